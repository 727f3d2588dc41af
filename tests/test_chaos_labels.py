"""
Where devices have the labels, a run ends to the bit as an undisturbed one, whatever is killed, cut off or said twice: also
between what a device is asked back and what it replies. All that it says again is the same, with its dither and its noise.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from chaos import Fault, Outcome, Scene, num_answers

MODES = ["labels on the device, rounds of one step", "labels on the device, rounds of two steps"]
KINDS = {
    ("a", "send"): ("cut", "twice", "kill"),
    ("a", "receive"): ("kill", "cut"),
    ("server", "send"): ("twice", "cut", "kill"),
}


def faults(mode: str) -> list[Fault]:
    """
    At what client a sends or receives, and what the server sends to both: each kind of fault in its turn. At every message,
    but for half of them in the one mode and for the others in the other.
    """
    answers = num_answers(mode)
    counts = {"a": answers["a"], "server": sum(answers.values())}
    return [
        Fault(process, event, number, kinds[number // 2 % len(kinds)])
        for (process, event), kinds in KINDS.items()
        for number in range(1 + MODES.index(mode), counts[process] + 1, 2)
    ]


@pytest.mark.parametrize(("mode", "fault"), [(mode, fault) for mode in MODES for fault in faults(mode)], ids=str)
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    scene: Scene, undisturbed: Callable[[str], Outcome], tmp_path: Path, mode: str, fault: Fault
) -> None:
    outcome = scene.run(tmp_path, mode, [fault]).to_its_end()
    assert outcome.struck == [fault.what]
    assert outcome.differences(undisturbed(mode)) == []
