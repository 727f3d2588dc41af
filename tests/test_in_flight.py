"""Micro-batches under way at once: the same run to the bit, and computing goes on while others travel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import adapter_bytes, run_split

from edge_client.data import Dataset
from edge_client.torch_engine import TorchEngine
from gpu_server.torch_engine import TorchEngine as ServerEngine
from split_model import PretrainedModel
from storage import load_tokenizer

CODECS = ("float32", "bfloat16", "int8", "int4", "delta")
ON_DEVICE = {"labels": "device", "check_codec_every": 0}
NOISE = {"activation_noise": 0.01, "activation_clip": 50.0, "gradient_noise": 0.1, "gradient_clip": 1.0}


def options(model: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    usual = {"cut_layer": 2, "lora_rank": 4, "lr": 2e-3, "lora_dropout": 0.1, "micro_batches": 3, "epochs": 2}
    return {"model": str(model), "run_dir": str(run_dir), **usual, **more}


@pytest.mark.parametrize(
    "mode",
    [
        *({"codec": codec} for codec in CODECS),
        {"codec": "delta", **ON_DEVICE},
        {"codec": "int4", **ON_DEVICE, **NOISE, "label_rows": "hidden"},
    ],
    ids=lambda mode: "-".join([mode["codec"], *(name for name in ("labels", "label_rows") if name in mode)]),
)
@pytest.mark.parametrize("aggregate_every", [1, 2])
def test_run_is_the_same_to_the_bit_however_many_are_in_flight(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    mode: dict[str, Any],
    aggregate_every: int,
) -> None:
    monkeypatch.setattr("edge_client.client_state.ClientState.noise_secret", lambda _: b"s" * 32)  # else every run has its own
    files = {name: pairs_file(name, count, 100 * i) for i, (name, count) in enumerate({"a": 11, "b": 13}.items())}
    outcomes = []
    for in_flight in (1, 2, 5):
        run_dir = tmp_path / f"run-{in_flight}"
        clients = {
            name: {"data": file, "batch_size": 4, "in_flight": in_flight, "state_dir": tmp_path / f"state-{in_flight}"}
            for name, file in files.items()
        }
        settings = options(
            tiny_model,
            run_dir,
            **{"aggregate_every": aggregate_every, "check_codec_every": 2, "codec_tolerance": 1e9, **mode},
        )
        outcomes.append((run_split(settings, clients).losses, adapter_bytes(run_dir)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_division_of_a_batch_changes_nothing_but_the_order_of_sums(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    clients = {name: {"data": pairs_file(name, 11, 100 * i), "batch_size": 4} for i, name in enumerate("ab")}
    losses = [
        run_split(
            options(tiny_model, tmp_path / f"{parts}", micro_batches=parts, dtype="float64", lora_dropout=0.0), clients
        ).losses
        for parts in (1, 2, 4, 7)  # more than a batch has samples: some parts are empty
    ]
    for divided in losses[1:]:
        assert divided == pytest.approx(losses[0], abs=1e-12)


def test_parts_of_a_batch_are_the_batch(tiny_model: Path, pairs_file: Callable[..., Path]) -> None:
    data = Dataset.load(pairs_file("a", 11), load_tokenizer(tiny_model), PretrainedModel(tiny_model).config.end_token, 256)
    for step, count in ((1, 4), (3, 3)):
        whole = data.batch(step, 4, (1, "order"))
        parts = [data.batch(step, 4, (1, "order"), part=part, of=3) for part in range(3)]
        assert [len(part.lengths) for part in parts] == ([2, 1, 1] if count == 4 else [1, 1, 1])
        for name in ("tokens", "lengths", "label_counts", "labels"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        numbers = [data.numbers(step, 4, (1, "order"), part=part, of=3, below=5) for part in range(3)]
        order = data.order(step, 4, (1, "order"))
        assert np.concatenate(numbers).tolist() == [number if number < 5 else -1 for number in order]  # type: ignore[arg-type]
    assert data.numbers(1, 4, None, below=0) is None


def test_samples_that_fit_are_counted_from_the_first_on(tiny_model: Path, pairs_file: Callable[..., Path]) -> None:
    data = Dataset.load(pairs_file("a", 5), load_tokenizer(tiny_model), PretrainedModel(tiny_model).config.end_token, 256)
    rows = [len(sample.tokens) - 1 for sample in data.samples]
    row = 3 * (2 * 5 + 16)  # three versions of five bfloat16 numbers, and what a file needs besides
    assert data.num_that_fit(0, width=5) == 0
    assert data.num_that_fit(row * rows[0], width=5) == 1
    assert data.num_that_fit(row * (rows[0] + rows[1]) - 1, width=5) == 1
    assert data.num_that_fit(10**9, width=5) == 5


@pytest.mark.parametrize(
    ("in_flight", "order"),
    [
        (1, ["forward", "send", "backward"] * 3),
        (2, ["forward", "send", "forward", "send", "backward", "forward", "send", "backward", "backward"]),
        (3, [*["forward", "send"] * 3, *["backward"] * 3]),
    ],
)
def test_next_part_is_computed_while_the_one_before_is_under_way(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    in_flight: int,
    order: list[str],
) -> None:
    log: list[str] = []

    def noted(owner: type, name: str, as_what: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            if type(arguments[-1]).__name__ != "AdapterGradient":
                log.append(as_what)
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    from edge_client.membership import Membership

    noted(TorchEngine, "forward", "forward")
    noted(TorchEngine, "backward", "backward")
    original = Membership.exchange_each

    def exchange_each(self: Membership, questions: Any, *rest: Any) -> Any:
        def sent() -> Any:
            for question in questions:
                if hasattr(question, "micro_batch"):
                    log.append("send")
                yield question

        return original(self, sent(), *rest)

    monkeypatch.setattr(Membership, "exchange_each", exchange_each)
    clients = {"a": {"data": pairs_file("a", 6), "batch_size": 6, "in_flight": in_flight}}
    run_split(options(tiny_model, tmp_path / "run", epochs=1), clients)
    assert log == order


def test_server_computes_all_clients_parts_of_a_number_in_one_pass(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int, int]] = []
    train = ServerEngine.train

    def watched(self: ServerEngine, step: int, total_steps: int, micro_batch: int, batches: dict[str, Any]) -> Any:
        passes.append((step, micro_batch, len(batches)))
        return train(self, step, total_steps, micro_batch, batches)

    monkeypatch.setattr(ServerEngine, "train", watched)
    clients = {name: {"data": pairs_file(name, 6, 100 * i), "batch_size": 3} for i, name in enumerate("abc")}
    run_split(options(tiny_model, tmp_path / "run", epochs=1), clients)
    assert passes == [(step, part, 3) for step in (1, 2) for part in (0, 1, 2)]
