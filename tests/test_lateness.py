"""Lateness is never final: whoever stalls is refused for a while only, and a device comes back in mid-run."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attacks import SECONDS, RawClient
from conftest import run_in_thread

from edge_client import ConnectionFailed, EdgeClient
from edge_client.connection import Connection, SecretRefused
from gpu_server import GpuServer
from gpu_server.federation.deadline import Deadline
from gpu_server.serving.conversation import Conversations
from protocol import Failure, Hello, Welcome
from split_model import PretrainedModel


def options(model: Path, folder: Path, **more: Any) -> dict[str, Any]:
    usual = {"cut_layer": 1, "lora_rank": 2, "device": "cpu", "dtype": "float32", "steps": 4}
    return {"model": str(model), "run_dir": str(folder / "run"), "port": 0, **usual, **more}


def port_of(server: GpuServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_client_that_says_nothing_may_try_again(tiny_model: Path, tmp_path: Path) -> None:
    with GpuServer(**options(tiny_model, tmp_path, handshake_seconds=0.3)) as server:
        with RawClient(port_of(server), None, encrypted=False) as late:
            told = late.hear()
        assert isinstance(told, Failure)
        assert (told.reason, told.retry_after) == ("no Hello came within 0.3 s", 10.0)


def test_client_that_is_long_in_loading_its_model_may_try_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_server.serving.conversation.SECONDS_TO_JOIN", 0.3)
    with GpuServer(**options(tiny_model, tmp_path)) as server:
        with RawClient(port_of(server), None, encrypted=False) as late:
            late.say(Hello(name="a", fingerprint=PretrainedModel(tiny_model).fingerprint()))
            assert isinstance(late.hear(), Welcome)
            told = late.hear()
        assert isinstance(told, Failure)
        assert (told.reason, told.retry_after) == ("no Join came within 0.3 s", 10.0)


@pytest.mark.parametrize("aggregate_every", [1, 3])
def test_device_whose_link_stalls_when_it_comes_back_is_heard_the_next_time(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    aggregate_every: int,
) -> None:
    monkeypatch.setattr("gpu_server.serving.conversation.SECONDS_TO_TRY_AGAIN", 0.2)
    refused, refuse = threading.Event(), Conversations._refuse

    async def noting(self: Conversations, *arguments: Any, **more: Any) -> None:
        await refuse(self, *arguments, **more)
        refused.set()

    monkeypatch.setattr(Conversations, "_refuse", noting)
    settings = options(tiny_model, tmp_path, handshake_seconds=1.0, aggregate_every=aggregate_every)
    with GpuServer(**settings) as server:
        client = EdgeClient(
            server.url, engine="torch", model=str(tiny_model), data=pairs_file("a", 9), device="cpu", dtype="float32"
        )
        with client:
            steps = client.train()
            next(steps)
            exchange = Connection.exchange

            def stalled(self: Connection, message: Any, *kinds: type) -> Any:
                if isinstance(message, Hello) and not refused.is_set():
                    assert refused.wait(SECONDS)
                return exchange(self, message, *kinds)

            monkeypatch.setattr(Connection, "exchange", stalled)
            connection = client._membership._server.connection
            assert connection is not None
            connection._socket.socket.shutdown(socket.SHUT_RDWR)
            assert [step.number for step in steps] == [2, 3, 4]
        assert len(list(server.train())) == 4
    assert refused.is_set()


def test_run_goes_on_without_a_device_that_is_late_and_takes_it_in_again_when_it_asks(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "gpu_server")
    device = {
        "engine": "torch",
        "model": str(tiny_model),
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 1,
        "state_dir": tmp_path / "state",
    }
    files = {name: pairs_file(name, 9, 100 * i) for i, name in enumerate("ab")}
    step_1_is_done, a_is_ahead = threading.Event(), threading.Event()
    monkeypatch.setattr(Deadline, "seconds", lambda *_: 0.05 if step_1_is_done.is_set() else 1000.0)

    def take_part_late() -> list[int]:
        with EdgeClient(server.url, data=files["b"], name="b", **device) as client:
            steps = client.train()
            first = next(steps).number
            assert a_is_ahead.wait(SECONDS)
            return [first, *(step.number for step in steps)]

    settings = {"clients": 2, "quorum": 1, "steps": 6}
    with GpuServer(**options(tiny_model, tmp_path, **settings)) as server:
        late = run_in_thread(take_part_late)
        with EdgeClient(server.url, data=files["a"], name="a", **device) as client:
            steps = client.train()
            assert next(steps).number == 1
            step_1_is_done.set()
            assert [next(steps).number for _ in range(3)] == [2, 3, 4]
            a_is_ahead.set()
            assert late.result(SECONDS) == [1, 5, 6]
            assert list(steps) == []  # now it was late itself
        rows = list(server.train())
    assert [row.number for row in rows] == [1, 2, 3, 4, 5, 6]
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("step 2 goes on without b, silent for ") for line in said)
    assert "b takes part again; steps 2 to 4 went on without it" in said


# Answers in HTTP


@contextmanager
def answering(head: str) -> Iterator[str]:
    """The address of somebody who answers every request so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(2**16)
                        connection.sendall(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n".encode())
            except OSError:
                pass  # closed

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


@pytest.mark.parametrize(
    ("head", "kind", "retry_after", "said"),
    [
        ("401 Unauthorized", SecretRefused, None, "takes enrolled devices only"),
        ("403 Forbidden", ConnectionFailed, 0.0, "answers HTTP 403 instead of opening a WebSocket"),
        ("404 Not Found", ConnectionFailed, 0.0, "answers HTTP 404 instead of opening a WebSocket"),
        ("426 Upgrade Required", ConnectionFailed, 0.0, "answers HTTP 426 instead of opening a WebSocket"),
        ("502 Bad Gateway", ConnectionFailed, 0.0, "answers HTTP 502 instead of opening a WebSocket"),
        ("429 Too Many Requests\r\nRetry-After: 42", ConnectionFailed, 42.0, "has no time now (HTTP 429)"),
        ("503 Service Unavailable", ConnectionFailed, 10.0, "has no time now (HTTP 503)"),
        ("503 Service Unavailable\r\nRetry-After: 999999999", ConnectionFailed, 3600.0, "has no time now"),
        ("503 Service Unavailable\r\nRetry-After: Fri, 27 Nov 2026 22:00:00 GMT", ConnectionFailed, 10.0, "has no time now"),
    ],
)
def test_what_an_answer_in_http_means(head: str, kind: type[Exception], retry_after: float | None, said: str) -> None:
    with answering(head) as url, pytest.raises(kind) as caught:
        Connection(url)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert getattr(caught.value, "retry_after", None) == retry_after


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        target = f"ws://127.0.0.1:{elsewhere.getsockname()[1]}/"
        with answering(f"{status} Elsewhere\r\nLocation: {target}") as url, pytest.raises(ConnectionFailed) as caught:
            Connection(url, credentials=("a", "secret"))
        assert "which is not followed" in str(caught.value)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
