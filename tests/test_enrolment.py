"""Who may come in: what the server keeps of a device, and the device of a server."""

import base64
import hashlib
import hmac
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import REPOSITORY, permissions
from hypothesis import given
from hypothesis import strategies as st

from edge_client.enrolment import EnrolmentError, find, keep_pins, state_folder, store
from gpu_server import ConfigError, ServerError
from gpu_server.enrolment import Enrolments
from protocol import InvalidName
from protocol.invitation import Invitation

SECRET = base64.urlsafe_b64encode(bytes(range(32))).decode().rstrip("=")
OTHER_SECRET = base64.urlsafe_b64encode(bytes(32)).decode().rstrip("=")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "clients.json"


@pytest.fixture
def enrolments(path: Path) -> Enrolments:
    return Enrolments(path)


# The server: who is enrolled


def test_enrolled_device_is_admitted_with_its_secret_and_no_other(enrolments: Enrolments) -> None:
    secret, other = enrolments.enrol("phone-1"), enrolments.enrol("phone-2")
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    assert enrolments.admits("phone-1", secret)
    assert not enrolments.admits("phone-1", other)
    assert not enrolments.admits("phone-2", secret)
    assert not enrolments.admits("phone-3", secret)


def test_secret_makes_an_invitation(enrolments: Enrolments) -> None:
    for i in range(20):
        secret = enrolments.enrol(f"phone-{i}")
        assert Invitation(host="h", port=1, name=f"phone-{i}", secret=secret, pin=None).credentials == (f"phone-{i}", secret)


@given(st.text(), st.text())
def test_nothing_else_is_admitted_and_nothing_fails(tmp_path_factory: pytest.TempPathFactory, name: str, secret: str) -> None:
    path = tmp_path_factory.getbasetemp() / "admits-anything.json"
    enrolments = Enrolments(path)
    if not enrolments.exists():
        enrolments.enrol("a")
    assert not enrolments.admits(name, secret)
    assert not enrolments.admits("a", secret)
    assert not enrolments.admits("\udc80", "\udc80")  # as a damaged header is decoded


def test_file_holds_the_hash_and_never_the_secret(enrolments: Enrolments, path: Path) -> None:
    before = datetime.now(timezone.utc) - timedelta(seconds=1)
    secret = enrolments.enrol("phone-1")
    text = path.read_text()
    assert secret not in text
    content = json.loads(text)
    assert content["format"] == 1
    (entry,) = content["clients"].values()
    assert entry.keys() == {"secret_sha256", "enrolled", "enrolled_by"}
    assert entry["secret_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert before <= datetime.fromisoformat(entry["enrolled"]) <= datetime.now(timezone.utc)


def test_no_repr_shows_a_secret_or_its_hash(enrolments: Enrolments) -> None:
    secret = enrolments.enrol("phone-1")
    assert enrolments.admits("phone-1", secret)
    shown = repr(enrolments) + repr(enrolments._current())
    assert secret not in shown
    assert repr(hashlib.sha256(secret.encode()).digest()) not in shown


def test_file_is_private_whatever_the_umask(enrolments: Enrolments, path: Path) -> None:
    before = os.umask(0)
    try:
        enrolments.enrol("phone-1")
        enrolments.enrol("phone-2")
    finally:
        os.umask(before)
    assert permissions(path) == 0o600


def test_server_that_starts_takes_nothing_from_a_command_that_is_just_writing(tmp_path: Path) -> None:
    from gpu_server.run_directory import RunDirectory  # which needs torch

    directory = RunDirectory(tmp_path)
    for name in ("clients.json", "run.json"):
        (tmp_path / f"{name}.0123.part").touch()
    directory.hold()
    directory.release()
    assert [path.name for path in tmp_path.glob("*.part")] == ["clients.json.0123.part"]
    Enrolments(tmp_path / "clients.json").enrol("phone-1")  # by now, whoever was writing has been killed: the lock is free
    assert not list(tmp_path.glob("*.part"))


def test_clients_are_listed_by_name_with_their_time(enrolments: Enrolments) -> None:
    assert enrolments.clients() == {}
    assert not enrolments.exists()
    for name in ("b", "c", "a"):
        enrolments.enrol(name)
    assert enrolments.exists()
    assert list(enrolments.clients()) == ["a", "b", "c"]
    for client in enrolments.clients().values():
        assert abs(datetime.now(timezone.utc) - client.enrolled) < timedelta(minutes=5)


def test_file_is_read_again_only_if_it_has_changed(enrolments: Enrolments, path: Path) -> None:
    enrolments.enrol("a")
    looking = Enrolments(path)
    first = looking.clients()
    assert looking.clients() is first
    assert looking.admits("a", "not its secret") is None
    enrolments.enrol("b")
    assert list(looking.clients()) == ["a", "b"]
    path.unlink()
    assert looking.clients() == {}


def test_several_are_revoked_at_once_or_none_is(enrolments: Enrolments, path: Path) -> None:
    for name in ("a", "b", "c"):
        enrolments.enrol(name)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="'d' is not enrolled"):
        enrolments.revoke("a", "d")
    assert path.read_bytes() == before
    enrolments.revoke("a", "c")
    assert list(enrolments.clients()) == ["b"]


def test_name_is_enrolled_once(enrolments: Enrolments) -> None:
    secret = enrolments.enrol("phone-1")
    with pytest.raises(ConfigError, match=r"^phone-1 is enrolled already: .* add --renew; .* revoke it first$"):
        enrolments.enrol("phone-1")
    assert enrolments.admits("phone-1", secret)


def test_renewed_secret_is_the_only_one_and_the_device_is_the_same(enrolments: Enrolments, path: Path) -> None:
    first, other = enrolments.enrol("phone-1"), enrolments.enrol("phone-2")
    before, others = enrolments.clients().values()
    second = Enrolments(path).renew("phone-1")
    assert not enrolments.admits("phone-1", first)
    after = enrolments.admits("phone-1", second)
    assert after is not None
    assert before.renewed is None
    assert after.renewed is not None
    assert before.enrolled < after.renewed <= datetime.now(timezone.utc)
    assert before.is_same_device(after)
    assert before != after
    assert enrolments.admits("phone-2", other) == others
    assert second not in path.read_text()
    enrolments.revoke("phone-1")
    enrolments.enrol("phone-1")
    assert not before.is_same_device(enrolments.clients()["phone-1"])
    assert not before.is_same_device(None)


def test_only_an_enrolled_device_is_given_a_new_secret(enrolments: Enrolments, path: Path) -> None:
    with pytest.raises(ConfigError, match="'phone-1' is not enrolled; nobody is in "):
        enrolments.renew("phone-1")
    assert not path.parent.exists()


def test_whoever_has_typed_sudo_has_enrolled_the_device(enrolments: Enrolments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "anna")
    enrolments.enrol("phone-1")
    monkeypatch.delenv("SUDO_USER")
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("no such user")))
    enrolments.enrol("phone-2")
    assert [client.enrolled_by for client in enrolments.clients().values()] == ["anna", ""]


def test_name_that_cannot_be_one_is_refused_before_anything_is_written(enrolments: Enrolments, path: Path) -> None:
    with pytest.raises(InvalidName):
        enrolments.enrol("../phone")
    assert not path.parent.exists()


def test_unknown_name_to_revoke_is_answered_with_the_nearest(enrolments: Enrolments) -> None:
    enrolments.enrol("phone-1")
    enrolments.enrol("laptop")
    with pytest.raises(ConfigError, match=r"'phone1' is not enrolled; did you mean phone-1\?"):
        enrolments.revoke("phone1")
    with pytest.raises(ConfigError, match="'fridge' is not enrolled; the devices that are: laptop and phone-1"):
        enrolments.revoke("fridge")
    assert list(enrolments.clients()) == ["laptop", "phone-1"]


def test_revoking_in_a_mistyped_folder_says_so_and_does_not_make_it(enrolments: Enrolments, path: Path) -> None:
    with pytest.raises(ConfigError, match="'phone-1' is not enrolled; nobody is in ") as caught:
        enrolments.revoke("phone-1")
    assert str(path) in str(caught.value)
    assert not path.parent.exists()


# The server: while it runs


def test_running_server_sees_who_is_enrolled_and_revoked_by_other_commands(enrolments: Enrolments, path: Path) -> None:
    assert not enrolments.admits("phone-1", SECRET)
    secret = Enrolments(path).enrol("phone-1")
    assert enrolments.admits("phone-1", secret)
    Enrolments(path).revoke("phone-1")
    assert not enrolments.admits("phone-1", secret)
    again = Enrolments(path).enrol("phone-1")
    assert not enrolments.admits("phone-1", secret)
    assert enrolments.admits("phone-1", again)


def test_own_changes_count_at_once(enrolments: Enrolments) -> None:
    secrets = {enrolments.enrol("phone-1")}
    for _ in range(20):
        enrolments.revoke("phone-1")
        assert not any(enrolments.admits("phone-1", secret) for secret in secrets)
        secrets.add(newest := enrolments.enrol("phone-1"))
        assert [secret for secret in secrets if enrolments.admits("phone-1", secret)] == [newest]


def test_unchanged_file_is_not_read_again(enrolments: Enrolments, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = enrolments.enrol("phone-1")
    assert enrolments.admits("phone-1", secret)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read again"))
    assert enrolments.admits("phone-1", secret)


def test_unknown_name_costs_the_comparison_of_a_known_one(enrolments: Enrolments, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = enrolments.enrol("phone-1")
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for name, offered in (("phone-1", secret), ("phone-1", OTHER_SECRET), ("nobody", secret), ("nobody", "")):
        enrolments.admits(name, offered)
    assert compared == [(32, 32)] * 4


def test_torn_file_admits_nobody_and_says_why_once(
    enrolments: Enrolments, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = enrolments.enrol("phone-1")
    assert enrolments.admits("phone-1", secret)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.INFO, logger="gpu_server"):
        assert not enrolments.admits("phone-1", secret)
        assert not enrolments.admits("phone-1", secret)
    (record,) = caplog.records
    assert record.name == "gpu_server"
    assert str(path) in record.getMessage()
    assert "no device is admitted" in record.getMessage()
    assert secret not in caplog.text
    path.write_bytes(whole)
    assert enrolments.admits("phone-1", secret)


def test_file_that_is_taken_away_admits_nobody_and_says_why_once(
    enrolments: Enrolments, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = enrolments.enrol("phone-1")
    assert enrolments.admits("phone-1", secret)
    path.unlink()
    assert not enrolments.admits("phone-1", secret)
    assert not enrolments.admits("phone-1", secret)
    assert len(caplog.records) == 1


def test_server_before_the_first_enrolment_has_nothing_to_complain_of(
    enrolments: Enrolments, caplog: pytest.LogCaptureFixture
) -> None:
    assert not enrolments.admits("phone-1", SECRET)
    assert not caplog.records


ENTRY = {"secret_sha256": "00" * 32, "enrolled": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "clients": []}',
        '{"format": 1, "clients": {"a": "b"}}',
        json.dumps({"format": 1, "clients": {"../a": ENTRY}}),
        json.dumps({"format": 1, "clients": {"a": {**ENTRY, "secret_sha256": "00"}}}),
        json.dumps({"format": 1, "clients": {"a": {**ENTRY, "secret_sha256": 5}}}),
        json.dumps({"format": 1, "clients": {"a": {**ENTRY, "enrolled": "yesterday"}}}),
        json.dumps({"format": 1, "clients": {"a": {**ENTRY, "enrolled": "2026-01-01T00:00:00"}}}),
        json.dumps({"format": 1, "clients": {"a": {**ENTRY, "renewed": "2026-01-01T00:00:00"}}}),
        json.dumps({"format": 2, "clients": {}}),
    ],
)
def test_file_that_is_no_list_of_devices_is_named_and_admits_nobody(enrolments: Enrolments, path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    for command in (enrolments.clients, enrolments.exists, lambda: enrolments.enrol("b"), lambda: enrolments.revoke("a")):
        with pytest.raises(ServerError) as caught:
            command()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_text() == content
    assert not enrolments.admits("a", SECRET)


def test_file_that_cannot_be_read_is_named(enrolments: Enrolments, path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(ServerError, match=r"clients\.json cannot be read: Is a directory"):
        enrolments.exists()
    assert not enrolments.admits("a", SECRET)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match=r"clients\.json cannot be"):
        Enrolments(tmp_path / "file" / "clients.json").enrol("a")


# The server: several commands at once


def test_threads_that_enrol_and_revoke_at_once_lose_nothing(path: Path) -> None:
    Enrolments(path).enrol("leaves")
    names = [f"phone-{i:02}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        leaving = pool.submit(Enrolments(path).revoke, "leaves")
        secrets = dict(zip(names, pool.map(lambda name: Enrolments(path).enrol(name), names), strict=True))
        leaving.result(timeout=60)
    assert list(Enrolments(path).clients()) == names
    enrolments = Enrolments(path)
    assert all(enrolments.admits(name, secret) for name, secret in secrets.items())


def test_one_name_wanted_by_many_threads_is_given_to_one(path: Path) -> None:
    def enrol(_: int) -> str | None:
        try:
            return Enrolments(path).enrol("phone-1")
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        given_secrets = [secret for secret in pool.map(enrol, range(8)) if secret is not None]
    assert len(given_secrets) == 1
    assert Enrolments(path).admits("phone-1", given_secrets[0])


def test_processes_that_enrol_at_once_lose_nothing(path: Path) -> None:
    enrol_ten = (
        "import sys; from pathlib import Path; from gpu_server.enrolment import Enrolments\n"
        "for i in range(10): Enrolments(Path(sys.argv[1])).enrol(f'{sys.argv[2]}-{i}')"
    )
    commands = [[sys.executable, "-c", enrol_ten, str(path), name] for name in ("a", "b")]
    processes = [subprocess.Popen(command, cwd=REPOSITORY) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert list(Enrolments(path).clients()) == [f"{name}-{i}" for name in ("a", "b") for i in range(10)]


# The device


def invitation(**changes: object) -> Invitation:
    parts = {"host": "192.168.1.20", "port": 8765, "name": "phone-1", "secret": SECRET, "pin": "ab" * 32, **changes}
    return Invitation(**parts)  # type: ignore[arg-type]


def found(folder: Path, host: str, port: int, name: str | None) -> Invitation | None:
    kept = find(folder, host, port, name)
    return kept and kept.invitation


def stored_files(folder: Path) -> list[Path]:
    return sorted((folder / "enrolments").iterdir())


@pytest.mark.parametrize("changes", [{}, {"pin": None}, {"host": "fd00::1"}, {"host": "Workstation.local"}])
def test_what_is_stored_is_found_with_and_without_the_name(tmp_path: Path, changes: dict[str, object]) -> None:
    wanted = invitation(**changes)
    store(tmp_path, wanted)
    host = str(changes.get("host", "192.168.1.20"))
    assert found(tmp_path, host, 8765, "phone-1") == wanted
    assert found(tmp_path, host, 8765, None) == wanted
    assert found(tmp_path, host.upper(), 8765, None) == wanted


def test_another_server_or_name_finds_nothing(tmp_path: Path) -> None:
    assert find(tmp_path, "192.168.1.20", 8765, None) is None
    store(tmp_path, invitation())
    assert find(tmp_path, "192.168.1.21", 8765, None) is None
    assert find(tmp_path, "192.168.1.20", 8766, None) is None
    assert find(tmp_path, "192.168.1.20", 8765, "phone-2") is None
    assert find(tmp_path, "192.168.1.20", 8765, "*") is None
    assert find(tmp_path, "no host", 8765, None) is None


def test_enrolling_again_replaces(tmp_path: Path) -> None:
    store(tmp_path, invitation())
    store(tmp_path, renewed := invitation(secret=OTHER_SECRET, pin="cd" * 32))
    assert found(tmp_path, "192.168.1.20", 8765, None) == renewed
    assert len(stored_files(tmp_path)) == 1


def test_what_a_device_has_heard_of_its_servers_key_outlives_reading_its_invitation_again(tmp_path: Path) -> None:
    """As a service does, which is started with the same invitation every time."""
    old, new, upcoming = "ab" * 32, "cd" * 32, "ef" * 32
    store(tmp_path, invitation(pin=old))
    for pins in ((old, new), (new,), (new, upcoming)):
        keep_pins(tmp_path, invitation(pin=old), pins)
        store(tmp_path, invitation(pin=old))
        kept = find(tmp_path, "192.168.1.20", 8765, None)
        assert kept is not None
        assert kept.pins == pins
        assert kept.invitation == invitation(pin=pins[0])
    store(tmp_path, renewed := invitation(secret=OTHER_SECRET, pin=old))
    keep_pins(tmp_path, invitation(pin=old), (new,))  # a device that runs with what was its invitation until now
    kept = find(tmp_path, "192.168.1.20", 8765, None)
    assert kept is not None
    assert (kept.invitation, kept.pins) == (renewed, (old,))


def test_invitation_replaces_what_cannot_be_read(tmp_path: Path) -> None:
    store(tmp_path, invitation())
    (file,) = stored_files(tmp_path)
    file.write_text("{")
    store(tmp_path, invitation())
    assert found(tmp_path, "192.168.1.20", 8765, None) == invitation()


@pytest.mark.parametrize("next_pin", [5, "", "ab", "AB" * 32, [], True])
def test_damaged_next_pin_is_a_damaged_file(tmp_path: Path, next_pin: object) -> None:
    store(tmp_path, invitation())
    (file,) = stored_files(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), "next_pin": next_pin}))
    with pytest.raises(EnrolmentError, match="is damaged; delete it and join again"):
        find(tmp_path, "192.168.1.20", 8765, None)


def test_several_names_at_one_server_need_a_choice(tmp_path: Path) -> None:
    for name in ("b", "a"):
        store(tmp_path, invitation(name=name))
    store(tmp_path, invitation(name="elsewhere", port=8766))
    with pytest.raises(EnrolmentError, match=r"192\.168\.1\.20:8765 as a, b; choose one of them with --name"):
        find(tmp_path, "192.168.1.20", 8765, None)
    assert found(tmp_path, "192.168.1.20", 8765, "b") == invitation(name="b")
    assert found(tmp_path, "192.168.1.20", 8766, None) == invitation(name="elsewhere", port=8766)


def test_folder_and_files_are_private_whatever_the_umask_and_whatever_was_there(tmp_path: Path) -> None:
    (tmp_path / "enrolments").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        store(tmp_path, invitation())
    finally:
        os.umask(before)
    assert permissions(tmp_path / "enrolments") == 0o700
    assert [permissions(file) for file in stored_files(tmp_path)] == [0o600]


def test_file_names_are_plain_and_hold_nothing_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "A", "a.json"):
        store(tmp_path, invitation(name=name))
    names = [file.name for file in stored_files(tmp_path)]
    assert len(names) == 3
    assert all(len(name) == len("0" * 32 + ".json") and set(name[:32]) <= set("0123456789abcdef") for name in names)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "5", '{"host": 5}', "\x00"])
def test_damaged_file_is_named_and_only_where_its_server_is_meant(tmp_path: Path, content: str) -> None:
    store(tmp_path, invitation())
    (damaged,) = stored_files(tmp_path)
    store(tmp_path, elsewhere := invitation(port=8766))
    damaged.write_text(content)
    for name in (None, "phone-1"):
        with pytest.raises(EnrolmentError) as caught:
            find(tmp_path, "192.168.1.20", 8765, name)
        assert str(damaged) in str(caught.value)
        assert SECRET not in str(caught.value)
    assert found(tmp_path, "192.168.1.20", 8766, None) == elsewhere


@pytest.mark.parametrize("field", ["host", "port", "name", "secret", "pin"])
@pytest.mark.parametrize("value", [5.5, [], {}, True, "", "a b"])
def test_damaged_field_is_a_damaged_file(tmp_path: Path, field: str, value: object) -> None:
    store(tmp_path, invitation())
    (file,) = stored_files(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(EnrolmentError, match="is damaged; delete it and join again"):
        find(tmp_path, "192.168.1.20", 8765, None)


def test_failed_write_keeps_the_earlier_one_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, invitation())

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnrolmentError, match="No space left on device"):
        store(tmp_path, invitation(secret=OTHER_SECRET))
    assert found(tmp_path, "192.168.1.20", 8765, None) == invitation()
    assert len(stored_files(tmp_path)) == 1


def test_state_is_where_it_is_asked_for_else_where_the_platform_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert state_folder(None) == tmp_path / "splitlora"
    assert "splitlora" in str(state_folder(None))
