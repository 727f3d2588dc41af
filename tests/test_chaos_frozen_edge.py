"""
A run whose edge learns nothing gives the adapter of an undisturbed one, to the bit, whatever is killed, cut off or said twice.

It happens at every single message in turn. In client a's second epoch both sides have to agree on what the server has kept.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import Fault, Outcome, Scene, every_fault, named

MODE = "nothing learnt on the edge"
ON_DEVICE = "nothing learnt on the edge, labels on the device"


@pytest.mark.parametrize("faults", every_fault(MODE), ids=named)
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, faults: list[Fault]
) -> None:
    outcome = scene.run(tmp_path, MODE, faults).to_its_end()
    assert outcome.struck == [fault.what for fault in faults]
    assert outcome.differences(undisturbed(MODE)) == []


@pytest.mark.parametrize(
    "fault", [fault for fault, *_ in every_fault(ON_DEVICE) if (fault.what, fault.event) == ("kill", "receive")], ids=str
)
def test_with_a_codec_noise_and_labels_on_the_device_too(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, fault: Fault
) -> None:
    outcome = scene.run(tmp_path, ON_DEVICE, [fault]).to_its_end()
    assert outcome.struck == [fault.what]
    assert outcome.differences(undisturbed(ON_DEVICE)) == []
