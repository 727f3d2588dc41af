"""AdamW, as both sides use it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["OptimiserConfig", "adamw", "gradient_norm", "optimiser_state", "restore_optimiser", "take_step"]


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (arXiv 1711.05101) with betas 0.9, 0.999 and epsilon 1e-8, torch's defaults."""

    learning_rate: float = 1e-3
    """Before the schedule, which is the run's (`protocol.RunSettings.learning_rate_at`)."""
    weight_decay: float = 0.01


def adamw(parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean, of all their gradients together; 0 if they have none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])))


def take_step(optimiser: torch.optim.AdamW, learning_rate: float) -> None:
    """Update the parameters once, at the given rate, and clear their gradients."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad()


def optimiser_state(optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """
    A copy of what the optimiser has learnt, on the CPU; empty before its first step. Names begin with the parameter's number:
    "0/exp_avg" and "0/exp_avg_sq" in the parameter's shape, "0/step" of shape (), "1/exp_avg" and so on.
    """
    return {
        f"{index}/{key}": value.detach().cpu().clone()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimiser(optimiser: torch.optim.AdamW, state: dict[str, Tensor]) -> None:
    """Take over what `optimiser_state` returned; learning rate and weight decay stay the optimiser's own."""
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        index, _, key = name.partition("/")
        by_parameter.setdefault(int(index), {})[key] = tensor.clone()
    optimiser.load_state_dict({"state": by_parameter, "param_groups": optimiser.state_dict()["param_groups"]})
