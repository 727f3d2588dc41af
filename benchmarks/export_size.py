"""
What an export takes: time, memory and disk, for the shapes of known models with random weights.

Memory is that of `splitlora-export onnx` while it runs. Anonymous memory is what has to fit; pages of mapped files, the rest of
resident memory, are given back when somebody needs the room.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
from numpy.typing import NDArray

from edge_client.generation import process_memory
from export.checkpoint import write_checkpoint
from graphs import Weights
from split_model import ModelConfig
from split_model.families import read_config

GPT2 = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257, "eos_token_id": 50256}
SHAPES = {
    "GPT-2 small": {**GPT2, "n_layer": 12, "n_embd": 768, "n_head": 12},
    "GPT-2 XL, 1.6 billion": {**GPT2, "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "eos_token_id": 50256,  # of the tokenizer that lies beside the weights, which is no part of what is measured
    },
}


class RandomWeights(Weights):
    """Standard deviation 0.02."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = config.tensor_shapes
        self._generator = np.random.default_rng(0)

    def read(self, name: str) -> NDArray[np.float32]:
        return self._generator.standard_normal(self._shapes[name], np.float32) * np.float32(0.02)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        yield self.read(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "q8", "q4"])
    parser.add_argument("--scratch", help="a folder with 25 GB of room for the large ones (default: the system's)")
    options = parser.parse_args()
    rows = []
    for name in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            model, out = make_model(Path(scratch) / "model", SHAPES[name]), Path(scratch) / "out"
            for precision in options.precisions:
                command = f"onnx --model {model} --output {out} --overwrite --precision {precision}"
                seconds, resident, anonymous = watched([str(harness.PROGRAMS / "splitlora-export"), *command.split()])
                size = sum(json.loads((out / "splitlora.json").read_text())["precisions"][precision]["bytes"].values())
                cells = [name, precision, f"{size / 1e6:.1f} MB", f"{seconds:.0f} s", f"{anonymous / 1e9:.2f} GB"]
                rows.append([*cells, f"{resident / 1e9:.2f} GB"])
    header = ["shape", "precision", "graph and weights", "whole export", "peak anonymous memory", "peak resident memory"]
    print(harness.markdown(header, rows))


def make_model(folder: Path, shape: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes(harness.shared(f"tokenizers/gpt2/{name}").read_bytes())
    described = read_config(folder / "config.json")
    write_checkpoint(folder / "model.safetensors", described, RandomWeights(described))
    return folder


def watched(command: list[str]) -> tuple[float, int, int]:
    """Seconds, and the peaks of resident and of anonymous memory in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    resident = anonymous = 0
    while process.poll() is None:
        resident = max(resident, process_memory("VmHWM", process.pid) or 0)  # 0 where it ends just now
        anonymous = max(anonymous, process_memory("RssAnon", process.pid) or 0)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command} failed")
    return time.monotonic() - began, resident, anonymous


if __name__ == "__main__":
    main()
