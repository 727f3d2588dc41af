"""GPT-2 cut in two, with LoRA on both parts. Knows nothing of networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_folder import load_adapter, save_adapter
    from .generation import continue_greedily
    from .lora import Adapter, LoraConfig, adapter_shapes, initial_adapter
    from .optimisation import OptimiserConfig, adamw, optimiser_state, restore_optimiser, take_step
    from .parts import EdgePart, ServerPart, check_cut_layer
    from .precision import DTYPES, choose_device, choose_dtype, working_dtype
    from .pretrained_model import (
        ModelConfig,
        PretrainedModel,
        StoredTensor,
    )
    from .sealed_tensors import DamagedFile, read_sealed, seal

__all__ = [
    "DTYPES",
    "Adapter",
    "DamagedFile",
    "EdgePart",
    "LoraConfig",
    "ModelConfig",
    "OptimiserConfig",
    "PretrainedModel",
    "ServerPart",
    "StoredTensor",
    "adamw",
    "adapter_shapes",
    "check_cut_layer",
    "choose_device",
    "choose_dtype",
    "continue_greedily",
    "initial_adapter",
    "load_adapter",
    "optimiser_state",
    "read_sealed",
    "restore_optimiser",
    "save_adapter",
    "seal",
    "take_step",
    "working_dtype",
]

_HOMES = {
    "Adapter": "lora",
    "PretrainedModel": "pretrained_model",
    "DTYPES": "precision",
    "DamagedFile": "sealed_tensors",
    "EdgePart": "parts",
    "LoraConfig": "lora",
    "ModelConfig": "pretrained_model",
    "OptimiserConfig": "optimisation",
    "ServerPart": "parts",
    "StoredTensor": "pretrained_model",
    "adamw": "optimisation",
    "adapter_shapes": "lora",
    "check_cut_layer": "parts",
    "choose_device": "precision",
    "choose_dtype": "precision",
    "continue_greedily": "generation",
    "initial_adapter": "lora",
    "load_adapter": "adapter_folder",
    "optimiser_state": "optimisation",
    "read_sealed": "sealed_tensors",
    "restore_optimiser": "optimisation",
    "save_adapter": "adapter_folder",
    "seal": "sealed_tensors",
    "take_step": "optimisation",
    "working_dtype": "precision",
}


def __getattr__(name: str) -> Any:
    # Most of this needs torch, but what reads a folder does not, and is wanted where there is none (PEP 562).
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'split_model' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
