"""
One run, decided: who is in a step, when it starts, what is averaged. Messages and the time come in, actions go out.

Theory of operation
===================

The run goes through phases, and only here:

    JOINING ── all have joined ──► ACTIVATIONS ── nobody has data left ──► SAVING ──► FINISHED     (see Early endings)
                                     │   ▲   ▲
                      all have asked │   │   └─────────────────────────────────────────┐
                                     ▼   │ step or round goes on                       │ the round has its adapter
                                    TRAINING ── round ends ──► CONTRIBUTIONS ──► AGGREGATING
                                                                        all have asked

Where the edge part learns nothing nobody contributes: AGGREGATING follows TRAINING at once, and only closes the round.

A round ends early if every member that still has steps to do in it has left: CONTRIBUTIONS then follows ACTIVATIONS. If nobody
is left to contribute either, the round closes with its adapter unchanged. A resumed run begins in ACTIVATIONS.

Where devices have the labels, a micro-batch is computed in two halves, both in TRAINING. In between its clients are asked back:
they get its hidden states, and reply with their loss and its gradient.

    ACTIVATIONS ── all have asked ──► forward ──► HIDDEN_GRADIENTS ── all have replied ──► backward
                                         ▲                │
                                         └────────────────┘
                            meanwhile all have asked the next micro-batch

A backward leads to HIDDEN_GRADIENTS again if another micro-batch is asked back, else to ACTIVATIONS, or out of the step. When
it is ready it goes before a forward. Backwards come in the order of micro-batches, and no number depends on when a forward was.

Who may ask what. A member asks along its `Itinerary`: its next question, or a later micro-batch of the same step. A question
waits at the member until it is answered. One that was answered already, of the step and kind that were answered last, gets the
same answer again. One that the run has left behind is answered by `Start`, which says where to go on. Any other breaks the
protocol. So nothing is computed, averaged or stepped twice, however often it is asked. A member that asks a micro-batch again
is asked back again, with the same, if it has not replied. A reply that nobody waits for is treated as a question would be: left
behind, or a breach of the protocol.

Whom a phase waits for. ACTIVATIONS waits for every member that has data for the step, a later micro-batch of it for those that
sent the first; CONTRIBUTIONS for those that took part in the round. A member that has left is not waited for. With a quorum,
one that has not asked by the deadline is not waited for either: the run *overtakes* it. HIDDEN_GRADIENTS waits for those in the
step to reply to its first micro-batch, in the same way. Only what the present phase waits for has a deadline: a later
micro-batch is late only when it is its turn. Whoever is overtaken or has left when a backward begins has a gradient of zero in
it, and counts no tokens.

What a presence may become. Once the run has started, a lost connection changes nothing but who can be written to: the member
keeps its place, and the questions of its steps stay asked. Being overtaken does change something: what the member has asked is
dropped, and it must be told where to go on.

                 connected             lost        connection lost           left       left
    up to date   HERE    ────────────────────────► AWAY    ─────────────────────────►  LEFT
                  │  ▲                               │                                   │
        overtaken │  │ told by `Start`,              │ overtaken                         │ overtaken
                  ▼  │ between two steps             ▼                                   ▼
    overtaken    BEHIND, and RETURNING ──────────► ABSENT  ─────────────────────────►  GONE
                 once it has asked

A member that comes back is HERE if it was AWAY or LEFT, and RETURNING if it was ABSENT or GONE. A connected one may leave, too.

Early endings. Devices evaluate held-out texts between two steps. So when all have asked the first micro-batch of a step, all
losses after the step before are known, and with early stopping they are judged then. If that ends the run, nobody has data left
from there on: whoever has asked is told by a `Start` whose `total_steps` are those that are done. A run that ends with the best
adapter waits in LAST_EVALUATIONS, before SAVING, for those that evaluate after the last step: they ask `Done` when they have.

What is kept for how long. A member's answers, until a question of a newer step or kind of its is answered. The counts of a
round, until the round has its adapter. Hidden states and replies, until their micro-batch has had its backward. A step's sums,
until the next step begins. Nothing of a round survives the server: a checkpoint is the end of a round, and devices do the rest
again.

What a message costs. The same, however many members there are: who stands where, and who of those that are waited for has come,
is kept by `Roster` and `Turnout`, which hear of every member that changes. All members are looked at only when a phase begins
or a computation ends: that concerns all of them anyway.

The order of actions is part of the result: replies leave in it, and a checkpoint must not know of a step that metrics do not.
"""

import enum
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    Array,
    Contribution,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    HeldOutLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Noted,
    QuestionId,
    RemoteProtocolError,
    RunEnd,
    RunSettings,
    Start,
    Tensors,
    Welcome,
)
from protocol.settings import SERVER_ABILITIES, codec_name
from terminal import duration

from .codec_policy import CodecPolicy
from .deadline import Deadline
from .early_stopping import EarlyStopping, Judgement
from .events import (
    Action,
    Aggregate,
    Backward,
    Checkpoint,
    Evaluate,
    FinishRun,
    FinishStep,
    Forward,
    KeepHeldOutLoss,
    KeepJudgement,
    Reply,
    Report,
    SaveCodecState,
    Train,
)
from .gathering import Gathering, Verdict
from .member import Member, Presence
from .message_rules import (
    ModelLimits,
    StepQuestion,
    check_held_out_loss,
    check_hello,
    check_hidden_gradient,
    check_newcomer,
    check_question,
    check_same_data,
)
from .roster import Asked, Roster
from .run_status import RunStatus
from .step import Aggregated, AskedBack, StepInProgress, Trained
from .timing import StepTiming
from .turnout import Turnout

__all__ = ["Federation", "Phase"]

logger = logging.getLogger("gpu_server")


class Phase(enum.Enum):
    JOINING = "waiting for clients"
    ACTIVATIONS = "waiting for activations"
    TRAINING = "computing the step"
    HIDDEN_GRADIENTS = "waiting for gradients at the hidden states"
    CONTRIBUTIONS = "waiting for the clients' adapters"
    AGGREGATING = "computing the edge adapter"
    LAST_EVALUATIONS = "waiting for the last held-out losses"
    SAVING = "saving the adapter"
    FINISHED = "finished"


WAITED_FOR: dict[Phase, type] = {
    Phase.JOINING: Join,
    Phase.ACTIVATIONS: Activations,
    Phase.HIDDEN_GRADIENTS: HiddenGradient,
    Phase.CONTRIBUTIONS: Contribution,
    Phase.LAST_EVALUATIONS: Done,
    Phase.FINISHED: Done,
}

NAMES_IN_DETAILS = 100
"""Of devices that a step waits for: a line of events.jsonl does not grow with their number."""


@dataclass
class Federation:
    """
    One run. Every method that is told ``now`` gets seconds of one monotonic clock.

    Args:
        quorum: clients that a step needs at least once its deadline has passed; None is all of them.
        checkpoint_every: rounds.
        codec_policy: None if the run has one codec from beginning to end.
        early_stopping: None if no held-out loss decides anything.
        restarts: how often the server has been started for this run before.
    """

    run: str
    settings: RunSettings
    limits: ModelLimits
    edge_adapter: Tensors
    quorum: int | None = None
    checkpoint_every: int = 1
    deadline: Deadline = field(default_factory=Deadline)
    codec_policy: CodecPolicy | None = None
    early_stopping: EarlyStopping | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        self.step = 0
        """Steps trained."""
        self.round = 0
        """The last step that is in the edge adapter."""
        self.checkpoints = (0, 0)
        """Steps of the last two checkpoints, the earlier first: the server may still go back to either."""
        self.total_steps = 0
        """The last step for which any member had data when the run started, or after which it ends early; 0 until then."""
        self.phase = Phase.JOINING
        self.timing = StepTiming()
        self._roster = Roster(self.settings, self.limits.edge_shapes)
        self._present_step = StepInProgress()
        self._recorded = 0
        """The last step whose record was given out."""
        self._step_began = 0.0
        """When the step before was finished; before a server's first step, when the run began, or went on."""
        self._since = 0.0
        """When the present phase began."""
        self._gathering: Gathering | None = None
        """
        What the present phase waits for. None while the server computes, unless it does so ahead of a gradient that it waits
        for: that wait goes on afterwards, and is as long.
        """
        self._told: dict[str, HeldOutLoss] = {}
        """By client: of its held-out texts under the adapter that the run has."""
        self._is_unjudged_told = False
        """Whether the operator knows that nobody evaluates, so that no step is judged."""
        self._best_step = 0
        """The last in the adapter with which the run has ended, where that is an earlier one; else 0."""
        self._ahead: Turnout | None = None
        """While HIDDEN_GRADIENTS waits: who of those it waits for has asked the next micro-batch. None until that is asked."""

    @property
    def members(self) -> dict[str, Member]:
        return self._roster.members

    # Across a restart of the server

    def membership(self) -> dict[str, dict[str, Any]]:
        """What has to be known of the members to go on after a round's end, as JSON."""
        return self._roster.saved()

    def restore(
        self,
        step: int,
        earliest: int,
        membership: dict[str, dict[str, Any]],
        edge_adapter: Tensors,
        now: float,
        *,
        told: Mapping[str, HeldOutLoss] | None = None,
    ) -> list[Action]:
        """
        Stand at the end of the round that ended with ``step``, with everybody's connection lost.

        Args:
            earliest: step of the earliest checkpoint that there is.
            membership: as `membership` gave it then.
            edge_adapter: of that round.
            told: by client, the last of its held-out losses that is kept. It tells none twice once it was noted.
        """
        told = told or {}
        self.edge_adapter = edge_adapter
        self._roster.restore(membership, step, {name: loss.step for name, loss in told.items()})
        self._told = {name: loss for name, loss in told.items() if loss.step == step}
        self.step = self.round = self._recorded = step
        self.checkpoints = (earliest, step)
        self.total_steps = self._roster.last_step
        self._step_began = now
        self._enter(Phase.ACTIVATIONS, now)
        if self.ends_early:
            return self._end_early(now)
        return self._advance(now)

    # What comes in

    def welcome(self, hello: Hello) -> Welcome:
        """
        Raises:
            NameInUse: a client of this name is connected.
            RemoteProtocolError: it has another model, lacks a codec or an ability, or there is no place in the run.
        """
        later = set() if self.codec_policy is None else self.codec_policy.may_use()
        check_hello(hello, self.limits, self.settings.codecs() | later, self.settings.abilities())
        self._roster.greet(hello.name, starting=self.phase is Phase.JOINING, ending=self._is_ending)
        return Welcome(
            run=self.run,
            settings=self.settings,
            fingerprint=self.limits.fingerprint,
            restarts=self.restarts,
            abilities=SERVER_ABILITIES,
        )

    def join(self, name: str, join: Join, now: float) -> list[Action]:
        """
        A client that was welcomed says how much data it has; if it is a member, it is back.

        Raises:
            RemoteProtocolError: its batches would be too large, or are not those that it joined the run with before.
        """
        member = self.members.get(name)
        if member is not None:
            return self._join_again(name, member, join, now)
        newcomer = self._roster.newcomer(join)
        check_newcomer(newcomer, self.limits)
        if not self.members:
            self._enter(Phase.JOINING, now)  # from now on somebody waits
        self._roster.add(name, newcomer)
        return self._advance(now)

    def _join_again(self, name: str, member: Member, join: Join, now: float) -> list[Action]:
        self._roster.check_return(name, ending=self._is_ending)  # the run may have ended since its welcome
        check_same_data(name, member.join, join)
        self._roster.came_back(name, join)
        return self._tell_where_to_go_on(name, now)

    def receive(self, name: str, message: Message, now: float) -> list[Action]:
        """
        A member's question, or what it replies when it is asked back.

        Raises:
            RemoteProtocolError: it is out of turn, or does not fit the run.
        """
        member = self.members[name]
        member.is_evaluating = isinstance(message, Evaluation)
        if isinstance(message, Evaluation):
            check_question(name, message, member, self.limits)
            member.evaluation = message
            return [Evaluate(client=name, batch=message)]
        if isinstance(message, HeldOutLoss):
            return self._note_held_out_loss(name, message, now)
        if not isinstance(message, StepQuestion | HiddenGradient):
            raise RemoteProtocolError(f"{type(message).__name__} out of turn")
        if isinstance(message, Activations | HiddenGradient) and message.step <= member.answered_up_to:
            kind = type(message).__name__
            logger.debug("%s: ignored %s of step %d: Start has answered it meanwhile", name, kind, message.step)
            return []
        if isinstance(message, HiddenGradient):
            return self._take_hidden_gradient(name, message, now)
        return self._observe(name, message, now) + self._take(name, message, now)

    def _observe(self, name: str, message: StepQuestion, now: float) -> list[Action]:
        """How long the client took decides how long the next one may take."""
        kind = Contribution if isinstance(message, Contribution) else type(message)
        derived = self.deadline.observe(kind, self.timing.away(name, now))
        if not derived or kind is not Activations:
            return []
        unused = "" if self.quorum is not None else " (acts only with --quorum)"
        seconds = self.deadline.seconds(kind)
        text = f"step deadline {duration(seconds)}, measured{unused}"
        return [Report(kind="deadline", text=text, details={"seconds": seconds})]

    def _take(self, name: str, message: StepQuestion, now: float) -> list[Action]:
        """A question is new, or was answered, or the run has left it behind; see `Theory of operation`."""
        member, question = self.members[name], QuestionId.of(message)
        is_current = not member.presence.is_overtaken
        if is_current and member.may_ask(question):
            check_question(name, message, member, self.limits)
            if question.micro_batch not in member.questions and not isinstance(message, Done):
                self.timing.question((name, question.micro_batch), message.seconds, now)
            member.asks(question.micro_batch, message)
            asked_back = self._present_step.asked_back_of(question.micro_batch)
            if asked_back is not None and asked_back.waits_for(name):  # it is back on another connection
                return [self._ask_back(name, asked_back.hidden_states[name], now)]
            return self._advance(now)
        if is_current and question in member.answers:
            self.timing.replied(name, now)
            return [Reply(client=name, message=member.answers[question])]
        # A client would take the same `Start` for one message, delivered twice, and wait for ever.
        told_already = is_current and member.told == (member.resumes_after(), self.round)
        if told_already or not member.is_behind(question, self.step):
            raise RemoteProtocolError(f"expected {member.next_question}, got {question}")
        # Activations and gradients belong to a step that is being done, all else to one that its client has finished.
        of_step_under_way = isinstance(message, Activations | AdapterGradient)
        return self._find_behind(name, message.step - 1 if of_step_under_way else message.step, now)

    def _find_behind(self, name: str, remembers: int, now: float) -> list[Action]:
        """What it says shows that it has to be told where to go on, and that it has finished this step."""
        self.members[name].remembers = remembers
        self.members[name].asked_from_behind()
        return self._tell_where_to_go_on(name, now)

    def _take_hidden_gradient(self, name: str, message: HiddenGradient, now: float) -> list[Action]:
        """What a member replies when it is asked back: its micro-batch waits for it, or the run has left the step behind."""
        is_of_this_step = message.step == self.step + 1
        if self.members[name].presence.is_overtaken and message.step <= self.step + 1:
            return self._find_behind(name, message.step - 1, now)
        asked_back = self._present_step.asked_back_of(message.micro_batch) if is_of_this_step else None
        if asked_back is None or not asked_back.waits_for(name):
            raise RemoteProtocolError(f"HiddenGradient of step {message.step}, micro-batch {message.micro_batch}, out of turn")
        check_hidden_gradient(name, message, asked_back.hidden_states[name])
        question = (name, message.micro_batch)
        self.deadline.observe(HiddenGradient, self.timing.thought(question, now))
        self.timing.question(question, message.seconds, now)
        asked_back.gradients[name] = message
        self.members[name].changed()
        return self._advance(now)

    def disconnected(self, name: str, now: float) -> None:
        """A client's connection is lost. Once the run has started it keeps its place."""
        self._roster.disconnected(name, now, starting=self.phase is Phase.JOINING)

    def leave(self, name: str, now: float) -> list[Action]:
        """A client says that it is gone for good, or is let in no more; the run goes on with the others."""
        self.disconnected(name, now)
        if name not in self.members:
            return []
        self.members[name].left()
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed; see `expires`."""
        return self._advance(now)

    # What somebody may ask who watches

    def expires(self) -> float | None:
        """When `tick` should be called, if nothing else happens before."""
        has_deadline = self.phase in WAITED_FOR and self.phase is not Phase.FINISHED
        if self._gathering is None or not has_deadline or not self.members:
            return None
        return self._gathering.expires()

    def waits_for(self, now: float, most: int | None = None) -> tuple[list[str], float]:
        """
        The members that everybody waits for, and since how many seconds; nobody while the server computes.

        Args:
            most: if there are more members than that, so many of them are enough.
        """
        if self._gathering is None or self.phase not in WAITED_FOR:
            return [], 0.0
        names = sorted(islice(self._gathering.turnout.missing(), most))
        return names, now - self._since if names else 0.0

    def unfinished(self) -> list[str]:
        """Members that have not said goodbye: whether an adapter that was sent has arrived, only they know."""
        return self._roster.unfinished()

    @property
    def num_unfinished(self) -> int:
        """How many these are."""
        return self._roster.num_unfinished

    @property
    def connected(self) -> int:
        """Members that are connected."""
        return self._roster.num_connected

    def status(self) -> RunStatus:
        """For whoever watches."""
        return RunStatus(
            run=self.run,
            clients=self.settings.clients,
            connected=self.connected,
            members={name: member.presence.value for name, member in self._roster},
            unfinished=tuple(self.unfinished()),
            phase=self.phase.value,
            step=self.step,
            round=self.round,
            total_steps=self.total_steps,
            is_saved=self.phase is Phase.FINISHED,
        )

    def codec_of(self, step: int) -> str:
        """In which the step's activations travel."""
        return self.settings.activation_codec if self.codec_policy is None else self.codec_policy.codec_of(step)

    # What was computed

    def checked(self, changes: dict[str, float]) -> list[Action]:
        """By how much codecs change the loss of the step that is computed, in nats per labelled token."""
        if self.codec_policy is None or not changes:
            return []
        note = self.codec_policy.update(self.step + 1, changes, self.timing.take_link_share())
        saved = SaveCodecState(state=self.codec_policy.state())
        codec = codec_name(self.codec_of(self.step + 2))
        return [saved] if note is None else [saved, Report(kind="codec", text=note, details={"codec": codec})]

    def forwarded(self, hidden: dict[str, Array], seconds: float, now: float) -> list[Action]:
        """The last `Forward` is computed: by client, hidden states (M, d). It took so many ``seconds``."""
        present = self._present_step
        present.server_compute += seconds
        micro_batch = present.next_forward
        asked_back = AskedBack(
            {
                name: HiddenStates(
                    step=self.step + 1,
                    micro_batch=micro_batch,
                    values=values,
                    queue_seconds=self.timing.queued((name, micro_batch)),
                    compute_seconds=seconds,
                )
                for name, values in hidden.items()
            }
        )
        present.asked_back.append(asked_back)
        actions: list[Action] = [self._ask_back(name, states, now) for name, states in asked_back.hidden_states.items()]
        if self._gathering is None:
            self._enter(Phase.HIDDEN_GRADIENTS, now)
        else:
            self.phase = Phase.HIDDEN_GRADIENTS  # where it has waited all the time
        return actions + self._advance(now)

    def trained(self, trained: Trained, seconds: float, now: float) -> list[Action]:
        """The last `Train` or `Backward` is computed; it took so many ``seconds``."""
        present = self._present_step
        ends_step = present.micro_batch + 1 == self.settings.micro_batches
        present.add_trained(trained, seconds)
        actions = self._answer_activations(trained, seconds, now, ends_step=ends_step)
        if not ends_step:
            present.micro_batch_is_answered()
            self._enter(Phase.HIDDEN_GRADIENTS if present.asked_back else Phase.ACTIVATIONS, now)
            return actions + self._advance(now)
        self.step += 1
        self._told.clear()
        present.goes_on_from(0)
        for name, num_labels in present.labels_of.items():
            member = self.members[name]
            if not member.presence.is_overtaken:  # else it takes the step back
                member.labelled_tokens[self.step] = num_labels
        if self.settings.ends_round(self.step) or not self._roster.participants(self.step + 1):
            actions += self._end_round(now)
        else:
            actions += self._finish_step(now)
        return actions + self._advance(now)

    def _answer_activations(self, trained: Trained, seconds: float, now: float, *, ends_step: bool) -> list[Action]:
        step, micro_batch = self.step + 1, self._present_step.micro_batch
        actions: list[Action] = []
        asked = self._asked(Activations)
        nothing = numpy.empty((0, self.limits.width), self.settings.precision)
        gradients = trained.gradients if self.settings.trains_edge else dict.fromkeys(trained.summed_losses, nothing)
        for name, gradient in gradients.items():
            if name in asked:
                answer = ActivationGradient(
                    step=step,
                    micro_batch=micro_batch,
                    loss=trained.loss,
                    labelled_tokens=trained.labelled_tokens,
                    values=gradient,
                    codec=self.codec_of(step + 1) if ends_step else "",
                    queue_seconds=self.timing.queued((name, micro_batch)),
                    compute_seconds=seconds,
                )
                next_question = self.members[name].itinerary.after_activations(step, micro_batch)
                actions.append(self._reply(name, answer, next_question, now))
        return actions

    def aggregated(self, aggregated: Aggregated, seconds: float, now: float) -> list[Action]:
        """The edge adapter of the last `Aggregate` is computed; it took so many ``seconds``."""
        self.edge_adapter = aggregated.edge_adapter
        sent: Any = self.edge_adapter if aggregated.change is None else aggregated.change
        self._present_step.add_aggregated(aggregated, seconds)
        actions: list[Action] = []
        for name in sorted(self._asked(Contribution)):
            answer = EdgeAdapter(
                step=self.step,
                tensors=sent,
                checkpoint=self.checkpoints[0],
                queue_seconds=self.timing.queued((name, 0)),
                compute_seconds=seconds,
            )
            actions.append(self._reply(name, answer, self.members[name].itinerary.after_round(self.step), now))
        self._close_round()
        actions += self._finish_step(now)
        rounds = -(-(self.step - self.checkpoints[1]) // self.settings.aggregate_every)
        if rounds >= self.checkpoint_every or not self._roster.participants(self.step + 1):
            actions.append(Checkpoint(step=self.step))
        return actions + self._advance(now)

    def checkpointed(self, step: int) -> None:
        """The checkpoint of a `Checkpoint` is on disk."""
        self.checkpoints = (self.checkpoints[1], step)

    def saved(self, now: float, *, best_step: int = 0, edge_adapter: Tensors | None = None) -> list[Action]:
        """
        The adapter of `FinishRun` is on disk.

        Args:
            best_step: as it said.
            edge_adapter: with which the run ends, where that is not the last.
        """
        self._best_step = best_step
        self.edge_adapter = self.edge_adapter if edge_adapter is None else edge_adapter
        self._enter(Phase.FINISHED, now)
        return self._advance(now)

    def evaluated(self, name: str, batch: Evaluation, summed_loss: float, now: float) -> list[Action]:
        """The loss of an `Evaluate` is computed. A client that has come back meanwhile asks again, or something else."""
        return self._answer_evaluation(name, batch, EvaluationLoss(index=batch.index, summed_loss=summed_loss), now)

    def inferred(self, name: str, batch: Evaluation, hidden: Array, now: float) -> list[Action]:
        """The hidden states (M, d) of an `Evaluate` are computed; as `evaluated`."""
        return self._answer_evaluation(name, batch, EvaluationStates(index=batch.index, values=hidden), now)

    def _answer_evaluation(
        self, name: str, batch: Evaluation, answer: EvaluationLoss | EvaluationStates, now: float
    ) -> list[Action]:
        member = self.members[name]
        if member.evaluation is not batch:
            return []
        member.evaluation = None
        self.timing.replied(name, now)  # the time of an evaluation belongs to no step
        return [Reply(client=name, message=answer)]

    def _note_held_out_loss(self, name: str, told: HeldOutLoss, now: float) -> list[Action]:
        """Kept once, and only if it is that of the adapter which the run had while the client evaluated."""
        check_held_out_loss(name, told, self.settings)
        member = self.members[name]
        if told.step > self.step:
            raise RemoteProtocolError(f"HeldOutLoss of step {told.step}, and the run has reached step {self.step}")
        self.timing.replied(name, now)  # as of an evaluation
        noted = Reply(client=name, message=Noted(step=told.step, reached=self._best_step or self.step))
        if told.step == self.step == self.round:
            self._told[name] = told
        if name not in self._told or told.step <= member.evaluated:
            return [noted]
        member.evaluated = told.step
        kept = KeepHeldOutLoss(client=name, step=told.step, loss=told.loss, labelled_tokens=told.labelled_tokens)
        return [kept, noted]

    # What follows from it

    def _advance(self, now: float) -> list[Action]:
        """Go on as far as what has come in, and the time, allow."""
        if self.phase is Phase.JOINING:
            return self._await_newcomers(now)
        if self.phase is Phase.ACTIVATIONS:
            return self._advance_activations(now)
        if self.phase is Phase.HIDDEN_GRADIENTS:
            return self._advance_hidden_gradients(now)
        if self.phase is Phase.CONTRIBUTIONS:
            return self._advance_contributions(now)
        if self.phase is Phase.LAST_EVALUATIONS:
            return self._advance_last_evaluations(now)
        if self.phase is Phase.FINISHED:
            return self._answer_returning(now) + self._answer_done(now)
        return []

    def _advance_activations(self, now: float) -> list[Action]:
        is_between_steps = self._present_step.micro_batch == 0
        actions = self._answer_returning(now) if is_between_steps else []
        if is_between_steps and self._wants_nobody:
            return actions + self._close_last_round(now)
        ready, notes = self._gathered(now)
        if ready and is_between_steps:
            notes += self._judge(ready)
            if self.ends_early:
                return actions + notes + self._end_early(now)
        # If all that began a step have gone, it ends with the micro-batches that there are.
        is_due = bool(ready) or self._wants_nobody
        return actions + notes + ([self._compute_micro_batch(ready, now)] if is_due else [])

    def _advance_hidden_gradients(self, now: float) -> list[Action]:
        ready, notes = self._gathered(now)
        if ready or self._wants_nobody:
            return [*notes, self._backward(ready, now)]
        # While some are waited for, the next micro-batch is computed if it is complete; nobody is overtaken for its sake.
        next_forward = self._present_step.next_forward
        if next_forward == self.settings.micro_batches:
            return notes
        if self._ahead is None:
            self._ahead = self._turnout(Activations, next_forward)
        return [*notes, self._forward(sorted(self._ahead.come), now)] if self._ahead.is_complete else notes

    def _advance_contributions(self, now: float) -> list[Action]:
        if self._wants_nobody:  # all have left: the edge adapter stays as it was
            self._overtake_without([])
            self._close_round()
            return self._finish_step(now) + self._advance(now)
        ready, notes = self._gathered(now)
        return notes + ([self._aggregate(ready, now)] if ready else [])

    def _advance_last_evaluations(self, now: float) -> list[Action]:
        actions = self._answer_returning(now)
        ready, notes = self._gathered(now)
        if not ready and not self._wants_nobody:
            return actions + notes
        return actions + notes + self._judge(ready) + self._finish_run(now)

    def _gathered(self, now: float) -> tuple[list[str], list[Action]]:
        """Those with whom the step can go on, and what the operator is told; nobody as long as the step has to wait."""
        assert self._gathering is not None
        verdict = self._gathering.verdict(self._step_under_way, now)
        return verdict.go, _reports(verdict, now - self._since)

    def _await_newcomers(self, now: float) -> list[Action]:
        if self._gathering is None:
            return []
        verdict = self._gathering.newcomers(self.members, self.settings.clients, now)
        return self._start(now) if verdict.go else _reports(verdict, now - self._since)

    def _start(self, now: float) -> list[Action]:
        self._enter(Phase.ACTIVATIONS, now)
        self._step_began = now
        self.total_steps = self._roster.last_step
        actions: list[Action] = [Checkpoint(step=0)]
        for name in self.members:
            actions += self._tell_where_to_go_on(name, now)
        return actions

    def _compute_micro_batch(self, participants: list[str], now: float) -> Train | Forward | Backward:
        """The next micro-batch of these, or of nobody, which ends the step."""
        if self.settings.labels == "server":
            return self._train(participants, now)
        return self._forward(participants, now) if participants else self._backward(participants, now)

    def _train(self, participants: list[str], now: float) -> Train:
        """The micro-batch of these, or of nobody, which ends the step."""
        batches = self._admit(participants, now)
        self._enter(Phase.TRAINING, now)
        if not participants:
            self._present_step.goes_on_from(self.settings.micro_batches - 1)
        step, micro_batch = self.step + 1, self._present_step.micro_batch
        policy = self.codec_policy if not micro_batch and self.settings.checks_codec(step) else None
        return Train(
            step=step,
            total_steps=self.total_steps,
            micro_batch=micro_batch,
            codecs_to_try=None if policy is None else policy.alternatives(step),
            batches=batches,
        )

    def _forward(self, participants: list[str], now: float) -> Forward:
        """The first half of a micro-batch of these, perhaps ahead of a gradient that is waited for."""
        micro_batch, batches = self._present_step.next_forward, self._admit(participants, now)
        if self.phase is Phase.HIDDEN_GRADIENTS:
            self.phase, self._ahead = Phase.TRAINING, None  # and the gathering stays
        else:
            self._enter(Phase.TRAINING, now)
        return Forward(step=self.step + 1, micro_batch=micro_batch, batches=batches)

    def _backward(self, ready: list[str], now: float) -> Backward:
        """The second half of a micro-batch with the gradients of these, or of nobody, which ends the step."""
        present = self._present_step
        self._overtake(present.labels_of.keys() - set(ready))
        self._enter(Phase.TRAINING, now)
        if not ready:
            present.goes_on_from(self.settings.micro_batches - 1)
        gradients = {name: present.asked_back[0].gradients[name] for name in ready}
        present.add_labels(gradients)
        self.timing.computing([(name, present.micro_batch) for name in ready], now)
        return Backward(step=self.step + 1, total_steps=self.total_steps, micro_batch=present.micro_batch, gradients=gradients)

    def _admit(self, participants: list[str], now: float) -> dict[str, Activations]:
        """What these have asked of the next micro-batch. The step goes on without the others."""
        micro_batch = self._present_step.next_forward
        if not micro_batch:
            with_data = [name for name, member in self._roster if member.last_step > self.step]
            self._overtake(set(with_data).difference(participants))
            self._present_step = StepInProgress()
        else:
            self._overtake(self._present_step.labels_of.keys() - set(participants))
        asked = self._roster.asked(Activations, micro_batch)
        batches = {name: asked[name] for name in participants}
        self._present_step.add(batches)
        for name in participants:
            self.members[name].in_round = True
        self.timing.computing([(name, micro_batch) for name in participants], now)
        return batches

    def _aggregate(self, contributors: list[str], now: float) -> Aggregate:
        self._enter(Phase.AGGREGATING, now)
        self._overtake_without(contributors)
        asked = self._asked(Contribution)
        self.timing.computing([(name, 0) for name in contributors], now)
        return Aggregate(
            step=self.step,
            total_steps=self.total_steps,
            contributions={name: asked[name].tensors for name in contributors},
            weights={name: sum(self.members[name].labelled_tokens.values()) for name in contributors},
        )

    def _finish_step(self, now: float) -> list[Action]:
        self._enter(Phase.ACTIVATIONS, now)
        seconds = self.timing.take()
        if self._recorded == self.step:  # a last round that is closed early, since those who had steps left have gone
            return []
        self._recorded = self.step
        step_seconds, self._step_began = now - self._step_began, now
        record = self._present_step.record(
            self.step,
            seconds=seconds,
            step_seconds=step_seconds,
            learning_rate=self.settings.learning_rate_at(self.step, self.total_steps),
            deadline=self.deadline.seconds(Activations),
            codec=codec_name(self.codec_of(self.step)),
        )
        return [FinishStep(record=record)]

    def _close_last_round(self, now: float) -> list[Action]:
        if self._roster.contributors():
            return self._end_round(now) + self._advance(now)
        if self.settings.final_adapter == "best" and self.step > self._judged_step:
            self._enter(Phase.LAST_EVALUATIONS, now)
            return self._advance(now)
        return self._finish_run(now)

    def _finish_run(self, now: float) -> list[Action]:
        self._enter(Phase.SAVING, now)
        judge = self.early_stopping
        if judge is None or self.settings.final_adapter == "last":
            return [FinishRun(step=self.step)]
        if judge.best is None:
            text = "the run ends with its last adapter and not with the best: held-out texts were evaluated after no step"
            return [Report(kind="note", text=text), FinishRun(step=self.step)]
        best = judge.best
        if best.step == self.step:
            return [FinishRun(step=self.step)]
        text = f"the run ends with the adapter of step {best.step}, the best that was judged: held-out loss {best.loss:.4f}"
        if judge.last_step < self.step:
            why = "since devices that evaluate held-out texts had left, or told no loss"
            text += f"; after step {judge.last_step} none was judged, {why}"
        return [Report(kind="note", text=text), FinishRun(step=self.step, best_step=best.step)]

    # What held-out losses decide

    @property
    def _judged_step(self) -> int:
        return 0 if self.early_stopping is None else self.early_stopping.last_step

    @property
    def ends_early(self) -> bool:
        """Whether what was judged last is of the adapter that the run has, and ends it."""
        return self.early_stopping is not None and self.early_stopping.ends_run and self._judged_step == self.step

    def _judge(self, going_on: list[str]) -> list[Action]:
        """
        Compare what held-out texts lose under the adapter that the run has with what they lost before. The adapter with which
        the run begins is not judged.

        Args:
            going_on: members with whom the run goes on. The step is left out where one of them evaluates and has not told its
                loss; what others have told, before they left or were overtaken, counts all the same.
        """
        judge, telling = self.early_stopping, {name for name in going_on if self.members[name].evaluated >= 0}
        if judge is None or 0 < self.step <= judge.last_step:
            return []
        if not telling and not self._told:
            return self._tell_that_nobody_evaluates(judge) if going_on else []
        if not self.step or not telling <= self._told.keys():
            return []
        self._is_unjudged_told = False
        judge.judge(Judgement.of(self.step, {name: self._told[name] for name in sorted(self._told)}))
        return [KeepJudgement(step=self.step, is_best=judge.best_step == self.step)]

    def _tell_that_nobody_evaluates(self, judge: EarlyStopping) -> list[Action]:
        """Once, until a step is judged again."""
        if self._is_unjudged_told:
            return []
        self._is_unjudged_told = True
        text = (
            "no device evaluates held-out texts, by which this run would end early or find its best adapter: start one with "
            "--eval-data and --eval-every"
        )
        if judge.best_step:
            text = (
                f"no device that takes part evaluates held-out texts any more: no step after step {judge.last_step} is judged "
                f"until one does; the best adapter is that of step {judge.best_step}"
            )
        return [Report(kind="note", text=text)]

    def _end_early(self, now: float) -> list[Action]:
        """The run has no more steps: everybody is told so as whoever is told where to go on."""
        assert self.early_stopping is not None
        self.total_steps = self.step
        for _, member in self._roster:
            member.ends_after(self.step)
        details = {"total_steps": self.total_steps, "best_step": self.early_stopping.best_step}
        ended = Report(kind="ended_early", text=self.early_stopping.reason(), details=details)
        self._enter(Phase.ACTIVATIONS, now)
        return [ended, *self._advance(now)]

    def _end_round(self, now: float) -> list[Action]:
        """
        Wait for the adapters of those who took part, where they have any. Members that still had steps of the round to do have
        left; otherwise it would not end here.
        """
        if not self.settings.trains_edge:
            return [self._aggregate([], now)]
        self._enter(Phase.CONTRIBUTIONS, now)
        if not self.settings.ends_round(self.step):
            self._overtake(name for name, member in self._roster if member.last_step > self.step)
        return []

    def _overtake_without(self, contributors: list[str]) -> None:
        """The round goes on without those whose adapter is missing."""
        owing = {name for name, member in self._roster if issubclass(member.next_question.kind, Contribution)}
        self._overtake(owing.difference(contributors))

    def _close_round(self) -> None:
        """The round has its adapter."""
        self.round = self.step
        for _, member in self._roster:
            member.begins_round()

    def _overtake(self, names: Iterable[str]) -> None:
        """The run goes on without these."""
        for name in names:
            self.members[name].was_overtaken(self._step_under_way)

    def _answer_done(self, now: float) -> list[Action]:
        assert self._gathering is not None
        end = RunEnd(step=self.step, tensors=self.edge_adapter, best_step=self._best_step)
        return [self._reply(name, end, QuestionId(Evaluation, self.step), now) for name in list(self._gathering.turnout.come)]

    def _reply(self, name: str, message: Message, next_question: QuestionId, now: float) -> Reply:
        self.members[name].answer(self._present_step.micro_batch, message, next_question)
        self.timing.replied(name, now)
        return Reply(client=name, message=message)

    def _ask_back(self, name: str, states: HiddenStates, now: float) -> Reply:
        self.timing.asked_back((name, states.micro_batch), now)
        return Reply(client=name, message=states)

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase, self._since, kind = phase, now, WAITED_FOR.get(phase)
        self._gathering = self._ahead = None
        if kind is not None:
            quorum = None if phase is Phase.JOINING else self.quorum  # a run starts with all of its clients
            turnout = self._turnout(kind, self._present_step.micro_batch)
            self._gathering = Gathering(kind, now, self.deadline, quorum, turnout)

    # Members that come back

    def _tell_where_to_go_on(self, name: str, now: float) -> list[Action]:
        """At once; but between two steps, if one has gone on without it."""
        member = self.members[name]
        if member.presence is Presence.RETURNING:
            return self._advance(now)
        self.timing.replied(name, now)
        step = member.resumes_after()
        if self.phase is not Phase.AGGREGATING:  # what is being averaged was sent with these counts
            member.forget_lost_steps(repeated=step + 1)
        member.told = step, self.round
        start = Start(
            step=step,
            round=self.round,
            total_steps=self.total_steps,
            adapter=self.edge_adapter,
            codec=self.codec_of(step + 1),
        )
        return [Reply(client=name, message=start)]

    def _answer_returning(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for name in self._roster.returning():
            member = self.members[name]
            if member.missed_from:
                missed = (
                    f"step {self.step}" if member.missed_from == self.step else f"steps {member.missed_from} to {self.step}"
                )
                text = f"{name} takes part again; {missed} went on without it"
                actions.append(Report(kind="takes_part_again", text=text, client=name))
            member.catches_up(self.step)
            actions += self._tell_where_to_go_on(name, now)
        return actions

    # The calendar

    @property
    def _step_under_way(self) -> int:
        return self.step + 1 if self.phase in (Phase.ACTIVATIONS, Phase.HIDDEN_GRADIENTS) else self.step

    @property
    def _is_ending(self) -> bool:
        return self.phase in (Phase.LAST_EVALUATIONS, Phase.SAVING, Phase.FINISHED)

    @property
    def _wants_nobody(self) -> bool:
        """Whether the present phase has nobody to wait for, come or not."""
        return self._gathering is None or not len(self._gathering.turnout)

    def _turnout(self, kind: type, micro_batch: int) -> Turnout:
        """Of the members that the present phase waits for, those that have sent this."""
        return self._roster.turnout(self._is_wanted(), self._has_come(kind, micro_batch))

    def _is_wanted(self) -> Callable[[str, Member], bool]:
        """Says of a member whether the present phase waits for it."""
        if self.phase is Phase.JOINING:
            return lambda name, member: False  # for those that are no members yet
        if self.phase is Phase.FINISHED:
            return lambda name, member: not member.presence.has_left
        if self.phase is Phase.LAST_EVALUATIONS:
            last = self.step
            return lambda name, member: member.evaluated >= 0 and member.has_data_for(last)
        if self.phase is Phase.CONTRIBUTIONS:
            return lambda name, member: member.contributes
        if self._present_step.next_forward:
            began_it = self._present_step.labels_of
            return lambda name, member: name in began_it and member.presence.takes_part
        step = self.step + 1
        return lambda name, member: member.has_data_for(step)

    def _has_come(self, kind: type, micro_batch: int) -> Callable[[str, Member], bool]:
        """Says of a member whether it has sent this."""
        if kind is HiddenGradient:
            replies = self._present_step.asked_back[0].gradients
            return lambda name, member: name in replies
        return lambda name, member: isinstance(member.questions.get(micro_batch), kind)

    def _asked(self, kind: type[Asked]) -> dict[str, Asked]:
        """The open questions of this kind, and of the present micro-batch, by client."""
        return self._roster.asked(kind, self._present_step.micro_batch)


def _reports(verdict: Verdict, seconds: float) -> list[Action]:
    """What the operator is told of a wait that has lasted so many ``seconds``."""
    if not verdict.say:
        return []
    kind = "overtaken" if verdict.go else "late"
    client = verdict.silent[0] if len(verdict.silent) == 1 else None
    details = {"clients": list(verdict.silent[:NAMES_IN_DETAILS]), "count": len(verdict.silent), "seconds": seconds}
    return [Report(kind=kind, text=verdict.say, client=client, details=details)]
