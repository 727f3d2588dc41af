"""
A sample crosses the link once where the edge part learns nothing (SplitFrozen, arXiv 2503.18986), since its activations never
change: from then on its number stands for them.

The server keeps the rows as they arrived, in an `ActivationCache`. The client, which never needs them again, keeps the same
versions without rows: it knows by them what the server has. Both drop versions alike, as in `delta`; so whatever happens on the
way, a sample has the same rows in the same step.
"""

from dataclasses import replace

import numpy as np

from .delta import ActivationCache
from .errors import RemoteProtocolError
from .messages import Activations, Array

__all__ = ["kept_since", "note_sent", "with_all_rows"]


def kept_since(samples: Array | None, step: int, cache: ActivationCache) -> Array | None:
    """
    What the client need not send again.

    Args:
        samples: (B,) as in `Activations`.
        step: that is to be asked.

    Returns:
        (B,) int32, as `Activations.since`.
    """
    if samples is None:
        return None
    found = [cache.latest(sample, step) if sample >= 0 else None for sample in samples.tolist()]
    return np.array([0 if version is None else version[0] for version in found], np.int32)


def note_sent(message: Activations, cache: ActivationCache) -> None:
    """The client's cache learns which samples the server will have when it answers."""
    nothing = message.values[:0]
    _store(message, dict.fromkeys(_new(message), nothing), cache)


def with_all_rows(message: Activations, cache: ActivationCache, max_bytes: int) -> Activations:
    """
    The message as the server computes with it: with values (N, d) of all sequences. Those that came are stored in the cache.

    Args:
        max_bytes: the most that these may take.

    Raises:
        RemoteProtocolError: it stands for rows that are not in the cache, for a sample of another length, or for too many rows.
    """
    since = message.since
    if message.samples is None or since is None:
        return message
    num_rows, row_bytes = int(message.lengths.sum(dtype=np.int64)), message.values.itemsize * message.values.shape[1]
    if num_rows * row_bytes > max_bytes:
        raise RemoteProtocolError(f"Activations stand for {num_rows} rows of {row_bytes} bytes, more than {max_bytes} together")
    came = np.split(message.values, np.cumsum(message.lengths[since == 0]))
    rows = [
        came.pop(0) if not step else _kept(cache, sample, step, (length, message.values.shape[1]))
        for sample, step, length in zip(message.samples.tolist(), since.tolist(), message.lengths.tolist(), strict=True)
    ]
    _store(message, {sample: rows[number] for sample, number in _new(message).items()}, cache)
    values = np.concatenate([message.values[:0], *rows])
    return replace(message, values=values, since=None)


def _new(message: Activations) -> dict[int, int]:
    """Samples that both sides keep from this message on, and which of its sequences each is."""
    if message.samples is None or message.since is None:
        return {}
    pairs = zip(message.samples.tolist(), message.since.tolist(), strict=True)
    return {sample: number for number, (sample, step) in enumerate(pairs) if sample >= 0 and not step}


def _kept(cache: ActivationCache, sample: int, step: int, shape: tuple[int, int]) -> Array:
    rows = cache.version(sample, step)
    if rows is None:
        raise RemoteProtocolError(f"sample {sample} as in step {step}, which is not in the cache")
    if rows.shape != shape:
        raise RemoteProtocolError(f"sample {sample} of {shape[0]} rows of {shape[1]}; in the cache it has {list(rows.shape)}")
    return rows


def _store(message: Activations, rows: dict[int, Array], cache: ActivationCache) -> None:
    try:
        cache.store(message.step, message.micro_batch, {sample: (0, each) for sample, each in rows.items()})
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from None
