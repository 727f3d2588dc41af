"""What all attacks have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from protocol import Array

from ..knowledge import Knowledge
from ..observation import Observations, Setting, Target

__all__ = ["Attack", "Recovered"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recovered:
    """The guesses of an attack."""

    target: Target
    guesses: Sequence[Array]
    """
    TOKENS and LABELS: of each sequence, a token for every row (T,); NO_TOKEN where there is no label, or no guess.
    LABEL_ROWS: of each sequence, for every row (T,) the probability that it has a label. BAG: of each micro-batch, different
    tokens, the surest first. ROWS and LABELLED_TOKENS: of each micro-batch, a number (1,).
    """


class Attack(Protocol):
    """An attack on one channel."""

    @property
    def name(self) -> str:
        """In a table's words."""

    @property
    def channel(self) -> str:
        """What it looks at, in a table's words."""

    @property
    def target(self) -> Target:
        """What it guesses."""

    def why_not(self, setting: Setting) -> str:
        """Why there is nothing to be attacked under this setting; empty: there is."""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        """Guess. All chance comes from ``rng``."""

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        """What would be guessed of texts of this kind, and of these lengths, if the channel said nothing."""
