"""
Bytes of a labelled sample both ways, as TCP carries them: with TLS, WebSocket framing, handshakes and the adapter's exchange.

gpt2-mini on shuffled rows of a third of E2E's train.txt, batches of 8, cut after block 3, one round of 33 steps, each codec in
a run of its own. The reference pads every sample to 512 tokens and sends float32; its bytes are computed, of activations and
gradients alone.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import contestants

from edge_client import EdgeClient
from edge_client.enrolment import store
from gpu_server import GpuServer
from gpu_server.door import enrolments_of, invite
from protocol import CODECS
from split_model import BaseModel
from terminal import Progress

BATCH_SIZE, REFERENCE_LENGTH, BYTES_OF_A_FLOAT = 8, 512, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=33)
    options = parser.parse_args()
    model = contestants.shared("models/gpt2-mini")
    num_samples = BATCH_SIZE * options.steps
    reference = 2 * REFERENCE_LENGTH * BYTES_OF_A_FLOAT * BaseModel(model).config.width
    of_reference = [f"{reference / parts / 1e3:.1f}" for parts in (2, 2, 1)]
    rows = [["reference: float32, padded to 512", *of_reference, ""]]
    with tempfile.TemporaryDirectory() as scratch, Progress((1 + len(CODECS)) * options.steps) as progress:
        data = contestants.write_rows(Path(scratch) / "rows.txt", contestants.e2e_rows("train", slice(0, 14_020)))
        for codec in ("float32", *CODECS):
            settings = {"model": str(model), "steps": options.steps, "aggregate_every": options.steps, "codec": codec}
            up, down = (count / num_samples for count in bytes_of_run(Path(scratch) / codec, settings, data, progress))
            sample = [f"{number / 1e3:.1f}" for number in (up, down, up + down)]
            rows.append([codec, *sample, f"1/{reference / (up + down):.1f}"])
    print(contestants.markdown(["kB a sample", "up", "down", "both", "of the reference"], rows))


def bytes_of_run(folder: Path, settings: dict[str, Any], data: Path, progress: Progress) -> tuple[int, int]:
    """Up and down, of the whole life of a device's connection."""
    from test_run import tapped

    run_dir, port = str(folder / "run"), contestants.free_port()
    with tapped(port) as tap:
        address = tap.url.removeprefix("ws://")
        invitation = invite(enrolments_of(run_dir, None), "device", address=address, tls_cert=None, insecure=False)
        store(folder / "state", invitation)
        with GpuServer(run_dir=run_dir, port=port, dtype="float32", **settings) as server:
            own = {"model": settings["model"], "batch_size": BATCH_SIZE, "dtype": "float32", "state_dir": folder / "state"}
            with EdgeClient(f"wss://{address}", data=data, **own) as client:
                for step in client.train():
                    progress.advance(f"{settings['codec']}, loss {step.loss:.3f}")
            list(server.train())
    return tap.up, tap.down


if __name__ == "__main__":
    main()
