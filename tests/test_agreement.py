"""What both sides hold each other to once a run's settings are known, and what a conversation leaves in the log."""

import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from protocol_samples import SAMPLES, SETTINGS

from protocol import (
    DELTA,
    EXACT,
    Activations,
    AdapterGradient,
    EdgeAdapter,
    Hello,
    Join,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    RunSettings,
    Session,
    Side,
    Start,
    Welcome,
    encode,
)
from protocol.agreement import changed_settings
from protocol.settings import ABILITIES

EXACTLY = replace(SETTINGS, activation_codec=EXACT, gradient_codec=EXACT, check_codec_every=0)
OFFERED = ("bfloat16", "int8", "coarse", DELTA)


class Talk:
    """Both ends of a conversation; what one says is encoded, and heard by the other."""

    def __init__(self, settings: RunSettings = EXACTLY) -> None:
        self.ends = {side: Session(side, max_bytes=2**20) for side in Side}
        self.say(Side.CLIENT, Hello(name="a", fingerprint="f", codecs=OFFERED, abilities=ABILITIES))
        self.say(Side.SERVER, Welcome(run="r", settings=settings, fingerprint="f"))
        self.say(Side.CLIENT, Join(num_samples=1, batch_size=1, longest=9))

    def say(self, side: Side, message: Message) -> None:
        assert self.ends[side.peer].receive(self.ends[side].send(message)) is not None

    def started(self) -> "Talk":
        self.say(Side.SERVER, Start(step=0, total_steps=100, adapter={}))
        return self

    def refusal(self, side: Side, message: Message) -> str:
        """Of a message that one side says without asking its own session."""
        with pytest.raises(RemoteProtocolError) as caught:
            self.ends[side.peer].receive(encode(message))
        return str(caught.value)


def activations(**fields: Any) -> Any:
    return replace(SAMPLES["Activations"], **{"micro_batch": 0, "samples": None, "exact": None, **fields})


def gradient(**fields: Any) -> Any:
    values = SAMPLES["Activations"].values  # type: ignore[union-attr]
    return replace(SAMPLES["ActivationGradient"], **{"micro_batch": 0, "codec": "", "values": values, **fields})


def test_a_micro_batch_beyond_those_of_the_run_is_named() -> None:
    expected = "of micro-batch 2 of step 1; this run's are numbered from 0 to 1"
    assert Talk().started().refusal(Side.CLIENT, activations(micro_batch=2)) == f"Activations {expected}"
    talk = Talk().started()
    talk.say(Side.CLIENT, activations())
    assert talk.refusal(Side.SERVER, gradient(micro_batch=2)) == f"ActivationGradient {expected}"


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_floats_of_another_precision_than_the_runs_are_refused_by_both_sides(precision: str) -> None:
    settings, other = replace(EXACTLY, precision=precision), {"float32": "float64", "float64": "float32"}[precision]
    matrices = {"m": np.zeros((1, 1), other)}
    reason = f"is {other}; this run is in {precision}"
    assert (
        Talk(settings).refusal(Side.SERVER, Start(step=0, total_steps=100, adapter=matrices)) == f"Start.adapter['m'] {reason}"
    )
    values = np.zeros((3, 2), other)
    assert Talk(settings).started().refusal(Side.CLIENT, activations(values=values)) == f"Activations.values {reason}"
    contribution = AdapterGradient(step=1, seconds=SAMPLES["Activations"].seconds, tensors=matrices)  # type: ignore[union-attr]
    assert Talk(settings).started().refusal(Side.CLIENT, contribution) == f"AdapterGradient.tensors['m'] {reason}"
    talk = Talk(settings).started()
    talk.say(Side.CLIENT, activations(values=np.zeros((3, 2), precision)))
    assert talk.refusal(Side.SERVER, gradient(values=values)) == f"ActivationGradient.values {reason}"


def test_a_run_that_began_exact_gets_no_codec_in_mid_run() -> None:
    start = Start(step=0, total_steps=100, adapter={}, codec="int8")
    for precision in ("float32", "float64"):
        reason = Talk(replace(EXACTLY, precision=precision)).refusal(Side.SERVER, start)
        assert reason == "the server chose the codec int8 in a run that began exact and stays so"


def test_a_run_that_did_not_begin_with_delta_does_not_come_to_it() -> None:
    talk = Talk(SETTINGS).started()
    talk.say(Side.CLIENT, activations())
    reason = "the server chose the codec delta in a run that did not begin with it"
    assert talk.refusal(Side.SERVER, gradient(codec=DELTA)) == reason
    assert Talk(SETTINGS).refusal(Side.SERVER, Start(step=0, total_steps=100, adapter={}, codec=DELTA)) == reason


@pytest.mark.parametrize(("step", "round", "total"), [(0, 0, 99), (0, 0, 2**31), (101, 0, 100), (0, 101, 100), (0, 0, 0)])
def test_a_start_beyond_the_end_of_the_run_or_before_the_clients_own_is_refused(step: int, round: int, total: int) -> None:
    """A rate that falls linearly would be negative behind the run's last step."""
    talk = Talk(EXACTLY)  # of 100 steps
    assert f"in a run of {total} steps" in talk.refusal(
        Side.SERVER, Start(step=step, round=round, total_steps=total, adapter={})
    )


# Where the labels are

ON_DEVICE = replace(EXACTLY, labels="device")
HIDDEN = replace(ON_DEVICE, label_rows="hidden", gradient_noise=1.0, gradient_clip=0.5)
NONE = np.empty(0, np.int32)


def held_out(**fields: Any) -> Any:
    return replace(SAMPLES["Evaluation"], **fields)


def owned(talk: Talk, side: Side, message: Message) -> str:
    """What a side says of a message that it is to send itself."""
    with pytest.raises(LocalProtocolError) as caught:
        talk.ends[side].send(message)
    return str(caught.value)


@pytest.mark.parametrize("batch", [activations(), held_out()], ids=["Activations", "Evaluation"])
def test_labels_are_with_the_batch_where_the_server_has_them_and_nowhere_else(batch: Any) -> None:
    kind = type(batch).__name__
    reason = f"{kind} with 1 labels, expected 0: in this run the device has the labels"
    assert Talk(ON_DEVICE).started().refusal(Side.CLIENT, batch) == reason
    assert owned(Talk(ON_DEVICE).started(), Side.CLIENT, batch) == reason
    without = replace(batch, labels=NONE)
    reason = f"{kind} with 0 labels, expected 1: in this run the server has the labels"
    assert Talk().started().refusal(Side.CLIENT, without) == reason
    assert owned(Talk().started(), Side.CLIENT, without) == reason
    Talk(ON_DEVICE).started().say(Side.CLIENT, without)
    Talk().started().say(Side.CLIENT, batch)


def test_server_that_has_the_labels_does_not_ask_back() -> None:
    talk = Talk().started()
    talk.say(Side.CLIENT, activations())
    states: Any = replace(SAMPLES["HiddenStates"], micro_batch=0)  # type: ignore[type-var]
    reason = "HiddenStates, and in this run the server has the labels"
    assert owned(talk, Side.SERVER, states) == reason
    assert talk.refusal(Side.SERVER, states) == reason


@pytest.mark.parametrize(("settings", "answer"), [(EXACTLY, "EvaluationStates"), (ON_DEVICE, "EvaluationLoss")])
def test_held_out_texts_get_their_loss_from_whoever_has_their_labels(settings: RunSettings, answer: str) -> None:
    talk = Talk(settings).started()
    talk.say(Side.CLIENT, held_out(labels=NONE) if settings is ON_DEVICE else held_out())
    reason = f"{answer}, and in this run the {settings.labels} has the labels"
    assert owned(talk, Side.SERVER, SAMPLES[answer]) == reason
    assert talk.refusal(Side.SERVER, SAMPLES[answer]) == reason


@pytest.mark.parametrize("batch", [activations(labels=NONE), held_out(labels=NONE)], ids=["Activations", "Evaluation"])
def test_batch_does_not_say_which_rows_have_a_label_where_that_is_hidden(batch: Any) -> None:
    reason = f"{type(batch).__name__} says which rows have a label, and this run hides it"
    assert Talk(HIDDEN).started().refusal(Side.CLIENT, batch) == reason
    assert owned(Talk(HIDDEN).started(), Side.CLIENT, batch) == reason
    Talk(HIDDEN).started().say(Side.CLIENT, replace(batch, label_counts=batch.lengths))


@pytest.mark.parametrize(("settings", "counts", "labelled"), [(ON_DEVICE, [1, 1], 1), (HIDDEN, [2, 1], 0), (HIDDEN, [2, 1], 3)])
def test_all_rows_of_a_gradient_have_a_label_unless_that_is_hidden(
    settings: RunSettings, counts: list[int], labelled: int
) -> None:
    talk = Talk(settings).started()
    rows = np.ones((sum(counts), 2), np.float32)
    talk.say(Side.CLIENT, activations(labels=NONE, label_counts=np.array(counts, np.int32)))
    talk.say(Side.SERVER, replace(SAMPLES["HiddenStates"], micro_batch=0, values=rows))  # type: ignore[arg-type, type-var]
    gradient: Any = replace(
        SAMPLES["HiddenGradient"],  # type: ignore[type-var]
        micro_batch=0,
        values=rows,
        labelled_tokens=labelled,  # type: ignore[arg-type]
    )
    if settings is HIDDEN:
        talk.say(Side.CLIENT, gradient)
    else:
        assert talk.refusal(Side.CLIENT, gradient) == "HiddenGradient of 2 rows and 1 labelled tokens, expected as many"


@pytest.mark.parametrize("labelled", [2, -1])
def test_labelled_tokens_are_as_many_as_rows_at_most(labelled: int) -> None:
    with pytest.raises(ValueError, match=f"{labelled} labelled tokens, and a gradient of 1 rows"):
        replace(SAMPLES["HiddenGradient"], labelled_tokens=labelled)  # type: ignore[call-arg, type-var]


@pytest.mark.parametrize(
    ("settings", "offered", "missing"),
    [
        (ON_DEVICE, (), "device-labels"),
        (HIDDEN, (), "device-labels, noise"),
        (HIDDEN, ("device-labels", "later"), "noise"),
        (replace(EXACTLY, activation_clip=1.0), ("device-labels",), "noise"),
        (replace(EXACTLY, lr_schedule="cosine"), ("device-labels", "noise"), "schedules"),
        (replace(EXACTLY, warmup_steps=0, warmup_ratio=0.1), (), "schedules"),
    ],
)
def test_client_leaves_a_run_that_needs_what_it_cannot(settings: RunSettings, offered: tuple[str, ...], missing: str) -> None:
    client = Session(Side.CLIENT)
    client.send(Hello(name="a", fingerprint="f", abilities=offered))
    with pytest.raises(RemoteProtocolError, match=f"^this run needs {missing}, which this side did not offer$"):
        client.receive(encode(Welcome(run="r", settings=settings, fingerprint="f")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": "client"}, "labels must be server or device, got 'client'"),
        (
            {"max_grad_norm": 1.0, "aggregate_every": 5},
            "max_grad_norm 1 needs aggregate_every 1: it is the norm of both parts'",
        ),
        ({"label_rows": "secret"}, "label_rows must be shown or hidden, got 'secret'"),
        ({"activation_noise": 0.5}, "activation_noise 0.5 is a multiple of activation_clip, which is not given"),
        ({"labels": "device", "gradient_noise": 0.5}, "gradient_noise 0.5 is a multiple of gradient_clip, which is not given"),
        ({"gradient_clip": 0.5}, "gradient_clip needs labels device"),
        ({"gradient_noise": 0.5, "gradient_clip": 0.5}, "gradient_noise needs labels device"),
        ({"label_rows": "hidden"}, "label_rows hidden needs labels device"),
        ({"label_rows": "hidden", "labels": "device"}, "label_rows hidden needs gradient_noise"),
        ({"label_rows": "hidden", "labels": "device", "gradient_clip": 0.5}, "label_rows hidden needs gradient_noise"),
        ({"labels": "device", "check_codec_every": 1}, "check_codec_every must be 0 where labels stay on the device, got 1"),
        (
            {"activation_codec": DELTA, "activation_noise": 0.5, "activation_clip": 1.0},
            "activation_noise 0.5 does not go with codec delta",
        ),
        (
            {"activation_noise": 2000.0, "activation_clip": 100.0},
            "activation_noise 2000 times activation_clip 100 is more than 100000: training would seem to diverge",
        ),
        ({"noise_delta": 0.0}, "noise_delta must be 1e-30 to 0.999, got 0.0"),
        ({"noise_delta": 1.0}, "noise_delta must be 1e-30 to 0.999, got 1.0"),
    ],
)
def test_settings_of_labels_and_noise_that_cannot_be_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        replace(EXACTLY, **changes)


@pytest.mark.parametrize(
    "changes", [{"labels": "device"}, {"activation_clip": 2.0}, {"activation_clip": 1.0, "activation_noise": 0.5}]
)
def test_run_that_is_welcomed_again_has_its_labels_where_they_were_and_its_noise(changes: dict[str, Any]) -> None:
    before = replace(EXACTLY, activation_clip=1.0, activation_noise=1.0, lr_schedule="constant")
    name, value = list(changes.items())[-1]
    found = changed_settings(before, replace(before, steps=200, **changes), restarted=True)
    assert f"{name} {getattr(before, name)} is now {value}" in found


STEPPED = [
    "Activations",
    "HiddenStates",
    "HiddenGradient",
    "ActivationGradient",
    "AdapterGradient",
    "AdapterWeights",
    "EdgeAdapter",
    "Done",
]


@pytest.mark.parametrize("kind", STEPPED)
def test_a_step_numbered_0_is_refused_whoever_sends_it(kind: str) -> None:
    with pytest.raises(ValueError, match="steps are numbered from 1, got 0"):
        replace(SAMPLES[kind], step=0)  # type: ignore[type-var]
    message: Any = SAMPLES[kind]
    object.__setattr__(message := replace(message), "step", 0)
    with pytest.raises(RemoteProtocolError, match=f"{kind}: steps are numbered from 1, got 0"):
        Session(Side.SERVER).receive(encode(message))


# What is ignored


def test_a_message_that_is_ignored_leaves_a_line_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "protocol")
    talk = Talk().started()
    client, server = talk.ends[Side.CLIENT], talk.ends[Side.SERVER]
    first, late = (client.send(activations(micro_batch=part)) for part in (0, 1))
    server.receive(first)
    assert server.receive(first) is None
    start = server.send(Start(step=1, total_steps=100, adapter={}))
    client.receive(start)
    assert client.receive(start) is None
    assert server.receive(late) is None
    assert [record.getMessage() for record in caplog.records] == [
        "server (a): ignored Activations 1, micro-batch 0: it was delivered twice",
        "client (a): ignored Start 1, micro-batch 0: it was delivered twice",
        "server (a): ignored Activations 1, micro-batch 1: Start after step 1 has answered it already",
    ]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert isinstance(server.receive(client.send(activations(step=2))), Activations)


def test_question_of_a_step_that_its_client_knows_to_be_behind_is_refused() -> None:
    """It would never be answered."""
    talk = Talk(replace(EXACTLY, micro_batches=3)).started()
    client, server = talk.ends[Side.CLIENT], talk.ends[Side.SERVER]
    talk.say(Side.CLIENT, activations())
    client.receive(server.send(Start(step=1, total_steps=100, adapter={})))
    talk.say(Side.CLIENT, activations(step=2))
    with pytest.raises(RemoteProtocolError, match="Activations of step 1 after a Start that goes on after 1"):
        server.receive(encode(activations(micro_batch=1)))


def test_a_checkpoint_is_not_later_than_the_adapter_that_tells_of_it() -> None:
    talk = Talk().started()
    seconds = SAMPLES["Activations"].seconds  # type: ignore[union-attr]
    talk.say(Side.CLIENT, AdapterGradient(step=1, seconds=seconds, tensors={}))
    reason = talk.refusal(Side.SERVER, EdgeAdapter(step=4, tensors={}, checkpoint=5))
    assert reason == "EdgeAdapter of step 4 with a later checkpoint, 5"
