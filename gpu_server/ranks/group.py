"""The processes that compute together, and what they add up."""

from collections.abc import Iterable
from typing import Protocol

from torch import nn

__all__ = ["Alone", "Ranks"]


class Ranks(Protocol):
    """
    What each of the processes asks of all together. All of them ask for the same, in the same order: whatever decides what is
    asked next must itself have been added up.
    """

    def sum_numbers(self, numbers: list[float]) -> list[float]:
        """Of every process' numbers the sums, in float64."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all gradients of each parameter; one that has none counts as zeros."""


class Alone:
    """One process, whose sums are what it has."""

    def sum_numbers(self, numbers: list[float]) -> list[float]:
        return numbers

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pass
