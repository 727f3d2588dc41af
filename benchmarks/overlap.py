"""
How much of a step's arithmetic overlaps: one edge and one server over loopback, each on one core of its own.

    python benchmarks/overlap.py --steps 4 --turns 2

GPT-2 small's shape, batches of 8 E2E rows, LoRA r=4 on c_attn. With parts of a batch in flight the server computes one part
while the edge computes another: a step should take as long as the slower side. With one at a time it takes as long as both.
What each side computes is what metrics.jsonl says of the same steps.

The contestants take turns of some steps. The first step of a turn is not counted: what the edge reports of it holds the other's
turn.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from terminal import Progress

BATCH_SIZE, RANK = 8, 4
IN_FLIGHT: dict[int, dict[str, dict[str, Any]]] = {
    2: {"server": {"micro_batches": 4}, "edge": {"in_flight": 2}},
    1: {"server": {"micro_batches": 4}, "edge": {"in_flight": 1}},
}
"""By parts of a batch that may be on their way at once: what the two sides are told."""
MOST_OF_THE_LARGER = 1.1


@dataclass(frozen=True)
class Step:
    """Seconds."""

    whole: float
    edge: float
    server: float


class Contestant:
    """A server and an edge that takes a step only when it is told to."""

    def __init__(self, options: dict[str, dict[str, Any]], folder: Path, settings: dict[str, Any], data: Path) -> None:
        core_of_server, core_of_edge = two_cores()
        self._metrics = folder / "metrics.jsonl"
        server = {**settings, "run_dir": str(folder), "lora_rank": RANK, "checkpoint_every": 10**6, **options["server"]}
        self._server, url = harness.start_server(server, core_of_server)
        edge = {"model": settings["model"], "data": str(data), "batch_size": BATCH_SIZE, "shuffle": False, **options["edge"]}
        self._pipe, there = harness.PROCESSES.Pipe()
        arguments = (
            url,
            {**edge, "engine": "torch", "dtype": "float32", "state_dir": str(folder / "state")},
            core_of_edge,
            there,
        )
        self._edge = harness.PROCESSES.Process(target=take_steps, args=arguments, daemon=True)
        self._edge.start()
        there.close()
        self._seconds: list[float] = []

    def take_turn(self, steps: int) -> None:
        for _ in range(steps):
            self._pipe.send("go on")
            self._seconds.append(self._pipe.recv())

    def end(self, steps_of_a_turn: int) -> list[Step]:
        """The steps that count."""
        self._pipe.close()
        for process in (self._edge, self._server):
            process.join()
        rows = [json.loads(line) for line in self._metrics.read_text().splitlines()]
        steps = []
        for number, (whole, row) in enumerate(zip(self._seconds, rows, strict=True)):
            if number % steps_of_a_turn:
                (client,) = row["clients"].values()
                steps.append(Step(whole, client["seconds"]["edge_compute"], row["server_compute"]))
        return steps


def take_steps(url: str, options: dict[str, Any], core: set[int], pipe: Any) -> None:
    """The edge's process: takes a step and says how long it took, as often as it is told."""
    harness.keep_to(core)
    from edge_client import EdgeClient

    with EdgeClient(url, **options) as client:
        client.start()
        steps = client.train()
        while True:
            try:
                pipe.recv()
            except EOFError:
                break
            began = time.perf_counter()
            next(steps)
            pipe.send(time.perf_counter() - began)


def two_cores() -> tuple[set[int], set[int]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("overlap needs two cores, one for each side; this process has one")
    return {cores[0]}, {cores[-1]}


def race(model: Path, data: Path, cut_layer: int, options: argparse.Namespace, progress: Progress) -> dict[int, list[Step]]:
    """The counted steps, by what is in flight."""
    settings = {"model": str(model), "cut_layer": cut_layer, "steps": options.steps * options.turns, "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        racers = {
            number: Contestant(told, Path(folder) / str(number), {**settings, "device": "cpu"}, data)
            for number, told in IN_FLIGHT.items()
        }
        for _ in range(options.turns):
            for number, racer in racers.items():
                racer.take_turn(options.steps)
                progress.advance(f"cut after block {cut_layer}, {number} in flight")
        return {number: racer.end(options.steps) for number, racer in racers.items()}


def row_of(cut_layer: int, in_flight: int, steps: list[Step]) -> list[object]:
    columns = (
        [step.whole for step in steps],
        [step.edge for step in steps],
        [step.server for step in steps],
        [step.whole / max(step.edge, step.server) for step in steps],
        [step.whole / (step.edge + step.server) for step in steps],
    )
    return [cut_layer, in_flight, *(f"{statistics.median(column):.2f}" for column in columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--cut-layers", type=int, nargs="+", default=[3, 6, 9])
    parser.add_argument("--steps", type=int, default=4, help="of a turn, one of which is not counted")
    parser.add_argument("--turns", type=int, default=2, help="of each contestant")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}: the first of a turn is not counted")
    rows = []
    total = len(options.cut_layers) * options.turns * len(IN_FLIGHT)
    with tempfile.TemporaryDirectory() as scratch, Progress(total, unit="turn") as progress:
        model = harness.make_gpt2_small(Path(scratch))
        pairs = harness.e2e_rows("train", slice(0, BATCH_SIZE * options.steps * options.turns))
        data = harness.write_rows(Path(scratch) / "rows.txt", pairs)
        for cut_layer in options.cut_layers:
            steps = race(model, data, cut_layer, options, progress)
            rows += [row_of(cut_layer, in_flight, of_contestant) for in_flight, of_contestant in steps.items()]
    header = ["cut after block", "in flight", "seconds a step", "edge computes", "server computes", "of the larger", "of both"]
    print(harness.markdown(header, rows))
    print(f"\ngoal with 2 in flight: at most {MOST_OF_THE_LARGER} of the larger")


if __name__ == "__main__":
    main()
