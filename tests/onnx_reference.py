"""What exported graphs are held to: transformers, run as the tests ask, and an exported graph run as a caller would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import reference
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from export.exported_model import ExportedModel, read_manifest
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


def dequantised(
    integers: NDArray[np.uint8], scales: NDArray[np.float32], zero_points: NDArray[np.uint8], bits: int, width: int
) -> NDArray[np.float32]:
    """(N, width) as a runtime reads what a graph stores of it."""
    if bits == 4:
        integers, zero_points = (np.stack([both & 15, both >> 4], -1) for both in (integers, zero_points))
    blocks = integers.reshape(*scales.shape, -1).astype(np.float32)
    zero_points = zero_points.reshape(len(scales), -1)[:, : scales.shape[1]].astype(np.float32)
    values: NDArray[np.float32] = (blocks - zero_points[..., None]) * scales[..., None]
    return values.reshape(len(scales), -1)[:, :width]


def weights_in(path: Path) -> dict[str, NDArray[np.float32]]:
    """A graph's weights, in (out, in) where they are quantised; of several that are stored as one, each by its name."""
    graph = onnx.load(path).graph
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    widths = {name: array.shape for name, array in stored.items()}
    found = {name: array for name, array in stored.items() if "." in name and array.dtype == np.float32}
    for node in graph.node:
        settings = {item.name: item.i for item in node.attribute}
        for name in node.input:
            if "bits" in settings and name.endswith(".scales"):
                matrix = name.removesuffix(".scales")
                parts = [stored[f"{matrix}.{part}"] for part in ("integers", "scales", "zero_points")]
                width = settings.get("K", widths[name][1] * settings["block_size"])
                found[matrix] = dequantised(*parts, settings["bits"], width)  # type: ignore[arg-type]
    return found


def rounded(folder: Path, out: Path, precision: str) -> Any:
    """transformers' model with the weights that an exported graph has."""
    config = PretrainedModel(folder).config
    (path,) = read_manifest(out).precisions[precision].graphs
    found = {}
    for names, value in weights_in(path).items():
        start = 0
        for name in filter(config.tensor_shapes.__contains__, names.split("+")):
            shape, layer = config.tensor_shapes[name], name.split(".", 2)[-1].removesuffix(".weight")
            is_turned = layer in config.layer_shapes  # (out, in) in the graph
            rows = config.layer_shapes[layer][1] if is_turned else shape[0]
            some = value[start : start + rows]
            found[name] = some.T if is_turned else some[..., : shape[-1]] if some.ndim > 1 else some
            start += rows
    state = {}
    for name, value in found.items():
        value = value.T if name in config.turned_matrices else value
        state[config.stored_name(name)] = torch.from_numpy(np.array(value, order="C"))
    model = reference.load_base(folder)
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) <= ({config.separate_head_name} if config.tied_head else set())
    return model
