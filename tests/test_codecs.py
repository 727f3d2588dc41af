"""Codecs: what is lost is bounded, what is random is repeatable, and nothing that arrives is believed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import protocol_samples
import pytest
from chaos import Fault, Scene
from conftest import adapter_bytes, run_split
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

import edge_client.client
from edge_client import EdgeClient, Refused
from gpu_server import GpuServer
from protocol import (
    CODECS,
    DELTA,
    EXACT,
    ActivationGradient,
    Activations,
    Array,
    EdgeAdapter,
    Evaluation,
    EvaluationStates,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    RemoteProtocolError,
    RunSettings,
    Seconds,
    Session,
    Side,
    Start,
    Welcome,
    compressed_bound,
    decode,
    encode,
    gradient_codec,
    largest_message_bytes,
)
from protocol.codecs import CODES_OF_THE_RMS, Coded
from protocol.gradients import coded_gradient
from protocol.quantisation import LARGEST_CODE, LARGEST_VALUE, quantise
from protocol.rounding import Dither, from_bfloat16, to_bfloat16
from protocol.settings import ABILITIES, COARSE, DITHERED, OFFERED, codec_name, codec_named

GOLDEN: dict[str, str] = json.loads((Path(__file__).parent / "golden" / "codecs-3.json").read_text())
MAX_BYTES = 2**22

every_codec = pytest.mark.parametrize("codec", CODECS)
quantising = pytest.mark.parametrize("codec", list(CODES_OF_THE_RMS))
some_hundred = settings(max_examples=200)
dithers = st.sampled_from([None, 1, 2])
tensors = np_st.arrays(
    np.float32,
    np_st.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32) | st.just(0.0),
    fill=st.floats(-4, 4, width=32),
)


def through(values: Array, codec: str, dither: int | None = None) -> Array:
    """As it arrives on the other side."""
    message = ActivationGradient(step=1, loss=0.0, labelled_tokens=1, values=values)
    arrived = decode(encode(message, codec, None if dither is None else Dither(dither)), MAX_BYTES, [codec])
    assert isinstance(arrived, ActivationGradient)
    assert (arrived.values.dtype, arrived.values.shape) == (np.float32, values.shape)
    assert arrived.values.flags.writeable
    return arrived.values


def code_of(reach: Array, codec: str) -> Array:
    """The most that a code of each row can be, (N, 1), where rows (N, d) are this far from their centre at most."""
    code = reach.max(axis=1, initial=0, keepdims=True) / LARGEST_CODE
    codes_of_the_rms = CODES_OF_THE_RMS[codec]
    if codes_of_the_rms is not None and reach.size:
        code = np.maximum(code, np.median(np.sqrt(np.square(reach).mean(axis=1))) / codes_of_the_rms)
    # A scale may be 2^-7 larger than needed.
    return np.asarray(code * (1 + 2.0**-6) + 2.0**-125)


def activations(num_rows: int = 300, width: int = 128, outliers: tuple[int, ...] = (5, 77)) -> Array:
    """As a pretrained transformer's: channels with means of their own, and a few a hundred times as large."""
    random = np.random.default_rng(0)
    values = random.normal(size=(num_rows, width)) + 3 * random.normal(size=width)
    values[:, list(outliers)] *= 300
    return values.astype(np.float32)


# What is lost is bounded


@given(tensors, dithers)
@some_hundred
def test_bfloat16_is_right_to_eight_bits(values: Array, dither: int | None) -> None:
    step = np.maximum(np.abs(values) * 2.0**-7, 2.0**-133)
    assert (np.abs(through(values, "bfloat16", dither) - values) <= step * (0.5 if dither is None else 1.0)).all()


@given(tensors, st.sampled_from(list(CODES_OF_THE_RMS)))
@some_hundred
def test_an_activation_is_off_by_half_a_code_of_its_row_at_most(values: Array, codec: str) -> None:
    wide = values.astype(np.float64)
    centre = wide.mean(axis=0) if len(wide) else wide
    # The centre travels as bfloat16.
    reach = np.abs(wide - centre) + np.abs(centre) * 2.0**-8
    assert (
        np.abs(through(values, codec) - wide) <= 0.5 * code_of(reach, codec) + 2.0**-22 * (np.abs(wide) + np.abs(centre))
    ).all()


@given(tensors, st.sampled_from(list(CODES_OF_THE_RMS)), st.integers(0, 9))
@some_hundred
def test_a_gradient_is_off_by_less_than_a_code_of_its_row_and_keeps_its_sign(values: Array, codec: str, seed: int) -> None:
    wide = values.astype(np.float64)
    arrived = through(values, codec, seed)
    assert (np.abs(arrived - wide) <= code_of(np.abs(wide), codec)).all()
    assert (arrived * wide >= 0).all()


@every_codec
@pytest.mark.parametrize("dither", [None, 1])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1), (1, 64), (64, 1)])
def test_empty_tensors_and_single_rows_and_columns_arrive(codec: str, dither: int | None, shape: tuple[int, int]) -> None:
    if dither is None:
        assert (through(np.full(shape, 1.5, np.float32), codec, dither) == 1.5).all()
    assert (through(np.zeros(shape, np.float32), codec, dither) == 0).all()


@every_codec
def test_a_constant_row_arrives_exactly_if_bfloat16_has_it(codec: str) -> None:
    values = np.full((5, 32), -2.75, np.float32)
    assert (through(values, codec) == values).all()


@every_codec
def test_zeros_among_gradients_stay_zeros(codec: str) -> None:
    values = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    values[::3] = 0
    values[:, ::5] = 0
    assert (through(values, codec, 3)[values == 0] == 0).all()


@every_codec
@pytest.mark.parametrize("dither", [None, 1])
def test_denormal_numbers_do_no_harm(codec: str, dither: int | None) -> None:
    values = np.array([[1e-45, -1e-45, 1e-40], [1e-38, 0, -1e-39]], np.float32)
    assert np.abs(through(values, codec, dither) - values).max() < 2.0**-125


@quantising
@pytest.mark.parametrize("dither", [None, 1])
def test_numbers_too_large_for_a_codec_become_its_largest(codec: str, dither: int | None) -> None:
    huge = np.finfo(np.float32).max
    arrived = through(np.array([[huge, -huge, 1.0], [-huge, huge, 2.0]], np.float32), codec, dither)
    # In a coarse unit the largest of two rows alike is five or six codes, and dither makes one more or less of it.
    assert np.abs(arrived).max() == pytest.approx(LARGEST_VALUE, rel={"int8": 0.02, COARSE: 0.2}[codec])
    outlier = activations(outliers=())
    outlier[:, 9] = -huge
    outlier[4, 9] = huge
    assert np.abs(through(outlier, codec, dither)[:, 9]).min() == pytest.approx(LARGEST_VALUE, rel=0.02)


@every_codec
@pytest.mark.parametrize("dither", [None, 1])
def test_what_bfloat16_has_and_a_scale_divides_arrives_exactly(codec: str, dither: int | None) -> None:
    codes = np.random.default_rng(0).integers(-7, 8, (40, 16)).astype(np.float32)
    codes[:, 0] = 7
    if codec == "bfloat16":
        assert (through(codes * 2.0**-20, codec, dither) == codes * 2.0**-20).all()
    assert (through(codes, EXACT) == codes).all()


@given(tensors)
@some_hundred
def test_exact_is_exact(values: Array) -> None:
    assert through(values, EXACT).tobytes() == values.tobytes()


@given(tensors, dithers)
@some_hundred
def test_what_bfloat16_has_arrives_exactly_in_it(values: Array, dither: int | None) -> None:
    representable = from_bfloat16(to_bfloat16(values))
    assert through(representable, "bfloat16", dither).tobytes() == representable.tobytes()


def scales(values: Array, codec: str) -> Array:
    return from_bfloat16(quantise(values, CODES_OF_THE_RMS[codec]).scales)


def test_a_coarse_unit_is_that_of_all_rows_but_of_those_that_would_not_fit_in_a_byte() -> None:
    values = np.random.default_rng(0).normal(size=(301, 128)).astype(np.float32)
    values[:100] *= 3
    of_all = np.median(np.sqrt(np.square(values).mean(axis=1))) / 4.5
    units = scales(values, COARSE)
    assert (units == units[0]).all()
    assert units[0] == pytest.approx(of_all, rel=0.02)
    values[200] *= 40  # as the first row of a sequence may be
    units = scales(values, COARSE)
    assert np.delete(units, 200) == pytest.approx(of_all, rel=0.02)
    assert units[200] == pytest.approx(np.abs(values[200] - values.mean(axis=0)).max() / 127, rel=0.02)


def test_a_coarse_code_takes_less_than_four_bits_and_a_half_and_has_a_third_of_the_error_of_fifteen_levels() -> None:
    values = np.random.default_rng(0).normal(size=(400, 256)).astype(np.float32)
    message = ActivationGradient(step=1, loss=1.0, labelled_tokens=300, values=values)
    assert 8 * len(encode(message, COARSE)) / values.size < 4.5
    fifteen = np.abs(values).max(axis=1, keepdims=True) / 7
    squared_error = np.square(through(values, COARSE) - values).mean()
    assert squared_error < 0.3 * np.square(np.rint(values / fifteen) * fifteen - values).mean()
    assert squared_error == pytest.approx((1 / 4.5) ** 2 / 12, rel=0.05)


# Outliers and centres


def test_outlier_channels_are_found_and_kept_apart() -> None:
    assert quantise(activations()).outliers.tolist() == [5, 77]
    assert quantise(activations(), dither=Dither(0)).outliers.tolist() == [5, 77]
    assert quantise(activations(outliers=())).outliers.tolist() == []


@quantising
def test_outliers_spoil_neither_themselves_nor_the_others(codec: str) -> None:
    values = activations()
    quiet = np.setdiff1d(np.arange(128), [5, 77])
    error = np.abs(through(values, codec) - values)
    # A row's scale is that of the quiet channels, which reach about 4 from their centres, in the root mean square 1; an outlier
    # has bfloat16's 8 bits.
    assert error[:, quiet].max() < 0.5 * {"int8": 6 / 127, COARSE: 1.02 / 4.5}[codec]
    assert error[:, [5, 77]].max() < 2.0**-8 * np.abs(values - values.mean(axis=0)).max()


def test_at_most_one_channel_in_sixteen_is_an_outlier() -> None:
    values = activations(outliers=tuple(range(0, 128, 4)))
    assert len(quantise(values).outliers) == 128 // 16


def test_in_a_coarse_unit_a_channel_that_only_its_own_codes_make_longer_is_none() -> None:
    values = activations(outliers=(5, 77))
    values[:, 77] /= 50
    assert quantise(values).outliers.tolist() == [5, 77]
    assert quantise(values, 4.5).outliers.tolist() == [5]


@quantising
def test_the_mean_of_a_channel_costs_no_precision(codec: str) -> None:
    values = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    around_zero = np.abs(through(values, codec) - values).max()
    far_away = values + np.linspace(-50, 50, 64, dtype=np.float32)
    assert np.abs(through(far_away, codec) - far_away).max() < 1.2 * around_zero


# Stochastic rounding


@every_codec
def test_stochastic_rounding_is_right_on_average(codec: str) -> None:
    num_rows = 16_000
    row = np.random.default_rng(0).uniform(-1, 1, 64).astype(np.float32)
    arrived = through(np.tile(row, (num_rows, 1)), codec, 7)
    step = 2.0**-8 if codec == "bfloat16" else 1.01 / (CODES_OF_THE_RMS[codec] or LARGEST_CODE)
    # The deviation of one rounding is at most half a step; five of those of the mean are allowed, 64 times.
    assert np.abs(arrived.mean(axis=0, dtype=np.float64) - row).max() < 5 * 0.5 * step / num_rows**0.5
    assert len(np.unique(arrived[:, 0])) == 2


def test_noise_is_odd_symmetric_and_a_function_of_its_seed() -> None:
    noise = Dither("a", 1).draw(100_001)
    assert noise.shape == (100_001,)
    assert (noise % 2 == 1).all()
    assert abs(noise.mean(dtype=np.float64)) < 5 * 2**15 / 3**0.5 / 100_001**0.5
    assert (Dither("a", 1).draw(100_001) == noise).all()
    assert (Dither("a", 2).draw(100_001) != noise).any()


def test_noise_is_that_of_every_other_machine() -> None:
    assert Dither(7, "jetson", "ActivationGradient", 3).draw(6).tolist() == GOLDEN["noise"]


# On the wire


def coded_samples() -> dict[str, Coded]:
    random = np.random.default_rng(5)
    values = (random.integers(-64, 64, (4, 17)) / 8).astype(np.float32)
    values[:, 3] *= 1000
    return {f"{codec} {name}": Coded.of(values, codec, dither()) for codec in CODECS for name, dither in ROUNDINGS.items()}


ROUNDINGS: dict[str, Callable[[], Dither | None]] = {"activations": lambda: None, "gradients": lambda: Dither(1)}
SAMPLES = coded_samples()


def extension(coded: Coded, **changes: Any) -> msgpack.ExtType:
    changed = dataclasses.replace(coded, **changes)
    return msgpack.ExtType(2, msgpack.packb([changed.codec, changed.shape, *changed.parts]))


def gradient_frame(values: msgpack.ExtType) -> bytes:
    return protocol_samples.frame_of("ActivationGradient", {"step": 1, "loss": 0.0, "labelled_tokens": 1, "values": values})


@pytest.mark.parametrize("name", SAMPLES)
def test_coded_bytes_of_version_3_are_still_written_and_mean_what_the_document_says(name: str) -> None:
    coded = SAMPLES[name]
    assert extension(coded).data.hex() == GOLDEN[name]
    golden = msgpack.ExtType(2, bytes.fromhex(GOLDEN[name]))
    arrived = decode(gradient_frame(golden), MAX_BYTES, [coded.codec])
    assert isinstance(arrived, ActivationGradient)
    assert arrived.values.tobytes() == protocol_samples.decoded(golden).tobytes()


def test_the_samples_have_an_outlier() -> None:
    assert all(len(SAMPLES[f"{codec} {name}"].parts[1]) == 4 for codec in CODES_OF_THE_RMS for name in ROUNDINGS)


@every_codec
@pytest.mark.parametrize("shape", [(1, 1), (1, 768), (512, 1), (512, 17), (64, 768)])
def test_a_coded_message_is_smaller_than_the_bound_of_an_exact_one(codec: str, shape: tuple[int, int]) -> None:
    rows, width = shape
    values = (np.random.default_rng(0).normal(size=shape) * 1e6).astype(np.float32)
    bound = largest_message_bytes(rows=rows, width=width, precision="float32", adapter_elements=0)
    data = encode(ActivationGradient(step=2**53, loss=1e300, labelled_tokens=1, values=values), codec)
    assert len(protocol_samples.inflate(data)) <= bound
    assert len(data) <= compressed_bound(bound)
    decode(data, bound, codec)


# Hostile bytes


def refusal(values: msgpack.ExtType, codec: str, max_bytes: int = MAX_BYTES) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(gradient_frame(values), max_bytes, codec)
    assert 0 < len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()
    return str(caught.value)


def bfloat16(*values: float) -> bytes:
    bits = (np.array(values, np.float32).view(np.uint32) >> 16).astype("<u2")
    return bits.view(np.uint8).reshape(-1, 2).T.tobytes()


def int32(*values: int) -> bytes:
    return np.array(values, "<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


# Two rows of three channels, of which the last is an outlier.
PARTS: dict[str, bytes] = {
    "centre": bfloat16(1, 2, 3),
    "outliers": int32(2),
    "outlier values": bfloat16(5, 6),
    "scales": bfloat16(1, 0.5),
    "codes": bytes(6),
}


def of_parts(codec: str = "int8", shape: Any = (2, 3), **changed: bytes) -> msgpack.ExtType:
    parts = {**PARTS, **{name.replace("_", " "): part for name, part in changed.items()}}
    return msgpack.ExtType(2, msgpack.packb([codec, shape, *parts.values()]))


@quantising
def test_parts_made_by_hand_are_understood(codec: str) -> None:
    message = decode(gradient_frame(of_parts(codec)), MAX_BYTES, [codec])
    assert isinstance(message, ActivationGradient)
    assert message.values.tolist() == [[1, 2, 8], [1, 2, 9]]
    without = of_parts(codec, centre=b"", outliers=b"", outlier_values=b"")
    assert decode(gradient_frame(without), MAX_BYTES, [codec]).values.tolist() == [[0] * 3] * 2  # type: ignore[union-attr]


@quantising
@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf"), 2.0**121])
def test_a_scale_that_is_not_positive_and_finite_is_refused(codec: str, scale: float) -> None:
    assert "a scale of" in refusal(of_parts(codec, scales=bfloat16(1, scale)), codec)


@quantising
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 2.0**121, -(2.0**121)])
@pytest.mark.parametrize(("part", "count"), [("centre", 3), ("outlier_values", 2)])
def test_a_centre_or_outlier_that_is_no_number_is_refused(codec: str, value: float, part: str, count: int) -> None:
    changed = bfloat16(*[1.0] * (count - 1), value)
    assert f"the {part.replace('_', ' ')} of" in refusal(of_parts(codec, **{part: changed}), codec)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bfloat16_that_is_no_number_is_refused(value: float) -> None:
    values = msgpack.ExtType(2, msgpack.packb(["bfloat16", [1, 2], bfloat16(1, value)]))
    assert "NaN or infinite" in refusal(values, "bfloat16")


@quantising
@pytest.mark.parametrize("outliers", [(3,), (-1,), (2**31 - 1,), (-(2**31),), (1, 1), (2, 1), (0, 1, 2, 3)])
def test_outliers_that_are_no_increasing_channels_are_refused(codec: str, outliers: tuple[int, ...]) -> None:
    values = bfloat16(*[1.0] * (2 * len(outliers)))
    assert "increasing" in refusal(of_parts(codec, outliers=int32(*outliers), outlier_values=values), codec)


@quantising
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", [-1, 1, 2, 1000])
def test_a_part_of_another_size_is_refused(codec: str, part: str, change: int) -> None:
    changed = {part.replace(" ", "_"): bytes(len(PARTS[part]) + change)}
    assert "bytes, expected" in refusal(of_parts(codec, **changed), codec)


@every_codec
@pytest.mark.parametrize("count", [0, 1, 4, 6, 13])
def test_another_number_of_parts_is_refused(codec: str, count: int) -> None:
    count += codec == "bfloat16" and count == 1
    refusal(msgpack.ExtType(2, msgpack.packb([codec, [2, 3], *[bytes(12)] * count])), codec)


@every_codec
@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        ["int8"],
        {},
        "int8",
        ["int3", [1, 1], b""],
        [["int8"], [1, 1], b""],
        [None, [1, 1], b""],
        *(["int8", shape, b"", b"", b"", bytes(2), b"\0"] for shape in (None, 1, [1], [1, 1, 1], [1, -1], [True, 1], ["1", 1])),
        ["int8", [1, 1], b"", b"", b"", "xx", b"\0"],
        ["int8", [1, 1], b"", b"", b"", [0, 0], b"\0"],
    ],
)
def test_what_is_no_coded_tensor_is_refused(codec: str, fields: Any) -> None:
    refusal(msgpack.ExtType(2, msgpack.packb(fields)), codec)


@every_codec
@pytest.mark.parametrize("shape", [(1025, 1024), (2**40, 0), (0, 2**63), (2**63, 2**63), (2**20 + 1, 1)])
def test_a_tensor_that_would_decode_to_more_than_the_limit_is_refused(codec: str, shape: tuple[int, int]) -> None:
    values = msgpack.ExtType(2, msgpack.packb([codec, shape, *[b""] * (1 if codec == "bfloat16" else 5)]))
    assert "exceeds the limit of 4194304 bytes" in refusal(values, codec)


@every_codec
def test_a_codec_that_was_not_agreed_on_is_refused(codec: str) -> None:
    values = np.ones((2, 3), np.float32)
    for agreed in {EXACT, *CODECS} - {codec}:
        assert refusal(extension(Coded.of(values, codec)), agreed).startswith(f"a tensor in {codec}, which was not agreed on;")
    assert isinstance(
        decode(encode(ActivationGradient(step=1, loss=0.0, labelled_tokens=1, values=values)), MAX_BYTES, [codec]),
        ActivationGradient,
    )


@every_codec
def test_adapters_cannot_be_coded_as_activations_are(codec: str) -> None:
    values = np.ones((2, 3), np.float32)
    fields = {"step": 1, "tensors": {"a": extension(Coded.of(values, codec))}}
    with pytest.raises(RemoteProtocolError, match=f"a tensor in {codec}, in which none of this field can be"):
        decode(protocol_samples.frame_of("EdgeAdapter", fields), MAX_BYTES, [codec])
    assert encode(EdgeAdapter(step=1, tensors={"a": values}), codec) == encode(EdgeAdapter(step=1, tensors={"a": values}))


parts_of_anything = st.lists(st.binary(max_size=24), max_size=6)


@given(st.sampled_from(CODECS), st.lists(st.integers(0, 4), min_size=2, max_size=2), parts_of_anything)
@settings(some_hundred, max_examples=500)
def test_any_parts_are_a_tensor_or_refused(codec: str, shape: list[int], parts: list[bytes]) -> None:
    values = msgpack.ExtType(2, msgpack.packb([codec, shape, *parts]))
    try:
        message = decode(gradient_frame(values), MAX_BYTES, [codec])
    except RemoteProtocolError:
        refusal(values, codec)
    else:
        assert isinstance(message, ActivationGradient)
        assert np.isfinite(message.values).all()


@given(st.sampled_from(list(SAMPLES)), st.data())
@settings(some_hundred, max_examples=500)
def test_a_changed_part_is_a_tensor_or_refused(name: str, draw: st.DataObject) -> None:
    coded = SAMPLES[name]
    parts = [bytearray(part) for part in coded.parts]
    part = draw.draw(st.sampled_from([part for part in parts if part]))
    part[draw.draw(st.integers(0, len(part) - 1))] = draw.draw(st.integers(0, 255))
    try:
        decode(gradient_frame(extension(coded, parts=[bytes(part) for part in parts])), MAX_BYTES, [coded.codec])
    except RemoteProtocolError:
        pass


# Agreed on by both sides


SETTINGS = dataclasses.replace(protocol_samples.SETTINGS, activation_codec="int8", gradient_codec=COARSE, check_codec_every=0)


class Pair:
    """Both sides of a conversation."""

    def __init__(self, settings: RunSettings = SETTINGS, name: str = "a", offered: tuple[str, ...] = CODECS) -> None:
        self.ends = {side: Session(side, MAX_BYTES) for side in Side}
        self.say(Side.CLIENT, Hello(name=name, fingerprint="f", codecs=offered, abilities=ABILITIES))
        self.say(Side.SERVER, Welcome(run="r", settings=settings, fingerprint="f"))
        self.say(Side.CLIENT, Join(num_samples=1, batch_size=1, longest=9))
        self.say(Side.SERVER, Start(step=0, total_steps=100, adapter={}))

    def say(self, side: Side, message: Message) -> tuple[bytes, Message]:
        data = self.ends[side].send(message)
        received = self.ends[side.peer].receive(data)
        assert received is not None
        return data, received


def batch(step: int = 1) -> Activations:
    counts = np.array([300], np.int32)
    labels = np.zeros(300, np.int32)
    return Activations(
        step=step, seconds=Seconds(), lengths=counts, label_counts=counts, labels=labels, values=activations(outliers=())
    )


def a_step(pair: Pair, step: int = 1) -> tuple[bytes, bytes]:
    """The bytes of its activations and of their gradient."""
    up, received = pair.say(Side.CLIENT, batch(step))
    assert isinstance(received, Activations)
    gradient = ActivationGradient(step=step, loss=1.0, labelled_tokens=300, values=received.values)
    return up, pair.say(Side.SERVER, gradient)[0]


def test_each_direction_has_its_codec() -> None:
    up, down = a_step(Pair())
    assert b"int8" in protocol_samples.inflate(up)
    assert b"coarse" in protocol_samples.inflate(down)
    exact = a_step(Pair(dataclasses.replace(SETTINGS, activation_codec=EXACT, gradient_codec=EXACT), offered=()))
    assert len(up) < 0.35 * len(exact[0])
    assert len(down) < 0.2 * len(exact[1])


def test_a_message_that_is_sent_again_has_the_same_bytes() -> None:
    assert a_step(Pair()) == a_step(Pair())
    first, again = ([data for data, _ in four_directions().values()] for _ in range(2))
    assert first == again


ON_DEVICE = dataclasses.replace(SETTINGS, labels="device")


def four_directions(settings: RunSettings = ON_DEVICE) -> dict[type, tuple[bytes, Array]]:
    """Of a step whose labels stay on the device, by kind the bytes of each message, and the values that arrive."""
    pair, values = Pair(settings, offered=OFFERED), activations(outliers=())
    of_batch: dict[str, Any] = {name: getattr(batch(), name) for name in ("lengths", "label_counts")}
    of_batch["labels"] = np.empty(0, np.int32)
    gradient = HiddenGradient(step=1, seconds=Seconds(), summed_loss=1.0, labelled_tokens=300, values=values)
    conversation: list[tuple[Side, Any]] = [
        (Side.CLIENT, Activations(step=1, seconds=Seconds(), values=values, **of_batch)),
        (Side.SERVER, HiddenStates(step=1, values=values)),
        (Side.CLIENT, gradient),
        (Side.SERVER, ActivationGradient(step=1, loss=1.0, labelled_tokens=300, values=values)),
        (
            Side.CLIENT,
            Evaluation(index=1, values=values, **of_batch),
        ),
        (Side.SERVER, EvaluationStates(index=1, values=values)),
    ]
    said: dict[type, tuple[bytes, Array]] = {}
    for side, message in conversation:
        data, came = pair.say(side, message)
        said[type(message)] = (data, came.values)  # type: ignore[union-attr]
    return said


def test_gradients_of_both_directions_are_rounded_at_random_and_hidden_states_to_the_nearest() -> None:
    values = activations(outliers=())
    gradients = {
        kind: Coded.of(values, COARSE, Dither(7, "a", kind, 1, 0)) for kind in ("HiddenGradient", "ActivationGradient")
    }
    expected = {
        Activations: Coded.of(values, "int8"),
        HiddenStates: Coded.of(values, COARSE),
        HiddenGradient: gradients["HiddenGradient"],
        ActivationGradient: gradients["ActivationGradient"],
        Evaluation: Coded.of(values, "bfloat16"),
        EvaluationStates: Coded.of(values, "bfloat16"),
    }
    said = four_directions()
    for kind, coded in expected.items():
        assert said[kind][1].tobytes() == coded.decode().tobytes(), kind
    assert gradients["HiddenGradient"].parts != gradients["ActivationGradient"].parts


def with_dithered_gradients(codec: str, **more: Any) -> RunSettings:
    return dataclasses.replace(ON_DEVICE, activation_codec=codec, gradient_codec=DITHERED, **more)


@pytest.mark.parametrize("codec", ["int8", COARSE])
def test_dithered_gradients_of_both_directions_are_right_on_average_and_of_all_rows_alike(codec: str) -> None:
    """Beside them hidden states travel as activations do, for they have a centre and outliers."""
    values = activations(outliers=())
    said = four_directions(with_dithered_gradients(codec))
    assert said[HiddenStates][1].tobytes() == Coded.of(values, codec).decode().tobytes()
    for kind in (HiddenGradient, ActivationGradient):
        data, came = said[kind]
        assert b"dithered" in protocol_samples.inflate(data)
        errors = came.astype(float) - values
        unit = np.abs(errors).max() * 2
        assert unit == pytest.approx(np.sqrt(np.square(values).mean()) / {"int8": 8.0, COARSE: 0.85}[codec], rel=0.02)
        assert abs(errors.mean()) < 5 * unit / np.sqrt(12 * errors.size)
        np.testing.assert_allclose(errors.var(axis=1), unit**2 / 12, rtol=0.5)
    assert (said[HiddenGradient][1] != said[ActivationGradient][1]).any()


def test_dithered_gradients_beside_int4_take_two_bits_an_element() -> None:
    values = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
    message = ActivationGradient(step=1, loss=1.0, labelled_tokens=300, values=values)
    dithered = len(encode(coded_gradient(message, COARSE, Dither(0))))
    assert 8 * dithered / values.size < 2.2
    assert dithered < 0.5 * len(encode(message, COARSE, Dither(0)))


def test_gradients_stay_dithered_as_long_as_activations_are_in_few_bits() -> None:
    codecs = (DELTA, COARSE, "int8", "bfloat16", EXACT)
    assert [gradient_codec(codec) for codec in codecs] == [*[DITHERED] * 3, "bfloat16", EXACT]
    pair = Pair(with_dithered_gradients(COARSE, labels="server"), offered=OFFERED)
    sizes = []
    for step, codec in enumerate(("int8", "bfloat16", EXACT, EXACT), 1):
        _, received = pair.say(Side.CLIENT, batch(step))
        assert isinstance(received, Activations)
        gradient = ActivationGradient(step=step, loss=1.0, labelled_tokens=300, values=received.values, codec=codec)
        data, _ = pair.say(Side.SERVER, gradient)
        assert (b"dithered" in protocol_samples.inflate(data)) == (step < 3)
        sizes.append(len(data))
        assert pair.ends[Side.CLIENT].codecs == pair.ends[Side.SERVER].codecs
    assert sizes == sorted(sizes)


def test_a_server_of_an_earlier_release_sends_gradients_as_it_did() -> None:
    """It tells its clients of no other codec, and chooses one of both at once."""
    pair = Pair(dataclasses.replace(SETTINGS, gradient_codec="int8"), offered=OFFERED)
    for step, codec in enumerate(("int8", "bfloat16"), 1):
        _, received = pair.say(Side.CLIENT, batch(step))
        assert isinstance(received, Activations)
        gradient = ActivationGradient(step=step, loss=1.0, labelled_tokens=300, values=received.values, codec=codec)
        pair.say(Side.SERVER, gradient)
        assert pair.ends[Side.CLIENT].codecs[:2] == (codec, codec)


@every_codec
def test_all_four_directions_together_take_four_times_a_codecs_bytes(codec: str) -> None:
    said = four_directions(dataclasses.replace(ON_DEVICE, activation_codec=codec, gradient_codec=codec))
    elements = 300 * 128
    sizes = [len(data) / elements for kind, (data, _) in said.items() if not issubclass(kind, Evaluation | EvaluationStates)]
    assert sum(sizes) < 4 * {"bfloat16": 2.0, "int8": 1.1, COARSE: 0.6}[codec]


def test_run_without_codec_is_exact_in_all_directions() -> None:
    said = four_directions(dataclasses.replace(ON_DEVICE, activation_codec=EXACT, gradient_codec=EXACT))
    for _, values in said.values():
        assert values.tobytes() == activations(outliers=()).tobytes()


@pytest.mark.parametrize(
    "other", [{"name": "b"}, {"settings": dataclasses.replace(SETTINGS, seed=8)}, {"step": 2}], ids=["client", "seed", "step"]
)
def test_noise_differs_by_client_seed_and_step(other: dict[str, Any]) -> None:
    step = other.pop("step", 1)
    gradients = [
        decode(down, MAX_BYTES, [COARSE]).values  # type: ignore[union-attr]
        for _, down in (a_step(Pair()), a_step(Pair(**other), step))
    ]
    assert (gradients[0] != gradients[1]).any()


def test_codes_of_four_bits_of_earlier_releases_are_neither_offered_nor_read() -> None:
    """On the wire they had the name that people give to COARSE now."""
    assert "int4" not in OFFERED
    with pytest.raises(RemoteProtocolError, match="the server chose the codec coarse, which was not offered"):
        Pair(dataclasses.replace(SETTINGS, activation_codec=COARSE), offered=("bfloat16", "int8", "int4", DELTA, DITHERED))
    assert "a tensor in the codec 'int4'" in refusal(of_parts("int4", codes=bytes(3)), "int8")


def test_people_call_codecs_by_other_names() -> None:
    named = {codec_name(codec): codec for codec in (EXACT, *OFFERED)}
    assert list(named) == ["float32", "bfloat16", "int8", "int4", "delta", "dithered"]
    assert all(codec_named(name) == codec for name, codec in named.items())


def test_a_codec_that_the_client_did_not_offer_is_refused_by_it() -> None:
    with pytest.raises(RemoteProtocolError, match="the server chose the codec coarse, which was not offered"):
        Pair(offered=("int8", "bfloat16"))


# In a run


def options(model: Path, run_dir: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "run_dir": str(run_dir), "cut_layer": 2, "lora_rank": 4, "lr": 2e-3, "steps": 8, **more}


@pytest.fixture(scope="module")
def exact_losses(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], list[float]]:
    known: list[list[float]] = []

    def losses(clients: dict[str, Any]) -> list[float]:
        if not known:
            known.append(run_split(options(tiny_model, tmp_path_factory.mktemp("exact") / "run"), clients).losses)
        return known[0]

    return losses


# Of the loss, at every one of 8 steps; four times what is found. Half a code is 1/512, 1/254 and 1/14 of what a value, or its
# row, reaches; errors of several hundred values cancel out for the most part.
CLOSE = {"bfloat16": 4e-4, "int8": 1e-3, COARSE: 1e-2}


@every_codec
def test_a_run_in_a_codec_learns_nearly_as_an_exact_one_and_repeats_to_the_bit(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], exact_losses: Callable[..., list[float]], codec: str
) -> None:
    clients = {name: {"data": pairs_file(name, 12, 100 * i), "batch_size": 3} for i, name in enumerate("ab")}
    outcomes = []
    for number in range(2):
        run_dir = tmp_path / f"run-{number}"
        result = run_split(options(tiny_model, run_dir, codec=codec_name(codec), adapter_codec="float32"), clients)
        outcomes.append((result.losses, adapter_bytes(run_dir)))
    assert outcomes[0] == outcomes[1]
    exact = exact_losses(clients)
    assert outcomes[0][0] == pytest.approx(exact, rel=CLOSE[codec])
    assert outcomes[0][0] != exact


def test_a_client_without_the_runs_codec_is_refused_by_name_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pairs_file("a", 6)
    with GpuServer(port=0, dtype="float32", **options(tiny_model, tmp_path / "run", codec="auto", steps=2)) as server:
        with monkeypatch.context() as patch:
            patch.setattr(edge_client.client, "OFFERED", ("bfloat16",))
            with pytest.raises(Refused, match="old does not offer the codec coarse, dithered, int8, which this run uses"):
                EdgeClient(server.url, engine="torch", model=str(tiny_model), data=data, name="old").__enter__()
        with EdgeClient(server.url, engine="torch", model=str(tiny_model), data=data, name="new") as client:
            assert len(list(client.train())) == 2
        assert len(list(server.train())) == 2


DISTURBED = [
    ("int8", "rounds of one step", [Fault("server", "send", 7, "kill"), Fault("a", "receive", 6, "cut")]),
    ("int8", "rounds of two steps", [Fault("server", "receive", 9, "kill"), Fault("b", "send", 4, "kill")]),
    ("int4", "rounds of one step", [Fault("a", "send", 5, "kill"), Fault("server", "send", 9, "twice")]),
    ("delta", "delta, rounds of one step", [Fault("a", "receive", 14, "kill"), Fault("server", "send", 30, "kill")]),
    ("delta", "delta, rounds of two steps", [Fault("b", "receive", 17, "kill"), Fault("server", "receive", 26, "kill")]),
]


@pytest.mark.parametrize(("codec", "mode", "faults"), DISTURBED, ids=[f"{codec}-{mode}" for codec, mode, _ in DISTURBED])
def test_a_disturbed_run_in_a_codec_gives_the_adapter_of_an_undisturbed_one(
    scene: Scene, tmp_path: Path, codec: str, mode: str, faults: list[Fault]
) -> None:
    codecs: dict[str, Any] = {"codec": codec, "adapter_codec": "dithered"}
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    undisturbed = scene.run(tmp_path / "undisturbed", mode, [], **codecs).to_its_end()
    disturbed = scene.run(tmp_path / "disturbed", mode, faults, **codecs).to_its_end()
    assert sorted(disturbed.struck) == sorted(fault.what for fault in faults)
    assert disturbed.differences(undisturbed) == []
