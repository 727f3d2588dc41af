"""
Devices that fetch their part of the model, and compute it with onnxruntime, give to the bit what undisturbed ones give,
whatever happens to one of them: while it asks for its part, between two pieces, in the run.
"""

from pathlib import Path

import pytest
from chaos import Fault, Outcome, Scene

MODE = "rounds of two steps"


@pytest.fixture(scope="module")
def undisturbed(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return scene.run(tmp_path_factory.mktemp("undisturbed"), MODE, [], engine="onnxruntime").to_its_end()


@pytest.mark.parametrize("number", range(1, 23, 2))
@pytest.mark.parametrize(("event", "what"), [("send", "cut"), ("receive", "kill")])
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: Outcome, tmp_path: Path, number: int, event: str, what: str
) -> None:
    outcome = scene.run(tmp_path, MODE, [Fault("a", event, number, what)], engine="onnxruntime").to_its_end()
    assert outcome.differences(undisturbed) == []
    assert outcome.struck == [what]
