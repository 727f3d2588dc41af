"""The server's side of handing a device its part: it makes the files once, and gives them out piece by piece."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import SECONDS, RawClient
from conftest import metrics, permissions, run_in_thread
from safetensors.numpy import save_file

import gpu_server.run_setup
from gpu_server import ConfigError, GpuServer, RunEndedEarly, ServerConfig
from gpu_server.edge_part import EdgePartStore, PartUnavailable
from gpu_server.run_directory import RunDirectory
from gpu_server.serving.peer import Peer
from protocol import (
    PIECE_BYTES,
    ActivationGradient,
    Activations,
    AdapterGradient,
    AskPart,
    AskPiece,
    Done,
    EdgeAdapter,
    Failure,
    Goodbye,
    Hello,
    Join,
    Message,
    Part,
    PartFile,
    Piece,
    Ping,
    Pong,
    RunEnd,
    Seconds,
    Start,
    Welcome,
)
from protocol.settings import ABILITIES
from split_model import PretrainedModel
from storage import EDGE_WEIGHTS, ModelError, PartDescription, load_tokenizer, required_files

FILES = {
    "part.json": b"{}",
    "block-0.safetensors": np.random.default_rng(0).bytes(2 * PIECE_BYTES + 5),
    "merges.txt": b"",
}
WANTED = {"fingerprint": "f", "targets": ("c_attn",)}


class Builder:
    """Makes the files, and counts how often."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        self.has_begun.set()
        assert self.may_go_on.wait(SECONDS)
        for number, (name, data) in enumerate(FILES.items()):
            if number and self.error is not None:
                raise self.error
            (folder / name).write_bytes(data)


def store_in(folder: Path, builder: Callable[[Path], object], **wanted: Any) -> EdgePartStore:
    return EdgePartStore(folder / "edge-part", wanted.pop("weights", "float32"), {**WANTED, **wanted}, builder)


def fetched(file: PartFile, piece: Callable[[str, int], bytes]) -> bytes:
    data = b""
    while len(data) < file.size:
        data += piece(file.sha256, len(data))
    assert hashlib.sha256(data).hexdigest() == file.sha256
    return data


# The files


def test_files_are_described_and_come_in_pieces(tmp_path: Path) -> None:
    store = store_in(tmp_path, Builder())
    files = store.make()
    assert {file.name: fetched(file, store.piece) for file in files} == FILES
    block = next(file for file in files if file.name.startswith("block"))
    assert [len(store.piece(block.sha256, offset)) for offset in (0, 7, PIECE_BYTES, 2 * PIECE_BYTES + 4)] == [
        PIECE_BYTES,
        PIECE_BYTES,
        PIECE_BYTES,
        1,
    ]
    assert permissions(store.folder) == 0o700


def test_server_that_is_started_again_finds_the_files_and_makes_none(tmp_path: Path) -> None:
    first = store_in(tmp_path, Builder())
    files, builder = first.make(), Builder()
    again = store_in(tmp_path, builder)
    assert again.make() == files
    assert builder.calls == 0
    assert {file.name: fetched(file, again.piece) for file in files} == FILES


def damage(folder: Path, how: str) -> None:
    block, manifest = folder / "block-0.safetensors", folder / "manifest.json"
    content = bytearray(block.read_bytes())
    if how == "a flipped bit":
        content[PIECE_BYTES] ^= 4
        block.write_bytes(content)
    elif how == "a file that was cut off":
        block.write_bytes(content[:-1])
    elif how == "a file that is gone":
        block.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "a manifest that is none":
        manifest.write_bytes(b"[1, 2]")
    elif how == "a manifest that was cut off":
        manifest.write_bytes(manifest.read_bytes()[:-9])
    elif how == "a manifest with a file elsewhere":
        text = json.loads(manifest.read_text())
        text["files"][0]["name"] = "../run.json"
        manifest.write_text(json.dumps(text))


@pytest.mark.parametrize(
    "how",
    [
        *("a flipped bit", "a file that was cut off", "a file that is gone", "no manifest", "a manifest that is none"),
        *("a manifest that was cut off", "a manifest with a file elsewhere"),
    ],
)
def test_files_that_are_not_whole_are_made_anew(tmp_path: Path, how: str) -> None:
    files, builder = store_in(tmp_path, Builder()).make(), Builder()
    damage(tmp_path / "edge-part", how)
    again = store_in(tmp_path, builder)
    assert again.make() == files
    assert builder.calls == 1
    assert {file.name: fetched(file, again.piece) for file in files} == FILES


@pytest.mark.parametrize(
    "other", [{"weights": "int8"}, {"fingerprint": "g"}, {"targets": ("c_fc",)}, {"cut_layer": 2}, {"head": True}]
)
def test_files_that_follow_from_something_else_are_made_anew(tmp_path: Path, other: dict[str, Any]) -> None:
    store_in(tmp_path, Builder()).make()
    (tmp_path / "edge-part" / "block-9.safetensors").write_bytes(b"of another cut")
    builder = Builder()
    names = {file.name for file in store_in(tmp_path, builder, **other).make()}
    assert builder.calls == 1
    assert names == FILES.keys()
    assert {path.name for path in (tmp_path / "edge-part").iterdir()} == {*FILES, "manifest.json"}


@pytest.mark.parametrize(
    ("error", "may_be_mended", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True, "cannot be written to .*: No space left on device; mend that"),
        (ModelError("tensor 'a' has infinite values"), False, "^tensor 'a' has infinite values$"),
    ],
)
def test_files_that_cannot_be_made_leave_nothing_and_may_be_made_later(
    tmp_path: Path, error: Exception, may_be_mended: bool, reason: str
) -> None:
    builder = Builder(error)
    store = store_in(tmp_path, builder)
    with pytest.raises(PartUnavailable, match=reason) as caught:
        store.make()
    assert caught.value.may_be_mended == may_be_mended
    assert list(tmp_path.iterdir()) == []
    builder.error = None
    assert {file.name for file in store.make()} == FILES.keys()


def test_part_of_more_files_than_can_be_handed_over_is_said_so(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        for number in range(257):
            (folder / f"block-{number}.safetensors").touch()

    with pytest.raises(PartUnavailable, match="has 257 files, and at most 256 can be handed over; use a smaller --cut-layer"):
        store_in(tmp_path, build).make()
    assert list(tmp_path.iterdir()) == []


def test_disk_that_takes_no_more_weights_is_said_so(tmp_path: Path) -> None:
    """Which the library says that writes them, in its own way."""

    def build(folder: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PIECE_BYTES, before[1]))
        try:
            save_file({"a": np.zeros(PIECE_BYTES, np.float32)}, folder / "block-0.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(PartUnavailable, match=r"cannot be written to .*edge-part: .*File too large.*; mend that, or start"):
        store_in(tmp_path, build).make()
    assert list(tmp_path.iterdir()) == []


def test_server_that_was_killed_while_it_made_the_files_leaves_none_to_the_next(tmp_path: Path) -> None:
    class Killed(BaseException):
        """Nothing that is done about exceptions happens to it."""

    def build(folder: Path) -> None:
        (folder / "block-0.safetensors").write_bytes(b"half of i")
        raise Killed

    directory = RunDirectory(tmp_path / "run")
    store = EdgePartStore(directory.edge_part_folder, "float32", WANTED, build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu_server.edge_part.remove_unfinished_part", lambda _: None)
        with pytest.raises(Killed):
            store.make()
    assert [path.name for path in directory.path.iterdir()] == ["edge-part.unfinished"]
    directory.hold()
    directory.release()
    assert not (directory.path / "edge-part.unfinished").exists()


def test_piece_of_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    store = store_in(tmp_path, Builder())
    with pytest.raises(PartUnavailable, match="not made yet"):
        store.piece("0" * 64, 0)
    block, merges, _ = store.make()
    with pytest.raises(LookupError, match=f"no file of the part has the SHA-256 {'0' * 64}"):
        store.piece("0" * 64, 0)
    for offset in (block.size, block.size + 1, 2**53):
        with pytest.raises(
            LookupError, match=f"block-0.safetensors of the part has 2,097,157 bytes, and no piece from byte {offset} on"
        ):
            store.piece(block.sha256, offset)
    with pytest.raises(LookupError, match=r"merges.txt of the part has 0 bytes, and no piece from byte 0 on"):
        store.piece(merges.sha256, 0)


@pytest.mark.parametrize("how", ["a file that is gone", "a file that was cut off"])
def test_file_that_somebody_spoils_meanwhile_is_made_anew(tmp_path: Path, how: str) -> None:
    builder = Builder()
    store = store_in(tmp_path, builder)
    block = store.make()[0]
    damage(store.folder, how)
    with pytest.raises(PartUnavailable, match="will be made anew") as caught:
        store.piece(block.sha256, 2 * PIECE_BYTES)
    assert caught.value.may_be_mended
    assert store.files is None
    store.make()
    assert builder.calls == 2
    assert fetched(block, store.piece) == FILES["block-0.safetensors"]


# The conversation


def options(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    usual = {"cut_layer": 1, "lora_rank": 2, "device": "cpu", "dtype": "float32", "steps": 1, "micro_batches": 1}
    return {"model": str(model), "run_dir": str(folder / "run"), "port": 0, **usual, **more}


@pytest.fixture
def serving(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``serving(builder, **settings)``: a server whose part ``builder`` makes."""

    @contextmanager
    def serve(builder: Callable[[Path], object], **settings: Any) -> Iterator[GpuServer]:
        make_store = gpu_server.run_setup._edge_part

        def with_builder(*arguments: Any) -> EdgePartStore | None:
            store = make_store(*arguments)
            if store is not None:
                store._build = builder
            return store

        monkeypatch.setattr(gpu_server.run_setup, "_edge_part", with_builder)
        with GpuServer(**options(tiny_model, tmp_path, **settings)) as server:
            yield server

    return serve


class Device(RawClient):
    """A device without a model."""

    def __init__(self, server: GpuServer) -> None:
        super().__init__(int(server.url.rpartition(":")[2]), None, encrypted=False)
        self.index = 0

    def ask(self, message: Message) -> Any:
        self.say(message)
        return self.hear()

    def greet(self, name: str = "a", fingerprint: str = "") -> Any:
        return self.ask(Hello(name=name, fingerprint=fingerprint, abilities=ABILITIES))

    def ask_part(self) -> Any:
        self.index += 1
        return self.ask(AskPart(index=self.index))

    def ask_piece(self, sha256: str, offset: int) -> Any:
        self.index += 1
        return self.ask(AskPiece(index=self.index, sha256=sha256, offset=offset))

    def fetch(self, file: PartFile) -> bytes:
        def piece(sha256: str, offset: int) -> bytes:
            answer = self.ask_piece(sha256, offset)
            assert isinstance(answer, Piece)
            assert answer.index == self.index
            return answer.data

        return fetched(file, piece)


def test_device_without_a_model_fetches_its_part_and_trains_with_it(
    serving: Callable[..., Any], tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpu_server")
    with serving(Builder()) as server:
        ended = run_in_thread(lambda: list(server.train()))
        with Device(server) as device:
            pong = device.ask(Ping(index=1))
            assert isinstance(pong, Pong)
            assert pong.edge_weights == "float32"
            welcome = device.greet()
            assert isinstance(welcome, Welcome)
            assert welcome.fingerprint == PretrainedModel(tiny_model).fingerprint()
            part = device.ask_part()
            assert isinstance(part, Part)
            assert {file.name: device.fetch(file) for file in part.files} == FILES
            start = device.ask(Join(num_samples=1, batch_size=1, longest=2))
            assert isinstance(start, Start)
            two = np.array([2], np.int32)
            values = np.ones((2, 32), np.float32)
            batch = Activations(
                step=1, seconds=Seconds(), lengths=two, label_counts=two, labels=np.array([3, 4], np.int32), values=values
            )
            assert isinstance(device.ask(batch), ActivationGradient)
            gradient = {name: np.zeros_like(matrix) for name, matrix in start.adapter.items()}
            assert isinstance(device.ask(AdapterGradient(step=1, seconds=Seconds(), tensors=gradient)), EdgeAdapter)
            assert isinstance(device.ask(Done(step=1)), RunEnd)
            device.say(Goodbye())
        assert len(ended.result(SECONDS)) == 1
    lines = [record.getMessage() for record in caplog.records]
    made = r"the devices' part of the model was made in \d+\.\d s: 3 files, 2\.1 MB"
    assert sum(re.fullmatch(made, line) is not None for line in lines) == 1
    assert sum(line.endswith("has fetched its part of the model, 2.1 MB") for line in lines) == 1
    (step,) = metrics(tmp_path / "run")
    assert step["clients"]["a"]["bytes_down"] < PIECE_BYTES  # the part belongs to no step
    assert not (tmp_path / "run" / "edge-part").exists()  # it is complete


def test_all_who_ask_while_the_part_is_made_get_the_same_one_and_others_are_answered_meanwhile(
    serving: Callable[..., Any],
) -> None:
    builder = Builder()
    builder.may_go_on.clear()
    with serving(builder, clients=9, max_connections=20) as server:
        devices = [Device(server) for _ in range(9)]  # more than the server has threads for messages
        for number, device in enumerate(devices):
            assert isinstance(device.greet(f"device-{number}"), Welcome)
            device.say(AskPart(index=1))
        assert builder.has_begun.wait(SECONDS)
        with Device(server) as other:
            assert all(isinstance(other.ask(Ping(index=index)), Pong) for index in range(1, 20))
        builder.may_go_on.set()
        parts = [device.hear() for device in devices]
        assert all(part.files == parts[0].files for part in parts)
        assert builder.calls == 1
        for device in devices:
            device.close()


@pytest.mark.parametrize("leaves", ["the device", "the server"])
def test_part_is_made_to_its_end_when_nobody_waits_for_it_any_more(serving: Callable[..., Any], leaves: str) -> None:
    builder = Builder()
    builder.may_go_on.clear()
    with serving(builder) as server:
        with Device(server) as device:
            device.greet()
            device.say(AskPart(index=1))
            assert builder.has_begun.wait(SECONDS)
            if leaves == "the server":
                server.suspend()
        builder.may_go_on.set()
        if leaves == "the server":
            with pytest.raises(RunEndedEarly):
                list(server.train())
            return
        with Device(server) as device:
            assert isinstance(device.greet(), Welcome)
            assert isinstance(device.ask_part(), Part)
    assert builder.calls == 1


def test_server_that_goes_on_with_a_run_hands_over_what_is_there(serving: Callable[..., Any]) -> None:
    builder = Builder()
    parts = []
    for resume in (False, True):
        with serving(builder, resume=resume) as server:
            with Device(server) as device:
                device.greet()
                parts.append(device.ask_part().files)
            server.suspend()
            with pytest.raises(RunEndedEarly):
                list(server.train())
    assert parts[0] == parts[1]
    assert builder.calls == 1


def test_disk_that_is_full_is_told_to_who_asks_and_the_run_goes_on_for_the_others(
    serving: Callable[..., Any], tiny_model: Path
) -> None:
    builder = Builder(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with serving(builder, clients=2) as server:
        with Device(server) as device:
            device.greet()
            refused = device.ask_part()
            assert isinstance(refused, Failure)
            assert "No space left on device; mend that, or start the devices with --model" in refused.reason
            assert refused.retry_after == 60.0
        with Device(server) as device, Device(server) as with_model:
            assert isinstance(with_model.greet("b", PretrainedModel(tiny_model).fingerprint()), Welcome)
            with_model.say(Join(num_samples=1, batch_size=1, longest=2))
            builder.error = None  # somebody has freed some
            assert isinstance(device.greet(), Welcome)
            assert isinstance(device.ask_part(), Part)
            assert isinstance(device.ask(Join(num_samples=1, batch_size=1, longest=2)), Start)
            assert isinstance(with_model.hear(), Start)
        assert builder.calls == 2


def test_model_of_which_no_part_can_be_made_is_refused_for_good(serving: Callable[..., Any]) -> None:
    with serving(Builder(ModelError("tensor 'a' has infinite values"))) as server, Device(server) as device:
        device.greet()
        refused = device.ask_part()
        assert isinstance(refused, Failure)
        assert (refused.reason, refused.retry_after) == ("tensor 'a' has infinite values", 0.0)


def test_what_is_not_there_is_refused_by_name(serving: Callable[..., Any]) -> None:
    with serving(Builder()) as server:
        for asked in ("digest", "offset"):
            with Device(server) as device:
                device.greet()
                block = device.ask_part().files[0]
                sha256, offset = ("0" * 64, 0) if asked == "digest" else (block.sha256, block.size)
                refused = device.ask_piece(sha256, offset)
                assert isinstance(refused, Failure)
                assert refused.retry_after == 0.0
                assert refused.reason == (
                    f"no file of the part has the SHA-256 {sha256}"
                    if asked == "digest"
                    else f"block-0.safetensors of the part has 2,097,157 bytes, and no piece from byte {offset} on"
                )


@pytest.mark.parametrize("size", ["whole pieces", "single bytes", "lists"])
def test_who_asks_more_than_twice_for_everything_is_refused(serving: Callable[..., Any], size: str) -> None:
    with serving(Builder()) as server, Device(server) as device:
        device.greet()
        block = device.ask_part().files[0]
        answers = 1
        while not isinstance(
            answer := device.ask_part()
            if size == "lists"
            else device.ask_piece(block.sha256, 0 if size == "whole pieces" else block.size - 1),
            Failure,
        ):
            answers += 1
        assert answers == 2 * 4 + 16  # the block has three pieces, part.json one
        assert answer.reason == "a has asked more than 24 times for a part of 4 pieces"
        assert answer.retry_after == 0.0


def test_each_piece_gives_a_device_as_much_time_again(serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[float | None] = []
    receive = Peer.receive

    async def noting(self: Peer, timeout: float | None) -> Message | None:
        allowed.append(timeout)
        return await receive(self, timeout)

    monkeypatch.setattr(Peer, "receive", noting)
    with serving(Builder()) as server:
        with Device(server) as device:
            device.greet()
            device.fetch(device.ask_part().files[0])
            # For Hello, AskPart and three times AskPiece; what comes next may not be awaited yet.
            assert allowed[:5] == [10.0, 600.0, 600.0, 600.0, 600.0]
        with Device(server) as device:
            device.greet("b")
            monkeypatch.setattr("gpu_server.serving.conversation.SECONDS_TO_JOIN", 0.3)
            assert isinstance(device.ask_part(), Part)
            told = device.hear()  # it asks nothing more
            assert isinstance(told, Failure)
            assert (told.reason, told.retry_after) == ("no Join came within 0.3 s", 10.0)


def test_device_without_a_model_is_told_what_to_do_where_no_part_is_handed_over(
    serving: Callable[..., Any], tiny_model: Path
) -> None:
    with serving(Builder(), dtype="float64") as server:
        with Device(server) as device:
            assert device.ask(Ping(index=1)).edge_weights == ""
            refused = device.greet()
            assert isinstance(refused, Failure)
            assert refused.reason == (
                "a has no model, and this run hands over no part of its own, as no run in float64 does; start a with --model"
            )
        with Device(server) as device:
            assert isinstance(device.greet("a", PretrainedModel(tiny_model).fingerprint()), Welcome)
            refused = device.ask_part()
            assert isinstance(refused, Failure)
            assert refused.reason == "this run hands over no part of its model; start this device with --model"


def test_each_precision_of_a_part_can_be_chosen() -> None:
    (choices,) = (item.metadata["choices"] for item in dataclasses.fields(ServerConfig) if item.name == "edge_weights")
    assert choices == EDGE_WEIGHTS


def test_run_in_float64_hands_over_nothing_in_less(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edge-weights int8 is for runs in float32"):
        GpuServer(**options(tiny_model, tmp_path, dtype="float64", edge_weights="int8"))


def test_precision_of_the_part_stays_when_a_run_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    settings = options(tiny_model, tmp_path, edge_weights="float16")
    with GpuServer(**settings) as server:
        server.suspend()
        with pytest.raises(RunEndedEarly):
            list(server.train())
    resumed: dict[str, Any] = {"run_dir": settings["run_dir"], "resume": True, "port": 0}
    assert GpuServer(**resumed).config.edge_weights == "float16"
    with pytest.raises(ConfigError, match="holds a run with edge-weights float16; it cannot go on with edge-weights int8"):
        GpuServer(**resumed, edge_weights="int8")


@pytest.mark.parametrize("weights", EDGE_WEIGHTS)
@pytest.mark.parametrize("labels", ["server", "device"])
def test_part_that_is_handed_over_is_that_of_the_run(tiny_model: Path, tmp_path: Path, weights: str, labels: str) -> None:
    settings = options(
        tiny_model,
        tmp_path,
        cut_layer=2,
        edge_weights=weights,
        lora_targets=("c_attn", "c_fc"),
        lora_dropout=0.1,
        labels=labels,
    )
    folder = tmp_path / "device"
    folder.mkdir()
    with GpuServer(**settings) as server, Device(server) as device:
        assert device.ask(Ping(index=1)).edge_weights == weights
        device.greet()
        for file in device.ask_part().files:
            (folder / file.name).write_bytes(device.fetch(file))
    part, base = PartDescription.read(folder), PretrainedModel(tiny_model)
    with_head = labels == "device"
    names = {*required_files(part.cut_layer, with_head=with_head), "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert part.head == ("embedding.safetensors" if with_head else "")
    assert (part.fingerprint, part.weights, part.cut_layer) == (base.fingerprint(), weights, 2)
    assert (part.lora_rank, part.lora_alpha, part.lora_dropout) == (2, 32.0, 0.1)
    assert part.adapted == {"attn.c_attn": (32, 96), "mlp.c_fc": (32, 128)}
    assert load_tokenizer(folder).get_vocab() == base.tokenizer().get_vocab()
    size = (folder / "block-1.safetensors").stat().st_size
    assert size < {"float32": 52_000, "float16": 28_000, "int8": 17_000}[weights]
