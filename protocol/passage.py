"""
The passage of LoRA matrices between devices and server, in the codec `DITHERED`.

A device sends its gradient, or what its matrices have changed since the round began, with noise that the server subtracts: the
error has a mean of zero, and nobody keeps anything of it. The server sends what the adapter has changed since the round began,
rounded to the nearest, and goes on itself from what it has sent: so both sides have the same adapter, to the bit. What the
rounding has left out it *owes*, and adds to the next change (error feedback, 1-bit SGD of Seide et al. 2014): nothing is lost,
and errors do not add up.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from .codecs import Coded
from .errors import TrainingDiverged
from .messages import Array, Contribution, Tensors
from .rounding import Dither
from .settings import COARSE, DELTA, RunSettings

__all__ = ["changed_by", "changes", "coded_contribution", "coded_update"]

CODES_OF_THE_RMS = {"int8": (8.0, 4.0), COARSE: (3.0, 1.0), DELTA: (3.0, 1.0)}
"""
In rounds of one step, where the passage is a large part of what crosses the link: how many codes the root mean square of a
block is, of what a device sends and of what the server sends, beside each codec of activations. What is sent down may be
coarser, for its error is owed; but codes of twice the root mean square would never send anything where all elements are alike.
"""
NEARLY_EXACT = (8.0, 8.0)
"""In longer rounds, and beside richer codecs."""

Sent = TypeVar("Sent", bound=Contribution)


def coded_contribution(message: Sent, settings: RunSettings, dither: Dither) -> Sent:
    """
    A device's message as it travels.

    Raises:
        TrainingDiverged: its numbers are not finite.
    """
    codes, _ = _codes_of_the_rms(settings)
    coded = {name: Coded.dithered(_finite(name, matrix), codes, dither) for name, matrix in message.tensors.items()}
    return replace(message, tensors=coded)  # type: ignore[arg-type]  # as it is on the wire


def coded_update(before: Tensors, wanted: Tensors, settings: RunSettings) -> tuple[dict[str, Coded], Tensors, Tensors]:
    """
    What the server sends at a round's end, what everybody has then, and what it owes.

    Args:
        before: the matrices that everybody has.
        wanted: those that everybody should have, with what was owed.
    """
    _, codes = _codes_of_the_rms(settings)
    change = {name: Coded.dithered(matrix, codes) for name, matrix in changes(wanted, before).items()}
    shared = changed_by(before, {name: coded.decode() for name, coded in change.items()})
    return change, shared, changes(wanted, shared)


def changed_by(before: Tensors, change: Mapping[str, Array]) -> Tensors:
    """The matrices after a change, float32, on both sides the same."""
    return {name: matrix + change[name] for name, matrix in before.items()}


def changes(later: Tensors, earlier: Tensors) -> Tensors:
    """By matrix."""
    return {name: matrix - earlier[name] for name, matrix in later.items()}


def _codes_of_the_rms(settings: RunSettings) -> tuple[float, float]:
    """Of what a device sends, and of what the server sends."""
    if settings.aggregate_every > 1:
        return NEARLY_EXACT
    return CODES_OF_THE_RMS.get(settings.activation_codec, NEARLY_EXACT)


def _finite(name: str, matrix: Array) -> Array:
    if not np.isfinite(matrix).all():
        raise TrainingDiverged(f"this device's {name} is no longer finite; try a lower --lr on the server")
    return matrix
