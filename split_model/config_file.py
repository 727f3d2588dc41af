"""A model's config.json, which may be a stranger's."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage import Folder, ModelError, shown

__all__ = ["ConfigFile", "Settings"]

KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys by which some versions of transformers fetch code from the hub, unless their value is one of `OWN_KERNELS`."""
OWN_KERNELS = ("eager", "sdpa")
UNSUPPORTED = ("add_cross_attention", "pruned_heads")
"""Settings of any family that change what a model computes, in ways that no family here follows."""
# fmt: off
OF_FILES = (
    "_name_or_path", "architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype",
    "tokenizer_class", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
    "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id",
)
OF_TRAINING = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "gradient_checkpointing", "initializer_range",
    "finetuning_task", "problem_type", "task_specific_params",
)
"""The dropouts are of pretraining; LoRA has its own, and leaves these out as in evaluation."""
OF_GENERATION = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
)
OF_THE_PROGRAM = (
    "_attn_implementation_autoset", "chunk_size_feed_forward", "cross_attention_hidden_size", "is_decoder",
    "is_encoder_decoder", "keys_to_ignore_at_inference", "output_attentions", "output_hidden_states", "return_dict",
    "tf_legacy_loss", "tie_encoder_decoder", "torchscript", "use_bfloat16", "use_cache",
)
# fmt: on
WITHOUT_EFFECT = frozenset({*OF_FILES, *OF_TRAINING, *OF_GENERATION, *OF_THE_PROGRAM, *KERNELS})
"""Keys of any family that change nothing of what a model computes here."""
LARGEST = (1 << 31) - 1
QUANTISATION = ("quantization_config", "compression_config")
"""Keys under which it stands how weights were quantised."""
QUANTISERS = {"awq": "AWQ", "bitsandbytes": "bitsandbytes", "gptq": "GPTQ"}
"""By what config.json calls them, what people do."""
OTHER_HEAD = re.compile(r"\w+For(?!CausalLM)[A-Z]\w*")
"""Architectures that do not tell the next token."""
ENCODER = re.compile(r"\w+For(MaskedLM|PreTraining)")
"""Those that fill gaps instead, with what is before and behind them."""


class Settings:
    """
    Members of a JSON object, asked for one after the other.

    Args:
        path: of the file, for messages.
        within: where in the file the object stands, such as "rope_scaling."; "" for the whole file.

    Raises:
        ModelError: in every method; it names the file, the key and what stands there.
    """

    def __init__(self, path: Path, raw: dict[str, Any], within: str = "") -> None:
        self.path, self.within = path, within
        self._raw = raw
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there, and not null."""
        self._asked.add(key)
        return self._raw.get(key) is not None

    @property
    def is_empty(self) -> bool:
        return not self._raw

    def is_null(self, key: str) -> bool:
        """Whether the key is there, and null."""
        self._asked.add(key)
        return key in self._raw and self._raw[key] is None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Positive and finite."""
        value = self._get(key, default)
        if not _is_positive(value):
            raise self.wrong(key, "a positive number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """So many positive and finite ones."""
        values = self._get(key, None)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_positive, values)):
            raise self.wrong(key, f"a list of {count} positive numbers")
        return tuple(map(float, values))

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """One whole number from 0 on, or a list of them; none where the key is absent or null."""
        value = self._raw.get(key)
        self._asked.add(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each <= LARGEST:
                raise self.wrong(key, f"a whole number from 0 to {LARGEST}, or a list of them,")
        return tuple(values)

    def texts(self, key: str) -> list[str]:
        """Empty where the key is absent or null."""
        value = self._get(key, [])
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "a list of texts")
        return value

    def settings(self, key: str) -> "Settings":
        """An object that stands in this one; empty where the key is absent or null."""
        value = self._get(key, {})
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Settings(self.path, value, f"{self.within}{key}.")

    def one_of(self, key: str, default: str, known: Iterable[str]) -> str:
        value = self.text(key, default)
        if value not in known:
            raise ModelError(f"{self.path}: {self.within}{key} is {shown(value)}; it can be {', '.join(known)}")
        return value

    def refuse(self, *options: str) -> None:
        """None of these options is set."""
        for option in options:
            self._asked.add(option)
            if self._raw.get(option):
                raise ModelError(f"{self.path}: {self.within}{option} is {shown(self._raw[option])}, which is not supported")

    def check_all_known(self, without_effect: Iterable[str] = ()) -> None:
        """
        Every key has been asked for, is one of these, or has a value that sets nothing. Otherwise the file asks for something
        that this package has never heard of, and would compute another model than the one that is meant.
        """
        for key in sorted(self._raw.keys() - self._asked - set(without_effect)):
            if self._raw[key]:
                raise ModelError(
                    f"{self.path}: {self.within}{key} is {shown(self._raw[key])}, an option that is not known here; remove the "
                    "key if it changes nothing of what the model computes"
                )

    def wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {self.within}{key} is {shown(self._raw.get(key))}; {expected} is expected")

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        if key not in self._raw and default is None:
            raise ModelError(f"{self.path}: {self.within}{key} is missing; {self._needed_by}")
        return self._raw.get(key, default)

    @property
    def _needed_by(self) -> str:
        return "it is needed"


class ConfigFile(Settings):
    """The whole file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Folder(path.parent, ModelError).read_json(path.name))

    @property
    def model_type(self) -> object:
        """The name of the model's family, or whatever else stands there."""
        return self._raw.get("model_type")

    def check_support(self, *options: str) -> None:
        """Neither these options nor `UNSUPPORTED` are set, no code is named, and the weights are numbers as they stand."""
        self.refuse(*options, *UNSUPPORTED)
        path, raw = self.path, self._raw
        for key in filter(raw.get, QUANTISATION):
            quantised = raw[key]
            method = _quantiser(quantised) if isinstance(quantised, dict) else None
            by = f" by {QUANTISERS.get(method, shown(method))}" if isinstance(method, str) else ""
            raise ModelError(
                f"{path}: {key} is {shown(quantised)}; weights that are quantised{by} cannot be used: take the "
                "model that they were made from, which --dtype bfloat16 and --edge-weights int8 make smaller here"
            )
        if not self.boolean("is_causal", True):
            raise ModelError(
                f"{path}: is_causal is false: tokens see what comes behind them, and what is split here only continues texts"
            )
        for architecture in self.texts("architectures"):
            if OTHER_HEAD.fullmatch(architecture):
                raise ModelError(
                    f"{path}: architectures is {shown(raw['architectures'])}, a model that does not tell the next token; its "
                    "ForCausalLM is what can be split"
                )
        if raw.get("auto_map"):
            raise ModelError(f"{path}: auto_map is {shown(raw['auto_map'])}; code of a folder is never run; remove the key")
        for key in KERNELS:
            if raw.get(key) is not None and raw[key] not in OWN_KERNELS:
                raise ModelError(f"{path}: {key} is {shown(raw[key])}; code of others is never fetched; remove the key")

    def other_kind(self) -> str:
        """Of a model of no known family: what keeps it from being one, as the end of a sentence; "" if that is not known."""
        if any(self.has(key) for key in ("vision_config", "audio_config")):
            return ": it takes more than text; its language model, saved as a model of its own, may be one of these"
        if self._raw.get("is_encoder_decoder") is True or any(map(ENCODER.fullmatch, self.texts("architectures"))):
            return ": it has an encoder, and what is split here only continues texts"
        return ""

    def rename(self, aliases: dict[str, str]) -> None:
        """Read what stands under an alias (alias -> name) as if it stood under the name; where both are there, they agree."""
        for alias, name in aliases.items():
            self._asked.add(alias)
            if alias in self._raw and self._raw.setdefault(name, self._raw[alias]) != self._raw[alias]:
                values = f"{name} is {shown(self._raw[name])} and {alias} {shown(self._raw[alias])}"
                raise ModelError(f"{self.path}: {values}; they mean the same")

    @property
    def _needed_by(self) -> str:
        return f"a configuration of model_type {self.model_type!r} needs it"


def _quantiser(settings: dict[str, Any]) -> object:
    """Old files of bitsandbytes do not name it."""
    is_unnamed = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    return settings.get("quant_method", "bitsandbytes" if is_unnamed else None)


def _is_positive(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= LARGEST
