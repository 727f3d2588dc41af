"""
What a codec does to a whole run: gpt2-mini on E2E NLG, three clients of batch 8, perplexity of held-out rows after it.

A server and its clients over loopback, in one process, for every codec and seed; a seed decides initial adapter, order and
noise. The table is printed after every seed, of all so far. The codec policy is told to let every codec be: what it would have
done follows from the change of the loss that it saw. Held-out rows are every twelfth of valid.txt, and travel in bfloat16 at
least.
"""

import argparse
import json
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import harness
import torch

from edge_client import EdgeClient
from gpu_server import GpuServer
from protocol import DELTA
from protocol.settings import CODEC_NAMES, DITHERED
from terminal import Progress

CLIENTS, BATCH_SIZE, THIRD = 3, 8, 14_020


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=480, help="of each client")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr-schedule", default="linear", help="a constant rate ends in the noise of its last steps")
    usual = ",".join((*CODEC_NAMES, DELTA))
    parser.add_argument("--codecs", default=usual, help="the first is the measure of the others")
    parser.add_argument("--aggregate-every", type=int, default=1, help="steps in a round")
    parser.add_argument("--adapter-codec", choices=("float32", DITHERED), help="default: as runs have it")
    parser.add_argument("--labels", choices=("server", "device"), default="server")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codecs = options.codecs.split(",")
    steps = options.epochs * -(-options.rows // BATCH_SIZE)
    found: dict[str, list[float]] = {codec: [] for codec in codecs}
    changes: dict[str, list[float]] = {codec: [] for codec in codecs}
    with tempfile.TemporaryDirectory() as name, Progress(len(codecs) * options.seeds * steps) as progress:
        folder = Path(name)
        for seed in range(options.seeds):
            for codec in codecs:
                settings = {"epochs": options.epochs, "seed": seed, "codec": codec, "lr_schedule": options.lr_schedule}
                settings |= {"aggregate_every": options.aggregate_every}
                settings |= {"adapter_codec": options.adapter_codec} if options.adapter_codec and codec != "float32" else {}
                settings |= {"labels": options.labels, "check_codec_every": 0 if options.labels == "device" else 10}
                perplexity, change = run(folder / f"{seed}-{codec}", settings, options.rows, progress)
                found[codec].append(perplexity)
                changes[codec].append(change)
            report(found, changes, f"{options.epochs} epochs of {CLIENTS} x {options.rows} rows, {steps} steps")


def run(folder: Path, settings: dict[str, Any], rows: int, progress: Progress) -> tuple[float, float]:
    """Perplexity after the run, and by how many nats/token the codec changed the loss in the last check."""
    folder.mkdir()
    model = str(harness.shared("models/gpt2-mini"))
    valid = harness.write_rows(folder / "valid.txt", harness.e2e_rows("valid", slice(None, None, 12)))
    training = {"cut_layer": 3, "lr": 2e-3, "dtype": "float32", "codec_tolerance": 1e9}
    perplexity: list[float] = []
    with GpuServer(model=model, run_dir=str(folder / "run"), port=0, clients=CLIENTS, **training, **settings) as server:

        def take_part(number: int) -> None:
            third = harness.e2e_rows("train", slice(number * THIRD, number * THIRD + rows))
            data = harness.write_rows(folder / f"{number}.txt", third)
            own = {
                "batch_size": BATCH_SIZE,
                "engine": "torch",
                "dtype": "float32",
                "name": f"client-{number}",
                "state_dir": folder / "state",
            }
            with EdgeClient(server.url, model=model, data=data, eval_data=None if number else valid, **own) as client:
                for step in client.train():
                    if not number:
                        progress.advance(f"{settings['codec']}, seed {settings['seed']}, loss {step.loss:.3f}")
                if not number:
                    perplexity.append(client.perplexity())

        threads = [threading.Thread(target=take_part, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        list(server.train())
        for thread in threads:
            thread.join()
    return perplexity[0], seen_by_the_policy(folder / "run" / "codecs.json", settings["codec"])


def seen_by_the_policy(path: Path, codec: str) -> float:
    """Nats per labelled token, smoothed."""
    if not path.exists():
        return 0.0
    seen = json.loads(path.read_text())["seen"][codec]
    return float(seen["total"] / seen["weight"])


def report(found: dict[str, list[float]], changes: dict[str, list[float]], what: str) -> None:
    first, *_ = found.values()
    rows = []
    for codec, perplexities in found.items():
        against = [100 * (perplexity / exact - 1) for perplexity, exact in zip(perplexities, first, strict=True)]
        each = ", ".join(f"{difference:+.2f}" for difference in against)
        shown = ", ".join(f"{perplexity:.3f}" for perplexity in perplexities)
        rows.append([codec, shown, f"{statistics.mean(against):+.2f} %", each, f"{statistics.mean(changes[codec]):+.4f}"])
    header = [f"after {what}", "perplexity, by seed", "against the first", "each, %", "change of the loss that was seen"]
    print(harness.markdown(header, rows), flush=True)


if __name__ == "__main__":
    main()
