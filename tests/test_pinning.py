"""A device speaks to the certificate it was enrolled with, and says nothing to any other."""

import hashlib
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from conftest import run_in_thread
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from websockets.datastructures import Headers
from websockets.http11 import Request
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from edge_client.pinning import CertificateChanged, PinnedContext
from gpu_server.certificates import Certificate, own_certificate

SECONDS = 30  # after which a test that waits is wrong


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return own_certificate(tmp_path / "own")


@pytest.fixture
def impostor(tmp_path: Path) -> Certificate:
    return own_certificate(tmp_path / "impostor")


def all_it_is_sent(listening: socket.socket, context: ssl.SSLContext) -> bytes:
    """Every application byte of one caller, from a server that is glad of any."""
    accepted, _ = listening.accept()
    accepted.settimeout(SECONDS)
    received = b""
    with context.wrap_socket(accepted, server_side=True) as connection:  # raises if the handshake fails
        try:
            while data := connection.recv(4096):
                received += data
        except OSError:
            pass  # the caller has hung up without a goodbye
    return received


@contextmanager
def listening_server(context: ssl.SSLContext) -> Iterator[tuple[int, "Future[bytes]"]]:
    """A port, and what one caller will have sent to it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(SECONDS)
        received = run_in_thread(lambda: all_it_is_sent(listening, context))
        yield listening.getsockname()[1], received
        received.exception(timeout=SECONDS)


def test_right_pin_connects_and_what_is_sent_arrives(certificate: Certificate) -> None:
    with listening_server(certificate.server_context()) as (port, received):
        caller = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        with PinnedContext(certificate.pin()).wrap_socket(caller, server_hostname="127.0.0.1") as connection:
            assert connection.version() == "TLSv1.3"
            connection.sendall(b"the secret")
        assert received.result(timeout=SECONDS) == b"the secret"


def renewed(certificate: Certificate, folder: Path) -> Certificate:
    """Another certificate for the same key, as whoever renews one gets it."""
    folder.mkdir()
    key = serialization.load_pem_private_key(certificate.key_file.read_bytes(), None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "renewed")])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(7)
    made = builder.not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, hashes.SHA256())  # type: ignore[arg-type]
    (folder / "renewed.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return Certificate(folder / "renewed.pem", certificate.key_file)


def hears(certificate: Certificate, *pins: str) -> bytes:
    """What a server with this certificate hears of a device with these pins."""
    with listening_server(certificate.server_context()) as (port, received):
        caller = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        try:
            with PinnedContext(*pins).wrap_socket(caller, server_hostname="127.0.0.1") as connection:
                connection.sendall(b"the secret")
        except CertificateChanged:
            pass
        return received.result(timeout=SECONDS)


def test_renewal_with_the_same_key_locks_nobody_out(certificate: Certificate, tmp_path: Path) -> None:
    again = renewed(certificate, tmp_path / "renewed")
    assert hears(again, certificate.pin()) == b"the secret"


def test_announced_key_is_accepted_beside_the_one_before(certificate: Certificate, impostor: Certificate) -> None:
    before, announced = impostor, certificate
    pins = (before.pin(), announced.pin())
    assert hears(before, *pins) == hears(announced, *pins) == b"the secret"
    assert hears(before, announced.pin()) == b""
    context = PinnedContext(*pins)
    for each in (before, announced):
        assert context.pin_of(ssl.PEM_cert_to_DER_cert(each.certificate_file.read_text())) == each.pin()


def test_invitation_that_holds_the_certificates_hash_is_still_one(certificate: Certificate, tmp_path: Path) -> None:
    der = ssl.PEM_cert_to_DER_cert(certificate.certificate_file.read_text())
    pin = hashlib.sha256(der).hexdigest()
    assert hears(certificate, pin) == b"the secret"
    assert hears(renewed(certificate, tmp_path / "renewed"), pin) == b""


def test_wrong_pin_is_refused_before_any_byte(certificate: Certificate, impostor: Certificate) -> None:
    with listening_server(impostor.server_context()) as (port, received):
        caller = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        with pytest.raises(CertificateChanged):
            PinnedContext(certificate.pin()).wrap_socket(caller, server_hostname="127.0.0.1")
        assert caller.fileno() == -1
        # The handshake was whole, so that something could have been sent; and the connection is closed, or this would wait.
        assert received.result(timeout=SECONDS) == b""


def test_message_shows_both_fingerprints_and_what_to_do(certificate: Certificate, impostor: Certificate) -> None:
    with listening_server(impostor.server_context()) as (port, _):
        caller = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        with pytest.raises(CertificateChanged) as caught:
            PinnedContext(certificate.pin()).wrap_socket(caller)
    said = str(caught.value)
    for part in (
        certificate.pin()[:16],
        impostor.pin()[:16],
        "somebody is between",
        "another key since",
        "splitlora-server enrol NAME",
        "--renew",
        "splitlora-edge join",
    ):
        assert part in said
    assert certificate.pin()[:17] not in said
    assert "\n" not in said


def test_socket_whose_handshake_is_put_off_is_not_handed_out(certificate: Certificate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        caller = socket.create_connection(listening.getsockname(), timeout=SECONDS)
        with pytest.raises(ValueError, match="handshake"):
            PinnedContext(certificate.pin()).wrap_socket(caller, do_handshake_on_connect=False)
        assert caller.fileno() == -1


def test_ways_around_the_check_are_closed(certificate: Certificate) -> None:
    with pytest.raises(NotImplementedError):
        PinnedContext(certificate.pin()).wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO())


def test_server_of_an_older_tls_is_not_spoken_to(certificate: Certificate) -> None:
    context = certificate.server_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with listening_server(context) as (port, received):
        caller = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        with pytest.raises(ssl.SSLError):
            PinnedContext(certificate.pin()).wrap_socket(caller)
        assert isinstance(received.exception(timeout=SECONDS), ssl.SSLError)


@contextmanager
def websocket_server(certificate: Certificate) -> Iterator[tuple[str, list[Headers]]]:
    """A URL, and the headers of every request that comes."""
    requests: list[Headers] = []

    def note(connection: ServerConnection, request: Request) -> None:
        requests.append(request.headers)

    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, "127.0.0.1", 0, ssl=certificate.server_context(), process_request=note) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"wss://127.0.0.1:{server.socket.getsockname()[1]}", requests
        finally:
            server.shutdown()
            thread.join(timeout=SECONDS)


def test_websocket_to_the_right_certificate_carries_the_secret(certificate: Certificate) -> None:
    with websocket_server(certificate) as (url, requests):
        context = PinnedContext(certificate.pin())
        with connect(url, ssl=context, proxy=None, additional_headers={"Authorization": "the secret"}) as connection:
            connection.send("hello")
            assert connection.recv(timeout=SECONDS) == "hello"
        assert [headers["Authorization"] for headers in requests] == ["the secret"]


def test_websocket_to_another_certificate_sends_no_request(certificate: Certificate, impostor: Certificate) -> None:
    with websocket_server(impostor) as (url, requests):
        context = PinnedContext(certificate.pin())
        with pytest.raises(CertificateChanged):
            connect(url, ssl=context, proxy=None, additional_headers={"Authorization": "the secret"})
        assert requests == []
    assert requests == []
