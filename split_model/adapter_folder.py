"""An adapter as PEFT keeps it: adapter_config.json and adapter_model.safetensors in one folder."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .base_model import ModelConfig
from .errors import AdapterError
from .lora import Adapter, LoraConfig, adapter_shapes

__all__ = ["load_adapter", "save_adapter"]

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
BEYOND_PLAIN_LORA = (
    "use_dora",
    "use_rslora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)


def save_adapter(folder: Path, adapter: Adapter, lora: LoraConfig, base_model: str) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` loads. Matrices are stored in float32 unless they are float64."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: matrix.contiguous() for name, matrix in adapter.items()}, folder / WEIGHTS_FILE, {"format": "pt"})


def load_adapter(folder: Path, config: ModelConfig, lora: LoraConfig) -> Adapter:
    """
    Read a PEFT folder that fits the model and the run's LoRA settings.

    Raises:
        AdapterError: it is missing or incomplete, or has another rank, alpha, targets or kind.
    """
    stored = _read_config(folder / CONFIG_FILE)
    _check_plain_lora(folder, stored)
    for key, expected in {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": set(lora.targets)}.items():
        found = stored.get(key)
        if isinstance(found, list):
            found = set(map(str, found))
        if found != expected:
            raise AdapterError(f"{folder}: {key} is {stored.get(key)!r}, the run asks for {expected!r}")
    try:
        adapter = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from None
    shapes = {name: tuple(matrix.shape) for name, matrix in adapter.items()}
    expected_shapes = adapter_shapes(config, lora, range(config.num_layers))
    if shapes != expected_shapes:
        odd = sorted(name for name in shapes.keys() | expected_shapes if shapes.get(name) != expected_shapes.get(name))
        raise AdapterError(f"{folder}: {odd[0]} is missing, unknown or of another shape; it was made for another model")
    return {name: adapter[name] for name in expected_shapes}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} does not describe a LoRA adapter")
    return config


def _check_plain_lora(folder: Path, stored: dict[str, Any]) -> None:
    beyond = [option for option in BEYOND_PLAIN_LORA if stored.get(option)]
    if stored.get("bias", "none") != "none":
        beyond.append("bias")
    if beyond:
        raise AdapterError(f"{folder}: only plain LoRA can be continued; this adapter uses {', '.join(beyond)}")
