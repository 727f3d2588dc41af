"""How a device comes back: when it tries, when it stops trying, and what it says then. No socket, no clock but the test's."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol_samples import SETTINGS

from edge_client.connection import ConnectionFailed, Refused
from edge_client.membership import Membership, Redirected
from edge_client.reconnector import Backoff
from protocol import (
    ActivationGradient,
    Activations,
    AskPiece,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Piece,
    Ping,
    Pong,
    RemoteProtocolError,
    Seconds,
    Session,
    Side,
    Start,
    Welcome,
)
from storage import CacheFolder

TENSORS = {"m": np.zeros((2, 2), np.float32)}
VALUES = np.zeros((2, 4), np.float32)
HELLO = Hello(name="a", fingerprint="f")
JOIN = Join(num_samples=4, batch_size=1, longest=2)
Reply = Message | Exception | Callable[[], Message]


def welcome(**fields: Any) -> Welcome:
    return Welcome(**{"run": "r", "settings": SETTINGS, "fingerprint": "f", **fields})


def start(step: int = 0, round: int | None = None) -> Start:
    return Start(step=step, total_steps=9, adapter=TENSORS, round=step if round is None else round)


def activations(step: int, micro_batch: int = 0) -> Activations:
    counts = np.array([2], np.int32)
    return Activations(
        step=step,
        micro_batch=micro_batch,
        seconds=Seconds(),
        lengths=counts,
        label_counts=counts,
        labels=np.array([1, 1], np.int32),
        values=VALUES,
    )


def gradient(step: int, micro_batch: int = 0) -> ActivationGradient:
    return ActivationGradient(step=step, micro_batch=micro_batch, loss=1.0, labelled_tokens=2, values=VALUES)


LOST = ConnectionFailed("lost")


class FakeConnection:
    """Answers from a list; an exception in it is raised, a function in it is called."""

    url = "ws://here"

    def __init__(self, replies: list[Reply]) -> None:
        self.session = Session(Side.CLIENT)
        self.num_bytes = 0
        self.asked: list[Message] = []
        self.abandoned = self.closed = False
        self._replies = replies

    def expect(self, size: int) -> None:
        pass

    def exchange(self, message: Message, *kinds: type) -> Message:
        self.ask(message)
        return self.answer(*kinds)

    def ask(self, message: Message) -> None:
        self.asked.append(message)
        self.num_bytes += 1

    def answer(self, *_: type) -> Message:
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply() if callable(reply) else reply

    def watch_link(self, *_: object, **__: int) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned = True

    def close(self) -> None:
        self.closed = True


class World:
    """Connections to be had, in this order; an exception is a dial that fails. Time passes when somebody sleeps."""

    def __init__(self, *connections: list[Reply] | Exception) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.made: list[FakeConnection] = []
        self._connections = list(connections)

    def dial(self) -> Any:
        # A world without connections left stays so.
        replies = self._connections.pop(0) if self._connections else ConnectionFailed("nobody")
        if isinstance(replies, Exception):
            raise replies
        self.made.append(FakeConnection(replies))
        return self.made[-1]

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def member(self, **options: Any) -> Membership:
        return Membership(self.dial, HELLO, sleep=self.sleep, clock=lambda: self.now, **options)


MakeWorld = Callable[..., World]


@pytest.fixture
def world() -> MakeWorld:
    return World


def test_waits_are_at_most_an_eighth_of_the_time_away_and_half_a_minute_and_never_twice_the_same(world: MakeWorld) -> None:
    here = world(LOST, *[LOST] * 200, [welcome()])
    here.member(server_may_be_away=True)
    assert len(here.slept) == 201
    away = 0.0
    for wait in here.slept:
        assert 0.05 <= wait <= min(30.0, max(0.1, away / 8))
        away += wait
    assert len(set(here.slept)) == len(here.slept)
    assert max(here.slept) > 25
    assert sum(sum(here.slept[: number + 1]) < 10 for number in range(200)) < 60  # attempts of the first ten seconds


@pytest.mark.parametrize("devices", [100, 1000, 10_000])
def test_devices_that_lose_their_server_together_do_not_come_back_together(devices: int) -> None:
    """In no second it is asked for more connections than it has time for."""
    attempts: list[float] = []
    for number in range(devices):
        backoff, away = Backoff(f"device-{number}"), 0.0
        backoff.num_devices = devices
        while away < 20.0:
            away += backoff.next_wait(away)
            attempts.append(away)
    for second in range(20):
        assert sum(second <= moment < second + 1 for moment in attempts) < 300


def test_devices_that_are_to_come_again_at_a_time_come_one_after_the_other(world: MakeWorld, monkeypatch: Any) -> None:
    waits = []
    for number in range(100):
        monkeypatch.setattr(f"{__name__}.HELLO", Hello(name=f"device-{number}", fingerprint="f"))
        many = welcome(settings=replace(SETTINGS, clients=1000))
        here = world(ConnectionFailed("busy", retry_after=10.0), [many])
        here.member(server_may_be_away=True, before=many)
        waits += here.slept
    assert all(10.0 < wait <= 20.0 for wait in waits)
    for second in range(10, 20):
        assert sum(second <= wait < second + 1 for wait in waits) < 25


def test_device_among_many_tries_before_it_gives_up(world: MakeWorld) -> None:
    many = welcome(settings=replace(SETTINGS, clients=100_000))
    here = world()
    with pytest.raises(ConnectionFailed, match="gave up after 60 s"):
        here.member(server_may_be_away=True, before=many, give_up_after=60.0)
    assert len(here.slept) >= 3


def test_device_that_comes_back_to_its_run_knows_how_many_do(world: MakeWorld) -> None:
    """Also before the server has said it again; and as many as the run had is what the server says."""
    many = welcome(settings=replace(SETTINGS, clients=1000))
    here = world(*[LOST] * 10, [many, start(), LOST], *[LOST] * 10, [many, start(), gradient(1)])
    member = here.member(server_may_be_away=True, before=many)
    assert max(here.slept) > 5
    here.slept.clear()
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    assert max(here.slept) > 5


def test_devices_that_lost_the_same_server_come_back_at_different_times(world: MakeWorld, monkeypatch: Any) -> None:
    waits = []
    for name in ("a", "b"):
        monkeypatch.setattr(f"{__name__}.HELLO", Hello(name=name, fingerprint="f"))
        here = world(LOST, *[LOST] * 5, [welcome()])
        here.member(server_may_be_away=True)
        waits.append(here.slept[1:])
    assert not set(waits[0]) & set(waits[1])


def test_address_where_nobody_answers_at_first_is_an_error(world: MakeWorld) -> None:
    here = world(LOST, [welcome()])
    with pytest.raises(ConnectionFailed, match="lost"):
        here.member()
    assert here.slept == []


def test_link_that_is_lost_before_the_welcome_is_opened_again(world: MakeWorld) -> None:
    here = world([LOST], [welcome()])
    assert here.member().welcome.run == "r"
    assert here.made[0].abandoned


def test_it_gives_up_when_it_was_told_to_and_not_before(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST])
    member = here.member(give_up_after=100.0)
    member.start(JOIN)
    with pytest.raises(ConnectionFailed, match="gave up after 100 s"):
        member.exchange(activations(1), ActivationGradient)
    assert 70 <= here.now <= 100
    assert sum(here.slept) == pytest.approx(here.now)  # since 3.12 sum() rounds less


def test_question_is_asked_again_on_the_next_connection(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], LOST, [welcome(), start(), gradient(1)])
    member = here.member()
    member.start(JOIN)
    assert member.exchange(activations(1), ActivationGradient).step == 1
    assert [type(message) for message in here.made[1].asked] == [Hello, Join, Activations]


def test_it_says_at_which_step_it_stands(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(3), gradient(4)])
    member = here.member()
    member.start(JOIN)
    member.position.step, member.position.round = 3, 3
    member.exchange(activations(4), ActivationGradient)
    joined = [message.step for connection in here.made for message in connection.asked if isinstance(message, Join)]
    assert joined == [0, 3]


def test_it_says_which_versions_of_samples_it_has(world: MakeWorld, tmp_path: Path) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(), gradient(1)])
    member = here.member()
    cache = CacheFolder(tmp_path / "samples", 10**6)
    member.start(JOIN, activation_cache=cache)
    cache.store(4, 0, {0: (0, np.zeros((2, 3), np.uint16))})
    cache.confirm(4, 0)
    member.exchange(activations(1), ActivationGradient)
    joined = [message.kept for connection in here.made for message in connection.asked if isinstance(message, Join)]
    assert joined == [0, 4]


@pytest.mark.parametrize("moved", [start(5), start(0, round=2)])
def test_run_that_has_gone_on_tells_the_device_where_to(world: MakeWorld, moved: Start) -> None:
    here = world([welcome(), start(), LOST], [welcome(), moved])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected) as caught:
        member.exchange(activations(1), ActivationGradient)
    assert caught.value.start is moved


def test_server_that_was_started_again_moves_the_device_even_to_where_it_stands(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(restarts=1), start()])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected):
        member.exchange(activations(1), ActivationGradient)


def evaluation(index: int) -> Evaluation:
    batch = {name: getattr(activations(1), name) for name in ("lengths", "label_counts", "labels", "values")}
    return Evaluation(index=index, **batch)


LOSS = EvaluationLoss(index=1, summed_loss=1.0)


def test_device_that_came_back_within_an_evaluation_goes_on_where_it_stood(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(), LOSS, gradient(1)])
    member = here.member()
    member.start(JOIN)
    member.exchange(evaluation(1), EvaluationLoss)
    assert member.exchange(activations(1), ActivationGradient).step == 1


def test_run_that_went_on_during_an_evaluation_moves_the_device_at_its_next_step(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(1, round=0), LOSS])
    member = here.member()
    member.start(JOIN)
    member.exchange(evaluation(1), EvaluationLoss)
    with pytest.raises(Redirected, match="go on after step 1"):
        member.exchange(activations(1), ActivationGradient)
    assert not any(isinstance(message, Activations) for message in here.made[1].asked)


def test_going_back_during_an_evaluation_is_not_forgotten_when_the_link_is_lost_again(world: MakeWorld) -> None:
    back = welcome(restarts=1)
    here = world([welcome(), start(), LOST], [back, start(), LOST], [back, start(), LOSS])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected):
        member.exchange(evaluation(1), EvaluationLoss)
    member.exchange(evaluation(2), EvaluationLoss)
    with pytest.raises(Redirected):
        member.exchange(activations(1), ActivationGradient)


def test_start_instead_of_an_answer_moves_the_device(world: MakeWorld) -> None:
    here = world([welcome(), start(), start(7)])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected, match="go on after step 7"):
        member.exchange(activations(1), ActivationGradient)


def test_another_run_at_the_address_is_not_entered(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(run="other")])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Refused, match="has another run now: other instead of r"):
        member.exchange(activations(1), ActivationGradient)


def test_refusal_ends_it_and_one_that_names_a_time_does_not(world: MakeWorld) -> None:
    busy, never = ConnectionFailed("the name a is in use", retry_after=40.0), Refused("revoked")
    here = world([welcome(), start(), LOST], [busy], [welcome(), start(), gradient(1), LOST], [never])
    member = here.member()
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    assert 40.0 < here.slept[1] < 41.0
    with pytest.raises(Refused, match="revoked"):
        member.exchange(activations(2), ActivationGradient)


@pytest.mark.parametrize("refused", ["hello", "join"])
def test_server_that_names_a_time_is_asked_again_then_from_the_beginning_on(world: MakeWorld, refused: str) -> None:
    late = ConnectionFailed("no message came within 10 s", retry_after=10.0)
    here = world([late] if refused == "hello" else [welcome(), late], [welcome(), start(3)])
    assert here.member().start(JOIN).step == 3
    assert 10.0 < here.slept[0] < 11.0
    assert len(here.slept) == 1


def test_address_that_says_it_is_busy_is_not_taken_for_wrong(world: MakeWorld) -> None:
    here = world(ConnectionFailed("has no time now (HTTP 503)", retry_after=7.0), [welcome()])
    assert here.member().welcome.run == "r"
    assert 7.0 < here.slept[0] < 8.0


def test_it_gives_up_without_waiting_longer_than_it_may(world: MakeWorld) -> None:
    busy = ConnectionFailed("busy", retry_after=3600.0)
    here = world([welcome(), start(), LOST], [busy])
    member = here.member(give_up_after=3.0)
    member.start(JOIN)
    with pytest.raises(ConnectionFailed, match=r"busy \(and wants to be asked again in 3600 s\); gave up after 3 s"):
        member.exchange(activations(1), ActivationGradient)
    assert here.now < 3.0


def test_server_that_welcomes_and_is_gone_is_asked_ever_more_seldom(world: MakeWorld) -> None:
    here = world(
        [welcome(), start(), LOST], *([welcome(), start(), LOST] for _ in range(200)), [welcome(), start(), gradient(1)]
    )
    member = here.member()
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    assert max(here.slept) > 25
    assert sum(here.slept[100:]) / len(here.slept[100:]) > 10


def test_answer_lets_the_waits_begin_anew(world: MakeWorld) -> None:
    going = [reply for _ in range(4) for reply in ([welcome(), start(), gradient(1), LOST], LOST, LOST, LOST)]
    here = world(*going, [welcome(), start(), gradient(1)])
    member = here.member()
    member.start(JOIN)
    for _ in range(5):
        member.exchange(activations(1), ActivationGradient)
    assert all(wait <= 0.1 for wait in here.slept[::4])


def test_server_that_welcomes_and_is_gone_is_given_up_in_the_end(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], *([welcome(), start(), LOST] for _ in range(200)))
    member = here.member(give_up_after=100.0)
    member.start(JOIN)
    with pytest.raises(ConnectionFailed, match="gave up after 100 s"):
        member.exchange(activations(1), ActivationGradient)
    assert 70 <= here.now <= 100


def test_time_with_a_connection_is_not_counted_as_time_without(world: MakeWorld) -> None:
    """The others may be long in coming."""

    def lost_after_a_long_wait() -> Message:
        here.now += 1000.0
        raise LOST

    here = world([welcome(), start(), LOST], [welcome(), lost_after_a_long_wait], [welcome(), start(), gradient(1)])
    member = here.member(give_up_after=100.0)
    member.start(JOIN)
    assert member.exchange(activations(1), ActivationGradient).step == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": replace(SETTINGS, lr=0.5, micro_batches=3)}, "micro_batches 2 is now 3, lr 0.0002 is now 0.5"),
        ({"restarts": 1}, "restarts 2 is now 1"),
    ],
)
def test_same_run_has_the_same_settings(world: MakeWorld, changed: dict[str, Any], said: str) -> None:
    here = world([welcome(restarts=2), start(), LOST], [welcome(**{"restarts": 2, **changed})])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(RemoteProtocolError) as caught:
        member.exchange(activations(1), ActivationGradient)
    assert f"run r has other settings than before ({said}); the same run has the same settings" in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "steps", "restarts", "is_allowed"),
    [("constant", 200, 1, True), ("constant", 200, 0, False), ("constant", 50, 1, False), ("linear", 200, 1, False)],
)
def test_run_may_be_longer_after_a_restart_where_its_rate_is_constant(
    world: MakeWorld, schedule: str, steps: int, restarts: int, is_allowed: bool
) -> None:
    before = replace(SETTINGS, lr_schedule=schedule)
    back = welcome(settings=replace(before, steps=steps), restarts=restarts)
    here = world([welcome(settings=before), start(), LOST], [back, start(3)])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected if is_allowed else RemoteProtocolError):
        member.exchange(activations(1), ActivationGradient)
    assert member.welcome.settings.steps == (steps if is_allowed else 100)


def test_an_outage_is_told_of_at_growing_distances(world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "edge_client")
    here = world([welcome(), start(), LOST], *[LOST] * 400, [welcome(), start(), gradient(1)])
    member = here.member()
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    lines = [record.getMessage() for record in caplog.records]
    assert here.now > 3600
    assert 6 <= len(lines) <= 12
    assert all("tries until there is a connection, next in" in line for line in lines[:-1])
    assert lines[-1] == "connected again; the run goes on after step 0, this device had finished step 0"


def test_it_remembers_what_the_server_may_go_back_to(world: MakeWorld) -> None:
    answers = [EdgeAdapter(step=step, tensors=TENSORS, checkpoint=checkpoint) for step, checkpoint in ((2, 1), (4, 3), (6, 2))]
    here = world([welcome(), start(), *answers])
    member = here.member()
    member.start(JOIN)
    found = []
    for _ in answers:
        member.exchange(activations(1), EdgeAdapter)
        found.append((member.position.round, member.position.checkpoint))
    assert found == [(2, 1), (4, 3), (6, 3)]


def test_bytes_of_lost_connections_count(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(), gradient(1)])
    member = here.member()
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    assert member.num_bytes == 6


def test_whoever_cannot_enter_leaves_no_connection_open(world: MakeWorld) -> None:
    here = world([Refused("no place")])
    with pytest.raises(Refused):
        here.member()
    assert here.made[0].abandoned


# Several questions under way


def test_next_question_is_made_while_the_ones_before_are_under_way(world: MakeWorld) -> None:
    here = world([welcome(), start(), gradient(1), gradient(1, 1), gradient(1, 2)])
    member = here.member()
    member.start(JOIN)
    log: list[str] = []

    def questions() -> Any:
        for number in range(3):
            log.append(f"ask {number}")
            yield activations(1, number)

    for _, answer in member.exchange_each(questions(), ActivationGradient, in_flight=2):
        log.append(f"answer {answer.micro_batch}")
    assert log == ["ask 0", "ask 1", "answer 0", "ask 2", "answer 1", "answer 2"]


def test_all_open_questions_are_asked_again_in_their_order(world: MakeWorld) -> None:
    here = world([welcome(), start(), LOST], [welcome(), start(), gradient(1), LOST], [welcome(), start(), gradient(1, 1)])
    member = here.member()
    member.start(JOIN)
    questions = [activations(1, number) for number in (0, 1)]
    pairs = list(member.exchange_each(questions, ActivationGradient, in_flight=2))
    assert [(asked.micro_batch, answer.micro_batch) for asked, answer in pairs] == [(0, 0), (1, 1)]
    assert [message for message in here.made[1].asked if isinstance(message, Activations)] == questions
    assert [message for message in here.made[2].asked if isinstance(message, Activations)] == questions[1:]


# A server that asks back


def states(step: int, micro_batch: int = 0) -> HiddenStates:
    return HiddenStates(step=step, micro_batch=micro_batch, values=VALUES)


def reply(asked: HiddenStates) -> HiddenGradient:
    return HiddenGradient(
        step=asked.step,
        micro_batch=asked.micro_batch,
        seconds=Seconds(),
        summed_loss=1.0,
        labelled_tokens=2,
        values=VALUES,
    )


def heard(member: Membership, questions: list[Activations], in_flight: int = 1) -> list[str]:
    """What a device hears that replies to everything, as the micro-batch of its own question and the kind."""
    log = []
    for question, answer in member.exchange_each(questions, ActivationGradient, in_flight):
        log.append(f"{question.micro_batch} {type(answer).__name__}")
        if isinstance(answer, HiddenStates):
            member.reply(reply(answer))
    return log


def said(here: World, connection: int) -> list[str]:
    """What the device has said on a connection since it joined."""
    return [f"{getattr(message, 'micro_batch', '')} {type(message).__name__}" for message in here.made[connection].asked[2:]]


def test_question_stays_open_while_the_server_asks_back(world: MakeWorld) -> None:
    here = world([welcome(), start(), states(1), states(1, 1), gradient(1), gradient(1, 1)])
    member = here.member()
    member.start(JOIN)
    assert heard(member, [activations(1), activations(1, 1)], in_flight=2) == [
        *["0 HiddenStates", "1 HiddenStates", "0 ActivationGradient", "1 ActivationGradient"]
    ]
    assert said(here, 0) == ["0 Activations", "1 Activations", "0 HiddenGradient", "1 HiddenGradient"]


def test_reply_that_was_lost_is_asked_back_again(world: MakeWorld) -> None:
    here = world([welcome(), start(), states(1), LOST], [welcome(), start(), states(1), gradient(1)])
    member = here.member()
    member.start(JOIN)
    assert heard(member, [activations(1)]) == ["0 HiddenStates", "0 HiddenStates", "0 ActivationGradient"]
    assert said(here, 1) == ["0 Activations", "0 HiddenGradient"]


def test_server_that_has_the_reply_answers_at_once_on_the_next_connection(world: MakeWorld) -> None:
    """It may still ask back about a later micro-batch, before or after."""
    here = world(
        [welcome(), start(), states(1), LOST],
        [welcome(), start(), states(1, 1), gradient(1), LOST],
        [welcome(), start(), gradient(1, 1)],
    )
    member = here.member()
    member.start(JOIN)
    assert heard(member, [activations(1), activations(1, 1)], in_flight=2) == [
        *["0 HiddenStates", "1 HiddenStates", "0 ActivationGradient", "1 ActivationGradient"]
    ]
    assert said(here, 2) == ["1 Activations"]


def test_reply_without_a_connection_is_not_sent(world: MakeWorld) -> None:
    here = world([welcome(), start(), states(1)], [welcome(), start(), states(1), gradient(1)])
    member = here.member()
    member.start(JOIN)
    pairs = member.exchange_each([activations(1)], ActivationGradient)
    next(pairs)
    member.hang_up()
    member.reply(reply(states(1)))
    assert [type(answer) for _, answer in pairs] == [HiddenStates, ActivationGradient]
    assert said(here, 0) == ["0 Activations"]


def test_run_may_go_on_while_a_device_computes_the_loss(world: MakeWorld) -> None:
    here = world([welcome(), start(), states(1), start(2)])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected, match="go on after step 2"):
        heard(member, [activations(1)])


def test_being_asked_back_is_no_progress(world: MakeWorld) -> None:
    """A link that always breaks with the reply is given up."""
    here = world([welcome(), start(), states(1), LOST], *([welcome(), start(), states(1), LOST] for _ in range(200)))
    member = here.member(give_up_after=100.0)
    member.start(JOIN)
    with pytest.raises(ConnectionFailed, match="gave up after 100 s"):
        heard(member, [activations(1)])


def test_server_that_asks_back_with_other_hidden_states_gets_no_second_gradient(world: MakeWorld) -> None:
    other = replace(states(1), values=VALUES + 1)
    here = world([welcome(), start(), states(1), LOST], [welcome(), start(), other])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(RemoteProtocolError, match="asks back about micro-batch 0 of step 1 with other hidden states"):
        heard(member, [activations(1)])
    assert said(here, 1) == ["0 Activations"]


def test_step_that_is_done_again_may_have_other_hidden_states(world: MakeWorld) -> None:
    """A server that was started again has another adapter."""
    again = [welcome(restarts=1), start(), replace(states(1), values=VALUES + 1), gradient(1)]
    here = world([welcome(), start(), states(1), LOST], again)
    member = here.member()
    member.start(JOIN)
    with pytest.raises(Redirected):
        heard(member, [activations(1)])
    assert heard(member, [activations(1)]) == ["0 HiddenStates", "0 ActivationGradient"]


def test_hidden_states_that_nobody_waits_for_are_an_error(world: MakeWorld) -> None:
    here = world([welcome(), start(), states(1, 1)])
    member = here.member()
    member.start(JOIN)
    with pytest.raises(RemoteProtocolError, match="micro-batch 1 of step 1, which this device waits for no more"):
        heard(member, [activations(1)])


def test_run_of_another_model_is_not_entered(world: MakeWorld) -> None:
    with pytest.raises(RemoteProtocolError, match="its run has another base model"):
        world([welcome(fingerprint="g")]).member()


def test_settings_are_those_that_a_killed_device_has_noted(world: MakeWorld) -> None:
    noted = welcome(settings=replace(SETTINGS, lora_rank=9))
    with pytest.raises(RemoteProtocolError, match=r"run r has other settings than before \(lora_rank 9 is now 2\)"):
        world([welcome()]).member(before=noted)
    assert world([welcome(run="next")]).member(before=noted).welcome.run == "next"


def test_steps_that_were_missed_are_said(world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    here = world([welcome(), start(), start(step=3), start(step=4), start(step=4)])
    member = here.member()
    member.start(JOIN)
    with caplog.at_level(logging.INFO, "edge_client"):
        for step in (1, 4, 5):
            with pytest.raises(Redirected):
                member.exchange(activations(step), ActivationGradient)
    assert [record.getMessage() for record in caplog.records] == [
        "the run has gone on without this device, which has missed steps 1 to 3",
        "the run has gone on without this device, which has missed step 4",
        "the server sends this device back: what it has sent of step 5 it sends again",
    ]


def test_device_that_leaves_without_a_connection_says_that_nobody_was_told(
    world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    here = world([welcome(), start()])
    member = here.member()
    member.start(JOIN)
    member.hang_up()
    member.close()
    assert "the server cannot be told that this device leaves" in caplog.text


def test_waiting_is_told_from_working(world: MakeWorld) -> None:
    here, waits = world([welcome(), start(), gradient(1)]), []

    class Noted:
        def __enter__(self) -> None:
            waits.append(type(here.made[0].asked[-1]).__name__)

        def __exit__(self, *_: object) -> None:
            waits.append("answered")

    member = here.member(while_waiting=Noted())
    member.start(JOIN)
    member.exchange(activations(1), ActivationGradient)
    assert waits[-2:] == ["Activations", "answered"]


# Before the run is joined


PONG = Pong(software="0.1.0", run="r", clients=1, joined=0, step=0, edge_weights="int8")
PIECES = [AskPiece(index=index, sha256="0" * 64, offset=index) for index in (1, 2)]


def piece(index: int) -> Piece:
    return Piece(index=index, data=b"x")


def test_what_is_asked_before_the_run_is_joined_is_asked_again_without_joining(world: MakeWorld) -> None:
    here = world([PONG, welcome(), piece(1), LOST], LOST, [welcome(), piece(2)])
    member = here.member(wants_part=True)
    assert member.edge_weights == "int8"
    assert [member.ask(question, Piece).index for question in PIECES] == [1, 2]
    assert [[type(message) for message in connection.asked] for connection in here.made] == [
        [Ping, Hello, AskPiece, AskPiece],
        [Hello, AskPiece],
    ]


def test_link_that_is_lost_while_a_part_is_fetched_is_given_up_in_the_end(world: MakeWorld) -> None:
    here = world([PONG, welcome(), piece(1), LOST])
    member = here.member(wants_part=True, give_up_after=100.0)
    member.ask(PIECES[0], Piece)
    with pytest.raises(ConnectionFailed, match="gave up after 100 s"):
        member.ask(PIECES[1], Piece)


@pytest.mark.parametrize(
    ("now", "error", "reason"),
    [
        ({"run": "other"}, Refused, "has another run now: other instead of r"),
        ({"settings": replace(SETTINGS, seed=8)}, RemoteProtocolError, "seed 7 is now 8"),
    ],
)
def test_another_run_at_the_address_hands_over_nothing(
    world: MakeWorld, now: dict[str, Any], error: type[Exception], reason: str
) -> None:
    member = world([PONG, welcome(), LOST], [welcome(**now)]).member(wants_part=True)
    with pytest.raises(error, match=reason):
        member.ask(PIECES[0], Piece)
