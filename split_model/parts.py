"""
A model cut in two at a block boundary: what a device holds, and what the server holds.

B sequences, N rows of their tokens one under the other, d elements in a row, V tokens in the vocabulary, L blocks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from storage import AdapterError, ModelError

from .decoder import Block, Embedding, final_norm
from .dropout import SeededDropout
from .lora import Adapter, LoraConfig, LoraLinear, adapted_layers, adapter_name
from .loss import Head
from .packing import Packing, Places
from .placement import Placement
from .pretrained_model import PretrainedModel
from .products import frozen_linear
from .rotary import Rotation
from .transfer import read_back

if TYPE_CHECKING:
    from .sharding import Sharding

__all__ = ["EdgePart", "ServerPart", "backpropagate", "check_cut_layer", "check_lora_rank"]


def check_cut_layer(cut_layer: int, num_layers: int) -> None:
    """
    Raises:
        ModelError: unless both parts have a block.
    """
    if not 0 < cut_layer < num_layers:
        raise ModelError(
            f"cut layer must be between 1 and {num_layers - 1} for a model of {num_layers} blocks, got {cut_layer}"
        )


def check_lora_rank(rank: int, width: int) -> None:
    """
    Raises:
        ModelError: it is more than the model's width.
    """
    if rank > width:
        raise ModelError(
            f"LoRA rank {rank} is more than the model's width, {width}; what is added to a matrix has no higher rank"
        )


def backpropagate(output: Tensor, gradient: Tensor) -> None:
    """Add to the parameters' gradients, given the loss's gradient by a part's output (N, d)."""
    # A scalar whose gradient is the wanted one. Given the gradient itself, autograd imports sympy: 25 MB and a second.
    torch.autograd.backward((output * gradient).sum())


class Blocks(nn.ModuleList):
    """One after the other."""

    def forward(self, hidden: Tensor, packing: Packing, kept: Places | None = None) -> Tensor:  # (N, d) -> (N, d)
        *before, last = self
        for block in before:
            hidden = block(hidden, packing)
        rows: Tensor = last(hidden, packing, kept)
        return rows


class Part(nn.Module):
    """
    Consecutive blocks of a model with LoRA.

    Args:
        weight_dtype: of the frozen matrices; for everything else see `Placement.dtype`.
        sharding: keeps a part of the frozen matrices here, where other processes have the rest.
    """

    def __init__(
        self,
        model: PretrainedModel,
        blocks: range,
        lora: LoraConfig,
        *,
        weight_dtype: torch.dtype,
        device: torch.device,
        in_bfloat16: bool = False,
        sharding: "Sharding | None" = None,
    ) -> None:
        super().__init__()
        config = model.config
        self.placement = Placement(weight_dtype, device, in_bfloat16)
        self.placement.prepare()
        self.dtype, self.device = self.placement.dtype, device
        self.dropout, rotation = SeededDropout(lora.dropout, device), Rotation(config.rotary, self.placement)
        self.blocks = Blocks()
        self._matrices: dict[str, nn.Parameter] = {}
        self._adapted: list[LoraLinear] = []
        for index in blocks:
            block = Block(config, model.tensors, index, self.placement, rotation)
            for layer in adapted_layers(config, lora) if index >= lora.first_block else ():
                linear = block.layers[layer]
                self._adapted.append(linear)
                for matrix, parameter in linear.adapt(lora, self.dropout, self.dtype).items():
                    self._matrices[adapter_name(config, index, layer, matrix)] = parameter
            if sharding is not None:
                sharding.shard(block)  # before the next is loaded: no process ever has them all
            self.blocks.append(block)
        if sharding is not None:
            sharding.shard(self.blocks)  # has no matrix of its own; it lets torch fetch the next block's while one computes

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within this context, compute with the base model alone."""
        for linear in self._adapted:
            linear.is_adapted = False
        try:
            yield
        finally:
            for linear in self._adapted:
                linear.is_adapted = True

    def seed_dropout(self, seeds: Sequence[int]) -> None:
        """Fix the dropout masks of the next forward pass: a seed for each sequence, 0 to 2^64 - 1; none without dropout."""
        self.dropout.seeds = seeds

    def use_dropout_masks(self, masks: Iterator[Tensor]) -> None:
        """Drop in the next forward pass what these masks drop; see `SeededDropout.masks`."""
        self.dropout.masks = masks

    def matrices(self) -> dict[str, nn.Parameter]:
        """The trainable matrices under PEFT's names, in the order of the forward pass."""
        return dict(self._matrices)

    def adapter(self) -> Adapter:
        """A copy of the matrices' values, on the CPU."""
        values = read_back(*self._matrices.values())
        return {name: torch.from_numpy(value).clone() for name, value in zip(self._matrices, values, strict=True)}

    def gradients(self) -> Adapter:
        """The matrices' gradients, on the CPU; zeros for a matrix that no backward pass has reached."""
        gradients = (torch.zeros_like(matrix) if matrix.grad is None else matrix.grad for matrix in self._matrices.values())
        return {name: torch.from_numpy(value) for name, value in zip(self._matrices, read_back(*gradients), strict=True)}

    def divide_gradients(self, divisor: int) -> None:
        """Turn gradients of a summed loss into those of its mean over ``divisor`` labels."""
        for matrix in self._matrices.values():
            if matrix.grad is not None:
                matrix.grad /= divisor

    def clear_gradients(self) -> None:
        for matrix in self._matrices.values():
            matrix.grad = None

    def load_adapter(self, adapter: Adapter) -> None:
        """
        Take over the values of exactly this part's matrices.

        Raises:
            AdapterError: a matrix is missing, unknown or of another shape.
        """
        if adapter.keys() != self._matrices.keys():
            odd = sorted(adapter.keys() ^ self._matrices.keys())
            raise AdapterError(f"adapter does not fit: {odd[0]} and {len(odd) - 1} more are missing or unknown")
        with torch.no_grad():
            for name, matrix in self._matrices.items():
                if adapter[name].shape != matrix.shape:
                    raise AdapterError(f"{name} has shape {list(adapter[name].shape)}, expected {list(matrix.shape)}")
                matrix.copy_(adapter[name])

    def _run(self, hidden: Tensor, packing: Packing, kept: Places | None = None) -> Tensor:
        """(N, d) -> (N, d), or (M, d) if only some rows of the last block are asked for."""
        self.dropout.begin(packing, kept)
        rows: Tensor = self.blocks(hidden.to(self.placement.residual), packing, kept)
        return rows


class EdgePart(Part):
    """The embedding and blocks [0, cut). Of the token embedding, only the rows that a batch uses are read."""

    def __init__(
        self, model: PretrainedModel, cut_layer: int, lora: LoraConfig, *, weight_dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model, range(cut_layer), lora, weight_dtype=weight_dtype, device=device)
        self.width = model.config.width
        self.embedding = Embedding(model.config, model.tensors, self.placement)

    def forward(self, tokens: ArrayLike, lengths: ArrayLike) -> Tensor:
        """Packed ids (N,) and lengths (B,), both on the host -> activations (N, d) on the device."""
        packing = Packing(lengths, self.device)
        return self._run(self.embedding(numpy.asarray(tokens), packing), packing).to(self.dtype)


class ServerPart(Part):
    """
    Blocks [cut, L) and the final norm, with the LM head and the loss behind them.

    Args:
        with_head: whether there is a head: where devices compute the loss, it would only take memory.
        in_bfloat16: whether what flows through the blocks is in bfloat16 as well; see `Placement.residual`.
        sharding: see `Part`; of the head, too.
    """

    def __init__(
        self,
        model: PretrainedModel,
        cut_layer: int,
        lora: LoraConfig,
        *,
        weight_dtype: torch.dtype,
        device: torch.device,
        with_head: bool = True,
        in_bfloat16: bool = False,
        sharding: "Sharding | None" = None,
    ) -> None:
        super().__init__(
            model,
            range(cut_layer, model.config.num_layers),
            lora,
            weight_dtype=weight_dtype,
            device=device,
            in_bfloat16=in_bfloat16,
            sharding=sharding,
        )
        self.final_norm = final_norm(model.config, model.tensors, self.placement)
        self._head = Head(model.tensors[model.config.head_name].view().to(device, weight_dtype)) if with_head else None
        if sharding is not None and self._head is not None:
            sharding.shard(self._head, again_in_backward=False)  # the loss' gradient is computed with it

    @property
    def head(self) -> Tensor:
        """(V, d), frozen."""
        return self._with_head().weight

    def hidden(self, activations: Tensor, lengths: ArrayLike, label_counts: ArrayLike) -> Tensor:
        """
        Hidden states (M, d) behind the final norm, at the labelled rows.

        Args:
            activations: (N, d) packed, on the device.
            lengths: (B,) rows of each sequence, on the host.
            label_counts: (B,) how many of the last rows of each sequence have a label; M = sum(label_counts). On the host.
        """
        packing = Packing(lengths, self.device)
        # Rows without a label end where the last block has mixed them into others: neither its MLP nor the head, a third of a
        # small model's work, is computed for them.
        hidden: Tensor = self.final_norm(self._run(activations, packing, packing.labelled(label_counts)).to(self.dtype))
        return hidden

    def losses(
        self, activations: Tensor, lengths: ArrayLike, label_counts: ArrayLike, labels: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """
        Cross-entropies of all labels, (M,), in nats.

        Args:
            activations, lengths, label_counts: see `hidden`.
            labels: (M,) the next token at the labelled rows, on the device.
            smoothing: see `cross_entropies`.
        """
        losses: Tensor = self._with_head()(self.hidden(activations, lengths, label_counts), labels, smoothing)
        return losses

    def summed_loss(
        self, activations: Tensor, lengths: ArrayLike, label_counts: ArrayLike, labels: Tensor, smoothing: float = 0.0
    ) -> Tensor:
        """The sum of the `losses`."""
        return self.losses(activations, lengths, label_counts, labels, smoothing).sum()

    def logits(self, activations: Tensor, lengths: ArrayLike) -> Tensor:
        """Activations (N, d) -> logits (N, V). For generation and for tests; training never holds them all."""
        hidden = self.final_norm(self._run(activations, Packing(lengths, self.device)).to(self.dtype))
        return frozen_linear(hidden, self.head)

    def _with_head(self) -> Head:
        assert self._head is not None, "this part was made without its head"
        return self._head
