"""AdamW is torch's, without what torch's class loads beside it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from split_model import OptimiserConfig, adamw, optimiser_state, restore_optimiser, take_step

CONFIG = OptimiserConfig(learning_rate=1e-2, weight_decay=0.1)


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in ((3, 4), (4, 2), (5,))]


def gradients(matrices: list[nn.Parameter], step: int) -> list[Tensor | None]:
    """Not every parameter has one in every step."""
    draw = torch.Generator().manual_seed(step)
    drawn = [torch.randn(matrix.shape, generator=draw, dtype=matrix.dtype) for matrix in matrices]
    return [None if (step + number) % 3 == 0 else gradient for number, gradient in enumerate(drawn)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_updates_as_torchs_class_does_to_the_bit_and_keeps_the_same_state(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimiser = adamw(ours, CONFIG)
    reference = torch.optim.AdamW(theirs, lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    assert optimiser_state(optimiser) == {}
    for step in range(12):
        for matrices in (ours, theirs):
            for matrix, gradient in zip(matrices, gradients(matrices, step), strict=True):
                matrix.grad = gradient
        take_step(optimiser, 1e-2 / (1 + step))
        reference.param_groups[0]["lr"] = 1e-2 / (1 + step)
        reference.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert all(matrix.grad is None for matrix in ours)
    expected = {f"{i}/{key}": value for i, state in reference.state_dict()["state"].items() for key, value in state.items()}
    found = optimiser_state(optimiser)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_it_goes_on_from_its_state_to_the_bit() -> None:
    first = parameters(torch.float32)
    optimiser = adamw(first, CONFIG)
    for step in range(4):
        if step == 2:
            state = optimiser_state(optimiser)
            second = [nn.Parameter(matrix.detach().clone()) for matrix in first]
            again = adamw(second, CONFIG)
            restore_optimiser(again, state)
        for matrix, gradient in zip(first, gradients(first, step), strict=True):
            matrix.grad = gradient
        take_step(optimiser, 1e-2)
    assert all(torch.equal(again.state[i][key], value) for i in range(3) for key, value in state_of(state, i).items())
    for step in (2, 3):
        for matrix, gradient in zip(second, gradients(second, step), strict=True):
            matrix.grad = gradient
        take_step(again, 1e-2)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    restore_optimiser(again, {})
    assert optimiser_state(again) == {}


def state_of(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    return {name.partition("/")[2]: value for name, value in state.items() if name.startswith(f"{number}/")}


def test_server_that_listens_has_not_loaded_torchs_compiler(tiny_model: Path, tmp_path: Path) -> None:
    """It would take as long as all the rest of its start."""
    script = f"""
import sys, torch
from gpu_server import GpuServer
from split_model import OptimiserConfig, adamw, backpropagate, optimiser_state, restore_optimiser, take_step
with GpuServer(model={str(tiny_model)!r}, clients=1, steps=1, cut_layer=1, port=0, run_dir={str(tmp_path / "run")!r}):
    matrix = torch.nn.Parameter(torch.ones(2))
    optimiser = adamw([matrix], OptimiserConfig())
    backpropagate(2 * matrix, torch.ones(2))
    take_step(optimiser, 0.1)
    restore_optimiser(optimiser, optimiser_state(optimiser))
    print(*({{"torch._dynamo", "sympy", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
