"""GPT-2 cut in two, with LoRA on both parts. Knows nothing of networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter_folder import load_adapter, save_adapter
    from .adapter_settings import AdapterSettings
    from .atomic_file import remove_unfinished, replace_file
    from .errors import AdapterError, ModelError, TrainingDiverged
    from .folder import Folder, shown
    from .generation import continue_greedily
    from .kept_samples import SampleFolder
    from .lora import Adapter, LoraConfig, adapter_shapes, initial_adapter
    from .optimisation import OptimiserConfig, adamw, optimiser_state, restore_optimiser, take_step
    from .parts import EdgePart, ServerPart, check_cut_layer
    from .precision import DTYPES, choose_device, choose_dtype, working_dtype
    from .pretrained_model import (
        FILES_BESIDE_WEIGHTS,
        ModelConfig,
        PretrainedModel,
        StoredTensor,
        find_model,
        is_hub_name,
        part_that_differs,
    )
    from .sealed_tensors import DamagedFile, read_sealed, seal
    from .seeds import derive_seed
    from .tokenizer import encode, load_tokenizer

__all__ = [
    "DTYPES",
    "FILES_BESIDE_WEIGHTS",
    "Adapter",
    "AdapterError",
    "AdapterSettings",
    "DamagedFile",
    "EdgePart",
    "Folder",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "OptimiserConfig",
    "PretrainedModel",
    "SampleFolder",
    "ServerPart",
    "StoredTensor",
    "TrainingDiverged",
    "adamw",
    "adapter_shapes",
    "check_cut_layer",
    "choose_device",
    "choose_dtype",
    "continue_greedily",
    "derive_seed",
    "encode",
    "find_model",
    "initial_adapter",
    "is_hub_name",
    "load_adapter",
    "load_tokenizer",
    "optimiser_state",
    "part_that_differs",
    "read_sealed",
    "remove_unfinished",
    "replace_file",
    "restore_optimiser",
    "save_adapter",
    "seal",
    "shown",
    "take_step",
    "working_dtype",
]

_HOMES = {
    "Adapter": "lora",
    "AdapterError": "errors",
    "AdapterSettings": "adapter_settings",
    "PretrainedModel": "pretrained_model",
    "DTYPES": "precision",
    "DamagedFile": "sealed_tensors",
    "EdgePart": "parts",
    "FILES_BESIDE_WEIGHTS": "pretrained_model",
    "Folder": "folder",
    "LoraConfig": "lora",
    "ModelConfig": "pretrained_model",
    "ModelError": "errors",
    "OptimiserConfig": "optimisation",
    "SampleFolder": "kept_samples",
    "ServerPart": "parts",
    "StoredTensor": "pretrained_model",
    "TrainingDiverged": "errors",
    "adamw": "optimisation",
    "adapter_shapes": "lora",
    "check_cut_layer": "parts",
    "choose_device": "precision",
    "choose_dtype": "precision",
    "continue_greedily": "generation",
    "derive_seed": "seeds",
    "encode": "tokenizer",
    "find_model": "pretrained_model",
    "initial_adapter": "lora",
    "is_hub_name": "pretrained_model",
    "load_adapter": "adapter_folder",
    "load_tokenizer": "tokenizer",
    "optimiser_state": "optimisation",
    "part_that_differs": "pretrained_model",
    "read_sealed": "sealed_tensors",
    "remove_unfinished": "atomic_file",
    "replace_file": "atomic_file",
    "restore_optimiser": "optimisation",
    "save_adapter": "adapter_folder",
    "seal": "sealed_tensors",
    "shown": "folder",
    "take_step": "optimisation",
    "working_dtype": "precision",
}


def __getattr__(name: str) -> Any:
    # Most of this needs torch, but what reads a folder does not, and is wanted where there is none (PEP 562).
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'split_model' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
