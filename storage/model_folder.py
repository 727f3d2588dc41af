"""Finds the model that a user names, here or on the Hugging Face hub, and says which of its files are needed. Reads none."""

import re
from pathlib import Path

from .errors import ModelError
from .folder import Folder, shown
from .tokenizer import TOKENIZER_FILES

__all__ = [
    "CONFIG_FILE",
    "FILES_BESIDE_WEIGHTS",
    "GENERATION_FILE",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "find_model",
    "is_hub_name",
    "stated_ends",
    "stated_positions",
]

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
FILES_OF_WEIGHTS = (CONFIG_FILE, "model*.safetensors", INDEX_FILE)
FILES_BESIDE_WEIGHTS = (*TOKENIZER_FILES, GENERATION_FILE)
"""The files of a model folder, besides weights and configuration, that other programs need."""
POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")
"""Under one of these, families say in config.json how many positions a model has; the first that is there counts."""
PRETRAINED_KEY = "original_max_position_embeddings"


def is_hub_name(name: str) -> bool:
    """Whether a model can have this name on the Hugging Face hub."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def find_model(name: str) -> Path:
    """
    The folder of a model. If ``name`` is no folder, the model of that name is fetched from the Hugging Face hub, only the files
    that are needed.

    Raises:
        ModelError: there is no such folder, and the hub does not give such a model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder} is a file; a model is a folder with config.json and model.safetensors")
    if not is_hub_name(name):
        raise ModelError(f"no model folder at {folder}")
    try:  # a slow import that a local folder does not need
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name!r} is no folder here, and the Hugging Face hub is asked with {error.name}, which is not installed: "
            "pip install 'splitlora[torch]'"
        ) from None

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES_OF_WEIGHTS, *FILES_BESIDE_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{name!r} is no folder here, and the Hugging Face hub did not give it: {reason}") from None


def stated_positions(files: Folder) -> int | None:
    """
    How many positions a model has by its config.json, for whoever reads nothing else of it; None where none are stated. One
    whose rotary positions are scaled by longrope has those that it was pretrained with.

    Raises:
        ModelError: config.json cannot be read, or says no number.
    """
    config = files.read_json(CONFIG_FILE) if files.find(CONFIG_FILE) else {}
    key = next((key for key in POSITION_KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    found, scaling = config[key], config.get("rope_parameters") or config.get("rope_scaling")
    if isinstance(scaling, dict) and "longrope" in (scaling.get("rope_type"), scaling.get("type")):
        key = PRETRAINED_KEY if PRETRAINED_KEY in config else key
        found = config[key]
    if not _is_whole(found, least=1):
        raise ModelError(f"{files.path / CONFIG_FILE}: {key} is {shown(found)}; a whole number from 1 on is expected")
    return int(found)


def stated_ends(files: Folder) -> tuple[int, ...]:
    """
    The tokens at which generation stops by a model's files, for whoever reads nothing else of them: as in transformers, those
    of generation_config.json alone if it names any, or else those of config.json. None where neither names any.

    Raises:
        ModelError: a file cannot be read, or names no token.
    """
    for name in filter(files.find, (GENERATION_FILE, CONFIG_FILE)):
        found = files.read_json(name).get("eos_token_id")
        ends = [] if found is None else found if isinstance(found, list) else [found]
        if not all(_is_whole(token, least=0) for token in ends):
            raise ModelError(
                f"{files.path / name}: eos_token_id is {shown(found)}; a whole number from 0 on, or a list of them, is expected"
            )
        if ends:
            return tuple(ends)
    return ()


def _is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
