"""
Two processes that compute the server's part together, against one. Each has a core of its own, and one thread of torch.

    python benchmarks/several_ranks.py --rounds 6

GPT-2 small's shape with made-up weights, cut after block 3, LoRA r=8 on c_attn, in float32. The engine is given the activations
of three clients, so nothing is measured but the server's arithmetic, and what its ranks tell each other. The contestants take
turns, step by step; each computes the same steps, and must find the same losses. What a rank sends is the kernel's count of all
its TCP connections.

Memory is measured with GPT-2 large's shape and batches of a few tokens. It is what is a rank's own: anonymous and shared
pages. The weights are stored in float16, so that in float32 they are no pages of their file.
"""

import argparse
import ctypes
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy
from ports import free_port

from terminal import Progress

CLIENTS, BATCH_SIZE = 3, 8
CUT_LAYER, RANK = 3, 8
LONG = [[1024, 96, 64], [512, 384], [256, 192, 128]]
"""Tokens of each client's texts, which are learnt whole."""
GOAL = 1.8
SAME_LOSS = 1e-4  # of float32
SECONDS_BETWEEN_LOOKS = 0.02
BYTES_ACKED = slice(120, 128)
"""In the kernel's struct tcp_info."""

LARGE = {"n_layer": 36, "n_embd": 1280, "n_head": 20}
FEW_TOKENS = [([16] * 4, [8] * 4)]

Texts = list[tuple[list[int], list[int]]]
"""By client the tokens of each text, and how many of them have a label."""


@dataclass(frozen=True)
class Step:
    seconds: float
    loss: float
    sent: int
    """Bytes, by all ranks."""
    busy: float
    """Seconds of its processor, of the busiest rank."""
    most: list[int]
    """Of each rank the most memory, in bytes."""


class Memory:
    """What this process has of its own, in bytes; looked at again and again."""

    def __init__(self) -> None:
        self.before, self._most = _own_memory(), 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self._most = max(self._most, _own_memory())
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def figures(self, at_rest: bool = False) -> dict[str, int]:
        """
        Before the model was loaded; at most since this was asked last; and now.

        Args:
            at_rest: give back what was freed first.
        """
        most, self._most = max(self._most, _own_memory()), 0
        if at_rest:
            ctypes.CDLL(None).malloc_trim(0)
        return {"before": self.before, "most": most, "now": _own_memory()}


def _own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines) if name.startswith("Rss")}
    return 1024 * (sizes["RssAnon"] + sizes["RssShmem"])


def bytes_sent() -> int:
    """Over all TCP connections that this process has, as far as they have arrived."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                    total += struct.unpack("Q", info[BYTES_ACKED])[0]
        except FileNotFoundError:
            continue  # the folder that was listed
    return total


class Contestant:
    """Some ranks, whose leader takes a step only when it is told to."""

    def __init__(self, model: Path, num_ranks: int, options: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < num_ranks:
            sys.exit(f"{num_ranks} ranks need {num_ranks} cores, one for each; this process has {len(cores)}")
        port = free_port()
        self._pipe, there = harness.PROCESSES.Pipe()
        told = {"model": str(model), **options}
        self._processes = [
            harness.PROCESSES.Process(target=compute, args=(rank, num_ranks, cores[rank], port, told, there), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in self._processes:
            process.start()
        there.close()
        self.loaded: list[dict[str, int]] = self._pipe.recv()
        """Each rank's figures when it had loaded the model."""

    def step(self, number: int, texts: Texts) -> Step:
        before = self.figures()
        self._pipe.send((number, texts))
        seconds, loss = self._pipe.recv()
        after = self.figures()
        grown = [{name: rank[name] - was[name] for name in rank} for was, rank in zip(before, after, strict=True)]
        return Step(
            seconds=seconds,
            loss=loss,
            sent=sum(rank["sent"] for rank in grown),
            busy=max(rank["busy"] for rank in grown) / 1e9,
            most=[rank["most"] for rank in after],
        )

    def figures(self, at_rest: bool = False) -> list[dict[str, int]]:
        """Of each rank; see `Memory.figures`."""
        self._pipe.send(at_rest)
        figures: list[dict[str, int]] = self._pipe.recv()
        return figures

    def close(self) -> None:
        self._pipe.close()
        for process in self._processes:
            process.join()


def compute(rank: int, num_ranks: int, core: int, port: int, options: dict[str, Any], pipe: Any) -> None:
    """A rank's process."""
    harness.keep_to({core})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from gpu_server.ranks import follower
    from gpu_server.ranks.place import Place

    memory = Memory()

    def figures(_: Any, at_rest: bool = False) -> dict[str, int]:
        return {**memory.figures(at_rest), "sent": bytes_sent(), "busy": time.process_time_ns()}

    place = Place(rank=rank, num_ranks=num_ranks, local_rank=rank, local_ranks=num_ranks, port=port)
    if not place.leads:
        pipe.close()
        follower.COMMANDS["figures"] = figures
        follower.follow(place, {})
    else:
        lead(place, options, pipe, figures)


def lead(place: Any, options: dict[str, Any], pipe: Any, figures: Any) -> None:
    """The first rank's process, or the only one: it computes what it is told, as long as it is told anything."""
    import torch

    from gpu_server.config import ServerConfig
    from gpu_server.part_trainer import make_trainer
    from gpu_server.ranks.leader import Leader
    from gpu_server.torch_engine import TorchEngine
    from split_model import LoraConfig, PretrainedModel, adapter_shapes, initial_adapter

    leader = Leader(place, {}) if place.num_ranks > 1 else None
    given = {"run_dir": "unused", "steps": 10**6, "port": 0, "cut_layer": CUT_LAYER, "lora_rank": RANK, "dtype": "float32"}
    config = ServerConfig.from_options({**given, "lora_targets": ("c_attn",), **options}).settled("float32")
    model, lora, cpu = PretrainedModel(Path(config.model)), LoraConfig(**config.settings().lora()), torch.device("cpu")
    adapter = initial_adapter(model.config, lora, config.seed)
    if leader is not None:
        leader.prepare(config, cpu)
    trainer = (leader.trainer if leader is not None else make_trainer)(config, model, adapter, cpu)
    edge = adapter_shapes(model.config, lora, range(config.cut_layer))
    engine = TorchEngine(trainer, config.settings(), {name: adapter[name] for name in edge})

    def of_all(at_rest: bool) -> list[dict[str, int]]:
        group = leader._group if leader is not None else None
        if group is None:
            return [figures(None, at_rest)]
        group.send({other: {"command": "figures", "at_rest": at_rest} for other in group.partners})
        return [figures(None, at_rest), *(group.receive(other) for other in group.partners)]

    pipe.send(of_all(False))
    while True:
        try:
            told = pipe.recv()
        except EOFError:
            break
        if isinstance(told, bool):
            pipe.send(of_all(told))
            continue
        number, texts = told
        batches = made_up(number, texts, model.config.width, model.config.vocabulary_size)
        began = time.perf_counter()
        trained = engine.train(number, 10**6, 0, batches)
        pipe.send((time.perf_counter() - began, trained.loss))
    if leader is not None:
        leader.close()


def made_up(step: int, texts: Texts, width: int, vocabulary: int) -> dict[str, Any]:
    """What clients would send of their texts."""
    from protocol import Activations, Seconds

    generator = numpy.random.default_rng(step)
    return {
        f"client-{number}": Activations(
            step=step,
            micro_batch=0,
            seconds=Seconds(),
            lengths=numpy.array(lengths, numpy.int32),
            label_counts=numpy.array(label_counts, numpy.int32),
            labels=generator.integers(0, vocabulary, sum(label_counts), dtype=numpy.int32),
            values=generator.standard_normal((sum(lengths), width), dtype=numpy.float32),
        )
        for number, (lengths, label_counts) in enumerate(texts)
    }


def e2e_texts(model: Path, rounds: int) -> list[Texts]:
    """Of each round, every client's batch."""
    from split_model import PretrainedModel

    tokenizer = PretrainedModel(model).tokenizer()
    rows = harness.e2e_rows("train", slice(0, rounds * CLIENTS * BATCH_SIZE))
    # A text's tokens are what its labels are predicted from: its own last one predicts nothing.
    counts = [tuple(len(tokenizer.encode(part).ids) + 1 for part in row) for row in rows]
    texts = [(prompt + completion - 1, completion) for prompt, completion in counts]
    batches = [
        tuple(list(column) for column in zip(*texts[at : at + BATCH_SIZE], strict=True))
        for at in range(0, len(texts), BATCH_SIZE)
    ]
    return [batches[at : at + CLIENTS] for at in range(0, len(batches), CLIENTS)]


def race(racers: dict[str, Contestant], first: int, rounds: list[Texts], progress: Progress) -> dict[str, list[Step]]:
    """
    Args:
        first: number of the first step.
    """
    steps: dict[str, list[Step]] = {name: [] for name in racers}
    for number, texts in enumerate(rounds, first):
        order = list(racers)
        for name in order if number % 2 else reversed(order):
            steps[name].append(racers[name].step(number, texts))
            progress.advance(f"step {number}, {name}")
        losses = [of_racer[-1].loss for of_racer in steps.values()]
        if max(losses) - min(losses) > SAME_LOSS:
            sys.exit(f"the contestants do not compute the same: their losses of step {number} are {losses}")
    return steps


def speed_rows(what: str, steps: dict[str, list[Step]], rounds: list[Texts]) -> list[list[object]]:
    tokens = [sum(sum(lengths) for lengths, _ in texts) for texts in rounds]
    alone = next(iter(steps.values()))
    rows: list[list[object]] = []
    for name, of_racer in steps.items():
        rates = [number / step.seconds for number, step in zip(tokens, of_racer, strict=True)]
        ratios = [other.seconds / step.seconds for other, step in zip(alone, of_racer, strict=True)]
        busy = statistics.median(other.busy / step.busy for other, step in zip(alone, of_racer, strict=True))
        sent = statistics.median(step.sent for step in of_racer)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        rows.append([what, name, f"{statistics.median(rates):.0f}", ratio, f"{busy:.2f}", f"{sent / 1e6:.1f}"])
    return rows


def memory_rows(name: str, racer: Contestant) -> list[list[object]]:
    steps = [racer.step(number, FEW_TOKENS) for number in (1, 2)]
    rows: list[list[object]] = []
    for rank, (loaded, at_rest) in enumerate(zip(racer.loaded, racer.figures(at_rest=True), strict=True)):
        sizes = loaded["before"], loaded["most"], max(step.most[rank] for step in steps), at_rest["now"]
        rows.append([name, rank, *(f"{size / 1e6:.0f}" for size in sizes)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    together = f"{options.ranks} ranks"
    told: dict[str, tuple[int, dict[str, Any]]] = {
        "one process": (1, {}),
        together: (options.ranks, {}),
        f"{together}, --shard": (options.ranks, {"shard": True}),
    }
    speeds: list[list[object]] = []
    memory: list[list[object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        small = harness.make_gpt2_small(Path(scratch) / "small", half=True)
        work = {
            "E2E": e2e_texts(small, options.rounds),
            "long texts": options.rounds * [[(lengths, lengths) for lengths in LONG]],
        }
        with ExitStack() as started, Progress(len(told) * len(work) * (1 + options.rounds)) as progress:
            racers = {name: Contestant(small, *how) for name, how in told.items()}
            for racer in racers.values():
                started.callback(racer.close)
            number = 1
            for what, rounds in work.items():
                race(racers, number, rounds[:1], progress)  # is not counted
                speeds += speed_rows(what, race(racers, number + 1, rounds, progress), rounds)
                number += 1 + len(rounds)
        large = harness.make_gpt2_small(Path(scratch) / "large", half=True, **LARGE)
        for name, how in told.items():
            racer = Contestant(large, *how)
            memory += memory_rows(name, racer)
            racer.close()
    print(harness.markdown(["", "", "tokens/s", "against one process", "by processor time", "MB between ranks a step"], speeds))
    print(f"\ngoal of {together}: {GOAL} x\n")
    header = ["MB of its own", "rank", "before the model", "most while it is loaded", "most in a step", "at rest"]
    print(harness.markdown(header, memory))


if __name__ == "__main__":
    main()
