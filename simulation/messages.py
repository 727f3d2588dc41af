"""What devices say, with arrays of one number: made once and shared by all, since a message does not name its sender."""

from functools import cache

import numpy as np

from protocol import Activations, AdapterGradient, AdapterWeights, Done, Join, Seconds

__all__ = [
    "ADAPTER",
    "LONGEST",
    "SAMPLES",
    "VALUES",
    "activations",
    "adapter_gradient",
    "adapter_weights",
    "done",
    "join",
]

VALUES = np.zeros((1, 1), np.float32)
ADAPTER = {"A": np.zeros((1, 1), np.float32)}
LONGEST, SAMPLES = 1, 1
ONE, LABEL = np.ones(1, np.int32), np.zeros(1, np.int32)
UNTIMED = Seconds()


@cache
def activations(step: int, micro_batch: int) -> Activations:
    return Activations(
        step=step, micro_batch=micro_batch, seconds=UNTIMED, lengths=ONE, label_counts=ONE, labels=LABEL, values=VALUES
    )


@cache
def adapter_gradient(step: int) -> AdapterGradient:
    return AdapterGradient(step=step, seconds=UNTIMED, tensors=ADAPTER)


@cache
def adapter_weights(step: int) -> AdapterWeights:
    return AdapterWeights(step=step, seconds=UNTIMED, tensors=ADAPTER)


@cache
def done(step: int) -> Done:
    return Done(step=step)


@cache
def join(step: int, batch_size: int) -> Join:
    """Of a device that has finished ``step``."""
    return Join(num_samples=SAMPLES, batch_size=batch_size, longest=LONGEST, step=step)
