"""A device's graphs of every family, and every option of theirs: what they compute is what torch and transformers compute."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from device_parts import make_part
from family_models import OPTIONS, make_family_model
from usual_settings import settings

from edge_client.data import Batch, Sample, pack
from edge_client.onnx_engine import OnnxEngine
from edge_client.part.device_part import DevicePart
from edge_client.torch_engine import TorchEngine
from graphs import Adaptation
from graphs.layers import Rotation
from graphs.part_graph import PartGraph
from protocol import Array, Tensors
from split_model import PretrainedModel
from split_model.rotary import Rotary, rotate
from storage import EDGE_WEIGHTS

TOLERANCE = 1e-5
LENGTHS = (3, 1, 40, 17, 5, 41)  # longer than a window; several grids
SEED = 1234


@pytest.fixture(scope="module", params=OPTIONS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("base"), request.param)


def batch_of(*lengths: int) -> Batch:
    source = np.random.default_rng(sum(lengths))
    return pack([Sample(source.integers(0, 600, length + 1).astype(np.int32), (length + 1) // 2) for length in lengths])


def step(engine: OnnxEngine | TorchEngine, batch: Batch) -> tuple[Array, Tensors]:
    engine.begin_step()
    activations = engine.forward(batch, SEED)
    upstream = np.random.default_rng(7).normal(0, 1, activations.shape).astype(np.float32)
    engine.backward(upstream.astype(activations.dtype))
    engine.end_step(7)
    return activations, engine.gradients()


def relative(found: Array, expected: Array) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_step_on_all_layers_is_that_of_the_engine_with_torch(base: Path, tmp_path: Path, dropout: float) -> None:
    """In float64, for in float32 torch is as far from it."""
    model = PretrainedModel(base)
    run = settings(lora_targets=model.config.lora_targets, cut_layer=3, lora_dropout=dropout)
    theirs, ours = (
        TorchEngine(model, replace(run, precision="float64"), "cpu", "float64"),
        OnnxEngine(DevicePart(make_part(tmp_path / "part", base, run)), run),
    )
    source = np.random.default_rng(3)
    adapter = {name: source.normal(0, 0.2, matrix.shape).astype(np.float32) for name, matrix in theirs.adapter().items()}
    theirs.load_adapter({name: matrix.astype(np.float64) for name, matrix in adapter.items()})
    ours.load_adapter(adapter)
    batch = batch_of(*LENGTHS)
    (expected, expected_gradients), (found, gradients) = step(theirs, batch), step(ours, batch)
    assert relative(found, expected) < TOLERANCE
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative(gradients[name], gradient) < TOLERANCE, name
    assert relative(ours.infer(batch), theirs.infer(batch)) < TOLERANCE


@pytest.mark.parametrize("precision", EDGE_WEIGHTS)
def test_stored_precision_moves_activations_no_further_than_its_rounding(base: Path, tmp_path: Path, precision: str) -> None:
    model = PretrainedModel(base)
    run = settings(lora_targets=model.config.family.usual_targets, cut_layer=3)
    ours = OnnxEngine(DevicePart(make_part(tmp_path / "part", base, run, precision)), run)
    moved = relative(ours.infer(batch_of(*LENGTHS)), TorchEngine(model, run, "cpu", "float32").infer(batch_of(*LENGTHS)))
    most = {"float32": TOLERANCE, "float16": 2e-3, "int8": 0.08}[precision]
    least = {"float32": 0, "float16": TOLERANCE, "int8": 1e-3}[precision]
    assert least <= moved < most


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_device_takes_part_of_heads_as_wide_as_those_of_pretrained_models(tmp_path: Path, head_dim: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make_family_model(base, "llama", head_dim=head_dim)
    run = settings(lora_targets=("q_proj",), cut_layer=3)
    ours = OnnxEngine(DevicePart(make_part(tmp_path / "part", base, run)), run)
    expected = TorchEngine(PretrainedModel(base), run, "cpu", "float32").infer(batch_of(*LENGTHS))
    assert relative(ours.infer(batch_of(*LENGTHS)), expected) < TOLERANCE


def test_only_a_part_whose_blocks_ask_for_positions_is_none_for_older_devices(base: Path, tmp_path: Path) -> None:
    part = DevicePart(make_part(tmp_path / "part", base, settings(lora_targets=PretrainedModel(base).config.lora_targets[:1])))
    graphs = part.open()
    training = graphs.training
    assert training is not None
    blocks = (graphs.inference, training.forward, training.backward, training.first_backward)
    assert {"positions" in graph.inputs for graph in blocks} == {part.description.format == 2}


def test_heads_are_turned_by_far_positions_as_torch_turns_them(tmp_path: Path) -> None:
    """131,071 radians are many turns: what a runtime makes of them depends on how it takes the turns away."""
    import onnxruntime

    rotary, positions = Rotary(width=16, base=5e5), np.array([0, 1, 1000, 8191, 65_537, 131_071])
    graph = PartGraph(tmp_path / "turn.onnx", Adaptation(layers={}, rank=1, alpha=1.0, dropout=0.0), trains=False)
    heads = graph.given("heads", np.float32, ["sequences", 2, "columns", 20])
    graph.name_output("turned", Rotation(graph, rotary, 20).turned(heads), np.float32, ["sequences", 2, "columns", 20])
    graph.write("turn")
    values = np.random.default_rng(0).normal(size=(1, 2, 6, 20)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "turn.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"heads": values, "positions": positions, "row_of_cell": np.arange(6)[None]})
    angles = positions.astype(np.float32)[:, None] * rotary.frequencies()  # float32, as transformers computes them
    tables = (torch.from_numpy(turn(angles.astype(np.float64)))[:, None] for turn in (np.cos, np.sin))
    expected = rotate(torch.from_numpy(values[0]).double().transpose(0, 1), tuple(tables)).transpose(0, 1)
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=0, atol=1e-6)
