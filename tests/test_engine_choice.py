"""Which engine computes on a device, what it needs, and what is said where it cannot."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, RunResult, adapter_bytes, run_in_thread, run_split
from protocol_samples import SETTINGS
from safetensors.numpy import load

from edge_client import DataError, EdgeClient, StateError, cli, engine_choice
from edge_client.client_state import ClientState
from edge_client.engine_choice import choose_engine
from gpu_server import GpuServer
from gpu_server.serving.conversation import Conversations
from protocol import RemoteProtocolError
from storage import ModelError, PartDescription
from terminal import PackageMissing

FLOAT64 = dataclasses.replace(SETTINGS, precision="float64", activation_codec="exact", gradient_codec="exact")
USUAL = {"device": "auto", "dtype": "auto", "settings": SETTINGS, "edge_weights": "float32", "before": None}


@pytest.mark.parametrize(
    ("asked", "has_model", "has_cuda", "changes", "engine", "why"),
    [
        ("auto", False, True, {}, "onnxruntime", "no model of its own"),
        ("auto", True, False, {}, "onnxruntime", "on a CPU"),
        ("auto", True, True, {}, "torch", "has CUDA"),
        ("auto", True, True, {"device": "cpu"}, "onnxruntime", "on a CPU"),
        ("auto", True, False, {"settings": FLOAT64, "edge_weights": ""}, "torch", "the run is in float64"),
        ("auto", True, False, {"edge_weights": ""}, "torch", "hands over no part"),
        ("auto", True, False, {"dtype": "bfloat16"}, "torch", "weights in float32, and --dtype is bfloat16"),
        ("auto", True, True, {"dtype": "float32"}, "torch", "has CUDA"),
        ("auto", True, False, {"dtype": "float32"}, "onnxruntime", "on a CPU"),
        ("auto", True, False, {"before": "torch"}, "torch", "as before"),
        ("auto", True, True, {"before": "onnxruntime"}, "onnxruntime", "as before"),
        ("auto", False, False, {"before": "torch"}, "onnxruntime", "no model of its own"),
        ("auto", True, True, {"before": "damaged"}, "torch", "has CUDA"),
        ("onnxruntime", True, True, {"before": "torch"}, "onnxruntime", "as asked for"),
        ("torch", True, False, {"before": "onnxruntime", "edge_weights": ""}, "torch", "as asked for"),
    ],
)
def test_engine_is_chosen_by_one_rule(
    asked: str,
    has_model: bool,
    has_cuda: bool,
    changes: dict[str, Any],
    engine: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_choice, "finds_cuda", lambda: has_cuda)
    chosen, reason = choose_engine(asked, has_model=has_model, **{**USUAL, **changes})
    assert (chosen, why in reason) == (engine, True), reason


@pytest.mark.parametrize(
    ("asked", "has_model", "changes", "reason"),
    [
        ("onnxruntime", True, {"settings": FLOAT64}, "the run is in float64; use --engine torch"),
        ("auto", False, {"settings": FLOAT64}, "the run is in float64; give --model"),
        ("onnxruntime", True, {"edge_weights": ""}, "hands over no part of its model; use --engine torch"),
        ("auto", False, {"dtype": "bfloat16"}, "weights in float32, and --dtype is bfloat16; give --model"),
        ("onnxruntime", True, {"dtype": "float32", "edge_weights": "int8"}, "weights in int8, and --dtype is float32; use"),
    ],
)
def test_what_no_engine_can_compute_is_one_sentence(asked: str, has_model: bool, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        choose_engine(asked, has_model=has_model, **{**USUAL, **changes})


@pytest.mark.parametrize("engine", engine_choice.ENGINES)
def test_each_engine_can_be_chosen_on_the_command_line(engine: str) -> None:
    words = ["train", "--server=ws://here", "--data=notes.txt", f"--engine={engine}"]
    assert cli.build_parser().parse_args(words).engine == engine


def test_torch_is_not_imported_to_find_no_cuda() -> None:
    check = """
import sys
from edge_client import engine_choice
engine_choice.CUDA_DRIVERS = ("libnothing.so",)
assert not engine_choice.finds_cuda()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


# Whole runs


def run_options(model: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    shape = {"cut_layer": 2, "lora_rank": 4, "steps": 4, "dtype": "float32", "micro_batches": 2}
    return {"model": str(model), "run_dir": str(run_dir), **shape, **more}


ALONE = """
import sys
for name in ("torch", "transformers", "safetensors", "onnx", "huggingface_hub", "peft"):
    sys.modules[name] = None  # whoever imports it fails
port, *words = sys.argv[1:]

def only_the_server(event, details):
    if event == "socket.connect" and details[1][1] != int(port):
        raise SystemExit(f"{event} {details[1:]}")
    if event == "socket.getaddrinfo" and details[0] not in ("127.0.0.1", None):
        raise SystemExit(f"{event} {details}")

sys.addaudithook(only_the_server)
from edge_client.cli import main
sys.exit(main(words))
"""


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_device_needs_no_library_for_models_and_nobody_but_its_server(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], aggregate_every: int
) -> None:
    data = pairs_file("a", 9)
    options = run_options(tiny_model, tmp_path / "run", aggregate_every=aggregate_every, lora_dropout=0.1)
    with GpuServer(**options, port=0) as server:
        ended = run_in_thread(lambda: list(server.train()))
        words = ["train", f"--server={server.url}", f"--data={data}", f"--eval-data={data}", "--batch-size=2", "--name=a"]
        line = [sys.executable, "-c", ALONE, server.url.rpartition(":")[2], *words, f"--state-dir={tmp_path / 'state'}"]
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        if done.returncode:
            server.stop()
        assert done.returncode == 0, done.stderr
        losses = [record.loss for record in ended.result(timeout=60)]
    assert "engine onnxruntime: this device has no model of its own; dtype float32: as the server hands" in done.stderr
    assert "done: " in done.stderr
    expected = run_split(
        {**options, "run_dir": str(tmp_path / "with-torch")},
        {"a": {"data": data, "batch_size": 2, "state_dir": tmp_path / "other"}},
    )
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-4)


def difference(one: RunResult, other: RunResult) -> float:
    """Between the runs' adapters, by the norm of the other's."""
    first, second = (load(adapter_bytes(run.run_dir)) for run in (one, other))
    assert first.keys() == second.keys()
    norms = [
        np.sqrt(sum(float(np.sum(np.square(part))) for part in parts))
        for parts in ([first[name] - second[name] for name in first], list(second.values()))
    ]
    return float(norms[0] / norms[1])


@pytest.mark.parametrize(("steps", "aggregate_every"), [(100, 1), (30, 5)])
def test_run_of_one_device_of_each_kind_is_that_of_two_with_torch(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], steps: int, aggregate_every: int
) -> None:
    devices = {name: {"data": pairs_file(name, 12, offset), "batch_size": 3} for name, offset in (("a", 0), ("b", 40))}
    options = {"steps": steps, "aggregate_every": aggregate_every, "lora_dropout": 0.1}
    both, torch = (
        run_split(
            run_options(tiny_model, tmp_path / kind, **options),
            {name: {**device, "engine": engine} for (name, device), engine in zip(devices.items(), engines, strict=True)},
        )
        for kind, engines in (("both", ("onnxruntime", "torch")), ("torch", ("torch", "torch")))
    )
    np.testing.assert_allclose(both.losses, torch.losses, rtol=1e-4)
    assert difference(both, torch) < 1e-3


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path) -> Any:
    """Starts a server in this process, for devices that do not come to train."""

    def start(**more: Any) -> GpuServer:
        return GpuServer(**run_options(tiny_model, tmp_path / "run", **more), port=0)

    return start


@pytest.fixture
def device(tmp_path: Path, pairs_file: Callable[..., Path]) -> dict[str, Any]:
    return {"data": pairs_file("a", 4), "batch_size": 2, "name": "a", "state_dir": tmp_path / "state"}


def kill(client: EdgeClient) -> None:
    client._membership.hang_up()
    client._wait_reports.close()


def test_what_takes_a_while_is_shown_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with cli._Preparations() as shown:
        for what, size in (("small.jsonl", 999_999), ("the part", 3_000_000)):
            for done in (0, size // 2, size, size):
                shown(what, done, size)
        shown("known.jsonl", 9_000_000, 9_000_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("MB of the part 3/3: ")


def test_device_that_comes_back_goes_on_with_the_engine_it_began_with(
    serve: Any, device: dict[str, Any], tiny_model: Path
) -> None:
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, engine="torch", model=str(tiny_model), **device).__enter__())
        with EdgeClient(server.url, model=str(tiny_model), **device) as client:
            assert (client.engine, client.engine_choice) == ("torch", "as before this device was stopped")
            list(client.train())


def test_device_with_a_model_that_runs_what_the_server_hands_over_is_checked_by_its_model(
    serve: Any, device: dict[str, Any], tiny_model: Path
) -> None:
    with serve(steps=1) as server, EdgeClient(server.url, model=str(tiny_model), **device) as client:
        assert (client.engine, client.dtype) == ("onnxruntime", "float32")
        assert len(list(client.train())) == 1


def test_part_that_changes_under_a_run_is_said(
    serve: Any, device: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        kill(EdgeClient(server.url, **device).__enter__())
        assert "before it was stopped" not in caplog.text
        (note,) = (tmp_path / "state/places").rglob("place.json")
        note.write_text(json.dumps({**json.loads(note.read_text()), "part": "0", "dtype": "int8"}))
        with EdgeClient(server.url, **device) as client:
            list(client.train())
    assert re.search(
        r"with onnxruntime in float32 on the server's part [0-9a-f]{12} of the model; before it was stopped it computed with "
        r"onnxruntime in int8 on the server's part 0 of the model: ",
        caplog.text,
    )
    assert not ClientState(tmp_path / "state", server.url, "a").is_in_a_run


@pytest.mark.parametrize(
    ("first", "then", "was", "now"),
    [
        ("onnxruntime", {"engine": "torch"}, "onnxruntime in float32 on the server's part", "torch in float32"),
        ("torch", {"engine": "onnxruntime"}, "torch in float32", "onnxruntime in float32 on the server's part"),
        ("torch", {"engine": "auto", "model": None}, "torch in float32", "onnxruntime in float32 on the server's part"),
        ("torch", {"dtype": "bfloat16"}, "torch in float32", "torch in bfloat16"),
    ],
)
def test_device_that_comes_back_another_way_goes_on_and_says_so_once(
    serve: Any,
    device: dict[str, Any],
    tiny_model: Path,
    caplog: pytest.LogCaptureFixture,
    first: str,
    then: dict[str, Any],
    was: str,
    now: str,
) -> None:
    device = {**device, "model": str(tiny_model), "dtype": "float32"}
    with serve(steps=2) as server:
        killed = EdgeClient(server.url, engine=first, **device).__enter__()
        next(killed.train())
        kill(killed)
        for options in ({**device, "engine": first, **then}, {**device, "engine": "auto", **then}):
            client = EdgeClient(server.url, **options).__enter__()
            client.start()
            kill(client)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        with EdgeClient(server.url, **{**device, "engine": first, **then}) as client:
            assert len(list(client.train())) == 1
    (warning,) = (text for text in warnings if "before it was stopped" in text)
    assert re.search(f"this device goes on in run .* with {now}.*; before it was stopped it computed with {was}", warning)
    assert warning.endswith(": the run's adapter will not be to the bit that of an undisturbed run")


def test_data_that_changes_under_a_run_is_refused(serve: Any, device: dict[str, Any]) -> None:
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        lines = device["data"].read_text().splitlines(keepends=True)
        for changed, options in (("".join(reversed(lines)), {}), ("".join(lines), {"shuffle": False})):
            device["data"].write_text(changed)
            with pytest.raises(DataError, match=r"is not the data with which this device has taken part in run .* so far"):
                EdgeClient(server.url, **options, **device).__enter__()
        with EdgeClient(server.url, **device) as client:
            assert len(list(client.train())) == 1


def test_data_of_another_kind_is_refused_by_name(serve: Any, device: dict[str, Any]) -> None:
    """The same bytes: as .jsonl they are pairs, as .txt each line is a text with braces in it."""
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        other = device["data"].rename(device["data"].with_suffix(".txt"))
        with pytest.raises(
            DataError, match=r"a\.txt is not the data with which .* so far: the file's kind is another\. Give it"
        ):
            EdgeClient(server.url, **{**device, "data": other}).__enter__()
        other.rename(device["data"])
        with EdgeClient(server.url, **device) as client:
            assert len(list(client.train())) == 1


def test_another_chat_template_is_refused_by_name(serve: Any, device: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Another model folder may have the same weights and make other tokens of a conversation."""
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        with pytest.raises(DataError, match=r"so far: the model's chat template is another\. Give it"):
            EdgeClient(server.url, model=str(other), **device).__enter__()
        with EdgeClient(server.url, model=str(tiny_model), **device) as client:
            assert len(list(client.train())) == 1


def test_another_size_of_the_activation_cache_is_refused_by_name(serve: Any, device: dict[str, Any]) -> None:
    """It decides of which samples only changes are sent, and so on the result."""
    with serve(steps=1, codec="delta") as server:
        kill(EdgeClient(server.url, **device).__enter__())
        with pytest.raises(DataError, match=r"so far: how much of its activations is kept \(--cache-bytes\) is another\. Give"):
            EdgeClient(server.url, cache_bytes=0, **device).__enter__()
        with EdgeClient(server.url, cache_bytes=2**40, **device) as client:  # more than the server keeps, as without the flag
            assert len(list(client.train())) == 1


def test_size_of_an_activation_cache_may_change_in_a_run_that_has_none(serve: Any, device: dict[str, Any]) -> None:
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        with EdgeClient(server.url, cache_bytes=0, **device) as client:
            assert len(list(client.train())) == 1


def test_device_goes_on_with_the_place_that_an_earlier_version_has_noted(
    serve: Any, device: dict[str, Any], tmp_path: Path
) -> None:
    """It said less of the data."""
    with serve(steps=1) as server:
        kill(EdgeClient(server.url, **device).__enter__())
        (note,) = (tmp_path / "state/places").rglob("place.json")
        written = json.loads(note.read_text())
        lacking = ("kind", "template", "cache_bytes")
        note.write_text(json.dumps({name: value for name, value in written.items() if name not in lacking}))
        with EdgeClient(server.url, **device) as client:
            assert len(list(client.train())) == 1


# What is said


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"data": "notes.pdf"}, DataError, r"notes\.pdf: data files end in \.jsonl, \.csv, \.txt"),
        ({"data": "absent.txt"}, DataError, r"absent\.txt cannot be read: No such file"),
        ({"eval_data": "absent.txt"}, DataError, r"absent\.txt cannot be read: No such file"),
        ({"engine": "tensorflow"}, DataError, "engine must be auto, onnxruntime or torch, got 'tensorflow'"),
        ({"engine": "torch"}, ModelError, "the torch engine computes with a model of this device's own: give --model"),
        ({"part_bytes": -1}, DataError, "part-bytes must be at least 0, got -1"),
        ({"max_length": 1}, DataError, "max-length must be at least 2 tokens, got 1"),
    ],
)
def test_what_is_wrong_with_the_flags_is_said_before_anybody_is_called(
    device: dict[str, Any], changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        EdgeClient("ws://127.0.0.1:1", **{**device, **changes})


@pytest.mark.parametrize("engine", ["auto", "onnxruntime"])
def test_server_that_hands_over_no_part_is_said(serve: Any, device: dict[str, Any], engine: str) -> None:
    with serve(dtype="float64") as server:
        with pytest.raises(
            ModelError, match=r"server at ws://.* \(splitlora .*\) hands over no part of its model, .*: update it"
        ):
            EdgeClient(server.url, engine=engine, **device).__enter__()
        server.stop()


def test_device_with_a_model_takes_part_where_no_part_is_handed_over(
    serve: Any, device: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pong = Conversations._pong
    monkeypatch.setattr(Conversations, "_pong", lambda *given: dataclasses.replace(pong(*given), edge_weights=""))
    with serve(steps=1) as server, EdgeClient(server.url, model=str(tiny_model), dtype="float32", **device) as client:
        assert (client.engine, client.engine_choice) == ("torch", "the server hands over no part of its model")
        assert len(list(client.train())) == 1


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"cut_layer": 1}, RemoteProtocolError, r"for cut layer 2 lacks block-1\.safetensors"),
        ({"cut_layer": 3}, ModelError, "cut layer 3, the run has 2"),
        ({"fingerprint": "0" * 32}, ModelError, r"another base model \(fingerprint 0{32}\) than that of the run"),
        ({"onnxruntime": "99.0"}, ModelError, "needs onnxruntime 99.0, this device has .*: pip install 'onnxruntime>=99.0'"),
    ],
)
def test_part_of_something_else_is_refused(
    serve: Any,
    device: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception],
    reason: str,
) -> None:
    import graphs

    build = graphs.build_part

    def build_another(folder: Path, *given: Any, **options: Any) -> PartDescription:
        built = build(folder, *given, **{**options, **{name: value for name, value in change.items() if name in options}})
        changed = dataclasses.replace(built, **change)
        changed.write(folder)
        return changed

    monkeypatch.setattr(graphs, "build_part", build_another)
    with serve() as server:
        with pytest.raises(error, match=reason):
            EdgeClient(server.url, **device).__enter__()
        server.stop()


def test_pipe_is_refused_as_data(device: dict[str, Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="no file that can be read twice"):
        EdgeClient("ws://127.0.0.1:1", **{**device, "data": tmp_path / "pipe.txt"})


def test_cuda_that_this_onnxruntime_has_not_is_said(serve: Any, device: dict[str, Any]) -> None:
    with serve() as server:
        with pytest.raises(ModelError, match=r"--device cuda: onnxruntime .* computes on the CPU alone here"):
            EdgeClient(server.url, device="cuda", **device).__enter__()
        assert not (device["state_dir"] / "parts").exists()  # nothing has been fetched
        server.stop()


def test_part_for_which_there_is_no_room_is_said(serve: Any, device: dict[str, Any]) -> None:
    with serve() as server:
        with pytest.raises(StateError, match=r"this device keeps at most .* MB: raise --part-bytes"):
            EdgeClient(server.url, part_bytes=1000, **device).__enter__()
        server.stop()


@pytest.mark.parametrize(
    ("library", "options", "reason"),
    [
        ("onnxruntime", {}, r"needs onnxruntime, which is not installed: pip install splitlora"),
        ("torch", {"engine": "torch", "model": "."}, r"--model needs torch, .*: pip install 'splitlora\[torch\]'"),
    ],
)
def test_engine_that_is_not_installed_is_said(
    serve: Any, device: dict[str, Any], library: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server:
        with monkeypatch.context() as patch:
            for name in [library, *(name for name in sys.modules if name.split(".")[0] in ("split_model",))]:
                patch.setitem(sys.modules, name, None) if name == library else patch.delitem(sys.modules, name)
            with pytest.raises(PackageMissing, match=reason):
                EdgeClient(server.url, **device, **options).__enter__()
        server.stop()
