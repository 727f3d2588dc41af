"""
Every run ends with the adapter that an undisturbed run gives, to the bit, whatever is killed, cut off or said twice.

Here are runs with several faults; test_chaos_short_rounds.py and test_chaos_long_rounds.py have one at every single message.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos import Fault, Outcome, Scene


@pytest.mark.parametrize("number", [11, 12, 13])
def test_device_that_is_killed_after_its_server_went_back_remembers_nothing_that_was_taken_back(
    scene: Scene, tmp_path: Path, number: int
) -> None:
    (tmp_path / "undisturbed").mkdir()
    twice = {"epochs": 2, "checkpoint_every": 1000}  # the server goes back to the beginning
    undisturbed = scene.run(tmp_path / "undisturbed", "rounds of two steps", [], **twice).to_its_end()
    faults = [Fault("server", "send", 17, "kill"), Fault("a", "receive", number, "kill")]
    outcome = scene.run(tmp_path, "rounds of two steps", faults, **twice).to_its_end()
    assert outcome.struck == ["kill", "kill"]
    assert outcome.differences(undisturbed) == []


@pytest.mark.parametrize("seed", range(20))
def test_run_disturbed_at_random_gives_them_too(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, seed: int
) -> None:
    mode, outcome = scene.run_at_random(tmp_path, seed)
    assert outcome.differences(undisturbed(mode)) == []


@pytest.mark.parametrize("seed", range(100, 108))
def test_run_that_may_go_on_without_whoever_is_late_ends_well_for_all(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, seed: int
) -> None:
    """Who is late is for the clock to say, and so is the adapter; but nobody is refused, and no step is lost or taken twice."""
    mode, outcome = scene.run_at_random(tmp_path, seed, quorum=1, step_deadline=0.03)
    assert len(outcome.losses) == len(undisturbed(mode).losses)
    assert all(map(math.isfinite, outcome.losses))


@pytest.mark.parametrize(("mode", "warmup_steps"), [("rounds of one step", 0), ("rounds of two steps", 3)])
def test_run_with_a_falling_learning_rate_falls_the_same_way_whoever_is_killed(
    scene: Scene, tmp_path: Path, mode: str, warmup_steps: int
) -> None:
    options: dict[str, Any] = {"epochs": 2, "steps": None, "lr_schedule": "linear", "warmup_steps": warmup_steps}
    faults = {
        "nobody": [],
        "the server": [Fault("server", "receive", 17, "kill"), Fault("server", "send", 12, "kill", life=2)],
        "a device": [Fault("b", "send", 9, "kill"), Fault("b", "receive", 7, "kill", life=2)],
        "all": [Fault(name, "receive", 10, "kill") for name in ("server", "a", "b")],
    }
    outcomes = {}
    for killed, of_them in faults.items():
        (tmp_path / killed).mkdir()
        outcomes[killed] = scene.run(tmp_path / killed, mode, of_them, **options).to_its_end()
        assert len(outcomes[killed].struck) == len(of_them)
        assert outcomes[killed].differences(outcomes["nobody"]) == []
    (tmp_path / "constant").mkdir()
    constant = scene.run(tmp_path / "constant", mode, [], **{**options, "lr_schedule": "constant"}).to_its_end()
    assert constant.differences(outcomes["nobody"]) == ["adapter", "losses", "perplexity"]
