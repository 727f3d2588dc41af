"""
How many epochs at which rate, for a few hundred rows? Perplexity of held-out rows after so many passes over those there are.

One device, batches of 8, a constant rate, a server's default LoRA. Both parts are in one process, since a split run learns the
same. Two base models: gpt2-mini on E2E NLG, and the one of the examples on a restaurant guide. A seed decides the initial
adapter and the order.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import harness
import torch

from contestants.whole_model import WholeModel
from edge_client.data import Dataset
from gpu_server import ServerConfig
from split_model import LoraConfig
from terminal import Progress, count

BATCH_SIZE, HELD_OUT = 8, 80
EXAMPLES = harness.REPOSITORY / "examples"
GUIDES = EXAMPLES / "restaurants"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--epochs", type=numbers(int), default=[1, 3, 10], metavar="LIST", help="after which it is measured")
    parser.add_argument("--rates", type=numbers(float), default=[2e-4, 1e-3, 3e-3], metavar="LIST", help="learning rates")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        for what, model, train, valid in tasks(Path(name), options.rows):
            found: dict[float, list[list[float]]] = {rate: [] for rate in options.rates}
            before = 0.0
            with Progress(len(options.rates) * options.seeds * len(options.epochs), unit="measurement") as progress:
                for rate in options.rates:
                    for seed in range(options.seeds):
                        before, *after = run(model, train, valid, rate, seed, options.epochs, progress)
                        found[rate].append(after)
            print(f"\n{what}, {options.rows} rows; {before:.2f} before\n")
            print(f"| rate | {' | '.join(count(number, 'epoch') for number in options.epochs)} |")
            print(f"|---|{'---|' * len(options.epochs)}")
            for rate, of_seeds in found.items():
                cells = [f"{statistics.mean(values):.2f}" for values in zip(*of_seeds, strict=True)]
                print(f"| {rate:g} | {' | '.join(cells)} |")


def numbers(kind: type) -> object:
    return lambda text: [kind(part) for part in text.split(",")]


def tasks(folder: Path, rows: int) -> Iterator[tuple[str, Path, Path, Path]]:
    """What, base model, rows to learn, held-out rows."""
    pairs = harness.e2e_rows("train", slice(None, None, 42_061 // rows))[:rows]
    held_out = harness.e2e_rows("valid", slice(None, None, 4_672 // HELD_OUT))[:HELD_OUT]
    train, valid = harness.write_rows(folder / "train.txt", pairs), harness.write_rows(folder / "valid.txt", held_out)
    yield "gpt2-mini on E2E", harness.shared("models/gpt2-mini"), train, valid
    lines = (GUIDES / "client-0.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    guide = folder / "guide.jsonl"
    guide.write_text("".join(lines[:rows]), encoding="utf-8")
    yield (
        "examples/base_model on examples/restaurants",
        harness.REPOSITORY / "examples/base_model",
        guide,
        GUIDES / "valid.jsonl",
    )


def run(
    model: Path, train: Path, valid: Path, rate: float, seed: int, epochs: list[int], progress: Progress
) -> Iterator[float]:
    """Perplexity of the held-out rows before, and after each of these numbers of epochs."""
    defaults = {item.name: item.default for item in fields(ServerConfig)}
    lora = LoraConfig(rank=defaults["lora_rank"], alpha=defaults["lora_alpha"], targets=defaults["lora_targets"])
    whole = harness.whole_model(model, lora, rate, seed)
    data, held_out = harness.read_samples(train, whole), harness.read_samples(valid, whole)
    yield whole.perplexity(held_out)
    trained = 0
    for number in epochs:
        learn(whole, data, seed, rate, range(trained, number))
        trained = number
        perplexity = whole.perplexity(held_out)
        progress.advance(f"rate {rate:g}, perplexity {perplexity:.2f}")
        yield perplexity


def learn(whole: WholeModel, data: Dataset, seed: int, rate: float, epochs: range) -> None:
    num_batches = data.num_batches(BATCH_SIZE)
    for step in range(epochs.start * num_batches + 1, epochs.stop * num_batches + 1):
        whole.learn(data.batch(step, BATCH_SIZE, (seed, "device", "order")), rate)


if __name__ == "__main__":
    main()
