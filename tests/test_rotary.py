"""Angles of rotary positions, and what config.json says of them, held to transformers."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from family_models import OPTIONS, make_family_model

from split_model.config_file import ConfigFile
from split_model.families import read_config
from split_model.packing import Packing
from split_model.placement import Placement
from split_model.rotary import Rotary, Rotation, read_rotary, rotate
from storage import ModelError

CPU = torch.device("cpu")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.5}
YARN = {"rope_type": "yarn", "factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "of older files": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "nothing in the older place": {
        "rope_scaling": {},
        "rope_parameters": {**LINEAR, "rope_theta": 2e4},
    },
    "null in the older place": {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "both places": {
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
    },
    "dynamic": {"rope_theta": 3e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.3}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}},
    "llama3, small": {"rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64}},
    "yarn": {"rope_theta": 1e6, "rope_scaling": {**YARN, "original_max_position_embeddings": 32768}},
    "yarn, positions of the model": {"rope_scaling": YARN, "original_max_position_embeddings": 4096},
    "yarn, not truncated": {
        "rope_scaling": {**YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 100}
    },
    "yarn, a step": {"rope_scaling": {**YARN, "beta_fast": 1.01, "beta_slow": 1.0, "original_max_position_embeddings": 2}},
    "yarn, amplitudes": {
        "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3, "original_max_position_embeddings": 4096}
    },
    "yarn, amplitude": {"rope_scaling": {**YARN, "attention_factor": 0.7, "original_max_position_embeddings": 4096}},
}


def config_with(folder: Path, said: dict[str, Any], head_width: int = 64) -> Path:
    """A Llama's config.json; its weights are nowhere."""
    shape = {"hidden_size": 4 * head_width, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    rest = {"model_type": "llama", "vocab_size": 100, "eos_token_id": 0, "max_position_embeddings": 131_072}
    path = folder / "config.json"
    path.write_text(json.dumps({**shape, **rest, **said}))
    return path


def assert_are_those_of_transformers(config_file: Path, longest: int) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = read_config(config_file).rotary
    assert rotary is not None
    reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(config_file.parent))
    assert rotary.frequencies().tobytes() == reference.inv_freq.numpy().tobytes()
    assert rotary.amplitude == reference.attention_scaling
    lengths = [longest, 3]
    tables = Rotation(rotary, Placement(torch.float32, CPU)).tables(Packing(lengths, CPU))
    assert tables is not None
    positions = torch.cat([torch.arange(length) for length in lengths])
    for table, expected in zip(tables, reference(torch.zeros(()), positions[None]), strict=True):
        assert torch.equal(table.squeeze(1), expected[0, :, : rotary.width // 2])


@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("said", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_those_of_transformers_to_the_bit(tmp_path: Path, said: dict[str, Any], head_width: int) -> None:
    assert_are_those_of_transformers(config_with(tmp_path, said, head_width), 100_000)


LONGROPE = {"type": "longrope", "short_factor": [1 + 0.07 * i for i in range(32)], "long_factor": [1.3 + i for i in range(32)]}
LONG: dict[str, dict[str, Any]] = {
    "as published": {"original_max_position_embeddings": 4096},
    "positions in the scaling": {"original_max_position_embeddings": 2048, "rope_scaling": {**LONGROPE, "factor": 40.0}},
    "positions of the family": {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 512}},
    "not longer": {"max_position_embeddings": 4096},
    "amplitude": {"rope_scaling": {**LONGROPE, "attention_factor": 1.7}},
    "partly": {"partial_rotary_factor": 0.5, "hidden_size": 512},
}


@pytest.mark.parametrize("said", LONG.values(), ids=LONG)
def test_frequencies_of_longrope_are_those_of_transformers_up_to_the_pretrained_positions(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    path = config_with(tmp_path, {"model_type": "phi3", "rope_scaling": LONGROPE, **said})
    config = read_config(path)
    assert config.num_positions == said.get("original_max_position_embeddings", 4096)
    assert_are_those_of_transformers(path, config.num_positions)


def test_turned_heads_are_turned_back_by_the_gradient() -> None:
    """A rotation is orthogonal: what is turned keeps its length, and its gradient is the upstream one, turned back."""
    torch.manual_seed(0)
    tables = Rotation(Rotary(width=6, base=100.0), Placement(torch.float64, CPU)).tables(Packing([9, 4], CPU))
    assert tables is not None
    heads = torch.randn(13, 3, 8, dtype=torch.float64, requires_grad=True)
    turned = rotate(heads, tables)
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1), rtol=1e-6, atol=0)  # angles are in float32
    assert torch.equal(turned[..., 6:], heads[..., 6:])
    assert torch.autograd.gradcheck(lambda given: rotate(given, tables), heads)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown scaling": (
        {"rope_scaling": {"type": "longrope"}},
        'rope_scaling.type is "longrope"; it can be default, linear, llama3, yarn, dynamic',
    ),
    "unknown scaling, newer": (
        {"rope_parameters": {"rope_type": "su"}},
        'rope_parameters.rope_type is "su"; it can be default',
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "factor of nothing": (
        {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
        "rope_parameters.factor is 2.0, an option that is not known here",
    ),
    "no number": (
        {"rope_parameters": {"rope_theta": "1e6"}},
        'rope_theta is "1e6"; a positive number is expected',
    ),
    "partly": (
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 turns 32 of 64 elements of a head; all",
    ),
    "the wrong way": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, "begins to scale at 1 and ends at 0.5 turns"),
    "divisors of other heads": (
        {"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [1.0] * 31}},
        "; a list of 32 positive numbers is expected",
    ),
    "a divisor of 0": (
        {"model_type": "phi3", "rope_scaling": {**LONGROPE, "short_factor": [0.0] * 32}},
        "rope_scaling.short_factor is [0.0, 0.0",
    ),
    "no positions": (
        {"model_type": "phi3", "rope_scaling": LONGROPE, "original_max_position_embeddings": 1},
        "original_max_position_embeddings is 1; a whole number from 2",
    ),
    "a list": ({"rope_scaling": [1.0]}, "rope_scaling is [1.0]; an object is expected"),
}


@pytest.mark.parametrize(("said", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_turned_is_refused_by_name(tmp_path: Path, said: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(config_with(tmp_path, said))
    assert sentence in str(caught.value)


def test_family_that_knows_fewer_scalings_refuses_the_others(tmp_path: Path) -> None:
    file = ConfigFile(config_with(tmp_path, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    with pytest.raises(ModelError, match=r'rope_scaling\.type is "dynamic"; it can be default$'):
        read_rotary(file, 64, 100, scalings=("default",))


@pytest.mark.parametrize("option", [option for option, (family, _) in OPTIONS.items() if family != "gpt2"])
def test_settings_come_back_from_what_transformers_is_told(tmp_path: Path, option: str) -> None:
    rotary = read_config(make_family_model(tmp_path, option) / "config.json").rotary
    assert rotary is not None
    for head_width in (rotary.width, 2 * rotary.width):
        path = config_with(tmp_path, {"rope_parameters": rotary.settings(head_width)})
        again = read_rotary(ConfigFile(path), head_width, 1024, scalings=(rotary.scaling,), may_be_partial=True)
        assert again == rotary
        assert numpy.array_equal(again.frequencies(), rotary.frequencies())
