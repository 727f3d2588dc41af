"""What is exported: a base model, and the adapter of a run or of a folder."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graphs import StoredWeights, Weights
from split_model import ModelConfig, PretrainedModel
from storage import ModelError, find_model
from terminal import user_path, user_text_path

from .adapter_folder import BeyondLora, read_adapter
from .errors import ExportError
from .lora import LoraAdapter, Merged
from .peft_merge import merge_with_peft
from .run_directory import Run, RunDirectory

__all__ = ["Source", "open_source"]

logger = logging.getLogger("export")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to be exported."""

    name: str
    """The base model, as the user named it."""
    folder: Path
    """Where its tokenizer and configuration are."""
    config: ModelConfig
    fingerprint: str
    """Of the base model, see `PretrainedModel.fingerprint`."""
    stored: Weights
    adapter: LoraAdapter | None
    adapter_folder: Path | None
    """The PEFT folder that the adapter was read from."""
    run: Run | None

    def base(self) -> Weights:
        return Merged(self.stored, {})

    def merged(self) -> Weights:
        return Merged(self.stored, self.adapter or {})


@contextmanager
def open_source(
    model: str | None, *, run_dir: Path | None = None, adapter: Path | None = None, plain_only: bool = False
) -> Iterator[Source]:
    """
    Args:
        model: a Hugging Face folder, or a name on the hub; None is the model of the run.
        plain_only: whether to refuse an adapter that is more than plain LoRA. Otherwise PEFT merges it first.

    Raises:
        ModelError, AdapterError, ExportError: the model, the run or the adapter cannot be read, or they do not belong together.
    """
    run_dir, adapter = [None if path is None else user_path(path) for path in (run_dir, adapter)]
    directory = None if run_dir is None else RunDirectory(run_dir)
    name = user_text_path(model) if model else directory.model if directory else None
    if name is None:
        raise ExportError("--model is missing: the base model, unless --run-dir names a run, which knows its own")
    try:
        base = PretrainedModel(find_model(name))
    except ModelError as error:
        if model is not None:
            raise
        raise ExportError(f"{error}; {run_dir} names it as its base model: give --model with where it is now") from None
    fingerprint, run, lora = base.fingerprint(), None, None
    with tempfile.TemporaryDirectory(prefix="splitlora-") as scratch:
        if directory is not None:
            run, adapter = directory.adapter(base, Path(scratch, "adapter"))
        if adapter is not None:
            try:
                lora = read_adapter(adapter, base.config)
            except BeyondLora as error:
                if plain_only:
                    raise ExportError(f"{error}; only merging can export it: leave --keep-adapter out") from None
                logger.info("%s; it is merged by PEFT", error)
                merge_with_peft(base, adapter, Path(scratch, "merged"))
                base = PretrainedModel(Path(scratch, "merged"))
        yield Source(
            name=name,
            folder=base.folder,
            config=base.config,
            fingerprint=fingerprint,
            stored=StoredWeights(base),
            adapter=lora,
            adapter_folder=adapter,
            run=run,
        )
