"""A run on a model of any family, with any of its options, is centralised LoRA by transformers + PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from family_models import OPTIONS, make_family_model
from test_parity import assert_equals_centralised
from torch.nn import functional as F

from split_model import EdgePart, LoraConfig, PretrainedModel, ServerPart, load_adapter

LENGTHS = (40, 17, 3, 200, 1)  # longer than a window, and than the positions that a scaling was pretrained for
LOGITS_TOLERANCE = 1e-5
ONE_OF_EACH_FAMILY = ("llama", "mistral-window", "qwen2-windows", "qwen3-biases", "phi3-partial", "starcoder2")
"""GPT-2 has a file of its own, test_parity.py."""


@pytest.fixture(scope="module", params=OPTIONS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_model(tmp_path_factory.mktemp("base"), request.param)


def parts(base: Path, cut_layer: int, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> tuple[EdgePart, ServerPart]:
    model, where = PretrainedModel(base), {"weight_dtype": dtype, "device": torch.device("cpu")}
    return EdgePart(model, cut_layer, lora, **where), ServerPart(model, cut_layer, lora, **where)  # type: ignore[arg-type]


def texts_for(base: Path) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    source, size = np.random.default_rng(0), PretrainedModel(base).config.vocabulary_size
    return [source.integers(0, size, length) for length in LENGTHS]


@pytest.mark.parametrize("cut_layer", [1, 3])
def test_logits_are_those_of_transformers(base: Path, cut_layer: int) -> None:
    edge, server = parts(base, cut_layer, LoraConfig(targets=PretrainedModel(base).config.family.usual_targets))
    texts, whole = texts_for(base), reference.load_base(base)
    with torch.no_grad():
        found = server.logits(edge(np.concatenate(texts), LENGTHS), LENGTHS)
        expected = torch.cat([whole(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts])
    assert float((found - expected).abs().max()) <= LOGITS_TOLERANCE * float(expected.abs().max())


def of_transformers(base: Path, adapter: Path, texts: list[Any], dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, Any]]:
    """Losses of all tokens but the first ones, and the gradients of LoRA by their sum. Matrices of LoRA are in float32."""
    whole = reference.load_peft(base, adapter, torch.float32, is_trainable=True)
    for name, parameter in whole.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    rows = [whole(input_ids=torch.from_numpy(text)[None]).logits[0, :-1].float() for text in texts]
    labels = torch.from_numpy(np.concatenate([text[1:] for text in texts]))
    losses = F.cross_entropy(torch.cat(rows), labels, reduction="none")
    torch.autograd.backward(losses.sum())
    gradients = {n.replace(".default", ""): p.grad for n, p in whole.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def test_bfloat16_is_as_near_to_exact_losses_and_gradients_as_that_of_transformers(base: Path, tmp_path: Path) -> None:
    """Both round; but what flows from block to block is in float32 here."""
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    for file in base.iterdir():
        (rounded / file.name).write_bytes(file.read_bytes())
    reference.load_base(base, torch.bfloat16).save_pretrained(rounded)
    config = PretrainedModel(rounded).config
    lora = LoraConfig(rank=4, alpha=8.0, targets=config.lora_targets)
    adapter = reference.make_adapter(rounded, tmp_path / "adapter", targets=lora.targets)
    texts = [text for text in texts_for(base) if len(text) > 1]
    exact, expected = of_transformers(rounded, adapter, texts, torch.float32)
    theirs, of_theirs = of_transformers(rounded, adapter, texts, torch.bfloat16)

    edge, server = parts(rounded, 2, lora, torch.bfloat16)
    matrices = load_adapter(adapter, config, lora)
    for part in (edge, server):
        part.load_adapter({name: matrices[name] for name in part.matrices()})
    tokens, counts = np.concatenate([text[:-1] for text in texts]), [len(text) - 1 for text in texts]
    activations = edge(tokens, counts)
    leaf = activations.detach().requires_grad_()
    losses = server.losses(leaf, counts, counts, torch.from_numpy(np.concatenate([text[1:] for text in texts])))
    torch.autograd.backward(losses.sum())
    torch.autograd.backward(activations, leaf.grad)
    found = edge.gradients() | server.gradients()

    assert float((losses.detach() - exact).norm()) <= float((theirs - exact).norm())
    error, of_error = (reference.relative_difference(each, expected) for each in (found, of_theirs))
    assert error <= 1.5 * of_error  # which roundings cancel out is luck


@pytest.mark.parametrize("option", OPTIONS)
def test_run_of_two_devices_on_all_layers_equals_centralised_lora_in_float64(tmp_path: Path, option: str) -> None:
    (base := tmp_path / "base").mkdir()
    make_family_model(base, option, num_hidden_layers=2)
    assert_equals_centralised(
        base,
        tmp_path,
        batch_sizes=[1, 2],
        steps=50 if option in ONE_OF_EACH_FAMILY else 20,
        dtype="float64",
        cut_layer=1,
        micro_batches=1,
        lora_targets=PretrainedModel(base).config.lora_targets,
    )


@pytest.mark.parametrize("option", ONE_OF_EACH_FAMILY)
def test_run_of_a_device_without_torch_equals_centralised_lora_in_float32(tmp_path: Path, option: str) -> None:
    """The device's graphs of every option are held to torch in test_family_graphs.py."""
    (base := tmp_path / "base").mkdir()
    make_family_model(base, option, num_hidden_layers=3)
    assert_equals_centralised(
        base,
        tmp_path,
        batch_sizes=[2, 2],
        steps=20,
        dtype="float32",
        engines=("onnxruntime", "torch"),
        cut_layer=2,
        micro_batches=1,
        lora_targets=PretrainedModel(base).config.lora_targets,
    )
