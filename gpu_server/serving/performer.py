"""Performs what the federation decides: sends, computes, writes."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from split_model import Adapter

from ..checkpoints import CheckpointSpacing, SavedRound
from ..engine import Engine
from ..federation import (
    Action,
    Aggregate,
    Backward,
    Checkpoint,
    Evaluate,
    Federation,
    FinishRun,
    FinishStep,
    Forward,
    KeepHeldOutLoss,
    KeepJudgement,
    Reply,
    Report,
    SaveCodecState,
    StepRecord,
    Train,
)
from ..history import EvaluationRecord, tell
from .journal import Journal
from .lifetime import Lifetime
from .observer import Observer
from .peer import Peer

__all__ = ["Performer", "Replies"]

logger = logging.getLogger("gpu_server")
Result = TypeVar("Result")
Replies = dict[str, "asyncio.Task[None]"]
"""Those that are being sent, by client."""

SECONDS_FOR_REPLIES = 1.0
SECONDS_BETWEEN_TOLD_CHECKPOINTS = 60.0


class Performer:
    """
    Performs the federation's actions in their order. What takes time runs beside the event loop, and its outcome goes back to
    the federation, which may want more done.

    The engine computes on one thread of its own, so that the event loop always answers keepalives.

    Args:
        spacing: which of the federation's checkpoints are written; None: all. The last round's end always is.
    """

    def __init__(
        self,
        federation: Federation,
        engine: Engine,
        *,
        journal: Journal,
        observers: Sequence[Observer],
        peers: Mapping[str, Peer],
        lifetime: Lifetime,
        spacing: CheckpointSpacing | None = None,
    ) -> None:
        self._federation, self._engine, self._journal = federation, engine, journal
        self._peers, self._lifetime = peers, lifetime
        self._observers = observers
        # For the others no snapshot of all members is made at every coming and going.
        self._of_status = [each for each in observers if _listens_to_status(each)]
        self._steps = _StepWriter(journal, observers, peers, lifetime)
        self._checkpoints = _CheckpointWriter(federation, engine, journal, observers, self._steps, lifetime, spacing)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._alarm: asyncio.TimerHandle | None = None
        self._judging: asyncio.Task[None] | None = None
        """Keeps the last judgement."""
        # What returns a coroutine takes time: the actions after it do not wait for it.
        self._methods: dict[type[Action], Callable[[Any, Replies], Coroutine[Any, Any, None] | None]] = {
            Reply: self._reply,
            Report: self._report,
            FinishStep: self._finish_step,
            Checkpoint: self._checkpoint,
            Train: self._train,
            Forward: self._forward,
            Backward: self._backward,
            Aggregate: self._aggregate,
            Evaluate: self._evaluate,
            KeepHeldOutLoss: self._keep_held_out_loss,
            KeepJudgement: self._keep_judgement,
            FinishRun: self._finish_run,
            SaveCodecState: self._save_codec_state,
        }

    def perform(self, actions: Sequence[Action]) -> Replies:
        """The replies that are being sent; everything else is under way, too, and fails with the run."""
        replies: Replies = {}
        for action in actions:
            takes_time = self._methods[type(action)](action, replies)
            if takes_time is not None:
                self._lifetime.spawn(takes_time)
        self._set_alarm()
        return replies

    async def _perform_in_turn(self, actions: Sequence[Action]) -> None:
        """Each is done before the next begins."""
        for action in actions:
            takes_time = self._methods[type(action)](action, {})
            if takes_time is not None:
                await takes_time

    async def save_unfinished(self) -> None:
        """Of a run that ends before its time: a checkpoint of its last round's end, and the adapter as it is."""
        await self.save_round_end()
        await self._save_adapter()

    async def save_round_end(self) -> None:
        """A checkpoint of it, for which nothing need be computed."""
        await self._checkpoints.write_round_end()

    def tell_status(self) -> None:
        """Call it when a client has come or gone."""
        if not self._of_status:
            return
        status = self._federation.status()
        try:
            for observer in self._of_status:
                observer.status_changed(status)
        except Exception as error:
            self._lifetime.fail(error)

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._worker.shutdown()

    # At once

    def _reply(self, action: Reply, replies: Replies) -> None:
        peer = self._peers.get(action.client)
        if peer is not None:
            replies[action.client] = self._lifetime.spawn(_send(peer, action))

    def _report(self, action: Report, _: Replies) -> None:
        tell(action.kind, action.text, client=action.client, step=self._federation.step, **action.details)

    def _finish_step(self, action: FinishStep, replies: Replies) -> None:
        self._steps.write(action, list(replies.values()))
        self.tell_status()

    def _checkpoint(self, _: Checkpoint, __: Replies) -> None:
        self._checkpoints.write_if_due()

    # What takes time

    async def _train(self, action: Train, _: Replies) -> None:
        federation, engine = self._federation, self._engine
        if action.codecs_to_try is not None:
            changes = await self._compute(engine.check, list(action.batches.values()), action.codecs_to_try)
            came = federation.codec_of(action.step)
            await self._perform_in_turn(federation.checked({codec or came: change for codec, change in changes.items()}))
        done = self._timed(engine.train, action.step, action.total_steps, action.micro_batch, action.batches)
        self.perform(federation.trained(*await done))

    async def _forward(self, action: Forward, _: Replies) -> None:
        done = self._timed(self._engine.forward, action.step, action.micro_batch, action.batches)
        self.perform(self._federation.forwarded(*await done))

    async def _backward(self, action: Backward, _: Replies) -> None:
        done = self._timed(self._engine.backward, action.step, action.total_steps, action.micro_batch, action.gradients)
        self.perform(self._federation.trained(*await done))

    async def _save_codec_state(self, action: SaveCodecState, _: Replies) -> None:
        await asyncio.wrap_future(self._journal.write_codec_state(action.state))

    async def _aggregate(self, action: Aggregate, _: Replies) -> None:
        done = await self._timed(self._engine.aggregate, action.step, action.total_steps, action.contributions, action.weights)
        self._checkpoints.round_ended(action.step, self._engine.round_end)
        self.perform(self._federation.aggregated(*done))

    async def _evaluate(self, action: Evaluate, _: Replies) -> None:
        federation, engine = self._federation, self._engine
        if federation.settings.labels == "server":
            summed_loss = await self._compute(engine.evaluate, action.batch)
            self.perform(federation.evaluated(action.client, action.batch, summed_loss, time.monotonic()))
        else:
            hidden = await self._compute(engine.infer, action.batch)
            self.perform(federation.inferred(action.client, action.batch, hidden, time.monotonic()))

    async def _keep_held_out_loss(self, action: KeepHeldOutLoss, _: Replies) -> None:
        record = EvaluationRecord(
            step=action.step,
            time=time.time(),
            client=action.client,
            loss=action.loss,
            labelled_tokens=action.labelled_tokens,
        )
        written, step = self._journal.write_evaluation(record), self._steps.last
        if step is not None:
            await step  # whoever follows the run hears of a step before he hears what came of it
        await asyncio.wrap_future(written)
        for observer in self._observers:
            observer.evaluated(record)

    def _keep_judgement(self, action: KeepJudgement, _: Replies) -> None:
        self._judging = self._lifetime.spawn(self._judged(action))

    async def _judged(self, action: KeepJudgement) -> None:
        if action.is_best:
            await self._compute(self._engine.keep_best)
        self._checkpoints.judged(action.step, self._engine.round_end)

    async def _finish_run(self, action: FinishRun, _: Replies) -> None:
        if self._judging is not None:
            await self._judging
        await self._checkpoints.finish()
        edge_adapter = await self._compute(self._engine.load_best) if action.best_step else None
        await self._save_adapter(action.best_step)
        self.perform(self._federation.saved(time.monotonic(), best_step=action.best_step, edge_adapter=edge_adapter))
        tell("complete", "the adapter is saved", step=self._federation.step, quiet=True)
        self.tell_status()
        self._lifetime.end_if_all_have_left()

    async def _save_adapter(self, best_step: int = 0) -> None:
        adapter = await self._compute(self._engine.adapter)
        reached, of = self._federation.round, self._federation.total_steps
        await asyncio.wrap_future(self._journal.write_adapter(adapter, step=reached, of=of, best_step=best_step))

    async def _timed(self, function: Callable[..., Result], *arguments: Any) -> tuple[Result, float, float]:
        """What is computed, how many seconds it took, and when it was done."""
        started = time.monotonic()
        result = await self._compute(function, *arguments)
        now = time.monotonic()
        return result, now - started, now

    async def _compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    # The alarm

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        expires = self._federation.expires()
        if expires is not None:
            self._alarm = asyncio.get_running_loop().call_later(expires - time.monotonic(), self._tick)

    def _tick(self) -> None:
        self.perform(self._federation.tick(time.monotonic()))


class _StepWriter:
    """Writes the line of every finished step, one after the other, and tells whoever observes the run."""

    def __init__(self, journal: Journal, observers: Sequence[Observer], peers: Mapping[str, Peer], lifetime: Lifetime) -> None:
        self._journal, self._observers, self._peers, self._lifetime = journal, observers, peers, lifetime
        self.last: asyncio.Task[None] | None = None
        """Done when the step that was finished last is written, and so are all before it."""
        self._counted = asyncio.Event()
        """Whether the bytes of the step that was finished last are counted."""
        self._counted.set()

    def write(self, action: FinishStep, replies: Sequence["asyncio.Task[None]"]) -> None:
        """
        Args:
            replies: those that have to be sent first: their bytes are the step's.
        """
        self._counted, counted_before = asyncio.Event(), self._counted
        record = replace(action.record, time=time.time())
        self.last = self._lifetime.spawn(self._write(record, replies, counted_before, self._counted, self.last))

    async def _write(
        self,
        record: StepRecord,
        replies: Sequence["asyncio.Task[None]"],
        counted_before: asyncio.Event,
        counted: asyncio.Event,
        before: "asyncio.Task[None] | None",
    ) -> None:
        try:
            if replies:
                # Bytes that a slow reader takes later than this are counted in the next line.
                await asyncio.wait(replies, timeout=SECONDS_FOR_REPLIES)
            # Counting follows the steps, and not the disk: else a slow one would move bytes from line to line.
            await counted_before.wait()
            counts = {name: peer.take_counts() for name, peer in sorted(self._peers.items())}
            record = replace(
                record,
                bytes_up={name: up for name, (up, _) in counts.items()},
                bytes_down={name: down for name, (_, down) in counts.items()},
            )
            written = self._journal.write_step(record)
        finally:
            counted.set()
        await asyncio.wrap_future(written)
        if before is not None:
            await before
        for observer in self._observers:
            observer.step_finished(record)


class _CheckpointWriter:
    """One checkpoint at a time: who asks while one is written has that one, or the next, written after."""

    def __init__(
        self,
        federation: Federation,
        engine: Engine,
        journal: Journal,
        observers: Sequence[Observer],
        steps: _StepWriter,
        lifetime: Lifetime,
        spacing: CheckpointSpacing | None,
    ) -> None:
        self._federation, self._journal, self._steps, self._lifetime = federation, journal, steps, lifetime
        self._spacing = spacing
        self._observers, self._told = observers, -math.inf
        self._round_end: tuple[int, Adapter, list[Any]] = (federation.round, engine.round_end, self._judgements())
        """
        What the last round ended with: its step, `Engine.round_end` as it was then, or as its judgement has left it, and all
        judgements until then.
        """
        self._asked_for = federation.round
        """The last round's end that was to be written, or the one from which the server went on."""
        self._to_write: tuple[int, Adapter, list[Any]] | None = None
        self._writing: asyncio.Task[None] | None = None

    def round_ended(self, step: int, state: Adapter) -> None:
        self._round_end = step, state, self._judgements()

    def judged(self, step: int, state: Adapter) -> None:
        """The last round's end is judged. Its checkpoint, if it is written already, is written again at the end."""
        assert step == self._round_end[0]
        self.round_ended(step, state)
        self._asked_for = min(self._asked_for, step - 1)

    def _judgements(self) -> list[Any]:
        judge = self._federation.early_stopping
        return [] if judge is None else judge.state()

    def write_if_due(self) -> None:
        if self._spacing is None or self._spacing.is_due(time.monotonic()):
            self.write_round_end()

    def write_round_end(self) -> "asyncio.Task[None]":
        if self._spacing is not None:
            self._spacing.asked()
        self._to_write, self._asked_for = self._round_end, self._round_end[0]
        if self._writing is None or self._writing.done():
            self._writing = self._lifetime.spawn(self._write())
        return self._writing

    async def finish(self) -> None:
        """Have the last round's end on the disk."""
        if self._round_end[0] > self._asked_for:
            self.write_round_end()
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        """The newest round's end that is to be written, as often as there is a newer one."""
        while self._to_write is not None:
            (step, state, judgements), self._to_write = self._to_write, None
            if self._steps.last is not None:
                await self._steps.last  # metrics know at least the steps that a checkpoint knows
            saved = SavedRound(
                run=self._federation.run,
                step=step,
                membership=self._federation.membership(),
                state=state,
                judgements=judgements,
            )
            seconds, num_bytes = await asyncio.wrap_future(self._journal.write_checkpoint(saved))
            if self._spacing is not None:
                self._spacing.written(time.monotonic(), seconds=seconds, num_bytes=num_bytes)
            self._federation.checkpointed(step)
            for observer in self._observers:
                observer.checkpoint_written(step)
            if time.monotonic() - self._told >= SECONDS_BETWEEN_TOLD_CHECKPOINTS:
                self._told = time.monotonic()
                tell("checkpoint", f"a checkpoint of step {step} is written", step=step, quiet=True)


def _listens_to_status(observer: Observer) -> bool:
    return getattr(observer.status_changed, "__func__", None) is not Observer.status_changed


async def _send(peer: Peer, action: Reply) -> None:
    if not await peer.send(action.message):
        logger.debug("%s: did not wait for %s any more", peer, type(action.message).__name__)
