"""
What both parts compute on a CUDA device keeps to it, and never makes the host wait before a micro-batch ends: shown without a
device, on tensors that know their shape, type and place alone. Whether the numbers are right, test_cuda.py asks a real one.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, HostWaits, Watch, backward, fake_cuda
from family_models import make_family_model
from test_server_engine import WIDTH, batches
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
)
from usual_settings import settings

from contestants.whole_model import WholeModel
from edge_client.data import Sample, pack
from edge_client.torch_engine import TorchEngine
from gpu_server import part_trainer
from gpu_server.part_trainer import PartTrainer
from protocol import Activations, Array, HiddenGradient, Seconds
from split_model import (
    EdgePart,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    ServerPart,
    Uploads,
    copied_to,
    dropout,
    initial_adapter,
    packing,
)
from split_model.dropout import SeededDropout
from split_model.packing import Packing, Places

LENGTHS, LABEL_COUNTS = np.array([5, 3, 9, 4]), np.array([2, 0, 5, 4])
EVERYTHING = ("c_attn", "c_proj", "c_fc")
SEEDS = [1, 2, 3, 4]


@pytest.fixture
def said() -> Iterator[list[str]]:
    with fake_cuda() as said:
        yield said


def parts_on_cuda(
    folder: Path, dtype: torch.dtype, dropout: float = 0.1, in_bfloat16: bool = False
) -> tuple[EdgePart, ServerPart]:
    model = PretrainedModel(folder)
    lora = LoraConfig(rank=2, targets=model.config.lora_targets, dropout=dropout)
    where: dict[str, Any] = {"weight_dtype": dtype, "device": CUDA}
    return EdgePart(model, 2, lora, **where), ServerPart(model, 2, lora, in_bfloat16=in_bfloat16, **where)


def train(edge: EdgePart, server: ServerPart) -> tuple[Tensor, Tensor]:
    """Losses of the labels (M,), and the gradient by the activations; the parts' matrices have theirs afterwards."""
    with Watch():
        for part in (edge, server):
            part.train()
            part.seed_dropout(SEEDS)
        activations = edge(np.arange(LENGTHS.sum()), LENGTHS)
        leaf = activations.detach().requires_grad_()
        labels = copied_to(CUDA, torch.from_numpy(np.arange(LABEL_COUNTS.sum())))
        losses = server.losses(leaf, LENGTHS, LABEL_COUNTS, labels)
        backward(losses.sum())
        assert leaf.grad is not None
        backward(activations, leaf.grad)
        for part in (edge, server):
            part.divide_gradients(3)
    return losses, leaf.grad


@pytest.mark.parametrize(
    ("dtype", "in_bfloat16", "dropout"),
    [
        (torch.float32, False, 0.0),
        (torch.float32, False, 0.1),
        (torch.bfloat16, False, 0.1),
        (torch.bfloat16, True, 0.1),
        (torch.float64, False, 0.1),
    ],
)
def test_parts_train_without_making_the_host_wait(
    said: list[str], tiny_model: Path, dtype: torch.dtype, in_bfloat16: bool, dropout: float
) -> None:
    edge, server = parts_on_cuda(tiny_model, dtype, dropout, in_bfloat16)
    losses, gradient = train(edge, server)
    assert (losses.shape, gradient.shape, losses.device, gradient.device) == ((11,), (21, WIDTH), CUDA, CUDA)
    for part in (edge, server):
        for matrix in part.matrices().values():
            assert matrix.grad is not None
            assert (matrix.grad.device, matrix.grad.dtype) == (CUDA, part.dtype)


@pytest.mark.parametrize(("dtype", "in_bfloat16"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("option", ["llama-biases", "qwen2-windows", "qwen3", "phi3-partial"])
def test_parts_of_other_families_train_without_making_the_host_wait(
    tmp_path: Path, option: str, dtype: torch.dtype, in_bfloat16: bool
) -> None:
    make_family_model(tmp_path, option)
    with fake_cuda():
        edge, server = parts_on_cuda(tmp_path, dtype, in_bfloat16=in_bfloat16)
        losses, gradient = train(edge, server)
        assert (losses.shape, gradient.shape, losses.device, gradient.device) == ((11,), (21, WIDTH), CUDA, CUDA)


def test_windows_are_told_to_the_kernel_of_packed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    called = []

    def kernel(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
        called.append((key.shape == query.shape, options["window_size"]))
        mixed: Tensor = varlen.varlen_attn(query, key, *others, **options)
        return mixed

    monkeypatch.setattr("split_model.packing._varlen_attn", lambda device: kernel)
    make_family_model(tmp_path, "qwen2-windows")
    with fake_cuda():
        train(*parts_on_cuda(tmp_path, torch.bfloat16))
    assert called == [(True, (-1, 0)), *[(True, (4, 0))] * 3]  # of five tokens a token sees itself and four before it


def test_parts_train_on_packed_rows(said: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel of which the documentation says that it waits for nothing."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    called = []

    def kernel(*arguments: Any, **options: Any) -> Tensor:
        called.append(options)
        mixed: Tensor = varlen.varlen_attn(*arguments, **options)
        return mixed

    monkeypatch.setattr("split_model.packing._varlen_attn", lambda device: kernel)
    train(*parts_on_cuda(tiny_model, torch.bfloat16))
    assert called == [{"window_size": (-1, 0)}] * 4


def test_part_on_cuda_computes_the_same_twice_and_products_of_float32_in_float32(said: list[str], tiny_model: Path) -> None:
    torch.set_float32_matmul_precision("high")  # as where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set
    parts_on_cuda(tiny_model, torch.float32)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # else attention's backward pass stays as it is
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@torch.no_grad()
def test_parts_evaluate_without_making_the_host_wait(said: list[str], tiny_model: Path) -> None:
    edge, server = parts_on_cuda(tiny_model, torch.bfloat16)
    edge.eval()
    server.eval()
    with Watch(), edge.without_adapter():
        activations = edge(np.arange(LENGTHS.sum()), LENGTHS)
        hidden = server.hidden(activations, LENGTHS, LABEL_COUNTS)
        assert (hidden.shape, hidden.device, hidden.dtype) == ((11, WIDTH), CUDA, torch.float32)
        assert server.logits(activations, LENGTHS).device == CUDA


def trainer_on_cuda(folder: Path, **changes: Any) -> PartTrainer:
    run = settings(**{"lora_targets": EVERYTHING, "lora_dropout": 0.1, "micro_batches": 2, **changes})
    model = PretrainedModel(folder)
    adapter = initial_adapter(model.config, LoraConfig(**run.lora()), run.seed)
    return PartTrainer(model, run, adapter, weight_dtype=torch.bfloat16, device=CUDA)


def questions(micro_batch: int) -> tuple[dict[str, Activations], dict[str, list[int]]]:
    union = batches(1, micro_batch)
    union = {name: replace(batch, values=batch.values.astype(np.float32)) for name, batch in union.items()}
    return union, {name: list(range(len(batch.lengths))) for name, batch in union.items()}


UPLOADED = ["computing waits for copying", "memory is kept for computing"]
READ = "the host waits for computing"


def test_server_waits_once_for_each_micro_batch(said: list[str], tiny_model: Path) -> None:
    trainer = trainer_on_cuda(tiny_model)
    for micro_batch in range(2):
        said.clear()
        union, seeds = questions(micro_batch)
        with Watch():
            trained = trainer.train(1, 1, micro_batch, union, seeds)
        of_step = [READ] if micro_batch == 1 else []  # the gradient's norm
        assert said == [*UPLOADED, *UPLOADED, READ, *of_step]  # labels and activations go there
        assert {name: gradient.shape for name, gradient in trained.gradients.items()} == {
            name: batch.values.shape for name, batch in union.items()
        }
    said.clear()
    with Watch():
        assert trainer.adapter().keys() == trainer.adapter().keys()
        assert trainer.optimiser_state()
    assert said == [READ] * 3  # of many matrices at once


def test_server_waits_once_for_each_half_of_a_micro_batch(said: list[str], tiny_model: Path) -> None:
    trainer = trainer_on_cuda(tiny_model, labels="device", micro_batches=1)
    union, seeds = questions(0)
    with Watch():
        hidden = trainer.forward(1, 0, union, seeds)
        assert said == [*UPLOADED, READ]
        said.clear()
        replies = {
            name: HiddenGradient(step=1, seconds=Seconds(), summed_loss=1.0, labelled_tokens=len(states), values=states)
            for name, states in hidden.items()
            if name == "a"  # b's is still to come when the step goes on
        }
        trainer.backward(1, 1, 0, replies)
        assert said == [*UPLOADED, READ, READ]


def test_server_waits_once_for_an_evaluation(said: list[str], tiny_model: Path) -> None:
    trainer = trainer_on_cuda(tiny_model)
    union, _ = questions(0)
    with Watch():
        trainer.summed_loss(list(union.values()), "held-out texts")
        assert said == [*UPLOADED, *UPLOADED, READ]
        said.clear()
        assert trainer.infer(union["a"], "held-out texts").shape == (union["a"].num_labelled, WIDTH)
        assert said == [*UPLOADED, READ]


def test_whole_model_waits_once_for_a_batch_and_once_for_a_step(said: list[str], tiny_model: Path) -> None:
    base, lora = PretrainedModel(tiny_model), LoraConfig(rank=2, targets=EVERYTHING, dropout=0.1)
    adapter = initial_adapter(base.config, lora, 0)
    whole = WholeModel(base, lora, OptimiserConfig(), adapter, weight_dtype=torch.bfloat16, device=CUDA)
    with Watch():
        whole.backward(pack([Sample(np.arange(8), 3), Sample(np.array([4, 5, 6]), 1)]), dropout_seed=1)
        assert said == [READ]
        whole.take_step(4, 0.1)
        assert said == [READ, READ]


def test_device_waits_once_for_each_computation(said: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_client.torch_engine.choose_device", lambda name: CUDA)
    run = settings(lora_targets=EVERYTHING, lora_dropout=0.1, aggregate_every=4, labels="device")
    engine = TorchEngine(PretrainedModel(tiny_model), run, "cuda", "bfloat16")
    batch = pack([Sample(np.arange(8), 3), Sample(np.array([4, 5, 6]), 1)])
    engine.begin_step()
    with Watch():
        activations = engine.forward(batch, 7)
        hidden = engine.infer(batch)[:4]
        engine.losses_and_gradient(hidden, batch.labels)
        engine.losses(hidden, batch.labels)
        assert said == [READ] * 4
        said.clear()
        engine.backward(activations)
        engine.end_step(4)
        engine.take_step(0.1)
        assert not said
        engine.adapter()
        engine.state()
        assert said == [READ] * 3


Mistake = Callable[[pytest.MonkeyPatch], None]


def lengths_that_are_read_back(patch: pytest.MonkeyPatch) -> None:
    made = Packing.__init__
    patch.setattr(Packing, "__init__", lambda self, lengths, device: made(self, on_cuda(lengths).tolist(), device))


def lengths_on_the_device(patch: pytest.MonkeyPatch) -> None:
    made = Packing.__init__
    patch.setattr(Packing, "__init__", lambda self, lengths, device: made(self, on_cuda(lengths), device))


def labelled_rows_that_are_looked_for(patch: pytest.MonkeyPatch) -> None:
    def labelled(packing: Packing, label_counts: Array) -> Places:
        has_label = on_cuda(np.ones(len(packing.positions))) > 0
        return Places(has_label.nonzero().flatten(), len(packing.positions), packing.device)  # type: ignore[arg-type]

    patch.setattr(Packing, "labelled", labelled)


def labelled_rows_by_a_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "_take", lambda places, spread: spread[torch.ones_like(spread[:, 0]) > 0])


def rows_repeated_as_the_device_says(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Places, "_spread", lambda places, rows: rows.repeat_interleave(torch.ones_like(rows[:, 0]).long(), 0))


def numbers_of_rows_on_the_host(patch: pytest.MonkeyPatch) -> None:
    made = Places.__init__
    patch.setattr(Places, "__init__", lambda self, places, among, device: made(self, places, among, torch.device("cpu")))


def rows_indexed_from_the_host(patch: pytest.MonkeyPatch) -> None:
    """Which torch takes, and copies the index meanwhile."""
    patch.setattr(Places, "_take", lambda places, spread: spread[torch.arange(len(places._places))])


def loss_that_is_looked_at(patch: pytest.MonkeyPatch) -> None:
    losses = ServerPart.losses
    patch.setattr(ServerPart, "losses", lambda *given: looked_at(losses(*given), lambda losses: losses.sum().item()))


def check_before_the_end(patch: pytest.MonkeyPatch) -> None:
    losses = ServerPart.losses
    patch.setattr(ServerPart, "losses", lambda *given: looked_at(losses(*given), lambda losses: bool(losses.isfinite().all())))


def loss_copied_before_the_end(patch: pytest.MonkeyPatch) -> None:
    losses = ServerPart.losses
    patch.setattr(ServerPart, "losses", lambda *given: looked_at(losses(*given), lambda losses: losses.cpu()))


def numbers_copied_one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    for module in (packing, dropout):
        patch.setattr(module, "copied_to", lambda device, tensor: tensor.to(device))


def number_made_on_the_host(patch: pytest.MonkeyPatch) -> None:
    losses = ServerPart.losses
    patch.setattr(ServerPart, "losses", lambda *given: losses(*given) * torch.tensor([2.0], device=CUDA))


def masks_drawn_on_the_host(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SeededDropout, "_mask", lambda self, columns, dtype: torch.ones(21, len(columns)))


def labels_on_the_host(patch: pytest.MonkeyPatch) -> None:
    losses = ServerPart.losses
    patch.setattr(ServerPart, "losses", lambda *given: losses(*given[:-1], torch.zeros(11, dtype=torch.int64)))


def attention_at_a_length_of_the_device(patch: pytest.MonkeyPatch) -> None:
    attend = Packing.attend

    def of_longest(packing: Packing, query: Tensor, *others: Any) -> Tensor:
        return attend(packing, query[: on_cuda(packing.lengths).sum()], *others)

    patch.setattr(Packing, "attend", of_longest)


def on_cuda(numbers: Array) -> Tensor:
    return copied_to(CUDA, torch.from_numpy(numbers))


def looked_at(tensor: Tensor, look: Callable[[Tensor], object]) -> Tensor:
    look(tensor)
    return tensor


@pytest.mark.parametrize(
    "mistake",
    [
        lengths_that_are_read_back,
        lengths_on_the_device,
        labelled_rows_that_are_looked_for,
        labelled_rows_by_a_mask,
        rows_repeated_as_the_device_says,
        numbers_of_rows_on_the_host,
        rows_indexed_from_the_host,
        loss_that_is_looked_at,
        check_before_the_end,
        loss_copied_before_the_end,
        numbers_copied_one_after_the_other,
        number_made_on_the_host,
        masks_drawn_on_the_host,
        labels_on_the_host,
        attention_at_a_length_of_the_device,
    ],
)
def test_every_mistake_that_makes_the_host_wait_or_mixes_devices_is_found(
    said: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, mistake: Mistake
) -> None:
    both = parts_on_cuda(tiny_model, torch.bfloat16)
    mistake(monkeypatch)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException, FakeTensorDeviceMismatchError, HostWaits)):
        train(*both)


@pytest.mark.parametrize("where", ["activations", "gradient"])
def test_values_that_a_trainer_reads_too_early_are_found(
    said: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    trainer = trainer_on_cuda(tiny_model)
    read, joined = part_trainer._read_gradient, Uploads.joined

    def look_first(leaf: Any, *more: Tensor) -> list[Array]:
        return read(looked_at(leaf, lambda leaf: leaf.grad.cpu()), *more)

    if where == "gradient":
        monkeypatch.setattr(part_trainer, "_read_gradient", look_first)
    else:
        monkeypatch.setattr(Uploads, "joined", lambda self, arrays: looked_at(joined(self, arrays), lambda rows: rows.tolist()))
    with Watch(), pytest.raises((DataDependentOutputException, HostWaits)):
        trainer.train(1, 1, 0, *questions(0))
