"""The server's decisions, without sockets, clocks or a model."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies
from hypothesis import settings as settings_of_hypothesis

from gpu_server.federation import Action, Aggregate, Federation, FinishRun, FinishStep, ModelLimits, Phase, Reply, Train
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Done,
    EdgeAdapter,
    Evaluation,
    Hello,
    Join,
    RemoteProtocolError,
    RunSettings,
    Start,
)

WIDTH, ROWS = 4, 3
SHAPES = {"A": (2, 4), "B": (12, 2)}
LIMITS = ModelLimits(
    fingerprint="f", width=WIDTH, vocabulary_size=100, num_positions=16, max_batch_tokens=64, edge_shapes=SHAPES
)


def tensors(value: float = 0.0) -> dict[str, Any]:
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def settings(**changes: Any) -> RunSettings:
    usual = {"cut_layer": 1, "lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, "lora_targets": ("c_attn",)}
    training = {"lr": 1e-3, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "seed": 0}
    return RunSettings(**{**usual, **training, "precision": "float32", "clients": 2, "epochs": 1, **changes})


class Table:
    """A federation, its clients' questions asked in any order, and the actions they cause."""

    def __init__(self, samples: dict[str, int], **changes: Any) -> None:
        self.federation = Federation("run", settings(clients=len(samples), **changes), LIMITS, tensors())
        self.now = 0.0
        for name in samples:
            self.federation.welcome(Hello(name=name, fingerprint="f"))
        self.started = [a for name, count in samples.items() for a in self.join(name, count)]

    def join(self, name: str, num_samples: int) -> list[Action]:
        return self.federation.join(name, Join(num_samples=num_samples, batch_size=1, longest=ROWS), self.now)

    def activations(self, name: str, step: int) -> list[Action]:
        ints = {"lengths": [ROWS], "label_counts": [2], "labels": [5, 6]}
        arrays = {field: np.array(values, np.int32) for field, values in ints.items()}
        message = Activations(step=step, edge_seconds=0.0, values=np.zeros((ROWS, WIDTH), np.float32), **arrays)
        return self.federation.receive(name, message, self.now)

    def contribute(self, name: str, step: int, kind: type = AdapterGradient) -> list[Action]:
        return self.federation.receive(name, kind(step=step, edge_seconds=0.0, tensors=tensors()), self.now)

    def done(self, name: str, step: int) -> list[Action]:
        return self.federation.receive(name, Done(step=step), self.now)

    def trained(self, *names: str) -> list[Action]:
        gradients = {name: np.zeros((ROWS, WIDTH), np.float32) for name in names}
        return self.federation.trained(1.5, gradients, 0.1, self.now)

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
        return self.federation.aggregated(tensors(1.0), 0.1, self.now)


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
    assert kinds(actions) == [Reply, Reply, FinishStep, FinishRun]


def test_final_adapter_is_sent_only_when_it_is_saved() -> None:
    table = Table({"a": 1})
    table.activations("a", 1)
    table.trained("a")
    table.contribute("a", 1)
    table.aggregated()
    assert table.done("a", 1) == []
    assert told(table.federation.saved(0.0), EdgeAdapter) == ["a"]


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
    assert kinds(actions) == [Reply, FinishRun]


def test_last_round_waits_for_matrices_that_are_still_owed() -> None:
    table = Table({"long": 9, "short": 1}, aggregate_every=5)
    for name in ("long", "short"):
        table.activations(name, 1)
    table.trained("long", "short")
    assert table.federation.leave("long", 0.0) == []
    (aggregate,) = table.contribute("short", 1, AdapterWeights)
    assert list(aggregate.contributions) == ["short"]  # type: ignore[union-attr]
    assert kinds(table.aggregated()) == [Reply, FinishRun]


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
    with pytest.raises(RemoteProtocolError, match="has its 1 clients already"):
        federation.welcome(Hello(name="c", fingerprint="f"))


def test_question_out_of_turn_changes_nothing() -> None:
    table = Table({"a": 3, "b": 3})
    for wrong in (lambda: table.activations("a", 2), lambda: table.contribute("a", 1), lambda: table.done("a", 3)):
        with pytest.raises(RemoteProtocolError, match="expected Activations of step 1"):
            wrong()
    table.activations("a", 1)
    assert kinds(table.activations("b", 1)) == [Train]


def test_time_of_a_client_is_divided_without_gap() -> None:
    table = Table({"a": 1, "b": 1})
    table.now = 10.0
    first = Activations(
        step=1,
        edge_seconds=6.0,
        lengths=np.array([ROWS], np.int32),
        label_counts=np.array([2], np.int32),
        labels=np.array([1, 2], np.int32),
        values=np.zeros((ROWS, WIDTH), np.float32),
    )
    table.federation.receive("a", first, 10.0)
    table.now = 13.0
    table.activations("b", 1)
    table.now = 14.0
    table.trained("a", "b")
    table.contribute("a", 1)
    table.contribute("b", 1)
    (finished,) = [action for action in table.aggregated() if isinstance(action, FinishStep)]
    seconds = finished.seconds["a"]
    assert (seconds["edge_compute"], seconds["wire"], seconds["waiting"]) == (6.0, 4.0, 3.0)
    assert seconds["server_compute"] == pytest.approx(0.2)


def test_time_of_an_evaluation_belongs_to_no_step() -> None:
    table = Table({"a": 1, "b": 1})
    table.federation.evaluated("a", 0, 3.0, now=50.0)
    table.now = 52.0
    table.activations("a", 1)
    table.activations("b", 1)
    table.trained("a", "b")
    table.contribute("a", 1)
    table.contribute("b", 1)
    (finished,) = [action for action in table.aggregated() if isinstance(action, FinishStep)]
    assert finished.seconds["a"]["wire"] == 2.0


@settings_of_hypothesis(max_examples=200, deadline=None)
@given(data=strategies.data())
def test_every_question_is_answered_whoever_leaves_and_whenever(data: strategies.DataObject) -> None:
    samples = {name: data.draw(strategies.integers(1, 6), name) for name in "abc"}
    table = Table(samples, aggregate_every=data.draw(strategies.integers(1, 4), "every"))
    federation, asked, ended, actions = table.federation, {}, set(), list(table.started)
    computing: list[Action] = []
    while True:
        for action in actions:
            if isinstance(action, Reply):
                asked.pop(action.client, None)
                if isinstance(action.message, EdgeAdapter) and federation.members[action.client].next_question[0] is Evaluation:
                    ended.add(action.client)
            elif not isinstance(action, FinishStep):
                computing.append(action)
        ready = [name for name in federation.members if name not in asked and name not in ended]
        choices = [("ask", name) for name in ready] + [("leave", name) for name in federation.members]
        choices += [("compute", "")] if computing else []
        if not [choice for choice in choices if choice[0] != "leave"]:
            break
        what, name = data.draw(strategies.sampled_from(choices))
        if what == "leave":
            asked.pop(name, None)
            actions = federation.leave(name, 0.0)
        elif what == "ask":
            kind, step = federation.members[name].next_question
            asked[name] = kind
            actions = table.ask(name, kind, step)
        else:
            actions = table.compute(computing.pop(0))
    assert not asked
    assert federation.phase is Phase.FINISHED
    assert ended == set(federation.members)
