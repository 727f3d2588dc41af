"""What one device's noise is worth in a run, for people and for files."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from .accounting import NoiseWorth, apart_in_activations, apart_in_gradients

__all__ = ["NoiseReport", "visits_of"]


class NoiseSettings(Protocol):
    """What a run says of noise, as `NoiseReport.of` takes it."""

    @property
    def activation_noise(self) -> float: ...
    @property
    def gradient_noise(self) -> float: ...
    @property
    def labels(self) -> str: ...
    @property
    def noise_delta(self) -> float: ...


def visits_of(steps: int, num_samples: int, batch_size: int) -> int:
    """How often each of a device's samples is sent at most, in as many steps; each comes once an epoch."""
    return -(-steps // -(-num_samples // batch_size))


@dataclass(frozen=True, kw_only=True)
class NoiseReport:
    """
    What the noise of one device is worth: by what is sent with it, "activations", "gradients" at the hidden states with sums of
    losses, or "both together" where both have noise.
    """

    delta: float
    visits: int
    """How often each text is sent in the run."""
    longest: int
    """Rows of the longest text."""
    worth: dict[str, NoiseWorth]
    not_covered: tuple[str, ...]
    """What the same texts decide, and is sent as it is."""

    @classmethod
    def of(
        cls, *, activation_noise: float, gradient_noise: float, labels: str, delta: float, visits: int, longest: int
    ) -> "NoiseReport":
        """
        Args:
            activation_noise, gradient_noise: standard deviations in units of the clip; 0: none.
            labels: who has them, "server" or "device".
            delta, visits, longest: as the attributes.

        Raises:
            ImportError: dp-accounting is not installed.
        """
        apart: dict[str, Callable[[int], float]] = {}
        if activation_noise:
            apart["activations"] = partial(apart_in_activations, activation_noise)
        if gradient_noise:
            apart["gradients"] = partial(apart_in_gradients, gradient_noise)
        if len(apart) == 2:
            one, other = apart.values()
            apart["both together"] = lambda rows: math.hypot(one(rows), other(rows))
        open_to_all = []
        if not activation_noise:
            open_to_all.append("activations, which give the text back")
        if labels == "server":
            open_to_all.append("the labels, which the server reads")
        elif not gradient_noise:
            open_to_all.append("gradients at the hidden states, which name the labels")
        return cls(
            delta=delta,
            visits=visits,
            longest=longest,
            worth={name: NoiseWorth.of(each, visits=visits, longest=longest, delta=delta) for name, each in apart.items()},
            not_covered=(*open_to_all, "lengths and numbers of labels", "the adapter's gradients"),
        )

    @classmethod
    def in_run(
        cls, settings: NoiseSettings, *, steps: int, num_samples: int, batch_size: int, longest: int
    ) -> "NoiseReport | None":
        """
        None in a run without noise.

        Args:
            steps: in which the device takes part.
            num_samples, batch_size: of the device.
            longest: rows of its longest text.

        Raises:
            ImportError: dp-accounting is not installed.
        """
        if not (settings.activation_noise or settings.gradient_noise):
            return None
        return cls.of(
            activation_noise=settings.activation_noise,
            gradient_noise=settings.gradient_noise,
            labels=settings.labels,
            delta=settings.noise_delta,
            visits=visits_of(steps, num_samples, batch_size),
            longest=longest,
        )

    def as_json(self) -> dict[str, Any]:
        """The same, with null for an infinite epsilon."""
        worth = {
            name: {what: epsilon if math.isfinite(epsilon) else None for what, epsilon in vars(figures).items()}
            for name, figures in self.worth.items()
        }
        return {**asdict(self), "worth": worth, "not_covered": list(self.not_covered)}

    def __str__(self) -> str:
        visits = f"at its {self.visits} visits" if self.visits > 1 else "in the run"
        figures = "; ".join(
            f"{name}, a row sent once {_shown(each.row_once)}, a row {visits} {_shown(each.row)}, a text of "
            f"{self.longest} rows {_shown(each.text)}"
            for name, each in self.worth.items()
        )
        return (
            f"what its noise is worth, as epsilons at delta {self.delta:g}: {figures} (beyond 10 it promises next to nothing). "
            f"Not covered: {'; '.join(self.not_covered)}"
        )


def _shown(epsilon: float) -> str:
    return f"{epsilon:,.0f}" if 100 <= epsilon < math.inf else f"{epsilon:.3g}"
