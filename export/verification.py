"""How well an exported folder agrees with its model, which transformers runs in float32, with PEFT where it has an adapter."""

import math
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from graphs import Floats
from split_model import PretrainedModel
from storage import ExportedManifest, find_model, load_tokenizer
from terminal import Progress, user_path, user_text_path

from .errors import ExportError
from .exported_model import ExportedModel, read_manifest
from .peft_merge import load_with_peft, load_with_transformers
from .precision import PRECISIONS
from .run_directory import RunDirectory
from .sentences import SENTENCES
from .texts import Tokens, encode_texts, read_texts

__all__ = ["Agreement", "table", "verify"]

LARGEST_LOGIT_DIFFERENCE = {"fp32": 1e-5}
"""Of the largest logit, or of 10 where all are smaller."""
LARGEST_LOSS_CHANGE = {"fp32": 1e-5, "fp16": 0.001, "q8": 0.002, "q4": 0.02}
"""Nats per token that the loss may rise by."""
LARGEST_DIVERGENCE = {"fp32": 1e-5, "fp16": 0.005, "q8": 0.01, "q4": 0.1}
"""
Nats per token. Where the texts are too few for the loss, this tells a bad rounding from a good one: five times what the loss
may rise by, for a model diverges more on texts that it has never met the like of.
"""
STANDARD_ERRORS = 2.0
"""How many of them are called the uncertainty of a mean."""
ROWS_AT_ONCE = 64
NUM_CONTINUED, CONTINUED_TOKENS = 8, 16


@dataclass(kw_only=True)
class Agreement:
    """How one precision agrees with the reference, over all texts."""

    precision: str
    num_bytes: int
    logit_difference: float = 0.0
    """The largest difference of any logit."""
    largest_logit: float = 10.0
    """In magnitude, of the reference's; at least 10."""
    loss_changes: list[float] = field(default_factory=list)
    """Of each predicted token, in nats; positive where the exported model is worse."""
    predicted: list[tuple[int, int]] = field(default_factory=list)
    """Of each, the number of its text, and the token."""
    summed_divergence: float = 0.0
    same_first: int = 0
    """Number of positions at which both find the same token the most likely."""
    continuations: list[bool] = field(default_factory=list)
    """Of each text that was continued greedily, whether both continue it in the same way."""

    @property
    def tokens(self) -> int:
        """Those that are predicted."""
        return len(self.loss_changes)

    @property
    def loss_change(self) -> float:
        """Nats per token; positive where the exported model is worse."""
        return float(np.mean(self.loss_changes))

    @property
    def uncertainty(self) -> float:
        """
        Nats per token by which the loss may have changed more, or less, by chance. The errors of one text go together, and so
        do those of one predicted token wherever it stands, since rounding has moved its logit; so the variance is clustered
        both ways (Cameron, Gelbach and Miller 2011).
        """
        by_text, by_token = np.transpose(self.predicted)
        both = by_text * (by_token.max() + 1) + by_token
        of_both = self._variance(by_text) + self._variance(by_token) - self._variance(both)
        return STANDARD_ERRORS * math.sqrt(max(of_both, self._variance(by_text), self._variance(by_token)))

    def _variance(self, clusters: ArrayLike) -> float:
        """Of the mean loss change."""
        _, cluster = np.unique(clusters, return_inverse=True)
        number = int(cluster.max()) + 1
        if number == 1:
            return 0.0
        sums = np.bincount(cluster, np.asarray(self.loss_changes) - self.loss_change)
        return float(np.square(sums).sum()) * number / (number - 1) / self.tokens**2

    @property
    def divergence(self) -> float:
        """
        Of Kullback and Leibler, in nats per token: what the loss would rise by if all that the exact model expects came next in
        turn. The token that does come next adds chance; this has none of it, and is the same from a few hundred tokens on.
        """
        return self.summed_divergence / self.tokens

    @property
    def within_tolerance(self) -> bool:
        """What is beyond by chance alone is within."""
        is_near = self.allowed_difference is None or self.logit_difference <= self.allowed_difference
        is_sound = self.divergence <= LARGEST_DIVERGENCE[self.precision]
        return is_near and is_sound and self.loss_change - self.uncertainty <= LARGEST_LOSS_CHANGE[self.precision]

    @property
    def needed_tokens(self) -> int:
        """As many as would tell a change of the loss as large as the limit from chance, if they were as varied as these."""
        return round(self.tokens * max(1.0, self.uncertainty / LARGEST_LOSS_CHANGE[self.precision]) ** 2)

    @property
    def allowed_difference(self) -> float | None:
        """Of any logit; None: any."""
        share = LARGEST_LOGIT_DIFFERENCE.get(self.precision)
        return None if share is None else share * self.largest_logit

    @property
    def is_finite(self) -> bool:
        """Whether all that the exported model computes are finite numbers."""
        return bool(np.isfinite([self.logit_difference, self.loss_change]).all())

    @property
    def may_overflow(self) -> bool:
        """Whether the precision lacks numbers that the reference has, which computes in float32."""
        return PRECISIONS[self.precision].dtype != np.float32

    def add(self, found: "Prediction", expected: "Prediction") -> None:
        """Add the predictions of both for one text."""
        difference = float((found.logits - expected.logits).abs().max())
        self.logit_difference = float(np.maximum(self.logit_difference, difference))  # NaN stays: Python's max would lose it
        self.largest_logit = max(self.largest_logit, float(expected.logits.abs().max()))
        text = self.predicted[-1][0] + 1 if self.predicted else 0
        self.predicted += [(text, token) for token in expected.following.tolist()]
        for start in range(0, len(expected.following), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            right, own = expected.log_probabilities(rows), found.log_probabilities(rows)
            self.loss_changes += (right - own).gather(1, expected.following[rows].unsqueeze(1))[:, 0].tolist()
            self.summed_divergence += float((right.exp() * (right - own)).sum())
            self.same_first += int((right.argmax(-1) == own.argmax(-1)).sum())


class Prediction:
    """
    A model's predictions for a text of S tokens.

    Args:
        logits: (S, V). No token of the text follows the last row, so it counts for differences, but for no loss.
    """

    def __init__(self, logits: Floats, tokens: Tokens) -> None:
        self.logits = torch.from_numpy(logits)
        self.following = torch.from_numpy(tokens[1:])

    def log_probabilities(self, rows: slice) -> torch.Tensor:
        """Of each token after these positions, (rows, V) in nats."""
        return self.logits[:-1][rows].double().log_softmax(-1)


def verify(
    folder: Path,
    prompts: Path | None = None,
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    adapter: Path | None = None,
) -> list[Agreement]:
    """
    Args:
        prompts: a file of texts, one a line; without it, sentences of our own.
        model, run_dir, adapter: what the folder was exported from, as of `export_onnx`. Where there is an adapter, PEFT itself
            says what the model computes; else the checkpoint in the folder does.

    Raises:
        ExportError: the folder is incomplete or no exported folder; the file has no text; the model to hold it to computes no
            numbers.
        ModelError, AdapterError: the model or the adapter cannot be read.
    """
    folder = user_path(folder)
    run_dir, adapter = [None if path is None else user_path(path) for path in (run_dir, adapter)]
    model = model and user_text_path(model)
    manifest = read_manifest(folder)
    config = PretrainedModel(folder).config
    described: dict[str, object] = {"context": config.num_positions, "vocabulary_size": config.vocabulary_size}
    described |= {"end_token": config.end_token, "stop_tokens": config.stop_tokens}
    for name, right in described.items():
        if (found := getattr(manifest, name)) != right:
            raise ExportError(f"{folder}: splitlora.json says {name} {found}, config.json {right}; export the model again")
    texts = encode_texts(
        read_texts(user_path(prompts), "--prompts") if prompts else SENTENCES,
        load_tokenizer(folder),
        folder,
        end_token=manifest.end_token,
        longest=manifest.context,
        vocabulary_size=manifest.vocabulary_size,
        option="--prompts",
    )
    if len({token for tokens in texts for token in tokens[1:].tolist()}) == 1:
        raise ExportError("the texts of --prompts have one token to predict; it takes several to tell a change from chance")
    models = {name: ExportedModel(files.graphs, manifest.adapter) for name, files in manifest.precisions.items()}
    agreements = {name: Agreement(precision=name, num_bytes=manifest.precisions[name].num_bytes) for name in models}
    with _reference(manifest, model, run_dir, adapter) as reference, Progress(len(texts), unit="text") as progress:
        for number, tokens in enumerate(texts):
            expected = Prediction(reference.logits(tokens), tokens)
            if not torch.isfinite(expected.logits).all():
                raise ExportError(
                    f"{folder}: the model in float32 gives logits that are not finite numbers; nothing can be held to it"
                )
            for name, exported in models.items():
                logits = exported.logits(tokens[None])[0]
                if logits.shape != expected.logits.shape:
                    found, right = logits.shape[-1], expected.logits.shape[-1]
                    raise ExportError(f"{folder}: {name} has a vocabulary of {found}, the model one of {right}")
                agreements[name].add(Prediction(logits, tokens), expected)
            if number < NUM_CONTINUED:
                _compare_continuations(agreements, models, reference, tokens[: (len(tokens) + 1) // 2].tolist())
            progress.advance(", ".join(f"{name} {found.loss_change:+.5f}" for name, found in agreements.items()))
    return list(agreements.values())


def _compare_continuations(
    agreements: dict[str, Agreement], models: dict[str, ExportedModel], reference: "Reference", prompt: list[int]
) -> None:
    expected = reference.continue_greedily(prompt)
    for name, model in models.items():
        found = model.continue_greedily(prompt, len(expected), reference.ends)
        agreements[name].continuations.append(found == expected)


HEADER = (
    "",
    "MB",
    "largest logit difference",
    "loss change (nats/token)",
    "divergence (nats/token)",
    "top-1 agreement",
    "same greedy text",
    "",
)


def table(agreements: Sequence[Agreement], columns: int | None = None) -> str:
    """The agreements as text: a table, or a list where it is too wide for the terminal's ``columns``."""
    rows = [HEADER, *(_row(found) for found in agreements)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if columns is not None and max(map(len, lines)) > columns:
        lines = [line for row in rows[1:] for line in _list(row, columns)]
    lines.append(f"{agreements[0].tokens} tokens of text")
    for found in agreements:
        if found.allowed_difference is None and found.needed_tokens > found.tokens:
            text = (
                f"{found.precision}: texts too few to tell a loss change of {LARGEST_LOSS_CHANGE[found.precision]:g} from "
                f"chance; it takes {found.needed_tokens} tokens as varied as these (--prompts). The divergence is sure."
            )
            lines += [text] if columns is None else textwrap.wrap(text, columns)
    return "\n".join(lines)


def _row(found: Agreement) -> tuple[str, ...]:
    allowed = found.allowed_difference
    return (
        found.precision,
        f"{found.num_bytes / 1e6:.1f}",
        f"{found.logit_difference:.2g}" + (f" (<= {allowed:.2g})" if allowed else ""),
        f"{found.loss_change:+.5f} ± {found.uncertainty:.2g} (<= {LARGEST_LOSS_CHANGE[found.precision]:g})",
        f"{found.divergence:.2g} (<= {LARGEST_DIVERGENCE[found.precision]:g})",
        f"{100 * found.same_first / found.tokens:.2f} %",
        f"{sum(found.continuations)} of {len(found.continuations)}",
        "agrees" if found.within_tolerance else "BEYOND TOLERANCE",
    )


def _list(row: Sequence[str], columns: int) -> Iterator[str]:
    precision, *values, verdict = row
    yield from textwrap.wrap(f"{precision}: {verdict}", columns)
    for name, value in zip(HEADER[1:-1], values, strict=True):
        yield from textwrap.wrap(f"{name}: {value}", columns, initial_indent="  ", subsequent_indent="    ")


@contextmanager
def _reference(
    manifest: ExportedManifest, model: str | None, run_dir: Path | None, adapter: Path | None
) -> Iterator["Reference"]:
    """The checkpoint in the folder, or the base model with the adapter put on by PEFT."""
    directory = None if run_dir is None else RunDirectory(run_dir)
    name = model or (directory.model if directory else None)
    adapter = adapter or (manifest.peft_adapter if directory is None else None)
    with tempfile.TemporaryDirectory(prefix="splitlora-") as scratch:
        base = PretrainedModel(manifest.folder if name is None else find_model(name))
        if directory is not None:
            _, adapter = directory.adapter(base, Path(scratch))
        if adapter is not None and name is None and manifest.adapter is None:
            raise ExportError(
                f"{manifest.folder} has its adapter merged: --adapter needs --model, the base model that it is of"
            )
        if adapter is None and manifest.adapter is not None:
            raise ExportError(f"{manifest.folder} has an adapter: give the PEFT folder that it was made of with --adapter")
        for what, found, needed in (
            ("positions", base.config.num_positions, manifest.context),
            ("tokens in its vocabulary", base.config.vocabulary_size, manifest.vocabulary_size),
        ):
            if found < needed:
                raise ExportError(
                    f"{base.folder} has {found} {what}, and {manifest.folder} {needed}: it was exported from another model; "
                    "give that one with --model"
                )
        yield Reference(base, adapter, ends=manifest.ends, context=manifest.context)


class Reference:
    """A model in transformers, and its adapter in PEFT where it has one."""

    def __init__(self, model: PretrainedModel, adapter: Path | None, *, ends: Sequence[int], context: int) -> None:
        self._model = load_with_transformers(model) if adapter is None else load_with_peft(model, adapter)
        self.ends, self._context = ends, context

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Floats:  # (S,) -> (S, V)
        logits: Floats = self._model(input_ids=torch.from_numpy(tokens)[None]).logits[0].numpy()
        return logits

    def continue_greedily(self, prompt: list[int]) -> list[int]:
        """The most likely continuation, up to a token that ends it or the context's end."""
        ids, limit = torch.tensor([prompt]), min(CONTINUED_TOKENS, self._context - len(prompt))
        ends = {"eos_token_id": list(self.ends), "pad_token_id": self.ends[0]}
        options = {"max_new_tokens": limit, "do_sample": False, **ends}
        found = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        return [int(token) for token in found]
