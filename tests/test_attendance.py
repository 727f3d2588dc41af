"""Who was in a run, when, and from where: read from what the run has written."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from steps import a_step

from gpu_server.attendance import Seen, attendance, not_seen_since
from gpu_server.cli import main
from gpu_server.door import enrolments_of
from gpu_server.enrolment import Enrolments
from gpu_server.errors import ConfigError
from gpu_server.federation import StepRecord
from gpu_server.history import TOGETHER, RunEvent, RunFiles, row_of
from gpu_server.run_lock import lock_of
from storage import RunDescription

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc).timestamp()


def event(hours: float, kind: str, client: str | None = None, **details: Any) -> RunEvent:
    return RunEvent(time=NOW + 3600 * hours, kind=kind, text="it happened", client=client, details=details)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={}).write(tmp_path)
    with lock_of(tmp_path):  # as a server that serves it
        yield tmp_path


def written(run_dir: Path, *events: RunEvent) -> RunFiles:
    lines = [json.dumps(one.as_json()) + "\n" for one in events]
    (run_dir / "events.jsonl").write_text("".join(lines))
    return RunFiles(run_dir)


def test_device_is_where_it_came_from_last_and_gone_when_it_went(run_dir: Path) -> None:
    files = written(
        run_dir,
        event(0, "server_started"),
        event(1, "joined", "kitchen", address="10.0.0.1:1"),
        event(1, "joined", "cellar", address="10.0.0.2:1"),
        event(2, "lost", "kitchen"),
        event(3, "back", "kitchen", address="10.0.0.9:1"),
        event(4, "late", "cellar"),  # of which the server says something, not the device
        event(5, "lost", "cellar"),
        event(6, "left", "cellar"),  # revoked while it was away
    )
    assert attendance(files) == {
        "kitchen": Seen(time=NOW + 3 * 3600, address="10.0.0.9:1", is_connected=True),
        "cellar": Seen(time=NOW + 5 * 3600, address="10.0.0.2:1"),
    }


def test_server_that_was_killed_leaves_nobody_connected(run_dir: Path) -> None:
    before = (event(0, "server_started"), event(1, "joined", "kitchen", address="10.0.0.1:1"))
    again = written(run_dir, *before, event(2, "server_started"))
    assert not attendance(again)["kitchen"].is_connected
    files = written(run_dir, *before)
    assert attendance(files)["kitchen"].is_connected


def test_nobody_is_connected_where_no_server_is(tmp_path: Path) -> None:
    RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={}).write(tmp_path)
    files = written(tmp_path, event(1, "joined", "kitchen", address="10.0.0.1:1"))
    assert attendance(files) == {"kitchen": Seen(time=NOW + 3600, address="10.0.0.1:1")}


def test_device_whose_server_was_killed_was_there_until_its_last_step(run_dir: Path) -> None:
    joined = event(1, "joined", "kitchen", address="10.0.0.1:1")
    files = written(run_dir, event(0, "server_started"), joined, event(9, "server_started"))
    record = StepRecord(
        number=1,
        loss=1.0,
        labelled_tokens=1,
        tokens=1,
        seconds={},
        deadline=0.0,
        codec="exact",
        server_compute=0.0,
        bytes_up={"kitchen": 1},
        bytes_down={"kitchen": 1},
    )
    rows = [json.dumps(row_of(replace(record, number=number, time=NOW + 3600 * number))) for number in (1, 2, 3)]
    (run_dir / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))
    assert attendance(files)["kitchen"] == Seen(time=NOW + 3 * 3600, address="10.0.0.1:1")


def test_no_step_but_the_last_is_read_where_events_say_until_when_each_server_was_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFiles, "steps", lambda _: pytest.fail("all steps are read"))
    events = (
        event(0, "server_started", restarts=0),
        event(1, "joined", "kitchen"),
        event(1, "joined", "cellar"),
        event(2, "lost", "cellar"),
        event(3, "note"),  # and then the server was killed
        event(9, "server_started", restarts=1, last_step_time=NOW + 3600 * 4),
        event(10, "back", "cellar"),
        event(11, "stopped"),
        event(19, "server_started", restarts=2, last_step_time=NOW + 3600 * 10.5),
    )
    assert {name: one.time - NOW for name, one in attendance(written(run_dir, *events)).items()} == {
        "kitchen": 4 * 3600,
        "cellar": 11 * 3600,
    }


def test_device_of_a_server_that_was_killed_last_was_there_at_its_last_step(tmp_path: Path) -> None:
    RunDescription(run="r", fingerprint="f", config={}, dtype="float32", versions={}).write(tmp_path)
    files = written(tmp_path, event(0, "server_started", restarts=0), event(1, "joined", "kitchen"))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row_of(a_step(n, time=NOW + 3600 * n))) + "\n" for n in (5, 6)))
    assert attendance(files) == {"kitchen": Seen(time=NOW + 6 * 3600)}


def enrolled(run_dir: Path, **days_ago: float) -> Enrolments:
    """Devices that were enrolled so many days before NOW."""
    entries = {
        name: {"secret_sha256": "00" * 32, "enrolled": datetime.fromtimestamp(NOW - 86400 * days, timezone.utc).isoformat()}
        for name, days in days_ago.items()
    }
    (run_dir / "clients.json").write_text(json.dumps({"format": 1, "clients": entries}))
    return enrolments_of(str(run_dir), None)


def test_only_devices_that_are_long_away_are_not_seen(run_dir: Path) -> None:
    enrolments = enrolled(run_dir, here=100, away=100, never=100, new=1, stays=100)
    files = written(
        run_dir,
        event(-24 * 90, "joined", "away"),
        event(-24 * 90, "joined", "stays", address="10.0.0.3:1"),
        event(-24 * 80, "lost", "away"),
        event(-24 * 2, "joined", "here"),
        event(-24 * 1, "lost", "here"),
    )
    month_ago = NOW - 86400 * 30
    assert not_seen_since(month_ago, enrolments.clients(), files) == ["away", "never"]
    enrolments.renew("never")  # its invitation is on its way to it
    assert not_seen_since(month_ago, enrolments.clients(), files) == ["away"]


def test_devices_that_were_seen_nobody_knows_when_are_not_forgotten(run_dir: Path) -> None:
    """An earlier version wrote steps without their times, and no events."""
    clients = {"kitchen": {"bytes_up": 1, "bytes_down": 1, "seconds": {}}}
    row = {"step": 1, "loss": 1.0, "labelled_tokens": 1, "tokens": 1, "clients": clients}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    enrolments = enrolled(run_dir, kitchen=100)
    for files in (RunFiles(run_dir), written(run_dir, event(-1, "server_started"))):
        with pytest.raises(ConfigError, match="does not say when its devices were seen so long ago"):
            not_seen_since(NOW - 86400, enrolments.clients(), files)
    since = written(run_dir, event(-24 * 60, "server_started"))
    assert not_seen_since(NOW - 86400, enrolments.clients(), since) == ["kitchen"]


OF_MANY = replace(a_step(1), bytes_up={TOGETHER: 1}, bytes_down={TOGETHER: 1}, together=1001)


@pytest.mark.parametrize("step", [OF_MANY, a_step(7)])
def test_devices_that_moved_files_may_name_are_not_forgotten(step: StepRecord, run_dir: Path) -> None:
    """One that was there before the first event, and is not there any more, may have been there until a moment before."""
    (run_dir / "metrics.jsonl").write_text(json.dumps(row_of(step)) + "\n")
    clients = enrolled(run_dir, kitchen=100).clients()
    files = written(run_dir, event(-1, "server_started", restarts=3))
    with pytest.raises(ConfigError, match="or older files were moved elsewhere"):
        not_seen_since(NOW - 86400 * 30, clients, files)
    assert not_seen_since(NOW - 60, clients, files) == ["kitchen"]


def test_run_that_began_since_says_all_of_its_devices(run_dir: Path) -> None:
    clients = enrolled(run_dir, kitchen=100).clients()
    files = written(run_dir, event(-1, "server_started", restarts=0))
    assert not_seen_since(NOW - 86400 * 30, clients, files) == ["kitchen"]


def test_commands_list_and_forget(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enrolments = enrolled(run_dir, kitchen=10, cellar=9, attic=8)
    written(
        run_dir,
        event(1, "joined", "kitchen", address="10.0.0.1:1"),
        event(1, "joined", "cellar", address="10.0.0.2:1"),
        event(2, "lost", "cellar"),
    )
    enrolments.renew("attic")
    renewed = enrolments.clients()["attic"].renewed
    assert main(["clients", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"attic                    enrolled 2026-02-21 12:00 UTC, a new secret {renewed:%Y-%m-%d %H:%M} UTC, never seen",
        "cellar                   enrolled 2026-02-20 12:00 UTC, last seen 2026-03-01 14:00 UTC at 10.0.0.2:1",
        "kitchen                  enrolled 2026-02-19 12:00 UTC, connected at 10.0.0.1:1",
    ]
    assert main(["clients", "--clients-file", str(enrolments.path)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "cellar                   enrolled 2026-02-20 12:00 UTC"
    for _ in range(2):
        assert main(["revoke", "--not-seen-for", "0", "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "the enrolment of attic is revoked",
        "the enrolment of cellar is revoked",
        "every device was in the run within the last 0 days",
    ]
    assert list(enrolments.clients()) == ["kitchen"]


def test_devices_of_several_runs_are_not_forgotten_by_what_one_of_them_has_seen(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = Enrolments(tmp_path_factory.mktemp("shared") / "clients.json")
    shared.enrol("kitchen")
    words = ["revoke", "--not-seen-for", "0"]
    assert main([*words, "--run-dir", str(run_dir), "--clients-file", str(shared.path)]) == 1
    assert "may be that of other runs, too" in capsys.readouterr().err
    assert main([*words, "--clients-file", str(shared.path)]) == 1
    assert "needs --run-dir" in capsys.readouterr().err
    for days in ("-1", "9" * 400):
        assert main(["revoke", "--not-seen-for", days, "--run-dir", str(run_dir)]) == 1
        assert f"from 0 to 36500, got {days}" in capsys.readouterr().err
    assert list(shared.clients()) == ["kitchen"]


def test_devices_are_listed_before_a_run_is_served_for_the_first_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "anna")
    enrolments_of(str(tmp_path), None).enrol("kitchen")
    assert main(["clients", "--run-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(" UTC by anna\n")
