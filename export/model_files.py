"""The files beside the graphs, by which each runtime recognises the model."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from graphs import Weights
from split_model import ModelConfig
from storage import Folder, load_tokenizer
from storage.model_folder import CONFIG_FILE, GENERATION_FILE
from storage.tokenizer import FILE, OF_MODELS, SETTINGS

from .beside_weights import copy_files_beside_weights
from .checkpoint import write_checkpoint
from .errors import ExportError
from .source import Source

__all__ = ["first_token", "write_genai_config", "write_json", "write_model_files"]


def write_model_files(folder: Path, source: Source, weights: Weights, more: dict[str, Any]) -> None:
    """
    Write a Hugging Face checkpoint in float32 with its tokenizer.

    Args:
        more: keys of config.json that the base model's does not have.
    """
    copy_files_beside_weights(source.folder, folder)
    tokenizer = load_tokenizer(source.folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = Folder(folder, ExportError).read_json(SETTINGS) if (folder / SETTINGS).exists() else None
    if settings is None:
        write_json(folder / SETTINGS, _tokenizer_config(tokenizer, source.config))
    elif source.config.family.model_type not in OF_MODELS:
        # Nothing is left to be built by the class that the base model names, and versions of transformers build it differently.
        write_json(folder / SETTINGS, settings | {"tokenizer_class": FILE})
    write_json(folder / GENERATION_FILE, _generation_config(source))
    write_json(folder / CONFIG_FILE, _config(source) | more)
    write_checkpoint(folder / "model.safetensors", source.config, weights)


def write_genai_config(folder: Path, source: Source, *, filename: str, shared_cache: bool) -> None:
    """
    Write genai_config.json, by which onnxruntime-genai loads the model.

    Args:
        filename: of the graph it loads.
        shared_cache: whether past and present keys and values may be one buffer.
    """
    config = source.config
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
        "bos_token_id": first_token(source),
        "eos_token_id": _ends(source),
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


def _config(source: Source) -> dict[str, Any]:
    """
    The base model's config.json in float32, with keys that other programs look for and transformers no longer writes. The token
    that ends a text is one here, also where the base model's file lists several: see `_generation_config`.
    """
    family, config = source.config.family, _read(source, CONFIG_FILE)
    config.pop("torch_dtype", None)
    config.setdefault("architectures", [family.architecture])
    config.setdefault("bos_token_id", source.config.end_token)
    for key in family.position_keys:
        config.setdefault(key, source.config.num_positions)
    return config | {
        "dtype": "float32",
        "eos_token_id": source.config.end_token,
        "tie_word_embeddings": source.config.tied_head,
    }


def _generation_config(source: Source) -> dict[str, Any]:
    """The base model's, with all tokens that end a text: there, transformers, optimum and transformers.js look for them."""
    return {"bos_token_id": first_token(source)} | _read(source, GENERATION_FILE) | {"eos_token_id": _ends(source)}


def _ends(source: Source) -> int | list[int]:
    """As runtimes write it: one number, or a list of several."""
    return list(source.config.ends) if source.config.stop_tokens else source.config.end_token


def first_token(source: Source) -> int:
    """
    The token that begins a text, where the base model's configuration names one that it has: many GPT-2s with a small
    vocabulary still say 50256, which transformers writes where nothing is said.
    """
    token = _read(source, CONFIG_FILE).get("bos_token_id")
    if isinstance(token, int) and 0 <= token < source.config.vocabulary_size:
        return token
    return source.config.end_token


def _read(source: Source, name: str) -> dict[str, Any]:
    files = Folder(source.folder, ExportError)
    return files.read_json(name) if files.find(name) else {}


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    end = tokenizer.id_to_token(config.end_token)
    return {
        "tokenizer_class": OF_MODELS.get(config.family.model_type, FILE),
        "model_max_length": config.num_positions,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end),
    }
