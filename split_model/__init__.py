"""GPT-2 cut in two, with LoRA on both parts. Knows nothing of networks."""

from .adapter_folder import load_adapter, save_adapter
from .adapter_settings import AdapterSettings
from .atomic_file import remove_unfinished, replace_file
from .base_model import FILES_BESIDE_WEIGHTS, BaseModel, ModelConfig, StoredTensor, find_model, is_hub_name
from .errors import AdapterError, ModelError, TrainingDiverged
from .folder import Folder, shown
from .generation import continue_greedily
from .kept_samples import SampleFolder
from .lora import Adapter, LoraConfig, adapter_shapes, initial_adapter
from .optimisation import OptimiserConfig, adamw, optimiser_state, restore_optimiser, take_step
from .parts import EdgePart, ServerPart, check_cut_layer
from .precision import DTYPES, choose_device, choose_dtype, working_dtype
from .sealed_tensors import DamagedFile, read_sealed, seal
from .seeds import derive_seed
from .tokenizer import encode, load_tokenizer

__all__ = [
    "DTYPES",
    "FILES_BESIDE_WEIGHTS",
    "Adapter",
    "AdapterError",
    "AdapterSettings",
    "BaseModel",
    "DamagedFile",
    "EdgePart",
    "Folder",
    "LoraConfig",
    "ModelConfig",
    "ModelError",
    "OptimiserConfig",
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
