"""
A run with rounds of one step gives the adapter of an undisturbed one, to the bit, whatever is killed, cut off or said twice.

It happens at every single message in turn; test_chaos.py has several faults in a run.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import Fault, Outcome, Scene, every_fault, named

MODE = "rounds of one step"
CLIPPED = "clipped, rounds of one step"


@pytest.mark.parametrize("faults", every_fault(MODE), ids=named)
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, faults: list[Fault]
) -> None:
    outcome = scene.run(tmp_path, MODE, faults).to_its_end()
    assert outcome.struck == [fault.what for fault in faults]
    assert outcome.differences(undisturbed(MODE)) == []


KILLS_OF_THE_SERVER = [
    fault for fault, *_ in every_fault(CLIPPED) if (fault.what, fault.process, fault.event) == ("kill", "server", "receive")
]


@pytest.mark.parametrize("fault", KILLS_OF_THE_SERVER, ids=str)
def test_disturbed_run_whose_gradients_are_clipped_gives_them_too(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, fault: Fault
) -> None:
    """The server's step waits for the devices' gradients; killed in between, the server begins it again."""
    outcome = scene.run(tmp_path, CLIPPED, [fault]).to_its_end()
    assert outcome.struck == [fault.what]
    assert outcome.differences(undisturbed(CLIPPED)) == []


def test_gradients_are_clipped_in_these_runs(undisturbed: Callable[[str], Outcome]) -> None:
    assert undisturbed(CLIPPED).differences(undisturbed(MODE)) == ["adapter", "losses", "perplexity"]
