"""The files of a run and of a stranger's model or adapter, read and written without torch. Knows nothing of networks."""

from .activation_cache import CacheFolder
from .adapter_settings import AdapterSettings
from .atomic_file import remove_unfinished, replace_file
from .chat_template import ChatTemplate, Message, TemplateFailed
from .errors import AdapterError, ModelError
from .exported_manifest import ExportedManifest
from .fingerprint import fingerprint, part_that_differs
from .folder import Folder, NamedFiles, shown
from .model_folder import FILES_BESIDE_WEIGHTS, find_model, is_hub_name
from .part_description import (
    EDGE_WEIGHTS,
    GRAPH_FILES,
    HEAD_GRAPH_FILES,
    HEAD_WEIGHTS,
    PART_FILE,
    PartDescription,
    required_files,
)
from .run_description import RunDescription
from .tokenizer import TOKENIZER_FILES, encode, load_tokenizer

__all__ = [
    "EDGE_WEIGHTS",
    "FILES_BESIDE_WEIGHTS",
    "GRAPH_FILES",
    "HEAD_GRAPH_FILES",
    "HEAD_WEIGHTS",
    "PART_FILE",
    "TOKENIZER_FILES",
    "AdapterError",
    "AdapterSettings",
    "CacheFolder",
    "ChatTemplate",
    "ExportedManifest",
    "Folder",
    "Message",
    "ModelError",
    "NamedFiles",
    "PartDescription",
    "RunDescription",
    "TemplateFailed",
    "encode",
    "find_model",
    "fingerprint",
    "is_hub_name",
    "load_tokenizer",
    "part_that_differs",
    "remove_unfinished",
    "replace_file",
    "required_files",
    "shown",
]
