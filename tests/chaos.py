"""
Whole runs in processes of their own, that are killed (SIGKILL), cut off or told everything twice at a chosen message.

Processes are forked from one that has imported torch already: a run takes a fraction of a second. Faults strike where a
library hands messages over, in the process that sends or receives them.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from websockets.asyncio.server import ServerConnection
from websockets.sync.client import ClientConnection

from edge_client import ConnectionFailed, EdgeClient, membership
from gpu_server import GpuServer

torch.set_num_threads(1)

PROCESSES = multiprocessing.get_context("forkserver")
SECONDS_FOR_A_RUN = 120.0
NO_SERVER = 3  # exit status


@dataclass(frozen=True)
class Fault:
    """Something that happens to a process once, at the n-th message that it sends or receives."""

    process: str
    """"server", or a client's name."""
    event: str
    """"send": before the message leaves. "receive": after it arrived, before anybody looked at it."""
    number: int
    what: str
    """"kill", "cut" the connection, or, of a message that is sent, "twice"."""

    def __str__(self) -> str:
        return f"{self.what} {self.process} at {self.event} {self.number}"


@dataclass(frozen=True)
class Outcome:
    """What is left of a run."""

    adapter: bytes
    losses: list[float]
    killed: int
    """How many processes were, and were started again."""


class Run:
    """
    A server and its clients.

    Args:
        options: of `GpuServer`; the run directory is made inside ``folder``.
        clients: arguments of `EdgeClient` by name.
        port: where clients reach the server; None is the server's own.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        clients: dict[str, dict[str, Any]],
        faults: list[Fault] | None = None,
        port: int | None = None,
        server_port: int | None = None,
    ) -> None:
        self.server_port = server_port or free_port()
        self.url = f"ws://127.0.0.1:{port or self.server_port}"
        self.run_dir = folder / "run"
        usual = {"dtype": "float32", "port": self.server_port, "linger": 3.0, "run_dir": str(self.run_dir)}
        self.options = {**usual, "clients": len(clients), **options}
        self.clients = {
            name: {"model": options["model"], "dtype": "float32", "state_dir": str(folder / "state"), **more}
            for name, more in clients.items()
        }
        self.faults = faults or []
        self.killed = 0

    def to_its_end(self) -> Outcome:
        """Start everything, start again what is killed, wait until all have ended well."""
        started, deadline = set(), time.monotonic() + SECONDS_FOR_A_RUN
        living = {"server": self._start("server", started)}
        try:
            for name in self.clients:
                living[name] = self._start(name, started)
            while living:
                self._wait(living, deadline)
                for name, process in list(living.items()):
                    if process.exitcode is None:
                        continue
                    del living[name]
                    self.killed += process.exitcode == -signal.SIGKILL
                    if process.exitcode == -signal.SIGKILL or (process.exitcode == NO_SERVER and "server" in living):
                        living[name] = self._start(name, started)
                    elif process.exitcode not in (0, NO_SERVER):
                        raise AssertionError(f"{name} ended with status {process.exitcode}")
        finally:
            for process in living.values():
                process.kill()
                process.join()
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        adapter = (self.run_dir / "adapter/adapter_model.safetensors").read_bytes()
        return Outcome(adapter, [row["loss"] for row in rows], self.killed)

    def _wait(self, living: dict[str, Any], deadline: float) -> None:
        sentinels = [process.sentinel for process in living.values()]
        if not multiprocessing.connection.wait(sentinels, max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"{', '.join(living)} did not end within {SECONDS_FOR_A_RUN:.0f} s")
        for process in living.values():
            if process.exitcode is not None:
                process.join()

    def _start(self, name: str, started: set[str]) -> Any:
        # A fault strikes once: who was started before has had it.
        faults = [] if name in started else [fault for fault in self.faults if fault.process == name]
        started.add(name)
        here, there = PROCESSES.Pipe()
        if name == "server":
            resume = (self.run_dir / "run.json").exists()
            target, arguments = serve, ({**self.options, "resume": resume}, faults, there)
        else:
            target, arguments = take_part, (self.url, {**self.clients[name], "name": name}, faults, there)
        process = PROCESSES.Process(target=target, args=arguments, name=name)
        process.start()
        there.close()
        if name == "server":
            try:
                here.recv()  # it listens
            except EOFError:
                pass  # or was killed before
        here.close()
        return process


def serve(options: dict[str, Any], faults: list[Fault], told: Any) -> None:
    """A server's process."""
    watch_server(faults)
    with GpuServer(**options) as server:
        told.send(server.url)
        for _ in server.train():
            pass


def take_part(url: str, options: dict[str, Any], faults: list[Fault], told: Any) -> None:
    """A client's process."""
    membership.SHORTEST_WAIT, membership.LONGEST_WAIT = 0.02, 0.2
    watch_client(faults)
    try:
        with EdgeClient(url, **options) as client:
            for _ in client.train():
                pass
    except ConnectionFailed:
        raise SystemExit(NO_SERVER) from None


class Watch:
    """Counts a process's messages, and says what happens at each."""

    def __init__(self, faults: list[Fault]) -> None:
        self.count: Counter[str] = Counter()
        self.faults = {(fault.event, fault.number): fault.what for fault in faults}

    def at(self, event: str, cut: Callable[[], None]) -> bool:
        """Let the fault of this message strike; says whether it has to be delivered twice."""
        self.count[event] += 1
        what = self.faults.get((event, self.count[event]))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "cut":
            cut()
        return what == "twice"


def watch_client(faults: list[Fault]) -> None:
    watch, send, receive = Watch(faults), ClientConnection.send, ClientConnection.recv

    def watched_send(self: ClientConnection, message: Any, *rest: Any, **more: Any) -> None:
        if watch.at("send", lambda: self.socket.shutdown(socket.SHUT_RDWR)):
            send(self, message, *rest, **more)
        send(self, message, *rest, **more)

    def watched_receive(self: ClientConnection, *rest: Any, **more: Any) -> Any:
        message = receive(self, *rest, **more)
        watch.at("receive", lambda: self.socket.shutdown(socket.SHUT_RDWR))
        return message

    ClientConnection.send, ClientConnection.recv = watched_send, watched_receive  # type: ignore[method-assign]


def watch_server(faults: list[Fault]) -> None:
    watch, send, receive = Watch(faults), ServerConnection.send, ServerConnection.recv

    async def watched_send(self: ServerConnection, message: Any, *rest: Any, **more: Any) -> None:
        if watch.at("send", self.transport.abort):
            await send(self, message, *rest, **more)
        await send(self, message, *rest, **more)

    async def watched_receive(self: ServerConnection, *rest: Any, **more: Any) -> Any:
        message = await receive(self, *rest, **more)
        watch.at("receive", self.transport.abort)
        return message

    ServerConnection.send, ServerConnection.recv = watched_send, watched_receive  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# Installed modules only: where the tests lie is not known to the process that forks (before Python 3.12).
PROCESSES.set_forkserver_preload(
    ["gpu_server.gpu_server", "edge_client.client", "torch._dynamo", "websockets.asyncio.server", "websockets.sync.client"]
)
