"""The server's arithmetic in PyTorch."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from protocol import (
    Activations,
    Array,
    Evaluation,
    HiddenGradient,
    LabelledBatch,
    RunSettings,
    Tensors,
    TrainingDiverged,
    coded_update,
    derive_seed,
)
from protocol.codecs import Coded
from split_model import (
    Adapter,
    OptimiserConfig,
    adamw,
    clipping_factor,
    gradient_norm,
    optimiser_state,
    restore_optimiser,
    take_step,
)
from storage import AdapterError

from .federation import Aggregated, Trained
from .part_trainer import Seeds, Trainer

__all__ = ["TorchEngine"]

ADAPTER, SERVER_OPTIMISER, EDGE_OPTIMISER, BEST = "adapter/", "server_optimiser/", "edge_optimiser/", "best/"
OWED = "owed/"
HELD_OUT = "held-out texts"


class TorchEngine:
    """
    An `Engine`: shapes, units and errors of its methods stand there.

    The edge adapter lives here, in float32 or float64 on the CPU: devices keep no optimiser state in rounds of one step.

    Args:
        trainer: of the server's part.
        edge_adapter: initial LoRA matrices of the edge part, none where it learns nothing: A is (r, inputs), B is (outputs, r).
    """

    def __init__(self, trainer: Trainer, settings: RunSettings, edge_adapter: Adapter) -> None:
        self._trainer, self._settings = trainer, settings
        dtype = torch.float64 if settings.precision == "float64" else torch.float32
        self._edge = {name: nn.Parameter(matrix.to(dtype, copy=True)) for name, matrix in edge_adapter.items()}
        self._edge_optimiser = adamw(self._edge.values(), OptimiserConfig(**settings.optimiser()))
        self._owed: Adapter = {}
        """By how much the edge adapter would be another if its changes were not coded; see `coded_update`. Empty: nowhere."""
        self._best: Adapter = {}
        """The adapter that was kept as the best; empty if none was."""
        self.round_end: Adapter = self._state()
        self._norm_of_server = 0.0
        """Of the gradient by the server's adapter, in the step that is trained."""

    def train(self, step: int, total_steps: int, micro_batch: int, batches: dict[str, Activations]) -> Trained:
        seeds = self._seeds(step, micro_batch, batches)
        return self._noted(self._trainer.train(step, total_steps, micro_batch, batches, seeds))

    def forward(self, step: int, micro_batch: int, batches: dict[str, Activations]) -> dict[str, Array]:
        return self._trainer.forward(step, micro_batch, batches, self._seeds(step, micro_batch, batches))

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: dict[str, HiddenGradient]) -> Trained:
        return self._noted(self._trainer.backward(step, total_steps, micro_batch, gradients))

    def _noted(self, trained: Trained) -> Trained:
        self._norm_of_server = trained.gradient_norm
        return trained

    def _seeds(self, step: int, micro_batch: int, batches: Mapping[str, LabelledBatch]) -> Seeds:
        """Each sequence has its own, so that its masks do not depend on what it is computed with, nor where."""
        if not self._settings.lora_dropout:
            return {}
        return {
            client: [
                derive_seed(self._settings.seed, "server", "dropout", step, micro_batch, client, number)
                for number in range(len(batch.lengths))
            ]
            for client, batch in batches.items()
        }

    def check(self, batches: list[Activations], others: list[str]) -> dict[str, float]:
        came = [batch for batch in batches if batch.exact is not None and len(batch.values)]
        exactly = [replace(batch, values=batch.exact) for batch in came if batch.exact is not None]
        labelled_tokens = sum(len(batch.labels) for batch in exactly)
        if not labelled_tokens:
            return {}
        of = f"step {came[0].step}"
        exact_loss, changes = self._trainer.summed_loss(exactly, of), {}
        for codec in ("", *others):
            union = [replace(batch, values=Coded.of(batch.values, codec).decode()) for batch in exactly] if codec else came
            changes[codec] = (self._trainer.summed_loss(union, of) - exact_loss) / labelled_tokens
        return changes

    def aggregate(self, step: int, total_steps: int, contributions: dict[str, Tensors], weights: dict[str, int]) -> Aggregated:
        norm, before = 0.0, self.edge_adapter()
        if self._settings.aggregate_every == 1:
            for name, matrix in self._edge.items():
                matrix.grad = torch.stack([_tensor(tensors[name]) for tensors in contributions.values()]).sum(0)
            norm = gradient_norm(self._edge.values())
            factor = 1.0
            if self._settings.max_grad_norm:
                factor = self._clipping_factor(step, math.hypot(self._norm_of_server, norm))
                self._trainer.take_step(step, total_steps, factor)
            take_step(self._edge_optimiser, self._settings.learning_rate_at(step, total_steps), gradient_factor=factor)
        else:
            # FedAvg (arXiv 1602.05629). A round without any label has taught nobody anything: all count alike.
            weights = weights if any(weights.values()) else dict.fromkeys(weights, 1)
            total = sum(weights.values())
            with torch.no_grad():
                for name, matrix in self._edge.items():
                    shares = [_tensor(tensors[name]) * (weights[client] / total) for client, tensors in contributions.items()]
                    mean = torch.stack(shares).sum(0)
                    matrix.copy_(matrix + mean if self._settings.codes_adapter else mean)
        if not all(torch.isfinite(matrix).all() for matrix in self._edge.values()):
            raise TrainingDiverged(f"the edge adapter of step {step} is not finite; try a lower --lr")
        change = self._go_on_from_what_is_sent(before) if self._settings.codes_adapter else None
        self.round_end = self._state()
        return Aggregated(edge_adapter=self.edge_adapter(), change=change, gradient_norm=norm)

    @torch.no_grad()
    def _go_on_from_what_is_sent(self, before: Tensors) -> dict[str, Coded]:
        """Let the edge adapter be what devices make of its change since ``before``, which is returned."""
        for name, matrix in self._owed.items():
            self._edge[name].add_(matrix)
        change, shared, owed = coded_update(before, self.edge_adapter(), self._settings)
        for name, matrix in self._edge.items():
            matrix.copy_(_tensor(shared[name]))
        self._owed = {name: _tensor(matrix) for name, matrix in owed.items()}
        return change

    def _clipping_factor(self, step: int, norm: float) -> float:
        if not math.isfinite(norm):  # by which a gradient would become 0, without a word
            raise TrainingDiverged(f"the norm of the gradient of step {step} is {norm}; try a lower --lr")
        return clipping_factor(norm, self._settings.max_grad_norm)

    def evaluate(self, batch: Evaluation) -> float:
        return self._trainer.summed_loss([batch], HELD_OUT) if len(batch.values) else 0.0

    def infer(self, batch: Evaluation) -> Array:
        return self._trainer.infer(batch, HELD_OUT) if len(batch.values) else batch.values

    def keep_best(self) -> None:
        # Copies: a checkpoint may have both, and no file keeps two tensors of one memory.
        self._best = {name: matrix.clone() for name, matrix in _under(ADAPTER, self.round_end).items()}
        self.round_end = {**self.round_end, **{f"{BEST}{name}": matrix for name, matrix in self._best.items()}}

    def load_best(self) -> Tensors:
        self._load(self._best, self._trainer.optimiser_state())
        return self.edge_adapter()

    def edge_adapter(self) -> Tensors:
        return {name: matrix.detach().clone().numpy() for name, matrix in self._edge.items()}

    def adapter(self) -> Adapter:
        return {**{name: matrix.detach().clone() for name, matrix in self._edge.items()}, **self._trainer.adapter()}

    def restore(self, state: Adapter) -> None:
        self._load(_under(ADAPTER, state), _under(SERVER_OPTIMISER, state))
        restore_optimiser(self._edge_optimiser, _under(EDGE_OPTIMISER, state))
        self._owed = _under(OWED, state)
        self._best = _under(BEST, state)
        self.round_end = self._state()

    def _load(self, adapter: Adapter, server_optimiser: Adapter) -> None:
        if not self._edge.keys() <= adapter.keys():
            raise AdapterError("the checkpoint's matrices are not those of the run's model and LoRA settings")
        self._trainer.restore({name: matrix for name, matrix in adapter.items() if name not in self._edge}, server_optimiser)
        with torch.no_grad():
            for name, matrix in self._edge.items():
                matrix.copy_(adapter[name])

    def _state(self) -> Adapter:
        parts = {
            ADAPTER: self.adapter(),
            SERVER_OPTIMISER: self._trainer.optimiser_state(),
            EDGE_OPTIMISER: optimiser_state(self._edge_optimiser),
            OWED: self._owed,
            BEST: self._best,
        }
        return {f"{prefix}{name}": tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}


def _under(prefix: str, state: Adapter) -> Adapter:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)
