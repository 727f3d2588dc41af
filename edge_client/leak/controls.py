"""
Whether the meter can be believed: it must find a leak that was planted, as large as it is, and find nothing where nothing is.

The planted leak: some texts cross as they are, and all that crosses of the others is drowned in noise. The reading over all of
them must be the share that was planted. The opposite: guesses of one measurement against true tokens in a shuffled order. No
guess can be right more often than the commonest token is there, however it was made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from protocol import Array

from .observation import Exchange, Observations, Target
from .statistics import Counts, Estimate, Ratio, count, guess_the_commonest

__all__ = ["Planted", "Shuffled", "masked", "planted", "planted_texts", "shuffled"]

DOSE = 0.2
"""Of the texts of a planted leak, the share that crosses as it is."""
DROWNING = 100.0
"""Norm of a row of noise that drowns, in those of the row under it."""
CONFIDENCE = 0.99
SHUFFLES = 20
MOST_STANDARD_ERRORS = 4.0


def planted_texts(number: int, rng: np.random.Generator) -> Array:
    """(number,) bool: which texts are planted, at least one, and not all."""
    chosen: Array = np.zeros(number, bool)
    chosen[rng.permutation(number)[: max(1, round(DOSE * number))]] = True
    return chosen


def masked(observations: Observations, kept: Array, rng: np.random.Generator) -> Observations:
    """
    The same texts seen through noise in which nothing can be found, except for some.

    Args:
        observations: of micro-batches of one text.
        kept: (U,) bool: texts of which everything crosses as it is.
    """
    exchanges = tuple(
        exchange if keep else _drowned(exchange, rng)
        for exchange, keep in zip(observations.exchanges, kept.tolist(), strict=True)
    )
    return replace(observations, exchanges=exchanges)


def _drowned(exchange: Exchange, rng: np.random.Generator) -> Exchange:
    def noise(values: Array) -> Array:
        # Around nothing, not around the values: what a codec or a clip may have left of them is gone as well.
        scale = DROWNING * np.linalg.norm(values) / max(1.0, values.size**0.5)
        drowned: Array = (scale * rng.standard_normal(values.shape)).astype(values.dtype)
        return drowned

    gradient, labels = exchange.hidden_gradient, exchange.labels
    return replace(
        exchange,
        activations=noise(exchange.activations),
        hidden_states=noise(exchange.hidden_states),
        hidden_gradient=None if gradient is None else noise(gradient),
        activation_gradient=noise(exchange.activation_gradient),
        adapter_gradient={name: noise(value) for name, value in exchange.adapter_gradient.items()},
        labels=None if labels is None else np.zeros_like(labels),
        frame_bytes={kind: int(size * rng.uniform(0.2, 5)) for kind, size in exchange.frame_bytes.items()},
    )


@dataclass(frozen=True)
class Planted:
    """What was found of a planted leak."""

    dose: float
    """The share of tokens that was planted."""
    least: float
    """What must be found: the dose, times what the attack recovers where nothing is masked."""
    most: float
    """The dose, and what is guessed right of the rest without seeing it."""
    found: Estimate
    among_planted: float
    """What was found of the planted texts alone."""

    @property
    def passed(self) -> bool:
        return self.found.low <= self.most and self.found.high >= self.least


def planted(counts: Counts, kept: Array, *, open_reading: Estimate, guess: float, seed: int) -> Planted:
    """
    Args:
        counts: of an attack on what `masked` has left.
        kept: (U,) bool.
        open_reading: what the attack recovers where nothing is masked.
        guess: what is right among guesses of the commonest.
    """
    tokens = counts.tokens
    found = tokens.estimate(seed, confidence=CONFIDENCE)
    assert found is not None
    dose = float(tokens.below[kept].sum() / tokens.below.sum())
    return Planted(
        dose=dose,
        least=dose * open_reading.low,
        most=dose + (1 - dose) * guess,
        found=found,
        among_planted=tokens.of(kept).value,
    )


@dataclass(frozen=True)
class Shuffled:
    """What guesses have in common with a shuffled truth."""

    reading: float
    guess: float
    """What is right there among guesses of the commonest: no guess made without the shuffled truth can expect more."""
    standard_error: float

    @property
    def passed(self) -> bool:
        return self.reading <= self.guess + MOST_STANDARD_ERRORS * self.standard_error


def shuffled(
    target: Target, truth: Sequence[Array], guesses: Sequence[Array], is_rare: Array, rng: np.random.Generator
) -> Shuffled:
    """The arguments are those of `count`; the truth is shuffled over all positions of all units, several times."""
    readings: list[Ratio] = []
    commonest: list[Ratio] = []
    for _ in range(SHUFFLES):
        pool = rng.permutation(np.concatenate(truth))
        shuffle = np.split(pool, np.cumsum([len(true) for true in truth])[:-1])
        readings.append(count(target, shuffle, guesses, is_rare).tokens)
        commonest.append(count(target, shuffle, guess_the_commonest(target, shuffle, shuffle), is_rare).tokens)
    reading, guess = Ratio.joined(readings).value, Ratio.joined(commonest).value
    number = sum(int(ratio.below.sum()) for ratio in readings)
    return Shuffled(reading, guess, float((max(guess * (1 - guess), 1 / number) / number) ** 0.5))
