"""The head on a device: the loss of hidden states by its labels, and its gradient, are those of torch in float64."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model, run_split
from device_parts import make_part
from spoiling import change_weights
from torch.nn import functional as F
from usual_settings import settings

from edge_client.engine import Engine
from edge_client.onnx_engine import OnnxEngine
from edge_client.part import head
from edge_client.part.device_part import DevicePart
from edge_client.torch_engine import TorchEngine
from protocol import Array, TrainingDiverged
from split_model import PretrainedModel
from split_model.loss import CHUNK_ROWS
from storage import EDGE_WEIGHTS, ModelError

WIDTH, VOCABULARY = 32, 600
RUN = settings(labels="device")

Engines = Callable[..., Engine]
"""Makes one, given a model's folder, another one to write into, and the run's label smoothing."""


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A model whose head is the tokens' table, and one that has a head of its own."""
    return make_model(tmp_path_factory.mktemp("base"), tie_word_embeddings=request.param == "tied")


def of_torch(dtype: str) -> Engines:
    run = settings(labels="device", precision="float64" if dtype == "float64" else "float32")
    return lambda base, _, smoothing=0.0: TorchEngine(
        PretrainedModel(base), replace(run, label_smoothing=smoothing), "cpu", dtype
    )


def of_onnxruntime(precision: str) -> Engines:
    return lambda base, folder, smoothing=0.0: OnnxEngine(
        DevicePart(make_part(folder / "part", base, RUN, precision)), replace(RUN, label_smoothing=smoothing)
    )


ENGINES = {
    **{f"torch-{dtype}": of_torch(dtype) for dtype in ("float32", "float64", "bfloat16")},
    **{f"onnxruntime-{precision}": of_onnxruntime(precision) for precision in EDGE_WEIGHTS},
}
TOLERANCES = {
    "torch-float32": 1e-5,
    "torch-float64": 1e-12,
    "torch-bfloat16": 2e-2,
    "onnxruntime-float32": 1e-5,
    "onnxruntime-float16": 1e-3,
    "onnxruntime-int8": 2e-2,
}


@pytest.fixture(autouse=True)
def _several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiny vocabulary, the last one shorter than the others."""
    monkeypatch.setattr(head, "SLICE_FLOATS", 256 * WIDTH)


def states(num_rows: int, dtype: str = "float32") -> tuple[Array, Array]:
    """Hidden states (M, d) as after a norm, and labels (M,)."""
    source = np.random.default_rng(num_rows)
    return source.normal(0, 1, (num_rows, WIDTH)).astype(dtype), source.integers(0, VOCABULARY, num_rows).astype(np.int32)


def by_torch(base: Path, hidden: Array, labels: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """In float64."""
    model = PretrainedModel(base)
    head = model.tensors[model.config.head_name].view().double()
    rows = torch.from_numpy(hidden).double().requires_grad_()
    losses = F.cross_entropy(rows @ head.T, torch.from_numpy(labels).long(), reduction="none", label_smoothing=smoothing)
    losses.sum().backward()
    assert rows.grad is not None
    return losses.detach().numpy(), rows.grad.numpy()


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("num_rows", [1, 37, CHUNK_ROWS + 7, head.MOST_ROWS + 9])
@pytest.mark.parametrize("name", ENGINES)
def test_loss_and_gradient_are_those_of_torch_in_float64(base: Path, tmp_path: Path, name: str, num_rows: int) -> None:
    dtype = "float64" if name == "torch-float64" else "float32"
    engine, (hidden, labels) = ENGINES[name](base, tmp_path), states(num_rows, dtype)
    expected_losses, expected_gradient = by_torch(base, hidden, labels)
    losses, gradient = engine.losses_and_gradient(hidden, labels)
    assert relative(losses, expected_losses) < TOLERANCES[name]
    assert relative(gradient, expected_gradient) < TOLERANCES[name]
    assert gradient.dtype == dtype
    assert np.array_equal(engine.losses(hidden, labels), losses)


@pytest.mark.parametrize("name", ENGINES)
def test_what_was_computed_of_the_head_is_equal_to_the_bit_and_leaves_no_gradient_behind(
    base: Path, tmp_path: Path, name: str
) -> None:
    engine, (hidden, labels) = ENGINES[name](base, tmp_path), states(20, "float64" if name == "torch-float64" else "float32")
    before = hidden.copy()
    first, second = (engine.losses_and_gradient(hidden, labels) for _ in range(2))
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])
    assert np.array_equal(hidden, before)
    assert not any(gradient.any() for gradient in engine.gradients().values())


@pytest.mark.parametrize("name", ENGINES)
def test_labels_are_smoothed_in_steps_and_not_in_evaluations(base: Path, tmp_path: Path, name: str) -> None:
    dtype = "float64" if name == "torch-float64" else "float32"
    engine, (hidden, labels) = ENGINES[name](base, tmp_path, 0.3), states(37, dtype)
    expected_losses, expected_gradient = by_torch(base, hidden, labels, 0.3)
    losses, gradient = engine.losses_and_gradient(hidden, labels)
    assert relative(losses, expected_losses) < TOLERANCES[name]
    assert relative(gradient, expected_gradient) < TOLERANCES[name]
    assert gradient.dtype == dtype
    assert relative(engine.losses(hidden, labels), by_torch(base, hidden, labels)[0]) < TOLERANCES[name]


@pytest.mark.parametrize("name", ENGINES)
def test_without_labelled_rows_there_is_no_loss(base: Path, tmp_path: Path, name: str) -> None:
    engine, (hidden, labels) = ENGINES[name](base, tmp_path), states(0, "float64" if name == "torch-float64" else "float32")
    losses, gradient = engine.losses_and_gradient(hidden, labels)
    assert (losses.shape, gradient.shape, engine.losses(hidden, labels).shape) == ((0,), (0, WIDTH), (0,))


@pytest.mark.parametrize("name", ENGINES)
def test_loss_that_is_no_number_ends_the_training(base: Path, tmp_path: Path, name: str) -> None:
    engine, (hidden, labels) = ENGINES[name](base, tmp_path), states(3, "float64" if name == "torch-float64" else "float32")
    hidden[1, 2] = np.inf
    for compute in (engine.losses_and_gradient, engine.losses):
        with pytest.raises(TrainingDiverged, match="the loss of this device's labels is nan; try a lower --lr on the server"):
            compute(hidden, labels)


@pytest.mark.parametrize("name", [name for name in ENGINES if name.startswith("torch")])
def test_head_that_is_no_number_is_named_rather_than_the_learning_rate(model: Path, tmp_path: Path, name: str) -> None:
    change_weights(model, lambda weights: weights["transformer.wte.weight"][5].fill_(float("nan")))
    engine, (hidden, labels) = ENGINES[name](model, tmp_path), states(3, "float64" if name == "torch-float64" else "float32")
    with pytest.raises(ModelError, match="without an adapter, gives losses that are not finite numbers"):
        engine.losses_and_gradient(hidden, labels)


def test_head_is_held_only_where_the_labels_are(tiny_model: Path, tmp_path: Path) -> None:
    run = settings()
    for engine in (
        TorchEngine(PretrainedModel(tiny_model), run, "cpu", "float32"),
        OnnxEngine(DevicePart(make_part(tmp_path / "part", tiny_model, run)), run),
    ):
        with pytest.raises(RuntimeError, match="the server has the labels, and the head"):
            engine.losses(*states(3))


def test_run_learns_the_same_wherever_the_labels_are_with_a_head_of_its_own_too(
    base: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    results = []
    for labels, name in (("server", "torch"), ("device", "onnxruntime")):
        device = {"data": pairs_file("train", 9), "eval_data": pairs_file("valid", 4, 30), "batch_size": 3, "engine": name}
        device |= {"state_dir": tmp_path / f"state-{labels}", "dtype": "float32"}
        server = {"model": str(base), "cut_layer": 2, "steps": 3, "lora_dropout": 0.1, "run_dir": str(tmp_path / labels)}
        results.append(run_split({**server, "labels": labels}, {"a": device}))
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-5)
    assert results[1].perplexity["a"] == pytest.approx(results[0].perplexity["a"], rel=1e-5)


def test_part_of_a_run_with_other_labels_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with_head, without = (make_part(tmp_path / labels, tiny_model, settings(labels=labels)) for labels in ("device", "server"))
    for part, run, message in (
        (without, RUN, "has labels on the server, the run has device; the server has to hand this run's part over"),
        (with_head, settings(), "has labels on the device, the run has server"),
    ):
        with pytest.raises(ModelError, match=message):
            OnnxEngine(DevicePart(part), run)


@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
def test_no_logits_of_the_whole_vocabulary_and_no_copy_of_the_table_are_in_memory(tmp_path: Path, precision: str) -> None:
    """Of 30,000 tokens the table has 31 MB in float32, and 400 rows of logits 48 MB."""
    base = make_model(tmp_path, n_layer=2, n_embd=256, vocab_size=30_000)
    part = make_part(tmp_path / "part", base, RUN, precision)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(part)], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert int(done.stdout) < 20e6


MEASURE = """
import sys
sys.path.append("tests")
import numpy as np
from pathlib import Path
from usual_settings import settings
from edge_client.onnx_engine import OnnxEngine
from edge_client.part import head
from edge_client.part.device_part import DevicePart

def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = int(status.read_text().partition("VmHWM:")[2].split()[0])
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * found

head.SLICE_FLOATS = 1024 * 256
engine = OnnxEngine(DevicePart(Path(sys.argv[1])), settings(labels="device"))
hidden, labels = np.ones((400, 256), np.float32), np.arange(400, dtype=np.int32)
engine.losses(hidden[:1], labels[:1])
peak()
before = peak()
engine.losses_and_gradient(hidden, labels)
print(peak() - before)
"""
