"""A run on a model of any family, with any of its options, is centralised LoRA by transformers + PEFT."""

from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from family_models import OPTIONS, make_family_model
from test_parity import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, assert_equals_centralised

from split_model import EdgePart, LoraConfig, PretrainedModel, ServerPart

LENGTHS = (40, 17, 3, 200, 1)  # longer than a window, and than the positions that a scaling was pretrained for
LOGITS_TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=OPTIONS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("base"), request.param)


@pytest.mark.parametrize("cut_layer", [1, 3])
def test_logits_are_those_of_transformers(base: Path, cut_layer: int) -> None:
    model, where = PretrainedModel(base), {"weight_dtype": torch.float32, "device": torch.device("cpu")}
    lora = LoraConfig(targets=model.config.family.usual_targets)
    edge, server = EdgePart(model, cut_layer, lora, **where), ServerPart(model, cut_layer, lora, **where)  # type: ignore[arg-type]
    source = np.random.default_rng(0)
    texts = [source.integers(0, model.config.vocabulary_size, length) for length in LENGTHS]
    whole = reference.load_base(base)
    with torch.no_grad():
        found = server.logits(edge(np.concatenate(texts), LENGTHS), LENGTHS)
        expected = torch.cat([whole(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts])
    assert float((found - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())


def test_run_of_two_devices_on_all_layers_equals_centralised_lora_in_float64(base: Path, tmp_path: Path) -> None:
    assert_equals_centralised(
        base,
        tmp_path,
        batch_sizes=[2, 3],
        steps=50,
        dtype="float64",
        tolerance=FLOAT64_TOLERANCE,
        cut_layer=2,
        lora_targets=PretrainedModel(base).config.lora_targets,
    )


def test_run_of_a_device_without_torch_equals_centralised_lora_in_float32(base: Path, tmp_path: Path) -> None:
    assert_equals_centralised(
        base,
        tmp_path,
        batch_sizes=[2, 2],
        steps=20,
        dtype="float32",
        tolerance=FLOAT32_TOLERANCE,
        engines=("onnxruntime", "torch"),
        cut_layer=1,
        lora_targets=PretrainedModel(base).config.lora_targets,
    )
