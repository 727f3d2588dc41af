"""What can be wrong with a model or an adapter that a user names."""

__all__ = ["AdapterError", "ModelError"]


class ModelError(ValueError):
    """A model folder, hub name, cut layer or device cannot be used; the message says why and what to do."""


class AdapterError(ValueError):
    """An adapter folder or a LoRA setting cannot be used, or does not fit; the message says why and what to do."""
