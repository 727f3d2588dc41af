"""Memory between forward and backward: nobody is given what somebody else has."""

import numpy as np
import pytest

from edge_client.part.reused_memory import ReusedMemory
from storage import ModelError


def test_arrays_have_their_shapes_and_do_not_overlap() -> None:
    _, arrays = ReusedMemory().take(3, {"a": 4, "b": 2, "c": 5})
    assert {name: array.shape for name, array in arrays.items()} == {"a": (3, 4), "b": (3, 2), "c": (3, 5)}
    for number, array in enumerate(arrays.values()):
        array[...] = number
    assert [set(array.ravel().tolist()) for array in arrays.values()] == [{0}, {1}, {2}]


def test_what_is_given_back_is_used_again_and_nothing_else() -> None:
    memory = ReusedMemory()
    (first, _), (second, _) = memory.take(10, {"a": 8}), memory.take(10, {"a": 8})
    assert not np.shares_memory(first, second)
    memory.give_back(first)
    again, _ = memory.take(9, {"a": 8})
    assert again is first
    assert not np.shares_memory(memory.take(9, {"a": 8})[0], first)


def test_smallest_piece_that_is_large_enough_is_taken_and_a_small_one_goes_for_a_larger_one() -> None:
    memory = ReusedMemory()
    pieces = [memory.take(rows, {"a": 8})[0] for rows in (30, 10, 20)]
    for piece in pieces:
        memory.give_back(piece)
    assert memory.take(15, {"a": 8})[0] is pieces[2]
    assert memory.take(35, {"a": 8})[0].size >= 35 * 8
    assert any(memory.take(5, {"a": 8})[0] is piece for piece in pieces[:2])


@pytest.mark.parametrize("num_rows", [1024, 2**40])
def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """The first is refused by the system, the second would be refused too late."""

    def refuse(size: int, _: object) -> None:
        assert size < 2**40
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    with pytest.raises(
        ModelError, match=r"no memory for the [\d,]+ MB that a block keeps of a batch; choose a smaller --batch"
    ):
        ReusedMemory().take(num_rows, {"a": 1024})
