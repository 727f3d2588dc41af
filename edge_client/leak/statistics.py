"""
How much of the truth is in guesses: of tokens, of rare tokens, of whole texts; and how far such a share may be off.

A unit is what an interval draws again: a text, or a micro-batch where that is what is guessed. The tokens of a text depend on
each other; texts do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protocol import Array

from .observation import Target

__all__ = ["Counts", "Estimate", "Ratio", "count", "guess_the_commonest", "rare_tokens"]

RESAMPLES = 2000
RARE_SHARE = 0.1
"""Rare are the least frequent tokens of a text file that together are at most this share of it."""


@dataclass(frozen=True)
class Estimate:
    """A value, and the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Ratio:
    """Sums over units, one divided by the other: such as tokens recovered, and all tokens."""

    above: Array
    """(U,)"""
    below: Array
    """(U,)"""

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())

    def estimate(self, seed: int, *, confidence: float = 0.95) -> Estimate | None:
        """
        With the bootstrap's percentile interval over units; None where there is nothing to count.

        Where all units have the same ratio the interval has no width: no sample of them shows how another could be.
        """
        if not self.below.sum():
            return None
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(self.below), size=(RESAMPLES, len(self.below)))
        above, below = self.above[drawn].sum(1), self.below[drawn].sum(1)
        ratios = above[below > 0] / below[below > 0]
        beyond = (1 - confidence) / 2
        low, high = np.quantile(ratios, [beyond, 1 - beyond])
        return Estimate(self.value, float(low), float(high))

    def of(self, units: Array) -> "Ratio":
        """Of some units: (U,) bool."""
        return Ratio(self.above[units], self.below[units])

    @staticmethod
    def joined(ratios: "Sequence[Ratio]") -> "Ratio":
        return Ratio(*(np.concatenate([getattr(ratio, name) for ratio in ratios]) for name in ("above", "below")))


@dataclass(frozen=True, eq=False)
class Counts:
    """What guesses have recovered of some units."""

    tokens: Ratio
    """Or of whatever else was guessed."""
    rare: Ratio
    """Of the rare tokens alone; of nothing where no tokens were guessed."""
    whole: Ratio
    """Units of which everything was recovered."""

    @staticmethod
    def joined(counts: "Sequence[Counts]") -> "Counts":
        return Counts(*(Ratio.joined([getattr(each, name) for each in counts]) for name in ("tokens", "rare", "whole")))


def rare_tokens(texts: Sequence[Array], vocabulary_size: int) -> Array:
    """(V,) bool: which tokens are rare in these texts; those that do not occur are, too."""
    counts = np.bincount(np.concatenate(texts), minlength=vocabulary_size)
    ascending = np.argsort(counts, kind="stable")
    is_rare: Array = np.zeros(vocabulary_size, bool)
    is_rare[ascending[np.cumsum(counts[ascending]) <= RARE_SHARE * counts.sum()]] = True
    return is_rare


def count(target: Target, truth: Sequence[Array], guesses: Sequence[Array], is_rare: Array) -> Counts:
    """
    Args:
        truth: as `observation.truth` gives it.
        guesses: as `Recovered` describes them. Of a bag, as many are counted as there are in the truth.
        is_rare: (V,) bool.
    """
    right, rare = [], []
    for true, guess in zip(truth, guesses, strict=True):
        if target is Target.BAG:
            right.append(np.isin(true, guess[: len(true)]))
        elif target is Target.LABEL_ROWS:
            right.append(true == (guess > 0.5))
        else:
            right.append(true == guess)
        has_tokens = target in (Target.TOKENS, Target.LABELS, Target.BAG)
        rare.append(is_rare[true] if has_tokens else np.zeros(len(true), bool))
    return Counts(
        _ratio([(hit.sum(), len(hit)) for hit in right]),
        _ratio([((hit & among).sum(), among.sum()) for hit, among in zip(right, rare, strict=True)]),
        _ratio([(int(hit.all()) if len(hit) else 0, int(len(hit) > 0)) for hit in right]),
    )


def _ratio(pairs: Sequence[tuple[int, int]]) -> Ratio:
    return Ratio(*np.array(pairs, np.int64).reshape(-1, 2).T)


def guess_the_commonest(target: Target, known: Sequence[Array], truth: Sequence[Array]) -> list[Array]:
    """
    What somebody guesses who sees nothing: always what is commonest.

    Args:
        known: truths of this target, of other texts, from which it is known what is common.
        truth: what is guessed; only how much of it there is counts.
    """
    values = np.concatenate(known).astype(np.int64)
    if target in (Target.ROWS, Target.LABELLED_TOKENS):
        numbers, times = np.unique(values, return_counts=True)
        return [np.full(len(true), numbers[times.argmax()]) for true in truth]
    ranking = np.argsort(-np.bincount(values), kind="stable")
    if target is Target.BAG:
        return [ranking[: len(true)] for true in truth]
    return [np.full(len(true), ranking[0]) for true in truth]
