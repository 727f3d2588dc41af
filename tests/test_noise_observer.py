"""What a server says of its devices' noise, and where."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from usual_settings import settings

from edge_client import EdgeClient
from gpu_server import GpuServer
from gpu_server.errors import ServerError
from gpu_server.federation import Federation, ModelLimits
from gpu_server.history import RunEvent
from gpu_server.noise_observer import NoiseObserver
from gpu_server.run_directory import RunDirectory
from gpu_server.serving import Journal
from privacy import NoiseReport
from protocol import Hello, Join
from split_model import Adapter
from storage import RunDescription

LIMITS = ModelLimits(fingerprint="f", width=4, vocabulary_size=9, num_positions=64, max_batch_tokens=999, edge_shapes={})
NOISE = {"labels": "device", "activation_noise": 0.5, "activation_clip": 8.0, "gradient_noise": 0.25, "gradient_clip": 1.0}
ABILITIES = ("device-labels", "noise")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    description = RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={})
    nothing: Any = None
    journal = Journal(RunDirectory(tmp_path / "run"), description, nothing, nothing, base_model="")
    journal.begin("ws://here")
    yield journal
    journal.close()


def recorded(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail))


def federation(**changes: Any) -> Federation:
    return Federation("run", settings(**{"clients": 2, "epochs": 3, **NOISE, **changes}), LIMITS, {})


def event(kind: str) -> RunEvent:
    return RunEvent(time=1e9, kind=kind, text="")


def join(run: Federation, name: str, **bringing: int) -> None:
    run.welcome(Hello(name=name, fingerprint="f", abilities=ABILITIES))
    run.join(name, Join(**{"num_samples": 9, "batch_size": 4, "longest": 30, **bringing}), 0.0)


def test_what_the_noise_of_each_device_is_worth_is_said_and_written_when_it_has_joined(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpu_server")
    run = federation()
    observer = NoiseObserver(run, journal)
    for name, bringing in (("kitchen", {}), ("office", {"longest": 50})):
        join(run, name, **bringing)
        observer.event_happened(event("joined"))
        observer.event_happened(event("back"))
    journal.close()
    figures = {
        name: NoiseReport.of(activation_noise=0.5, gradient_noise=0.25, labels="device", delta=1e-6, visits=3, longest=longest)
        for name, longest in (("kitchen", 30), ("office", 50))
    }
    assert caplog.messages == [f"{name}: {report}" for name, report in figures.items()]
    assert recorded(tmp_path)["noise"] == {name: report.as_json() for name, report in figures.items()}
    assert recorded(tmp_path)["url"] == "ws://here"


def test_visits_are_counted_in_the_steps_of_a_run_that_has_a_number_of_them(journal: Journal, tmp_path: Path) -> None:
    run = federation(clients=1, epochs=None, steps=10)
    join(run, "kitchen")  # 3 steps an epoch
    NoiseObserver(run, journal).event_happened(event("joined"))
    journal.close()
    assert recorded(tmp_path)["noise"]["kitchen"]["visits"] == 4


def test_device_that_has_left_before_the_start_is_not_reported(journal: Journal, tmp_path: Path) -> None:
    run = federation()
    observer = NoiseObserver(run, journal)
    join(run, "kitchen")
    observer.event_happened(event("joined"))
    run.leave("kitchen", 1.0)
    join(run, "office")
    observer.event_happened(event("joined"))
    journal.close()
    assert recorded(tmp_path)["noise"].keys() == {"office"}


def test_the_adapter_of_the_end_does_not_replace_what_the_noise_is_worth(journal: Journal, tmp_path: Path) -> None:
    written: list[str] = []
    directory = cast(Any, journal)._directory
    directory.save_adapter = lambda *_: written.append("adapter")
    journal.write_noise({"kitchen": {"delta": 1e-6}})
    journal.write_adapter(Adapter(), step=3, of=3)
    journal.close()
    assert written == ["adapter"]
    assert recorded(tmp_path)["noise"] == {"kitchen": {"delta": 1e-6}}
    assert recorded(tmp_path)["adapter"] == {"step": 3, "of": 3}


def test_run_whose_description_cannot_be_written_fails(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = federation(clients=1)
    observer = NoiseObserver(run, journal)
    join(run, "kitchen")
    monkeypatch.setattr(RunDescription, "write", refuse)
    observer.event_happened(event("joined"))
    journal.close()
    with pytest.raises(ServerError, match="cannot be written: No space left on device"):
        observer.event_happened(event("joined"))


def test_run_says_what_its_noise_is_worth_and_still_does_when_it_goes_on(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gpu_server")
    options: dict[str, Any] = {"run_dir": str(tmp_path / "run"), "port": 0, "device": "cpu"}
    lora: dict[str, Any] = {"model": str(tiny_model), "cut_layer": 2, "lora_rank": 2, "steps": 5}
    device: dict[str, Any] = {"engine": "torch", "model": str(tiny_model), "data": pairs_file("a", 9), "name": "a"}
    with (
        GpuServer(**options, **lora, **NOISE) as server,
        EdgeClient(server.url, **device, batch_size=4, state_dir=tmp_path / "state", device="cpu") as client,
    ):
        report = client.noise_report()
        assert len(list(client.train())) == 5
    figures = recorded(tmp_path)["noise"]["a"]
    assert report is not None
    assert figures == report.as_json()
    assert (figures["delta"], figures["visits"]) == (1e-6, 2)
    assert figures["worth"].keys() == {"activations", "gradients", "both together"}
    assert [
        message for message in caplog.messages if message.startswith("a: what its noise is worth, as epsilons at delta 1e-06: ")
    ]
    with GpuServer(**options, resume=True, steps=13):
        assert recorded(tmp_path)["noise"]["a"] == figures
