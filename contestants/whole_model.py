"""Both parts of a split model in one process, with the optimiser of both."""

import math
from collections.abc import Mapping

import torch

from edge_client.data import Batch, Dataset, pack
from protocol import Array, Tensors, TrainingDiverged, derive_seed
from split_model import (
    Adapter,
    EdgePart,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    ServerPart,
    adamw,
    clipping_factor,
    copied_to,
    gradient_norm,
    optimiser_state,
    read_back,
    restore_optimiser,
    take_step,
)

__all__ = ["WholeModel"]

CPU = torch.device("cpu")
CUT = 1  # of all that is computed here, where the model is cut changes nothing
ADAPTER, OPTIMISER = "adapter/", "optimiser/"
ROWS_AT_A_TIME = 20
"""Held-out sequences that are computed together."""


class WholeModel:
    """
    A model with LoRA, trained as both sides of a split run train it together.

    Args:
        adapter: initial LoRA matrices of the whole model.
        weight_dtype: of the frozen weights; the adapter and its optimiser are never less exact than float32.
        max_grad_norm, label_smoothing: see `RunSettings`.
    """

    def __init__(
        self,
        base: PretrainedModel,
        lora: LoraConfig,
        optimiser: OptimiserConfig,
        adapter: Adapter,
        *,
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        max_grad_norm: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        self.base, self._max_grad_norm, self._smoothing = base, max_grad_norm, label_smoothing
        self._edge = EdgePart(base, CUT, lora, weight_dtype=weight_dtype, device=device)
        self._server = ServerPart(base, CUT, lora, weight_dtype=weight_dtype, device=device)
        self._matrices = {**self._edge.matrices(), **self._server.matrices()}
        self._optimiser = adamw(self._matrices.values(), optimiser)
        self.load_adapter(adapter)

    def backward(self, batch: Batch, dropout_seed: int = 0) -> float:
        """
        The batch's summed loss in nats; its gradient is added to those since the last step.

        Raises:
            TrainingDiverged, ModelError: the loss is not a finite number, because of the training or of the base model.
        """
        if not len(batch.tokens):
            return 0.0
        for number, part in enumerate((self._edge, self._server)):
            part.train()
            part.seed_dropout([derive_seed(dropout_seed, number, sequence) for sequence in range(len(batch.lengths))])
        loss = self._summed_loss(batch, self._smoothing)
        torch.autograd.backward(loss)
        summed = float(*read_back(loss))
        if not math.isfinite(summed):
            with torch.no_grad(), self._edge.without_adapter(), self._server.without_adapter():
                if not torch.isfinite(self._summed_loss(batch)):
                    raise self.base.not_finite("losses")
            raise TrainingDiverged(f"the loss is {summed}; try a lower --lr")
        return summed

    def take_step(self, labelled_tokens: int, learning_rate: float) -> float:
        """
        Take the optimiser's step with the gradient of the mean loss.

        Args:
            labelled_tokens: of all batches since the last step.

        Returns:
            The Euclidean norm of that gradient, before it is clipped.
        """
        for part in (self._edge, self._server):
            part.divide_gradients(max(1, labelled_tokens))
        norm = gradient_norm(self._matrices.values())
        if not math.isfinite(norm):
            raise TrainingDiverged("the gradient is not finite; try a lower --lr")
        factor = clipping_factor(norm, self._max_grad_norm) if self._max_grad_norm else 1.0
        take_step(self._optimiser, learning_rate, gradient_factor=factor)
        return norm

    def learn(self, batch: Batch, learning_rate: float) -> float:
        """One step on one batch; the mean loss before it, in nats per labelled token."""
        summed_loss = self.backward(batch)
        self.take_step(len(batch.labels), learning_rate)
        return summed_loss / max(1, len(batch.labels))

    @torch.no_grad()
    def evaluate(self, data: Dataset) -> tuple[float, int]:
        """Of held-out texts: the mean loss in nats per labelled token, and how many these are."""
        self._edge.eval()
        self._server.eval()
        summed, labelled_tokens = 0.0, 0
        for start in range(0, len(data.samples), ROWS_AT_A_TIME):
            batch = pack(data.samples[start : start + ROWS_AT_A_TIME])
            if len(batch.tokens):
                summed += self._summed_loss(batch).item()
            labelled_tokens += len(batch.labels)
        return summed / max(1, labelled_tokens), labelled_tokens

    def perplexity(self, data: Dataset) -> float:
        """Token-weighted."""
        return math.exp(self.evaluate(data)[0])

    def adapter(self) -> Adapter:
        """A copy of the matrices, on the CPU."""
        return {**self._edge.adapter(), **self._server.adapter()}

    def load_adapter(self, adapter: Mapping[str, torch.Tensor]) -> None:
        for part in (self._edge, self._server):
            part.load_adapter({name: adapter[name] for name in part.matrices()})

    def take_gradients(self) -> Tensors:
        """The gradients since the last step, which are gone afterwards."""
        gradients = arrays({**self._edge.gradients(), **self._server.gradients()})
        for part in (self._edge, self._server):
            part.clear_gradients()
        return gradients

    def put_gradients(self, gradients: Mapping[str, Array]) -> None:
        """Go on as if these were the gradients since the last step."""
        for name, matrix in self._matrices.items():
            matrix.grad = torch.from_numpy(gradients[name]).to(matrix.device)

    def state(self) -> Adapter:
        """The adapter, and what the optimiser has learnt."""
        learnt = optimiser_state(self._optimiser)
        return {
            **{f"{ADAPTER}{name}": matrix for name, matrix in self.adapter().items()},
            **{f"{OPTIMISER}{name}": tensor for name, tensor in learnt.items()},
        }

    def restore(self, state: Adapter) -> None:
        """Go on from where `state` was asked for."""
        self.load_adapter(_behind(ADAPTER, state))
        restore_optimiser(self._optimiser, _behind(OPTIMISER, state))

    def _summed_loss(self, batch: Batch, smoothing: float = 0.0) -> torch.Tensor:
        activations = self._edge(batch.tokens, batch.lengths)
        labels = copied_to(activations.device, torch.from_numpy(batch.labels).long())
        return self._server.summed_loss(activations, batch.lengths, batch.label_counts, labels, smoothing)


def arrays(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _behind(prefix: str, state: Adapter) -> Adapter:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
