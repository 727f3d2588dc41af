"""What of this device's texts leaves it, by the run's settings; and what its user demands of these."""

from dataclasses import dataclass

import numpy as np

from privacy import Centre, GaussianNoise
from protocol import Array, RunSettings

from .data import Batch

__all__ = ["LOSS_CAP", "Demands", "Disclosure", "TooMuchDisclosed"]

LOSS_CAP = 20.0
"""Nats that a label may add to a sum of losses with noise; a uniform guess of 50,257 tokens loses 10.8."""


class TooMuchDisclosed(ValueError):
    """The run takes more of this device than its user allows."""


@dataclass(frozen=True)
class Demands:
    """The least that a run has to keep from the server, for this device to take part in it."""

    labels: str = "server"
    """Where the labels may be: "device", on this device alone; "server", on the server as well."""
    activation_noise: float = 0.0
    """See `RunSettings`, as of the next."""
    gradient_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.labels not in ("server", "device"):
            raise ValueError(f"labels must be server or device, got {self.labels!r}")
        for name in ("activation_noise", "gradient_noise"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                raise ValueError(f"{name.replace('_', '-')} must be at least 0, got {value}")

    def check(self, settings: RunSettings, run: str) -> None:
        """
        Raises:
            TooMuchDisclosed: the run does not keep to them.
        """
        if self.labels == "device" and settings.labels != "device":
            raise TooMuchDisclosed(
                f"run {run} sends the labels, the token ids of what is learnt, to the server, and --labels device forbids it; "
                "start the server with --labels device"
            )
        for kind, what in (("activation", "activations"), ("gradient", "gradients at the hidden states")):
            demanded, has = getattr(self, f"{kind}_noise"), getattr(settings, f"{kind}_noise")
            if has < demanded:
                raise TooMuchDisclosed(
                    f"run {run} puts {f'noise of {has:g} times the clip' if has else 'no noise'} on {what}, and this device "
                    f"demands --{kind}-noise {demanded:g}; start the server with that much and --{kind}-clip"
                )


class Disclosure:
    """
    What the server gets to see of a batch.

    N rows of a batch, M of them with a label, R rows that the server answers with hidden states: the M, or all N in runs that
    hide which rows have a label.

    Args:
        secret: of this device's noise; None in runs without any.
        centre: of activations, where they are clipped.
    """

    def __init__(self, settings: RunSettings, secret: bytes | None = None, centre: Centre | None = None) -> None:
        self._settings, self._centre = settings, centre
        self._noise = {
            kind: GaussianNoise(secret or b"", sigma=getattr(settings, f"{kind}_noise"), clip=clip)
            for kind in ("activation", "gradient")
            if (clip := getattr(settings, f"{kind}_clip"))
        }
        if settings.gradient_noise:
            # Beside a gradient with noise an exact loss would tell of the labels what the noise is to hide.
            self._noise["loss"] = GaussianNoise(secret or b"", sigma=settings.gradient_noise, clip=LOSS_CAP)

    def labels(self, batch: Batch) -> Array:
        """(M,), or (0,) where they stay on this device."""
        return batch.labels if self._settings.labels == "server" else batch.labels[:0]

    def label_counts(self, batch: Batch) -> Array:
        """(B,) how many of each sequence's last rows the server has to answer; their sum is R."""
        return batch.lengths if self._settings.label_rows == "hidden" else batch.label_counts

    def activations(self, values: Array, batch: Batch, *purpose: int | str) -> Array:
        """
        Activations (N, d) as they may leave this device.

        Args:
            purpose: what they are sent for; see `GaussianNoise`.
        """
        if "activation" not in self._noise:
            return values
        centre = None if self._centre is None else self._centre.rows(batch.lengths)
        return self._noise["activation"](values, ("activations", *purpose), centre)

    def gradient(self, values: Array, *purpose: int | str) -> Array:
        """The gradient at the hidden states (R, d) as it may leave this device."""
        return self._noise["gradient"](values, ("gradient", *purpose)) if "gradient" in self._noise else values

    def summed_loss(self, losses: Array, *purpose: int | str) -> float:
        """
        The sum of a micro-batch's losses as it may leave this device, in nats; with noise it may be negative.

        Args:
            losses: (M,) nats, of each label.
        """
        if "loss" not in self._noise:
            return float(np.sum(losses, dtype=np.float64))
        summed = np.sum(np.minimum(losses, LOSS_CAP), dtype=np.float64).reshape(1, 1)
        return float(self._noise["loss"].on_bounded(summed, ("loss", *purpose)).item())

    def of_labelled_rows(self, states: Array, batch: Batch) -> Array:
        """What the server answers, (R, d), without the rows that have no label: (M, d)."""
        return states[self._has_label(batch)]

    def of_all_rows(self, gradient: Array, batch: Batch) -> Array:
        """A gradient by the labelled rows, (M, d), with zeros for the other rows that the server has answered: (R, d)."""
        has_label = self._has_label(batch)
        values = np.zeros((len(has_label), gradient.shape[1]), gradient.dtype)
        values[has_label] = gradient
        return values

    def _has_label(self, batch: Batch) -> Array:
        """(R,) bool."""
        counts = self.label_counts(batch)
        ends = np.cumsum(counts, dtype=np.int64)
        first_labels = np.repeat(ends - batch.label_counts, counts)
        has_label: Array = np.arange(len(first_labels)) >= first_labels
        return has_label

    def __str__(self) -> str:
        """A sentence for the user."""
        activations = f"activations ({self._described('activation')})"
        if self._settings.labels == "server":
            return f"this device sends {activations}, and the labels as token ids"
        gradients = f"gradients at the hidden states ({self._described('gradient')})"
        return f"this device keeps the labels, and sends {activations} and {gradients}"

    def _described(self, kind: str) -> str:
        clip, noise = (getattr(self._settings, f"{kind}_{what}") for what in ("clip", "noise"))
        described = f"noise {noise:g} times that" if noise else "no noise"
        return f"clipped to {clip:g}, {described}" if clip else described
