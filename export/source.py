"""What is exported: a base model, and the adapter of a run or of a folder."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from split_model import BaseModel, ModelConfig, find_model

from .errors import ExportError
from .lora import BeyondLora, LoraAdapter, Merged, read_adapter
from .peft_merge import merge_with_peft
from .run_directory import Run, read_run
from .weights import StoredWeights, Weights

__all__ = ["Source", "open_source"]

logger = logging.getLogger("export")


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
def open_source(
    model: str, *, run_dir: Path | None = None, adapter: Path | None = None, plain_only: bool = False
) -> Iterator[Source]:
    """
    Args:
        plain_only: whether an adapter that is more than LoRA is refused; else PEFT merges it, and that is the source.

    Raises:
        ModelError, ExportError: the model, the run or the adapter cannot be read, or they do not belong together.
    """
    base = BaseModel(find_model(model))
    base.check()
    name, fingerprint, run, lora = model, base.fingerprint(), None, None
    with tempfile.TemporaryDirectory(prefix="splitlora-") as scratch:
        if run_dir is not None:
            run, lora = read_run(run_dir, base.config, fingerprint)
        elif adapter is not None:
            try:
                lora = read_adapter(adapter, base.config)
            except BeyondLora as error:
                if plain_only:
                    raise ExportError(f"{error}, which only merging can export; leave --keep-adapter out") from None
                logger.info("%s; it is merged by PEFT", error)
                merge_with_peft(base.folder, adapter, Path(scratch))
                base = BaseModel(Path(scratch))
        yield Source(
            name=name,
            folder=base.folder,
            config=base.config,
            fingerprint=fingerprint,
            base=StoredWeights(base.weight_files),
            adapter=lora,
            run=run,
        )
