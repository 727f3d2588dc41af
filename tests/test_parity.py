"""A run over real sockets is centralised LoRA: same losses, same adapter as transformers + PEFT in one process."""

import copy
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from conftest import REPOSITORY, SHARED, make_model, run_split, shared_path
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from gpu_server import StepRecord

LEARNING_RATE = 2e-3
TOLERANCES = {"float64": (1e-9, 1e-8), "float32": (1e-4, 1e-3)}
"""
By dtype, of the loss at every step, in nats, and of the final adapter: its largest difference in float64, its relative one in
float32.
"""
CLIPPED = 0.35
"""Norm of the gradient that some steps exceed and others do not."""
SCHEDULES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def rows(count: int, offset: int = 0) -> list[reference.Pair]:
    """Pairs of E2E where it is at hand, else of the project's own sample."""
    path = SHARED / "data/e2e/train.txt"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()[offset : offset + count]
        return [(prompt, completion) for prompt, completion in (line.split("||") for line in lines)]
    pairs = [
        json.loads(line)
        for client in (0, 1)
        for line in (REPOSITORY / f"examples/restaurants/client-{client}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [(pair["prompt"], pair["completion"]) for pair in pairs[offset : offset + count]]


def write_pairs(path: Path, pairs: list[reference.Pair]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("four-blocks"))


class Federation:
    """Clients with their own rows and batch sizes, and the union batches that centralised training would see."""

    def __init__(self, tmp_path: Path, batch_sizes: list[int], steps: int) -> None:
        self.batch_sizes, self.steps = batch_sizes, steps
        # Fewer rows than the steps use, so that data is gone through more than once.
        sizes = [max(2, steps * size * 2 // 3) + i for i, size in enumerate(batch_sizes)]
        self.pairs = [rows(size, offset=sum(sizes[:i])) for i, size in enumerate(sizes)]
        self.files = [write_pairs(tmp_path / f"client-{i}.jsonl", pairs) for i, pairs in enumerate(self.pairs)]

    def clients(self, engines: Sequence[str] = ("torch",), **options: Any) -> dict[str, dict[str, Any]]:
        """
        Args:
            engines: of the clients, as often as there are more of these.
            options: of all of them.
        """
        return {
            f"client-{i}": {"data": file, "batch_size": size, "shuffle": False, "engine": engine, **options}
            for i, (file, size, engine) in enumerate(zip(self.files, self.batch_sizes, itertools.cycle(engines)))
        }

    def batches(self, base: Path) -> list[list[list[reference.Sample]]]:
        """By step and client."""
        samples = [reference.encode(pairs, base) for pairs in self.pairs]
        return [[self._batch(samples[i], size, step) for i, size in enumerate(self.batch_sizes)] for step in range(self.steps)]

    def union_batches(self, base: Path) -> list[list[reference.Sample]]:
        return [[sample for batch in step for sample in batch] for step in self.batches(base)]

    @staticmethod
    def _batch(samples: list[reference.Sample], size: int, step: int) -> list[reference.Sample]:
        index = step % -(-len(samples) // size)
        return samples[index * size : (index + 1) * size]


OF_TRAINING = {"lr_schedule", "warmup_steps", "warmup_ratio", "max_grad_norm", "label_smoothing"}
_trained: dict[Any, tuple[list[float], dict[str, torch.Tensor]]] = {}


def centralised(
    federation: Federation, base: Path, start: Path, dtype: str, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """
    Losses and the final adapter of transformers + PEFT. Wherever a model is cut and whoever has the labels, they are the same,
    and computed once for all that they depend on.
    """
    steps, files = federation.steps, tuple(file.read_bytes() for file in sorted(start.glob("adapter_*")))
    key = repr((base, files, federation.pairs, federation.batch_sizes, steps, dtype, sorted(options.items())))
    if key not in _trained:
        schedule = None
        if "lr_schedule" in options:
            warmup = options.get("warmup_steps") or math.ceil(options["warmup_ratio"] * steps)
            schedule = lambda optimiser: SCHEDULES[options["lr_schedule"]](optimiser, warmup, steps)  # noqa: E731
        losses, adapter, _ = reference.train(
            base,
            start,
            federation.union_batches(base),
            dtype=getattr(torch, dtype),
            lr=LEARNING_RATE,
            schedule=schedule,
            max_grad_norm=options.get("max_grad_norm"),
            label_smoothing=options.get("label_smoothing", 0.0),
        )
        _trained[key] = losses, adapter
    return _trained[key]


def assert_equals_centralised(
    base: Path,
    tmp_path: Path,
    *,
    batch_sizes: list[int],
    steps: int,
    dtype: str,
    engines: Sequence[str] = ("torch",),
    in_flight: int = 2,
    **options: Any,
) -> list[StepRecord]:
    federation = Federation(tmp_path, batch_sizes, steps)
    targets = options.get("lora_targets", ("c_attn",))
    has_edge = options.get("edge_adapter", "lora") == "lora"
    blocks = None if has_edge else range(options["cut_layer"], json.loads((base / "config.json").read_text())["n_layer"])
    rslora = options.get("lora_rslora", False)
    start = reference.make_adapter(base, tmp_path / "start", targets=targets, rslora=rslora, blocks=blocks)
    run_dir = tmp_path / "run"
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "init_adapter": str(start)}
    server = {
        "model": str(base),
        "run_dir": str(run_dir),
        "steps": steps,
        "lr": LEARNING_RATE,
        "dtype": dtype,
        **lora,
        **options,
    }
    result = run_split(server, federation.clients(engines, in_flight=in_flight))
    losses, adapter = centralised(
        federation, base, start, dtype, **{name: options[name] for name in OF_TRAINING & options.keys()}
    )
    assert [record.number for record in result.records] == list(range(1, steps + 1))
    of_losses, of_adapter = TOLERANCES[dtype]
    assert max(abs(a - b) for a, b in zip(result.losses, losses, strict=True)) <= of_losses
    found = reference.read_adapter(run_dir / "adapter")
    difference = reference.largest_difference if dtype == "float64" else reference.relative_difference
    assert difference(found, adapter) <= of_adapter
    assert reference.relative_difference(adapter, reference.read_adapter(start)) > 1e-3  # something was learnt
    return result.records


@pytest.mark.parametrize("cut_layer", [1, 2, 3])
@pytest.mark.parametrize("batch_sizes", [[3], [2, 2], [2, 2, 2], [4, 1]], ids=["one", "two", "three", "unequal"])
def test_run_equals_centralised_lora_in_float64(
    four_blocks: Path, tmp_path: Path, batch_sizes: list[int], cut_layer: int
) -> None:
    steps = 100 if batch_sizes == [2, 2] else 30
    assert_equals_centralised(
        four_blocks,
        tmp_path,
        batch_sizes=batch_sizes,
        steps=steps,
        dtype="float64",
        cut_layer=cut_layer,
    )


def test_run_whose_edge_learns_nothing_equals_it_in_float32_with_devices_without_torch(
    four_blocks: Path, tmp_path: Path
) -> None:
    options = {"edge_adapter": "none", "cut_layer": 2, "labels": "device", "engines": ("onnxruntime", "torch")}
    assert_equals_centralised(four_blocks, tmp_path, batch_sizes=[2, 3], steps=30, dtype="float32", **options)


@pytest.mark.parametrize(
    ("batch_sizes", "cut_layer", "more"),
    [
        ([2, 2], 2, {}),
        ([3, 1], 1, {"micro_batches": 3, "max_grad_norm": CLIPPED}),
        ([2, 1, 2], 3, {"labels": "device", "lora_targets": ("c_attn", "c_proj", "c_fc")}),
    ],
    ids=["two", "clipped", "labels on the device"],
)
def test_run_whose_edge_learns_nothing_equals_centralised_lora_of_the_blocks_behind_the_cut(
    four_blocks: Path, tmp_path: Path, batch_sizes: list[int], cut_layer: int, more: dict[str, Any]
) -> None:
    """PEFT's layers_to_transform; the last third of the steps has samples that the server has kept."""
    options = {"edge_adapter": "none", "cut_layer": cut_layer, **more}
    records = assert_equals_centralised(four_blocks, tmp_path, batch_sizes=batch_sizes, steps=30, dtype="float64", **options)
    first, last = (sum(record.num_bytes for record in some) for some in (records[1:9], records[-9:-1]))
    assert last * (1.5 if "labels" in more else 10) < first


@pytest.mark.parametrize(
    "schedule", [{"lr_schedule": "linear", "warmup_steps": 5}, {"lr_schedule": "cosine", "warmup_ratio": 0.1}]
)
def test_run_equals_centralised_lora_with_all_targets_and_a_schedule(
    four_blocks: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    options = {"lora_targets": ("c_attn", "c_proj", "c_fc"), "cut_layer": 2, **schedule}
    assert_equals_centralised(four_blocks, tmp_path, batch_sizes=[2, 3], steps=30, dtype="float64", **options)


@pytest.mark.parametrize(
    ("batch_sizes", "cut_layer", "labels", "micro_batches"), [([2, 3], 2, "server", 1), ([3, 1, 2], 1, "device", 2)]
)
def test_gradients_of_both_parts_are_clipped_by_their_common_norm_as_in_centralised_lora(
    four_blocks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_sizes: list[int],
    cut_layer: int,
    labels: str,
    micro_batches: int,
) -> None:
    monkeypatch.setattr("test_parity.SHARED", tmp_path)  # other texts have other norms
    records = assert_equals_centralised(
        four_blocks,
        tmp_path,
        batch_sizes=batch_sizes,
        steps=50,
        dtype="float64",
        cut_layer=cut_layer,
        labels=labels,
        micro_batches=micro_batches,
        max_grad_norm=CLIPPED,
    )
    longer = [record.gradient_norm > CLIPPED for record in records]
    assert any(longer)
    assert not all(longer)


@pytest.mark.parametrize("labels", ["server", "device"])
def test_held_out_texts_are_measured_without_smoothing(four_blocks: Path, tmp_path: Path, labels: str) -> None:
    found = []
    for smoothing in (0.0, 0.4):
        federation = Federation(tmp_path, [2], 1)
        (client,) = federation.clients(("torch",)).values()
        server = {"model": str(four_blocks), "run_dir": str(tmp_path / f"run-{smoothing}"), "steps": 1, "dtype": "float64"}
        device = {"a": {**client, "eval_data": client["data"]}}
        result = run_split({**server, "cut_layer": 2, "labels": labels, "label_smoothing": smoothing}, device)
        found.append((result.perplexity["a"][0], result.losses[0]))
    (plain, plain_loss), (smoothed, smoothed_loss) = found
    assert smoothed == plain
    assert abs(smoothed_loss - plain_loss) > 1e-3


@pytest.mark.parametrize(
    ("labels", "engines", "dtype"),
    [
        ("server", ("torch",), "float64"),
        ("device", ("torch",), "float64"),
        ("device", ("onnxruntime", "torch"), "float32"),
        ("server", ("onnxruntime",), "float32"),
    ],
)
def test_labels_are_smoothed_as_in_centralised_lora(
    four_blocks: Path, tmp_path: Path, labels: str, engines: Sequence[str], dtype: str
) -> None:
    options = {"cut_layer": 2, "labels": labels, "micro_batches": 2, "label_smoothing": 0.2}
    assert_equals_centralised(four_blocks, tmp_path, batch_sizes=[2, 3], steps=50, dtype=dtype, engines=engines, **options)


@pytest.mark.parametrize("labels", ["server", "device"])
@pytest.mark.parametrize(
    ("engines", "batch_sizes"),
    [(("torch",), [2, 2]), (("onnxruntime",), [3]), (("onnxruntime", "torch", "onnxruntime"), [2, 1, 2])],
    ids=["torch", "onnxruntime", "devices of each kind"],
)
def test_run_equals_centralised_lora_in_float32(
    four_blocks: Path, tmp_path: Path, engines: Sequence[str], batch_sizes: list[int], labels: str
) -> None:
    assert_equals_centralised(
        four_blocks,
        tmp_path,
        batch_sizes=batch_sizes,
        steps=100 if labels == "server" else 30,
        dtype="float32",
        engines=engines,
        cut_layer=2,
        labels=labels,
    )


# Each number of devices, cut, number of micro-batches and number in flight once with most of the others.
@pytest.mark.parametrize(
    ("batch_sizes", "cut_layer", "micro_batches", "in_flight"),
    [([3], 1, 1, 1), ([3], 3, 3, 2), ([2, 2], 3, 1, 2), ([2, 2, 2], 1, 2, 1), ([4, 1], 3, 3, 3), ([4, 1], 1, 2, 2)],
)
def test_run_whose_labels_stay_on_the_devices_equals_centralised_lora(
    four_blocks: Path, tmp_path: Path, batch_sizes: list[int], cut_layer: int, micro_batches: int, in_flight: int
) -> None:
    assert_equals_centralised(
        four_blocks,
        tmp_path,
        batch_sizes=batch_sizes,
        steps=30,
        dtype="float64",
        cut_layer=cut_layer,
        micro_batches=micro_batches,
        in_flight=in_flight,
        labels="device",
    )


@pytest.mark.parametrize("aggregate_every", [1, 5])
@pytest.mark.parametrize(("batch_sizes", "cut_layer"), [([3], 3), ([2, 2], 1), ([2, 3, 1], 3)], ids=["one", "two", "three"])
def test_run_is_the_same_whoever_has_the_labels(
    four_blocks: Path, tmp_path: Path, batch_sizes: list[int], cut_layer: int, aggregate_every: int
) -> None:
    steps = 30
    federation = Federation(tmp_path, batch_sizes, steps)
    losses, adapters = [], []
    for labels in ("server", "device"):
        run_dir = tmp_path / labels
        server = {"model": str(four_blocks), "run_dir": str(run_dir), "steps": steps, "lr": LEARNING_RATE, "dtype": "float64"}
        more = {"lora_dropout": 0.1, "cut_layer": cut_layer, "aggregate_every": aggregate_every, "labels": labels}
        losses.append(run_split({**server, **more}, federation.clients()).losses)
        adapters.append(reference.read_adapter(run_dir / "adapter"))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= TOLERANCES["float64"][0]
    assert reference.largest_difference(*adapters) <= TOLERANCES["float64"][1]


@pytest.mark.parametrize("labels", ["server", "device"])
def test_figures_of_a_step_equal_those_of_centralised_lora(four_blocks: Path, tmp_path: Path, labels: str) -> None:
    federation, steps = Federation(tmp_path, [2, 3], 5), 5
    start = reference.make_adapter(four_blocks, tmp_path / "start", targets=("c_attn",))
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "init_adapter": str(start)}
    server = {"model": str(four_blocks), "run_dir": str(tmp_path / "run"), "steps": steps, "dtype": "float64", "labels": labels}
    schedule = {"lr": LEARNING_RATE, "lr_schedule": "linear", "warmup_steps": 2}
    records = run_split({**server, **schedule, **lora, "cut_layer": 2}, federation.clients()).records
    model = reference.load_peft(four_blocks, start, torch.float64, is_trainable=True)
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(matrices, lr=LEARNING_RATE, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimiser, 2, steps)
    for record, of_clients in zip(records, federation.batches(four_blocks), strict=True):
        losses = {f"client-{i}": reference.mean_loss(model, samples).item() for i, samples in enumerate(of_clients)}
        reference.mean_loss(model, [sample for samples in of_clients for sample in samples]).backward()
        norm = torch.nn.utils.clip_grad_norm_(matrices, torch.inf).item()
        assert record.losses == pytest.approx(losses, abs=TOLERANCES["float64"][0])
        assert record.gradient_norm == pytest.approx(norm, rel=1e-9)
        assert record.learning_rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        assert record.samples == {f"client-{i}": len(samples) for i, samples in enumerate(of_clients)}
        assert record.labelled == {
            f"client-{i}": sum(len(tokens) - unlabelled for tokens, unlabelled in samples)
            for i, samples in enumerate(of_clients)
        }
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()


@pytest.mark.shared
@pytest.mark.parametrize(("dtype", "cut_layer"), [("float64", 3), ("float32", 3), ("float32", 11)])
def test_run_equals_centralised_lora_on_a_pretrained_model(tmp_path: Path, dtype: str, cut_layer: int) -> None:
    base = shared_path("models/gpt2-mini")
    steps = 100 if cut_layer == 3 else 20
    assert_equals_centralised(base, tmp_path, batch_sizes=[1, 1], steps=steps, dtype=dtype, cut_layer=cut_layer)


def test_one_client_with_long_rounds_equals_centralised_lora(four_blocks: Path, tmp_path: Path) -> None:
    assert_equals_centralised(
        four_blocks,
        tmp_path,
        batch_sizes=[3],
        steps=30,
        dtype="float64",
        cut_layer=2,
        aggregate_every=7,
        lr_schedule="cosine",
        warmup_ratio=0.09,
    )


def test_clients_with_long_rounds_equal_ten_lines_of_federated_averaging(four_blocks: Path, tmp_path: Path) -> None:
    batch_sizes, steps, every, cut = [2, 3, 1], 20, 6, 2
    federation = Federation(tmp_path, batch_sizes, steps)
    start = reference.make_adapter(four_blocks, tmp_path / "start", targets=["c_attn"])
    options = {"lora_rank": 4, "lora_alpha": 8.0, "init_adapter": str(start), "lr": LEARNING_RATE, "dtype": "float64"}
    server = {"model": str(four_blocks), "run_dir": str(tmp_path / "run"), "steps": steps, "aggregate_every": every, **options}
    result = run_split({**server, "cut_layer": cut}, federation.clients())

    # The reference: whole models that share the server's matrices and differ in the edge's, until they are averaged.
    models = [reference.load_peft(four_blocks, start, torch.float64, is_trainable=True) for _ in batch_sizes]
    matrices = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    is_edge = {name: int(name.split(".h.")[1].split(".")[0]) < cut for name in matrices[0]}
    edge_steps = [torch.optim.AdamW([p for n, p in m.items() if is_edge[n]], lr=LEARNING_RATE) for m in matrices]
    server_step = torch.optim.AdamW([p for n, p in matrices[0].items() if not is_edge[n]], lr=LEARNING_RATE)
    losses, tokens = [], [0] * len(models)
    for step, batches in enumerate(federation.batches(four_blocks), 1):
        counts = [sum(len(t) - u for t, u in batch) for batch in batches]
        tokens = [a + b for a, b in zip(tokens, counts, strict=True)]
        parts = [reference.mean_loss(m, b) * c / sum(counts) for m, b, c in zip(models, batches, counts, strict=True)]
        sum(parts).backward()
        losses.append(sum(parts).item())
        for name, matrix in matrices[0].items():
            if not is_edge[name]:
                matrix.grad = sum(m[name].grad for m in matrices)
        for optimiser in [*edge_steps, server_step]:
            optimiser.step()
        for model in models:
            model.zero_grad()
        with torch.no_grad():
            for name in matrices[0]:
                ends = step % every == 0 or step == steps
                mean = sum(m[name] * w / sum(tokens) for m, w in zip(matrices, tokens, strict=True)) if ends else None
                for m in matrices:
                    m[name].copy_(matrices[0][name] if not is_edge[name] else m[name] if mean is None else mean)
        tokens = [0] * len(models) if step % every == 0 else tokens

    assert max(abs(a - b) for a, b in zip(result.losses, losses, strict=True)) <= TOLERANCES["float64"][0]
    expected = {name.replace(".default", ""): matrix.detach() for name, matrix in matrices[0].items()}
    assert reference.largest_difference(reference.read_adapter(tmp_path / "run/adapter"), expected) <= TOLERANCES["float64"][1]


def test_adapter_loaded_by_peft_gives_the_perplexity_the_run_reported_merged_and_unmerged(
    four_blocks: Path, tmp_path: Path
) -> None:
    federation = Federation(tmp_path, [4, 4], 15)
    held_out = rows(30, offset=4000 if (SHARED / "data/e2e/train.txt").exists() else 300)
    clients = federation.clients()
    clients["client-0"]["eval_data"] = write_pairs(tmp_path / "valid.jsonl", held_out)
    run_dir = tmp_path / "run"
    result = run_split(
        {"model": str(four_blocks), "run_dir": str(run_dir), "steps": 15, "lr": LEARNING_RATE, "cut_layer": 2}, clients
    )
    before, after = result.perplexity["client-0"]
    samples = reference.encode(held_out, four_blocks)
    model = reference.load_peft(four_blocks, run_dir / "adapter")
    assert reference.perplexity(reference.load_base(four_blocks), samples) == pytest.approx(before, rel=1e-4)
    assert reference.perplexity(model, samples) == pytest.approx(after, rel=1e-4)
    ids, _ = reference.pad(samples[:4])
    with torch.no_grad():
        merged = copy.deepcopy(model).merge_and_unload()
        assert (merged(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4
    assert after < before
