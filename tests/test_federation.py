"""The server's decisions, without sockets, clocks or a model."""

from itertools import pairwise
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
    EarlyStopping,
    Federation,
    FinishRun,
    FinishStep,
    Forward,
    KeepJudgement,
    ModelLimits,
    NameInUse,
    Phase,
    Reply,
    Report,
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
    HeldOutLoss,
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

WIDTH, ROWS = 4, 3
NO_TIME = Seconds()
SHAPES = {"A": (2, 4), "B": (12, 2)}
LIMITS = ModelLimits(
    fingerprint="f", width=WIDTH, vocabulary_size=100, num_positions=16, max_batch_tokens=64, edge_shapes=SHAPES
)


def tensors(value: float = 0.0) -> dict[str, Any]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


class Table:
    """A federation, its clients' questions asked in any order, and the actions they cause."""

    def __init__(self, samples: dict[str, int], quorum: int | None = None, **changes: Any) -> None:
        self.federation = Federation("run", settings(clients=len(samples), **changes), LIMITS, tensors(), quorum=quorum)
        self.federation.early_stopping = EarlyStopping.in_run(self.federation.settings, threshold=0.0)
        self.now = 0.0
        for name in samples:
            self.federation.welcome(Hello(name=name, fingerprint="f", abilities=ABILITIES))
        self.started = [a for name, count in samples.items() for a in self.join(name, count)]

    def join(self, name: str, num_samples: int, step: int = 0) -> list[Action]:
        return self.federation.join(name, Join(num_samples=num_samples, batch_size=1, longest=ROWS, step=step), self.now)

    def come_back(self, name: str, step: int = 0) -> list[Action]:
        self.federation.welcome(Hello(name=name, fingerprint="f", abilities=ABILITIES))
        return self.join(name, self.federation.members[name].join.num_samples, step)

    def batch(self) -> dict[str, Any]:
        labels = [5, 6] if self.federation.settings.labels == "server" else []
        ints = {"lengths": [ROWS], "label_counts": [2], "labels": labels}
        arrays = {field: np.array(values, np.int32) for field, values in ints.items()}
        return {"values": np.zeros((ROWS, WIDTH), np.float32), **arrays}

    def activations(self, name: str, step: int, seconds: Seconds = NO_TIME, micro_batch: int = 0) -> list[Action]:
        message = Activations(step=step, micro_batch=micro_batch, seconds=seconds, **self.batch())
        return self.federation.receive(name, message, self.now)

    def evaluation(self, name: str, index: int) -> list[Action]:
        return self.federation.receive(name, Evaluation(index=index, **self.batch()), self.now)

    def held_out(self, step: int, **losses: float) -> list[Action]:
        """Devices tell these, one after another."""
        told = {name: HeldOutLoss(step=step, loss=loss, labelled_tokens=10) for name, loss in losses.items()}
        return [action for name in told for action in self.federation.receive(name, told[name], self.now)]

    def do_step(self, step: int, *names: str) -> list[Action]:
        """With these, and with a quorum without all that are up to date and not here."""
        actions = [action for name in names for action in self.activations(name, step)]
        actions += self.out_of_time() + self.trained(*names)
        actions += [action for name in names for action in self.contribute(name, step)]
        return actions + self.aggregated()

    def out_of_time(self) -> list[Action]:
        self.now += 1e6
        return self.federation.tick(self.now)

    @property
    def judged(self) -> list[tuple[int, str]]:
        """The steps that were, and by whose losses."""
        assert self.federation.early_stopping is not None
        return [(each.step, "".join(each.clients)) for each in self.federation.early_stopping.judgements]

    def reply(self, name: str, step: int, seconds: Seconds = NO_TIME, micro_batch: int = 0) -> list[Action]:
        """To what it was asked back, where devices have the labels."""
        number: dict[str, int] = {"step": step, "micro_batch": micro_batch}
        loss: dict[str, Any] = {"summed_loss": 3.0, "labelled_tokens": 2, "values": np.zeros((2, WIDTH), np.float32)}
        return self.federation.receive(name, HiddenGradient(**number, **loss, seconds=seconds), self.now)

    def forwarded(self, *names: str) -> list[Action]:
        return self.federation.forwarded({name: np.zeros((2, WIDTH), np.float32) for name in names}, 0.1, self.now)

    def asked_back(self, *names: str, step: int = 1, micro_batch: int = 0) -> list[Action]:
        for name in names:
            self.activations(name, step, micro_batch=micro_batch)
        return self.forwarded(*names)

    def contribute(self, name: str, step: int, kind: type = AdapterGradient, seconds: Seconds = NO_TIME) -> list[Action]:
        return self.federation.receive(name, kind(step=step, seconds=seconds, tensors=tensors()), self.now)

    def done(self, name: str, step: int) -> list[Action]:
        return self.federation.receive(name, Done(step=step), self.now)

    def trained(self, *names: str) -> list[Action]:
        gradients = {name: np.zeros((ROWS, WIDTH), np.float32) for name in names}
        trained = Trained(
            loss=1.5, labelled_tokens=4, gradients=gradients, summed_losses=dict.fromkeys(names, 3.0), gradient_norm=3.0
        )
        return self.federation.trained(trained, 0.1, self.now)

    def ask(self, name: str, kind: type, step: int) -> list[Action]:
        if kind is Activations:
            return self.activations(name, step)
        return self.done(name, step) if kind is Done else self.contribute(name, step, kind)

    def compute(self, action: Action) -> list[Action]:
        """What the server does of its own accord."""
        if isinstance(action, Train):
            return self.trained(*action.batches)
        return self.aggregated() if isinstance(action, Aggregate) else self.federation.saved(self.now)

    def aggregated(self) -> list[Action]:
        return self.federation.aggregated(Aggregated(edge_adapter=tensors(1.0), gradient_norm=4.0), 0.1, self.now)


def told(actions: list[Action], kind: type) -> list[str]:
    """Who is sent a message of this kind."""
    return [action.client for action in actions if isinstance(action, Reply) and isinstance(action.message, kind)]


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def test_run_starts_when_the_last_client_joins() -> None:
    table = Table({"b": 2, "a": 5})
    assert told(table.started, Start) == ["b", "a"]
    assert table.federation.total_steps == 5


def test_step_is_trained_when_all_activations_are_there_in_the_order_of_names() -> None:
    table = Table({"b": 2, "a": 2})
    assert table.activations("b", 1) == []
    (train,) = table.activations("a", 1)
    assert isinstance(train, Train)
    assert list(train.batches) == ["a", "b"]


def test_gradients_are_aggregated_when_all_are_there_and_the_step_is_then_finished() -> None:
    table = Table({"a": 1, "b": 1})
    table.activations("a", 1)
    table.activations("b", 1)
    assert told(table.trained("a", "b"), ActivationGradient) == ["a", "b"]
    assert table.contribute("b", 1) == []
    (aggregate,) = table.contribute("a", 1)
    assert isinstance(aggregate, Aggregate)
    assert aggregate.weights == {"a": 2, "b": 2}
    actions = table.aggregated()
    assert told(actions, EdgeAdapter) == ["a", "b"]
    assert kinds(actions) == [Reply, Reply, FinishStep, Checkpoint, FinishRun]


def test_final_adapter_is_sent_only_when_it_is_saved() -> None:
    table = Table({"a": 1})
    table.activations("a", 1)
    table.trained("a")
    table.contribute("a", 1)
    table.aggregated()
    assert table.done("a", 1) == []
    assert told(table.federation.saved(0.0), RunEnd) == ["a"]


def test_client_whose_data_is_used_up_waits_for_the_end_while_the_others_go_on() -> None:
    table = Table({"long": 2, "short": 1})
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    for name in ("long", "short"):
        table.contribute(name, 1)
    table.aggregated()
    assert table.done("short", 1) == []
    (train,) = table.activations("long", 2)
    assert list(train.batches) == ["long"]  # type: ignore[union-attr]


def test_long_round_averages_at_its_end_with_the_weights_of_all_its_steps() -> None:
    table = Table({"a": 4, "b": 4}, aggregate_every=2)
    for step in (1, 2):
        table.activations("a", step)
        table.activations("b", step)
        actions = table.trained("a", "b")
    assert FinishStep not in kinds(actions)
    table.contribute("a", 2, AdapterWeights)
    (aggregate,) = table.contribute("b", 2, AdapterWeights)
    assert aggregate.weights == {"a": 4, "b": 4}  # type: ignore[union-attr]


def test_client_that_ends_inside_a_round_is_averaged_at_the_rounds_end() -> None:
    table = Table({"long": 3, "short": 1}, aggregate_every=3)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    assert table.contribute("short", 1, AdapterWeights) == []
    for step in (2, 3):
        table.activations("long", step)
        table.trained("long")
    (aggregate,) = table.contribute("long", 3, AdapterWeights)
    assert aggregate.weights == {"long": 6, "short": 2}  # type: ignore[union-attr]


def test_last_round_is_closed_when_those_with_steps_left_leave() -> None:
    table = Table({"long": 9, "short": 1}, aggregate_every=5)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    table.contribute("short", 1, AdapterWeights)
    (aggregate,) = table.federation.leave("long", 0.0)
    assert list(aggregate.contributions) == ["short"]  # type: ignore[union-attr]
    actions = table.aggregated()
    assert told(actions, EdgeAdapter) == ["short"]
    assert kinds(actions) == [Reply, Checkpoint, FinishRun]


def test_last_round_waits_for_matrices_that_are_still_owed() -> None:
    table = Table({"long": 9, "short": 1}, aggregate_every=5)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    assert table.federation.leave("long", 0.0) == []
    (aggregate,) = table.contribute("short", 1, AdapterWeights)
    assert list(aggregate.contributions) == ["short"]  # type: ignore[union-attr]
    assert kinds(table.aggregated()) == [Reply, Checkpoint, FinishRun]


@pytest.mark.parametrize("moment", ["before its activations", "while computing", "before its gradient"])
def test_others_go_on_when_a_client_leaves(moment: str) -> None:
    table = Table({"stays": 2, "leaves": 2})
    table.activations("stays", 1)
    if moment == "before its activations":
        (train,) = table.federation.leave("leaves", 0.0)
        assert list(train.batches) == ["stays"]  # type: ignore[union-attr]
        table.trained("stays")
        (aggregate,) = table.contribute("stays", 1)
    else:
        table.activations("leaves", 1)
        if moment == "while computing":
            assert table.federation.leave("leaves", 0.0) == []
        assert told(table.trained("leaves", "stays"), ActivationGradient)[-1] == "stays"
        answer = table.contribute("stays", 1)
        (aggregate,) = answer or table.federation.leave("leaves", 0.0)
    assert list(aggregate.contributions) == ["stays"]  # type: ignore[union-attr]


def test_run_ends_when_everybody_has_left() -> None:
    table = Table({"a": 5, "b": 5})
    assert table.federation.leave("a", 0.0) == []
    assert kinds(table.federation.leave("b", 0.0)) == [FinishRun]
    assert table.federation.phase is Phase.SAVING


def test_place_of_a_client_that_leaves_before_the_start_is_free_again() -> None:
    federation = Federation("run", settings(clients=1), LIMITS, tensors())
    federation.welcome(Hello(name="a", fingerprint="f"))
    federation.leave("a", 0.0)
    federation.welcome(Hello(name="b", fingerprint="f"))
    with pytest.raises(RemoteProtocolError, match=r"the run is full: it takes 1 device \(--clients\)"):
        federation.welcome(Hello(name="c", fingerprint="f"))


def test_client_that_does_not_offer_the_runs_codecs_is_refused_and_takes_no_place() -> None:
    codecs = {"activation_codec": "int8", "gradient_codec": "coarse"}
    federation = Federation("run", settings(clients=1, **codecs), LIMITS, tensors())
    for offered, missing in ((), "coarse, int8"), (("int8", "bfloat16", "int3"), "coarse"):
        with pytest.raises(RemoteProtocolError, match=f"^old does not offer the codec {missing}, which this run uses; "):
            federation.welcome(Hello(name="old", fingerprint="f", codecs=offered))
    assert federation.welcome(Hello(name="new", fingerprint="f", codecs=("int3", "coarse", "int8"))).settings.codecs() == {
        "coarse",
        "int8",
    }


def test_question_out_of_turn_changes_nothing() -> None:
    table = Table({"a": 3, "b": 3})
    for wrong in (lambda: table.activations("a", 2), lambda: table.contribute("a", 1), lambda: table.done("a", 3)):
        with pytest.raises(RemoteProtocolError, match="expected Activations of step 1"):
            wrong()
    table.activations("a", 1)
    assert kinds(table.activations("b", 1)) == [Train]


def test_time_in_the_queue_is_told_with_the_answer_and_the_clients_own_is_added_up() -> None:
    table = Table({"a": 1, "b": 1})
    table.activations("a", 1, Seconds(edge_compute=6.0, uplink=1.0))
    table.now = 3.0
    table.activations("b", 1)
    answers = {action.client: action.message for action in table.trained("a", "b") if isinstance(action, Reply)}
    assert (answers["a"].queue_seconds, answers["b"].queue_seconds) == (3.0, 0.0)  # type: ignore[union-attr]
    assert answers["a"].compute_seconds == 0.1  # type: ignore[union-attr]
    table.contribute("a", 1, seconds=Seconds(edge_compute=1.0, downlink=4.0))
    table.contribute("b", 1)
    (finished,) = [action for action in table.aggregated() if isinstance(action, FinishStep)]
    assert finished.record.seconds == {"a": Seconds(edge_compute=7.0, uplink=1.0, downlink=4.0), "b": Seconds()}


def test_record_of_a_step_says_what_is_known_of_it() -> None:
    table = Table({"a": 2, "b": 1, "c": 2}, lr=0.5, lr_schedule="linear", micro_batches=2)
    for step, names in ((1, "abc"), (2, "ac")):
        for micro_batch in (0, 1):
            for name in names:
                table.activations(name, step, micro_batch=micro_batch)
            table.now += 1.5
            table.trained(*names)
        for name in names:
            table.contribute(name, step)
        table.now += 0.25
        (record,) = [action.record for action in table.aggregated() if isinstance(action, FinishStep)]
        assert (record.number, record.step_seconds, record.learning_rate) == (step, 3.25, 0.5 / step)
        assert record.losses == dict.fromkeys(names, 1.5)
        assert record.labelled == dict.fromkeys(names, 4)
        assert record.samples == dict.fromkeys(names, 2)
        assert record.gradient_norm == 5.0  # sides of 3 and 4


def test_device_without_a_label_has_no_loss_of_its_own() -> None:
    table = Table({"a": 1, "b": 1})
    table.activations("a", 1)
    none = {name: np.zeros(0, np.int32) for name in ("lengths", "label_counts", "labels")}
    nothing = Activations(step=1, seconds=NO_TIME, values=np.zeros((0, WIDTH), np.float32), **none)
    table.federation.receive("b", nothing, table.now)
    losses = {"a": 5.0, "b": 0.0}
    gradients = {"a": np.zeros((ROWS, WIDTH), np.float32), "b": nothing.values}
    table.federation.trained(Trained(loss=2.5, labelled_tokens=2, gradients=gradients, summed_losses=losses), 0.1, table.now)
    table.contribute("a", 1)
    table.contribute("b", 1)
    (record,) = [action.record for action in table.aggregated() if isinstance(action, FinishStep)]
    assert record.losses == {"a": 2.5}
    assert record.labelled == {"a": 2, "b": 0}
    assert record.samples == {"a": 1, "b": 0}
    assert record.gradient_norm == 4.0


def test_time_of_a_resumed_runs_first_step_begins_when_it_goes_on() -> None:
    before = Table({"a": 2})
    table = Table({"a": 2})
    table.now = 100.0
    table.federation.restore(0, 0, before.federation.membership(), tensors(), table.now)
    table.come_back("a")
    table.now = 107.0
    table.activations("a", 1)
    table.trained("a")
    table.contribute("a", 1)
    (record,) = [action.record for action in table.aggregated() if isinstance(action, FinishStep)]
    assert record.step_seconds == 7.0


def test_time_of_an_evaluation_makes_no_client_late() -> None:
    table = Table({"a": 1, "b": 1})
    (evaluate,) = table.evaluation("a", 1)
    table.federation.evaluated("a", evaluate.batch, 3.0, now=50.0)  # type: ignore[union-attr]
    assert table.federation.timing.away("a", 52.0) == 2.0


# Micro-batches


def of_one_client(**changes: Any) -> Table:
    return Table({"a": 2}, micro_batches=2, **changes)


def answers_to(actions: list[Action], client: str) -> list[tuple[int, int]]:
    """Step and micro-batch of the gradients that a client is sent."""
    messages = [action.message for action in actions if isinstance(action, Reply) and action.client == client]
    return [(message.step, message.micro_batch) for message in messages if isinstance(message, ActivationGradient)]


def test_micro_batch_is_computed_when_all_clients_have_sent_theirs_of_its_number() -> None:
    table = Table({"a": 1, "b": 1}, micro_batches=2)
    assert table.activations("a", 1) == []
    assert table.activations("a", 1, micro_batch=1) == []
    (train,) = table.activations("b", 1)
    assert (train.micro_batch, list(train.batches)) == (0, ["a", "b"])  # type: ignore[union-attr]
    assert table.activations("b", 1, micro_batch=1) == []  # while the first is computed
    *_, train = table.trained("a", "b")
    assert (train.micro_batch, list(train.batches)) == (1, ["a", "b"])  # type: ignore[union-attr]
    assert table.federation.step == 0
    assert answers_to(table.trained("a", "b"), "a") == [(1, 1)]
    assert table.federation.step == 1


def test_adapter_is_contributed_only_after_the_last_micro_batch() -> None:
    table = of_one_client()
    table.activations("a", 1)
    table.trained("a")
    with pytest.raises(
        RemoteProtocolError, match="expected Activations of step 1, micro-batch 1, got AdapterGradient of step 1"
    ):
        table.contribute("a", 1)


def test_micro_batches_beyond_the_last_are_refused() -> None:
    table = of_one_client()
    with pytest.raises(RemoteProtocolError, match="expected Activations of step 1"):
        table.activations("a", 1, micro_batch=2)


def test_client_that_comes_back_gets_the_answers_of_all_its_micro_batches_again() -> None:
    table = of_one_client()
    table.activations("a", 1)
    first = table.trained("a")
    table.activations("a", 1, micro_batch=1)
    table.federation.disconnected("a", 0.0)
    second = table.trained("a")  # into the void
    (start,) = table.come_back("a")
    assert start.message.step == 0  # type: ignore[union-attr]
    assert table.activations("a", 1) == [first[0]]
    assert table.activations("a", 1, micro_batch=1) == [second[0]]
    (aggregate,) = table.contribute("a", 1)
    assert isinstance(aggregate, Aggregate)


def test_answers_of_a_step_are_kept_until_the_next_one_is_answered() -> None:
    table = of_one_client(aggregate_every=5)
    for step in (1, 2):
        for number in (0, 1):
            table.activations("a", step, micro_batch=number)
            table.trained("a")
        assert {question[1] for question in table.federation.members["a"].answers} == {step}


def test_step_goes_on_with_those_that_are_left_of_it() -> None:
    table = Table({"a": 2, "b": 2}, micro_batches=2)
    for name in "ab":
        table.activations(name, 1)
    table.trained("a", "b")
    table.activations("a", 1, micro_batch=1)
    (train,) = table.federation.leave("b", 0.0)
    assert list(train.batches) == ["a"]  # type: ignore[union-attr]
    table.trained("a")
    (aggregate,) = table.contribute("a", 1)
    assert list(aggregate.contributions) == ["a"]  # type: ignore[union-attr]


def test_step_whose_clients_have_all_gone_ends_with_what_there_is_of_it() -> None:
    table = Table({"a": 2, "b": 2}, micro_batches=3, quorum=1)
    for name in "ab":
        table.activations(name, 1)
    table.trained("a", "b")
    table.federation.leave("a", 0.0)
    (train,) = table.federation.leave("b", 0.0)
    assert (train.micro_batch, train.batches) == (2, {})  # type: ignore[union-attr]
    assert kinds(table.trained()) == [FinishStep, FinishRun]


def test_client_that_is_late_within_a_step_goes_on_after_it() -> None:
    table = Table({"a": 3, "b": 3}, micro_batches=2, quorum=1)
    for name in "ab":
        table.activations(name, 1)
    table.trained("a", "b")
    table.activations("a", 1, micro_batch=1)
    table.now = 1000.0
    _, train = table.federation.tick(table.now)
    assert list(train.batches) == ["a"]  # type: ignore[union-attr]
    assert table.activations("b", 1, micro_batch=1) == []
    table.trained("a")
    table.contribute("a", 1)
    (start,) = [message for message in replies(table.aggregated()).values() if isinstance(message, Start)]
    assert start.step == 1


def test_micro_batches_that_are_asked_again_are_counted_once() -> None:
    table = Table({"a": 1, "b": 1}, micro_batches=2)
    for number in (0, 1):
        table.activations("a", 1, micro_batch=number)
    table.federation.disconnected("a", 0.0)
    table.come_back("a")
    for number in (0, 1):
        assert table.activations("a", 1, micro_batch=number) == []
    *_, train = table.activations("b", 1)
    assert list(train.batches) == ["a", "b"]  # type: ignore[union-attr]


# Connections that are lost, and clients that come back


def replies(actions: list[Action]) -> dict[str, Message]:
    return {action.client: action.message for action in actions if isinstance(action, Reply)}


def test_member_whose_connection_is_lost_is_waited_for() -> None:
    table = Table({"a": 2, "b": 2})
    table.federation.disconnected("b", 0.0)
    assert table.activations("a", 1) == []
    start = replies(table.come_back("b"))["b"]
    assert isinstance(start, Start)
    assert (start.step, start.round) == (0, 0)
    assert kinds(table.activations("b", 1)) == [Train]


def test_question_stays_when_its_connection_is_lost() -> None:
    table = Table({"a": 2, "b": 2})
    table.activations("b", 1)
    table.federation.disconnected("b", 0.0)
    assert kinds(table.activations("a", 1)) == [Train]


def test_question_that_was_answered_gets_the_same_answer() -> None:
    table = Table({"a": 2, "b": 2})
    table.activations("a", 1)
    table.activations("b", 1)
    table.federation.disconnected("b", 0.0)
    first = replies(table.trained("a", "b"))["b"]
    table.come_back("b")
    assert replies(table.activations("b", 1))["b"] is first
    assert table.federation.step == 1


def test_device_that_forgot_everything_repeats_the_step_it_is_in() -> None:
    table = Table({"a": 2, "b": 2})
    for name in ("a", "b"):
        table.activations(name, 1)
    gradient = replies(table.trained("a", "b"))["b"]
    table.contribute("b", 1)
    table.federation.disconnected("b", 0.0)
    assert replies(table.come_back("b"))["b"].step == 0  # type: ignore[union-attr]
    assert replies(table.activations("b", 1))["b"] is gradient
    (aggregate,) = table.contribute("a", 1)
    assert list(aggregate.contributions) == ["a", "b"]  # type: ignore[union-attr]


def test_question_the_run_has_left_behind_is_answered_with_where_to_go_on() -> None:
    table = Table({"a": 2, "b": 2})
    for name in ("a", "b"):
        table.activations(name, 1)
    table.trained("a", "b")
    table.contribute("b", 1)
    table.federation.disconnected("b", 0.0)
    table.come_back("b")
    table.contribute("a", 1)
    table.aggregated()
    start = replies(table.activations("b", 1))["b"]
    assert isinstance(start, Start)
    assert (start.step, start.round) == (1, 1)


def test_name_of_a_connected_client_is_taken_and_that_of_a_lost_one_is_not() -> None:
    table = Table({"a": 2, "b": 2})
    with pytest.raises(NameInUse):
        table.federation.welcome(Hello(name="b", fingerprint="f"))
    table.federation.disconnected("b", 0.0)
    assert table.federation.welcome(Hello(name="b", fingerprint="f")).run == "run"


def test_client_that_comes_back_with_other_data_is_refused_and_keeps_its_place() -> None:
    table = Table({"a": 2, "b": 2})
    table.federation.disconnected("b", 0.0)
    with pytest.raises(RemoteProtocolError, match=r"b joined this run with 2 samples .* comes back with 3"):
        table.join("b", 3)
    assert isinstance(replies(table.come_back("b"))["b"], Start)


def reports_of_ticks(federation: Federation, until: float) -> list[tuple[float, str]]:
    """What is told while nothing comes in and `tick` is called when it is due, and when."""
    told_at: list[tuple[float, str]] = []
    while (now := federation.expires()) is not None and now < until:
        for action in federation.tick(now):
            assert isinstance(action, Report)
            told_at.append((now, action.text))
    return told_at


def test_without_a_quorum_a_step_waits_for_all_and_says_for_whom_at_growing_distances() -> None:
    table = Table({"a": 2, "b": 2, "c": 2})
    table.activations("a", 1)
    table.federation.disconnected("c", 0.0)
    day = reports_of_ticks(table.federation, 24 * 3600)
    times = [now for now, _ in day]
    assert times[:4] == [30, 60, 120, 240]
    distances = [later - earlier for earlier, later in pairwise(times)]
    assert distances == sorted(distances)
    assert max(distances) == 3600  # it never falls silent
    assert day[0][1] == "step 1 waits for b and c (not connected), silent for 30 s; 1 of 3 devices ready"


def test_device_that_is_waited_for_while_it_evaluates_is_said_to_evaluate() -> None:
    table = Table({"a": 2, "b": 2})
    table.activations("a", 1)
    table.evaluation("b", 1)
    day = reports_of_ticks(table.federation, 200)
    assert day[0][1] == "step 1 waits for b (evaluating), silent for 30 s; 1 of 2 devices ready"
    table.activations("b", 1)
    assert not table.federation.members["b"].is_evaluating


def test_of_many_that_are_missing_some_are_named_and_all_are_counted() -> None:
    names = [f"{number:03}" for number in range(120)]
    table = Table(dict.fromkeys(names, 1), quorum=1)
    for name in names[116:]:
        table.activations(name, 1)
    table.federation.disconnected("001", 0.0)
    (waits,) = table.federation.tick(30.0)
    goes_on, _ = table.federation.tick(300.0)
    for report, begins in ((waits, "step 1 waits for"), (goes_on, "step 1 goes on without")):
        assert isinstance(report, Report)
        assert report.text.startswith(f"{begins} 000, 001 (not connected), 002, 003, ")
        assert ", 009 and 106 more, silent for " in report.text
        assert (report.details["clients"], report.details["count"], report.client) == (names[:100], 116, None)


def test_who_asks_for_some_of_those_that_are_waited_for_is_given_so_many() -> None:
    table = Table({"c": 2, "b": 2, "a": 2})
    table.now = 5.0
    table.activations("b", 1)
    assert table.federation.waits_for(table.now, most=2) == (["a", "c"], 5.0)
    names, seconds = table.federation.waits_for(table.now, most=1)
    assert (len(names), seconds) == (1, 5.0)
    assert set(names) < {"a", "c"}


def test_finished_run_waits_for_those_that_have_not_said_goodbye_and_has_no_deadline() -> None:
    table = Table({"b": 1, "a": 1, "c": 1})
    for name in "abc":
        table.activations(name, 1)
    table.trained(*"abc")
    for name in "abc":
        table.contribute(name, 1)
    table.aggregated()
    table.done("b", 1)
    table.done("a", 1)
    assert told(table.federation.saved(0.0), RunEnd) == ["b", "a"]  # in the order in which they joined
    assert told(table.done("c", 1), RunEnd) == ["c"]
    table.federation.leave("b", 0.0)
    assert (table.federation.waits_for(3.0), table.federation.num_unfinished) == ((["a", "c"], 3.0), 2)
    assert table.federation.expires() is None


def test_run_that_has_not_started_says_how_many_are_still_to_join() -> None:
    federation = Federation("run", settings(clients=3), LIMITS, tensors())
    assert federation.expires() is None  # nobody waits yet
    federation.welcome(Hello(name="a", fingerprint="f"))
    federation.join("a", Join(num_samples=1, batch_size=1, longest=ROWS), 100.0)
    assert reports_of_ticks(federation, 200.0) == [
        (130.0, "the run waits for 2 more devices to join, for 30 s; a joined"),
        (160.0, "the run waits for 2 more devices to join, for 60 s; a joined"),
    ]


def test_wait_ends_with_what_was_waited_for_and_the_next_one_is_told_anew() -> None:
    table = Table({"a": 2, "b": 2})
    table.activations("a", 1)
    assert len(reports_of_ticks(table.federation, 100.0)) == 2
    table.now = 100.0
    assert table.federation.waits_for(table.now) == (["b"], 100.0)
    table.activations("b", 1)
    assert table.federation.waits_for(table.now) == ([], 0.0)  # the server computes
    table.trained("a", "b")
    assert table.federation.waits_for(101.0) == (["a", "b"], 1.0)
    assert [now for now, _ in reports_of_ticks(table.federation, 190.0)] == [130.0, 160.0]


def test_device_that_takes_part_again_is_told_of_with_the_steps_it_missed() -> None:
    table = Table({"a": 4, "b": 4}, quorum=1)
    for step in (1, 2):
        table.activations("a", step)
        table.federation.tick(1e6)
        table.trained("a")
        table.contribute("a", step)
        if step == 2:
            assert table.activations("b", 1) == []
        actions = table.aggregated()
    assert [a.text for a in actions if isinstance(a, Report)] == ["b takes part again; steps 1 to 2 went on without it"]


def test_step_goes_on_with_a_quorum_after_its_deadline_and_not_before() -> None:
    table = Table({"a": 2, "b": 2, "c": 2}, quorum=2)
    table.activations("a", 1)
    table.activations("b", 1)
    table.federation.tick(240.0)
    assert table.federation.expires() == 300.0
    assert table.federation.tick(299.9) == []
    report, train = table.federation.tick(300.0)
    assert isinstance(report, Report)
    assert report.text == "step 1 goes on without c, silent for 5 min"
    assert isinstance(train, Train)
    assert list(train.batches) == ["a", "b"]


def test_late_client_joins_the_next_step() -> None:
    table = Table({"a": 3, "b": 3, "c": 3}, quorum=2)
    for name in ("a", "b"):
        table.activations(name, 1)
    table.federation.tick(1e6)
    assert table.activations("c", 1) == []  # it is told when step 1 is done
    table.trained("a", "b")
    table.contribute("a", 1)
    table.contribute("b", 1)
    told_where = replies(table.aggregated())
    assert isinstance(told_where["c"], Start)
    assert (told_where["c"].step, told_where["c"].round) == (1, 1)
    for name in ("a", "b"):
        assert not replies(table.activations(name, 2))  # it is waited for again
    (train,) = table.activations("c", 2)
    assert list(train.batches) == ["a", "b", "c"]  # type: ignore[union-attr]


def test_absent_client_is_not_waited_for_again() -> None:
    table = Table({"a": 3, "b": 3, "c": 3}, quorum=2)
    for name in ("a", "b"):
        table.activations(name, 1)
    table.federation.tick(1e6)
    table.trained("a", "b")
    table.contribute("a", 1)
    table.contribute("b", 1)
    table.aggregated()
    table.activations("a", 2)
    assert kinds(table.activations("b", 2)) == [Train]


def test_absent_client_is_told_once_where_to_go_on_however_many_late_micro_batches_it_asks() -> None:
    table = Table({"a": 1, "b": 2}, quorum=1, micro_batches=2)
    table.activations("b", 1)
    table.federation.tick(1e6)
    table.trained("b")
    table.activations("b", 1, micro_batch=1)
    table.trained("b")
    table.contribute("b", 1)
    table.aggregated()
    assert told(table.activations("a", 1), Start) == ["a"]
    assert table.activations("a", 1, micro_batch=1) == []  # it was under way before the answer
    assert table.done("a", 1) == []
    assert kinds(table.activations("b", 2)) == [Train]


def test_step_that_went_on_without_a_client_weighs_nothing_in_its_average() -> None:
    table = Table({"a": 4, "b": 4}, quorum=1, micro_batches=2, aggregate_every=2)
    for name in ("a", "b"):
        table.activations(name, 1)
    table.trained("a", "b")
    table.activations("a", 1, micro_batch=1)
    table.federation.tick(1e6)  # b is absent in the midst of the step
    table.trained("a")
    assert told(table.activations("b", 1, micro_batch=1), Start) == ["b"]
    for micro_batch in (0, 1):
        for name in ("a", "b"):
            table.activations(name, 2, micro_batch=micro_batch)
        table.trained("a", "b")
    table.contribute("a", 2, AdapterWeights)
    (aggregate,) = table.contribute("b", 2, AdapterWeights)
    assert aggregate.weights == {"a": 8, "b": 4}  # type: ignore[union-attr]


def test_client_that_said_goodbye_may_come_back() -> None:
    table = Table({"a": 3, "b": 3})
    table.activations("a", 1)
    assert kinds(table.federation.leave("b", 0.0)) == [Train]
    assert table.come_back("b") == []
    table.trained("a")
    table.contribute("a", 1)
    assert isinstance(replies(table.aggregated())["b"], Start)


def test_client_that_leaves_and_comes_back_while_its_step_is_computed_goes_on_with_it() -> None:
    table = Table({"a": 3, "b": 3})
    for name in ("a", "b"):
        table.activations(name, 1)
    table.federation.leave("b", 0.0)
    assert replies(table.come_back("b"))["b"].step == 0  # type: ignore[union-attr]
    assert told(table.trained("a", "b"), ActivationGradient) == ["a", "b"]
    assert table.contribute("a", 1) == []
    (aggregate,) = table.contribute("b", 1)
    assert list(aggregate.contributions) == ["a", "b"]  # type: ignore[union-attr]


def test_client_that_was_revoked_while_it_waited_for_a_rounds_end_contributes_to_it_when_it_is_back() -> None:
    table = Table({"long": 3, "short": 1}, aggregate_every=3)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    table.contribute("short", 1, AdapterWeights)
    table.federation.leave("short", 0.0)
    start = replies(table.come_back("short", step=1))["short"]
    assert (start.step, start.round) == (1, 0)  # type: ignore[union-attr]
    assert table.contribute("short", 1, AdapterWeights) == []
    for step in (2, 3):
        table.activations("long", step)
        table.trained("long")
    (aggregate,) = table.contribute("long", 3, AdapterWeights)
    assert aggregate.weights == {"long": 6, "short": 2}  # type: ignore[union-attr]


def test_client_that_comes_back_after_the_round_went_on_without_it_is_told_the_rounds_adapter() -> None:
    table = Table({"long": 4, "short": 1}, aggregate_every=2)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    table.federation.leave("short", 0.0)
    table.activations("long", 2)
    table.trained("long")
    table.contribute("long", 2, AdapterWeights)
    table.aggregated()
    start = replies(table.come_back("short", step=1))["short"]
    assert (start.step, start.round) == (1, 2)  # type: ignore[union-attr]
    assert table.done("short", 1) == []


def test_steps_that_a_client_has_lost_are_not_counted_in_its_average() -> None:
    table = Table({"a": 3, "b": 3}, aggregate_every=3)
    for step in (1, 2):
        for name in ("a", "b"):
            table.activations(name, step)
        table.trained("a", "b")
    table.federation.disconnected("b", 0.0)
    start = replies(table.come_back("b", step=0))["b"]  # its disk is lost
    assert start.step == 1  # type: ignore[union-attr]  # it repeats step 2 with the answer that is kept
    assert told(table.activations("b", 2), ActivationGradient) == ["b"]
    for name in ("a", "b"):
        table.activations(name, 3)
    table.trained("a", "b")
    table.contribute("a", 3, AdapterWeights)
    (aggregate,) = table.contribute("b", 3, AdapterWeights)
    assert aggregate.weights == {"a": 6, "b": 4}  # type: ignore[union-attr]


def test_client_that_has_left_is_refused_when_the_run_ends_between_its_welcome_and_its_join() -> None:
    table = Table({"a": 3, "b": 3})
    table.federation.leave("b", 0.0)
    table.federation.welcome(Hello(name="b", fingerprint="f"))
    assert kinds(table.federation.leave("a", 0.0)) == [FinishRun]
    with pytest.raises(RemoteProtocolError, match="b has left the run, and the run is over"):
        table.join("b", 3)
    assert table.federation.members["b"].presence.has_left


def test_round_does_not_wait_for_an_absent_client_that_can_only_come_back_after_it() -> None:
    table = Table({"a": 4, "b": 4}, quorum=1, aggregate_every=2)
    for name in ("a", "b"):
        table.activations(name, 1)
    table.trained("a", "b")
    table.activations("a", 2)
    table.federation.tick(1e6)
    table.trained("a")
    table.federation.leave("a", 0.0)
    table.federation.disconnected("b", 0.0)
    start = replies(table.come_back("b", step=1))["b"]
    assert (start.step, start.round) == (2, 2)  # type: ignore[union-attr]
    assert kinds(table.activations("b", 3)) == [Train]


def test_loss_of_a_held_out_batch_answers_only_the_connection_that_asked_for_it() -> None:
    table = Table({"a": 2, "b": 2})
    (before,) = table.evaluation("a", 7)
    table.federation.disconnected("a", 0.0)
    table.come_back("a")
    (again,) = table.evaluation("a", 1)
    assert table.federation.evaluated("a", before.batch, 3.0, now=0.0) == []  # type: ignore[union-attr]
    answer = replies(table.federation.evaluated("a", again.batch, 5.0, now=0.0))["a"]  # type: ignore[union-attr]
    assert (answer.index, answer.summed_loss) == (1, 5.0)  # type: ignore[union-attr]


def test_restored_run_goes_on_where_the_checkpoint_stands() -> None:
    table = Table({"a": 3, "b": 3})
    membership = table.federation.membership()
    restored = Federation("run", table.federation.settings, LIMITS, tensors(), restarts=1)
    assert restored.restore(2, 1, membership, tensors(2.0), 0.0) == []
    for name in ("a", "b"):
        assert restored.welcome(Hello(name=name, fingerprint="f")).restarts == 1
        start = replies(restored.join(name, Join(num_samples=3, batch_size=1, longest=ROWS, step=3), 0.0))[name]
        assert (start.step, start.round) == (2, 2)  # type: ignore[union-attr]
        assert start.adapter["A"][0, 0] == 2.0  # type: ignore[union-attr]


def test_restored_run_that_was_complete_is_finished_again() -> None:
    table = Table({"a": 3, "b": 3})
    restored = Federation("run", table.federation.settings, LIMITS, tensors(), restarts=1)
    assert kinds(restored.restore(3, 2, table.federation.membership(), tensors(), 0.0)) == [FinishRun]


def test_micro_batch_is_no_larger_than_a_part_of_a_batch() -> None:
    federation = Federation("run", settings(clients=1, micro_batches=2), LIMITS, tensors())
    federation.welcome(Hello(name="a", fingerprint="f"))
    federation.join("a", Join(num_samples=9, batch_size=3, longest=ROWS), 0.0)
    counts = np.ones(3, np.int32)
    batch = {"lengths": counts, "label_counts": 0 * counts, "labels": counts[:0], "values": np.zeros((3, WIDTH), np.float32)}
    with pytest.raises(RemoteProtocolError, match="a micro-batch has 3 sequences; at most 2 can be"):
        federation.receive("a", Activations(step=1, seconds=NO_TIME, **batch), 0.0)


def test_exact_values_come_only_where_the_codec_is_checked() -> None:
    table = Table({"a": 9}, check_codec_every=4)
    values = np.zeros((ROWS, WIDTH), np.float32)
    counts = np.array([ROWS], np.int32)
    batch = {"lengths": counts, "label_counts": 0 * counts, "labels": counts[:0], "values": values, "exact": values}
    assert kinds(table.federation.receive("a", Activations(step=1, seconds=NO_TIME, **batch), 0.0)) == [Train]
    table.trained("a")
    table.contribute("a", 1)
    table.aggregated()
    with pytest.raises(RemoteProtocolError, match="exact values in micro-batch 0 of step 2, which checks no codec"):
        table.federation.receive("a", Activations(step=2, seconds=NO_TIME, **batch), 0.0)


# What is refused, and what others may ask of a federation


def test_client_whose_batches_are_too_large_is_refused_and_its_name_is_free_again() -> None:
    federation = Federation("run", settings(clients=1), LIMITS, tensors())
    federation.welcome(Hello(name="a", fingerprint="f"))
    with pytest.raises(RemoteProtocolError, match="the model has 16 positions"):
        federation.join("a", Join(num_samples=1, batch_size=1, longest=17), 0.0)
    federation.disconnected("a", 0.0)
    federation.welcome(Hello(name="a", fingerprint="f"))


def test_held_out_batch_is_held_to_what_was_announced() -> None:
    table = Table({"a": 2})
    ints = {"lengths": [ROWS + 1], "label_counts": [0], "labels": []}
    arrays = {field: np.array(values, np.int32) for field, values in ints.items()}
    with pytest.raises(RemoteProtocolError, match=f"the batch has {ROWS + 1} rows; at most {ROWS} were announced"):
        table.federation.receive("a", Evaluation(index=1, values=np.zeros((ROWS + 1, WIDTH), np.float32), **arrays), 0.0)


def test_message_that_is_no_question_is_refused() -> None:
    table = Table({"a": 2})
    with pytest.raises(RemoteProtocolError, match="Hello out of turn"):
        table.federation.receive("a", Hello(name="a", fingerprint="f"), 0.0)


def test_stranger_that_hangs_up_or_leaves_changes_nothing() -> None:
    table = Table({"a": 2})
    table.federation.disconnected("x", 0.0)
    assert table.federation.leave("x", 0.0) == []


def test_round_is_checkpointed_every_so_often_and_at_the_end() -> None:
    table = Table({"a": 5})
    table.federation.checkpoint_every = 2
    written = []
    for step in range(1, 6):
        table.activations("a", step)
        table.trained("a")
        table.contribute("a", step)
        actions = table.aggregated()
        written += [action.step for action in actions if isinstance(action, Checkpoint)]
        for action in actions:
            if isinstance(action, Checkpoint):
                table.federation.checkpointed(action.step)
    assert written == [2, 4, 5]


def test_every_round_is_checkpointed_by_default_however_long() -> None:
    table = Table({"a": 5}, aggregate_every=2)
    assert table.federation.checkpoints == (0, 0)
    written = []
    for step in range(1, 6):
        table.activations("a", step)
        actions = table.trained("a")
        if step in (2, 4, 5):
            table.contribute("a", step, AdapterWeights)
            actions = table.aggregated()
        written += [action.step for action in actions if isinstance(action, Checkpoint)]
    assert written == [2, 4, 5]


def test_answers_of_an_aggregation_leave_in_the_order_of_names_and_hold_the_adapter_that_returning_members_get() -> None:
    table = Table({"b": 2, "a": 2})
    for name in ("b", "a"):
        table.activations(name, 1)
    table.trained("a", "b")
    for name in ("b", "a"):
        table.contribute(name, 1)
    assert told(table.aggregated(), EdgeAdapter) == ["a", "b"]
    table.federation.disconnected("b", 0.0)
    start = replies(table.come_back("b", step=1))["b"]
    assert start.adapter["A"][0, 0] == 1.0  # type: ignore[union-attr]


def test_loss_of_a_held_out_batch_is_told_once() -> None:
    table = Table({"a": 2})
    (evaluate,) = table.evaluation("a", 1)
    assert len(table.federation.evaluated("a", evaluate.batch, 3.0, now=0.0)) == 1  # type: ignore[union-attr]
    assert table.federation.evaluated("a", evaluate.batch, 3.0, now=0.0) == []  # type: ignore[union-attr]


def test_time_of_a_client_counts_from_its_last_answer_whichever_it_was() -> None:
    table = Table({"a": 3, "b": 3})

    def away() -> float:
        return table.federation.timing.away("a", table.now)

    table.now = 10.0
    for name in ("a", "b"):
        table.activations(name, 1)
    table.now = 20.0
    table.trained("a", "b")
    table.now = 25.0
    assert away() == 5.0
    table.activations("a", 1)  # again, and answered again
    assert away() == 0.0
    table.federation.disconnected("a", table.now)
    table.now = 30.0
    table.come_back("a")
    assert away() == 0.0


def test_status_is_that_of_now() -> None:
    table = Table({"a": 1, "b": 1})
    before = table.federation.status()
    assert (before.run, before.clients, before.connected, before.is_saved) == ("run", 2, 2, False)
    assert (before.members, before.unfinished) == ({"a": "here", "b": "here"}, ("a", "b"))
    assert (before.phase, before.step, before.round, before.total_steps) == ("waiting for activations", 0, 0, 1)
    table.federation.leave("b", 0.0)
    table.activations("a", 1)
    table.trained("a")
    table.contribute("a", 1)
    table.aggregated()
    table.federation.saved(0.0)
    after = table.federation.status()
    assert (after.members, after.unfinished, after.connected) == ({"a": "here", "b": "gone"}, ("a",), 1)
    assert (after.phase, after.step, after.round, after.is_saved) == ("finished", 1, 1, True)
    assert before.step == 0


def test_run_is_the_first_of_its_server_unless_it_is_said() -> None:
    federation = Federation("run", settings(clients=1), LIMITS, tensors())
    assert federation.welcome(Hello(name="a", fingerprint="f")).restarts == 0


def test_who_is_told_where_to_go_on_is_told_the_codec_of_the_next_step() -> None:
    """What was decided holds for steps that are done again, which may be before it."""
    codecs = {"activation_codec": "int8", "gradient_codec": "int8", "check_codec_every": 9}
    policy = CodecPolicy("int8", 0.01, decisions=[(3, "bfloat16")])
    federation = Federation("run", settings(clients=1, **codecs), LIMITS, tensors(), codec_policy=policy)
    table = Table.__new__(Table)
    table.federation, table.now = federation, 0.0
    federation.welcome(Hello(name="a", fingerprint="f", codecs=("int8", "bfloat16")))
    table.join("a", 5)
    table.activations("a", 1)
    assert federation.checked({}) == []
    assert replies(table.trained("a"))["a"].codec == "int8"  # type: ignore[union-attr]
    table.contribute("a", 1)
    table.aggregated()
    federation.disconnected("a", 0.0)
    federation.welcome(Hello(name="a", fingerprint="f", codecs=("int8", "bfloat16")))
    assert replies(table.join("a", 5, step=1))["a"].codec == "int8"  # type: ignore[union-attr]
    table.activations("a", 2)
    assert replies(table.trained("a"))["a"].codec == "bfloat16"  # type: ignore[union-attr]


def test_without_a_policy_a_check_says_nothing() -> None:
    assert Table({"a": 2}).federation.checked({"int8": 9.0}) == []


def test_rounds_between_checkpoints_are_counted_and_not_steps() -> None:
    table = Table({"a": 7}, aggregate_every=2)
    table.federation.checkpoint_every = 2
    written = []
    for step in range(1, 8):
        table.activations("a", step)
        actions = table.trained("a")
        if step in (2, 4, 6, 7):
            table.contribute("a", step, AdapterWeights)
            actions = table.aggregated()
        for action in actions:
            if isinstance(action, Checkpoint):
                written.append(action.step)
                table.federation.checkpointed(action.step)
    assert written == [4, 7]


def of_two(**changes: Any) -> Table:
    return Table({"a": 4, "b": 4}, labels="device", **changes)


def numbers(actions: list[Action], kind: type) -> list[tuple[int, list[str]]]:
    """Micro-batch and clients of what is to be computed, all of this kind."""
    computed = [action for action in actions if isinstance(action, Train | Forward | Backward)]
    assert all(isinstance(action, kind) for action in computed), kinds(actions)
    return [
        (action.micro_batch, list(action.gradients if isinstance(action, Backward) else action.batches)) for action in computed
    ]


def test_devices_that_have_the_labels_are_asked_back_in_the_order_of_names_and_answered_with_their_gradients() -> None:
    table = of_two()
    table.activations("b", 1)
    assert numbers(table.activations("a", 1), Forward) == [(0, ["a", "b"])]
    assert told(table.forwarded("a", "b"), HiddenStates) == ["a", "b"]
    assert table.reply("b", 1) == []
    assert numbers(table.reply("a", 1), Backward) == [(0, ["a", "b"])]
    assert told(table.trained("a", "b"), ActivationGradient) == ["a", "b"]
    assert table.federation.phase is Phase.CONTRIBUTIONS


def test_next_micro_batch_is_computed_ahead_if_everybody_has_asked_it_and_a_backward_goes_first() -> None:
    table = of_two(micro_batches=3)
    table.asked_back("a", "b")
    assert table.activations("a", 1, micro_batch=1) == []
    assert numbers(table.activations("b", 1, micro_batch=1), Forward) == [(1, ["a", "b"])]
    for name in ("a", "b"):
        assert numbers(table.activations(name, 1, micro_batch=2) + table.reply(name, 1), Forward) == []  # the server computes
    assert numbers(table.forwarded("a", "b"), Backward) == [(0, ["a", "b"])]
    assert numbers(table.trained("a", "b"), Forward) == [(2, ["a", "b"])]
    assert numbers(table.forwarded("a", "b"), Forward) == []
    for micro_batch in (2, 1):  # a reply waits until it is its turn
        for name in ("a", "b"):
            actions = table.reply(name, 1, micro_batch=micro_batch)
    assert numbers(actions, Backward) == [(1, ["a", "b"])]
    assert numbers(table.trained("a", "b"), Backward) == [(2, ["a", "b"])]
    table.trained("a", "b")
    assert (table.federation.phase, table.federation.step) == (Phase.CONTRIBUTIONS, 1)


def test_micro_batch_beyond_the_last_is_not_waited_for() -> None:
    table = of_two(micro_batches=2)
    for micro_batch in (0, 1):
        table.asked_back("a", "b", micro_batch=micro_batch)
    assert table.reply("a", 1) == []
    assert numbers(table.reply("b", 1), Backward) == [(0, ["a", "b"])]
    assert kinds(table.trained("a", "b")) == [Reply, Reply]
    assert table.federation.phase is Phase.HIDDEN_GRADIENTS


def test_while_a_gradient_is_awaited_a_later_micro_batch_overtakes_nobody() -> None:
    table = Table({"a": 4, "b": 4, "c": 4}, quorum=2, labels="device", micro_batches=2)
    table.asked_back("a", "b", "c")
    table.activations("a", 1, micro_batch=1)
    table.activations("b", 1, micro_batch=1)
    table.reply("a", 1)
    table.now = 1e6
    table.federation.tick(table.now)
    assert set(table.federation.status().members.values()) == {"here"}
    assert numbers(table.reply("c", 1), Backward) == [(0, ["a", "c"])]  # a quorum, after the deadline
    assert table.federation.status().members == {"a": "here", "b": "behind", "c": "here"}


def test_deadline_that_passes_while_a_micro_batch_is_computed_ahead_counts_afterwards() -> None:
    table = of_two(quorum=1, micro_batches=2)
    table.asked_back("a", "b")
    table.reply("a", 1)
    expires = table.federation.expires()
    for name in ("a", "b"):
        table.activations(name, 1, micro_batch=1)
    table.now = 1e6
    assert table.federation.waits_for(table.now) == ([], 0.0)
    assert expires is not None
    assert table.federation.expires() is None
    assert table.federation.tick(table.now) == []
    actions = table.forwarded("a", "b")
    assert kinds(actions) == [Reply, Reply, Report, Backward]
    assert numbers(actions, Backward) == [(0, ["a"])]


def test_wait_for_a_gradient_begins_when_it_is_its_turn() -> None:
    table = of_two(micro_batches=2)
    for micro_batch in (0, 1):
        table.asked_back("a", "b", micro_batch=micro_batch)
        table.now += 10.0
    assert table.federation.waits_for(table.now) == (["a", "b"], 20.0)
    for name in ("a", "b"):
        table.reply(name, 1)
    table.trained("a", "b")
    table.now += 3.0
    assert table.federation.waits_for(table.now) == (["a", "b"], 3.0)


def test_labelled_tokens_are_those_that_devices_report_and_a_step_without_them_weighs_nothing() -> None:
    table = of_two(micro_batches=2, aggregate_every=2, quorum=1)
    table.asked_back("a", "b")
    table.reply("a", 1)
    table.reply("b", 1)
    table.trained("a", "b")
    table.asked_back("a", "b", micro_batch=1)
    table.reply("a", 1, micro_batch=1)
    table.federation.tick(1e6)  # b is overtaken in the midst of the step
    table.trained("a")
    assert told(table.reply("b", 1, micro_batch=1), Start) == ["b"]
    for micro_batch in (0, 1):
        table.asked_back("a", "b", step=2, micro_batch=micro_batch)
        table.reply("a", 2, micro_batch=micro_batch)
        table.reply("b", 2, micro_batch=micro_batch)
        table.trained("a", "b")
    table.contribute("a", 2, AdapterWeights)
    (aggregate,) = table.contribute("b", 2, AdapterWeights)
    assert aggregate.weights == {"a": 8, "b": 4}  # type: ignore[union-attr]


@pytest.mark.parametrize("moment", ["before it replies", "after it has replied", "while the next one is computed ahead"])
def test_device_that_leaves_has_no_part_in_what_is_computed_from_then_on(moment: str) -> None:
    table = Table({"a": 4, "b": 4, "c": 4}, labels="device", micro_batches=2)
    table.asked_back("a", "b", "c")
    table.reply("a", 1)
    if moment == "after it has replied":
        table.reply("c", 1)
    for name in "abc":
        ahead = table.activations(name, 1, micro_batch=1)
    assert numbers(ahead, Forward) == [(1, ["a", "b", "c"])]
    if moment == "while the next one is computed ahead":
        assert table.federation.leave("c", 0.0) == []
        table.forwarded("a", "b", "c")
    else:
        table.forwarded("a", "b", "c")
        assert table.federation.leave("c", 0.0) == []
    assert numbers(table.reply("b", 1), Backward) == [(0, ["a", "b"])]
    assert table.federation.status().members["c"] == "gone"


def test_device_that_leaves_before_the_next_micro_batch_is_computed_ahead_is_not_in_it() -> None:
    table = Table({"a": 4, "b": 4, "c": 4}, labels="device", micro_batches=2)
    table.asked_back("a", "b", "c")
    table.activations("a", 1, micro_batch=1)
    table.activations("b", 1, micro_batch=1)
    assert numbers(table.federation.leave("c", 0.0), Forward) == [(1, ["a", "b"])]
    assert table.federation.status().members["c"] == "gone"


def test_device_that_leaves_and_comes_back_before_the_backward_goes_on_with_its_step() -> None:
    table = of_two(quorum=1)
    table.asked_back("a", "b")
    assert table.federation.leave("b", 0.0) == []
    assert told(table.come_back("b"), Start) == ["b"]
    assert told(table.activations("b", 1), HiddenStates) == ["b"]
    table.reply("a", 1)
    assert numbers(table.reply("b", 1), Backward) == [(0, ["a", "b"])]


def test_step_that_everybody_leaves_before_a_reply_ends_without_any() -> None:
    table = of_two(micro_batches=3)
    table.asked_back("a", "b")
    table.federation.leave("a", 0.0)
    (backward,) = table.federation.leave("b", 0.0)
    assert numbers([backward], Backward) == [(2, [])]
    table.trained()
    assert (table.federation.step, table.federation.phase) == (1, Phase.SAVING)


def test_time_of_both_halves_is_told_and_added_up() -> None:
    table = of_two()
    table.activations("a", 1, Seconds(edge_compute=1.0))
    table.now = 3.0
    table.activations("b", 1)
    states = [action.message for action in table.forwarded("a", "b") if isinstance(action, Reply)]
    assert [(one.queue_seconds, one.compute_seconds) for one in states] == [(3.0, 0.1), (0.0, 0.1)]  # type: ignore[union-attr]
    table.reply("b", 1, Seconds(uplink=2.0))
    table.now = 5.0
    table.reply("a", 1, Seconds(edge_compute=4.0))
    answers = [action.message for action in table.trained("a", "b") if isinstance(action, Reply)]
    assert [one.queue_seconds for one in answers] == [0.0, 2.0]  # type: ignore[union-attr]
    table.contribute("a", 1)
    table.contribute("b", 1)
    (record,) = [action.record for action in table.aggregated() if isinstance(action, FinishStep)]
    assert record.seconds == {"a": Seconds(edge_compute=5.0), "b": Seconds(uplink=2.0)}
    assert record.server_compute == pytest.approx(0.3)
    assert (record.labelled_tokens, record.tokens) == (4, 2 * ROWS)
    assert (record.labelled, record.losses) == ({"a": 2, "b": 2}, {"a": 1.5, "b": 1.5})


def test_deadline_of_a_reply_is_that_of_replies() -> None:
    table = of_two(quorum=1, steps=9, epochs=None)
    for step in (1, 2, 3):
        for name in ("a", "b"):
            table.activations(name, step)
        table.forwarded("a", "b")
        table.now += 20.0  # all take so long for a reply, and no time for anything else
        for name in ("a", "b"):
            table.reply(name, step)
        table.trained("a", "b")
        for name in ("a", "b"):
            table.contribute(name, step)
        table.aggregated()
    started = table.now
    assert table.federation.expires() == started + 1.0
    table.asked_back("a", "b", step=4)
    table.now += 1.0
    assert table.federation.expires() == started + 20.0


def test_reply_of_another_step_or_micro_batch_is_refused_and_changes_nothing() -> None:
    table = of_two(micro_batches=2)
    table.asked_back("a", "b")
    for step, micro_batch in ((2, 0), (1, 1)):
        with pytest.raises(RemoteProtocolError, match=f"HiddenGradient of step {step}, micro-batch {micro_batch}, out of turn"):
            table.reply("a", step, micro_batch=micro_batch)
    assert table.federation.waits_for(0.0) == (["a", "b"], 0.0)


def test_steps_before_the_one_that_went_on_without_a_device_still_count() -> None:
    table = of_two(aggregate_every=3, quorum=1)
    for step in (1, 2, 3):
        table.asked_back("a", "b", step=step)
        table.reply("a", step)
        if step == 2:
            table.federation.tick(1e6)
            assert told(table.reply("b", 2), Start) == []
            assert told(table.trained("a"), Start) == ["b"]
        else:
            table.reply("b", step)
            table.trained("a", "b")
    table.contribute("a", 3, AdapterWeights)
    (aggregate,) = table.contribute("b", 3, AdapterWeights)
    assert aggregate.weights == {"a": 6, "b": 4}  # type: ignore[union-attr]


def test_device_that_does_not_know_the_mode_is_refused_and_takes_no_place() -> None:
    federation = Federation("run", settings(clients=1, labels="device"), LIMITS, tensors())
    with pytest.raises(RemoteProtocolError, match="a does not know device-labels"):
        federation.welcome(Hello(name="a", fingerprint="f"))
    federation.welcome(Hello(name="a", fingerprint="f", abilities=ABILITIES))


def test_delta_that_is_too_large_for_a_device_is_refused() -> None:
    noise: dict[str, Any] = {"activation_noise": 1.0, "activation_clip": 1.0, "noise_delta": 0.5}
    with pytest.raises(RemoteProtocolError, match=r"delta is 0\.5, and with 2 samples"):
        Table({"a": 2}, **noise)


# What held-out losses decide


def texts(actions: list[Action], kind: str = "note") -> list[str]:
    return [action.text for action in actions if isinstance(action, Report) and action.kind == kind]


def test_with_a_quorum_a_device_that_has_lost_its_network_is_not_waited_for_to_judge_a_step() -> None:
    table = Table({"a": 9, "b": 9}, quorum=1, early_stopping_patience=2)
    table.held_out(0, a=9.0, b=9.0)
    for step in (1, 2):
        table.do_step(step, "a", "b")
        table.held_out(step, a=5.0, b=5.0)
    table.federation.disconnected("b", table.now)  # after it has told its loss, which counts
    for step, loss in ((3, 4.0), (4, 6.0), (5, 6.0)):
        table.do_step(step, "a")
        table.held_out(step, a=loss)
    actions = table.activations("a", 6)
    assert table.judged == [(1, "ab"), (2, "ab"), (3, "a"), (4, "a"), (5, "a")]
    (ended,) = texts(actions, "ended_early")
    assert ended.startswith("the run ends early, after step 5: in 2 evaluations")
    assert "lowest after step 3, 4.0000" in ended


def test_with_a_quorum_a_device_that_is_back_is_waited_for_again_to_judge_a_step() -> None:
    table = Table({"a": 9, "b": 9}, quorum=1, final_adapter="best")
    table.held_out(0, a=9.0, b=9.0)
    table.do_step(1, "a", "b")
    table.held_out(1, a=5.0, b=5.0)
    table.federation.disconnected("b", table.now)
    table.do_step(2, "a")
    table.held_out(2, a=5.0)
    table.do_step(3, "a")
    table.come_back("b", 1)
    table.held_out(3, a=5.0)
    table.do_step(4, "a", "b")
    table.held_out(4, a=5.0, b=5.0)
    table.activations("a", 5)
    table.activations("b", 5)
    assert table.judged == [(1, "ab"), (2, "a"), (4, "ab")]


def test_what_a_device_has_told_counts_though_it_leaves_before_the_step_is_judged() -> None:
    table = Table({"a": 9, "b": 9}, final_adapter="best")
    table.held_out(0, a=9.0)
    table.do_step(1, "a", "b")
    table.held_out(1, a=5.0)
    table.federation.leave("a", table.now)
    table.activations("b", 2)
    assert table.judged == [(1, "a")]


def test_last_step_is_judged_by_what_was_told_before_the_server_was_started_again() -> None:
    before, table = (Table({"a": 1, "b": 1}, final_adapter="best") for _ in range(2))
    before.do_step(1, "a", "b")
    before.held_out(1, a=5.0)
    before.done("a", 1)
    table.federation.members.clear()
    told = {"a": HeldOutLoss(step=1, loss=5.0, labelled_tokens=10), "b": HeldOutLoss(step=0, loss=9.0, labelled_tokens=10)}
    table.federation.restore(1, 0, before.federation.membership(), tensors(), 0.0, told=told)
    for name in "ab":
        table.come_back(name, 1)
    table.done("a", 1)  # without telling again what the server has noted
    assert table.judged == []
    table.held_out(1, b=4.0)
    assert kinds(table.done("b", 1)) == [KeepJudgement, FinishRun]
    assert table.judged == [(1, "ab")]


def test_run_that_nobody_evaluates_any_more_says_so_once_and_at_its_end_which_adapter_it_ends_with() -> None:
    table = Table({"a": 5, "b": 5}, final_adapter="best")
    table.held_out(0, a=9.0)
    for step in (1, 2):
        table.do_step(step, "a", "b")
        table.held_out(step, a=4.0 + step)
    table.federation.leave("a", table.now)
    said = [texts(table.do_step(step, "b")) for step in (3, 4)]
    assert said == [
        [],  # what it had told of step 2 is still judged
        [
            "no device that takes part evaluates held-out texts any more: no step after step 2 is judged until one does; the "
            "best adapter is that of step 1"
        ],
    ]
    actions = table.do_step(5, "b")
    assert texts(actions) == [
        "the run ends with the adapter of step 1, the best that was judged: held-out loss 5.0000; after step 2 none was "
        "judged, since devices that evaluate held-out texts had left, or told no loss"
    ]
    assert actions[-1] == FinishRun(step=5, best_step=1)


def test_run_that_is_judged_again_says_anew_that_nobody_evaluates() -> None:
    table = Table({"a": 9, "b": 9}, quorum=1, final_adapter="best")
    table.held_out(0, a=9.0)
    said = []
    for step in range(1, 9):
        if step in (2, 6):
            table.federation.disconnected("a", table.now)
        elif step == 5:
            table.come_back("a", 1)
        is_here = step in (1, 5)
        said += [step] * len(texts(table.do_step(step, *("ab" if is_here else "b"))))
        if is_here:
            table.held_out(step, a=5.0)
    assert said == [3, 7]
