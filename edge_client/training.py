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
    Itinerary,
    QuestionId,
    RemoteProtocolError,
    RunEnd,
    Seconds,
    Start,
    Tensors,
    TrainingDiverged,
    derive_seed,
)

from .data import Batch, Dataset, pack
from .engine import TorchEngine
from .membership import Membership, Redirected
from .place import Place, SavedStep
from .stopwatch import difference

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
    seconds: Seconds
    """Where its time went."""


def train(
    membership: Membership,
    engine: TorchEngine,
    data: Dataset,
    start: Start,
    *,
    name: str,
    batch_size: int,
    shuffle: bool,
    place: Place,
    in_flight: int = 2,
    num_kept: int = 0,
) -> Iterator[Step]:
    """
    Take part in every step this device has data for; at the end the engine holds the run's final adapter.

    Up to ``in_flight`` micro-batches of a step are under way at once: while one travels, or is computed on the server, this
    side computes the next. What comes out is the same, to the bit, for any number of them. Both sides keep the first
    ``num_kept`` samples as they arrived, for runs in `DELTA`.

    Steps are repeated, and given again, where a server has gone back to a checkpoint.
    """
    settings = membership.welcome.settings
    order_seed = (settings.seed, name, "order") if shuffle else None

    def last_step() -> int:
        """A run that goes on after a restart may be longer than it was."""
        return membership.welcome.settings.steps_of_client(len(data.samples), batch_size)

    def micro_batches(step: int) -> Iterator[Activations]:
        """The step's batch in parts; each is computed when it is asked for."""
        for number in range(settings.micro_batches):
            batch = data.batch(step, batch_size, order_seed, part=number, of=settings.micro_batches)
            try:
                values = engine.forward(batch, derive_seed(settings.seed, name, "dropout", step, number))
            except TrainingDiverged as error:
                raise TrainingDiverged(f"in step {step} {error}") from None
            yield Activations(
                step=step,
                micro_batch=number,
                seconds=membership.stopwatch.lap(),
                lengths=batch.lengths,
                label_counts=batch.label_counts,
                labels=batch.labels,
                values=values,
                samples=data.numbers(step, batch_size, order_seed, part=number, of=settings.micro_batches, below=num_kept),
            )

    def contribute(step: int, kind: type[AdapterGradient | AdapterWeights], tensors: Tensors) -> None:
        """Exchange what this device adds for the adapter that everybody goes on with."""
        summand = kind(step=step, seconds=membership.stopwatch.lap(), tensors=tensors)
        answer = membership.exchange(summand, EdgeAdapter)
        if answer.step < step or (answer.step > step and step != last_step()):  # whose data has ended, gets the round's
            raise RemoteProtocolError(f"expected the adapter of step {step}, got that of step {answer.step}")
        engine.load_adapter(answer.tensors)

    def steps_after(start: Start) -> Iterator[Step]:
        itinerary = Itinerary(settings, last_step())
        first = _go_to(start, engine, membership, place, itinerary)
        if first.kind is AdapterWeights:
            contribute(first.step, AdapterWeights, engine.adapter())

        for step in range(start.step + 1, last_step() + 1):
            bytes_before, seconds_before = membership.num_bytes, membership.stopwatch.read()
            engine.begin_step()
            for question, answer in membership.exchange_each(micro_batches(step), ActivationGradient, in_flight):
                _check_answer(question, answer)
                engine.backward(answer.values)
            engine.end_step(answer.labelled_tokens)

            if settings.aggregate_every == 1:
                # The server sums the gradients of all clients and takes the step for everybody.
                contribute(step, AdapterGradient, engine.gradients())
                membership.position.step = step
            else:
                # Every client steps by itself; at a round's end the adapters are averaged.
                engine.take_step(settings.learning_rate_at(step, start.total_steps))
                ends_round = itinerary.ends_round(step)
                _keep_step(step, engine, membership, place, is_round_end=ends_round)
                if ends_round:
                    contribute(step, AdapterWeights, engine.adapter())

            seconds = difference(membership.stopwatch.read(), seconds_before)
            num_tokens = len(data.batch(step, batch_size, order_seed).tokens)
            yield Step(step, answer.loss, num_tokens, membership.num_bytes - bytes_before, seconds)

    while True:
        try:
            yield from steps_after(start)
            end = membership.exchange(Done(step=last_step()), RunEnd)
        except Redirected as redirected:
            start = redirected.start
        else:
            engine.load_adapter(end.tensors)
            return


def _check_answer(question: Activations, answer: ActivationGradient) -> None:
    asked, got = [
        f"micro-batch {message.micro_batch} of step {message.step}, {list(message.values.shape)}"
        for message in (question, answer)
    ]
    if asked != got:
        raise RemoteProtocolError(f"expected the gradient of {asked}; got that of {got}")


def _go_to(start: Start, engine: TorchEngine, membership: Membership, place: Place, itinerary: Itinerary) -> QuestionId:
    """Stand where the run does. Returns the question to go on with."""
    settings, restarts = membership.welcome.settings, membership.welcome.restarts
    place.forget_after(start.step)
    saved = place.load(start.step) if settings.aggregate_every > 1 else None
    if saved is not None:
        engine.restore(saved.state)
    elif settings.aggregate_every > 1:
        engine.forget()
    if saved is None or not saved.is_of_round(start, restarts):
        engine.load_adapter(start.adapter)
    membership.position.step = start.step
    return itinerary.resume(start, restarts, saved)


def _keep_step(step: int, engine: TorchEngine, membership: Membership, place: Place, *, is_round_end: bool) -> None:
    """Before the next question: an answer is kept by the server only until then."""
    saved = SavedStep(step=step, round=membership.position.round, restarts=membership.welcome.restarts, state=engine.state())
    place.save(saved, keep_from=membership.position.checkpoint, is_round_end=is_round_end)
    membership.position.step = step


def perplexity(membership: Membership, engine: TorchEngine, data: Dataset, batch_size: int) -> Iterator[float]:
    """
    Token-weighted perplexity through both parts, exp(summed loss / labelled tokens).

    Gives the estimate after every batch; the last one is the perplexity of all data.

    Raises:
        Redirected: the server has gone back to a checkpoint meanwhile: the batches before had another adapter.
    """
    summed_loss, num_labels = 0.0, 0
    for index in range(data.num_batches(batch_size)):
        batch = pack(data.samples[index * batch_size : (index + 1) * batch_size])
        summed_loss += _evaluate(membership, engine, batch)
        num_labels += len(batch.labels)
        mean_loss = summed_loss / max(1, num_labels)
        yield math.exp(mean_loss) if mean_loss < LARGEST_EXPONENT else math.inf


def _evaluate(membership: Membership, engine: TorchEngine, batch: Batch) -> float:
    question = Evaluation(
        index=membership.next_index(),
        lengths=batch.lengths,
        label_counts=batch.label_counts,
        labels=batch.labels,
        values=engine.infer(batch),
    )
    answer = membership.exchange(question, EvaluationLoss)
    if answer.index != question.index:
        raise RemoteProtocolError(f"expected the loss of batch {question.index}, got that of batch {answer.index}")
    return answer.summed_loss
