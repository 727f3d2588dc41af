"""
Cross-entropy over a large vocabulary in chunks of rows.

All logits of M rows, (M, V), would be by far the largest tensor of training: 2,048 rows of GPT-2's 50,257 tokens are 412 MB in
float32, and as much again for their gradient. So only one chunk of them exists at a time.

Where chunks end changes no loss, but a kernel for another number of rows may round otherwise. On the CPU they always end at the
same rows. On a CUDA device their size is found out once, so that a process repeats its own results to the bit; another process,
with other memory left, agrees with it as another card would.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .products import frozen_linear, frozen_linear_aligned

__all__ = ["Head", "cross_entropies", "summed_cross_entropy"]

CHUNK_ROWS = 256  # 256 x 50,257 logits in float32 are 51 MB
MOST_ROWS = 8192  # more make no product faster
SHARE = 8
"""Of the free memory of a CUDA device, a chunk takes at most this part of the whole."""
BYTES_OF_LOGIT = 12
"""At most, with the copies in other types that a chunk needs for a moment."""


class Head(nn.Module):
    """The frozen LM head, and the loss behind it."""

    weight: Tensor
    """(V, d), in the dtype of the product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, hidden: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """See `cross_entropies`."""
        return cross_entropies(hidden, self.weight, labels, smoothing)


def summed_cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The sum of the `cross_entropies`."""
    return cross_entropies(hidden, head, labels).sum()


def cross_entropies(hidden: Tensor, head: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """
    Of each row -log softmax(hidden head^T)[label], (M,), in nats. The head is frozen.

    With ``smoothing`` e it is (1 - e) of that, and e of the mean of -log softmax over the vocabulary: transformers'
    LabelSmoother.

    Args:
        hidden: (M, d), normalised.
        head: (V, d), in the dtype of the product.
        labels: (M,) ids below V.
    """
    return _CrossEntropies.apply(hidden, head, labels, smoothing)  # type: ignore[no-any-return, no-untyped-call]


@cache
def rows_at_a_time(device: torch.device, vocabulary_size: int) -> int:
    """Of a chunk: on a CUDA device a power of 2 by its free memory, asked once, when the weights are there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CHUNK_ROWS
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch has and does not use
    rows = max(1, free // (SHARE * BYTES_OF_LOGIT * vocabulary_size))
    return min(max(1 << rows.bit_length() - 1, CHUNK_ROWS), MOST_ROWS)


class _CrossEntropies(torch.autograd.Function):
    # The gradient by a row of ``hidden`` is (softmax(logits) - onehot(label)) head; smoothing makes of onehot(label)
    # (1 - e) onehot(label) + e / V. The forward pass computes it chunk by chunk from logits that are there anyhow; backward,
    # which would have to compute these a second time, only scales it.

    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        losses = hidden.new_empty(len(labels))
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        size = rows_at_a_time(head.device, len(head))
        for start in range(0, len(labels), size):
            chunk, targets = slice(start, start + size), labels[start : start + size]
            rows = torch.arange(len(targets), device=targets.device)
            logits = frozen_linear_aligned(hidden[chunk], head)  # (rows, V)
            logits -= logits.amax(1, keepdim=True)  # exp of what is left cannot overflow; in place, as all that follows
            of_labels = logits[rows, targets]
            if smoothing:
                of_labels = (1 - smoothing) * of_labels + smoothing * logits.mean(1)
            sums = logits.exp_().sum(1, keepdim=True)
            losses[chunk] = sums.log().squeeze(1) - of_labels
            if gradient is not None:
                difference = logits.div_(sums)  # softmax, (rows, V)
                if smoothing:
                    difference -= smoothing / len(head)
                difference[rows, targets] -= 1 - smoothing
                gradient[chunk] = frozen_linear(difference, head.T)
        context.gradient = gradient
        return losses

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return upstream[0].unsqueeze(1) * context.gradient, None, None, None
