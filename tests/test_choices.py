"""What nobody has said, a program chooses by what is so and stays so, says it on its first line, and comes back with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import metrics, run_in_thread
from ports import free_port
from programs import arguments, program

from edge_client import EdgeClient
from gpu_server import ConfigError, GpuServer, ServerConfig
from split_model import choose_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ZEN4 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
ZEN3 = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}
SAPPHIRE_RAPIDS = {**ZEN4, "avx512_fp16": True, "amx_bf16": True}
WITH_AMX_HIDDEN = {**SAPPHIRE_RAPIDS, "amx_bf16": False}
ORIN = {"architecture": "aarch64", "neon": True, "bf16": False}
GRAVITON3 = {"architecture": "aarch64", "neon": True, "bf16": True}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Puts a processor under torch that has these capabilities."""
    return lambda capabilities: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.fixture
def options(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "cut_layer": 2,
        "lora_rank": 2,
        "device": "cpu",
        "run_dir": str(tmp_path / "run"),
        "port": 0,
    }


@pytest.fixture
def device(options: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]) -> dict[str, Any]:
    """One that comes back under its name, to where it was."""
    return {
        "model": options["model"],
        "data": pairs_file("a", 9),
        "name": "a",
        "state_dir": tmp_path / "state",
        "device": "cpu",
    }


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(Path(options["run_dir"], "run.json").read_text())["config"])


# In which precision weights are


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        (ZEN4, "bfloat16"),
        (ZEN3, "float32"),
        (SAPPHIRE_RAPIDS, "bfloat16"),
        (WITH_AMX_HIDDEN, "float32"),
        (ORIN, "float32"),
        (GRAVITON3, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype_is_bfloat16_where_the_processor_multiplies_it_faster(
    processor: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], dtype: str
) -> None:
    processor(capabilities)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert choose_dtype("auto", CPU)[0] == dtype
    for asked in ("float32", "bfloat16", "float64"):
        assert choose_dtype(asked, CPU) == (asked, "as asked for")


def test_dtype_is_float32_where_torch_has_no_fast_products_or_cannot_say(
    processor: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(ZEN4)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_dtype("auto", CPU) == (
        "float32",
        "this torch is built without oneDNN, whose products in bfloat16 are the fast ones",
    )
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    dtype, why = choose_dtype("auto", CPU)
    assert dtype == "float32"
    assert "does not say whether this processor has instructions for bfloat16" in why


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert choose_dtype("auto", CUDA)[0] == dtype


def test_resumed_server_goes_on_in_the_dtype_it_began_with(
    processor: Callable[..., None], options: dict[str, Any], tmp_path: Path
) -> None:
    processor(ZEN4)
    with GpuServer(**options, steps=3) as server:
        assert "dtype bfloat16: this processor has instructions for it" in server.choices
        server.suspend()
    assert recorded(options)["dtype"] == "bfloat16"
    processor(ZEN3)
    for again in ({}, {"dtype": "auto"}, {"dtype": "bfloat16"}):
        with GpuServer(run_dir=options["run_dir"], port=0, resume=True, **again) as server:
            assert server.config.dtype == "bfloat16"
            assert server.choices == ["dtype bfloat16: as the run began"]
            server.suspend()
    with pytest.raises(ConfigError, match="holds a run with dtype bfloat16; it cannot go on with dtype float32"):
        GpuServer(run_dir=options["run_dir"], resume=True, dtype="float32")


def test_device_that_was_killed_comes_back_in_the_dtype_it_began_with(
    processor: Callable[..., None], options: dict[str, Any], device: dict[str, Any], tmp_path: Path
) -> None:
    device = {**device, "engine": "torch"}
    with GpuServer(**options, dtype="float32", steps=1) as server:
        processor(ZEN4)
        killed = EdgeClient(server.url, **device).__enter__()
        killed._membership.hang_up()
        processor(ZEN3)
        with EdgeClient(server.url, **device) as client:
            assert (client.dtype, client.choice) == ("bfloat16", "as before this device was stopped")
            assert len(list(client.train())) == 1
        assert len(list(server.train())) == 1
    with (
        GpuServer(**{**options, "run_dir": str(tmp_path / "another")}, dtype="float32", steps=1) as server,
        EdgeClient(server.url, **device) as client,
    ):
        assert client.dtype == "float32"


def test_device_that_comes_back_with_torch_goes_on_in_the_precision_that_the_server_handed_over(
    processor: Callable[..., None], options: dict[str, Any], device: dict[str, Any]
) -> None:
    with GpuServer(**options, dtype="float32", steps=1) as server:
        processor(ZEN4)
        killed = EdgeClient(server.url, engine="onnxruntime", **device).__enter__()
        killed._membership.hang_up()
        with EdgeClient(server.url, engine="torch", **device) as client:
            assert (client.dtype, client.choice) == ("float32", "as before this device was stopped")
            list(client.train())


# How many micro-batches a step has


@pytest.mark.parametrize(
    ("host", "micro_batches"),
    [("127.0.0.1", 1), ("localhost", 1), ("::1", 1), ("0.0.0.0", 2), ("192.168.1.20", 2), ("gpu.local", 2)],
)
def test_step_is_divided_where_devices_have_processors_of_their_own(host: str, micro_batches: int) -> None:
    config = ServerConfig(model="gpt2", run_dir="run", steps=1, host=host)
    assert config.settled("float32").micro_batches == micro_batches
    given = ServerConfig(model="gpt2", run_dir="run", steps=1, host=host, micro_batches=3)
    assert given.settled("float32").micro_batches == 3


def test_resumed_server_that_listens_elsewhere_divides_its_steps_as_before(options: dict[str, Any]) -> None:
    with GpuServer(**options, steps=3) as server:
        assert "micro-batches 1: only this machine reaches the server, so both sides share its cores" in server.choices
        server.suspend()
    assert recorded(options)["micro_batches"] == 1
    with GpuServer(run_dir=options["run_dir"], port=0, resume=True, host="0.0.0.0", insecure=True) as server:
        assert server.config.micro_batches == 1
        server.suspend()


# Which layers are adapted


LAYERS = {None: ["c_attn"], "all-linear": ["c_attn", "c_proj", "c_fc"], "c_fc": ["c_fc"]}


@pytest.mark.parametrize("asked", LAYERS)
def test_adapted_layers_are_recorded_by_their_names_and_the_same_command_goes_on(
    options: dict[str, Any], asked: str | None
) -> None:
    given = options | ({} if asked is None else {"lora_targets": asked})
    with GpuServer(**given, steps=3, resume_or_start=True) as server:
        server.suspend()
        said = [choice for choice in server.choices if choice.startswith("lora-targets ")]
    assert said == ([] if asked == "c_fc" else [f"lora-targets {','.join(LAYERS[asked])}: those of this model (GPT-2)"])
    assert recorded(options)["lora_targets"] == LAYERS[asked]
    with GpuServer(**given, steps=3, resume_or_start=True) as server:
        assert server.config.lora_targets == tuple(LAYERS[asked])
        server.suspend()


def test_run_of_some_layers_does_not_go_on_with_all_of_them(options: dict[str, Any]) -> None:
    with GpuServer(**options, steps=3) as server:
        server.suspend()
    with pytest.raises(ConfigError, match="lora-targets c_attn; it cannot go on with lora-targets c_attn,c_fc,c_proj"):
        GpuServer(run_dir=options["run_dir"], resume=True, lora_targets="all-linear")


def test_scale_of_a_run_is_recorded_and_stays(options: dict[str, Any]) -> None:
    with GpuServer(**options, steps=3, lora_rslora=True) as server:
        server.suspend()
    config = recorded(options)
    assert (config["lora_rslora"], config["lora_alpha"]) == (True, 32.0)
    with GpuServer(run_dir=options["run_dir"], port=0, resume=True) as server:
        assert server.config.lora_rslora
        server.suspend()


# Where it is said


def test_both_programs_say_on_their_first_line_what_they_chose(
    options: dict[str, Any], tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    dtype, why = choose_dtype("auto", CPU)
    port = free_port()
    device = {
        "server": f"ws://127.0.0.1:{port}",
        "engine": "torch",
        "model": options["model"],
        "data": pairs_file("a", 9),
        "device": "cpu",
    }
    device["state_dir"] = tmp_path / "state"
    with program("gpu_server", "serve", *arguments({**options, "port": port, "steps": 1})) as server:
        assert server.stderr is not None
        first = server.stderr.readline()
        with program("edge_client", "train", *arguments(device)) as client:
            said = run_in_thread(client.communicate).result(timeout=60)[1]
            assert server.wait(timeout=60) == 0
    assert first.startswith("listening on ")
    assert f"; dtype {dtype}: {why}; micro-batches 1: only this machine reaches the server" in first
    assert f"; dtype {dtype}: {why}; " in said.splitlines()[0]


# In which words


def test_metrics_call_a_codec_what_the_flag_calls_it(
    options: dict[str, Any], pairs_file: Callable[..., Path], tmp_path: Path
) -> None:
    with GpuServer(**options, dtype="float32", codec="float32", steps=1) as server:
        with EdgeClient(
            server.url, engine="torch", model=options["model"], data=pairs_file("a", 9), state_dir=tmp_path / "state"
        ) as client:
            list(client.train())
        (record,) = server.train()
    (row,) = metrics(Path(options["run_dir"]))
    assert record.codec == row["codec"] == "float32"


# What cannot be checked


def test_codec_that_the_server_cannot_check_is_named(options: dict[str, Any]) -> None:
    with GpuServer(**options, steps=3, labels="device", codec="int8") as server:
        assert "codec int8 is not checked: devices keep the labels, so the server has no loss to compare" in server.choices
        server.suspend()
    assert recorded(options)["check_codec_every"] == 0
    options["run_dir"] += "-exact"
    with GpuServer(**options, steps=3, labels="device") as server:
        assert not any("is not checked" in choice for choice in server.choices)
