"""Memory between forward and backward: nobody is given what somebody else has."""

import numpy as np
import pytest

from edge_client.part.reused_memory import ReusedMemory
from storage import ModelError


def test_arrays_of_a_buffer_have_their_shapes_and_do_not_overlap() -> None:
    buffer = ReusedMemory().take(3 * 11)
    arrays = [buffer.take(3, width) for width in (4, 2, 5)]
    assert [array.shape for array in arrays] == [(3, 4), (3, 2), (3, 5)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert [set(array.ravel().tolist()) for array in arrays] == [{0}, {1}, {2}]


def test_what_is_given_back_is_used_again_and_nothing_else() -> None:
    memory = ReusedMemory()
    first, second = memory.take(80), memory.take(80)
    one, other = first.take(10, 8), second.take(10, 8)
    assert not np.shares_memory(one, other)
    memory.give_back(first)
    assert memory.take(72) is first
    assert np.shares_memory(first.take(9, 8), one)
    assert memory.take(72) not in (first, second)


def test_smallest_buffer_that_is_large_enough_is_taken_and_the_largest_goes_for_a_larger_one() -> None:
    memory = ReusedMemory()
    buffers = [memory.take(size) for size in (300, 100, 200)]
    for buffer in buffers:
        memory.give_back(buffer)
    assert memory.take(150) is buffers[2]
    larger = memory.take(1000)
    assert larger.size >= 1000
    assert memory.take(50) is buffers[1]
    assert memory.take(50) not in buffers


@pytest.mark.parametrize("size", [2**20, 2**50])
def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The first is refused by the system, the second would be refused too late."""

    def refuse(size: int, _: object) -> None:
        assert size < 2**40
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(ModelError, match=r"no memory for the [\d,]+ MB that are kept of a batch; choose a smaller --batch"):
        ReusedMemory().take(size)
