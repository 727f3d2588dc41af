"""How onnxruntime is set up on a device."""

import os

import pytest

from edge_client.part.runtime import num_threads


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("0", 5), ("", 5), ("many", 5)])
def test_number_of_threads_is_the_one_asked_for_or_that_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    assert num_threads() == expected
