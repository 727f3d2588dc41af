"""What the README tells people to type works, word for word but for the model, the data and the address."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, run_in_thread, run_split
from ports import free_port

from edge_client import EdgeClient
from gpu_server import GpuServer

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(program: str) -> list[list[str]]:
    """The indented commands of the README that start with ``program``, continuation lines joined."""
    text = README.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(rf"^    ({program} .*)$", text, re.M)]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


def adapted(command: list[str], **values: object) -> list[str]:
    """The command with the values of some of its flags exchanged; every flag must be in it."""
    for flag, value in values.items():
        command = [*command]
        command[command.index(f"--{flag.replace('_', '-')}") + 1] = str(value)
    return command


@contextmanager
def started(command: list[str], folder: Path, **more: Any) -> Iterator["subprocess.Popen[str]"]:
    program = Path(sys.executable).parent / command[0]
    with subprocess.Popen([str(program), *command[1:]], cwd=folder, stderr=subprocess.PIPE, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def test_server_and_devices_of_the_readme_train_to_the_end(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    (enrol,), (serve,), (join,) = map(commands, ("splitlora-server enrol", "splitlora-server serve", "splitlora-edge join"))
    address = f"127.0.0.1:{free_port()}"
    names = ("kitchen", "cellar")
    for name in names:
        *command, redirected, invitation = [word.replace("kitchen", name) for word in enrol]
        assert redirected == ">"
        with (
            (tmp_path / invitation).open("w") as file,
            started([*command, "--address", address], tmp_path, stdout=file) as enrolling,
        ):
            enrolling.communicate(timeout=60)
    serve = adapted(serve, model=tiny_model, clients=2)
    with started([*serve, "--port", address.rpartition(":")[2]], tmp_path) as server:
        assert server.stderr is not None
        assert "listening on wss://0.0.0.0" in server.stderr.readline()
        held_out = pairs_file("held-out", 5, 50)
        devices = [
            [word.replace("kitchen", name) for word in adapted(join, data=data, eval_data=held_out)]
            for name, data in zip(names, (pairs_file("notes", 20), pairs_file("more", 9, 20)), strict=True)
        ]
        more = ["--state-dir", str(tmp_path / "state")]
        with started([*devices[0], *more], tmp_path) as one, started([*devices[1], *more], tmp_path) as two:
            said = [one.communicate(timeout=120)[1], two.communicate(timeout=120)[1], server.communicate(timeout=120)[1]]
    assert (one.returncode, two.returncode, server.returncode) == (0, 0, 0), said
    assert "perplexity before" in said[0]
    assert "perplexity after" in said[0]
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.jsonl", "run.json"):
        assert (tmp_path / "runs/mine" / name).is_file()


def test_command_for_one_machine_of_the_readme_trains(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    (train,) = (shlex.split(text) for text in re.findall("`(splitlora-edge train .*?)`", README))
    with GpuServer(model=str(tiny_model), clients=1, steps=2, run_dir=str(tmp_path / "run"), port=0) as server:
        train = adapted(train, server=server.url, data=pairs_file("notes", 20))
        with started([*train, "--state-dir", str(tmp_path / "state")], tmp_path) as device:
            assert len(list(server.train())) == 2
            device.communicate(timeout=60)
    assert device.returncode == 0


def test_five_lines_of_the_edge_sdk_train(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in python_blocks() if "EdgeClient" in block)
    with GpuServer(model=str(tiny_model), clients=1, steps=3, run_dir=str(tmp_path / "run"), port=0) as server:
        code = code.replace("ws://127.0.0.1:8765", server.url)
        exec(code.replace('"notes.jsonl"', repr(str(pairs_file("notes", 20)))), {})
        losses = [record.loss for record in server.train()]
    assert capsys.readouterr().out == "".join(f"{number} {loss}\n" for number, loss in enumerate(losses, 1))


def test_five_lines_of_the_server_sdk_train(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(block for block in python_blocks() if "GpuServer" in block)
    code = code.replace('"gpt2", clients=2', f"{str(tiny_model)!r}, clients=2, port=0").replace("steps=300", "steps=3")
    assert "port=0" in code
    clients = []

    class Announced(GpuServer):
        def __enter__(self) -> GpuServer:
            super().__enter__()
            for name in ("one", "two"):
                client = EdgeClient(self.url, model=str(tiny_model), data=pairs_file(name, 20), name=name)
                clients.append(run_in_thread(lambda client=client: train(client)))
            return self

    def train(client: EdgeClient) -> None:
        with client:
            list(client.train())

    monkeypatch.setattr("gpu_server.sdk.GpuServer", Announced)
    exec(code.replace('"runs/mine"', repr(str(tmp_path / "run"))), {})
    for client in clients:
        client.result(timeout=60)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_demo_trains_and_shows_what_it_learnt(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "perplexity before" in done.stdout
    assert "perplexity after" in done.stdout
    assert str(tmp_path / "run/adapter") in done.stdout
    assert done.stdout.count("->") == 3


def test_exports_of_the_readme_are_written_and_verified_and_generate(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    options = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "cut_layer": 2, "steps": 2}
    run_split(options, {"a": {"data": pairs_file("a", 10), "batch_size": 3}})
    (tmp_path / "held-out.txt").write_text("A text.\nAnd another.\n")
    write, check = commands("splitlora-export")
    (prepare,), (generate,) = commands("splitlora-edge prepare"), commands("splitlora-edge generate")
    write = adapted(write, run_dir=tmp_path / "run")
    # What 8 and 4 bits do to random weights is no measure of what they do to trained ones.
    verified = (adapted(write, precision="fp32"), check)
    for command in (*verified, [*adapted(write, precision="q8"), "--overwrite"], prepare, generate):
        with started(command, tmp_path) as process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert "weights: prepared" in said
