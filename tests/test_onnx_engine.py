"""The engine without torch computes what the one with torch, and transformers + PEFT, compute; it does the same every time."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model
from device_parts import make_part
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from reference import load_base
from torch import nn
from usual_settings import settings

from edge_client.data import Batch, Sample, pack
from edge_client.dropout import dropout_masks
from edge_client.engine import Engine
from edge_client.onnx_engine import OnnxEngine
from edge_client.part.device_part import DevicePart
from edge_client.part.grids import grids
from edge_client.torch_engine import TorchEngine
from protocol import Array, RunSettings, Tensors, TrainingDiverged
from split_model import LoraConfig, PretrainedModel, ServerPart, adapted_layers
from storage import EDGE_WEIGHTS, AdapterError, ModelError

TOLERANCE = 1e-5
CHOICES = [targets for count in (1, 2, 3) for targets in itertools.combinations(("c_attn", "c_proj", "c_fc"), count)]
EVERYTHING = CHOICES[-1]
SEED = 1234

Parts = Callable[..., DevicePart]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 blocks, d = 32."""
    return make_model(tmp_path_factory.mktemp("base"), n_layer=5)


@pytest.fixture
def part_of(tmp_path: Path, base: Path) -> Parts:
    """``part_of(settings, precision)``: the base model's part for such a run."""
    numbers = itertools.count()

    def make(run: RunSettings, precision: str = "float32") -> DevicePart:
        return DevicePart(make_part(tmp_path / f"part-{next(numbers)}", base, run, precision))

    return make


def adapter_of(engine: Engine, scale: float = 0.2) -> Tensors:
    """Both matrices different from zero: every gradient is, too."""
    source = np.random.default_rng(3)
    return {name: source.normal(0, scale, matrix.shape).astype(np.float32) for name, matrix in engine.adapter().items()}


def sequences(*lengths: int) -> Batch:
    """A packed batch of random tokens; the second half of each sequence has labels."""
    source = np.random.default_rng(sum(lengths))
    return pack([Sample(source.integers(0, 600, length + 1).astype(np.int32), (length + 1) // 2) for length in lengths])


RAGGED = (3, 1, 40, 17, 5, 41)  # several grids, see `test_one_long_sequence_has_a_grid_of_its_own`


def gradient_for(activations: Array) -> Array:
    return np.random.default_rng(len(activations)).normal(0, 1, activations.shape).astype(np.float32)


def step(engine: Engine, batches: Sequence[Batch], labelled_tokens: int = 7) -> tuple[list[Array], Tensors]:
    """The activations of every micro-batch, and the gradients of the step."""
    engine.begin_step()
    activations = [engine.forward(batch, SEED + number) for number, batch in enumerate(batches)]
    for values in activations:
        engine.backward(gradient_for(values))
    engine.end_step(labelled_tokens)
    return activations, engine.gradients()


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def assert_close(found: Tensors, expected: Tensors, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative(found[name], expected[name]) < tolerance, name


# The same as with torch


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cut_layer", [1, 3, 4])
@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_step_is_that_of_the_engine_with_torch(
    base: Path, part_of: Parts, targets: tuple[str, ...], cut_layer: int, dropout: float
) -> None:
    run = settings(lora_targets=targets, cut_layer=cut_layer, lora_dropout=dropout)
    reference, engine = TorchEngine(PretrainedModel(base), run, "cpu", "float32"), OnnxEngine(part_of(run), run)
    for each in (reference, engine):
        each.load_adapter(adapter_of(reference))
    batches = [sequences(*RAGGED), sequences(), sequences(1), sequences(9, 9)]
    (expected, expected_gradients), (found, gradients) = step(reference, batches), step(engine, batches)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < TOLERANCE if len(theirs) else ours.shape == theirs.shape
    assert_close(gradients, expected_gradients)
    assert engine.num_adapter_elements == reference.num_adapter_elements
    assert relative(engine.infer(batches[0]), reference.infer(batches[0])) < TOLERANCE


class FixedDropout(nn.Module):
    """PEFT's dropout of one mask."""

    def __init__(self, mask: torch.Tensor, dropout: float) -> None:
        super().__init__()
        self.factor = mask / (1 - dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def by_peft(base: Path, run: RunSettings, adapter: Tensors, batch: Batch) -> tuple[float, Tensors]:
    """Of one padded batch in float64, the whole model in one process: mean loss, and gradients by the device's matrices."""
    lora = LoraConfig(**run.lora())
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), fan_in_fan_out=True
    )
    model = get_peft_model(load_base(base), config).double()
    lengths, counts = torch.from_numpy(batch.lengths).long(), torch.from_numpy(batch.label_counts).long()
    columns = torch.arange(int(lengths.max()))
    is_token, is_labelled = columns < lengths[:, None], columns >= (lengths - counts)[:, None]
    ids = torch.zeros(is_token.shape, dtype=torch.long)
    ids[is_token] = torch.from_numpy(batch.tokens).long()
    matrices = {name.replace(".default", ""): matrix for name, matrix in model.named_parameters()}
    with torch.no_grad():
        for name, value in adapter.items():
            matrices[name].copy_(torch.from_numpy(value))
    layers = adapted_layers(PretrainedModel(base).config, lora)
    for block in range(run.cut_layer) if lora.dropout else ():
        masks = dropout_masks(SEED, block, lora.dropout, len(batch.tokens), [inputs for inputs, _ in layers.values()])
        for layer, mask in zip(layers, masks, strict=True):
            padded = torch.zeros(*is_token.shape, mask.shape[1]).double()
            padded[is_token] = torch.from_numpy(mask).double()
            linear = model.base_model.model.transformer.h[block].get_submodule(layer)
            linear.lora_dropout["default"] = FixedDropout(padded, lora.dropout)
    for block in range(run.cut_layer, 5):  # the server's part computes without dropout here
        for layer in layers:
            linear = model.base_model.model.transformer.h[block].get_submodule(layer)
            linear.lora_dropout["default"] = nn.Identity()
    logits = model(input_ids=ids).logits[is_token & is_labelled]
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels).long())
    loss.backward()
    return loss.item(), {name: matrices[name].grad.numpy() for name in adapter}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("cut_layer", [1, 3, 4])
@pytest.mark.parametrize("targets", CHOICES, ids="+".join)
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    base: Path, part_of: Parts, targets: tuple[str, ...], cut_layer: int, dropout: float
) -> None:
    run = settings(lora_targets=targets, cut_layer=cut_layer, lora_dropout=dropout)
    engine, batch = OnnxEngine(part_of(run), run), sequences(*RAGGED)
    engine.load_adapter(adapter_of(engine))
    server = ServerPart(
        PretrainedModel(base),
        cut_layer,
        LoraConfig(**run.lora()),
        weight_dtype=torch.float32,
        device=torch.device("cpu"),
    )
    server.eval()
    activations = torch.from_numpy(engine.forward(batch, SEED)).requires_grad_()
    rest = (torch.from_numpy(array).long() for array in (batch.lengths, batch.label_counts, batch.labels))
    loss = server.summed_loss(activations, *rest)
    loss.backward()
    assert activations.grad is not None
    engine.backward(activations.grad.numpy())
    engine.end_step(len(batch.labels))
    expected_loss, expected = by_peft(base, run, engine.adapter(), batch)
    assert math.isclose(loss.item() / len(batch.labels), expected_loss, rel_tol=TOLERANCE)
    assert_close(engine.gradients(), expected)


@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
def test_stored_precision_moves_activations_no_further_than_its_rounding(base: Path, part_of: Parts, precision: str) -> None:
    run = settings(cut_layer=3)
    batch, engine = sequences(*RAGGED), OnnxEngine(part_of(run, precision), run)
    expected = TorchEngine(PretrainedModel(base), run, "cpu", "float32").infer(batch)
    most = {"float32": TOLERANCE, "float16": 1e-3, "int8": 0.05}[precision]
    least = {"float32": 0, "float16": TOLERANCE, "int8": 1e-3}[precision]
    assert least <= relative(engine.infer(batch), expected) < most


# Long rounds: the optimiser's steps


def test_adamw_is_that_of_torch(base: Path, part_of: Parts) -> None:
    run = settings(cut_layer=3, lora_targets=EVERYTHING, aggregate_every=4, weight_decay=0.1)
    reference, engine = TorchEngine(PretrainedModel(base), run, "cpu", "float32"), OnnxEngine(part_of(run), run)
    for each in (reference, engine):
        each.load_adapter(adapter_of(reference))
    gradients = np.random.default_rng(0)
    for number in range(20):
        drawn = {name: gradients.normal(0, 0.1, matrix.shape).astype(np.float32) for name, matrix in engine.adapter().items()}
        rate = 1e-2 / (1 + number)
        give_gradients(reference, drawn)
        give_gradients(engine, drawn)
        reference.take_step(rate)
        engine.take_step(rate)
    found, expected = engine.state(), reference.state()
    assert_close(found, expected, 1e-6)
    assert {name: array.dtype for name, array in found.items()} == {name: array.dtype for name, array in expected.items()}


def give_gradients(engine: TorchEngine | OnnxEngine, gradients: Tensors) -> None:
    """As if a backward pass had just computed them."""
    if isinstance(engine, OnnxEngine):
        engine._gradients = {name: gradient.copy() for name, gradient in gradients.items()}
    else:
        for name, matrix in engine._part.matrices().items():
            matrix.grad = torch.from_numpy(gradients[name].copy())


def test_each_engine_goes_on_from_the_others_state(base: Path, part_of: Parts) -> None:
    run = settings(aggregate_every=4)
    batches = [sequences(5, 8)]

    def trained(engine: Engine, steps: int) -> Engine:
        for _ in range(steps):
            step(engine, batches)
            engine.take_step(1e-2)
        return engine

    def of_torch() -> Engine:
        return TorchEngine(PretrainedModel(base), run, "cpu", "float32")

    def of_onnxruntime() -> Engine:
        return OnnxEngine(part_of(run), run)

    begin = adapter_of(of_torch())
    expected = of_torch()
    expected.load_adapter(begin)
    trained(expected, 4)
    for first, second in ((of_torch, of_onnxruntime), (of_onnxruntime, of_torch)):
        one, other = first(), second()
        one.load_adapter(begin)
        other.restore(trained(one, 2).state())
        assert_close(trained(other, 2).adapter(), expected.adapter())


def test_restored_engine_goes_on_to_the_bit(part_of: Parts) -> None:
    run = settings(aggregate_every=4, lora_dropout=0.1)
    part, batches = part_of(run), [sequences(*RAGGED)]
    engine, other = OnnxEngine(part, run), OnnxEngine(part, run)
    engine.load_adapter(adapter_of(engine))
    step(engine, batches)
    engine.take_step(1e-2)
    state = engine.state()
    other.restore(state)
    for each in (engine, other):
        step(each, batches)
        each.take_step(1e-2)
    assert all(np.array_equal(engine.state()[name], other.state()[name]) for name in state)
    assert not all(np.array_equal(engine.state()[name], state[name]) for name in state), "the state is no copy"
    other.restore(state)
    other.forget()
    assert set(other.state()) == {f"adapter/{name}" for name in other.adapter()}


def test_state_of_another_part_is_refused(part_of: Parts) -> None:
    run = settings(aggregate_every=4)
    engine = OnnxEngine(part_of(run), run)
    step(engine, [sequences(4)])
    engine.take_step(1e-2)
    whole = engine.state()
    for name in ("optimiser/0/exp_avg", "optimiser/1/step", next(iter(whole))):
        with pytest.raises(AdapterError, match="not fit"):
            engine.restore({other: array for other, array in whole.items() if other != name})
    with pytest.raises(AdapterError, match=r"not fit: it has 0/exp_avg in the shape \(3, 3\), expected \(2, 32\)"):
        engine.restore({**whole, "optimiser/0/exp_avg": np.zeros((3, 3), np.float32)})


def test_server_takes_the_steps_of_short_rounds(part_of: Parts) -> None:
    run = settings()
    with pytest.raises(RuntimeError, match="the server takes it"):
        OnnxEngine(part_of(run), run).take_step(1e-3)


# The adapter


def test_adapter_that_does_not_fit_is_refused_and_nothing_changes(part_of: Parts) -> None:
    run = settings()
    engine = OnnxEngine(part_of(run), run)
    right = adapter_of(engine)
    engine.load_adapter(right)
    first = next(iter(right))
    for wrong, message in (
        ({**right, "other": right[first]}, "other and 0 more are missing or unknown"),
        ({name: matrix for name, matrix in right.items() if name != first}, "and 0 more are missing"),
        ({**right, first: right[first][:1]}, r"has shape \[1, 32\], expected \[2, 32\]"),
    ):
        with pytest.raises(AdapterError, match=message):
            engine.load_adapter({name: 2 * matrix for name, matrix in wrong.items()})
        assert all(np.array_equal(engine.adapter()[name], right[name]) for name in right)


# A step


def test_gradients_are_zero_where_nothing_was_computed_and_interrupted_steps_are_forgotten(part_of: Parts) -> None:
    run = settings(cut_layer=2)
    engine = OnnxEngine(part_of(run), run)
    engine.load_adapter(adapter_of(engine))
    _, expected = step(engine, [sequences(5)])
    engine.begin_step()
    assert not any(gradient.any() for gradient in engine.gradients().values())
    engine.forward(sequences(7), SEED)
    engine.backward(gradient_for(engine.forward(sequences(7), SEED)))
    _, found = step(engine, [sequences(5)])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(RuntimeError, match="needs a forward"):
        engine.backward(gradient_for(np.zeros((5, 32))))


def test_the_same_calls_give_the_same_bits_in_every_process(part_of: Parts) -> None:
    """And in a process where torch cannot be imported."""
    run = settings(cut_layer=3, lora_targets=EVERYTHING, lora_dropout=0.1)
    part = part_of(run)
    program = f"""
import sys
sys.modules["torch"] = sys.modules["safetensors"] = sys.modules["onnx"] = None
sys.path[:0] = [{str(REPOSITORY / "tests")!r}]
import hashlib
from pathlib import Path
import numpy as np
from usual_settings import settings
from edge_client.data import Sample, pack
from edge_client.onnx_engine import OnnxEngine
from edge_client.part.device_part import DevicePart
run = settings(cut_layer=3, lora_targets={EVERYTHING}, lora_dropout=0.1)
engine = OnnxEngine(DevicePart(Path({str(part.files.path)!r})), run)
source = np.random.default_rng(3)
engine.load_adapter({{n: source.normal(0, 0.2, m.shape).astype(np.float32) for n, m in engine.adapter().items()}})
for _ in range(2):
    engine.begin_step()
    batch = pack([Sample(np.arange(n + 1, dtype=np.int32), 1) for n in {RAGGED}])
    values = engine.forward(batch, 5)
    engine.backward(values)
    digest = hashlib.sha256(values)
    for gradient in engine.gradients().values():
        digest.update(gradient)
    print(digest.hexdigest())
"""
    lines = [
        line
        for _ in range(2)
        for line in subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=REPOSITORY
        ).stdout.splitlines()
    ]
    assert len(lines) == 4
    assert len(set(lines)) == 1


def test_one_long_sequence_has_a_grid_of_its_own() -> None:
    batch = sequences(*RAGGED)
    assert len(grids(batch.lengths, 32)) > 1
    assert len(grids(batch.lengths, 768)) == 1
    assert len(grids(sequences(8, 8, 8, 9, 1000).lengths, 768)) == 2
    assert [len(grid.rows) for grid in grids(sequences(*[20] * 25).lengths, 768)] == [260, 240]
    assert [grid.row_of_cell.shape for grid in grids(sequences(*[700] * 4).lengths, 768)] == [(1, 700)] * 4


@pytest.mark.parametrize("width", [32, 768])
def test_grids_show_every_row_of_a_batch_once(width: int) -> None:
    batch = sequences(*RAGGED)
    found = grids(batch.lengths, width)
    assert sorted(row for grid in found for row in grid.rows.tolist()) == list(range(len(batch.tokens)))
    positions = np.concatenate([np.arange(length) for length in batch.lengths])
    for grid in found:
        assert np.array_equal(grid.positions, positions[grid.rows])
        assert np.array_equal(grid.row_of_cell.ravel()[grid.cell_of_row], np.arange(len(grid.rows)))
        assert np.array_equal(np.flatnonzero(grid.is_token), grid.cell_of_row)
        assert set(grid.row_of_cell.ravel().tolist()) == set(range(len(grid.rows)))
    assert grids(sequences().lengths, width) == []


# What is wrong


def test_adapter_that_has_diverged_is_told_from_a_model_that_has_no_finite_activations(base: Path, part_of: Parts) -> None:
    run = settings()
    part = part_of(run)
    engine = OnnxEngine(part, run)
    engine.load_adapter({name: np.full_like(matrix, 1e30) for name, matrix in engine.adapter().items()})
    for compute in (lambda: engine.forward(sequences(5), SEED), lambda: engine.infer(sequences(5))):
        with pytest.raises(TrainingDiverged, match="try a lower --lr"):
            compute()
    path = part.files.path / "block-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4096] + np.full(1024, np.nan, np.float32).tobytes())
    with pytest.raises(ModelError, match="without an adapter"):
        OnnxEngine(part, run).infer(sequences(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut_layer": 2}, "has cut layer 1, the run has 2"),
        ({"lora_rank": 3}, "has LoRA rank 2, the run has 3"),
        ({"lora_alpha": 8.0}, "has LoRA alpha 4.0, the run has 8.0"),
        ({"lora_dropout": 0.5}, "has LoRA dropout 0.0, the run has 0.5"),
        ({"lora_targets": ("c_attn", "c_fc")}, "has LoRA targets c_attn, the run has c_attn, c_fc"),
        ({"precision": "float64"}, "the run computes in float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_part_of_another_run_is_refused_in_one_sentence(part_of: Parts, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        OnnxEngine(part_of(settings()), settings(**changes))
