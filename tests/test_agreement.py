"""What both sides hold each other to once a run's settings are known, and what a conversation leaves in the log."""

import logging
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
    Message,
    RemoteProtocolError,
    RunSettings,
    Session,
    Side,
    Start,
    Welcome,
    encode,
)

EXACTLY = replace(SETTINGS, activation_codec=EXACT, gradient_codec=EXACT, check_codec_every=0)
OFFERED = ("bfloat16", "int8", "int4", DELTA)


class Talk:
    """Both ends of a conversation; what one says is encoded, and heard by the other."""

    def __init__(self, settings: RunSettings = EXACTLY) -> None:
        self.ends = {side: Session(side, max_bytes=2**20) for side in Side}
        self.say(Side.CLIENT, Hello(name="a", fingerprint="f", codecs=OFFERED))
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


STEPPED = ["Activations", "ActivationGradient", "AdapterGradient", "AdapterWeights", "EdgeAdapter", "Done"]


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
