"""Exported graphs of every family, and every option of theirs, against transformers and PEFT."""

from pathlib import Path

import numpy as np
import pytest
import reference
from family_models import OPTIONS, make_family_model
from onnx_reference import decode, exported, largest_difference, left_padded, logits_of, random_ids

from export import export_onnx
from export.attention import ATTENTIONS
from split_model import PretrainedModel


@pytest.fixture(scope="module", params=[option for option in OPTIONS if not option.startswith("gpt2")])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("base"), request.param)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_merged_adapter_gives_the_logits_of_peft(base: Path, tmp_path: Path, attention: str) -> None:
    targets = PretrainedModel(base).config.lora_targets
    adapter = reference.make_adapter(base, tmp_path / "adapter", targets=targets)
    export_onnx(str(base), tmp_path / "out", adapter=adapter, precisions=["fp32"], attention=attention)
    ids, mask = random_ids(600, 2, 40), left_padded([40, 23])
    expected = logits_of(reference.load_peft(base, adapter).eval(), ids, mask)
    found = decode(exported(tmp_path / "out"), ids, mask, 34)
    assert largest_difference(found, expected, mask) < 1e-5 * np.abs(expected).max()


def test_adapter_of_its_own_and_two_parts_give_the_same(base: Path, tmp_path: Path) -> None:
    targets = PretrainedModel(base).config.lora_targets
    adapter = reference.make_adapter(base, tmp_path / "adapter", targets=targets)
    ids, mask = random_ids(600, 2, 30), left_padded([30, 23])
    expected = logits_of(reference.load_peft(base, adapter).eval(), ids, mask)
    export_onnx(str(base), tmp_path / "slots", adapter=adapter, precisions=["fp32"], keep_adapter=True)
    export_onnx(str(base), tmp_path / "parts", adapter=adapter, precisions=["fp32"], split=2)
    for found in (exported(tmp_path / "slots", with_adapter=True), exported(tmp_path / "parts")):
        assert largest_difference(decode(found, ids, mask, 25), expected, mask) < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("precision", "most"), [("fp16", 4e-3), ("q8", 0.05), ("q4", 0.5)])
def test_precision_moves_logits_no_further_than_its_rounding(base: Path, tmp_path: Path, precision: str, most: float) -> None:
    export_onnx(str(base), tmp_path / "out", precisions=[precision])
    ids = random_ids(600, 2, 30)
    expected = logits_of(reference.load_base(base), ids)
    found = decode(exported(tmp_path / "out", precision), ids, np.ones_like(ids), 25)
    assert 1e-6 < largest_difference(found, expected) / np.abs(expected).max() < most


def test_checkpoint_that_is_exported_is_one_that_transformers_loads(base: Path, tmp_path: Path) -> None:
    export_onnx(str(base), tmp_path / "out", precisions=["q4"])
    ids = random_ids(600, 2, 30)
    found, expected = (logits_of(reference.load_base(folder), ids) for folder in (tmp_path / "out", base))
    assert np.array_equal(found, expected)
