"""What is exported: a base model, and the adapter of a run or of a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from split_model import BaseModel, ModelConfig, find_model

from .lora import LoraAdapter, Merged, read_adapter
from .weights import StoredWeights, Weights

__all__ = ["Run", "Source", "open_source"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where an adapter comes from."""

    id: str
    step: int
    """The last one that is in it."""
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to be exported."""

    name: str
    """Of the base model, as the user gave it."""
    folder: Path
    """Where its tokenizer and configuration are."""
    config: ModelConfig
    fingerprint: str
    """Of the base model, see `BaseModel.fingerprint`."""
    base: Weights
    adapter: LoraAdapter | None
    run: Run | None

    def merged(self) -> Weights:
        return Merged(self.base, self.adapter) if self.adapter else self.base


@contextmanager
def open_source(model: str, *, adapter: Path | None = None) -> Iterator[Source]:
    """
    Raises:
        ModelError, ExportError: the model, the run or the adapter cannot be read, or they do not belong together.
    """
    base = BaseModel(find_model(model))
    base.check()
    yield Source(
        name=model,
        folder=base.folder,
        config=base.config,
        fingerprint=base.fingerprint(),
        base=StoredWeights(base.weight_files),
        adapter=read_adapter(adapter, base.config) if adapter else None,
        run=None,
    )
