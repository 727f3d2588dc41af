"""A micro-batch in as many shares as there are ranks, and what they make of it put together again."""

from collections.abc import Mapping

import numpy

from protocol import Array, LabelledBatch

from .division import Work, divide

__all__ = ["Shares"]


class Shares:
    """
    Which sequences of each client's batch every rank computes. All clients are in every share, though perhaps with no sequence.

    Args:
        batches: by client, or by whatever else tells them apart.
        work: by which they are balanced.
    """

    def __init__(self, batches: Mapping[str, LabelledBatch], num_ranks: int, work: Work) -> None:
        lengths = [length for batch in batches.values() for length in batch.lengths.tolist()]
        label_counts = [number for batch in batches.values() for number in batch.label_counts.tolist()]
        ranks = numpy.array(divide(lengths, label_counts, num_ranks, work), numpy.int64)
        self._sequences: dict[str, Array] = {}
        """The rank of each of a client's sequences, (B,)."""
        for name, batch in batches.items():
            self._sequences[name], ranks = numpy.split(ranks, [len(batch.lengths)])
        self._rows = {name: numpy.repeat(self._sequences[name], batch.lengths) for name, batch in batches.items()}
        """The same of its rows, (N,)."""
        self._labelled = {name: numpy.repeat(self._sequences[name], batch.label_counts) for name, batch in batches.items()}
        """The same of its labelled rows, (M,)."""

    def of(self, rank: int, batches: Mapping[str, LabelledBatch]) -> dict[str, LabelledBatch]:
        """The rank's share of the batches, which are those that were divided."""
        return {
            name: LabelledBatch(
                lengths=batch.lengths[self._sequences[name] == rank],
                label_counts=batch.label_counts[self._sequences[name] == rank],
                labels=batch.labels[self._labelled[name] == rank] if len(batch.labels) else batch.labels,
                values=batch.values[self._rows[name] == rank],
            )
            for name, batch in batches.items()
        }

    def seeds_of(self, rank: int, seeds: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """Those of the rank's sequences."""
        return {
            name: [seed for seed, of in zip(of_client, self._sequences[name], strict=True) if of == rank]
            for name, of_client in seeds.items()
        }

    def labelled_of(self, rank: int, values: Mapping[str, Array]) -> dict[str, Array]:
        """Of values (M, d) of each client's labelled rows those of the rank's sequences."""
        return {name: rows[self._labelled[name] == rank] for name, rows in values.items()}

    def join_rows(self, parts: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
        """By client values (N, d), of what the ranks have for the rows of their sequences."""
        return _joined(self._rows, parts)

    def join_labelled(self, parts: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
        """The same of labelled rows, (M, d)."""
        return _joined(self._labelled, parts)


def _joined(ranks: Mapping[str, Array], parts: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
    """
    Args:
        ranks: by client, of which rank each of its rows is.
        parts: by rank and client; all ranks have the same clients.
    """
    joined: dict[str, Array] = {}
    for rank, of_rank in parts.items():
        for name, rows in of_rank.items():
            if name not in joined:
                joined[name] = numpy.empty((len(ranks[name]), *rows.shape[1:]), rows.dtype)
            joined[name][ranks[name] == rank] = rows
    return joined
