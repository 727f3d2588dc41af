"""
What `--edge-adapter none` costs and saves: gpt2-mini on E2E NLG, two devices of batch 8, with an edge part that learns and
with one that does not, at several cuts.

A server and its devices over loopback, in one process, on one thread of torch each. Perplexity is that of every twelfth row of
valid.txt after the run. Bytes are those of one device's messages, both ways, for a sample of its data; seconds those in which
it computed, encoded and decoded, for an epoch: in the first, and in the mean of those after it.
"""

import argparse
import tempfile
import threading
from itertools import product
from pathlib import Path
from typing import Any

import harness
import torch

from edge_client import EdgeClient, Step
from gpu_server import GpuServer
from terminal import Progress

CLIENTS, BATCH_SIZE, HALF = 2, 8, 21_030


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=120, help="of each device")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cuts", default="1,3,6")
    parser.add_argument("--codecs", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = list(product(options.codecs.split(","), map(int, options.cuts.split(",")), ("lora", "none")))
    in_epoch = -(-options.rows // BATCH_SIZE)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as name, Progress(len(cells) * options.epochs * in_epoch) as progress:
        for codec, cut, edge in cells:
            settings = {"epochs": options.epochs, "seed": options.seed, "cut_layer": cut, "edge_adapter": edge, "codec": codec}
            folder = Path(name) / f"{codec}-{cut}-{edge}"
            perplexity, steps = run(folder, settings, options.rows, progress)
            first, later = steps[:in_epoch], steps[in_epoch:]
            more_epochs = options.epochs - 1
            rows.append(
                [
                    *(codec, str(cut), edge, f"{perplexity:.3f}"),
                    *(f"{num_bytes(some) / options.rows / of:,.0f}" for some, of in ((first, 1), (later, more_epochs))),
                    f"{num_bytes(steps) / 1e6:.2f}",
                    *(f"{seconds(some) / of:.2f}" for some, of in ((first, 1), (later, more_epochs))),
                ]
            )
    header = [
        "codec",
        "cut",
        "edge",
        "perplexity",
        "B/sample, epoch 1",
        "after it",
        "MB in all",
        "s, epoch 1",
        "after it",
    ]
    print(f"{CLIENTS} x {options.rows} rows, {options.epochs} epochs of {in_epoch} steps, seed {options.seed}\n")
    print(harness.markdown(header, rows), flush=True)


def num_bytes(steps: list[Step]) -> int:
    return sum(step.num_bytes for step in steps)


def seconds(steps: list[Step]) -> float:
    """In which the device worked."""
    return sum(step.seconds.edge_compute + step.seconds.encode + step.seconds.decode for step in steps)


def run(folder: Path, settings: dict[str, Any], rows: int, progress: Progress) -> tuple[float, list[Step]]:
    """Perplexity after the run, and the steps as the first device saw them."""
    folder.mkdir()
    model = str(harness.shared("models/gpt2-mini"))
    valid = harness.write_rows(folder / "valid.txt", harness.e2e_rows("valid", slice(None, None, 12)))
    training = {"lr": 2e-3, "lr_schedule": "linear", "dtype": "float32", "check_codec_every": 0, "linger": 5.0}
    steps: list[Step] = []
    perplexity: list[float] = []
    with GpuServer(model=model, run_dir=str(folder / "run"), port=0, clients=CLIENTS, **training, **settings) as server:

        def take_part(number: int) -> None:
            half = harness.e2e_rows("train", slice(number * HALF, number * HALF + rows))
            own = {
                "data": harness.write_rows(folder / f"{number}.txt", half),
                "eval_data": None if number else valid,
                "batch_size": BATCH_SIZE,
                "engine": "torch",
                "dtype": "float32",
                "name": f"client-{number}",
                "state_dir": folder / "state",
            }
            with EdgeClient(server.url, model=model, **own) as client:
                for step in client.train():
                    if not number:
                        steps.append(step)
                        progress.advance(f"cut {settings['cut_layer']}, {settings['edge_adapter']}, loss {step.loss:.3f}")
                if not number:
                    perplexity.append(client.perplexity())

        threads = [threading.Thread(target=take_part, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        list(server.train())
        for thread in threads:
            thread.join()
    return perplexity[0], steps


if __name__ == "__main__":
    main()
