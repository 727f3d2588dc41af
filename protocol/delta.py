"""
AQ-SGD's delta coding of activations (arXiv 2206.01299): a sample that has been sent before is sent as the change since then.

Both sides keep the rows that the receiver reconstructed, in an `ActivationCache`, and the sender codes the change since those,
not since the rows that it meant: so the errors of the code do not pile up from epoch to epoch. Fine-tuning changes activations
in few directions (SplitLite sends activations themselves in that way), so the change of N rows of d elements is coded as the
product of a matrix (N, r) and a matrix (r, d). A sample that is not in the cache travels in int8.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from .codecs import Coded, quantised_parts, quantised_values
from .errors import RemoteProtocolError
from .messages import Activations, Array
from .quantisation import LARGEST_CODE, MARGIN
from .rounding import from_bfloat16, to_bfloat16, upwards_to_bfloat16
from .settings import DELTA
from .shuffling import shuffled, unshuffled

__all__ = ["ActivationCache", "arrived", "coded"]

CODES_OF_THE_RMS = 2.0  # three bits a code; coarser codes of more directions lose more at equal bytes
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-60, 2.0**30
NOWHERE = -1
"""The number of a sample that neither side caches."""

Version = tuple[int, Array]
"""A step, and a sample's rows as they arrived, (n, d); here in bfloat16, in `recall` in the run's precision."""


class ActivationCache(Protocol):
    """
    One client's samples as the receiver reconstructed them: a version of a sample for each step in which it was sent.

    The rows of a message are stored when it is sent or received, and *count* once it is answered: until then one side may have
    them and the other not. A version stays as long as the run may go back to a step whose message is coded as a change of it.
    """

    def latest(self, sample: int, before: int) -> Version | None:
        """The newest version that counts of all steps earlier than ``before``; None if there is none."""

    def version(self, sample: int, step: int) -> Array | None:
        """The rows (n, d) of this step in bfloat16; None if they are not there or do not count."""

    def store(self, step: int, micro_batch: int, versions: dict[int, Version]) -> None:
        """
        Keep the rows of one message; they do not count yet.

        Args:
            versions: by sample its rows, each with the step of the version that they were sent as a change of; 0: of none.

        Raises:
            ValueError: they are more than there is room for.
        """

    def confirm(self, step: int, micro_batch: int) -> None:
        """The message of this micro-batch was answered: its versions count."""

    def forget_after(self, step: int) -> None:
        """
        The run goes on after this step. Drop all versions of steps later than the next one, and whatever does not count. What
        counts of the next step stays: the client may have answers to some of its micro-batches, and asks only the others again.
        """

    def forget_before(self, step: int) -> None:
        """
        The run cannot go back behind this step. Of each sample's versions up to it, drop all but the newest and the one that
        the newest is a change of: if the answer that made the newest count was lost, it counts on one side only, and the
        message comes again as the same change.
        """

    @property
    def newest(self) -> int:
        """The latest step of which there is a version that counts; 0 if none."""

    @property
    def is_full(self) -> bool:
        """Whether the sender should add no more versions for now."""


def coded(message: Activations, cache: ActivationCache) -> Activations:
    """The message as the sender sends it. Stores in the cache what the receiver will reconstruct, where there is room."""
    if cache.is_full:
        message = replace(message, samples=None)  # the receiver then stores nothing either: both sides decide by the message
    found = [cache.latest(sample, message.step) if sample >= 0 else None for sample in _samples(message)]
    since = np.array([0 if version is None else version[0] for version in found], np.int32)
    references = _references([None if version is None else version[1] for version in found], message)
    is_change = _is_change(since, message)
    change = message.values[is_change] - references
    small = _factors(change)
    fresh = quantised_parts(message.values[~is_change], "int8", None)
    parts = [shuffled(since), *fresh, *small]
    made = Coded(DELTA, message.values.shape, parts)
    _store(message, since, _values(made, message, since, references), cache)
    return replace(message, values=made)  # type: ignore[arg-type]  # as it is on the wire


def arrived(message: Activations, cache: ActivationCache) -> Activations:
    """
    A message that was `coded`, with float32 values (N, d) again. Stores them in the cache.

    Raises:
        RemoteProtocolError: it is malformed, or a change of a version that is not in the cache.
    """
    assert isinstance(message.values, Coded)
    since = _since(message.values, message)
    rows = []
    for sample, step in zip(_samples(message), since.tolist(), strict=True):
        version = cache.version(sample, step) if step else None
        if step and version is None:
            raise RemoteProtocolError(f"a change of sample {sample} since step {step}, which is not in the cache")
        rows.append(version)
    values = _values(message.values, message, since, _references(rows, message))
    _store(message, since, values, cache)
    return replace(message, values=values)


def _since(made: Coded, message: Activations) -> Array:
    """(B,) int32: for each sequence the step of the version that it is a change of; 0: it comes as it is."""
    if len(made.parts) != 9:
        raise RemoteProtocolError(f"{DELTA} has {len(made.parts)} parts, expected 9")
    first, num_sequences = made.parts[0], len(message.lengths)
    if len(first) != 4 * num_sequences:
        raise RemoteProtocolError(f"{DELTA} has {len(first)} bytes of steps for {num_sequences} sequences")
    return unshuffled(first, np.dtype(np.int32), (num_sequences,))


def _samples(message: Activations) -> list[int]:
    return [NOWHERE] * len(message.lengths) if message.samples is None else message.samples.tolist()


def _is_change(since: Array, message: Activations) -> Array:
    """(N,) bool: for every row, whether it comes as a change."""
    is_change: Array = np.repeat(since > 0, message.lengths)
    return is_change


def _references(rows: Sequence[Array | None], message: Activations) -> Array:
    """The cached rows that the message's changed rows are changes of, one under the other: (N', d) float32."""
    width = message.values.shape[1]
    for number, length in enumerate(message.lengths.tolist()):
        row = rows[number]
        if row is not None and row.shape != (length, width):
            raise RemoteProtocolError(f"a change of {length} rows of {width}; in the cache it has {list(row.shape)}")
    there = [row for row in rows if row is not None]
    return from_bfloat16(np.concatenate(there) if there else np.empty((0, width), np.uint16))


def _store(message: Activations, since: Array, values: Array, cache: ActivationCache) -> None:
    """Both sides store the same rows: what the receiver reconstructs, rounded to bfloat16."""
    each = np.split(values, np.cumsum(message.lengths))[:-1]
    versions = {
        sample: (step, to_bfloat16(rows))
        for sample, step, rows in zip(_samples(message), since.tolist(), each, strict=True)
        if sample >= 0
    }
    try:
        cache.store(message.step, message.micro_batch, versions)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None


def _values(made: Coded, message: Activations, since: Array, references: Array) -> Array:
    """
    (N, d) float32: what the receiver reconstructs.

    Args:
        references: (N', d), the cached rows that the changed rows are changes of.
    """
    _, *fresh, left, right, unit = made.parts
    is_change = _is_change(since, message)
    values = np.empty(made.shape, np.float32)
    num_changed, width = int(is_change.sum()), made.shape[1]
    values[~is_change] = quantised_values("int8", (len(values) - num_changed, width), fresh)
    values[is_change] = references + _product(left, right, unit, (num_changed, width))
    return values


def _factors(change: Array) -> list[bytes]:
    """
    A change (N, d) as two matrices of signed bytes, (r, N) and (r, d), and their unit, one bfloat16: the unit's square times
    the product of the matrices is about the change.
    """
    num_rows, width = change.shape
    # A quarter of a code for each element of the change; int8 has one.
    rank = change.size // (4 * max(1, num_rows + width))
    if not rank:
        return [b"", b"", shuffled(to_bfloat16(np.ones(1, np.float32)))]
    left, right = _left_and_right(change, rank) if width <= num_rows else reversed(_left_and_right(change.T, rank))
    unit = _unit(left, right)
    codes = [np.rint(factor / from_bfloat16(unit)).astype(np.int8) for factor in (left, right)]
    return [*(code.tobytes() for code in codes), shuffled(unit)]


def _left_and_right(tall: Array, rank: int) -> list[Array]:
    """
    The two factors, (rank, n) and (rank, m), of a matrix (n, m) with n >= m, its strongest directions first. Their product is
    the nearest there is of this rank (Eckart and Young).
    """
    # The smaller of the two Gram matrices has the same directions, and takes a fraction of an SVD's time.
    strengths, directions = np.linalg.eigh((tall.T @ tall).astype(np.float64))
    strongest = slice(-1, -1 - rank, -1)
    right = directions.T[strongest].astype(np.float32)
    roots = np.sqrt(np.sqrt(np.maximum(strengths[strongest], 0.0))).astype(np.float32)[:, None]
    left = np.divide(right @ tall.T, roots, out=np.zeros((rank, len(tall)), np.float32), where=roots > 0)
    return [left, right * roots]


def _unit(left: Array, right: Array) -> Array:
    """(1,) bfloat16: the value of code 1, for both factors."""
    rms = np.sqrt((np.square(left).sum() + np.square(right).sum()) / (left.size + right.size))
    largest = max(np.abs(left).max(), np.abs(right).max())
    exact = np.array([max(rms / CODES_OF_THE_RMS, largest * MARGIN / LARGEST_CODE, SMALLEST_UNIT)], np.float32)
    return upwards_to_bfloat16(exact)


def _product(left: bytes, right: bytes, unit: bytes, shape: tuple[int, int]) -> Array:
    """The change (N', d) in float32 that the three parts of a message stand for; they come from the peer, so all is checked."""
    num_rows, width = shape
    rank = len(right) // max(1, width)
    if len(unit) != 2 or (len(left), len(right)) != (num_rows * rank, rank * width) or rank > width:
        sizes = f"{len(left)}, {len(right)} and {len(unit)}"
        raise RemoteProtocolError(f"{DELTA} has parts of {sizes} bytes for a change of {num_rows} rows of {width}")
    (worth,) = from_bfloat16(unshuffled(unit, np.dtype(np.uint16), (1,)))
    if not SMALLEST_UNIT <= worth <= LARGEST_UNIT:
        raise RemoteProtocolError(f"the unit of {DELTA} is not a number from 2^-60 to 2^30")
    factors = np.frombuffer(left, np.int8).reshape(rank, num_rows), np.frombuffer(right, np.int8).reshape(rank, width)
    # Sums of whole numbers below 2^24 are exact in float32, in whatever order a machine adds them up.
    product: Array = factors[0].T.astype(np.float32) @ factors[1].astype(np.float32)
    product *= worth * worth
    return product
