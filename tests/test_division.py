"""Sequences are dealt to ranks: each to one, evenly by what they cost, and always alike."""

import random
from pathlib import Path

import numpy as np
import pytest

from gpu_server.ranks.division import Work, divide
from gpu_server.ranks.shares import Shares
from protocol import LabelledBatch
from split_model import PretrainedModel

WORK = Work(row=1000, pair=3, label=5000)


def sequences(seed: int, number: int) -> tuple[list[int], list[int]]:
    """Lengths, and how many rows of each have a label."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 200) for _ in range(number)]
    return lengths, [draw.randint(0, length) for length in lengths]


def loads(ranks: list[int], lengths: list[int], label_counts: list[int], num_ranks: int) -> list[int]:
    summed = [0] * num_ranks
    for rank, length, label_count in zip(ranks, lengths, label_counts, strict=True):
        summed[rank] += WORK.of_sequence(length, label_count)
    return summed


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [0, 1, 2, 7, 64, 500])
def test_no_rank_has_a_third_more_to_do_than_the_best_division_would_leave_it(number: int, num_ranks: int) -> None:
    lengths, label_counts = sequences(number, number)
    ranks = divide(lengths, label_counts, num_ranks, WORK)
    assert len(ranks) == number
    assert set(ranks) <= set(range(num_ranks))
    costs = [WORK.of_sequence(*sequence) for sequence in zip(lengths, label_counts, strict=True)]
    no_division_is_better = max([sum(costs) / num_ranks, *costs])
    assert max(loads(ranks, lengths, label_counts, num_ranks)) <= 4 / 3 * no_division_is_better


def test_many_sequences_are_divided_within_a_hundredth() -> None:
    lengths, label_counts = sequences(1, 512)
    summed = loads(divide(lengths, label_counts, 4, WORK), lengths, label_counts, 4)
    assert max(summed) < 1.01 * min(summed)


def test_rows_alone_would_not_balance_what_sequences_cost() -> None:
    """One of 90 rows costs more than ten of nine where pairs of rows dominate; rows with a label more than others."""
    of_pairs = Work(row=0, pair=1, label=0)
    assert divide([90, *[9] * 10], [0] * 11, 2, of_pairs) == [0, *[1] * 10]
    of_labels = Work(row=1, pair=0, label=100)
    assert divide([10, 10, 10, 10], [10, 0, 0, 10], 2, of_labels) == [0, 0, 1, 1]


def test_the_same_sequences_are_divided_alike_and_of_equals_the_first_comes_first() -> None:
    assert divide([5] * 6, [1] * 6, 3, WORK) == [0, 1, 2, 0, 1, 2]
    lengths, label_counts = sequences(3, 100)
    assert divide(lengths, label_counts, 3, WORK) == divide(list(lengths), list(label_counts), 3, WORK)


def test_work_counts_the_products_of_a_model(tiny_model: Path) -> None:
    config = PretrainedModel(tiny_model).config
    blocks, width = config.num_layers - 1, config.width
    with_head, without = (Work.of(config, 1, with_head=answer) for answer in (True, False))
    # Attention's and the inner layers' matrices of a GPT-2 block have 12 d^2 elements.
    assert without == Work(row=2 * blocks * 12 * width**2, pair=6 * blocks * width, label=0)
    assert with_head.label == 2 * config.vocabulary_size * width
    assert (with_head.row, with_head.pair) == (without.row, without.pair)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_shares_put_together_are_what_was_divided(num_ranks: int) -> None:
    batches, seeds = {}, {}
    for client, number in {"b": 7, "a": 1, "c": 0}.items():
        lengths, label_counts = sequences(ord(client), number)
        batches[client] = LabelledBatch(
            lengths=np.array(lengths, np.int32),
            label_counts=np.array(label_counts, np.int32),
            labels=np.arange(sum(label_counts), dtype=np.int32),
            values=np.arange(3 * sum(lengths), dtype=np.float64).reshape(-1, 3),
        )
        seeds[client] = list(range(number))
    shares = Shares(batches, num_ranks, WORK)
    of_ranks = {rank: shares.of(rank, batches) for rank in range(num_ranks)}
    assert all(list(share) == list(batches) for share in of_ranks.values())
    values = shares.join_rows({rank: {c: batch.values for c, batch in share.items()} for rank, share in of_ranks.items()})
    labels = shares.join_labelled({rank: {c: batch.labels for c, batch in share.items()} for rank, share in of_ranks.items()})
    for client, batch in batches.items():
        np.testing.assert_array_equal(values[client], batch.values)
        np.testing.assert_array_equal(labels[client], batch.labels)
        dealt = [seed for rank in range(num_ranks) for seed in shares.seeds_of(rank, seeds)[client]]
        assert sorted(dealt) == seeds[client]
        assert sum(len(shares.seeds_of(rank, seeds)[client]) for rank in range(num_ranks)) == len(batch.lengths)
