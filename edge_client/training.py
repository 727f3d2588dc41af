"""The device's side of the algorithm (SplitLoRA, arXiv 2407.00952, section III), readable from top to bottom."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    RemoteProtocolError,
    RunSettings,
    Start,
)
from split_model import OptimiserConfig, derive_seed

from .connection import Connection
from .data import Batch, Dataset, pack
from .engine import TorchEngine

__all__ = ["Step", "perplexity", "train"]

LARGEST_EXPONENT = 700.0  # exp() of more is no float


@dataclass(frozen=True)
class Step:
    """What one step did, as this device saw it."""

    number: int
    """1, 2, ..."""
    loss: float
    """Nats per labelled token, over all clients' batches."""
    tokens: int
    """Tokens of this device's batch."""
    num_bytes: int
    """Bytes of this device's messages, both ways."""


def train(
    connection: Connection,
    engine: TorchEngine,
    data: Dataset,
    settings: RunSettings,
    start: Start,
    *,
    name: str,
    batch_size: int,
    shuffle: bool,
) -> Iterator[Step]:
    """Take part in every step this device has data for; at the end the engine holds the run's final adapter."""
    optimiser = OptimiserConfig(**settings.optimiser())
    order_seed = (settings.seed, name, "order") if shuffle else None
    last_step = settings.steps_of_client(len(data.samples), batch_size)
    engine.load_adapter(start.adapter)

    for step in range(start.step + 1, last_step + 1):
        bytes_before = connection.num_bytes
        batch = data.batch(step, batch_size, order_seed)
        values = engine.forward(batch, derive_seed(settings.seed, name, "dropout", step))
        gradient = connection.exchange(
            Activations(
                step=step,
                edge_seconds=connection.seconds_since_reply(),
                lengths=batch.lengths,
                label_counts=batch.label_counts,
                labels=batch.labels,
                values=values,
            ),
            ActivationGradient,
        )
        if gradient.step != step or gradient.values.shape != values.shape:
            raise RemoteProtocolError(
                f"expected the gradient of step {step}, {list(values.shape)}; "
                f"got that of step {gradient.step}, {list(gradient.values.shape)}"
            )
        engine.backward(gradient.values)

        if settings.aggregate_every == 1:
            # The server sums the gradients of all clients and takes the step for everybody.
            summand = AdapterGradient(step=step, edge_seconds=connection.seconds_since_reply(), tensors=engine.gradients())
            engine.load_adapter(connection.exchange(summand, EdgeAdapter).tensors)
        else:
            # Every client steps by itself; at a round's end the adapters are averaged.
            engine.take_step(optimiser.learning_rate_at(step, start.total_steps))
            if settings.ends_round(step) or step == last_step:
                mine = AdapterWeights(step=step, edge_seconds=connection.seconds_since_reply(), tensors=engine.adapter())
                engine.load_adapter(connection.exchange(mine, EdgeAdapter).tensors)

        yield Step(step, gradient.loss, len(batch.tokens), connection.num_bytes - bytes_before)

    engine.load_adapter(connection.exchange(Done(step=last_step), EdgeAdapter).tensors)


def perplexity(connection: Connection, engine: TorchEngine, data: Dataset, batch_size: int) -> Iterator[float]:
    """
    Token-weighted perplexity through both parts, exp(summed loss / labelled tokens).

    Gives the estimate after every batch; the last one is the perplexity of all data.
    """
    summed_loss, num_labels = 0.0, 0
    for index in range(data.num_batches(batch_size)):
        batch = pack(data.samples[index * batch_size : (index + 1) * batch_size])
        summed_loss += _evaluate(connection, engine, batch, index)
        num_labels += len(batch.labels)
        mean_loss = summed_loss / max(1, num_labels)
        yield math.exp(mean_loss) if mean_loss < LARGEST_EXPONENT else math.inf


def _evaluate(connection: Connection, engine: TorchEngine, batch: Batch, index: int) -> float:
    question = Evaluation(
        index=index,
        lengths=batch.lengths,
        label_counts=batch.label_counts,
        labels=batch.labels,
        values=engine.infer(batch),
    )
    answer = connection.exchange(question, EvaluationLoss)
    if answer.index != index:
        raise RemoteProtocolError(f"expected the loss of batch {index}, got that of batch {answer.index}")
    return answer.summed_loss
