"""Text from an exported model, on a device that has onnxruntime, numpy and tokenizers, and needs nothing else."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from storage import ExportedManifest
from storage.tokenizer import guarded
from terminal import user_path

from .decoder import Decoder
from .exported_model import ExportedModelError, open_exported
from .memory import available_memory
from .prepared import PACKED, find_prepared

__all__ = ["GenerationError", "Generator", "Sampling", "Speed", "choose_precision"]

Result = TypeVar("Result")

BY_PREFERENCE = ("q8", "q4", "fp32", "fp16")


class GenerationError(ValueError):
    """A prompt or a setting that no text can be generated with; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; 1 draws from the model's distribution."""
    top_p: float = 1.0
    """Draw only from the most likely tokens that together have this probability (Holtzman et al. 2020, nucleus sampling)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top-p must be above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise GenerationError(f"seed must be 0 or more, got {self.seed}")

    def choose(self, logits: NDArray[np.float32], random: np.random.Generator) -> int:
        """A token, given the (vocabulary,) logits."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = (logits.astype(np.float64) - logits.max()) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        probabilities = np.exp(scaled[order])
        probabilities /= probabilities.sum()
        num_kept = int(np.searchsorted(probabilities.cumsum(), self.top_p)) + 1
        kept = probabilities[:num_kept]
        return int(random.choice(order[:num_kept], p=kept / kept.sum()))


@dataclass(kw_only=True)
class Speed:
    """Of one continuation."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    """Until the first token was there."""
    new_tokens: int = 0
    seconds: float = 0.0
    """From the first token to the last, without what was done with them."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding; the first token is the prompt's."""
        return (self.new_tokens - 1) / self.seconds if self.seconds else 0.0


class Generator:
    """
    An exported model that continues texts.

    Args:
        folder: what `splitlora-export onnx` made.
        precision: one that was exported; "auto" chooses, see `choose_precision`.
        adapter: a .onnx_adapter file; by default the one that came with the folder, if one did.
        num_threads: 0 is one for every core.

    Raises:
        ExportedModelError: the folder or the adapter cannot be used.
        RuntimeMissing: there is no onnxruntime.
    """

    def __init__(
        self, folder: str | Path, *, precision: str = "auto", adapter: str | Path | None = None, num_threads: int = 0
    ) -> None:
        self.model = open_exported(user_path(folder))
        self.precision, self.choice = choose_precision(self.model) if precision == "auto" else (precision, "as asked for")
        graphs = self.model.require(self.precision).graphs
        prepared = find_prepared(self.model, self.precision)
        self.preparation = prepared.reason
        self._decoder = Decoder(
            prepared.graphs or graphs,
            shares_buffer=self.model.attention == "gqa",
            # Of float weights, a rearranged copy in memory is no faster than the mapped file.
            configuration={} if self.precision in PACKED else {"session.disable_prepacking": "1"},
            num_threads=num_threads,
        )
        self.tokenizer = _load_tokenizer(self.model)
        self.speed = Speed()
        first_adapter = adapter or self.model.adapter
        if first_adapter is not None:
            self.use_adapter(first_adapter)

    def use_adapter(self, path: str | Path) -> None:
        """
        Continue with another adapter. The model stays loaded.

        Raises:
            ExportedModelError: the folder was exported without room for one, or the file is none that fits.
        """
        if not self._decoder.has_slots:
            raise ExportedModelError(f"{self.model.folder} has its adapter merged; --keep-adapter exports with room for others")
        self._decoder.use_adapter(user_path(path))

    def text(self, prompt: str, *, raw: bool = False, max_new_tokens: int = 64, sampling: Sampling | None = None) -> str:
        """The completion. See `stream`."""
        return "".join(self.stream(prompt, raw=raw, max_new_tokens=max_new_tokens, sampling=sampling))

    def stream(
        self, prompt: str, *, raw: bool = False, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """
        The completion, piece by piece; a piece has whole characters, of however many tokens. ``"".join(...)`` is all of it.

        Args:
            raw: continue ``prompt`` as it stands, for a model that has learnt plain texts. Without it, a model that has learnt
                pairs is given the prompt as training gave it: see `encode`.

        Raises:
            GenerationError: the prompt cannot be encoded or leaves no room, or ``max_new_tokens`` is less than 1.
        """
        pieces = self._pieces(self.encode(prompt, raw=raw), max_new_tokens, sampling)
        return pieces if raw else _without_first_space(pieces)

    def _pieces(self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None) -> Iterator[str]:
        stream, tokens, streamed = DecodeStream(skip_special_tokens=True), [], ""
        for token in self.tokens(prompt, max_new_tokens=max_new_tokens, sampling=sampling):
            tokens.append(token)
            piece = self._guarded(partial(stream.step, self.tokenizer, token)) or ""
            streamed += piece
            yield piece
        if rest := self._guarded(lambda: self.tokenizer.decode(tokens)).removeprefix(streamed):
            yield rest  # a last character that was begun and not finished

    def _guarded(self, work: Callable[[], Result]) -> Result:
        return guarded(work, f"{self.model.folder}: the tokenizer cannot be used", ExportedModelError)

    def tokens(self, prompt: Sequence[int], *, max_new_tokens: int = 64, sampling: Sampling | None = None) -> Iterator[int]:
        """The continuation as token ids, up to the end of the text, ``max_new_tokens`` or the model's context. See `stream`."""
        sampling = sampling or Sampling()
        capacity = self._capacity(prompt, max_new_tokens)
        random = np.random.default_rng(sampling.seed)
        self.speed = Speed(prompt_tokens=len(prompt))
        self._decoder.clear(capacity)
        pending = list(prompt)
        for _ in range(capacity - len(prompt)):
            began = time.perf_counter()
            token = sampling.choose(self._logits(pending), random)
            self._count(time.perf_counter() - began)
            if token == self.model.end_token:
                return
            yield token
            pending = [token]

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Of the token after these. Where values overflow, the first of all tokens would look like the most likely."""
        logits = self._decoder.extend(tokens)
        if logits.shape != (self.model.vocabulary_size,):
            size = self.model.vocabulary_size
            raise ExportedModelError(f"{self.model.folder} gives logits of the shape {logits.shape}, not of {size} tokens")
        if not np.isfinite(logits).all():
            others = [name for name in BY_PREFERENCE if name in self.model.precisions and name != self.precision]
            way = f"try --precision {others[-1]}" if others else "export it in another one"
            raise ExportedModelError(f"{self.model.folder} computes no numbers in {self.precision}, which they overflow: {way}")
        return logits

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """
        Token ids of a prompt as `data.Dataset` puts it before a completion: without white space at its ends, and with the token
        that separates texts behind it. With ``raw``, of the text as it stands; of an empty one, that token.

        Raises:
            GenerationError: the prompt is not text.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise GenerationError(f"the prompt is not UTF-8: {prompt[error.start : error.end]!a} is not a character") from None
        text = prompt if raw else prompt.strip()
        ids = self._guarded(lambda: self.tokenizer.encode(text, add_special_tokens=False)).ids
        if max(ids, default=0) >= self.model.vocabulary_size:
            highest = f"{max(ids)} of {self.model.vocabulary_size} tokens"
            raise ExportedModelError(f"{self.model.folder}: the tokenizer is of another model ({highest})")
        if not ids or (not raw and ids[-1] != self.model.end_token):
            ids = [*ids, self.model.end_token]
        return ids

    def _capacity(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """Tokens of prompt and continuation."""
        if max_new_tokens < 1:
            raise GenerationError(f"max-new-tokens must be at least 1, got {max_new_tokens}")
        if not 0 < len(prompt) < self.model.context:
            raise GenerationError(
                f"the prompt has {len(prompt):,} tokens; prompt and continuation together may have {self.model.context:,}"
            )
        return min(self.model.context, len(prompt) + max_new_tokens)

    def _count(self, seconds: float) -> None:
        if self.speed.new_tokens:
            self.speed.seconds += seconds
        else:
            self.speed.prompt_seconds = seconds
        self.speed.new_tokens += 1


def _without_first_space(pieces: Iterator[str]) -> Iterator[str]:
    """Training puts one between the token that separates texts and a completion."""
    for piece in pieces:
        yield piece.removeprefix(" ")
        if piece:
            break
    yield from pieces


def choose_precision(model: ExportedManifest) -> tuple[str, str]:
    """The precision for this machine, and why."""
    present = [name for name in BY_PREFERENCE if name in model.precisions]
    if not present:
        raise ExportedModelError(f"{model.folder} has no precision that is known here: {', '.join(model.precisions) or 'none'}")
    room = available_memory()
    fitting = [name for name in present if room is None or _memory_needed(model, name) < room]
    if not fitting:
        smallest = min(present, key=lambda name: model.precisions[name].num_bytes)
        return smallest, "the smallest one; memory is short for it too"
    passed_over = present[: present.index(fitting[0])]
    if passed_over:
        return fitting[0], f"{passed_over[0]} would not fit into the {room or 0:,} free bytes of memory"
    reasons = {
        "q8": "close to fp32, and its decoding reads a quarter of the bytes",
        "q4": "the fastest to decode that is there",
    }
    return fitting[0], reasons.get(fitting[0], "no quantised one was exported")


def _memory_needed(model: ExportedManifest, precision: str) -> int:
    """Roughly, in bytes: quantised weights are held twice while they are rearranged."""
    size = model.precisions[precision].num_bytes
    return 3 * size if precision in PACKED else size


def _load_tokenizer(model: ExportedManifest) -> Tokenizer:
    path = model.folder / "tokenizer.json"
    if model.files.find(path.name) is None:
        raise ExportedModelError(f"{path} is missing: the folder is incomplete; copy or export it again")
    content = model.files.read_text(path.name)
    tokenizer: Tokenizer = guarded(lambda: Tokenizer.from_str(content), f"{path} cannot be read", ExportedModelError)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
