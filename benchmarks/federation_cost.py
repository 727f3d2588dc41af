"""
What a message costs the server's decisions, by the number of devices: no sockets, no torch, made-up numbers.

    python benchmarks/federation_cost.py --devices 100 1000 10000 100000

A run is played from the first join to the last goodbye: two steps, in each of which all devices ask, in random order. In the
midst of the first one connections are lost and come back, the alarm rings, and pings ask who is waited for. With a quorum, the
first step goes on without a fifth of the devices: half of these ask too late, half lose their connections and are back in the
second step.

Each figure is the processor's time of one message: of all that the federation decides because of it, and of the next alarm's
time. What completes a step, or a part of it, and what follows from its computation is counted apart, by device and step, for
there is something in it for every device.
"""

import argparse
import gc
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from usual_settings import settings

from gpu_server.federation import (
    Action,
    Aggregate,
    Aggregated,
    Backward,
    Checkpoint,
    Deadline,
    Federation,
    FinishRun,
    Forward,
    ModelLimits,
    Train,
    Trained,
)
from protocol import Activations, AdapterGradient, Done, Hello, HiddenGradient, Join, Message, Seconds
from protocol.settings import ABILITIES

STEPS, WIDTH, ROWS = 2, 8, 4
DEADLINE = 60.0
"""Seconds."""
SHAPES = {"A": (2, WIDTH), "B": (WIDTH, 2)}
LIMITS = ModelLimits(
    fingerprint="f", width=WIDTH, vocabulary_size=100, num_positions=16, max_batch_tokens=64, edge_shapes=SHAPES
)
ADAPTER = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
VALUES = np.zeros((ROWS, WIDTH), np.float32)
SPENT = Seconds(edge_compute=1.0)

MOST_DISTURBED = 1000
"""Devices that lose their connections, and ticks, and pings."""
TO_COMPUTE = Train | Forward | Backward | Aggregate | FinishRun

Act = Callable[[], list[Action]]
Spend = Callable[[str, Act], list[Action]]


@dataclass
class Crowd:
    """
    A federation with so many ``devices``, whose messages come in random order.

    Args:
        quorum: of the devices, a share; None: all are needed.
        spend: is given a kind of message and what it makes the federation do; it does that, and gives what came of it.
    """

    devices: int
    labels: str = "server"
    micro_batches: int = 1
    quorum: float | None = None
    names_in_a_pong: int = 100
    spend: Spend = lambda kind, act: act()
    now: float = 0.0
    computing: deque[Action] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.names = [f"device-{number:06}" for number in range(self.devices)]
        self.random = random.Random(0)
        chosen = settings(clients=self.devices, labels=self.labels, micro_batches=self.micro_batches)
        quorum = None if self.quorum is None else round(self.quorum * self.devices)
        self.federation = Federation("run", chosen, LIMITS, ADAPTER, quorum, deadline=Deadline(DEADLINE))
        self.join = Join(num_samples=STEPS * self.micro_batches, batch_size=self.micro_batches, longest=ROWS)

    # What devices do

    def comes(self, name: str, kind: str = "join") -> None:
        hello = Hello(name=name, fingerprint="f", abilities=ABILITIES)

        def welcome_and_join() -> list[Action]:
            self.federation.welcome(hello)
            return self.federation.join(name, self.join, self.now)

        self.tell(kind, welcome_and_join)

    def ask_all(self, kind: str, names: Iterable[str], message: Message) -> None:
        for name in names:
            self.tell(kind, lambda name=name: self.federation.receive(name, message, self.now))  # type: ignore[misc]

    def is_lost(self, name: str) -> None:
        self.tell("lost", lambda: self.federation.disconnected(name, self.now) or [])  # type: ignore[func-returns-value]

    def ping(self) -> None:
        self.tell("ping", lambda: self.federation.waits_for(self.now, self.names_in_a_pong) and [])

    def tick(self) -> None:
        self.tell("tick", lambda: self.federation.tick(self.now))

    # What the server does

    def tell(self, kind: str, act: Act) -> None:
        def act_and_set_the_alarm() -> list[Action]:
            actions = act()
            self.federation.expires()
            return actions

        for action in self.spend(kind, act_and_set_the_alarm):
            if isinstance(action, TO_COMPUTE):
                self.computing.append(action)
            elif isinstance(action, Checkpoint):
                self.federation.checkpointed(action.step)

    def compute(self) -> None:
        """All that is to be computed now."""
        while self.computing:
            action = self.computing.popleft()
            self.tell("step", lambda action=action: self.computed(action))  # type: ignore[misc]

    def computed(self, action: Action) -> list[Action]:
        if isinstance(action, Forward):
            return self.federation.forwarded(dict.fromkeys(action.batches, VALUES), 0.1, self.now)
        if isinstance(action, Train | Backward):
            names = action.batches if isinstance(action, Train) else action.gradients
            results: dict[str, Any] = {"gradients": dict.fromkeys(names, VALUES), "summed_losses": dict.fromkeys(names, 1.0)}
            return self.federation.trained(Trained(loss=1.0, labelled_tokens=1, **results), 0.1, self.now)
        if isinstance(action, Aggregate):
            return self.federation.aggregated(Aggregated(edge_adapter=ADAPTER), 0.1, self.now)
        return self.federation.saved(self.now)

    # The run

    def play(self) -> None:
        for name in self.shuffled():
            self.comes(name)
        names = self.shuffled()
        late = names[: self.devices // 5] if self.quorum is not None else []
        self.play_step(1, names[len(late) :], self.disturb, late)
        lost = late[1::2]
        self.play_step(2, [*names[len(late) :], *late[::2], *lost], lambda: self.are_back(lost))
        self.ask_all("done", self.shuffled(), Done(step=STEPS))
        for name in self.shuffled():
            self.tell("goodbye", lambda name=name: self.federation.leave(name, self.now))  # type: ignore[misc]

    def play_step(self, step: int, names: list[str], in_its_midst: Callable[[], None], late: Sequence[str] = ()) -> None:
        half = len(names) // 2
        for micro_batch in range(self.micro_batches):
            batch = self.activations(step, micro_batch)
            self.ask_all("activations", names[:half], batch)
            if not micro_batch:
                in_its_midst()
            self.ask_all("activations", names[half:], batch)
            if late:
                self.goes_on_without(late, batch)
            self.compute()
        if self.labels == "device":
            for micro_batch in range(self.micro_batches):
                self.ask_all("reply", names, self.reply(step, micro_batch))
                self.compute()
        self.ask_all("gradient", names, AdapterGradient(step=step, seconds=SPENT, tensors=ADAPTER))
        self.compute()

    def disturb(self) -> None:
        """Connections are lost and come back, the alarm rings, and somebody asks who is waited for."""
        some = self.shuffled()[:MOST_DISTURBED]
        for name in some:
            self.is_lost(name)
        self.are_back(some)
        for _ in some:
            self.tick()
            self.ping()

    def goes_on_without(self, late: Sequence[str], batch: Activations) -> None:
        self.now += DEADLINE
        self.tell("step", lambda: self.federation.tick(self.now))
        self.ask_all("late", late[::2], batch)
        for name in late[1::2]:
            self.is_lost(name)

    def are_back(self, names: Iterable[str]) -> None:
        for name in names:
            self.comes(name, "back")

    def shuffled(self) -> list[str]:
        return self.random.sample(self.names, self.devices)

    # Messages: their numbers are never changed, so that all devices may send the same

    def activations(self, step: int, micro_batch: int) -> Activations:
        ints: dict[str, Any] = {"lengths": [ROWS], "label_counts": [2], "labels": [5, 6] if self.labels == "server" else []}
        arrays = {name: np.array(values, np.int32) for name, values in ints.items()}
        return Activations(step=step, micro_batch=micro_batch, seconds=SPENT, values=VALUES, **arrays)

    def reply(self, step: int, micro_batch: int) -> HiddenGradient:
        loss: dict[str, Any] = {"summed_loss": 3.0, "labelled_tokens": 2, "values": VALUES}
        return HiddenGradient(step=step, micro_batch=micro_batch, seconds=SPENT, **loss)


KINDS = ("join", "activations", "reply", "gradient", "late", "lost", "back", "tick", "ping", "done", "goodbye", "step")


def measured(**how: Any) -> dict[str, float]:
    """By kind of message that there was: microseconds."""
    counts, total = Counter[str](), Counter[str]()

    def spend(kind: str, act: Act) -> list[Action]:
        began = time.thread_time_ns()
        actions = act()
        seconds = (time.thread_time_ns() - began) / 1e9
        completes = any(isinstance(action, Checkpoint | TO_COMPUTE) for action in actions)
        kind = "step" if completes else kind
        counts[kind] += 1
        total[kind] += 1e6 * seconds
        return actions

    gc.collect()
    crowd = Crowd(**how, spend=spend)
    crowd.play()
    counts["step"] = STEPS * crowd.devices
    return {kind: total[kind] / counts[kind] for kind in KINDS if counts[kind]}


WAYS: dict[str, dict[str, Any]] = {
    "labels on the server": {},
    "labels on the devices": {"labels": "device"},
    "two micro-batches": {"labels": "device", "micro_batches": 2},
    "a quorum of 80 %": {"quorum": 0.8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    print(f"Microseconds:\n\n| | devices | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
    for devices in parser.parse_args().devices:
        for way, how in WAYS.items():
            means = measured(devices=devices, **how)
            cells = [f"{means[kind]:.0f}" if kind in means else "" for kind in KINDS]
            print(f"| {way} | {devices:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
