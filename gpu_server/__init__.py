"""The workstation's side of a split fine-tuning run."""

from typing import TYPE_CHECKING, Any

from .config import ServerConfig
from .errors import ConfigError, ServerError

if TYPE_CHECKING:
    from .federation import RunStatus, StepRecord
    from .sdk import GpuServer, RunEndedEarly
    from .serving import Observer

__all__ = ["ConfigError", "GpuServer", "Observer", "RunEndedEarly", "RunStatus", "ServerConfig", "ServerError", "StepRecord"]

_HOMES = {
    "GpuServer": "sdk",
    "Observer": "serving",
    "RunEndedEarly": "sdk",
    "RunStatus": "federation",
    "StepRecord": "federation",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `splitlora-server --help` does not need it (PEP 562).
    from importlib import import_module

    from terminal import importing

    if name not in _HOMES:
        raise AttributeError(f"module 'gpu_server' has no attribute {name!r}")
    with importing("a server", install="splitlora[server]"):
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
