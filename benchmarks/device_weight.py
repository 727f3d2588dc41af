"""
What a device pays: memory, start, disk. GPT-2 small's shape, cut after block 3, batches of 8 E2E rows.

Memory is the peak of resident memory (VmHWM) of `splitlora-edge train` less that of `python -c "import torch"`.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import contestants
from packaging.requirements import Requirement

from edge_client.generation import process_memory
from gpu_server import GpuServer
from gpu_server.federation import Action, Federation
from protocol import Activations, Message

STEPS = 5


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
        model = contestants.make_gpt2_small(Path(scratch))
        data = contestants.write_rows(Path(scratch) / "rows.txt", contestants.e2e_rows("train", slice(0, 8 * STEPS)))
        torch_alone = peak_memory(subprocess.Popen([sys.executable, "-c", "import torch"]))
        options = {"model": str(model), "run_dir": f"{scratch}/run", "steps": STEPS, "lora_rank": 4, "dtype": "float32"}
        with GpuServer(port=0, **options) as server:
            began = time.monotonic()
            edge = f"train --server {server.url} --model {model} --data {data} --dtype float32"
            command = [str(contestants.PROGRAMS / "splitlora-edge"), *edge.split()]
            whole = peak_memory(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            list(server.train())
    rows = [
        ["peak resident memory beyond `import torch`", f"{(whole - torch_alone) / 1e6:.0f} MB", "250 MB"],
        ["`import torch` alone", f"{torch_alone / 1e6:.0f} MB", ""],
        ["start of the process to its first activations at the server", f"{Watched.first_activations - began:.1f} s", ""],
        ["`import torch` alone", f"{median_seconds(sys.executable, '-c', 'import torch'):.1f} s", ""],
        ["`splitlora-edge --help`", f"{median_seconds(str(contestants.PROGRAMS / 'splitlora-edge'), '--help'):.2f} s", "0.3 s"],
        ["`import edge_client.data`", f"{median_seconds(sys.executable, '-c', 'import edge_client.data'):.2f} s", "0.2 s"],
        ["installed without torch and what torch itself needs", f"{sum(sizes().values()) / 1e6:.0f} MB", "60 MB"],
    ]
    print(contestants.markdown(["", "measured", "goal"], rows))
    print("\nof that: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sorted(sizes().items(), key=lambda x: -x[1])))


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


def sizes() -> dict[str, int]:
    """Bytes on disk of everything the base package installs and torch does not."""
    return {name: installed_size(name) for name in needed_by("splitlora") - needed_by("torch") - {"splitlora"}}


def needed_by(name: str) -> set[str]:
    """The distribution and all it requires here, without extras."""
    found, waiting = set(), [name]
    while waiting:
        current = waiting.pop().lower().replace("_", "-")
        if current in found:
            continue
        try:
            requirements = [Requirement(text) for text in metadata.requires(current) or []]
        except metadata.PackageNotFoundError:
            continue  # only needed on another platform
        found.add(current)
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def installed_size(name: str) -> int:
    files = metadata.files(name) or []
    # Byte code is made on the first import, and may be left out on a small device.
    return sum(
        path.stat().st_size for path in {Path(str(file.locate())) for file in files} if path.is_file() and path.suffix != ".pyc"
    )


if __name__ == "__main__":
    main()
