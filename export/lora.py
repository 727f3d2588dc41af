"""A LoRA adapter as PEFT keeps it, read without PEFT and without torch."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ExportError
from .weights import Floats, StoredWeights, Weights

if TYPE_CHECKING:  # a graph is built without torch, which split_model imports
    from split_model import ModelConfig

__all__ = ["BeyondLora", "LoraAdapter", "LoraUpdate", "Merged", "lora_updates", "read_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT's LoraConfig under which an adapter does more than to add a product of two matrices.
BEYOND = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
    *(
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "velora_config",
    ),
)
MATRIX = re.compile(r"base_model\.model\.transformer\.(h\.\d+\.\w+\.\w+)\.lora_([AB])\.weight")


class BeyondLora(ExportError):
    """An adapter that is more than plain LoRA: PEFT itself may be able to merge it."""


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """What is added to a layer's matrix (in, out): scale * (B A) transposed."""

    a: Floats
    """(r, in)"""
    b: Floats
    """(out, r)"""
    scale: float

    def matrix(self) -> Floats:
        update: Floats = self.a.T @ (self.b.T * np.float32(self.scale))
        return update


LoraAdapter = dict[str, LoraUpdate]
"""By layer, such as "h.0.attn.c_attn"."""


class Merged:
    """Weights with an adapter in them."""

    def __init__(self, weights: Weights, adapter: LoraAdapter) -> None:
        self._weights, self._adapter = weights, adapter

    def read(self, name: str) -> Floats:
        tensor, update = self._weights.read(name), self._adapter.get(name.removesuffix(".weight"))
        return tensor if update is None else tensor + update.matrix()


def read_adapter(folder: Path, config: "ModelConfig") -> LoraAdapter:
    """
    Raises:
        BeyondLora: the adapter does more than LoRA does.
        ExportError: there is none, it cannot be read, or it is of another shape than the model.
    """
    settings = _read_settings(folder)
    beyond = [option for option in BEYOND if settings.get(option)]
    if settings.get("bias", "none") != "none":
        beyond.append("bias")
    if beyond:
        raise BeyondLora(f"{folder}: the adapter uses {', '.join(beyond)}")
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ExportError(f"{path} is missing; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    stored = StoredWeights([path])
    return lora_updates(folder, {name: stored.read(name) for name in stored.names()}, settings, config)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path} is missing; an adapter folder has {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ExportError(f"{folder}: only LoRA adapters can be exported; this one's peft_type is {kind!r}")
    return dict(settings)


def lora_updates(where: Path, matrices: dict[str, Floats], settings: dict[str, Any], config: "ModelConfig") -> LoraAdapter:
    """
    The adapter that matrices under PEFT's names make.

    Args:
        where: they come from, for messages.
        settings: of PEFT's LoraConfig.

    Raises:
        ExportError: a matrix is missing, or adapts no layer of the model, or is of another shape.
    """
    pairs: dict[str, dict[str, Floats]] = {}
    for name, matrix in matrices.items():
        found = MATRIX.fullmatch(name)
        layer = found[1].split(".", 2) if found else []
        if found is None or layer[2] not in config.layer_shapes or int(layer[1]) >= config.num_layers:
            known = ", ".join(config.layer_shapes)
            raise ExportError(f"{where}: {name} adapts nothing that is known; known are {known} of {config.num_layers} blocks")
        pairs.setdefault(found[1], {})[found[2]] = matrix
    if not pairs:
        raise ExportError(f"{where}: the adapter is empty")
    return {layer: _update(where, layer, pair, settings, config) for layer, pair in pairs.items()}


def _update(where: Path, layer: str, pair: dict[str, Floats], settings: dict[str, Any], config: "ModelConfig") -> LoraUpdate:
    if pair.keys() != {"A", "B"}:
        raise ExportError(f"{where}: {layer} has only one of its two matrices")
    a, b = pair["A"], pair["B"]
    inputs, outputs = config.layer_shapes[layer.split(".", 2)[2]]
    rank = a.shape[0]
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise ExportError(
            f"{where}: the matrices of {layer} are {list(a.shape)} and {list(b.shape)}, the model asks for "
            f"[r, {inputs}] and [{outputs}, r]; the adapter is of another model"
        )
    alpha = float(_for_layer(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", 8)))
    return LoraUpdate(a=a, b=b, scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _for_layer(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a layer's full name, as PEFT does it."""
    name = f"transformer.{layer}"
    for pattern, value in (patterns or {}).items():
        if re.match(pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$", name):
            return value
    return default
