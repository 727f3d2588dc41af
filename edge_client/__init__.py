"""The device's side of a split fine-tuning run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks import Callback
    from .client import EdgeClient
    from .client_state import StateError
    from .connection import ConnectionFailed, Refused
    from .data import DataError
    from .disclosure import TooMuchDisclosed
    from .enrolment import EnrolmentError
    from .generation import ExportedModelError, GenerationError, Generator, RuntimeMissing, Sampling
    from .pinning import CertificateChanged
    from .server_status import ServerStatus, ping
    from .training import Step

__all__ = [
    "Callback",
    "CertificateChanged",
    "ConnectionFailed",
    "DataError",
    "EdgeClient",
    "EnrolmentError",
    "ExportedModelError",
    "GenerationError",
    "Generator",
    "Refused",
    "RuntimeMissing",
    "Sampling",
    "ServerStatus",
    "StateError",
    "Step",
    "TooMuchDisclosed",
    "ping",
]

_HOMES = {
    "Callback": "callbacks",
    "CertificateChanged": "pinning",
    "EnrolmentError": "enrolment",
    "StateError": "client_state",
    "ConnectionFailed": "connection",
    "DataError": "data",
    "EdgeClient": "client",
    "ExportedModelError": "generation",
    "GenerationError": "generation",
    "Generator": "generation",
    "Refused": "connection",
    "RuntimeMissing": "generation",
    "Sampling": "generation",
    "ServerStatus": "server_status",
    "Step": "training",
    "TooMuchDisclosed": "disclosure",
    "ping": "server_status",
}


def __getattr__(name: str) -> Any:
    # `splitlora-edge --help` needs none of them (PEP 562).
    from importlib import import_module

    from terminal import importing

    if name not in _HOMES:
        raise AttributeError(f"module 'edge_client' has no attribute {name!r}")
    with importing("a device", install="splitlora"):
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
