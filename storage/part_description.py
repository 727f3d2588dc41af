"""
part.json, by which a server tells a device what the files of its part are: its blocks as ONNX graphs, their weights, and the
tokenizer. A device has it from the network, so every value is checked before anything is done with it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .atomic_file import replace_file
from .errors import ModelError
from .fingerprint import FINGERPRINT
from .folder import Folder, Member, shown

__all__ = ["EDGE_WEIGHTS", "GRAPH_FILES", "HEAD_GRAPH_FILES", "HEAD_WEIGHTS", "PART_FILE", "PartDescription", "required_files"]

PART_FILE = "part.json"
WITHOUT_POSITIONS, WITH_POSITIONS = FORMATS = (1, 2)
"""Whether the graphs of blocks ask for positions, which older devices do not give them."""
EDGE_WEIGHTS = ("float32", "float16", "int8")
"""How the frozen matrices of a part can be stored."""
GRAPH_FILES = ("embedding.onnx", "forward.onnx", "inference.onnx", "backward.onnx", "first_backward.onnx")
TRAINING_GRAPH_FILES = ("forward.onnx", "backward.onnx", "first_backward.onnx")
"""Of these, those that a part has only if it learns something."""
HEAD_GRAPH_FILES = ("head.onnx", "head_loss.onnx")
"""Of a part that has the head, too."""
EMBEDDING_WEIGHTS, HEAD_WEIGHTS = "embedding.safetensors", "head.safetensors"
LARGEST = (1 << 31) - 1
MOST_BLOCKS, MOST_LAYERS, LONGEST_NAME = 10_000, 64, 200
REMEDY = "; the server's splitlora has to hand the part over again"


@dataclass(frozen=True, kw_only=True)
class PartDescription:
    """
    A device's part of a model, and of which run it is. The scale of the adapters' products and that of dropout are constants in
    the graphs; the same graph is run for every block.
    """

    fingerprint: str
    """Of the base model and its tokenizer."""
    cut_layer: int
    """The number of blocks."""
    weights: str
    """One of EDGE_WEIGHTS."""
    width: int
    """Elements of a hidden state, d."""
    num_positions: int
    """Longest sequence, in tokens."""
    vocabulary_size: int
    end_token: int
    """Id of the token that ends a text."""
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    adapter_prefix: str
    """What PEFT's name of a block's adapter matrix begins with, "{block}" in place of the block's number."""
    adapted: Mapping[str, tuple[int, int]]
    """The adapted layers of a block, by name, in the order of the forward pass: (in, out). Empty where nothing is learnt."""
    onnxruntime: str
    """The lowest version that runs the graphs, such as "1.23"."""
    head: str = ""
    """The file of weights whose table of tokens is the head's; empty where the labels, and so the head, are on the server."""
    format: int = WITHOUT_POSITIONS
    """One of FORMATS."""

    @classmethod
    def read(cls, folder: Path | Folder, *, onnxruntime: str | None = None) -> "PartDescription":
        """
        Args:
            onnxruntime: the version that is to run the graphs; None: they are not to be run.

        Raises:
            ModelError: the file cannot be read, or describes no part that this splitlora and this onnxruntime can compute.
        """
        files = folder if isinstance(folder, Folder) else Folder(folder, ModelError)
        raw, path = files.read_json(PART_FILE), files.path / PART_FILE
        if raw.get("format", FORMATS[0]) not in FORMATS:  # another may be wrong in everything that is checked from here on
            raise ModelError(
                f"{path} has format {shown(raw['format'])}; this splitlora reads formats {FORMATS[0]} to {FORMATS[-1]}: "
                "install the server's version of splitlora on this device"
            )
        values = _Values(files, raw)
        needed = values.matching("onnxruntime", r"[0-9]{1,4}\.[0-9]{1,4}", "a version such as 1.23")
        if onnxruntime is not None and _version(onnxruntime) < _version(needed):
            raise ModelError(
                f"the server's part of the model needs onnxruntime {needed}, this device has {onnxruntime}: "
                f"pip install 'onnxruntime>={needed}'"
            )
        vocabulary_size = values.integer("vocabulary_size", 1, LARGEST)
        return cls(
            fingerprint=values.matching("fingerprint", FINGERPRINT, "32 hexadecimal digits"),
            cut_layer=values.integer("cut_layer", 1, MOST_BLOCKS),
            weights=values.matching("weights", "|".join(EDGE_WEIGHTS), f"one of {', '.join(EDGE_WEIGHTS)}"),
            width=values.integer("width", 1, LARGEST),
            num_positions=values.integer("num_positions", 1, LARGEST),
            vocabulary_size=vocabulary_size,
            end_token=values.integer("end_token", 0, vocabulary_size - 1),
            lora_rank=values.integer("lora_rank", 1, LARGEST),
            lora_alpha=values.number("lora_alpha", lambda alpha: 0 < alpha < float("inf"), "a positive number"),
            lora_dropout=values.number("lora_dropout", lambda dropout: 0 <= dropout < 1, "a number from 0 to below 1"),
            adapter_prefix=values.matching(
                "adapter_prefix", r"[\w.]*\{block\}[\w.]*", "letters, digits and dots with {block} among them"
            ),
            adapted=values.layers("adapted"),
            onnxruntime=needed,
            head=values.matching("head", f"{EMBEDDING_WEIGHTS}|{HEAD_WEIGHTS}", f"{EMBEDDING_WEIGHTS} or {HEAD_WEIGHTS}")
            if "head" in raw
            else "",
            format=values.get("format", int),
        )

    def write(self, folder: Path) -> None:
        """
        Raises:
            OSError: it cannot be written.
        """
        content = {"format": self.format, **asdict(self)}
        if not self.head:  # a part of the same bytes as before there were heads on devices
            del content["head"]
        replace_file(folder / PART_FILE, (json.dumps(content, indent=2) + "\n").encode())

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The embedding's, then each block's."""
        return _weight_files(self.cut_layer)

    def adapter_name(self, block: int, layer: str, matrix: str) -> str:
        """PEFT's name of ``matrix`` ("A" or "B") of a block's layer in the whole model."""
        return f"{self.adapter_prefix.replace('{block}', str(block))}{layer}.lora_{matrix}.weight"


def required_files(cut_layer: int, *, with_head: bool = False, trains: bool = True) -> tuple[str, ...]:
    """
    The files of a part of so many blocks, but for those that not every part has: the tokenizer's, and the weights of a head
    that is not the table of the token embeddings.
    """
    graphs = [name for name in GRAPH_FILES if trains or name not in TRAINING_GRAPH_FILES]
    return (PART_FILE, *graphs, *(HEAD_GRAPH_FILES if with_head else ()), *_weight_files(cut_layer))


def _weight_files(cut_layer: int) -> tuple[str, ...]:
    return (EMBEDDING_WEIGHTS, *(f"block-{block}.safetensors" for block in range(cut_layer)))


class _Values:
    """
    The members of part.json, each checked as it is asked for.

    Raises:
        ModelError: in every method; it names the file, the key and what stands there.
    """

    def __init__(self, files: Folder, raw: dict[str, Any]) -> None:
        self._files, self._raw = files, raw

    def get(self, key: str, kind: type[Member]) -> Member:
        return self._files.member(PART_FILE, self._raw, key, kind, REMEDY)

    def integer(self, key: str, least: int, most: int) -> int:
        value = self.get(key, int)
        if not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def number(self, key: str, is_right: Any, expected: str) -> float:
        value = self.get(key, float)
        if not is_right(value):
            raise self._wrong(key, expected)
        return float(value)

    def matching(self, key: str, pattern: str, expected: str) -> str:
        value = self.get(key, str)
        if len(value) > LONGEST_NAME or not re.fullmatch(pattern, value, re.ASCII):
            raise self._wrong(key, expected)
        return value

    def layers(self, key: str) -> dict[str, tuple[int, int]]:
        layers = self.get(key, dict)
        if len(layers) > MOST_LAYERS:
            raise ModelError(f"{self._where}: {key} has {len(layers)} layers; at most {MOST_LAYERS} are expected{REMEDY}")
        for layer, shape in layers.items():
            if len(layer) > LONGEST_NAME or not re.fullmatch(r"\w+(\.\w+)*", layer, re.ASCII):
                raise ModelError(f"{self._where}: {key} names {shown(layer)}, which is no name of a layer{REMEDY}")
            if not (
                isinstance(shape, list)
                and [type(size) for size in shape] == [int, int]
                and min(shape) > 0
                and max(shape) <= LARGEST
            ):
                raise ModelError(f"{self._where}: {key} says {shown(shape)} of {layer}; two sizes are expected{REMEDY}")
        return {layer: (shape[0], shape[1]) for layer, shape in layers.items()}

    @property
    def _where(self) -> Path:
        return self._files.path / PART_FILE

    def _wrong(self, key: str, expected: str) -> ModelError:
        return ModelError(f"{self._where}: {key} is {shown(self._raw[key])}; {expected} is expected{REMEDY}")


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version; of "1.23.0rc1": (1, 23). Whatever is no number counts as 0."""
    numbers = (re.match("[0-9]{1,9}", part) for part in text.split(".")[:2])
    return tuple(int(number[0]) if number else 0 for number in numbers)
