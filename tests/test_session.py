"""The conversation: TRANSITIONS is the whole truth, and both sides are always at the same place in it."""

import itertools
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_samples import SAMPLES

from protocol import (
    HANDSHAKE_BYTES,
    TRANSITIONS,
    EdgeAdapter,
    Failure,
    Goodbye,
    Hello,
    Join,
    LocalProtocolError,
    Message,
    Ping,
    RemoteProtocolError,
    Session,
    Side,
    Start,
    State,
    encode,
)

KINDS = get_args(Message)
LAST_WORDS = {Goodbye, Failure}
BYTES = {kind: encode(SAMPLES[kind.__name__]) for kind in KINDS}

everywhere = pytest.mark.parametrize(
    ("state", "side"), [pytest.param(*place, id=f"{place[0].name}-{place[1].name}") for place in itertools.product(State, Side)]
)
some_hundred = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def session_in(state: State, side: Side) -> Session:
    session = Session(side)
    session.state = state
    return session


class Pair:
    """Both ends of one conversation; what one says the other hears at once."""

    def __init__(self) -> None:
        self.ends = {side: Session(side) for side in Side}

    def say(self, side: Side, kind: type) -> None:
        heard = self.ends[side.peer].receive(self.ends[side].send(SAMPLES[kind.__name__]))
        assert type(heard) is kind

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
        session, message = session_in(state, side), SAMPLES[kind.__name__]
        next_state = TRANSITIONS.get((state, side, kind))
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
        session = session_in(state, side.peer)
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


def test_it_is_never_the_turn_of_both_sides() -> None:
    turns = {(state, side) for state, side, kind in TRANSITIONS if kind not in LAST_WORDS}
    assert len({state for state, _ in turns}) == len(turns)


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


@given(st.lists(moves, max_size=30))
@some_hundred
def test_both_sides_agree_whatever_they_try_to_say(script: list[tuple[Side, type]]) -> None:
    pair = Pair()
    for side, kind in script:
        before = pair.state
        try:
            pair.say(side, kind)
        except LocalProtocolError:
            assert (before, side, kind) not in TRANSITIONS
            assert pair.state is before
        else:
            assert pair.state is TRANSITIONS[before, side, kind]


@given(st.lists(st.integers(0, 99), max_size=40))
@some_hundred
def test_both_sides_agree_throughout_a_legal_conversation(choices: list[int]) -> None:
    pair = Pair()
    for choice in choices:
        legal = [(side, kind) for state, side, kind in TRANSITIONS if state is pair.state and kind not in LAST_WORDS]
        side, kind = legal[choice % len(legal)]
        expected = TRANSITIONS[pair.state, side, kind]
        pair.say(side, kind)
        assert pair.state is expected


@given(st.lists(st.integers(0, 99), max_size=20), st.binary(max_size=40), st.sampled_from(Side), st.lists(moves, max_size=10))
@some_hundred
def test_after_illegal_bytes_only_last_words_follow(
    choices: list[int], junk: bytes, side: Side, script: list[tuple[Side, type]]
) -> None:
    pair = Pair()
    for choice in choices:
        legal = [(who, kind) for state, who, kind in TRANSITIONS if state is pair.state and kind not in LAST_WORDS]
        pair.say(*legal[choice % len(legal)])
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
