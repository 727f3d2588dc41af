"""
How long until a model is good enough, over the links that devices have? gpt2-mini on E2E NLG, three clients of batch 8.

    python benchmarks/time_to_perplexity.py                     # --links 3g,4g,wifi,lan --codecs int8

Every client has a link of its own (benchmarks/shaped_link.py), and every contestant the same ones:

split         three blocks on the devices, nine and the head on the server, rounds of one step.
naive split   the same, but exact floats, and nobody computes while anything is on the way.
federated     the whole model on every device, adapters averaged every 12 steps (contestants/federated.py). A cut before the
              last block would not do for it: activations would still cross the link at every step, which it spares.
centralised   transformers + PEFT in one process, on padded batches. The texts have to come there once: time without their
              upload, and with the upload of a client's whole third of train.txt, its bytes through the bandwidth.

Seconds a step are measured over the link, medians of a few steps. Perplexity by step, on 400 rows of valid.txt drawn by the
seed, is computed once for each way of learning, in one process and without a link. The time to a target is a product of both:
steps until the curve crosses the target, by seconds a step. It is no run watched from its beginning to its end; with two cores
for a server and three devices that would say less, not more. What follows from that:

- Split, naive split and centralised learn on the same batches and have one curve, which is exact for float32 in rounds of one
  step (tests/test_parity.py). A lossy codec's own noise is taken for nothing: for int8 that is so (benchmarks/README.md),
  for int4 it is a favour.
- A device here is one thread; three of them and the server, which has two, share the machine. Federated clients, which do all
  the work themselves, share it in three, and so have the speed of a server rather than of three phones: that favours them.
- Federated clients compute at each of their steps what split devices compute in four. Neither that such a device must hold the
  whole model, nor that centralised training sees the texts, is counted: where they win, the last column says that split loses.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"  # as the programs do; it has to be said before torch is imported

import harness
import torch
from chaos import PROCESSES
from shaped_link import LINKS, LinkProfile, ShapedLink

from contestants.federated import mean
from contestants.whole_model import WholeModel, arrays
from edge_client import EdgeClient
from edge_client.data import Batch, pack
from gpu_server import GpuServer, StepRecord
from protocol import AdapterWeights, EdgeAdapter, Seconds, Tensors, decode, encode
from split_model import Adapter, LoraConfig
from terminal import Progress

CLIENTS, BATCH_SIZE, CUT_LAYER, LEARNING_RATE, SEED = 3, 8, 3, 2e-3, 0
THIRD, VALIDATION_ROWS = 14_020, 400
LORA = LoraConfig(rank=8, alpha=32.0, targets=("c_attn",))
ROUND = 12  # steps between two exchanges of federated adapters, and between two looks at the perplexity
SERVER_THREADS, DEVICE_THREADS = 2, 1
MAX_BYTES = 2**28
GOALS = {"4g": "naive split takes 3 x", "wifi": "within 10 % of the slower part", "lan": "within 10 % of the slower part"}


@dataclass
class Scene:
    """What all contestants share."""

    base: Path
    scratch: Path
    steps: int
    """How many are measured of each contestant on each link."""
    thirds: list[Path] = field(default_factory=list)
    valid: Path = field(init=False)

    def __post_init__(self) -> None:
        for client in range(CLIENTS):
            rows = harness.e2e_rows("train", slice(client * THIRD, (client + 1) * THIRD))
            self.thirds.append(harness.write_rows(self.scratch / f"third-{client}.txt", rows))
        drawn = random.Random(SEED).sample(harness.e2e_rows("valid", slice(None)), VALIDATION_ROWS)
        self.valid = harness.write_rows(self.scratch / "valid.txt", drawn)
        self._folders = count()

    def new_folder(self) -> Path:
        folder = self.scratch / f"run-{next(self._folders)}"
        folder.mkdir()
        return folder

    def model(self) -> WholeModel:
        return harness.whole_model(self.base, LORA, LEARNING_RATE, SEED)

    def batches(self, model: WholeModel, *clients: int) -> Iterator[Batch]:
        """Of steps 1, 2, ..., those of the given clients together, as they draw them in a split run."""
        data = {f"client-{client}": harness.read_samples(self.thirds[client], model) for client in clients}
        for step in count(1):
            orders = {name: of_client.order(step, BATCH_SIZE, (SEED, name, "order")) for name, of_client in data.items()}
            yield pack([data[name].samples[row] for name, order in orders.items() for row in order])


@dataclass(frozen=True)
class Cost:
    """What a step takes, medians; bytes are of one device."""

    seconds: float
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    edge_seconds: float = 0.0
    """Of the slowest device's computation."""
    server_seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--links", default=",".join(LINKS), help="links to measure (default: %(default)s)")
    parser.add_argument("--codecs", default="int8", help="of split, each a contestant (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=2, help="of split, all under way at once (default: %(default)s)")
    parser.add_argument("--target", type=float, default=30.0, help="perplexity (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="measured on each link (default: %(default)s)")
    parser.add_argument("--max-steps", type=int, default=300, help="after which a curve is given up (default: %(default)s)")
    parser.add_argument("--jitter", type=float, default=0.0, help="milliseconds, of every link")
    parser.add_argument("--loss", type=float, default=0.0, help="of segments, of every link")
    options = parser.parse_args()
    for name in options.links.split(","):
        if name not in LINKS:
            parser.error(f"there is no link {name!r}; there are {', '.join(LINKS)}")
    links = {name: replace(LINKS[name], jitter=options.jitter / 1e3, loss=options.loss) for name in options.links.split(",")}
    with tempfile.TemporaryDirectory() as scratch:
        scene = Scene(harness.shared("models/gpt2-mini"), Path(scratch), options.steps)
        torch.set_num_threads(SERVER_THREADS)
        curves = {
            1: learning_curve("centralised", centralised_models(scene), scene, options),
            ROUND: learning_curve("federated", federated_models(scene), scene, options),
        }
        steps = {length: steps_to(options.target, curve, length) for length, curve in curves.items()}
        codecs = options.codecs.split(",")
        costs = {name: measure(scene, f"{name}, ", profile, codecs, options.micro_batches) for name, profile in links.items()}
        report_curves(curves, steps, options.target)
        for name, profile in links.items():
            report_link(name, profile, costs[name], steps, max(path.stat().st_size for path in scene.thirds))
        report_goals({name: (of_link[f"split, {codecs[0]}"], of_link["naive split"]) for name, of_link in costs.items()})


# Perplexity by step


def centralised_models(scene: Scene) -> Iterator[WholeModel]:
    """The model after each step on the union of the clients' batches."""
    model = scene.model()
    for batch in scene.batches(model, *range(CLIENTS)):
        model.learn(batch, LEARNING_RATE)
        yield model


def federated_models(scene: Scene) -> Iterator[WholeModel]:
    """One of the clients' models after each step; at the end of a round all have the mean adapter."""
    models = [scene.model() for _ in range(CLIENTS)]
    batches = [scene.batches(model, client) for client, model in enumerate(models)]
    for step in count(1):
        for model, of_client in zip(models, batches, strict=True):
            model.learn(next(of_client), LEARNING_RATE)
        if step % ROUND == 0:
            adapter = tensors(mean([arrays(model.adapter()) for model in models]))
            for model in models:
                model.load_adapter(adapter)
        yield models[0]


def learning_curve(name: str, models: Iterator[WholeModel], scene: Scene, options: argparse.Namespace) -> dict[int, float]:
    """Perplexity before, and after every so many steps until it is below the target."""
    untrained = scene.model()
    valid = harness.read_samples(scene.valid, untrained)
    curve = {0: untrained.perplexity(valid)}
    with Progress(options.max_steps) as progress:
        for step in range(1, options.max_steps + 1):
            model = next(models)
            if step % ROUND == 0:
                curve[step] = model.perplexity(valid)
            progress.advance(f"{name}: perplexity {curve[max(curve)]:.1f} after {max(curve)} steps")
            if curve[max(curve)] <= options.target:
                return curve
    sys.exit(f"{name} training has perplexity {curve[max(curve)]:.1f} after {max(curve)} steps; give a higher --target")


def steps_to(target: float, curve: dict[int, float], length: int) -> int:
    """Where the curve, a straight line in nats between two looks, crosses the target; in whole rounds of this length."""
    (before, high), (after, low) = list(curve.items())[-2:]
    crossing = before + (after - before) * math.log(high / target) / math.log(high / low)
    return math.ceil(crossing / length) * length


# Seconds a step


def centralised_cost(scene: Scene, what: str) -> Cost:
    import reference  # loads transformers, which the other processes, that import this file too, must not

    start = reference.make_adapter(scene.base, scene.new_folder(), rank=LORA.rank, alpha=int(LORA.alpha), targets=LORA.targets)
    rows = [reference.encode(harness.read_rows(path)[: BATCH_SIZE * (scene.steps + 1)], scene.base) for path in scene.thirds]
    moments: list[float] = []

    def batches() -> Iterator[Sequence[Any]]:
        with Progress(scene.steps, unit="step") as progress:
            for step in range(scene.steps + 1):  # the first warms up
                moments.append(time.perf_counter())
                yield [row for of_client in rows for row in of_client[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
                if step:
                    progress.advance(f"{what}: {time.perf_counter() - moments[-1]:.2f} s")
            moments.append(time.perf_counter())

    reference.train(scene.base, start, batches(), dtype=torch.float32, lr=LEARNING_RATE)
    return Cost(statistics.median(later - earlier for earlier, later in pairwise(moments[1:])))


def measure(scene: Scene, where: str, profile: LinkProfile, codecs: list[str], micro_batches: int) -> dict[str, Cost]:
    """All contestants over the same link, one after the other; the centralised one has none, but the same minutes."""
    costs = {f"split, {codec}": split_cost(scene, f"{where}split, {codec}", profile, codec, micro_batches) for codec in codecs}
    costs["naive split"] = split_cost(scene, f"{where}naive split", profile, "float32", 1)
    costs["federated"] = federated_cost(scene, f"{where}federated", profile)
    costs["centralised"] = centralised_cost(scene, f"{where}centralised")
    return costs


def split_cost(scene: Scene, what: str, profile: LinkProfile, codec: str, micro_batches: int) -> Cost:
    folder = scene.new_folder()
    lora = {"lora_rank": LORA.rank, "lora_alpha": LORA.alpha, "lora_targets": LORA.targets}
    run = {"run_dir": str(folder / "run"), "steps": scene.steps, "clients": CLIENTS, "cut_layer": CUT_LAYER}
    wire = {"codec": codec, "micro_batches": micro_batches}
    computed = {"model": str(scene.base), "dtype": "float32"}
    with Cast(profile) as cast, Progress(scene.steps) as progress:
        cast.start(serve, {**computed, **run, **wire, **lora, "lr": LEARNING_RATE, "seed": SEED})
        links = cast.links(int(cast.listen().rpartition(":")[2]))
        for client, (link, data) in enumerate(zip(links, scene.thirds, strict=True)):
            own = {"name": f"client-{client}", "data": data, "batch_size": BATCH_SIZE, "state_dir": folder / "state"}
            cast.start(take_part, link.url, {**computed, **own, "engine": "torch", "in_flight": micro_batches})
        moments, records = [], []
        for _ in range(scene.steps):
            moment, record = cast.listen()
            moments.append(moment)
            records.append(record)
            progress.advance(f"{what}: step {record.number}")
        cast.wait()
    return split_cost_of(moments, records)


def split_cost_of(moments: list[float], records: list[StepRecord]) -> Cost:
    """The first step only warms up."""

    def median(of_record: Callable[[StepRecord], float]) -> float:
        return statistics.median(of_record(record) for record in records[1:])

    return Cost(
        seconds=statistics.median(later - earlier for earlier, later in pairwise(moments)),
        bytes_up=median(lambda record: statistics.mean(record.bytes_up.values())),
        bytes_down=median(lambda record: statistics.mean(record.bytes_down.values())),
        edge_seconds=median(lambda record: max(parts.edge_compute for parts in record.seconds.values())),
        server_seconds=median(lambda record: record.server_compute),
    )


def serve(options: dict[str, Any], told: Any) -> None:
    """The split server's process: says where it listens, then when each step was finished."""
    torch.set_num_threads(SERVER_THREADS)
    with GpuServer(port=0, **options) as server:
        told.send(server.url)
        for record in server.train():
            told.send((time.perf_counter(), record))


def take_part(url: str, options: dict[str, Any], told: Any) -> None:
    """A split device's process."""
    torch.set_num_threads(DEVICE_THREADS)
    with EdgeClient(url, **options) as client:
        for _ in client.train():
            pass


def federated_cost(scene: Scene, what: str, profile: LinkProfile) -> Cost:
    """
    Of one step and its part of an exchange. What a step computes is the same throughout a round, so rounds are cut short.
    """
    rounds, steps = 3, max(1, scene.steps // 3)
    with Cast(profile) as cast, Progress(rounds * CLIENTS, unit="client's round") as progress:
        cast.start(average, CLIENTS)
        for client, link in enumerate(cast.links(cast.listen())):
            cast.start(take_part_whole, scene, client, rounds, steps, link.port)
        by_client: dict[int, list[Round]] = {client: [] for client in range(CLIENTS)}
        for _ in range(rounds * CLIENTS):
            client, of_round = cast.listen()
            by_client[client].append(of_round)
            progress.advance(f"{what}: {of_round.training / steps:.2f} s a step, exchange {of_round.exchange:.2f} s")
        cast.wait()
    # The last one to come waits for nobody: its exchange is that of the link, and all wait as long as it computes.
    of_rounds = list(zip(*by_client.values(), strict=True))
    computing = statistics.median(max(one.training for one in of_round) for of_round in of_rounds) / steps
    exchange = statistics.median(min(one.exchange for one in of_round) for of_round in of_rounds)
    one = of_rounds[-1][0]
    return Cost(computing + exchange / ROUND, one.bytes_up / ROUND, one.bytes_down / ROUND)


def take_part_whole(scene: Scene, client: int, rounds: int, steps: int, port: int, told: Any) -> None:
    """A federated device's process."""
    torch.set_num_threads(DEVICE_THREADS)
    model = scene.model()
    for of_round in take_rounds(model, scene.batches(model, client), rounds, steps, port):
        told.send((client, of_round))


def average(clients: int, told: Any) -> None:
    """The federated server's process, until its clients leave: says its port, then averages."""
    with Listener(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(clients) as pool:
        told.send(listener.address[1])
        ends = [listener.accept() for _ in range(clients)]
        while True:
            try:
                messages = list(pool.map(Connection.recv_bytes, ends))  # at once, as their links bring them
            except EOFError:
                return
            contributions = [decode(message, MAX_BYTES) for message in messages]
            adapter = mean([contribution.tensors for contribution in contributions])  # type: ignore[union-attr]
            answer = encode(EdgeAdapter(step=contributions[0].step, tensors=adapter))  # type: ignore[union-attr]
            list(pool.map(Connection.send_bytes, ends, [answer] * clients))


@dataclass(frozen=True)
class Round:
    """What a round took a client."""

    training: float
    """Seconds of all its steps."""
    exchange: float
    """Seconds from the last of them to the mean adapter."""
    bytes_up: int
    bytes_down: int


def take_rounds(model: WholeModel, batches: Iterator[Batch], rounds: int, steps: int, port: int) -> Iterator[Round]:
    """A federated client's part in so many rounds of so many steps, over whatever listens at ``port``."""
    with Client(("127.0.0.1", port)) as server:
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            for _ in range(steps):
                model.learn(next(batches), LEARNING_RATE)
            trained = time.perf_counter()
            question = encode(
                AdapterWeights(
                    step=number * steps, seconds=Seconds(edge_compute=trained - began), tensors=arrays(model.adapter())
                )
            )
            server.send_bytes(question)
            answer = server.recv_bytes()
            model.load_adapter(tensors(decode(answer, MAX_BYTES).tensors))  # type: ignore[union-attr]
            yield Round(trained - began, time.perf_counter() - trained, len(question), len(answer))


def tensors(adapter: Tensors) -> Adapter:
    return {name: torch.from_numpy(array) for name, array in adapter.items()}


class Cast:
    """The processes of one contestant on one link, and what they say. They are gone when it is left."""

    def __init__(self, profile: LinkProfile) -> None:
        self._profile = profile
        self._processes: list[Any] = []
        self._open = ExitStack()

    def __enter__(self) -> "Cast":
        here, self._there = PROCESSES.Pipe(duplex=False)
        self._here = self._open.enter_context(closing(here))
        return self

    def start(self, target: Callable[..., None], *arguments: Any) -> None:
        """A process, which is also given where to say something."""
        process = PROCESSES.Process(target=target, args=(*arguments, self._there), daemon=True)
        process.start()
        self._processes.append(process)

    def links(self, port: int) -> list[ShapedLink]:
        """One for every client."""
        return [self._open.enter_context(ShapedLink(port, self._profile, seed)) for seed in range(CLIENTS)]

    def listen(self) -> Any:
        """What one of the processes says next."""
        while True:
            living = [process.sentinel for process in self._processes if process.exitcode is None]
            if self._here.poll():
                return self._here.recv()
            self._check()
            if not living:
                sys.exit("all processes of the run have ended, and have said less than expected")
            wait([self._here, *living])

    def wait(self) -> None:
        """Until all have ended, and well."""
        for process in self._processes:
            process.join()
        self._check()

    def _check(self) -> None:
        for process in self._processes:
            if process.exitcode:
                sys.exit(f"a process of the run ended with status {process.exitcode}")

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._there.close()
        self._open.close()


# Tables


def report_curves(curves: dict[int, dict[int, float]], steps: dict[int, int], target: float) -> None:
    looks = sorted({step for curve in curves.values() for step in curve})
    names = {1: "split, naive split, centralised", ROUND: f"federated, rounds of {ROUND}"}
    rows = [
        [names[length], *(f"{curve[step]:.1f}" if step in curve else "" for step in looks), steps[length]]
        for length, curve in curves.items()
    ]
    print(harness.markdown(["perplexity after steps", *looks, f"steps to {target:g}"], rows))


def report_link(name: str, profile: LinkProfile, costs: dict[str, Cost], steps: dict[int, int], text_bytes: int) -> None:
    # Name, cost, steps, seconds to the target.
    found: list[tuple[str, Cost, int, float]] = []
    for contestant, cost in costs.items():
        needed = steps[ROUND if contestant == "federated" else 1]
        found.append((contestant, cost, needed, needed * cost.seconds))
    _, cost, needed, seconds = found[-1]
    upload = text_bytes * 8 / profile.up
    found.append((f"centralised, after {text_bytes / 1e6:.1f} MB of text", cost, needed, upload + seconds))
    ours = found[0][3]
    rows = []
    for contestant, cost, needed, seconds in found:
        megabytes = [f"{num_bytes / 1e6:.3f}" for num_bytes in (cost.bytes_up, cost.bytes_down)]
        ratio = f"{seconds / ours:.2f} x"
        loses = "split loses" if seconds < ours else ""
        rows.append([contestant, f"{cost.seconds:.2f}", *megabytes, needed, f"{seconds:.0f} s", ratio, loses])
    title = f"{name}: {profile.up / 1e6:g} up, {profile.down / 1e6:g} Mbit/s down, {profile.round_trip * 1e3:g} ms"
    header = [title, "s a step", "MB up", "MB down", "steps", "to the target", "against split", ""]
    print("\n" + harness.markdown(header, rows))


def report_goals(pairs: dict[str, tuple[Cost, Cost]]) -> None:
    """Of the first codec's split and of the naive one, by link."""
    rows = []
    for name, (ours, naive) in pairs.items():
        slower, faster_than_naive = max(ours.edge_seconds, ours.server_seconds), naive.seconds / ours.seconds
        met = {"4g": faster_than_naive >= 3}.get(name, ours.seconds <= 1.1 * slower)
        goal = GOALS.get(name, "")
        parts = [f"{seconds:.2f}" for seconds in (ours.seconds, ours.edge_seconds, ours.server_seconds)]
        ratios = [f"{ours.seconds / slower:.2f} x", f"{faster_than_naive:.2f} x"]
        rows.append([name, *parts, *ratios, goal and f"{goal}: {'reached' if met else 'missed'}"])
    header = [
        "split",
        "s a step",
        "edge computes, s",
        "server computes, s",
        "step to the slower",
        "naive split to split",
        "goal",
    ]
    print("\n" + harness.markdown(header, rows))


if __name__ == "__main__":
    main()
