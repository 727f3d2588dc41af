"""
Whole runs in processes of their own, that are killed (SIGKILL), cut off or told everything twice at a chosen message.

Processes are forked from one that has imported torch already: a run takes a fraction of a second. Faults strike where a
library hands messages over, in the process that sends or receives them.
"""

import gc
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from disturbance import Link, Plan
from ports import free_port
from reconnecting import come_back_within
from usual_settings import settings
from websockets.asyncio.server import ServerConnection
from websockets.sync.client import ClientConnection

from edge_client import ConnectionFailed, EdgeClient
from gpu_server import GpuServer
from protocol import Activations, Done, Itinerary, QuestionId

torch.set_num_threads(1)

PROCESSES = multiprocessing.get_context("forkserver")
SECONDS_FOR_A_RUN = 120.0
NO_SERVER = 3  # exit status


# A run of so few steps that there is time to disturb it everywhere. With epochs, the clients' data ends at different steps.
MODES: dict[str, dict[str, Any]] = {
    "rounds of one step": {"steps": 2, "aggregate_every": 1},
    "rounds of two steps": {"epochs": 1, "aggregate_every": 2},
}
# Longer ones, in which samples come again. Of a model so small a codec may change the loss as it likes.
DELTA: dict[str, Any] = {"epochs": 2, "codec": "delta", "check_codec_every": 3, "codec_tolerance": 1e9}
# With every codec that dithers, and noise that is secret: what is said again has to be the same.
ON_DEVICE: dict[str, Any] = {
    "labels": "device",
    "codec": "int8",
    **dict.fromkeys(("activation_noise", "gradient_noise"), 0.1),
    **dict.fromkeys(("activation_clip", "gradient_clip"), 1.0),
}
# In the third step all samples of client a come as their numbers.
FROZEN: dict[str, Any] = {"steps": 3, "edge_adapter": "none"}
ALL_MODES: dict[str, dict[str, Any]] = {
    **MODES,
    "clipped, rounds of one step": {**MODES["rounds of one step"], "max_grad_norm": 0.05},
    "delta, rounds of one step": {**DELTA, "aggregate_every": 1},
    "delta, rounds of two steps": {**DELTA, "aggregate_every": 2},
    "labels on the device, rounds of one step": {**ON_DEVICE, **MODES["rounds of one step"]},
    "nothing learnt on the edge": FROZEN,
    "nothing learnt on the edge, labels on the device": {**ON_DEVICE, **FROZEN},
    "labels on the device, rounds of two steps": {**ON_DEVICE, **MODES["rounds of two steps"], "label_rows": "hidden"},
}
DEVICES: dict[str, dict[str, Any]] = {"torch": {"engine": "torch", "dtype": "float32"}, "onnxruntime": {}}
"""Those with onnxruntime fetch their part of the model, and share what they have fetched."""
OF_ITINERARY = ("steps", "epochs", "aggregate_every", "edge_adapter")
"""The settings on which it depends what clients ask."""
MICRO_BATCHES = 2
NUM_SAMPLES = {"a": 5, "b": 7}
BATCH_SIZE = {"a": 3, "b": 2}
NUM_EVALUATIONS = {"a": 2, "b": 0}  # one before the training and one after it, of a single batch


def num_answers(mode: str) -> dict[str, int]:
    """How many messages the server sends to each client in a run that nobody disturbs."""
    of_run = {name: value for name, value in ALL_MODES[mode].items() if name in OF_ITINERARY}
    asks_back = ALL_MODES[mode].get("labels") == "device"
    of_mode = settings(clients=len(NUM_SAMPLES), micro_batches=MICRO_BATCHES, **{"epochs": None, **of_run})
    counts = {}
    for name, num_samples in NUM_SAMPLES.items():
        itinerary = Itinerary(of_mode, of_mode.steps_of_client(num_samples, BATCH_SIZE[name]))
        of_handshake = 2  # to Hello and Join
        asked = list(questions(itinerary))
        num_asked_back = sum(question.kind is Activations for question in asked) if asks_back else 0
        counts[name] = of_handshake + NUM_EVALUATIONS[name] + len(asked) + num_asked_back
    return counts


def questions(itinerary: Itinerary) -> Iterator[QuestionId]:
    """All that a client asks from the beginning of a run to its end."""
    question = itinerary.after_round(0)
    while question.kind is not Done:
        yield question
        if question.kind is Activations:
            question = itinerary.after_activations(question.step, question.micro_batch)
        else:
            question = itinerary.after_round(question.step)
    yield question


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
    life: int = 1
    """Of the process: 2 is the one that was started after the first was killed."""

    def __str__(self) -> str:
        return f"{self.what} {self.process} at {self.event} {self.number}"


@dataclass(frozen=True)
class Outcome:
    """What is left of a run."""

    adapter: bytes
    losses: list[float]
    perplexity: float
    """Of client a's held-out text after the run; not a number if it came too late to ask."""
    struck: list[str]
    """Which faults did."""

    def differences(self, other: "Outcome") -> list[str]:
        """In what this run did not end as the other did. A perplexity that came too late is none."""
        found = [name for name in ("adapter", "losses") if getattr(self, name) != getattr(other, name)]
        perplexities = {self.perplexity, other.perplexity}
        return found + ["perplexity"] * (len(perplexities) > 1 and not any(map(math.isnan, perplexities)))


def every_fault(mode: str) -> list[list[Fault]]:
    """
    At every message that the server or client a sends or receives; both clients' messages pass the server. A kill or a cut is
    the only fault of its run. What is said twice changes nothing that is said afterwards, so a run has every second message
    of one process twice, and another run has the others.
    """
    answers = num_answers(mode)
    of_a, of_both = answers["a"], sum(answers.values())
    # The client's last message is its Goodbye, which has no answer.
    counts = {("a", "send"): of_a + 1, ("a", "receive"): of_a, ("server", "receive"): of_both + 1, ("server", "send"): of_both}
    points = [(*where, number) for where, count in counts.items() for number in range(1, count + 1)]
    alone = [[Fault(*point, what)] for point in points for what in ("kill", "cut")]
    sent = [where for where in counts if "send" in where]
    return alone + [
        [Fault(*where, number, "twice") for number in range(first, counts[where] + 1, 2)] for where in sent for first in (1, 2)
    ]


def named(faults: list[Fault]) -> str:
    """A test, by the first of its faults."""
    return str(faults[0])


class Scene:
    """
    Two clients' data, and the settings that all runs share.

    Args:
        model: of two blocks at least. It is made elsewhere: every process imports this file, and shall not import transformers.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.clients: dict[str, dict[str, Any]] = {
            name: {"data": self._write(folder / f"{name}.jsonl", 100 * i, num_samples), "batch_size": BATCH_SIZE[name]}
            for i, (name, num_samples) in enumerate(NUM_SAMPLES.items())
        }
        self.clients["a"]["eval_data"] = self._write(folder / "held-out.jsonl", 200, BATCH_SIZE["a"])
        self.options = {"model": str(model), "cut_layer": 1, "lora_rank": 2, "lr": 1e-2, "lora_dropout": 0.1}

    @staticmethod
    def _write(path: Path, first: int, count: int) -> str:
        rows = [{"prompt": f"n{i}", "completion": f"abc {i * 37 % 101}"} for i in range(first, first + count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def run(
        self,
        folder: Path,
        mode: str,
        faults: list[Fault],
        *,
        engine: str = "torch",
        through: int | None = None,
        **options: Any,
    ) -> "Run":
        usual = {"checkpoint_every": 1, **self.options, **ALL_MODES[mode]}
        return Run(folder, {**usual, **options}, self.clients, faults, engine, through)

    def run_at_random(self, folder: Path, seed: int, *, engine: str = "torch", **more: Any) -> tuple[str, Outcome]:
        """A run with faults of all kinds, the same for the same seed; its mode, and what is left of it."""
        draw = random.Random(seed)
        mode = draw.choice(list(ALL_MODES))
        answers = num_answers(mode)
        numbers = {**answers, "server": sum(answers.values())}
        kills = [
            Fault(process, draw.choice(["send", "receive"]), draw.randint(1, number), "kill", life)
            for process, number in numbers.items()
            for life in range(1, 1 + draw.choice([0, 0, 1, 1, 2]))
        ]
        plan = Plan.random(seed, draw.randint(0, 6), numbers["server"])
        server_port = free_port()
        with Link(server_port, plan) as link:
            options = {"port": server_port, "checkpoint_every": draw.randint(1, 3), **more}
            outcome = self.run(folder, mode, kills, engine=engine, through=link.port, **options).to_its_end()
            outcome.struck.extend(link.faults.elements())
        return mode, outcome


class Run:
    """
    A server and its clients.

    Args:
        options: of `GpuServer`; the run directory is made inside ``folder``.
        clients: arguments of `EdgeClient` by name.
        engine: which the devices have.
        through: the port where clients reach the server; None is its own.
    """

    def __init__(
        self,
        folder: Path,
        options: dict[str, Any],
        clients: dict[str, dict[str, Any]],
        faults: list[Fault],
        engine: str,
        through: int | None,
    ) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        usual = {"dtype": "float32", "micro_batches": MICRO_BATCHES, "linger": 3.0}
        usual |= {"port": free_port(), "run_dir": str(self.run_dir)}
        self.options = {**usual, "clients": len(clients), **options}
        self.url = f"ws://127.0.0.1:{through or self.options['port']}"
        self.clients = {
            name: {
                **DEVICES[engine],
                "model": options["model"] if engine == "torch" else None,
                "state_dir": str(folder / f"state-{name}"),  # nobody finds what another one has fetched
                **more,
            }
            for name, more in clients.items()
        }
        self.faults = faults
        self.lives: Counter[str] = Counter()

    def to_its_end(self) -> Outcome:
        """Start everything, start again what is killed, wait until all have ended well."""
        deadline = time.monotonic() + SECONDS_FOR_A_RUN
        living = {"server": self._start("server")}
        try:
            for name in self.clients:
                living[name] = self._start(name)
            while living:
                self._wait(living, deadline)
                for name, process in list(living.items()):
                    if process.exitcode is None:
                        continue
                    del living[name]
                    if process.exitcode == -signal.SIGKILL or (process.exitcode == NO_SERVER and "server" in living):
                        living[name] = self._start(name)
                    elif process.exitcode not in (0, NO_SERVER):
                        raise AssertionError(f"{name} ended with status {process.exitcode}")
        finally:
            for process in living.values():
                process.kill()
                process.join()
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        adapter = (self.run_dir / "adapter/adapter_model.safetensors").read_bytes()
        struck = [fault for path in sorted(self.folder.glob("*.struck")) for fault in path.read_text().splitlines()]
        perplexity = self.folder / "perplexity"
        after = float(perplexity.read_text()) if perplexity.exists() else math.nan
        return Outcome(adapter, [row["loss"] for row in rows], after, struck)

    def _wait(self, living: dict[str, Any], deadline: float) -> None:
        sentinels = [process.sentinel for process in living.values()]
        if not multiprocessing.connection.wait(sentinels, max(0.0, deadline - time.monotonic())):
            raise AssertionError(f"{', '.join(living)} did not end within {SECONDS_FOR_A_RUN:.0f} s")
        for process in living.values():
            if process.exitcode is not None:
                process.join()

    def _start(self, name: str) -> Any:
        self.lives[name] += 1
        faults = [fault for fault in self.faults if (fault.process, fault.life) == (name, self.lives[name])]
        watch = Watch(faults, self.folder / f"{name}-{self.lives[name]}.struck")
        here, there = PROCESSES.Pipe()
        if name == "server":
            resume = (self.run_dir / "run.json").exists()
            target, arguments = serve, ({**self.options, "resume": resume}, watch, there)
        else:
            target, arguments = take_part, (self.url, {**self.clients[name], "name": name}, watch, self.folder / "perplexity")
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


def serve(options: dict[str, Any], watch: "Watch", told: Any) -> None:
    """A server's process."""
    gc.freeze()  # what was imported before the fork: whoever collects need not look at it
    watch_server(watch)
    with GpuServer(**options) as server:
        told.send(server.url)
        for _ in server.train():
            pass


def take_part(url: str, options: dict[str, Any], watch: "Watch", perplexity: Path) -> None:
    """A client's process."""
    gc.freeze()
    name = str(options["name"])
    # Of one client it is the same in every run, so that runs with noise can be compared.
    os.urandom = lambda size: (size * name.encode())[:size]  # type: ignore[assignment]
    come_back_within(0.2)
    watch_client(watch)
    try:
        with EdgeClient(url, **options) as client:
            if client.eval_data:
                client.perplexity()
            for _ in client.train():
                pass
            if client.eval_data:
                perplexity.write_text(repr(client.perplexity()))
    except ConnectionFailed:
        raise SystemExit(NO_SERVER) from None


@dataclass
class Watch:
    """Counts a process's messages, and lets the faults strike that are meant for it."""

    faults: list[Fault]
    journal: Path
    """Where those that struck are written."""

    def __post_init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._due = {(fault.event, fault.number): fault for fault in self.faults}

    def at(self, event: str, cut: Callable[[], None]) -> bool:
        """Let the fault of this message strike; says whether it has to be delivered twice."""
        self._count[event] += 1
        fault = self._due.get((event, self._count[event]))
        if fault is None:
            return False
        with self.journal.open("a") as file:
            file.write(f"{fault.what}\n")
        if fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.what == "cut":
            cut()
        return fault.what == "twice"


def watch_client(watch: Watch) -> None:
    send, receive = ClientConnection.send, ClientConnection.recv

    def watched_send(self: ClientConnection, message: Any, *rest: Any, **more: Any) -> None:
        if watch.at("send", lambda: self.socket.shutdown(socket.SHUT_RDWR)):
            send(self, message, *rest, **more)
        send(self, message, *rest, **more)

    def watched_receive(self: ClientConnection, *rest: Any, **more: Any) -> Any:
        message = receive(self, *rest, **more)
        watch.at("receive", lambda: self.socket.shutdown(socket.SHUT_RDWR))
        return message

    ClientConnection.send, ClientConnection.recv = watched_send, watched_receive  # type: ignore[method-assign]


def watch_server(watch: Watch) -> None:
    send, receive = ServerConnection.send, ServerConnection.recv

    async def watched_send(self: ServerConnection, message: Any, *rest: Any, **more: Any) -> None:
        if watch.at("send", self.transport.abort):
            await send(self, message, *rest, **more)
        await send(self, message, *rest, **more)

    async def watched_receive(self: ServerConnection, *rest: Any, **more: Any) -> Any:
        message = await receive(self, *rest, **more)
        watch.at("receive", self.transport.abort)
        return message

    ServerConnection.send, ServerConnection.recv = watched_send, watched_receive  # type: ignore[method-assign]


# Installed modules only: where the tests lie is not known to the process that forks (before Python 3.12). The last ones would
# be imported by every process that comes to need them: dp_accounting takes longer than a run.
PROCESSES.set_forkserver_preload(
    [
        *("gpu_server.sdk", "edge_client.client", "websockets.asyncio.server", "websockets.sync.client"),
        *("dp_accounting.pld.privacy_loss_distribution", "edge_client.torch_engine", "encodings.idna", "numpy.random"),
    ]
)
