"""What exported graphs are held to: transformers, run as the tests ask, and an exported graph run as a caller would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from numpy.typing import NDArray

from export.equalisation import Equalised
from export.exported_model import ExportedModel, read_manifest
from export.precision import PRECISIONS, sensitive_layers
from export.quantisation import BlockFormat, quantise
from graphs import StoredWeights
from split_model import PretrainedModel

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


def dequantised(rows: Any, form: BlockFormat) -> Any:
    """(N, K) as a runtime reads it, and the step between two values at every place."""
    stored = quantise([rows], form)
    integers, zero_points = stored.integers, stored.zero_points
    if form.bits == 4:
        integers, zero_points = (np.stack([both & 15, both >> 4], -1) for both in (integers, zero_points))
    blocks = integers.reshape(len(rows), -1, form.size).astype(np.float32)
    zero_points = zero_points.reshape(len(rows), -1)[:, : blocks.shape[1]].astype(np.float32)
    values = (blocks - zero_points[..., None]) * stored.scales[..., None]
    width = rows.shape[1]
    return values.reshape(len(rows), -1)[:, :width], np.repeat(np.abs(stored.scales), form.size, 1)[:, :width]


def rounded(folder: Path, precision: str) -> Any:
    """transformers' model with the weights that a quantised graph has."""
    base, form = PretrainedModel(folder), PRECISIONS[precision]
    config, weights = base.config, Equalised(StoredWeights(base), base.config)
    forms = dict.fromkeys(config.layer_shapes, form.matrices) | dict.fromkeys(sensitive_layers(config), form.sensitive)
    forms_by_name = {
        f"{config.block_name(block)}.{layer}": each for block in range(config.num_layers) for layer, each in forms.items()
    }
    state = {}
    for name in config.tensor_shapes:
        value, layer = weights.read(name), name.removesuffix(".weight")
        if name in (config.table_name, config.head_name):
            assert form.table is not None
            value = dequantised(value, form.table)[0]
        elif block_form := forms_by_name.get(layer):
            value = dequantised(value.T, block_form)[0].T
        turned = value.T if name in config.turned_matrices else value
        state[config.stored_name(name)] = torch.from_numpy(np.ascontiguousarray(turned))
    model = reference.load_base(folder)
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) <= ({config.separate_head_name} if config.tied_head else set())
    return model
