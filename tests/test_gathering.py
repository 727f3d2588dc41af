"""When a step goes on, with whom, and when the operator hears that it waits."""

from usual_settings import settings

from gpu_server.federation.deadline import Deadline
from gpu_server.federation.gathering import Gathering, Verdict
from gpu_server.federation.member import Member, Presence
from gpu_server.federation.turnout import Turnout
from protocol import Activations, Itinerary, Join

WAIT = Verdict()
NOBODY = Turnout({}, lambda name, member: True, lambda name, member: True)


def gathering(quorum: int | None = None, seconds: float | None = 60.0) -> Gathering:
    return Gathering(Activations, 100.0, Deadline(seconds), quorum, NOBODY)


def verdict(one: Gathering, ready: str, missing: str, now: float, absent: str = "", away: str = "") -> Verdict:
    """Of step 7, with a member for each letter."""
    members = {}
    for name in sorted(ready + missing):
        member = Member(Join(num_samples=1, batch_size=1, longest=1), Itinerary(settings(), 9), {})
        member.presence = Presence.ABSENT if name in absent else Presence.AWAY if name in away else Presence.HERE
        members[name] = member
    one.turnout = Turnout(members, lambda name, member: True, lambda name, member: name in ready)
    return one.verdict(7, now)


def test_all_that_are_wanted_are_enough() -> None:
    assert verdict(gathering(), "ba", "", 100.0) == Verdict(go=["a", "b"])


def test_without_a_quorum_one_that_is_missing_is_waited_for_long_after_the_deadline() -> None:
    one = gathering()
    assert verdict(one, "a", "b", 159.0) == WAIT
    assert verdict(one, "a", "b", 1000.0) == Verdict(
        say="step 7 waits for b, silent for 15 min; 1 of 2 devices ready", silent=("b",)
    )


def test_without_a_quorum_even_an_absent_one_is_needed() -> None:
    assert verdict(gathering(), "a", "b", 100.0, absent="b") == WAIT


def test_quorum_is_not_enough_before_the_deadline_and_is_from_then_on() -> None:
    one = gathering(quorum=1)
    assert verdict(one, "a", "bc", 159.9) == WAIT
    goes_on = Verdict(go=["a"], say="step 7 goes on without b (not connected), silent for 60 s", silent=("b",))
    assert verdict(one, "a", "bc", 160.0, absent="c", away="b") == goes_on


def test_who_is_absent_is_not_waited_for_if_the_quorum_is_there() -> None:
    assert verdict(gathering(quorum=1), "a", "b", 100.0, absent="b") == Verdict(go=["a"])


def test_fewer_than_the_quorum_are_waited_for_after_the_deadline_too() -> None:
    one = gathering(quorum=2)
    assert one.expires() == 160.0
    waits = "step 7 waits for b and c (not connected), silent for 70 s; 1 of 3 devices ready, 2 needed"
    assert verdict(one, "a", "bc", 170.0, absent="c") == Verdict(say=waits, silent=("b", "c"))
    assert one.expires() == 240.0  # only to tell so again: nothing else comes with time
    assert verdict(one, "ab", "c", 171.0) == Verdict(
        go=["a", "b"], say="step 7 goes on without c, silent for 71 s", silent=("c",)
    )


def test_of_fewer_than_the_quorum_all_are_enough() -> None:
    assert verdict(gathering(quorum=3), "ab", "", 100.0) == Verdict(go=["a", "b"])
    assert verdict(gathering(quorum=3), "a", "b", 165.0).say.endswith("; 1 of 2 devices ready, 2 needed")


def test_wait_is_told_of_when_it_is_long_and_again_at_twice_the_time() -> None:
    one = gathering()
    assert [now for now in range(100, 1000) if verdict(one, "a", "b", now).say] == [160, 220, 340, 580]


def test_run_that_has_not_started_goes_on_with_all_of_its_clients_and_says_how_many_are_missing() -> None:
    one = gathering()
    assert one.newcomers([], 3, 200.0) == WAIT  # nobody waits
    assert one.newcomers(["b", "a"], 3, 159.0) == WAIT
    assert one.newcomers(["b", "a"], 3, 160.0) == Verdict(
        say="the run waits for 1 more device to join, for 60 s; b and a joined"
    )
    assert one.newcomers(["b", "a"], 3, 161.0) == WAIT
    assert one.newcomers(["b", "a", "c"], 3, 161.0) == Verdict(go=["b", "a", "c"])


def test_who_goes_on_and_who_is_missing_are_in_the_order_of_their_names_and_not_in_that_in_which_they_joined() -> None:
    members = {}
    for name in "dbca":
        members[name] = Member(Join(num_samples=1, batch_size=1, longest=1), Itinerary(settings(), 9), {})
    one = gathering(quorum=2)
    one.turnout = Turnout(members, lambda name, member: True, lambda name, member: name in "db")
    assert one.verdict(7, 160.0).go == ["b", "d"]
    assert one.verdict(7, 160.0).silent == ("a", "c")
    one.quorum = 3
    assert one.verdict(7, 220.0).silent == ("a", "c")
    one.turnout = Turnout(members, lambda name, member: True, lambda name, member: True)
    assert one.verdict(7, 220.0).go == ["a", "b", "c", "d"]


def test_time_until_the_next_verdict_is_that_of_the_deadline_or_of_a_report() -> None:
    deadline = Deadline()
    for _ in range(5):
        deadline.observe(Activations, 2.0)
    assert Gathering(Activations, 100.0, deadline, 1, NOBODY).expires() == 102.0
    assert Gathering(Activations, 100.0, deadline, None, NOBODY).expires() == 105.0


def test_wait_for_a_short_deadline_of_the_operator_is_told_of_when_it_has_passed() -> None:
    assert gathering(seconds=1.0).expires() == 101.0
