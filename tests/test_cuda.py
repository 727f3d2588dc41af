"""The server's part, and a device's head, on a CUDA device."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_split
from usual_settings import settings

from edge_client.torch_engine import TorchEngine
from split_model import PretrainedModel


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_head_on_cuda_computes_what_it_computes_on_the_cpu(tiny_model: Path, dtype: str, tolerance: float) -> None:
    run, source = settings(labels="device"), np.random.default_rng(0)
    hidden, labels = source.normal(0, 1, (300, 32)).astype(np.float32), source.integers(0, 600, 300).astype(np.int32)
    on_cpu = TorchEngine(PretrainedModel(tiny_model), run, "cpu", "float32")
    expected_losses, expected = on_cpu.losses_and_gradient(hidden, labels)
    engine = TorchEngine(PretrainedModel(tiny_model), run, "cuda", dtype)
    losses, gradient = engine.losses_and_gradient(hidden, labels)
    assert np.linalg.norm(losses - expected_losses) / np.linalg.norm(expected_losses) < tolerance
    assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) < tolerance
    assert engine.losses(hidden, labels) == pytest.approx(losses)
