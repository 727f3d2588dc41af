"""Every run ends with the adapter that an undisturbed run gives, to the bit, whatever is killed, cut off or said twice."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos import Fault, Outcome, Run
from conftest import make_model

MODES: dict[str, dict[str, Any]] = {
    "rounds of one step": {"steps": 2, "aggregate_every": 1},
    "rounds of two steps": {"steps": 4, "aggregate_every": 2},
}
# Of a client: Hello, Join, then two questions a step or three a round of two, Done, and Goodbye.
ASKED = {"rounds of one step": 2 + 4 + 1, "rounds of two steps": 2 + 6 + 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("chaos-model"), n_layer=2, n_embd=16, n_head=2)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("chaos-data")
    described = {}
    for offset, (name, count) in enumerate({"a": 5, "b": 7}.items()):
        rows = [{"prompt": f"n{i}", "completion": f"abc {i * 37 % 101}"} for i in range(100 * offset, 100 * offset + count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        described[name] = {"data": str(folder / f"{name}.jsonl"), "batch_size": 2}
    return described


Disturbed = Callable[..., Outcome]


@pytest.fixture(scope="module")
def disturbed(model: Path, clients: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """A run of a mode with faults."""

    def run(mode: str, *faults: Fault, **options: Any) -> Outcome:
        usual = {"model": str(model), "cut_layer": 1, "lora_rank": 2, "lr": 1e-2, "lora_dropout": 0.1, "checkpoint_every": 1}
        folder = tmp_path_factory.mktemp("chaos-run")
        return Run(folder, {**usual, **MODES[mode], **options}, clients, list(faults)).to_its_end()

    return run


@pytest.fixture(scope="module")
def undisturbed(disturbed: Disturbed) -> dict[str, Outcome]:
    return {mode: disturbed(mode) for mode in MODES}


def every_fault(mode: str) -> list[Fault]:
    """At every message that the server or client a sends or receives. Both clients' messages pass the server."""
    asked = ASKED[mode]
    at_client = [("a", "send", number) for number in range(1, asked + 2)]
    at_client += [("a", "receive", number) for number in range(1, asked + 1)]
    at_server = [("server", "receive", number) for number in range(1, 2 * asked + 2)]
    at_server += [("server", "send", number) for number in range(1, 2 * asked + 1)]
    points = at_client + at_server
    faults = [Fault(*point, what) for point in points for what in ("kill", "cut")]
    return faults + [Fault(*point, "twice") for point in points if point[1] == "send"]


CASES = [(mode, fault) for mode in MODES for fault in every_fault(mode)]


@pytest.mark.parametrize(("mode", "fault"), CASES, ids=[f"{mode}-{fault}" for mode, fault in CASES])
def test_disturbed_run_gives_the_adapter_and_the_losses_of_an_undisturbed_one(
    disturbed: Disturbed, undisturbed: dict[str, Outcome], mode: str, fault: Fault
) -> None:
    outcome = disturbed(mode, fault)
    assert outcome.losses == undisturbed[mode].losses
    assert outcome.adapter == undisturbed[mode].adapter
    assert outcome.killed == (1 if fault.what == "kill" else 0)
