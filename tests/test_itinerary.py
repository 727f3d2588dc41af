"""
After every `Start` both sides agree on what comes next, every run ends, and what a round averages is weighted by what is in it.

The federation and the device's rule are the real ones; what happens to them is random.
"""

import random
from collections import deque
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
    EarlyStopping,
    Evaluate,
    Federation,
    FinishRun,
    Forward,
    KeepJudgement,
    ModelLimits,
    Phase,
    Reply,
    Train,
    Trained,
)
from protocol import (
    LEGS,
    ActivationGradient,
    Activations,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    HeldOutLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Itinerary,
    Join,
    Message,
    Noted,
    QuestionId,
    Remembered,
    RemoteProtocolError,
    RunEnd,
    RunSettings,
    Seconds,
    Start,
    identity,
)
from protocol.settings import ABILITIES

LIMITS = ModelLimits(
    fingerprint="f", width=1, vocabulary_size=9, num_positions=9, max_batch_tokens=9, edge_shapes={"A": (1, 1)}
)
ENDING = (Phase.LAST_EVALUATIONS, Phase.SAVING, Phase.FINISHED)
"""Phases in which nobody comes back who has left."""
ONE = np.ones(1, np.int32)
NONE = np.empty(0, np.int32)
BATCH = {"lengths": ONE, "label_counts": ONE, "labels": ONE, "values": np.zeros((1, 1), np.float32)}


def adapter_of(num_steps: int) -> dict[str, Any]:
    """Matrices that tell how many steps of the round are in them."""
    return {"A": np.array([[num_steps]], np.float32)}


def held_out_loss(step: int) -> float:
    """Under the adapter that the run has after this step: it falls at first."""
    return (1.0, 0.6, 0.8, 0.5, 0.9, 0.7, 0.6)[min(step, 6)]


ANSWERS: dict[type, set[type]] = {
    **{leg.question: {leg.answer} for leg in LEGS},
    Evaluation: {EvaluationLoss, EvaluationStates},
    HeldOutLoss: {Noted},
}


class Device:
    """
    A client as far as its questions go. Every decision is the `Itinerary`'s; what is here is what a process, a disk and a
    connection would add: a process may die and its disk keep what it wrote, a connection loses what is on its way.
    """

    def __init__(self, name: str, num_samples: int, of: RunSettings) -> None:
        self.name, self.num_samples, self.settings = name, num_samples, of
        self.itinerary = self.whole = Itinerary(of, of.steps_of_client(num_samples, 1))
        self.evaluates = False
        """Whether it tells what its held-out texts lose, after every round."""
        self.kept: dict[int, Remembered] = {}
        """On its disk, by step."""
        self.num_steps_at: dict[int, int] = {}
        """Steps of the round in the matrices that are kept with each."""
        self.ended = False
        self.connected = self.alive = False
        self.is_joining = False
        """Whether it waits for the `Start` to its `Join`."""
        self.inbox: deque[Message] = deque()
        self.outbox: deque[Message] = deque()
        self.awaited: deque[Message] = deque()
        """Questions that the server has got on the present connection, and not answered."""
        self.asked_back: dict[tuple[int, int], bool] = {}
        """Steps and micro-batches that the server has asked back on the present connection: whether it has the reply."""
        self.start_process()

    def start_process(self) -> None:
        self.alive = True
        self.step = max(self.kept, default=0)
        self.round = self.restarts = 0
        self.known_restarts = 0
        """Those of the server when this client heard last where it stands."""
        self.next: QuestionId | None = None
        """To be asked. None before the first `Start`, and while all that may be asked is."""
        self.has_begun = False
        self.num_steps = 0
        """Steps of the round in its matrices."""
        self.open: deque[Message] = deque()
        self.unheard: Start | None = None
        """Where the training must go once an evaluation has ended."""
        self.num_evaluations = 0
        self.told_of = -1
        """The step of which it has told its held-out loss last, since it heard where to go on."""

    def dial(self, restarts: int) -> Join:
        self.connected = self.is_joining = True
        self.restarts = restarts
        return Join(num_samples=self.num_samples, batch_size=1, longest=1, step=self.step)

    def hang_up(self) -> None:
        self.connected = self.is_joining = False
        self.inbox.clear()
        self.outbox.clear()
        self.awaited.clear()
        self.asked_back.clear()

    def awaits(self, answer: Message) -> bool:
        """Whether the server's session may send this: a device that is back may not have asked again yet."""
        if isinstance(answer, Start):
            self.awaited.clear()
            self.asked_back.clear()
            return True
        number = identity(answer)[1:]
        if isinstance(answer, HiddenStates):
            is_open = any(isinstance(asked, Activations) and identity(asked)[1:] == number for asked in self.awaited)
            if is_open and number not in self.asked_back:
                self.asked_back[number] = False
                return True
            return False
        if not self.awaited or type(answer) not in ANSWERS[type(self.awaited[0])]:
            return False
        if isinstance(answer, ActivationGradient):
            if number != identity(self.awaited[0])[1:] or not self.asked_back.get(number, True):
                return False
            self.asked_back.pop(number, None)
        self.awaited.popleft()
        return True

    def question(self, wanted: QuestionId) -> Message:
        kind, step, micro_batch = wanted
        if kind is Activations:
            return Activations(step=step, micro_batch=micro_batch, seconds=Seconds(), **self.batch())
        return Done(step=step) if kind is Done else kind(step=step, seconds=Seconds(), tensors=adapter_of(self.num_steps))

    def batch(self) -> dict[str, Any]:
        return BATCH if self.settings.labels == "server" else {**BATCH, "labels": NONE}

    def may_ask(self) -> bool:
        is_here = self.alive and self.connected and not self.is_joining
        return is_here and self.next is not None and not self.is_evaluating and not self.is_telling

    @property
    def is_evaluating(self) -> bool:
        return bool(self.open) and isinstance(self.open[0], Evaluation)

    @property
    def is_telling(self) -> bool:
        return bool(self.open) and isinstance(self.open[0], HeldOutLoss)

    def ask(self) -> None:
        assert self.next is not None
        if self.unheard is not None:
            start, self.unheard = self.unheard, None
            return self.go_to(start)
        if self.evaluates and not self.open and self.step == self.round and self.told_of != self.step:
            self.told_of = self.step
            return self.tell()
        kind, step, micro_batch = self.next
        self.put(self.question(self.next))
        # A step's later micro-batches need not wait for the answer.
        more = kind is Activations and micro_batch + 1 < self.settings.micro_batches
        self.next = QuestionId(kind, step, micro_batch + 1) if more else None
        return None

    def evaluate(self) -> None:
        self.num_evaluations += 1
        self.put(Evaluation(index=self.num_evaluations, **self.batch()))

    def tell(self) -> None:
        """Its held-out loss, as a question of the training."""
        if self.unheard is not None:
            start, self.unheard = self.unheard, None
            return self.go_to(start)
        return self.put(HeldOutLoss(step=self.round, loss=held_out_loss(self.round), labelled_tokens=1))

    def put(self, question: Message) -> None:
        self.open.append(question)
        self.outbox.append(question)

    def go_to(self, start: Start) -> None:
        self.open.clear()
        self.told_of = -1
        self.itinerary = Itinerary(self.settings, min(self.whole.last_step, start.total_steps))
        self.kept = {step: kept for step, kept in self.kept.items() if step <= start.step}
        latest = self.kept[max(self.kept)] if self.kept else None
        self.next = self.itinerary.resume(start, self.restarts, latest)
        is_of_round = latest is not None and latest.is_of_round(start, self.restarts)
        self.num_steps = self.num_steps_at[latest.step] if latest is not None and is_of_round else 0
        self.round, self.step, self.has_begun = start.round, start.step, True
        self.known_restarts = self.restarts

    def hear(self, message: Message) -> None:
        if isinstance(message, Start):
            # What it has not sent yet belongs to what it asked before.
            self.outbox = deque(unsent for unsent in self.outbox if not isinstance(unsent, HiddenGradient))
            self.hear_start(message)
            return
        if isinstance(message, HiddenStates):
            number = {"step": message.step, "micro_batch": message.micro_batch}
            loss = {"summed_loss": 1.0, "labelled_tokens": 1, "values": message.values}
            self.outbox.append(HiddenGradient(**number, **loss, seconds=Seconds()))
            return
        question = self.open.popleft()
        if isinstance(message, ActivationGradient):
            assert identity(question)[1:] == (message.step, message.micro_batch), f"{identity(question)} != {message.step}"
            if message.micro_batch + 1 == self.settings.micro_batches:
                if self.settings.aggregate_every > 1:
                    self.kept[message.step] = Remembered(step=message.step, round=self.round, restarts=self.restarts)
                    self.step = message.step
                    self.num_steps += 1
                    self.num_steps_at[message.step] = self.num_steps
                self.next = self.itinerary.after_activations(message.step, message.micro_batch)
        elif isinstance(message, EdgeAdapter):
            self.round, self.num_steps = message.step, 0
            if self.settings.aggregate_every == 1:
                self.step = message.step
            self.next = self.itinerary.after_round(message.step)
        elif isinstance(message, RunEnd):
            self.ended, self.next = True, None

    def hear_start(self, start: Start) -> None:
        """In a new process; or on a new connection, with a question open; or in answer to a question."""
        came_back, self.is_joining = self.is_joining, False
        if not came_back or not self.has_begun:
            return self.go_to(start)
        is_same = (self.known_restarts, self.round) == (self.restarts, start.round)
        if self.open and is_same and Itinerary.may_ask_again(self.open[0], start):
            self.outbox.extend(self.open)
            must_go = self.unheard or (self.next and not Itinerary.may_ask_again(self.question(self.next), start))
            assert not (self.is_telling and must_go), "what it asks next would be refused"
            if self.is_evaluating and must_go:
                self.unheard = start
            return None
        self.known_restarts = self.restarts
        if self.is_evaluating:  # its batches before had another adapter: it begins again
            self.open.clear()
            self.unheard = start
            return None
        return self.go_to(start)


class History:
    """One federation and three devices, to which anything may happen."""

    def __init__(self, seed: int, labels: str, **more: Any) -> None:
        self.random = random.Random(seed)
        choose = self.random.choice
        mode = {"labels": labels, "check_codec_every": 0, **more}
        self.settings = settings(clients=3, aggregate_every=choose([1, 1, 2, 3, 5]), micro_batches=choose([1, 1, 2, 3]), **mode)
        self.quorum = choose([None, 1, 2])
        self.checkpoint_every = choose([1, 2])
        self.now = 0.0
        self.num_starts = 0
        self.num_asked_again = 0
        """Micro-batches that a device was asked back once more, since its connection was lost."""
        self.have_asked_back: set[tuple[str, int, int]] = set()
        self.computing: deque[Action] = deque()
        self.in_forward: dict[int, list[str]] = {}
        """Clients of each micro-batch whose forward was computed last."""
        self.checkpoints: list[tuple[int, dict[str, Any], list[Any]]] = []
        self.federation = self.served()
        self.devices = {name: Device(name, self.random.randint(1, 7), self.settings) for name in "abc"}
        if self.federation.early_stopping is not None:
            for device in self.devices.values():
                device.evaluates = self.random.random() < 0.6
        for device in self.devices.values():
            self.come_back(device)

    # What a server does

    def served(self) -> Federation:
        judge = EarlyStopping.in_run(self.settings, threshold=0.0)
        federation = Federation("run", self.settings, LIMITS, adapter_of(0), self.quorum, self.checkpoint_every)
        federation.early_stopping = judge
        return federation

    def judgements(self) -> list[Any]:
        judge = self.federation.early_stopping
        return [] if judge is None else judge.state()

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Reply):
                device = self.devices[action.client]
                if device.connected and device.awaits(action.message):
                    if isinstance(action.message, Start):
                        self.agree(device, action.message)
                    elif isinstance(action.message, HiddenStates):
                        micro_batch = (device.name, *identity(action.message)[1:])
                        self.num_asked_again += micro_batch in self.have_asked_back
                        self.have_asked_back.add(micro_batch)
                    device.inbox.append(action.message)
            elif isinstance(action, Checkpoint):
                saved = self.federation.round, self.federation.membership(), self.judgements()
                self.checkpoints = [*self.checkpoints[-1:], saved]
                self.federation.checkpointed(self.federation.round)
            elif isinstance(action, KeepJudgement):
                step, members, _ = self.checkpoints[-1]
                assert action.step == self.federation.round
                if step == action.step and self.random.random() < 0.5:  # it was not written yet, or is written again
                    self.checkpoints[-1] = step, members, self.judgements()
            elif isinstance(action, Train | Forward | Backward | Aggregate | FinishRun | Evaluate):
                self.computing.append(action)

    def agree(self, device: Device, start: Start) -> None:
        """What the device would ask if it went where this `Start` says is expected, or was answered and will be again."""
        self.num_starts += 1
        twin = Device(device.name, device.num_samples, self.settings)
        twin.kept, twin.num_steps_at, twin.restarts = dict(device.kept), device.num_steps_at, device.restarts
        twin.go_to(start)
        member = self.federation.members[device.name]
        assert twin.next is not None
        assert twin.next == member.next_question or twin.next in member.answers, (
            f"after step {start.step} of round {start.round} {device.name} asks {twin.next}, expected is {member.next_question}"
        )

    def compute(self) -> None:
        action, federation = self.computing.popleft(), self.federation
        if isinstance(action, Forward):
            self.in_forward[action.micro_batch] = list(action.batches)
            hidden = dict.fromkeys(action.batches, BATCH["values"])
            self.perform(federation.forwarded(hidden, 0.1, self.now))
        elif isinstance(action, Train | Backward):
            clients = action.batches if isinstance(action, Train) else self.in_forward.get(action.micro_batch, [])
            gradients = dict.fromkeys(clients, BATCH["values"])
            trained = Trained(loss=1.0, labelled_tokens=0, gradients=gradients)
            self.perform(federation.trained(trained, 0.1, self.now))
        elif isinstance(action, Aggregate):
            if self.settings.aggregate_every > 1:
                num_steps = {name: int(tensors["A"][0, 0]) for name, tensors in action.contributions.items()}
                weights = {name: weight // self.settings.micro_batches for name, weight in action.weights.items()}
                assert weights == num_steps, f"{num_steps} steps were done, {weights} are counted"
            self.perform(federation.aggregated(Aggregated(edge_adapter=adapter_of(0)), 0.1, self.now))
        elif isinstance(action, Evaluate):
            if self.settings.labels == "server":
                self.perform(federation.evaluated(action.client, action.batch, 0.0, self.now))
            else:
                self.perform(federation.inferred(action.client, action.batch, BATCH["values"], self.now))
        else:
            self.perform(federation.saved(self.now, best_step=action.best_step))

    def restart(self) -> None:
        if not self.checkpoints or self.federation.phase in (Phase.SAVING, Phase.FINISHED):
            return
        step, members, judgements = self.checkpoints[-1]
        self.computing.clear()
        for device in self.devices.values():
            device.hang_up()
        before = self.federation
        self.federation = self.served()
        if self.federation.early_stopping is not None:
            self.federation.early_stopping.restore(judgements)
        self.federation.restarts = before.restarts + 1
        self.perform(self.federation.restore(step, self.checkpoints[0][0], members, adapter_of(0), self.now))

    # What happens to a device

    def come_back(self, device: Device) -> None:
        """With the process it has, once that has noticed, by a question; else with a new one."""
        if device.connected or device.ended:
            return
        while device.alive and device.has_begun and not device.open:
            device.ask()
        if not device.alive:
            device.start_process()
        member = self.federation.members.get(device.name)
        if member is not None and member.presence.has_left and self.federation.phase in ENDING:
            device.ended = True  # the run is over for it
            return
        self.federation.welcome(Hello(name=device.name, fingerprint="f", abilities=ABILITIES))
        join = device.dial(self.federation.restarts)
        device.outbox.clear()
        self.perform(self.federation.join(device.name, join, self.now))

    def happen(self, what: str, device: Device) -> None:
        federation = self.federation
        if what == "ask" and device.may_ask():
            device.ask()
        elif what == "evaluate" and device.may_ask() and not device.open:
            device.evaluate()
        elif what == "tell" and device.may_ask() and not device.open and device.step == device.round:
            device.tell()
        elif what == "upload" and device.connected and device.outbox:
            self.upload(device)
        elif what == "download" and device.inbox:
            device.hear(device.inbox.popleft())
        elif what == "lose" and device.connected:
            device.hang_up()
            federation.disconnected(device.name, self.now)
        elif what == "kill" and federation.total_steps and not device.ended:
            device.alive = False
            if device.connected:
                self.happen("lose", device)
        elif what == "wipe":
            self.happen("kill", device)
            if not device.alive:
                device.kept.clear()
        elif what == "leave" and device.name in federation.members and federation.total_steps:
            device.hang_up()
            self.perform(federation.leave(device.name, self.now))
            device.alive = device.alive and self.random.random() < 0.5  # it was revoked, or said goodbye and ended
        elif what == "back":
            self.come_back(device)
        elif what == "compute" and self.computing:
            self.compute()
        elif what == "wait":
            self.now += 1000.0
            self.perform(federation.tick(self.now))
        elif what == "restart":
            self.restart()

    def upload(self, device: Device) -> None:
        question, member = device.outbox.popleft(), self.federation.members[device.name]
        if not (isinstance(question, Activations | HiddenGradient) and question.step <= member.answered_up_to):
            if isinstance(question, HiddenGradient):
                assert device.asked_back[identity(question)[1:]] is False, "nobody asked for it, or it was given"
                device.asked_back[identity(question)[1:]] = True
            else:
                device.awaited.append(question)
        self.perform(self.federation.receive(device.name, question, self.now))

    def run(self) -> None:
        usual = ["ask"] * 8 + ["upload"] * 8 + ["download"] * 8 + ["compute"] * 8 + ["back"] * 3
        faults = ["lose", "lose", "kill", "kill", "wipe", "leave", "leave", "wait", "evaluate", "tell", "tell", "restart"]
        share_of_faults = self.random.choice([0.01, 0.02, 0.05, 0.2])
        for _ in range(self.random.randint(50, 600)):
            what = self.random.choice(faults if self.random.random() < share_of_faults else usual)
            self.happen(what, self.random.choice(list(self.devices.values())))
        for _ in range(400):  # whatever happened, from here on everybody does what is due
            for device in self.devices.values():
                for what in ("back", "ask", "upload", "download"):
                    self.happen(what, device)
            self.happen("compute", device)
            if all(device.ended for device in self.devices.values()):
                return
        waiting = {
            device.name: (device.next, *map(identity, device.open)) for device in self.devices.values() if not device.ended
        }
        raise AssertionError(f"hangs in {self.federation.phase.value}: {waiting}")


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize("final_adapter", ["last", "best"])
def test_both_sides_agree_where_a_run_ends_early_or_with_its_best_adapter(labels: str, final_adapter: str) -> None:
    num_early = num_best = 0
    for seed in range(200):
        patience = seed % 3 if final_adapter == "best" else 1
        history = History(seed, labels, early_stopping_patience=patience, final_adapter=final_adapter)
        try:
            history.run()
        except (AssertionError, RemoteProtocolError) as error:
            pytest.fail(f"history {seed}: {error}")
        federation = history.federation
        had = max(device.whole.last_step for device in history.devices.values())
        num_early += federation.total_steps < had
        if federation.total_steps < had:
            assert federation.step == federation.total_steps == federation.early_stopping.last_step  # type: ignore[union-attr]
        num_best += 0 < federation._best_step < federation.step
    assert num_early >= 20
    assert (num_best >= 20) == (final_adapter == "best")


@pytest.mark.parametrize(("labels", "histories"), [("server", 1500), ("device", 750)])
def test_both_sides_agree_after_every_start_and_every_run_ends(labels: str, histories: int) -> None:
    num_starts = num_asked_again = 0
    for seed in range(histories):
        history = History(seed, labels)
        try:
            history.run()
        except (AssertionError, RemoteProtocolError) as error:
            pytest.fail(f"history {seed}: {error}")
        num_starts += history.num_starts
        num_asked_again += history.num_asked_again
    assert num_starts >= 7 * histories
    assert num_asked_again >= (histories if labels == "device" else 0)
