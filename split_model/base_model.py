"""A GPT-2 checkpoint in Hugging Face's layout: config.json and safetensors, mapped into memory and never read whole."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError

__all__ = ["BaseModel", "ModelConfig", "find_model", "is_hub_name"]

FILES_NEEDED = [
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
]
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu")
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNSUPPORTED = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")


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
        raw = _read_json(path)
        if raw.get("model_type") != "gpt2":
            raise ModelError(f"{path}: model_type is {raw.get('model_type')!r}; only 'gpt2' can be split")
        for option in UNSUPPORTED:
            if raw.get(option):
                raise ModelError(f"{path}: {option} is not supported")
        if not raw.get("scale_attn_weights", True):
            raise ModelError(f"{path}: attention without scale_attn_weights is not supported")
        try:
            config = cls(
                num_layers=int(raw["n_layer"]),
                width=int(raw["n_embd"]),
                num_heads=int(raw["n_head"]),
                inner_width=int(raw.get("n_inner") or 4 * raw["n_embd"]),
                num_positions=int(raw.get("n_positions") or raw["n_ctx"]),
                vocabulary_size=int(raw["vocab_size"]),
                norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
                activation=str(raw.get("activation_function", "gelu_new")),
                tied_head=bool(raw.get("tie_word_embeddings", True)),
                end_token=int(raw.get("eos_token_id", 50256)),
            )
        except KeyError as error:
            raise ModelError(f"{path}: {error} is missing; a GPT-2 configuration needs it") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{path} is no GPT-2 configuration: {error}") from None
        if min(config.num_layers, config.width, config.num_heads, config.num_positions, config.vocabulary_size) < 1:
            raise ModelError(f"{path}: n_layer, n_embd, n_head, n_positions and vocab_size must be at least 1")
        if not 0 <= config.end_token < config.vocabulary_size:
            raise ModelError(f"{path}: eos_token_id {config.end_token} is not below vocab_size {config.vocabulary_size}")
        if config.activation not in ACTIVATIONS:
            raise ModelError(f"{path}: activation_function {config.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if config.width % config.num_heads:
            raise ModelError(f"{path}: n_embd {config.width} is not a multiple of n_head {config.num_heads}")
        return config


class BaseModel:
    """
    A model folder, opened. Tensors come out as views of the mapped files: nothing is read before it is used.

    Raises:
        ModelError: there is no such folder, or no GPT-2 with safetensors weights in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelError(f"no model folder at {folder}")
        self.config = ModelConfig.from_file(folder / "config.json")
        self._files = {name: _open(folder / name) for name in _weight_files(folder)}
        self._places = {
            stored.removeprefix("transformer."): (file, stored) for file in self._files.values() for stored in file.keys()
        }

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """
        The tensor ``name`` (transformers' name without "transformer."), in the dtype it is stored in.

        Raises:
            ModelError: it is missing or has another shape.
        """
        if name not in self._places:
            raise ModelError(f"{self.folder}: tensor {name!r} is missing; is this a complete GPT-2 checkpoint?")
        file, stored = self._places[name]
        found = tuple(file.get_slice(stored).get_shape())
        if found != shape:
            raise ModelError(f"{self.folder}: tensor {name!r} has shape {list(found)}, config.json asks for {list(shape)}")
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the tensors."""
        return [self.folder / name for name in self._files]

    def check(self) -> None:
        """
        Raises:
            ModelError: a tensor of the model is missing or has another shape.
        """
        for name, shape in self.config.tensor_shapes.items():
            self.tensor(name, shape)

    def rows(self, name: str) -> "Rows":
        """The same tensor as rows that are read one by one. For tables of which little is used: see `Rows`."""
        file, stored = self._places[name]
        path = next(self.folder / shard for shard, opened in self._files.items() if opened is file)
        return Rows(path, stored)

    def fingerprint(self) -> str:
        """
        SHA-256 over the configuration and every weight's name, shape, dtype and first, middle and last row, as 32 hex digits.

        Rows, not whole tensors: it takes milliseconds for any size, and training of any kind moves every row.
        """
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(filter(self._is_part_of_the_model, self._places)):
            rows = self.rows(name)
            digest.update(f"{name} {rows.shape} {rows.dtype}".encode())
            for row in sorted({0, rows.shape[0] // 2, rows.shape[0] - 1}) if rows.shape else ():
                digest.update(rows.read([row]))
        return digest.hexdigest()[:32]

    def _is_part_of_the_model(self, name: str) -> bool:
        # Old checkpoints carry the causal mask as a buffer, and a tied head twice.
        is_mask, is_head = name.endswith((".attn.bias", ".attn.masked_bias")), name == "lm_head.weight"
        return not is_mask and not (is_head and self.config.tied_head)


class Rows:
    """
    A stored tensor's rows, read from the file when they are asked for.

    Pages of a mapped file stay resident with dozens of their neighbours once touched: a vocabulary's table would soon be
    in memory whole.
    """

    def __init__(self, path: Path, stored: str) -> None:
        self._file = path.open("rb", buffering=0)
        header_bytes = int.from_bytes(self._file.read(8), "little")  # the format of safetensors: length, JSON, data
        entry = json.loads(self._file.read(header_bytes))[stored]
        self.dtype: str = entry["dtype"]
        self.shape: list[int] = entry["shape"]
        begin, end = entry["data_offsets"]
        self._begin = 8 + header_bytes + begin
        self._row_bytes = (end - begin) // max(1, self.shape[0] if self.shape else 1)

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
        rows = torch.frombuffer(self.read(distinct.tolist()), dtype=STORED_DTYPES[self.dtype])
        return rows.view(len(distinct), -1).index_select(0, places)

    def __del__(self) -> None:
        self._file.close()


def is_hub_name(name: str) -> bool:
    """Whether a model can have this name on the Hugging Face hub."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def find_model(name: str) -> Path:
    """
    The folder of a model: ``name`` itself if it is one, else fetched from the Hugging Face hub (only the files needed).

    Raises:
        ModelError: neither a folder nor a model the hub gives us.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; a model is a folder with config.json and model.safetensors")
    if not is_hub_name(name):
        raise ModelError(f"no model folder at {folder}")
    from huggingface_hub import snapshot_download  # a slow import that a local folder does not need
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES_NEEDED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{name!r} is no folder here, and the Hugging Face hub did not give it: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; a model folder has config.json and model.safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def _weight_files(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json")
    weight_map = _read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    if not names or any(not isinstance(name, str) or name == ".." or Path(name).name != name for name in names):
        raise ModelError(f"{index} names no shards, or shards outside its folder")
    return sorted(set(names))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
