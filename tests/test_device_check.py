"""The check of a card: its dry run on the CPU, and what becomes of a part that fails, crashes or takes too long."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import device_check
import device_steps
import pytest
import torch
from conftest import REPOSITORY
from fake_cuda import CUDA, Watch, fake_cuda

SCRIPT = REPOSITORY / "benchmarks/device_check.py"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_dry_run_checks_every_part_and_its_findings_become_tables(tmp_path: Path) -> None:
    file = tmp_path / "dry-run.json"
    done = run("--device", "cpu", "--output", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(file.read_text())
    assert {name: found["verdict"] for name, found in findings["parts"].items()} == dict.fromkeys(device_check.PARTS, "passed")
    tests, runs, ranks, steps = (findings["parts"][name]["figures"] for name in ("tests", "runs", "ranks", "steps"))
    assert (tests["skipped"], tests["failed"]) == (0, {})
    assert [run["dtype"] for run in runs["runs"]] == ["float32", "bfloat16"]
    assert ranks["loss_difference"] < 1e-4
    assert [(case["race"], case["rows"]) for case in steps["cases"]] == [
        ("choices", 24),
        ("against_the_peer", 8),
        ("against_the_peer", 24),
    ]
    assert not steps["left_out"]
    for of in (of for case in steps["cases"] for of in case["contestants"].values()):
        assert of["gradient_difference"] < 1e-4
        assert of["parts"] == 1
        assert len(of["seconds_of_all"]) == 2
    table = run("--table", str(file)).stdout
    assert table.startswith("the CPU, a dry run on tiny shapes;")
    for words in (
        "| tests | passed |",
        "| tiny | two ranks | float32 |",
        "transformers + PEFT",
        "this project, the server's part",
    ):
        assert words in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_card_there_is_one_sentence() -> None:
    done = run("--output", "nothing.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"the check needs a CUDA device, and torch {torch.__version__} finds none here; --device cpu is its dry run\n"
    )


def test_place_where_nothing_can_be_written_is_named_before_all_the_work(tmp_path: Path) -> None:
    for place, why in ((tmp_path, "Is a directory"), (tmp_path / "none/file.json", "No such file or directory")):
        done = run("--device", "cpu", "--output", str(place))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"{place} cannot be written: {why}\n"


def test_file_that_no_check_has_written_is_named(tmp_path: Path) -> None:
    for content in (None, "{", "[]", "{}"):
        file = tmp_path / "findings.json"
        if content is not None:
            file.write_text(content)
        done = run("--table", str(file))
        assert done.returncode == 1
        assert done.stderr.startswith(f"{file} is not what a check has written: ")
        assert done.stderr.count("\n") == 1


def test_all_parts_together_have_less_than_eight_minutes() -> None:
    assert sum(seconds for seconds, _ in device_check.PARTS.values()) < 8 * 60


def verdict(check: Any, folder: Path) -> dict[str, Any]:
    device_check.Part("cpu", 1.0, folder / "findings.json", folder).run(check)
    found: dict[str, Any] = json.loads((folder / "findings.json").read_text())
    return found


def test_part_that_breaks_keeps_what_it_has_found(tmp_path: Path) -> None:
    def breaks(part: device_check.Part) -> str:
        part.note(runs=[1])
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand much more")

    def finds_a_fault(part: device_check.Part) -> str:
        raise device_check.Failed("losses differ")

    def has_nothing_to_do(part: device_check.Part) -> str:
        raise device_check.Skipped("0.1 GB of the card are free")

    assert verdict(breaks, tmp_path) == {
        "verdict": "failed",
        "found": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "figures": {"runs": [1]},
    }
    assert verdict(finds_a_fault, tmp_path) == {"verdict": "failed", "found": "losses differ", "figures": {}}
    assert verdict(has_nothing_to_do, tmp_path) == {
        "verdict": "skipped",
        "found": "0.1 GB of the card are free",
        "figures": {},
    }


def test_parts_that_crash_or_take_too_long_do_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "parts.py"
    script.write_text(
        "import os, signal, subprocess, sys, time\n"
        "part = sys.argv[sys.argv.index('--part') + 1]\n"
        "file = sys.argv[sys.argv.index('--output') + 1]\n"
        'open(file, "w").write(\'{"verdict": "passed", "found": "so far", "figures": {"half": 1}}\')\n'
        "if part == 'tests':\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "if part == 'runs':\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(1000)\n"
    )
    monkeypatch.setattr(device_check, "__file__", str(script))
    seconds = {"runs": 3.0, "tests": 60.0, "steps": 60.0}
    monkeypatch.setattr(device_check, "PARTS", {name: (most, device_check.run_tests) for name, most in seconds.items()})
    output = tmp_path / "findings.json"
    assert device_check.check("cpu", list(seconds), output) == 1
    parts = json.loads(output.read_text())["parts"]
    assert [found["verdict"] for found in parts.values()] == ["took too long", "failed", "passed"]
    assert parts["tests"]["found"] == "its process ended with -11; what it printed says why"
    assert parts["runs"]["figures"] == {"half": 1}
    child = Path("/proc", (tmp_path / "child").read_text())
    assert not child.exists() or "zombie" in (child / "status").read_text()
    assert "| runs | took too long |" in device_check.tables(json.loads(output.read_text()))


def small_race() -> device_steps.Race:
    return device_steps.Race((2, 32, 2), 97, torch.float32, torch.device("cpu"), device_steps.against_the_peer)


def test_step_that_computes_something_else_is_noticed() -> None:
    race = small_race()
    assert not device_steps.doubts(race.run(8, 60.0), 1e-3)
    peer, *others = race.contestants
    assert isinstance(peer, device_steps.Peer)
    with torch.no_grad():
        for matrix in peer.matrices.values():
            matrix *= 1.01
    doubts = device_steps.doubts(race.run(8, 60.0), 1e-3)
    assert [doubt.partition(" is ")[0] for doubt in doubts] == [f"the gradient of {other.name}" for other in others]


def test_step_that_does_not_fit_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    race = small_race()
    step, tried = device_steps.Peer.step, []

    def with_little_memory(peer: device_steps.Peer) -> float:
        tried.append(len(peer.parts))
        if len(peer.parts) < 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(peer)

    monkeypatch.setattr(device_steps.Peer, "step", with_little_memory)
    figures = race.run(8, 60.0)["contestants"]
    assert tried[:3] == [1, 2, 4]
    assert [of["parts"] for of in figures.values()] == [4, 1, 1]
    # Parts add up to the whole.
    assert not device_steps.doubts(race.run(8, 60.0), 1e-3)
    monkeypatch.setattr(device_steps.Peer, "step", lambda peer: with_little_memory(peer) if len(peer.parts) < 4 else step(peer))
    with pytest.raises(device_steps.DoesNotFit, match=r"transformers \+ PEFT does not fit"):
        race.run(2, 60.0)


def test_steps_keep_to_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that know their device alone; what transformers and PEFT do there is theirs."""
    randn, generator = torch.randn, torch.Generator()
    with fake_cuda():
        # This torch has no generators of a device that it does not know, and no values of one that is not there.
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator)
        monkeypatch.setattr(torch, "randn", lambda shape, generator, device="cpu": randn(shape, device=device))
        monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 1.0)
        race = device_steps.Race((2, 32, 2), 97, torch.bfloat16, CUDA, device_steps.choices)
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        with Watch():
            figures = race.run(8, 60.0)["contestants"]
    assert list(figures) == ["as it is", "sums in any order", "attention in grids", "--residual bfloat16", "--lora-dropout 0.1"]
