"""The conversation: TRANSITIONS is the whole truth, and both sides are always at the same place in it."""

import itertools
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_samples import SAMPLES, make_due

from protocol import (
    HANDSHAKE_BYTES,
    PIECE_BYTES,
    TRANSITIONS,
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    AskPart,
    AskPiece,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    Failure,
    Goodbye,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    LocalProtocolError,
    Message,
    Part,
    Piece,
    Ping,
    Pong,
    RemoteProtocolError,
    RunEnd,
    Session,
    Side,
    Start,
    State,
    Welcome,
    decode,
    encode,
    identity,
)

KINDS = get_args(Message)
LAST_WORDS = {Goodbye, Failure}
BYTES = {kind: encode(SAMPLES[kind.__name__]) for kind in KINDS}

everywhere = pytest.mark.parametrize(
    ("state", "side"), [pytest.param(*place, id=f"{place[0].name}-{place[1].name}") for place in itertools.product(State, Side)]
)
some_hundred = settings(max_examples=100)


def session_in(state: State, side: Side, expected: type | None = None) -> Session:
    """One in which such a message, of the samples, is to come next if it may come at all."""
    session = Session(side)
    if expected is not None and state is State.AWAITING_GRADIENT:
        make_due(session, SAMPLES[expected.__name__])
    if (state, side) == (State.GREETED, Side.CLIENT):
        session.send(SAMPLES["Hello"])  # what it offers is what it may be told
    session.state = state
    return session


def numbered(kind: type, number: int) -> Any:
    """A message of another identity for every number, where the kind has any."""
    message: Any = SAMPLES[kind.__name__]
    names = [name for name in ("index", "step") if hasattr(message, name)]
    return replace(message, **{names[0]: number}) if names else message


def in_float32(message: Any) -> Any:
    """As the run of the samples has its floats."""
    if isinstance(message, ActivationGradient):
        return replace(message, values=message.values.astype(np.float32))
    if isinstance(message, EdgeAdapter):
        return replace(message, checkpoint=0)
    if isinstance(message, AdapterWeights):
        return replace(message, tensors={name: matrix.astype(np.float32) for name, matrix in message.tensors.items()})
    return message


class Pair:
    """Both ends of one conversation; what one says the other hears at once."""

    def __init__(self, most_open: int = 1024, labels: str = "server") -> None:
        self.ends = {side: Session(side) for side in Side}
        self.most_open, self.labels = most_open, labels
        self.heard: dict[Side, list[bytes]] = {side: [] for side in Side}
        self.numbers = itertools.count(1)
        self.resumed_at = 0
        """The step of the last `Start`."""
        self.said_last: type | None = None
        self.open: dict[int, type] = {}
        """The latest message about each micro-batch that is not answered, by its step: here each has a step of its own."""

    def say(self, side: Side, kind: type) -> None:
        message = self.message(kind)
        data = self.ends[side].send(message)
        heard: Any = self.ends[side.peer].receive(data)
        assert type(heard) is kind
        self.said_last = kind
        if kind is Start:
            self.resumed_at = heard.step
            self.open.clear()
        elif kind is ActivationGradient:
            del self.open[min(self.open)]
        elif kind in (Activations, HiddenStates, HiddenGradient):
            self.open[message.step] = kind
        self.heard[side.peer].append(data)

    def due(self, kind: type) -> list[int]:
        """Micro-batches of which hidden states, or the gradient there, may come."""
        before = Activations if kind is HiddenStates else HiddenStates
        return [step for step, latest in self.open.items() if latest is before]

    def may(self, side: Side, kind: type) -> bool:
        """What the table and its words in PROTOCOL.md allow."""
        if (self.state, side, kind) not in TRANSITIONS:
            return False
        if kind in (HiddenStates, HiddenGradient):
            return self.labels == "device" and bool(self.due(kind))
        if kind in (EvaluationStates, EvaluationLoss):
            return (kind is EvaluationStates) == (self.labels == "device")
        if kind is ActivationGradient:
            return self.open[min(self.open)] is not HiddenStates
        return kind is not Activations or len(self.open) < self.most_open

    def message(self, kind: type) -> Any:
        message = numbered(kind, next(self.numbers))
        if kind is Welcome:
            settings = replace(message.settings, micro_batches=self.most_open)
            if self.labels == "device":
                settings = replace(settings, labels="device", check_codec_every=0)
            return replace(message, settings=settings)
        if kind is Start:
            return replace(message, total_steps=10**6)
        if kind in (HiddenStates, HiddenGradient) and (due := self.due(kind)):
            return replace(message, step=due[message.step % len(due)])  # in any order
        if kind in (Activations, Evaluation) and self.labels == "device":
            return replace(message, labels=np.empty(0, np.int32))
        return in_float32(message)

    def say_something(self, choice: int) -> None:
        """One of the messages that may come next, last words aside."""
        rows = [(side, kind) for state, side, kind in TRANSITIONS if state is self.state and kind not in LAST_WORDS]
        legal = [row for row in rows if self.may(*row)]
        self.say(*legal[choice % len(legal)])

    def walk(self, *moves: tuple[Side, type]) -> "Pair":
        for side, kind in moves:
            self.say(side, kind)
        return self

    @property
    def state(self) -> State:
        states = {end.state for end in self.ends.values()}
        assert len(states) == 1
        return states.pop()


@everywhere
def test_only_what_the_table_allows_can_be_sent(state: State, side: Side) -> None:
    for kind in KINDS:
        session, message = session_in(state, side, kind), SAMPLES[kind.__name__]
        next_state = TRANSITIONS.get((state, side, kind))
        if kind is not ActivationGradient:  # which also has to be the one that comes first
            assert session.awaits(message) == (next_state is not None)
        if next_state is None:
            with pytest.raises(LocalProtocolError, match=f"{side.value} cannot send {kind.__name__} while {state.value}"):
                session.send(message)
            assert session.state is state
        else:
            assert session.send(message) == BYTES[kind]
            assert session.state is next_state


@everywhere
def test_only_what_the_table_allows_can_be_received(state: State, side: Side) -> None:
    for kind in KINDS:
        session = session_in(state, side.peer, kind)
        next_state = TRANSITIONS.get((state, side, kind))
        if next_state is None:
            with pytest.raises(RemoteProtocolError, match=f"{side.value} sent {kind.__name__} while {state.value}"):
                session.receive(BYTES[kind])
            assert session.state is (State.CLOSED if state is State.CLOSED else State.BROKEN)
        else:
            assert type(session.receive(BYTES[kind])) is kind
            assert session.state is next_state


def test_every_kind_of_message_has_one_sender() -> None:
    senders = {(kind, side) for _, side, kind in TRANSITIONS}
    assert sorted(kind.__name__ for kind, _ in senders) == sorted(kind.__name__ for kind in KINDS)


def test_it_is_the_turn_of_both_sides_only_while_micro_batches_are_under_way() -> None:
    turns = [state for state, _ in {(state, side) for state, side, kind in TRANSITIONS if kind not in LAST_WORDS}]
    assert {state for state in turns if turns.count(state) > 1} == {State.AWAITING_GRADIENT}


def test_every_state_is_reached_and_left() -> None:
    reached, waiting = {State.NEW}, [State.NEW]
    while waiting:
        state = waiting.pop()
        following = {after for (before, _, _), after in TRANSITIONS.items() if before is state} - reached
        reached |= following
        waiting += following
    assert reached == set(State) - {State.BROKEN}  # which no message leads to, but an illegal one
    assert {state for state, _, _ in TRANSITIONS} == set(State) - {State.CLOSED}


def test_whoever_is_broken_can_say_and_hear_only_last_words() -> None:
    assert {kind for state, _, kind in TRANSITIONS if state is State.BROKEN} == LAST_WORDS
    assert {after for (state, _, _), after in TRANSITIONS.items() if state is State.BROKEN} == {State.CLOSED}


@pytest.mark.parametrize("illegal", ["text", b"", b"junk", BYTES[Join], BYTES[Start]])
def test_after_an_illegal_message_the_server_can_only_refuse(illegal: bytes | str) -> None:
    server, client = Session(Side.SERVER), Session(Side.CLIENT)
    for _ in range(2):  # and it stays so
        with pytest.raises(RemoteProtocolError):
            server.receive(illegal)
        assert server.state is State.BROKEN
        with pytest.raises(RemoteProtocolError):
            server.receive(BYTES[Ping])
    client.receive(server.send(Failure(reason="junk")))
    assert (server.state, client.state) == (State.CLOSED, State.CLOSED)


def test_after_an_illegal_message_the_client_can_only_leave() -> None:
    server, client = Session(Side.SERVER), Session(Side.CLIENT)
    with pytest.raises(RemoteProtocolError):
        client.receive(b"junk")
    with pytest.raises(LocalProtocolError):
        client.send(Ping())
    server.receive(client.send(Goodbye()))
    assert (server.state, client.state) == (State.CLOSED, State.CLOSED)


def test_a_closed_conversation_is_not_opened_by_what_still_arrives() -> None:
    pair = Pair().walk((Side.SERVER, Failure))
    for late in (BYTES[Ping], b"junk", "text"):
        with pytest.raises(RemoteProtocolError):
            pair.ends[Side.SERVER].receive(late)
    assert pair.state is State.CLOSED
    with pytest.raises(LocalProtocolError):
        pair.ends[Side.SERVER].send(Failure(reason="a second time"))


def test_a_text_frame_is_refused_by_name() -> None:
    with pytest.raises(RemoteProtocolError, match="text frame"):
        Session(Side.SERVER).receive("Ping")


def test_a_message_that_cannot_be_encoded_leaves_the_state() -> None:
    session = session_in(State.AWAITING_ADAPTER, Side.SERVER)
    with pytest.raises(TypeError, match="cannot send"):
        session.send(EdgeAdapter(step=1, tensors={"a": np.zeros((1, 1), np.float16)}))
    assert session.state is State.AWAITING_ADAPTER


def test_a_session_refuses_more_bytes_than_it_was_told() -> None:
    hello = BYTES[Hello]
    session = Session(Side.SERVER, max_bytes=10)
    with pytest.raises(RemoteProtocolError, match="exceeds the limit of 10 bytes"):
        session.receive(hello)
    assert session.state is State.BROKEN
    session = Session(Side.SERVER, max_bytes=10)
    session.max_bytes = HANDSHAKE_BYTES
    assert isinstance(session.receive(hello), Hello)


moves = st.tuples(st.sampled_from(Side), st.sampled_from(KINDS))
labels = st.sampled_from(["server", "device"])


@given(st.lists(moves, max_size=30), labels)
@some_hundred
def test_both_sides_agree_whatever_they_try_to_say(script: list[tuple[Side, type]], labels: str) -> None:
    pair = Pair(labels=labels)
    for side, kind in script:
        before, may = pair.state, pair.may(side, kind)
        try:
            pair.say(side, kind)
        except LocalProtocolError:
            assert not may
            assert pair.state is before
        else:
            still_open = before is State.AWAITING_GRADIENT is pair.state and kind is ActivationGradient
            assert may
            assert still_open or pair.state is TRANSITIONS[before, side, kind]


@given(st.lists(st.integers(0, 99), max_size=40), labels)
@some_hundred
def test_both_sides_agree_throughout_a_legal_conversation(choices: list[int], labels: str) -> None:
    pair = Pair(labels=labels)
    for choice in choices:
        pair.say_something(choice)
        assert pair.state not in (State.BROKEN, State.CLOSED)  # and it is one state: see Pair


@given(st.lists(st.integers(0, 99), max_size=20), st.binary(max_size=40), st.sampled_from(Side), st.lists(moves, max_size=10))
@some_hundred
def test_after_illegal_bytes_only_last_words_follow(
    choices: list[int], junk: bytes, side: Side, script: list[tuple[Side, type]]
) -> None:
    pair = Pair()
    for choice in choices:
        pair.say_something(choice)
    session = pair.ends[side]
    with pytest.raises(RemoteProtocolError):
        session.receive(junk)
    for who, kind in script:
        try:
            if who is side:
                session.send(SAMPLES[kind.__name__])
            else:
                session.receive(BYTES[kind])
        except (LocalProtocolError, RemoteProtocolError):
            assert session.state in (State.BROKEN, State.CLOSED)
        else:
            assert kind in LAST_WORDS
            assert session.state is State.CLOSED
            return


# The answers that lead on

TO_READY = [(Side.CLIENT, Hello), (Side.SERVER, Welcome), (Side.CLIENT, Join), (Side.SERVER, Start)]


@pytest.mark.parametrize("question", [Activations, AdapterGradient, AdapterWeights])
def test_a_question_that_the_run_has_left_behind_is_answered_with_a_start(question: type) -> None:
    pair = Pair().walk(*TO_READY, (Side.CLIENT, question), (Side.SERVER, Start))
    assert pair.state is State.READY
    assert pair.walk((Side.CLIENT, Activations), (Side.SERVER, Start), (Side.CLIENT, Done)).state is State.AWAITING_END


def test_a_start_answers_nothing_else() -> None:
    answered = {state for state, _, kind in TRANSITIONS if kind is Start}
    assert answered == {State.JOINING, State.AWAITING_GRADIENT, State.AWAITING_ADAPTER}


def test_the_runs_end_answers_done_and_nothing_else_does() -> None:
    assert Pair().walk(*TO_READY, (Side.CLIENT, Done), (Side.SERVER, RunEnd)).state is State.READY
    assert {kind for state, _, kind in TRANSITIONS if state is State.AWAITING_END} - LAST_WORDS == {RunEnd}
    assert {state for state, _, kind in TRANSITIONS if kind is RunEnd} == {State.AWAITING_END}


# Handing over the part


def test_client_takes_the_largest_piece_before_start_and_the_server_no_more_than_a_handshake() -> None:
    pair = Pair().walk((Side.CLIENT, Hello), (Side.SERVER, Welcome), (Side.CLIENT, AskPiece))
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    piece = Piece(index=3, data=np.random.default_rng(0).bytes(PIECE_BYTES))
    data = server.send(piece)
    heard = client.receive(data)
    assert isinstance(heard, Piece)
    assert heard.data == piece.data
    assert client.receive(data) is None  # delivered twice
    with pytest.raises(RemoteProtocolError, match="exceeds the limit of 65536 bytes"):
        server.receive(data)


def test_part_and_its_pieces_are_asked_for_in_any_order_and_then_the_client_joins() -> None:
    pair = Pair().walk((Side.CLIENT, Hello), (Side.SERVER, Welcome))
    ask_piece, ask_part = [(Side.CLIENT, AskPiece), (Side.SERVER, Piece)], [(Side.CLIENT, AskPart), (Side.SERVER, Part)]
    pair.walk(*ask_part, *ask_piece, *ask_piece, *ask_part, *ask_piece)
    assert pair.walk((Side.CLIENT, Join), (Side.SERVER, Start)).state is State.READY


# Micro-batches under way


def test_state_is_left_with_the_answer_to_the_last_of_several_micro_batches() -> None:
    pair = Pair(most_open=3).walk(*TO_READY, *[(Side.CLIENT, Activations)] * 3)
    for _ in range(2):
        assert pair.walk((Side.SERVER, ActivationGradient)).state is State.AWAITING_GRADIENT
    assert pair.walk((Side.CLIENT, Activations), (Side.SERVER, ActivationGradient)).state is State.AWAITING_GRADIENT
    assert pair.walk((Side.SERVER, ActivationGradient)).state is State.READY


def test_no_more_micro_batches_are_under_way_than_the_run_has() -> None:
    pair = Pair(most_open=2).walk(*TO_READY, *[(Side.CLIENT, Activations)] * 2)
    with pytest.raises(LocalProtocolError, match="client cannot send Activations while awaiting gradient"):
        pair.ends[Side.CLIENT].send(numbered(Activations, 99))
    with pytest.raises(RemoteProtocolError, match="client sent Activations while awaiting gradient"):
        pair.ends[Side.SERVER].receive(encode(numbered(Activations, 99)))


def test_of_several_micro_batches_the_first_that_is_open_is_awaited() -> None:
    pair = Pair(most_open=2).walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    parts: list[Any] = [replace(numbered(Activations, 7), micro_batch=part) for part in (0, 1)]
    answers: list[Any] = [replace(in_float32(numbered(ActivationGradient, 7)), micro_batch=part) for part in (0, 1)]
    assert not server.awaits(answers[0])
    for part in parts:
        server.receive(client.send(part))
    for answer, later in ((answers[0], answers[1]), (answers[1], answers[0])):
        assert (server.awaits(answer), server.awaits(later)) == (True, False)
        client.receive(server.send(answer))
    assert not any(server.awaits(answer) for answer in answers)


def test_a_start_answers_all_that_are_under_way() -> None:
    pair = Pair(most_open=2).walk(*TO_READY, *[(Side.CLIENT, Activations)] * 2, (Side.SERVER, Start))
    assert pair.state is State.READY
    assert pair.walk(*[(Side.CLIENT, Activations)] * 2).state is State.AWAITING_GRADIENT


def test_question_that_crosses_the_start_which_answers_it_is_not_heard() -> None:
    """Its client may have gone on to say that it is done."""
    pair = Pair(most_open=2).walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    first, late = (client.send(replace(numbered(Activations, 7), micro_batch=part)) for part in (0, 1))
    server.receive(first)
    client.receive(server.send(numbered(Start, 7)))
    assert server.receive(late) is None
    assert pair.walk((Side.CLIENT, Done)).state is State.AWAITING_END


def test_start_that_is_sent_while_a_question_is_decoded_answers_it() -> None:
    pair = Pair(most_open=2).walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    first, late = (client.send(replace(numbered(Activations, 7), micro_batch=part)) for part in (0, 1))
    server.receive(first)

    def while_it_is_decoded(message: Any) -> Any:
        client.receive(server.send(numbered(Start, 7)))
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_as_meant", while_it_is_decoded)
        assert server.receive(late) is None
    assert pair.walk((Side.CLIENT, Done)).state is State.AWAITING_END


def test_question_of_the_step_after_a_start_is_heard() -> None:
    pair = Pair(most_open=2).walk(*TO_READY, (Side.CLIENT, Activations))
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    client.receive(server.send(numbered(Start, 7)))
    assert isinstance(server.receive(client.send(numbered(Activations, 8))), Activations)


def test_questions_and_answers_may_cross() -> None:
    """Each side counts as it hears: they agree again when nothing is under way."""
    pair = Pair(most_open=2).walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    first, second = (client.send(numbered(Activations, step)) for step in (8, 9))
    server.receive(first)
    answer = server.send(in_float32(numbered(ActivationGradient, 8)))
    assert (client.state, server.state) == (State.AWAITING_GRADIENT, State.READY)
    client.receive(answer)
    server.receive(second)
    assert pair.state is State.AWAITING_GRADIENT
    client.receive(server.send(in_float32(numbered(ActivationGradient, 9))))
    assert pair.state is State.READY


# Labels on the device


def asked_back(pair: Pair, *parts: int) -> tuple[Session, Session]:
    """Of step 7: its micro-batches are asked, and of these ones the hidden states have come."""
    pair.walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    for part in range(pair.most_open):
        server.receive(client.send(of_part(pair, Activations, part)))
    for part in parts:
        client.receive(server.send(of_part(pair, HiddenStates, part)))
    return client, server


def of_part(pair: Pair, kind: type, part: int) -> Any:
    return replace(pair.message(kind), step=7, micro_batch=part)


def test_each_open_micro_batch_is_asked_back_once_and_in_any_order() -> None:
    pair = Pair(most_open=3, labels="device")
    client, server = asked_back(pair, 0, 2)
    for part in (0, 2):
        assert not server.awaits(of_part(pair, HiddenStates, part))
        with pytest.raises(LocalProtocolError, match="server cannot send HiddenStates while awaiting gradient"):
            server.send(of_part(pair, HiddenStates, part))
    assert server.awaits(of_part(pair, HiddenStates, 1))
    for part in (2, 0):
        assert client.awaits(of_part(pair, HiddenGradient, part))
        server.receive(client.send(of_part(pair, HiddenGradient, part)))
        assert not client.awaits(of_part(pair, HiddenGradient, part))
    assert [server.awaits(of_part(pair, ActivationGradient, part)) for part in range(3)] == [True, False, False]


def test_micro_batch_is_not_answered_while_its_gradient_is_owed() -> None:
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair, 0)
    answer = of_part(pair, ActivationGradient, 0)
    assert not server.awaits(answer)
    with pytest.raises(RemoteProtocolError, match="server sent ActivationGradient while awaiting gradient"):
        client.receive(encode(answer))


def test_micro_batch_whose_gradient_the_server_has_from_before_is_answered_at_once() -> None:
    """The connection broke after it had come."""
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair)
    assert server.awaits(answer := of_part(pair, ActivationGradient, 0))
    assert client.receive(server.send(answer)) is not None
    assert client.receive(server.send(of_part(pair, HiddenStates, 1))) is not None


@pytest.mark.parametrize("part", [0, 1, 2])
def test_gradient_that_nobody_asked_for_is_refused(part: int) -> None:
    """Of a micro-batch that is not asked back, one that has replied, and one that is not open."""
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair, 1)
    server.receive(client.send(of_part(pair, HiddenGradient, 1)))
    gradient = of_part(pair, HiddenGradient, part)
    if part == 1:  # or it is that message, delivered twice
        client.receive(server.send(of_part(pair, HiddenStates, 0)))
        server.receive(client.send(of_part(pair, HiddenGradient, 0)))
    with pytest.raises(LocalProtocolError, match="client cannot send HiddenGradient while awaiting gradient"):
        client.send(gradient)
    with pytest.raises(RemoteProtocolError, match="client sent HiddenGradient while awaiting gradient"):
        server.receive(encode(gradient))


def test_gradient_that_crosses_a_start_is_not_heard() -> None:
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair, 0, 1)
    late = [client.send(of_part(pair, HiddenGradient, part)) for part in (0, 1)]
    start = server.send(replace(pair.message(Start), step=7))
    assert [server.receive(data) for data in (*late, late[1])] == [None] * 3
    client.receive(start)
    assert pair.walk((Side.CLIENT, Done)).state is State.AWAITING_END


def test_start_that_is_sent_while_a_gradient_is_decoded_answers_it() -> None:
    pair = Pair(labels="device", most_open=1)
    client, server = asked_back(pair, 0)
    late = client.send(of_part(pair, HiddenGradient, 0))

    def while_it_is_decoded(message: Any) -> Any:
        client.receive(server.send(replace(pair.message(Start), step=7)))
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "_as_meant", while_it_is_decoded)
        assert server.receive(late) is None
    assert pair.walk((Side.CLIENT, Done)).state is State.AWAITING_END


@pytest.mark.parametrize("late", [Activations, HiddenGradient])
def test_what_crosses_a_start_may_be_in_the_codec_from_before_it(late: type) -> None:
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair)
    client.receive(server.send(replace(pair.message(Start), step=6, codec="int8")))
    server.receive(client.send(of_part(pair, Activations, 0)))
    if late is HiddenGradient:
        client.receive(server.send(of_part(pair, HiddenStates, 0)))
    data = client.send(of_part(pair, late, 1 if late is Activations else 0))
    client.receive(server.send(replace(pair.message(Start), step=7, codec="bfloat16")))
    with pytest.raises(RemoteProtocolError, match="a tensor in int8, which was not agreed on"):
        decode(data, HANDSHAKE_BYTES, server.codecs.of_side(Side.CLIENT))
    assert server.receive(data) is None


def test_gradient_of_a_step_that_its_client_knows_to_be_behind_is_refused() -> None:
    pair = Pair(most_open=1, labels="device")
    client, server = asked_back(pair, 0)
    late = of_part(pair, HiddenGradient, 0)
    client.receive(server.send(replace(pair.message(Start), step=7)))
    with pytest.raises(LocalProtocolError, match="client cannot send HiddenGradient while ready"):
        client.send(late)
    server.receive(client.send(replace(pair.message(Activations), step=8, micro_batch=0)))
    with pytest.raises(RemoteProtocolError, match="client sent HiddenGradient while awaiting gradient"):
        server.receive(encode(late))


def test_after_a_start_nothing_is_asked_back_of_before() -> None:
    pair = Pair(most_open=2, labels="device")
    client, server = asked_back(pair, 0)
    client.receive(server.send(replace(pair.message(Start), step=6)))
    assert not server.awaits(of_part(pair, HiddenStates, 1))
    server.receive(client.send(of_part(pair, Activations, 0)))
    assert client.receive(server.send(of_part(pair, HiddenStates, 0))) is not None


@pytest.mark.parametrize("shape", [(0, 2), (2, 2), (1, 1), (1, 3)])
def test_hidden_states_and_their_gradient_have_a_row_for_every_label(shape: tuple[int, int]) -> None:
    pair = Pair(most_open=1, labels="device")
    client, server = asked_back(pair)
    reason = rf"of {shape[0]} x {shape[1]}, expected 1 x 2: one row for every label"
    values = np.zeros(shape, np.float32)
    with pytest.raises(RemoteProtocolError, match=f"HiddenStates {reason}"):
        client.receive(encode(replace(of_part(pair, HiddenStates, 0), values=values)))
    pair = Pair(most_open=1, labels="device")
    client, server = asked_back(pair, 0)
    gradient = replace(of_part(pair, HiddenGradient, 0), values=values, labelled_tokens=shape[0])
    with pytest.raises(RemoteProtocolError, match=f"HiddenGradient {reason}"):
        server.receive(encode(gradient))
    pair = Pair(labels="device").walk(*TO_READY)
    client, server = pair.ends[Side.CLIENT], pair.ends[Side.SERVER]
    server.receive(client.send(replace(pair.message(Evaluation), index=3)))
    with pytest.raises(RemoteProtocolError, match=f"EvaluationStates {reason}"):
        client.receive(encode(EvaluationStates(index=3, values=values)))


# Messages that are delivered twice, late or in another order


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *((kind, 9) for kind in (Join, Start, Activations, ActivationGradient, AdapterGradient, AdapterWeights, EdgeAdapter)),
        *((kind, 9) for kind in (AskPart, Part, AskPiece, Piece, HiddenStates, HiddenGradient)),
        *((kind, 9) for kind in (Ping, Pong, Evaluation, EvaluationLoss, EvaluationStates, Done, RunEnd)),
        *((kind, 0) for kind in (Hello, Welcome, Goodbye, Failure)),
    ],
)
def test_a_message_is_identified_by_its_kind_its_index_or_step_and_its_micro_batch(kind: type, number: int) -> None:
    in_parts = (Activations, HiddenStates, HiddenGradient, ActivationGradient)
    assert identity(numbered(kind, 9)) == (kind, number, 1 if kind in in_parts else 0)


@pytest.mark.parametrize(
    ("state", "side", "kind"), [pytest.param(*row, id=f"{row[0].name}-{row[2].__name__}") for row in TRANSITIONS]
)
def test_a_message_delivered_twice_is_ignored_in_every_state(state: State, side: Side, kind: type) -> None:
    session = session_in(state, side.peer, kind)
    assert session.receive(BYTES[kind]) is not None
    for later in set(State) - {State.BROKEN}:
        session.state = later
        assert session.receive(BYTES[kind]) is None
        assert session.state is later


def test_whoever_is_broken_refuses_a_message_delivered_twice() -> None:
    server = session_in(State.READY, Side.SERVER)
    server.receive(BYTES[Activations])
    with pytest.raises(RemoteProtocolError):
        server.receive(b"junk")
    with pytest.raises(RemoteProtocolError, match="while broken"):
        server.receive(BYTES[Activations])
    assert server.state is State.BROKEN


@given(st.lists(st.integers(0, 99), max_size=40), st.integers(2, 4), labels)
@some_hundred
def test_a_conversation_in_which_everything_is_delivered_several_times_is_the_same(
    choices: list[int], times: int, labels: str
) -> None:
    pair = Pair(labels=labels)
    for choice in choices:
        pair.say_something(choice)
        before = pair.state
        for side in Side:  # of both directions, so that answers are repeated after the next question, too
            for _ in range(times):
                assert not pair.heard[side] or pair.ends[side].receive(pair.heard[side][-1]) is None
        assert pair.state is before


def test_of_a_message_delivered_twice_the_first_counts_whatever_the_second_says() -> None:
    client = session_in(State.AWAITING_LOSS, Side.CLIENT)
    assert client.receive(encode(EvaluationLoss(index=1, summed_loss=2.0))) is not None
    assert client.receive(encode(EvaluationLoss(index=1, summed_loss=3.0))) is None


@pytest.mark.parametrize(
    ("asked", "state"), [(Ping, State.NEW), (AskPart, State.WELCOMED), (AskPiece, State.WELCOMED), (Evaluation, State.READY)]
)
def test_a_question_with_a_fresh_index_is_another_question(asked: type, state: State) -> None:
    server = session_in(state, Side.SERVER)
    for number in (1, 2):
        assert server.receive(encode(numbered(asked, number))) is not None
        assert server.receive(encode(numbered(asked, number))) is None
        server.state = state  # as after the answer
    server.receive(encode(numbered(asked, 1)))
    assert server.state is not state


def test_a_start_of_the_same_step_in_the_next_round_is_another_start() -> None:
    """A client stands after step 5, is too late with its adapter, and the round ends without it."""
    client = session_in(State.JOINING, Side.CLIENT)
    start: Any = SAMPLES["Start"]
    assert client.receive(encode(replace(start, step=5, round=0))) is not None
    client.send(numbered(AdapterWeights, 5))
    assert client.receive(encode(replace(start, step=5, round=0))) is None
    assert client.state is State.AWAITING_ADAPTER
    assert client.receive(encode(replace(start, step=5, round=5))) is not None
    assert client.send(numbered(Activations, 6))  # it is this side's turn again


@given(st.lists(st.integers(0, 99), min_size=2, max_size=40), st.integers(0, 99), st.sampled_from(Side), labels)
@some_hundred
def test_an_old_message_is_refused_unless_its_kind_is_awaited(choices: list[int], old: int, side: Side, labels: str) -> None:
    """Where its kind is awaited, its step says that it is old: that is seen by whoever knows the run."""
    pair = Pair(labels=labels)
    for choice in choices:
        pair.say_something(choice)
    before, session = pair.heard[side][:-1], pair.ends[side]
    if not before:
        return
    replayed, state = before[old % len(before)], session.state
    message: Any = decode(replayed, HANDSHAKE_BYTES, session.codecs.of_side(side.peer))
    kind, resumed_at = type(message), pair.resumed_at
    if kind is HiddenGradient and pair.said_last is Start:  # it may have crossed that
        assert session.receive(replayed) is None
        assert session.state is state
    elif kind not in (HiddenStates, HiddenGradient) and pair.may(side.peer, kind):
        if kind is Activations and message.step <= resumed_at:  # whose sender has heard the `Start`
            with pytest.raises(RemoteProtocolError, match="after a Start that goes on after"):
                session.receive(replayed)
        else:
            assert session.receive(replayed) is not None
    else:
        with pytest.raises(RemoteProtocolError, match=f"sent {kind.__name__} while"):
            session.receive(replayed)
        assert session.state is State.BROKEN


@pytest.mark.parametrize(
    ("side", "heard", "late"),
    [
        (Side.SERVER, [Activations, AdapterGradient], Activations),
        (Side.SERVER, [Activations, Evaluation], Activations),
        (Side.CLIENT, [ActivationGradient, EdgeAdapter], ActivationGradient),
        (Side.CLIENT, [ActivationGradient, EdgeAdapter, EvaluationLoss], EdgeAdapter),
        (Side.CLIENT, [Start, ActivationGradient], Start),
    ],
)
def test_a_message_that_comes_again_after_another_is_refused(side: Side, heard: list[type], late: type) -> None:
    session = Session(side)
    for kind in heard:
        session.state = next(state for state, who, what in TRANSITIONS if (who, what) == (side.peer, kind))
        assert session.receive(BYTES[kind]) is not None
    with pytest.raises(RemoteProtocolError, match=f"sent {late.__name__} while {session.state.value}"):
        session.receive(BYTES[late])
    assert session.state is State.BROKEN


@pytest.mark.parametrize(
    ("state", "side", "first"),
    [
        (State.NEW, Side.SERVER, Join),
        (State.READY, Side.SERVER, Join),
        (State.GREETED, Side.CLIENT, Start),
        (State.AWAITING_GRADIENT, Side.CLIENT, EdgeAdapter),
        (State.AWAITING_ADAPTER, Side.CLIENT, ActivationGradient),
        (State.AWAITING_ADAPTER, Side.CLIENT, RunEnd),
        (State.AWAITING_END, Side.CLIENT, EdgeAdapter),
    ],
)
def test_a_message_that_overtakes_another_is_refused(state: State, side: Side, first: type) -> None:
    session = session_in(state, side)
    with pytest.raises(RemoteProtocolError, match=f"sent {first.__name__} while {state.value}"):
        session.receive(BYTES[first])
    assert session.state is State.BROKEN
