"""AdamW, as both sides use it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as update

from .transfer import read_back

__all__ = [
    "AdamW",
    "OptimiserConfig",
    "adamw",
    "clipping_factor",
    "gradient_norm",
    "optimiser_state",
    "restore_optimiser",
    "take_step",
]

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW (arXiv 1711.05101) with betas 0.9, 0.999 and epsilon 1e-8, torch's defaults."""

    learning_rate: float = 1e-3
    """Before the schedule, which is the run's (`protocol.RunSettings.learning_rate_at`)."""
    weight_decay: float = 0.01


class AdamW:
    """
    What `torch.optim.AdamW` keeps: the parameters' moments, under its names. Its update is torch's own function.

    Not torch's class, since that loads torch's compiler with its first parameter and at every step, for which nobody here asks:
    half of the time that a server needs to start, and 70 MB.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self._weight_decay = config.weight_decay
        self.state: dict[int, dict[str, Tensor]] = {}
        """By the parameter's number, from its first gradient on: "step", "exp_avg" and "exp_avg_sq"."""

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update the parameters that have a gradient."""
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                if number not in self.state:
                    self.state[number] = _at_first(parameter)
                parameters.append(parameter)
                gradients.append(parameter.grad)
                states.append(self.state[number])
        if parameters:
            update(
                parameters,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=learning_rate,
                weight_decay=self._weight_decay,
                eps=EPSILON,
                maximize=False,
            )


def adamw(parameters: Iterable[nn.Parameter], config: OptimiserConfig) -> AdamW:
    return AdamW(parameters, config)


def _at_first(parameter: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device="cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean, of all their gradients together; 0 if they have none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return float(*read_back(torch.linalg.vector_norm(norms)))


def clipping_factor(norm: float, max_norm: float) -> float:
    """What a gradient of this norm is multiplied by, to be no longer than ``max_norm``: as `torch.nn.utils.clip_grad_norm_`."""
    return min(1.0, max_norm / (norm + 1e-6))


def take_step(optimiser: AdamW, learning_rate: float, *, gradient_factor: float = 1.0) -> None:
    """
    Update the parameters once, at the given rate, and clear their gradients.

    Args:
        gradient_factor: by which the gradients are multiplied before.
    """
    if gradient_factor != 1.0:
        for parameter in optimiser.parameters:
            if parameter.grad is not None:
                parameter.grad *= gradient_factor
    optimiser.step(learning_rate)
    for parameter in optimiser.parameters:
        parameter.grad = None


def optimiser_state(optimiser: AdamW) -> dict[str, Tensor]:
    """
    A copy of what the optimiser has learnt, on the CPU; empty before its first step. Names begin with the parameter's number:
    "0/exp_avg" and "0/exp_avg_sq" in the parameter's shape, "0/step" of shape (), "1/exp_avg" and so on.
    """
    learnt = {f"{index}/{key}": value for index, state in sorted(optimiser.state.items()) for key, value in state.items()}
    return {name: torch.from_numpy(value).clone() for name, value in zip(learnt, read_back(*learnt.values()), strict=True)}


def restore_optimiser(optimiser: AdamW, state: dict[str, Tensor]) -> None:
    """Take over what `optimiser_state` returned; learning rate and weight decay stay the optimiser's own."""
    optimiser.state.clear()
    for name, tensor in state.items():
        index, _, key = name.partition("/")
        kept = tensor.clone() if key == "step" else tensor.clone().to(optimiser.parameters[int(index)])
        optimiser.state.setdefault(int(index), {})[key] = kept
