"""The files beside the graphs, by which each runtime recognises the model."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from graphs import Weights
from split_model import ModelConfig
from storage import Folder, load_tokenizer
from storage.tokenizer import DEFAULT_CLASS

from .beside_weights import copy_files_beside_weights
from .checkpoint import write_checkpoint
from .errors import ExportError
from .source import Source

__all__ = ["write_genai_config", "write_json", "write_model_files"]


def write_model_files(folder: Path, source: Source, weights: Weights, more: dict[str, Any]) -> None:
    """
    Write a Hugging Face checkpoint in float32 with its tokenizer.

    Args:
        more: keys of config.json that the base model's does not have.
    """
    copy_files_beside_weights(source.folder, folder)
    tokenizer = load_tokenizer(source.folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    _write_missing(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, source.config))
    _write_missing(
        folder / "generation_config.json", {"bos_token_id": source.config.end_token, "eos_token_id": source.config.end_token}
    )
    write_json(folder / "config.json", _config(source) | more)
    write_checkpoint(folder / "model.safetensors", source.config, weights)


def write_genai_config(folder: Path, config: ModelConfig, *, filename: str, shared_cache: bool) -> None:
    """
    Write genai_config.json, by which onnxruntime-genai loads the model.

    Args:
        filename: of the graph it loads.
        shared_cache: whether past and present keys and values may be one buffer.
    """
    cache = {f"{when}_{part}_names": f"{prefix}.%d.{part}" for when, prefix in CACHE_NAMES.items() for part in ("key", "value")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": filename,
        "head_size": config.head_width,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            **{name: pattern for name, pattern in cache.items() if name.startswith("past")},
        },
        "outputs": {"logits": "logits", **{name: pattern for name, pattern in cache.items() if name.startswith("present")}},
    }
    model = {
        "type": "decoder",  # a family's own name would mean the names and the combined cache of older exports
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.end_token),
        # genai masks every token that equals it, so it cannot be the end token, which stands between prompt and completion. No
        # text has -1, and as an index into the table it is a row that exists, the last one.
        "pad_token_id": -1,
        "context_length": config.num_positions,
        "vocab_size": config.vocabulary_size,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": config.num_positions, "past_present_share_buffer": shared_cache}
    write_json(folder / "genai_config.json", {"model": model, "search": search})


CACHE_NAMES = {"past": "past_key_values", "present": "present"}


def write_json(path: Path, value: dict[str, Any]) -> None:
    # In ASCII, the default of json: an escape can be half a surrogate pair, which UTF-8 cannot hold.
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_missing(path: Path, value: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, value)


def _config(source: Source) -> dict[str, Any]:
    """The base model's config.json in float32, with keys that other programs look for and transformers no longer writes."""
    family, config = source.config.family, Folder(source.folder, ExportError).read_json("config.json")
    config.pop("torch_dtype", None)
    config.setdefault("architectures", [family.architecture])
    config.setdefault("bos_token_id", source.config.end_token)
    return config | {
        "dtype": "float32",
        "eos_token_id": source.config.end_token,
        **dict.fromkeys(family.position_keys, source.config.num_positions),
        "tie_word_embeddings": source.config.tied_head,
    }


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    end = tokenizer.id_to_token(config.end_token)
    return {
        "tokenizer_class": DEFAULT_CLASS,
        "model_max_length": config.num_positions,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
    }
