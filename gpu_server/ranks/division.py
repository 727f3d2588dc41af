"""Which rank computes which sequence."""

from collections.abc import Sequence

__all__ = ["divide"]


def divide(lengths: Sequence[int], label_counts: Sequence[int], ranks: int) -> list[int]:
    """
    The rank of every sequence of a micro-batch.

    Args:
        lengths: rows of each sequence.
        label_counts: how many of them have a label.
        ranks: how many there are.
    """
    work = [0] * ranks
    chosen = [0] * len(lengths)
    for sequence in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        chosen[sequence] = min(range(ranks), key=lambda rank: (work[rank], rank))
        work[chosen[sequence]] += lengths[sequence]
    return chosen
