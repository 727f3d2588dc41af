"""The server as torchrun starts it: ranks that are killed, told to end, not alike, and runs that go on with another number."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_model, metrics, run_in_thread, run_split
from ports import free_port
from programs import arguments
from ranks import environments
from safetensors.torch import load_file

from edge_client import EdgeClient
from gpu_server import GpuServer
from split_model import PretrainedModel
from terminal import version

STEPS = 12
SECONDS = 60.0
SETTINGS: dict[str, Any] = {"clients": 1, "steps": STEPS, "cut_layer": 1, "lora_dropout": 0.2, "micro_batches": 2}


class Server:
    """
    A program, and what it says on standard error.

    Args:
        words: of its command line, behind the interpreter.
    """

    def __init__(self, words: list[str], **environment: str) -> None:
        usual = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            [sys.executable, *words], stderr=subprocess.PIPE, text=True, env={**os.environ, **usual, **environment}
        )
        self._lines: list[str] = []
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as said:
            for line in said:
                self._lines.append(line)
                if "listening on" in line:
                    self._listening.set()
        self._listening.set()

    def wait_until_it_listens(self) -> None:
        assert self._listening.wait(SECONDS)
        assert self.process.poll() is None, self.said()

    def ranks(self) -> dict[int, int]:
        """The processes that torchrun has started."""
        pid = self.process.pid
        found = {}
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            environment = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{child}/environ").read_text().split("\0"))
            if "RANK" in environment:
                found[int(environment["RANK"])] = int(child)
        return found

    def ended(self) -> int:
        """Its exit status; all that it has started has ended, too."""
        ranks = [] if self.process.poll() is not None else list(self.ranks().values())
        status = self.process.wait(SECONDS)
        self._reader.join(SECONDS)  # nobody has standard error open any more
        assert not self._reader.is_alive()
        assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
        return status

    def said(self) -> str:
        """On standard error, in all, when it has ended."""
        self._reader.join(SECONDS)
        return "".join(self._lines)

    def errors(self) -> list[str]:
        """The sentences with which our programs end: torchrun says much beside."""
        self._reader.join(SECONDS)
        return [line for line in self._lines if line.startswith("splitlora-server")]


@contextmanager
def started(words: list[str], **environment: str) -> Iterator[Server]:
    server = Server(words, **environment)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(SECONDS)
        finally:
            server.process.kill()
            server.said()


class Run:
    """One device, in this process, and servers one after the other."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.port = folder / "run", model, free_port()
        self._toml = folder / "settings.toml"
        self._toml.write_text('dtype = "float64"\n')  # which is no choice of a flag
        self._options = {"model": str(model), "name": "a", "data": str(data), "engine": "torch", "dtype": "float64"}
        self._device: Future[None]

    def at_step(self, number: int, strike: Callable[[], object]) -> None:
        """When the device, which begins now, has finished that step."""

        def train() -> None:
            with EdgeClient(f"ws://127.0.0.1:{self.port}", batch_size=5, **self._options) as client:
                steps = client.train()
                for step in steps:
                    if step.number == number:
                        break
                strike()
                assert [step.number for step in steps][-1] == STEPS

        self._device = run_in_thread(train)

    def torchrun(self, num_ranks: int, max_restarts: int = 0, words: Sequence[str] = ()) -> AbstractContextManager[Server]:
        own = {"nproc_per_node": num_ranks, "master_port": free_port(), "max_restarts": max_restarts}
        options = {**SETTINGS, "model": self.model, "run_dir": self.folder, "config": self._toml, "port": self.port}
        torchrun = ["-m", "torch.distributed.run", *arguments(own), "-m", "gpu_server", "serve"]
        return started([*torchrun, *arguments(options), *words])

    def resumed(self, num_ranks: int) -> None:
        """To its end."""
        if num_ranks == 1:
            with GpuServer(run_dir=str(self.folder), resume=True, port=self.port) as server:
                assert [record.number for record in server.train()][-1] == STEPS
                assert not server.config.shard
        else:
            own = ["-m", "torch.distributed.run", *arguments({"nproc_per_node": num_ranks, "master_port": free_port()})]
            with started([*own, "-m", "gpu_server", "serve", "--resume", f"--run-dir={self.folder}"]) as server:
                assert server.ended() == 0, server.said()
        self.device_has_ended()

    def device_has_ended(self) -> None:
        self._device.result(SECONDS)


def write_pairs(path: Path) -> Path:
    pairs = ({"prompt": f"n{i} {'x' * (i % 7)}", "completion": f"{'abc' * (1 + i % 5)} {i * 37 % 101}"} for i in range(30))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Run:
    return Run(tmp_path, tiny_model, write_pairs(tmp_path / "a.jsonl"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of the same run, which one process has computed."""
    folder = tmp_path_factory.mktemp("alone")
    options = {**SETTINGS, "model": str(tiny_model), "run_dir": str(folder / "run"), "dtype": "float64"}
    run_split(options, {"a": {"data": str(write_pairs(folder / "a.jsonl")), "batch_size": 5, "dtype": "float64"}})
    return folder / "run"


def assert_same_run(one: Path, other: Path) -> None:
    """At every step the same loss, and in the end the same adapter."""
    losses, expected = ([row["loss"] for row in metrics(folder)] for folder in (one, other))
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    adapter, expected_adapter = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other))
    assert adapter.keys() == expected_adapter.keys()
    for name, matrix in adapter.items():
        torch.testing.assert_close(matrix, expected_adapter[name], rtol=0, atol=1e-8)


def test_rank_that_is_killed_ends_all_and_the_run_goes_on_with_one_process(run: Run, alone: Path) -> None:
    with run.torchrun(3, words=["--shard"]) as server:
        server.wait_until_it_listens()
        run.at_step(5, lambda: os.kill(server.ranks()[2], signal.SIGKILL))
        assert server.ended() == 1
        (error,) = server.errors()
        assert error.startswith("splitlora-server: rank 2 is gone: its process has ended, or the connection to it broke; ")
    # The last round was in memory, and it is on the disk, though a checkpoint is due only every tenth.
    assert (run.folder / "checkpoints/000000005.safetensors").exists()
    run.resumed(1)
    assert_same_run(run.folder, alone)


def test_run_that_is_told_to_end_goes_on_with_another_number_of_ranks(run: Run, alone: Path) -> None:
    with run.torchrun(2) as server:
        server.wait_until_it_listens()
        run.at_step(4, server.process.terminate)
        assert server.ended() == 1
        assert "stopped after step 4 of 12; its adapter is saved; --resume goes on from there" in server.said()
        assert not server.errors()
    run.resumed(3)
    assert_same_run(run.folder, alone)


def test_torchrun_starts_ranks_again_that_have_ended_with_the_first(run: Run, alone: Path) -> None:
    with run.torchrun(2, max_restarts=1, words=["--resume-or-start"]) as server:
        server.wait_until_it_listens()
        run.at_step(2, lambda: os.kill(server.ranks()[0], signal.SIGKILL))
        assert server.ended() == 0
        (error,) = server.errors()
        assert error.startswith("splitlora-server: rank 1: rank 0 is gone: its process has ended")
    run.device_has_ended()
    assert_same_run(run.folder, alone)


FOLLOWING = """
import os, sys
from gpu_server import cli
from gpu_server.ranks import process_group

process_group.MOST_SECONDS_SILENT = 5
{more}
sys.exit(cli.main(sys.argv[1:]))
"""


@contextmanager
def by_hand(*ranks: tuple[str, dict[str, Any]]) -> Iterator[list[Server]]:
    """
    As many servers, without torchrun, which would end all as soon as one has.

    Args:
        ranks: of each what is done before it begins, and its flags.
    """
    with ExitStack() as stack:
        yield [
            stack.enter_context(started(["-c", FOLLOWING.format(more=more), "serve", *arguments(flags)], **environment))
            for (more, flags), environment in zip(ranks, environments(len(ranks)), strict=True)
        ]


@pytest.fixture
def flags(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    return {"model": tiny_model, "run_dir": tmp_path / "run", "steps": 5, "cut_layer": 1, "port": free_port()}


def test_rank_that_no_longer_answers_ends_all_though_its_connection_stands(flags: dict[str, Any]) -> None:
    with by_hand(*[("", flags)] * 3) as servers, ExitStack() as stack:
        servers[0].wait_until_it_listens()
        servers[2].process.send_signal(signal.SIGSTOP)
        stack.callback(servers[2].process.kill)
        assert servers[0].ended() == 1
        assert "splitlora-server: rank 2 is gone" in servers[0].said()
        assert servers[1].ended() == 0
        assert servers[1].said() == ""


def test_signals_are_for_the_first_rank(flags: dict[str, Any]) -> None:
    with by_hand(*[("", flags)] * 2) as servers:
        servers[0].wait_until_it_listens()
        for number in (signal.SIGTERM, signal.SIGINT):
            servers[1].process.send_signal(number)
        servers[0].process.send_signal(signal.SIGTERM)
        assert servers[0].ended() == 128 + signal.SIGTERM
        assert "stopped before the run started" in servers[0].said()
        assert servers[1].ended() == 0
        assert servers[1].said() == ""


TOLD_TO_END_WHEN_ONE_IS_LOST = """
import signal
from gpu_server.ranks import leader

def load(config, model, adapter, device, group):
    group._is_lost.wait()
    os.kill(os.getpid(), signal.SIGTERM)

leader.make_trainer = load
"""
FOLLOWER = """
import signal
from gpu_server.errors import RankLost
from gpu_server.ranks import follower
from storage import ModelError

def fail(error):
    raise error

"""
KILLED = "follower.make_trainer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
WITH_A_TORN_MODEL = "follower.make_trainer = lambda *_: fail(ModelError('its file is torn'))"


@pytest.mark.parametrize(
    ("fault", "says"),
    [(KILLED, ""), (WITH_A_TORN_MODEL, "splitlora-server: rank 1: its file is torn\n")],
    ids=["killed", "torn"],
)
def test_rank_that_is_lost_before_anybody_is_served_is_named(flags: dict[str, Any], fault: str, says: str) -> None:
    with by_hand((TOLD_TO_END_WHEN_ONE_IS_LOST, flags), (FOLLOWER + fault, flags)) as servers:
        assert servers[0].ended() == 1
        (error,) = servers[0].errors()
        assert error.startswith("splitlora-server: rank 1 is gone")
        assert servers[1].said() == says


def test_rank_that_has_lost_another_of_which_the_first_does_not_know_ends(flags: dict[str, Any]) -> None:
    lost = "follower.MOST_SECONDS_SILENT = 0; follower._compute = lambda *_: fail(RankLost('another rank'))"
    with by_hand(("", flags), (FOLLOWER + lost, flags)) as servers:
        assert servers[1].ended() == 1
        assert servers[0].ended() == 1
        ((first,), (second,)) = (server.errors() for server in servers)
        assert first.startswith("splitlora-server: rank 1 is gone: ")
        assert second.startswith("splitlora-server: rank 1: another rank is gone: ")


OTHER_VERSIONS = """
import torch
from gpu_server.ranks import agreement
agreement.version = lambda: "0.0.1"
torch.__version__ = "1.0"
"""


def test_ranks_with_other_versions_and_settings_are_named_once(flags: dict[str, Any]) -> None:
    others = ("", flags), (OTHER_VERSIONS, {**flags, "lr": 0.5}), ("", {**flags, "steps": 6})
    with by_hand(*others) as servers:
        assert [server.ended() for server in servers] == [1, 0, 0]
        first, *rest = (server.said() for server in servers)
    assert first == (
        f"splitlora-server: the ranks cannot compute together: rank 1 has splitlora 0.0.1, rank 0 has {version()}; rank 1 has "
        f"torch 1.0, rank 0 has {torch.__version__}; rank 1 was given --lr 0.5, rank 0 no --lr; rank 2 was given --steps 6, "
        "rank 0 --steps 5\n"
    )
    assert rest == ["", ""]
    assert not flags["run_dir"].exists()


def test_ranks_with_other_models_are_named_once(flags: dict[str, Any], tmp_path: Path) -> None:
    other = make_model(tmp_path, seed=1)
    mine, theirs = (PretrainedModel(folder).fingerprint() for folder in (flags["model"], other))
    with by_hand(("", flags), ("", {**flags, "model": other}), ("", {**flags, "model": tmp_path / "none"})) as servers:
        assert [server.ended() for server in servers] == [1, 0, 0]
        first, *rest = (server.said() for server in servers)
    assert first.startswith(
        f"splitlora-server: the ranks cannot compute together: rank 1 has another model: the fingerprint of {other} there is "
        f"{theirs}, that of {flags['model']} on rank 0 is {mine}; rank 2: no model folder at {tmp_path}/none"
    )
    assert first.count("\n") == 1
    assert rest == ["", ""]


@pytest.mark.parametrize("wrong", [["--lr=high"], ["--config=none.toml"]])
def test_command_line_that_is_wrong_is_said_once(flags: dict[str, Any], wrong: list[str]) -> None:
    own = arguments({"nproc_per_node": 2, "master_port": free_port()})
    words = ["-m", "torch.distributed.run", *own, "-m", "gpu_server", "serve", *arguments(flags), *wrong]
    with started(words) as server:
        assert server.ended() == 1
        (error,) = server.errors()
        assert wrong[0].partition("=")[2] in error


def test_port_of_the_rendezvous_is_no_port_for_devices(flags: dict[str, Any]) -> None:
    port = free_port()
    words = ["-m", "torch.distributed.run", *arguments({"nproc_per_node": 2, "master_port": port}), "-m", "gpu_server", "serve"]
    with started([*words, *arguments({**flags, "port": port})]) as server:
        assert server.ended() == 1
        assert server.errors() == [
            f"splitlora-server: port {port} is the one at which the ranks meet (MASTER_PORT): give the server another --port, "
            "or torchrun another --master-port\n"
        ]
