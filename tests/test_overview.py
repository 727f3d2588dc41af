"""How a run stands: in figures that follow from its steps, and in words that name who is slow or late."""

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.federation import StepRecord
from gpu_server.history import Curve, EvaluationRecord, HistoryError, Overview, RunEvent
from protocol import Seconds


def step(number: int, *, cellar: float = 1.0, who: str = "abc", at: float | None = None, **more: Any) -> StepRecord:
    """A step of two seconds of devices a, b and c, the last of which takes so many times as long to compute."""
    own = {name: Seconds(edge_compute=0.5 * (cellar if name == "c" else 1.0), uplink=0.25, queue=0.25) for name in who}
    usual: dict[str, Any] = {
        "loss": 3.0 - number / 100,
        "labelled_tokens": 4 * len(who),
        "tokens": 10 * len(who),
        "seconds": own,
        "deadline": 60.0,
        "codec": "int8",
        "server_compute": 0.1,
        "bytes_up": dict.fromkeys(who, 100),
        "bytes_down": dict.fromkeys(who, 50),
        "time": 1000.0 + 2 * number if at is None else at,
        "step_seconds": 2.0,
        "losses": {name: 3.0 + place for place, name in enumerate(who)},
        "labelled": dict.fromkeys(who, 4),
        "samples": dict.fromkeys(who, 2),
        "tokens_of": dict.fromkeys(who, 10),
    }
    return StepRecord(number=number, **{**usual, **more})


def event(kind: str, time: float, client: str | None = None, **details: Any) -> RunEvent:
    return RunEvent(time=time, kind=kind, text=kind, client=client, details=details)


def joined() -> Overview:
    """Three devices have joined a run of 100 steps."""
    run = Overview("r", 3)
    run.add_event(event("server_started", 990.0, restarts=0))
    for name in "abc":
        run.add_event(event("joined", 995.0, name, samples=40, batch_size=4, steps=100))
    run.add_event(event("training_started", 1000.0, total_steps=100))
    return run


def devices(run: Overview, now: float) -> dict[str, dict[str, Any]]:
    return {device["name"]: device for device in run.as_json(now)["devices"]}


def test_sentence_says_step_devices_and_time_left() -> None:
    run = joined()
    for number in range(1, 11):
        run.add_step(step(number))
    now = run.as_json(1020.0)
    assert now["sentence"] == "step 10 of 100, 3 of 3 devices, 3 min left"
    assert now["seconds_left"] == pytest.approx(90 * 2.0)
    assert (now["state"], now["step"], now["total_steps"], now["connected"]) == ("training", 10, 100, 3)
    assert now["tokens_per_second"] == pytest.approx(30 / 2)
    assert now["bytes_per_second"] == pytest.approx(450 / 2)
    assert devices(run, 1020.0)["b"] | {"seconds": None} == {
        "name": "b",
        "state": "connected",
        "words": "takes part",
        "samples": 40,
        "batch_size": 4,
        "loss": 4.0,
        "tokens_per_second": 5.0,
        "bytes_up": 1000,
        "bytes_down": 500,
        "last_heard": 1020.0,
        "missed_steps": 0,
        "late_seconds": None,
        "slowness": 1.0,
        "is_slowest": False,
        "seconds": None,
    }


def test_slow_device_is_named_with_its_part_and_what_to_do() -> None:
    run = joined()
    for number in range(1, 31):
        run.add_step(step(number, cellar=4.0))
    now = run.as_json(1060.0)
    assert now["bottleneck"]["client"] == "c"
    assert now["bottleneck"]["part"] == "edge_compute"
    assert now["bottleneck"]["sentence"].startswith("c is 3.0 times as slow as the others, who wait for it; 80 % of its time")
    assert "--batch-size" in now["bottleneck"]["advice"]
    slow = devices(run, 1060.0)["c"]
    assert (slow["is_slowest"], slow["slowness"]) == (True, pytest.approx((2.0 + 0.25) / 0.75))
    assert slow["words"] == "takes part, 3.0 times as slow as the others"
    assert slow["seconds"]["edge_compute"] == pytest.approx(20 * 2.0)


@given(st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0, 8.0]), min_size=2, max_size=9))
def test_slowness_is_over_the_median_of_the_others(seconds: list[float]) -> None:
    own = {f"d{place}": each for place, each in enumerate(seconds)}
    run = Overview("r", len(own))
    for number in (1, 2):
        spent = {name: Seconds(edge_compute=each / 2, uplink=each / 2, queue=3.0) for name, each in own.items()}
        run.add_step(step(number, seconds=spent, bytes_up=dict.fromkeys(own, 1), labelled=dict.fromkeys(own, 1)))
    for place, device in enumerate(devices(run, 1010.0).values()):
        assert device["slowness"] == pytest.approx(seconds[place] / statistics.median(seconds[:place] + seconds[place + 1 :]))


def test_where_nobody_is_slow_the_largest_part_is_named() -> None:
    run = joined()
    for number in range(1, 5):
        run.add_step(step(number))
    found = run.as_json(1010.0)["bottleneck"]
    assert (found["client"], found["part"], found["share"]) == (None, "edge_compute", pytest.approx(0.5))


def test_device_that_everybody_waits_for_is_late_until_the_step_is_done() -> None:
    run = joined()
    run.add_step(step(1))
    run.waits_for(["b"], 4.0, 1006.0)
    assert run.as_json(1006.0)["state"] == "training"  # a usual step takes two seconds
    run.waits_for(["b"], 12.0, 1014.0)
    now = run.as_json(1014.0)
    assert now["sentence"] == "step 1 of 100 waits for b, for 12 s; 3 of 3 devices"
    assert now["waiting_for"] == [{"client": "b", "seconds": 12.0}]
    assert devices(run, 1014.0)["b"]["words"] == "is 12 s late"
    run.add_step(step(2, at=1015.0))
    assert run.as_json(1015.0)["waiting_for"] == []


def test_device_that_is_late_because_it_evaluates_is_said_to_evaluate() -> None:
    run = joined()
    run.add_step(step(1))
    run.waits_for(["b", "c"], 12.0, 1014.0, lambda name: name == "c")
    assert run.as_json(1014.0)["sentence"] == "step 1 of 100 waits for b and c (evaluating), for 12 s; 3 of 3 devices"
    assert devices(run, 1014.0)["b"]["words"] == "is 12 s late"
    assert devices(run, 1014.0)["c"]["words"] == "is 12 s late, evaluating"


def test_file_alone_says_who_is_late_once_an_operator_was_told() -> None:
    run = joined()
    run.add_step(step(1))
    run.add_event(event("late", 1062.0, clients=["b", "c"], seconds=60.0))
    assert run.as_json(1072.0)["waiting_for"] == [{"client": "b", "seconds": 70.0}, {"client": "c", "seconds": 70.0}]


def test_device_that_is_lost_and_back_has_missed_what_went_on_without_it() -> None:
    run = joined()
    run.add_step(step(1))
    run.add_event(event("lost", 1003.0, "c"))
    run.add_step(step(2, who="ab"))
    run.add_step(step(3, who="ab"))
    assert devices(run, 1008.0)["c"]["words"] == "lost its connection 5.0 s ago"
    assert run.as_json(1008.0)["connected"] == 2
    run.add_event(event("back", 1009.0, "c"))
    assert (devices(run, 1009.0)["c"]["state"], devices(run, 1009.0)["c"]["missed_steps"]) == ("connected", 2)


def test_device_whose_data_is_at_its_end_misses_nothing() -> None:
    run = Overview("r", 2)
    run.add_event(event("joined", 1.0, "a", steps=5))
    run.add_event(event("joined", 1.0, "b", steps=1))
    run.add_step(step(1, who="ab"))
    run.add_step(step(2, who="a"))
    assert devices(run, 5.0)["b"]["missed_steps"] == 0


def test_device_that_has_left_misses_nothing_more() -> None:
    run = joined()
    run.add_event(event("left", 1001.0, "c"))
    run.add_step(step(1, who="ab"))
    assert (devices(run, 1002.0)["c"]["words"], devices(run, 1002.0)["c"]["missed_steps"]) == ("has left", 0)


def test_server_that_starts_again_has_lost_everybody_who_was_connected() -> None:
    run = joined()
    run.add_step(step(1))
    run.add_event(event("server_started", 1100.0, restarts=1))
    now = run.as_json(1103.0)
    assert (now["connected"], now["restarts"]) == (0, 1)
    assert {device["state"] for device in now["devices"]} == {"lost"}


@pytest.mark.parametrize(
    ("kind", "state", "sentence"),
    [
        ("complete", "finished", "the run is complete: 1 step"),
        ("stopped", "stopped", "stopped after step 1 of 100, 3 min left at its last speed"),
        ("failed", "stopped", "the server failed after step 1 of 100, 3 min left at its last speed"),
    ],
)
def test_end_of_a_run_is_said(kind: str, state: str, sentence: str) -> None:
    run = joined()
    run.add_step(step(1))
    run.add_event(event(kind, 1004.0))
    assert (run.as_json(1005.0)["state"], run.as_json(1005.0)["sentence"]) == (state, sentence)


def test_run_whose_server_was_killed_says_so() -> None:
    run = joined()
    run.add_step(step(1))
    run.is_served = False
    assert run.as_json(1005.0)["sentence"] == "no server runs; step 1 of 100, 3 min left at its last speed"
    assert {device["words"] for device in run.as_json(1005.0)["devices"]} == {"no server runs"}


def test_server_that_goes_on_knows_how_many_steps_there_are_where_no_event_before_says() -> None:
    """As in a run that was begun before there were events."""
    run = Overview("r", 3)
    run.add_step(step(40))
    run.add_event(event("server_started", 1100.0, restarts=1, total_steps=100))
    now = run.as_json(1101.0)
    assert (now["state"], now["total_steps"], now["seconds_left"]) == ("training", 100, 120.0)


def test_run_that_has_not_begun_waits_for_devices() -> None:
    run = Overview("r", 3)
    run.add_event(event("server_started", 1.0))
    run.add_event(event("joined", 2.0, "a"))
    assert run.as_json(3.0)["sentence"] == "waiting for devices: 1 of 3 devices joined"


def test_held_out_loss_is_that_of_all_labels_of_the_last_step_evaluated() -> None:
    run = joined()
    for client, at, loss, labels in (("a", 2, 9.0, 9), ("a", 4, 2.0, 30), ("b", 4, 3.0, 10), ("c", 2, 9.0, 9)):
        run.add_evaluation(EvaluationRecord(step=at, time=0.0, client=client, loss=loss, labelled_tokens=labels))
    assert run.as_json(1.0)["held_out"] == {"step": 4, "loss": 2.25, "perplexity": pytest.approx(math.exp(2.25))}


def test_held_out_loss_of_a_step_is_said_once_all_have_told_theirs() -> None:
    run = joined()

    def told(client: str, at: int, loss: float) -> tuple[int, float]:
        run.add_evaluation(EvaluationRecord(step=at, time=0.0, client=client, loss=loss, labelled_tokens=10))
        held_out = run.as_json(1.0)["held_out"]
        return held_out["step"], held_out["loss"]

    assert told("a", 2, 4.0) == (2, 4.0)
    assert told("b", 2, 2.0) == (2, 3.0)
    assert told("a", 4, 1.0) == (2, 3.0)
    assert told("b", 4, 2.0) == (4, 1.5)
    assert told("b", 6, 1.0) == (4, 1.5)
    run.add_event(event("left", 1002.0, "a"))
    assert told("b", 8, 0.5) == (8, 0.5)  # of those who may still tell


def test_clock_that_is_put_back_makes_nobody_early() -> None:
    run = joined()
    run.add_step(step(1))
    run.waits_for(["b"], 20.0, 1022.0)
    assert run.as_json(900.0)["waiting_for"] == [{"client": "b", "seconds": 0.0}]
    assert devices(run, 900.0)["b"]["words"] == "is 0.0 s late"


def test_codec_is_that_of_the_last_step_with_why_it_was_chosen() -> None:
    run = joined()
    run.add_event(RunEvent(time=1.0, kind="codec", text="int4 costs too much: int8 from now on", details={"codec": "int8"}))
    assert (run.as_json(2.0)["codec"], run.as_json(2.0)["codec_reason"]) == ("int8", "int4 costs too much: int8 from now on")


def test_lines_of_an_earlier_version_say_what_they_can() -> None:
    run = Overview("r", 2)
    run.add_step(step(1, time=0.0, step_seconds=0.0, losses={}, labelled={}, samples={}, tokens_of={}))
    now = run.as_json(5.0)
    assert (now["step"], now["seconds_left"], now["tokens_per_second"]) == (1, None, None)
    assert devices(run, 5.0)["a"]["bytes_up"] == 100


def test_event_of_a_later_version_is_refused_in_a_sentence() -> None:
    with pytest.raises(HistoryError, match=r"what was written at 7\.500 .* is nothing that this version reads"):
        joined().add(event("late", 7.5, clients=3))


# Many devices


def test_of_more_devices_than_are_listed_those_come_first_that_are_late_or_lost_or_slow() -> None:
    names = [f"d{number:02}" for number in range(12)]
    run = Overview("r", len(names))
    run.add_event(event("server_started", 990.0))
    for name in names:
        run.add_event(event("joined", 995.0, name))
    run.add_event(event("training_started", 1000.0, total_steps=100))
    own = {name: Seconds(edge_compute={"d07": 4.0, "d05": 2.0}.get(name, 1.0)) for name in names}
    run.add_step(step(1, seconds=own, bytes_up=dict.fromkeys(names, 1), labelled=dict.fromkeys(names, 1)))
    run.add_event(event("left", 1003.0, "d00"))
    run.add_event(event("lost", 1003.0, "d09"))
    run.waits_for(["d11", "d09"], 20.0, 1022.0)
    now = run.as_json(1022.0, 5)
    assert [device["name"] for device in now["devices"]] == ["d11", "d09", "d07", "d05", "d01"]
    assert now["more_devices"] == 7
    assert now["device_states"] == {"late": 1, "lost": 1, "connected": 9, "left": 1}
    assert now["connected"] == 10
    assert [device["name"] for device in run.as_json(1022.0, 12)["devices"]] == names
    assert run.as_json(1022.0)["more_devices"] == 0
    assert now["bottleneck"]["client"] == "d07"


def test_wait_for_many_is_told_with_their_number_though_an_event_names_the_first() -> None:
    run = joined()
    run.add_step(step(1))
    run.add_event(event("late", 1062.0, clients=["b", "c"], count=5000, seconds=60.0))
    assert run.as_json(1072.0)["sentence"] == "step 1 of 100 waits for b, c and 4,998 more, for 70 s; 3 of 3 devices"
    run.waits_for((f"d{number}" for number in range(50)), 70.0, 1072.0)
    assert len(run.as_json(1072.0, 7)["waiting_for"]) == 7


def test_figures_of_a_device_are_of_the_last_twenty_steps_that_it_took_part_in() -> None:
    run = joined()
    for number in range(1, 41):
        run.add_step(step(number, who="abc" if number % 2 else "ab"))
    run.add_step(step(41, who="abcd", step_seconds=4.0, bytes_up=dict.fromkeys("abcd", 100)))
    found = devices(run, 1100.0)
    assert [found[name]["seconds"]["edge_compute"] for name in "abcd"] == [10.0, 10.0, 10.0, 0.5]
    assert found["a"]["tokens_per_second"] == pytest.approx(200 / 42)
    assert found["d"]["tokens_per_second"] == pytest.approx(10 / 4)
    assert found["c"]["missed_steps"] == 20


def test_steps_with_only_the_sums_of_all_devices_name_none_and_count_for_none() -> None:
    run = joined()
    spent = Seconds(edge_compute=30.0, uplink=60.0)
    run.add_event(event("lost", 1001.0, "c"))
    for number in (1, 2):
        run.add_step(step(number, who="*", seconds={"*": spent}, tokens=30, together=3))
    now = run.as_json(1006.0)
    assert [device["name"] for device in now["devices"]] == ["a", "b", "c"]
    assert (now["tokens_per_second"], now["bottleneck"]["part"]) == (15, "uplink")
    assert {device[key] for device in now["devices"] for key in ("bytes_up", "missed_steps", "slowness")} == {None}
    assert [devices(run, 1006.0)[name]["last_heard"] for name in "abc"] == [1004.0, 1004.0, 995.0]
    run.add_step(step(3, cellar=4.0, who="abc"))  # as a server that goes on is told it
    assert run.as_json(1008.0)["bottleneck"]["client"] == "c"
    assert devices(run, 1008.0)["a"]["bytes_up"] is None  # of the run so far nobody knows


def test_held_out_losses_of_many_devices_are_gone_through_once_a_step_and_not_once_a_device() -> None:
    run, looks = Overview("r", 300), list[str]()
    has_left = run._has_left
    run._has_left = lambda client: looks.append(client) or has_left(client)  # type: ignore[method-assign, func-returns-value]
    for at in (1, 2):
        for number in range(300):
            run.add_evaluation(EvaluationRecord(step=at, time=0.0, client=f"d{number}", loss=at, labelled_tokens=1))
    assert run.as_json(1.0)["held_out"]["step"] == 2
    assert len(looks) <= 600


# Curves


@given(st.integers(0, 300), st.sampled_from([2, 8, 50]))
def test_curve_keeps_means_extremes_and_the_last_step_in_few_points(steps: int, most: int) -> None:
    curve, records = Curve(most), [step(number, loss=float((7 * number) % 11)) for number in range(1, steps + 1)]
    for record in records:
        curve.add(record)
    columns = curve.as_json()
    assert len({len(column) for column in columns.values()}) == 1
    assert len(columns["step"]) <= most
    assert len(columns["step"]) > most // 2 or len(columns["step"]) == steps
    if not steps:
        return
    assert columns["step"][-1] == steps
    begins = [0, *columns["step"][:-1]]
    for place, (begin, end) in enumerate(zip(begins, columns["step"], strict=True)):
        losses = [record.loss for record in records[begin:end]]
        assert columns["loss"][place] == pytest.approx(sum(losses) / len(losses), rel=1e-5, abs=1e-9)
        assert (columns["loss_low"][place], columns["loss_high"][place]) == (min(losses), max(losses))
        assert columns["tokens_per_second"][place] == pytest.approx(15.0)


def test_curve_of_a_run_that_went_back_goes_on_from_there() -> None:
    curve = Curve(100)
    for number in (1, 2, 3, 4, 3, 4, 5):
        curve.add(step(number))
    assert curve.as_json()["step"] == [1, 2, 3, 4, 5]


def test_figures_that_are_none_are_left_out_of_means() -> None:
    curve = Curve(2)
    for number, norm in ((1, math.nan), (2, 2.0), (3, 4.0)):
        curve.add(step(number, gradient_norm=norm))
    assert curve.as_json()["gradient_norm"] == [2.0, 4.0]
    assert curve.as_json()["learning_rate"] == [None, None]
