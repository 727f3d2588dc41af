"""
Centralised LoRA as everybody does it: transformers + PEFT in one process, on padded batches. Shares no code with the packages.

It is the definition of "right" for the parity tests, and contestant (a) of the benchmarks.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

IGNORED = -100
Pair = tuple[str, str]
Sample = tuple[list[int], int]
"""Token ids, and how many of the first have no label."""


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if dtype == torch.float64:
        _compute_norms_in_float64(model)
    return model


def _compute_norms_in_float64(model: torch.nn.Module) -> None:
    """transformers' RMS norms round to float32 whatever the model's dtype is; torch's own do not."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)


def encode(pairs: Iterable[Pair], folder: Path, max_length: int = 512) -> list[Sample]:
    """ids(prompt) + [eos] + ids(" " + completion) + [eos]; the completion and its end are learnt."""
    end = AutoConfig.from_pretrained(folder).eos_token_id
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = [(tokenizer.encode(p.strip()).ids, tokenizer.encode(" " + c.strip()).ids) for p, c in pairs]
    else:
        slow = AutoTokenizer.from_pretrained(folder)
        ids = [(slow(p.strip()).input_ids, slow(" " + c.strip()).input_ids) for p, c in pairs]
    return [([*prompt, end, *completion, end][:max_length], len(prompt) + 1) for prompt, completion in ids]


def pad(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and labels."""
    longest = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, unlabelled) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, unlabelled : len(tokens)] = torch.tensor(tokens[unlabelled:])
    return ids, labels


def mean_loss(model: Any, samples: Sequence[Sample], label_smoothing: float = 0.0) -> torch.Tensor:
    """Nats per labelled token. Smoothed it is transformers' LabelSmoother, which adds up in float32 whatever the logits are."""
    ids, labels = pad(samples)
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    alpha: int = 8,
    targets: Sequence[str],
    rslora: bool = False,
    blocks: Sequence[int] | None = None,
) -> Path:
    """A PEFT folder whose B is not zero, so that everything is learnt from the first step on; of all blocks or of some."""
    torch.manual_seed(seed)
    whole = load_base(base)
    turned = any(isinstance(module, Conv1D) for module in whole.modules())
    more: dict[str, Any] = {"fan_in_fan_out": turned, "use_rslora": rslora, "task_type": "CAUSAL_LM"}
    if blocks is not None:
        more["layers_to_transform"] = list(blocks)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **more)
    model = get_peft_model(whole, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


def load_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return PeftModel.from_pretrained(load_base(base, dtype), adapter, autocast_adapter_dtype=False, **options).to(dtype)


def train(
    base: Path,
    adapter: Path,
    union_batches: Iterable[Sequence[Sample]],
    *,
    dtype: torch.dtype,
    lr: float,
    schedule: Any = None,
    max_grad_norm: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses, final adapter under PEFT's names, and the model."""
    model = load_peft(base, adapter, dtype, is_trainable=True)
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(matrices.values(), lr=lr, weight_decay=0.01)
    scheduler = schedule(optimiser) if schedule else None
    losses = []
    for samples in union_batches:
        loss = mean_loss(model, samples, label_smoothing)
        loss.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(matrices.values(), max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses, {name.replace(".default", ""): matrix.detach() for name, matrix in matrices.items()}, model


@torch.no_grad()
def perplexity(model: Any, samples: Sequence[Sample], batch_size: int = 16) -> float:
    """Token-weighted."""
    summed, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        labelled = sum(len(tokens) - unlabelled for tokens, unlabelled in batch)
        summed, count = summed + mean_loss(model, batch).item() * labelled, count + labelled
    return math.exp(summed / count)


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all matrices together."""
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - expected[name].double()).square().sum() for name in expected)
    return math.sqrt(difference / sum(matrix.double().square().sum() for matrix in expected.values()))


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in expected)
