"""A model's config.json as it lies on the hub is read, option by option."""

import json
import math
import re
from pathlib import Path

import pytest

from split_model.families import read_config
from storage import ModelError

FILES = {
    "gpt2": """
        {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
        "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
        "summary_type": "cls_index", "summary_use_proj": true, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}}
    """,
    "Llama-2-7b": """
        {"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "model_type": "llama",
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "use_cache": true,
        "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0", "vocab_size": 32000}
    """,
    "Llama-3.2-1B-Instruct": """
        {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000, "head_dim": 64,
        "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "use_cache": true,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "vocab_size": 128256}
    """,
    "SmolLM2-135M-Instruct": """
        {"attention_dropout": 0.0, "initializer_range": 0.041666666666666664, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0", "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true, "use_cache": true,
        "vocab_size": 49152, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
    """,
    "Mistral-7B-v0.1": """
        {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}
    """,
    "Qwen2.5-0.5B-Instruct": """
        {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
        "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}
    """,
    "Qwen3-0.6B": """
        {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643, "eos_token_id": 151645,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
        "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "use_cache": true, "use_sliding_window": false, "vocab_size": 151936}
    """,
    "Phi-3-mini-4k-instruct": """
        {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
        "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": false,
        "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047,
        "tie_word_embeddings": false, "use_cache": true, "vocab_size": 32064}
    """,
    "starcoder2-3b": """
        {"architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "bos_token_id": 0, "embedding_dropout": 0.1,
        "eos_token_id": 0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042,
        "intermediate_size": 12288, "max_position_embeddings": 16384, "mlp_type": "default", "model_type": "starcoder2",
        "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24, "num_hidden_layers": 30,
        "num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999999.4420358813, "sliding_window": 4096,
        "torch_dtype": "float32", "transformers_version": "4.37.0.dev0", "use_bias": true, "use_cache": true,
        "vocab_size": 49152}
    """,
}
SHAPES = {
    "gpt2": (12, 768, 12, 12, 64, 3072, 50257, 1024),
    "Llama-2-7b": (32, 4096, 32, 32, 128, 11008, 32000, 4096),
    "Llama-3.2-1B-Instruct": (16, 2048, 32, 8, 64, 8192, 128256, 131072),
    "SmolLM2-135M-Instruct": (30, 576, 9, 3, 64, 1536, 49152, 8192),
    "Mistral-7B-v0.1": (32, 4096, 32, 8, 128, 14336, 32000, 32768),
    "Qwen2.5-0.5B-Instruct": (24, 896, 14, 2, 64, 4864, 151936, 32768),
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 3072, 151936, 40960),
    "Phi-3-mini-4k-instruct": (32, 3072, 32, 32, 96, 8192, 32064, 4096),
    "starcoder2-3b": (30, 3072, 24, 2, 128, 12288, 49152, 16384),
}
PARAMETERS = {
    "gpt2": 124_439_808,
    "Llama-2-7b": 6_738_415_616,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "SmolLM2-135M-Instruct": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "starcoder2-3b": 3_030_371_328,
}
"""As their model cards count them."""


@pytest.mark.parametrize("name", FILES)
def test_file_of_the_hub_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(FILES[name])
    config = read_config(path)
    heads = (config.num_heads, config.num_key_value_heads, config.head_width)
    rest = (config.inner_width, config.vocabulary_size, config.num_positions)
    assert (config.num_layers, config.width, *heads, *rest) == SHAPES[name]
    assert sum(map(math.prod, config.tensor_shapes.values())) == PARAMETERS[name]


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "no end": (
        "Llama-3.2-1B-Instruct",
        {"eos_token_id": None},
        "eos_token_id is missing; a text has to end with a token: add the id of the tokenizer's eos_token",
    ),
    "another family's scaling": (
        "Phi-3-mini-4k-instruct",
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        'rope_scaling.type is "yarn"; it can be default, longrope',
    ),
    "an MLP of another kind": (
        "starcoder2-3b",
        {"mlp_type": "gated"},
        'mlp_type is "gated"; it can be default',
    ),
    "AWQ": (
        "Qwen2.5-0.5B-Instruct",
        {"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}},
        "weights that are quantised by AWQ cannot be used: take the model that they were made from",
    ),
    "GPTQ": (
        "Llama-3.2-1B-Instruct",
        {"quantization_config": {"bits": 4, "damp_percent": 0.01, "desc_act": True, "quant_method": "gptq"}},
        "weights that are quantised by GPTQ cannot be used: take the model that they were made from",
    ),
    "bitsandbytes": (
        "Mistral-7B-v0.1",
        {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        "weights that are quantised by bitsandbytes cannot be used: take the model that they were made from",
    ),
    "a head for classes": (
        "Qwen3-0.6B",
        {"architectures": ["Qwen3ForSequenceClassification"]},
        'architectures is ["Qwen3ForSequenceClassification"], a model that does not tell the next token',
    ),
    "code": (
        "Phi-3-mini-4k-instruct",
        {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
        "code of a folder is never run; remove the key",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_asks_for_something_else_is_refused_in_a_sentence(tmp_path: Path, case: str) -> None:
    name, changes, reason = REFUSED[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(FILES[name]) | changes))
    with pytest.raises(ModelError, match=f"^{re.escape(str(path))}: .*{re.escape(reason)}") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_first_of_several_ends_is_a_texts_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(FILES["Llama-3.2-1B-Instruct"])
    config = read_config(path)
    assert (config.end_token, config.stop_tokens) == (128001, (128008, 128009))
