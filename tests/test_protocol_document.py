"""PROTOCOL.md says what the code does."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgpack
import numpy as np
import pytest
from protocol_samples import SAMPLES, inflate

import protocol
from protocol import CODECS, DELTA, HANDSHAKE_BYTES, PROTOCOL_VERSION, TRANSITIONS, Message, RunSettings, Side, State, encode
from protocol.codecs import Coded
from protocol.encoding import MAX_ELEMENTS, MAX_TENSOR_ELEMENTS, MAX_TEXT
from protocol.invitation import FORM
from protocol.rounding import Dither

DOCUMENT = (Path(__file__).parent.parent / "PROTOCOL.md").read_text(encoding="utf-8")
KINDS = {kind.__name__: kind for kind in get_args(Message)}
WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    tuple[str, ...]: "list of texts",
    int | None: "integer or nil",
    protocol.messages.Floats: "floats",
    protocol.messages.CodedFloats: "coded floats",
    protocol.messages.Integers: "integers",
    protocol.messages.CodedFloats | None: "coded floats or nil",
    protocol.messages.Integers | None: "integers or nil",
    protocol.Seconds: "Seconds",
    protocol.Tensors: "map of floats",
    RunSettings: "RunSettings",
}

every_kind = pytest.mark.parametrize("kind", KINDS)


def tables(text: str, *header: str) -> list[list[list[str]]]:
    """The rows of every table with this header."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        first, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        if first == list(header):
            found.append(rows)
    return found


def section(kind: str) -> str:
    """What stands under the heading of a message."""
    _, _, rest = DOCUMENT.partition(f"\n### {kind}\n")
    assert rest, f"PROTOCOL.md has no section on {kind}"
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


def documented_fields(rows: list[list[str]]) -> dict[str, str]:
    return {name.strip("`"): kind for name, kind, _ in rows}


def actual_fields(kind: type) -> dict[str, str]:
    types = get_type_hints(kind, include_extras=True)
    return {field.name: WORDS[types[field.name]] for field in dataclasses.fields(kind)}


def test_it_is_about_this_version() -> None:
    assert DOCUMENT.startswith(f"# The splitlora protocol, version {PROTOCOL_VERSION}\n")


def test_its_table_of_the_conversation_is_the_programs() -> None:
    (rows,) = tables(DOCUMENT, "state", "sender", "message", "next state")
    documented: dict[tuple[State, Side, type], State] = {}
    for state, sender, message, next_state in rows:
        states = [other for other in State if other is not State.CLOSED] if state == "any but closed" else [State(state)]
        for each in states:
            assert (each, Side(sender), KINDS[message]) not in documented
            documented[each, Side(sender), KINDS[message]] = State(next_state)
    assert documented == TRANSITIONS


def test_it_has_a_section_on_every_message_in_the_programs_order() -> None:
    headings = re.findall(r"^### (\w+)$", DOCUMENT.partition("\n## Messages\n")[2], re.MULTILINE)
    assert headings == list(KINDS)


@every_kind
def test_it_lists_the_fields_of_a_message_and_their_types_in_order(kind: str) -> None:
    rows, *_ = [*tables(section(kind), "field", "type", "meaning"), []]
    assert list(documented_fields(rows).items()) == list(actual_fields(KINDS[kind]).items())


def test_it_lists_the_settings_of_a_run_and_their_types_in_order() -> None:
    _, rows = tables(section("Welcome"), "field", "type", "meaning")
    assert list(documented_fields(rows).items()) == list(actual_fields(RunSettings).items())


def test_it_lists_the_parts_of_a_clients_time_in_order() -> None:
    (rows,) = tables(section("Activations"), "part", "type", "meaning")
    assert list(documented_fields(rows).items()) == list(actual_fields(protocol.Seconds).items())


def test_it_names_the_defaults_of_fields_that_may_be_absent() -> None:
    _, settings = tables(section("Welcome"), "field", "type", "meaning")
    described = [(RunSettings, settings)]
    described += [(kind, ([*tables(section(name), "field", "type", "meaning"), []])[0]) for name, kind in KINDS.items()]
    for owner, rows in described:
        documented = {name.strip("`"): meaning.rpartition("default ")[2] for name, _, meaning in rows if "default " in meaning}
        defaults = {field.name: field.default for field in dataclasses.fields(owner)}
        actual = {name: default for name, default in defaults.items() if default is not dataclasses.MISSING}
        assert documented == {name: in_words(default) for name, default in actual.items()}, owner


def in_words(default: Any) -> str:
    return "nil" if default is None else f"{default:g}" if isinstance(default, int | float) else default or "empty"


def test_its_invitation_is_the_programs() -> None:
    assert f"\n    {FORM}\n" in DOCUMENT


@every_kind
def test_it_names_the_sender_of_a_message(kind: str) -> None:
    (side,) = {side for _, side, message in TRANSITIONS if message is KINDS[kind]}
    assert section(kind).lstrip().startswith(f"{side.value.capitalize()} to {side.peer.value}")


def test_every_type_of_a_field_is_explained() -> None:
    (rows,) = tables(DOCUMENT, "type", "in msgpack")
    assert sorted(name for name, _ in rows) == sorted(WORDS.values())


def test_it_names_the_limits() -> None:
    (rows,) = tables(DOCUMENT, "what", "limit")
    limits = [cell.removesuffix(" bytes") for _, cell in rows]
    assert limits == [f"{HANDSHAKE_BYTES:,}", "see below", f"{MAX_ELEMENTS:,}", f"{MAX_TENSOR_ELEMENTS}", f"{MAX_TEXT:,}"]


def test_its_example_of_a_tensor_is_what_is_sent() -> None:
    ((plain, shuffled),) = re.findall(r"have the bytes `([0-9 ]+)`, and travel as `([0-9 ]+)`", DOCUMENT)
    batch = dataclasses.replace(
        SAMPLES["Activations"], labels=np.array([1, 258], np.int32), label_counts=np.array([1, 1], np.int32)
    )
    assert bytes.fromhex(plain) == batch.labels.tobytes()
    assert msgpack.packb(["int32", [2], bytes.fromhex(shuffled)]) in inflate(encode(batch))


def test_its_example_of_codes_is_what_is_sent() -> None:
    ((codes, packed),) = re.findall(r"of the codes ([-0-9, ]+) `int4` makes the bytes `([0-9a-f ]+)`", DOCUMENT)
    values = np.array([[int(code) for code in codes.split(",")]], np.float32)
    assert Coded.of(values, "int4", Dither(0)).parts[-1] == bytes.fromhex(packed)


def test_it_names_the_codecs() -> None:
    (rows,) = tables(DOCUMENT, "codec", "parts")
    assert [name for cell, _ in rows for name in re.findall(r"`(\w+)`", cell)] == [*CODECS, DELTA]
    for codec, row in zip(CODECS, (rows[0], rows[1], rows[1]), strict=True):
        assert len(Coded.of(np.ones((2, 3), np.float32), codec).parts) == len(row[1].split(","))


def test_it_names_no_message_that_does_not_exist() -> None:
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", DOCUMENT))
    assert named <= {*KINDS, "RunSettings", "Seconds"}
