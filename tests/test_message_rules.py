"""What a message must respect beyond its type: each rule at its bound, and one beyond."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from usual_settings import settings

from gpu_server.federation.member import Member
from gpu_server.federation.message_rules import (
    WITHOUT_ABILITY,
    ModelLimits,
    check_hello,
    check_hidden_gradient,
    check_newcomer,
    check_question,
    check_same_data,
)
from protocol import (
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    Evaluation,
    Hello,
    HiddenGradient,
    HiddenStates,
    Itinerary,
    Join,
    Message,
    RemoteProtocolError,
    Seconds,
)
from protocol.limits import LARGEST_VALUE
from protocol.settings import ABILITIES, LARGEST_COUNT, NEXT_PIN

SHAPES = {"A": (2, 4), "B": (12, 2)}
LIMITS = ModelLimits(
    fingerprint="0123456789abcdef" * 2, width=4, vocabulary_size=9, num_positions=8, max_batch_tokens=24, edge_shapes=SHAPES
)
JOIN = Join(num_samples=9, batch_size=3, longest=8)


def member(join: Join = JOIN, **changes: Any) -> Member:
    checked = 0 if changes.get("labels") == "device" else 4
    of_run = settings(**{"micro_batches": 2, "check_codec_every": checked, **changes})
    return Member(join, Itinerary(of_run, of_run.steps_of_client(join.num_samples, join.batch_size)), SHAPES)


def batch(lengths: list[int], labels: list[int], width: int = 4, value: float = 0.0) -> dict[str, Any]:
    counts = [len(labels), *[0] * len(lengths)][: len(lengths)]
    arrays = {"lengths": lengths, "label_counts": counts, "labels": labels}
    values = np.full((sum(lengths), width), value, np.float32)
    return {"values": values, **{name: np.array(numbers, np.int32) for name, numbers in arrays.items()}}


def activations(lengths: list[int], labels: list[int], *, step: int = 1, micro_batch: int = 0, **options: Any) -> Activations:
    exact = options.pop("exact", None)
    fields = batch(lengths, labels, **options)
    return Activations(step=step, micro_batch=micro_batch, seconds=Seconds(), exact=exact, **fields)


def adapter(kind: type = AdapterGradient, value: float = 0.0, **shapes: tuple[int, ...]) -> Message:
    tensors = {name: np.full(shape, value, np.float32) for name, shape in {**SHAPES, **shapes}.items() if shape}
    message: Message = kind(step=3, seconds=Seconds(), tensors=tensors)
    return message


ALLOWED: dict[str, Message] = {
    "as large as was announced": activations([8, 8], [0, 8]),
    "nothing": activations([], []),
    "the largest number": activations([1], [], value=LARGEST_VALUE),
    "exact values where the codec is checked": activations([1], [], step=5, exact=np.zeros((1, 4), np.float32)),
    "a whole held-out batch": Evaluation(index=1, **batch([8, 8, 8], [1])),
    "gradients": adapter(),
    "matrices": adapter(AdapterWeights, value=LARGEST_VALUE),
    "done": Done(step=3),
}


@pytest.mark.parametrize("message", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_is_at_the_bound_is_allowed(message: Any) -> None:
    check_question("a", message, member(), LIMITS)


REFUSED: list[tuple[Message, str]] = [
    (activations([1], [], width=5), "values are 5 wide, the model is 4"),
    (
        activations([1], [], value=2 * LARGEST_VALUE),
        r"a sent activations of step 1 with values up to 2e\+06; beyond 1e\+06 training has diverged: try a lower --lr on the",
    ),
    (
        activations([1], [], exact=np.full((1, 4), 2 * LARGEST_VALUE, np.float32)),
        r"a sent activations of step 1 with values up to 2e\+06",
    ),
    (Evaluation(index=1, **batch([1], [], value=-2 * LARGEST_VALUE)), r"a sent activations of a held-out batch with values up"),
    (Evaluation(index=1, **batch([8, 8, 8, 1], [])), "the batch has 25 rows; at most 24 were announced"),
    (Evaluation(index=1, **batch([1, 1, 1, 1], [])), "the batch has 4 sequences; at most 3 were announced"),
    (activations([1, 1, 1], []), "a micro-batch has 3 sequences; at most 2 can be"),
    (activations([9], []), "a sequence has 9 tokens; at most 8 were announced"),
    (activations([2], [3, -1]), "a label is -1; this model's tokens are 0 to 8"),
    (activations([2], [9, 3]), "a label is 9; this model's tokens are 0 to 8"),
    (
        activations([1], [], micro_batch=1, exact=np.zeros((1, 4), np.float32)),
        "exact values in micro-batch 1 of step 1, which checks no codec",
    ),
    (
        activations([1], [], step=2, exact=np.zeros((1, 4), np.float32)),
        "exact values in micro-batch 0 of step 2, which checks no codec",
    ),
    (adapter(A=(4, 2)), r"the tensors are not the LoRA matrices of the edge part: 'A' is \[4, 2\], expected \[2, 4\]"),
    (adapter(B=()), r"'B' is none, expected \[12, 2\]"),
    (adapter(C=(1, 1)), r"'C' is \[1, 1\], expected none"),
    (adapter(**{"D" * 300: (1,)}), rf"the edge part: '{'D' * 200}' is \[1\]"),
    (adapter(value=2 * LARGEST_VALUE), r"a sent an adapter gradient of step 3 with values up to 2e\+06"),
    (adapter(AdapterWeights, value=2 * LARGEST_VALUE), r"a sent an adapter of step 3 with values up to 2e\+06"),
]


@pytest.mark.parametrize(("message", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_is_beyond_a_bound_is_refused_by_name(message: Any, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        check_question("a", message, member(), LIMITS)


def test_part_of_a_batch_that_cannot_be_divided_evenly_may_have_the_larger_half() -> None:
    check_question("a", activations([1, 1], []), member(micro_batches=2), LIMITS)
    with pytest.raises(RemoteProtocolError, match="a micro-batch has 2 sequences; at most 1 can be"):
        check_question("a", activations([1, 1], []), member(micro_batches=3), LIMITS)


def test_model_of_a_client_must_be_the_runs() -> None:
    check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint), LIMITS, set(), set())
    other = "x" * 64 + "y"
    with pytest.raises(RemoteProtocolError, match=f"of a has fingerprint {'x' * 64}, the run's has {LIMITS.fingerprint}; use"):
        check_hello(Hello(name="a", fingerprint=other), LIMITS, set(), set())


def test_exact_floats_need_not_be_offered() -> None:
    check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint, codecs=("int8",)), LIMITS, {"exact", "int8"}, set())


TOO_LARGE = [
    (Join(num_samples=9, batch_size=1, longest=9), "sequences are up to 9 tokens long, and the model has 8 positions"),
    (Join(num_samples=9, batch_size=4, longest=8), r"batches are up to 4 x 8 tokens, .* at most 24 \(--max-batch-tokens\)"),
    (Join(num_samples=LARGEST_COUNT + 1, batch_size=1, longest=8), f"{LARGEST_COUNT + 1} samples take .* {LARGEST_COUNT} can"),
]


@pytest.mark.parametrize(("join", "why"), TOO_LARGE)
def test_client_with_too_much_of_something_is_refused(join: Join, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        check_newcomer(member(join), LIMITS)


@pytest.mark.parametrize("longest", [8, 1])
def test_client_with_as_much_as_is_allowed_is_taken(longest: int) -> None:
    check_newcomer(member(Join(num_samples=LARGEST_COUNT, batch_size=1, longest=longest)), LIMITS)
    check_newcomer(member(Join(num_samples=9, batch_size=24 // longest, longest=longest)), LIMITS)


def test_client_that_comes_back_has_the_data_it_joined_with_wherever_it_stands() -> None:
    check_same_data("a", JOIN, replace(JOIN, step=7, kept=3))
    for change in ({"num_samples": 8}, {"batch_size": 2}, {"longest": 7}):
        with pytest.raises(
            RemoteProtocolError, match="a joined this run with 9 samples of up to 8 tokens in batches of 3, and"
        ):
            check_same_data("a", JOIN, replace(JOIN, **change))


@pytest.mark.parametrize(
    ("ability", "instead"),
    [
        ("device-labels", "with --labels server"),
        ("noise", "without noise and clipping"),
        ("schedules", "with another --lr-schedule than cosine, and --warmup-steps instead of --warmup-ratio"),
        ("early-end", "without --early-stopping-patience, and with --final-adapter last"),
        ("label-smoothing", "without --label-smoothing, or with --labels server"),
    ],
)
def test_client_that_lacks_an_ability_is_told_what_helps(ability: str, instead: str) -> None:
    others = tuple(other for other in ABILITIES if other != ability)
    check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint), LIMITS, set(), set())
    check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint, abilities=ABILITIES), LIMITS, set(), set(ABILITIES))
    why = f"^a does not know {ability}, which this run uses; update splitlora-edge there, or start the run {instead}$"
    with pytest.raises(RemoteProtocolError, match=why):
        check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint, abilities=others), LIMITS, set(), set(ABILITIES))
    with pytest.raises(RemoteProtocolError, match=r"^a does not know device-labels"):
        check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint), LIMITS, set(), set(ABILITIES))


def test_every_ability_that_a_run_may_need_has_a_way_without_it() -> None:
    assert {*WITHOUT_ABILITY, NEXT_PIN} == set(ABILITIES)


NOISE: list[dict[str, Any]] = [
    {"activation_noise": 1.0, "activation_clip": 1.0},
    {"gradient_noise": 1.0, "gradient_clip": 1.0, "labels": "device"},
]


@pytest.mark.parametrize("noise", NOISE)
def test_delta_of_noise_is_below_one_in_the_number_of_samples(noise: dict[str, Any]) -> None:
    join = Join(num_samples=100, batch_size=1, longest=1)
    check_newcomer(member(join, noise_delta=0.0099, **noise), LIMITS)
    check_newcomer(member(join, noise_delta=0.5), LIMITS)  # there is no noise
    why = "delta is 0.01, and with 100 samples it must be below 0.01, .* start the run with a smaller --noise-delta"
    with pytest.raises(RemoteProtocolError, match=why):
        check_newcomer(member(join, noise_delta=0.01, **noise), LIMITS)


HIDDEN = HiddenStates(step=3, values=np.zeros((2, 4), np.float32))


def hidden_gradient(rows: int = 2, width: int = 4, value: float = 0.0, **changes: Any) -> HiddenGradient:
    reply: dict[str, Any] = {"step": 3, "seconds": Seconds(), "summed_loss": 1.5, "labelled_tokens": rows}
    return HiddenGradient(**{**reply, **changes}, values=np.full((rows, width), value, np.float32))


@pytest.mark.parametrize(
    "gradient",
    [
        hidden_gradient(value=LARGEST_VALUE),
        hidden_gradient(summed_loss=-LARGEST_VALUE, labelled_tokens=0),
        hidden_gradient(summed_loss=2 * LARGEST_VALUE),
    ],
)
def test_gradient_at_the_hidden_states_may_be_as_large_as_is_allowed(gradient: HiddenGradient) -> None:
    check_hidden_gradient("a", gradient, HIDDEN)


@pytest.mark.parametrize(
    ("gradient", "why"),
    [
        (hidden_gradient(rows=1), r"the gradient at hidden states \[2, 4\] is \[1, 4\]"),
        (hidden_gradient(width=5), r"the gradient at hidden states \[2, 4\] is \[2, 5\]"),
        (
            hidden_gradient(value=-2 * LARGEST_VALUE),
            r"a sent a gradient at the hidden states of step 3 with values up to 2e\+06; beyond 1e\+06 training has diverged",
        ),
        (hidden_gradient(summed_loss=2.1 * LARGEST_VALUE), r"the loss of 2 tokens is 2\.1e\+06; it may be up to 2e\+06"),
        (hidden_gradient(summed_loss=-2.1 * LARGEST_VALUE), r"the loss of 2 tokens is -2\.1e\+06; it may be up to 2e\+06"),
        (
            hidden_gradient(labelled_tokens=0, summed_loss=1.1 * LARGEST_VALUE),
            r"the loss of 0 tokens is 1\.1e\+06; it may be up to 1e\+06",
        ),
    ],
)
def test_gradient_at_the_hidden_states_is_of_what_was_asked(gradient: HiddenGradient, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        check_hidden_gradient("a", gradient, HIDDEN)


def test_codecs_that_are_missing_are_told_in_one_order() -> None:
    with pytest.raises(RemoteProtocolError, match=r"^a does not offer the codec a1, b2, c3, d4, e5, which this run uses"):
        check_hello(Hello(name="a", fingerprint=LIMITS.fingerprint), LIMITS, {"e5", "c3", "a1", "d4", "b2"}, set())
