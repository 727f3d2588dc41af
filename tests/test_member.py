"""What becomes of a member's presence, and what is kept of its questions and answers."""

from typing import Any

import numpy as np
import pytest
from usual_settings import settings

from gpu_server.federation.member import Member, Presence
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    Itinerary,
    Join,
    QuestionId,
    Seconds,
)

HERE, BEHIND, RETURNING = Presence.HERE, Presence.BEHIND, Presence.RETURNING
AWAY, ABSENT, LEFT, GONE = Presence.AWAY, Presence.ABSENT, Presence.LEFT, Presence.GONE
JOIN = Join(num_samples=6, batch_size=1, longest=3)


def member(**changes: Any) -> Member:
    return Member(JOIN, Itinerary(settings(**changes), 6), {"A": (1, 1)})


ONE = np.ones(1, np.int32)
BATCH: dict[str, Any] = {"lengths": ONE, "label_counts": ONE, "labels": ONE, "values": np.zeros((1, 1), np.float32)}


def activations(step: int, micro_batch: int = 0) -> Activations:
    return Activations(step=step, micro_batch=micro_batch, seconds=Seconds(), **BATCH)


def gradient(step: int, micro_batch: int = 0) -> ActivationGradient:
    values = np.zeros((1, 1), np.float32)
    return ActivationGradient(step=step, micro_batch=micro_batch, loss=1.0, labelled_tokens=1, values=values)


def ask_and_answer(one: Member, step: int, micro_batch: int = 0) -> None:
    one.questions[micro_batch] = activations(step, micro_batch)
    one.answer(micro_batch, gradient(step, micro_batch), one.itinerary.after_activations(step, micro_batch))


TRANSITIONS: dict[str, dict[Presence, Presence]] = {
    "lost": {HERE: AWAY, BEHIND: ABSENT, RETURNING: ABSENT, AWAY: AWAY, ABSENT: ABSENT, LEFT: LEFT, GONE: GONE},
    "left": {AWAY: LEFT, ABSENT: GONE, LEFT: LEFT, GONE: GONE},
    "overtaken": {HERE: BEHIND, BEHIND: BEHIND, RETURNING: RETURNING, AWAY: ABSENT, ABSENT: ABSENT, LEFT: GONE, GONE: GONE},
    "back": {AWAY: HERE, ABSENT: RETURNING, LEFT: HERE, GONE: RETURNING},
    "asked": {HERE: HERE, BEHIND: RETURNING, RETURNING: RETURNING},
    "caught up": {RETURNING: HERE},
}


@pytest.mark.parametrize(("event", "before"), [(event, before) for event in TRANSITIONS for before in TRANSITIONS[event]])
def test_presence_after_an_event(event: str, before: Presence) -> None:
    one = member()
    one.presence = before
    events = {
        "lost": lambda: one.was_lost(1.0),
        "left": one.left,
        "overtaken": lambda: one.was_overtaken(1),
        "back": lambda: one.came_back(JOIN),
        "asked": one.asked_from_behind,
        "caught up": lambda: one.catches_up(1),
    }
    events[event]()
    assert one.presence is TRANSITIONS[event][before]


def test_every_presence_says_whether_it_is_connected_overtaken_or_gone_for_good() -> None:
    assert {each for each in Presence if each.is_connected} == {HERE, BEHIND, RETURNING}
    assert {each for each in Presence if each.is_overtaken} == {BEHIND, RETURNING, ABSENT, GONE}
    assert {each for each in Presence if each.has_left} == {LEFT, GONE}
    assert {each for each in Presence if each.takes_part} == {HERE, AWAY}


def test_lost_connection_takes_with_it_what_only_it_waited_for() -> None:
    one = member()
    one.evaluation = Evaluation(index=1, **BATCH)
    one.questions[0] = activations(1)
    one.was_lost(7.0)
    assert (one.evaluation, one.lost_at) == (None, 7.0)
    assert one.questions  # it will ask the same
    one.was_lost(9.0)
    assert one.lost_at == 7.0


def test_member_that_comes_back_has_been_told_nothing_and_remembers_what_it_says() -> None:
    one = member()
    assert (one.remembers, one.answered_up_to) == (0, -1)
    one.told, one.presence = (3, 2), AWAY
    assert one.answered_up_to == 3
    back = Join(num_samples=6, batch_size=1, longest=3, step=4)
    one.came_back(back)
    assert (one.told, one.answered_up_to, one.remembers, one.join) == (None, -1, 4, back)


def test_overtaken_member_has_asked_nothing_and_the_first_step_it_missed_is_known() -> None:
    one = member()
    assert one.missed_from == 0
    one.questions[0] = activations(2)
    one.was_overtaken(2)
    one.was_overtaken(3)
    assert (one.missed_from, one.questions) == (2, {})
    one.questions[0] = activations(2)
    one.was_overtaken(3)
    assert not one.questions


def test_member_that_catches_up_goes_on_with_the_others() -> None:
    one = member()
    ask_and_answer(one, 1)
    one.in_round = True
    one.was_overtaken(2)
    one.asked_from_behind()
    one.catches_up(3)
    assert (one.answers, one.next_question, one.missed_from) == ({}, QuestionId(Activations, 4), 0)
    assert one.in_round


def test_member_that_catches_up_after_its_last_step_does_not_contribute_to_the_round() -> None:
    one = member()
    one.in_round = True
    one.was_overtaken(6)
    one.asked_from_behind()
    one.catches_up(6)
    assert one.next_question == QuestionId(Done, 6)
    assert not one.in_round


def test_answers_are_those_of_one_step_and_kind() -> None:
    one = member(micro_batches=2)
    ask_and_answer(one, 1, 0)
    ask_and_answer(one, 1, 1)
    assert list(one.answers) == [QuestionId(Activations, 1, 0), QuestionId(Activations, 1, 1)]
    assert one.next_question == QuestionId(AdapterGradient, 1)
    assert not one.questions
    one.questions[0] = AdapterGradient(step=1, seconds=Seconds(), tensors={})
    answer = EdgeAdapter(step=1, tensors={})
    one.answer(0, answer, one.itinerary.after_round(1))
    assert one.answers == {QuestionId(AdapterGradient, 1): answer}
    assert one.next_question == QuestionId(Activations, 2)


def test_member_may_ask_the_rest_of_its_step_and_no_more() -> None:
    one = member(micro_batches=3)
    ask_and_answer(one, 1, 0)
    asked = [QuestionId(Activations, step, number) for step in (1, 2) for number in range(4)]
    may = [question for question in asked if one.may_ask(question)]
    assert may == [QuestionId(Activations, 1, 1), QuestionId(Activations, 1, 2)]
    assert not one.may_ask(QuestionId(AdapterGradient, 1))


def test_what_is_before_the_next_question_is_behind() -> None:
    one = member(micro_batches=2)
    ask_and_answer(one, 1, 0)
    assert one.is_behind(QuestionId(Activations, 1, 0), step=0)
    assert not one.is_behind(QuestionId(Activations, 1, 1), step=0)
    assert not one.is_behind(QuestionId(AdapterGradient, 1), step=0)
    ask_and_answer(one, 1, 1)
    assert one.is_behind(QuestionId(Activations, 1, 1), step=1)


def test_of_an_overtaken_member_everything_is_behind_up_to_the_step_under_way() -> None:
    one = member()
    one.was_overtaken(2)
    behind = [step for step in range(1, 6) if one.is_behind(QuestionId(Activations, step), step=2)]
    assert behind == [1, 2, 3]


@pytest.mark.parametrize("is_overtaken", [False, True])
def test_nothing_makes_the_last_question_stale(is_overtaken: bool) -> None:
    one = member()
    one.next_question = QuestionId(Evaluation, 6)
    if is_overtaken:
        one.was_overtaken(6)
    assert one.is_behind(QuestionId(Done, 6), step=6) is False


def test_counts_are_of_what_is_in_the_matrices() -> None:
    one = member(aggregate_every=6)
    one.labelled_tokens, one.remembers = {1: 10, 2: 20, 3: 30, 4: 40}, 2
    one.forget_lost_steps(repeated=4)
    assert one.labelled_tokens == {1: 10, 2: 20, 4: 40}
    one.begins_round()
    assert (one.labelled_tokens, one.in_round) == ({}, False)


@pytest.mark.parametrize(("kind", "is_kept"), [(AdapterWeights, False), (Activations, True)])
def test_matrices_with_lost_steps_in_them_are_forgotten(kind: type, is_kept: bool) -> None:
    one = member(aggregate_every=6)
    one.labelled_tokens, one.remembers = {1: 10, 2: 20}, 1
    one.questions[0] = activations(3) if kind is Activations else AdapterWeights(step=2, seconds=Seconds(), tensors={})
    one.forget_lost_steps(repeated=3)
    assert bool(one.questions) is is_kept


def test_matrices_without_lost_steps_stay() -> None:
    one = member(aggregate_every=6)
    one.labelled_tokens, one.remembers = {1: 10, 2: 20}, 2
    one.questions[0] = AdapterWeights(step=2, seconds=Seconds(), tensors={})
    one.forget_lost_steps(repeated=3)
    assert one.questions


def test_whoever_keeps_lists_hears_of_every_change_that_moves_a_member_from_one_to_another() -> None:
    one = member(aggregate_every=6)
    heard: list[str] = []
    asked = AdapterWeights(step=2, seconds=Seconds(), tensors={})

    def hears_of(event: str, act: Any) -> None:
        """After it: whoever hears must find the member as it is then."""
        before = len(heard)
        act()
        state = f"{one.presence.value}, {sorted(one.questions)}, {one.in_round}"
        assert heard[before:], event
        assert heard[-1] == state

    one.on_change = lambda: heard.append(f"{one.presence.value}, {sorted(one.questions)}, {one.in_round}")
    hears_of("asks", lambda: one.asks(0, activations(1)))
    hears_of("is answered", lambda: one.answer(0, gradient(1), one.itinerary.after_activations(1, 0)))
    hears_of("is in the round", lambda: setattr(one, "in_round", True))
    one.labelled_tokens = {1: 5, 2: 5}
    hears_of("asks", lambda: one.asks(0, asked))
    hears_of("forgets", lambda: one.forget_lost_steps(repeated=3))
    assert not one.questions
    hears_of("is lost", lambda: one.was_lost(1.0))
    hears_of("leaves", one.left)
    hears_of("asks", lambda: one.asks(0, asked))
    hears_of("is overtaken", lambda: one.was_overtaken(3))
    hears_of("is back", lambda: one.came_back(JOIN))
    hears_of("catches up", lambda: one.catches_up(3))
    hears_of("begins a round", one.begins_round)
