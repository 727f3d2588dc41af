"""Messages as bytes: what is sent arrives, and nothing else does any harm."""

import dataclasses
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from protocol_samples import (
    SAMPLES,
    SETTINGS,
    WITH_NOISE,
    assert_same,
    compress,
    frame,
    frame_of,
    inflate,
    plain,
    tensor,
    tensor_of,
)

import protocol
from protocol import (
    HANDING_OVER_BYTES,
    HANDSHAKE_BYTES,
    PIECE_BYTES,
    ActivationGradient,
    Activations,
    Array,
    EdgeAdapter,
    EvaluationLoss,
    Hello,
    InvalidName,
    Message,
    Part,
    PartFile,
    Piece,
    Ping,
    RemoteProtocolError,
    RunSettings,
    Seconds,
    Start,
    Welcome,
    compressed_bound,
    decode,
    encode,
    largest_message_bytes,
    zstd,
)

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "protocol-3.json").read_text())
EARLIER: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "earlier-3.json").read_text())
"""Messages as releases wrote them that had fewer fields."""
KINDS = [kind.__name__ for kind in get_args(Message)]
MEGABYTE = 2**20

every_kind = pytest.mark.parametrize("kind", KINDS)
some_hundred = settings(max_examples=200)


def refusal(data: bytes, max_bytes: int = HANDSHAKE_BYTES) -> str:
    """The error ``data`` causes, which is the right one and short."""
    with pytest.raises(RemoteProtocolError) as caught:
        decode(data, max_bytes)
    assert 0 < len(str(caught.value)) < 1000
    return str(caught.value)


def decode_if_possible(data: bytes) -> None:
    """Any error but RemoteProtocolError fails the test."""
    try:
        message = decode(data, HANDSHAKE_BYTES)
    except RemoteProtocolError:
        refusal(data)
    else:
        assert type(message).__name__ in KINDS


# What is sent arrives


def test_there_is_a_sample_of_every_kind() -> None:
    assert list(SAMPLES) == KINDS


@every_kind
def test_a_message_survives_the_round_trip(kind: str) -> None:
    assert_same(decode(encode(SAMPLES[kind]), HANDSHAKE_BYTES), SAMPLES[kind])


@every_kind
def test_a_message_is_encoded_as_the_document_says(kind: str) -> None:
    assert inflate(encode(SAMPLES[kind])) == msgpack.packb([3, kind, plain(SAMPLES[kind])])


@every_kind
def test_the_bytes_of_version_3_are_still_understood(kind: str) -> None:
    assert_same(decode(compress(bytes.fromhex(GOLDEN[kind])), HANDSHAKE_BYTES), SAMPLES[kind])


@every_kind
def test_the_bytes_of_version_3_are_still_written(kind: str) -> None:
    assert inflate(encode(SAMPLES[kind])).hex() == GOLDEN[kind]


def test_the_bytes_of_earlier_releases_are_understood_and_mean_what_they_meant() -> None:
    hello, welcome = (decode(compress(bytes.fromhex(EARLIER[kind])), HANDSHAKE_BYTES) for kind in ("Hello", "Welcome"))
    assert_same(hello, dataclasses.replace(SAMPLES["Hello"], abilities=(), instance=""))
    assert_same(welcome, dataclasses.replace(SAMPLES["Welcome"], settings=SETTINGS, next_pin="", abilities=()))
    assert isinstance(welcome, Welcome)
    assert (welcome.settings.labels, welcome.settings.abilities()) == ("server", set())


floats = st.sampled_from(["<f4", "<f8", ">f4", ">f8"]).flatmap(
    lambda dtype: np_st.arrays(
        dtype,
        np_st.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=8 * int(dtype[2:])),
    )
)
layouts = st.sampled_from(
    [
        lambda array: array,
        np.asfortranarray,
        lambda array: array.T,
        lambda array: array[::-1, ::2],
        lambda array: array[1:, 1:],
        lambda array: np.broadcast_to(array[:1, :1], (3, 2)) if array.size else array,
    ]
)


@given(floats, layouts)
@settings(some_hundred, max_examples=100)
def test_a_float_tensor_of_any_shape_and_layout_survives_bit_by_bit(array: Array, layout: Any) -> None:
    sent = layout(array)
    decoded = decode(encode(EdgeAdapter(step=1, tensors={"a": sent})), HANDSHAKE_BYTES)
    assert isinstance(decoded, EdgeAdapter)
    arrived = decoded.tensors["a"]
    assert (arrived.dtype, arrived.shape) == (sent.dtype.newbyteorder("="), sent.shape)
    assert arrived.tobytes() == sent.astype(arrived.dtype).tobytes()


@given(np_st.arrays(np.int32, st.integers(1, 8), elements=st.integers(-(2**31), 2**31 - 1)), st.sampled_from([1, -1, 2]))
@settings(some_hundred, max_examples=100)
def test_an_integer_tensor_survives_bit_by_bit(array: Array, stride: int) -> None:
    labels = array[::stride]
    count = np.array([len(labels)], np.int32)
    values = np.zeros((len(labels), 2), np.float32)
    batch = Activations(step=1, seconds=Seconds(), lengths=count, label_counts=count, labels=labels, values=values)
    assert_same(decode(encode(batch), HANDSHAKE_BYTES), dataclasses.replace(batch, labels=np.ascontiguousarray(labels)))


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (1, 1), (2, 3)])
def test_a_tensor_that_arrived_can_be_written_to(shape: tuple[int, int]) -> None:
    message = decode(encode(EdgeAdapter(step=1, tensors={"a": np.zeros(shape)})), HANDSHAKE_BYTES)
    assert isinstance(message, EdgeAdapter)
    assert message.tensors["a"].flags.writeable
    assert message.tensors["a"].flags.aligned


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.bool_, object])
def test_a_tensor_of_a_dtype_the_protocol_does_not_have_cannot_be_sent(dtype: Any) -> None:
    with pytest.raises(TypeError, match="cannot send"):
        encode(ActivationGradient(step=1, loss=0.0, labelled_tokens=1, values=np.zeros((1, 1), dtype)))


# How messages evolve


@every_kind
def test_unknown_fields_are_ignored(kind: str) -> None:
    later = {**plain(SAMPLES[kind]), "later": [1, {"x": None}], "more": tensor(np.zeros(3, np.float32))}
    assert_same(decode(frame_of(kind, later), HANDSHAKE_BYTES), SAMPLES[kind])


def test_unknown_fields_of_the_settings_are_ignored() -> None:
    fields = plain(SAMPLES["Welcome"])
    fields["settings"]["later"] = 1
    assert_same(decode(frame_of("Welcome", fields), HANDSHAKE_BYTES), SAMPLES["Welcome"])


def test_absent_fields_have_their_defaults() -> None:
    fields = plain(SAMPLES["Welcome"])
    for name in ("epochs", "aggregate_every", "activation_codec", "gradient_codec"):
        del fields["settings"][name]
    defaults = {"aggregate_every": 1, "activation_codec": "exact", "gradient_codec": "exact"}
    message = decode(frame_of("Welcome", fields), HANDSHAKE_BYTES)
    assert isinstance(message, Welcome)
    assert message.settings == dataclasses.replace(WITH_NOISE, **defaults)
    del fields["settings"]["steps"]
    fields["settings"]["epochs"] = 2
    message = decode(frame_of("Welcome", fields), HANDSHAKE_BYTES)
    assert isinstance(message, Welcome)
    assert message.settings == dataclasses.replace(WITH_NOISE, steps=None, epochs=2, **defaults)


DEFAULTS: dict[str, dict[str, Any]] = {
    "Hello": {"codecs": (), "abilities": (), "instance": ""},
    "Ping": {"index": 0},
    "Pong": {"index": 0, "model": "", "waiting_for": (), "waiting_seconds": 0.0, "edge_weights": ""},
    "Welcome": {"restarts": 0, "next_pin": ""},
    "Join": {"step": 0},
    "Start": {"round": 0},
    "EdgeAdapter": {"checkpoint": 0},
    "RunEnd": {"best_step": 0},
    "Failure": {"retry_after": 0.0},
}


@every_kind
def test_absent_fields_of_a_message_have_their_defaults(kind: str) -> None:
    defaults = DEFAULTS.get(kind, {})
    fields = {name: value for name, value in plain(SAMPLES[kind]).items() if name not in defaults}
    assert_same(decode(frame_of(kind, fields), HANDSHAKE_BYTES), dataclasses.replace(SAMPLES[kind], **defaults))
    assert all(getattr(SAMPLES[kind], name) != default for name, default in defaults.items())  # or the test shows nothing


def required_fields() -> list[tuple[str, str]]:
    return [
        (kind, field.name)
        for kind in KINDS
        for field in dataclasses.fields(SAMPLES[kind])
        if field.default is dataclasses.MISSING
    ]


@pytest.mark.parametrize(("kind", "name"), required_fields())
def test_a_missing_field_is_refused_by_its_name(kind: str, name: str) -> None:
    fields = plain(SAMPLES[kind])
    del fields[name]
    assert refusal(frame_of(kind, fields)) == f"{kind}.{name} is missing"


def test_a_missing_field_of_the_settings_is_refused_by_its_name() -> None:
    fields = plain(SAMPLES["Welcome"])
    del fields["settings"]["lr"]
    assert refusal(frame_of("Welcome", fields)) == "Welcome.settings.lr is missing"


@pytest.mark.parametrize(
    "unpacked", [[1, "Ping", {}], [4, "Ping", {}], [0, "Ping", {}], [1], [4, "Ping", {}, "more"], [2, None, None]]
)
def test_another_version_is_refused_and_both_are_named(unpacked: list[Any]) -> None:
    assert refusal(frame(unpacked)) == f"peer speaks protocol version {unpacked[0]}, this side speaks 3"


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1]])
def test_a_version_that_is_no_integer_is_refused(version: Any) -> None:
    assert refusal(frame([version, "Ping", {}])) == "not a message: expected [version, kind, fields]"


# Types


ONE = np.zeros((1, 1), np.float32)
FILE = plain(SAMPLES["Part"])["files"][0]
NO_FLOATS = [
    np.zeros((2, 2), np.int32),
    np.zeros(4, np.float32),
    np.zeros((1, 2, 2), np.float32),
    np.zeros((), np.float64),
    np.full((1, 1), np.nan, np.float32),
    np.full((2, 1), np.inf),
    None,
    [[1.0]],
    b"xxxx",
    1.0,
    {},
]
NO_MAPS = [*({"a": value} for value in NO_FLOATS), {"x" * 4097: ONE}, {b"a": ONE}, [], None, 1, ONE]
NO_INTEGERS = [np.zeros((1, 1), np.int32), np.zeros(1, np.float32), np.zeros((), np.int32), None, [1], 1, {}]
WRONG: dict[Any, list[Any]] = {
    int: [-1, 2**53 + 1, 2**64 - 1, True, 1.0, "1", b"1", None, [], {}, ONE],
    float: [float("nan"), float("inf"), float("-inf"), True, "1", b"1", None, [], {}, ONE],
    str: [1, b"x", None, True, "x" * 4097, ["x"], {}, ONE],
    tuple[str, ...]: ["c_attn", [1], [None], [["c_attn"]], None, {}, 1, ONE],
    bytes: ["text", 1, None, [], [b"x"], {}, ONE],
    tuple[PartFile, ...]: [
        *(None, 1, "files", {}, ONE, [None], [[]], [{"name": "a"}], [FILE | {"size": 1.0}]),
        *([FILE | {"name": name}] for name in ("", "..", ".a", "-a", "a/b", "a\\b", "/a", "a b", "a\0", "ä", "C:a", "a" * 65)),
        *([FILE | {"size": size}] for size in (-1, 2**40 + 1, 2**63)),
        *([FILE | {"sha256": digest}] for digest in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "g", "0" * 64 + "\n", 0)),
    ],
    int | None: [-1, 2**53 + 1, True, 1.0, "1", [], ONE],
    RunSettings: [None, [], 1, "settings", {}, ONE],
    Seconds: [None, [], 1, "seconds", {"uplink": -1.0}, {"decode": float("nan")}, {"queue": "1"}, ONE],
    protocol.messages.Integers | None: [value for value in NO_INTEGERS if value is not None],
    protocol.messages.CodedFloats | None: [value for value in NO_FLOATS if value is not None],
    protocol.messages.Floats: NO_FLOATS,
    protocol.messages.CodedFloats: NO_FLOATS,
    protocol.messages.Integers: NO_INTEGERS,
    protocol.Tensors: NO_MAPS,
    protocol.messages.CodedTensors: NO_MAPS,
}


def fields_of(*owners: type) -> pytest.MarkDecorator:
    """Every field of these dataclasses, and values that are not of its type."""
    types = {owner: get_type_hints(owner, include_extras=True) for owner in owners}
    return pytest.mark.parametrize(
        ("kind", "name", "wrong"),
        [
            pytest.param(owner.__name__, field.name, WRONG[types[owner][field.name]], id=f"{owner.__name__}.{field.name}")
            for owner in owners
            for field in dataclasses.fields(owner)
        ],
    )


@fields_of(*get_args(Message))
def test_a_field_of_another_type_is_refused_by_its_name(kind: str, name: str, wrong: list[Any]) -> None:
    for value in wrong:
        reason = refusal(frame_of(kind, plain(SAMPLES[kind]) | {name: plain(value)}))
        assert reason.startswith(f"{kind}.{name}"), value


@fields_of(RunSettings)
def test_a_setting_of_another_type_is_refused_by_its_name(kind: str, name: str, wrong: list[Any]) -> None:
    for value in wrong:
        fields = plain(SAMPLES["Welcome"])
        fields["settings"][name] = plain(value)
        assert refusal(frame_of("Welcome", fields)).startswith(f"Welcome.settings.{name}"), value


def test_the_largest_integer_arrives() -> None:
    assert_same(decode(frame_of("Done", {"step": 2**53}), HANDSHAKE_BYTES), protocol.Done(step=2**53))


def test_an_integer_is_a_number() -> None:
    message = decode(frame_of("EvaluationLoss", {"index": 0, "summed_loss": 2}), HANDSHAKE_BYTES)
    assert_same(message, EvaluationLoss(index=0, summed_loss=2.0))


@pytest.mark.parametrize(
    "unpacked",
    [
        None,
        1,
        "Ping",
        {},
        {"version": 2},
        [],
        [2],
        [2, "Ping"],
        [2, "Ping", {}, 0],
        [2, "Ping", None],
        [2, "Ping", []],
        [2, "Ping", "fields"],
        [2, "Ping", tensor(np.zeros(3))],
        tensor(np.zeros(3)),
    ],
)
def test_what_is_no_triple_is_refused(unpacked: Any) -> None:
    refusal(frame(unpacked))


@pytest.mark.parametrize("kind", ["Pang", "ping", "", "LabelledBatch", "Contribution", "x" * 10_000, None, 1, b"Ping", [], {}])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    assert refusal(frame([3, kind, {}])).startswith("unknown kind of message")


# What types cannot say


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ä", "a\n", "a" * 65])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    assert "client name" in refusal(frame_of("Hello", {"name": name, "fingerprint": ""}))
    with pytest.raises(InvalidName):
        Hello(name=name, fingerprint="")


@pytest.mark.parametrize("run", ["", "..", "../elsewhere", "a/b", "a\\b", "C:", "a b", "ä", "a\0", "a\n", "a" * 65])
def test_a_run_that_cannot_name_a_folder_is_refused(run: str) -> None:
    assert refusal(frame_of("Welcome", plain(SAMPLES["Welcome"]) | {"run": run})).startswith("Welcome: ")


@pytest.mark.parametrize("pin", ["ab", "AB" * 32, "ab" * 33, "ab" * 31 + "\u0661\u0661", " " + "ab" * 32])
def test_pin_that_is_none_is_refused(pin: str) -> None:
    assert "a SHA-256 is 64 of 0-9 a-f" in refusal(frame_of("Welcome", plain(SAMPLES["Welcome"]) | {"next_pin": pin}))


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([], "a part has 1 to 256 files, got 0"),
        ([FILE] * 257, "a part has 1 to 256 files, got 257"),
        ([FILE, FILE], "two files have the name part.json"),
        ([FILE, FILE | {"name": "Part.JSON", "sha256": "1" * 64}], "two files have the name Part.JSON"),
        ([FILE, FILE | {"name": "other", "size": 4}], "other has the content of another file, and another size"),
    ],
)
def test_part_whose_files_contradict_each_other_is_refused(files: list[Any], reason: str) -> None:
    assert refusal(frame_of("Part", {"index": 0, "files": files})) == f"Part: {reason}"


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "../" * 21 + "x", "0" * 64 + "\n"])
def test_piece_of_what_is_no_digest_is_refused(digest: str) -> None:
    asked = plain(SAMPLES["AskPiece"]) | {"sha256": digest}
    assert refusal(frame_of("AskPiece", asked)) == f"AskPiece: a SHA-256 is 64 of 0-9 a-f, got {digest!r}"


@pytest.mark.parametrize("size", [0, PIECE_BYTES + 1])
def test_piece_of_no_bytes_or_too_many_is_refused(size: int) -> None:
    refused = refusal(frame_of("Piece", {"index": 1, "data": bytes(size)}), HANDING_OVER_BYTES)
    assert refused == f"Piece: a piece has 1 to 1048576 bytes, got {size}"


def test_largest_piece_arrives_within_what_a_client_takes_before_start() -> None:
    piece = Piece(index=2**53, data=np.random.default_rng(0).bytes(PIECE_BYTES))
    data = encode(piece)
    assert len(inflate(data)) <= HANDING_OVER_BYTES
    assert len(data) <= compressed_bound(HANDING_OVER_BYTES)
    assert_same(decode(data, HANDING_OVER_BYTES), piece)
    assert "exceeds the limit" in refusal(data, HANDSHAKE_BYTES)


def test_part_of_most_files_with_the_longest_names_fits_the_handshake() -> None:
    files = tuple(PartFile(name=f"{i:03}".rjust(64, "x"), size=2**40, sha256=f"{i:064x}") for i in range(256))
    part = Part(index=2**53, files=files)
    assert len(inflate(encode(part))) < HANDSHAKE_BYTES
    assert_same(decode(encode(part), HANDSHAKE_BYTES), part)
    later = [{**plain(file), **{f"later {i}": i for i in range(9)}} for file in files]  # a release that says more of each
    assert_same(decode(frame_of("Part", {"index": 2**53, "files": later}), 2 * HANDSHAKE_BYTES), part)


def test_piece_takes_no_memory_beyond_its_bytes() -> None:
    data = frame_of("Piece", {"index": 1, "data": bytes(PIECE_BYTES + 1), "later": bytes(PIECE_BYTES)})
    assert peak_bytes(data, 3 * PIECE_BYTES) < 5 * PIECE_BYTES


@pytest.mark.parametrize("name", ["num_samples", "batch_size", "longest"])
def test_a_join_that_brings_nothing_is_refused(name: str) -> None:
    assert "at least 1" in refusal(frame_of("Join", plain(SAMPLES["Join"]) | {name: 0}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1, "epochs": 1},
        {"steps": None, "epochs": None},
        {"aggregate_every": 0},
        {"steps": 0},
        {"steps": None, "epochs": 2**31},
        {"micro_batches": 1025},
        {"lora_alpha": 1e300},
        {"lora_alpha": 0.0},
        {"lora_dropout": 1.0},
        {"lora_targets": []},
        {"lora_targets": ["c_attn", "q.proj"]},
        {"lora_targets": ["all-linear"]},
        {"lora_targets": ["x" * 65]},
        {"lora_targets": [f"layer_{number}" for number in range(65)]},
        {"lora_targets": ["c_attn", "c_attn"]},
        {"lr": 1e39},
        {"lr": 1e-40},
        {"weight_decay": -0.1},
        {"weight_decay": 1e300},
        {"seed": 2**31},
        {"warmup_steps": 2**31},
        {"check_codec_every": 2**31},
        {"cache_bytes": 2**50 + 1},
        {"precision": "float16"},
        {"precision": "x" * 4096},
        {"activation_codec": "int3"},
        {"gradient_codec": "x" * 4096},
        {"precision": "float64", "gradient_codec": "exact"},
        {"precision": "float64", "activation_codec": "exact"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    fields = plain(SAMPLES["Welcome"])
    assert refusal(frame_of("Welcome", fields | {"settings": fields["settings"] | wrong})).startswith("Welcome.settings: ")


@pytest.mark.parametrize("kind", ["Activations", "Evaluation"])
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"lengths": [3]}, "1 lengths and 2 label counts"),
        ({"label_counts": [1]}, "2 lengths and 1 label counts"),
        ({"lengths": [3, 0]}, "lengths must be positive"),
        ({"lengths": [4, -1]}, "lengths must be positive"),
        ({"label_counts": [2, -1]}, "label counts between"),
        ({"label_counts": [0, 2]}, "label counts between"),
        ({"lengths": [2, 2]}, "lengths add up to 4, values have 3 rows"),
        ({"lengths": [2**31 - 1, 2**31 - 1]}, "lengths add up to 4294967294"),
        ({"label_counts": [1, 1]}, "label counts add up to 2, got 1 labels"),
        ({"labels": [1, 2]}, "label counts add up to 1, got 2 labels"),
        ({"values": np.zeros((2, 2), np.float32)}, "lengths add up to 3, values have 2 rows"),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(kind: str, wrong: dict[str, Any], reason: str) -> None:
    arrays = {name: np.array(value, np.int32) if isinstance(value, list) else value for name, value in wrong.items()}
    assert reason in refusal(frame_of(kind, plain(SAMPLES[kind]) | plain(arrays)))


# Tensors that are none


def refused_tensor(value: Any) -> str:
    return refusal(frame_of("EdgeAdapter", {"step": 1, "tensors": {"a": value}}))


@pytest.mark.parametrize("num_bytes", [0, 15, 17, 32])
def test_a_tensor_of_more_or_fewer_bytes_than_its_shape_takes_is_refused(num_bytes: int) -> None:
    assert refused_tensor(tensor_of("float32", [2, 2], bytes(num_bytes))) == f"float32[2, 2] takes 16 bytes, got {num_bytes}"


@pytest.mark.parametrize(
    "shape", [[2**63], [2**62, 4], [2**64 - 1] * 8, [0, 2**62], [2**62, 0], [0, 2**63], [0] + [2**40] * 5, [0] * 11, [0] * 65]
)
def test_a_tensor_of_an_impossible_shape_is_refused(shape: list[int]) -> None:
    refused_tensor(tensor_of("float32", shape, b""))


@pytest.mark.parametrize("shape", [[-1, 1], [-1, -1], [True, 1], [1.0, 1], ["1", 1], [None], [[1, 1]], 1, None, "11", {}])
def test_a_tensor_whose_shape_is_no_list_of_sizes_is_refused(shape: Any) -> None:
    refused_tensor(tensor_of("float32", shape, bytes(4)))


@pytest.mark.parametrize("dtype", ["float16", "<f4", "object", "O", "V4", ""])
def test_a_tensor_of_an_unknown_dtype_is_refused_by_its_name(dtype: str) -> None:
    reason = f"a tensor of dtype '{dtype}'; there are float32, float64, int32"
    assert refused_tensor(tensor_of(dtype, [1, 1], bytes(4))) == reason


@pytest.mark.parametrize("dtype", [None, 1, b"float32", ["float32"]])
def test_a_tensor_whose_dtype_is_no_text_is_refused(dtype: Any) -> None:
    assert refused_tensor(tensor_of(dtype, [1, 1], bytes(4))) == "a tensor is [dtype, shape, bytes]"


def unshuffled(array: Array) -> Any:
    """As a sender that forgets to shuffle has it."""
    return tensor_of(array.dtype.name, list(array.shape), array.tobytes())


def test_values_that_were_not_shuffled_are_named_as_such() -> None:
    hint = "; its bytes look as if they were not shuffled: see Tensors in PROTOCOL.md"
    floats = np.random.default_rng(0).standard_normal((100, 20)).astype(np.float32)
    assert refused_tensor(unshuffled(floats)) == f"EdgeAdapter.tensors['a']: has NaN or infinite values{hint}"
    batch = plain(SAMPLES["Activations"])
    counts = {name: unshuffled(getattr(SAMPLES["Activations"], name)) for name in ("lengths", "label_counts", "labels")}
    assert refusal(frame_of("Activations", batch | counts)).endswith(hint)


def test_values_that_are_no_numbers_are_not_taken_for_ones_that_were_not_shuffled() -> None:
    values = np.ones((100, 20), np.float32)
    values[3, 4] = np.nan
    assert refused_tensor(tensor(values)) == "EdgeAdapter.tensors['a']: has NaN or infinite values"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\xc1",
        b"\x93",
        b"\x93\xa7float32",
        msgpack.packb(["float32", [1, 1]]),
        msgpack.packb(["float32", [1, 1], "xxxx"]),
        msgpack.packb(["float32", [1, 1], bytes(4), None]),
        msgpack.packb(["float32", [1, 1], bytes(4)]) + b"\xc0",
        msgpack.packb(tensor(np.zeros(1))),
        msgpack.packb([tensor(np.zeros(1))] * 3),
        b"\x91" * 10_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x93\xa1\xff\x90\xc4\x00",
    ],
)
def test_a_tensor_that_is_no_triple_is_refused(payload: bytes) -> None:
    refused_tensor(msgpack.ExtType(1, payload))


@pytest.mark.parametrize("code", [0, 3, 127])
def test_an_unknown_extension_is_refused_wherever_it_stands(code: int) -> None:
    reason = f"unknown msgpack extension {code}"
    assert refused_tensor(msgpack.ExtType(code, b"")) == reason
    assert refusal(frame_of("Ping", {"later": msgpack.ExtType(code, b"")})) == reason


def test_a_timestamp_is_refused() -> None:
    assert "expected a tensor" in refused_tensor(msgpack.Timestamp(1))
    refusal(compress(b"\xd4\xff\x00"))


# Bytes that are no message


def test_msgpack_that_was_not_compressed_is_named() -> None:
    packed = msgpack.packb([3, "Ping", {}])
    frame = "expected a zstd frame, which begins with 28 b5 2f fd"
    assert refusal(packed) == f"not a message: {frame}; got msgpack that was not compressed"
    assert refusal(b"GET / ") == f"not a message: {frame}; got bytes 47 45 54 20"
    assert refusal(b"") == f"not a message: {frame}; got bytes none"


def test_an_unknown_codec_is_named() -> None:
    coded = msgpack.ExtType(2, msgpack.packb(["int3", [1, 1], b""]))
    values = frame_of("EvaluationLoss", plain(SAMPLES["EvaluationLoss"]) | {"later": coded})
    assert refusal(values) == "a tensor in the codec 'int3'; there are bfloat16, int8, coarse, delta, dithered"


def zstd_header(content_size: int) -> bytes:
    """The header of a frame of one segment that announces 8 bytes of size (RFC 8878, section 3.1.1.1)."""
    return b"\x28\xb5\x2f\xfd\xe0" + content_size.to_bytes(8, "little")


def zstd_block(data: bytes, *, repeat: int = 0, last: bool = True) -> bytes:
    """A raw block, or one that repeats a byte (section 3.1.1.2)."""
    kind, size = (1, repeat) if repeat else (0, len(data))
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


PING = msgpack.packb([3, "Ping", {}])


def large_window(content_size: int) -> bytes:
    """A Ping in a frame with a window of 128 MiB, the largest that decoders take unless told otherwise."""
    header = b"\x28\xb5\x2f\xfd\xc0" + bytes([17 << 3]) + content_size.to_bytes(8, "little")
    return header + zstd_block(PING)


def test_a_frame_made_by_hand_is_understood() -> None:
    assert isinstance(decode(zstd_header(len(PING)) + zstd_block(PING), HANDSHAKE_BYTES), Ping)


@pytest.mark.parametrize("size", [HANDSHAKE_BYTES + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 3])
def test_a_frame_that_announces_too_much_is_refused_before_it_is_inflated(size: int) -> None:
    assert refusal(zstd_header(size)) == f"message of {size} bytes exceeds the limit of {HANDSHAKE_BYTES} bytes"


def test_a_message_may_have_just_as_many_bytes_as_the_limit() -> None:
    data = encode(SAMPLES["Welcome"])
    size = len(inflate(data))
    assert isinstance(decode(data, size), Welcome)
    assert "exceeds the limit" in refusal(data, size - 1)


@pytest.mark.parametrize("announced", [0, 1, len(PING) - 1, len(PING) + 1, 1000])
def test_a_frame_that_inflates_to_another_size_than_announced_is_refused(announced: int) -> None:
    reason = refusal(zstd_header(announced) + zstd_block(PING))
    assert reason.startswith("not a message: ")
    assert any(what in reason for what in ("bytes that it announces", "corruption detected", "buffer is too small"))


@pytest.mark.parametrize("cut", [1, 3, 5, 9, 12, 15, -1])
def test_frame_that_is_cut_off_is_refused_as_such(cut: int) -> None:
    whole = zstd_header(len(PING)) + zstd_block(PING[:4], last=False) + zstd_block(PING[4:])
    assert isinstance(decode(whole, HANDSHAKE_BYTES), Ping)
    assert refusal(whole[:cut]).startswith("not a message: ")
    assert cut < 13 or refusal(whole[:cut]) == "not a message: the zstd frame is cut off"


def test_frame_may_end_with_an_empty_block() -> None:
    assert isinstance(decode(zstd_header(len(PING)) + zstd_block(PING, last=False) + zstd_block(b""), HANDSHAKE_BYTES), Ping)


def test_a_small_frame_cannot_inflate_beyond_what_it_announces() -> None:
    bomb = zstd_header(100) + zstd_block(b"\0", repeat=100_000, last=False) * 1000 + zstd_block(b"")
    assert peak_bytes(bomb, HANDSHAKE_BYTES) < MEGABYTE


@pytest.mark.parametrize(("num_blocks", "than"), [(1, "less"), (127, "less"), (129, "more"), (10**5, "more")])
def test_frame_whose_blocks_come_through_a_small_window_holds_what_it_announces(num_blocks: int, than: str) -> None:
    """Which decoders inflate piece by piece, and do not all check themselves."""
    header = b"\x28\xb5\x2f\xfd\xc0\x00" + (128 * 1024).to_bytes(8, "little")  # a window of 1,024 bytes
    frame = header + zstd_block(b"\0", repeat=1024, last=False) * num_blocks + zstd_block(b"")
    assert refusal(frame, MEGABYTE) == f"not a message: the zstd frame holds {than} than the 131072 bytes that it announces"
    assert peak_bytes(frame, MEGABYTE) < MEGABYTE


def test_frame_that_asks_for_a_large_window_takes_no_memory_for_it() -> None:
    """A window beyond what the frame announces is never filled."""
    program = f"""
import resource, sys
from protocol import RemoteProtocolError, decode
largest = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = largest()
for frame in {[large_window(len(PING)).hex(), large_window(100).hex()]}:
    try:
        decode(bytes.fromhex(frame), 65536)
    except RemoteProtocolError:
        pass
sys.exit(largest() - before > 8 * 1024)
"""
    assert isinstance(decode(large_window(len(PING)), HANDSHAKE_BYTES), Ping)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_frame_of_unannounced_size_is_refused() -> None:
    unannounced = zstd.compress(PING, options={zstd.CompressionParameter.content_size_flag: 0})
    assert "does not announce its size" in refusal(unannounced)
    compressor = zstd.ZstdCompressor()
    assert "does not announce its size" in refusal(compressor.compress(PING) + compressor.flush())


@pytest.mark.parametrize("extra", [b"\0", b"extra", compress(PING), b"\x50\x2a\x4d\x18\x01\0\0\0x"])
def test_nothing_may_follow_the_frame(extra: bytes) -> None:
    assert refusal(compress(PING) + extra) == "not a message: something follows the zstd frame"


@pytest.mark.parametrize("extra", [b"\0", b"\xc1", PING])
def test_nothing_may_follow_the_list(extra: bytes) -> None:
    refusal(compress(PING + extra))


@pytest.mark.parametrize(
    "data", [b"", b"\0", PING, b"GET / HTTP/1.1\r\n\r\n", b"\x50\x2a\x4d\x18\x01\0\0\0x", zstd_header(5), compress(b"")]
)
def test_what_is_no_frame_of_a_message_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize("header", ["dd", "df", "db", "c6", "c9", "dcffff", "deffff", "daffff", "c5ffff"])
def test_a_header_that_promises_more_than_the_frame_holds_is_refused(header: str) -> None:
    data = compress(bytes.fromhex(header.ljust(10, "f")) + b"\x01")
    refusal(data)
    assert peak_bytes(data, HANDSHAKE_BYTES) < MEGABYTE


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x81\xa1a\x91", b"\xdc\x00\x01"])
@pytest.mark.parametrize("depth", [100, 1000, 10_000])
def test_deep_nesting_does_no_harm(opening: bytes, depth: int) -> None:
    for prefix in (b"", b"\x93\x02\xa4Ping", b"\x93\x02\xa4Ping\x81\xa5later"):
        refusal(compress(prefix + opening * depth))
        decode_if_possible(compress(prefix + opening * depth + b"\xc0"))
    refusal(compress(opening * depth + b"\xc0"))


@pytest.mark.parametrize("key", [1, None, 1.5, True])
def test_a_key_that_is_no_text_is_refused(key: Any) -> None:
    refusal(frame_of("Ping", {key: 1}))


def test_a_list_cannot_be_a_key() -> None:
    refusal(compress(b"\x93\x02\xa4Ping\x81\x91\x01\x01"))


def test_text_that_is_no_utf_8_is_refused() -> None:
    refusal(compress(b"\x93\x02\xa4Ping\x81\xa2\xff\xfe\x01"))
    refusal(compress(b"\x93\x02\xa7Failure\x81\xa6reason\xa3\xed\xa0\x80"))


def test_a_message_of_too_many_elements_is_refused() -> None:
    assert isinstance(decode(frame_of("Ping", {"later": [0] * 4089}), HANDSHAKE_BYTES), Ping)  # 1 + 3, 1 + 1, 1 + 4089
    assert "more than 4096 elements" in refusal(frame_of("Ping", {"later": [[0] * 1000] * 5}))
    assert "more than 4096 elements" in refusal(frame_of("Ping", {"later": [{}] * 4000}))
    refusal(frame_of("Ping", {"later": [0] * 4090}))
    assert "4097" in refusal(frame_of("Ping", {"later": [0] * 4097}))


# Hostile bytes cost little


def peak_bytes(data: bytes, max_bytes: int) -> int:
    tracemalloc.start()
    try:
        refusal(data, max_bytes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_lists_of_nothing_cannot_fill_the_memory() -> None:
    lists = b"\x93\x02\xa4Ping\x81\xa5later\xdc\x0f\xff" + (b"\xdc\x0f\xff" + b"\x90" * 4095) * 1000
    assert peak_bytes(compress(lists), 8 * MEGABYTE) < len(lists) + MEGABYTE


def test_lists_of_nothing_in_a_tensor_cannot_fill_the_memory() -> None:
    lists = b"\x90"
    for _ in range(4):
        lists = b"\xdc\x00\x10" + lists * 16
    data = frame_of("EdgeAdapter", {"step": 1, "tensors": {"a": msgpack.ExtType(1, lists)}})
    assert peak_bytes(data, 8 * MEGABYTE) < 2 * len(lists) + MEGABYTE


def test_nested_headers_cannot_fill_the_memory() -> None:
    assert peak_bytes(compress(b"\xdc\x10\x00" * 20_000), HANDSHAKE_BYTES) < 40 * MEGABYTE


@pytest.mark.parametrize("shape", [[2**31, 2**31], [10**9, 10**9]])
def test_a_tensor_is_not_laid_out_before_its_bytes_are_there(shape: list[int]) -> None:
    data = frame_of("EdgeAdapter", {"step": 1, "tensors": {"a": tensor_of("float64", shape, b"")}})
    assert peak_bytes(data, HANDSHAKE_BYTES) < MEGABYTE


@pytest.mark.parametrize("field", ["step", "loss", "values"])
def test_a_huge_value_is_not_written_into_the_error(field: str) -> None:
    fields = plain(SAMPLES["ActivationGradient"]) | {field: tensor(np.ones((1000, 500), np.float32))}
    if field == "values":
        fields[field] = ["x" * 1000] * 1000
    data = frame_of("ActivationGradient", fields)
    assert peak_bytes(data, 8 * MEGABYTE) < 8 * MEGABYTE
    assert len(refusal(data, 8 * MEGABYTE)) < 200


# Whatever bytes arrive


@given(st.binary(max_size=200))
@some_hundred
def test_any_bytes_are_refused(data: bytes) -> None:
    refusal(data)


@given(st.binary(max_size=200))
@some_hundred
def test_any_bytes_in_a_frame_are_refused(data: bytes) -> None:
    refusal(compress(data))


def mutate(data: bytes, draw: st.DataObject) -> bytes:
    mutated = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(mutated)))
        what = draw.draw(st.sampled_from(["replace", "insert", "remove", "cut"]))
        if what == "replace":
            mutated[place : place + 1] = draw.draw(st.binary(min_size=1, max_size=1))
        elif what == "insert":
            mutated[place:place] = draw.draw(st.binary(min_size=1, max_size=8))
        elif what == "remove":
            del mutated[place : place + draw.draw(st.integers(1, 8))]
        else:
            del mutated[place:]
    return bytes(mutated)


@given(st.sampled_from(KINDS), st.data())
@some_hundred
def test_a_mutated_frame_is_a_message_or_refused(kind: str, draw: st.DataObject) -> None:
    decode_if_possible(mutate(encode(SAMPLES[kind]), draw))


@given(st.sampled_from(KINDS), st.data())
@some_hundred
def test_a_mutated_list_is_a_message_or_refused(kind: str, draw: st.DataObject) -> None:
    decode_if_possible(compress(mutate(inflate(encode(SAMPLES[kind])), draw)))


@every_kind
def test_a_message_cut_off_anywhere_is_refused(kind: str) -> None:
    data = encode(SAMPLES[kind])
    for length in range(len(data)):
        refusal(data[:length])
    packed = inflate(data)
    for length in range(len(packed)):
        refusal(compress(packed[:length]))


tensors = st.builds(
    tensor_of,
    st.sampled_from(["float32", "float64", "int32", "float16", 1, None]),
    st.lists(st.integers(-1, 3) | st.integers(0, 2**64 - 1), max_size=4),
    st.sampled_from([0, 4, 8, 12, 16, 24]).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=24))
    | tensors
)
field_names = st.sampled_from(sorted({field.name for message in SAMPLES.values() for field in dataclasses.fields(message)}))
structures = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | field_names | st.binary(max_size=2) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=5,
)


@given(structures)
@some_hundred
def test_any_structure_is_refused(unpacked: Any) -> None:
    refusal(frame(unpacked))


@given(st.sampled_from(KINDS), st.data())
@some_hundred
def test_a_message_with_any_values_in_it_is_a_message_or_refused(kind: str, draw: st.DataObject) -> None:
    fields = plain(SAMPLES[kind])
    names = draw.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=2)) if fields else []
    for name in names:
        fields[name] = draw.draw(structures)
    decode_if_possible(frame_of(kind, fields))


# How large messages can be


def full_batch(rows: int, width: int, dtype: Any) -> Activations:
    """The batch of ``rows`` rows that takes most bytes: each row a sequence, each labelled."""
    ones = np.ones(rows, np.int32)
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(dtype)
    seconds = Seconds(uplink=1e300)
    batch = {"lengths": ones, "label_counts": ones, "labels": ones, "samples": ones}
    return Activations(step=2**53, seconds=seconds, values=values, exact=values, **batch)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 768), (4096, 1), (512, 768)])
def test_a_full_batch_and_its_gradient_are_not_larger_than_the_bound(precision: str, rows: int, width: int) -> None:
    bound = largest_message_bytes(rows=rows, width=width, precision=precision, adapter_elements=0)
    batch = full_batch(rows, width, precision)
    for message in (batch, ActivationGradient(step=2**53, loss=1e300, labelled_tokens=2**53, values=batch.values)):
        data = encode(message)
        assert rows * width * batch.values.itemsize < len(inflate(data)) <= bound
        assert len(data) <= compressed_bound(bound)
        assert_same(decode(data, bound), message)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_adapter_of_the_largest_gpt2_is_not_larger_than_the_bound(precision: str) -> None:
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [
        f"base_model.model.transformer.h.{block}.{layer}.lora_{matrix}.weight"
        for block in range(48)
        for layer in layers
        for matrix in "AB"
    ]
    adapter = {name: np.ones((8, 100), precision) for name in names}
    bound = largest_message_bytes(rows=1, width=1, precision=precision, adapter_elements=8 * 100 * len(names))
    for message in (EdgeAdapter(step=1, tensors=adapter), Start(step=0, total_steps=1, adapter=adapter)):
        data = encode(message)
        assert len(inflate(data)) <= bound
        assert_same(decode(data, bound), message)


@pytest.mark.parametrize("kind", ["Ping", "Pong", "Hello", "Welcome", "AskPart", "AskPiece", "Join", "Failure"])
def test_a_message_of_the_handshake_fits_its_bound(kind: str) -> None:
    longest = {name: "ü" * 4096 if isinstance(value, str) else value for name, value in plain(SAMPLES[kind]).items()}
    assert len(msgpack.packb([3, kind, longest])) < HANDSHAKE_BYTES


@pytest.mark.parametrize("size", [0, 1, 100, 2**10, 2**16 - 1, 2**17, 2**20, 3 * 2**20 + 1])
@pytest.mark.parametrize("level", [1, 3])
def test_noise_does_not_compress_to_more_than_the_bound(size: int, level: int) -> None:
    noise = np.random.default_rng(size).bytes(size)
    assert len(zstd.compress(noise, level)) <= compressed_bound(size)


# What it needs


def test_the_protocol_loads_neither_torch_nor_a_network() -> None:
    program = "import sys, protocol; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "protocol" in loaded
    assert loaded.isdisjoint({"torch", "asyncio", "websockets", "socket", "ssl", "transformers"})


def test_public_names_are_sorted_and_exist() -> None:
    assert list(protocol.__all__) == sorted(protocol.__all__, key=lambda name: (not re.fullmatch("[A-Z_]+", name), name))
    assert all(hasattr(protocol, name) for name in protocol.__all__)
