"""From a user's file to batches of token ids: reading, encoding, order. The text stays here."""

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from protocol import Array
from split_model import derive_seed

__all__ = ["Batch", "DataError", "Dataset", "Sample", "Text", "read_texts"]


class DataError(ValueError):
    """A data file that cannot be used; the message names file, line and reason."""


class Text(NamedTuple):
    """One entry of a file. Without a prompt, the loss is on all of it."""

    prompt: str | None
    completion: str


class Sample(NamedTuple):
    """One entry as token ids; the last ``num_labels`` of them are predicted."""

    tokens: Array
    num_labels: int


@dataclass(frozen=True)
class Batch:
    """Packed inputs, and the tokens that follow at the labelled rows. All int32."""

    tokens: Array
    """(N,) ids that go into the model: every sample without its last token, which nothing is predicted from."""
    lengths: Array
    """(B,)"""
    label_counts: Array
    """(B,) how many of each sequence's last rows have a label."""
    labels: Array
    """(M,)"""


@dataclass(frozen=True)
class Dataset:
    """The samples of one file, in its order."""

    samples: list[Sample]
    num_cut: int
    """Samples that were longer than the greatest length."""

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, end_token: int, max_length: int) -> "Dataset":
        """
        Raises:
            DataError: the file is missing, malformed, empty, or has nothing to predict.
        """
        if max_length < 2:
            raise DataError(f"max-length must be at least 2 tokens, got {max_length}")
        texts = list(read_texts(path))
        samples = _encode(texts, tokenizer, end_token)
        cut = [_cut(sample, max_length) for sample in samples]
        if not any(sample.num_labels for sample in cut):
            raise DataError(f"{path}: no token to predict is left within {max_length} tokens; raise --max-length")
        return cls(cut, sum(len(sample.tokens) > max_length for sample in samples))

    @property
    def longest(self) -> int:
        """Rows of the longest sequence in a batch."""
        return max(len(sample.tokens) for sample in self.samples) - 1

    @property
    def highest_token(self) -> int:
        return max(int(sample.tokens.max()) for sample in self.samples)

    def num_batches(self, batch_size: int) -> int:
        """In one epoch; the last may be smaller."""
        return -(-len(self.samples) // batch_size)

    def batch(
        self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None, *, part: int = 0, of: int = 1
    ) -> Batch:
        """
        The batch of step 1, 2, ..., or a part of it, 0 to ``of`` - 1; a function of its arguments alone. See `order`.

        Parts have equally many samples, the first ones one more where it does not come out even.
        """
        return pack([self.samples[index] for index in self._part(step, batch_size, order_seed, part, of).tolist()])

    def numbers(
        self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None, *, part: int = 0, of: int = 1, below: int
    ) -> Array | None:
        """Of the samples in a part of a batch, (B,) int32; -1 for those not ``below`` a number. None if that is 0."""
        if not below:
            return None
        numbers = self._part(step, batch_size, order_seed, part, of)
        return np.where(numbers < below, numbers, -1).astype(np.int32)

    def num_within(self, num_bytes: int, bytes_a_row: int) -> int:
        """How many samples from the first on fit into so many bytes, of rows of activations."""
        sizes = np.cumsum([bytes_a_row * (len(sample.tokens) - 1) for sample in self.samples])
        return int(np.searchsorted(sizes, num_bytes, side="right"))

    def _part(self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None, part: int, of: int) -> Array:
        order = np.array(self.order(step, batch_size, order_seed), np.int64)
        return np.array_split(order, of)[part]

    def order(self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None) -> list[int]:
        """
        Which samples the batch of step 1, 2, ... has.

        Args:
            order_seed: of the shuffle, made anew for each epoch; None keeps the file's order.
        """
        epoch, index = divmod(step - 1, self.num_batches(batch_size))
        order = _epoch_order(len(self.samples), order_seed, epoch)
        return order[index * batch_size : (index + 1) * batch_size]


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, order_seed: tuple[int | str, ...] | None, epoch: int) -> list[int]:
    order = list(range(num_samples))
    if order_seed is not None:
        random.Random(derive_seed(*order_seed, epoch)).shuffle(order)
    return order


def pack(samples: list[Sample]) -> Batch:
    """Samples one under the other."""
    nothing = np.empty(0, np.int32)
    return Batch(
        tokens=np.concatenate([nothing, *(sample.tokens[:-1] for sample in samples)]),
        lengths=np.array([len(sample.tokens) - 1 for sample in samples], np.int32),
        label_counts=np.array([sample.num_labels for sample in samples], np.int32),
        labels=np.concatenate([nothing, *(sample.tokens[len(sample.tokens) - sample.num_labels :] for sample in samples)]),
    )


def read_texts(path: Path) -> Iterator[Text]:
    """
    The entries of a .jsonl, .csv or .txt file, white space at their ends stripped.

    Raises:
        DataError: see `Dataset.load`.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}
    if path.suffix not in readers:
        raise DataError(f"{path}: data files end in {', '.join(readers)}")
    texts = list(readers[path.suffix](path, _read_utf8(path)))
    if not texts:
        raise DataError(f"{path} is empty")
    for prompt, completion in texts:
        yield Text(prompt if prompt is None else prompt.strip(), completion.strip())


def _encode(texts: list[Text], tokenizer: Tokenizer, end_token: int) -> list[Sample]:
    """ids(prompt) + [end] + ids(" " + completion) + [end], as in the LoRA papers; a text alone is ids(text) + [end]."""
    prompts = _ids(tokenizer, [text.prompt or "" for text in texts])
    rest = _ids(tokenizer, [text.completion if text.prompt is None else " " + text.completion for text in texts])
    samples = []
    for text, prompt_ids, ids in zip(texts, prompts, rest, strict=True):
        if text.prompt is None:
            samples.append(Sample(np.array([*ids, end_token], np.int32), len(ids)))
        else:
            tokens = np.array([*prompt_ids, end_token, *ids, end_token], np.int32)
            samples.append(Sample(tokens, len(ids) + 1))
    return [sample for sample in samples if len(sample.tokens) > 1]


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _cut(sample: Sample, max_length: int) -> Sample:
    tokens = sample.tokens[:max_length]
    return Sample(tokens, max(0, sample.num_labels - (len(sample.tokens) - len(tokens))))


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file first") from None


def _read_jsonl(path: Path, content: str) -> Iterator[Text]:
    # Not splitlines(): JSON strings may hold the other line separators of Unicode as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: broken JSON: {error.msg} at character {error.pos + 1}") from None
        except (ValueError, RecursionError) as error:  # an endless number, or endless nesting
            raise DataError(f"{path}, line {number}: broken JSON: {error}") from None
        text = _text_of_fields(entry, f"{path}, line {number}")
        if any("\ud800" <= character <= "\udfff" for character in f"{text.prompt}{text.completion}"):
            raise DataError(f"{path}, line {number}: a \\ud800 to \\udfff alone is half a character; they come in pairs")
        yield text


def _read_csv(path: Path, content: str) -> Iterator[Text]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for entry in reader:
            yield _text_of_fields(entry, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: broken CSV: {error}") from None


def _read_txt(path: Path, content: str) -> Iterator[Text]:
    texts = [line for line in content.split("\n") if line.strip()]
    # One text a line may well contain "||"; a file of pairs has it on every line.
    if all("||" in line for line in texts):
        for line in texts:
            prompt, _, completion = line.partition("||")
            yield Text(prompt, completion)
    else:
        for line in texts:
            yield Text(None, line)


def _text_of_fields(entry: object, where: str) -> Text:
    if isinstance(entry, dict):
        prompt, completion, text = entry.get("prompt"), entry.get("completion"), entry.get("text")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Text(prompt, completion)
        if isinstance(text, str):
            return Text(None, text)
    raise DataError(f'{where}: expected "prompt" and "completion", or "text", each a string')
