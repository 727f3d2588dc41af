"""
What noise is worth: (epsilon, delta) of differential privacy, and of what exactly.

Two inputs that differ in one row, whatever either row is, cannot be told apart by more than (epsilon, delta) from what was
sent of them. Rows are clipped to C, so two of them are at most 2 C apart, and noise of ``sigma`` C is sigma / 2 times that.
What is sent of the row again, at each of its visits, and of the other rows of its text, if all of them differ, are further
Gaussian mechanisms. Their composition is one with less noise, exactly so (Dong, Roth and Su, 2022, corollary 3.3), also where
each depends on what was sent before; its epsilon has a closed form (Balle and Wang, 2018), which `dp_accounting` solves. Its
accountants of Renyi divergences and of privacy loss distributions give a little more for the same mechanism.

Beside gradients at the hidden states a device sends the sum of a micro-batch's losses, each between 0 and a cap, with noise of
``sigma`` times the cap. Another label moves the sum by one cap at most, other labels in all rows of a text by as many caps.

Nothing is gained by sampling: batches are shuffled, so that every row comes once an epoch, while the theorems on sampling ask
for draws that are independent.

What the figures do not cover:

- A token of a text changes the activations of its own row and of all rows behind it. So for activations a figure of one row
  says nothing of a token; that of a text does. Of gradients at the hidden states, a label changes one row.
- Lengths, label counts, and the edge adapter's gradients or matrices are sent without noise.
- A server that breaks the rules: one that sends a device back to a step (`protocol.Start`) with another adapter gets further
  releases, as often as it likes.
- Steps that are done again with another adapter, after a restart in which a device was missing, are further visits.
- Held-out texts are sent with the noise of activations, before and after training, as often as their loss is asked.
- They hold for whoever cannot tell SHAKE-256 from chance, and for real numbers: see `privacy.noise`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["NoiseWorth", "apart_in_activations", "apart_in_gradients", "worth"]

MOST_DISTANCE = 1e6
"""In units of the noise. Epsilons of more, beyond 5e11, are called infinite."""


def worth(sigma: float, releases: int, delta: float, rows: int = 1) -> float:
    """
    Epsilon of ``rows`` rows, replaced by any others, each of which was sent ``releases`` times.

    Args:
        sigma: the noise's standard deviation in units of the clip; 0: no noise, and an infinite epsilon.
        delta: between 0 and 1.

    Raises:
        ImportError: dp-accounting is not installed.
    """
    return _epsilon(math.sqrt(releases) * apart_in_activations(sigma, rows), delta) if sigma else math.inf


def apart_in_activations(sigma: float, rows: int) -> float:
    """
    The distance, in units of the noise, of what is sent once of ``rows`` rows from what may be sent of others.

    Those of several releases add up as sides of a right triangle do.
    """
    return math.sqrt(rows) * 2 / sigma


def apart_in_gradients(sigma: float, rows: int) -> float:
    """The same of gradients at the hidden states, and of the sum of losses that is sent with them."""
    return math.hypot(math.sqrt(rows) * 2, rows) / sigma


def _epsilon(distance: float, delta: float) -> float:
    """Of a Gaussian mechanism by which two inputs are this far apart in units of its noise."""
    import dp_accounting  # takes most of a second, and devices need not have it

    if distance < delta:
        return 0.0  # the two are told apart with a probability of less than delta
    if distance > MOST_DISTANCE:
        return math.inf
    return float(dp_accounting.get_epsilon_gaussian(1 / distance, delta))


@dataclass(frozen=True, kw_only=True)
class NoiseWorth:
    """The epsilons of what one device sends in a run, all at one delta."""

    row_once: float
    """A row, sent once."""
    row: float
    """A row at all its visits in the run."""
    text: float
    """All rows of the longest text at all its visits; no other text's is larger."""

    @classmethod
    def of(cls, apart: Callable[[int], float], *, visits: int, longest: int, delta: float) -> "NoiseWorth":
        """
        Args:
            apart: the distance of so many rows, sent once; see `apart_in_activations`.
            visits: how often each text is sent in the run.
            longest: rows of the longest text.
        """
        releases_and_rows = {"row_once": (1, 1), "row": (visits, 1), "text": (visits, longest)}
        return cls(
            **{name: _epsilon(math.sqrt(times) * apart(rows), delta) for name, (times, rows) in releases_and_rows.items()}
        )
