"""
What an export takes: time, memory and disk, for GPT-2 small's and XL's shape with random weights.

Memory is that of `splitlora-export onnx` while it runs. Anonymous memory is what has to fit; pages of mapped files, the rest of
resident memory, are given back when somebody needs the room.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
from numpy.typing import NDArray

from edge_client.generation import process_memory
from export.checkpoint import write_checkpoint
from graphs import Weights
from split_model import ModelConfig
from split_model.families import read_config

SHAPES = {
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}


class RandomWeights(Weights):
    """Standard deviation 0.02, one tensor at a time."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = config.tensor_shapes
        self._generator = np.random.default_rng(0)

    def read(self, name: str) -> NDArray[np.float32]:
        return self._generator.standard_normal(self._shapes[name], np.float32) * np.float32(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="small,xl")
    parser.add_argument("--scratch", help="a folder with 25 GB of room for xl (default: the system's)")
    options = parser.parse_args()
    rows = []
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            model, out = make_model(Path(scratch) / "model", SHAPES[name]), Path(scratch) / "out"
            for precision in ("fp32", "q8", "q4"):
                command = f"onnx --model {model} --output {out} --overwrite --precision {precision}"
                seconds, resident, anonymous = watched([str(harness.PROGRAMS / "splitlora-export"), *command.split()])
                size = sum(json.loads((out / "splitlora.json").read_text())["precisions"][precision]["bytes"].values())
                cells = [name, precision, f"{size / 1e6:.1f} MB", f"{seconds:.0f} s", f"{anonymous / 1e9:.2f} GB"]
                rows.append([*cells, f"{resident / 1e9:.2f} GB"])
    header = ["shape", "precision", "graph and weights", "whole export", "peak anonymous memory", "peak resident memory"]
    print(harness.markdown(header, rows))


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    folder.mkdir()
    config = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257, "eos_token_id": 50256, **shape}
    (folder / "config.json").write_text(json.dumps(config))
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
