"""
One server and 1 to 32 clients of a tiny model: tokens a second, how long a client waits for its gradient, and memory.

    python benchmarks/server_scale.py --seconds 4 --rounds 3

The server is a process of its own on one half of the cores. The clients share the other half, eight of them a process. They
speak the protocol through the device's own connection, but compute nothing: their activations and gradients are drawn at
random, with the shapes of real ones. So what is measured is the server, as long as its cores are busy, which the table says.
Latency is of one question, Activations -> ActivationGradient; a step begins when everybody has asked, so it holds the wait for
the others.

Memory is the server's anonymous memory, the highest value of a run. A step needs some for every row that it computes, whoever
sent it. What a client itself costs is the slope over further runs whose steps have the same rows, divided among the clients.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness  # first: it finds the tests' modules
import numpy as np

from edge_client.connection import Connection
from edge_client.generation import process_memory
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    EdgeAdapter,
    Hello,
    Join,
    Seconds,
    Start,
    Welcome,
    encode,
    largest_message_bytes,
)
from terminal import Progress

CLIENTS = (1, 2, 4, 8, 16, 32)
CLIENTS_A_PROCESS = 8
MODEL = {"n_layer": 4, "n_embd": 64, "n_head": 4}
RUN = {"cut_layer": 1, "lora_rank": 4, "steps": 10**6, "dtype": "float32", "device": "cpu"}
RUN |= {"checkpoint_every": 10**6, "micro_batches": 1}
BATCH_SIZE, SHORTEST, LONGEST, VOCABULARY = 8, 8, 40, 500
SEQUENCES_TO_SHARE = 32
SECONDS_OF_WARM_UP = 1.0
SECONDS_BETWEEN_LOOKS = 0.05
MOST_MEGABYTES_A_CLIENT = 2.0  # beyond the message that waits for its step
PICTURE = Path(__file__).with_suffix(".svg")


@dataclass(frozen=True)
class Batch:
    """What a client sends in every step: made up, of its own seed."""

    lengths: Any
    label_counts: Any
    labels: Any
    values: Any

    @classmethod
    def drawn(cls, seed: int, size: int = BATCH_SIZE) -> "Batch":
        draw = np.random.default_rng(seed)
        lengths = draw.integers(SHORTEST, LONGEST + 1, size).astype(np.int32)
        label_counts = lengths // 2
        labels = draw.integers(0, VOCABULARY, label_counts.sum()).astype(np.int32)
        return cls(lengths, label_counts, labels, draw.standard_normal((lengths.sum(), MODEL["n_embd"]), np.float32))

    def question(self, step: int) -> Activations:
        return Activations(step=step, seconds=Seconds(), **vars(self))


@dataclass(frozen=True)
class Run:
    """One run: whom the clients talk to, and what about."""

    url: str
    fingerprint: str
    clients: int
    batch_size: int
    seconds: float
    """Of taking part, from the run's start on."""


def take_part(run: Run, number: int) -> tuple[list[float], list[float]]:
    """A client, from its greeting to its goodbye: when it asked for gradients, and when it got them."""
    batch, asked, answered = Batch.drawn(number, run.batch_size), [], []
    with Connection(run.url) as connection:
        welcome = connection.exchange(Hello(name=f"client-{number:02}", fingerprint=run.fingerprint), Welcome)
        largest = {"rows": run.batch_size * LONGEST, "width": MODEL["n_embd"], "precision": welcome.settings.precision}
        connection.expect(largest_message_bytes(**largest, adapter_elements=100_000))  # more than this model's edge has
        start = connection.exchange(Join(num_samples=10**6, batch_size=run.batch_size, longest=LONGEST), Start)
        draw = np.random.default_rng(number)
        gradients = {name: 1e-3 * draw.standard_normal(matrix.shape, np.float32) for name, matrix in start.adapter.items()}
        step, until = start.step, time.monotonic() + run.seconds
        while time.monotonic() < until:
            step += 1
            asked.append(time.monotonic())
            connection.exchange(batch.question(step), ActivationGradient)
            answered.append(time.monotonic())
            connection.exchange(AdapterGradient(step=step, seconds=Seconds(), tensors=gradients), EdgeAdapter)
    return asked, answered


def take_part_together(run: Run, numbers: range, cores: set[int], told: Any) -> None:
    """The process of several clients; tells what became of each, by number."""
    harness.keep_to(cores)
    threads = [
        threading.Thread(target=lambda number: told.put((number, *take_part(run, number))), args=(number,))
        for number in numbers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass(frozen=True)
class Look:
    """At the server's process."""

    time: float
    processor_seconds: float
    megabytes: float

    @classmethod
    def at(cls, pid: int) -> "Look":
        # proc_pid_stat(5): the name, in brackets, may hold spaces; utime and stime are the 12th and 13th field after it.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        memory = process_memory("RssAnon", pid)
        assert memory is not None
        return cls(time.monotonic(), sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), memory / 1e6)


@dataclass(frozen=True)
class Measured:
    """Of one run, while everybody took part, the warm-up aside."""

    tokens_a_second: float
    median_latency: float
    """Seconds."""
    latency_99: float
    """Seconds that one question in a hundred takes longer than."""
    arithmetic: float
    """Share of a step's time that the server's worker computed."""
    busy: float
    """Share of its cores that the server used."""
    megabytes: float


def measure(model: Path, fingerprint: str, clients: int, batch_size: int, seconds: float) -> Measured:
    cores_of_server, cores_of_clients = halves(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        # All clients connect at once, and none comes again if it is told to.
        many = {"clients": clients, "max_strangers": max(clients, 32)}
        settings = {**RUN, "model": str(model), "run_dir": f"{folder}/run", **many}
        server, url = harness.start_server(settings, cores_of_server)
        run, told, looks = (
            Run(url, fingerprint, clients, batch_size, seconds + SECONDS_OF_WARM_UP),
            harness.PROCESSES.Queue(),
            [],
        )
        for first in range(0, clients, CLIENTS_A_PROCESS):
            numbers = range(first, min(first + CLIENTS_A_PROCESS, clients))
            arguments = (run, numbers, cores_of_clients, told)
            harness.PROCESSES.Process(target=take_part_together, args=arguments, daemon=True).start()
        while told.empty():
            looks.append(Look.at(server.pid))
            if not server.is_alive():
                sys.exit("the server ended before its clients did")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        heard = {number: times for number, *times in (told.get() for _ in range(clients))}
        server.join()
        metrics = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
    return evaluate(run, heard, looks, metrics, len(cores_of_server))


def evaluate(
    run: Run, heard: dict[int, list[list[float]]], looks: list[Look], metrics: list[dict[str, Any]], cores: int
) -> Measured:
    begin = max(asked[0] for asked, _ in heard.values()) + SECONDS_OF_WARM_UP
    end = min(answered[-1] for _, answered in heard.values())
    latencies, tokens = [], 0
    for number, (asked, answered) in heard.items():
        inside = [b - a for a, b in zip(asked, answered, strict=True) if begin <= b <= end]
        latencies += inside
        tokens += len(inside) * int(Batch.drawn(number, run.batch_size).lengths.sum())
    computed = statistics.median(row["server_compute"] for row in metrics[:-1])
    times = [look.time for look in looks]
    first, last = looks[bisect_left(times, begin)], looks[bisect_left(times, end) - 1]
    return Measured(
        tokens / (end - begin),
        statistics.median(latencies),
        statistics.quantiles(latencies, n=100)[-1],
        computed * len(latencies) / run.clients / (end - begin),
        (last.processor_seconds - first.processor_seconds) / (last.time - first.time) / cores,
        max(look.megabytes for look in looks),
    )


def halves(cores: set[int]) -> tuple[set[int], set[int]]:
    """One for the server, one for its clients; the same core where there is only one."""
    ordered = sorted(cores)
    middle = (len(ordered) + 1) // 2
    return set(ordered[:middle]), set(ordered[middle:]) or cores


def medians(runs: list[Measured]) -> Measured:
    return Measured(*(statistics.median(values) for values in zip(*(vars(run).values() for run in runs), strict=True)))


def report(measured: dict[int, Measured], shared: dict[int, Measured]) -> None:
    rows = [
        [
            clients,
            f"{run.tokens_a_second:,.0f}",
            *(f"{1000 * latency:.1f}" for latency in (run.median_latency, run.latency_99)),
            *(f"{share:.0%}" for share in (run.arithmetic, run.busy)),
            *(f"{megabytes:.1f}" for megabytes in (run.megabytes, shared[clients].megabytes)),
        ]
        for clients, run in measured.items()
    ]
    header = ["clients", "tokens/s", "latency, median ms", "99th percentile", "of a step, arithmetic", "server's cores busy"]
    print(harness.markdown([*header, "server's memory, MB", f"{SEQUENCES_TO_SHARE} sequences shared, MB"], rows))
    question = Batch.drawn(0).question(1)
    print(
        f"\nits queue, one message of {len(question.values)} x {MODEL['n_embd']}: {question.values.nbytes / 1e6:.3f} MB, "
        f"{len(encode(question)) / 1e6:.3f} on the wire"
    )
    if len(shared) > 1:
        slope = statistics.linear_regression(list(shared), [run.megabytes for run in shared.values()]).slope
        print(f"a client more, the rows the same: {slope:.2f} MB (goal: at most {MOST_MEGABYTES_A_CLIENT:g} beyond its queue)")


def draw(measured: dict[int, Measured], picture: Path) -> None:
    """Tokens a second and latency over the number of clients, as a picture."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit(f"{picture.name} is not drawn: matplotlib is missing; pip install --group dev, or --no-picture")
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": picture.name, "font.family": "sans-serif"})
    from matplotlib import pyplot

    clients = list(measured)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(clients, [run.tokens_a_second / 1000 for run in measured.values()], "o-")
    left.set(title="What the server trains", ylabel="thousand tokens a second")
    for name, label, style in (("latency_99", "99th percentile", "o--"), ("median_latency", "median", "o-")):
        right.plot(clients, [1000 * getattr(run, name) for run in measured.values()], style, color="tab:blue", label=label)
    right.set(title="How long a client waits for its gradient", ylabel="milliseconds")
    right.legend(frameon=False)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xticks(clients, map(str, clients))
        panel.set_xlabel("clients")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    print(f"drawn: {picture}")


def main() -> None:
    from conftest import make_model  # loads transformers, which the other processes, that import this file too, must not

    from split_model import PretrainedModel

    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run, after a warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--picture", type=Path, default=PICTURE, help=".svg or .png")
    parser.add_argument("--no-picture", action="store_const", const=None, dest="picture")
    options = parser.parse_args()
    total = 2 * options.rounds * len(options.clients)
    measured, shared = ({clients: [] for clients in options.clients} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder, Progress(total, unit="run") as progress:
        model = make_model(Path(folder), **MODEL)
        fingerprint = PretrainedModel(model).fingerprint()
        for _ in range(options.rounds):
            for clients in options.clients:
                for runs, size in ((measured, BATCH_SIZE), (shared, max(1, SEQUENCES_TO_SHARE // clients))):
                    runs[clients].append(run := measure(model, fingerprint, clients, size, options.seconds))
                    progress.advance(f"{clients} clients, {run.tokens_a_second:,.0f} tokens/s, {run.megabytes:.1f} MB")
    in_the_middle = [{clients: medians(of_clients) for clients, of_clients in runs.items()} for runs in (measured, shared)]
    report(*in_the_middle)
    if options.picture is not None:
        draw(in_the_middle[0], options.picture)


if __name__ == "__main__":
    main()
