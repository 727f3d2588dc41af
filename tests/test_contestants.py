"""Ways to train that split nothing learn what split learning learns where theory says so, and leave the same files behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import adapter_bytes, metrics, run_split
from test_parity import LEARNING_RATE, TOLERANCES, Federation, rows, write_pairs

from contestants.centralised import Centralised
from contestants.cli import main
from contestants.federated import Federated, mean
from contestants.training import Task, train
from gpu_server import ServerConfig, ServerError
from gpu_server.history import Overview, RunFiles
from gpu_server.sweep.settings import DeviceConfig, device_names
from storage import RunDescription

STEPS = 12
WAYS: dict[str, Callable[..., Any]] = {
    "centralised": lambda task, model: Centralised(model, task.settings, task.num_bytes()),
    "federated": lambda task, model: Federated(model, task.settings, task.names),
}


def run(mode: str, files: list[Path], device: dict[str, Any] | None = None, **options: Any) -> Path:
    """Train, and give the run's folder."""
    more = {name: options.pop(name) for name in ("eval_data", "eval_every") if name in options}
    config = ServerConfig.from_options({"clients": len(files), "lr": LEARNING_RATE, "dtype": "float32", **options})
    task = Task(mode=mode, config=config, device=DeviceConfig(**(device or {})), files=files, **more)
    model = task.model()
    train(task, model, WAYS[mode](task, model))
    return Path(config.run_dir)


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics(run_dir)]


def largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def difference(run_dir: Path, other: Path) -> float:
    """Of two runs' adapters, the largest."""
    return reference.largest_difference(*(reference.read_adapter(each / "adapter") for each in (run_dir, other)))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of three clients, of different sizes, each gone through more than once."""
    return [write_pairs(tmp_path / f"data-{i}.jsonl", rows(7 + i, offset=10 * i)) for i in range(3)]


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """The start is no zero adapter: all matrices learn from the first step on."""
    start = reference.make_adapter(tiny_model, tmp_path / "start", targets=["c_attn"])
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "init_adapter": str(start)}
    return {"model": str(tiny_model), "steps": STEPS, "lr_schedule": "linear", "warmup_steps": 3, **lora}


CLIPPED: dict[str, Any] = {"lr_schedule": "cosine", "warmup_steps": 0, "warmup_ratio": 0.2, "max_grad_norm": 0.2}
"""A schedule, and a norm that some steps' gradients exceed."""
SMOOTHED: dict[str, Any] = {"label_smoothing": 0.2}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize(("dtype", "more"), [("float32", {}), ("float64", {}), ("float64", CLIPPED), ("float64", SMOOTHED)])
def test_centralised_equals_split_in_rounds_of_one_step(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, dtype: str, more: dict[str, Any], number: int
) -> None:
    data, server = files[:number], {**settings, "dtype": dtype, "lr": LEARNING_RATE, **more}
    clients = {name: {"data": path, "batch_size": 2} for name, path in zip(device_names(number), data, strict=True)}
    split = run_split({**server, "run_dir": str(tmp_path / "split"), "cut_layer": 2}, clients)
    centralised = run("centralised", data, {"batch_size": 2}, **server, run_dir=str(tmp_path / "centralised"))
    tolerance = TOLERANCES[dtype]
    assert largest(losses(centralised), split.losses) <= tolerance[0]
    assert difference(centralised, split.run_dir) <= tolerance[1]
    assert [row["learning_rate"] for row in metrics(centralised)] == [record.learning_rate for record in split.records]


@pytest.mark.parametrize("mode", WAYS)
def test_rank_stabilised_scale_is_that_of_a_split_run(tiny_model: Path, files: list[Path], tmp_path: Path, mode: str) -> None:
    lora = {"lora_rank": 4, "lora_rslora": True, "lora_targets": "all-linear"}
    server = {"model": str(tiny_model), "steps": 5, "dtype": "float32", "lr": LEARNING_RATE, **lora}
    split = run_split(
        {**server, "run_dir": str(tmp_path / "split"), "cut_layer": 2}, {"device-1": {"data": files[0], "batch_size": 2}}
    )
    other = run(mode, files[:1], {"batch_size": 2}, **server, run_dir=str(tmp_path / mode))
    assert largest(losses(other), split.losses) <= TOLERANCES["float32"][0]
    assert difference(other, split.run_dir) <= TOLERANCES["float32"][1]
    told = RunDescription.read(other, ServerError)
    assert told is not None
    assert (told.config["lora_rslora"], told.config["lora_targets"]) == (True, ["c_attn", "c_proj", "c_fc"])


@pytest.mark.parametrize("epochs", [2])
def test_client_whose_data_ends_earlier_leaves_as_in_a_split_run(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, epochs: int
) -> None:
    server = {**{name: value for name, value in settings.items() if name != "steps"}, "epochs": epochs, "lr": LEARNING_RATE}
    clients = {name: {"data": path, "batch_size": 3} for name, path in zip(device_names(3), files, strict=True)}
    split = run_split({**server, "run_dir": str(tmp_path / "split"), "cut_layer": 1, "dtype": "float32"}, clients)
    centralised = run("centralised", files, {"batch_size": 3}, **server, run_dir=str(tmp_path / "centralised"))
    assert largest(losses(centralised), split.losses) <= TOLERANCES["float32"][0]
    assert [row["labelled_tokens"] for row in metrics(centralised)] == [record.labelled_tokens for record in split.records]


@pytest.mark.parametrize("more", [{}, CLIPPED, SMOOTHED], ids=["", "clipped", "smoothed"])
def test_federated_in_rounds_of_one_step_equals_centralised(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    settings = {**settings, **more}
    runs = {mode: run(mode, files, {"batch_size": 2}, **settings, run_dir=str(tmp_path / mode)) for mode in WAYS}
    assert largest(losses(runs["federated"]), losses(runs["centralised"])) <= TOLERANCES["float32"][0]
    assert difference(*runs.values()) <= TOLERANCES["float32"][1]
    norms = [[row["gradient_norm"] for row in metrics(folder)] for folder in runs.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_one_federated_client_learns_as_centralised_however_long_its_rounds_are(
    settings: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    centralised = run("centralised", files[:1], {"batch_size": 2}, **settings, run_dir=str(tmp_path / "centralised"))
    federated = run("federated", files[:1], {"batch_size": 2}, **settings, aggregate_every=5, run_dir=str(tmp_path / "f"))
    assert losses(federated) == losses(centralised)
    assert adapter_bytes(federated) == adapter_bytes(centralised)


def test_first_round_of_federated_and_split_begins_with_the_same_loss_and_they_part_afterwards(
    settings: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    """Their server part learns from everybody at each step, ours does not: only before the first step is all the same."""
    server = {**settings, "aggregate_every": 4, "lr": LEARNING_RATE, "dtype": "float32"}
    clients = {name: {"data": path, "batch_size": 2} for name, path in zip(device_names(3), files, strict=True)}
    split = run_split({**server, "run_dir": str(tmp_path / "split"), "cut_layer": 2}, clients)
    federated = run("federated", files, {"batch_size": 2}, **server, run_dir=str(tmp_path / "federated"))
    # The warm-up's first rate is 0.
    assert largest(losses(federated)[:2], split.losses[:2]) <= TOLERANCES["float32"][0]
    assert largest(losses(federated), split.losses) > TOLERANCES["float32"][0]


def test_federated_with_long_rounds_equals_averaged_models_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    batch_size, steps, every = 2, 10, 4
    federation = Federation(tmp_path, [batch_size] * 3, steps)
    start = reference.make_adapter(tiny_model, tmp_path / "start", targets=["c_attn"])
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "init_adapter": str(start)}
    options = {"model": str(tiny_model), "steps": steps, "aggregate_every": every, "dtype": "float64", **lora}
    device = {"batch_size": batch_size, "no_shuffle": True}
    found = run("federated", federation.files, device, **options, run_dir=str(tmp_path / "run"))

    models = [reference.load_peft(tiny_model, start, torch.float64, is_trainable=True) for _ in federation.files]
    matrices = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    optimisers = [torch.optim.AdamW(of_model.values(), lr=LEARNING_RATE) for of_model in matrices]
    expected, tokens = [], [0] * len(models)
    for step, batches in enumerate(federation.batches(tiny_model), 1):
        counts = [sum(len(ids) - unlabelled for ids, unlabelled in batch) for batch in batches]
        tokens = [a + b for a, b in zip(tokens, counts, strict=True)]
        means = [reference.mean_loss(model, batch) for model, batch in zip(models, batches, strict=True)]
        expected.append(sum(loss.item() * number for loss, number in zip(means, counts, strict=True)) / sum(counts))
        for loss, optimiser in zip(means, optimisers, strict=True):
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                for name in matrices[0]:
                    average = sum(m[name] * number / sum(tokens) for m, number in zip(matrices, tokens, strict=True))
                    for of_model in matrices:
                        of_model[name].copy_(average)
            tokens = [0] * len(models)
    assert largest(losses(found), expected) <= TOLERANCES["float64"][0]
    adapter = {name.replace(".default", ""): matrix.detach() for name, matrix in matrices[0].items()}
    assert reference.largest_difference(reference.read_adapter(found / "adapter"), adapter) <= TOLERANCES["float64"][1]


def test_held_out_loss_is_the_one_that_peft_computes_at_the_steps_that_were_asked_for(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, tiny_model: Path
) -> None:
    held_out = rows(9, offset=60)
    options = {"eval_data": write_pairs(tmp_path / "valid.jsonl", held_out), "eval_every": 5, "aggregate_every": 3}
    found = run("federated", files, {"batch_size": 2}, **settings, **options, run_dir=str(tmp_path / "run"))
    evaluations = list(RunFiles(found).evaluations())
    assert [record.step for record in evaluations] == [0, 6, STEPS]  # at the ends of rounds
    assert {record.client for record in evaluations} == {"device-1"}
    samples = reference.encode(held_out, tiny_model)
    for record, folder in ((evaluations[0], tmp_path / "start"), (evaluations[-1], found / "adapter")):
        model = reference.load_peft(tiny_model, folder)
        assert record.perplexity == pytest.approx(reference.perplexity(model, samples), rel=1e-4)
    assert evaluations[-1].loss < evaluations[0].loss


@pytest.mark.parametrize("every", [1, 3])
def test_all_ways_are_evaluated_after_the_same_steps_and_lose_the_same_where_they_learn_the_same(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, every: int
) -> None:
    valid = write_pairs(tmp_path / "valid.jsonl", rows(9, offset=60))
    clients: dict[str, dict[str, Any]] = {
        name: {"data": path, "batch_size": 2} for name, path in zip(device_names(2), files, strict=False)
    }
    clients["device-1"] |= {"eval_data": valid, "eval_every": 4}
    server = {**settings, "lr": LEARNING_RATE, "dtype": "float32", "cut_layer": 1, "run_dir": str(tmp_path / "split")}
    folders = [run_split({**server, "aggregate_every": every}, clients).run_dir]
    for mode in WAYS if every == 1 else ("federated",):
        more = {"aggregate_every": every, "run_dir": str(tmp_path / mode), "eval_data": valid, "eval_every": 4}
        folders.append(run(mode, files[:2], {"batch_size": 2}, **settings, **more))
    split, *others = (list(RunFiles(folder).evaluations()) for folder in folders)
    assert [record.step for record in split] == ([0, 4, 8, STEPS] if every == 1 else [0, 6, 9, STEPS])
    for found in others:
        assert [(record.step, record.client, record.labelled_tokens) for record in found] == [
            (record.step, record.client, record.labelled_tokens) for record in split
        ]
        compared = len(split) if every == 1 else 1
        differences = [abs(a.loss - b.loss) for a, b in zip(split, found, strict=True)]
        assert max(differences[:compared]) <= TOLERANCES["float32"][0]


def test_federated_counts_the_bytes_of_adapters_and_centralised_those_of_texts(
    settings: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    federated = metrics(run("federated", files, **settings, aggregate_every=5, run_dir=str(tmp_path / "federated")))
    adapter = reference.read_adapter(tmp_path / "federated/adapter")
    size = sum(matrix.numel() * 4 for matrix in adapter.values())
    for row in federated:
        ends_round = row["step"] in (5, 10, STEPS)
        for client in row["clients"].values():
            # float32 compresses by its exponents alone.
            for direction in ("bytes_up", "bytes_down"):
                assert (0.7 * size < client[direction] < 1.1 * size) if ends_round else client[direction] == 0
    first, *later = metrics(run("centralised", files, **settings, run_dir=str(tmp_path / "centralised")))
    assert [client["bytes_up"] for client in first["clients"].values()] == [path.stat().st_size for path in files]
    assert not any(client["bytes_up"] or client["bytes_down"] for row in later for client in row["clients"].values())


@pytest.mark.parametrize("mode", WAYS)
def test_run_is_described_by_the_settings_that_mean_something_to_it(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, mode: str
) -> None:
    folder = run(mode, files, {"batch_size": 3}, **settings, run_dir=str(tmp_path / "run"))
    description = RunDescription.read(folder, ValueError)
    assert description is not None
    assert description.config["mode"] == mode
    assert description.config["batch_size"] == 3
    assert description.adapter == {"step": STEPS, "of": STEPS}
    assert ("aggregate_every" in description.config) == (mode == "federated")
    assert not {"cut_layer", "codec", "port", "in_flight"} & description.config.keys()
    events = list(RunFiles(folder).events())
    assert [event.kind for event in events] == ["joined"] * 3 + ["training_started", "complete"]
    assert events[3].details["total_steps"] == STEPS  # by which it is known how far the run is
    assert sum(row["clients"]["device-1"]["samples"] for row in metrics(folder)) > 0
    assert Overview.of_files(RunFiles(folder)).as_json(0.0)["state"] == "finished"


def test_mean_is_weighted() -> None:
    adapters = [{"A": np.full((1, 2), value, np.float32)} for value in (1.0, 4.0)]
    assert mean(adapters)["A"].tolist() == [[2.5, 2.5]]
    assert mean(adapters, [2, 1])["A"].tolist() == [[2.0, 2.0]]
    assert mean(adapters)["A"].dtype == np.float32


def flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def test_program_trains_and_repeats_itself_to_the_bit(settings: dict[str, Any], files: list[Path], tmp_path: Path) -> None:
    options = {**settings, "lora_dropout": 0.1, "token_folder": tmp_path / "tokens", "batch_size": 2}
    data = [f"--data={path}" for path in files]
    for name in ("one", "two"):
        assert main(["federated", "--run-dir", str(tmp_path / name), "--aggregate-every=4", *flags(options), *data]) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert adapter_bytes(tmp_path / "one") == adapter_bytes(tmp_path / "two")
    without = run("federated", files, {"batch_size": 2}, **settings, aggregate_every=4, run_dir=str(tmp_path / "without"))
    assert losses(without) != losses(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"eval_every": 0}, "eval-every must be at least 1, got 0"),
        ({"batch_size": 0}, "batch-size must be at least 1, got 0"),
        ({"lora_rank": 0}, "lora-rank must be"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"lr": 1e12}, "in step"),
    ],
)
def test_bad_input_is_told_in_a_sentence(
    settings: dict[str, Any], files: list[Path], tmp_path: Path, changes: dict[str, Any], words: str, capsys: Any
) -> None:
    options = {**settings, "lr_schedule": "constant", "warmup_steps": 0, "run_dir": tmp_path / "run", **changes}
    assert main(["centralised", f"--data={files[0]}", *flags(options)]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_folder_with_a_run_is_left_as_it_is(settings: dict[str, Any], files: list[Path], tmp_path: Path, capsys: Any) -> None:
    folder = run("centralised", files, **settings, run_dir=str(tmp_path / "run"))
    before = adapter_bytes(folder)
    assert main(["centralised", f"--data={files[0]}", *flags({**settings, "run_dir": folder})]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert adapter_bytes(folder) == before


def test_setting_of_splitting_is_unknown(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["centralised", "--cut-layer=2"])
    assert "there is no --cut-layer" in capsys.readouterr().err
