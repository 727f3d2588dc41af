"""Tiny tokenizers of the form that each family's have, learnt in a moment, in the folders that name them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["CHATML", "MARKERS", "SYSTEM", "TALK", "TOKENIZERS", "make_family_tokenizer"]

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "sentencepiece": ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"],
}


def _learnt(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, limit_alphabet=600
    )
    tokenizer.train([str(REPOSITORY / "examples/restaurants/valid.jsonl")], trainer)
    return tokenizer


@cache
def _bytes_as_characters(words: str, kind: str) -> str:
    """tokenizer.json of a byte-level BPE that cuts texts by a pattern; a pattern of nothing: digits, and GPT-2's own."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(words), "isolated") if words else pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return str(_learnt(tokenizer, SPECIAL[kind], pre_tokenizers.ByteLevel.alphabet()).to_str())


@cache
def _bytes_as_numbers() -> str:
    """tokenizer.json of a BPE as SentencePiece learns it: spaces are letters, and what is no token is its bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    # Only while it learns: words are joined to their spaces, and no token reaches over two.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="never")
    _learnt(tokenizer, [*SPECIAL["sentencepiece"], *(f"<0x{byte:02X}>" for byte in range(256))], [])
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if not token["content"].startswith("<0x")]
    whole["pre_tokenizer"] = None
    whole["post_processor"] = json.loads(processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)]).__getstate__())
    decoder = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    whole["decoder"] = json.loads(decoders.Sequence(decoder).__getstate__())
    return json.dumps(whole)


def _llama3() -> dict[str, Any]:
    whole: dict[str, Any] = json.loads(_bytes_as_characters(LLAMA3_WORDS, "llama3"))
    whole["model"]["ignore_merges"] = True
    begin = processors.TemplateProcessing("<|begin_of_text|> $A", "<|begin_of_text|> $A $B", [("<|begin_of_text|>", 0)])
    whole["post_processor"] = json.loads(begin.__getstate__())
    return whole


def _qwen() -> dict[str, Any]:
    return {**json.loads(_bytes_as_characters(QWEN_WORDS, "qwen")), "normalizer": {"type": "NFC"}}


def _metaspace() -> dict[str, Any]:
    space = {"type": "Metaspace", "replacement": "\N{LOWER ONE EIGHTH BLOCK}", "prepend_scheme": "first", "split": False}
    return {**json.loads(_bytes_as_numbers()), "normalizer": None, "pre_tokenizer": space}


ENDS = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "sentencepiece": "</s>"}
NAMES = {
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None},
    "sentencepiece": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
FAST = "PreTrainedTokenizerFast"
TOKENIZERS: dict[str, tuple[str, Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "Llama 3": ("llama", _llama3, "llama3", {"tokenizer_class": FAST}),
    "Llama 3 that names Llama 2's": ("llama", _llama3, "llama3", {"tokenizer_class": "LlamaTokenizerFast"}),
    "Llama 2": (
        "llama",
        lambda: json.loads(_bytes_as_numbers()),
        "sentencepiece",
        {"tokenizer_class": "LlamaTokenizer", "legacy": False},
    ),
    "Llama 2, legacy": ("llama", _metaspace, "sentencepiece", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "Llama 2, no prefix": (
        "llama",
        _metaspace,
        "sentencepiece",
        {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    ),
    "Mistral": (
        "mistral",
        lambda: json.loads(_bytes_as_numbers()),
        "sentencepiece",
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
    ),
    "Mistral, Metaspace": (
        "mistral",
        _metaspace,
        "sentencepiece",
        {"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": True},
    ),
    "Phi-3": ("phi3", lambda: json.loads(_bytes_as_numbers()), "sentencepiece", {"tokenizer_class": "LlamaTokenizer"}),
    "Qwen2": ("qwen2", _qwen, "qwen", {"tokenizer_class": "Qwen2Tokenizer"}),
    "Qwen2 that names none": ("qwen2", _qwen, "qwen", {}),
    "Qwen2 that names Llama's": ("qwen2", _qwen, "qwen", {"tokenizer_class": "LlamaTokenizerFast"}),
    "Qwen3": ("qwen3", _qwen, "qwen", {"tokenizer_class": "Qwen2TokenizerFast", "add_prefix_space": False}),
    "Qwen3 that names none": ("qwen3", _qwen, "qwen", {}),
    "SmolLM2": (
        "llama",
        lambda: json.loads(_bytes_as_characters("", "qwen")),
        "qwen",
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False},
    ),
}
"""By what a test calls it: the model_type, tokenizer.json, whose special tokens, and the settings."""


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKERS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "You know pubs."}
TALK = [
    {"role": "user", "content": "A pub near the river? "},
    {"role": "assistant", "content": "The Mill, by the river."},
    {"role": "user", "content": "And caf\u00e9s?"},
    {"role": "assistant", "content": "\nAromi \U0001f600: 12 tables"},
]


def make_family_tokenizer(folder: Path, name: str, **more: Any) -> Path:
    """
    Args:
        more: settings besides.
    """
    model_type, make, kind, settings = TOKENIZERS[name]
    folder.mkdir(exist_ok=True)
    config = folder / "config.json"
    if not config.exists():
        config.write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer.json").write_text(json.dumps(make()))
    (folder / "tokenizer_config.json").write_text(json.dumps({**NAMES[kind], **settings, **more}))
    return folder
