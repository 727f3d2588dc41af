"""Texts that an export is calibrated and measured on: a user's, or what a model writes itself."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from storage import encode
from storage.tokenizer import beginning
from terminal import Progress

from .errors import ExportError
from .exported_model import ExportedModel

__all__ = ["Tokens", "encode_texts", "read_texts", "written_by"]

Tokens = NDArray[np.int64]

NUM_WRITTEN, WRITTEN_TOKENS, SEED = 32, 128, 0
TEXTS_AT_ONCE = 256
SMALLEST = np.finfo(np.float32).tiny


def read_texts(path: Path, option: str) -> list[str]:
    """
    The lines of a file.

    Args:
        option: by which it was given, for messages.
    """
    if path.suffix in (".json", ".jsonl"):
        raise ExportError(
            f"{path} holds JSON, which is no text as a model meets it; {option} is a file with a text on each line"
        )
    try:
        texts = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from None
    if not texts:
        raise ExportError(f"{path} has no text; {option} is a file with a text on each line")
    return texts


def encode_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    end_token: int,
    longest: int,
    vocabulary_size: int,
    option: str,
    enough: int | None = None,
) -> list[Tokens]:
    """
    Ids (S,) of each text as training makes them, cut to the longest: what the tokenizer puts before it, and the end token, if
    it does not end with that. A text of one token predicts nothing, so it is left out.

    Args:
        folder: of the tokenizer, for messages.
        enough: tokens after which no more texts are taken; then they come in a random order, the same every time. None takes
            all in theirs.
    """
    if enough is not None:
        texts = [texts[number] for number in np.random.default_rng(SEED).permutation(len(texts))]
    encoded, found, begin = list[list[int]](), 0, beginning(tokenizer)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        for ids in encode(tokenizer, texts[start : start + TEXTS_AT_ONCE]):
            end = [] if ids[-1:] == [end_token] else [end_token]
            tokens = [*begin, *ids, *end][:longest]
            if len(tokens) > 1 and (enough is None or found < enough):
                encoded.append(tokens)
                found += len(tokens)
        if enough is not None and found >= enough:
            break
    if not encoded:
        raise ExportError(f"no text is longer than a token; give longer ones with {option}")
    highest = max(max(tokens) for tokens in encoded)
    if highest >= vocabulary_size:
        raise ExportError(
            f"{folder}: the tokenizer is of another model: it has a token {highest}, the vocabulary has {vocabulary_size}"
        )
    return [np.array(tokens, np.int64) for tokens in encoded]


def written_by(model: ExportedModel, first: int, context: int) -> list[Tokens]:
    """
    What a model writes by itself, each token drawn with the probability that the model gives it; the same every time.

    Args:
        first: the token that begins every text.
        context: the most tokens that the model takes.
    """
    length, generator = min(WRITTEN_TOKENS, context), np.random.default_rng(SEED)
    texts, cache = np.full((NUM_WRITTEN, 1), first, np.int64), model.empty_cache(NUM_WRITTEN)
    with Progress(length - 1, unit="token") as progress:
        while texts.shape[1] < length:
            logits, cache = model.step(texts[:, -1:], np.ones_like(texts), cache)
            texts = np.concatenate([texts, _drawn(logits[:, -1], generator)], 1)
            progress.advance(f"{NUM_WRITTEN} texts for calibration")
    return list(texts)


def _drawn(logits: NDArray[np.float32], generator: np.random.Generator) -> Tokens:  # (B, V) -> (B, 1)
    # Minus the logarithm of exponential noise is Gumbel's: with it, each is the largest with its softmax's probability.
    noise = (np.maximum(generator.standard_exponential(len(row), np.float32), SMALLEST) for row in logits)
    return np.array([[(row - np.log(of_row)).argmax()] for row, of_row in zip(logits, noise, strict=True)])
