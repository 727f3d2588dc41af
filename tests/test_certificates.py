"""The server's key and certificate: private from the first byte, one pair whoever comes first, clear faults."""

import hashlib
import os
import ssl
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from conftest import permissions
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import example, given
from hypothesis import strategies as st

from gpu_server import ConfigError, ServerError
from gpu_server.certificates import Certificate, given_certificate, own_certificate
from protocol.public_key import InvalidCertificate, public_key_sha256
from terminal import PackageMissing


def refused(folder: Path) -> str:
    with pytest.raises(ServerError) as caught:
        own_certificate(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def no_umask() -> object:
    before = os.umask(0)
    yield
    os.umask(before)


# Its own


def test_own_certificate_is_what_the_documentation_says(tmp_path: Path) -> None:
    own = own_certificate(tmp_path)
    loaded = x509.load_pem_x509_certificate(own.certificate_file.read_bytes())
    key = loaded.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    assert loaded.subject == loaded.issuer
    assert loaded.subject.rfc4514_string() == "CN=splitlora"
    loaded.verify_directly_issued_by(loaded)
    until = loaded.not_valid_after_utc - datetime.now(timezone.utc)
    assert timedelta(days=3650) < until < timedelta(days=3654)


def spki_sha256(certificate: x509.Certificate) -> str:
    """As RFC 7469 says, by a library that is not ours."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(certificate.public_key().public_bytes(serialization.Encoding.DER, form)).hexdigest()


def test_server_says_nothing_of_its_own_accord_after_the_handshake(tmp_path: Path) -> None:
    """A device's threads read and write at once from then on, which OpenSSL allows only where no handshake message comes."""
    of_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    of_client.check_hostname, of_client.verify_mode = False, ssl.CERT_NONE
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = of_client.wrap_bio(down, up)
    server = own_certificate(tmp_path).server_context().wrap_bio(up, down, server_side=True)
    for side in (client, server, client):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.version() == "TLSv1.3"
    down.read()
    server.do_handshake()  # it has the client's last message now
    assert down.pending == 0


def test_pin_is_the_sha256_of_the_public_key(tmp_path: Path) -> None:
    own = own_certificate(tmp_path)
    assert own.pin() == spki_sha256(x509.load_pem_x509_certificate(own.certificate_file.read_bytes()))


KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
}


def signed(key: Any, *, serial_number: int = 1, names: int = 1, extensions: int = 0) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"n{number}") for number in range(names)])
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(serial_number).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    if extensions:
        others = [x509.DNSName(f"host{number}.example") for number in range(extensions)]
        builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


@pytest.mark.parametrize("kind", KEYS)
def test_key_of_any_certificate_is_found(kind: str) -> None:
    key = KEYS[kind]()
    for options in ({}, {"serial_number": 2**158}, {"names": 0}, {"names": 40}, {"extensions": 3000}):
        certificate = signed(key, **options)
        assert public_key_sha256(certificate.public_bytes(serialization.Encoding.DER)) == spki_sha256(certificate)


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 400))
@example(b"\x00" * 4, 104, 108)  # another curve, which the other library does not know
def test_bytes_that_are_no_certificate_are_refused_and_damage_never_has_another_answer(
    inserted: bytes, start: int, end: int
) -> None:
    der = ONE.public_bytes(serialization.Encoding.DER)
    for data in (inserted, der[:start], der[:start] + inserted + der[end:]):
        try:
            found = public_key_sha256(data)
        except InvalidCertificate:
            continue
        with suppress(ValueError, UnsupportedAlgorithm):  # what the other library does not take has no key to be compared
            assert found == spki_sha256(x509.load_der_x509_certificate(data))


ONE = signed(KEYS["P-256"]())


def test_certificate_once_made_stays(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    first = own_certificate(folder).pin()
    assert own_certificate(folder).pin() == first
    assert own_certificate(tmp_path / "other").pin() != first


def test_server_speaks_tls_1_3_only(tmp_path: Path) -> None:
    assert own_certificate(tmp_path).server_context().minimum_version is ssl.TLSVersion.TLSv1_3


@pytest.mark.usefixtures("no_umask")
def test_key_is_private_before_its_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {}
    real_open = os.open

    def open_and_look(path: "os.PathLike[str]", flags: int, *arguments: int, **options: int) -> int:
        descriptor = real_open(path, flags, *arguments, **options)
        if str(path).endswith(".part"):
            modes[Path(path).name] = (stat.S_IMODE(os.fstat(descriptor).st_mode), bool(flags & os.O_EXCL))
        return descriptor

    monkeypatch.setattr(os, "open", open_and_look)
    own = own_certificate(tmp_path)
    (key,) = (found for name, found in modes.items() if name.startswith("server-key.pem."))
    assert key == (0o600, True)
    assert permissions(own.key_file) == 0o600


def test_files_appear_whole_and_the_key_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    appeared = []
    real_replace = os.replace

    def look_and_replace(source: Path, target: Path) -> None:
        assert b"-----END" in source.read_bytes()
        appeared.append(target.name)
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    own_certificate(tmp_path)
    assert appeared == ["server-key.pem", "server-certificate.pem"]


def test_unfinished_file_of_a_killed_writer_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "server-key.pem.0123.part").write_text("half a k")
    own_certificate(tmp_path)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_full_disk_leaves_no_half_of_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    monkeypatch.undo()
    own_certificate(tmp_path)


def test_two_who_are_first_at_once_end_with_one_pair(tmp_path: Path) -> None:
    for attempt in range(10):
        barrier = threading.Barrier(2)

        def make(folder: Path = tmp_path / str(attempt), barrier: threading.Barrier = barrier) -> str:
            barrier.wait(timeout=60)
            return own_certificate(folder).pin()  # loads both files, so they belong together

        with ThreadPoolExecutor(2) as pool:
            fingerprints = [future.result(timeout=60) for future in [pool.submit(make), pool.submit(make)]]
        assert fingerprints == [own_certificate(tmp_path / str(attempt)).pin()] * 2


@pytest.mark.parametrize("gone", ["server-key.pem", "server-certificate.pem"])
def test_half_a_pair_is_named_and_not_made_anew(tmp_path: Path, gone: str) -> None:
    own = own_certificate(tmp_path)
    (there,) = {own.key_file, own.certificate_file} - {tmp_path / gone}
    (tmp_path / gone).unlink()
    said = refused(tmp_path)
    assert said.startswith(f"{there} is there and {gone} is not")
    assert f"delete {there}" in said
    assert "every device must be enrolled again" in said
    assert not (tmp_path / gone).exists()


def test_key_of_another_certificate_is_noticed(tmp_path: Path) -> None:
    own, other = own_certificate(tmp_path / "own"), own_certificate(tmp_path / "other")
    own.key_file.write_bytes(other.key_file.read_bytes())
    said = refused(tmp_path / "own")
    assert "key values mismatch" in said
    assert f"delete {own.key_file} and {own.certificate_file}" in said


@pytest.mark.parametrize("name", ["server-key.pem", "server-certificate.pem"])
@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"]
)
def test_damaged_file_is_a_sentence_and_stays(tmp_path: Path, name: str, content: bytes) -> None:
    own_certificate(tmp_path)
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path)
    assert name in said
    assert "delete" in said
    assert (tmp_path / name).read_bytes() == content


def test_folder_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file" / "run") in refused(tmp_path / "file" / "run")
    (tmp_path / "server-key.pem").mkdir()
    (tmp_path / "server-certificate.pem").mkdir()
    assert "cannot be read" in refused(tmp_path)


def test_missing_library_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(PackageMissing, match=r"^making a certificate needs cryptography, .*'splitlora\[server\]'$"):
        own_certificate(tmp_path)


def test_certificate_that_is_there_needs_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = own_certificate(tmp_path).pin()
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert own_certificate(tmp_path).pin() == first


# Somebody's


def test_given_certificate_is_taken_with_its_chain_and_comments(tmp_path: Path) -> None:
    own, authority = own_certificate(tmp_path / "own"), own_certificate(tmp_path / "authority")
    chain = tmp_path / "chain.pem"
    chain.write_bytes(
        "Müllers Zertifikat\n".encode() + own.certificate_file.read_bytes() + authority.certificate_file.read_bytes()
    )
    given = given_certificate(str(chain), str(own.key_file))
    assert given == Certificate(chain, own.key_file)
    assert given.pin() == own.pin()


def test_none_given_is_none() -> None:
    assert given_certificate(None, None) is None


def test_one_without_the_other_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"certificate c\.pem needs its key"):
        given_certificate("c.pem", None)
    with pytest.raises(ConfigError, match=r"key k\.pem needs its certificate"):
        given_certificate(None, "k.pem")


def test_given_files_that_are_not_there_or_no_pair_are_refused(tmp_path: Path) -> None:
    one, other = own_certificate(tmp_path / "one"), own_certificate(tmp_path / "other")
    with pytest.raises(ServerError, match=r"absent\.pem cannot be read: No such file"):
        given_certificate(str(tmp_path / "absent.pem"), str(one.key_file))
    with pytest.raises(ServerError, match=r"absent\.pem cannot be read: No such file"):
        given_certificate(str(one.certificate_file), str(tmp_path / "absent.pem"))
    with pytest.raises(ServerError, match="key values mismatch"):
        given_certificate(str(one.certificate_file), str(other.key_file))


def test_encrypted_key_is_refused_instead_of_asking_at_the_terminal(tmp_path: Path) -> None:
    own = own_certificate(tmp_path)
    key = serialization.load_pem_private_key(own.key_file.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    protection = serialization.BestAvailableEncryption(b"passphrase")
    encrypted.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection))
    with pytest.raises(ServerError, match=r"encrypted\.pem is encrypted; write it without a passphrase"):
        given_certificate(str(own.certificate_file), str(encrypted))
