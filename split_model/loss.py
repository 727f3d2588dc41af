"""Cross-entropy of a large vocabulary without ever holding all its logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["summed_cross_entropy"]

CHUNK_ROWS = 256  # 256 x 50,257 logits in float32 are 51 MB


def summed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """
    Sum over rows of -log softmax(hidden head^T)[label], in nats. The head is frozen.

    Args:
        hidden: (M, d), normalised.
        head: (V, d), in the dtype of the product.
        labels: (M,) ids below V.
    """
    return _SummedCrossEntropy.apply(hidden, head, labels)  # type: ignore[no-any-return, no-untyped-call]


class _SummedCrossEntropy(torch.autograd.Function):
    # The gradient is softmax - onehot times the head: made chunk by chunk in the forward pass, while the logits are there.

    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        total = hidden.new_zeros(())
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        for start in range(0, len(labels), CHUNK_ROWS):
            chunk, targets = slice(start, start + CHUNK_ROWS), labels[start : start + CHUNK_ROWS]
            logits = (hidden[chunk].to(head.dtype) @ head.T).to(hidden.dtype)  # (rows, V)
            log_probabilities = F.log_softmax(logits, dim=1)
            total += F.nll_loss(log_probabilities, targets, reduction="sum")
            if gradient is not None:
                difference = log_probabilities.exp_()
                difference[torch.arange(len(targets), device=targets.device), targets] -= 1
                gradient[chunk] = (difference.to(head.dtype) @ head).to(hidden.dtype)
        context.gradient = gradient
        return total

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0] * context.gradient, None, None
