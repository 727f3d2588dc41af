"""AdamW and the learning-rate schedule that both sides follow."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["OptimiserConfig", "adamw", "optimiser_state", "restore_optimiser", "take_step"]


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (arXiv 1711.05101) with betas 0.9, 0.999 and epsilon 1e-8, torch's defaults."""

    learning_rate: float = 1e-3
    schedule: str = "constant"
    """"constant", or "linear": down to zero at the run's end. Both after a linear warm-up."""
    warmup_steps: int = 0
    weight_decay: float = 0.01

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The rate of step 1, 2, ... total_steps; the same as transformers' schedulers give."""
        taken = step - 1
        if taken < self.warmup_steps:
            return self.learning_rate * taken / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (total_steps - taken) / max(1, total_steps - self.warmup_steps)


def adamw(parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


def take_step(optimiser: torch.optim.AdamW, learning_rate: float) -> None:
    """One update at the given rate; the gradients are used up."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad()


def optimiser_state(optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """A copy of what the optimiser has learnt, on the CPU: "0/exp_avg", "0/exp_avg_sq", "0/step", "1/...", by parameter."""
    return {
        f"{index}/{key}": value.detach().cpu().clone()
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimiser(optimiser: torch.optim.AdamW, state: dict[str, Tensor]) -> None:
    """Take over what `optimiser_state` gave."""
    by_parameter: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        index, _, key = name.partition("/")
        by_parameter.setdefault(int(index), {})[key] = tensor.clone()
    optimiser.load_state_dict({"state": by_parameter, "param_groups": optimiser.state_dict()["param_groups"]})
