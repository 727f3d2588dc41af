"""
What sizes of frames tell somebody who sees nothing else, as an encrypted connection shows it. The server is told lengths and
label counts outright.
"""

from collections.abc import Callable

import numpy as np

from protocol import Array

from ..knowledge import Knowledge
from ..observation import Exchange, Observations, Setting, Target
from .attack import Recovered

__all__ = ["LabelsFromSizes", "RowsFromSizes"]


class _FromSizes:
    """A whole number of each micro-batch by the size of a frame, which grows with it in proportion, but for a constant."""

    name, channel, frame = "linear regression", "sizes of frames, to outsiders", ""
    target: Target

    def why_not(self, setting: Setting) -> str:
        return ""

    def run(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        true = np.array([self._true(exchange) for exchange in knowledge.own.exchanges], float)
        sizes = np.array([exchange.frame_bytes[self.frame] for exchange in knowledge.own.exchanges], float)
        spread = ((sizes - sizes.mean()) ** 2).sum()
        slope = ((sizes - sizes.mean()) * (true - true.mean())).sum() / spread if spread else 0.0
        return self._recovered(
            observations, lambda exchange: true.mean() + slope * (exchange.frame_bytes[self.frame] - sizes.mean())
        )

    def baseline(self, observations: Observations, knowledge: Knowledge, rng: np.random.Generator) -> Recovered:
        usual = float(np.median([self._true(exchange) for exchange in knowledge.own.exchanges]))
        return self._recovered(observations, lambda exchange: usual)

    def _recovered(self, observations: Observations, guess: Callable[[Exchange], float]) -> Recovered:
        guesses: list[Array] = [np.array([max(0, round(guess(exchange)))]) for exchange in observations.exchanges]
        return Recovered(target=self.target, guesses=guesses)

    def _true(self, exchange: Exchange) -> int:
        raise NotImplementedError


class RowsFromSizes(_FromSizes):
    """How many rows a micro-batch has, by the frame of its activations."""

    frame, target = "Activations", Target.ROWS

    def _true(self, exchange: Exchange) -> int:
        return len(exchange.activations)


class LabelsFromSizes(_FromSizes):
    """How many labels a micro-batch has, by the frame of their gradients; with hidden rows, by what zstd makes of these."""

    frame, target = "HiddenGradient", Target.LABELLED_TOKENS

    def why_not(self, setting: Setting) -> str:
        return "" if setting.labels == "device" else "no such frame where the server has the labels"

    def _true(self, exchange: Exchange) -> int:
        return exchange.labelled_tokens
