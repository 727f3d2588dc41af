"""
What noise is worth: (epsilon, delta) of differential privacy, and of what exactly.

Two inputs that differ in one row, whatever either row is, cannot be told apart by more than (epsilon, delta) from what was
sent of them. Rows are clipped to C, so two of them are at most 2 C apart, and noise of ``sigma`` C is sigma / 2 times that.
What is sent of the row again, at each of its visits, and of the other rows of its text, if all of them differ, are further
Gaussian mechanisms. Their composition is one with less noise, exactly so (Dong, Roth and Su, 2022, corollary 3.3), also where
each depends on what was sent before; its epsilon has a closed form (Balle and Wang, 2018), which `dp_accounting` solves. Its
accountants of Renyi divergences and of privacy loss distributions give a little more for the same mechanism.

Nothing is gained by sampling: batches are shuffled, so that every row comes once an epoch, while the theorems on sampling ask
for draws that are independent.

What the figures do not cover:

- A token of a text changes the activations of its own row and of all rows behind it. So for activations a figure of one row
  says nothing of a token; that of a text does. Of gradients at the hidden states, a label changes one row.
- Lengths, label counts, sums of losses, and the edge adapter's gradients or matrices are sent without noise.
- Steps that are done again with another adapter, after a restart in which a device was missing, are further visits.
- Held-out texts are sent with the noise of activations, before and after training, as often as their loss is asked.
- They hold for whoever cannot tell SHAKE-256 from chance, and for real numbers: see `privacy.noise`.
"""

import math
from dataclasses import dataclass

__all__ = ["NoiseWorth", "worth"]

LEAST_NOISE = 1e-6
"""In units of the distance that it is to hide. An epsilon of less, 5e11 and more, is a way of saying infinite."""


def worth(sigma: float, releases: int, delta: float, rows: int = 1) -> float:
    """
    Epsilon of ``rows`` rows, replaced by any others, each of which was sent ``releases`` times.

    Args:
        sigma: the noise's standard deviation in units of the clip; 0: no noise, and an infinite epsilon.
        delta: between 0 and 1.

    Raises:
        ImportError: dp-accounting is not installed.
    """
    import dp_accounting  # takes most of a second, and devices need not have it

    noise = sigma / (2 * math.sqrt(releases * rows))
    if noise < LEAST_NOISE:
        return math.inf
    if noise * delta > 1:
        return 0.0  # the two are told apart with a probability of less than delta
    return float(dp_accounting.get_epsilon_gaussian(noise, delta))


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
    def of(cls, sigma: float, *, visits: int, longest: int, delta: float) -> "NoiseWorth":
        """
        Args:
            visits: how often each text is sent in the run.
            longest: rows of the longest text.
        """
        return cls(
            row_once=worth(sigma, 1, delta), row=worth(sigma, visits, delta), text=worth(sigma, visits, delta, rows=longest)
        )
