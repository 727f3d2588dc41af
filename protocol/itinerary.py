"""
Which question a client asks next: the one rule that both sides follow.

A client's way through a run is made of legs. In every step it asks `Activations` of each micro-batch. Then it exchanges its
adapter, where it has one: `AdapterGradient` at once where a round has one step, else `AdapterWeights` at the round's end and
after the client's last step. At last it asks `Done`. PROTOCOL.md states the same under The course of a run. The device's loop,
`edge_client.training.train`, spells this order out, so that the algorithm can be read there; its tests hold the two together.

A `Start` interrupts this order: the server says after which step to go on, and the client finds its next question from that
and from what it has kept. Both sides must come to the same question, for the server refuses any other.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .messages import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    HeldOutLoss,
    HiddenGradient,
    HiddenStates,
    Message,
    RunEnd,
    Start,
    identity,
)
from .settings import RunSettings

__all__ = ["LEGS", "Itinerary", "Leg", "QuestionId", "Remembered"]


@dataclass(frozen=True)
class Leg:
    """One kind of question on a client's way through a run, and what answers it."""

    question: type
    answer: type
    by_micro_batch: bool = False
    """Whether a step has a question of every micro-batch. The next ones may then be asked before the first is answered."""
    may_be_overtaken: bool = True
    """Whether the run may go on without the answer. Who asks is then told by `Start` where to go on."""
    asks_back: type | None = None
    """What the server may say first, in runs whose labels are on the device: it needs something else for its answer."""
    replied_by: type | None = None
    """With what the client gives it that."""


LEGS = (
    Leg(Activations, ActivationGradient, by_micro_batch=True, asks_back=HiddenStates, replied_by=HiddenGradient),
    Leg(AdapterGradient, EdgeAdapter),
    Leg(AdapterWeights, EdgeAdapter),
    Leg(Done, RunEnd, may_be_overtaken=False),
)
"""
In the order in which a client asks them within a step. `Evaluation` and `HeldOutLoss` are no legs: they may be asked between
any two of them.
"""

_LEG_OF = {leg.question: leg for leg in LEGS}
_ORDER = {kind: place for place, kind in enumerate([*(leg.question for leg in LEGS), Evaluation])}


class QuestionId(NamedTuple):
    """What makes a question this one, within a run and of one client."""

    kind: type
    step: int
    micro_batch: int = 0

    @classmethod
    def of(cls, question: Message) -> "QuestionId":
        return cls(*identity(question))

    def is_before(self, other: "QuestionId") -> bool:
        """Whether a client asks this one earlier."""
        mine, others = ((question.step, _ORDER[question.kind], question.micro_batch) for question in (self, other))
        return mine < others

    def is_with(self, other: "QuestionId") -> bool:
        """Whether both are of one kind and step: such questions may be open, and are repeated, together."""
        return self[:2] == other[:2]

    @property
    def is_by_micro_batch(self) -> bool:
        """See `Leg.by_micro_batch`."""
        return self.kind in _LEG_OF and _LEG_OF[self.kind].by_micro_batch

    @property
    def may_be_overtaken(self) -> bool:
        """See `Leg.may_be_overtaken`."""
        return self.kind in _LEG_OF and _LEG_OF[self.kind].may_be_overtaken

    def __str__(self) -> str:
        part = f", micro-batch {self.micro_batch}" if self.is_by_micro_batch else ""
        return f"{self.kind.__name__} of step {self.step}{part}"


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What a client had reached when it finished a step of a longer round, and has kept with its matrices."""

    step: int
    round: int
    """The last step that was in the adapter with which it began the round."""
    restarts: int
    """Of the server, as `Welcome` gave them."""

    def is_of_round(self, start: Start, restarts: int) -> bool:
        """Whether the matrices that were kept are still those to go on with; else the adapter of ``start`` is."""
        return (self.round, self.restarts) == (start.round, restarts)


@dataclass(frozen=True)
class Itinerary:
    """One client's way through a run, up to the last step for which it has data."""

    settings: RunSettings
    last_step: int

    def after_round(self, step: int) -> QuestionId:
        """The next question of a client that has the adapter in which ``step`` is the last."""
        return QuestionId(Activations, step + 1) if step < self.last_step else QuestionId(Done, self.last_step)

    def after_activations(self, step: int, micro_batch: int) -> QuestionId:
        """The next question after the gradient of this micro-batch."""
        if micro_batch + 1 < self.settings.micro_batches:
            return QuestionId(Activations, step, micro_batch + 1)
        if not self.settings.trains_edge:
            return self.after_round(step)
        if self.settings.aggregate_every == 1:
            return QuestionId(AdapterGradient, step)
        if self.ends_round(step):
            return QuestionId(AdapterWeights, step)
        return QuestionId(Activations, step + 1)

    def may_ask(self, question: QuestionId, next_question: QuestionId) -> bool:
        """Whether it is the next question, or a later micro-batch of the same step."""
        if not question.is_with(next_question):
            return False
        several = self.settings.micro_batches if question.is_by_micro_batch else 1
        return next_question.micro_batch <= question.micro_batch < several

    def ends_round(self, step: int) -> bool:
        """Whether this client exchanges its adapter after ``step``."""
        return self.settings.ends_round(step) or step == self.last_step

    def resumes_after(self, next_question: QuestionId, answered_last: QuestionId | None, remembered: int) -> int:
        """
        The ``step`` of `Start` for a client that is to ask ``next_question``: the server's half of the rule.

        Args:
            answered_last: whose answers are still kept, so that the client may repeat it.
            remembered: the last step that the client has finished and remembers.
        """
        kind, step, _ = next_question
        if kind is Activations:
            # The answers of the step before are still kept, so a client that has not kept its outcome can do it again.
            is_lost = answered_last is not None and answered_last[:2] == (Activations, step - 1) and remembered < step - 1
            return step - 2 if is_lost else step - 1
        if kind is AdapterGradient or (kind is AdapterWeights and remembered != step):
            return step - 1
        return min(step, self.last_step)

    def resume(self, start: Start, restarts: int, remembered: Remembered | None) -> QuestionId:
        """
        The first question of a client that goes where ``start`` says: the client's half of the rule.

        Args:
            restarts: as the `Welcome` before gave them.
            remembered: the latest step up to that of ``start`` that the client has kept.
        """
        has_done_it = remembered is not None and remembered.step == start.step and remembered.is_of_round(start, restarts)
        if has_done_it and self.ends_round(start.step):
            return QuestionId(AdapterWeights, start.step)
        return self.after_round(start.step)

    @staticmethod
    def may_ask_again(question: Message, start: Start) -> bool:
        """Whether a question that was open when the connection broke is still due after ``start``, of the same round."""
        kind, step, _ = identity(question)
        if kind is Evaluation:
            return True
        if kind is HeldOutLoss:  # of the run's end, a client's own data may have ended earlier
            return start.step <= step == start.round
        if kind in (Activations, AdapterGradient):
            return step == start.step + 1 <= start.total_steps
        return step == start.step
