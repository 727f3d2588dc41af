"""A wait is told of at growing distances."""

import pytest

from terminal import Reminders


def told(reminders: Reminders, until: float) -> list[float]:
    times = [reminders.next_after(0.0)]
    while (after := reminders.next_after(times[-1])) <= until:
        times.append(after)
    return times


@pytest.mark.parametrize(
    ("reminders", "times"),
    [
        (Reminders(first=60, times_later=2), [60, 120, 240, 480, 960, 1920, 3840, 7680]),
        (Reminders(first=10, times_later=3, longest_between=3600), [10, 30, 90, 270, 810, 2430, 6030, 9630]),
        (Reminders(first=30, times_later=2, longest_between=60), [30, 60, 120, 180, 240, 300]),
    ],
)
def test_distances_grow_up_to_the_longest(reminders: Reminders, times: list[float]) -> None:
    assert told(reminders, until=times[-1]) == times


def test_what_was_told_at_once_is_told_again_after_the_first_distance() -> None:
    assert Reminders(first=60, times_later=2).next_after(0.001) == 60
