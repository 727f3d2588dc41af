"""The run on the network: it moves bytes, and does what the federation decides."""

from .run_server import RunServer

__all__ = ["RunServer"]
