"""The head on a device: the loss of hidden states by its labels, and its gradient, are those of torch in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from spoiling import change_weights
from torch.nn import functional as F
from usual_settings import settings

from edge_client.engine import Engine
from edge_client.torch_engine import TorchEngine
from protocol import Array, TrainingDiverged
from split_model import PretrainedModel
from split_model.loss import CHUNK_ROWS
from storage import ModelError

WIDTH, VOCABULARY = 32, 600
RUN = settings(labels="device")

Engines = Callable[[Path], Engine]


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model whose head is the tokens' table, and one that has a head of its own."""
    return make_model(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param == "tied")


def of_torch(dtype: str) -> Engines:
    run = settings(labels="device", precision="float64" if dtype == "float64" else "float32")
    return lambda base: TorchEngine(PretrainedModel(base), run, "cpu", dtype)


ENGINES = {f"torch-{dtype}": of_torch(dtype) for dtype in ("float32", "float64", "bfloat16")}
TOLERANCES = {"torch-float32": 1e-5, "torch-float64": 1e-12, "torch-bfloat16": 2e-2}


def states(num_rows: int, dtype: str = "float32") -> tuple[Array, Array]:
    """Hidden states (M, d) as after a norm, and labels (M,)."""
    source = np.random.default_rng(num_rows)
    return source.normal(0, 1, (num_rows, WIDTH)).astype(dtype), source.integers(0, VOCABULARY, num_rows).astype(np.int32)


def by_torch(base: Path, hidden: Array, labels: Array) -> tuple[float, Array]:
    """In float64."""
    model = PretrainedModel(base)
    head = model.tensors[model.config.head_name].view().double()
    rows = torch.from_numpy(hidden).double().requires_grad_()
    loss = F.cross_entropy(rows @ head.T, torch.from_numpy(labels).long(), reduction="sum")
    loss.backward()
    assert rows.grad is not None
    return loss.item(), rows.grad.numpy()


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("num_rows", [1, 37, CHUNK_ROWS + 7])
@pytest.mark.parametrize("name", ENGINES)
def test_loss_and_gradient_are_those_of_torch_in_float64(base: Path, name: str, num_rows: int) -> None:
    dtype = "float64" if name == "torch-float64" else "float32"
    engine, (hidden, labels) = ENGINES[name](base), states(num_rows, dtype)
    expected_loss, expected_gradient = by_torch(base, hidden, labels)
    loss, gradient = engine.loss_and_gradient(hidden, labels)
    assert loss == pytest.approx(expected_loss, rel=TOLERANCES[name])
    assert relative(gradient, expected_gradient) < TOLERANCES[name]
    assert gradient.dtype == dtype
    assert engine.loss(hidden, labels) == loss


@pytest.mark.parametrize("name", ENGINES)
def test_what_was_computed_of_the_head_is_equal_to_the_bit_and_leaves_no_gradient_behind(base: Path, name: str) -> None:
    engine, (hidden, labels) = ENGINES[name](base), states(20, "float64" if name == "torch-float64" else "float32")
    before = hidden.copy()
    first, second = (engine.loss_and_gradient(hidden, labels) for _ in range(2))
    assert first[0] == second[0]
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(hidden, before)
    assert not any(gradient.any() for gradient in engine.gradients().values())


@pytest.mark.parametrize("name", ENGINES)
def test_without_labelled_rows_the_loss_is_zero(base: Path, name: str) -> None:
    engine, (hidden, labels) = ENGINES[name](base), states(0, "float64" if name == "torch-float64" else "float32")
    loss, gradient = engine.loss_and_gradient(hidden, labels)
    assert (loss, gradient.shape, engine.loss(hidden, labels)) == (0, (0, WIDTH), 0)


@pytest.mark.parametrize("name", ENGINES)
def test_loss_that_is_no_number_ends_the_training(base: Path, name: str) -> None:
    engine, (hidden, labels) = ENGINES[name](base), states(3, "float64" if name == "torch-float64" else "float32")
    hidden[1, 2] = np.inf
    for compute in (engine.loss_and_gradient, engine.loss):
        with pytest.raises(TrainingDiverged, match="the loss of this device's labels is nan; try a lower --lr on the server"):
            compute(hidden, labels)


@pytest.mark.parametrize("name", ENGINES)
def test_head_that_is_no_number_is_named_rather_than_the_learning_rate(model: Path, name: str) -> None:
    change_weights(model, lambda weights: weights["transformer.wte.weight"][5].fill_(float("nan")))
    engine, (hidden, labels) = ENGINES[name](model), states(3, "float64" if name == "torch-float64" else "float32")
    with pytest.raises(ModelError, match="without an adapter, gives losses that are not finite numbers"):
        engine.loss_and_gradient(hidden, labels)


def test_head_is_held_only_where_the_labels_are(tiny_model: Path) -> None:
    engine = TorchEngine(PretrainedModel(tiny_model), settings(), "cpu", "float32")
    with pytest.raises(RuntimeError, match="the server has the labels, and the head"):
        engine.loss(*states(3))
