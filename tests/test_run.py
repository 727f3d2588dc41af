"""Properties of whole runs over real sockets, besides parity."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
from conftest import adapter_bytes, metrics, run_in_thread, run_split
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from edge_client import EdgeClient
from edge_client.data import Dataset
from edge_client.torch_engine import TorchEngine
from gpu_server import GpuServer
from gpu_server.torch_engine import TorchEngine as ServerEngine
from split_model import PretrainedModel
from storage import load_tokenizer


def options(model: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "run_dir": str(run_dir), "cut_layer": 2, "lora_rank": 4, "lr": 2e-3, **more}


PARTS = ["edge_compute", "encode", "uplink", "queue", "server_compute", "downlink", "decode"]


def load(model: Path, file: Path) -> Dataset:
    return Dataset.load(file, load_tokenizer(model), PretrainedModel(model).config.end_token, 256)


@pytest.mark.parametrize("aggregate_every", [1, 3])
def test_epochs_use_every_sample_of_every_client_exactly_so_often(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], aggregate_every: int
) -> None:
    files = {name: pairs_file(name, count, 100 * i) for i, (name, count) in enumerate({"a": 11, "b": 3, "c": 25}.items())}
    clients = {name: {"data": file, "batch_size": 4} for name, file in files.items()}
    result = run_split(options(tiny_model, tmp_path / "run", epochs=2, aggregate_every=aggregate_every), clients)
    data = {name: load(tiny_model, file) for name, file in files.items()}
    for name, steps in result.steps.items():
        assert len(steps) == 2 * data[name].num_batches(4)
        assert sum(step.tokens for step in steps) == 2 * sum(len(sample.tokens) - 1 for sample in data[name].samples)
    labels = sum(sample.num_labels for dataset in data.values() for sample in dataset.samples)
    assert sum(row["labelled_tokens"] for row in metrics(tmp_path / "run")) == 2 * labels
    assert len(result.records) == 2 * 7
    assert sum(record.tokens for record in result.records) == sum(s.tokens for steps in result.steps.values() for s in steps)


def test_run_is_the_same_to_the_bit_whoever_comes_first_with_dropout_and_shuffle(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    files = {name: pairs_file(name, 20, 100 * i) for i, name in enumerate("abc")}
    outcomes = []
    for number, order in enumerate(["abc", "cba"]):
        run_dir = tmp_path / f"run-{number}"
        clients = {name: {"data": files[name], "batch_size": 3, "dtype": "float32"} for name in order}
        settings = options(tiny_model, run_dir, steps=12, lora_dropout=0.3, seed=5, lora_targets=("c_attn", "c_fc"))
        outcomes.append((run_split(settings, clients).losses, adapter_bytes(run_dir)))
    assert outcomes[0] == outcomes[1]


def test_another_seed_is_another_run(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> None:
    client = {"a": {"data": pairs_file("a", 20), "batch_size": 3}}
    losses = [run_split(options(tiny_model, tmp_path / f"{seed}", steps=5, seed=seed), client).losses for seed in (1, 2)]
    assert losses[0] != losses[1]


def test_run_with_its_residual_stream_in_bfloat16_learns_what_one_in_float32_learns(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    client = {"a": {"data": pairs_file("a", 20), "batch_size": 3}}
    losses = {}
    for residual in ("float32", "bfloat16"):
        settings = options(tiny_model, tmp_path / residual, steps=5, dtype="bfloat16", residual=residual)
        losses[residual] = run_split(settings, client).losses
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    assert json.loads((tmp_path / "bfloat16/run.json").read_text())["config"]["residual"] == "bfloat16"


def test_metrics_say_where_every_second_of_a_step_went(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    clients = {name: {"data": pairs_file(name, 20), "batch_size": 3} for name in "ab"}
    result = run_split(options(tiny_model, tmp_path / "run", steps=6), clients)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == result.losses
    for row in rows:
        assert row.keys() == {
            *("step", "time", "step_seconds", "loss", "learning_rate", "gradient_norm", "labelled_tokens", "tokens"),
            *("deadline", "codec", "server_compute", "clients"),
        }
        assert row["server_compute"] > 0
        assert row["deadline"] > 0
        assert row["clients"].keys() == {"a", "b"}
        for client in row["clients"].values():
            assert client["bytes_up"] > 0
            assert client["bytes_down"] > 0
            assert list(client["seconds"]) == PARTS
            assert all(seconds >= 0 for seconds in client["seconds"].values())
            assert client["seconds"]["edge_compute"] > 0
    for name, steps in result.steps.items():
        told = [sum(row["clients"][name]["seconds"].values()) for row in rows]
        # A question tells of the time before it: what follows a step's last one stands in the next row.
        assert sum(told) == pytest.approx(sum(sum(vars(step.seconds).values()) for step in steps), rel=0.3)
    described = json.loads((tmp_path / "run/run.json").read_text())
    assert described["config"]["steps"] == 6
    assert described["fingerprint"] == PretrainedModel(tiny_model).fingerprint()
    assert described["versions"].keys() == {"splitlora", "torch", "numpy"}


class Wiretap:
    """Forwards one connection and counts its bytes in both directions."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(("127.0.0.1", self._target)) as far:
            back = threading.Thread(target=self._forward, args=(far, near, "down"))
            back.start()
            self._forward(near, far, "up")
            back.join()

    def _forward(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        while data := source.recv(65536):
            setattr(self, direction, getattr(self, direction) + len(data))
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


@contextmanager
def tapped(port: int) -> Iterator[Wiretap]:
    tap = Wiretap(port)
    try:
        yield tap
    finally:
        tap.close()


def test_bytes_in_the_metrics_are_those_on_the_socket(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    file = pairs_file("a", 20)
    with GpuServer(port=0, **options(tiny_model, tmp_path / "run", steps=5)) as server:
        with tapped(int(server.url.rpartition(":")[2])) as tap:

            def take_part() -> tuple[int, int]:
                with EdgeClient(tap.url, engine="torch", model=str(tiny_model), data=file) as client:
                    steps = client.train()
                    for _ in range(5):
                        next(steps)
                    # The last line of metrics is written when its replies are sent: here all of them have arrived.
                    return tap.up, tap.down

            on_the_wire = run_in_thread(take_part).result(timeout=60)
        list(server.train())
    for direction, counted in zip(("bytes_up", "bytes_down"), on_the_wire, strict=True):
        assert sum(client[direction] for row in metrics(tmp_path / "run") for client in row["clients"].values()) == counted


def test_initial_adapter_is_where_the_run_starts(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> None:
    start = reference.make_adapter(tiny_model, tmp_path / "start", targets=["c_attn"])
    held_out = pairs_file("held-out", 10, 500)
    settings = options(tiny_model, tmp_path / "run", steps=1, lora_alpha=8.0, init_adapter=str(start))
    result = run_split(settings, {"a": {"data": pairs_file("a", 9), "eval_data": held_out}})
    pairs = [json.loads(line) for line in held_out.read_text().splitlines()]
    samples = reference.encode([(pair["prompt"], pair["completion"]) for pair in pairs], tiny_model)
    expected = reference.perplexity(reference.load_peft(tiny_model, start), samples)
    assert result.perplexity["a"][0] == pytest.approx(expected, rel=1e-4)


def test_bfloat16_weights_train_nearly_as_float32_ones_do(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    client = {"data": pairs_file("a", 20), "batch_size": 3}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        settings = options(tiny_model, tmp_path / dtype, steps=10, dtype=dtype)
        losses[dtype] = run_split(settings, {"a": {**client, "dtype": dtype}}).losses
    # bfloat16 has 8 bits of mantissa; the loss is a mean over some dozens of tokens.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]


def test_round_without_any_label_leaves_the_adapter_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    # The first rows are cut before their completion begins; the last one has labels.
    lines = [{"prompt": "x" * 400, "completion": "y"}] * 4 + [{"prompt": "a", "completion": "b c d"}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = reference.make_adapter(tiny_model, tmp_path / "start", targets=["c_attn"])
    settings = options(tiny_model, tmp_path / "run", steps=2, aggregate_every=2, lora_alpha=8.0, init_adapter=str(start))
    client = {"data": file, "batch_size": 1, "max_length": 12, "shuffle": False}
    result = run_split({**settings, "weight_decay": 0.0}, {"a": client})
    assert [record.labelled_tokens for record in result.records] == [0, 0]
    found, before = (reference.read_adapter(folder) for folder in (tmp_path / "run/adapter", start))
    assert reference.largest_difference(found, before) == 0


@pytest.mark.parametrize("busy", ["server", "device"])
def test_computing_for_long_does_not_lose_a_connection(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    busy: str,
) -> None:
    caplog.set_level("INFO")
    for side in ("gpu_server.serving.http_handshake", "edge_client.connection"):
        monkeypatch.setattr(f"{side}.SECONDS_BETWEEN_PINGS", 0.05)
        monkeypatch.setattr(f"{side}.SECONDS_TO_PONG", 0.3)
    owner, name, peer = (ServerEngine, "train", Side.CLIENT) if busy == "server" else (TorchEngine, "backward", Side.SERVER)
    compute, receive = getattr(owner, name), Protocol.recv_frame
    pongs = threading.Semaphore(0)

    def watched_receive(self: Protocol, frame: Frame) -> None:
        receive(self, frame)
        if frame.opcode is Opcode.PONG and self.side is peer:
            pongs.release()

    def compute_for_long(*arguments: Any) -> Any:
        while pongs.acquire(blocking=False):
            pass  # those of before
        for _ in range(10):  # longer than the peer bears silence
            assert pongs.acquire(timeout=60)
        return compute(*arguments)

    monkeypatch.setattr(owner, name, compute_for_long)
    monkeypatch.setattr(Protocol, "recv_frame", watched_receive)
    client = {"data": pairs_file("a", 9), "state_dir": tmp_path / "state"}
    result = run_split(options(tiny_model, tmp_path / "run", steps=1), {"a": client})
    assert len(result.losses) == 1
    assert "lost" not in caplog.text
