"""
The main job, small: a server and two devices on loopback fine-tune the base model of this folder on two restaurant guides;
then the model is exported, checked, and generates as it would on a device.

Each is a process of its own, started with the command a user would type. The devices have no torch and no model: each gets its
part from the server. Takes about a minute on two cores.
"""

import argparse
import itertools
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge_client import ConnectionFailed, ping
from edge_client.text_file import read_texts

HERE = Path(__file__).parent.relative_to(Path.cwd()) if Path(__file__).is_relative_to(Path.cwd()) else Path(__file__).parent
MODEL = HERE / "base_model"
GUIDES = HERE / "restaurants"
ENVIRONMENT = Path(sys.prefix)
"""Of the server: its programs need not be on the PATH."""
CUT_LAYER, RANK, ALPHA = 2, 8, 32.0
NUM_CLIENTS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a split model end to end on this machine.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--run-dir", type=Path, help="default: the next free runs/demo-N")
    parser.add_argument("--devices", type=Path, default=ENVIRONMENT, metavar="DIR", help="the devices' environment")
    options = parser.parse_args()
    steps, run_dir = options.steps, options.run_dir or _unused_folder()
    url = f"ws://127.0.0.1:{_free_port()}"
    print(f"A server and {NUM_CLIENTS} devices on this machine; the texts of each device stay in its process.")
    for name, environment in (("server", ENVIRONMENT), ("devices", options.devices)):
        print(f"The environment of the {name}, {_shown(environment)}: {_described(environment)}.")
    print()
    with ExitStack() as running:
        server = _start(running, ENVIRONMENT, _server_command(run_dir, url, steps))
        _wait_until_it_answers(server, url)
        commands = [_edge_command(url, client) for client in range(NUM_CLIENTS)]
        devices = [_start(running, options.devices, command, stderr=subprocess.PIPE) for command in commands]
        readers = [threading.Thread(target=_relay, args=(client, device)) for client, device in enumerate(devices)]
        for reader in readers:
            reader.start()
        statuses = _wait_for_all([server, *devices])
        for reader in readers:
            reader.join()
    if any(statuses):
        print(f"the demo failed: exit statuses {statuses}", file=sys.stderr)
        return 1
    try:
        _deploy(run_dir, options.devices)
    except subprocess.CalledProcessError as error:
        print(f"the demo failed: {error.cmd[0]} has exit status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def _server_command(run_dir: Path, url: str, steps: int) -> list[str]:
    options = f"--model {MODEL} --cut-layer {CUT_LAYER} --lora-rank {RANK} --lora-alpha {ALPHA} --clients {NUM_CLIENTS}"
    training = f"--steps {steps} --lr 3e-3 --run-dir {run_dir} --port {url.rpartition(':')[2]}"
    return ["splitlora-server", "serve", *options.split(), *training.split()]


def _edge_command(url: str, client: int) -> list[str]:
    command = f"splitlora-edge train --server {url} --data {GUIDES}/client-{client}.jsonl --name device-{client}"
    return [*command.split(), *([] if client else ["--eval-data", f"{GUIDES}/valid.jsonl"])]


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _described(environment: Path) -> str:
    """How much is installed there, and whether torch is."""
    packages = next(environment.glob("lib/python*/site-packages"))
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    return f"{size / 1e6:.0f} MB with{'' if (packages / 'torch').exists() else 'out'} torch"


def _start(running: ExitStack, environment: Path, command: list[str], **options: Any) -> "subprocess.Popen[str]":
    print("$ " + " ".join(command), flush=True)
    process = subprocess.Popen([str(environment / "bin" / command[0]), *command[1:]], text=True, **options)
    running.callback(process.terminate)
    return process


def _wait_until_it_answers(server: "subprocess.Popen[str]", url: str) -> None:
    while server.poll() is None:
        try:
            ping(url)
            return
        except ConnectionFailed:
            time.sleep(0.1)


def _wait_for_all(processes: "list[subprocess.Popen[str]]") -> list[int]:
    """Exit statuses; when one has failed, the others would wait for it, and are ended."""
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.1)
    return [process.wait() for process in processes]


def _relay(client: int, device: "subprocess.Popen[str]") -> None:
    """Show what a device has to say, but for its progress: the server's bar tells that already."""
    assert device.stderr is not None
    for line in device.stderr:
        if not line.startswith(("step ", "batch ")):
            print(f"\r\x1b[Kdevice-{client}: {line}" if sys.stderr.isatty() else f"device-{client}: {line}", end="", flush=True)


def _deploy(run_dir: Path, devices: Path) -> None:
    """Export what was learnt, check it, and generate with it on the devices' side."""
    print(f"\nThe adapter of both parts, a PEFT folder: {run_dir / 'adapter'}")
    folder = run_dir / "deployed"
    _run(ENVIRONMENT, ["splitlora-export", "onnx", "--run-dir", str(run_dir), "--model", str(MODEL), "--output", str(folder)])
    # On a model so small, what 8 and 4 bits change lies near the tolerances, on either side; the table is what there is to see.
    _run(ENVIRONMENT, ["splitlora-export", "verify", str(folder)], check=False)
    print("Three prompts it has never seen, continued as a device does, without torch:\n")
    for pair in itertools.islice(read_texts(GUIDES / "valid.jsonl"), 0, 60, 20):
        command = ["splitlora-edge", "generate", str(folder), "--prompt", pair.prompt, "--max-new-tokens", "80"]
        print(f"  -> {_run(devices, command, stdout=subprocess.PIPE).stdout.strip()}\n")


def _run(environment: Path, command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """A command from its beginning to its end. CalledProcessError if it fails, unless ``check`` is False."""
    print("$ " + shlex.join(command), flush=True)
    return subprocess.run([str(environment / "bin" / command[0]), *command[1:]], text=True, **{"check": True, **options})


def _unused_folder() -> Path:
    folders: Iterator[Path] = (Path("runs") / f"demo-{number}" for number in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
