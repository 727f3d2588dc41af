"""The device's algorithm, call by call: the engine only notes what it is asked to do, and the server answers everything."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol_samples import SETTINGS

from edge_client.data import Batch, Batches, Dataset, Sample
from edge_client.disclosure import Disclosure
from edge_client.held_out import perplexity
from edge_client.membership import Membership
from edge_client.saved_steps import SavedStep, SavedSteps
from edge_client.stopwatch import Stopwatch
from edge_client.token_file import Samples
from edge_client.training import Step, train
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
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
    RunSettings,
    Session,
    Side,
    Start,
    Tensors,
    Welcome,
)

RUN = replace(SETTINGS, steps=3, lr=0.1, lr_schedule="linear", warmup_steps=0, check_codec_every=0)
TENSORS = {"m": np.zeros((1, 1), np.float32)}
DATA = Dataset(Samples.of([Sample(np.array([1, 2, 3], np.int32), 2)] * 3))


class NotingEngine:
    """An `Engine` without arithmetic."""

    num_adapter_elements = 1

    def __init__(self, log: list[str]) -> None:
        self._note = log.append

    def begin_step(self) -> None:
        self._note("begin step")

    def forward(self, batch: Batch, dropout_seed: int) -> Array:
        self._note("forward")
        return np.zeros((len(batch.tokens), 2), np.float32)

    def backward(self, gradient: Array) -> None:
        self._note("backward")

    def end_step(self, labelled_tokens: int) -> None:
        self._note(f"divide by {labelled_tokens}")

    def take_step(self, learning_rate: float) -> None:
        self._note(f"AdamW at {learning_rate:.3f}")

    def state(self) -> Tensors:
        self._note("save")
        return TENSORS

    def restore(self, state: Tensors) -> None:
        self._note("restore")

    def forget(self) -> None:
        self._note("forget")

    def gradients(self) -> Tensors:
        return TENSORS

    def adapter(self) -> Tensors:
        return TENSORS

    def load_adapter(self, tensors: Tensors) -> None:
        self._note("load adapter")

    def losses_and_gradient(self, hidden: Array, labels: Array) -> tuple[Array, Array]:
        return self.losses(hidden, labels), hidden + 1

    def losses(self, hidden: Array, labels: Array) -> Array:
        self._note(f"loss of {labels.tolist()}")
        return hidden.sum(1)

    def infer(self, batch: Batch) -> Array:
        return np.zeros((len(batch.tokens), 2), np.float32)


class Server:
    """A connection that answers what it is asked, and notes it; ``answer`` may change an answer."""

    url = "ws://here"
    num_bytes = 0

    def __init__(self, settings: RunSettings, start: Start, log: list[str], answer: Callable[[Message], Message]) -> None:
        self.session = Session(Side.CLIENT)
        self._settings, self._start, self._log, self._answer = settings, start, log, answer
        self._asked: list[Message] = []

    def expect(self, size: int) -> None:
        pass

    def exchange(self, message: Message, *kinds: type) -> Message:
        self.ask(message)
        return self.answer(*kinds)

    def ask(self, message: Message) -> None:
        self._asked.append(message)
        if not isinstance(message, Hello | Join):
            part = f".{message.micro_batch}" if isinstance(message, Activations | HiddenGradient) else ""
            verb = "reply" if isinstance(message, HiddenGradient) else "ask"
            self._log.append(f"{verb} {type(message).__name__} {getattr(message, 'step', '')}{part}")

    def answer(self, *_: type) -> Message:
        # As the server: the backward pass of a micro-batch first, then the forward pass of the next one.
        question = min(self._asked, key=lambda message: not isinstance(message, HiddenGradient))
        self._asked.remove(question)
        if isinstance(question, Hello):
            return Welcome(run="r", settings=self._settings, fingerprint="f")
        return self._start if isinstance(question, Join) else self._answer(question)

    def watch_link(self, *_: object, **__: int) -> None:
        pass

    def abandon(self) -> None:
        pass


def usual_answer(question: Message) -> Message:
    if isinstance(question, Activations):
        fields = {"step": question.step, "micro_batch": question.micro_batch, "values": question.values}
        return ActivationGradient(**fields, loss=question.step / 2, labelled_tokens=5)
    if isinstance(question, Evaluation):
        return EvaluationLoss(index=question.index, summed_loss=float(len(question.labels)))
    if isinstance(question, AdapterGradient | AdapterWeights):
        return EdgeAdapter(step=question.step, tensors=TENSORS)
    assert isinstance(question, Done)
    return RunEnd(step=question.step, tensors=TENSORS)


Run = Callable[..., tuple[list[str], list[Step]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """What happens in a run from ``start`` on, and its steps."""

    def run(
        settings: RunSettings,
        *,
        start: Start | None = None,
        saved: SavedStep | None = None,
        in_flight: int = 1,
        answer: Callable[[Message], Message] = usual_answer,
    ) -> tuple[list[str], list[Step]]:
        log: list[str] = []
        start = start or Start(step=0, total_steps=3, adapter=TENSORS, round=0)
        server: Any = Server(settings, start, log, answer)
        saved_steps = SavedSteps(tmp_path)
        if saved is not None:
            saved_steps.save(saved, keep_from=0, is_round_end=True)
        membership = Membership(lambda: server, Hello(name="a", fingerprint="f"))
        membership.start(Join(num_samples=3, batch_size=3, longest=2))
        batches = Batches(data=DATA, name="a", batch_size=3, shuffle=True, seed=settings.seed, num_parts=settings.micro_batches)
        more = {"disclosure": Disclosure(settings, b"s" * 32), "saved_steps": saved_steps, "in_flight": in_flight}
        steps = list(train(membership, NotingEngine(log), batches, start, **more))
        return log, steps

    return run


def test_in_rounds_of_one_step_gradients_are_summed_by_the_server(run: Run) -> None:
    log, steps = run(replace(RUN, aggregate_every=1, micro_batches=1))
    one_step = "begin step/forward/ask Activations {0}.0/backward/divide by 5/ask AdapterGradient {0}/load adapter"
    assert log == [
        "load adapter",
        *[line for step in (1, 2, 3) for line in one_step.format(step).split("/")],
        *["ask Done 3", "load adapter"],
    ]
    assert [(step.number, step.loss, step.tokens) for step in steps] == [(1, 0.5, 6), (2, 1.0, 6), (3, 1.5, 6)]


def test_in_longer_rounds_every_client_steps_and_adapters_are_averaged_at_their_end(run: Run) -> None:
    log, _ = run(replace(RUN, aggregate_every=2, micro_batches=1))
    computed = "begin step/forward/ask Activations {}.0/backward/divide by 5/AdamW at {:.3f}/save"
    averaged = ["ask AdapterWeights {}", "load adapter"]
    assert log == [
        *["forget", "load adapter"],
        *computed.format(1, 0.1).split("/"),
        *computed.format(2, 0.1 * 2 / 3).split("/"),
        *[line.format(2) for line in averaged],
        *computed.format(3, 0.1 / 3).split("/"),
        *[line.format(3) for line in averaged],  # the client's last step ends a round for it
        *["ask Done 3", "load adapter"],
    ]


def test_next_micro_batch_is_computed_before_the_answer_to_the_one_before_is_used(run: Run) -> None:
    log, _ = run(replace(RUN, steps=1, aggregate_every=1, micro_batches=3), in_flight=2)
    assert log[2:-5] == [
        *["forward", "ask Activations 1.0", "forward", "ask Activations 1.1", "backward"],
        *["forward", "ask Activations 1.2", "backward", "backward"],
    ]


@pytest.mark.parametrize("restarts", [0, 1])
def test_client_that_had_finished_a_round_and_was_not_heard_gives_its_adapter_first(run: Run, restarts: int) -> None:
    """Unless the server has been started again since: then the adapter that it gives is another one than the client's was."""
    saved = SavedStep(step=2, round=0, restarts=restarts, state=TENSORS)
    start = Start(step=2, total_steps=3, adapter=TENSORS, round=0)
    log, steps = run(replace(RUN, aggregate_every=2, micro_batches=1), start=start, saved=saved)
    first = ["restore", "ask AdapterWeights 2", "load adapter"] if restarts == 0 else ["restore", "load adapter"]
    assert log[: len(first) + 1] == [*first, "begin step"]
    assert [step.number for step in steps] == [3]


def test_steps_are_done_again_where_the_run_goes_back(run: Run) -> None:
    back = [Start(step=1, total_steps=3, adapter=TENSORS, round=1)]

    def answer(question: Message) -> Message:
        is_third = isinstance(question, Activations) and question.step == 3
        return back.pop() if is_third and back else usual_answer(question)

    log, steps = run(replace(RUN, aggregate_every=1, micro_batches=1), answer=answer)
    assert [step.number for step in steps] == [1, 2, 2, 3]
    third = log.index("ask Activations 3.0")
    assert log[third + 1 : third + 5] == ["load adapter", "begin step", "forward", "ask Activations 2.0"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"micro_batch": 1}, "expected the gradient of micro-batch 0 of step 1, .*; got that of micro-batch 1 of step 1"),
        ({"values": np.zeros((5, 2), np.float32)}, r"got that of micro-batch 0 of step 1, \[5, 2\]"),
        ({"step": 2}, "got that of micro-batch 0 of step 2"),
    ],
)
def test_gradient_of_something_else_is_an_error(run: Run, changed: dict[str, Any], said: str) -> None:
    def answer(question: Message) -> Message:
        return replace(usual_answer(question), **changed)

    with pytest.raises(RemoteProtocolError, match=said):
        run(replace(RUN, aggregate_every=1, micro_batches=2), answer=answer)


@pytest.mark.parametrize(("step", "is_taken"), [(2, True), (4, False), (1, False)])
def test_adapter_is_of_the_step_that_was_asked_for(run: Run, step: int, is_taken: bool) -> None:
    def answer(question: Message) -> Message:
        answer = usual_answer(question)
        return replace(answer, step=step) if isinstance(answer, EdgeAdapter) and answer.step == 2 else answer

    settings = replace(RUN, aggregate_every=2, micro_batches=1)
    if is_taken:
        assert len(run(settings, answer=answer)[1]) == 3
    else:
        with pytest.raises(RemoteProtocolError, match=f"expected the adapter of step 2, got that of step {step}"):
            run(settings, answer=answer)


# Labels that stay on the device


AT_HOME = replace(RUN, labels="device", activation_codec="exact", gradient_codec="exact", steps=1, aggregate_every=1)
TWO_OF_THREE = Dataset(Samples.of([Sample(np.array([7, 1, 2, 3], np.int32), 2)]))


class Asking:
    """A server that asks back about every micro-batch, and keeps what it is sent."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.open: dict[int, Activations] = {}

    def __call__(self, message: Message) -> Message:
        self.heard.append(message)
        if isinstance(message, Activations):
            self.open[message.micro_batch] = message
            return hidden_states(message)
        if isinstance(message, HiddenGradient):
            return usual_answer(self.open.pop(message.micro_batch))
        if isinstance(message, Evaluation):
            return EvaluationStates(index=message.index, values=np.ones((message.num_labelled, 2), np.float32))
        return usual_answer(message)

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


def hidden_states(question: Activations) -> HiddenStates:
    """Its rows are numbered."""
    values = np.arange(question.num_labelled, dtype=np.float32)[:, None].repeat(2, 1)
    return HiddenStates(step=question.step, micro_batch=question.micro_batch, values=values)


def test_device_that_keeps_its_labels_computes_the_loss_between_forward_and_backward(run: Run) -> None:
    server = Asking()
    log, steps = run(replace(AT_HOME, micro_batches=1), answer=server)
    assert log[2:8] == [
        *["forward", "ask Activations 1.0", "loss of [2, 3, 2, 3, 2, 3]", "reply HiddenGradient 1.0", "backward"],
        "divide by 5",
    ]
    assert [step.loss for step in steps] == [0.5]  # of all clients, as the server says
    (asked,), (replied,) = server.of(Activations), server.of(HiddenGradient)
    assert (asked.labels.tolist(), asked.label_counts.tolist()) == ([], [2, 2, 2])
    assert (replied.summed_loss, replied.labelled_tokens) == (30.0, 6)
    assert np.array_equal(replied.values, hidden_states(asked).values + 1)


def test_device_computes_the_next_micro_batch_before_the_server_asks_back_about_the_first(run: Run) -> None:
    log, _ = run(replace(AT_HOME, micro_batches=3), in_flight=2, answer=Asking())
    assert [line for line in log[2:-3] if not line.startswith("loss")] == [
        *["forward", "ask Activations 1.0", "forward", "ask Activations 1.1"],
        *["reply HiddenGradient 1.0", "backward", "forward", "ask Activations 1.2"],
        *["reply HiddenGradient 1.1", "backward", "reply HiddenGradient 1.2", "backward", "divide by 5"],
        "ask AdapterGradient 1",
    ]


def test_gradient_of_rows_without_a_label_is_zero_where_the_server_does_not_know_them(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(f"{__name__}.DATA", TWO_OF_THREE)
    before: list[Array] = []
    monkeypatch.setattr(Disclosure, "gradient", lambda self, values, *purpose: before.append(values) or values + 0.5)
    server = Asking()
    log, _ = run(replace(AT_HOME, micro_batches=1, label_rows="hidden", gradient_noise=1.0, gradient_clip=1.0), answer=server)
    assert "loss of [2, 3]" in log
    (asked,), (replied,) = server.of(Activations), server.of(HiddenGradient)
    assert asked.label_counts.tolist() == asked.lengths.tolist() == [3]
    assert before[0].tolist() == [[0, 0], [2, 2], [3, 3]]
    assert np.array_equal(replied.values, before[0] + 0.5)
    assert replied.labelled_tokens == 2
    assert replied.summed_loss != 6.0  # it has noise, too


def test_step_that_is_repeated_sends_the_same_noise(run: Run) -> None:
    noise = {"activation_noise": 0.5, "activation_clip": 2.0, "gradient_noise": 0.5, "gradient_clip": 2.0}
    sent = []
    for _ in range(2):
        server = Asking()
        run(replace(AT_HOME, micro_batches=2, steps=2, **noise), answer=server)
        sent.append([message.values.tobytes() for message in [*server.of(Activations), *server.of(HiddenGradient)]])
    assert sent[0] == sent[1]
    assert len(set(sent[0])) == 8


def test_server_that_asks_back_about_what_was_not_asked_is_in_error(run: Run) -> None:
    def answer(question: Message) -> Message:
        assert isinstance(question, Activations)
        return replace(hidden_states(question), micro_batch=1)

    with pytest.raises(RemoteProtocolError, match="hidden states of micro-batch 1 of step 1, which this device waits for no"):
        run(replace(AT_HOME, micro_batches=2), answer=answer)


def test_held_out_text_that_is_asked_about_again_has_the_same_noise() -> None:
    """Else whoever asks often enough would know it by the mean."""
    settings, server = replace(AT_HOME, activation_noise=0.5, activation_clip=2.0), Asking()
    connection: Any = Server(settings, Start(step=0, total_steps=1, adapter=TENSORS, round=0), [], server)
    membership = Membership(lambda: connection, Hello(name="a", fingerprint="f"))
    membership.start(Join(num_samples=3, batch_size=3, longest=2))
    for _ in range(2):
        assert len(list(perplexity(membership, NotingEngine([]), DATA, 2, Disclosure(settings, b"s" * 32)))) == 2
    first, second, *again = (message.values.tobytes() for message in server.of(Evaluation))
    assert again == [first, second]
    assert first[: len(second)] != second


@pytest.mark.parametrize("labels", ["server", "device"])
def test_perplexity_is_the_same_wherever_the_labels_are(labels: str) -> None:
    settings = replace(AT_HOME, labels=labels)
    server, log = Asking() if labels == "device" else usual_answer, list[str]()
    now = [0.0]
    connection: Any = Server(settings, Start(step=0, total_steps=1, adapter=TENSORS, round=0), log, server)
    membership = Membership(lambda: connection, Hello(name="a", fingerprint="f"), stopwatch=Stopwatch(lambda: now[0]))
    membership.start(Join(num_samples=3, batch_size=3, longest=2))
    now[0] = 5.0
    found = list(perplexity(membership, NotingEngine(log), TWO_OF_THREE, 2, Disclosure(settings)))
    assert found == pytest.approx([np.exp(2.0) if labels == "device" else np.exp(1.0)])
    assert ("loss of [2, 3]" in log) is (labels == "device")
    now[0] = 7.0
    assert membership.stopwatch.lap().edge_compute == pytest.approx(2.0)  # an evaluation belongs to no step
    if isinstance(server, Asking):
        assert server.of(Evaluation)[0].labels.tolist() == []
