"""
What the federation says to small stories, as text: each file of transcripts/ is one, with what came of every command in it.

Above ---- stand commands: `NAME joins SAMPLES`, `NAME asks KIND STEP [MICRO-BATCH]`, `NAME replies STEP [MICRO-BATCH]`,
`NAME is lost`, `NAME leaves`, `NAME is back [LAST STEP IT REMEMBERS]`, `SECONDS pass`, `the server computes`, `the server
restarts`. Below it stand the actions, in their order, and where everybody stands, if that has changed.

Whoever changes the federation on purpose rewrites the files with ``REWRITE_TRANSCRIPTS=1 pytest tests/test_transcript.py``, and
reads the difference.
"""

import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from usual_settings import settings

from gpu_server.federation import (
    Action,
    Aggregate,
    Aggregated,
    Backward,
    Checkpoint,
    CodecPolicy,
    Deadline,
    Evaluate,
    Federation,
    FinishRun,
    FinishStep,
    Forward,
    ModelLimits,
    Reply,
    Report,
    SaveCodecState,
    Train,
    Trained,
)
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    RemoteProtocolError,
    RunEnd,
    Seconds,
    Start,
)
from protocol.settings import ABILITIES

STORIES = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
LIMITS = ModelLimits(
    fingerprint="f", width=1, vocabulary_size=9, num_positions=9, max_batch_tokens=9, edge_shapes={"A": (1, 1)}
)
ONE = np.ones(1, np.int32)
KINDS = {kind.__name__: kind for kind in (Activations, AdapterGradient, AdapterWeights, Done, Evaluation)}


class Story:
    """One federation, told line by line what happens."""

    def __init__(self, **changes: Any) -> None:
        self.quorum, self.checkpoint_every = changes.pop("quorum", None), changes.pop("checkpoint_every", 1)
        self.deadline = changes.pop("deadline", None)
        self.settings = settings(**changes)
        self.restarts = 0
        self.federation = self.new_federation()
        self.now = 0.0
        self.samples: dict[str, int] = {}
        self.computing: deque[Action] = deque()
        self.checkpoint: tuple[int, dict[str, Any]] = (0, {})
        self.standing = ""
        self.num_evaluations = 0

    def new_federation(self) -> Federation:
        policy = CodecPolicy(self.settings.activation_codec, tolerance=0.01) if self.settings.check_codec_every else None
        adapter = {"A": np.zeros((1, 1), np.float32)}
        return Federation(
            *("run", self.settings, LIMITS, adapter, self.quorum, self.checkpoint_every),
            deadline=Deadline(self.deadline),
            codec_policy=policy,
            restarts=self.restarts,
        )

    def tell(self, command: str) -> list[str]:
        """What comes of it, in lines."""
        who, what, *rest = command.split()
        verbs: dict[str, Callable[..., list[Action]]] = {
            "joins": self.joins,
            "asks": self.asks,
            "replies": self.replies,
            "leaves": lambda name: self.federation.leave(name, self.now),
            "is": lambda name, where, step="0": self.goes(name, where, int(step)),
            "pass": lambda seconds: self.waits(float(seconds)),
        }
        try:
            if command == "the server computes":
                actions = self.computes()
            elif command == "the server restarts":
                actions = self.restart()
            else:
                actions = verbs[what](who, *rest)
        except RemoteProtocolError as error:
            return [f"refused: {error}", *self.stands()]
        lines = [self.line(action) for action in actions]
        self.keep(actions)
        return [*lines, *self.stands()]

    # What happens

    def joins(self, name: str, samples: str) -> list[Action]:
        self.samples[name] = int(samples)
        return self.goes(name, "back", 0)

    def goes(self, name: str, where: str, step: int) -> list[Action]:
        if where == "lost":
            self.federation.disconnected(name, self.now)
            return []
        self.federation.welcome(Hello(name=name, fingerprint="f", codecs=("int8", "bfloat16"), abilities=ABILITIES))
        join = Join(num_samples=self.samples[name], batch_size=1, longest=1, step=step)
        return self.federation.join(name, join, self.now)

    def asks(self, name: str, kind: str, step: str, micro_batch: str = "0") -> list[Action]:
        labels = ONE if self.settings.labels == "server" else ONE[:0]
        batch = {"lengths": ONE, "label_counts": ONE, "labels": labels, "values": np.zeros((1, 1), np.float32)}
        seconds = Seconds(edge_compute=1.0)
        message: Message
        if kind == "Activations":
            message = Activations(step=int(step), micro_batch=int(micro_batch), seconds=seconds, **batch)
        elif kind == "Evaluation":
            message = Evaluation(index=int(step), **batch)
        elif kind == "Done":
            message = Done(step=int(step))
        else:
            tensors = {"A": np.zeros((1, 1), np.float32)}
            message = {"AdapterGradient": AdapterGradient, "AdapterWeights": AdapterWeights}[kind](
                step=int(step), seconds=seconds, tensors=tensors
            )
        return self.federation.receive(name, message, self.now)

    def replies(self, name: str, step: str, micro_batch: str = "0") -> list[Action]:
        message = HiddenGradient(
            step=int(step),
            micro_batch=int(micro_batch),
            seconds=Seconds(edge_compute=0.5),
            summed_loss=1.0,
            labelled_tokens=1,
            values=np.zeros((1, 1), np.float32),
        )
        return self.federation.receive(name, message, self.now)

    def waits(self, seconds: float) -> list[Action]:
        """As the server's alarm does: it ticks whenever something may be due."""
        until, actions = self.now + seconds, []
        while (due := self.federation.expires()) is not None and due <= until:
            self.now = due
            actions += self.federation.tick(due)
            assert self.federation.expires() != due, "it would tick for ever"
        self.now = until
        return actions

    def computes(self) -> list[Action]:
        action, federation = self.computing.popleft(), self.federation
        if isinstance(action, Train):
            came = federation.codec_of(action.step)
            actions = federation.checked({came: 0.5}) if action.codecs_to_try is not None else []
            gradients = {name: batch.values for name, batch in action.batches.items()}
            return actions + federation.trained(Trained(loss=1.0, labelled_tokens=1, gradients=gradients), 0.5, self.now)
        if isinstance(action, Forward):
            return federation.forwarded({name: batch.values for name, batch in action.batches.items()}, 0.5, self.now)
        if isinstance(action, Backward):
            gradients = {name: gradient.values for name, gradient in action.gradients.items()}
            return federation.trained(Trained(loss=1.0, labelled_tokens=1, gradients=gradients), 0.5, self.now)
        if isinstance(action, Aggregate):
            return federation.aggregated(Aggregated(edge_adapter={"A": np.zeros((1, 1), np.float32)}), 0.25, self.now)
        if isinstance(action, Evaluate) and self.settings.labels == "device":
            return federation.inferred(action.client, action.batch, action.batch.values, self.now)
        if isinstance(action, Evaluate):
            return federation.evaluated(action.client, action.batch, 3.0, self.now)
        return federation.saved(self.now)

    def restart(self) -> list[Action]:
        step, members = self.checkpoint
        self.restarts += 1
        self.computing.clear()
        self.federation = self.new_federation()
        return self.federation.restore(step, step, members, {"A": np.zeros((1, 1), np.float32)}, self.now)

    def keep(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Checkpoint):
                self.checkpoint = action.step, self.federation.membership()
                self.federation.checkpointed(action.step)
            elif isinstance(action, Train | Forward | Backward | Aggregate | Evaluate | FinishRun):
                self.computing.append(action)

    # As text

    def line(self, action: Action) -> str:
        if isinstance(action, Reply):
            return f"-> {action.client}: {said(action.message)}"
        if isinstance(action, Train):
            tried = action.codecs_to_try
            check = "" if tried is None else f", trying {', '.join(['the codec', *tried])}"
            of = f"step {action.step} of {action.total_steps}, micro-batch {action.micro_batch}"
            return f"train {of}, of {', '.join(action.batches) or 'nobody'}{check}"
        if isinstance(action, Forward):
            return f"forward of step {action.step}, micro-batch {action.micro_batch}, of {', '.join(action.batches)}"
        if isinstance(action, Backward):
            of = f"step {action.step} of {action.total_steps}, micro-batch {action.micro_batch}"
            return f"backward of {of}, with the gradients of {', '.join(action.gradients) or 'nobody'}"
        if isinstance(action, Aggregate):
            weights = ", ".join(f"{name} ({action.weights[name]})" for name in action.contributions)
            return f"aggregate step {action.step} of {action.total_steps}: {weights}"
        if isinstance(action, FinishStep):
            record = action.record
            spent = {name: seconds.edge_compute for name, seconds in record.seconds.items()}
            tokens = f"{record.labelled_tokens} of {record.tokens} tokens"
            return (
                f"finish step {record.number}: loss {record.loss}, {tokens}, {record.codec}, "
                f"clients' seconds {spent}, server's {record.server_compute}, deadline {record.deadline:g}"
            )
        if isinstance(action, SaveCodecState):
            return f"save the codec policy, which has seen step {action.state['checked']}"
        if isinstance(action, Report):
            return f'say "{action.text}"'
        if isinstance(action, Evaluate):
            return f"evaluate batch {action.batch.index} of {action.client}"
        return f"{'checkpoint' if isinstance(action, Checkpoint) else 'finish the run after'} step {action.step}"

    def stands(self) -> list[str]:
        federation = self.federation
        status, (names, seconds) = federation.status(), federation.waits_for(self.now)
        members = [f"{name} {presence}" for name, presence in status.members.items()]
        waits = f", for {seconds:g} s for {', '.join(names)}" if names else ""
        progress = f"step {status.step} of {status.total_steps}, round {status.round}"
        now = f"= {status.phase}{waits}; {progress}; {', '.join(members) or 'nobody'}; {status.connected} connected"
        changed, self.standing = now != self.standing, now
        return [now] if changed else []


def said(message: Message) -> str:
    if isinstance(message, Start):
        codec = f", codec {message.codec}" if message.codec != "exact" else ""
        return f"Start after step {message.step} of {message.total_steps}, round {message.round}{codec}"
    if isinstance(message, ActivationGradient):
        codec = f", codec {message.codec}" if message.codec not in ("", "exact") else ""
        times = f"queue {message.queue_seconds:g} s, computed in {message.compute_seconds:g} s"
        return f"ActivationGradient of step {message.step}, micro-batch {message.micro_batch}, {times}{codec}"
    if isinstance(message, HiddenStates):
        times = f"queue {message.queue_seconds:g} s, computed in {message.compute_seconds:g} s"
        return f"HiddenStates of step {message.step}, micro-batch {message.micro_batch}, {times}"
    if isinstance(message, EvaluationStates):
        return f"EvaluationStates of batch {message.index}"
    if isinstance(message, EdgeAdapter):
        return f"EdgeAdapter of step {message.step}, queue {message.queue_seconds:g} s; back to {message.checkpoint} at most"
    if isinstance(message, EvaluationLoss):
        return f"EvaluationLoss of batch {message.index}: {message.summed_loss}"
    assert isinstance(message, RunEnd)
    return f"RunEnd after step {message.step}"


def parsed(value: str) -> Any:
    return int(value) if value.isdigit() else value


def retold(text: str) -> str:
    """The same story, with what comes of it now."""
    blocks = text.strip().split("\n\n")
    title, run = blocks[0], blocks[1]
    assert run.startswith("run"), run
    story = Story(**{key: parsed(value) for key, value in (pair.split("=") for pair in run.split()[1:])})
    told = [title, run]
    for block in blocks[2:]:
        if block.startswith("#"):
            told.append(block)
            continue
        commands = block.partition("\n----")[0].splitlines()
        lines = [line for command in commands for line in story.tell(command)]
        told.append("\n".join([*commands, "----", *lines]))
    return "\n\n".join(told) + "\n"


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_federation_says_what_is_written(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    now = retold(text)
    if os.environ.get("REWRITE_TRANSCRIPTS"):
        path.write_text(now, encoding="utf-8")
    assert now.splitlines() == text.splitlines()


def test_there_are_stories() -> None:
    assert len(STORIES) >= 5
