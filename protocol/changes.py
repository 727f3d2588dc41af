"""
Activations as what has changed since their sample was sent last (AQ-SGD, arXiv 2206.01299).

Both sides keep what the receiver made of each sample, so that errors do not pile up. Fine-tuning changes activations in few
directions (SplitLite, which sends those of activations themselves): of N rows the change is a product of two small matrices.
A sample that is not kept yet, or not any more, travels in int8.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from .codecs import Coded, quantised_parts, quantised_values
from .errors import RemoteProtocolError
from .messages import Activations, Array
from .quantisation import MARGIN
from .rounding import from_bfloat16, to_bfloat16, upwards_to_bfloat16
from .settings import DELTA
from .shuffling import shuffled, unshuffled

__all__ = ["KeptSamples", "arrived", "coded"]

LARGEST_CODE = 127
CODES_OF_THE_RMS = 1.5  # so coarse that a code takes little more than three bits
SMALLEST_UNIT, LARGEST_UNIT = 2.0**-60, 2.0**30
NOWHERE = -1
"""The number of a sample that is not kept."""

Version = tuple[int, Array]
"""A step, and a sample's rows as they arrived, (n, d) bfloat16."""


class KeptSamples(Protocol):
    """
    One client's samples as they arrived, a version for each step in which one was sent.

    A version counts once its question is answered: until then one side may have it and the other not. Versions are kept as
    long as the run may go back to a step that needs them.
    """

    def latest(self, sample: int, before: int) -> Version | None:
        """The newest version of an earlier step that counts, and its step."""

    def version(self, sample: int, step: int) -> Array | None:
        """Its rows of this step, if they are kept and count."""

    def keep(self, step: int, micro_batch: int, versions: dict[int, Version]) -> None:
        """
        Args:
            versions: by sample, with the steps whose versions they are changes of; 0: of none.

        Raises:
            ValueError: it is more than may be kept.
        """

    def confirm(self, step: int, micro_batch: int) -> None:
        """The versions of this micro-batch count."""

    def forget_after(self, step: int) -> None:
        """
        The run goes on after this step: of the next one only what counts is kept, for the client may ask only the rest of it;
        of later ones nothing.
        """

    def forget_before(self, step: int) -> None:
        """
        The run cannot go back behind this step: of versions up to it the newest is needed, and the one that it is a change of,
        for of an answer that was lost only one side may know that it made the newest count.
        """

    @property
    def newest(self) -> int:
        """The latest step of which there is a version that counts; 0 if none."""

    @property
    def is_full(self) -> bool:
        """Whether nothing more should be kept for now."""


def coded(message: Activations, kept: KeptSamples) -> Activations:
    """What is sent instead of a message; keeps what will arrive, where there is room."""
    if kept.is_full:
        message = replace(message, samples=None)
    found = [kept.latest(sample, message.step) if sample >= 0 else None for sample in _samples(message)]
    since = np.array([0 if version is None else version[0] for version in found], np.int32)
    references = _references([None if version is None else version[1] for version in found], message)
    is_change = _is_change(since, message)
    change = message.values[is_change] - references
    small = _factors(change)
    fresh = quantised_parts(message.values[~is_change], "int8", None)
    parts = [shuffled(since), *fresh, *small]
    made = Coded(DELTA, message.values.shape, parts)
    _keep(message, since, _values(made, message, since, references), kept)
    return replace(message, values=made)  # type: ignore[arg-type]  # as it is on the wire


def arrived(message: Activations, kept: KeptSamples) -> Activations:
    """
    What a message that was `coded` says; keeps it.

    Raises:
        RemoteProtocolError: it is malformed, or builds on what is not kept.
    """
    assert isinstance(message.values, Coded)
    since = _since(message.values, message)
    rows = []
    for sample, step in zip(_samples(message), since.tolist(), strict=True):
        version = kept.version(sample, step) if step else None
        if step and version is None:
            raise RemoteProtocolError(f"a change of sample {sample} since step {step}, which is not kept")
        rows.append(version)
    values = _values(message.values, message, since, _references(rows, message))
    _keep(message, since, values, kept)
    return replace(message, values=values)


def _since(made: Coded, message: Activations) -> Array:
    """Of each sequence the step whose version it is a change of, (B,) int32; 0: it comes as it is."""
    if len(made.parts) != 9:
        raise RemoteProtocolError(f"{DELTA} has {len(made.parts)} parts, expected 9")
    first, num_sequences = made.parts[0], len(message.lengths)
    if len(first) != 4 * num_sequences:
        raise RemoteProtocolError(f"{DELTA} has {len(first)} bytes of steps for {num_sequences} sequences")
    return unshuffled(first, np.dtype(np.int32), (num_sequences,))


def _samples(message: Activations) -> list[int]:
    return [NOWHERE] * len(message.lengths) if message.samples is None else message.samples.tolist()


def _is_change(since: Array, message: Activations) -> Array:
    """Of every row, (N,) bool."""
    is_change: Array = np.repeat(since > 0, message.lengths)
    return is_change


def _references(rows: Sequence[Array | None], message: Activations) -> Array:
    """What the changed rows are changes of, one under the other: float32."""
    width = message.values.shape[1]
    for number, length in enumerate(message.lengths.tolist()):
        row = rows[number]
        if row is not None and row.shape != (length, width):
            raise RemoteProtocolError(f"a change of {length} rows of {width}, kept are {list(row.shape)}")
    there = [row for row in rows if row is not None]
    return from_bfloat16(np.concatenate(there) if there else np.empty((0, width), np.uint16))


def _keep(message: Activations, since: Array, values: Array, kept: KeptSamples) -> None:
    """What has arrived is what is kept, rounded to bfloat16 on both sides."""
    each = np.split(values, np.cumsum(message.lengths))[:-1]
    versions = {
        sample: (step, to_bfloat16(rows))
        for sample, step, rows in zip(_samples(message), since.tolist(), each, strict=True)
        if sample >= 0
    }
    try:
        kept.keep(message.step, message.micro_batch, versions)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None


def _values(made: Coded, message: Activations, since: Array, references: Array) -> Array:
    """(N, d) float32, where ``references`` are what the changed rows are changes of."""
    _, *fresh, left, right, unit = made.parts
    is_change = _is_change(since, message)
    values = np.empty(made.shape, np.float32)
    num_changed, width = int(is_change.sum()), made.shape[1]
    values[~is_change] = quantised_values("int8", (len(values) - num_changed, width), fresh)
    values[is_change] = references + _product(left, right, unit, (num_changed, width))
    return values


def _factors(change: Array) -> list[bytes]:
    """Of a change (N, d): r N and r d signed bytes, and one bfloat16, whose square times their product is about the change."""
    num_rows, width = change.shape
    rank = 3 * change.size // (10 * max(1, num_rows + width))
    if not rank:
        return [b"", b"", shuffled(to_bfloat16(np.ones(1, np.float32)))]
    left, right = _left_and_right(change, rank) if width <= num_rows else reversed(_left_and_right(change.T, rank))
    unit = _unit(left, right)
    codes = [np.rint(factor / from_bfloat16(unit)).astype(np.int8) for factor in (left, right)]
    return [*(code.tobytes() for code in codes), shuffled(unit)]


def _left_and_right(tall: Array, rank: int) -> list[Array]:
    """Of (n, m), n >= m: (rank, n) and (rank, m), the strongest directions first; the best there is (Eckart and Young)."""
    # The smaller of the two Gram matrices has the same directions, and takes a fraction of an SVD's time.
    strengths, directions = np.linalg.eigh((tall.T @ tall).astype(np.float64))
    strongest = slice(-1, -1 - rank, -1)
    right = directions.T[strongest].astype(np.float32)
    roots = np.sqrt(np.sqrt(np.maximum(strengths[strongest], 0.0))).astype(np.float32)[:, None]
    left = np.divide(right @ tall.T, roots, out=np.zeros((rank, len(tall)), np.float32), where=roots > 0)
    return [left, right * roots]


def _unit(left: Array, right: Array) -> Array:
    """(1,) bfloat16: what one of a code is worth."""
    rms = np.sqrt((np.square(left).sum() + np.square(right).sum()) / (left.size + right.size))
    largest = max(np.abs(left).max(), np.abs(right).max())
    exact = np.array([max(rms / CODES_OF_THE_RMS, largest * MARGIN / LARGEST_CODE, SMALLEST_UNIT)], np.float32)
    return upwards_to_bfloat16(exact)


def _product(left: bytes, right: bytes, unit: bytes, shape: tuple[int, int]) -> Array:
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
