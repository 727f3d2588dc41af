"""What strangers and clients that mean harm can do: nothing that the others notice. `make fuzz` tries more of it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import TRIALS, TRIALS_OF_LABELS_ON_DEVICE, Siege, besieged
from hostile_server import Ambush
from mutation import Judge, Mutator

SEED = 20_260_101


def test_mutated_and_random_frames_are_messages_or_refused() -> None:
    mutator, judge = Mutator(SEED), Judge(SEED)
    made: Counter[str] = Counter()
    for _ in range(20_000):
        level, frame = mutator.frame()
        made[level] += 1
        judge.judge(frame)
    assert sum(judge.outcomes.values()) == 20_000
    # Mutations that never get far, or never fail, would show nothing.
    assert min(made.values()) > 500
    for outcome in (
        "no message",
        "a wrong field",
        "out of turn",
        "message",
        "message that does not fit the run",
        "another codec",
    ):
        assert judge.outcomes[outcome] > 300, outcome


def test_frames_are_the_same_for_the_same_seed() -> None:
    one, two = Mutator(7), Mutator(7)
    assert [one.frame() for _ in range(200)] == [two.frame() for _ in range(200)]


def test_device_believes_a_server_that_means_harm_or_refuses_it_in_one_sentence(tmp_path: Path) -> None:
    ambush = Ambush(tmp_path)
    with ambush.server.listening() as url:
        assert ambush.visit(url) == "believed"
        for number in range(60):
            ambush.lay(url, SEED, number)
    believed = {outcome.partition(": ")[0] for outcome in ambush.outcomes if outcome.endswith(": believed")}
    refused = {outcome.partition(": ")[0] for outcome in ambush.outcomes if outcome.endswith("Error")}
    assert believed == refused == ambush.kinds.keys(), "a kind of which all or none is refused is badly mutated"


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with besieged(tmp_path_factory.mktemp("siege"), SEED) as siege:
        yield siege


@pytest.mark.parametrize("name", TRIALS)
def test_attack_is_fended_off_while_the_honest_client_trains(siege: Siege, name: str) -> None:
    trial = TRIALS[name]
    counts = siege.suffer(trial.attack, trial.short).counts
    assert counts.keys() <= trial.ends
    assert sum(counts.values()) >= 2 * trial.short


def test_attacks_on_a_server_whose_devices_keep_their_labels_are_fended_off(tmp_path: Path) -> None:
    with besieged(tmp_path, SEED, labels="device") as siege:
        for trial in TRIALS_OF_LABELS_ON_DEVICE.values():
            counts = siege.suffer(trial.attack, trial.short).counts
            assert counts.keys() <= trial.ends
            assert sum(counts.values()) >= 2 * trial.short
        assert "Traceback" not in "".join(siege.server.said)


def test_after_all_attacks_the_server_is_as_before_and_has_said_no_secret(siege: Siege) -> None:
    siege.honest.goes_on()
    # A line of metrics and a checkpoint may be open just now.
    assert siege.server.open_files() <= siege.open_files + 2
    said = "".join(siege.server.said)
    assert siege.mallory.secret not in said
    assert siege.page_token not in said.replace(
        f"?token={siege.page_token}\n", ""
    )  # but for the line that gives the page's URL
    assert "Traceback" not in said
    assert siege.server.stop() == 143
    assert "stopped after step" in siege.server.said[-1]
