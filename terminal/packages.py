"""What is not installed, said in one sentence with what installs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES

__all__ = ["PackageMissing", "importing"]


class PackageMissing(ImportError):
    """A library is not installed, or cannot be loaded here; the message says what needs it, and what installs it."""


@contextmanager
def importing(purpose: str, install: str) -> Iterator[None]:
    """
    Around imports of libraries that an installation may lack.

        with importing("the torch engine", install="splitlora[torch]"):
            from .torch_engine import TorchEngine

    Args:
        purpose: what needs the libraries.
        install: what pip is to install for it.

    Raises:
        PackageMissing: a module is not there, or a compiled one cannot be loaded. Other errors of an import, such as a name
            that a module does not have, are defects and stay what they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(purpose, install, f"{error.name}, which is not installed") from None
    except ImportError as error:
        if not (error.path or "").endswith(tuple(EXTENSION_SUFFIXES)):
            raise
        raise _missing(purpose, install, f"{error.name}, which cannot be loaded here ({error})") from None


def _missing(purpose: str, install: str, what: str) -> PackageMissing:
    return PackageMissing(f"{purpose} needs {what}: pip install {repr(install) if '[' in install else install}")
