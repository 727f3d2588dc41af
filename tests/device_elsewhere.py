"""
A device on another Python, or on another machine, takes part in a run: what comes out is what devices of this environment give.

    python tests/device_elsewhere.py [--steps N] [--scratch DIR] COMMAND...

COMMAND... starts splitlora-edge there. There are two runs of two devices each: in the first both are of this environment, in
the second one is the other. None of them is given a model. The exit status is 1 if losses or adapters differ by more than
rounding.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from answering import wait_until_it_answers
from ports import free_port
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
HERE = [str(PROGRAMS / "splitlora-edge")]
LOSS_TOLERANCE, ADAPTER_TOLERANCE = 1e-5, 1e-4
"""In nats, and as a part of the adapter's norm: what float32's rounding comes to in so many steps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scratch", type=Path, help="folder that both see under this name (default: a temporary one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what starts splitlora-edge elsewhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        here = run(Path(scratch) / "here", options.steps, [HERE, HERE])
        elsewhere = run(Path(scratch) / "elsewhere", options.steps, [HERE, options.command])
        loss = max(abs(a - b) for a, b in zip(losses(here), losses(elsewhere), strict=True))
        adapters = [matrices(folder) for folder in (here, elsewhere)]
    difference = np.linalg.norm(adapters[0] - adapters[1]) / np.linalg.norm(adapters[0])
    print(f"{options.steps} steps: losses differ by at most {loss:.1e} nats, the adapter by {difference:.1e} of its norm")
    return int(loss > LOSS_TOLERANCE or difference > ADAPTER_TOLERANCE)


def run(folder: Path, steps: int, devices: Sequence[Sequence[str]]) -> Path:
    """The run directory, when the run has been trained to its end."""
    url, model = f"ws://127.0.0.1:{free_port()}", REPOSITORY / "examples/base_model"
    # AdamW makes a whole step of a first gradient's sign, which near zero is that of its rounding: warmed up, a small one.
    training = f"--steps {steps} --lr 3e-3 --warmup-steps {steps // 2} --dtype float32"
    options = f"--model {model} --cut-layer 2 --lora-rank 8 --clients {len(devices)} {training}"
    serve = f"serve {options} --run-dir {folder / 'run'} --port {url.rpartition(':')[2]}"
    with ExitStack() as running:
        server = subprocess.Popen([str(PROGRAMS / "splitlora-server"), *serve.split()])
        running.callback(server.terminate)
        wait_until_it_answers(server, url)
        processes = [server]
        for number, device in enumerate(devices):
            data = folder / f"{number}.jsonl"  # not from the checkout: elsewhere need not see it
            data.write_text((REPOSITORY / f"examples/restaurants/client-{number}.jsonl").read_text(encoding="utf-8"), "utf-8")
            words = f"train --server {url} --data {data} --name device-{number} --state-dir {folder / f'state-{number}'}"
            processes.append(subprocess.Popen([*device, *words.split()]))
            running.callback(processes[-1].terminate)
        for process in reversed(processes):
            if process.wait():
                sys.exit(f"{process.args} failed")
    return folder / "run"


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def matrices(run_dir: Path) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """All of the adapter's numbers, matrix after matrix."""
    stored = load_file(run_dir / "adapter/adapter_model.safetensors")
    return np.concatenate([stored[name].ravel() for name in sorted(stored)])


if __name__ == "__main__":
    sys.exit(main())
