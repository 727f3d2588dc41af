"""
What a client's message must respect beyond what its type says: the run's settings, the model, and what the client announced.

Nothing here has a state, and the only error is RemoteProtocolError: its sender has broken a rule, and leaves the run.
"""

from dataclasses import dataclass, replace

import numpy as np

from protocol import (
    EXACT,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
    Done,
    Evaluation,
    HeldOutLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    RemoteProtocolError,
    RunSettings,
)
from protocol.limits import LARGEST_VALUE
from protocol.settings import LARGEST_COUNT
from protocol.shuffling import NOT_SHUFFLED, looks_plain
from storage import part_that_differs
from terminal import count

from .member import Member

__all__ = [
    "ModelLimits",
    "StepQuestion",
    "check_held_out_loss",
    "check_hello",
    "check_hidden_gradient",
    "check_newcomer",
    "check_question",
    "check_same_data",
]

StepQuestion = Activations | AdapterGradient | AdapterWeights | Done


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the model and this server's memory allow."""

    fingerprint: str
    width: int
    """Elements of a row of activations, d."""
    vocabulary_size: int
    num_positions: int
    """Most tokens of a sequence."""
    max_batch_tokens: int
    """Most rows of a client's batch, (N, d)."""
    edge_shapes: dict[str, tuple[int, int]]
    """Of the edge part's LoRA matrices, by name."""
    hands_over_part: bool = False
    """Whether a client without a model is handed its part."""


WITHOUT_ABILITY = {
    "device-labels": "with --labels server",
    "noise": "without noise and clipping",
    "schedules": "with another --lr-schedule than cosine, and --warmup-steps instead of --warmup-ratio",
    "early-end": "without --early-stopping-patience, and with --final-adapter last",
    "label-smoothing": "without --label-smoothing, or with --labels server",
    "frozen-edge": "with --edge-adapter lora",
}
"""For each of `protocol.settings.ABILITIES`: how to start a run in which a client without it can take part."""


def check_hello(hello: Hello, limits: ModelLimits, codecs: set[str], abilities: set[str]) -> None:
    """
    Args:
        codecs: all that the run may come to use.
        abilities: what the run's settings ask of a client.

    Raises:
        RemoteProtocolError: the client has another model, or none and is handed none, or does not know one of the codecs or
            abilities.
    """
    if not hello.fingerprint and not limits.hands_over_part:
        raise RemoteProtocolError(
            f"{hello.name} has no model, and this run hands over no part of its own, as no run in float64 does; "
            f"start {hello.name} with --model"
        )
    if hello.fingerprint and hello.fingerprint != limits.fingerprint:
        what = part_that_differs(hello.fingerprint, limits.fingerprint)
        raise RemoteProtocolError(
            f"the {what} of {hello.name} has fingerprint {ascii(hello.fingerprint[:64])[1:-1]}, "
            f"the run's has {limits.fingerprint}; use the same base {what} on both sides"
        )
    missing = codecs - {EXACT, *hello.codecs}
    if missing:
        raise RemoteProtocolError(
            f"{hello.name} does not offer the codec {', '.join(sorted(missing))}, which this run uses; "
            f"update splitlora-edge there, or start the run with --codec float32"
        )
    if unknown := abilities.difference(hello.abilities):
        ability = min(unknown)
        raise RemoteProtocolError(
            f"{hello.name} does not know {ability}, which this run uses; "
            f"update splitlora-edge there, or start the run {WITHOUT_ABILITY[ability]}"
        )


def check_newcomer(member: Member, limits: ModelLimits) -> None:
    """
    Raises:
        RemoteProtocolError: the client's batches are too large for the model or the server, or its data for the wire, or too
            little for the run's delta.
    """
    join, settings = member.join, member.itinerary.settings
    if join.longest > limits.num_positions:
        raise RemoteProtocolError(
            f"sequences are up to {join.longest} tokens long, and the model has {limits.num_positions} positions; "
            f"choose a smaller --max-length"
        )
    if join.batch_size * join.longest > limits.max_batch_tokens:
        raise RemoteProtocolError(
            f"batches are up to {join.batch_size} x {join.longest} tokens, and the server takes at most "
            f"{limits.max_batch_tokens} (--max-batch-tokens); choose a smaller --batch-size or --max-length"
        )
    if member.last_step > LARGEST_COUNT:
        raise RemoteProtocolError(f"{join.num_samples} samples take {member.last_step} steps; at most {LARGEST_COUNT} can be")
    if (settings.activation_noise or settings.gradient_noise) and settings.noise_delta * join.num_samples >= 1:
        raise RemoteProtocolError(
            f"delta is {settings.noise_delta:g}, and with {count(join.num_samples, 'sample')} it must be below "
            f"{1 / join.num_samples:.3g}, else one of them may be told whole; start the run with a smaller --noise-delta"
        )


def check_same_data(name: str, before: Join, now: Join) -> None:
    """
    Raises:
        RemoteProtocolError: a client comes back with other data than it joined with, so that its steps would be others.
    """
    if replace(now, step=0, kept=None).__dict__ != replace(before, step=0, kept=None).__dict__:
        was, now_is = (
            f"{count(each.num_samples, 'sample')} of up to {count(each.longest, 'token')} in batches of {each.batch_size}"
            for each in (before, now)
        )
        raise RemoteProtocolError(f"{name} joined this run with {was}, and comes back with {now_is}; start it as before")


def check_question(name: str, question: StepQuestion | Evaluation, member: Member, limits: ModelLimits) -> None:
    """
    Raises:
        RemoteProtocolError: sizes are not what the client announced, a label is no token, or a number is too large.
    """
    if isinstance(question, Activations):
        _check_batch(name, question, member.join, limits)
        _check_micro_batch(name, question, member.join, member.itinerary.settings)
    elif isinstance(question, Evaluation):
        _check_batch(name, question, member.join, limits)
    elif not isinstance(question, Done):
        _check_adapter(name, question, member.matrix_shapes)


def check_hidden_gradient(name: str, gradient: HiddenGradient, states: HiddenStates) -> None:
    """
    Args:
        states: what it replies to.

    Raises:
        RemoteProtocolError: it is of another size, or a number is too large.
    """
    if gradient.values.shape != states.values.shape:
        raise RemoteProtocolError(f"the gradient at hidden states {list(states.values.shape)} is {list(gradient.values.shape)}")
    _check_size(gradient.values, _sent(name, gradient))
    # Noise may make it negative, and of a micro-batch without any label it is then all that there is.
    if abs(gradient.summed_loss) > (most := LARGEST_VALUE * max(1, gradient.labelled_tokens)):
        raise RemoteProtocolError(
            f"the loss of {count(gradient.labelled_tokens, 'token')} is {gradient.summed_loss:g}; it may be up to {most:g}"
        )


def check_held_out_loss(name: str, told: HeldOutLoss, settings: RunSettings) -> None:
    """
    Raises:
        RemoteProtocolError: it is no loss that the run's texts may have.
    """
    least = -LARGEST_VALUE if settings.gradient_noise else 0.0
    if not least <= told.loss <= LARGEST_VALUE:
        raise RemoteProtocolError(
            f"{name} says that its held-out texts lose {told.loss:g}; it may be {least:g} to {LARGEST_VALUE:g}"
        )


def _check_batch(name: str, batch: Activations | Evaluation, join: Join, limits: ModelLimits) -> None:
    rows = join.batch_size * join.longest
    if batch.values.shape[1] != limits.width:
        raise RemoteProtocolError(f"values are {batch.values.shape[1]} wide, the model is {limits.width}")
    _check_size(batch.values, _sent(name, batch))
    if len(batch.values) > rows:
        raise RemoteProtocolError(f"the batch has {count(len(batch.values), 'row')}; at most {rows} were announced")
    if len(batch.lengths) > join.batch_size:
        sequences = count(len(batch.lengths), "sequence")
        raise RemoteProtocolError(f"the batch has {sequences}; at most {join.batch_size} were announced")
    if batch.lengths.max(initial=0) > join.longest:
        raise RemoteProtocolError(f"a sequence has {batch.lengths.max()} tokens; at most {join.longest} were announced")
    wrong = batch.labels[(batch.labels < 0) | (batch.labels >= limits.vocabulary_size)]
    if len(wrong):
        raise RemoteProtocolError(f"a label is {wrong[0]}; this model's tokens are 0 to {limits.vocabulary_size - 1}")


def _check_micro_batch(name: str, batch: Activations, join: Join, settings: RunSettings) -> None:
    if batch.exact is not None:
        if batch.micro_batch or not settings.checks_codec(batch.step):
            raise RemoteProtocolError(
                f"exact values in micro-batch {batch.micro_batch} of step {batch.step}, which checks no codec"
            )
        _check_size(batch.exact, _sent(name, batch))
    most = -(-join.batch_size // settings.micro_batches)
    if len(batch.lengths) > most:
        raise RemoteProtocolError(f"a micro-batch has {count(len(batch.lengths), 'sequence')}; at most {most} can be")


def _check_adapter(name: str, contribution: AdapterGradient | AdapterWeights, expected: dict[str, tuple[int, int]]) -> None:
    found = {key: tensor.shape for key, tensor in contribution.tensors.items()}
    for key in [*expected, *found]:
        if expected.get(key) != found.get(key):
            which = [f"{list(shapes[key])}" if key in shapes else "none" for shapes in (found, expected)]
            raise RemoteProtocolError(
                f"the tensors are not the LoRA matrices of the edge part: {key[:200]!a} is {which[0]}, expected {which[1]}"
            )
    for tensor in contribution.tensors.values():
        _check_size(tensor, _sent(name, contribution))


def _sent(name: str, message: Activations | Evaluation | HiddenGradient | AdapterGradient | AdapterWeights) -> str:
    """Who sent the numbers, and what they are."""
    if isinstance(message, Evaluation):
        return f"{name} sent activations of a held-out batch"
    kinds: dict[type, str] = {
        HiddenGradient: "a gradient at the hidden states",
        AdapterGradient: "an adapter gradient",
        AdapterWeights: "an adapter",
    }
    return f"{name} sent {kinds.get(type(message), 'activations')} of step {message.step}"


def _check_size(values: Array, sent: str) -> None:
    """One client's numbers must not make everybody's infinite."""
    largest = np.abs(values).max(initial=0.0)
    if largest > LARGEST_VALUE:
        diverged = f"beyond {LARGEST_VALUE:g} training has diverged: try a lower --lr on the server"
        why = NOT_SHUFFLED if looks_plain(values, LARGEST_VALUE) else diverged
        raise RemoteProtocolError(f"{sent} with values up to {largest:.3g}; {why}")
