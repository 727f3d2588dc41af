"""Who gets in, through the commands that people type and over real sockets: TLS, invitations, secrets, one place a device."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from attacks import ENDED, PING, PONG, SECONDS, HonestClient, RawClient, ServerProcess, frame_header, pump, request
from ports import free_port
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from edge_client import EdgeClient
from edge_client.connection import SecretRefused
from edge_client.enrolment import store
from gpu_server import GpuServer
from gpu_server.door import enrolments_of, invite
from gpu_server.enrolment import Enrolments
from gpu_server.history import RunEvent
from gpu_server.serving import Observer
from protocol import Failure, Goodbye, Hello, Join, Welcome
from protocol.invitation import Invitation
from split_model import PretrainedModel

SETTINGS: dict[str, Any] = {"cut_layer": 1, "lora_rank": 2, "device": "cpu", "dtype": "float32"}
# On a busy machine programs take their time; only the tests that are about it give them little.
FLAGS = ["--cut-layer=1", "--lora-rank=2", "--device=cpu", "--dtype=float32", "--handshake-seconds=60"]


def command(package: str, *words: object) -> "subprocess.CompletedProcess[str]":
    """A command of ours, run to its end."""
    line = [sys.executable, "-m", package, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=2 * SECONDS, check=False)


def enrol(run_dir: Path, name: str, port: int, *flags: str) -> str:
    """The string that the command prints."""
    done = command("gpu_server", "enrol", name, "--run-dir", run_dir, "--address", f"127.0.0.1:{port}", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def serving(model: Path, run_dir: Path, port: int, *flags: str) -> Iterator[ServerProcess]:
    server = ServerProcess(f"--model={model}", f"--run-dir={run_dir}", f"--port={port}", *FLAGS, *flags)
    try:
        server.wait_for("listening on")
        yield server
    finally:
        server.stop()


def everything_in(*folders: Path) -> str:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return "".join(path.read_bytes().decode("latin-1") for path in files)


def modes(folder: Path, *patterns: str) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for pattern in patterns for path in folder.rglob(pattern)}


# The commands


def test_device_joins_by_its_invitation_and_trains_to_the_end_encrypted(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run_dir, state, port = tmp_path / "run", tmp_path / "state", free_port()
    before = os.umask(0)  # what is private is so by its own doing
    try:
        invitation = enrol(run_dir, "phone", port)
        with serving(tiny_model, run_dir, port, "--host=0.0.0.0", "--steps=3") as server:
            words = ("join", invitation, "--model", tiny_model, "--data", pairs_file("phone", 9), "--state-dir", state)
            joined = command("edge_client", *words, "--device=cpu", "--dtype=float32")
            assert joined.returncode == 0, joined.stderr
            server.wait_for("done: the adapter is in")
    finally:
        os.umask(before)
    said = "".join(server.said)
    assert f"listening on wss://0.0.0.0:{port}" in said
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    secret = Invitation.parse(invitation).secret
    assert secret not in said + joined.stderr + joined.stdout + everything_in(run_dir)
    assert secret in everything_in(state)
    assert modes(run_dir, "clients.json", "server-key.pem", "server-certificate.pem") == {0o600}
    assert modes(state, "*.json") == {0o600}
    listed = command("gpu_server", "clients", "--run-dir", run_dir)
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d UTC"
    assert re.fullmatch(rf"phone +enrolled {date}( by \S+)?, last seen {date} at 127\.0\.0\.1:\d+\n", listed.stdout)


def test_revoked_device_has_left_at_once_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    stays, goes = (Invitation.parse(enrol(run_dir, name, port)) for name in ("stays", "goes"))
    store(tmp_path / "state", stays)
    with serving(tiny_model, run_dir, port, "--host=0.0.0.0", "--clients=2", "--steps=1000000") as server:
        client = EdgeClient(
            stays.url,
            engine="torch",
            model=str(tiny_model),
            data=pairs_file("a", 9),
            state_dir=tmp_path / "state",
            give_up_after=0.1,
        )
        words = ("join", goes.text(), "--model", tiny_model, "--data", pairs_file("b", 9), "--state-dir", tmp_path / "other")
        with ExitStack() as stack:
            line = [sys.executable, "-m", "edge_client", *map(str, words)]
            joined = stack.enter_context(subprocess.Popen(line, stderr=subprocess.PIPE, text=True))
            stack.callback(joined.kill)
            honest = HonestClient(client)
            honest.goes_on(5)
            assert command("gpu_server", "revoke", "goes", "--run-dir", run_dir).returncode == 0
            _, said = joined.communicate(timeout=SECONDS)
            assert joined.returncode == 1
            assert said.splitlines()[-1].endswith("refuses: the enrolment of goes was revoked")
            honest.goes_on(5)
        again = command("edge_client", *words)
        assert again.returncode == 1
        assert again.stderr == (
            f"splitlora-edge: the server at {goes.url} does not know goes with this secret: goes was revoked, or has "
            "a new one. Join with the invitation that splitlora-server enrol goes prints there, with --renew where goes "
            "is still enrolled\n"
        )
        assert command("gpu_server", "clients", "--run-dir", run_dir).stdout.split()[0] == "stays"
        honest.goes_on(5)
        server.stop()
        honest.join()
    assert goes.secret not in "".join(server.said) + said + again.stderr


def test_other_certificate_is_refused_with_what_it_means(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    invitation = enrol(run_dir, "phone", port)
    for name in ("server-key.pem", "server-certificate.pem"):
        (run_dir / name).unlink()
    with serving(tiny_model, run_dir, port, "--host=0.0.0.0", "--steps=3") as server:
        words = ("join", invitation, "--model", tiny_model, "--data", pairs_file("phone", 9), "--state-dir", tmp_path / "state")
        joined = command("edge_client", *words)
    assert joined.returncode == 1
    assert "is not the one this device was enrolled with" in joined.stderr
    assert "either somebody is between this device and the server, or the server has another key since" in joined.stderr
    assert "joined" not in "".join(server.said)


def test_insecure_listens_plainly_where_others_reach_it_and_says_what_that_means(tiny_model: Path, tmp_path: Path) -> None:
    run_dir, port = tmp_path / "run", free_port()
    invitation = Invitation.parse(enrol(run_dir, "phone", port, "--insecure"))
    assert (invitation.pin, invitation.url) == (None, f"ws://127.0.0.1:{port}")
    with serving(tiny_model, run_dir, port, "--host=0.0.0.0", "--steps=3", "--insecure") as server:
        server.wait_for("insecure: without encryption whoever shares the network reads what passes, secrets too")
        with RawClient(port, invitation, encrypted=False) as device, RawClient(port, None, encrypted=False) as stranger:
            assert (device.status, stranger.status) == (101, 401)


def test_device_is_told_how_the_runs_server_listens(tiny_model: Path, tmp_path: Path) -> None:
    run_dir, port = tmp_path / "run", free_port()
    first = Invitation.parse(enrol(run_dir, "first", port))
    with serving(tiny_model, run_dir, port, "--steps=3"):
        done = command("gpu_server", "enrol", "second", "--run-dir", run_dir)
        second = Invitation.parse(done.stdout)
        assert (second.host, second.port, second.pin) == ("127.0.0.1", port, first.pin)
        enrol(tmp_path / "elsewhere", "somebody", port)  # makes a certificate
        other = tmp_path / "elsewhere/server-certificate.pem"
        for flag, reason in ((f"--tls-cert={other}", "has another certificate"), ("--insecure", "listens with encryption")):
            refused = command("gpu_server", "enrol", "third", "--run-dir", run_dir, flag)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert reason in refused.stderr
    assert list(enrolments_of(str(run_dir), None).clients()) == ["first", "second"]


def test_device_is_not_enrolled_where_the_server_takes_everybody_until_it_is_started_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    words = ("gpu_server", "enrol", "phone", "--run-dir", run_dir)
    with serving(tiny_model, run_dir, port, "--steps=3"):
        refused = command(*words)
        assert "was started before anybody was enrolled, and listens without encryption" in refused.stderr
        assert not (run_dir / "clients.json").exists()
    assert Invitation.parse(command(*words).stdout).port == port


def test_file_of_enrolments_is_the_one_that_the_server_was_given(tiny_model: Path, tmp_path: Path) -> None:
    run_dir, clients = tmp_path / "run", tmp_path / "clients.json"
    with serving(tiny_model, run_dir, free_port(), "--steps=3", f"--clients-file={clients}"):
        pass
    assert enrolments_of(str(run_dir), None).path == clients


def test_invitation_that_nobody_can_read_enrols_nobody(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "gpu_server", "enrol", "phone", "--run-dir", str(tmp_path), "--address", "127.0.0.1:1"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert done.stderr == "splitlora-server: standard output cannot be written: No space left on device\n"
    assert enrolments_of(str(tmp_path), None).clients() == {}


def test_without_insecure_another_address_is_encrypted_and_takes_nobody_that_is_not_enrolled(
    tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    with serving(tiny_model, tmp_path / "run", port, "--host=0.0.0.0", "--steps=3") as server:
        server.wait_for("no device is enrolled yet, and no other is let in: splitlora-server enrol NAME --run-dir")
        with RawClient(port, None) as stranger:
            assert stranger.status == 401
        with pytest.raises((EOFError, ConnectionError)):
            RawClient(port, None, encrypted=False)


def test_brought_certificate_is_the_one_that_is_served_and_pinned(tiny_model: Path, tmp_path: Path) -> None:
    run_dir, port = tmp_path / "run", free_port()
    enrol(tmp_path / "elsewhere", "somebody", port)  # makes a pair
    certificate, key = (shutil.copy(tmp_path / "elsewhere" / f"server-{part}.pem", tmp_path) for part in ("certificate", "key"))
    invitation = Invitation.parse(enrol(run_dir, "phone", port, f"--tls-cert={certificate}"))
    store(tmp_path / "state", invitation)
    flags = ("--steps=3", f"--tls-cert={certificate}", f"--tls-key={key}")
    with serving(tiny_model, run_dir, port, *flags):  # on loopback, too
        pinged = command("edge_client", "ping", "--server", invitation.url, "--state-dir", tmp_path / "state")
    assert pinged.returncode == 0, pinged.stderr
    assert not (run_dir / "server-key.pem").exists()


# The handshake, seen closely


@pytest.fixture
def guarded(tiny_model: Path, tmp_path: Path) -> Iterator["Guarded"]:
    with Guarded(tiny_model, tmp_path) as guarded:
        yield guarded


class Guarded:
    """A guarded, encrypted server in this process, of a run for two clients, and whom it knows."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.run_dir = folder / "run"
        self.enrolments = enrolments_of(str(self.run_dir), None)
        self.alice, self.bob = (invite(self.enrolments, name, address="127.0.0.1:1") for name in ("alice", "bob"))
        self.fingerprint = PretrainedModel(model).fingerprint()
        settings = {"host": "0.0.0.0", "port": 0, "clients": 2, "steps": 5, **SETTINGS, **options}
        self.server = GpuServer(model=str(model), run_dir=str(self.run_dir), **settings)

    def __enter__(self) -> "Guarded":
        self.server.__enter__()
        self.port = int(self.server.url.rpartition(":")[2])
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(None, None, None)

    def greeted(self, who: Invitation, name: str | None = None, *, instance: str = "", **options: Any) -> tuple[RawClient, Any]:
        """A connection that has said hello, and the answer."""
        client = RawClient(self.port, who, **options)
        client.say(Hello(name=name or who.name, fingerprint=self.fingerprint, instance=instance))
        return client, client.hear()

    def joined(self, who: Invitation) -> RawClient:
        client, answer = self.greeted(who)
        assert isinstance(answer, Welcome)
        client.say(Join(num_samples=4, batch_size=2, longest=4))
        return client


def test_wrong_secret_is_refused_before_any_message_is_read(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    monkeypatch.setattr("protocol.Session.receive", lambda self, data: read.append(data))
    bob_with_alices_secret = Invitation(
        host="127.0.0.1", port=guarded.port, name="bob", secret=guarded.alice.secret, pin=guarded.alice.pin
    )
    for invitation in (None, bob_with_alices_secret):
        client = RawClient.__new__(RawClient)
        monkeypatch.setattr("attacks.request", lambda who: request(who) + frame_header(2, b"pushed behind the request"))
        client.__init__(guarded.port, invitation)  # type: ignore[misc]
        with client:
            assert client.status == 401
            assert client.end() == "cut off"
    assert read == []


def test_secret_opens_the_run_for_its_own_name_only(guarded: Guarded) -> None:
    client, answer = guarded.greeted(guarded.alice, name="bob")
    with client:
        assert isinstance(answer, Failure)
        assert answer.reason == "the secret is that of alice; it does not open the run for bob"


def test_device_that_is_back_from_a_silent_link_is_welcome_at_once(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its earlier connection is open, answers nothing, and need not be waited for: nobody else knows the device's instance."""
    monkeypatch.setattr("gpu_server.serving.peer.SECONDS_TO_SHOW_LIFE", 1e6)
    first, answer = guarded.greeted(guarded.alice, instance="alice's")
    assert isinstance(answer, Welcome)
    with first:
        for _ in range(2):
            again, answer = guarded.greeted(guarded.alice, instance="alice's")
            with again:
                assert isinstance(answer, Welcome)


@pytest.mark.parametrize("instances", [("", ""), ("one", "other"), ("one", "")])
def test_second_device_with_one_secret_is_refused_while_the_first_lives(guarded: Guarded, instances: tuple[str, str]) -> None:
    first, answer = guarded.greeted(guarded.alice, instance=instances[0])
    with first:
        assert isinstance(answer, Welcome)
        answers = pongs_in_background(first)
        second, answer = guarded.greeted(guarded.alice, instance=instances[1])
        with second:
            assert isinstance(answer, Failure)
            assert answer.reason.startswith("the name alice is in use")
            assert answer.retry_after > 0
        first.say(Goodbye())
        answers.join(SECONDS)
    while True:
        third, answer = guarded.greeted(guarded.alice)
        third.close()
        if isinstance(answer, Welcome):
            return
        assert answer.reason.startswith("the name alice is in use")  # the goodbye is still on its way


def pongs_in_background(client: RawClient) -> threading.Thread:
    """Answer the server's pings, which is what a living device's library does."""

    def answer() -> None:
        try:
            while True:
                first, length = client._read(2)
                payload = client._read(length)
                if first & 15 == PING:
                    client.send(frame_header(PONG, payload))
        except (OSError, EOFError, ValueError):
            pass  # closed

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_web_page_on_the_servers_own_machine_is_refused(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), port=0, steps=1, **SETTINGS) as server:
        with connect(server.url, proxy=None):
            pass
        with pytest.raises(InvalidStatus, match="403"):
            connect(server.url, proxy=None, origin="https://example.org")  # type: ignore[arg-type]
    assert any("refused: HTTP 403, a web page of 'https://example.org'" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("GET /admin HTTP/1.1\r\n", "HTTP 404, there is nothing at '/admin'"),
        ("GET / HTTP/1.1\r\nOrigin: a\r\nOrigin: b\r\n", "HTTP 403, a web page of 'a, b'"),
        ("GET / HTTP/1.1\r\n", "HTTP 426, it speaks no WebSocket"),
        ("GET / HTTP/1.1\r\nAuthorization: x\r\nAuthorization: y\r\n", "HTTP 400, Bad Request"),
    ],
)
def test_whoever_is_refused_in_http_leaves_a_line_with_the_reason(
    guarded: "Guarded", caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, head: str, line: str
) -> None:
    secret = "" if "Authorization" in head else request(guarded.alice).decode().partition("Authorization")[2]
    lines = f"Authorization{secret.partition(chr(13))[0]}\r\n" if secret else ""
    monkeypatch.setattr("attacks.request", lambda _: f"{head}Host: a\r\n{lines}\r\n".encode("latin-1"))
    with RawClient(guarded.port, None) as client:
        assert f"HTTP {client.status}" == line.partition(",")[0]
        with suppress(*ENDED):
            while client.socket.recv(4096):
                pass  # until the server has closed: by then websockets has written its own line, too
    (said,) = [message for message in caplog.messages if "refused" in message]
    assert f"refused: {line}" in said
    assert not any(record.exc_info for record in caplog.records)


def test_one_device_has_a_few_connections(guarded: Guarded) -> None:
    with ExitStack() as stack:
        statuses = [stack.enter_context(RawClient(guarded.port, guarded.alice)).status for _ in range(6)]
        assert statuses == [101, 101, 101, 101, 429, 429]
        assert stack.enter_context(RawClient(guarded.port, guarded.bob)).status == 101


def test_new_secret_ends_the_connection_of_the_old_one(guarded: Guarded) -> None:
    with guarded.joined(guarded.alice) as thief:
        guarded.enrolments.revoke("alice")
        alice = invite(guarded.enrolments, "alice", address="127.0.0.1:1")
        answer = thief.hear()
        assert isinstance(answer, Failure)
        assert answer.reason.endswith(" was revoked")
        owner, answer = guarded.greeted(alice)
        with owner:
            assert isinstance(answer, Welcome)


class Losses(Observer):
    """Knows when a device has lost its connection."""

    def __init__(self) -> None:
        self.happened = threading.Event()

    def event_happened(self, event: RunEvent) -> None:
        if event.kind == "lost":
            self.happened.set()


def test_device_with_a_renewed_secret_goes_on_where_it_was_and_the_old_secret_opens_nothing(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    # Within a round of three steps: what the device has learnt in it stands in its own folder only.
    settings = {**SETTINGS, "model": str(tiny_model), "clients": 1, "steps": 6, "aggregate_every": 3, "port": 0}
    data, results = pairs_file("alice", 9), []
    for name, is_disturbed in (("calm", False), ("disturbed", True)):
        run_dir, lost = tmp_path / name, Losses()
        enrolments = enrolments_of(str(run_dir), None)
        enrolments.enrol("alice")
        server = GpuServer(run_dir=str(run_dir), **settings)
        server.observe(lost)
        with server:

            def join(server: GpuServer = server, enrolments: Enrolments = enrolments, name: str = name) -> EdgeClient:
                address = server.url.partition("//")[2]
                invitation = invite(enrolments, "alice", run_dir=str(tmp_path / name), address=address, renew=True)
                state = tmp_path / f"state-{name}"
                return EdgeClient.join(invitation.text(), model=str(tiny_model), engine="torch", data=data, state_dir=state)

            with ExitStack() as stack:
                first = stack.enter_context(join())
                steps = first.train()
                if is_disturbed:
                    for _ in range(4):
                        next(steps)
                    second = join()
                    assert lost.happened.wait(SECONDS)
                    with pytest.raises(SecretRefused) as caught, first:
                        next(steps)
                    assert "has a new one" in str(caught.value)
                    stack.pop_all()
                    steps = stack.enter_context(second).train()
                done = [step.number for step in steps]
            assert done == ([5, 6] if is_disturbed else [1, 2, 3, 4, 5, 6])
            assert len(list(server.train())) == 6
        results.append((run_dir / "adapter/adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_file_that_cannot_be_read_for_a_while_keeps_nobody_from_being_revoked(guarded: Guarded) -> None:
    path = guarded.run_dir / "clients.json"
    content = json.loads(path.read_text())
    looked = threading.Event()
    enrolled = guarded.server._run.door.enrolled
    assert enrolled is not None

    def looking() -> Any:
        try:
            return enrolled()
        except Exception:
            looked.set()
            raise

    object.__setattr__(guarded.server._run.door, "enrolled", looking)
    with guarded.joined(guarded.alice) as alice:
        path.write_text("{")
        assert looked.wait(SECONDS)
        del content["clients"]["alice"]
        path.write_text(json.dumps(content))
        answer = alice.hear()
        assert isinstance(answer, Failure)
        assert answer.reason.endswith(" was revoked")


def test_device_that_vanishes_while_it_is_greeted_keeps_its_name(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(5):
        client = RawClient(guarded.port, guarded.alice)
        client.say(Hello(name="alice", fingerprint=guarded.fingerprint))
        client.close()
    while True:
        client, answer = guarded.greeted(guarded.alice)
        client.close()
        if isinstance(answer, Welcome):
            return
        assert isinstance(answer, Failure)


# Peers that do not read


def make_deaf(client: RawClient) -> RawClient:
    """Have it answered more than the systems of both sides hold, and read nothing."""
    pump(client, frame_header(PING, b"x" * 125) * 500)
    return client


def test_server_stops_though_somebody_does_not_read(tiny_model: Path, tmp_path: Path) -> None:
    with Guarded(tiny_model, tmp_path) as guarded, RawClient(guarded.port, guarded.alice, read_buffer=2**12) as client:
        make_deaf(client)
        ended = threading.Thread(target=guarded.server.__exit__, args=(None, None, None))
        ended.start()
        ended.join(SECONDS)
        assert not ended.is_alive()


def test_device_gets_its_name_back_from_a_connection_that_does_not_read(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_server.serving.peer.SECONDS_TO_SHOW_LIFE", 0.2)
    with guarded.greeted(guarded.alice, read_buffer=2**12)[0] as client:
        make_deaf(client)
        again, answer = guarded.greeted(guarded.alice)
        with again:
            assert isinstance(answer, Welcome)
