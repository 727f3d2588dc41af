"""The server's arithmetic in PyTorch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy
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
    derive_seed,
)
from protocol.codecs import Coded
from split_model import (
    Adapter,
    LoraConfig,
    OptimiserConfig,
    PretrainedModel,
    ServerPart,
    adamw,
    adapter_shapes,
    gradient_norm,
    optimiser_state,
    restore_optimiser,
    take_step,
)
from storage import AdapterError

from .federation import Aggregated, Trained

__all__ = ["TorchEngine"]

ADAPTER = "adapter/"


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


class TorchEngine:
    """
    An `Engine`: shapes, units and errors of its methods stand there.

    The edge adapter lives here too, in float32 or float64 on the CPU: devices keep no optimiser state in rounds of one step.

    Args:
        adapter: initial LoRA matrices of the whole model, both parts: A is (r, inputs), B is (outputs, r).
        weight_dtype: of the frozen weights; adapters and their optimisers are never less exact than float32.
    """

    def __init__(
        self,
        model: PretrainedModel,
        settings: RunSettings,
        adapter: Adapter,
        *,
        weight_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        lora = LoraConfig(**settings.lora())
        self._model, self._settings = model, settings
        optimiser = OptimiserConfig(**settings.optimiser())
        self._part = ServerPart(
            model,
            settings.cut_layer,
            lora,
            weight_dtype=weight_dtype,
            device=device,
            with_head=settings.labels == "server",
        )
        self._part.load_adapter({name: adapter[name] for name in self._part.matrices()})
        edge_names = adapter_shapes(model.config, lora, range(settings.cut_layer))
        self._edge = {name: nn.Parameter(adapter[name].to(self._part.dtype, copy=True)) for name in edge_names}
        self._server_optimiser = adamw(self._part.matrices().values(), optimiser)
        self._edge_optimiser = adamw(self._edge.values(), optimiser)
        self._summed, self._labelled_tokens = 0.0, 0
        """Of the step so far: its loss in nats, and how many labels it has."""
        self._graphs: dict[int, _Graph] = {}
        """Of the step's micro-batches whose gradient is still to come."""
        self.round_end: Adapter = self._state()

    def train(self, step: int, total_steps: int, micro_batch: int, batches: dict[str, Activations]) -> Trained:
        if not micro_batch:
            self._begin_step()
        gradients, summed_losses = self._gradients(step, micro_batch, batches)
        return self._trained(step, total_steps, micro_batch, gradients, summed_losses)

    def forward(self, step: int, micro_batch: int, batches: dict[str, Activations]) -> dict[str, Array]:
        if not micro_batch:
            self._begin_step()
        union = list(batches.values())
        activations = self._as_leaf(step, micro_batch, union)
        hidden = self._hidden(activations, union) if len(activations) else activations
        if not torch.isfinite(hidden).all():
            self._check_base("hidden states", lambda: self._hidden(activations, union))
            raise TrainingDiverged(f"the hidden states of step {step} are not finite; try a lower --lr")
        graph = self._graphs[micro_batch] = _Graph(
            activations,
            hidden,
            num_rows={client: len(batch.values) for client, batch in batches.items()},
            num_labelled={client: batch.num_labelled for client, batch in batches.items()},
        )
        return _by_client(hidden.detach(), graph.num_labelled)

    def backward(self, step: int, total_steps: int, micro_batch: int, gradients: dict[str, HiddenGradient]) -> Trained:
        if not gradients:
            return self._trained(step, total_steps, micro_batch, {}, {})
        graph = self._graphs.pop(micro_batch)
        zeros = graph.hidden.new_zeros(1, graph.hidden.shape[1])
        upstream = [
            self._join([gradients[client].values]) if client in gradients else zeros.expand(rows, -1)
            for client, rows in graph.num_labelled.items()
        ]
        torch.autograd.backward(graph.hidden, torch.cat(upstream))
        summed_losses = {client: gradient.summed_loss for client, gradient in gradients.items()}
        self._summed += sum(summed_losses.values())
        self._labelled_tokens += sum(gradient.labelled_tokens for gradient in gradients.values())
        of_all = _by_client(self._gradient_of(graph.activations, step), graph.num_rows)
        return self._trained(step, total_steps, micro_batch, {client: of_all[client] for client in gradients}, summed_losses)

    def _begin_step(self) -> None:
        self._summed, self._labelled_tokens = 0.0, 0
        self._graphs.clear()

    def _trained(
        self, step: int, total_steps: int, micro_batch: int, gradients: dict[str, Array], summed_losses: dict[str, float]
    ) -> Trained:
        """With a step's last micro-batch, update the server part."""
        norm = 0.0
        # A step without any label has gradients of 0: it teaches nothing, and divides by 1.
        labelled_tokens = max(1, self._labelled_tokens)
        if micro_batch + 1 == self._settings.micro_batches:
            self._graphs.clear()
            self._part.divide_gradients(labelled_tokens)
            norm = gradient_norm(self._part.matrices().values())
            take_step(self._server_optimiser, self._settings.learning_rate_at(step, total_steps))
        return Trained(
            loss=self._summed / labelled_tokens,
            labelled_tokens=self._labelled_tokens,
            gradients=gradients,
            summed_losses=summed_losses,
            gradient_norm=norm,
        )

    def _gradients(
        self, step: int, micro_batch: int, batches: dict[str, Activations]
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """
        Of the micro-batch's summed loss by each client's values, (N, d), and its share of that loss. Adds the loss and its
        labels to the step's.
        """
        union = list(batches.values())
        if not sum(len(batch.values) for batch in union):
            return {client: batch.values for client, batch in batches.items()}, dict.fromkeys(batches, 0.0)
        activations = self._as_leaf(step, micro_batch, union)
        labels = self._join([batch.labels for batch in union]).long()
        # The sum, since how many labels the step has is known only with its last micro-batch.
        losses = self._part.losses(activations, *self._shape(union), labels)
        loss = losses.sum()
        if not torch.isfinite(loss):
            self._check_base("losses", lambda: self._summed_loss(activations, union, labels))
            raise TrainingDiverged(f"the loss of step {step} is {loss.item()}; try a lower --lr")
        torch.autograd.backward(loss)
        gradient = self._gradient_of(activations, step)
        self._summed += loss.item()
        self._labelled_tokens += len(labels)
        of_rows = _by_client(losses.detach(), {client: len(batch.labels) for client, batch in batches.items()})
        summed_losses = {client: float(rows.sum(dtype=numpy.float64)) for client, rows in of_rows.items()}
        return _by_client(gradient, {client: len(batch.values) for client, batch in batches.items()}), summed_losses

    def _as_leaf(self, step: int, micro_batch: int, union: list[Activations]) -> torch.Tensor:
        """The values of all, (N, d), for a forward pass with this micro-batch's dropout and for a backward pass."""
        self._part.train()
        self._part.seed_dropout(derive_seed(self._settings.seed, "server", "dropout", step, micro_batch))
        return self._join([batch.values for batch in union]).requires_grad_()

    def _gradient_of(self, activations: torch.Tensor, step: int) -> torch.Tensor:
        """
        (N, d), after a backward pass.

        Raises:
            TrainingDiverged: it is not finite.
        """
        assert activations.grad is not None
        if not torch.isfinite(activations.grad).all():
            raise TrainingDiverged(f"the gradient of step {step} is not finite; try a lower --lr")
        return activations.grad

    @torch.no_grad()
    def check(self, batches: list[Activations], others: list[str]) -> dict[str, float]:
        exactly = [replace(batch, values=batch.exact) for batch in batches if batch.exact is not None and len(batch.values)]
        labelled_tokens = sum(len(batch.labels) for batch in exactly)
        if not labelled_tokens:
            return {}
        came = {"": [batch for batch in batches if batch.exact is not None and len(batch.values)]}
        tried = {
            codec: [replace(batch, values=Coded.of(batch.values, codec).decode()) for batch in exactly] for codec in others
        }
        exact_loss = self._loss_of(exactly)
        return {codec: (self._loss_of(union) - exact_loss) / labelled_tokens for codec, union in {**came, **tried}.items()}

    def _loss_of(self, union: list[Activations]) -> float:
        """Of all batches together: the sum in nats, without dropout."""
        self._part.eval()
        labels = self._join([batch.labels for batch in union]).long()
        return self._summed_loss(self._join([batch.values for batch in union]), union, labels).item()

    def aggregate(self, step: int, total_steps: int, contributions: dict[str, Tensors], weights: dict[str, int]) -> Aggregated:
        norm = 0.0
        if self._settings.aggregate_every == 1:
            for name, matrix in self._edge.items():
                matrix.grad = torch.stack([_tensor(tensors[name]) for tensors in contributions.values()]).sum(0)
            norm = gradient_norm(self._edge.values())
            take_step(self._edge_optimiser, self._settings.learning_rate_at(step, total_steps))
        else:
            # FedAvg (arXiv 1602.05629). A round without any label has taught nobody anything: all count alike.
            weights = weights if any(weights.values()) else dict.fromkeys(weights, 1)
            total = sum(weights.values())
            with torch.no_grad():
                for name, matrix in self._edge.items():
                    shares = [_tensor(tensors[name]) * (weights[client] / total) for client, tensors in contributions.items()]
                    matrix.copy_(torch.stack(shares).sum(0))
        if not all(torch.isfinite(matrix).all() for matrix in self._edge.values()):
            raise TrainingDiverged(f"the edge adapter of step {step} is not finite; try a lower --lr")
        self.round_end = self._state()
        return Aggregated(edge_adapter=self.edge_adapter(), gradient_norm=norm)

    def restore(self, state: Adapter) -> None:
        adapter = {name.removeprefix(ADAPTER): tensor for name, tensor in state.items() if name.startswith(ADAPTER)}
        if adapter.keys() != self._edge.keys() | self._part.matrices().keys():
            raise AdapterError("the checkpoint's matrices are not those of the run's model and LoRA settings")
        self._part.load_adapter({name: adapter[name] for name in self._part.matrices()})
        with torch.no_grad():
            for name, matrix in self._edge.items():
                matrix.copy_(adapter[name])
        for prefix, optimiser in self._optimisers().items():
            restore_optimiser(optimiser, {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        self.round_end = self._state()

    def _state(self) -> Adapter:
        state = {f"{ADAPTER}{name}": matrix for name, matrix in self.adapter().items()}
        for prefix, optimiser in self._optimisers().items():
            state.update({f"{prefix}{name}": tensor for name, tensor in optimiser_state(optimiser).items()})
        return state

    def _optimisers(self) -> dict[str, torch.optim.AdamW]:
        return {"server_optimiser/": self._server_optimiser, "edge_optimiser/": self._edge_optimiser}

    @torch.no_grad()
    def evaluate(self, batch: Evaluation) -> float:
        self._part.eval()
        if not len(batch.values):
            return 0.0
        labels = self._join([batch.labels]).long()
        activations = self._join([batch.values])
        loss = self._summed_loss(activations, [batch], labels)
        if not torch.isfinite(loss):
            self._check_base("losses", lambda: self._summed_loss(activations, [batch], labels))
            raise TrainingDiverged(f"the loss of held-out texts is {loss.item()}; try a lower --lr")
        return loss.item()

    @torch.no_grad()
    def infer(self, batch: Evaluation) -> Array:
        self._part.eval()
        if not len(batch.values):
            return batch.values
        activations = self._join([batch.values])
        hidden = self._hidden(activations, [batch])
        if not torch.isfinite(hidden).all():
            self._check_base("hidden states", lambda: self._hidden(activations, [batch]))
            raise TrainingDiverged("the hidden states of held-out texts are not finite; try a lower --lr")
        return hidden.cpu().numpy()

    def edge_adapter(self) -> Tensors:
        return {name: matrix.detach().clone().numpy() for name, matrix in self._edge.items()}

    def adapter(self) -> Adapter:
        return {**{name: matrix.detach().clone() for name, matrix in self._edge.items()}, **self._part.adapter()}

    def _hidden(self, activations: torch.Tensor, union: Sequence[LabelledBatch]) -> torch.Tensor:
        """(M, d) behind the final norm, of activations (N, d): those of the batches one after the other."""
        return self._part.hidden(activations, *self._shape(union))

    def _summed_loss(self, activations: torch.Tensor, union: Sequence[LabelledBatch], labels: torch.Tensor) -> torch.Tensor:
        """
        In nats, a scalar.

        Args:
            activations: (N, d), those of the batches one after the other.
            labels: of all labelled tokens, in their order.
        """
        return self._part.summed_loss(activations, *self._shape(union), labels)

    def _shape(self, union: Sequence[LabelledBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and label counts of all sequences, (B,) each."""
        lengths = self._join([batch.lengths for batch in union]).long()
        return lengths, self._join([batch.label_counts for batch in union]).long()

    @torch.no_grad()
    def _check_base(self, what: str, compute: Callable[[], torch.Tensor]) -> None:
        """
        Args:
            what: it computes, in the plural.

        Raises:
            ModelError: without the adapter this is not finite either.
        """
        with self._part.without_adapter():
            if not torch.isfinite(compute()).all():
                raise self._model.not_finite(what)

    def _join(self, arrays: list[Array]) -> torch.Tensor:
        """One after the other along their first axis, where the model computes."""
        return torch.cat([_tensor(array) for array in arrays]).to(self._part.device)


def _by_client(rows: torch.Tensor, counts: dict[str, int]) -> dict[str, Array]:
    """Each client's rows, of those of all one after the other."""
    return {client: part.numpy() for client, part in zip(counts, torch.split(rows.cpu(), list(counts.values())), strict=True)}


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(array)
