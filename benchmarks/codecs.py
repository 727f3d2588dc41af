"""
What each codec costs and loses: activations at the cut and their gradients, on E2E NLG in batches of 8.

The model is gpt2-mini after a moment of training, or another one, such as that of benchmarks/smollm2.py, which has outlier
channels as gpt2-mini has not: the first table says how large its channels become.

Bytes an element are those of whole messages after zstd. Speed is of whole messages, too, from floats to bytes and back, in MB
of float32 a second of one core's own time; memcpy and zstd alone are what cannot be beaten. The change of the loss is that of
the server's part when it gets the activations as they arrive. Gradients change no loss at once, but the edge's gradient that is
made of them: that of its LoRA matrices.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch

from edge_client.data import Batch, Dataset
from protocol import CODECS, EXACT, ActivationGradient, Array, decode, encode, zstd
from protocol.encoding import COMPRESSION_LEVEL
from protocol.gradients import coded_gradient
from protocol.rounding import Dither
from protocol.settings import COARSE, DITHERED, codec_name
from split_model import EdgePart, LoraConfig, OptimiserConfig, PretrainedModel, ServerPart, adamw, initial_adapter, take_step
from terminal import Progress

BATCH_SIZE, LEARNING_RATE, MAX_BYTES = 8, 2e-3, 2**26


@dataclass
class Example:
    """One batch's activations and gradient, (N, d) each."""

    batch: Batch
    activations: Array
    gradient: Array


@dataclass
class Cost:
    """Of one codec, one kind of values."""

    codec: str
    gradients: bool
    beside: str = ""
    """How activations travel, where gradients are dithered: as finely as that."""
    encoding: list[float] = field(default_factory=list)
    """MB of float32 a second of CPU time, a figure a message."""
    decoding: list[float] = field(default_factory=list)
    num_bytes: int = 0
    num_elements: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    arrived: list[Array] = field(default_factory=list)

    def measure(self, number: int, values: Array) -> None:
        # As the session does: the noise of every message is another one.
        dither = Dither("benchmark", number) if self.gradients and self.codec != EXACT else None
        message = ActivationGradient(step=number, loss=0.0, labelled_tokens=1, values=values)
        began = time.thread_time()
        data = encode(coded_gradient(message, self.beside, dither) if self.beside else message, self.codec, dither)
        encoded = time.thread_time()
        arrived = decode(data, MAX_BYTES, [self.codec]).values  # type: ignore[union-attr]
        ended = time.thread_time()
        self.encoding.append(values.nbytes / 1e6 / (encoded - began))
        self.decoding.append(values.nbytes / 1e6 / (ended - encoded))
        self.num_bytes += len(data)
        self.num_elements += values.size
        self.squared_error += float(np.square(arrived - values, dtype=np.float64).sum())
        self.squared += float(np.square(values, dtype=np.float64).sum())
        self.arrived.append(arrived)

    def row(self, loss: str) -> list[str]:
        speeds = [f"{statistics.median(speeds):,.0f}" for speeds in (self.encoding, self.decoding)]
        error = (self.squared_error / self.squared) ** 0.5
        name = f"{self.codec}, beside {codec_name(self.beside)}" if self.beside else codec_name(self.codec)
        return [name, f"{self.num_bytes / self.num_elements:.3f}", *speeds, f"{error:.4f}", loss]


class Model:
    """Both parts of a model in one process, to be trained for a moment, so that the adapters are no longer zero."""

    def __init__(self, folder: Path, cut_layer: int) -> None:
        self.base, cpu = PretrainedModel(folder), torch.device("cpu")
        lora = LoraConfig(rank=8, alpha=32.0, dropout=0.0, targets=self.base.config.family.usual_targets)
        adapter = initial_adapter(self.base.config, lora, 0)
        self.edge = EdgePart(self.base, cut_layer, lora, weight_dtype=torch.float32, device=cpu)
        self.server = ServerPart(self.base, cut_layer, lora, weight_dtype=torch.float32, device=cpu)
        self.parts = (self.edge, self.server)
        for part in self.parts:
            part.load_adapter({name: adapter[name] for name in part.matrices()})
            part.train()

    def activations(self, batch: Batch) -> torch.Tensor:
        """After the edge's blocks, (N, d); the gradients of both parts are cleared."""
        for part in self.parts:
            part.clear_gradients()
        return self.edge(batch.tokens, batch.lengths)

    def loss(self, batch: Batch, values: torch.Tensor) -> torch.Tensor:
        """Summed, in nats, of the server's part given activations."""
        return self.server.summed_loss(values, batch.lengths, batch.label_counts, torch.from_numpy(batch.labels).long())

    def example(self, batch: Batch) -> Example:
        activations = self.activations(batch)
        values = activations.detach().requires_grad_()
        (self.loss(batch, values) / len(batch.labels)).backward()
        assert values.grad is not None
        activations.backward(values.grad)
        return Example(batch, values.detach().numpy(), values.grad.numpy())

    def edge_gradient(self, batch: Batch, gradient: Array) -> Array:
        """Of all the edge's trained matrices, one after the other."""
        self.activations(batch).backward(torch.from_numpy(gradient))
        return np.concatenate([matrix.numpy().ravel() for matrix in self.edge.gradients().values()])

    def train(self, batches: list[Batch], progress: Progress) -> None:
        matrices = [matrix for part in self.parts for matrix in part.matrices().values()]
        optimiser = adamw(matrices, OptimiserConfig(learning_rate=LEARNING_RATE))
        for batch in batches:
            example = self.example(batch)
            take_step(optimiser, LEARNING_RATE)
            progress.advance(f"{len(example.activations)} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="in Hugging Face's format, instead of gpt2-mini")
    parser.add_argument("--cut-layer", type=int, default=3)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--steps", type=int, default=40, help="of training before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(options.model or harness.shared("models/gpt2-mini"), options.cut_layer)
    batches = e2e_batches(model.base, options.batches + options.steps)
    with Progress(options.steps) as progress:
        model.train(batches[options.batches :], progress)
    costs = [Cost(codec, gradients) for gradients in (False, True) for codec in (EXACT, *CODECS)]
    costs += [Cost(DITHERED, True, beside) for beside in ("int8", COARSE)]
    limits: dict[str, list[float]] = {}
    examples = []
    with Progress(options.batches) as progress:
        for number, batch in enumerate(batches[: options.batches], 1):
            examples.append(model.example(batch))
            for cost in costs:
                cost.measure(number, examples[-1].gradient if cost.gradients else examples[-1].activations)
            race_limits(examples[-1].activations, limits)
            progress.advance("batches coded")
    print(channels(examples), end="\n\n")
    report(model, examples, costs, limits)


def e2e_batches(base: PretrainedModel, count: int) -> list[Batch]:
    with tempfile.TemporaryDirectory() as scratch:
        rows = harness.write_rows(Path(scratch) / "rows.txt", harness.e2e_rows("train", slice(0, 14_020)))
        data = Dataset.load(rows, base.tokenizer(), base.config.end_token, 512)
    return [data.batch(step, BATCH_SIZE, (0, "benchmark", "order")) for step in range(1, count + 1)]


def race_limits(values: Array, speeds: dict[str, list[float]]) -> None:
    """What no codec can beat: copying the floats, and zstd on the bytes of int8's codes."""
    codes = np.rint(values * (127 / np.abs(values).max(axis=1, keepdims=True))).astype(np.int8).tobytes()
    copy, compressed = np.empty_like(values), zstd.compress(codes, COMPRESSION_LEVEL)
    contests: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: np.copyto(copy, values),
        "zstd alone, of one byte an element": lambda: zstd.compress(codes, COMPRESSION_LEVEL),
        "unzstd alone": lambda: zstd.ZstdDecompressor().decompress(compressed),
    }
    for name, contest in contests.items():
        began = time.thread_time()
        contest()
        speeds.setdefault(name, []).append(values.nbytes / 1e6 / max(time.thread_time() - began, 1e-9))


def channels(examples: list[Example]) -> str:
    """How large the elements of a channel become, of the largest channels and of the median one."""
    rows = []
    for kind in ("activations", "gradient"):
        largest = np.max([np.abs(getattr(example, kind)).max(axis=0) for example in examples], axis=0)
        *_, third, second, first = np.sort(largest)
        rows.append([kind, *(f"{value:.3g}" for value in (first, second, third, np.median(largest)))])
    return harness.markdown(["largest element of a channel", "first", "second", "third", "median channel"], rows)


def report(model: Model, examples: list[Example], costs: list[Cost], limits: dict[str, list[float]]) -> None:
    header = ["bytes an element", "encode MB/s", "decode MB/s", "relative error"]
    for gradients, last in ((False, "change of the loss, nats/token"), (True, "relative error of the edge's gradient")):
        of_kind = [cost for cost in costs if cost.gradients is gradients]
        effects = gradient_errors(model, examples, of_kind) if gradients else loss_changes(model, examples, of_kind)
        rows = [cost.row(effect) for cost, effect in zip(of_kind, effects, strict=True)]
        print(harness.markdown(["gradients" if gradients else "activations", *header, last], rows), end="\n\n")
    rows = [[name, f"{statistics.median(speeds):,.0f}"] for name, speeds in limits.items()]
    print(harness.markdown(["limit", "MB/s of float32"], rows))


def loss_changes(model: Model, examples: list[Example], costs: list[Cost]) -> list[str]:
    losses = []
    with torch.no_grad(), Progress(len(costs)) as progress:
        for cost in costs:
            pairs = zip(examples, cost.arrived, strict=True)
            losses.append(sum(model.loss(example.batch, torch.from_numpy(arrived)).item() for example, arrived in pairs))
            progress.advance(f"loss with {cost.codec}")
    num_labels = sum(len(example.batch.labels) for example in examples)
    return [f"{(loss - losses[0]) / num_labels:+.5f}" for loss in losses]


def gradient_errors(model: Model, examples: list[Example], costs: list[Cost]) -> list[str]:
    errors = []
    exact = [model.edge_gradient(example.batch, example.gradient) for example in examples]
    with Progress(len(costs)) as progress:
        for cost in costs:
            coded = [model.edge_gradient(e.batch, arrived) for e, arrived in zip(examples, cost.arrived, strict=True)]
            ratios = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(coded, exact, strict=True)]
            errors.append(f"{statistics.median(ratios):.4f}")
            progress.advance(f"gradient with {cost.codec}")
    return errors


if __name__ == "__main__":
    main()
