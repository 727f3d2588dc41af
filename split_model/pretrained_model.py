"""A checkpoint in Hugging Face's layout: a folder with config.json, safetensors weights and a tokenizer."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from storage import Folder, ModelError, fingerprint, load_tokenizer, shown
from storage.adapter_settings import CONFIG_FILE as ADAPTER_CONFIG_FILE
from storage.model_folder import CONFIG_FILE, GENERATION_FILE
from storage.tokenizer import end_of_text, tokenizer_digest

from .config_file import Settings
from .families import read_config
from .model_config import ModelConfig
from .stored_tensors import STORED_DTYPES, StoredTensor, StoredTensors, open_tensors, weight_files

__all__ = ["PretrainedModel"]

QUANTISED = ".qweight"
"""How the names of packed matrices end that GPTQ and AWQ store."""


class PretrainedModel:
    """
    A model folder, opened: all tensors of the model are there, in their shapes and in types that can be read, and the
    tokenizer ends a text as the model does. No tensor is read before it is used.

    Raises:
        ModelError: there is no such folder, or no model of a known family with safetensors weights and its tokenizer in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelError(f"no model folder at {folder}")
        if (folder / ADAPTER_CONFIG_FILE).exists() and not (folder / CONFIG_FILE).exists():
            raise ModelError(f"{folder} has an adapter, and no model; give the model that it adapts")
        config = read_config(folder / CONFIG_FILE)
        stored = open_tensors(weight_files(Folder(folder, ModelError)), config.names.prefix)
        config = _settle_head(config, stored)
        self.tensors: StoredTensors = {name: _find(folder, config, stored, name) for name in config.tensor_shapes}
        """In the order of the forward pass, and no others than the model's."""
        for name, shape in config.tensor_shapes.items():
            _check(self.tensors[name], name, shape)
        _check_blocks(folder, config, stored)
        tokenizer = load_tokenizer(folder)
        self.config = _settle_ends(config, folder, tokenizer)
        self._tokenizer_digest = tokenizer_digest(tokenizer)

    def tokenizer(self) -> Tokenizer:
        """It is read anew: most who open a model need none, and a large one is as much memory as a block."""
        return load_tokenizer(self.folder)

    def fingerprint(self) -> str:
        """
        32 hex digits. The first 16 are of SHA-256 over the configuration and every weight's name, shape, dtype and first,
        middle and last row; the last 16 are those of `tokenizer_digest`.

        Rows, not whole tensors: it takes milliseconds for any size, and training of any kind moves every row.
        """
        digest = hashlib.sha256(json.dumps(self.config.identity(), sort_keys=True).encode())
        for name, stored in sorted(self.tensors.items()):
            rows = stored.rows()
            digest.update(f"{name} {list(stored.shape)} {stored.dtype}".encode())
            for row in sorted({0, stored.shape[0] // 2, stored.shape[0] - 1}):
                digest.update(rows.read([row]))
        return fingerprint(digest.hexdigest(), self._tokenizer_digest)

    def not_finite(self, what: str) -> ModelError:
        """
        The error of a model that computes NaN or infinity without any adapter; to find out why, all weights are read.

        Args:
            what: the values that are not finite, in the plural.
        """
        name = next((name for name, stored in self.tensors.items() if not torch.isfinite(stored.view()).all()), None)
        reason = "its weights are too large for the precision" if name is None else f"its tensor {name!r} has such values"
        return ModelError(
            f"the base model itself, without an adapter, gives {what} that are not finite numbers: {reason}; "
            "take another copy of the model, or another model"
        )


def _settle_head(config: ModelConfig, stored: dict[str, StoredTensor]) -> ModelConfig:
    """
    Of a model whose configuration ties its head to its token embedding, and whose files hold a head all the same: what
    transformers makes of it. A stored head stands for a missing table, and one that is not the table is a head of its own.
    """
    table, head = config.table_name, config.separate_head_name
    if config.tied_head and head in stored:
        if table not in stored:
            stored[table] = stored[head]
        elif not stored[head].equals(stored[table]):
            return replace(config, tied_head=False)
    return config


def _settle_ends(config: ModelConfig, folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    """
    One token ends a text in training: the tokenizer's own, which config.json or generation_config.json has to name, or else the
    first of config.json. It also ends what the model generates; so do, as in transformers, those of generation_config.json
    alone if it names any, or else those of config.json.

    Raises:
        ModelError: the tokenizer ends a text by a token that neither file names, or a token is beyond the vocabulary.
    """
    generation, end, chosen = _ends_of_generation(config, folder), end_of_text(folder), config.end_token
    if end is not None:
        found, path = tokenizer.token_to_id(end), folder / CONFIG_FILE
        if found not in (*config.ends, *generation):
            other = tokenizer.id_to_token(config.end_token)
            raise ModelError(
                f"{path}: eos_token_id is {config.end_token}, which is {shown(other)} in the tokenizer; its own eos_token "
                f"is {shown(end)}, id {found}; correct the one that is wrong"
            )
        chosen = found
    stops = dict.fromkeys(generation or config.ends)
    return replace(config, end_token=chosen, stop_tokens=tuple(token for token in stops if token != chosen))


def _ends_of_generation(config: ModelConfig, folder: Path) -> tuple[int, ...]:
    files = Folder(folder, ModelError)
    if not files.find(GENERATION_FILE):
        return ()
    ends = Settings(folder / GENERATION_FILE, files.read_json(GENERATION_FILE)).integers("eos_token_id")
    config.check_ends(ends, folder / GENERATION_FILE)
    return ends


def _find(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor], name: str) -> StoredTensor:
    if name in stored:
        return stored[name]
    if any(other.endswith(QUANTISED) for other in stored):
        raise ModelError(f"{folder}: tensor {name!r} is missing; its weights are quantised: take the model they were made from")
    other = next((tensor for other, tensor in stored.items() if other.endswith(f".{name}")), None)
    as_what = f"{other.path.name} has {other.name!r}, a name that transformers does not read either" if other else ""
    raise ModelError(
        f"{folder}: tensor {name!r} is missing; {as_what or f'is this a complete {config.family.title} checkpoint?'}"
    )


def _check_blocks(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    """
    Raises:
        ModelError: the files have more in a block, or more blocks, than the configuration asks for. Whoever made them computed
            another model; what else they have, such as a second head, is left out, as transformers leaves it out.
    """
    blocks, constants = f"{config.names.blocks}.", config.names.constants_of_a_block
    more = [name for name in stored if name.startswith(blocks) and name not in config.tensor_shapes]
    more = [name for name in more if name.removeprefix(blocks).partition(".")[2] not in constants]
    if more:
        like_it = f" ({len(more)} are like it)" if len(more) > 1 else ""
        raise ModelError(
            f"{stored[more[0]].path}: {CONFIG_FILE} asks for no tensor {more[0]!r}{like_it}, and without it this is another "
            f"{config.family.title}; correct {CONFIG_FILE}, or remove the tensor"
        )


def _check(stored: StoredTensor, name: str, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise ModelError(f"{stored.path}: tensor {name!r} has shape {list(stored.shape)}, {CONFIG_FILE} asks for {list(shape)}")
    if stored.dtype not in STORED_DTYPES:
        raise ModelError(
            f"{stored.path}: tensor {name!r} is stored as {stored.dtype}; weights can be {', '.join(STORED_DTYPES)}: "
            "save the model in one of them"
        )
