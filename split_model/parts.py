"""GPT-2 cut in two at a block boundary: what a device holds, and what the server holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage import AdapterError, ModelError

from .blocks import Block, LayerNorm
from .lora import Adapter, LoraConfig, LoraLinear, SeededDropout, adapter_name
from .loss import summed_cross_entropy
from .packing import Packing, labelled_positions
from .precision import working_dtype
from .pretrained_model import PretrainedModel

__all__ = ["EdgePart", "ServerPart", "check_cut_layer"]


def check_cut_layer(cut_layer: int, num_layers: int) -> None:
    """
    Raises:
        ModelError: unless both parts have a block.
    """
    if not 0 < cut_layer < num_layers:
        raise ModelError(
            f"cut layer must be between 1 and {num_layers - 1} for a model of {num_layers} blocks, got {cut_layer}"
        )


class Part(nn.Module):
    """
    Consecutive blocks of a GPT-2 with LoRA.

    Args:
        weight_dtype: dtype of the frozen matrices; everything else is in `working_dtype`.
    """

    def __init__(
        self, model: PretrainedModel, blocks: range, lora: LoraConfig, *, weight_dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.dtype, self.device = working_dtype(weight_dtype), device
        self.dropout = SeededDropout(lora.dropout, device)
        parts = [Block(model, index, weight_dtype, self.dtype, device) for index in blocks]
        self.blocks = nn.ModuleList(parts)
        self._matrices: dict[str, nn.Parameter] = {}
        self._adapted: list[LoraLinear] = []
        for block in parts:
            for layer, linear in block.linear_layers().items():
                if lora.adapts(layer):
                    self._adapted.append(linear)
                    for matrix, parameter in linear.adapt(lora, self.dropout, self.dtype).items():
                        self._matrices[adapter_name(block.index, layer, matrix)] = parameter

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model alone, for as long as this lasts."""
        for linear in self._adapted:
            linear.is_adapted = False
        try:
            yield
        finally:
            for linear in self._adapted:
                linear.is_adapted = True

    def seed_dropout(self, seed: int) -> None:
        """Fix the dropout masks of the next forward pass."""
        self.dropout.generator.manual_seed(seed)

    def matrices(self) -> dict[str, nn.Parameter]:
        """The trainable matrices under PEFT's names, in the order of the forward pass."""
        return dict(self._matrices)

    def adapter(self) -> Adapter:
        """A copy of the matrices' values, on the CPU."""
        return {name: matrix.detach().cpu().clone() for name, matrix in self._matrices.items()}

    def gradients(self) -> Adapter:
        """The matrices' gradients, on the CPU; zero where none came."""
        return {
            name: (torch.zeros_like(matrix) if matrix.grad is None else matrix.grad).cpu()
            for name, matrix in self._matrices.items()
        }

    def divide_gradients(self, divisor: int) -> None:
        """Make the gradients of a sum those of a mean."""
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

    def _run(self, hidden: Tensor, packing: Packing) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, packing)
        return hidden


class EdgePart(Part):
    """Embeddings and blocks [0, cut). Of the token embedding, only the rows a batch uses are read."""

    def __init__(
        self, model: PretrainedModel, cut_layer: int, lora: LoraConfig, *, weight_dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model, range(cut_layer), lora, weight_dtype=weight_dtype, device=device)
        config = model.config
        self.width = config.width
        model.tensor("wte.weight", (config.vocabulary_size, config.width))  # is there, and has its shape
        self.tokens = model.rows("wte.weight")
        self.positions = model.tensor("wpe.weight", (config.num_positions, config.width))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Packed ids (N,) and lengths (B,), both on the CPU -> activations (N, d)."""
        packing = Packing(lengths)
        tokens_embedded = self.tokens.gather(tokens).to(self.device, self.dtype)
        hidden = tokens_embedded + F.embedding(packing.positions, self.positions).to(self.device, self.dtype)
        return self._run(hidden, packing if self.device.type == "cpu" else Packing(lengths.to(self.device)))


class ServerPart(Part):
    """Blocks [cut, L), the final norm, the LM head and the loss."""

    def __init__(
        self, model: PretrainedModel, cut_layer: int, lora: LoraConfig, *, weight_dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(model, range(cut_layer, model.config.num_layers), lora, weight_dtype=weight_dtype, device=device)
        config = model.config
        self.final_norm = LayerNorm(model, "ln_f", self.dtype, device)
        head = "wte.weight" if config.tied_head else "lm_head.weight"
        self.head = model.tensor(head, (config.vocabulary_size, config.width)).to(device, weight_dtype)

    def summed_loss(self, activations: Tensor, lengths: Tensor, label_counts: Tensor, labels: Tensor) -> Tensor:
        """
        Sum of the cross-entropies of all labels, in nats.

        Args:
            activations: (N, d) packed.
            lengths: (B,) rows of each sequence.
            label_counts: (B,) how many of the last rows of each sequence have a label.
            labels: (M,) the next token at those rows; M = sum(label_counts).
        """
        hidden = self._run(activations, Packing(lengths))
        hidden = self.final_norm(hidden.index_select(0, labelled_positions(lengths, label_counts)))
        return summed_cross_entropy(hidden, self.head, labels)

    def logits(self, activations: Tensor, lengths: Tensor) -> Tensor:
        """Activations (N, d) -> logits (N, V). For generation and for tests; training never holds them all."""
        hidden = self.final_norm(self._run(activations, Packing(lengths)))
        logits: Tensor = (hidden.to(self.head.dtype) @ self.head.T).to(self.dtype)
        return logits
