"""What exported graphs are held to: transformers, run as the tests ask, and an exported graph run as a caller would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.exported_model import ExportedModel, read_manifest

Ids = NDArray[np.int64]


def random_ids(vocabulary: int, *shape: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


def left_padded(lengths: Sequence[int]) -> Ids:
    """A mask with as many ones at the end of each row."""
    return np.array([[0] * (max(lengths) - length) + [1] * length for length in lengths])


@torch.no_grad()
def logits_of(model: Any, ids: Ids, mask: Ids | None = None) -> NDArray[np.float32]:
    """(B, S) -> (B, S, V) by transformers."""
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    ids, mask, positions = (torch.from_numpy(array) for array in (ids, mask, positions))
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()  # type: ignore[no-any-return]


def exported(folder: Path, precision: str = "fp32", *, with_adapter: bool = False) -> ExportedModel:
    manifest = read_manifest(folder)
    return ExportedModel(manifest.precisions[precision].graphs, manifest.adapter if with_adapter else None)


def decode(model: ExportedModel, ids: Ids, mask: Ids, prefill: int) -> NDArray[np.float32]:
    """The same logits as of one call, computed for ``prefill`` tokens at once and then token by token."""
    logits, cache = model.step(ids[:, :prefill], mask[:, :prefill], model.empty_cache(len(ids)))
    found = [logits]
    for end in range(prefill + 1, ids.shape[1] + 1):
        logits, cache = model.step(ids[:, end - 1 : end], mask[:, :end], cache)
        found.append(logits)
    return np.concatenate(found, 1)


def largest_difference(found: NDArray[np.float32], expected: NDArray[np.float32], mask: Ids | None = None) -> float:
    """Where the mask, if there is one, is 1: what stands at padding means nothing."""
    difference = np.abs(found - expected)
    return float(difference.max() if mask is None else difference[mask.astype(bool)].max())
