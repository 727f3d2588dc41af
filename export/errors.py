"""What can be wrong with an export that a user asks for."""

__all__ = ["Disagreement", "ExportError"]


class ExportError(ValueError):
    """A run, an adapter, an output folder or an exported folder that cannot be used; the message says why and what to do."""


class Disagreement(ArithmeticError):
    """An exported folder does not compute what its model does."""
