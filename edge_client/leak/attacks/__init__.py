"""Attacks, a module each: from what is seen and known to guesses. None of them is given the texts."""

from .attack import Attack, Recovered
from .labels import LabelRows, LabelsFromGradient, LabelsRead

__all__ = ["ATTACKS", "Attack", "Recovered"]

ATTACKS: tuple[Attack, ...] = (LabelsRead(), LabelsFromGradient(), LabelRows())
