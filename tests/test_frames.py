"""A message in endlessly many frames, which would cost its receiver memory, ends the connection."""

import socket
from concurrent.futures import Future
from pathlib import Path

import pytest
from attacks import BINARY, RawClient, frame_header
from conftest import run_in_thread
from websockets.sync.server import ServerConnection, serve

from edge_client.connection import Connection, ConnectionFailed
from gpu_server import GpuServer
from protocol import MAX_FRAMES, Hello, Ping, Pong, Welcome, decode, encode

EMPTY = frame_header(0, b"", last=False)


def a_message_in(num_frames: int, data: bytes) -> bytes:
    return frame_header(BINARY, data, last=False) + EMPTY * (num_frames - 2) + frame_header(0, b"")


def test_server_takes_a_message_in_as_many_frames_as_are_allowed_and_no_more(tiny_model: Path, tmp_path: Path) -> None:
    with GpuServer(model=str(tiny_model), cut_layer=2, steps=1, run_dir=str(tmp_path / "run"), port=0) as server:
        port = int(server.url.rpartition(":")[2])
        with RawClient(port, None, encrypted=False) as client:
            client.send(a_message_in(MAX_FRAMES, encode(Ping())))
            assert isinstance(client.hear(), Pong)
        with RawClient(port, None, encrypted=False) as client:
            # Never finished: what counts is that it is not waited for.
            assert client.end(frame_header(BINARY, b"x", last=False) + EMPTY * MAX_FRAMES) == "cut off"


def test_device_hangs_up_on_a_message_in_too_many_frames() -> None:
    hung_up: Future[bool] = Future()

    def endless(connection: ServerConnection) -> None:
        assert isinstance(decode(connection.recv(), 2**16), Hello)
        try:
            connection.send(b"" for _ in range(10 * MAX_FRAMES))
        finally:
            hung_up.set_result(True)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with serve(endless, sock=listening, compression=None) as server:
            serving = run_in_thread(server.serve_forever)
            with (
                Connection(f"ws://127.0.0.1:{listening.getsockname()[1]}") as connection,
                pytest.raises(ConnectionFailed, match="1002"),
            ):
                connection.exchange(Hello(name="a", fingerprint="f"), Welcome)
            assert hung_up.result(timeout=30)
            server.shutdown()
            serving.result(timeout=30)
