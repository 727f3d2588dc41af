"""
The device's side of the algorithm (SplitLoRA, arXiv 2407.00952, section III): `train` is a run, read from top to bottom.

It knows neither torch nor sockets: an `Engine` computes, and a `Membership` gets every question its answer, over however many
connections that takes. Only one thing may come instead of an answer: `Redirected` says where in the run this device goes on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    HiddenGradient,
    HiddenStates,
    Itinerary,
    QuestionId,
    RemoteProtocolError,
    RunEnd,
    RunSettings,
    Seconds,
    Start,
    Tensors,
    TrainingDiverged,
    changed_by,
    changes,
    derive_seed,
    kept_since,
)

from .data import Batch, Batches
from .disclosure import Disclosure
from .engine import Engine
from .held_out import HeldOut
from .membership import Membership, Redirected
from .saved_steps import SavedStep, SavedSteps
from .stopwatch import difference

__all__ = ["Step", "hidden_gradient", "train"]


@dataclass(frozen=True, kw_only=True)
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
    engine: Engine,
    batches: Batches,
    start: Start,
    *,
    disclosure: Disclosure,
    saved_steps: SavedSteps,
    in_flight: int = 2,
    held_out: HeldOut | None = None,
) -> Iterator[Step]:
    """
    Take part in every step this device has data for; at the end the engine holds the run's final adapter.

    A step that the server takes again, since it went back to a checkpoint, is given again, too.

    Args:
        start: where the run stands.
        disclosure: what the server gets to see.
        in_flight: micro-batches of a step that are under way at once: while one travels, or is computed on the server, this
            side computes the next. The result is the same to the bit, however many they are.
        held_out: evaluated between steps, and when the run is over. The result is the same to the bit, with it and without.
    """
    while True:
        settings = membership.welcome.settings  # of each pass: a server that was started again may have made the run longer
        last_step = min(batches.last_step(settings), start.total_steps)  # the run may have ended before this device's data
        itinerary = Itinerary(settings, last_step)
        try:
            question = _go_to(start, itinerary, engine, membership, saved_steps)
            shared = _fitting(start.adapter, engine)  # with which everybody has begun the round
            if question.kind is AdapterWeights:  # the step before was finished, and the server has not averaged it yet
                shared = _exchange_adapter(AdapterWeights, question.step, last_step, shared, engine, membership)

            for step in range(start.step + 1, last_step + 1):
                if held_out is not None and membership.position.is_between_rounds:
                    held_out.evaluate_if_due(step - 1)

                bytes_before, seconds_before = membership.num_bytes, membership.stopwatch.read()

                # Forward to the cut, micro-batch by micro-batch; the server does the rest and sends back the loss's gradients.
                engine.begin_step()
                questions = _activations(step, batches, engine, membership, disclosure)
                for sent, answer in membership.exchange_each(questions, ActivationGradient, in_flight):
                    if isinstance(answer, HiddenStates):
                        # The labels stay here: the server's blocks end with hidden states, and the loss is computed from these.
                        batch = batches.micro_batch(step, answer.micro_batch)
                        membership.reply(hidden_gradient(answer, batch, engine, disclosure, lap=membership.stopwatch.lap))
                        continue
                    _check_gradient(sent, answer, settings)
                    if settings.trains_edge:
                        engine.backward(answer.values)
                    loss, labelled_tokens = answer.loss, answer.labelled_tokens
                engine.end_step(labelled_tokens)

                if not settings.trains_edge:
                    membership.position.step = membership.position.round = step
                elif settings.aggregate_every == 1:
                    # The server sums the gradients of all clients and takes the optimiser's step for everybody.
                    shared = _exchange_adapter(AdapterGradient, step, last_step, shared, engine, membership)
                    membership.position.step = step
                else:
                    # Every client takes the optimiser's step by itself; at a round's end their adapters are averaged.
                    engine.take_step(settings.learning_rate_at(step, start.total_steps))
                    ends_round = itinerary.ends_round(step)
                    _save(step, engine, membership, saved_steps, is_round_end=ends_round)
                    if ends_round:
                        shared = _exchange_adapter(AdapterWeights, step, last_step, shared, engine, membership)

                yield Step(
                    number=step,
                    loss=loss,
                    tokens=batches.num_tokens(step),
                    num_bytes=membership.num_bytes - bytes_before,
                    seconds=difference(membership.stopwatch.read(), seconds_before),
                )

            if held_out is not None and settings.final_adapter == "best" and batches.last_step(settings) == start.total_steps:
                held_out.evaluate(last_step)  # the server, which decides by it, may have forgotten what it was told
            end = membership.exchange(Done(step=last_step), RunEnd)
            engine.load_adapter(end.tensors)
            if held_out is not None:
                held_out.evaluate_once(end.best_step or end.step)
            return
        except Redirected as redirected:
            start = redirected.start
            membership.training_follows()


def _activations(
    step: int, batches: Batches, engine: Engine, membership: Membership, disclosure: Disclosure
) -> Iterator[Activations]:
    """The questions of a step, one for each micro-batch. Each is computed when it is asked for, and not before."""
    settings = membership.welcome.settings
    for number in range(settings.micro_batches):
        batch, samples = batches.micro_batch(step, number), batches.cached_samples(step, number)
        since, computed = None, batch
        purpose: tuple[int, ...] = step, number
        if not settings.trains_edge and membership.activation_cache is not None:
            # Of a sample that the server has, nothing is computed: its number stands for it.
            since = kept_since(samples, step, membership.activation_cache)
        if since is not None:
            computed = batch.of(since == 0)
            purpose = (step, number, *since.tolist())  # other samples never get the same noise
        with _diverging_in(step):
            if settings.trains_edge:
                # Seeded by what it is for, so that a repeated step draws the same noise.
                values = engine.forward(computed, derive_seed(settings.seed, batches.name, "dropout", step, number))
            else:
                values = engine.infer(computed)
        yield Activations(
            step=step,
            micro_batch=number,
            lengths=batch.lengths,
            label_counts=disclosure.label_counts(batch),
            labels=disclosure.labels(batch),
            values=disclosure.activations(values, computed, *purpose),
            samples=samples,
            since=since,
            seconds=membership.stopwatch.lap(),
        )


def hidden_gradient(
    asked: HiddenStates, batch: Batch, engine: Engine, disclosure: Disclosure, *, lap: Callable[[], Seconds]
) -> HiddenGradient:
    """
    The loss at the rows of a micro-batch that have a label, and its gradient at all rows that the server has sent.

    Args:
        lap: asked, when all is computed, for the time since the question before.
    """
    with _diverging_in(asked.step):
        losses, gradient = engine.losses_and_gradient(disclosure.of_labelled_rows(asked.values, batch), batch.labels)
    values = disclosure.of_all_rows(gradient, batch)
    return HiddenGradient(
        step=asked.step,
        micro_batch=asked.micro_batch,
        summed_loss=disclosure.summed_loss(losses, asked.step, asked.micro_batch),
        labelled_tokens=len(batch.labels),
        values=disclosure.gradient(values, asked.step, asked.micro_batch),
        seconds=lap(),
    )


@contextmanager
def _diverging_in(step: int) -> Iterator[None]:
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"in step {step} {error}") from None


def _check_gradient(question: Activations, answer: ActivationGradient, settings: RunSettings) -> None:
    rows = question.values if settings.trains_edge else question.values[:0]
    asked, got = [
        f"micro-batch {message.micro_batch} of step {message.step}, {list(values.shape)}"
        for message, values in ((question, rows), (answer, answer.values))
    ]
    if asked != got:
        raise RemoteProtocolError(f"expected the gradient of {asked}; got that of {got}")


def _exchange_adapter(
    kind: type[AdapterGradient | AdapterWeights],
    step: int,
    last_step: int,
    shared: Tensors,
    engine: Engine,
    membership: Membership,
) -> Tensors:
    """
    Give what this device adds to the adapter, and go on with the adapter that everybody gets.

    Args:
        shared: with which everybody has begun the round.

    Returns:
        That with which everybody begins the next.
    """
    as_changes = membership.welcome.settings.codes_adapter
    if kind is AdapterGradient:
        tensors = engine.gradients()
    else:
        tensors = changes(engine.adapter(), shared) if as_changes else engine.adapter()
    question = kind(step=step, seconds=membership.stopwatch.lap(), tensors=tensors)
    answer = membership.exchange(question, EdgeAdapter)
    # A client whose data ends within a round gets the adapter of the round's end, a later step.
    if answer.step < step or (answer.step > step and step != last_step):
        raise RemoteProtocolError(f"expected the adapter of step {step}, got that of step {answer.step}")
    shared = changed_by(shared, _fitting(answer.tensors, engine)) if as_changes else answer.tensors
    engine.load_adapter(shared)
    return shared


def _fitting(tensors: Tensors, engine: Engine) -> Tensors:
    """
    Raises:
        RemoteProtocolError: they are not for this device's matrices.
    """
    found, expected = ({name: matrix.shape for name, matrix in each.items()} for each in (tensors, engine.adapter()))
    if found != expected:
        raise RemoteProtocolError("the server's LoRA matrices are not those of this device's part of the model")
    return tensors


def _go_to(start: Start, itinerary: Itinerary, engine: Engine, membership: Membership, saved_steps: SavedSteps) -> QuestionId:
    """Stand where the run does. Returns the question to go on with."""
    restarts = membership.welcome.restarts
    saved_steps.forget_after(start.step)
    saved = None
    if itinerary.settings.aggregate_every > 1:  # else the server has taken the optimiser's steps, and nothing is kept here
        saved = saved_steps.load(start.step)
        if saved is None:
            engine.forget()
        else:
            engine.restore(saved.state)
    if saved is None or not saved.is_of_round(start, restarts):
        engine.load_adapter(start.adapter)
    membership.position.step = start.step
    return itinerary.resume(start, restarts, saved)


def _save(step: int, engine: Engine, membership: Membership, saved_steps: SavedSteps, *, is_round_end: bool) -> None:
    """Before the next question: with that the server forgets its answers of this step, which then cannot be taken again."""
    position = membership.position
    saved = SavedStep(step=step, round=position.round, restarts=membership.welcome.restarts, state=engine.state())
    saved_steps.save(saved, keep_from=position.checkpoint, is_round_end=is_round_end)
    position.step = step
