"""
A server that runs for long while its devices come and go: what it holds must not grow, and nothing must be left at the end.

    python benchmarks/soak.py --minutes 30

Three devices of a tiny model, each in a process of its own, on a link that fails at random. Now and then one is killed and
started again. The server's memory, threads and files are read once a second; a straight line through its memory over
the second half of the time gives the slope.
"""

import argparse
import asyncio
import gc
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chaos import PROCESSES
from disturbance import Link, Plan
from ports import free_port
from reconnecting import come_back_within

from edge_client import EdgeClient
from edge_client.generation import process_memory
from gpu_server import GpuServer
from terminal import Progress

SECONDS_BETWEEN_KILLS = 7
FRAMES_BETWEEN_FAULTS = 400
LARGEST_SLOPE = 1.0  # MB in ten minutes; it is below what an allocator's rounding gives


def serve(options: dict[str, Any], told: Any) -> None:
    """The server's process: says where it listens, and at the end what is left of it."""
    before = _left_over()
    with GpuServer(**options) as server:
        told.send(server.url)
        steps = 0
        signal.signal(signal.SIGTERM, lambda *_: server.suspend())
        try:
            for step in server.train():
                steps = step.number
        except RuntimeError:
            pass  # it was suspended, which is how this ends
    told.send((steps, before, _left_over()))


def _left_over() -> dict[str, int]:
    gc.collect()
    tasks = sum(issubclass(type(item), asyncio.Task) and not item.done() for item in gc.get_objects())
    return {"threads": threading.active_count(), "tasks": tasks, "files and sockets": len(os.listdir("/proc/self/fd"))}


def take_part(url: str, options: dict[str, Any]) -> None:
    """A device's process."""
    come_back_within(1.0)
    with EdgeClient(url, engine="torch", give_up_after=30.0, **options) as client:
        for _ in client.train():
            pass


def resident(pid: int) -> float:
    """Anonymous memory of a process in MB: what it holds itself, without mapped files."""
    found = process_memory("RssAnon", pid)
    assert found is not None
    return found / 1e6


def faults_throughout(frames: int) -> Plan:
    """One fault in every so many frames, of whatever kind; more of them than any run here has frames for."""
    drawn = [Plan.random(seed, 1, frames).faults[0] for seed in range(5000)]
    return Plan(*(replace(fault, frame=fault.frame + number * frames) for number, fault in enumerate(drawn)))


@dataclass
class Soak:
    """A server, its devices, and what was read of the server meanwhile."""

    folder: Path
    model: str
    seed: int
    megabytes: list[tuple[float, float]] = field(default_factory=list)
    """When, in seconds, and how much."""
    kills: int = 0
    faults: int = 0
    steps: int = 0
    left: dict[str, int] = field(default_factory=dict)
    """What there is more of at the end than at the beginning."""

    def run(self, seconds: float) -> None:
        port = free_port()
        data = self.folder / "data.jsonl"
        data.write_text("".join(f'{{"prompt": "n{i}", "completion": "abc {i * 37 % 101}"}}\n' for i in range(50)))
        shared = {"model": self.model, "dtype": "float32"}
        run = {"cut_layer": 1, "lora_rank": 2, "steps": 10**7, "clients": 3, "checkpoint_every": 50, "quorum": 1}
        here, there = PROCESSES.Pipe()
        options = {**shared, **run, "port": port, "run_dir": str(self.folder / "run")}
        self._server = PROCESSES.Process(target=serve, args=(options, there))
        self._server.start()
        here.recv()
        with Link(port, faults_throughout(FRAMES_BETWEEN_FAULTS)) as link:
            self._url = link.url
            self._device = {**shared, "data": str(data), "batch_size": 2, "state_dir": str(self.folder / "state")}
            self._devices = {name: self._start(name) for name in "abc"}
            self._disturb(link, seconds)
            for process in self._devices.values():
                process.kill()
                process.join()
        os.kill(self._server.pid or 0, signal.SIGTERM)
        self.steps, before, after = here.recv()
        self._server.join()
        self.left = {what: after[what] - before[what] for what in before}

    def _start(self, name: str) -> Any:
        process = PROCESSES.Process(target=take_part, args=(self._url, {**self._device, "name": name}))
        process.start()
        return process

    def _disturb(self, link: Link, seconds: float) -> None:
        draw, begun = random.Random(self.seed), time.monotonic()
        with Progress(int(seconds), unit="second") as progress:
            for second in range(1, int(seconds) + 1):
                while (left := begun + second - time.monotonic()) > 0:
                    self._start_again(left)
                if second % SECONDS_BETWEEN_KILLS == 0:
                    self.kills += 1
                    self._devices[draw.choice("abc")].kill()
                self.megabytes.append((second, resident(self._server.pid or 0)))
                self.faults = link.faults.total()
                progress.advance(f"{self.megabytes[-1][1]:.1f} MB, {self.kills} kills, {self.faults} faults of the link")

    def _start_again(self, seconds: float) -> None:
        """Whatever device ends within so many seconds."""
        wait([process.sentinel for process in (self._server, *self._devices.values())], seconds)
        if self._server.exitcode is not None:
            raise SystemExit(f"the server ended with status {self._server.exitcode}")
        for name, process in self._devices.items():
            if process.exitcode is not None:
                process.join()
                self._devices[name] = self._start(name)


def main() -> int:
    from conftest import make_model  # loads transformers, which the other processes, that import this file too, must not

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soak = Soak(folder, str(make_model(folder, n_layer=2, n_embd=16, n_head=2)), options.seed)
        soak.run(options.minutes * 60)
    half = soak.megabytes[len(soak.megabytes) // 2 :]
    slope = statistics.linear_regression(*zip(*half, strict=True)).slope * 600
    print(f"{options.minutes:g} minutes, {soak.steps} steps, {soak.kills} devices killed, {soak.faults} faults of the link")
    print(f"server: {soak.megabytes[0][1]:.1f} MB at first, {half[0][1]:.1f} at half time, {half[-1][1]:.1f} at the end")
    print(f"slope over the second half: {slope:+.2f} MB in ten minutes (at most {LARGEST_SLOPE})")
    print("left over at the end: " + ", ".join(f"{count} {what}" for what, count in soak.left.items()))
    return 1 if slope > LARGEST_SLOPE or any(soak.left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
