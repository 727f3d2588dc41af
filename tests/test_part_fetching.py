"""A device's part of the model on its way to the disk: cut off, killed, damaged, wanted twice, without room. No sockets."""

import errno
import hashlib
import io
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from protocol_samples import SETTINGS

from edge_client import ConnectionFailed, StateError
from edge_client.membership import Membership
from edge_client.part.fetching import fetch_part, part_digest
from edge_client.part.part_cache import PartCache
from protocol import (
    CODECS,
    AskPart,
    AskPiece,
    Hello,
    Message,
    Part,
    PartFile,
    Piece,
    Ping,
    Pong,
    RemoteProtocolError,
    Session,
    Side,
    Welcome,
)
from protocol.settings import ABILITIES
from storage import HEAD_GRAPH_FILES, HEAD_WEIGHTS, ModelError, required_files

PIECE = 1000  # bytes; servers decide how many
ROOM = 10**6


class Killed(BaseException):
    """Nothing that is done about exceptions happens to it."""


def contents(*, seed: int = 0) -> dict[str, bytes]:
    """A part of as many blocks as SETTINGS say, with files of no, one and several whole pieces."""
    draw = random.Random(seed)
    sizes = (1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 7 * PIECE + 3)
    names = (*required_files(SETTINGS.cut_layer), "tokenizer.json")
    return {name: draw.randbytes(sizes[number % len(sizes)]) for number, name in enumerate(names)}


def described(name: str, content: bytes) -> PartFile:
    return PartFile(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


class Server:
    """Hands over files, over connections that are lost when ``lose`` says so, and counts what it sends."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = tuple(described(name, content) for name, content in files.items())
        self.content = {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        self.software, self.edge_weights, self.settings = "0.1.0", "float32", SETTINGS
        self.lose: Callable[[], bool] = lambda: False
        self.spoil: Callable[[bytes], bytes] = lambda data: data
        self.sent: list[tuple[str, int, int]] = []
        """Digest, offset and length of each piece, whether it arrived or not."""
        self.hellos: list[Hello] = []

    @property
    def num_bytes(self) -> int:
        return sum(length for _, _, length in self.sent)

    def dial(self) -> Any:
        return Link(self)

    def answer(self, question: Message) -> Message:
        if isinstance(question, Ping):
            return Pong(software=self.software, run="r", clients=1, joined=0, step=0, edge_weights=self.edge_weights)
        if isinstance(question, Hello):
            self.hellos.append(question)
            return Welcome(run="r", settings=self.settings, fingerprint="f")
        if isinstance(question, AskPart):
            return Part(index=question.index, files=self.files)
        assert isinstance(question, AskPiece)
        data = self.content[question.sha256][question.offset :][:PIECE]
        self.sent.append((question.sha256, question.offset, len(data)))
        return Piece(index=question.index, data=self.spoil(data))

    def member(self) -> Membership:
        return Membership(
            self.dial,
            Hello(name="a", fingerprint="", codecs=CODECS, abilities=ABILITIES),
            wants_part=True,
            sleep=lambda _: None,
        )


class Link:
    """A connection: both sides keep to the protocol's states."""

    url = "ws://here"

    def __init__(self, server: Server) -> None:
        self._server = server
        self.session, self._other = Session(Side.CLIENT), Session(Side.SERVER)
        self.num_bytes = 0

    def exchange(self, question: Message, kind: type) -> Message:
        understood = self._other.receive(self.session.send(question))
        assert understood is not None
        sent = self._other.send(self._server.answer(understood))
        if self._server.lose():
            raise ConnectionFailed("lost")
        answer = self.session.receive(sent)
        assert isinstance(answer, kind)
        return answer

    def watch_link(self, *_: object, **__: int) -> None:
        pass

    def abandon(self) -> None:
        pass


def fetched(server: Server, folder: Path, *, max_bytes: int = ROOM, report: Any = None) -> dict[str, bytes]:
    _, paths = fetch_part(server.member(), PartCache(folder, max_bytes), report)
    return {name: path.read_bytes() for name, path in paths.items()}


@pytest.fixture
def files() -> dict[str, bytes]:
    return contents()


@pytest.fixture
def server(files: dict[str, bytes]) -> Server:
    return Server(files)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "parts"


def total(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def path_of(folder: Path, content: bytes) -> Path:
    return folder / hashlib.sha256(content).hexdigest()


def test_part_is_fetched_once_and_kept_by_what_is_in_it(server: Server, files: dict[str, bytes], folder: Path) -> None:
    assert fetched(server, folder) == files
    assert server.num_bytes == total(files)
    assert {path.name for path in folder.iterdir()} == set(server.content)
    assert all(path.stat().st_mode & 0o77 == 0 for path in folder.iterdir())
    assert fetched(server, folder) == files
    assert server.num_bytes == total(files)


def test_another_part_takes_over_what_is_the_same(server: Server, files: dict[str, bytes], folder: Path) -> None:
    fetched(server, folder)
    other = Server({**files, "block-0.safetensors": b"other weights", "merges.txt": files["tokenizer.json"]})
    assert fetched(other, folder)["block-0.safetensors"] == b"other weights"
    assert other.num_bytes == len(b"other weights")
    assert part_digest(other.files) != part_digest(server.files) == part_digest(tuple(reversed(server.files)))


@pytest.mark.parametrize("more", [(), (HEAD_WEIGHTS,)])
def test_head_is_fetched_where_the_labels_are_on_devices_and_nothing_else_again(
    files: dict[str, bytes], folder: Path, more: tuple[str, ...]
) -> None:
    fetched(Server(files), folder)
    head = {name: name.encode() for name in (*HEAD_GRAPH_FILES, *more)}
    server = Server({**files, "part.json": b"with a head", **head})
    assert fetched(server, folder) == {**files, "part.json": b"with a head"}, "of a run with the labels on the server"
    server.settings = replace(SETTINGS, labels="device", check_codec_every=0)
    assert fetched(server, folder) == {**files, "part.json": b"with a head", **head}
    assert server.num_bytes == len(b"with a head") + total(head)
    lacking = Server(files)
    lacking.settings = server.settings
    with pytest.raises(RemoteProtocolError, match=r"the server's part of the model for cut layer \d lacks head.onnx"):
        fetched(lacking, folder)


def test_progress_counts_what_was_lacking(server: Server, files: dict[str, bytes], folder: Path) -> None:
    told: list[tuple[int, int]] = []
    fetched(server, folder, report=lambda *told_now: told.append(told_now))
    assert told[-1] == (total(files), total(files))
    assert told == sorted(told)
    told.clear()
    path_of(folder, files["part.json"]).unlink()
    fetched(server, folder, report=lambda *told_now: told.append(told_now))
    assert told == [(0, len(files["part.json"])), (len(files["part.json"]),) * 2]
    told.clear()
    fetched(server, folder, report=lambda *told_now: told.append(told_now))
    assert told == []


def fetched_at_last(server: Server, folder: Path, report: Any = None) -> dict[str, bytes]:
    """As `fetched`, by a device that is started again whenever it was killed."""
    while True:
        try:
            return fetched(server, folder, report=report)
        except Killed:
            continue


@pytest.mark.parametrize("seed", range(6))
def test_link_that_is_lost_anywhere_costs_no_more_than_the_piece_on_it(
    server: Server, files: dict[str, bytes], folder: Path, seed: int
) -> None:
    draw, num_lost = random.Random(seed), 0

    def lose() -> bool:
        nonlocal num_lost
        is_lost = draw.random() < 0.3
        num_lost += is_lost
        return is_lost

    server.lose = lose
    assert fetched(server, folder) == files
    assert num_lost > 3
    assert len(server.sent) - len(set(server.sent)) <= num_lost
    assert sum(length for _, _, length in set(server.sent)) == total(files)  # no byte is in two pieces


@pytest.mark.parametrize("seed", range(6))
def test_device_that_is_killed_anywhere_goes_on_at_the_same_byte(
    server: Server, files: dict[str, bytes], folder: Path, seed: int
) -> None:
    draw, num_killed = random.Random(seed), 0

    def kill(*_: int) -> None:
        nonlocal num_killed
        if draw.random() < 0.4:
            num_killed += 1
            for path in folder.glob("*.partial"):  # as if it had been killed while it was writing
                os.truncate(path, max(0, path.stat().st_size - draw.randrange(PIECE // 2)))
            raise Killed

    assert fetched_at_last(server, folder, kill) == files
    assert num_killed > 3
    assert server.num_bytes - total(files) <= num_killed * PIECE
    assert {path.name for path in folder.iterdir()} == set(server.content)


def test_device_that_is_killed_between_the_last_byte_and_the_name_asks_for_nothing_more(
    server: Server, files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            fetched(server, folder)
    assert fetched(server, folder) == files
    assert server.num_bytes == total(files)


def test_byte_that_is_flipped_on_the_way_is_found_and_the_file_fetched_again(
    server: Server, files: dict[str, bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flips = iter([False, True])
    server.spoil = lambda data: bytes([data[0] ^ 1]) + data[1:] if next(flips, False) else data
    with caplog.at_level(logging.WARNING):
        assert fetched(server, folder) == files
    (said,) = caplog.messages
    assert said.endswith("arrived damaged: it is fetched again")
    assert server.num_bytes <= total(files) + max(map(len, files.values()))


def test_server_that_never_sends_what_it_says_is_named(server: Server, folder: Path) -> None:
    server.spoil = lambda data: bytes(len(data))
    with pytest.raises(RemoteProtocolError, match=r"part\.json arrives with another SHA-256 than the server says"):
        fetched(server, folder)
    assert not [path for path in folder.iterdir() if path.stat().st_size]


def test_piece_that_goes_beyond_its_file_is_refused(server: Server, folder: Path) -> None:
    server.spoil = lambda data: data + b"more"
    with pytest.raises(RemoteProtocolError, match=r"a piece of part\.json goes beyond its 1 byte"):
        fetched(server, folder)


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes([data[0] ^ 1]) + data[1:]]
)
def test_what_somebody_edits_in_the_cache_is_found_said_and_fetched_again(
    server: Server, files: dict[str, bytes], folder: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes]
) -> None:
    fetched(server, folder)
    edited = path_of(folder, files["forward.onnx"])
    edited.write_bytes(spoil(files["forward.onnx"]))
    with caplog.at_level(logging.WARNING):
        assert fetched(server, folder) == files
    (said,) = caplog.messages
    assert said == f"{edited}, kept of forward.onnx, is not what was fetched: it was edited or damaged; it is fetched again"
    assert server.num_bytes == total(files) + len(files["forward.onnx"])


@pytest.mark.parametrize("spoil", [lambda data: bytes(len(data)), lambda data: data + bytes(20 * PIECE)])
def test_beginning_that_is_damaged_is_fetched_again(
    server: Server, files: dict[str, bytes], folder: Path, spoil: Callable[[bytes], bytes]
) -> None:
    def kill(done: int, _: int) -> None:
        if done > total(files) // 2:
            raise Killed

    with pytest.raises(Killed):
        fetched(server, folder, report=kill)
    (begun,) = (path for path in folder.glob("*.partial") if path.stat().st_size)
    begun.write_bytes(spoil(begun.read_bytes()))
    assert fetched(server, folder) == files


# The disk


class FullDisk(io.FileIO):
    room = 0

    def write(self, data: Any) -> int:
        data = bytes(data)[: FullDisk.room]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FullDisk.room -= len(data)
        return super().write(data)


def test_full_disk_is_one_sentence_and_what_is_there_stays(
    server: Server, files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk.room = total(files) // 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda number, *_, **__: FullDisk(number, "r+b"))
        with pytest.raises(StateError, match=r"cannot be kept in .*: No space left on device; free some space there$"):
            fetched(server, folder)
    assert fetched(server, folder) == files
    assert server.num_bytes <= total(files) + PIECE


def test_part_for_which_the_disk_has_no_room_is_not_begun(
    server: Server, files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(server, folder)
    path_of(folder, files["forward.onnx"]).unlink()
    size, free = len(files["forward.onnx"]), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(
        StateError, match="of the server's part of the model are still to be fetched, and 0 MB are free; free some"
    ):
        fetched(server, folder)
    assert server.num_bytes == total(files)
    free = size
    assert fetched(server, folder) == files


def test_part_that_is_larger_than_the_bound_is_refused(server: Server, files: dict[str, bytes], folder: Path) -> None:
    with pytest.raises(StateError, match=r"this device keeps at most 0\.0\d* MB: raise --part-bytes"):
        fetched(server, folder, max_bytes=total(files) - 1)
    assert server.num_bytes == 0
    assert fetched(server, folder, max_bytes=total(files)) == files


def test_what_is_used_least_recently_goes_first_and_what_is_needed_stays(folder: Path) -> None:
    first, second, third = (contents(seed=seed) for seed in range(3))
    for number, files in enumerate((first, second)):
        fetched(Server(files), folder)
        for content in files.values():
            os.utime(path_of(folder, content), ns=(number, number))
    fetched(Server(first), folder)  # used again
    fetched(Server(third), folder, max_bytes=2 * total(third))
    kept = {path.name for path in folder.iterdir()}
    assert kept == set(Server(first).content) | set(Server(third).content)
    fetched(Server(second), folder, max_bytes=total(second))
    assert {path.name for path in folder.iterdir()} == set(Server(second).content)


def test_whole_file_stays_where_another_device_has_left_a_beginning_of_it(folder: Path) -> None:
    files = contents()
    fetched(Server(files), folder)
    for number, (digest, content) in enumerate(Server(files).content.items()):
        (folder / f"{digest}.{number:016}.partial").write_bytes(content[:-1])
    path_of(folder, files["part.json"]).unlink()
    assert fetched(server := Server(files), folder, max_bytes=total(files)) == files
    assert server.num_bytes == len(files["part.json"])
    assert {path.name for path in folder.iterdir()} == set(server.content)


def test_folder_that_cannot_be_made_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot be kept in .*file/parts: Not a directory; choose another --state-dir"):
        fetched(server, tmp_path / "file" / "parts")


# Several devices


def test_devices_that_fetch_at_once_do_not_disturb_each_other(server: Server, files: dict[str, bytes], folder: Path) -> None:
    """Each waits for the other at every piece, so that both are at the same file all the time."""
    both, found = threading.Barrier(2), {}

    def together(*_: int) -> None:
        try:
            both.wait(timeout=1)
        except threading.BrokenBarrierError:
            pass  # the other is done

    def fetch(name: str) -> None:
        found[name] = fetched(server, folder, report=together)

    threads = [threading.Thread(target=fetch, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"a": files, "b": files}
    assert {path.name for path in folder.iterdir()} == set(server.content)


def test_device_leaves_alone_what_another_is_writing(folder: Path) -> None:
    mine, other = contents(seed=1), contents(seed=2)
    file = described("block-0.safetensors", mine["block-0.safetensors"])
    cache = PartCache(folder, ROOM)
    with cache.unfinished(file) as unfinished:
        unfinished.append(b"x")
        with cache.unfinished(file) as second:
            assert second.size == 0
        fetched(Server(other), folder, max_bytes=total(other))
        assert len(list(folder.glob("*.partial"))) == 1
    fetched(Server(contents(seed=3)), folder, max_bytes=total(other))
    assert not list(folder.glob("*.partial"))


# What a server may offer


def without(name: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {key: content for key, content in files.items() if key != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((without(name), f"for cut layer 1 lacks {name}") for name in ("part.json", "backward.onnx", "block-0.safetensors")),
        (
            lambda files: {**files, "forward.onnx": bytes(2**20 + 1)},
            "forward.onnx of .* has 1048577 bytes; it can have at most",
        ),
        (
            lambda files: {**files, "part.json": bytes(2**20 + 1)},
            "part.json of .* has 1048577 bytes; it can have at most 1048576",
        ),
    ],
)
def test_part_that_cannot_be_one_is_refused_before_anything_is_fetched(
    files: dict[str, bytes], folder: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], reason: str
) -> None:
    server = Server(change(files))
    with pytest.raises(RemoteProtocolError, match=reason):
        fetched(server, folder)
    assert (server.sent, folder.exists()) == ([], False)


def test_part_of_more_blocks_than_files_is_refused_before_they_are_named(server: Server, folder: Path) -> None:
    server.settings = replace(SETTINGS, cut_layer=10**6)
    with pytest.raises(RemoteProtocolError, match="has 9 files, too few for cut layer 1000000"):
        fetched(server, folder)
    assert (server.sent, folder.exists()) == ([], False)


def test_file_that_no_part_has_is_not_fetched(files: dict[str, bytes], folder: Path) -> None:
    server = Server({**files, "block-1.safetensors": b"1", "run_me.py": b"2"})
    assert fetched(server, folder) == files
    assert server.num_bytes == total(files)


def test_server_that_hands_over_nothing_is_named(server: Server) -> None:
    server.edge_weights, server.software = "", "0.1.0\n"
    with pytest.raises(
        ModelError, match=r"server at ws://here \(splitlora 0\.1\.0\\n\) hands over no part .*: update it, or give --model"
    ):
        server.member()


def test_device_without_a_model_says_from_then_on_whose_part_it_has(server: Server, folder: Path) -> None:
    lost = iter([False, False, True])
    server.lose = lambda: next(lost, False)
    fetched(server, folder)
    assert [hello.fingerprint for hello in server.hellos] == ["", "f"]
