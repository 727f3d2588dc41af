"""Gradients of activations and of hidden states in the codec `DITHERED`: one unit for all of a message."""

from dataclasses import replace
from typing import TypeVar

from .codecs import Coded
from .messages import ActivationGradient, HiddenGradient
from .rounding import Dither
from .settings import COARSE, DELTA

__all__ = ["coded_gradient"]

CODES_OF_THE_RMS = {"int8": 8.0, COARSE: 0.85, DELTA: 0.85}
"""How many codes the root mean square of a message is, by the codec in which activations travel meanwhile."""

Sent = TypeVar("Sent", bound=ActivationGradient | HiddenGradient)


def coded_gradient(message: Sent, codec: str, dither: Dither | None) -> Sent:
    """
    A message as it travels. What adapters learn of is a sum over its rows, in which the errors of all count alike: rows with
    small gradients need no smaller unit.

    Args:
        codec: of activations.
    """
    coded = Coded.dithered(message.values, CODES_OF_THE_RMS[codec], dither, has_one_unit=True)
    return replace(message, values=coded)  # type: ignore[arg-type]  # as it is on the wire
