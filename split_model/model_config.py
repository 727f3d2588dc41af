"""What is known of a model before its weights are opened: its shape, and the names that its family gives to its tensors."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from storage import Folder, ModelError, shown

__all__ = ["ConfigFile", "ModelConfig"]

KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys by which some versions of transformers fetch code from the hub, unless their value is one of `OWN_KERNELS`."""
OWN_KERNELS = ("eager", "sdpa")
UNSUPPORTED = ("add_cross_attention", "pruned_heads", "quantization_config")
"""Settings of any family that change what a model computes, in ways that no family here follows."""
LARGEST = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """
    The shape of one model. A family derives its own class from this one. It adds the names of the model's tensors and, where
    these fields do not describe such a model wholly, fields of its own. All fields are part of the fingerprint (class variables
    are not), so a field that is renamed makes every model of the family another one.
    """

    model_type: ClassVar[str]
    """The family's name in config.json."""
    title: ClassVar[str]
    """The family's name in messages."""
    prefix: ClassVar[str]
    """What the stored names of all tensors but the head's begin with; old checkpoints leave it out."""
    blocks: ClassVar[str]
    """The name of the list of blocks: the names of what belongs to block 3 begin with f"{blocks}.3."."""
    table_name: ClassVar[str]
    """The token embedding, (V, d)."""
    separate_head_name: ClassVar[str]
    """The LM head, (V, d), where it is a matrix of its own."""
    stores_in_out: ClassVar[bool]
    """Linear layers' matrices are stored as (in, out), as by transformers' Conv1D; else as (out, in), as by torch's Linear."""

    num_layers: int
    width: int
    """Elements of a hidden state, d."""
    num_heads: int
    inner_width: int
    """Elements between the matrices of an MLP."""
    num_positions: int
    """Longest sequence, in tokens."""
    vocabulary_size: int
    """V."""
    norm_epsilon: float
    activation: str
    """Between the matrices of an MLP, under transformers' name."""
    tied_head: bool
    """Whether the LM head is the token embedding."""
    end_token: int
    """Id of the token that ends a text."""

    @classmethod
    @abstractmethod
    def read(cls, file: "ConfigFile") -> "ModelConfig":
        """
        Raises:
            ModelError: a value is missing, of a wrong type, or describes a model that this package cannot cut.
        """

    @property
    @abstractmethod
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """A block's linear layers, which LoRA may adapt, in the order of the forward pass: name in the block -> (in, out)."""

    @property
    @abstractmethod
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the model in the order of the forward pass: transformers' name without `prefix` -> shape as stored."""

    @property
    def head_name(self) -> str:
        """The tensor of the LM head, (V, d)."""
        return self.table_name if self.tied_head else self.separate_head_name

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """What PEFT's target_modules, and the flag --lora-targets, may name: the last components of the layers' names."""
        return tuple(dict.fromkeys(layer.rpartition(".")[2] for layer in self.layer_shapes))

    @property
    def head_width(self) -> int:
        """Elements of one head of attention, D."""
        return self.width // self.num_heads

    def block_name(self, block: int) -> str:
        """What the names of a block's tensors begin with, without `prefix` and without a dot at the end."""
        return f"{self.blocks}.{block}"

    def stored_name(self, tensor: str) -> str:
        """The name under which transformers stores a tensor."""
        return tensor if tensor == self.separate_head_name else f"{self.prefix}{tensor}"


class ConfigFile:
    """
    A model's config.json, which may be a stranger's, asked for one value after the other.

    Raises:
        ModelError: here and in every method; it names the file, the key and what stands there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = Folder(path.parent, ModelError).read_json(path.name)

    @property
    def model_type(self) -> object:
        """The name of the model's family, or whatever else stands there."""
        return self._raw.get("model_type")

    def check_support(self, *options: str) -> None:
        """Neither these options nor `UNSUPPORTED` are set, and no code is named."""
        path, raw = self.path, self._raw
        for option in (*options, *UNSUPPORTED):
            if raw.get(option):
                raise ModelError(f"{path}: {option} is {shown(raw[option])}, which is not supported")
        if raw.get("auto_map"):
            raise ModelError(f"{path}: auto_map is {shown(raw['auto_map'])}; code of a folder is never run; remove the key")
        for key in KERNELS:
            if raw.get(key) is not None and raw[key] not in OWN_KERNELS:
                raise ModelError(f"{path}: {key} is {shown(raw[key])}; code of others is never fetched; remove the key")

    def rename(self, aliases: dict[str, str]) -> None:
        """Read what stands under an alias (alias -> name) as if it stood under the name; where both are there, they agree."""
        for alias, name in aliases.items():
            if alias in self._raw and self._raw.setdefault(name, self._raw[alias]) != self._raw[alias]:
                values = f"{name} is {shown(self._raw[name])} and {alias} {shown(self._raw[alias])}"
                raise ModelError(f"{self.path}: {values}; they mean the same")

    def has_null(self, key: str) -> bool:
        """Whether the key is absent or null."""
        return self._raw.get(key) is None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Positive and finite."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise self._wrong(key, "a positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        if key not in self._raw and default is None:
            raise ModelError(f"{self.path}: {key!r} is missing; a configuration of model_type {self.model_type!r} needs it")
        return self._raw.get(key, default)

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {key} is {shown(self._raw.get(key))}; {expected} is expected")
