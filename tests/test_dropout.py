"""The masks of dropout: a device's, which both of its engines use, and those of the server's part."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_client.dropout import dropout_masks
from split_model.dropout import SeededDropout, row_keys
from split_model.packing import Packing

PINNED = [[[0, 1, 1], [1, 1, 1]], [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]


def test_masks_are_a_function_of_seed_and_block_alone() -> None:
    """The numbers themselves: they must not change with a version of numpy, or a run that goes on would be another one."""
    first = dropout_masks(7, 0, 0.25, 2, [3, 5])
    assert [mask.tolist() for mask in first] == PINNED
    assert all(np.array_equal(*pair) for pair in zip(first, dropout_masks(7, 0, 0.25, 2, [3, 5]), strict=True))
    for other in (dropout_masks(8, 0, 0.5, 64, [64]), dropout_masks(7, 1, 0.5, 64, [64])):
        assert not np.array_equal(other[0], dropout_masks(7, 0, 0.5, 64, [64])[0])


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.999])
def test_masks_drop_as_many_as_they_are_to(probability: float) -> None:
    (mask,) = dropout_masks(3, 0, probability, 1000, [1000])
    assert mask.dtype == np.uint8
    assert set(np.unique(mask).tolist()) <= {0, 1}
    deviation = np.sqrt(probability * (1 - probability) / mask.size)
    assert abs(1 - mask.mean() - probability) < 5 * deviation


CPU = torch.device("cpu")


def kept(
    probability: float, widths: Sequence[int], seeds: Sequence[int], lengths: Sequence[int], dtype: torch.dtype = torch.float64
) -> list[NDArray[np.float64]]:
    """What a part's dropout makes of ones in layers of these widths, (N, width) each: 0, or 1 where an element is kept."""
    dropout = SeededDropout(probability, CPU)
    columns = [dropout.add_columns(width) for width in widths]
    dropout.seeds = seeds
    dropout.begin(Packing(lengths, CPU))
    rows = sum(lengths)
    return [(dropout(torch.ones(rows, len(of), dtype=dtype), of) * (1 - probability)).double().numpy() for of in columns]


def test_row_keys_are_those_of_the_published_generator() -> None:
    """SplitMix64 from 1234567, as in its reference implementation's test vector."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert row_keys([1234567], Packing([5], CPU)).tolist() == expected
    assert row_keys([5, 1234567, 2**64 - 1], Packing([2, 5, 1], CPU)).tolist()[2:7] == expected


def test_masks_of_a_part_are_the_same_in_every_version() -> None:
    """The numbers themselves, worked out one by one: they decide a run that goes on, and must not depend on the machine."""

    def spread(bits: int, shift: int, factor: int) -> int:
        return (bits ^ bits >> shift) * factor % 2**32

    expected = []
    for key in row_keys([7, 8], Packing([2, 1], CPU)).tolist():
        for column in range(5):
            of_column = spread(spread(column, 16, 0x7FEB352D), 15, 0x846CA68B)
            bits = spread((spread(of_column ^ key % 2**32, 16, 0x7FEB352D) + (key >> 32)) % 2**32, 15, 0x846CA68B)
            signed = bits - 2**32 if bits >= 2**31 else bits
            expected.append(float(signed + 2**31 >= round(0.25 * 2**32)))
    first, second = kept(0.25, [2, 3], [7, 8], [2, 1])
    assert np.hstack([first, second]).ravel().tolist() == pytest.approx(expected)


def test_masks_of_a_sequence_do_not_depend_on_those_beside_it() -> None:
    alone = kept(0.5, [40, 64], [11], [9])
    among = kept(0.5, [40, 64], [10, 11, 12], [4, 9, 2])
    longer = kept(0.5, [40, 64], [11], [12])
    for one, other, more in zip(alone, among, longer, strict=True):
        assert np.array_equal(one, other[4:13])
        assert np.array_equal(one, more[:9])
    for dtype in (torch.float32, torch.bfloat16):
        assert np.array_equal(kept(0.5, [40], [11], [9], dtype)[0], alone[0])


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.999])
def test_masks_of_a_part_drop_as_many_as_they_are_to(probability: float) -> None:
    (mask,) = kept(probability, [1024], range(32), [32] * 32)
    deviation = math.sqrt(probability * (1 - probability) / mask.size)
    assert abs(1 - mask.mean() - probability) < 4 * deviation
    # And so in every row and in every column: their counts scatter as those of independent draws do, not more and not less.
    for axis in (0, 1):
        counts = mask.sum(axis)
        expected = probability * (1 - probability) * mask.shape[axis]
        assert counts.var() == pytest.approx(
            expected, rel=6 * math.sqrt(2 / len(counts)) + 3 / math.sqrt(expected * len(counts))
        )


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_no_two_rows_columns_or_layers_are_dropped_alike(probability: float) -> None:
    """All correlations are those of independent draws: normal, with deviation 1 / sqrt(n)."""
    one, other = (
        (mask - 1 + probability) / math.sqrt(probability * (1 - probability))
        for mask in kept(probability, [512, 512], [3, 4, 2**63, 2**63 + 1], [128] * 4)
    )
    of_columns, of_rows, of_layers = one.T @ one / len(one), one @ one.T / one.shape[1], one.T @ other / len(one)
    for matrix, size in ((of_columns, len(one)), (of_rows, one.shape[1])):
        correlations = matrix[np.triu_indices(len(matrix), 1)] * math.sqrt(size)
        assert correlations.std() == pytest.approx(1, abs=0.02)
        assert abs(correlations).max() < 6
    assert (of_layers * math.sqrt(len(one))).std() == pytest.approx(1, abs=0.02)
    assert abs(of_layers * math.sqrt(len(one))).max() < 6


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 16, 64])
def test_masks_do_not_repeat_along_positions_or_columns(lag: int) -> None:
    (mask,) = kept(0.5, [768], range(4), [256] * 4)
    signs = 2 * mask.reshape(4, 256, 768) - 1
    for earlier, later in ((signs[:, :-lag], signs[:, lag:]), (signs[:, :, :-lag], signs[:, :, lag:])):
        assert abs((earlier * later).mean()) < 5 / math.sqrt(earlier.size)


def test_seeds_that_differ_in_one_bit_give_independent_masks() -> None:
    seeds = [1 << bit for bit in range(64)]
    (mask,) = kept(0.5, [256], [0, *seeds], [16] * 65)
    signs = (2 * mask - 1).reshape(65, -1)
    assert abs(signs[1:] @ signs[0]).max() < 5 * math.sqrt(signs.shape[1])


def test_columns_of_all_layers_have_keys_of_their_own() -> None:
    dropout = SeededDropout(0.5, CPU)
    keys = torch.cat([dropout.add_columns(width) for width in (768, 768, 3072) * 48])
    assert len(keys.unique()) == len(keys)


def test_dropout_without_seeds_or_with_those_of_another_batch_is_refused() -> None:
    dropout = SeededDropout(0.5, CPU)
    columns, ones = dropout.add_columns(3), torch.ones(2, 3)
    dropout.begin(Packing([2], CPU))
    with pytest.raises(RuntimeError, match="needs seeds or masks before each forward pass"):
        dropout(ones, columns)
    dropout.seeds = [1, 2]
    with pytest.raises(ValueError, match="has seeds of 2 sequences, and the batch has 1"):
        dropout.begin(Packing([2], CPU))
    dropout.seeds = [1]
    dropout.begin(Packing([2], CPU))
    dropout.begin(Packing([2], CPU))  # seeds are used up with a pass
    with pytest.raises(RuntimeError, match="needs seeds or masks"):
        dropout(ones, columns)
    dropout.eval()
    assert torch.equal(dropout(ones, columns), ones)
