"""
LoRA's dropout on a device: which inputs of A are kept is a function of a seed alone, and the same for every engine, so that a
step that is repeated, by whichever engine, gives the same result.
"""

from collections.abc import Iterable

import numpy as np

from protocol import Array

__all__ = ["dropout_masks"]


def dropout_masks(seed: int, block: int, probability: float, num_rows: int, widths: Iterable[int]) -> list[Array]:
    """
    The masks of a block's adapted layers for one micro-batch.

    Each element takes 32 of the bits that SFC64 gives. Bits, and not a distribution of numpy's: only for the former does numpy
    promise that they stay the same in later versions. SFC64: numpy's fastest. 32 bits: the probability is right to 2e-10.

    Args:
        block: 0 to cut - 1. Every block has a generator of its own, so its masks can be drawn again without those before.
        probability: of losing an element.
        widths: of the layers' inputs, in the order of the forward pass.

    Returns:
        For each width (num_rows, width) uint8: 1 keeps an element, 0 drops it.
    """
    source = np.random.SFC64([seed, block])
    limit = np.uint32(round((1 - probability) * 2**32) - 1)
    return [_mask(source, limit, num_rows, width) for width in widths]


def _mask(source: np.random.BitGenerator, limit: np.uint32, num_rows: int, width: int) -> Array:
    size = num_rows * width
    bits = source.random_raw(-(-size // 2)).astype("<u8", copy=False).view("<u4")[:size]
    mask: Array = (bits <= limit).view(np.uint8).reshape(num_rows, width)
    return mask
