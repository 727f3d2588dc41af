"""Which rank computes which sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

from split_model import ModelConfig

__all__ = ["Work", "divide"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """
    What a sequence costs the server's part, forward and back, in multiply-adds: so much for each row, for each pair of rows
    and for each label. Products with frozen weights are computed once in each direction, attention's once more in the second.
    """

    row: int
    pair: int
    label: int

    @classmethod
    def of(cls, config: ModelConfig, cut_layer: int, *, with_head: bool) -> "Work":
        """
        Args:
            with_head: whether the server computes the loss.
        """
        num_blocks = config.num_layers - cut_layer
        return cls(
            row=2 * num_blocks * sum(inputs * outputs for inputs, outputs in config.layer_shapes.values()),
            pair=3 * num_blocks * 2 * config.query_width,
            label=2 * config.vocabulary_size * config.width if with_head else 0,
        )

    def of_sequence(self, length: int, label_count: int) -> int:
        return self.row * length + self.pair * length**2 + self.label * label_count


def divide(lengths: Sequence[int], label_counts: Sequence[int], num_ranks: int, work: Work) -> list[int]:
    """
    The rank of every sequence of a micro-batch: the largest are dealt first, each to the rank that has least to do (Graham's
    longest processing time, 1969, which is at most a third above the best possible). Of equals the first comes first.

    Args:
        lengths: rows of each sequence.
        label_counts: how many of them have a label.
    """
    costs = [work.of_sequence(*sequence) for sequence in zip(lengths, label_counts, strict=True)]
    loads, ranks = [0] * num_ranks, [0] * len(costs)
    for sequence in sorted(range(len(costs)), key=lambda number: -costs[number]):
        rank = loads.index(min(loads))
        ranks[sequence] = rank
        loads[rank] += costs[sequence]
    return ranks
