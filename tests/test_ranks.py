"""Several processes compute what one computes, whatever they are given."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_replies import LabelKeepers
from family_models import make_family_model
from ranks import Ranks, config_of, engine_of, ranks

from gpu_server.federation import Trained
from gpu_server.torch_engine import TorchEngine
from protocol import Activations, Evaluation, Seconds, TrainingDiverged
from split_model import PretrainedModel
from storage import ModelError

VOCABULARY, WIDTH = 600, 32
OF_LOSSES, OF_ADAPTERS = 1e-9, 1e-8
STEPS = 2

Shape = dict[str, tuple[list[int], list[int]]]
"""By client the lengths of its sequences, and how many labels each has."""
UNEQUAL: Shape = {"a": ([5, 9, 3, 60, 17], [2, 9, 0, 31, 17]), "b": ([4, 7], [1, 3])}
ONE_SEQUENCE: Shape = {"a": ([9], [4]), "b": ([], [])}
WITHOUT_A_LABEL: Shape = {"a": ([5, 9], [0, 0]), "b": ([4, 7, 6], [0, 3, 1])}
NOBODY: Shape = {"a": ([], []), "b": ([], [])}


@pytest.fixture(scope="module", params=[(2, False), (3, False), (3, True)], ids=["2", "3", "3 sharded"])
def several(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    number, shard = request.param
    with ranks(number, shard=shard) as started:
        yield started


def batches(shape: Shape, step: int, micro_batch: int, scale: float = 1.0) -> dict[str, Activations]:
    made = {}
    for client, (lengths, label_counts) in shape.items():
        rng = np.random.default_rng([step, micro_batch, ord(client)])
        made[client] = Activations(
            step=step,
            micro_batch=micro_batch,
            seconds=Seconds(),
            lengths=np.array(lengths, np.int32),
            label_counts=np.array(label_counts, np.int32),
            labels=rng.integers(0, VOCABULARY, sum(label_counts), dtype=np.int32),
            values=rng.normal(size=(sum(lengths), WIDTH)) * scale,
        )
    return made


def in_float32(of: dict[str, Activations]) -> dict[str, Activations]:
    return {client: replace(batch, values=batch.values.astype(np.float32)) for client, batch in of.items()}


def held_out(shape: Shape = UNEQUAL, **changes: Any) -> Evaluation:
    batch = batches(shape, 7, 0)["a"]
    fields = {name: getattr(batch, name) for name in ("lengths", "label_counts", "labels", "values")}
    return Evaluation(index=1, **{**fields, **changes})


class Devices(LabelKeepers):
    """All of a run."""

    def run(self, engine: TorchEngine, shapes: Sequence[Shape], silent: Sequence[str] = ()) -> Iterator[Trained]:
        """All micro-batches of a step are on their way before the first comes back."""
        for step in range(1, STEPS + 1):
            sent, hidden = {}, {}
            for number, shape in enumerate(shapes):
                sent[number] = batches(shape, step, number)
                unlabelled = {client: replace(batch, labels=batch.labels[:0]) for client, batch in sent[number].items()}
                hidden[number] = engine.forward(step, number, unlabelled)
            for number, of in sent.items():
                replies = {c: self.reply(hidden[number][c], batch) for c, batch in of.items() if c not in silent}
                yield engine.backward(step, STEPS, number, replies)


def run(engine: TorchEngine, shapes: Sequence[Shape]) -> Iterator[Trained]:
    """
    Args:
        shapes: of a step's micro-batches.
    """
    for step in range(1, STEPS + 1):
        for number, shape in enumerate(shapes):
            yield engine.train(step, STEPS, number, batches(shape, step, number))


def assert_same(one: Trained, other: Trained) -> None:
    assert one.labelled_tokens == other.labelled_tokens
    for figure in ("loss", "gradient_norm"):
        np.testing.assert_allclose(getattr(one, figure), getattr(other, figure), rtol=0, atol=OF_LOSSES)
    assert list(one.summed_losses) == list(other.summed_losses)
    for client, loss in one.summed_losses.items():
        np.testing.assert_allclose(loss, other.summed_losses[client], rtol=0, atol=OF_LOSSES)
    assert list(one.gradients) == list(other.gradients)
    for client, gradient in one.gradients.items():
        assert gradient.dtype == other.gradients[client].dtype
        np.testing.assert_allclose(gradient, other.gradients[client], rtol=0, atol=OF_LOSSES)


def assert_same_adapter(one: TorchEngine, other: TorchEngine, tolerance: float = OF_ADAPTERS) -> None:
    for name, matrix in one.adapter().items():
        torch.testing.assert_close(matrix, other.adapter()[name], rtol=0, atol=tolerance)


SHAPES = {
    "unequal clients": [UNEQUAL],
    "fewer sequences than ranks": [ONE_SEQUENCE],
    "a client without a label": [WITHOUT_A_LABEL],
    "several micro-batches": [UNEQUAL, ONE_SEQUENCE, WITHOUT_A_LABEL],
    "a micro-batch of nobody": [NOBODY, UNEQUAL],
    "a step of nobody": [NOBODY],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_ranks_train_as_one_process(several: Ranks, tiny_model: Path, shapes: list[Shape]) -> None:
    config = config_of(tiny_model, micro_batches=len(shapes), lora_dropout=0.3)
    one, all_ranks = engine_of(config), several.engine(config)
    for expected, trained in zip(run(one, shapes), run(all_ranks, shapes), strict=True):
        assert_same(trained, expected)
        assert_same_adapter(all_ranks, one)


def test_ranks_clip_the_gradient_as_one_process_does(several: Ranks, tiny_model: Path) -> None:
    """All of them wait for the edge's gradient, and take the step then."""
    config = config_of(tiny_model, max_grad_norm=0.05)
    one, all_ranks = engine_of(config), several.engine(config)
    edge = {"a": {name: matrix * 0 + 0.01 for name, matrix in one.edge_adapter().items()}}
    for step in (1, 2, 3):
        before = one.adapter()
        norms = []
        for engine in (one, all_ranks):
            (trained,) = [engine.train(step, 3, 0, batches(UNEQUAL, step, 0))]
            assert all(torch.equal(matrix, before[name]) for name, matrix in one.adapter().items())
            norms.append(trained.gradient_norm)
            if step != 2:  # nobody contributes to it
                engine.aggregate(step, 3, edge, {"a": 1})
                before = one.adapter()
        assert norms[0] == pytest.approx(norms[1], rel=OF_LOSSES)
        assert norms[0] > 0.05
        assert_same_adapter(all_ranks, one)


@pytest.mark.parametrize(
    ("name", "silent"), [*((name, "") for name in SHAPES), *(("several micro-batches", silent) for silent in ("a", "b", "ab"))]
)
def test_ranks_train_as_one_process_where_devices_keep_the_labels(
    several: Ranks, tiny_model: Path, name: str, silent: str
) -> None:
    shapes = SHAPES[name]
    config, devices = config_of(tiny_model, micro_batches=len(shapes), labels="device", lora_dropout=0.3), Devices(tiny_model)
    one, all_ranks = engine_of(config), several.engine(config)
    for expected, trained in zip(devices.run(one, shapes, silent), devices.run(all_ranks, shapes, silent), strict=True):
        assert_same(trained, expected)
        assert_same_adapter(all_ranks, one)


@pytest.mark.parametrize("option", ["llama-biases", "qwen3-biases", "phi3-partial"])
def test_ranks_train_models_of_other_families_as_one_process(several: Ranks, tmp_path: Path, option: str) -> None:
    targets = PretrainedModel(make_family_model(tmp_path, option)).config.lora_targets
    config = config_of(tmp_path, lora_targets=targets, micro_batches=2, lora_dropout=0.3)
    one, all_ranks = engine_of(config), several.engine(config)
    shapes = [UNEQUAL, ONE_SEQUENCE]
    for expected, trained in zip(run(one, shapes), run(all_ranks, shapes), strict=True):
        assert_same(trained, expected)
        assert_same_adapter(all_ranks, one)


def test_labels_may_be_fewer_than_rows_where_devices_hide_which_have_one(several: Ranks, tiny_model: Path) -> None:
    config, devices = config_of(tiny_model, labels="device"), Devices(tiny_model)
    engines = engine_of(config), several.engine(config)
    sent = batches(UNEQUAL, 1, 0)
    unlabelled = {client: replace(batch, labels=batch.labels[:0]) for client, batch in sent.items()}
    expected, trained = (
        engine.backward(
            1,
            1,
            0,
            {client: replace(devices.reply(hidden[client], batch), labelled_tokens=1) for client, batch in sent.items()},
        )
        for engine in engines
        for hidden in [engine.forward(1, 0, unlabelled)]
    )
    assert expected.labelled_tokens == 2
    assert_same(trained, expected)


def test_same_number_of_ranks_repeats_to_the_bit(several: Ranks, tiny_model: Path) -> None:
    config = config_of(tiny_model, micro_batches=3, lora_dropout=0.3, dtype="float32")
    shapes = SHAPES["several micro-batches"]
    outcomes = []
    for _ in range(2):
        engine = several.engine(config)
        losses = [
            engine.train(step, 2, number, in_float32(batches(shape, step, number))).loss
            for step in (1, 2)
            for number, shape in enumerate(shapes)
        ]
        outcomes.append((losses, engine.adapter()))
    assert outcomes[0][0] == outcomes[1][0]
    for name, matrix in outcomes[0][1].items():
        assert torch.equal(matrix, outcomes[1][1][name])


def test_held_out_texts_lose_on_ranks_what_they_lose_on_one_process(several: Ranks, tiny_model: Path) -> None:
    config = config_of(tiny_model, lora_dropout=0.5)
    one, all_ranks = engine_of(config), several.engine(config)
    for shape in (UNEQUAL, ONE_SEQUENCE, NOBODY):
        np.testing.assert_allclose(all_ranks.evaluate(held_out(shape)), one.evaluate(held_out(shape)), rtol=0, atol=OF_LOSSES)


def test_held_out_hidden_states_are_those_of_one_process(several: Ranks, tiny_model: Path) -> None:
    config = config_of(tiny_model, labels="device")
    one, all_ranks = engine_of(config), several.engine(config)
    for shape in (UNEQUAL, ONE_SEQUENCE, NOBODY):
        np.testing.assert_allclose(all_ranks.infer(held_out(shape)), one.infer(held_out(shape)), rtol=0, atol=OF_LOSSES)


def test_codecs_change_the_loss_on_ranks_by_what_they_change_it_on_one_process(several: Ranks, tiny_model: Path) -> None:
    config = config_of(tiny_model, dtype="float32", codec="int8")
    sent = []
    for batch in in_float32(batches(UNEQUAL, 1, 0)).values():
        sent.append(replace(batch, values=(batch.values * 8).round() / 8, exact=batch.values))
    expected = engine_of(config).check(sent, ["int8", "coarse"])
    changes = several.engine(config).check(sent, ["int8", "coarse"])
    assert changes.keys() == expected.keys() == {"", "int8", "coarse"}
    for codec, change in changes.items():
        assert change == pytest.approx(expected[codec], abs=1e-6), codec


def test_run_goes_on_with_another_number_of_ranks(several: Ranks, tiny_model: Path) -> None:
    config = config_of(tiny_model, lora_dropout=0.3)
    one, all_ranks = engine_of(config), several.engine(config)
    edge = {"a": one.edge_adapter()}

    def step(engine: TorchEngine, number: int) -> None:
        engine.train(number, 4, 0, batches(UNEQUAL, number, 0))
        engine.aggregate(number, 4, edge, {"a": 1})

    for number in (1, 2):
        step(one, number)
        step(all_ranks, number)
    fewer, more = engine_of(config), several.engine(config)
    fewer.restore(all_ranks.round_end)
    more.restore(one.round_end)
    for number in (3, 4):
        for engine in (one, fewer, more):
            step(engine, number)
    for engine in (fewer, more):
        assert_same_adapter(engine, one)


def infinite(engine: TorchEngine) -> None:
    state = engine.round_end
    name = next(name for name in state if "h.3" in name and "lora_B" in name)
    engine.restore({**state, name: torch.full_like(state[name], torch.inf)})


@pytest.mark.parametrize("shape", [UNEQUAL, ONE_SEQUENCE])
def test_loss_that_is_no_number_ends_the_run_on_all_ranks(several: Ranks, tiny_model: Path, shape: Shape) -> None:
    engine = several.engine(config_of(tiny_model))
    infinite(engine)
    with pytest.raises(TrainingDiverged, match=r"the loss of step 3 is nan; try a lower --lr"):
        engine.train(3, 3, 0, batches(shape, 3, 0))
    with pytest.raises(TrainingDiverged, match=r"the loss of held-out texts is nan; try a lower --lr"):
        engine.evaluate(held_out())
    with pytest.raises(ModelError, match="gives losses that are not finite numbers"):
        engine.train(3, 3, 0, batches(shape, 3, 0, scale=1e307))


def test_hidden_states_that_are_no_numbers_end_the_run_on_all_ranks(several: Ranks, tiny_model: Path) -> None:
    engine = several.engine(config_of(tiny_model, labels="device"))
    infinite(engine)
    sent = {client: replace(batch, labels=batch.labels[:0]) for client, batch in batches(UNEQUAL, 3, 0).items()}
    with pytest.raises(TrainingDiverged, match=r"the hidden states of step 3 are not finite; try a lower --lr"):
        engine.forward(3, 0, sent)
    with pytest.raises(TrainingDiverged, match=r"the hidden states of held-out texts are not finite; try a lower --lr"):
        engine.infer(held_out())


def test_number_that_is_none_on_one_rank_alone_ends_the_run_on_all(several: Ranks, tiny_model: Path) -> None:
    engine, devices = several.engine(config_of(tiny_model, labels="device")), Devices(tiny_model)
    sent = batches(UNEQUAL, 2, 0)
    hidden = engine.forward(2, 0, {client: replace(batch, labels=batch.labels[:0]) for client, batch in sent.items()})
    replies = {client: devices.reply(hidden[client], batch) for client, batch in sent.items()}
    values = replies["a"].values.copy()
    values[0] = 1e308  # of one row, and so of one rank
    with pytest.raises(TrainingDiverged, match=r"the gradient of step 2 is not finite; try a lower --lr"):
        engine.backward(2, 2, 0, {**replies, "a": replace(replies["a"], values=values)})
    assert np.isfinite(engine.infer(held_out())).all()  # and nobody waits for anybody
