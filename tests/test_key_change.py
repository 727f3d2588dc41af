"""A server changes its key as planned, and no device is enrolled again for it."""

import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks import SECONDS, HonestClient
from test_door import SETTINGS, Guarded, everything_in

from edge_client import EdgeClient
from edge_client.access import Access
from edge_client.enrolment import EnrolmentError, find, store
from edge_client.pinning import CertificateChanged
from gpu_server import ConfigError, GpuServer, ServerError
from gpu_server.certificates import Identity, change_key, make_next_key, next_certificate, own_certificate
from gpu_server.cli import main
from gpu_server.door import enrolments_of, invite
from gpu_server.history import RunEvent
from gpu_server.key_change import announce, change
from gpu_server.serving import Observer
from protocol import Join, Start, Welcome
from protocol.invitation import Invitation
from protocol.public_key import public_key_sha256
from storage import RunDescription

# The files


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return Identity(own_certificate(tmp_path), next_certificate(tmp_path).certificate_file)


def served_pin(context: ssl.SSLContext) -> str:
    """Of the key that who connects now meets."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = context.wrap_bio(to_server, to_client, server_side=True)
    client_side = client.wrap_bio(to_client, to_server)
    for side in (client_side, server_side, client_side):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            pass
    der = client_side.getpeercert(binary_form=True)
    assert der is not None
    return public_key_sha256(der)


def test_next_key_is_announced_once_it_is_made_and_served_once_it_is_the_servers(identity: Identity, tmp_path: Path) -> None:
    before = own_certificate(tmp_path).pin()
    assert (identity.next_pin, served_pin(identity.context)) == ("", before)
    upcoming = make_next_key(tmp_path)
    assert make_next_key(tmp_path).pin() == upcoming.pin()  # not made anew for who asks again
    identity.refresh()
    assert (identity.next_pin, served_pin(identity.context)) == (upcoming.pin(), before)
    announced = upcoming.pin()
    change_key(tmp_path)
    identity.refresh()
    assert (identity.next_pin, served_pin(identity.context)) == ("", announced)
    assert own_certificate(tmp_path).pin() == announced
    with pytest.raises(ServerError, match="there is no next key"):
        change_key(tmp_path)


def test_key_that_was_not_announced_does_not_shut_the_devices_out(
    identity: Identity, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = own_certificate(tmp_path).pin()
    other = own_certificate(tmp_path / "other")
    for one, its in ((other.certificate_file, "server-certificate.pem"), (other.key_file, "server-key.pem")):
        one.replace(tmp_path / its)
        with caplog.at_level(logging.INFO, logger="gpu_server"):
            identity.refresh()
        assert served_pin(identity.context) == before
    assert all("goes on with the certificate that it has" in message for message in caplog.messages)
    assert caplog.messages
    caplog.clear()
    identity.refresh()
    assert not caplog.messages  # it is told once


def test_damaged_next_certificate_is_told_and_not_announced(
    identity: Identity, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    next_certificate(tmp_path).certificate_file.write_text("-----BEGIN")
    identity.refresh()
    assert identity.next_pin == ""
    assert "holds no certificate in PEM; the next key is not announced" in caplog.text


@pytest.mark.parametrize("killed_after", [0, 1])
def test_change_that_a_kill_interrupts_is_finished_and_never_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    before, announced = own_certificate(tmp_path).pin(), make_next_key(tmp_path).pin()
    real, done = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        if len(done) == killed_after:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        change_key(tmp_path)
    monkeypatch.undo()
    found = own_certificate(tmp_path)
    found.server_context()
    assert found.pin() == (announced if killed_after else before)


def test_next_key_whose_making_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    own_certificate(tmp_path)
    make_next_key(tmp_path).certificate_file.unlink()  # the key is written first
    make_next_key(tmp_path).server_context()
    change_key(tmp_path)
    own_certificate(tmp_path)


def test_next_key_is_private_from_its_first_byte(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        upcoming = make_next_key(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (upcoming.key_file, upcoming.certificate_file)} == {0o600}


# The commands


def test_key_is_not_changed_where_a_device_would_be_shut_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path)
    invite(enrolments_of(run, None), "kitchen", run_dir=run, address="127.0.0.1:1")
    before = own_certificate(tmp_path).pin()
    assert main(["renew-key", "--run-dir", run]) == 0
    pin = next_certificate(tmp_path).pin()
    assert capsys.readouterr().err.splitlines() == [
        f"the next key is {pin[:16]}…",
        "not known to kitchen: devices hear of it when they are connected; ask again later",
    ]
    assert main(["renew-key", "--run-dir", run, "--now"]) == 1
    assert "kitchen would refuse the server, not having heard of its next key" in capsys.readouterr().err
    assert own_certificate(tmp_path).pin() == before
    assert main(["renew-key", "--run-dir", run, "--now", "--force"]) == 0
    assert own_certificate(tmp_path).pin() == pin
    enrolments_of(run, None).revoke("kitchen")
    assert main(["renew-key", "--run-dir", run]) == 0
    assert main(["renew-key", "--run-dir", run, "--now"]) == 0
    assert own_certificate(tmp_path).pin() != pin
    assert main(["renew-key"]) == 1
    assert "--run-dir is missing" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [[], ["--now"], ["--now", "--force"]])
def test_no_key_is_made_in_a_folder_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["renew-key", "--run-dir", str(tmp_path / "mistyped"), *words]) == 1
    assert "mistyped holds no run, and nobody was enrolled for one" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists()


def test_keys_that_the_operator_brings_are_announced_and_left_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, brought, upcoming = str(tmp_path), own_certificate(tmp_path / "one"), own_certificate(tmp_path / "two")
    settings = {"host": "0.0.0.0", "port": 1, "insecure": False, "clients_file": None}
    settings |= {"tls_cert": str(brought.certificate_file), "tls_key": str(brought.key_file), "next_tls_cert": None}
    description = RunDescription(run="r", fingerprint="f", config=settings, dtype="float32", versions={}, url="wss://h:1")
    description.write(tmp_path)
    assert main(["renew-key", "--run-dir", run]) == 1
    assert "give serve --next-tls-cert with a certificate of the next one" in capsys.readouterr().err
    replace(description, config={**settings, "next_tls_cert": str(upcoming.certificate_file)}).write(tmp_path)
    assert main(["renew-key", "--run-dir", run]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"the next key is {upcoming.pin()[:16]}…",
        "no device needs to hear of it any more: put it and its certificate where --tls-key and --tls-cert are",
    ]
    assert main(["renew-key", "--run-dir", run, "--now"]) == 1
    assert "you bring the keys of" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pem"))
    replace(description, config={**settings, "insecure": True}).write(tmp_path)
    assert main(["renew-key", "--run-dir", run]) == 1
    assert "listens without encryption" in capsys.readouterr().err


# The device


@pytest.mark.parametrize("pin", [None, "ab" * 32])
def test_announcement_counts_only_where_the_servers_own_key_was_compared(tmp_path: Path, pin: str | None) -> None:
    """Over ws anybody on the way could announce a key, and over wss without a pin any authority could."""
    invitation = Invitation(host="10.0.0.1", port=1, name="kitchen", secret=43 * "A", pin=pin)
    store(tmp_path, invitation)
    enrolled = Access.to(invitation.url, tmp_path)
    stranger = Access.to("wss://10.0.0.2:1", tmp_path)
    der = ssl.PEM_cert_to_DER_cert(own_certificate(tmp_path / "server").certificate_file.read_text())
    welcome = Welcome(run="r", settings=None, fingerprint="f", next_pin="cd" * 32)  # type: ignore[arg-type]
    before = everything_in(tmp_path / "enrolments")
    for access, certificate in ((enrolled, None), (enrolled, der), (stranger, der)):
        access.heard(SimpleNamespace(certificate=certificate), welcome)  # type: ignore[arg-type]
    assert everything_in(tmp_path / "enrolments") == before


def test_device_whose_disk_is_full_has_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before it joins, so that the server does not count on it."""
    server = own_certificate(tmp_path / "server")
    invitation = Invitation(host="10.0.0.1", port=1, name="kitchen", secret=43 * "A", pin=server.pin())
    store(tmp_path, invitation)
    access = Access.to(invitation.url, tmp_path)
    connection = SimpleNamespace(certificate=ssl.PEM_cert_to_DER_cert(server.certificate_file.read_text()))
    welcome = Welcome(run="r", settings=None, fingerprint="f", next_pin="cd" * 32)  # type: ignore[arg-type]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnrolmentError, match="No space left on device"):
        access.heard(connection, welcome)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert Access.to(invitation.url, tmp_path).encryption.pins == access.encryption.pins == (server.pin(),)  # type: ignore[union-attr]
    access.heard(connection, welcome)  # type: ignore[arg-type]
    assert Access.to(invitation.url, tmp_path).encryption.pins == access.encryption.pins == (server.pin(), "cd" * 32)  # type: ignore[union-attr]


# A whole run


class Events(Observer):
    def __init__(self) -> None:
        self._told: list[RunEvent] = []
        self._news = threading.Condition()

    def event_happened(self, event: RunEvent) -> None:
        with self._news:
            self._told.append(event)
            self._news.notify_all()

    def wait_for(self, kind: str, words: str, times: int = 1) -> None:
        def came() -> bool:
            return sum(event.kind == kind and words in event.text for event in self._told) >= times

        with self._news:
            assert self._news.wait_for(came, SECONDS), [event.text for event in self._told]


def test_device_hears_of_the_next_key_while_it_trains_and_goes_on_when_that_has_come(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run, events = str(tmp_path / "run"), Events()
    enrolments = enrolments_of(run, None)
    enrolments.enrol("cellar")  # which is never connected
    settings = {**SETTINGS, "clients": 1, "steps": 1000000, "port": 0}
    server = GpuServer(model=str(tiny_model), run_dir=run, **settings)
    server.observe(events)
    with server:
        invitation = invite(enrolments, "kitchen", run_dir=run, address=server.url.partition("//")[2])
        data, state = pairs_file("kitchen", 9), tmp_path / "state"

        def join(state: Path) -> EdgeClient:
            return EdgeClient.join(invitation.text(), model=str(tiny_model), engine="torch", data=data, state_dir=state)

        def pins() -> tuple[str, ...]:
            kept = find(state, invitation.host, invitation.port, None)
            assert kept is not None
            return kept.pins

        client = join(state)
        kitchen = HonestClient(client)
        kitchen.goes_on()
        assert pins() == (invitation.pin,)
        assert announce(run, None).knowing == []
        events.wait_for("next_key", "kitchen")
        kitchen.goes_on()
        announced = announce(run, None)
        assert (announced.knowing, announced.unknowing) == (["kitchen"], ["cellar"])
        assert pins() == (invitation.pin, announced.pin)
        with pytest.raises(ConfigError, match="cellar would refuse the server"):
            change(run, None)
        enrolments.revoke("cellar")
        change(run, None)
        events.wait_for("note", "the server has its new key")
        connected = client._membership._server.connection._socket.socket
        port = connected.getsockname()[1]
        connected.shutdown(socket.SHUT_RDWR)
        events.wait_for("lost", f"kitchen (127.0.0.1:{port}): connection lost")
        events.wait_for("back", "kitchen", times=2)
        kitchen.goes_on()
        assert pins() == (announced.pin,)
        store(state, invitation)  # a service reads the invitation whenever it is started
        assert pins() == (announced.pin,)
        with pytest.raises(CertificateChanged), join(tmp_path / "another state"):
            pass
        server.stop()
        kitchen.join()


def test_device_of_an_earlier_version_is_not_sent_away_for_what_it_does_not_keep(tmp_path: Path, tiny_model: Path) -> None:
    guarded, events = Guarded(tiny_model, tmp_path), Events()
    guarded.server.observe(events)
    with guarded, guarded.joined(guarded.alice) as old:  # it says nothing of next-pin
        announced = announce(str(guarded.run_dir), None)
        events.wait_for("note", "the server's next key is")
        bob, welcome = guarded.greeted(guarded.bob)
        with bob:
            assert isinstance(welcome, Welcome)
            assert welcome.next_pin == announced.pin
            bob.say(Join(num_samples=4, batch_size=2, longest=4))
            assert isinstance(bob.hear(), Start)
            assert isinstance(old.hear(), Start)
    assert announce(str(guarded.run_dir), None).knowing == []
