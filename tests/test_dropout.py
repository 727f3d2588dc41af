"""The masks of a device's dropout, which both of its engines use."""

import numpy as np
import pytest

from edge_client.dropout import dropout_masks

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
