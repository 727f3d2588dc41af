"""A tiny GPT-2 of our own, the evaluation data where it is, and whole runs over real sockets in one process."""

import functools
import gc
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from chaos import Outcome, Scene
    from tokenizers import Tokenizer

    from edge_client import Step
    from gpu_server import StepRecord


class _SkipsWhatNeedsTorch:
    """Finds no module. Where torch is not installed, a test or a file of tests that comes to import it is skipped."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            pytest.skip("needs torch", allow_module_level=True)


if find_spec("torch"):
    import torch

    # Whole federations run in this process, on models so small that a second thread only waits for the first.
    torch.set_num_threads(1)
else:
    sys.meta_path.append(_SkipsWhatNeedsTorch)

if find_spec("hypothesis"):
    import hypothesis

    # The same examples on every machine, however much else it does.
    hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("tests")


LONGEST = """
parity chaos_frozen_edge chaos_long_rounds chaos_short_rounds family_parity cuda_by_construction export_folder ranks sweep
family_export family_graphs chaos_labels export_graph resume ranks_programs training calibration contestants chaos
chaos_onnxruntime codec_decisions readme device_check onnx_engine token_file leak_meter leak_attacks
delta itinerary federation_cost door lora
"""
"""Files of tests, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: whoever comes to one of them when nothing else is left keeps the others waiting."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """
    Keep Python's collector from all that was imported: torch's and transformers' million objects, which every full collection
    would look at, as each server that starts asks for one.
    """
    if find_spec("hypothesis"):
        _let_hypothesis_look_around()
    gc.collect()
    gc.freeze()


def _let_hypothesis_look_around() -> None:
    """Its first test asks the collector who refers to numpy's random generator, and warns where nobody is found."""

    @hypothesis.given(hypothesis.strategies.none())
    def first_test(_: None) -> None:
        pass

    first_test()


# A script that starts the tests in the background has Ctrl-C ignored; the programs that tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"


def shared_path(name: str) -> Path:
    """A file of the evaluation data that lies beside the checkout; the test is skipped where it does not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} in the folder 'shared' beside the checkout")
    return path


def make_tokenizer() -> "Tokenizer":
    """A byte-level BPE of 600 entries, learnt in a moment from the project's own sample."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(REPOSITORY / "examples/restaurants/valid.jsonl")], trainer)
    return tokenizer


def make_model(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """A random GPT-2 with a vocabulary of 600, and weights large enough that every layer matters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    sizes = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": tokenizer.get_vocab_size(), "n_positions": 256, **shape}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=end, eos_token_id=end, initializer_range=0.2))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _state_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What devices keep by default lies in the user's folder for state: tests, and the programs they start, have another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 blocks, d = 32, 600 tokens."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is exported in few bits writes so little for it that many can be: for tests of everything else."""
    monkeypatch.setattr("export.texts.NUM_WRITTEN", 2)
    monkeypatch.setattr("export.texts.WRITTEN_TOKENS", 12)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> "Scene":
    """Two clients and a model of 2 blocks, d = 16, for runs in processes of their own; see chaos.py."""
    from chaos import Scene

    folder = tmp_path_factory.mktemp("scene")
    return Scene(folder, make_model(folder, n_layer=2, n_embd=16, n_head=2))


@pytest.fixture(scope="session")
def undisturbed(scene: "Scene", tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Outcome]":
    """What comes of a run in one of chaos.py's modes in which nothing goes wrong."""

    @functools.cache
    def run(mode: str) -> "Outcome":
        outcome = scene.run(tmp_path_factory.mktemp("undisturbed"), mode, []).to_its_end()
        assert not outcome.struck
        assert not math.isnan(outcome.perplexity)
        return outcome

    return run


@pytest.fixture
def pairs_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``pairs_file(name, count, offset)``: a .jsonl of prompts and completions of different lengths."""

    def write(name: str, count: int, offset: int = 0) -> Path:
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            for i in range(offset, offset + count):
                pair = {"prompt": f"n{i} {'x' * (i % 7)}", "completion": f"{'abc' * (1 + i % 5)} {i * 37 % 101}"}
                file.write(json.dumps(pair) + "\n")
        return path

    return write


class Clock:
    """Shows what it is set to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], threading.Event]:
    """``returned(owner, method)``: an event that is set when the method of any object of that class has returned."""

    def watch(owner: type, name: str) -> threading.Event:
        event, method = threading.Event(), getattr(owner, name)

        def watched(*arguments: Any, **more: Any) -> Any:
            try:
                return method(*arguments, **more)
            finally:
                event.set()

        monkeypatch.setattr(owner, name, watched)
        return event

    return watch


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Filled while the test runs: "fsync PATH" and "replace", in their order, without an unfinished file's digits."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        calls.append(f"fsync {re.sub(r'[.][0-9a-f]{16}[.]part$', '.part', path)}")
        fsync(number)

    def noted_replace(*paths: Path) -> None:
        calls.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


@dataclass
class RunResult:
    """What both sides of a run reported."""

    run_dir: Path
    records: "list[StepRecord]"
    steps: "dict[str, list[Step]]"
    perplexity: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By client with eval_data: before and after."""

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.records]


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def adapter_bytes(run_dir: Path) -> bytes:
    """The matrices that a run has left."""
    return (run_dir / "adapter/adapter_model.safetensors").read_bytes()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """A run's rows, one a step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def run_in_thread(function: Callable[[], Any]) -> "Future[Any]":
    """Like a pool of one; the future holds the result or the error."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def run_split(server_options: dict[str, Any], clients: dict[str, dict[str, Any]]) -> RunResult:
    """A whole run over loopback sockets: a server, and a thread for each client, given EdgeClient's arguments by name."""
    from edge_client import EdgeClient
    from gpu_server import GpuServer, RunEndedEarly

    steps: dict[str, list[Step]] = {}
    perplexity: dict[str, tuple[float, float]] = {}
    errors: list[BaseException] = []

    usual = {"port": 0, "dtype": "float32", "micro_batches": 2}

    def take_part(url: str, name: str, options: dict[str, Any]) -> None:
        try:
            with EdgeClient(
                url, model=str(server_options["model"]), name=name, **{"engine": "torch", "dtype": "float32", **options}
            ) as client:
                before = client.perplexity() if "eval_data" in options else 0.0
                steps[name] = list(client.train())
                if "eval_data" in options:
                    perplexity[name] = (before, client.perplexity())
        except BaseException as error:
            errors.append(error)
            server.stop()

    with GpuServer(**{**usual, "clients": len(clients), **server_options}) as server:
        threads = [threading.Thread(target=take_part, args=(server.url, name, options)) for name, options in clients.items()]
        for thread in threads:
            thread.start()
        try:
            records = list(server.train())
        except RunEndedEarly:
            assert errors, "the run ended early, and no client says why"
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return RunResult(Path(server_options["run_dir"]), records, steps, perplexity)
