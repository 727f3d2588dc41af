"""Where a step's time goes: how long questions waited, and what clients tell of theirs."""

from gpu_server.federation.timing import StepTiming
from protocol import Seconds


def test_question_has_waited_from_when_it_came_until_it_is_computed() -> None:
    timing = StepTiming()
    timing.question(("a", 0), Seconds(), 10.0)
    timing.question(("a", 1), Seconds(), 12.0)
    timing.computing([("a", 0)], 15.0)
    assert timing.queued(("a", 0)) == 5.0
    assert timing.queued(("a", 1)) == 0.0  # it is not computed
    timing.computing([("a", 1)], 20.0)
    assert timing.queued(("a", 1)) == 8.0


def test_client_is_away_since_its_last_reply_and_before_the_first_not_at_all() -> None:
    timing = StepTiming()
    assert timing.away("a", 7.0) == 0.0
    timing.replied("a", 10.0)
    assert timing.away("a", 12.5) == 2.5


def test_what_clients_have_spent_is_taken_once_in_the_order_of_their_names() -> None:
    timing = StepTiming()
    timing.question(("b", 0), Seconds(edge_compute=1.0), 0.0)
    timing.question(("a", 0), Seconds(edge_compute=2.0), 0.0)
    timing.question(("b", 1), Seconds(uplink=3.0), 0.0)
    taken = timing.take()
    assert list(taken.items()) == [("a", Seconds(edge_compute=2.0)), ("b", Seconds(edge_compute=1.0, uplink=3.0))]
    assert timing.take() == {}


def test_share_of_the_links_is_of_all_steps_since_it_was_taken_last() -> None:
    timing = StepTiming()
    assert timing.take_link_share() == 0.0
    timing.question(("a", 0), Seconds(edge_compute=5.0, uplink=2.0), 0.0)
    timing.take()
    timing.question(("b", 0), Seconds(queue=2.0, downlink=1.0), 0.0)
    timing.take()
    timing.question(("b", 0), Seconds(queue=99.0), 0.0)  # of a step that is not finished
    assert timing.take_link_share() == 0.3
    assert timing.take_link_share() == 0.0


def test_client_thinks_since_it_was_asked_back_whatever_it_was_sent_meanwhile() -> None:
    timing = StepTiming()
    timing.asked_back(("a", 0), 10.0)
    timing.asked_back(("a", 1), 12.0)
    timing.replied("a", 13.0)
    assert timing.thought(("a", 0), 15.0) == 5.0
    assert timing.thought(("a", 1), 15.0) == 3.0
    assert timing.away("a", 15.0) == 2.0
    timing.asked_back(("a", 0), 20.0)
    assert timing.away("a", 21.0) == 1.0  # it is a reply, too
