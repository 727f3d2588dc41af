"""What is not installed, said in one sentence with what installs it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any

__all__ = ["PackageMissing", "import_onnxruntime", "importing"]


class PackageMissing(ImportError):
    """A library is not installed, or cannot be loaded here; the message says what needs it, and what installs it."""


@contextmanager
def importing(purpose: str, install: str, *, instead: str = "") -> Iterator[None]:
    """
    Around imports of libraries that an installation may lack.

        with importing("the torch engine", install="splitlora[torch]"):
            from .torch_engine import TorchEngine

    Args:
        purpose: what needs the libraries.
        install: what pip is to install for it.
        instead: what else the user can do.

    Raises:
        PackageMissing: a module is not there, or a compiled one cannot be loaded. Other errors of an import, such as a name
            that a module does not have, are defects and stay what they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(purpose, install, instead, f"{error.name}, which is not installed") from None
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Ctrl-C while a compiled module initialised itself
            raise error.__cause__ from None
        if not (error.path or "").endswith(tuple(EXTENSION_SUFFIXES)):
            raise
        raise _missing(purpose, install, instead, f"{error.name}, which cannot be loaded here ({error})") from None


def import_onnxruntime(purpose: str, install: str) -> Any:
    """
    The module onnxruntime, told to report nothing. From 1.29 on it keeps a number of the device and records of its use in the
    user's folder, and sends them to its maker, unless this variable is set before it is loaded.

    Raises:
        PackageMissing: as `importing`.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    with importing(purpose, install):
        import onnxruntime
    return onnxruntime


def _missing(purpose: str, install: str, instead: str, what: str) -> PackageMissing:
    remedy = f"pip install {repr(install) if '[' in install else install}"
    return PackageMissing(f"{purpose} needs {what}: {remedy}{instead and f', or {instead}'}")
