"""An adapter as PEFT keeps it: adapter_config.json and adapter_model.safetensors in one folder."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from storage import AdapterError, AdapterSettings, Folder, shown
from storage.adapter_settings import CONFIG_FILE, WEIGHTS_FILE

from .lora import Adapter, LoraConfig, adapter_shapes
from .model_config import ModelConfig

__all__ = ["load_adapter", "save_adapter"]

CHOOSING = ("rank_pattern", "alpha_pattern", "exclude_modules")
"""Settings of plain LoRA that do not treat all layers alike; a run has one rank and one scale."""


def save_adapter(folder: Path, adapter: Adapter, config: ModelConfig, lora: LoraConfig, base_model: str) -> None:
    """
    Write a folder that ``PeftModel.from_pretrained`` loads.

    Args:
        adapter: of all adapted blocks; stored in the dtype it has, float32 unless the run is one of float64.
        base_model: the name or the folder under which PEFT finds the model that is adapted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "fan_in_fan_out": config.family.stores_in_out,
        "use_rslora": lora.rslora,
        "bias": "none",
        "inference_mode": True,
    }
    if lora.first_block:
        settings["layers_to_transform"] = _blocks(config, lora)
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file({name: matrix.contiguous() for name, matrix in adapter.items()}, folder / WEIGHTS_FILE, {"format": "pt"})


def load_adapter(folder: Path, config: ModelConfig, lora: LoraConfig) -> Adapter:
    """
    Read a PEFT folder that fits the model and the run's LoRA settings, in float32, or float64 where it is stored so.

    Raises:
        AdapterError: it is missing or incomplete, or has another rank, alpha, targets or kind.
    """
    settings = AdapterSettings.read(folder)
    beyond = settings.beyond + [name for name in CHOOSING if settings.has(name)]
    if beyond:
        raise AdapterError(f"{folder}: only plain LoRA can be continued; this adapter uses {', '.join(beyond)}")
    asked = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "target_modules": list(lora.targets)}
    given = settings.values | {"use_rslora": settings.has("use_rslora")}
    for key, expected in asked.items():
        found = given.get(key)
        same = set(found) == set(expected) if isinstance(found, list) and isinstance(expected, list) else found == expected
        if not same:
            raise AdapterError(f"{folder}: {key} is {shown(found)}, the run asks for {shown(expected)}")
    chosen = settings.values.get("layers_to_transform")
    blocks, expected_blocks = list(range(config.num_layers)) if chosen is None else chosen, _blocks(config, lora)
    if blocks != expected_blocks:
        raise AdapterError(
            f"{folder}: it adapts the blocks {shown(blocks)}, the run those from {lora.first_block} on: with --edge-adapter "
            "none the blocks before --cut-layer have no adapter, else all have one. Choose both as the adapter was made, or "
            "merge it into the model first (splitlora-export)"
        )
    try:
        adapter = load_file(Folder(folder, AdapterError).require(WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from None
    shapes = {name: tuple(matrix.shape) for name, matrix in adapter.items()}
    expected_shapes = adapter_shapes(config, lora, range(config.num_layers))
    if shapes != expected_shapes:
        odd = sorted(name for name in shapes.keys() | expected_shapes if shapes.get(name) != expected_shapes.get(name))
        raise AdapterError(f"{folder}: {odd[0]} is missing, unknown or of another shape; it was made for another model")
    for name, matrix in adapter.items():
        if not matrix.is_floating_point() or not torch.isfinite(matrix.float()).all():
            raise AdapterError(f"{folder}: {name} has values that are not finite numbers; the adapter cannot be used")
    # Adapters are trained in float32 at least, however they were stored.
    return {name: adapter[name] if adapter[name].dtype == torch.float64 else adapter[name].float() for name in expected_shapes}


def _blocks(config: ModelConfig, lora: LoraConfig) -> list[int]:
    """Those that are adapted."""
    return list(range(lora.first_block, config.num_layers))
