"""
A run ends early, and with its best adapter, exactly where transformers' trainer would have ended it.

What comes out is held to runs that nobody ends: one that was to have no more steps, and one of as many as the best.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chaos import Fault, Outcome, Scene
from conftest import adapter_bytes, metrics, run_split
from protocol_samples import SETTINGS
from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer_callback import EarlyStoppingCallback

from gpu_server import ConfigError, GpuServer, ServerConfig
from gpu_server.federation import EarlyStopping
from gpu_server.federation.early_stopping import Judgement
from gpu_server.history import RunFiles
from protocol import HeldOutLoss


def transformers_verdicts(losses: Sequence[float], patience: int, threshold: float) -> list[tuple[bool, float]]:
    """After each evaluation: whether training stops, and which loss is the best."""
    arguments = SimpleNamespace(
        metric_for_best_model="loss", greater_is_better=False, load_best_model_at_end=True, save_strategy="no"
    )
    trainer: Any = SimpleNamespace(args=arguments, state=TrainerState())
    callback: Any = EarlyStoppingCallback(patience, threshold)
    control, verdicts = TrainerControl(), []
    for loss in losses:
        callback.on_evaluate(arguments, trainer.state, control, {"eval_loss": loss})
        Trainer._determine_best_metric(trainer, {"eval_loss": loss}, trial=None)
        assert trainer.state.best_metric is not None
        verdicts.append((control.should_training_stop, trainer.state.best_metric))
        if control.should_training_stop:
            break
    return verdicts


def told(loss: float, labelled_tokens: int = 1) -> HeldOutLoss:
    return HeldOutLoss(step=1, loss=loss, labelled_tokens=labelled_tokens)


@pytest.mark.parametrize("seed", range(30))
def test_it_judges_as_transformers_callback_and_trainer_do(seed: int) -> None:
    draw = np.random.default_rng(seed)
    patience, threshold = int(draw.integers(1, 4)), float(draw.choice([0.0, 0.05, 0.3]))
    losses = np.round(
        2.0 + draw.normal(0, 0.3, 40) - draw.choice([0.0, 0.03]) * np.arange(40), int(draw.choice([1, 6]))
    ).tolist()
    judge, found = EarlyStopping(patience, threshold), []
    for step, loss in enumerate(losses, 1):
        judge.judge(Judgement.of(step, {"a": told(loss)}))
        assert judge.best is not None
        found.append((judge.ends_run, judge.best.loss))
        assert losses[judge.best_step - 1] == judge.best.loss
        if judge.ends_run:
            break
    assert found == transformers_verdicts(losses, patience, threshold)
    again = EarlyStopping(patience, threshold)
    again.restore(judge.state())
    assert vars(again) == vars(judge)


def test_losses_of_several_devices_are_one_by_their_tokens() -> None:
    judgement = Judgement.of(3, {"b": told(2.0, 30), "a": told(1.0, 10)})
    assert judgement == Judgement(step=3, loss=1.75, clients=("a", "b"))


def test_losses_of_other_devices_begin_a_comparison_anew() -> None:
    judge = EarlyStopping(2)
    for step, (loss, *names) in enumerate([(1.0, "a"), (1.5, "a"), (3.0, "a", "b"), (3.5, "a", "b"), (2.9, "a", "b")], 1):
        judge.judge(Judgement.of(step, {str(name): told(float(loss)) for name in names}))
        assert not judge.ends_run
    assert judge.best_step == 5


def test_run_without_these_settings_has_no_judge() -> None:
    assert EarlyStopping.in_run(SETTINGS, 0.0) is None


def test_threshold_without_patience_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^early-stopping-threshold 0.1 is for runs that may end early: add --early-"):
        ServerConfig(model="m", run_dir="r", steps=1, early_stopping_threshold=0.1)


STEPS = 24
EVERY = 2
KINDS: dict[str, dict[str, Any]] = {
    "rounds of one step": {},
    "rounds of two steps": {"aggregate_every": 2},
    "labels on the device": {"labels": "device"},
}


@pytest.fixture
def settings(tiny_model: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "cut_layer": 2,
        "lora_rank": 4,
        "steps": STEPS,
        "lr": 1e-1,
        "micro_batches": 2,
        "check_codec_every": 0,
    }


@pytest.fixture
def devices(pairs_file: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, dict[str, Any]]]:
    """Two, of which both have held-out texts; and one that has none, and is done earlier if a run has epochs."""

    def of_run(run: str, number: int = 3, **more: Any) -> dict[str, dict[str, Any]]:
        texts = {"a": 6, "b": 7, "c": 3}
        made: dict[str, dict[str, Any]] = {
            name: {
                "data": pairs_file(name, texts[name], offset=10 * place),
                "batch_size": 3,
                "state_dir": tmp_path / run / name,
            }
            for place, name in enumerate(list(texts)[:number])
        }
        for place, name in enumerate("ab"):
            made[name] |= {"eval_data": pairs_file(f"held-out-{name}", 4 + place, offset=50 + 9 * place), "eval_every": EVERY}
        return {name: {**options, **more} for name, options in made.items()}

    return of_run


def train(options: dict[str, Any], run_dir: Path, clients: dict[str, dict[str, Any]]) -> list[str]:
    """A run; what its events say."""
    run_split({**options, "run_dir": str(run_dir)}, clients)
    return [event.text for event in RunFiles(run_dir).events()]


def combined(run_dir: Path) -> dict[int, float]:
    """By step: what all held-out texts lost together."""
    by_step: dict[int, list[Any]] = {}
    for record in RunFiles(run_dir).evaluations():
        by_step.setdefault(record.step, []).append(record)
    return {
        step: math.fsum(each.loss * each.labelled_tokens for each in records) / sum(each.labelled_tokens for each in records)
        for step, records in by_step.items()
        if len(records) == 2
    }


@pytest.mark.parametrize("kind", KINDS)
def test_run_ends_where_transformers_would_have_ended_it_with_the_last_adapter_or_the_best(
    settings: dict[str, Any], devices: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path, kind: str
) -> None:
    options = {**settings, **KINDS[kind]}
    train(options, tmp_path / "whole", devices("whole"))
    losses = {step: loss for step, loss in combined(tmp_path / "whole").items() if step}
    verdicts = transformers_verdicts(list(losses.values()), 2, 0.0)
    last, best = list(losses)[len(verdicts) - 1], next(step for step, loss in losses.items() if loss == verdicts[-1][1])
    assert verdicts[-1][0], losses
    assert 0 < best < last < STEPS, losses  # or this would show nothing

    for final in ("last", "best"):
        early = {**options, "early_stopping_patience": 2, "final_adapter": final}
        events = train(early, tmp_path / final, devices(final))
        assert [row["loss"] for row in metrics(tmp_path / final)] == [row["loss"] for row in metrics(tmp_path / "whole")][:last]
        assert any(text.startswith(f"the run ends early, after step {last}: in 2 evaluations") for text in events)
        assert {step: loss for step, loss in combined(tmp_path / final).items() if step} == {
            step: loss for step, loss in losses.items() if step <= last
        }
        description = RunFiles(tmp_path / final).description
        assert description.adapter == {"step": last, "of": last, **({"best_step": best} if final == "best" else {})}
        assert any(text.startswith(f"the run ends with the adapter of step {best}, ") for text in events) == (final == "best")
    for steps, final in ((last, "last"), (best, "best")):
        train({**options, "steps": steps}, tmp_path / f"{steps} steps", devices(f"{steps} steps"))
        assert adapter_bytes(tmp_path / final) == adapter_bytes(tmp_path / f"{steps} steps")

    # The last step may be the best one, too: then both are in one checkpoint.
    train({**options, "steps": best, "final_adapter": "best"}, tmp_path / "best is last", devices("best is last"))
    assert adapter_bytes(tmp_path / "best is last") == adapter_bytes(tmp_path / "best")


def test_run_that_has_ended_early_is_not_made_longer_and_no_larger_number_of_steps_is_advised(
    settings: dict[str, Any],
    devices: Callable[..., dict[str, dict[str, Any]]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_dir = str(tmp_path / "run")
    train({**settings, "early_stopping_patience": 1, "early_stopping_threshold": 1e3}, tmp_path / "run", devices("run", 2))
    caplog.set_level("INFO", "gpu_server")
    with GpuServer(resume=True, run_dir=run_dir, port=0, linger=0.1) as server:
        assert list(server.train()) == []
    (done,) = [record.message for record in caplog.records if record.message.startswith("all 4 steps of this run are done")]
    assert "to train further: another run with --init-adapter" in done
    longer = GpuServer(resume=True, run_dir=run_dir, port=0, steps=2 * STEPS)
    with (
        pytest.raises(ConfigError, match="go on to step 48: held-out losses have ended it after step 4; its"),
        longer,
    ):
        pass


def test_device_that_is_killed_and_a_server_that_goes_back_end_early_as_if_nothing_had_been(
    scene: Scene, tmp_path: Path
) -> None:
    """About when the loss is judged that ends the run, and when all are told so."""
    early = {"steps": 12, "lr": 0.3, "early_stopping_patience": 1, "final_adapter": "best", "lora_dropout": 0.0}

    def outcome_of(*faults: Fault) -> Outcome:
        folder = tmp_path / "-".join(map(str, faults))
        folder.mkdir(exist_ok=True)
        run = scene.run(folder, "rounds of one step", list(faults), **early)
        run.clients["a"]["eval_every"] = 1
        outcome = run.to_its_end()
        assert outcome.struck == [fault.what for fault in faults]
        assert "ended_early" in [event.kind for event in RunFiles(run.run_dir).events()]
        return outcome

    undisturbed = outcome_of()
    steps = len(undisturbed.losses)
    assert 1 < steps < 12
    # In a step the server gets 8 messages, and the device that evaluates 5.
    for fault in (
        Fault("server", "receive", 8 * steps + 3, "kill"),
        Fault("server", "receive", 8 * steps + 10, "kill"),
        Fault("server", "send", 8 * steps + 8, "kill"),
        Fault("a", "receive", 5 * steps + 2, "kill"),
    ):
        assert outcome_of(fault).differences(undisturbed) == []
