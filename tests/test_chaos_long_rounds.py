"""
A run with rounds of two steps gives the adapter of an undisturbed one, to the bit, whatever is killed, cut off or said twice.

It happens at every single message in turn; test_chaos.py has several faults in a run.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import Fault, Outcome, Scene, every_fault, named

MODE = "rounds of two steps"


@pytest.mark.parametrize("faults", every_fault(MODE), ids=named)
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, faults: list[Fault]
) -> None:
    outcome = scene.run(tmp_path, MODE, faults).to_its_end()
    assert outcome.struck == [fault.what for fault in faults]
    assert outcome.differences(undisturbed(MODE)) == []
