"""Continues texts with an exported model. The device needs onnxruntime, numpy and tokenizers, and no torch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from storage import ChatTemplate, ExportedManifest, Message, ModelError, TemplateFailed
from storage.fingerprint import model_number
from storage.tokenizer import beginning, guarded
from terminal import user_path

from .decoder import Decoder
from .exported_model import ExportedModelError, open_exported
from .memory import available_memory
from .prepared import PACKED, find_prepared
from .text_pieces import text_pieces

__all__ = ["GenerationError", "Generator", "Sampling", "Speed", "choose_precision"]

Result = TypeVar("Result")

BY_PREFERENCE = ("q8", "q4", "fp32", "fp16")
"""The precisions that are known here, the best choice for most devices first: see `choose_precision`."""
HALF = "fp16"
"""The one whose largest number is smaller than float32's: q8 and q4 quantise weights, and compute in float32."""


class GenerationError(ValueError):
    """The prompt or a setting cannot be used to generate text; the message names it."""


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
        """The next token, given its (vocabulary,) logits."""
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
    """How fast one continuation was computed."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    """Until the first new token was computed."""
    new_tokens: int = 0
    seconds: float = 0.0
    """From the first new token to the last, without the time that the caller took between them."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding. The first new token is not counted: computing the prompt gives it."""
        return (self.new_tokens - 1) / self.seconds if self.seconds else 0.0


class Generator:
    """
    An exported model that continues texts.

    Args:
        folder: what `splitlora-export onnx` made.
        precision: one that was exported, such as "q8"; "auto" lets `choose_precision` choose.
        adapter: a .onnx_adapter file; by default the one that came with the folder, if one did.
        num_threads: 0 means one for every core.

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
            # onnxruntime would rearrange float weights in memory, too, and be no faster than with the mapped file.
            configuration={} if self.precision in PACKED else {"session.disable_prepacking": "1"},
            num_threads=num_threads,
        )
        self.tokenizer = _load_tokenizer(self.model)
        self._begins = self._guarded(lambda: beginning(self.tokenizer))
        self.speed = Speed()
        self._adapter: Path | None = None
        first_adapter = adapter or self.model.adapter
        if first_adapter is not None:
            self.use_adapter(first_adapter)

    def use_adapter(self, path: str | Path) -> None:
        """
        Continue with another adapter. The model stays loaded.

        Raises:
            ExportedModelError: the folder was exported without room for an adapter, or the file does not fit the model.
        """
        if not self._decoder.has_slots:
            raise ExportedModelError(
                f"{self.model.folder} has its adapter merged; --keep-adapter, without --split, exports with room for others"
            )
        path = user_path(path)
        self._decoder.use_adapter(path, model_number(self.model.fingerprint))
        self._adapter = path

    def text(
        self,
        prompt: str | Sequence[Message],
        *,
        raw: bool = False,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> str:
        """The whole completion. See `stream`."""
        return "".join(self.stream(prompt, raw=raw, max_new_tokens=max_new_tokens, sampling=sampling))

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        raw: bool = False,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """
        The completion, piece by piece; joined they are the whole. A piece has only whole characters, so some tokens give none.

        Args:
            prompt: for a model that was trained on pairs of prompt and completion, a prompt, which it is given in the form that
                it had there; for one that was trained on conversations, a list of messages, each with "role" and "content",
                which it answers. See `encode`.
            raw: continue ``prompt`` as it stands, for a model that was trained on plain texts.

        Raises:
            GenerationError: the prompt cannot be encoded or leaves no room, or ``max_new_tokens`` is less than 1.
        """
        tokens = self.tokens(self.encode(prompt, raw=raw), max_new_tokens=max_new_tokens, sampling=sampling)
        pieces = text_pieces(self.tokenizer, tokens, self._guarded)
        return pieces if raw else _without_first_space(pieces)

    def _guarded(self, work: Callable[[], Result]) -> Result:
        return guarded(work, f"{self.model.folder}: the tokenizer cannot be used", ExportedModelError)

    def tokens(self, prompt: Sequence[int], *, max_new_tokens: int = 64, sampling: Sampling | None = None) -> Iterator[int]:
        """The continuation as token ids: until the text ends, or ``max_new_tokens`` or the context is reached. See `stream`."""
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
            if token in self.model.ends:
                return
            yield token
            pending = [token]

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """
        (vocabulary,) logits of the token after these.

        Raises:
            ExportedModelError: they have another shape, or are not finite: the first of all tokens would seem the most likely.
        """
        logits = self._decoder.extend(tokens)
        if logits.shape != (self.model.vocabulary_size,):
            size = self.model.vocabulary_size
            raise ExportedModelError(f"{self.model.folder} gives logits of the shape {logits.shape}, not of {size} tokens")
        if not np.isfinite(logits).all():
            raise ExportedModelError(f"{self.model.folder} computes no numbers in {self.precision}{self._why_no_numbers()}")
        return logits

    def _why_no_numbers(self) -> str:
        """And what to do. Only a precision with larger numbers can help."""
        if self.precision == HALF:
            wider = [name for name in BY_PREFERENCE if name in self.model.precisions and name != HALF]
            return f", which they overflow: {f'try --precision {wider[0]}' if wider else 'export it with --precision fp32'}"
        adapter = f" or the adapter {self._adapter}" if self._adapter else ""
        return f": the model{adapter} is broken; export it again"

    def encode(self, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
        """
        The token ids of a prompt, in the form in which training puts it before what is learnt (see `samples`). Of a prompt,
        white space at both ends is removed, and the token that separates texts appended. Of messages, it is what the model's
        chat template makes of them, with an answer opened. With ``raw``, a text stands as it is; an empty one is the token that
        begins a text.

        Raises:
            GenerationError: the prompt is not valid Unicode, or the folder has no chat template that takes the messages.
            ExportedModelError: the tokenizer fails, or is another model's.
        """
        text = self._conversation(prompt) if not isinstance(prompt, str) else prompt if raw else prompt.strip()
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise GenerationError(f"the prompt is not UTF-8: {text[error.start : error.end]!a} is not a character") from None
        ids: list[int] = self._guarded(lambda: self.tokenizer.encode(text, add_special_tokens=False)).ids
        if isinstance(prompt, str):  # the template itself writes what begins a conversation, and what ends its messages
            ids = [*self._begins, *ids]
            if not ids or (not raw and ids[-1] != self.model.end_token):
                ids = [*ids, self.model.end_token]
        if max(ids, default=0) >= self.model.vocabulary_size:
            highest = f"{max(ids)} of {self.model.vocabulary_size} tokens"
            raise ExportedModelError(f"{self.model.folder}: the tokenizer is of another model ({highest})")
        return ids

    def _conversation(self, messages: Sequence[Message]) -> str:
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise GenerationError(f"message {number} is {str(message)[:80]!r}; it should have a role and a content")
        try:
            template = ChatTemplate.find(self.model.files)
            if template is None:
                raise GenerationError(
                    f"{self.model.folder} has no chat template, so the model takes no messages: give a prompt, or a raw text"
                )
            return template.render(messages, opens_answer=True)
        except ModelError as error:
            raise ExportedModelError(str(error)) from None
        except TemplateFailed as failure:
            raise GenerationError(f"the model's chat template does not take these messages: {failure}") from None

    def _capacity(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        """How many tokens prompt and continuation may have together."""
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
    """Training puts a space between what a model is given and what it completes; it is no part of the answer."""
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
    """Bytes, roughly: while onnxruntime rearranges quantised weights, it holds them twice, beside the mapped file."""
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
