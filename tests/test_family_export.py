"""Exported graphs of every family, and every option of theirs, against transformers and PEFT."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import reference
import torch
from family_models import OPTIONS, make_family_model
from numpy.typing import NDArray
from onnx_reference import decode, exported, largest_difference, left_padded, logits_of, random_ids, rounded

from export import export_onnx, verify
from export.attention import ATTENTIONS
from export.precision import sensitive_layers
from split_model import PretrainedModel

pytestmark = pytest.mark.usefixtures("few_texts")

IDS, MASK = random_ids(600, 2, 24), left_padded([24, 17])
PREFILL = 20


@dataclass(kw_only=True)
class Model:
    """One of the options, and an adapter of all its linear layers."""

    base: Path
    adapter: Path
    adapted: NDArray[np.float32]
    """Logits of the base model with its adapter in PEFT, for `IDS` and `MASK`."""


@pytest.fixture(scope="module", params=[option for option in OPTIONS if not option.startswith("gpt2")])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    base = make_family_model(tmp_path_factory.mktemp("base"), request.param)
    targets = PretrainedModel(base).config.lora_targets
    adapter = reference.make_adapter(base, tmp_path_factory.mktemp("adapter"), targets=targets)
    adapted = logits_of(reference.load_peft(base, adapter).eval(), IDS, MASK)
    return Model(base=base, adapter=adapter, adapted=adapted)


def root_mean_square(difference: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(difference).mean()))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_merged_adapter_gives_the_logits_of_peft(model: Model, tmp_path: Path, attention: str) -> None:
    export_onnx(str(model.base), tmp_path / "out", adapter=model.adapter, precisions=["fp32"], attention=attention)
    found = decode(exported(tmp_path / "out"), IDS, MASK, PREFILL)
    assert largest_difference(found, model.adapted, MASK) < 1e-5 * np.abs(model.adapted).max()


@pytest.mark.parametrize(
    ("attention", "precision", "expected"), [("gqa", "fp32", 8), ("gqa", "fp16", 0), ("attn23", "fp32", 0), ("ops", "fp32", 0)]
)
def test_sum_and_its_norm_are_one_operator_where_there_is_one(
    tmp_path: Path, attention: str, precision: str, expected: int
) -> None:
    export_onnx(str(make_family_model(tmp_path, "llama")), tmp_path / "out", precisions=[precision], attention=attention)
    (path,) = (tmp_path / "out/onnx").glob("*.onnx")
    nodes = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    assert nodes.count("SkipSimplifiedLayerNormalization") == expected  # before each norm but the first


def test_adapter_of_its_own_and_two_parts_give_the_same(model: Model, tmp_path: Path) -> None:
    export_onnx(str(model.base), tmp_path / "slots", adapter=model.adapter, precisions=["fp32"], keep_adapter=True)
    export_onnx(str(model.base), tmp_path / "parts", adapter=model.adapter, precisions=["fp32"], split=2)
    for found in (exported(tmp_path / "slots", with_adapter=True), exported(tmp_path / "parts")):
        logits = decode(found, IDS, MASK, PREFILL)
        assert largest_difference(logits, model.adapted, MASK) < 1e-5 * np.abs(model.adapted).max()


def test_quantised_graph_is_the_model_with_rounded_weights(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activations in full precision: what rounding them costs is measured on a trained model."""
    monkeypatch.setattr("export.graph_weights.INTEGER_PRODUCTS", 1)
    export_onnx(str(model.base), tmp_path / "out", precisions=["q8", "q4"])
    for precision in ("q8", "q4"):
        expected = logits_of(rounded(model.base, tmp_path / "out", precision), IDS, MASK)
        found = decode(exported(tmp_path / "out", precision), IDS, MASK, PREFILL)
        assert largest_difference(found, expected, MASK) < 1e-5 * np.abs(expected).max()


def test_half_precision_is_as_near_as_that_of_transformers(model: Model, tmp_path: Path) -> None:
    export_onnx(str(model.base), tmp_path / "out", precisions=["fp16"])
    exact, theirs = (
        logits_of(reference.load_base(model.base, dtype), IDS).astype(np.float32) for dtype in (torch.float32, torch.float16)
    )
    ours = decode(exported(tmp_path / "out", "fp16"), IDS, np.ones_like(IDS), PREFILL)
    assert 0 < root_mean_square(ours - exact) < root_mean_square(theirs - exact)


def test_checkpoint_that_is_exported_is_one_that_transformers_loads(model: Model, tmp_path: Path) -> None:
    export_onnx(str(model.base), tmp_path / "out", precisions=["q4"])
    found, expected = (logits_of(reference.load_base(folder), IDS) for folder in (tmp_path / "out", model.base))
    assert np.array_equal(found, expected)


def test_every_runtime_is_told_the_tokens_that_end_a_text_for_transformers(tmp_path: Path) -> None:
    base, out = make_family_model(tmp_path, "llama", eos_token_id=[7, 0], bos_token_id=3), tmp_path / "out"
    settings = {"eos_token_id": [0, 11], "temperature": 0.6}
    (base / "generation_config.json").write_text(json.dumps(settings))
    export_onnx(str(base), out, precisions=["fp32"])
    written = {
        name: json.loads((out / f"{name}.json").read_text()) for name in ("splitlora", "generation_config", "genai_config")
    }
    assert (written["splitlora"]["end_token"], written["splitlora"]["stop_tokens"]) == (0, [11])
    assert written["generation_config"] == {"bos_token_id": 3, "eos_token_id": [0, 11], "temperature": 0.6}
    assert (written["genai_config"]["model"]["bos_token_id"], written["genai_config"]["model"]["eos_token_id"]) == (
        3,
        [0, 11],
    )
    assert reference.load_base(out).generation_config.eos_token_id == [0, 11]
    assert all(agreement.within_tolerance for agreement in verify(out))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("gpt2", {"attn.c_proj"}),
        ("llama", {"self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"}),
        ("phi3", {"self_attn.o_proj", "mlp.down_proj"}),
    ],
)
def test_layers_that_suffer_from_four_bits_have_eight(tmp_path: Path, option: str, expected: set[str]) -> None:
    assert sensitive_layers(PretrainedModel(make_family_model(tmp_path, option)).config) == expected
