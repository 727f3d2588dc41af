"""
Reads a PEFT folder, which may be a stranger's, without PEFT: which layers its matrices adapt, and how they are scaled.
"""

import math
import re
from pathlib import Path

import ml_dtypes  # noqa: F401  # teaches numpy, and so safetensors, what bfloat16 is
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from graphs import Floats
from split_model import ModelConfig
from storage import AdapterSettings, Folder
from storage.adapter_settings import CONFIG_FILE, WEIGHTS_FILE

from .errors import ExportError
from .lora import LoraAdapter, LoraUpdate
from .patterns import AT_END, BEFORE_NUMBER, INSIDE, WHOLE, match_all

__all__ = ["BeyondLora", "copy_adapter", "read_adapter"]

SHOWN = 3


class BeyondLora(ExportError):
    """An adapter that is more than plain LoRA on the blocks' linear layers. PEFT itself may still be able to merge it."""


def read_adapter(folder: Path, config: ModelConfig) -> LoraAdapter:
    """
    The adapter, if merging it means what PEFT makes of it: adding a product of two matrices to layers of the blocks.

    Raises:
        BeyondLora: the adapter is more than that.
        AdapterError, ExportError: there is none, it cannot be read, or it is of another shape than the model.
    """
    settings = AdapterSettings.read(folder)
    matrices = _read_matrices(Folder(folder, ExportError).require(WEIGHTS_FILE))
    targets = Targets(settings, config)
    longest = max((size for matrix in matrices.values() for size in matrix.shape), default=0)
    for layer in targets.layers:
        if targets.rank(layer) > longest:
            raise ExportError(f"{settings.path}: {layer} has rank {targets.rank(layer)}, and no matrix is that large")
    blocks = re.escape(config.stored_name(config.names.blocks))
    of_a_layer = re.compile(rf"base_model\.model\.({blocks}\.\d+\.\w+\.\w+)\.lora_([AB])\.weight")
    pairs: dict[str, dict[str, Floats]] = {}
    beyond = settings.beyond
    for name, matrix in matrices.items():
        if found := of_a_layer.fullmatch(name):
            pairs.setdefault(found[1], {})[found[2]] = matrix
        else:
            beyond.append(name.removeprefix("base_model.model."))
    for layer in sorted(pairs.keys() ^ set(targets.layers)):
        beyond.append(f"matrices of {layer}, which target_modules does not name" if layer in pairs else f"none of {layer}")
    if beyond:
        more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
        raise BeyondLora(f"{folder}: the adapter is more than plain LoRA: {', '.join(beyond[:SHOWN])}{more}")
    return {layer.removeprefix(config.names.prefix): _update(folder, layer, pair, targets) for layer, pair in pairs.items()}


def copy_adapter(folder: Path, copy: Path) -> None:
    """Copy the settings and the matrices, and nothing else, of an adapter that `read_adapter` has accepted."""
    copy.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (copy / name).write_bytes((folder / name).read_bytes())


class Targets:
    """
    The layers that an adapter's settings name, and the rank and scale of each, by the rules of PEFT's functions
    `check_target_module_exists` and `get_pattern_key`.

    Raises:
        ExportError: a pattern is not a regular expression, or cannot be matched in seconds.
    """

    def __init__(self, settings: AdapterSettings, config: ModelConfig) -> None:
        self._settings = settings
        self._values = values = settings.values
        layers: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        """Of all linear layers, (in, out)."""
        for block in range(config.num_layers):
            for layer, shape in config.layer_shapes.items():
                name = f"{config.stored_name(config.block_name(block))}.{layer}"
                layers[name], self.shapes[name] = block, shape
        try:
            # Every expression with every name that PEFT may match it with: if that is fast here, PEFT will not hang on it.
            self._matched = match_all(_expressions(settings), [*layers, *config.other_modules])
        except ExportError as error:
            raise ExportError(f"{settings.path}: {error}") from None
        chosen = values.get("layers_to_transform")
        some_blocks = {chosen} if isinstance(chosen, int) else set(chosen or layers.values())
        whole = isinstance(values.get("target_modules"), str)
        self.layers = [
            layer
            for layer, block in layers.items()
            if self._is_named("target_modules", layer) and not self._is_named("exclude_modules", layer)
            if whole or block in some_blocks
        ]

    def rank(self, layer: str) -> int:
        return int(self._of_pattern("rank_pattern", layer, self._values["r"]))

    def scale(self, layer: str) -> float:
        alpha, rank = float(self._of_pattern("alpha_pattern", layer, self._values["lora_alpha"])), self.rank(layer)
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def _is_named(self, setting: str, layer: str) -> bool:
        names = self._values.get(setting) or []
        if isinstance(names, str):
            return layer in self._matched[WHOLE, names]
        return any(layer == name or layer.endswith(f".{name}") for name in names)

    def _of_pattern(self, setting: str, layer: str, default: float) -> float:
        """The value of the first pattern that matches the end of a layer's full name."""
        patterns: dict[str, float] = self._values.get(setting) or {}
        return next((value for pattern, value in patterns.items() if layer in self._matched[AT_END, pattern]), default)


def _expressions(settings: AdapterSettings) -> list[tuple[str, str]]:
    values, found = settings.values, []
    for form, keys in {
        WHOLE: [name for key in ("target_modules", "exclude_modules") if isinstance(name := values.get(key), str)],
        AT_END: [*(values.get("rank_pattern") or {}), *(values.get("alpha_pattern") or {})],
        INSIDE: values.get("modules_to_save") or [],
        BEFORE_NUMBER: [names] if isinstance(names := values.get("layers_pattern"), str) else names or [],
    }.items():
        found += [(form, key) for key in keys]
    return found


def _read_matrices(path: Path) -> dict[str, Floats]:
    try:
        matrices = {name: matrix.astype(np.float32) for name, matrix in load_file(path).items()}
    except (
        OSError,
        SafetensorError,
        TypeError,
        AttributeError,
        KeyError,
    ) as error:  # the last three: numpy lacks the type
        raise ExportError(f"{path} cannot be read as safetensors: {error}") from None
    if not matrices:
        raise ExportError(f"{path}: the adapter is empty")
    for name, matrix in matrices.items():
        if not np.isfinite(matrix).all():
            raise ExportError(f"{path}: {name} has values that are not finite numbers; the adapter cannot be used")
    return matrices


def _update(folder: Path, layer: str, pair: dict[str, Floats], targets: Targets) -> LoraUpdate:
    if pair.keys() != {"A", "B"}:
        raise ExportError(f"{folder}: {layer} has only one of its two matrices")
    a, b = pair["A"], pair["B"]
    inputs, outputs = targets.shapes[layer]
    rank = targets.rank(layer)
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise ExportError(
            f"{folder}: the matrices of {layer} are {list(a.shape)} and {list(b.shape)}, the model and the adapter's settings "
            f"ask for [{rank}, {inputs}] and [{outputs}, {rank}]; the adapter is of another model"
        )
    return LoraUpdate(a=a, b=b, scale=targets.scale(layer))
