"""Computes and trains the server's part of the model, in PyTorch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy
import torch

from protocol import Array, HiddenGradient, LabelledBatch, RunSettings, TrainingDiverged
from split_model import (
    DTYPES,
    Adapter,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    ServerPart,
    Uploads,
    adamw,
    backpropagate,
    gradient_norm,
    optimiser_state,
    read_back,
    restore_optimiser,
    take_step,
)

from .config import ServerConfig
from .federation import Trained
from .ranks import Alone, Ranks

if TYPE_CHECKING:
    from split_model.sharding import Sharding

    from .ranks.process_group import ProcessGroup

__all__ = ["HalfStep", "HiddenShare", "PartTrainer", "Seeds", "Trainer", "make_trainer"]

Seeds = dict[str, list[int]]
"""By client: of dropout's masks, one for each of its sequences; empty in runs without dropout."""


@dataclass(frozen=True)
class HiddenShare:
    """A part of a client's `HiddenGradient`, whose fields these are: of some of its sequences."""

    values: Array
    summed_loss: float = 0.0
    labelled_tokens: int = 0


HalfStep = HiddenGradient | HiddenShare
"""What is needed of a client for the second half of a micro-batch."""


class Trainer(Protocol):
    """
    The server's part, its adapter and its optimiser. What `Engine` says of shapes, units and errors holds for methods of the
    same name.
    """

    def train(
        self, step: int, total_steps: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds
    ) -> Trained: ...

    def forward(self, step: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds) -> dict[str, Array]: ...

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: Mapping[str, HalfStep]) -> Trained: ...

    def take_step(self, step: int, total_steps: int, gradient_factor: float) -> None:
        """
        The part's update by a step that is trained, in runs with ``max_grad_norm``, where it waits for the edge's gradient.
        Without it the step changes nothing.

        Args:
            gradient_factor: by which its gradient is multiplied before.
        """

    def summed_loss(self, batches: Sequence[LabelledBatch], of: str) -> float:
        """
        Of all batches together, in nats, without dropout.

        Args:
            of: what they are, for an error.

        Raises:
            TrainingDiverged: it is not finite.
            ModelError: nor is it without the adapter.
        """

    def infer(self, batch: LabelledBatch, of: str) -> Array:
        """Hidden states (M, d), see `Engine.infer`; as `summed_loss`."""

    def adapter(self) -> Adapter:
        """A copy of the part's LoRA matrices, on the CPU."""

    def optimiser_state(self) -> Adapter:
        """A copy of what its optimiser has learnt; see `split_model.optimiser_state`."""

    def restore(self, adapter: Adapter, optimiser: Adapter) -> None:
        """
        Take over what `adapter` and `optimiser_state` returned.

        Raises:
            AdapterError: the matrices are not this part's.
        """


@dataclass
class _Graph:
    """A micro-batch between its forward and its backward computation."""

    activations: torch.Tensor
    """(N, d) of all clients, one after the other, where the gradient arrives."""
    hidden: torch.Tensor
    """(M, d) of all clients."""
    num_rows: dict[str, int]
    """N of each client."""
    num_labelled: dict[str, int]
    """M of each client."""


class PartTrainer:
    """
    A `Trainer` on one process, of the sequences that it is given.

    Args:
        adapter: initial LoRA matrices, those of the server's part among them: A is (r, inputs), B is (outputs, r).
        weight_dtype: of the frozen weights; the adapter and its optimiser are never less exact than float32.
        in_bfloat16: whether what flows through the blocks is in bfloat16, too; see `Placement.residual`.
        ranks: those that compute other sequences of the same micro-batches at the same time. All are called alike.
        sharding: of the frozen weights over these ranks. Each of them then computes whenever one does, since it has a part of
            the weights.
    """

    def __init__(
        self,
        model: PretrainedModel,
        settings: RunSettings,
        adapter: Adapter,
        *,
        weight_dtype: torch.dtype,
        device: torch.device,
        in_bfloat16: bool = False,
        ranks: Ranks | None = None,
        sharding: "Sharding | None" = None,
    ) -> None:
        self._model, self._settings, self._ranks = model, settings, ranks or Alone()
        self._part = ServerPart(
            model,
            settings.cut_layer,
            LoraConfig(**settings.lora()),
            weight_dtype=weight_dtype,
            device=device,
            with_head=settings.labels == "server",
            in_bfloat16=in_bfloat16,
            sharding=sharding,
        )
        # Computed by a rank that has no sequence while others need its part of the weights.
        stand_in = LabelledBatch(
            lengths=numpy.ones(1, numpy.int32),
            label_counts=numpy.zeros(1, numpy.int32),
            labels=numpy.zeros(0, numpy.int32),
            values=numpy.zeros((1, model.config.width), settings.precision),
        )
        self._stand_in = None if sharding is None else stand_in
        self._part.load_adapter({name: adapter[name] for name in self._part.matrices()})
        self._uploads = Uploads(self._part.device)
        self._optimiser = adamw(self._part.matrices().values(), OptimiserConfig(**settings.optimiser()))
        self._summed, self._labelled_tokens = 0.0, 0
        """Of the step so far, and of all ranks: its loss in nats, and how many labels it has."""
        self._graphs: dict[int, _Graph] = {}
        """Of the step's micro-batches whose gradient is still to come."""

    def train(
        self, step: int, total_steps: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds
    ) -> Trained:
        if not micro_batch:
            self._begin_step()
        union = self._union(batches.values())
        gradients = {client: batch.values for client, batch in batches.items()} if self._settings.trains_edge else {}
        summed_losses = dict.fromkeys(batches, 0.0)
        is_finite = True
        if any(len(batch.values) for batch in union):
            activations = self._as_leaf(union, seeds)
            labels = self._labels(union)
            losses = self._part.losses(activations, *_shape(union), labels, self._settings.label_smoothing)
            # The sum, since how many labels the step has is known only with its last micro-batch.
            torch.autograd.backward(losses.sum())
            gradient, of_labels, all_finite = _read_gradient(activations, losses)
            is_finite = bool(all_finite)
            gradients = _by_client(gradient, {client: len(batches[client].values) for client in gradients})
            of_rows = _by_client(of_labels, {client: len(batch.labels) for client, batch in batches.items()})
            summed_losses = {client: float(rows.sum(dtype=numpy.float64)) for client, rows in of_rows.items()}
        loss, is_finite = self._add(sum(summed_losses.values()), sum(len(batch.labels) for batch in union), is_finite)
        if not math.isfinite(loss):
            self._check_base("losses", union, lambda: self._losses(union))
            raise TrainingDiverged(f"the loss of step {step} is {loss}; try a lower --lr")
        _check_gradient(is_finite, step)
        return self._trained(step, total_steps, micro_batch, gradients, summed_losses)

    def forward(self, step: int, micro_batch: int, batches: Mapping[str, LabelledBatch], seeds: Seeds) -> dict[str, Array]:
        if not micro_batch:
            self._begin_step()
        union = self._union(batches.values())
        activations = self._as_leaf(union, seeds)
        hidden = self._part.hidden(activations, *_shape(union)) if len(activations) else activations
        states, is_finite = read_back(hidden, torch.isfinite(hidden).all())
        if not self._is_finite_everywhere(bool(is_finite)):
            self._check_base("hidden states", union, lambda: self._hidden(union))
            raise TrainingDiverged(f"the hidden states of step {step} are not finite; try a lower --lr")
        graph = self._graphs[micro_batch] = _Graph(
            activations,
            hidden,
            num_rows={client: len(batch.values) for client, batch in batches.items()},
            num_labelled={client: batch.num_labelled for client, batch in batches.items()},
        )
        return _by_client(states, graph.num_labelled)

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: Mapping[str, HalfStep]) -> Trained:
        if not gradients:
            return self._trained(step, total_steps, micro_batch, {}, {})
        graph = self._graphs.pop(micro_batch)
        width, dtype = graph.hidden.shape[1], numpy.float64 if graph.hidden.dtype == torch.float64 else numpy.float32
        upstream = [
            gradients[client].values if client in gradients else numpy.zeros((rows, width), dtype=dtype)
            for client, rows in graph.num_labelled.items()
        ]
        if graph.hidden.requires_grad:
            backpropagate(graph.hidden, self._uploads.joined(upstream))
        gradient, all_finite = _read_gradient(graph.activations)
        summed_losses = {client: gradient.summed_loss for client, gradient in gradients.items()}
        labelled_tokens = sum(gradient.labelled_tokens for gradient in gradients.values())
        _, is_finite = self._add(sum(summed_losses.values()), labelled_tokens, bool(all_finite))
        _check_gradient(is_finite, step)
        of_all = _by_client(gradient, graph.num_rows) if self._settings.trains_edge else {}
        wanted = {client: of_all[client] for client in gradients if client in of_all}
        return self._trained(step, total_steps, micro_batch, wanted, summed_losses)

    def take_step(self, step: int, total_steps: int, gradient_factor: float) -> None:
        take_step(self._optimiser, self._settings.learning_rate_at(step, total_steps), gradient_factor=gradient_factor)

    def summed_loss(self, batches: Sequence[LabelledBatch], of: str) -> float:
        (loss,) = self._ranks.sum_numbers([float(*read_back(self._losses(batches).sum(dtype=torch.float64)))])
        if not math.isfinite(loss):
            self._check_base("losses", batches, lambda: self._losses(batches))
            raise TrainingDiverged(f"the loss of {of} is {loss}; try a lower --lr")
        return loss

    def infer(self, batch: LabelledBatch, of: str) -> Array:
        hidden = self._hidden([batch])
        states, is_finite = read_back(hidden, torch.isfinite(hidden).all())
        if not self._is_finite_everywhere(bool(is_finite)):
            self._check_base("hidden states", [batch], lambda: self._hidden([batch]))
            raise TrainingDiverged(f"the hidden states of {of} are not finite; try a lower --lr")
        return states

    def adapter(self) -> Adapter:
        return self._part.adapter()

    def optimiser_state(self) -> Adapter:
        return optimiser_state(self._optimiser)

    def restore(self, adapter: Adapter, optimiser: Adapter) -> None:
        self._part.load_adapter(adapter)
        restore_optimiser(self._optimiser, optimiser)

    def _begin_step(self) -> None:
        self._summed, self._labelled_tokens = 0.0, 0
        self._graphs.clear()
        self._part.clear_gradients()  # of a step that nobody has contributed to

    def _add(self, summed_loss: float, labelled_tokens: int, is_finite: bool) -> tuple[float, bool]:
        """A micro-batch's to the step's; returns the loss of all ranks, and whether the gradient is finite on all."""
        of_all, num_labels, not_finite = self._ranks.sum_numbers([summed_loss, labelled_tokens, not is_finite])
        self._summed += of_all
        self._labelled_tokens += int(num_labels)
        return of_all, not not_finite

    def _trained(
        self, step: int, total_steps: int, micro_batch: int, gradients: dict[str, Array], summed_losses: dict[str, float]
    ) -> Trained:
        """With a step's last micro-batch, update the part, or have its gradient ready for `take_step`."""
        norm = 0.0
        # A step without any label has gradients of 0: it teaches nothing, and divides by 1.
        labelled_tokens = max(1, self._labelled_tokens)
        if micro_batch + 1 == self._settings.micro_batches:
            self._graphs.clear()
            self._ranks.sum_gradients(self._part.matrices().values())
            self._part.divide_gradients(labelled_tokens)
            norm = gradient_norm(self._part.matrices().values())
            if not self._settings.trains_edge:  # else the gradient by the activations has been looked at
                _check_gradient(math.isfinite(norm), step)
            if not self._settings.max_grad_norm:
                self.take_step(step, total_steps, gradient_factor=1.0)
        return Trained(
            loss=self._summed / labelled_tokens,
            labelled_tokens=self._labelled_tokens,
            gradients=gradients,
            summed_losses=summed_losses,
            gradient_norm=norm,
        )

    def _is_finite_everywhere(self, is_finite: bool) -> bool:
        (not_finite,) = self._ranks.sum_numbers([not is_finite])
        return not not_finite

    @torch.no_grad()
    def _check_base(self, what: str, union: Sequence[LabelledBatch], compute: Callable[[], torch.Tensor]) -> None:
        """
        Args:
            what: it computes of the batches, in the plural.

        Raises:
            ModelError: without the adapter this is not finite either, here or on another rank.
        """
        with self._part.without_adapter():
            is_finite = bool(torch.isfinite(compute()).all())
        if not self._is_finite_everywhere(is_finite):
            raise self._model.not_finite(what)

    def _as_leaf(self, union: Sequence[LabelledBatch], seeds: Seeds) -> torch.Tensor:
        """The values of all, (N, d), for a forward pass with dropout and for a backward pass."""
        self._part.train()
        of_sequences = [seed for of_client in seeds.values() for seed in of_client]
        stands_in = bool(seeds) and len(of_sequences) < sum(len(batch.lengths) for batch in union)
        self._part.seed_dropout([*of_sequences, 0] if stands_in else of_sequences)
        return self._uploads.joined([batch.values for batch in union]).requires_grad_(self._settings.trains_edge)

    def _union(self, batches: Iterable[LabelledBatch]) -> list[LabelledBatch]:
        """What is computed of these: them, and if they have no row what stands in for one while other ranks have some."""
        union = list(batches)
        if self._stand_in is not None:
            num_rows = sum(len(batch.values) for batch in union)
            (rows_of_all,) = self._ranks.sum_numbers([num_rows])
            if rows_of_all and not num_rows:
                union.append(self._stand_in)
        return union

    @torch.no_grad()
    def _losses(self, batches: Sequence[LabelledBatch]) -> torch.Tensor:
        """(M,) in nats, without dropout."""
        self._part.eval()
        union = self._union(batches)
        activations = self._uploads.joined([batch.values for batch in union])
        if not len(activations):
            return activations.new_zeros(0)
        return self._part.losses(activations, *_shape(union), self._labels(union))

    @torch.no_grad()
    def _hidden(self, batches: Sequence[LabelledBatch]) -> torch.Tensor:
        """(M, d) behind the final norm, without dropout."""
        self._part.eval()
        union = self._union(batches)
        activations = self._uploads.joined([batch.values for batch in union])
        return self._part.hidden(activations, *_shape(union)) if len(activations) else activations

    def _labels(self, union: Sequence[LabelledBatch]) -> torch.Tensor:
        """(M,) of all batches."""
        return self._uploads.joined([batch.labels for batch in union]).long()


def _shape(union: Sequence[LabelledBatch]) -> tuple[Array, Array]:
    """Lengths and label counts of all sequences, (B,) each, which stay on the host."""
    return numpy.concatenate([batch.lengths for batch in union]), numpy.concatenate([batch.label_counts for batch in union])


def _check_gradient(is_finite: bool, step: int) -> None:
    """
    Raises:
        TrainingDiverged: it is not finite, here or on another rank.
    """
    if not is_finite:
        raise TrainingDiverged(f"the gradient of step {step} is not finite; try a lower --lr")


def _read_gradient(activations: torch.Tensor, *more: torch.Tensor) -> list[Array]:
    """
    After a backward pass: the gradient by the activations, what else is given, and whether it is finite. There is no such
    gradient where the edge part learns nothing.
    """
    gradient = activations.new_zeros(0) if activations.grad is None else activations.grad
    return read_back(gradient, *more, torch.isfinite(gradient).all())


def make_trainer(
    config: ServerConfig, model: PretrainedModel, adapter: Adapter, device: torch.device, ranks: "ProcessGroup | None" = None
) -> PartTrainer:
    """That of a run with these settings, which are settled; see `PartTrainer`."""
    sharding = None
    if config.shard:
        from split_model.sharding import Sharding

        assert ranks is not None, "one process has nobody to share with"
        assert ranks.group is not None
        sharding = Sharding(ranks.group, device)
    return PartTrainer(
        model,
        config.settings(),
        adapter,
        weight_dtype=DTYPES[config.dtype],
        device=device,
        in_bfloat16=config.residual == "bfloat16",
        ranks=ranks,
        sharding=sharding,
    )


def _by_client(rows: Array, counts: dict[str, int]) -> dict[str, Array]:
    """Each client's rows, of those of all one after the other; without those of what stood in."""
    ends = numpy.cumsum(list(counts.values()))
    return {client: rows[end - counts[client] : end] for client, end in zip(counts, ends, strict=True)}
