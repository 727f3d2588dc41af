"""A model cut in two, with LoRA on both parts. Knows nothing of networks."""

from .adapter_folder import load_adapter, save_adapter
from .generation import continue_greedily
from .lora import Adapter, LoraConfig, adapted_layers, adapter_shapes, initial_adapter
from .loss import cross_entropies, summed_cross_entropy
from .model_config import ModelConfig
from .optimisation import OptimiserConfig, adamw, clipping_factor, gradient_norm, optimiser_state, restore_optimiser, take_step
from .parts import EdgePart, ServerPart, backpropagate, check_cut_layer, check_lora_rank
from .placement import DTYPES, choose_device, choose_dtype
from .pretrained_model import PretrainedModel
from .sealed_tensors import DamagedFile, read_sealed, seal
from .transfer import Uploads, copied_to, read_back

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
    "Uploads",
    "adamw",
    "adapted_layers",
    "adapter_shapes",
    "backpropagate",
    "check_cut_layer",
    "check_lora_rank",
    "choose_device",
    "choose_dtype",
    "clipping_factor",
    "continue_greedily",
    "copied_to",
    "cross_entropies",
    "gradient_norm",
    "initial_adapter",
    "load_adapter",
    "optimiser_state",
    "read_back",
    "read_sealed",
    "restore_optimiser",
    "save_adapter",
    "seal",
    "summed_cross_entropy",
    "take_step",
]
