"""Who of those that are waited for has come, and what else is kept so that nobody has to look at all members, is true."""

import random
import sys
from collections import Counter
from typing import Any

import pytest
from test_itinerary import History
from usual_settings import settings

from gpu_server.federation import Federation, Member, Presence
from gpu_server.federation.gathering import Gathering
from gpu_server.federation.roster import Roster
from gpu_server.federation.turnout import Names, Turnout
from protocol import Activations, Contribution, Done, HiddenGradient, Join


def test_names_are_a_set_in_the_order_in_which_they_were_added() -> None:
    draw, names, expected = random.Random(0), Names(), list[str]()
    for number in range(2000):
        grows = number % 400 < 200  # and then becomes empty nearly
        name = str(draw.randrange(100))
        if draw.random() < (0.8 if grows else 0.1):
            names.add(name)
            expected += [name] if name not in expected else []
        else:
            names.discard(name)
            expected = [each for each in expected if each != name]
        assert (list(names), len(names), name in names) == (expected, len(expected), name in expected)


@pytest.mark.parametrize("left", [0, 3, 250])
def test_names_take_no_more_room_than_four_times_as_many_would(left: int) -> None:
    """To go through them takes as long as their room is large."""
    names, fewer = Names(), Names()
    for number in range(1000):
        names.add(str(number))
    for number in range(4 * left + 1):
        fewer.add(str(number))
    for number in range(1000 - left):
        names.discard(str(number))
    assert sys.getsizeof(names._names) <= sys.getsizeof(fewer._names)
    assert list(names) == [str(number) for number in range(1000 - left, 1000)]


def test_room_is_made_smaller_when_a_quarter_of_the_names_are_left() -> None:
    names, renewed = Names(), list[int]()
    for number in range(1000):
        names.add(str(number))
    for number in range(1000):
        before = names._names
        names.discard(str(number))
        renewed += [len(names)] if names._names is not before else []
    assert renewed == [250, 62, 15, 3, 0]


def roster(names: str) -> Roster:
    made = Roster(settings(clients=len(names)), {})
    for name in names:
        made.add(name, made.newcomer(Join(num_samples=1, batch_size=1, longest=1)))
    return made


def places(turnout: Turnout) -> tuple[str, str, str]:
    return "".join(turnout.come), "".join(turnout.awaited), "".join(turnout.overtaken)


def test_member_has_come_or_is_awaited_or_was_overtaken_and_moves_when_it_changes() -> None:
    members = roster("abcd")
    turnout = members.turnout(lambda name, member: name != "d", lambda name, member: member.in_round)
    assert (places(turnout), len(turnout), turnout.is_complete) == (("", "abc", ""), 3, False)
    members.members["b"].in_round = True
    members.members["c"].was_overtaken(1)
    members.members["d"].in_round = True
    assert places(turnout) == ("b", "a", "c")
    assert sorted(turnout.missing()) == ["a", "c"]
    members.members["c"].in_round = members.members["a"].in_round = True
    assert (places(turnout), len(turnout), turnout.is_complete) == (("bca", "", ""), 3, True)


def test_one_that_was_overtaken_alone_is_missing_too() -> None:
    members = roster("a")
    members.members["a"].was_overtaken(1)
    turnout = members.turnout(lambda name, member: True, lambda name, member: False)
    assert (places(turnout), turnout.is_complete) == (("", "", "a"), False)


def test_who_is_wanted_no_more_or_is_no_member_any_more_is_in_no_place() -> None:
    members = roster("abc")
    turnout = members.turnout(lambda name, member: not member.presence.has_left, lambda name, member: name == "a")
    members.disconnected("a", 0.0, starting=True)
    members.members["b"].was_lost(0.0)
    assert (turnout.why_missing("b"), turnout.why_missing("c")) == ("not connected", "")
    members.members["b"].left()
    assert (places(turnout), len(turnout)) == (("", "c", ""), 1)


def test_turnout_that_nobody_keeps_hears_of_nothing() -> None:
    members, looked_at = roster("a"), list[str]()

    def is_wanted(name: str, member: Member) -> bool:
        looked_at.append(name)
        return True

    turnout = members.turnout(is_wanted, lambda name, member: False)
    members.members["a"].in_round = True
    assert looked_at == ["a", "a"]
    del turnout
    members.members["a"].in_round = True
    assert looked_at == ["a", "a"]


class WatchedHistory(History):
    """After everything that happens, what is kept is compared with what a look at all members gives."""

    seen: Counter[Any]
    """How often, by kind of what was waited for."""

    def happen(self, what: str, device: Any) -> None:
        super().happen(what, device)
        check_census(self.federation)
        gathering, ahead = self.federation._gathering, self.federation._ahead
        if gathering is not None:
            wanted, come = wanted_by(self.federation, gathering), come_to(self.federation, gathering)
            check_turnout(self.federation, gathering.turnout, wanted, come)
            self.seen[gathering.kind] += 1
            if ahead is not None:
                check_turnout(self.federation, ahead, wanted, asked(self.federation, Activations, self.next_forward()))
                self.seen["ahead"] += 1

    def next_forward(self) -> int:
        present = self.federation._present_step
        return present.micro_batch + len(present.asked_back)


def check_census(federation: Federation) -> None:
    presences = {name: member.presence for name, member in federation.members.items()}
    roster = federation._roster
    assert roster._presences == presences
    assert {presence: names for presence, names in roster._standing.items() if names} == {
        presence: {name for name in presences if presences[name] is presence} for presence in presences.values()
    }
    assert federation.connected == sum(presence.is_connected for presence in presences.values())
    assert federation.num_unfinished == len(federation.unfinished())
    assert roster.returning() == sorted(name for name in presences if presences[name] is Presence.RETURNING)


def check_turnout(federation: Federation, turnout: Turnout, wanted: set[str], come: set[str]) -> None:
    missing = wanted - come
    overtaken = {name for name in missing if federation.members[name].presence.is_overtaken}
    assert set(turnout.come) == wanted & come
    assert (set(turnout.overtaken), set(turnout.awaited)) == (overtaken, missing - overtaken)
    assert (len(turnout), turnout.is_complete, set(turnout.missing())) == (len(wanted), not missing, missing)


def wanted_by(federation: Federation, gathering: Gathering) -> set[str]:
    present, roster = federation._present_step, federation._roster
    if gathering.kind is Join:
        return set()
    if gathering.kind is Done:
        return set(federation.unfinished())
    if gathering.kind is Contribution:
        return set(roster.contributors())
    if present.micro_batch or present.asked_back:
        return {name for name in present.labels_of if federation.members[name].presence.takes_part}
    return set(roster.participants(federation.step + 1))


def come_to(federation: Federation, gathering: Gathering) -> set[str]:
    present = federation._present_step
    if gathering.kind is HiddenGradient:
        return set(present.asked_back[0].gradients)
    return asked(federation, gathering.kind, present.micro_batch)


def asked(federation: Federation, kind: type, micro_batch: int) -> set[str]:
    return {name for name, member in federation.members.items() if isinstance(member.questions.get(micro_batch), kind)}


@pytest.mark.parametrize("labels", ["server", "device"])
def test_what_is_kept_is_what_a_look_at_all_members_gives(labels: str) -> None:
    seen = Counter[Any]()
    for seed in range(5000, 5060):
        history = WatchedHistory(seed, labels)
        history.seen = seen
        history.run()
    kinds = {Activations, Contribution, Done} | ({HiddenGradient, "ahead"} if labels == "device" else set())
    assert {kind for kind in kinds if seen[kind] >= 100} == kinds
