"""What a setting costs the model: in nats per labelled token, on the same texts with it and without."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol import Array
from split_model import OptimiserConfig, adamw, take_step

from ..data import Sample
from .cut_model import CutModel
from .observation import Observations, Setting
from .statistics import Ratio

__all__ = ["Prediction", "extra_nats", "predict", "train"]

LEARNING_RATE = 1e-3


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of the labels of each text."""

    nats: Array
    """(U,) summed over the labels of each text."""
    num_labels: Array
    """(U,)"""


@torch.no_grad()
def predict(observations: Observations, samples: Sequence[Sample], head: Tensor) -> Prediction:
    """
    From hidden states behind the final norm as they arrive: whatever the setting does to activations and to them is in it.

    Args:
        samples: the observed texts.
        head: (V, d)
    """
    nats = []
    sent = [
        part
        for exchange in observations.exchanges
        for part in np.split(exchange.hidden_states, np.cumsum(exchange.label_counts)[:-1])
    ]
    for sample, states in zip(samples, sent, strict=True):
        count = sample.num_labels
        labels = torch.from_numpy(sample.labels.astype(np.int64))
        logits = torch.from_numpy(states[len(states) - count :]) @ head.T  # with hidden rows, states of all rows are sent
        nats.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item() if count else 0.0)
    return Prediction(np.array(nats), np.array([sample.num_labels for sample in samples]))


def extra_nats(costly: Prediction, cheap: Prediction) -> Ratio:
    """How many nats a label is predicted worse, text by text."""
    return Ratio(costly.nats - cheap.nats, cheap.num_labels)


def train(
    cut: CutModel,
    setting: Setting,
    samples: Sequence[Sample],
    secret: bytes,
    *,
    steps: int,
    report: Callable[[int], object] = lambda done: None,
) -> None:
    """
    Train the adapter of both parts for some steps as a run with one device would, on micro-batches of neighbouring samples.

    Args:
        samples: begun again from the first where they are too few.
        secret: from which the device's noise is drawn.
        report: called with the number of steps done.
    """
    parts = (cut.edge, cut.server)
    config = OptimiserConfig(learning_rate=LEARNING_RATE)
    optimisers = [adamw(part.matrices().values(), config) for part in parts]
    batches = max(1, len(samples) // setting.batch_size)
    for step in range(steps):
        start = step % batches * setting.batch_size
        cut.server.clear_gradients()
        (exchange,) = Observations.of(samples[start : start + setting.batch_size], cut, setting, secret).exchanges
        cut.server.divide_gradients(max(1, exchange.labelled_tokens))
        for name, matrix in cut.edge.matrices().items():
            matrix.grad = torch.from_numpy(exchange.adapter_gradient[name])  # which a device has divided already
        for optimiser in optimisers:
            take_step(optimiser, LEARNING_RATE)
        report(step + 1)
