"""
What a device pays: disk, traffic, start, memory. GPT-2 small's shape, cut after block 3, batches of 8 E2E rows.

The device runs in an environment of its own that has the base package and nothing else; for comparison, with torch in this one.
It fetches its part of the model and is started again to be measured: the start is the median of three, memory the peak of all
that a process has resident (VmHWM).
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from pathlib import Path

import harness

from edge_client.generation import process_memory
from gpu_server import GpuServer
from gpu_server.federation import Action, Federation
from protocol import Activations, Message

STEPS = 3
GOALS = {"installed": "220 MB", "start": "1.2 s", "float32": "300 MB", "int8": "200 MB"}
NOT_OURS = re.compile(r"(pip|setuptools|pkg_resources|_distutils_hack|distutils-precedence)\b")
"""What an environment has before anything is installed."""


class Watched:
    """Notes when the first activations arrive."""

    first_activations = 0.0

    @classmethod
    def install(cls) -> None:
        receive = Federation.receive

        def noting_receive(federation: Federation, name: str, message: Message, now: float) -> list[Action]:
            if isinstance(message, Activations) and not cls.first_activations:
                cls.first_activations = now
            return receive(federation, name, message, now)

        Federation.receive = noting_receive  # type: ignore[method-assign]


def main() -> None:
    Watched.install()
    with tempfile.TemporaryDirectory() as scratch:
        environment = plain_environment(Path(scratch) / "environment")
        sizes = installed(environment)
        plain, with_torch = environment / "bin", harness.PROGRAMS
        model = harness.make_gpt2_small(Path(scratch))
        data = harness.write_rows(Path(scratch) / "rows.txt", harness.e2e_rows("train", slice(0, 8 * STEPS)))
        rows = []
        for engine, weights, programs in [
            *(("onnxruntime", weights, plain) for weights in ("float32", "float16", "int8")),
            ("torch", "float32", with_torch),
        ]:
            folder = Path(scratch) / f"{engine}-{weights}"
            options = {"data": str(data), "engine": engine, "state_dir": f"{folder}/state"}
            options |= {"model": str(model), "dtype": "float32"} if engine == "torch" else {}
            measured = [take_part(programs, options, model, folder / f"run-{number}", weights) for number in range(3)]
            seconds, peak = statistics.median(start for start, _ in measured), max(peak for _, peak in measured)
            held = sum(file.stat().st_size for file in (folder / "state").rglob("*") if file.is_file())
            goal = GOALS.get(weights, "") if engine == "onnxruntime" else ""
            rows.append([engine, weights, f"{held / 1e6:.0f} MB", f"{seconds:.1f} s", f"{peak / 1e6:.0f} MB", goal])
        starts = [
            ["`splitlora-edge --help`", f"{median_seconds(str(plain / 'splitlora-edge'), '--help'):.2f} s", "0.3 s"],
            *(
                [f"`import {name}`", f"{median_seconds(str(plain / 'python'), '-c', f'import {name}'):.2f} s", ""]
                for name in ("edge_client.data", "onnxruntime")
            ),
            ["`import torch`", f"{median_seconds(sys.executable, '-c', 'import torch'):.1f} s", ""],
        ]
    total = f"{sizes.total() / 1e6:.0f} MB"
    print(harness.markdown(["", "measured", "goal"], [["installed, without pip", total, GOALS["installed"]], *starts]))
    print("\nof that: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.most_common(12)) + "\n")
    heads = ["engine", "weights", "kept in the state folder", f"start (goal {GOALS['start']})", "peak memory", "goal"]
    print(harness.markdown(heads, rows))


def plain_environment(folder: Path) -> Path:
    """What `pip install splitlora` makes."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*pip, str(harness.REPOSITORY)], check=True)
    return folder


def installed(environment: Path) -> "Counter[str]":
    """Bytes of the files, byte code included, by what stands in the folder of packages; without what was there before."""
    (packages,) = environment.glob("lib/python*/site-packages")
    sizes: Counter[str] = Counter()
    for file in packages.rglob("*"):
        name = file.relative_to(packages).parts[0]
        if file.is_file() and not NOT_OURS.match(name):
            sizes[name] += file.stat().st_size
    return sizes


def take_part(programs: Path, options: dict[str, str], model: Path, run_dir: Path, weights: str) -> tuple[float, int]:
    """Seconds from the start of the device's process to its first activations at the server, and the process's peak memory."""
    Watched.first_activations = 0.0
    settings = {"model": str(model), "run_dir": str(run_dir), "steps": STEPS, "lora_rank": 4, "dtype": "float32"}
    with GpuServer(port=0, edge_weights=weights, **settings) as server:
        given = options | {"server": server.url}
        # It enters, and does not join: afterwards the server has made the part, and the device has it.
        fetch = f"from edge_client import EdgeClient\nwith EdgeClient(**{given}): pass"
        subprocess.run([programs / "python", "-c", fetch], check=True)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        began = time.monotonic()
        peak = peak_memory(subprocess.Popen([programs / "splitlora-edge", "train", *flags], stderr=subprocess.DEVNULL))
        list(server.train())
    return Watched.first_activations - began, peak


def peak_memory(process: "subprocess.Popen[bytes]") -> int:
    """Bytes of VmHWM, read until the process ends."""
    peak = 0
    while process.poll() is None:
        peak = process_memory("VmHWM", process.pid) or peak  # None where it ends just now
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{process.args} failed")
    return peak


def median_seconds(*command: str) -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
