"""
Both parts and the server's engine on a CUDA device compute what they compute on the CPU.

benchmarks/device_check.py runs these tests on the card that it finds. With SPLITLORA_CARD=cpu they hold the CPU to itself:
that says nothing of a card, but shows that the tests themselves run.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_split
from test_server_engine import VOCABULARY, WIDTH, Halves, batches
from usual_settings import settings

import edge_client.torch_engine
from edge_client.data import Sample, pack
from gpu_server.federation import Trained
from gpu_server.part_trainer import PartTrainer
from gpu_server.torch_engine import TorchEngine
from protocol import Activations, Array, Evaluation
from split_model import DTYPES, LoraConfig, PretrainedModel, adapter_shapes, choose_device, initial_adapter
from split_model.dropout import SeededDropout
from split_model.packing import Packing

CARD = os.environ.get("SPLITLORA_CARD", "cuda")
PRECISIONS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of the frozen weights on the card: how far results may be, relative to those of the CPU in float32, as Euclidean norms."""
STEPS, MICRO_BATCHES = 3, 2

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(CARD == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
in_each_precision = pytest.mark.parametrize("dtype", PRECISIONS)


def engine_on(device: str, folder: Path, dtype: str = "float32", *, in_bfloat16: bool = False, **changes: Any) -> TorchEngine:
    """
    Whose adapter has no zeros, so that every matrix has a gradient.

    Args:
        in_bfloat16: the residual stream as well.
        changes: of the run's settings.
    """
    run = settings(**{"lr": 1e-2, "lora_targets": ("c_attn", "c_fc"), "micro_batches": MICRO_BATCHES, **changes})
    model, lora = PretrainedModel(folder), LoraConfig(**run.lora())
    generator = torch.Generator().manual_seed(7)
    adapter = {
        name: torch.randn(matrix.shape, generator=generator) / 10
        for name, matrix in initial_adapter(model.config, lora, run.seed).items()
    }
    where: dict[str, Any] = {"weight_dtype": DTYPES[dtype], "device": choose_device(device), "in_bfloat16": in_bfloat16}
    trainer = PartTrainer(model, run, adapter, **where)
    edge = adapter_shapes(model.config, lora, range(run.cut_layer))
    return TorchEngine(trainer, run, {name: adapter[name] for name in edge})


def questions(step: int, micro_batch: int) -> dict[str, Activations]:
    return {name: replace(batch, values=batch.values.astype(np.float32)) for name, batch in batches(step, micro_batch).items()}


def held_out() -> Evaluation:
    batch = questions(9, 0)["a"]
    return Evaluation(index=1, lengths=batch.lengths, label_counts=batch.label_counts, labels=batch.labels, values=batch.values)


def train(engine: TorchEngine, first: int = 1, last: int = STEPS) -> list[Trained]:
    """These steps, the edge adapter's included, whose gradients are made up."""
    trained = []
    for step in range(first, last + 1):
        trained += [engine.train(step, STEPS, number, questions(step, number)) for number in range(MICRO_BATCHES)]
        rng = np.random.default_rng(step)
        gradients = {name: rng.normal(size=matrix.shape).astype(np.float32) for name, matrix in engine.edge_adapter().items()}
        engine.aggregate(step, STEPS, {"a": gradients}, {"a": 1})
    return trained


def everything(trained: Iterable[Trained]) -> dict[str, Array]:
    """What an engine has answered, by its name."""
    answers: dict[str, Array] = {}
    for number, of in enumerate(trained):
        answers |= {f"{number}: gradient of {client}": gradient for client, gradient in of.gradients.items()}
        answers |= {f"{number}: loss of {client}": np.array(loss) for client, loss in of.summed_losses.items()}
        answers[f"{number}: loss"], answers[f"{number}: norm"] = np.array(of.loss), np.array(of.gradient_norm)
    return answers


def learnt(engine: TorchEngine, before: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """By how much all matrices have changed, one after the other."""
    changes = [(matrix - before[name]).flatten() for name, matrix in engine.adapter().items()]
    return {"what is learnt": torch.cat(changes).numpy()}


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    differences = {}
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        difference, size = (np.linalg.norm(values.astype(np.float64)) for values in (found[name] - array, array))
        differences[name] = difference / size if size else difference
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= tolerance, f"{worst} is {differences[worst]:.1e} from the CPU's"


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    assert not [name for name, values in expected.items() if not np.array_equal(np.asarray(found[name]), np.asarray(values))]


@pytest.mark.parametrize(("dtype", "in_bfloat16"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_server_trains_on_the_card_as_on_the_cpu(tiny_model: Path, dtype: str, in_bfloat16: bool, dropout: float) -> None:
    on_cpu = engine_on("cpu", tiny_model, lora_dropout=dropout)
    on_card = engine_on(CARD, tiny_model, dtype, in_bfloat16=in_bfloat16, lora_dropout=dropout)
    before = on_cpu.adapter()
    assert_equal(on_card.adapter(), before)
    expected, found = train(on_cpu), train(on_card)
    assert [each.labelled_tokens for each in found] == [each.labelled_tokens for each in expected]
    assert_close(everything(found), everything(expected), PRECISIONS[dtype])
    # Adam divides a gradient by its size: where that is near zero, its rounding decides about a whole step.
    assert_close(learnt(on_card, before), learnt(on_cpu, before), 5 * PRECISIONS[dtype])


@in_each_precision
def test_server_computes_hidden_states_and_their_gradient_on_the_card_as_on_the_cpu(tiny_model: Path, dtype: str) -> None:
    options: dict[str, Any] = {"labels": "device", "lora_dropout": 0.3}
    device = Halves(tiny_model, precision="float32")  # which computes head and loss for both
    hidden, trained = {}, {}
    for engine in (on_cpu := engine_on("cpu", tiny_model, **options), on_card := engine_on(CARD, tiny_model, dtype, **options)):
        states: dict[str, Array] = {}
        answers = []
        for step in range(1, STEPS + 1):
            asked = [questions(step, number) for number in range(MICRO_BATCHES)]
            # Both are under way before the first gradient comes.
            of_step = [
                engine.forward(
                    step, number, {name: replace(batch, labels=batch.labels[:0]) for name, batch in asked[number].items()}
                )
                for number in range(MICRO_BATCHES)
            ]
            for number, of_clients in enumerate(of_step):
                states |= {f"{step}, {number}: states of {name}": array for name, array in of_clients.items()}
                replies = {name: reply_of(device, array, asked[number][name]) for name, array in of_clients.items()}
                answers.append(engine.backward(step, STEPS, number, replies))
        hidden[engine], trained[engine] = states, everything(answers)
    assert_close(hidden[on_card], hidden[on_cpu], PRECISIONS[dtype])
    assert_close(trained[on_card], trained[on_cpu], PRECISIONS[dtype])


def reply_of(device: Halves, hidden: Array, batch: Activations) -> Any:
    reply = device.reply(hidden.astype(np.float64), batch)
    return replace(reply, values=reply.values.astype(np.float32))


@in_each_precision
def test_held_out_texts_and_checks_of_codecs_give_on_the_card_what_they_give_on_the_cpu(tiny_model: Path, dtype: str) -> None:
    on_cpu, on_card = engine_on("cpu", tiny_model), engine_on(CARD, tiny_model, dtype)
    answers = {}
    for engine in (on_cpu, on_card):
        batch = held_out()
        answers[engine] = {
            "loss": np.array(engine.evaluate(batch)),
            "states": engine.infer(replace(batch, labels=batch.labels[:0])),
        }
    assert_close(answers[on_card], answers[on_cpu], PRECISIONS[dtype])
    checked = [replace(batch, exact=batch.values) for batch in questions(1, 0).values()]
    changes = [engine.check(checked, ["int8", "coarse"]) for engine in (on_card, on_cpu)]
    size = on_cpu.evaluate(held_out()) / held_out().num_labelled
    assert changes[0] == pytest.approx(changes[1], abs=PRECISIONS[dtype] * size)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_card_computes_the_same_again_to_the_bit(tiny_model: Path, labels: str) -> None:
    for dtype in PRECISIONS:
        once, again = (engine_on(CARD, tiny_model, dtype, lora_dropout=0.3) for _ in range(2))
        assert_equal(everything(train(once)), everything(train(again)))
        assert_equal(once.round_end, again.round_end)


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_masks_of_dropout_are_the_cpus(probability: float) -> None:
    masks = {}
    for name in ("cpu", CARD):
        device = torch.device(name)
        dropout = SeededDropout(probability, device)
        columns = [dropout.add_columns(width) for width in (768, 3072)]
        dropout.seeds = [7, 2**64 - 1, 0]
        dropout.begin(Packing([40, 1, 300], device))
        masks[name] = {
            str(len(keys)): dropout(torch.ones(341, len(keys), device=device), keys).cpu().numpy() > 0 for keys in columns
        }
    assert_equal(masks[CARD], masks["cpu"])


@pytest.mark.parametrize(("begins", "ends"), [(CARD, "cpu"), ("cpu", CARD)], ids=["card to CPU", "CPU to card"])
def test_state_of_one_goes_on_with_the_other(tiny_model: Path, begins: str, ends: str) -> None:
    begun, other = engine_on(begins, tiny_model), engine_on(ends, tiny_model)
    train(begun, 1, 2)
    before = begun.adapter()
    assert all(tensor.device.type == "cpu" for tensor in begun.round_end.values())
    other.restore(begun.round_end)
    assert_equal(other.round_end, begun.round_end)
    assert_close(everything(train(other, 3, 3)), everything(train(begun, 3, 3)), PRECISIONS["float32"])
    assert_close(learnt(other, before), learnt(begun, before), 5 * PRECISIONS["float32"])


@in_each_precision
def test_device_trains_its_part_on_the_card_as_on_the_cpu(tiny_model: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    batch = pack([Sample(rng.integers(0, VOCABULARY, length, dtype=np.int32), length // 2) for length in (9, 4, 17)])
    gradient = rng.normal(size=(len(batch.tokens), WIDTH)).astype(np.float32)
    run = settings(cut_layer=3, lora_dropout=0.3, aggregate_every=2, lora_targets=("c_attn", "c_fc"), lr=1e-2)
    answers = []
    for device, weights in (("cpu", "float32"), (CARD, dtype)):
        engine = edge_client.torch_engine.TorchEngine(PretrainedModel(tiny_model), run, device, weights)
        matrices = np.random.default_rng(1)
        engine.load_adapter({n: matrices.normal(0, 0.1, m.shape).astype(np.float32) for n, m in engine.adapter().items()})
        engine.begin_step()
        of_device = {"activations": engine.forward(batch, 5), "without dropout": engine.infer(batch)}
        engine.backward(gradient)
        engine.end_step(3)
        of_device |= {f"gradient of {name}": matrix for name, matrix in engine.gradients().items()}
        engine.take_step(1e-2)
        engine.restore(engine.state())
        answers.append(of_device)
    assert_close(answers[1], answers[0], PRECISIONS[dtype])


@in_each_precision
def test_device_computes_its_head_on_the_card_as_on_the_cpu(tiny_model: Path, dtype: str) -> None:
    run, source = settings(labels="device"), np.random.default_rng(0)
    hidden = source.normal(0, 1, (300, WIDTH)).astype(np.float32)
    labels = source.integers(0, VOCABULARY, 300).astype(np.int32)
    answers = []
    for device, weights in (("cpu", "float32"), (CARD, dtype)):
        engine = edge_client.torch_engine.TorchEngine(PretrainedModel(tiny_model), run, device, weights)
        losses, gradient = engine.losses_and_gradient(hidden, labels)
        assert engine.losses(hidden, labels) == pytest.approx(losses)
        answers.append({"losses": losses, "gradient": gradient})
    assert_close(answers[1], answers[0], PRECISIONS[dtype])


@pytest.mark.parametrize(
    ("where", "labels", "dropout"), [("server", "server", 0.1), ("devices", "server", 0.0), ("both", "device", 0.1)]
)
def test_run_on_the_card_learns_what_a_run_on_the_cpu_learns(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], where: str, labels: str, dropout: float
) -> None:
    files = {name: pairs_file(name, 20) for name in "ab"}
    losses = []
    for card in ("cpu", CARD):
        server, device = (card if where in (side, "both") else "cpu" for side in ("server", "devices"))
        clients = {name: {"data": path, "batch_size": 3, "device": device} for name, path in files.items()}
        run = {"model": str(tiny_model), "cut_layer": 2, "steps": 10, "labels": labels, "lora_dropout": dropout}
        losses.append(run_split({**run, "device": server, "run_dir": str(tmp_path / f"run-{len(losses)}")}, clients).losses)
    assert losses[1] == pytest.approx(losses[0], rel=PRECISIONS["float32"])


@pytest.mark.parametrize(("begins", "ends"), [(CARD, "cpu"), ("cpu", CARD)], ids=["card to CPU", "CPU to card"])
def test_run_that_began_on_one_goes_on_with_the_other(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], begins: str, ends: str
) -> None:
    clients = {name: {"data": pairs_file(name, 20), "batch_size": 3, "device": "cpu"} for name in "ab"}
    run: dict[str, Any] = {"model": str(tiny_model), "cut_layer": 2, "lora_dropout": 0.1}
    expected = run_split({**run, "steps": 10, "device": "cpu", "run_dir": str(tmp_path / "whole")}, clients).losses
    parts = {**run, "run_dir": str(tmp_path / "parts")}
    losses = run_split({**parts, "steps": 5, "device": begins}, clients).losses
    losses += run_split({**parts, "steps": 10, "device": ends, "resume": True}, clients).losses
    assert losses == pytest.approx(expected, rel=PRECISIONS["float32"])
