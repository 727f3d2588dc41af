"""Adapters that are more than LoRA, merged by PEFT itself."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from split_model import PretrainedModel
from storage import AdapterSettings, Folder, shown
from storage.model_folder import CONFIG_FILE, GENERATION_FILE

from .adapter_folder import BeyondLora, read_adapter
from .beside_weights import copy_files_beside_weights
from .errors import ExportError

__all__ = ["load_with_peft", "load_with_transformers", "merge_with_peft"]

logger = logging.getLogger("export")


def merge_with_peft(base: PretrainedModel, adapter: Path, folder: Path) -> None:
    """
    Write the base model with the adapter merged into it to ``folder``, in float32.

    Raises:
        ExportError: PEFT cannot load or merge the adapter, or would leave a part of it out.
    """
    import torch

    model = load_with_peft(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What an adapter does to one of two tied matrices, it does not do to the other.
        head = model.get_base_model().get_output_embeddings()
        matrix = getattr(head, "original_module", getattr(head, "base_layer", head))
        matrix.weight = torch.nn.Parameter(matrix.weight.detach().clone(), requires_grad=False)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except Exception as error:
            raise _refusal(adapter, error) from None
        head, table = merged.get_output_embeddings(), merged.get_input_embeddings()
        merged.config.tie_word_embeddings = bool(torch.equal(head.weight, table.weight))
        try:
            merged.save_pretrained(folder)
            _keep_settings(base, folder, tied_head=merged.config.tie_word_embeddings)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"the merged model cannot be written to {folder}: {error}; TMPDIR says where it goes") from None


def _keep_settings(base: PretrainedModel, folder: Path, *, tied_head: bool) -> None:
    """Let all but a merged model's weights be its base's files, of which `PretrainedModel.config` knows only a part."""
    config = Folder(base.folder, ExportError).read_json(CONFIG_FILE) | {"tie_word_embeddings": tied_head}
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    (folder / GENERATION_FILE).unlink(missing_ok=True)  # transformers' own
    copy_files_beside_weights(base.folder, folder, GENERATION_FILE)


def load_with_transformers(base: PretrainedModel) -> Any:
    """
    transformers' model of this family in float32, ready to be asked.

    It is made of what this package has read and checked, and not from the folder: there transformers would load an adapter that
    lies beside the weights as well, and fetch code that a configuration names.
    """
    import torch
    import transformers
    from transformers.utils import logging

    family = base.config.family
    architecture: Any = getattr(transformers, family.architecture)
    config = architecture.config_class(**family.settings(base.config))
    tensors = {base.config.stored_name(name): tensor.view().to(torch.float32) for name, tensor in base.tensors.items()}
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers calls functions of its own that it has deprecated
        return architecture.from_pretrained(
            None, config=config, state_dict=tensors, dtype=torch.float32, attn_implementation="eager"
        )


def load_with_peft(base: PretrainedModel, adapter: Path) -> Any:
    """
    The base model in transformers, float32, with the adapter put on by PEFT.

    PEFT is given the settings that describe the adapter, and none that say where to find code or another model.

    Raises:
        AdapterError, ExportError: `read_adapter` refuses the adapter, PEFT cannot load it, or would leave a part of it out.
    """
    import peft

    with suppress(BeyondLora):
        # This checks what PEFT would not: it loads pickled weights where there are no others, and matches patterns without end.
        read_adapter(adapter, base.config)
    settings = AdapterSettings.read(adapter)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    if unknown := [name for name in settings.values if name not in known and settings.has(name)]:
        raise ExportError(f"{settings.path}: PEFT {peft.__version__} knows no {', '.join(unknown[:5])}; a newer one may")
    _check_base(adapter, settings)
    kept = {name: value for name, value in settings.values.items() if name in known and settings.has(name)}
    for name in ("auto_mapping", "megatron_core", "revision"):
        kept.pop(name, None)
    kept |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.folder), "inference_mode": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers call what the other has deprecated
        model = load_with_transformers(base)
        try:
            config = peft.LoraConfig(**kept)
            adapted = peft.PeftModel.from_pretrained(model, adapter, config=config, autocast_adapter_dtype=False)
            expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
            found = peft.load_peft_weights(str(adapter), device="cpu").keys()
        except Exception as error:  # a stranger's settings reach all of PEFT, which raises exceptions of every type
            raise _refusal(adapter, error) from None
    _check_blocks(adapter, settings.values.get("layer_replication"), base.config.num_layers)
    if missing := sorted(expected - found):
        raise ExportError(f"{adapter}: the adapter's {missing[0]} is missing, which its settings ask for")
    if unused := sorted(found - expected - adapted.state_dict().keys()):
        raise ExportError(
            f"{adapter}: PEFT has no use for {unused[0]} with these settings; the adapter is not complete without it"
        )
    return adapted.eval()


def _check_base(adapter: Path, settings: AdapterSettings) -> None:
    """
    A warning says if the adapter was trained on another base model than it names.

    Raises:
        ExportError: nobody can make that base model again.
    """
    way = settings.values["init_lora_weights"]
    if settings.draws_base:
        raise ExportError(
            f"{adapter}: this adapter's initialisation ({way}) changed the base model that it was trained on by numbers drawn "
            "at random, so that nobody can repeat it: let PEFT make plain LoRA of it where it was trained, by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if settings.changes_base:
        logger.warning(
            "%s: this adapter's initialisation (%s) changed the base model that it was trained on; "
            "PEFT repeats that on the base as it is given, if it can, and else takes the base for one that was changed",
            adapter,
            way,
        )


def _check_blocks(adapter: Path, ranges: Sequence[tuple[int, int]] | None, num_layers: int) -> None:
    """
    Raises:
        ExportError: the adapter makes a model with another number of blocks, or with one block at two places.
    """
    blocks = [block for first, end in ranges or [(0, num_layers)] for block in range(first, end)]
    if sorted(blocks) != list(range(num_layers)):
        raise ExportError(
            f"{adapter}: layer_replication {shown(ranges)} asks for another number of blocks than the model's {num_layers}, or "
            "for one of them twice; a model is exported with each of its blocks once"
        )


def _refusal(adapter: Path, error: Exception) -> ExportError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ExportError(f"{adapter}: PEFT cannot merge this adapter: {reason}")
