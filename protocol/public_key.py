"""Which key a certificate is for: what a device knows its server by, as RFC 7469 pins keys."""

import hashlib

__all__ = ["InvalidCertificate", "public_key_sha256"]

INTEGER, SEQUENCE, VERSION = 0x02, 0x30, 0xA0
BEFORE_THE_KEY = (INTEGER, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE)  # serial number, algorithm, issuer, validity, subject


class InvalidCertificate(ValueError):
    """Not an X.509 certificate in DER."""


def public_key_sha256(certificate: bytes) -> str:
    """
    SHA-256 of a certificate's SubjectPublicKeyInfo (RFC 5280, 4.1), 64 lowercase hexadecimal digits. It stays the same where a
    certificate is renewed with the same key.

    Args:
        certificate: in DER.

    Raises:
        InvalidCertificate: it is none.
    """
    whole, rest = _element(certificate, SEQUENCE)
    if rest:
        raise InvalidCertificate("something follows the certificate")
    fields, _ = _element(whole, SEQUENCE)
    if fields[:1] == bytes([VERSION]):
        _, fields = _element(fields, VERSION)
    for tag in BEFORE_THE_KEY:
        _, fields = _element(fields, tag)
    _, after = _element(fields, SEQUENCE)
    return hashlib.sha256(fields[: len(fields) - len(after)]).hexdigest()


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    """The content of the element of this tag that ``data`` begins with, and what follows it."""
    if len(data) < 2 or data[0] != tag:
        raise InvalidCertificate("not an X.509 certificate in DER")
    length, start = data[1], 2
    if length >= 0x80:
        start += length - 0x80
        digits = data[2:start]
        length = int.from_bytes(digits, "big")
        # DER knows one way to write a length. Others might be read in another way by somebody else.
        if not 1 <= len(digits) <= 4 or digits[0] == 0 or length < 0x80:
            raise InvalidCertificate("not an X.509 certificate in DER")
    if len(data) < start + length:
        raise InvalidCertificate("the certificate is cut short")
    return data[start : start + length], data[start + length :]
