"""How well an exported folder agrees with the checkpoint in it, which transformers runs in float32."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from split_model import BaseModel, load_tokenizer
from terminal import Progress

from .equalisation import Equalised
from .errors import ExportError
from .exported_model import ExportedModel, Manifest
from .sentences import SENTENCES
from .weights import Floats, StoredWeights

__all__ = ["Agreement", "table", "verify"]

Tokens = NDArray[np.int64]

LARGEST_LOGIT_DIFFERENCE = {"fp32": 1e-4}
LARGEST_LOSS_CHANGE = {"fp32": 1e-5, "fp16": 0.001, "q8": 0.002, "q4": 0.02}
"""Nats per token that the loss may rise by."""
NUM_CONTINUED, CONTINUED_TOKENS = 8, 16


@dataclass(kw_only=True)
class Agreement:
    """Of one precision, over all texts."""

    precision: str
    num_bytes: int
    tokens: int = 0
    logit_difference: float = 0.0
    """The largest."""
    summed_loss_change: float = 0.0
    same_first: int = 0
    """Positions at which both find the same token the most likely."""
    continuations: list[bool] = field(default_factory=list)
    """Whether the greedy continuation of a text is the same."""

    @property
    def loss_change(self) -> float:
        """Nats per token; positive where the exported model is worse."""
        return self.summed_loss_change / self.tokens

    @property
    def within_tolerance(self) -> bool:
        largest_difference = LARGEST_LOGIT_DIFFERENCE.get(self.precision, float("inf"))
        return self.logit_difference <= largest_difference and self.loss_change <= LARGEST_LOSS_CHANGE[self.precision]

    def add(self, found: "Prediction", expected: "Prediction") -> None:
        """What both say of one text."""
        self.logit_difference = max(self.logit_difference, float((found.logits - expected.logits).abs().max()))
        self.summed_loss_change += found.loss - expected.loss
        self.same_first += int((found.first == expected.first).sum())
        self.tokens += len(found.first)


class Prediction:
    """
    What a model says of a text's S tokens.

    Args:
        logits: (S, V), of which the last, after the text's end, are compared but not judged.
    """

    def __init__(self, logits: Floats, tokens: Tokens) -> None:
        self.logits = torch.from_numpy(logits)
        self.first = self.logits[:-1].argmax(-1)
        self.loss = float(cross_entropy(self.logits[:-1], torch.from_numpy(tokens[1:]), reduction="sum"))
        """Summed over all tokens but the first, in nats."""


def verify(folder: Path, prompts: Path | None = None) -> list[Agreement]:
    """
    Args:
        prompts: a file of texts, one a line; without it, sentences of our own.

    Raises:
        ExportError: the folder is incomplete or no exported folder, or the file has no text.
    """
    manifest = Manifest.read(folder)
    texts = _encoded(_read_texts(prompts) if prompts else SENTENCES, folder, manifest)
    reference = Reference(manifest)
    models = {name: ExportedModel(manifest.graphs(name), manifest.adapter) for name in manifest.content["precisions"]}
    agreements = {name: Agreement(precision=name, num_bytes=manifest.num_bytes(name)) for name in models}
    with Progress(len(texts), unit="text") as progress:
        for number, tokens in enumerate(texts):
            expected = Prediction(reference.logits(tokens), tokens)
            for name, model in models.items():
                agreements[name].add(Prediction(model.logits(tokens[None])[0], tokens), expected)
            if number < NUM_CONTINUED:
                _compare_continuations(agreements, models, reference, tokens[: (len(tokens) + 1) // 2].tolist())
            progress.advance(", ".join(f"{name} {found.loss_change:+.5f}" for name, found in agreements.items()))
    return list(agreements.values())


def _compare_continuations(
    agreements: dict[str, Agreement], models: dict[str, ExportedModel], reference: "Reference", prompt: list[int]
) -> None:
    expected = reference.continue_greedily(prompt)
    for name, model in models.items():
        found = model.continue_greedily(prompt, len(expected), reference.end_token)
        agreements[name].continuations.append(found == expected)


def table(agreements: Sequence[Agreement]) -> str:
    """For a person to read."""
    header = ["", "MB", "largest logit difference", "loss change (nats/token)", "top-1 agreement", "same greedy text", ""]
    rows = [header]
    for found in agreements:
        allowed = LARGEST_LOGIT_DIFFERENCE.get(found.precision)
        rows.append(
            [
                found.precision,
                f"{found.num_bytes / 1e6:.1f}",
                f"{found.logit_difference:.2g}" + (f" (<= {allowed:g})" if allowed else ""),
                f"{found.loss_change:+.5f} (<= {LARGEST_LOSS_CHANGE[found.precision]:g})",
                f"{100 * found.same_first / found.tokens:.2f} %",
                f"{sum(found.continuations)} of {len(found.continuations)}",
                "agrees" if found.within_tolerance else "BEYOND TOLERANCE",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines) + f"\n{agreements[0].tokens} tokens of text"


class Reference:
    """The folder's checkpoint, and its adapter merged into it where there is one, in transformers."""

    def __init__(self, manifest: Manifest) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model: Any = AutoModelForCausalLM.from_pretrained(manifest.folder, dtype=torch.float32)
        self._model.eval()  # type: ignore[no-untyped-call]
        self.end_token: int = manifest.content["end_token"]
        self._context = manifest.content["context"]
        if manifest.adapter is not None:
            self._merge(manifest.adapter, manifest.folder)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Floats:  # (S,) -> (S, V)
        logits: Floats = self._model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
        return logits

    def continue_greedily(self, prompt: list[int]) -> list[int]:
        """The most likely continuation, up to the end token or the context's end."""
        ids, limit = torch.tensor([prompt]), min(CONTINUED_TOKENS, self._context - len(prompt))
        options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": self.end_token}
        found = self._model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        return [int(token) for token in found]

    @torch.no_grad()
    def _merge(self, adapter: Path, folder: Path) -> None:
        base = BaseModel(folder)
        equalised = Equalised(StoredWeights(base.weight_files), base.config)
        stored = onnxruntime.AdapterFormat.read_adapter(str(adapter))  # its parameters are views into what it holds
        values = stored.get_parameters()
        for name in values:
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                a = values[name].numpy() / equalised.rows(layer)[:, None]
                b = values[f"{layer}.lora_B.weight"].numpy() / equalised.columns(layer)
                self._model.get_parameter(f"transformer.{layer}.weight").add_(torch.from_numpy(a @ b))


def _read_texts(path: Path) -> list[str]:
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not texts:
        raise ExportError(f"{path} has no text; --prompts is a file with a text on each line")
    return texts


def _encoded(texts: Sequence[str], folder: Path, manifest: Manifest) -> list[Tokens]:
    """Ids of each text and the end token, cut to the model's context; what is shorter than two tokens tells nothing."""
    tokenizer = load_tokenizer(folder)
    end, context = manifest.content["end_token"], manifest.content["context"]
    encoded = [np.array([*tokenizer.encode(text).ids, end][:context], np.int64) for text in texts]
    return [tokens for tokens in encoded if len(tokens) > 1]
