"""
Who is in the run, when a step can start, what is averaged: the server's decisions.

Pure: messages and the time come in, actions go out. No sockets, no clock, no torch.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
    Contribution,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    Hello,
    Join,
    Message,
    RemoteProtocolError,
    RunSettings,
    Start,
    Tensors,
    Welcome,
)
from protocol.settings import LARGEST_COUNT

from .timing import StepTiming

__all__ = [
    "Action",
    "Aggregate",
    "Evaluate",
    "Federation",
    "FinishRun",
    "FinishStep",
    "ModelLimits",
    "Reply",
    "Train",
]


@dataclass(frozen=True)
class Reply:
    """Send this to that client."""

    client: str
    message: Message


@dataclass(frozen=True)
class Train:
    """Compute a step on these batches, then call `Federation.trained`."""

    step: int
    total_steps: int
    batches: dict[str, Activations]
    """By client, in the order of their names: the order of the union batch."""


@dataclass(frozen=True)
class Aggregate:
    """Make the new edge adapter of these contributions, then call `Federation.aggregated`."""

    step: int
    total_steps: int
    contributions: dict[str, Tensors]
    """LoRA gradients to be summed where a round has one step, else LoRA matrices to be averaged."""
    weights: dict[str, int]
    """Labelled tokens of each contributor in the round."""


@dataclass(frozen=True)
class Evaluate:
    """Compute a held-out batch's loss, then call `Federation.evaluated`."""

    client: str
    batch: Evaluation


@dataclass(frozen=True)
class FinishStep:
    """A step is complete: write its line of metrics once the replies before it are sent."""

    step: int
    loss: float
    tokens: int
    labelled_tokens: int
    seconds: dict[str, dict[str, float]]


@dataclass(frozen=True)
class FinishRun:
    """The run is complete, or nobody is left: write the adapter, then call `Federation.saved`."""

    step: int


Question = TypeVar("Question", bound="Message | Contribution")

LARGEST_VALUE = 1e6
"""
Of activations, gradients and adapters, in magnitude. GPT-2's largest activations are some thousands; what is beyond would make
the loss of everybody infinite, and belongs to one client that has diverged or means harm.
"""

Action = Reply | Train | Aggregate | Evaluate | FinishStep | FinishRun


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a batch must respect."""

    fingerprint: str
    width: int
    vocabulary_size: int
    num_positions: int
    max_batch_tokens: int
    edge_shapes: dict[str, tuple[int, int]]
    """Of the edge's LoRA matrices."""


class Phase(enum.Enum):
    GATHERING = "waiting for clients"
    ACTIVATIONS = "waiting for activations"
    TRAINING = "computing the step"
    CONTRIBUTIONS = "waiting for the clients' adapters"
    AGGREGATING = "computing the edge adapter"
    SAVING = "saving the adapter"
    FINISHED = "finished"


@dataclass
class Member:
    """A client of the run."""

    join: Join
    last_step: int
    """The last step it has data for."""
    next_question: tuple[type, int]
    """What it has to ask next, besides evaluations: kind and step."""
    labelled_tokens: int = 0
    """In this round."""


@dataclass
class Federation:
    """One run. Every method that is told ``now`` gets seconds of one monotonic clock."""

    run: str
    settings: RunSettings
    limits: ModelLimits
    edge_adapter: Tensors
    step: int = 0
    """Steps trained."""
    phase: Phase = Phase.GATHERING
    members: dict[str, Member] = field(default_factory=dict)
    greeted: set[str] = field(default_factory=set)
    """Names in use, whether or not they have joined."""
    waiting: dict[str, Message] = field(default_factory=dict)
    """Questions of the present round that are not answered yet, at most one a member."""
    timing: StepTiming = field(default_factory=StepTiming)
    total_steps: int = 0
    _loss: float = math.nan
    _tokens: int = 0
    _labelled_tokens: int = 0
    _finished_step: int = 0

    # What comes in

    def welcome(self, hello: Hello) -> Welcome:
        """
        Raises:
            RemoteProtocolError: another model, a name in use, or no place in the run.
        """
        if hello.fingerprint != self.limits.fingerprint:
            raise RemoteProtocolError(
                f"the model of {hello.name} has fingerprint {ascii(hello.fingerprint[:64])[1:-1]}, "
                f"the run's has {self.limits.fingerprint}; use the same base model on both sides"
            )
        if hello.name in self.greeted:
            raise RemoteProtocolError(f"the name {hello.name} is taken; choose another with --name")
        if self.phase is not Phase.GATHERING or len(self.greeted) >= self.settings.clients:
            raise RemoteProtocolError(f"the run has its {self.settings.clients} clients already")
        self.greeted.add(hello.name)
        return Welcome(run=self.run, settings=self.settings, fingerprint=self.limits.fingerprint)

    def join(self, name: str, join: Join, now: float) -> list[Action]:
        """
        Raises:
            RemoteProtocolError: its batches would be too large.
        """
        if join.longest > self.limits.num_positions:
            raise RemoteProtocolError(
                f"sequences of {join.longest} tokens; the model has {self.limits.num_positions} positions"
            )
        if join.batch_size * join.longest > self.limits.max_batch_tokens:
            raise RemoteProtocolError(
                f"batches of up to {join.batch_size} x {join.longest} tokens, the server takes "
                f"{self.limits.max_batch_tokens}; choose a smaller --batch-size or --max-length"
            )
        last_step = self.settings.steps_of_client(join.num_samples, join.batch_size)
        if last_step > LARGEST_COUNT:
            raise RemoteProtocolError(f"{join.num_samples} samples take {last_step} steps; at most {LARGEST_COUNT} can be")
        self.members[name] = Member(join, last_step, (Activations, 1))
        return self._advance(now)

    def receive(self, name: str, message: Message, now: float) -> list[Action]:
        """
        A member's question.

        Raises:
            RemoteProtocolError: it is out of turn, or does not fit the run.
        """
        member = self.members[name]
        if isinstance(message, Evaluation):
            self._check_batch(member, message)
            return [Evaluate(name, message)]
        if not isinstance(message, Activations | Contribution | Done):
            raise RemoteProtocolError(f"{type(message).__name__} out of turn")
        kind, step = member.next_question
        if (type(message), message.step) != (kind, step):
            raise RemoteProtocolError(
                f"expected {kind.__name__} of step {step}, got {type(message).__name__} of step {message.step}"
            )
        if isinstance(message, Activations):
            self._check_batch(member, message)
        elif not isinstance(message, Done):
            self._check_adapter(message.tensors)
        if not isinstance(message, Done):
            self.timing.question(name, message.edge_seconds, now)
        self.waiting[name] = message
        return self._advance(now)

    def leave(self, name: str, now: float) -> list[Action]:
        """A client is gone for good; the run goes on with the others."""
        self.greeted.discard(name)
        self.waiting.pop(name, None)
        if self.members.pop(name, None) is None or self.phase is Phase.GATHERING:
            return []
        return self._advance(now)

    def trained(self, loss: float, gradients: dict[str, Array], seconds: float, now: float) -> list[Action]:
        """The step of the last `Train` is computed: its loss, and each client's gradient at the cut."""
        self.step += 1
        self._loss = loss
        self.timing.computed(list(gradients), seconds)
        actions: list[Action] = []
        for name, gradient in gradients.items():
            if name in self.members:
                answer = ActivationGradient(step=self.step, loss=loss, values=gradient)
                actions += self._reply(name, answer, self._question_after_gradient(self.members[name]), now)
        if self.settings.ends_round(self.step) or not self._participants():
            self.phase = Phase.CONTRIBUTIONS
        else:
            actions += self._finish_step()
        return actions + self._advance(now)

    def aggregated(self, edge_adapter: Tensors, seconds: float, now: float) -> list[Action]:
        """The edge adapter of the last `Aggregate` is computed."""
        self.edge_adapter = edge_adapter
        contributors = [name for name in self._contributors() if name in self.waiting]
        self.timing.computed(contributors, seconds)
        actions: list[Action] = []
        for name in contributors:
            member = self.members[name]
            member.labelled_tokens = 0
            ahead = self.step < member.last_step
            next_question = (Activations, self.step + 1) if ahead else (Done, member.last_step)
            actions += self._reply(name, EdgeAdapter(step=self.step, tensors=edge_adapter), next_question, now)
        return actions + self._finish_step() + self._advance(now)

    def saved(self, now: float) -> list[Action]:
        """The adapter of `FinishRun` is on disk."""
        self.phase = Phase.FINISHED
        return self._advance(now)

    def evaluated(self, name: str, index: int, summed_loss: float, now: float) -> list[Action]:
        """The loss of an `Evaluate` is computed."""
        if name not in self.members:
            return []
        self.timing.replied(name, now)  # the time of an evaluation belongs to no step
        return [Reply(name, EvaluationLoss(index=index, summed_loss=summed_loss))]

    # What follows from it

    def _advance(self, now: float) -> list[Action]:
        """Go on as far as what has come in allows."""
        if self.phase is Phase.GATHERING:
            return self._start(now) if len(self.members) == self.settings.clients else []
        if self.phase is Phase.ACTIVATIONS:
            participants = self._participants()
            if not participants:
                return self._close_last_round(now)
            if self._asked(Activations).keys() >= set(participants):
                return [self._train(participants, now)]
        if self.phase is Phase.CONTRIBUTIONS:
            contributors = self._contributors()
            if not contributors:
                return self._finish_step() + self._advance(now)
            if self._asked(Contribution).keys() >= set(contributors):
                return [self._aggregate(contributors, now)]
        if self.phase is Phase.FINISHED:
            return self._answer_done(now)
        return []

    def _start(self, now: float) -> list[Action]:
        self.phase = Phase.ACTIVATIONS
        self.total_steps = max(member.last_step for member in self.members.values())
        actions: list[Action] = []
        for name in self.members:
            answer = Start(step=self.step, total_steps=self.total_steps, adapter=self.edge_adapter)
            actions += self._reply(name, answer, (Activations, 1), now)
        return actions

    def _train(self, participants: list[str], now: float) -> Train:
        self.phase = Phase.TRAINING
        asked = self._asked(Activations)
        batches = {name: asked[name] for name in participants}
        for name, batch in batches.items():
            self.members[name].labelled_tokens += len(batch.labels)
        self._tokens = sum(len(batch.values) for batch in batches.values())
        self._labelled_tokens = sum(len(batch.labels) for batch in batches.values())
        self.timing.computing(participants, now)
        return Train(self.step + 1, self.total_steps, batches)

    def _aggregate(self, contributors: list[str], now: float) -> Aggregate:
        self.phase = Phase.AGGREGATING
        asked = self._asked(Contribution)
        contributions = {name: asked[name].tensors for name in contributors}
        weights = {name: self.members[name].labelled_tokens for name in contributors}
        self.timing.computing(contributors, now)
        return Aggregate(self.step, self.total_steps, contributions, weights)

    def _finish_step(self) -> list[Action]:
        self.phase = Phase.ACTIVATIONS
        seconds = self.timing.take()
        if self._finished_step == self.step:  # a last round closed early, by the leaving of those who had steps left
            return []
        self._finished_step = self.step
        return [FinishStep(self.step, self._loss, self._tokens, self._labelled_tokens, seconds)]

    def _close_last_round(self, now: float) -> list[Action]:
        if any(member.next_question[0] is AdapterWeights for member in self.members.values()):
            self.phase = Phase.CONTRIBUTIONS
            return self._advance(now)
        return self._finish_run()

    def _finish_run(self) -> list[Action]:
        self.phase = Phase.SAVING
        return [FinishRun(self.step)]

    def _answer_done(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name in self._asked(Done):
            answer = EdgeAdapter(step=self.step, tensors=self.edge_adapter)
            actions += self._reply(name, answer, (Evaluation, self.step), now)
        return actions

    def _reply(self, name: str, message: Message, next_question: tuple[type, int], now: float) -> list[Action]:
        self.waiting.pop(name, None)
        self.members[name].next_question = next_question
        self.timing.replied(name, now)
        return [Reply(name, message)]

    # The calendar

    def _participants(self) -> list[str]:
        """Clients with data for the step, in the order of the union batch."""
        return sorted(name for name, member in self.members.items() if member.last_step > self.step)

    def _contributors(self) -> list[str]:
        """Clients whose adapters make the next edge adapter: all that took part in the round of the last step."""
        round_start = (self.step - 1) - (self.step - 1) % self.settings.aggregate_every
        return sorted(name for name, member in self.members.items() if member.last_step > round_start)

    def _asked(self, kind: type[Question]) -> dict[str, Question]:
        """The open questions of this kind, by client."""
        return {name: question for name, question in self.waiting.items() if isinstance(question, kind)}

    def _question_after_gradient(self, member: Member) -> tuple[type, int]:
        if self.settings.aggregate_every == 1:
            return AdapterGradient, self.step
        if self.settings.ends_round(self.step) or self.step == member.last_step:
            return AdapterWeights, self.step
        return Activations, self.step + 1

    # What a message must respect, beyond what its type says

    def _check_batch(self, member: Member, batch: Activations | Evaluation) -> None:
        limits, rows = self.limits, member.join.batch_size * member.join.longest
        if batch.values.dtype.name != self.settings.precision:
            raise RemoteProtocolError(f"values are {batch.values.dtype.name}, the run's are {self.settings.precision}")
        if batch.values.shape[1] != limits.width:
            raise RemoteProtocolError(f"values are {batch.values.shape[1]} wide, the model is {limits.width}")
        _check_size(batch.values)
        if len(batch.values) > rows or len(batch.lengths) > member.join.batch_size:
            raise RemoteProtocolError(f"{len(batch.values)} rows, at most {rows} were announced")
        if batch.lengths.max() > member.join.longest:
            raise RemoteProtocolError(
                f"a sequence of {batch.lengths.max()} tokens, at most {member.join.longest} were announced"
            )
        if len(batch.labels) and not 0 <= batch.labels.min() <= batch.labels.max() < limits.vocabulary_size:
            raise RemoteProtocolError(f"labels must be ids below {limits.vocabulary_size}")

    def _check_adapter(self, tensors: Tensors) -> None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != self.limits.edge_shapes:
            raise RemoteProtocolError("the tensors are not the LoRA matrices of the edge part")
        if any(tensor.dtype.name != self.settings.precision for tensor in tensors.values()):
            raise RemoteProtocolError(f"the run's adapters are {self.settings.precision}")
        for tensor in tensors.values():
            _check_size(tensor)


def _check_size(values: Array) -> None:
    largest = np.abs(values).max(initial=0.0)
    if largest > LARGEST_VALUE:
        raise RemoteProtocolError(f"has values up to {largest:.3g}; beyond {LARGEST_VALUE:g} training has diverged")
