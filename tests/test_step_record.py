"""A step's figures as metrics.jsonl has them: nothing is lost on the way there and back, and a line is JSON for everybody."""

import json
import math
import time
from pathlib import Path
from typing import Any

from conftest import metrics, run_split
from hypothesis import given
from hypothesis import strategies as st

from gpu_server.federation import StepRecord
from gpu_server.history import record_of, row_of
from protocol import Seconds

NAMES = st.lists(st.text(min_size=1, max_size=5), max_size=4, unique=True)
COUNTS = st.integers(0, 10**12)
MILLISECONDS = st.integers(0, 10**13).map(lambda number: round(number / 1000, 3))
MICROSECONDS = st.integers(0, 10**11).map(lambda number: round(number / 1e6, 6))
FIGURES = st.floats(-1e6, 1e6) | st.just(math.nan)


@st.composite
def records(draw: st.DrawFn) -> StepRecord:
    """A step in which some of the connected clients took part."""
    names = sorted(draw(NAMES))
    labelled = {name: draw(COUNTS) for name in names if draw(st.booleans())}
    return StepRecord(
        number=draw(COUNTS),
        time=draw(MILLISECONDS),
        step_seconds=draw(MICROSECONDS),
        loss=draw(FIGURES),
        learning_rate=draw(FIGURES),
        gradient_norm=draw(FIGURES),
        labelled_tokens=sum(labelled.values()),
        tokens=draw(COUNTS),
        deadline=draw(MILLISECONDS),
        codec=draw(st.sampled_from(["float32", "int8", "delta"])),
        server_compute=draw(MICROSECONDS),
        seconds={name: Seconds(uplink=draw(MICROSECONDS), decode=draw(MICROSECONDS)) for name in names},
        bytes_up={name: draw(COUNTS) for name in names},
        bytes_down={name: draw(COUNTS) for name in names},
        losses={name: draw(st.floats(-1e6, 1e6)) for name, num_labels in labelled.items() if num_labels},
        labelled=labelled,
        samples={name: draw(COUNTS) for name in labelled},
        tokens_of={name: draw(COUNTS) for name in labelled},
    )


@given(records())
def test_record_is_the_same_after_it_was_a_line(record: StepRecord) -> None:
    line = json.dumps(row_of(record), allow_nan=False)  # not every reader of JSON knows NaN
    assert row_of(record_of(json.loads(line))) == row_of(record)
    again = record_of(json.loads(line))
    for name, value in vars(record).items():
        assert getattr(again, name) == value or (math.isnan(value) and math.isnan(getattr(again, name))), name


def test_figure_that_is_no_number_is_null() -> None:
    usual: dict[str, Any] = {"labelled_tokens": 0, "tokens": 0, "seconds": {}, "deadline": 1.0, "codec": "int8"}
    row = row_of(StepRecord(number=1, loss=math.nan, gradient_norm=math.inf, server_compute=0.0, **usual))
    assert (row["loss"], row["gradient_norm"], row["learning_rate"]) == (None, None, None)


def test_client_that_is_gone_when_the_line_is_written_is_in_it_all_the_same() -> None:
    record = StepRecord(
        number=1,
        loss=2.0,
        labelled_tokens=3,
        tokens=4,
        seconds={"gone": Seconds(uplink=0.5)},
        deadline=1.0,
        codec="int8",
        server_compute=0.0,
        bytes_up={"here": 5},
        bytes_down={"here": 6},
        losses={"gone": 2.0},
        labelled={"gone": 3},
        samples={"gone": 1},
    )
    again = record_of(row_of(record))
    assert (again.losses, again.labelled, again.samples) == ({"gone": 2.0}, {"gone": 3}, {"gone": 1})
    assert again.bytes_up == {"gone": 0, "here": 5}
    assert again.seconds == {"gone": Seconds(uplink=0.5), "here": Seconds()}


def test_lines_of_a_run_have_every_figure(tiny_model: Path, tmp_path: Path, pairs_file: Any) -> None:
    began = time.time()
    files = [pairs_file(name, 4) for name in "ab"]
    options = {"data": files[0]}, {"data": files[1]}
    result = run_split(
        {"model": tiny_model, "run_dir": str(tmp_path / "run"), "steps": 3},
        dict(zip("ab", options, strict=True)),
    )
    rows = metrics(result.run_dir)
    moments = [began, *(row["time"] for row in rows), time.time()]
    assert [round(moment, 2) for moment in moments] == sorted(round(moment, 2) for moment in moments)
    for row, record in zip(rows, result.records, strict=True):
        assert row == row_of(record)
        labels = {name: client["labelled_tokens"] for name, client in row["clients"].items()}
        mean = sum(client["loss"] * labels[name] for name, client in row["clients"].items()) / sum(labels.values())
        assert sum(labels.values()) == row["labelled_tokens"]
        assert math.isclose(mean, row["loss"], rel_tol=1e-5)
        assert row["step_seconds"] > 0
        assert row["gradient_norm"] > 0
        assert row["learning_rate"] > 0
