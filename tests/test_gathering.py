"""When a step goes on, with whom, and when the operator hears that it waits."""

from gpu_server.federation.deadline import Deadline
from gpu_server.federation.gathering import Gathering, Verdict
from protocol import Activations

WAIT = Verdict()


def gathering(quorum: int | None = None, seconds: float | None = 60.0) -> Gathering:
    return Gathering(Activations, 100.0, Deadline(seconds), quorum)


def test_all_that_are_wanted_are_enough() -> None:
    assert gathering().verdict(["a", "b"], [], set(), 100.0) == Verdict(go=["a", "b"])


def test_without_a_quorum_one_that_is_missing_is_waited_for_long_after_the_deadline() -> None:
    one = gathering()
    assert one.verdict(["a"], ["b"], set(), 159.0) == WAIT
    assert not one.verdict(["a"], ["b"], set(), 1e6).go


def test_without_a_quorum_even_an_absent_one_is_needed() -> None:
    assert gathering().verdict(["a"], ["b"], {"b"}, 100.0) == WAIT


def test_quorum_is_not_enough_before_the_deadline_and_is_from_then_on() -> None:
    one = gathering(quorum=1)
    assert one.verdict(["a"], ["b", "c"], set(), 159.9) == WAIT
    assert one.verdict(["a"], ["b", "c"], {"c"}, 160.0) == Verdict(go=["a"], without=["b"])


def test_who_is_absent_is_not_waited_for_if_the_quorum_is_there() -> None:
    assert gathering(quorum=1).verdict(["a"], ["b"], {"b"}, 100.0) == Verdict(go=["a"])


def test_fewer_than_the_quorum_are_waited_for_after_the_deadline_too() -> None:
    one = gathering(quorum=2)
    assert one.expires() == 160.0
    assert one.verdict(["a"], ["b", "c"], {"b", "c"}, 170.0) == Verdict(is_worth_telling=True)
    assert one.expires() == 240.0  # only to tell so again: nothing else comes with time
    assert one.verdict(["a", "b"], ["c"], set(), 171.0) == Verdict(go=["a", "b"], without=["c"])


def test_of_fewer_than_the_quorum_all_are_enough() -> None:
    assert gathering(quorum=3).verdict(["a", "b"], [], set(), 100.0) == Verdict(go=["a", "b"])
    assert gathering(quorum=3).needed(2) == 2
    assert gathering(quorum=1).needed(2) == 1
    assert gathering().needed(2) == 2


def test_wait_is_told_of_when_it_is_long_and_again_at_twice_the_time() -> None:
    one = gathering()
    told = [now for now in range(100, 1000) if one.is_worth_telling(now) is True]
    assert told == [160, 220, 340, 580]
    assert one.waited(340.0) == "4 min"


def test_time_until_the_next_verdict_is_that_of_the_deadline_or_of_a_report() -> None:
    deadline = Deadline()
    for _ in range(5):
        deadline.observe(Activations, 2.0)
    assert Gathering(Activations, 100.0, deadline, 1).expires() == 102.0
    assert Gathering(Activations, 100.0, deadline, None).expires() == 105.0
