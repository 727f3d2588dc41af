"""Attacks, a module each: from what is seen and known to guesses. None of them is given the texts."""

from .activations_exact import SearchedActivations
from .adapter_gradient import BagFromAdapterGradient
from .attack import Attack, Recovered
from .labels import LabelRows, LabelsFromGradient, LabelsRead
from .linear_inversion import InvertedActivations, InvertedGradients
from .sizes import LabelsFromSizes, RowsFromSizes

__all__ = ["ATTACKS", "Attack", "Recovered"]

ATTACKS: tuple[Attack, ...] = (
    SearchedActivations(),
    SearchedActivations(with_gradients=True),
    InvertedActivations(),
    LabelsRead(),
    LabelsFromGradient(),
    LabelRows(),
    InvertedGradients(),
    BagFromAdapterGradient(),
    RowsFromSizes(),
    LabelsFromSizes(),
)
