"""What a fault has cost a run, from when its steps were finished."""

import pytest
import reliability


def cost(fault_at: float, finished: list[tuple[float, int]]) -> tuple[float, int]:
    """Seconds, and steps that were repeated; the run began at 100, and a step takes a second."""
    loss = reliability._cost((fault_at, "device", "attic"), 100.0, finished, 1.0)
    return loss.seconds, loss.steps_repeated


def test_fault_that_delays_nothing_costs_nothing() -> None:
    assert cost(102.5, [(100.0 + step, step) for step in range(1, 9)]) == (0.0, 0)
    assert cost(100.5, [(100.0 + step, step) for step in range(1, 9)]) == (0.0, 0)  # in the first step


def test_delay_counts_in_the_step_that_is_met_and_in_the_next_one() -> None:
    """Whoever is killed when it has done its part of a step is missed in the next."""
    in_this = [(101.0, 1), (102.0, 2), (103.5, 3), (104.5, 4), (105.5, 5)]
    in_the_next = [(101.0, 1), (102.0, 2), (103.0, 3), (104.5, 4), (105.5, 5)]
    assert cost(102.5, in_this) == cost(102.5, in_the_next) == (0.5, 0)


def test_steps_that_a_server_takes_again_are_lost() -> None:
    finished = [(101.0, 1), (102.0, 2), (103.0, 3), (105.0, 2), (106.0, 3), (107.0, 4), (108.0, 5)]
    seconds, repeated = cost(103.5, finished)
    assert (seconds, repeated) == (pytest.approx(3.0), 2)
