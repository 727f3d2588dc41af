"""A secret is never printed, logged or seen among a process's arguments."""

import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_in_thread

import edge_client.cli
from edge_client import EdgeClient, EnrolmentError, ping
from edge_client.enrolment import find, store
from gpu_server import GpuServer
from gpu_server.door import enrolments_of, invite
from protocol.invitation import InvalidInvitation, Invitation
from terminal import plain

SECRET = "A" * 42 + "I"
TEXT = f"splitlora://192.168.1.20:8765/#phone-1/{SECRET}/{'A' * 43}"


@pytest.mark.parametrize("url", [TEXT, f" {TEXT}\n", f"ws://phone-1:{SECRET}@127.0.0.1:1", f"wss://{SECRET}@127.0.0.1:1"])
def test_secret_in_the_place_of_an_address_is_not_repeated(
    url: str, tiny_model: Path, pairs_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnrolmentError) as caught:
        EdgeClient(url, model=str(tiny_model), data=pairs_file("a", 1))
    with pytest.raises(EnrolmentError) as of_ping:
        ping(url)
    assert edge_client.cli.main(["ping", f"--server={url}"]) == 1
    said = f"{caught.value} {of_ping.value} {capsys.readouterr()}"
    assert SECRET not in said
    assert "splitlora-edge join" in said or "give ws" in said


@pytest.mark.parametrize(
    "words", [[TEXT], ["trian", TEXT], ["train", TEXT], ["train", "--server", "x", "--device", TEXT], [f"--{TEXT}"]]
)
def test_command_line_that_is_wrong_does_not_repeat_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edge_client.cli.main(words)
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize("end", range(len(TEXT)))
def test_no_part_of_an_invitation_is_shown_that_may_be_the_secret(end: int) -> None:
    assert "AAAA" not in plain(f"cannot use {TEXT[:end]} here")
    assert "AAAA" not in plain(f"{TEXT[:end].replace('#', '', 1)}")


def test_other_text_is_shown_as_it_is() -> None:
    for text in ("splitlora 0.1.0", "gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "splitlora-server: no", "a#b/c"):
        assert plain(text) == text
    assert (
        plain(f"at {TEXT}, twice {TEXT}.")
        == "at splitlora://192.168.1.20:8765/#phone-1/… twice splitlora://192.168.1.20:8765/#phone-1/…"
    )


@pytest.fixture
def guarded(tiny_model: Path, tmp_path: Path) -> tuple[GpuServer, Invitation]:
    run_dir = str(tmp_path / "run")
    invitation = invite(enrolments_of(run_dir, None), "phone", address="127.0.0.1:1")
    options = {"model": str(tiny_model), "run_dir": run_dir, "cut_layer": 1, "steps": 2, "dtype": "float32"}
    return GpuServer(**options, port=0), invitation


def at(server: GpuServer, invitation: Invitation) -> str:
    port = int(server.url.rpartition(":")[2])
    return Invitation(**{**vars(invitation), "port": port}).text()


@pytest.mark.parametrize("how", ["file", "standard input", "environment", "argument", "Python"])
def test_device_joins_by_an_invitation_wherever_it_comes_from(
    how: str,
    guarded: tuple[GpuServer, Invitation],
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, state = pairs_file("a", 3), tmp_path / "state"
    caplog.set_level(logging.DEBUG)
    with guarded[0] as server:
        text = at(*guarded)
        ended = run_in_thread(lambda: list(server.train()))
        flags = [f"--data={data}", f"--model={tiny_model}", f"--state-dir={state}", "--dtype=float32"]
        if how == "file":
            (tmp_path / "invitation").write_text(f"\ufeff{text}\r\n", encoding="utf-8")
            words = [f"@{tmp_path / 'invitation'}"]
        elif how == "standard input":
            monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n"))
            words = ["-"]
        elif how == "environment":
            monkeypatch.setenv("SPLITLORA_INVITATION", text)
            words = []
        else:
            words = [text]
        if how == "Python":
            with EdgeClient.join(text, model=str(tiny_model), data=data, state_dir=state, dtype="float32") as client:
                assert [step.number for step in client.train()] == [1, 2]
        else:
            assert edge_client.cli.main(["join", *words, *flags]) == 0
        assert len(ended.result(timeout=60)) == 2
    secret = guarded[1].secret
    assert secret not in f"{capsys.readouterr()} {caplog.text}"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "there is no invitation: give @FILE, - for standard input, or set SPLITLORA_INVITATION"),
        (["@absent"], "the invitation cannot be read from @absent: No such file or directory"),
        (["@."], "the invitation cannot be read from @.: Is a directory"),
        (["@binary"], "@binary holds no invitation: it is not text"),
        (["@/dev/zero"], "an invitation looks like"),
        (["-"], "an invitation looks like"),
    ],
)
def test_invitation_that_is_not_there_is_one_sentence(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPLITLORA_INVITATION", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert edge_client.cli.main(["join", *words, "--data=d.jsonl"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"splitlora-edge: {reason}")


def test_join_keeps_the_invitation_and_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInvitation):
        EdgeClient.join(TEXT[:-3], model="m", data="d.jsonl", state_dir=tmp_path)
    assert not (tmp_path / "enrolments").exists()
    store(tmp_path, Invitation.parse(TEXT))
    kept = find(tmp_path, "192.168.1.20", 8765, None)
    assert kept is not None
    assert kept.invitation == Invitation.parse(TEXT)


def test_process_that_reads_its_invitation_shows_no_secret_among_its_arguments(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "edge_client", "join", "-", "--data=absent.jsonl", f"--state-dir={tmp_path}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        shown = Path(f"/proc/{process.pid}/cmdline").read_text()
        _, said = process.communicate(TEXT[:-1])
    assert SECRET not in shown + said
    assert process.returncode == 1


def test_file_without_its_at_sign_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kitchen.invitation"
    path.write_text(TEXT)
    assert edge_client.cli.main(["join", str(path), "--data", "notes.jsonl"]) == 1
    said = capsys.readouterr().err
    assert f"{path} is a file: to read the invitation from it, write @{path}" in said
    assert SECRET not in said
