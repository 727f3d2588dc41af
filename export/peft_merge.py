"""Adapters that are more than LoRA, merged by PEFT itself."""

import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError

from .errors import ExportError

__all__ = ["merge_with_peft"]


def merge_with_peft(base: Path, adapter: Path, folder: Path) -> None:
    """
    Write the base model with the adapter merged into it to ``folder``, in float32.

    Raises:
        ExportError: PEFT cannot load or merge the adapter.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the ways in which PEFT and transformers call each other
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        try:
            merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
        except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ExportError(f"{adapter}: PEFT cannot merge this adapter: {reason}") from None
        head, table = merged.lm_head.weight, merged.transformer.wte.weight
        # Training one of two tied matrices, or giving it an adapter, unties them.
        merged.config.tie_word_embeddings = bool(torch.equal(head, table))
        if not merged.config.tie_word_embeddings:
            merged.lm_head.weight = torch.nn.Parameter(head.detach().clone())
        try:
            merged.save_pretrained(folder)
            for name in ("tokenizer.json", "vocab.json", "merges.txt"):
                if (base / name).is_file():
                    shutil.copyfile(base / name, folder / name)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"the merged model cannot be written to {folder}: {error}; TMPDIR says where it goes") from None
