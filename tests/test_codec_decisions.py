"""What the codec policy decides takes effect in the run, and holds when a server or a device is killed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from chaos import Fault, Scene
from conftest import adapter_bytes, metrics, run_split
from ports import free_port
from protocol_samples import inflate
from websockets.sync.client import ClientConnection

from edge_client import EdgeClient
from gpu_server import GpuServer
from gpu_server.federation import codec_policy
from protocol.settings import COARSE, codec_name

EXACT_TENSOR = 1
"""Its extension type on the wire; another is that of a coded tensor, which begins with the codec's name."""


@pytest.fixture
def travelled(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """By step, in which codecs activations have left the devices."""
    codecs: dict[int, set[str]] = {}
    send = ClientConnection.send

    def watched_send(self: ClientConnection, data: Any, *rest: Any, **more: Any) -> None:
        _, kind, fields = msgpack.unpackb(inflate(data))
        if kind == "Activations":
            values = fields["values"]
            codec = "float32" if values.code == EXACT_TENSOR else msgpack.unpackb(values.data)[0]
            codecs.setdefault(fields["step"], set()).add(codec)
        send(self, data, *rest, **more)

    monkeypatch.setattr(ClientConnection, "send", watched_send)
    return codecs


def options(model: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    usual = {"cut_layer": 2, "lora_rank": 4, "lr": 2e-3, "steps": 8, "check_codec_every": 1}
    return {"model": str(model), "run_dir": str(run_dir), **usual, **more}


def in_metrics(run_dir: Path) -> list[str]:
    return [row["codec"] for row in metrics(run_dir)]


def decisions(run_dir: Path) -> list[list[Any]]:
    return list(json.loads((run_dir / "codecs.json").read_text())["decisions"])


@pytest.mark.parametrize("aggregate_every", [1, 3])
def test_activations_travel_in_a_richer_codec_from_the_step_after_a_check_that_found_too_large_a_change(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    travelled: dict[int, set[str]],
    aggregate_every: int,
) -> None:
    clients = {name: {"data": pairs_file(name, 12, 100 * i), "batch_size": 3} for i, name in enumerate("ab")}
    settings = {"codec": "int8", "codec_tolerance": 0.0, "check_codec_every": 3, "aggregate_every": aggregate_every}
    result = run_split(options(tiny_model, tmp_path / "run", **settings), clients)
    codecs = ["int8", *["bfloat16"] * 3, *["float32"] * 4]
    assert decisions(tmp_path / "run") == [[2, "bfloat16"], [5, "float32"]]
    assert travelled == {step: {codec} for step, codec in enumerate(codecs, 1)}
    assert in_metrics(tmp_path / "run") == [record.codec for record in result.records] == codecs


def test_automatic_codec_goes_down_where_links_are_slow_and_up_again_where_it_changes_the_loss(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    travelled: dict[int, set[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(codec_policy, "LINK_IS_THE_BOTTLENECK", 0.0)
    clients = {name: {"data": pairs_file(name, 12, 100 * i), "batch_size": 3} for i, name in enumerate("ab")}
    run = options(tiny_model, tmp_path / "run", codec="auto")
    run_split({**run, "steps": 6, "codec_tolerance": 1e9}, clients)
    assert decisions(tmp_path / "run") == [[4, "int4"]]
    run_split({**run, "steps": 8, "codec_tolerance": 0.0, "resume": True}, clients)
    codecs = [*["int8"] * 3, *[COARSE] * 4, "int8"]
    assert decisions(tmp_path / "run") == [[4, "int4"], [8, "int8"], [9, "bfloat16"]]
    assert travelled == {step: {codec} for step, codec in enumerate(codecs, 1)}
    assert in_metrics(tmp_path / "run") == [codec_name(codec) for codec in codecs]


@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_run_that_goes_back_behind_a_decision_does_its_steps_again_in_the_codecs_that_were_decided(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, aggregate_every: int
) -> None:
    monkeypatch.setattr(codec_policy, "LINK_IS_THE_BOTTLENECK", 0.0)
    device = {"data": pairs_file("a", 12), "batch_size": 3, "dtype": "float32"}
    settings = {"codec": "auto", "codec_tolerance": 1e9, "check_codec_every": 2, "aggregate_every": aggregate_every}
    settings |= {"checkpoint_every": 4 // aggregate_every, "dtype": "float32", "micro_batches": 2}
    run_split(options(tiny_model, tmp_path / "undisturbed", **settings), {"a": {**device, "state_dir": tmp_path / "other"}})
    run_dir, port = tmp_path / "run", free_port()
    run = options(tiny_model, run_dir, **settings, port=port)
    with GpuServer(**run) as server:
        client = EdgeClient(
            server.url, engine="torch", model=str(tiny_model), name="a", state_dir=tmp_path / "state", **device
        ).__enter__()
        steps = client.train()
        assert [next(steps).number for _ in range(7)][-1] == 7
        server.suspend()
    assert decisions(run_dir) == [[6, "int4"]]
    checkpoints = sorted((run_dir / "checkpoints").glob("*.safetensors"))
    assert int(checkpoints[0].stem) == 4
    os.truncate(checkpoints[1], 1000)
    monkeypatch.setattr(codec_policy, "LINK_IS_THE_BOTTLENECK", 2.0)  # nobody would decide it now
    with GpuServer(**run, resume=True) as again:
        assert list(steps)[-1].number == 8
        client.__exit__(None, None, None)
        assert [record.number for record in again.train()] == [5, 6, 7, 8]
    assert decisions(run_dir) == [[6, "int4"]]
    assert in_metrics(run_dir) == ["int8"] * 5 + ["int4"] * 3
    assert adapter_bytes(run_dir) == adapter_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("mode", ["delta, rounds of one step", "delta, rounds of two steps"])
def test_decisions_hold_whoever_is_killed(scene: Scene, tmp_path: Path, mode: str) -> None:
    settings = {"codec": "int4", "codec_tolerance": 0.0, "check_codec_every": 2}
    faults = {
        "nobody": [],
        "the server": [Fault("server", "send", 16, "kill"), Fault("server", "receive", 12, "kill", life=2)],
        "a device": [Fault("b", "receive", 8, "kill"), Fault("b", "send", 8, "kill", life=2)],
        "all": [Fault(name, "send", 11, "kill") for name in ("server", "a", "b")],
    }
    outcomes = {}
    for killed, of_them in faults.items():
        folder = tmp_path / killed
        folder.mkdir()
        outcomes[killed] = scene.run(folder, mode, of_them, **settings).to_its_end()
        assert len(outcomes[killed].struck) == len(of_them)
        assert outcomes[killed].differences(outcomes["nobody"]) == []
        assert decisions(folder / "run") == [[2, "int8"], [4, "bfloat16"], [6, "float32"]]
        assert in_metrics(folder / "run") == ["int4", "int8", "int8", "bfloat16", "bfloat16", *["float32"] * 3]
