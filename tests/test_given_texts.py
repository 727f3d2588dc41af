"""Texts that a program gives as values are learnt as those of a file, and whoever wants is told of every step."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import adapter_bytes, run_split

from edge_client import Callback, DataError, EdgeClient
from edge_client.given_texts import TextFiles
from gpu_server import GpuServer

PAIRS = [{"prompt": f"n{i}", "completion": f"abc {i * 37 % 101}"} for i in range(7)]


class Table:
    """As a datasets.Dataset: rows by number and one after the other, with None where a row has nothing in a column."""

    column_names = ("prompt", "completion", "text")

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return dict.fromkeys(self.column_names) | self._rows[number]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))


def options(tiny_model: Path, run_dir: Path) -> dict[str, Any]:
    return {"model": str(tiny_model), "run_dir": str(run_dir), "cut_layer": 1, "lora_rank": 2, "epochs": 2, "micro_batches": 1}


def test_list_iterator_and_table_are_learnt_as_the_file_of_the_same_texts(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    given = {"file": file, "list": PAIRS, "iterator": iter(PAIRS), "table": Table(PAIRS)}
    for name, data in given.items():
        device = {"data": data, "batch_size": 2, "state_dir": tmp_path / f"state-{name}"}
        run_split(options(tiny_model, tmp_path / name), {"a": device})
    assert len({adapter_bytes(tmp_path / name) for name in given}) == 1


def test_device_that_comes_back_goes_on_with_the_same_values_and_with_no_others(tiny_model: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stop(Callback):
        def on_step_end(self, client: EdgeClient, step: Any) -> None:
            if step.number == 3:
                raise Stopped

    common = {"model": str(tiny_model), "engine": "torch", "dtype": "float32", "batch_size": 2, "state_dir": tmp_path / "state"}
    with GpuServer(**options(tiny_model, tmp_path / "run"), dtype="float32", port=0) as server:
        device = {"name": "a", **common}
        with pytest.raises(Stopped), EdgeClient(server.url, data=PAIRS, callbacks=[Stop()], **device) as client:
            list(client.train())
        with pytest.raises(DataError, match=r"^data is not the data with which this device has taken part in run"):
            EdgeClient(server.url, data=PAIRS[1:], **device).__enter__()
        again = threading.Thread(target=lambda: finish(server.url, **device))
        again.start()
        records = list(server.train())
        again.join()
    run_split(options(tiny_model, tmp_path / "undisturbed"), {"a": {"data": PAIRS, "batch_size": 2}})
    assert len(records) == 8
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "undisturbed")


def finish(url: str, **device: Any) -> None:
    with EdgeClient(url, data=iter(PAIRS), **device) as client:
        list(client.train())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": PAIRS, "test": PAIRS}, '^data is one mapping, with "train", "test" in it: give a list of dicts, or of a'),
        (3, "^data is 3: give a file, or a list or an iterator of dicts$"),
        (["a text"], '^data, line 1: expected a dict, found "a text"$'),
        ([*PAIRS, {"prompt": "p"}], r'^data, line 8: expected "messages", or "instruction" and "output"'),
        ([{"text": object()}], "^data, line 1: found .*; each value is a text, or lists and dicts of texts$"),
        ([{"text": "\ud800"}], "^data, line 1: a .* alone is half a character"),
        ([], "^data is empty$"),
    ],
)
def test_what_is_wrong_with_values_is_said_without_the_name_of_a_file(
    tiny_model: Path, tmp_path: Path, data: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        EdgeClient("ws://127.0.0.1:1", model=str(tiny_model), data=data, state_dir=tmp_path)


def test_values_are_on_the_disk_for_the_user_alone_and_only_until_they_are_read() -> None:
    files = TextFiles()
    path = files.path([{"text": np.str_("a"), "label": np.int64(3)}], "data")
    assert path.read_text() == '{"label": 3, "text": "a"}\n'
    assert path.parent.stat().st_mode & 0o077 == 0
    files.remove()
    assert not path.parent.exists()
    forgotten = TextFiles()
    path = forgotten.path(PAIRS, "data")
    del forgotten
    assert not path.exists()


class Listening(Callback):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_train_begin(self, client: EdgeClient) -> None:
        self.heard.append("begin")

    def on_step_end(self, client: EdgeClient, step: Any) -> None:
        self.heard.append(step.number)

    def on_evaluate(self, client: EdgeClient, evaluated: Any) -> None:
        self.heard.append(f"evaluated after {evaluated.step}")

    def on_train_end(self, client: EdgeClient) -> None:
        self.heard.append(f"end, {len(client.evaluations)} evaluations")


def test_callbacks_are_told_of_steps_and_evaluations_in_their_order(tiny_model: Path, tmp_path: Path) -> None:
    listening = Listening()
    device = {
        "data": PAIRS,
        "batch_size": 4,
        "eval_data": Table(PAIRS[:2]),
        "eval_every": 2,
        "callbacks": [Callback(), listening],
    }
    run_split(options(tiny_model, tmp_path / "run"), {"a": device})
    assert listening.heard == [
        *("begin", "evaluated after 0", 1, 2, "evaluated after 2", 3, 4, "evaluated after 4"),
        "end, 3 evaluations",
    ]
