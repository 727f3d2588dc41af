"""One client of the run, as far as the server knows it."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from protocol import Activations, AdapterWeights, Done, Evaluation, Itinerary, Join, Message, QuestionId

__all__ = ["Member", "Presence"]


class Presence(enum.Enum):
    """
    Where a member stands: whether it is connected, whether the run has gone on without it, whether it has left.

    With a quorum, a step waits for members that take part, HERE or AWAY, and for no other. Without one it needs all that have
    not left.
    """

    is_connected: bool
    is_overtaken: bool
    """Whether the run has gone on without it, so that it has to be told where to go on before it is asked for anything."""
    has_left: bool
    takes_part: bool
    """Whether neither is so."""

    def __new__(cls, text: str, is_connected: bool, is_overtaken: bool, has_left: bool) -> "Presence":
        presence = object.__new__(cls)
        presence._value_ = text
        presence.is_connected, presence.is_overtaken, presence.has_left = is_connected, is_overtaken, has_left
        presence.takes_part = not (is_overtaken or has_left)
        return presence

    HERE = "here", True, False, False
    """It takes part."""
    BEHIND = "behind", True, True, False
    """The run has gone on without it, which it does not know: its next question will be answered with where to go on."""
    RETURNING = "returning", True, True, False
    """The run has gone on without it, and it has asked. It is told where to go on when the step under way is complete."""
    AWAY = "away", False, False, False
    """Its connection is lost. It keeps its place in the step, and its questions stay asked."""
    ABSENT = "absent", False, True, False
    """Its connection is lost, and the run has gone on without it."""
    LEFT = "left", False, False, True
    """It said goodbye, or was refused or revoked; nothing has gone on without it yet. If it comes back, it was only AWAY."""
    GONE = "gone", False, True, True
    """It left, and the run has gone on without it. If it comes back, it was only ABSENT."""


_LOST = {Presence.HERE: Presence.AWAY, Presence.BEHIND: Presence.ABSENT, Presence.RETURNING: Presence.ABSENT}
_BACK = {
    Presence.AWAY: Presence.HERE,
    Presence.LEFT: Presence.HERE,
    Presence.ABSENT: Presence.RETURNING,
    Presence.GONE: Presence.RETURNING,
}
_LEFT = {Presence.AWAY: Presence.LEFT, Presence.ABSENT: Presence.GONE}
_OVERTAKEN = {Presence.HERE: Presence.BEHIND, Presence.AWAY: Presence.ABSENT, Presence.LEFT: Presence.GONE}
_ASKED = {Presence.BEHIND: Presence.RETURNING}
_TOLD = {Presence.RETURNING: Presence.HERE}
"""What each event makes of a presence; where it is not named, it stays as it is."""

_NOTED = {"presence", "in_round"}
"""Attributes of a member that are no others without `Member.changed`."""


@dataclass
class Member:
    """
    A client of the run. Only its methods change its presence.

    Whoever keeps lists of members hears of every change that may move one from list to list, through ``on_change``.

    Its answers are kept so that whoever asks again gets the same bytes: those to the questions of one kind and step, all of
    them before ``next_question``.
    """

    join: Join
    """What it announced when it came last: how much data, in how large batches, and up to which step it remembers."""
    itinerary: Itinerary
    """Its own way through the run, which ends where its data does."""
    matrix_shapes: dict[str, tuple[int, int]]
    """
    Of the LoRA matrices that it trains, by name. Its messages are held to them, though all members have the same today.
    """
    presence: Presence = Presence.HERE
    """Whether it is connected, and whether the run went on without it: decides who is waited for, and who must be told."""
    next_question: QuestionId = field(default_factory=lambda: QuestionId(Activations, 1))
    """The first that is not answered, evaluations aside. It may have asked the next ones, too."""
    questions: dict[int, Message] = field(default_factory=dict)
    """What it has asked and was not answered, by micro-batch. They stay when a connection is lost: it will ask the same."""
    answers: dict[QuestionId, Message] = field(default_factory=dict)
    """Those to the questions that were answered last, all of one kind and step."""
    evaluation: Evaluation | None = None
    """The held-out batch whose loss its present connection waits for."""
    is_evaluating: bool = False
    """Whether it asks for the losses of its held-out texts: what it has sent last belongs to these."""
    evaluated: int = -1
    """The last step of which its held-out loss is kept; -1: none."""
    is_cut_short: bool = False
    """Whether the run has ended before its data does."""
    remembers: int = 0
    """The last step that it has finished and not forgotten, as its `Join` says, or a question that the run has left behind. A
    device whose disk is lost forgets."""
    told: tuple[int, int] | None = None
    """Step and round of the last `Start` on its present connection. The same one twice would be taken for one message."""
    in_round: bool = False
    """Whether it took part in a step of the present round, so that the round's adapter is made of its own, too."""
    labelled_tokens: dict[int, int] = field(default_factory=dict)
    """By step, of this round's steps that its matrices contain: its weight in the round's average."""
    lost_at: float | None = None
    """When it was disconnected last; None if it never was."""
    missed_from: int = 0
    """The first step that has gone on without it, if it is overtaken: to tell the operator; 0 if there is nothing to tell."""
    on_change: Callable[[], None] | None = None
    """Called when `changed` is."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in _NOTED:
            self.changed()

    def changed(self) -> None:
        """Its presence, its questions, its part in the round, or what it has replied is not what it was."""
        if self.on_change is not None:
            self.on_change()

    @property
    def last_step(self) -> int:
        """The last step for which it has data."""
        return self.itinerary.last_step

    @property
    def answered_up_to(self) -> int:
        """All that it asks of steps up to this one the last `Start` on its connection has answered; -1: none."""
        return -1 if self.told is None else self.told[0] + self.is_cut_short

    # Whether it is waited for

    def has_data_for(self, step: int) -> bool:
        """Whether it has a part in this step, unless it has left."""
        return self.itinerary.last_step >= step and not self.presence.has_left

    @property
    def contributes(self) -> bool:
        """Whether its adapter has a part in the next edge adapter."""
        return self.in_round and self.presence.takes_part

    # What becomes of its presence

    def came_back(self, join: Join) -> None:
        """A new connection has joined under its name."""
        self.presence = _BACK[self.presence]
        self.join, self.remembers, self.told = join, join.step, None

    def was_lost(self, now: float) -> None:
        """Its connection is lost, if it had one; the loss it waited for is of no use any more."""
        if self.presence in _LOST:
            self.presence = _LOST[self.presence]
            self.evaluation, self.is_evaluating, self.lost_at = None, False, now

    def left(self) -> None:
        """It said goodbye, or is let in no more. Its connection, if it had one, is lost already."""
        self.presence = _LEFT.get(self.presence, self.presence)

    def was_overtaken(self, step: int) -> None:
        """This step, or the round it ends, has gone on without it: what it has asked is not answered any more."""
        if not self.presence.is_overtaken:
            self.presence, self.missed_from = _OVERTAKEN[self.presence], step
        self._drop_questions()

    def ends_after(self, step: int) -> None:
        """The run ends with this step, and whoever has more data is to be told so."""
        if self.itinerary.last_step > step:
            has_asked = bool(self.questions)
            self.itinerary, self.is_cut_short = replace(self.itinerary, last_step=step), True
            self.was_overtaken(0)  # and has missed nothing
            if has_asked:
                self.asked_from_behind()

    def asked_from_behind(self) -> None:
        """What it asked shows that it has to be told where to go on."""
        self.presence = _ASKED.get(self.presence, self.presence)

    def catches_up(self, step: int) -> None:
        """It goes on after this step, the last one that is trained, with the others."""
        self.presence, self.missed_from = _TOLD[self.presence], 0
        self.answers = {}
        self.next_question = self.itinerary.after_round(step)
        if self.next_question.kind is Done:
            self.in_round = False  # the step after which it was to contribute has gone on without it

    # Questions and answers

    def asks(self, micro_batch: int, question: Message) -> None:
        """Its question of this micro-batch stays open until it is answered, or the run goes on without it."""
        self.questions[micro_batch] = question
        self.changed()

    def _drop_questions(self) -> None:
        self.questions.clear()
        self.changed()

    def may_ask(self, question: QuestionId) -> bool:
        return self.itinerary.may_ask(question, self.next_question)

    def is_behind(self, question: QuestionId, step: int) -> bool:
        """
        Whether the run has left this question behind, so that the member has to be told where to go on.

        Args:
            step: the last one that is trained.
        """
        if not question.may_be_overtaken:
            return False
        return question.step <= step + 1 if self.presence.is_overtaken else question.is_before(self.next_question)

    def answer(self, micro_batch: int, message: Message, next_question: QuestionId) -> None:
        """Its question of this micro-batch is answered; older answers are no longer needed once it asks something newer."""
        question = QuestionId.of(self.questions.pop(micro_batch))
        if not question.is_with(next(iter(self.answers), question)):
            self.answers = {}
        self.answers[question] = message
        self.next_question = next_question
        self.changed()

    def resumes_after(self) -> int:
        """The step that its `Start` names; the one before, if it must repeat a step whose result it has lost."""
        return self.itinerary.resumes_after(self.next_question, next(iter(self.answers), None), self.remembers)

    # Its share of the round

    def forget_lost_steps(self, repeated: int) -> None:
        """
        Count only what is in its matrices: steps that it remembers, and the one that it repeats with the answers kept.

        Matrices that it sent with more in them are forgotten: it will send those that it has.
        """
        counts = {step: n for step, n in self.labelled_tokens.items() if step <= self.remembers or step == repeated}
        if counts != self.labelled_tokens:
            self.labelled_tokens = counts
            if isinstance(self.questions.get(0), AdapterWeights):
                self._drop_questions()

    def begins_round(self) -> None:
        self.in_round, self.labelled_tokens = False, {}
