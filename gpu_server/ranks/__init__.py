"""Several processes that compute one server's part together."""

from .group import Alone, Ranks

__all__ = ["Alone", "Ranks"]
