"""From a user's file to batches of token ids: reading, encoding, order. The text does not leave the device."""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from protocol import Array, RunSettings, derive_seed
from protocol.limits import VERSIONS_OF_A_SAMPLE
from storage import encode, shown

__all__ = ["Batch", "Batches", "DataError", "Dataset", "Sample", "Text", "check_file", "read_texts"]

FIELDS = ("prompt", "completion", "text")
SHOWN = 8
"""How many names of fields an error message gives."""
BYTES_MORE_A_ROW = 16  # what a file of an activation cache has besides them, generously


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
    """(B,) rows of each sequence; N is their sum."""
    label_counts: Array
    """(B,) how many of each sequence's last rows have a label; M is their sum."""
    labels: Array
    """(M,) ids of the tokens that follow."""


@dataclass(frozen=True)
class Dataset:
    """The samples of one file, in its order."""

    samples: list[Sample]
    num_cut: int
    """How many samples were longer than the greatest length."""

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer, end_token: int, max_length: int) -> "Dataset":
        """
        Raises:
            DataError: the file is missing, malformed, empty, or has nothing to predict.
            ModelError: the tokenizer fails on the texts.
        """
        if max_length < 2:
            raise DataError(f"max-length must be at least 2 tokens, got {max_length}")
        texts = list(read_texts(path))
        samples = _encode(texts, tokenizer, end_token)
        if not samples:
            raise DataError(f"{path}: there is no text in it, only {len(texts)} empty entries")
        cut = [_cut(sample, max_length) for sample in samples]
        if not any(sample.num_labels for sample in cut):
            raise DataError(f"{path}: no token to predict is left within {max_length} tokens; raise --max-length")
        return cls(cut, sum(len(sample.tokens) > max_length for sample in samples))

    @property
    def num_unlabelled(self) -> int:
        """How many samples have nothing left to predict within the greatest length."""
        return sum(not sample.num_labels for sample in self.samples)

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

        Parts have equally many samples; if that is not possible, the first ones have one more.
        """
        return pack([self.samples[index] for index in self._part(step, batch_size, order_seed, part, of).tolist()])

    def numbers(
        self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None, *, part: int = 0, of: int = 1, below: int
    ) -> Array | None:
        """
        The numbers of the samples in a part of a batch, (B,) int32, counted from 0 in the file's order.

        Args:
            below: samples from this number on are given as -1; None is returned if it is 0.
        """
        if not below:
            return None
        numbers = self._part(step, batch_size, order_seed, part, of)
        return np.where(numbers < below, numbers, -1).astype(np.int32)

    def num_that_fit(self, cache_bytes: int, *, width: int) -> int:
        """
        Of how many samples, from the first on, an activation cache has room for all versions that may exist at once. Which
        samples are kept depends on nothing else, so that a run that is repeated keeps the same ones.

        Args:
            width: elements of a token's activations.
        """
        bytes_a_row = 2 * width + BYTES_MORE_A_ROW  # bfloat16
        sizes = np.cumsum([bytes_a_row * (len(sample.tokens) - 1) for sample in self.samples])
        return int(np.searchsorted(sizes, cache_bytes // VERSIONS_OF_A_SAMPLE, side="right"))

    def _part(self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None, part: int, of: int) -> Array:
        order = np.array(self.order(step, batch_size, order_seed), np.int64)
        return np.array_split(order, of)[part]

    def order(self, step: int, batch_size: int, order_seed: tuple[int | str, ...] | None) -> list[int]:
        """
        Which samples the batch of step 1, 2, ... has.

        Args:
            order_seed: of the shuffle, which is another one in every epoch; None keeps the file's order.
        """
        epoch, index = divmod(step - 1, self.num_batches(batch_size))
        order = _epoch_order(len(self.samples), order_seed, epoch)
        return order[index * batch_size : (index + 1) * batch_size]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """What a client trains on in each step of a run."""

    data: Dataset
    name: str
    """The client's: each shuffles its data differently."""
    batch_size: int
    shuffle: bool
    """Whether every epoch has a new order; if not, all have the file's."""
    seed: int
    """The run's."""
    num_parts: int
    """Micro-batches in a step."""
    num_cached: int = 0
    """Both sides keep the activations of the first ``num_cached`` samples of the data."""

    def last_step(self, settings: RunSettings) -> int:
        """In how many steps of a run this client takes part."""
        return settings.steps_of_client(len(self.data.samples), self.batch_size)

    def micro_batch(self, step: int, part: int) -> Batch:
        """Part 0 to ``num_parts`` - 1 of the batch of step 1, 2, ..."""
        return self.data.batch(step, self.batch_size, self._order_seed, part=part, of=self.num_parts)

    def cached_samples(self, step: int, part: int) -> Array | None:
        """The numbers of the micro-batch's samples, (B,) int32; -1 for one that is not cached. None in runs without a cache."""
        seed, parts = self._order_seed, self.num_parts
        return self.data.numbers(step, self.batch_size, seed, part=part, of=parts, below=self.num_cached)

    def num_tokens(self, step: int) -> int:
        """Of the step's whole batch."""
        return len(self.data.batch(step, self.batch_size, self._order_seed).tokens)

    @property
    def _order_seed(self) -> tuple[int | str, ...] | None:
        return (self.seed, self.name, "order") if self.shuffle else None


@lru_cache(maxsize=4)
def _epoch_order(num_samples: int, order_seed: tuple[int | str, ...] | None, epoch: int) -> list[int]:
    order = list(range(num_samples))
    if order_seed is not None:
        random.Random(derive_seed(*order_seed, epoch)).shuffle(order)
    return order


def pack(samples: list[Sample]) -> Batch:
    """Samples as one batch, their rows one under the other."""
    nothing = np.empty(0, np.int32)
    return Batch(
        tokens=np.concatenate([nothing, *(sample.tokens[:-1] for sample in samples)]),
        lengths=np.array([len(sample.tokens) - 1 for sample in samples], np.int32),
        label_counts=np.array([sample.num_labels for sample in samples], np.int32),
        labels=np.concatenate([nothing, *(sample.tokens[len(sample.tokens) - sample.num_labels :] for sample in samples)]),
    )


def check_file(path: Path) -> None:
    """
    Raises:
        DataError: this is no data file by its name, or it cannot be read; what is in it is not looked at.
    """
    _reader(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _reader(path: Path) -> Callable[[Path, str], Iterator[Text]]:
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_txt}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: data files end in {', '.join(readers)}")
    return reader


def read_texts(path: Path) -> Iterator[Text]:
    """
    The entries of a .jsonl, .csv or .txt file, white space at their ends stripped.

    Raises:
        DataError: see `Dataset.load`.
    """
    texts = list(_reader(path)(path, _read_utf8(path)))
    if not texts:
        raise DataError(f"{path} is empty")
    for prompt, completion in texts:
        prompt, completion = prompt and prompt.strip(), completion.strip()
        yield Text(prompt if completion else prompt or None, completion)  # a pair of two empty strings counts as an empty text


def _encode(texts: list[Text], tokenizer: Tokenizer, end_token: int) -> list[Sample]:
    """ids(prompt) + [end] + ids(" " + completion) + [end], as in the LoRA papers; a text alone is ids(text) + [end]."""
    prompts = encode(tokenizer, [text.prompt or "" for text in texts])
    rest = encode(tokenizer, [text.completion if text.prompt is None else " " + text.completion for text in texts])
    samples = []
    for text, prompt_ids, ids in zip(texts, prompts, rest, strict=True):
        if text.prompt is None:
            samples.append(Sample(np.array([*ids, end_token], np.int32), len(ids)))
        else:
            tokens = np.array([*prompt_ids, end_token, *ids, end_token], np.int32)
            samples.append(Sample(tokens, len(ids) + 1))
    return [sample for sample in samples if len(sample.tokens) > 1]


def _cut(sample: Sample, max_length: int) -> Sample:
    tokens = sample.tokens[:max_length]
    return Sample(tokens, max(0, sample.num_labels - (len(sample.tokens) - len(tokens))))


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file first") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a NUL character, as files in UTF-16 have; convert the file to UTF-8 first")
    return text


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
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # the library's is 131,072 characters
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        columns = reader.fieldnames
        if columns is not None:
            _text_of_fields(dict.fromkeys(columns, ""), f"{path}, line {reader.line_num}")
            if len(set(columns)) < len(columns):
                twice = next(name for name in columns if columns.count(name) > 1)
                raise DataError(f"{path}, line {reader.line_num}: two columns have the name {shown(twice)}")
        for entry in reader:
            if None in entry:
                more = len(entry.pop(None))
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(entry) + more} fields for {len(entry)} columns; "
                    "a field with a comma in it is written in quotes"
                )
            yield _text_of_fields(entry, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: broken CSV: {error}") from None


def _read_txt(path: Path, content: str) -> Iterator[Text]:
    lines = {number: line for number, line in enumerate(content.split("\n"), 1) if line.strip()}
    pairs = [number for number, line in lines.items() if "||" in line]
    if 0 < len(pairs) < len(lines):
        fewer = min(pairs, sorted(lines.keys() - pairs), key=len)
        this = "has it" if fewer is pairs else "has not"
        raise DataError(
            f"{path}, line {fewer[0]}: '||' is in {len(pairs)} of {len(lines)} lines, and this one {this}: "
            "each line is prompt||completion, or none is; texts with '||' in them can be written as .jsonl"
        )
    for line in lines.values():
        prompt, _, completion = line.partition("||")
        yield Text(prompt, completion) if pairs else Text(None, line)


def _text_of_fields(entry: object, where: str) -> Text:
    """The text in the fields "prompt" and "completion", or in "text"; their names may be in capitals."""
    fields: dict[str, object] = {}
    for key, value in entry.items() if isinstance(entry, dict) else ():
        name = key.strip().lower()
        if name in fields and name in FIELDS:
            raise DataError(f"{where}: {shown(key)} is there twice")
        fields[name] = value
    prompt, completion, text = (fields.get(name) for name in FIELDS)
    pair = Text(prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    whole = Text(None, text) if isinstance(text, str) else None
    if pair is None and whole is None:
        raise DataError(f'{where}: expected "prompt" and "completion", or "text", each a string; {_found(entry, fields)}')
    # A table may have all three columns if each of its rows fills either the pair or the text.
    says = [one for one in (pair, whole) if one is not None and f"{one.prompt or ''}{one.completion}".strip()]
    if len(says) > 1:
        raise DataError(f'{where}: both a "prompt" with its "completion" and a "text"; leave one of them empty')
    return says[0] if says else Text(None, "")


def _found(entry: object, fields: dict[str, object]) -> str:
    if not isinstance(entry, dict):
        return f"found {shown(entry)}"
    wrong = [f'"{name}" is {shown(fields[name])}' for name in FIELDS if not isinstance(fields.get(name, ""), str)]
    names = ", ".join(shown(name) for name in list(entry)[:SHOWN]) + (", ..." if len(entry) > SHOWN else "")
    return ", ".join(wrong) or f"found {names or 'nothing'}"
