"""
What labels on the device cost in time, over links: one more exchange for every micro-batch, and the head on the device.

gpt2-mini on E2E, cut after block 3, one device with batches of 8, codec int8, two micro-batches of which two are in flight.
Each link shapes both directions. A run for each link and holder of the labels; its first step is not counted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import harness
from shaped_link import LINKS, ShapedLink

from edge_client import EdgeClient
from gpu_server import GpuServer
from terminal import Progress

BATCH_SIZE, CODEC = 8, "int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--links", default=",".join(LINKS))
    options = parser.parse_args()
    links, rows = options.links.split(","), []
    with tempfile.TemporaryDirectory() as scratch, Progress(2 * len(links) * options.steps) as progress:
        data = harness.write_rows(Path(scratch) / "rows.txt", harness.e2e_rows("train", slice(0, 8 * options.steps)))
        for link in links:
            seconds = {
                labels: steps_of(Path(scratch) / f"{link}-{labels}", link, labels, data, options.steps, progress)
                for labels in ("server", "device")
            }
            medians = {labels: statistics.median(found[1:]) for labels, found in seconds.items()}
            ratio = f"{medians['device'] / medians['server']:.2f}"
            rows.append([link, *(f"{median:.2f}" for median in medians.values()), ratio])
    print(harness.markdown(["link", "s a step, labels on the server", "on the device", "times"], rows))


def steps_of(folder: Path, link: str, labels: str, data: Path, steps: int, progress: Progress) -> list[float]:
    """Seconds of each step."""
    model = str(harness.shared("models/gpt2-mini"))
    settings = {"labels": labels, "codec": CODEC, "check_codec_every": 0, "micro_batches": 2, "cut_layer": 3, "steps": steps}
    found = []
    with GpuServer(model=model, run_dir=str(folder / "run"), port=0, clients=1, dtype="float32", **settings) as server:
        with ShapedLink(int(server.url.rpartition(":")[2]), LINKS[link]) as shaped:
            # The part is large, and not what is measured: the device has its model.
            own = {"model": model, "engine": "torch", "dtype": "float32", "batch_size": BATCH_SIZE}
            with EdgeClient(f"ws://127.0.0.1:{shaped.port}", data=data, state_dir=folder / "state", **own) as client:
                client.start()
                began = time.perf_counter()
                for step in client.train():
                    found.append(time.perf_counter() - began)
                    began = time.perf_counter()
                    progress.advance(f"{link}, labels on the {labels}, loss {step.loss:.3f}")
        list(server.train())
    return found


if __name__ == "__main__":
    main()
