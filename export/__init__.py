"""From a run's result to what people deploy: a merged checkpoint, ONNX graphs, and how well they agree."""

from typing import TYPE_CHECKING, Any

from .errors import Disagreement, ExportError

if TYPE_CHECKING:
    from .merged_folder import merge
    from .onnx_folder import export_onnx
    from .verification import Agreement, verify

__all__ = ["Agreement", "Disagreement", "ExportError", "export_onnx", "merge", "verify"]

_HOMES = {"Agreement": "verification", "export_onnx": "onnx_folder", "merge": "merged_folder", "verify": "verification"}


def __getattr__(name: str) -> Any:
    # torch and onnx take seconds to import, and `splitlora-export --help` needs neither (PEP 562).
    from importlib import import_module

    from terminal import importing

    if name not in _HOMES:
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    with importing("exporting", install="splitlora[export]"):
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
