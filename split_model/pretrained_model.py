"""A GPT-2 checkpoint in Hugging Face's layout: config.json and safetensors, mapped into memory and never read whole."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from storage import Folder, ModelError, fingerprint, load_tokenizer, shown
from storage.model_folder import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from storage.tokenizer import end_of_text, tokenizer_digest

__all__ = ["ModelConfig", "PretrainedModel", "StoredTensor"]

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNSUPPORTED = ("scale_attn_by_inverse_layer_idx", "add_cross_attention", "pruned_heads", "quantization_config")
KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Keys by which some versions of transformers fetch code from the hub, unless their value is one of `OWN_KERNELS`."""
OWN_KERNELS = ("eager", "sdpa")
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other names that transformers takes for a GPT-2's settings."""
MOST_LAYERS, LARGEST = 10_000, (1 << 31) - 1
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-2."""

    num_layers: int
    width: int
    """Elements of a hidden state, d."""
    num_heads: int
    inner_width: int
    """Elements between the two matrices of an MLP; 4 d unless the checkpoint says otherwise."""
    num_positions: int
    """Longest sequence, in tokens."""
    vocabulary_size: int
    norm_epsilon: float
    activation: str
    tied_head: bool
    """Whether the LM head is the token embedding."""
    end_token: int
    """Id of <|endoftext|>."""

    @property
    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """The four linear layers of a block: name -> (in, out)."""
        d, inner = self.width, self.inner_width
        return {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, inner), "mlp.c_proj": (inner, d)}

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of the model, under transformers' names without "transformer.", in the order of the forward pass."""
        table, norm = (self.vocabulary_size, self.width), (self.width,)
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": table, "wpe.weight": (self.num_positions, self.width)}
        for block in range(self.num_layers):
            for name in ("ln_1", "ln_2"):
                shapes |= {f"h.{block}.{name}.weight": norm, f"h.{block}.{name}.bias": norm}
            for name, shape in self.layer_shapes.items():
                shapes |= {f"h.{block}.{name}.weight": shape, f"h.{block}.{name}.bias": shape[1:]}
        shapes |= {"ln_f.weight": norm, "ln_f.bias": norm}
        return shapes if self.tied_head else shapes | {"lm_head.weight": table}

    @classmethod
    def from_file(cls, path: Path) -> "ModelConfig":
        """
        Raises:
            ModelError: the file is missing, no JSON, or describes something other than a GPT-2 this package can cut.
        """
        raw = _Settings(path, Folder(path.parent, ModelError).read_json(path.name))
        raw.check_kind()
        config = cls(
            num_layers=raw.integer("n_layer", most=MOST_LAYERS),
            width=(width := raw.integer("n_embd")),
            num_heads=raw.integer("n_head"),
            inner_width=4 * width if raw.has_null("n_inner") else raw.integer("n_inner"),
            num_positions=raw.integer("n_ctx" if raw.has_null("n_positions") else "n_positions"),
            vocabulary_size=raw.integer("vocab_size"),
            norm_epsilon=raw.number("layer_norm_epsilon", 1e-5),
            activation=raw.text("activation_function", "gelu_new"),
            tied_head=raw.boolean("tie_word_embeddings", True),
            end_token=raw.integer("eos_token_id", 50256, least=0),
        )
        if config.end_token >= config.vocabulary_size:
            raise ModelError(f"{path}: eos_token_id {config.end_token} is not below vocab_size {config.vocabulary_size}")
        if config.activation not in ACTIVATIONS:
            raise ModelError(f"{path}: activation_function is {shown(config.activation)}; it can be {', '.join(ACTIVATIONS)}")
        if config.width % config.num_heads:
            raise ModelError(f"{path}: n_embd {config.width} is not a multiple of n_head {config.num_heads}")
        return config


class _Settings:
    """A config.json, asked for one value after the other; ModelError names the key and what stands there."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self._path, self._raw = path, raw
        for alias, name in ALIASES.items():
            if alias in raw and raw.setdefault(name, raw[alias]) != raw[alias]:
                raise ModelError(f"{path}: {name} is {shown(raw[name])} and {alias} {shown(raw[alias])}; they mean the same")

    def check_kind(self) -> None:
        """Whether it describes a GPT-2, and no code."""
        path, raw = self._path, self._raw
        if raw.get("model_type") != "gpt2":
            raise ModelError(f'{path}: model_type is {shown(raw.get("model_type"))}; only "gpt2" can be split')
        for option in UNSUPPORTED:
            if raw.get(option):
                raise ModelError(f"{path}: {option} is {shown(raw[option])}, which is not supported")
        if not self.boolean("scale_attn_weights", True):
            raise ModelError(f"{path}: attention without scale_attn_weights is not supported")
        if raw.get("auto_map"):
            raise ModelError(f"{path}: auto_map is {shown(raw['auto_map'])}; code of a folder is never run; remove the key")
        for key in KERNELS:
            if raw.get(key) is not None and raw[key] not in OWN_KERNELS:
                raise ModelError(f"{path}: {key} is {shown(raw[key])}; code of others is never fetched; remove the key")

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
            raise ModelError(f"{self._path}: {key!r} is missing; a GPT-2 configuration needs it")
        return self._raw.get(key, default)

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self._path}: {key} is {shown(self._raw.get(key))}; {expected} is expected")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and as what."""

    path: Path
    name: str
    """Under which the file holds it."""
    dtype: str
    """In the words of safetensors."""
    shape: tuple[int, ...]


class PretrainedModel:
    """
    A model folder, opened: all tensors of the model are there, in their shapes and in types that can be read, and the
    tokenizer ends a text as the model does. Tensors come out as views of the mapped files: nothing is read before it is used.

    Raises:
        ModelError: there is no such folder, or no GPT-2 with safetensors weights and its tokenizer in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelError(f"no model folder at {folder}")
        files = Folder(folder, ModelError)
        self.config = ModelConfig.from_file(folder / CONFIG_FILE)
        self._files: dict[Path, Any] = {}
        stored = self._open(_weight_files(files))
        if self.config.tied_head and "lm_head.weight" in stored:
            # As transformers does: one of the two is enough, and a head that is not the table is a head of its own.
            if "wte.weight" not in stored:
                stored["wte.weight"] = stored["lm_head.weight"]
            elif not _are_equal(stored["lm_head.weight"], stored["wte.weight"]):
                self.config = replace(self.config, tied_head=False)
        self.tensors: Mapping[str, StoredTensor] = {name: _find(folder, stored, name) for name in self.config.tensor_shapes}
        """Under transformers' names without "transformer.", in the order of the forward pass."""
        for name, shape in self.config.tensor_shapes.items():
            _check(self.tensors[name], name, shape)
        self._tokenizer_digest = tokenizer_digest(self.tokenizer())

    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            ModelError: there is none, it cannot be read, or ends a text by another token than the configuration.
        """
        tokenizer, end, path = load_tokenizer(self.folder), end_of_text(self.folder), self.folder / CONFIG_FILE
        found = None if end is None else tokenizer.token_to_id(end)
        if end is not None and found != self.config.end_token:
            other = tokenizer.id_to_token(self.config.end_token)
            raise ModelError(
                f"{path}: eos_token_id is {self.config.end_token}, which is {shown(other)} in the tokenizer; its own eos_token "
                f"is {shown(end)}, id {found}; correct the one that is wrong"
            )
        return tokenizer

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        The tensor ``name`` (transformers' name without "transformer."), in the dtype it is stored in.

        Raises:
            ModelError: it is missing or has another shape.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.folder}: the model has no tensor {name!r}")
        stored = self.tensors[name]
        _check(stored, name, shape)
        tensor: Tensor = self._files[stored.path].get_tensor(stored.name)
        return tensor

    def rows(self, name: str) -> "Rows":
        """The same tensor as rows that are read one by one. For tables of which little is used: see `Rows`."""
        return Rows(self.tensors[name])

    def not_finite(self, what: str) -> ModelError:
        """
        What is wrong with a model that computes NaN or infinity without any adapter; reads all weights.

        Args:
            what: of it is not finite, in the plural.
        """
        shapes = self.config.tensor_shapes.items()
        name = next((name for name, shape in shapes if not torch.isfinite(self.tensor(name, shape)).all()), None)
        reason = "its weights are too large for the precision" if name is None else f"its tensor {name!r} has such values"
        return ModelError(
            f"the base model itself, without an adapter, gives {what} that are not finite numbers: {reason}; "
            "take another copy of the model, or another model"
        )

    def fingerprint(self) -> str:
        """
        32 hex digits. The first 16 are of SHA-256 over the configuration and every weight's name, shape, dtype and first,
        middle and last row; the last 16 are those of `tokenizer_digest`.

        Rows, not whole tensors: it takes milliseconds for any size, and training of any kind moves every row.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(self.tensors):
            stored, rows = self.tensors[name], self.rows(name)
            digest.update(f"{name} {list(stored.shape)} {stored.dtype}".encode())
            for row in sorted({0, stored.shape[0] // 2, stored.shape[0] - 1}):
                digest.update(rows.read([row]))
        return fingerprint(digest.hexdigest(), self._tokenizer_digest)

    def _open(self, paths: Sequence[Path]) -> dict[str, StoredTensor]:
        """What the files hold, "transformer." removed from the names."""
        found: dict[str, StoredTensor] = {}
        for path in paths:
            try:
                file = self._files[path] = safe_open(path, framework="pt")
                for stored in file.keys():  # type: ignore[no-untyped-call]
                    part, name = file.get_slice(stored), stored.removeprefix("transformer.")  # type: ignore[no-untyped-call]
                    if name in found:
                        raise ModelError(
                            f"{path}: the tensor {name!r} is there twice, as {stored!r} and, in {found[name].path.name}, as "
                            f"{found[name].name!r}; remove the one that is not meant"
                        )
                    found[name] = StoredTensor(path, stored, part.get_dtype(), tuple(part.get_shape()))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
        return found


def _find(folder: Path, stored: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    if name in stored:
        return stored[name]
    other = next((tensor for other, tensor in stored.items() if other.endswith(f".{name}")), None)
    as_what = f"; {other.path.name} has {other.name!r}, a name that transformers does not read either" if other else ""
    raise ModelError(f"{folder}: tensor {name!r} is missing{as_what or '; is this a complete GPT-2 checkpoint?'}")


def _check(stored: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ModelError(f"{stored.path}: tensor {name!r} has shape {list(stored.shape)}, {CONFIG_FILE} asks for {list(shape)}")
    if stored.dtype not in STORED_DTYPES:
        raise ModelError(
            f"{stored.path}: tensor {name!r} is stored as {stored.dtype}; weights can be {', '.join(STORED_DTYPES)}: "
            "save the model in one of them"
        )


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two matrices have the same values; read in pieces, so that neither stays in memory."""
    can_be_read = {one.dtype, other.dtype} <= STORED_DTYPES.keys()
    if one.shape != other.shape or len(one.shape) != 2 or 0 in one.shape or not can_be_read:
        return False  # and what it should be, the model's own shapes say
    rows = Rows(one), Rows(other)
    for begin in range(0, one.shape[0], ROWS_AT_ONCE):
        indices = torch.arange(begin, min(begin + ROWS_AT_ONCE, one.shape[0]))
        if not torch.equal(*(each.gather(indices).double() for each in rows)):
            return False
    return True


class Rows:
    """
    A stored tensor's rows, read from the file when they are asked for.

    Pages of a mapped file stay resident with dozens of their neighbours once touched: a vocabulary's table would soon be
    in memory whole.
    """

    def __init__(self, stored: StoredTensor) -> None:
        self._file = stored.path.open("rb", buffering=0)
        header_bytes = int.from_bytes(self._file.read(8), "little")  # the format of safetensors: length, JSON, data
        begin, end = json.loads(self._file.read(header_bytes))[stored.name]["data_offsets"]
        self._dtype = STORED_DTYPES[stored.dtype]
        self._begin = 8 + header_bytes + begin
        self._row_bytes = (end - begin) // stored.shape[0]

    def read(self, indices: Sequence[int]) -> bytearray:
        """The bytes of the rows, one after the other."""
        buffer = bytearray(len(indices) * self._row_bytes)
        view = memoryview(buffer)
        for place, index in enumerate(indices):
            self._file.seek(self._begin + index * self._row_bytes)
            self._file.readinto(view[place * self._row_bytes : (place + 1) * self._row_bytes])
        return buffer

    def gather(self, indices: Tensor) -> Tensor:
        """Rows of a matrix, (N,) indices -> (N, width), each different row read once."""
        distinct, places = torch.unique(indices, return_inverse=True)
        rows = torch.frombuffer(self.read(distinct.tolist()), dtype=self._dtype)
        return rows.view(len(distinct), -1).index_select(0, places)

    def __del__(self) -> None:
        self._file.close()


def _weight_files(files: Folder) -> list[Path]:
    if path := files.find(WEIGHTS_FILE):
        return [path]
    if not files.find(INDEX_FILE):
        raise ModelError(f"{files.path} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    weight_map = files.read_json(INDEX_FILE).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or any(not isinstance(name, str) or name == ".." or Path(name).name != name for name in names):
        raise ModelError(f"{files.path / INDEX_FILE} names no shards, or shards outside its folder")
    return [files.require(name) for name in sorted(set(names))]
