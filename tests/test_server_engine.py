"""The server's arithmetic in two halves: what devices compute between them, and who is missing, changes nothing else."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_replies import LabelKeepers
from usual_settings import settings

from gpu_server.federation import Trained
from gpu_server.part_trainer import PartTrainer
from gpu_server.torch_engine import TorchEngine
from protocol import Activations, Evaluation, HiddenGradient, Seconds, TrainingDiverged
from split_model import LoraConfig, PretrainedModel, adapter_shapes, initial_adapter
from storage import ModelError

VOCABULARY, WIDTH = 600, 32
LENGTHS = {"a": [5, 9, 3], "b": [4, 7]}
LABEL_COUNTS = {"a": [2, 9, 0], "b": [1, 3]}


class Halves(LabelKeepers):
    """An engine whose devices compute the loss."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        super().__init__(folder)
        self.engine = engine_of(folder, labels="device", **changes)

    def forward(self, step: int, micro_batch: int, batches: dict[str, Activations]) -> dict[str, HiddenGradient]:
        """What the devices reply to the hidden states."""
        unlabelled = {name: replace(batch, labels=batch.labels[:0]) for name, batch in batches.items()}
        hidden = self.engine.forward(step, micro_batch, unlabelled)
        return {name: self.reply(hidden[name], batch) for name, batch in batches.items()}


def engine_of(folder: Path, **changes: Any) -> TorchEngine:
    run = settings(**{"precision": "float64", "lora_targets": ("c_attn", "c_fc"), **changes})
    model = PretrainedModel(folder)
    adapter = initial_adapter(model.config, LoraConfig(**run.lora()), run.seed)
    generator = torch.Generator().manual_seed(7)  # B of a new adapter is zero, and then A has no gradient
    adapter = {name: torch.randn(matrix.shape, generator=generator) / 10 for name, matrix in adapter.items()}
    trainer = PartTrainer(model, run, adapter, weight_dtype=torch.float64, device=torch.device("cpu"))
    edge = adapter_shapes(model.config, LoraConfig(**run.lora()), range(run.cut_layer))
    return TorchEngine(trainer, run, {name: adapter[name] for name in edge})


def batches(step: int = 1, micro_batch: int = 0, names: Sequence[str] = ("a", "b")) -> dict[str, Activations]:
    """The same for the same arguments, whoever else takes part."""
    return {name: batch_of(name, step, micro_batch) for name in names}


def batch_of(name: str, step: int, micro_batch: int) -> Activations:
    rng = np.random.default_rng([step, micro_batch, ord(name)])
    lengths, label_counts = LENGTHS[name], LABEL_COUNTS[name]
    return Activations(
        step=step,
        micro_batch=micro_batch,
        seconds=Seconds(),
        lengths=np.array(lengths, np.int32),
        label_counts=np.array(label_counts, np.int32),
        labels=rng.integers(0, VOCABULARY, sum(label_counts), dtype=np.int32),
        values=rng.normal(size=(sum(lengths), WIDTH)),
    )


def empty() -> Activations:
    none = np.zeros(0, np.int32)
    return replace(batch_of("a", 1, 0), lengths=none, label_counts=none, labels=none, values=np.zeros((0, WIDTH)))


def assert_same(one: Trained, other: Trained, tolerance: float = 1e-12) -> None:
    assert one.labelled_tokens == other.labelled_tokens
    np.testing.assert_allclose(one.loss, other.loss, rtol=tolerance)
    np.testing.assert_allclose(one.gradient_norm, other.gradient_norm, rtol=tolerance)
    assert list(one.summed_losses) == list(other.summed_losses)
    for name, loss in one.summed_losses.items():
        np.testing.assert_allclose(loss, other.summed_losses[name], rtol=tolerance)
    assert list(one.gradients) == list(other.gradients)
    for name, gradient in one.gradients.items():
        np.testing.assert_allclose(gradient, other.gradients[name], rtol=tolerance, atol=tolerance)


def assert_same_adapter(one: TorchEngine, other: TorchEngine, tolerance: float = 1e-12) -> None:
    for name, matrix in one.adapter().items():
        torch.testing.assert_close(matrix, other.adapter()[name], rtol=tolerance, atol=tolerance)


def test_two_halves_train_as_one_whole_with_the_same_dropout(tiny_model: Path) -> None:
    options: dict[str, Any] = {"micro_batches": 2, "lora_dropout": 0.3}
    whole, halves = engine_of(tiny_model, **options), Halves(tiny_model, **options)
    for step in (1, 2, 3):
        for micro_batch in (0, 1):
            expected = whole.train(step, 3, micro_batch, batches(step, micro_batch))
            replies = halves.forward(step, micro_batch, batches(step, micro_batch))
            assert_same(halves.engine.backward(step, 3, micro_batch, replies), expected)
    assert_same_adapter(halves.engine, whole)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_losses_of_the_devices_are_what_each_would_lose_alone(tiny_model: Path, precision: str) -> None:
    tolerance = 1e-5 if precision == "float32" else 1e-12
    engine = engine_of(tiny_model, micro_batches=2)
    alone = {name: engine_of(tiny_model).train(1, 1, 0, batches(names=name)) for name in "ab"}
    together = engine.train(1, 1, 0, batches())
    assert {name: pytest.approx(trained.loss * trained.labelled_tokens, rel=tolerance) for name, trained in alone.items()} == (
        together.summed_losses
    )
    assert together.gradient_norm == 0.0  # the step's gradient is not known yet


def test_nothing_depends_on_when_a_micro_batch_had_its_forward(tiny_model: Path) -> None:
    options: dict[str, Any] = {"micro_batches": 3, "lora_dropout": 0.3}
    in_turn, ahead = Halves(tiny_model, **options), Halves(tiny_model, **options)
    for step in (1, 2):
        turns = [
            in_turn.engine.backward(step, 2, micro_batch, in_turn.forward(step, micro_batch, batches(step, micro_batch)))
            for micro_batch in range(3)
        ]
        replies = [ahead.forward(step, micro_batch, batches(step, micro_batch)) for micro_batch in range(3)]
        for micro_batch, expected in enumerate(turns):
            assert_same(ahead.engine.backward(step, 2, micro_batch, replies[micro_batch]), expected, 0.0)
    assert_same_adapter(ahead.engine, in_turn.engine, 0.0)


def test_step_goes_on_without_a_device_that_does_not_reply_as_if_it_had_not_been_there(tiny_model: Path) -> None:
    without, overtaken = Halves(tiny_model, micro_batches=2), Halves(tiny_model, micro_batches=2)
    for micro_batch in (0, 1):
        only = batches(1, micro_batch, names="a")
        expected = without.engine.backward(1, 1, micro_batch, without.forward(1, micro_batch, only))
        replies = overtaken.forward(1, micro_batch, batches(1, micro_batch))
        assert_same(overtaken.engine.backward(1, 1, micro_batch, {"a": replies["a"]}), expected)
    assert_same_adapter(overtaken.engine, without.engine)


def test_step_that_everybody_has_left_ends_with_the_micro_batches_there_are(tiny_model: Path) -> None:
    shorter, given_up = Halves(tiny_model), Halves(tiny_model, micro_batches=3)
    expected = shorter.engine.backward(1, 1, 0, shorter.forward(1, 0, batches()))
    unfinished = given_up.engine.backward(1, 1, 0, given_up.forward(1, 0, batches()))
    assert_same(unfinished, replace(expected, gradient_norm=0.0))
    given_up.forward(1, 1, batches(1, 1))
    trained = given_up.engine.backward(1, 1, 2, {})
    assert_same(trained, replace(expected, gradients={}, summed_losses={}))
    assert_same_adapter(given_up.engine, shorter.engine)


def test_step_of_which_nobody_has_replied_teaches_nothing(tiny_model: Path) -> None:
    halves = Halves(tiny_model)
    before = halves.engine.adapter()
    halves.forward(1, 0, batches())
    trained = halves.engine.backward(1, 1, 0, {})
    assert (trained.loss, trained.labelled_tokens) == (0.0, 0)
    assert all(torch.equal(matrix, before[name]) for name, matrix in halves.engine.adapter().items())


@pytest.mark.parametrize("end", ["with its last backward", "when everybody has left", "when the next one begins"])
def test_step_that_is_over_is_forgotten(tiny_model: Path, end: str) -> None:
    halves, kept = Halves(tiny_model, micro_batches=2), []

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor.detach())
        kept.append(weakref.ref(saved))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):  # type: ignore[no-untyped-call]
        replies = [halves.forward(1, micro_batch, batches(1, micro_batch)) for micro_batch in (0, 1)]
    assert any(reference() is not None for reference in kept)
    if end == "with its last backward":
        for micro_batch in (0, 1):
            halves.engine.backward(1, 2, micro_batch, replies[micro_batch])
    elif end == "when everybody has left":
        halves.engine.backward(1, 2, 1, {})
    else:
        halves.forward(2, 0, batches(2))
    assert all(reference() is None for reference in kept)


CLIPPED = 0.01
"""The norm of no step's gradient is as small."""


@pytest.mark.parametrize("halved", [False, True], ids=["labels on the server", "labels on the device"])
def test_step_whose_gradient_is_clipped_waits_for_the_devices_part_of_it(tiny_model: Path, halved: bool) -> None:
    """What comes of it is torch's: all gradients together are clipped, and AdamW takes its step with them."""
    waiting, whole = (engine_of(tiny_model, max_grad_norm=limit) for limit in (CLIPPED, 0.0))
    if halved:
        halves = Halves(tiny_model, max_grad_norm=CLIPPED)
        waiting = halves.engine
    parameters = {name: torch.nn.Parameter(matrix) for name, matrix in waiting.adapter().items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    draw = np.random.default_rng(0)
    for step in (1, 2, 3):
        whole.restore({f"adapter/{name}": parameter.detach() for name, parameter in parameters.items()})
        before = waiting.adapter()
        if halved:
            norm = halves.engine.backward(step, 3, 0, halves.forward(step, 0, batches(step))).gradient_norm
        else:
            norm = waiting.train(step, 3, 0, batches(step)).gradient_norm
        assert all(torch.equal(matrix, before[name]) for name, matrix in waiting.adapter().items())
        edge = {name: draw.normal(size=matrix.shape) / 100 for name, matrix in waiting.edge_adapter().items()}
        aggregated = waiting.aggregate(step, 3, {"a": edge}, {"a": 1})
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(edge[name]) if name in edge else gradient_of(whole, step)[name]
        total = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIPPED).item()
        assert np.hypot(norm, aggregated.gradient_norm) == pytest.approx(total, rel=1e-12)
        assert total > CLIPPED
        optimiser.step()
        for name, matrix in waiting.adapter().items():
            torch.testing.assert_close(matrix, parameters[name].detach(), rtol=0, atol=1e-12)


def gradient_of(engine: TorchEngine, step: int) -> dict[str, torch.Tensor]:
    """By the server's matrices, of the mean loss of `batches`."""
    part = engine._trainer._part  # type: ignore[attr-defined]
    part.clear_gradients()
    union = list(batches(step).values())
    lengths, counts = (np.concatenate([getattr(batch, name) for batch in union]) for name in ("lengths", "label_counts"))
    values = torch.from_numpy(np.concatenate([batch.values for batch in union]))
    labels = torch.from_numpy(np.concatenate([batch.labels for batch in union])).long()
    part.train()
    part.losses(values, lengths, counts, labels).mean().backward()
    gradients = {name: matrix.grad.clone() for name, matrix in part.matrices().items()}
    part.clear_gradients()
    return gradients


def test_step_whose_gradient_is_clipped_and_to_which_nobody_contributes_changes_nothing(tiny_model: Path) -> None:
    engine, undisturbed = (engine_of(tiny_model, max_grad_norm=CLIPPED) for _ in range(2))
    before = engine.adapter()
    engine.train(1, 3, 0, batches(1))
    for each in (engine, undisturbed):
        each.train(2, 3, 0, batches(2))
        assert all(torch.equal(matrix, before[name]) for name, matrix in each.adapter().items())
        each.aggregate(2, 3, {"a": each.edge_adapter()}, {"a": 1})
    assert_same_adapter(engine, undisturbed, 0.0)


def test_norm_that_is_not_finite_ends_the_run_and_shortens_no_gradient_to_nothing(tiny_model: Path) -> None:
    engine = engine_of(tiny_model, max_grad_norm=CLIPPED)
    engine.train(2, 3, 0, batches(2))
    with pytest.raises(TrainingDiverged, match=r"^the norm of the gradient of step 2 is inf; try a lower --lr$"):
        engine.aggregate(2, 3, {"a": {name: matrix * 0 + 1e200 for name, matrix in engine.edge_adapter().items()}}, {"a": 1})


def test_devices_without_a_label_or_a_row_take_part(tiny_model: Path) -> None:
    whole, halves = engine_of(tiny_model), Halves(tiny_model)
    without_label = replace(batch_of("b", 1, 0), label_counts=np.zeros(2, np.int32), labels=np.zeros(0, np.int32))
    for union in (
        {"a": batch_of("a", 1, 0), "b": without_label, "c": empty()},
        {"b": without_label},
        {"a": empty(), "b": empty()},
    ):
        expected = whole.train(1, 1, 0, union)
        assert_same(halves.engine.backward(1, 1, 0, halves.forward(1, 0, union)), expected)
    assert_same_adapter(halves.engine, whole)


def test_held_out_texts_lose_on_the_device_what_they_lose_on_the_server(tiny_model: Path) -> None:
    whole, halves = engine_of(tiny_model, lora_dropout=0.5), Halves(tiny_model, lora_dropout=0.5)
    batch = batch_of("a", 1, 0)
    held_out = Evaluation(
        index=1, lengths=batch.lengths, label_counts=batch.label_counts, labels=batch.labels, values=batch.values
    )
    hidden = halves.engine.infer(replace(held_out, labels=batch.labels[:0]))
    np.testing.assert_allclose(halves.reply(hidden, batch).summed_loss, whole.evaluate(held_out), rtol=1e-12)
    nothing = empty()
    none = Evaluation(
        index=2, lengths=nothing.lengths, label_counts=nothing.lengths, labels=nothing.labels, values=nothing.values
    )
    assert halves.engine.infer(none).shape == (0, WIDTH)


def with_infinite_adapter(halves: Halves) -> None:
    state = halves.engine.round_end
    name = next(name for name in state if "h.3" in name and "lora_B" in name)
    halves.engine.restore({**state, name: torch.full_like(state[name], torch.inf)})


def test_hidden_states_that_are_not_finite_end_the_run(tiny_model: Path) -> None:
    halves = Halves(tiny_model)
    with_infinite_adapter(halves)
    with pytest.raises(TrainingDiverged, match=r"the hidden states of step 3 are not finite; try a lower --lr"):
        halves.forward(3, 0, batches(3))
    batch = batch_of("a", 1, 0)
    with pytest.raises(TrainingDiverged, match=r"the hidden states of held-out texts are not finite; try a lower --lr"):
        halves.engine.infer(
            Evaluation(
                index=1, lengths=batch.lengths, label_counts=batch.label_counts, labels=batch.labels[:0], values=batch.values
            )
        )


def test_base_model_that_gives_no_finite_hidden_states_is_named(tiny_model: Path) -> None:
    halves = Halves(tiny_model)
    too_large = {"a": replace(batch_of("a", 1, 0), values=np.full((17, WIDTH), 1e308))}
    with pytest.raises(ModelError, match="gives hidden states that are not finite numbers"):
        halves.forward(1, 0, too_large)


def test_gradient_at_the_cut_that_is_not_finite_ends_the_run(tiny_model: Path) -> None:
    halves = Halves(tiny_model)
    replies = halves.forward(2, 0, batches(2))
    too_large = {name: replace(reply, values=np.full_like(reply.values, 1e308)) for name, reply in replies.items()}
    with pytest.raises(TrainingDiverged, match=r"the gradient of step 2 is not finite; try a lower --lr"):
        halves.engine.backward(2, 2, 0, too_large)
