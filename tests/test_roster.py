"""Who may come in, and whom a step or a round waits for."""

import pytest
from usual_settings import settings

from gpu_server.federation.member import Presence
from gpu_server.federation.roster import NameInUse, Roster
from protocol import Activations, Done, EdgeAdapter, Join, QuestionId, RemoteProtocolError

LIVE = {"starting": False, "ending": False}
STARTING = {"starting": True, "ending": False}
ENDING = {"starting": False, "ending": True}


def roster(**samples: int) -> Roster:
    made = Roster(settings(clients=3, epochs=2), {"A": (1, 1)})
    for name, num_samples in samples.items():
        made.add(name, made.newcomer(Join(num_samples=num_samples, batch_size=2, longest=1)))
    return made


def test_way_of_a_member_through_the_run_follows_from_its_data() -> None:
    member = roster(a=5).members["a"]
    assert (member.last_step, member.matrix_shapes) == (6, {"A": (1, 1)})


def test_name_that_has_been_said_is_taken_until_its_client_has_joined_and_then_it_is_its_members() -> None:
    one = roster()
    one.greet("a", **STARTING)
    with pytest.raises(NameInUse, match="the name a is in use"):
        one.greet("a", **STARTING)
    one.add("a", one.newcomer(Join(num_samples=1, batch_size=1, longest=1)))
    assert not one.greeted
    with pytest.raises(NameInUse):
        one.greet("a", **STARTING)


@pytest.mark.parametrize("presence", [Presence.BEHIND, Presence.RETURNING])
def test_name_of_whoever_is_connected_is_taken(presence: Presence) -> None:
    one = roster(a=1)
    one.members["a"].presence = presence
    with pytest.raises(NameInUse):
        one.greet("a", **LIVE)


@pytest.mark.parametrize("presence", [Presence.AWAY, Presence.ABSENT, Presence.LEFT, Presence.GONE])
def test_member_that_is_not_connected_may_come_back(presence: Presence) -> None:
    one = roster(a=1)
    one.members["a"].presence = presence
    one.greet("a", **LIVE)
    assert one.greeted == {"a"}


def test_there_are_as_many_places_as_the_run_has_clients_and_who_is_greeted_has_one() -> None:
    one = roster(a=1)
    one.greet("b", **STARTING)
    one.greet("c", **STARTING)
    with pytest.raises(RemoteProtocolError, match=r"the run is full: it takes 3 devices \(--clients\)"):
        one.greet("d", **STARTING)


def test_nobody_new_is_let_in_once_the_run_has_started() -> None:
    with pytest.raises(RemoteProtocolError, match="the run is full"):
        roster(a=1).greet("b", **LIVE)


@pytest.mark.parametrize("presence", [Presence.LEFT, Presence.GONE])
def test_who_has_left_does_not_come_back_to_a_run_that_is_over(presence: Presence) -> None:
    one = roster(a=1)
    one.members["a"].presence = presence
    with pytest.raises(RemoteProtocolError, match="a has left the run, and the run is over"):
        one.greet("a", **ENDING)
    assert not one.greeted
    one.members["a"].presence = Presence.AWAY
    one.greet("a", **ENDING)


def test_step_has_those_that_have_data_for_it_in_the_order_of_their_names() -> None:
    one = roster(c=2, b=4, a=4)
    assert one.last_step == 4
    assert [one.participants(step) for step in (1, 2, 3, 4, 5)] == [
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["a", "b"],
        ["a", "b"],
        [],
    ]
    one.members["b"].presence = Presence.GONE
    assert one.participants(3) == ["a"]
    one.members["a"].presence = Presence.ABSENT
    assert one.participants(3) == ["a"]  # without a quorum it is needed


def test_round_has_those_that_took_part_and_are_waited_for_in_the_order_of_their_names() -> None:
    one = roster(c=1, b=1, a=1)
    assert one.contributors() == []
    for _, member in one:
        member.in_round = True
    assert one.contributors() == ["a", "b", "c"]
    counts = {}
    for presence in Presence:
        one.members["b"].presence = presence
        counts[presence] = "b" in one.contributors()
    assert {presence for presence, counted in counts.items() if counted} == {Presence.HERE, Presence.AWAY}


def test_returning_members_are_told_in_the_order_of_their_names() -> None:
    one = roster(c=1, b=1, a=1)
    for _, member in one:
        member.presence = Presence.RETURNING
    one.members["b"].presence = Presence.BEHIND
    assert one.returning() == ["a", "c"]


def test_whoever_has_not_left_is_unfinished() -> None:
    one = roster(a=1, b=1, c=1)
    one.members["a"].presence, one.members["b"].presence = Presence.LEFT, Presence.AWAY
    assert one.unfinished() == ["b", "c"]


def test_saved_members_are_away_or_have_left_and_go_on_after_the_round() -> None:
    before = roster(a=3, b=9)
    before.members["b"].presence = Presence.GONE
    after = roster()
    after.restore(before.saved(), step=4, evaluated={"a": 3})
    assert {name: member.presence for name, member in after} == {"a": Presence.AWAY, "b": Presence.LEFT}
    assert after.members["a"].next_question == QuestionId(Done, 4)
    assert after.members["b"].next_question == QuestionId(Activations, 5)
    assert vars(after.members["b"].join) == vars(before.members["b"].join)
    assert (after.members["a"].evaluated, after.members["b"].evaluated) == (3, -1)


def test_open_questions_are_those_of_one_kind_and_micro_batch() -> None:
    one = roster(a=1, b=1)
    done, first, second = Done(step=1), EdgeAdapter(step=1, tensors={}), EdgeAdapter(step=2, tensors={})
    one.members["a"].questions = {0: first, 1: second}
    one.members["b"].questions = {0: done}
    assert one.asked(EdgeAdapter, 0) == {"a": first}
    assert one.asked(EdgeAdapter, 1) == {"a": second}
    assert one.asked(Done, 0) == {"b": done}
    assert one.asked(Done, 1) == {}
