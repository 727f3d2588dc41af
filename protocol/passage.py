"""
The passage of LoRA matrices between devices and server, in the codec `LORA4`.

A device sends its gradient, or what its matrices have changed since the round began, rounded up or down at random: the error
has a mean of zero, and nobody keeps anything of it. The server sends what the adapter has changed since the round began,
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
from .messages import AdapterGradient, Array, Contribution, EdgeAdapter, Tensors
from .rounding import Dither
from .settings import RunSettings

__all__ = ["changed_by", "changes", "coded_contribution", "coded_update"]

COARSE = {AdapterGradient: 0.67, EdgeAdapter: 0.57}
"""
How many codes the root mean square of a row is, in rounds of one step beside int4. For what the server sends more than a half:
of a row whose elements are all alike something is sent then, and what is owed shrinks, whatever the row.
"""
ALL_CODES = 1e9
"""As fine as four bits allow."""

Sent = TypeVar("Sent", bound=Contribution)


def coded_contribution(message: Sent, settings: RunSettings, dither: Dither) -> Sent:
    """
    A device's message as it travels.

    Raises:
        TrainingDiverged: its numbers are not finite.
    """
    codes = _codes_of_the_rms(type(message), settings)
    coded = {name: Coded.of_matrix(_finite(name, matrix), codes, dither) for name, matrix in message.tensors.items()}
    return replace(message, tensors=coded)  # type: ignore[arg-type]  # as it is on the wire


def coded_update(before: Tensors, wanted: Tensors, settings: RunSettings) -> tuple[dict[str, Coded], Tensors, Tensors]:
    """
    What the server sends at a round's end, what everybody has then, and what it owes.

    Args:
        before: the matrices that everybody has.
        wanted: those that everybody should have, with what was owed.
    """
    codes = _codes_of_the_rms(EdgeAdapter, settings)
    change = {name: Coded.of_matrix(matrix, codes) for name, matrix in changes(wanted, before).items()}
    shared = changed_by(before, {name: coded.decode() for name, coded in change.items()})
    return change, shared, changes(wanted, shared)


def changed_by(before: Tensors, change: Mapping[str, Array]) -> Tensors:
    """The matrices after a change, float32, on both sides the same."""
    return {name: matrix + change[name] for name, matrix in before.items()}


def changes(later: Tensors, earlier: Tensors) -> Tensors:
    """By matrix."""
    return {name: matrix - earlier[name] for name, matrix in later.items()}


def _codes_of_the_rms(kind: type, settings: RunSettings) -> float:
    """Few where the passage is the larger part of what crosses the link: codes are then mostly zero, and take a bit or two."""
    is_coarse = settings.aggregate_every == 1 and settings.gradient_codec == "int4"
    return COARSE[kind] if is_coarse else ALL_CODES


def _finite(name: str, matrix: Array) -> Array:
    if not np.isfinite(matrix).all():
        raise TrainingDiverged(f"this device's {name} is no longer finite; try a lower --lr on the server")
    return matrix
