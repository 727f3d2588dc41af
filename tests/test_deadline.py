"""How long a step waits, from the times that clients took."""

import random
from statistics import median

import pytest

from gpu_server.federation.deadline import NEEDED, REMEMBERED, SHORTEST, UNTIL_KNOWN, Deadline
from protocol import Activations, AdapterGradient


def after(*seconds: float) -> Deadline:
    deadline = Deadline()
    for value in seconds:
        deadline.observe(Activations, value)
    return deadline


def test_operators_deadline_holds_whatever_is_observed() -> None:
    deadline = Deadline(3.0)
    for _ in range(100):
        deadline.observe(Activations, 50.0)
    assert deadline.seconds(Activations) == 3.0


def test_it_waits_long_until_enough_is_known() -> None:
    assert after(*[2.0] * (NEEDED - 1)).seconds(Activations) == UNTIL_KNOWN
    assert after(*[2.0] * NEEDED).seconds(Activations) == 2.0


def test_it_says_once_that_it_knows_enough() -> None:
    deadline = Deadline()
    assert [deadline.observe(Activations, 2.0) for _ in range(NEEDED + 2)] == [False] * (NEEDED - 1) + [True, False, False]
    assert not any(Deadline(3.0).observe(Activations, 2.0) for _ in range(NEEDED))


def test_it_is_the_median_and_six_times_the_median_deviation() -> None:
    # Median 10; the deviations are 2, 1, 0, 1, 90, their median is 1. A single step that took long changes nothing.
    assert after(8.0, 9.0, 10.0, 11.0, 100.0).seconds(Activations) == 16.0


@pytest.mark.parametrize("decimals", [0, 15])
def test_it_is_so_to_the_bit_whatever_is_observed(decimals: int) -> None:
    """With few decimals many values, and many deviations, are equal."""
    deadline, observed, numbers = Deadline(), list[float](), random.Random(1)
    for _ in range(3 * REMEMBERED):
        observed.append(round(numbers.lognormvariate(2.0, 1.0), decimals))
        deadline.observe(Activations, observed[-1])
        last = observed[-REMEMBERED:]
        middle = median(last)
        expected = max(SHORTEST, middle + 6 * median(abs(value - middle) for value in last))
        assert len(observed) < NEEDED or deadline.seconds(Activations) == expected


def test_it_is_never_shorter_than_a_pause_of_the_system() -> None:
    assert after(*[0.001] * 20).seconds(Activations) == SHORTEST


def test_it_follows_what_was_observed_last() -> None:
    assert after(*[2.0] * 500, *[5.0] * 100).seconds(Activations) == 5.0


def test_it_remembers_a_hundred() -> None:
    assert after(*[1.0] * 51, *[3.0] * 50).seconds(Activations) == 2.0 + 6 * 1.0


@pytest.mark.parametrize("other", [AdapterGradient])
def test_every_kind_of_question_has_its_own(other: type) -> None:
    assert after(*[2.0] * 20).seconds(other) == UNTIL_KNOWN


def test_what_is_observed_after_it_was_asked_for_counts_too() -> None:
    deadline = after(*[2.0] * NEEDED)
    assert (deadline.seconds(Activations), deadline.seconds_until_report(Activations)) == (2.0, 5.0)
    for _ in range(NEEDED + 2):
        deadline.observe(Activations, 7.0)
    assert (deadline.seconds(Activations), deadline.seconds_until_report(Activations)) == (7.0, 7.0)
