"""The server's part on a CUDA device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_split


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_run_on_cuda_learns_what_a_run_on_the_cpu_learns(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], dropout: float
) -> None:
    clients = {name: {"data": pairs_file(name, 20), "batch_size": 3, "device": "cpu"} for name in "ab"}
    losses = {}
    for device in ("cpu", "cuda"):
        settings = {"model": str(tiny_model), "cut_layer": 2, "steps": 10, "device": device, "lora_dropout": dropout}
        losses[device] = run_split({**settings, "run_dir": str(tmp_path / device)}, clients).losses
    # Dropout's masks are drawn on the device: the same run twice is equal, on another device it is alike.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2 if dropout else 1e-4)
