"""
Who is in the run, when a step can start, what is averaged: the server's decisions.

Pure: messages and the time come in, actions go out. No sockets, no clock, no torch.

A member whose connection is lost stays a member, and so do its questions: when it comes back it is told where to go on, and
a question that was answered already gets the same answer again. Nothing is computed, averaged or stepped twice.
"""

import enum
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from protocol import (
    EXACT,
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
    Itinerary,
    Join,
    Message,
    QuestionId,
    RemoteProtocolError,
    RunEnd,
    RunSettings,
    Seconds,
    Start,
    Tensors,
    Welcome,
    identity,
)
from protocol.limits import LARGEST_VALUE
from protocol.settings import LARGEST_COUNT
from protocol.shuffling import NOT_SHUFFLED, looks_plain
from storage import part_that_differs
from terminal import count, duration, listed

from .deadline import Deadline
from .gate import Gate
from .timing import StepTiming

__all__ = [
    "Action",
    "Aggregate",
    "Checkpoint",
    "Evaluate",
    "Federation",
    "FinishRun",
    "FinishStep",
    "ModelLimits",
    "NameInUse",
    "Reply",
    "Report",
    "Train",
]

logger = logging.getLogger("gpu_server")


@dataclass(frozen=True)
class Reply:
    """Send this to that client, if it is connected."""

    client: str
    message: Message


@dataclass(frozen=True)
class Train:
    """Compute a part of a step, then call `Federation.trained`."""

    step: int
    total_steps: int
    micro_batch: int
    check: list[str] | None
    """
    Where the codec is checked: others to be tried, too. Then `Federation.checked` is called before.
    """
    batches: dict[str, Activations]
    """
    By client, in the order of their names: the order of the union batch. None at all where those who began the step have
    gone: then it ends with what there is of it.
    """


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
    seconds: dict[str, Seconds]
    """By client: what it has spent since the step before."""
    deadline: float
    """Seconds that the next step waits for its clients' activations before it asks whether a quorum is there."""
    codec: str
    """In which this step's activations came."""
    server_compute: float
    """Seconds that the server computed, also while clients did not wait for it."""


@dataclass(frozen=True)
class Checkpoint:
    """A round is complete: write what is needed to go on from here, then call `Federation.checkpointed`."""

    step: int


@dataclass(frozen=True)
class FinishRun:
    """The run is complete, or nobody is left: write the adapter, then call `Federation.saved`."""

    step: int


@dataclass(frozen=True)
class Report:
    """Tell the operator."""

    text: str


class NameInUse(RemoteProtocolError):
    """A client of this name is connected."""


Question = TypeVar("Question", bound="Message | Contribution")
OfAStep = Activations | AdapterGradient | AdapterWeights | Done

LONGEST_BETWEEN_REPORTS = 3600.0
"""Seconds. A wait is told of at growing distances: again when it is twice as long as when it was told before."""

Action = Reply | Train | Aggregate | Evaluate | FinishStep | Checkpoint | FinishRun | Report


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


WAITED_FOR: dict[Phase, type] = {
    Phase.GATHERING: Join,
    Phase.ACTIVATIONS: Activations,
    Phase.CONTRIBUTIONS: Contribution,
}


@dataclass
class Member:
    """A client of the run."""

    join: Join
    itinerary: Itinerary
    next_question: QuestionId = field(default_factory=lambda: QuestionId(Activations, 1))
    """The first that is not answered, evaluations aside. It may have asked the next ones, too."""
    connected: bool = True
    absent: bool = False
    """A step or a round has gone on without it. It is not waited for until it has been told where to go on."""
    left: bool = False
    """For good, as far as it knows, so nobody waits for it. Until a step or a round has gone on without it, it may come back
    as if its connection had been lost."""
    in_round: bool = False
    """It took part in a step of the present round."""
    labelled_tokens: dict[int, int] = field(default_factory=dict)
    """In this round, by step, of those steps that are in its matrices."""
    remembers: int = 0
    """The last step that it has finished and not forgotten, as its last message tells."""
    told: tuple[int, int] | None = None
    """Step and round of the last `Start` on its present connection."""
    answers: dict[QuestionId, Message] = field(default_factory=dict)
    """Those to the questions of one kind and step that were answered last."""
    evaluation: Evaluation | None = None
    """The held-out batch whose loss its present connection waits for."""
    lost_at: float | None = None
    """When its last connection was lost; None while it is connected."""
    missed_from: int = 0
    """The first step that has gone on without it, while it is absent."""

    @property
    def gone_on_after(self) -> int:
        """What it asks of steps up to this one, that `Start` has answered; -1 where there was none."""
        return -1 if self.told is None else self.told[0]

    @property
    def last_step(self) -> int:
        """The last step it has data for."""
        return self.itinerary.last_step


@dataclass
class Federation:
    """
    One run. Every method that is told ``now`` gets seconds of one monotonic clock.

    Args:
        quorum: clients that a step needs at least once its deadline has passed; None is all of them.
        checkpoint_every: rounds.
    """

    run: str
    settings: RunSettings
    limits: ModelLimits
    edge_adapter: Tensors
    quorum: int | None = None
    checkpoint_every: int = 1
    deadline: Deadline = field(default_factory=Deadline)
    gate: Gate | None = None
    """None: the run has one codec from beginning to end."""
    restarts: int = 0
    step: int = 0
    """Steps trained."""
    round: int = 0
    """The last step that is in the edge adapter."""
    checkpoints: tuple[int, int] = (0, 0)
    """Steps of the last two checkpoints, the earlier first."""
    phase: Phase = Phase.GATHERING
    members: dict[str, Member] = field(default_factory=dict)
    greeted: set[str] = field(default_factory=set)
    """Names in use that have not joined."""
    micro_batch: int = 0
    """The one that is gathered or computed."""
    waiting: dict[tuple[str, int], Message] = field(default_factory=dict)
    """Questions of the present round that are not answered yet, by client and micro-batch."""
    timing: StepTiming = field(default_factory=StepTiming)
    total_steps: int = 0
    _since: float = 0.0
    """When the present phase began."""
    _deadline_passed: bool = False
    """Of the present phase, with too few clients to go on without the others."""
    _told_after: float = 0.0
    """Seconds from `_since` until it was last told for whom the phase waits; 0: it was not yet."""
    _returning: set[str] = field(default_factory=set)
    """Absent members that wait to be told where to go on."""
    _in_step: dict[str, int] = field(default_factory=dict)
    """Members whose first micro-batch of the present step is computed, and their labelled tokens in it so far."""
    _loss: float = math.nan
    _tokens: int = 0
    _labelled_tokens: int = 0
    _finished_step: int = 0
    _server_compute: float = 0.0
    _link_seconds: float = 0.0
    """Of all clients since the codec was checked last; and all their seconds."""
    _all_seconds: float = 0.0

    # Across a restart of the server

    def membership(self) -> dict[str, dict[str, Any]]:
        """What has to be known of the members to go on after a round's end."""
        return {name: {**asdict(member.join), "left": member.left} for name, member in self.members.items()}

    def restore(self, step: int, earliest: int, membership: dict[str, dict[str, Any]], now: float) -> list[Action]:
        """Stand at the end of the round that ended with ``step``, with everybody's connection lost.

        Args:
            earliest: step of the earliest checkpoint that there is.
        """
        for name, fields in membership.items():
            join = Join(**{key: value for key, value in fields.items() if key != "left"})
            self.members[name] = Member(join, self._itinerary(join), connected=False, left=fields["left"])
        self.step = self.round = self._finished_step = step
        self.checkpoints = (earliest, step)
        self.total_steps = max(member.last_step for member in self.members.values())
        for member in self.members.values():
            member.next_question = member.itinerary.after_round(self.step)
        self._enter(Phase.ACTIVATIONS, now)
        return self._advance(now)

    # What comes in

    def welcome(self, hello: Hello) -> Welcome:
        """
        Raises:
            NameInUse: a client of this name is connected.
            RemoteProtocolError: another model, or no place in the run.
        """
        if hello.fingerprint != self.limits.fingerprint:
            what = part_that_differs(hello.fingerprint, self.limits.fingerprint)
            raise RemoteProtocolError(
                f"the {what} of {hello.name} has fingerprint {ascii(hello.fingerprint[:64])[1:-1]}, "
                f"the run's has {self.limits.fingerprint}; use the same base {what} on both sides"
            )
        may_use = self.settings.codecs() | (self.gate.may_use() if self.gate is not None else set())
        missing = may_use - {EXACT, *hello.codecs}
        if missing:
            raise RemoteProtocolError(
                f"{hello.name} does not offer the codec {', '.join(sorted(missing))}, which this run uses; "
                f"update splitlora-edge there, or start the run with --codec float32"
            )
        member = self.members.get(hello.name)
        if hello.name in self.greeted or (member is not None and member.connected):
            raise NameInUse(
                f"the name {hello.name} is in use by a device that is connected; it is free again when that one has gone, "
                f"and another device needs a name of its own"
            )
        if member is None:
            places = self.settings.clients - len(self.greeted.union(self.members))
            if self.phase is not Phase.GATHERING or places < 1:
                raise RemoteProtocolError(f"the run is full: it takes {count(self.settings.clients, 'device')} (--clients)")
        else:
            self._check_return(hello.name, member)
        self.greeted.add(hello.name)
        return Welcome(run=self.run, settings=self.settings, fingerprint=self.limits.fingerprint, restarts=self.restarts)

    def join(self, name: str, join: Join, now: float) -> list[Action]:
        """
        Raises:
            RemoteProtocolError: its batches would be too large, or are not those that it joined the run with before.
        """
        member = self.members.get(name)
        if member is None:
            member = self._new_member(join)
            if not self.members:
                self._enter(Phase.GATHERING, now)  # from now on somebody waits
            self.members[name] = member
            self.greeted.discard(name)
            return self._advance(now)
        self._check_return(name, member)  # the run may have ended since its welcome
        before = member.join
        if replace(join, step=0, kept=None).__dict__ != replace(before, step=0, kept=None).__dict__:
            was, now_is = (
                f"{count(each.num_samples, 'sample')} of up to {count(each.longest, 'token')} in batches of {each.batch_size}"
                for each in (before, join)
            )
            raise RemoteProtocolError(f"{name} joined this run with {was}, and comes back with {now_is}; start it as before")
        self.greeted.discard(name)
        member.join, member.connected, member.left = join, True, False
        member.told = None
        member.remembers = join.step
        return self._tell_where_to_go_on(name, now)

    def receive(self, name: str, message: Message, now: float) -> list[Action]:
        """
        A member's question.

        Raises:
            RemoteProtocolError: it is out of turn, or does not fit the run.
        """
        member = self.members[name]
        if isinstance(message, Evaluation):
            self._check_batch(name, message)
            member.evaluation = message
            return [Evaluate(name, message)]
        if not isinstance(message, OfAStep):
            raise RemoteProtocolError(f"{type(message).__name__} out of turn")
        if isinstance(message, Activations) and message.step <= member.gone_on_after:
            logger.debug("%s: ignored Activations of step %d: Start has answered it meanwhile", name, message.step)
            return []
        kind = _waited_for_as(type(message))
        actions: list[Action] = []
        if self.deadline.observe(kind, self.timing.away(name, now)) and kind is Activations:
            unused = "" if self.quorum is not None else " (acts only with --quorum)"
            actions.append(Report(f"step deadline {duration(self.deadline.seconds(kind))}, measured{unused}"))
        return actions + self._take(name, message, now)

    def _take(self, name: str, message: OfAStep, now: float) -> list[Action]:
        member, question = self.members[name], QuestionId(*identity(message))
        if not member.absent and self._may_ask(member, question):
            self._check(name, message)
            place = name, question[2]
            if place not in self.waiting and not isinstance(message, Done):
                self.timing.question(place, message.seconds, now)
            self.waiting[place] = message
            return self._advance(now)
        if not member.absent and question in member.answers:
            self.timing.replied(name, now)
            return [Reply(name, member.answers[question])]
        # A client would take the same `Start` for one message, delivered twice, and wait for ever.
        told_already = not member.absent and member.told == (self._resumes_after(member), self.round)
        if told_already or not self._is_behind(member, question):
            raise RemoteProtocolError(f"expected {_worded(member.next_question)}, got {_worded(question)}")
        member.remembers = message.step - 1 if isinstance(message, Activations | AdapterGradient) else message.step
        return self._tell_where_to_go_on(name, now)

    def disconnected(self, name: str, now: float) -> list[Action]:
        """A client's connection is lost. Once the run has started it keeps its place."""
        self.greeted.discard(name)
        if self.phase is Phase.GATHERING:
            self.members.pop(name, None)
        elif name in self.members:
            member = self.members[name]
            member.connected, member.evaluation, member.lost_at = False, None, now
            self._returning.discard(name)
        return []

    def leave(self, name: str, now: float) -> list[Action]:
        """A client says that it is gone for good; the run goes on with the others."""
        self.disconnected(name, now)
        member = self.members.get(name)
        if member is None:
            return []
        member.left = True
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed; see `expires`."""
        return self._advance(now)

    def expires(self) -> float | None:
        """When `tick` should be called, if nothing else happens before."""
        if self.phase is Phase.GATHERING and not self.members:
            return None
        kind = WAITED_FOR.get(self.phase)
        if kind is None:
            return None
        seconds = self._next_report(kind)
        if self.quorum is not None and not self._deadline_passed:
            seconds = min(seconds, self.deadline.seconds(kind))
        return self._since + seconds

    def waits_for(self, now: float) -> tuple[list[str], float]:
        """The members that everybody waits for, and since how many seconds; nobody while the server computes."""
        if self.phase is Phase.FINISHED:
            return self.unfinished(), now - self._since
        kind = WAITED_FOR.get(self.phase)
        asked = () if kind is None else self._asked(kind)
        names = [name for name in self._wanted() if name not in asked]
        return names, now - self._since if names else 0.0

    def trained(
        self, loss: float, labelled_tokens: int, gradients: dict[str, Array], seconds: float, now: float
    ) -> list[Action]:
        """
        The last `Train` is computed.

        Args:
            loss: nats per labelled token of the step so far.
            labelled_tokens: of the step so far.
            gradients: of each client's micro-batch, at the cut.
        """
        step, ends_step = self.step + 1, self.micro_batch + 1 == self.settings.micro_batches
        self._loss, self._labelled_tokens = loss, labelled_tokens
        self._server_compute += seconds
        self.step += ends_step
        actions: list[Action] = []
        asked = self._asked(Activations)
        for name, gradient in gradients.items():
            if name in asked:  # it has not left meanwhile, and come back perhaps
                answer = ActivationGradient(
                    step=step,
                    micro_batch=self.micro_batch,
                    loss=loss,
                    labelled_tokens=labelled_tokens,
                    values=gradient,
                    codec=self.codec_of(step + 1) if ends_step else "",
                    queue_seconds=self.timing.queued((name, self.micro_batch)),
                    compute_seconds=seconds,
                )
                next_question = self.members[name].itinerary.after_activations(step, self.micro_batch)
                actions += self._reply(name, answer, next_question, now)
        if not ends_step:
            self.micro_batch += 1
            self._enter(Phase.ACTIVATIONS, now)
            return actions + self._advance(now)
        self.micro_batch = 0
        for name, num_labels in self._in_step.items():
            member = self.members[name]
            if not member.absent:  # else it takes the step back
                member.labelled_tokens[self.step] = num_labels
        if self.settings.ends_round(self.step) or not self._participants():
            self._end_round(now)
        else:
            actions += self._finish_step(now)
        return actions + self._advance(now)

    def checked(self, changes: dict[str, float]) -> list[Action]:
        """By how much codecs change the loss of the step that is computed, in nats per labelled token."""
        if self.gate is None or not changes:
            return []
        link_share = self._link_seconds / self._all_seconds if self._all_seconds else 0.0
        self._link_seconds = self._all_seconds = 0.0
        note = self.gate.check(self.step + 1, changes, link_share)
        return [] if note is None else [Report(note)]

    def aggregated(self, edge_adapter: Tensors, seconds: float, now: float) -> list[Action]:
        """The edge adapter of the last `Aggregate` is computed."""
        self.edge_adapter = edge_adapter
        self._server_compute += seconds
        actions: list[Action] = []
        for name in sorted(self._asked(Contribution)):
            answer = EdgeAdapter(
                step=self.step,
                tensors=edge_adapter,
                checkpoint=self.checkpoints[0],
                queue_seconds=self.timing.queued((name, 0)),
                compute_seconds=seconds,
            )
            actions += self._reply(name, answer, self.members[name].itinerary.after_round(self.step), now)
        self._close_round()
        actions += self._finish_step(now)
        if self._rounds_since_checkpoint() >= self.checkpoint_every or not self._participants():
            actions.append(Checkpoint(self.step))
        return actions + self._advance(now)

    def checkpointed(self, step: int) -> None:
        """The checkpoint of a `Checkpoint` is on disk."""
        self.checkpoints = (self.checkpoints[1], step)

    def saved(self, now: float) -> list[Action]:
        """The adapter of `FinishRun` is on disk."""
        self._enter(Phase.FINISHED, now)
        return self._advance(now)

    def evaluated(self, name: str, batch: Evaluation, summed_loss: float, now: float) -> list[Action]:
        """The loss of an `Evaluate` is computed. A client that has come back meanwhile asks again, or something else."""
        member = self.members[name]
        if member.evaluation is not batch:
            return []
        member.evaluation = None
        self.timing.replied(name, now)  # the time of an evaluation belongs to no step
        return [Reply(name, EvaluationLoss(index=batch.index, summed_loss=summed_loss))]

    def unfinished(self) -> list[str]:
        """Members that have not said goodbye: whether an adapter that was sent has arrived, only they know."""
        return [name for name, member in self.members.items() if not member.left]

    # What follows from it

    def _advance(self, now: float) -> list[Action]:
        """Go on as far as what has come in, and the time, allow."""
        if self.phase is Phase.GATHERING:
            return self._start(now) if len(self.members) == self.settings.clients else self._wait_for_joins(now)
        if self.phase is Phase.ACTIVATIONS and self.micro_batch:
            rest = self._wanted()
            ready, notes = self._gathered(Activations, rest, now)
            return notes + ([self._train(ready, now)] if ready or not rest else [])
        if self.phase is Phase.ACTIVATIONS:
            actions = self._answer_returning(now)
            participants = self._wanted()
            if not participants:
                return actions + self._close_last_round(now)
            ready, notes = self._gathered(Activations, participants, now)
            return actions + notes + ([self._train(ready, now)] if ready else [])
        if self.phase is Phase.CONTRIBUTIONS:
            contributors = self._wanted()
            if not contributors:  # all have left: the edge adapter stays as it was
                self._overtake_without(contributors)
                self._close_round()
                return self._finish_step(now) + self._advance(now)
            ready, notes = self._gathered(Contribution, contributors, now)
            return notes + ([self._aggregate(ready, now)] if ready else [])
        if self.phase is Phase.FINISHED:
            return self._answer_returning(now) + self._answer_done(now)
        return []

    def _gathered(self, kind: type[Question], wanted: list[str], now: float) -> tuple[list[str], list[Action]]:
        """
        Those of ``wanted`` with whom the step can go on: all that are present, or after the deadline those that have
        asked, if they are a quorum; nobody as long as the step has to wait.
        """
        asked = self._asked(kind)
        ready = [name for name in wanted if name in asked]
        missing = [name for name in wanted if name not in asked]
        needed = len(wanted) if self.quorum is None else min(self.quorum, len(wanted))
        awaited = [name for name in missing if not self.members[name].absent]
        if len(ready) >= needed and not awaited:
            return ready, []
        self._deadline_passed = self.quorum is not None and now - self._since >= self.deadline.seconds(kind)
        if len(ready) >= needed and self._deadline_passed:
            silent = f"{self._names(awaited)}, silent for {duration(now - self._since)}"
            return ready, [Report(f"step {self._step_under_way} goes on without {silent}")]
        quorum = "" if self.quorum is None else f", {needed} needed"
        here = f"{len(ready)} of {count(len(wanted), 'device')} ready{quorum}"
        return [], self._report_wait(kind, f"step {self._step_under_way} waits for {self._names(missing)}, silent", here, now)

    def _wait_for_joins(self, now: float) -> list[Action]:
        missing = self.settings.clients - len(self.members)
        here = f"{listed(self.members)} joined" if self.members else "nobody has joined"
        return self._report_wait(Join, f"the run waits for {count(missing, 'more device')} to join,", here, now)

    def _report_wait(self, kind: type, who: str, here: str, now: float) -> list[Action]:
        waited = now - self._since
        if waited < self._next_report(kind):
            return []
        self._told_after = waited
        return [Report(f"{who} for {duration(waited)}; {here}")]

    def _next_report(self, kind: type) -> float:
        """Seconds from the beginning of the phase."""
        told = self._told_after
        return told + min(told, LONGEST_BETWEEN_REPORTS) if told else self.deadline.patience(kind)

    def _names(self, clients: list[str]) -> str:
        return listed(name if self.members[name].connected else f"{name} (not connected)" for name in clients)

    @property
    def _step_under_way(self) -> int:
        return self.step + 1 if self.phase is Phase.ACTIVATIONS else self.step

    def _start(self, now: float) -> list[Action]:
        self._enter(Phase.ACTIVATIONS, now)
        self.total_steps = max(member.last_step for member in self.members.values())
        actions: list[Action] = [Checkpoint(0)]
        for name in self.members:
            actions += self._tell_where_to_go_on(name, now)
        return actions

    def _train(self, participants: list[str], now: float) -> Train:
        """The micro-batch of these, or of nobody, which ends the step."""
        of_step = self._in_step if self.micro_batch else [name for name, m in self.members.items() if m.last_step > self.step]
        self._overtake(*set(of_step).difference(participants))
        self._enter(Phase.TRAINING, now)
        if not participants:
            self.micro_batch = self.settings.micro_batches - 1
        elif not self.micro_batch:
            self._in_step, self._tokens = dict.fromkeys(participants, 0), 0
        asked = self._asked(Activations)
        batches = {name: asked[name] for name in participants}
        for name, batch in batches.items():
            self._in_step[name] += len(batch.labels)
            self.members[name].in_round = True
        self._tokens += sum(len(batch.values) for batch in batches.values())
        self.timing.computing([(name, self.micro_batch) for name in participants], now)
        step = self.step + 1
        checks = not self.micro_batch and self.settings.checks_codec(step) and self.gate is not None
        check = self.gate.alternatives(step) if checks and self.gate is not None else None
        return Train(step, self.total_steps, self.micro_batch, check, batches)

    def _aggregate(self, contributors: list[str], now: float) -> Aggregate:
        self._enter(Phase.AGGREGATING, now)
        self._overtake_without(contributors)
        asked = self._asked(Contribution)
        contributions = {name: asked[name].tensors for name in contributors}
        weights = {name: sum(self.members[name].labelled_tokens.values()) for name in contributors}
        self.timing.computing([(name, 0) for name in contributors], now)
        return Aggregate(self.step, self.total_steps, contributions, weights)

    def _finish_step(self, now: float) -> list[Action]:
        self._enter(Phase.ACTIVATIONS, now)
        seconds = self.timing.take()
        self._link_seconds += sum(spent.uplink + spent.downlink for spent in seconds.values())
        self._all_seconds += sum(sum(vars(spent).values()) for spent in seconds.values())
        if self._finished_step == self.step:  # a last round closed early, by the leaving of those who had steps left
            return []
        self._finished_step = self.step
        deadline = self.deadline.seconds(Activations)
        codec, server_compute = self.codec_of(self.step), self._server_compute
        self._server_compute = 0.0
        return [
            FinishStep(self.step, self._loss, self._tokens, self._labelled_tokens, seconds, deadline, codec, server_compute)
        ]

    def _close_last_round(self, now: float) -> list[Action]:
        if self._contributors():
            self._end_round(now)
            return self._advance(now)
        self._enter(Phase.SAVING, now)
        return [FinishRun(self.step)]

    def _end_round(self, now: float) -> None:
        """Wait for the adapters of those who took part. Members that have steps of the round left have left the run."""
        self._enter(Phase.CONTRIBUTIONS, now)
        if not self.settings.ends_round(self.step):
            self._overtake(*(name for name, member in self.members.items() if member.last_step > self.step))

    def _overtake_without(self, contributors: list[str]) -> None:
        """The round goes on without those whose adapter is missing."""
        owing = {name for name, member in self.members.items() if issubclass(member.next_question.kind, Contribution)}
        self._overtake(*owing.difference(contributors))

    def _close_round(self) -> None:
        """The round has its adapter."""
        self.round = self.step
        for member in self.members.values():
            member.in_round, member.labelled_tokens = False, {}

    def _overtake(self, *names: str) -> None:
        """The run goes on without these."""
        for name in names:
            if not self.members[name].absent:
                self.members[name].absent, self.members[name].missed_from = True, self._step_under_way
            self._forget_questions(name)

    def _answer_done(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name in self._asked(Done):
            answer = RunEnd(step=self.step, tensors=self.edge_adapter)
            actions += self._reply(name, answer, QuestionId(Evaluation, self.step), now)
        return actions

    def _reply(self, name: str, message: Message, next_question: QuestionId, now: float) -> list[Action]:
        member, question = self.members[name], QuestionId(*identity(self.waiting.pop((name, self.micro_batch))))
        if next(iter(member.answers), question)[:2] != question[:2]:
            member.answers = {}
        member.answers[question] = message
        member.next_question = next_question
        self.timing.replied(name, now)
        return [Reply(name, message)]

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase, self._since, self._deadline_passed, self._told_after = phase, now, False, 0.0

    # Members that come back

    def _tell_where_to_go_on(self, name: str, now: float) -> list[Action]:
        """At once, or where a step has gone on without it, between two steps."""
        member = self.members[name]
        if self.phase is Phase.GATHERING:
            return []
        if member.absent:
            self._returning.add(name)
            return self._advance(now)
        self.timing.replied(name, now)
        step = self._resumes_after(member)
        self._forget_lost_steps(name, repeated=step + 1)
        member.told = step, self.round
        answer = Start(
            step=step,
            round=self.round,
            total_steps=self.total_steps,
            adapter=self.edge_adapter,
            codec=self.codec_of(step + 1),
        )
        return [Reply(name, answer)]

    def _answer_returning(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name in sorted(self._returning):
            member = self.members[name]
            member.absent, member.answers = False, {}
            member.next_question = member.itinerary.after_round(self.step)
            if member.missed_from:
                actions.append(Report(f"{name} takes part again; {_steps(member.missed_from, self.step)} went on without it"))
                member.missed_from = 0
            if member.next_question[0] is Done:
                member.in_round = False  # the step after which it was to contribute has gone on without it
            actions += self._tell_where_to_go_on(name, now)
        self._returning.clear()
        return actions

    def _forget_lost_steps(self, name: str, repeated: int) -> None:
        """Count only what is in the member's matrices: what it remembers, and the step it repeats with the answers kept."""
        member = self.members[name]
        counts = {step: n for step, n in member.labelled_tokens.items() if step <= member.remembers or step == repeated}
        if counts != member.labelled_tokens and self.phase is not Phase.AGGREGATING:
            member.labelled_tokens = counts
            if isinstance(self.waiting.get((name, 0)), AdapterWeights):
                self._forget_questions(name)  # with matrices that it no longer has; it will ask again

    def _resumes_after(self, member: Member) -> int:
        """The step after which the member goes on. It repeats one whose outcome it has not kept."""
        answered_last = next(iter(member.answers), None)
        return member.itinerary.resumes_after(member.next_question, answered_last, member.remembers)

    def _may_ask(self, member: Member, question: QuestionId) -> bool:
        """Whether it is the member's next question, or a later micro-batch of its step."""
        *place, first = member.next_question
        several = self.settings.micro_batches if question[0] is Activations else 1
        return [*question[:2]] == place and first <= question[2] < several

    def _forget_questions(self, name: str) -> None:
        self.waiting = {place: question for place, question in self.waiting.items() if place[0] != name}

    def _is_behind(self, member: Member, question: QuestionId) -> bool:
        """Whether the run has left this question behind, so that the member has to be told where to go on."""
        if question[0] is Done:
            return False  # nothing that the run does makes it stale
        if member.absent:
            return question[1] <= self.step + 1
        return _place(question) < _place(member.next_question)

    def codec_of(self, step: int) -> str:
        """In which the step's activations travel."""
        return self.settings.activation_codec if self.gate is None else self.gate.codec_of(step)

    # The calendar

    def _wanted(self) -> list[str]:
        """Clients whose questions the present phase waits for."""
        if self.phase is Phase.ACTIVATIONS and self.micro_batch:
            return [name for name in self._in_step if not self.members[name].left and not self.members[name].absent]
        if self.phase is Phase.ACTIVATIONS:
            return self._participants()
        return self._contributors() if self.phase is Phase.CONTRIBUTIONS else []

    def _participants(self) -> list[str]:
        """Clients with data for the step, in the order of the union batch."""
        return sorted(name for name, member in self.members.items() if member.last_step > self.step and not member.left)

    def _contributors(self) -> list[str]:
        """
        Clients whose adapters make the next edge adapter: all that took part in a step of the round. Those that are absent
        now are told where to go on only after it.
        """
        return sorted(
            name for name, member in self.members.items() if member.in_round and not member.left and not member.absent
        )

    def _asked(self, kind: type[Question]) -> dict[str, Question]:
        """The open questions of this kind, and of the present micro-batch, by client."""
        return {
            name: question
            for (name, micro_batch), question in self.waiting.items()
            if isinstance(question, kind) and micro_batch == self.micro_batch
        }

    def _rounds_since_checkpoint(self) -> int:
        return -(-(self.step - self.checkpoints[1]) // self.settings.aggregate_every)

    # What a message must respect, beyond what its type says

    def _check_return(self, name: str, member: Member) -> None:
        if member.left and self.phase in (Phase.SAVING, Phase.FINISHED):
            raise RemoteProtocolError(f"{name} has left the run, and the run is over")

    def _new_member(self, join: Join) -> Member:
        if join.longest > self.limits.num_positions:
            raise RemoteProtocolError(
                f"sequences are up to {join.longest} tokens long, and the model has {self.limits.num_positions} positions; "
                f"choose a smaller --max-length"
            )
        if join.batch_size * join.longest > self.limits.max_batch_tokens:
            raise RemoteProtocolError(
                f"batches are up to {join.batch_size} x {join.longest} tokens, and the server takes at most "
                f"{self.limits.max_batch_tokens} (--max-batch-tokens); choose a smaller --batch-size or --max-length"
            )
        itinerary = self._itinerary(join)
        if itinerary.last_step > LARGEST_COUNT:
            raise RemoteProtocolError(
                f"{join.num_samples} samples take {itinerary.last_step} steps; at most {LARGEST_COUNT} can be"
            )
        return Member(join, itinerary)

    def _itinerary(self, join: Join) -> Itinerary:
        return Itinerary(self.settings, self.settings.steps_of_client(join.num_samples, join.batch_size))

    def _check(self, name: str, message: OfAStep) -> None:
        if isinstance(message, Activations):
            self._check_batch(name, message)
        elif not isinstance(message, Done):
            self._check_adapter(name, message)

    def _check_batch(self, name: str, batch: Activations | Evaluation) -> None:
        member = self.members[name]
        limits, rows = self.limits, member.join.batch_size * member.join.longest
        sent = f"{name} sent activations of {'a held-out batch' if isinstance(batch, Evaluation) else f'step {batch.step}'}"
        if batch.values.shape[1] != limits.width:
            raise RemoteProtocolError(f"values are {batch.values.shape[1]} wide, the model is {limits.width}")
        _check_size(batch.values, sent)
        if isinstance(batch, Activations) and batch.exact is not None:
            if batch.micro_batch or not self.settings.checks_codec(batch.step):
                raise RemoteProtocolError(
                    f"exact values in micro-batch {batch.micro_batch} of step {batch.step}, which checks no codec"
                )
            _check_size(batch.exact, sent)
        if len(batch.values) > rows:
            raise RemoteProtocolError(f"the batch has {count(len(batch.values), 'row')}; at most {rows} were announced")
        if len(batch.lengths) > member.join.batch_size:
            sequences = count(len(batch.lengths), "sequence")
            raise RemoteProtocolError(f"the batch has {sequences}; at most {member.join.batch_size} were announced")
        if batch.lengths.max(initial=0) > member.join.longest:
            raise RemoteProtocolError(
                f"a sequence has {batch.lengths.max()} tokens; at most {member.join.longest} were announced"
            )
        if isinstance(batch, Activations):
            most = -(-member.join.batch_size // self.settings.micro_batches)
            if len(batch.lengths) > most:
                raise RemoteProtocolError(f"a micro-batch has {count(len(batch.lengths), 'sequence')}; at most {most} can be")
        wrong = batch.labels[(batch.labels < 0) | (batch.labels >= limits.vocabulary_size)]
        if len(wrong):
            raise RemoteProtocolError(f"a label is {wrong[0]}; this model's tokens are 0 to {limits.vocabulary_size - 1}")

    def _check_adapter(self, name: str, contribution: AdapterGradient | AdapterWeights) -> None:
        tensors = contribution.tensors
        expected, found = self.limits.edge_shapes, {key: tensor.shape for key, tensor in tensors.items()}
        for key in [*expected, *found]:
            if expected.get(key) != found.get(key):
                which = [f"{list(shapes[key])}" if key in shapes else "none" for shapes in (found, expected)]
                raise RemoteProtocolError(
                    f"the tensors are not the LoRA matrices of the edge part: {key[:200]!a} is {which[0]}, expected {which[1]}"
                )
        what = "an adapter gradient" if isinstance(contribution, AdapterGradient) else "an adapter"
        for tensor in tensors.values():
            _check_size(tensor, f"{name} sent {what} of step {contribution.step}")


def _place(question: QuestionId) -> tuple[int, int, int]:
    """Where a question stands in the order in which a client asks them."""
    kind, step, micro_batch = question
    return step, [Activations, AdapterGradient, AdapterWeights, Done, Evaluation].index(kind), micro_batch


def _worded(question: QuestionId) -> str:
    part = f", micro-batch {question.micro_batch}" if question.kind is Activations else ""
    return f"{question.kind.__name__} of step {question.step}{part}"


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _waited_for_as(kind: type) -> type:
    """The kind under which the deadline knows a question."""
    return Contribution if issubclass(kind, Contribution) else kind


def _check_size(values: Array, sent: str) -> None:
    """
    Args:
        sent: who sent them, and what they are.
    """
    largest = np.abs(values).max(initial=0.0)
    if largest > LARGEST_VALUE:
        diverged = f"beyond {LARGEST_VALUE:g} training has diverged: try a lower --lr on the server"
        why = NOT_SHUFFLED if looks_plain(values, LARGEST_VALUE) else diverged
        raise RemoteProtocolError(f"{sent} with values up to {largest:.3g}; {why}")
