"""Tiny random models of every family, and every option of theirs, as transformers makes them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conftest import make_model, make_tokenizer
from family_tokenizers import TOKENIZERS, make_family_tokenizer

if TYPE_CHECKING:
    from split_model import ModelConfig

__all__ = ["OPTIONS", "gpt2_config", "make_family_model", "make_talking_model"]

ROPE = {"rope_theta": 1e4}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama": ("llama", {}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0}}),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-yarn": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0, 1.1, 1.25, 2.0],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "phi3-partial": ("phi3", {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}}),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "sliding_window": 5, "tie_word_embeddings": False}),
}
"""By what a test calls it: the model_type, and what its configuration says besides the tiny sizes."""
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "pad_token_id": None,
}


def gpt2_config(*, width: int, num_heads: int, **shape: Any) -> "ModelConfig":
    """Of a GPT-2 without a file."""
    from split_model import ModelConfig
    from split_model.families import FAMILIES

    heads = {"num_heads": num_heads, "num_key_value_heads": num_heads, "head_width": width // num_heads}
    rest = {"norm_epsilon": 1e-5, "activation": "gelu_new", "tied_head": True}
    return ModelConfig(family=FAMILIES["gpt2"], width=width, **{**heads, **rest, **shape})


def make_family_model(folder: Path, option: str, *, seed: int = 0, **sizes: Any) -> Path:
    """A model of one of the `OPTIONS`, 4 blocks, d = 32, 600 tokens; its norms and biases are no ones and zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, given = OPTIONS[option]
    if model_type == "gpt2":
        return make_model(folder, seed=seed, **given, **sizes)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: Mapping[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
    config = AutoConfig.for_model(model_type, **{**SIZES, **vocabulary, **given, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
    model.save_pretrained(folder)
    return folder


def make_talking_model(folder: Path, name: str, template: str) -> Path:
    """
    A model of conversations.

    Args:
        name: of its tokenizer; see `family_tokenizers`.
        template: its chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_family_tokenizer(folder, name, chat_template=template))
    make_family_model(folder, TOKENIZERS[name][0], vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return make_family_tokenizer(folder, name, chat_template=template)
