"""Time is divided without gap: what is waited for is the last part of an answer's way."""

import numpy as np
import pytest
from conftest import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.stopwatch import Stopwatch, difference
from protocol import ActivationGradient, HiddenStates, Seconds

seconds = st.floats(0, 1000)


def answer(queue: float, compute: float) -> ActivationGradient:
    values = np.zeros((1, 1), np.float32)
    return ActivationGradient(step=1, loss=0.0, labelled_tokens=1, values=values, queue_seconds=queue, compute_seconds=compute)


def of_waiting(waited: float, under_way: float, queue: float, compute: float, share_up: float) -> Seconds:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    clock.now = waited
    stopwatch.answered(answer(queue, compute), waited=waited, under_way=under_way, share_up=share_up)
    return stopwatch.read()


def test_all_of_the_way_is_divided_where_nothing_else_was_done() -> None:
    spent = of_waiting(waited=10.0, under_way=10.0, queue=1.0, compute=3.0, share_up=0.75)
    assert spent == Seconds(uplink=4.5, queue=1.0, server_compute=3.0, downlink=1.5)


@pytest.mark.parametrize(
    ("waited", "spent"),
    [
        (1.0, Seconds(downlink=1.0)),
        (4.0, Seconds(downlink=1.5, server_compute=2.5)),
        (5.0, Seconds(downlink=1.5, server_compute=3.0, queue=0.5)),
        (7.0, Seconds(downlink=1.5, server_compute=3.0, queue=1.0, uplink=1.5)),
    ],
)
def test_what_is_hidden_by_the_devices_own_work_is_the_first_of_the_way(waited: float, spent: Seconds) -> None:
    assert of_waiting(waited, under_way=10.0, queue=1.0, compute=3.0, share_up=0.75) == spent


def test_time_until_the_server_asks_back_is_divided_as_that_until_its_answer() -> None:
    asked = HiddenStates(step=1, values=np.zeros((1, 1), np.float32), queue_seconds=1.0, compute_seconds=3.0)
    clock = Clock()
    stopwatch = Stopwatch(clock)
    clock.now = 10.0
    stopwatch.answered(asked, waited=10.0, under_way=10.0, share_up=0.75)
    clock.now = 17.0  # seven seconds for the loss
    clock.now = 20.0
    stopwatch.answered(answer(queue=0.5, compute=1.5), waited=3.0, under_way=3.0, share_up=0.5)
    assert stopwatch.read() == Seconds(edge_compute=7.0, uplink=5.0, queue=1.5, server_compute=4.5, downlink=2.0)


@given(seconds, seconds, seconds, seconds, st.floats(0, 1))
@settings(max_examples=200)
def test_parts_add_up_whatever_the_server_says(
    waited: float, under_way: float, queue: float, compute: float, share_up: float
) -> None:
    spent = of_waiting(waited, under_way, queue, compute, share_up)
    assert sum(vars(spent).values()) == pytest.approx(waited)
    assert min(vars(spent).values()) >= 0


def test_what_is_nothing_else_is_the_devices_own_computing() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    clock.now = 10.0
    stopwatch.add(encode=1.0, decode=2.0)
    assert stopwatch.read() == Seconds(edge_compute=7.0, encode=1.0, decode=2.0)


def test_a_while_that_is_left_out_is_no_computing() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    before = stopwatch.read()
    clock.now = 10.0
    stopwatch.leave_out(8.0)
    assert difference(stopwatch.read(), before) == Seconds(edge_compute=2.0)


def test_laps_add_up_to_all_that_was_spent() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock)
    laps = []
    for seconds_encoding in (1.0, 0.5):
        clock.now += 4.0
        stopwatch.add(encode=seconds_encoding)
        laps.append(stopwatch.lap())
    assert laps == [Seconds(edge_compute=3.0, encode=1.0), Seconds(edge_compute=3.5, encode=0.5)]
    assert sum(laps, Seconds()) == stopwatch.read()
    assert stopwatch.lap() == Seconds()
