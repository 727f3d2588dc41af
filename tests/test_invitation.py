"""The string that enrols a device: it survives being copied, and whatever is wrong with it is said without its secret."""

import base64
import shlex
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.invitation import InvalidInvitation, Invitation

SECRET = base64.urlsafe_b64encode(bytes(range(100, 132))).decode().rstrip("=")
PIN = bytes(range(32)).hex()
PIN_TEXT = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
TEXT = f"splitlora://192.168.1.20:8765/#phone-1/{SECRET}/{PIN_TEXT}"

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
hosts = st.ip_addresses().map(str) | st.from_regex(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,60}", fullmatch=True)
digests = st.binary(min_size=32, max_size=32)
invitations = st.builds(
    Invitation,
    host=hosts,
    port=st.integers(1, 65535),
    name=names,
    secret=digests.map(lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")),
    pin=st.none() | digests.map(bytes.hex),
)


def invitation(**changes: object) -> Invitation:
    parts = {"host": "192.168.1.20", "port": 8765, "name": "phone-1", "secret": SECRET, "pin": PIN, **changes}
    return Invitation(**parts)  # type: ignore[arg-type]


def fault_of(text: str) -> str:
    """What is said against it; empty where it is an invitation."""
    try:
        Invitation.parse(text)
    except InvalidInvitation as error:
        return str(error)
    return ""


def refused(text: str) -> str:
    with pytest.raises(InvalidInvitation) as caught:
        Invitation.parse(text)
    return str(caught.value)


# What it is


def test_text_is_what_the_documentation_says() -> None:
    assert invitation().text() == TEXT
    assert Invitation.parse(TEXT) == invitation()


def test_without_a_pin_the_text_ends_with_the_secret_and_the_connection_is_plain() -> None:
    plain = invitation(pin=None)
    assert plain.text() == f"splitlora://192.168.1.20:8765/#phone-1/{SECRET}"
    assert plain.url == "ws://192.168.1.20:8765"
    assert invitation().url == "wss://192.168.1.20:8765"


def test_ipv6_stands_in_brackets_outside_and_without_them_inside() -> None:
    parsed = Invitation.parse(f"splitlora://[fd00:0:0::1]:8765/#phone-1/{SECRET}/{PIN_TEXT}")
    assert parsed.host == "fd00::1"
    assert parsed.url == "wss://[fd00::1]:8765"
    assert parsed.text() == f"splitlora://[fd00::1]:8765/#phone-1/{SECRET}/{PIN_TEXT}"


def test_two_spellings_of_a_host_are_one() -> None:
    assert invitation(host="Workstation.local") == invitation(host="workstation.LOCAL")
    assert invitation(host="FD00::0001") == invitation(host="fd00:0::1")


def test_credentials_are_name_and_secret() -> None:
    assert invitation().credentials == ("phone-1", SECRET)


@given(invitations)
def test_every_invitation_survives_its_text(original: Invitation) -> None:
    assert Invitation.parse(original.text()) == original
    assert Invitation.parse(f"  {original.text()}\n") == original


@given(invitations)
def test_text_needs_no_quotes_in_a_shell(original: Invitation) -> None:
    text = original.text()
    assert set(text) <= set(string.ascii_letters + string.digits + "._-:/#[]")
    assert not text.startswith("#")
    assert shlex.split(f"splitlora-edge join {text}") == ["splitlora-edge", "join", text]


@given(invitations)
def test_repr_does_not_show_the_secret(original: Invitation) -> None:
    shown = repr(original) + str(original) + f"{original}"
    assert original.secret not in shown
    assert original.name in shown


# What it is not


@given(st.text())
def test_any_other_text_is_refused_as_no_invitation(text: str) -> None:
    refused(text)
    for beginning in ("splitlora://", "splitlora://h:1/#", f"splitlora://h:1/#n/{SECRET}/"):
        assert "\n" not in fault_of(beginning + text)


@given(st.integers(0, len(TEXT)), st.integers(0, len(TEXT)), st.text(max_size=5))
def test_no_damage_to_the_text_makes_an_error_repeat_the_secret(start: int, end: int, inserted: str) -> None:
    said = fault_of(TEXT[:start] + inserted + TEXT[end:])
    assert not any(SECRET[i : i + 6] in said for i in range(len(SECRET) - 5))  # not even a piece of it


def test_secret_in_the_place_of_another_part_is_not_repeated_either() -> None:
    for text in (
        f"{SECRET}",
        f"splitlora://{SECRET}!:8765/#phone-1/{SECRET}",
        f"splitlora://h:{SECRET}/#phone-1/{SECRET}",
        f"splitlora://h:1/#-{SECRET}/{SECRET}",
        f"splitlora://h:1/#phone-1/{SECRET}/{SECRET}x",
    ):
        assert SECRET not in refused(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (TEXT.replace("splitlora://", "wss://"), "splitlora://HOST:PORT"),
        (TEXT.partition("#")[0], "after '/#'"),
        (TEXT.replace(f"/{SECRET}/{PIN_TEXT}", ""), "after '/#'"),
        (TEXT + "/more", "after '/#'"),
        (TEXT.replace("192.168.1.20", ""), "host"),
        (TEXT.replace("192.168.1.20", "a$b"), "host"),
        (TEXT.replace("192.168.1.20", "fd00::1"), "brackets"),
        (TEXT.replace("192.168.1.20", "[192.168.1.20]"), "brackets"),
        (TEXT.replace("192.168.1.20", "[fe80::1%eth0]"), "host"),
        (TEXT.replace("192.168.1.20", "[:::]"), "host"),
        (TEXT.replace(":8765", ""), "host"),
        (TEXT.replace("8765", "0"), "port"),
        (TEXT.replace("8765", "65536"), "port"),
        (TEXT.replace("8765", "٣"), "port"),
        (TEXT.replace("phone-1", ""), "name"),
        (TEXT.replace("phone-1", "my phone"), "name"),
        (TEXT.replace(SECRET, SECRET[:-1]), "secret"),
        (TEXT.replace(SECRET, SECRET + "="), "secret"),
        (TEXT.replace(SECRET, SECRET[:-1] + "B"), "secret"),
        (TEXT.replace(PIN_TEXT, PIN_TEXT[:-2]), "pin"),
        (TEXT.replace(PIN_TEXT, ""), "pin"),
        (TEXT.replace(PIN_TEXT, PIN), "pin"),
    ],
)
def test_error_names_the_part_that_is_wrong(text: str, part: str) -> None:
    assert part in refused(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "a b"},
        {"port": 0},
        {"port": True},
        {"name": "my phone"},
        {"secret": "short"},
        {"pin": PIN.upper().replace("0", "A")},
    ],
)
def test_parts_are_checked_however_an_invitation_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInvitation):
        invitation(**wrong)
