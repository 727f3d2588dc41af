"""The `Engine` of a device with torch."""

from collections import deque
from collections.abc import Iterator

import torch

from protocol import Array, RunSettings, Tensors, TrainingDiverged
from split_model import (
    DTYPES,
    Adapter,
    EdgePart,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    adamw,
    adapted_layers,
    backpropagate,
    check_cut_layer,
    check_lora_rank,
    choose_device,
    choose_dtype,
    copied_to,
    cross_entropies,
    optimiser_state,
    read_back,
    restore_optimiser,
    take_step,
)

from .data import Batch
from .dropout import dropout_masks

__all__ = ["TorchEngine", "choose_weight_dtype"]

ADAPTER, OPTIMISER = "adapter/", "optimiser/"


class TorchEngine:
    """
    See `Engine` for what its methods do.

    Args:
        device: "auto", "cpu" or "cuda".
        dtype: of the frozen weights, one of DTYPES.
    """

    def __init__(self, model: PretrainedModel, settings: RunSettings, device: str, dtype: str) -> None:
        self._model = model
        check_cut_layer(settings.cut_layer, model.config.num_layers)
        check_lora_rank(settings.lora_rank, model.config.width)
        lora = LoraConfig(**settings.lora())
        self._dropout, self._cut_layer, self._smoothing = lora.dropout, settings.cut_layer, settings.label_smoothing
        self._adapted = adapted_layers(model.config, lora)
        self._part = EdgePart(model, settings.cut_layer, lora, weight_dtype=DTYPES[dtype], device=choose_device(device))
        # On the CPU a head in the dtype in which it is stored is not copied: it is mapped, like every weight.
        self._head = (
            model.tensors[model.config.head_name].view().to(self._part.device, DTYPES[dtype])  # (V, d)
            if settings.labels == "device"
            else None
        )
        # In rounds of one step the server has the optimiser, for everybody.
        self._optimiser = (
            adamw(self._part.matrices().values(), OptimiserConfig(**settings.optimiser()))
            if settings.aggregate_every > 1
            else None
        )
        self._awaiting_gradient: deque[torch.Tensor] = deque()
        """Activations that were computed, and had no `backward` yet, each with the graph that leads to it."""

    @property
    def num_adapter_elements(self) -> int:
        return sum(matrix.numel() for matrix in self._part.matrices().values())

    def begin_step(self) -> None:
        self._awaiting_gradient.clear()
        self._part.clear_gradients()

    def forward(self, batch: Batch, dropout_seed: int) -> Array:
        self._part.train()
        self._part.use_dropout_masks(self._masks(dropout_seed, len(batch.tokens)))
        activations, values = self._run_finite(batch)
        self._awaiting_gradient.append(activations)
        return values

    def backward(self, gradient: Array) -> None:
        if not self._awaiting_gradient:
            raise RuntimeError("backward() needs a forward() before it")
        activations = self._awaiting_gradient.popleft()
        if not len(activations):
            return
        backpropagate(activations, copied_to(activations.device, _to_tensor(gradient)))

    def end_step(self, labelled_tokens: int) -> None:
        self._part.divide_gradients(max(1, labelled_tokens))

    @torch.no_grad()
    def infer(self, batch: Batch) -> Array:
        self._part.eval()
        _, values = self._run_finite(batch)
        return values

    def losses_and_gradient(self, hidden: Array, labels: Array) -> tuple[Array, Array]:
        states = copied_to(self._part.device, _to_tensor(hidden)).requires_grad_()
        losses = self._losses(states, labels, self._smoothing)
        torch.autograd.backward(losses.sum())
        assert states.grad is not None
        finite = [torch.isfinite(tensor).all() for tensor in (losses, states.grad)]
        values, gradient, is_finite, gradient_is_finite = read_back(losses, states.grad, *finite)
        self._check_losses(values, is_finite)
        if not gradient_is_finite:
            raise TrainingDiverged("the gradient of this device's loss is no longer finite; try a lower --lr on the server")
        return values, gradient

    @torch.no_grad()
    def losses(self, hidden: Array, labels: Array) -> Array:
        losses = self._losses(copied_to(self._part.device, _to_tensor(hidden)), labels)
        values, is_finite = read_back(losses, torch.isfinite(losses).all())
        self._check_losses(values, is_finite)
        return values

    def take_step(self, learning_rate: float) -> None:
        if self._optimiser is None:
            raise RuntimeError("in rounds of one step, the server takes it")
        take_step(self._optimiser, learning_rate)

    def gradients(self) -> Tensors:
        return _to_arrays(self._part.gradients())

    def adapter(self) -> Tensors:
        return _to_arrays(self._part.adapter())

    def load_adapter(self, tensors: Tensors) -> None:
        self._part.load_adapter({name: _to_tensor(value) for name, value in tensors.items()})

    def state(self) -> Tensors:
        assert self._optimiser is not None
        learnt = {f"{OPTIMISER}{name}": _to_array(tensor) for name, tensor in optimiser_state(self._optimiser).items()}
        return {**{f"{ADAPTER}{name}": matrix for name, matrix in self.adapter().items()}, **learnt}

    def forget(self) -> None:
        assert self._optimiser is not None
        restore_optimiser(self._optimiser, {})

    def restore(self, state: Tensors) -> None:
        assert self._optimiser is not None
        self.load_adapter({name.removeprefix(ADAPTER): value for name, value in state.items() if name.startswith(ADAPTER)})
        learnt = {name.removeprefix(OPTIMISER): value for name, value in state.items() if name.startswith(OPTIMISER)}
        restore_optimiser(self._optimiser, {name: _to_tensor(value) for name, value in learnt.items()})

    def _losses(self, hidden: torch.Tensor, labels: Array, smoothing: float = 0.0) -> torch.Tensor:
        if self._head is None:
            raise RuntimeError("the server has the labels, and the head")
        return cross_entropies(hidden, self._head, copied_to(hidden.device, _to_tensor(labels).long()), smoothing)

    def _check_losses(self, losses: Array, is_finite: Array) -> None:
        if is_finite:
            return
        if self._head is not None and not torch.isfinite(self._head).all():
            raise self._model.not_finite("losses")
        raise TrainingDiverged(f"the loss of this device's labels is {losses.sum()}; try a lower --lr on the server")

    def _masks(self, seed: int, num_rows: int) -> Iterator[torch.Tensor]:
        """Of all adapted layers, in the order of the forward pass, (N, in) each; drawn block by block as they are asked for."""
        for block in range(self._cut_layer):
            widths = (inputs for inputs, _ in self._adapted.values())
            for mask in dropout_masks(seed, block, self._dropout, num_rows, widths):
                yield torch.from_numpy(mask)

    def _run_finite(self, batch: Batch) -> tuple[torch.Tensor, Array]:
        """Activations, (N, d), and their values."""
        activations = self._run(batch)
        values, is_finite = read_back(activations, torch.isfinite(activations).all())
        if is_finite:
            return activations, values
        with torch.no_grad(), self._part.without_adapter():
            if not torch.isfinite(self._run(batch)).all():
                raise self._model.not_finite("activations")
        raise TrainingDiverged("this device's activations are no longer finite numbers; try a lower --lr on the server")

    def _run(self, batch: Batch) -> torch.Tensor:
        if not len(batch.tokens):
            return torch.empty(0, self._part.width, dtype=self._part.dtype)
        activations: torch.Tensor = self._part(batch.tokens, batch.lengths)
        return activations


def _to_tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)


def _to_array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array


def _to_arrays(adapter: Adapter) -> Tensors:
    return {name: _to_array(matrix) for name, matrix in adapter.items()}


def choose_weight_dtype(asked: str, device: str, settings: RunSettings, *, before: str | None) -> tuple[str, str]:
    """
    The dtype of the frozen weights, and why; see `choose_dtype`.

    Args:
        asked: "auto" or one of DTYPES.
        device: "auto", "cpu" or "cuda".
        before: the dtype with which this device was in the run before it was stopped, as its disk says; None if it was not.
    """
    if settings.precision == "float64":
        return "float64", "as the run"
    if asked == "auto" and before in DTYPES:  # what the disk says may be damaged
        return str(before), "as before this device was stopped"
    return choose_dtype(asked, choose_device(device))
