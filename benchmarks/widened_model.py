"""
A model of GPT-2 small's shape that speaks as gpt2-mini does: 12 blocks, d=768, 12 heads, GPT-2's vocabulary.

Everything of gpt2-mini is there three times side by side: elements of a hidden state, heads, and units of the MLPs. What
reads a hidden state has its weights divided unequally among the three copies, and the final norm is divided by three, because
the tied head adds them up; so the wide model computes the small one's logits. Then all matrices get noise, and the three copies
are no longer equal. The model's perplexity on E2E is printed before and after.

    .venv/bin/python benchmarks/widened_model.py --output gpt2-widened
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from harness import SHARED
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TIMES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "gpt2-mini")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.05, help="of each matrix, relative to its elements' root mean square")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    small = {name: tensor.float() for name, tensor in load_file(options.model / "model.safetensors").items()}
    wide = {name: widened(name, tensor, options.noise, generator) for name, tensor in small.items()}
    options.output.mkdir(parents=True, exist_ok=True)
    for file in ("merges.txt", "tokenizer_config.json", "vocab.json"):
        shutil.copyfile(options.model / file, options.output / file)
    config = json.loads((options.model / "config.json").read_text())
    config |= {"n_embd": TIMES * config["n_embd"], "n_head": TIMES * config["n_head"]}
    (options.output / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: tensor.half().contiguous() for name, tensor in wide.items()}
    save_file(tensors, options.output / "model.safetensors", {"format": "pt"})
    for folder in (options.model, options.output):
        print(f"{folder}: perplexity {perplexity(folder):.2f} on every 60th completion of E2E's valid.txt")


def widened(name: str, tensor: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """A tensor of the wide model; linear layers are stored as (in, out)."""
    if "ln_f" in name:
        return tensor.tile(TIMES) / TIMES
    if name.endswith("c_attn.weight"):
        return noisy(torch.cat([divided(part.tile(1, TIMES), generator) for part in tensor.chunk(3, 1)], 1), noise, generator)
    if name.endswith("c_attn.bias"):
        return torch.cat([part.tile(TIMES) for part in tensor.chunk(3)])
    if tensor.dim() == 1:
        return tensor.tile(TIMES)
    if "wte" in name or "wpe" in name:
        return noisy(tensor.tile(1, TIMES), noise, generator)
    return noisy(divided(tensor.tile(1, TIMES), generator), noise, generator)


def divided(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """(in, out) -> (TIMES x in, out): a weight's parts add up to it."""
    shares = torch.rand(TIMES, *matrix.shape, generator=generator)
    return (shares / shares.sum(0) * matrix).flatten(0, 1)


def noisy(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return matrix + noise * matrix.pow(2).mean().sqrt() * torch.randn(matrix.shape, generator=generator)


@torch.no_grad()
def perplexity(folder: Path) -> float:
    """Of completions, token-weighted."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    total, tokens = 0.0, 0
    for line in (SHARED / "data" / "e2e" / "valid.txt").read_text(encoding="utf-8").splitlines()[::60]:
        prompt, completion = (part.strip() for part in line.split("||", 1))
        before, after = [*tokenizer.encode(prompt), model.config.eos_token_id], tokenizer.encode(f" {completion}")
        after.append(model.config.eos_token_id)
        labels = torch.tensor([[-100] * len(before) + after])
        total += float(model(torch.tensor([before + after]), labels=labels).loss) * len(after)
        tokens += len(after)
    return math.exp(total / tokens)


if __name__ == "__main__":
    main()
