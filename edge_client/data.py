"""From a user's file to batches of token ids: encoding, order, packing. The text does not leave the device."""

import hashlib
import json
import random
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from protocol import Array, RunSettings, derive_seed
from protocol.limits import VERSIONS_OF_A_SAMPLE

from .arguments import whole_number
from .samples import Form, samples
from .text_encoder import TextEncoder
from .text_file import DataError, Entry, TextFile, check_file
from .token_file import CUT, Sample, Samples, Summary, TokenFolder, TokenWriter, check_long, kept_order

__all__ = ["Batch", "Batches", "DataError", "Dataset", "Form", "Sample", "check_file", "pack"]

FORMAT = 2
"""Of token files; another number for everything that changes what is in them, this file's rules included."""
CHARACTERS_AT_ONCE = 2**18
"""Of texts that are encoded together, as few as keep the memory for it small."""
BYTES_BETWEEN_COMMITS = 2**24
"""Of a text file: what is encoded again at most after a kill."""
KEPT_ORDER = 2**18
"""Samples from which on an epoch's order is kept on the disk: to make it takes a second for two million."""
BYTES_MORE_A_ROW = 16  # what a file of an activation cache has besides them, generously


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

    def of(self, chosen: Array) -> "Batch":
        """
        Those of its sequences that are chosen.

        Args:
            chosen: (B,) bool.
        """
        return Batch(
            tokens=self.tokens[np.repeat(chosen, self.lengths)],
            lengths=self.lengths[chosen],
            label_counts=self.label_counts[chosen],
            labels=self.labels[np.repeat(chosen, self.label_counts)],
        )


@dataclass(frozen=True)
class Dataset:
    """The samples of one file, in its order."""

    samples: Samples
    digest: str = ""
    """SHA-256 of the file, in hex; empty where there is none."""
    kind: str = ""
    """How it is read: its suffix, in small letters."""

    @classmethod
    def load(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        end_token: int,
        max_length: int,
        *,
        form: Form = Form(),  # noqa: B008
        long: str = CUT,
        folder: Path | None = None,
        report: Callable[[int, int], object] | None = None,
    ) -> "Dataset":
        """
        Read, encode and cut a file once; where that was done before, only find the result.

        Args:
            form: how entries become samples.
            long: what becomes of a sample of more than ``max_length`` tokens: "cut" keeps its beginning, "split" makes several
                of it, "skip" leaves it out.
            folder: of this device's token files; None keeps none.
            report: called now and then while the file is read, with the bytes encoded so far and those of the whole file.

        Raises:
            DataError: the file is missing, malformed, empty, or has nothing to predict.
            ModelError: the tokenizer fails on the texts.
            StateError: the disk is full, or ``folder`` cannot be written.
        """
        whole_number("max-length", max_length, 2, " tokens")
        check_long(long)
        if folder is None:
            # Where a system does not let go of a mapped file, it stays until somebody cleans up the folder of such files.
            with tempfile.TemporaryDirectory(prefix="splitlora-", ignore_cleanup_errors=True) as scratch:
                return cls.load(
                    path, tokenizer, end_token, max_length, form=form, long=long, folder=Path(scratch), report=report
                )
        report = report or (lambda done, total: None)
        files = TokenFolder(folder)
        with TextFile(path) as file:
            content = files.content(file, lambda: report(0, file.size))
            more = [*form.identity, *([f"long={long}"] if long != CUT else [])]
            vocabulary = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
            decides = (FORMAT, content, file.kind, vocabulary, end_token, max_length, *more)
            key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
            samples = files.find(key)
            if samples is None:
                with files.only_writer():
                    samples = files.find(key)  # another program may have made it meanwhile
                    if samples is None:
                        encoder = TextEncoder(tokenizer, end_token)
                        with files.writer(key, encoder.dtype, max_length, long) as writer:
                            _encode(file, form, encoder, end_token, writer, lambda done: report(done, file.size))
                            _check(file, writer.summary, max_length)
                        samples = files.find(key)
                        assert samples is not None  # it was written just now, and only who holds the lock deletes any
            report(file.size, file.size)
        return cls(samples, content, file.kind)

    @property
    def num_cut(self) -> int:
        """How many samples were longer than the greatest length."""
        return self.samples.summary.num_cut

    @property
    def num_unlabelled(self) -> int:
        """How many samples have nothing left to predict within the greatest length."""
        return self.samples.summary.num_unlabelled

    @property
    def longest(self) -> int:
        """Rows of the longest sequence in a batch."""
        return self.samples.summary.longest - 1

    @property
    def highest_token(self) -> int:
        return self.samples.summary.highest_token

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

    def num_that_fit(self, cache_bytes: int, *, width: int, versions: int = VERSIONS_OF_A_SAMPLE, element: int = 2) -> int:
        """
        Of how many samples, from the first on, an activation cache has room for all versions that may exist at once. Which
        samples are kept depends on nothing else, so that a run that is repeated keeps the same ones.

        Args:
            width: elements of a token's activations.
            versions: of a sample; as many as `DELTA` has, by default.
            element: bytes of an element; those of bfloat16, by default.
        """
        bytes_a_row = element * width + BYTES_MORE_A_ROW
        most_rows = cache_bytes // versions // bytes_a_row
        # A sample has a row less than tokens. The numbers of rows are ascending, and few of them need to be looked at.
        starts = self.samples.starts
        return bisect_right(range(1, len(starts)), most_rows, key=lambda number: int(starts[number]) - number)

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
        rows = slice(index * batch_size, (index + 1) * batch_size)
        if order_seed is None:
            return list(range(len(self.samples))[rows])
        order = _epoch_order(len(self.samples), order_seed, epoch, self.samples.folder)[rows]
        return [int(number) for number in order]


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
    """Kept are the activations of the first ``num_cached`` samples of the data."""

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


@lru_cache(maxsize=2)
def _epoch_order(num_samples: int, order_seed: tuple[int | str, ...], epoch: int, folder: Path | None) -> Array:
    seed = derive_seed(*order_seed, epoch)

    def shuffled() -> Array:
        order = array("I", range(num_samples))
        random.Random(seed).shuffle(order)
        return np.frombuffer(order, np.uintc)

    return shuffled() if folder is None or num_samples < KEPT_ORDER else kept_order(folder, seed, num_samples, shuffled)


def pack(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch, their rows one under the other."""
    nothing = np.empty(0, np.int32)
    return Batch(
        tokens=np.concatenate([nothing, *(sample.tokens[:-1] for sample in samples)]),
        lengths=np.array([len(sample.tokens) - 1 for sample in samples], np.int32),
        label_counts=np.array([sample.num_labels for sample in samples], np.int32),
        labels=np.concatenate([nothing, *(sample.labels for sample in samples)]),
    )


def _encode(
    file: TextFile, form: Form, encoder: TextEncoder, end_token: int, writer: TokenWriter, report: Callable[[int], object]
) -> None:
    """
    Write what the file has beyond the entries that are written already. They are read once more, which takes little beside
    encoding them: what is wrong with a file may lie in an entry that is right by itself.
    """
    entries, committed = islice(file.texts(), writer.summary.num_entries, None), 0
    for some in by_length(entries):
        writer.add(len(some), list(samples(some, form, encoder, end_token)))
        report(file.position)
        if file.position - committed > BYTES_BETWEEN_COMMITS:
            writer.commit()
            committed = file.position


def _check(file: TextFile, summary: Summary, max_length: int) -> None:
    if file.has_changed():
        raise DataError(f"{file.path} was changed while it was read; start again when it is complete")
    if not summary.num_samples and summary.num_cut:
        raise DataError(
            f"{file.path}: all samples have more than {max_length} tokens, and --long skip leaves them out; "
            "raise --max-length, or take --long split"
        )
    if not summary.num_samples:
        raise DataError(f"{file.path}: there is no text in it, only {summary.num_entries} empty entries")
    if summary.num_unlabelled == summary.num_samples:
        raise DataError(
            f"{file.path}: no token to predict is left within {max_length} tokens; raise --max-length, or take --long split"
        )


def by_length(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Lists of entries with about `CHARACTERS_AT_ONCE` characters."""
    some, length = [], 0
    for entry in entries:
        some.append(entry)
        length += entry.length
        if length >= CHARACTERS_AT_ONCE:
            yield some
            some, length = [], 0
    if some:
        yield some
