"""Texts that a program gives as values are learnt as those of a file, and whoever wants is told of every step."""

import json
import tempfile
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import adapter_bytes, run_in_thread, run_split

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


def test_client_of_values_that_is_entered_again_goes_on_with_them(tiny_model: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step_end(self, client: EdgeClient, step: Any) -> None:
            if step.number == 1:
                raise OSError("stopped")

    device = {"data": PAIRS, "eval_data": PAIRS[:1], "batch_size": 2, "name": "a", "state_dir": tmp_path / "state"}
    with GpuServer(**options(tiny_model, tmp_path / "run"), port=0) as server:
        client = EdgeClient(server.url, callbacks=[Stop()], **device)
        with pytest.raises(OSError, match="stopped"), client:
            list(client.train())
        with client:
            steps = [step.number for step in client.train()]
            assert client.perplexity() > 1
        assert [record.number for record in server.train()] == [1, *steps]


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
        (
            [*PAIRS, {"prompt": "p"}],
            r'^data, line 8: expected "prompt" and "completion", both .*; "prompt" is a string, there is no "completion"$',
        ),
        ([*PAIRS, {"prompt": "p", "completion": ""}], r'^data, line 8: "completion" is empty: there is nothing to learn;'),
        ([{"text": object()}], "^data, line 1: found .*; each value is a text, or lists and dicts of texts$"),
        ([{"text": "\ud800"}], "^data, line 1: a .* alone is half a character"),
        ([], "^data is empty$"),
        (iter([]), "^data is empty: an iterator gives its entries once; make it anew$"),
        (b"notes.jsonl", "^data is bytes: give a file, or a list or an iterator of dicts$"),
        (lambda: iter(PAIRS), "^data is function: give a file"),
        ([{1: "a", "text": "b"}], "^data, line 1: 1 is no name of a member: names are texts$"),
        ([{"text": 3}], '^data, line 1: expected .* "text" is 3$'),
        ([{"text": b"a"}], "^data, line 1: found bytes; each value is a text, or lists and dicts of texts$"),
        ([{"text": float("nan")}], '^data, line 1: expected .* "text" is NaN$'),
        ([{"messages": {"role": ["user"], "content": ["a"]}}], '^data, line 1: expected .* "messages" is {"content"'),
        ([{"name": "a", "food": object()}], '^data, line 1: expected .*; found "food", "name"$'),
    ],
)
def test_what_is_wrong_with_values_is_said_without_the_name_of_a_file(
    tiny_model: Path, tmp_path: Path, data: Any, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        EdgeClient("ws://127.0.0.1:1", model=str(tiny_model), data=data, state_dir=tmp_path)


def test_values_are_on_the_disk_for_the_user_alone_and_only_until_they_are_read() -> None:
    files = TextFiles()
    path = files.path([{"text": np.str_("a"), "Prompt ": np.array(["b"]), "when": datetime.now(), "picture": object()}], "data")
    assert path.read_text() == '{"Prompt ": ["b"], "picture": null, "text": "a", "when": null}\n', "what is learnt, and names"
    assert path.parent.stat().st_mode & 0o077 == 0
    files.remove()
    assert not path.parent.exists()
    forgotten = TextFiles()
    path = forgotten.path(PAIRS, "data")
    del forgotten
    assert not path.exists()


def test_error_of_an_iterator_is_its_own_and_leaves_no_text_on_the_disk(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gone(Exception):
        pass

    def rows() -> Iterator[dict[str, str]]:
        yield PAIRS[0]
        raise Gone

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    device: dict[str, Any] = {"model": str(tiny_model), "state_dir": tmp_path / "state"}
    with pytest.raises(Gone):
        EdgeClient("ws://127.0.0.1:1", data=rows(), **device)
    with pytest.raises(Gone):
        EdgeClient("ws://127.0.0.1:1", data=PAIRS, eval_data=rows(), **device)
    with pytest.raises(DataError) as failed:  # which holds on to the client that there was to be
        EdgeClient("ws://127.0.0.1:1", data=[*PAIRS, {"prompt": "p"}], **device)
    assert failed
    assert not list(tmp_path.glob("splitlora-*"))


def test_fewer_texts_than_a_batch_are_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    device = {"data": (pair for pair in PAIRS[:1]), "batch_size": 8, "eval_data": iter(PAIRS[:1]), "eval_every": 1}
    assert len(run_split(options(tiny_model, tmp_path / "run"), {"a": device}).records) == 2


class NoCallback:
    def on_train_begin(self, arguments: object, state: object, control: object) -> None:
        """As of transformers, which passes three arguments."""


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            {"callbacks": [Callback(), NoCallback()]},
            "^callbacks has NoCallback: each is an object of a class derived from edge_",
        ),
        ({"callbacks": [Callback]}, "^callbacks has the class Callback, of which an object is needed: each is an object"),
        ({"callbacks": Callback}, "^callbacks has the class Callback, of which an object is needed: each is an object"),
        ({"callbacks": Callback()}, "^callbacks is Callback: give a list of them$"),
        ({"batch_size": "8"}, "^batch-size must be a whole number, got '8'$"),
        ({"batch_size": 2.5}, r"^batch-size must be a whole number, got 2\.5$"),
        ({"max_length": np.int64(1)}, "^max-length must be at least 2 tokens, got 1$"),
        ({"eval_every": "50"}, "^eval-every must be a whole number, got '50'$"),
        ({"max_length": None}, "^max-length must be a whole number, got None$"),
        ({"batch_size": 10**30}, f"^batch-size must be at most {2**63 - 1}, got {10**30}$"),
        ({"name": 5}, "^name must be a text, got 5$"),
        ({"shuffle": "no"}, '^shuffle must be True or False, got "no"$'),
        ({"give_up_after": "x"}, "^give-up-after must be a number, got 'x'$"),
        ({"give_up_after": -1}, "^give-up-after must be at least 0, got -1$"),
        ({"activation_noise": "a"}, "^activation-noise must be a number, got 'a'$"),
        ({"gradient_noise": float("nan")}, "^gradient-noise must be at least 0, got nan$"),
        ({"device": "tpu"}, "^device must be auto, cpu or cuda, got 'tpu'$"),
        ({"engine": None}, "^engine must be auto, onnxruntime or torch, got None$"),
    ],
)
def test_option_of_a_wrong_kind_is_refused_before_anything_is_read(tmp_path: Path, option: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        EdgeClient("ws://127.0.0.1:1", data=tmp_path / "none.jsonl", state_dir=tmp_path, **option)


def test_numbers_of_numpy_are_taken_as_numbers(tmp_path: Path) -> None:
    """A message takes no other than Python's own."""
    client = EdgeClient("ws://127.0.0.1:1", data=[{"text": "a"}], state_dir=tmp_path, batch_size=np.int64(2))
    assert type(client.batch_size) is int


def test_callback_that_fails_when_all_is_over_keeps_nobody_waiting(tiny_model: Path, tmp_path: Path) -> None:
    class Full(Exception):
        pass

    class Save(Callback):
        def on_train_end(self, client: EdgeClient) -> None:
            raise Full

    with GpuServer(**options(tiny_model, tmp_path / "run"), dtype="float32", port=0) as server:
        served = run_in_thread(lambda: list(server.train()))
        device = {"model": str(tiny_model), "engine": "torch", "dtype": "float32", "state_dir": tmp_path / "state"}
        with pytest.raises(Full), EdgeClient(server.url, data=PAIRS, callbacks=[Save()], name="a", **device) as client:
            list(client.train())
        assert len(served.result()) == 2
        assert not client._state.is_in_a_run


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
