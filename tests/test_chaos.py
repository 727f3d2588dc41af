"""Every run ends with the adapter that an undisturbed run gives, to the bit, whatever is killed, cut off or said twice."""

import math
from pathlib import Path

import pytest
from chaos import ANSWERS, ANSWERS_OF_BOTH, MODES, MODES_WITH_CODECS, Fault, Outcome, Scene
from conftest import make_model


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    folder = tmp_path_factory.mktemp("scene")
    return Scene(folder, make_model(folder, n_layer=2, n_embd=16, n_head=2))


@pytest.fixture(scope="module")
def undisturbed(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    outcomes = {mode: scene.run(tmp_path_factory.mktemp("undisturbed"), mode, []).to_its_end() for mode in MODES_WITH_CODECS}
    assert not any(outcome.struck or math.isnan(outcome.perplexity) for outcome in outcomes.values())
    return outcomes


def every_fault(mode: str) -> list[Fault]:
    """At every message that the server or client a sends or receives. Both clients' messages pass the server."""
    answers, of_both = ANSWERS[mode]["a"], ANSWERS_OF_BOTH[mode]
    # The client's last message is its Goodbye, which has no answer.
    counts = [
        ("a", "send", answers + 1),
        ("a", "receive", answers),
        ("server", "receive", of_both + 1),
        ("server", "send", of_both),
    ]
    points = [(process, event, number) for process, event, count in counts for number in range(1, count + 1)]
    faults = [Fault(*point, what) for point in points for what in ("kill", "cut")]
    return faults + [Fault(*point, "twice") for point in points if point[1] == "send"]


def assert_same(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.losses == undisturbed.losses
    assert outcome.adapter == undisturbed.adapter
    assert outcome.perplexity == undisturbed.perplexity or math.isnan(outcome.perplexity)


CASES = [(mode, fault) for mode in MODES for fault in every_fault(mode)]


@pytest.mark.parametrize(("mode", "fault"), CASES, ids=[f"{mode}-{fault}" for mode, fault in CASES])
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: dict[str, Outcome], tmp_path: Path, mode: str, fault: Fault
) -> None:
    outcome = scene.run(tmp_path, mode, [fault]).to_its_end()
    assert outcome.struck == [fault.what]
    assert_same(outcome, undisturbed[mode])


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
    assert_same(outcome, undisturbed)


@pytest.mark.parametrize("seed", range(20))
def test_run_disturbed_at_random_gives_them_too(
    scene: Scene, undisturbed: dict[str, Outcome], tmp_path: Path, seed: int
) -> None:
    mode, outcome = scene.run_at_random(tmp_path, seed)
    assert_same(outcome, undisturbed[mode])


def test_runs_that_go_on_without_whoever_is_late_end_well_for_all(
    scene: Scene, undisturbed: dict[str, Outcome], tmp_path: Path
) -> None:
    """Who is late is for the clock to say, and so is the adapter; but nobody is refused, and no step is lost or taken twice."""
    differing = 0
    for seed in range(100, 108):
        (tmp_path / str(seed)).mkdir()
        mode, outcome = scene.run_at_random(tmp_path / str(seed), seed, quorum=1, step_deadline=0.03)
        assert len(outcome.losses) == len(undisturbed[mode].losses)
        assert all(map(math.isfinite, outcome.losses))
        differing += outcome.losses != undisturbed[mode].losses
    assert differing  # else none of them went on without anybody
