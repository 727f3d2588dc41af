"""
Bytes of a labelled sample both ways, as TCP carries them: with TLS, WebSocket framing, handshakes and the adapter's exchange.

gpt2-mini, or with --shape gpt2 a model of GPT-2 small's shape, on shuffled rows of E2E's train.txt, batches of 8, cut after
block 3, epochs of 66 steps, each codec in a run of its own: in rounds of one step, as runs are by default, and with an epoch as
one round, where the adapter crosses the link once. delta goes through its samples twice. Everything else is as runs have it by
default, but for the codec policy, which is told to let int4 and delta be. The reference pads every sample to 512 tokens and
sends float32; its bytes are computed, of activations and gradients alone, as are those of 16-bit floats without padding.

With --labels device the labels stay on the device: hidden states come down and their gradients go up, in the same codecs, of
the labelled rows or, with noise on the gradients, of all rows; bytes are also given for each element of the activations.
"""

import argparse
import itertools
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from edge_client import EdgeClient
from edge_client.enrolment import store
from gpu_server import GpuServer
from gpu_server.door import enrolments_of, invite
from protocol import DELTA
from protocol.settings import CODEC_NAMES, DITHERED
from split_model import PretrainedModel
from terminal import Progress

BATCH_SIZE, REFERENCE_LENGTH, BYTES_OF_A_FLOAT = 8, 512, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--steps", type=int, default=66, help="an epoch")
    parser.add_argument("--labels", choices=("server", "device"), default="server")
    parser.add_argument("--codecs", default=",".join((*CODEC_NAMES, DELTA)))
    parser.add_argument("--adapter-codec", choices=("float32", DITHERED), help="default: as runs have it")
    parser.add_argument("--shape", choices=("gpt2-mini", "gpt2"), default="gpt2-mini", help="gpt2 has random weights")
    parser.add_argument("--devices", type=int, default=1, help="each with rows of its own, and batches of 8")
    parser.add_argument("--rounds", default="1,epoch", help="steps in a round, or epoch")
    options = parser.parse_args()
    if options.labels == "device":
        of_labels_on_the_device(options.steps)
        return
    num_samples, codecs = options.devices * BATCH_SIZE * options.steps, options.codecs.split(",")
    rounds = {
        "one round" if every == "epoch" else f"rounds of {every}": options.steps if every == "epoch" else int(every)
        for every in options.rounds.split(",")
    }
    num_steps = len(rounds) * (len(codecs) + (DELTA in codecs)) * options.steps
    with tempfile.TemporaryDirectory() as scratch, Progress(num_steps) as progress:
        folder = Path(scratch)
        model = harness.make_gpt2_small(folder / "gpt2") if options.shape == "gpt2" else harness.shared("models/gpt2-mini")
        width = PretrainedModel(model).config.width
        reference = 2 * REFERENCE_LENGTH * BYTES_OF_A_FLOAT * width
        rows, of_16_bits = [row("reference: float32, padded to 512", reference / 2, reference / 2, reference)], []
        data = rows_of_devices(folder, options.devices, options.steps)
        for codec, (of_rounds, every) in itertools.product(codecs, rounds.items()):
            epochs = 2 if codec == DELTA else 1
            settings = {"model": str(model), "epochs": epochs, "aggregate_every": every, "codec": codec}
            settings |= {"adapter_codec": options.adapter_codec} if options.adapter_codec else {}
            # These two change the loss of this model by more than the codec policy's tolerance, and would be left.
            settings |= {"codec_tolerance": 1e9} if codec in ("int4", DELTA) else {}
            counts = bytes_of_run(folder / f"{codec}-{every}", settings, data, options.steps, progress)
            for epoch, (up, down) in enumerate(counts.epochs, 1):
                name = f"{codec}, {of_rounds}" if epochs == 1 else f"{codec}, {of_rounds}, epoch {epoch}"
                rows.append(row(name, up / num_samples, down / num_samples, reference))
                unpadded = 2 * counts.tokens * width
                of_16_bits.append([name, f"{100 * up / unpadded:.1f} %", f"{100 * (up + down) / (2 * unpadded):.1f} %"])
    print(harness.markdown(["kB a sample", "up", "down", "both", "of the reference"], rows), end="\n\n")
    print(harness.markdown(["of 16-bit floats without padding", "up", "both ways"], of_16_bits))


def of_labels_on_the_device(steps: int) -> None:
    """The table of runs whose labels stay on the device, beside those of a server that has them."""
    model = harness.shared("models/gpt2-mini")
    num_samples, width = BATCH_SIZE * steps, PretrainedModel(model).config.width
    modes: dict[str, dict[str, Any]] = {
        "server": {},
        "device": {"labels": "device"},
        "device, rows hidden": {"labels": "device", "label_rows": "hidden", "gradient_noise": 0.3, "gradient_clip": 1.5},
    }
    codecs, rows = CODEC_NAMES, []
    with tempfile.TemporaryDirectory() as scratch, Progress(len(modes) * len(codecs) * steps) as progress:
        folder = Path(scratch)
        data = rows_of_devices(folder, 1, steps)
        for codec in codecs:
            for mode, labels in modes.items():
                settings = {"model": str(model), "epochs": 1, "aggregate_every": steps, "codec": codec, "check_codec_every": 0}
                counts = bytes_of_run(folder / f"{codec}-{mode}", {**settings, **labels}, data, steps, progress)
                ((up, down),) = counts.epochs
                elements = counts.tokens * width
                kilobytes = (f"{number / num_samples / 1e3:.1f}" for number in (up, down, up + down))
                rows.append([codec, mode, *kilobytes, f"{(up + down) / elements:.2f}"])
    header = ["codec", "labels", "kB a sample up", "down", "both", "bytes an element, all directions"]
    print(harness.markdown(header, rows))


def row(name: str, up: float, down: float, reference: float) -> list[str]:
    share = "" if up + down == reference else f"1/{reference / (up + down):.1f}"
    return [name, *(f"{number / 1e3:.1f}" for number in (up, down, up + down)), share]


def rows_of_devices(folder: Path, num_devices: int, steps: int) -> list[Path]:
    """A file for each device, of as many rows as it needs for an epoch of so many steps."""
    each = BATCH_SIZE * steps
    return [
        harness.write_rows(folder / f"rows-{number}.txt", harness.e2e_rows("train", slice(number * each, (number + 1) * each)))
        for number in range(num_devices)
    ]


@dataclass
class Counts:
    """Of all devices' connections together, from the handshake to the end."""

    epochs: list[tuple[int, int]]
    """Bytes up and down; the last epoch's until the devices have left."""
    tokens: int
    """Of an epoch."""


def bytes_of_run(folder: Path, settings: dict[str, Any], data: list[Path], steps: int, progress: Progress) -> Counts:
    from test_run import tapped

    run_dir, port = str(folder / "run"), harness.free_port()
    with ExitStack() as stack:
        taps = [stack.enter_context(tapped(port)) for _ in data]
        totals, tokens = [(0, 0)], [0] * len(data)

        def note_totals() -> None:
            totals.append((sum(tap.up for tap in taps), sum(tap.down for tap in taps)))

        at_the_end_of_an_epoch = threading.Barrier(len(data), action=note_totals)

        def take_part(number: int, url: str) -> None:
            own = {
                "engine": "torch",
                "model": settings["model"],
                "batch_size": BATCH_SIZE,
                "dtype": "float32",
                "state_dir": folder / f"state-{number}",
            }
            with EdgeClient(url, data=data[number], **own) as client:
                for step in client.train():
                    tokens[number] += step.tokens
                    if not number:
                        progress.advance(f"{settings['codec']}, loss {step.loss:.3f}")
                    if step.number % steps == 0:
                        at_the_end_of_an_epoch.wait()

        devices = []
        for number, tap in enumerate(taps):
            address = tap.url.removeprefix("ws://")
            invitation = invite(
                enrolments_of(run_dir, None), f"device-{number}", address=address, tls_cert=None, insecure=False
            )
            store(folder / f"state-{number}", invitation)
            devices.append(threading.Thread(target=take_part, args=(number, f"wss://{address}")))
        with GpuServer(run_dir=run_dir, port=port, dtype="float32", clients=len(data), **settings) as server:
            for device in devices:
                device.start()
            list(server.train())
            for device in devices:
                device.join()
    note_totals()
    del totals[-2]  # at the end of the last epoch, before the devices had left
    epochs = [(later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in itertools.pairwise(totals)]
    return Counts(epochs, sum(tokens) // len(epochs))


if __name__ == "__main__":
    main()
