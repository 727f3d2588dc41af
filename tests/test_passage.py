"""LoRA matrices in few bits: what is lost is bounded, owed or zero on average, and both sides have the same to the bit."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from protocol_samples import decoded as decoded_as_documented
from protocol_samples import frame_of
from usual_settings import settings as usual

from gpu_server.federation import CodecPolicy
from gpu_server.part_trainer import PartTrainer
from gpu_server.torch_engine import TorchEngine
from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
    Contribution,
    EdgeAdapter,
    Hello,
    Join,
    RemoteProtocolError,
    RunSettings,
    Seconds,
    Session,
    Side,
    Start,
    Tensors,
    TrainingDiverged,
    Welcome,
    changed_by,
    changes,
    coded_update,
    decode,
)
from protocol.codecs import Coded
from protocol.passage import coded_contribution
from protocol.rounding import Dither
from protocol.settings import ABILITIES, DITHERED, OFFERED
from split_model import LoraConfig, PretrainedModel, adapter_shapes, initial_adapter

MAX_BYTES = 2**22
IN_INT4: dict[str, Any] = {
    "epochs": None,
    "steps": 10,
    "activation_codec": "coarse",
    "gradient_codec": "coarse",
    "adapter_codec": DITHERED,
}
COARSE, FINE = usual(**IN_INT4), usual(**IN_INT4, aggregate_every=2)
both = pytest.mark.parametrize("run", [COARSE, FINE], ids=["rounds of one step", "longer rounds"])
matrices = np_st.arrays(
    np.float32,
    np_st.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
    elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32) | st.just(0.0),
    fill=st.floats(-4, 4, width=32),
)
some_hundred = settings(max_examples=200)


def adapter(seed: int, scale: float = 1.0) -> Tensors:
    """An A and a B of rank 4, whose directions are of very different sizes."""
    rng, sizes = np.random.default_rng(seed), np.float32(scale) * np.array([[1e-3], [0.1], [1], [50]], np.float32)
    a, b = (rng.normal(size=(4, length)).astype(np.float32) * sizes for length in (64, 96))
    return {"layer.lora_A.weight": a, "layer.lora_B.weight": np.ascontiguousarray(b.T)}


def decoded(coded: dict[str, Coded]) -> Tensors:
    return {name: matrix.decode() for name, matrix in coded.items()}


def sizes_of_a_code(matrix: Array, coded: Coded) -> Array:
    """What a code is worth, in the shape of the matrix, read as PROTOCOL.md has it."""
    raw = np.frombuffer(coded.parts[1], np.uint8).reshape(2, -1).T.copy().view("<u2")[:, 0].astype(np.uint32) << 16
    sizes = np.repeat(raw.view(np.float32), 64)[: matrix.size]
    return sizes.reshape(matrix.shape[::-1]).T if matrix.shape[0] > matrix.shape[1] else sizes.reshape(matrix.shape)


# One matrix


def test_without_noise_a_matrix_decodes_to_its_codes_times_the_scale_of_their_block() -> None:
    rng = np.random.default_rng(3)
    codes, scales = rng.integers(-126, 127, (3, 64)), np.array([0.5, 3.0, 2.0**-40], np.float32)
    codes[:, 0] = 126  # so that no scale can be finer
    rows = (codes * scales[:, None]).astype(np.float32)
    for matrix in (rows, rows.T):
        coded = Coded.dithered(matrix, math.inf)
        assert len(coded.parts[1]) == 2 * 3
        assert (np.abs(coded.decode() - matrix) <= sizes_of_a_code(matrix, coded) / 2).all()
        assert (sizes_of_a_code(matrix, coded).max(axis=int(matrix.shape[0] < 64)) <= 1.5 * scales).all()


@given(matrices, st.sampled_from([0.25, 1.0, 1e9]), st.sampled_from([None, 1, 2]), st.booleans())
@some_hundred
def test_an_element_is_off_by_half_a_code_at_most(matrix: Array, codes: float, seed: int | None, has_one_unit: bool) -> None:
    coded = Coded.dithered(matrix, codes, None if seed is None else Dither(seed), has_one_unit=has_one_unit)
    found = coded.decode()
    assert (found.dtype, found.shape, found.flags.writeable) == (np.float32, matrix.shape, True)
    off = np.abs(found.astype(float) - matrix)
    assert (off <= sizes_of_a_code(matrix, coded).astype(float) * 0.5001).all()
    if seed is None:
        assert (found[matrix == 0] == 0).all()


def test_a_code_is_at_least_so_many_of_the_rms_and_less_than_half_more() -> None:
    matrix = np.random.default_rng(0).normal(size=(2, 6_400)).astype(np.float32)
    matrix[1] *= np.float32(1e-6)
    for codes in (0.5, 2.0):
        of_blocks = sizes_of_a_code(matrix, Coded.dithered(matrix, codes)).reshape(-1, 64)[:, 0]
        rms = np.sqrt(np.square(matrix.reshape(-1, 64), dtype=float).mean(axis=1))
        assert ((rms / codes <= of_blocks * 1.0001) & (of_blocks < 1.5001 * rms / codes)).all()
        (of_all,) = np.unique(sizes_of_a_code(matrix, Coded.dithered(matrix, codes, has_one_unit=True)))
        assert 1 <= of_all * codes / np.sqrt(np.square(matrix, dtype=float).mean()) < 1.5


@pytest.mark.parametrize("codes", [0.25, 1.0, 4.0])
def test_errors_of_a_dither_are_zero_on_average_and_of_a_twelfth_whatever_the_value(codes: float) -> None:
    """The variance of what is even over a code; rounding at random has up to three times of it."""
    matrix = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    num_drawn = 2000
    size = sizes_of_a_code(matrix, Coded.dithered(matrix, codes)).astype(float)
    errors = np.array([(Coded.dithered(matrix, codes, Dither(number)).decode() - matrix) / size for number in range(num_drawn)])
    assert (np.abs(errors.mean(0)) < 5 * math.sqrt(1 / 12 / num_drawn)).all()
    assert (np.abs(errors.var(0) - 1 / 12) < 5 * math.sqrt(1 / 180 / num_drawn)).all()


@given(matrices, st.sampled_from([0.25, 1.0, 1e9]), st.sampled_from([None, 3]))
@some_hundred
def test_a_matrix_decodes_to_what_the_document_says_one_element_at_a_time(
    matrix: Array, codes: float, seed: int | None
) -> None:
    if not matrix.size:
        return
    coded = Coded.dithered(matrix, codes, None if seed is None else Dither(seed))
    means = decoded_as_documented(extension(coded.codec, coded.shape, *coded.parts))
    np.testing.assert_array_equal(coded.decode(), means)


# What the server sends


@both
def test_both_sides_have_the_same_adapter_to_the_bit_and_what_is_missing_is_owed(run: RunSettings) -> None:
    before, wanted = adapter(0), adapter(1)
    change, shared, owed = coded_update(before, wanted, run)
    on_device = changed_by(before, decoded(change))
    for name, matrix in shared.items():
        assert on_device[name].tobytes() == matrix.tobytes()
        np.testing.assert_allclose(matrix.astype(float) + owed[name], wanted[name], rtol=1e-6, atol=1e-6)


@both
def test_what_is_owed_never_grows_beyond_half_a_code_and_nothing_drifts(run: RunSettings) -> None:
    """Against the sum of all updates in float64, which nobody codes."""
    shared = adapter(0)
    owed = {name: np.zeros_like(matrix) for name, matrix in shared.items()}
    exactly = {name: matrix.astype(float) for name, matrix in shared.items()}
    for step in range(1, 200):
        update = adapter(step, scale=1e-2)
        exactly = {name: matrix + update[name] for name, matrix in exactly.items()}
        wanted = {name: matrix + update[name] + owed[name] for name, matrix in shared.items()}
        change, shared, owed = coded_update(shared, wanted, run)
        for name, matrix in shared.items():
            most = sizes_of_a_code(matrix, change[name]).astype(float)
            off = np.abs(matrix - exactly[name])
            assert (off <= 0.5001 * most + 1e-4 * np.abs(exactly[name]) + 1e-6).all()


def test_changes_that_are_all_alike_are_sent_and_small_ones_among_them_later() -> None:
    """AdamW's first steps are as large in every element; a code beyond twice that size would never send anything."""
    shared, owed = {"A": np.zeros((1, 64), np.float32)}, {"A": np.zeros((1, 64), np.float32)}
    update = np.ones((1, 64), np.float32)
    update[0, 0] = 0.01
    for _ in range(400):
        _, shared, owed = coded_update(shared, {"A": shared["A"] + update + owed["A"]}, COARSE)
    np.testing.assert_allclose(shared["A"][0, 1:], 400, atol=2.0)
    assert shared["A"][0, 0] == pytest.approx(4.0, abs=2.0)


@given(np_st.arrays(np.float32, st.tuples(st.just(1), st.integers(1, 64)), elements=st.floats(-4, 4, width=16)))
@some_hundred
def test_what_is_owed_is_less_than_what_was_to_be_sent_of_every_row(row: Array) -> None:
    """By a factor: however the updates are, what is owed stays below a multiple of one of them (Stich et al. 2018)."""
    _, _, owed = coded_update({"A": np.zeros_like(row)}, {"A": row}, COARSE)
    assert np.square(owed["A"], dtype=float).sum() <= 0.8 * np.square(row, dtype=float).sum()


# What a device sends


class Talk:
    """A device and its server, which have both come to the end of step 1."""

    def __init__(self, run: RunSettings) -> None:
        self.ends = {side: Session(side, max_bytes=MAX_BYTES) for side in Side}
        self.say(Side.CLIENT, Hello(name="a", fingerprint="f", codecs=OFFERED, abilities=ABILITIES))
        self.say(Side.SERVER, Welcome(run="r", settings=run, fingerprint="f"))
        self.say(Side.CLIENT, Join(num_samples=99, batch_size=1, longest=9))
        self.say(Side.SERVER, Start(step=0, total_steps=10, adapter=adapter(0)))
        values, ones = np.ones((1, 2), np.float32), np.ones(1, np.int32)
        batch = {"lengths": ones, "label_counts": ones, "labels": ones, "values": values}
        self.say(Side.CLIENT, Activations(step=1, seconds=Seconds(), **batch))
        self.say(Side.SERVER, ActivationGradient(step=1, loss=1.0, labelled_tokens=1, values=values))

    def say(self, side: Side, message: Any) -> Any:
        return self.ends[side.peer].receive(self.ends[side].send(message))


KINDS = {AdapterGradient: COARSE, AdapterWeights: FINE}


@pytest.mark.parametrize("kind", KINDS)
def test_a_contribution_arrives_within_a_code_and_again_as_the_same_bytes(kind: type[Contribution]) -> None:
    message = kind(step=1, seconds=Seconds(), tensors=adapter(5))
    first, second = (Talk(KINDS[kind]).ends[Side.CLIENT].send(message) for _ in range(2))
    assert first == second
    arrived = Talk(KINDS[kind]).say(Side.CLIENT, message)
    for name, matrix in message.tensors.items():
        assert arrived.tensors[name].dtype == np.float32
        assert not np.array_equal(arrived.tensors[name], matrix)
        assert (np.abs(arrived.tensors[name] - matrix) <= np.abs(matrix).max() / 2).all()


def test_other_clients_and_other_steps_are_rounded_otherwise() -> None:
    message = AdapterGradient(step=1, seconds=Seconds(), tensors=adapter(5))
    told = [coded_contribution(message, COARSE, Dither(0, name, "AdapterGradient", 1, 0)).tensors for name in "ab"]
    assert any(told[0][name].parts != told[1][name].parts for name in message.tensors)  # type: ignore[attr-defined]


def test_a_gradient_beside_int4_takes_an_eighth_of_its_bytes() -> None:
    rng = np.random.default_rng(0)
    matrices = {f"{number}.lora_A.weight": rng.normal(size=(8, 768)).astype(np.float32) for number in range(12)}
    message = AdapterGradient(step=1, seconds=Seconds(), tensors=matrices)
    coded = len(Talk(COARSE).ends[Side.CLIENT].send(message))
    exact = len(Talk(replace(COARSE, adapter_codec="exact")).ends[Side.CLIENT].send(message))
    assert coded < exact / 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_no_number_is_not_coded_as_one(value: float) -> None:
    tensors = adapter(5)
    tensors["layer.lora_A.weight"][1, 2] = value
    talk = Talk(COARSE)
    with pytest.raises(TrainingDiverged, match=r"this device's layer\.lora_A\.weight is no longer finite"):
        talk.ends[Side.CLIENT].send(AdapterGradient(step=1, seconds=Seconds(), tensors=tensors))


def test_adapters_that_a_run_does_not_code_travel_as_they_are() -> None:
    talk = Talk(replace(COARSE, adapter_codec="exact"))
    arrived = talk.say(Side.CLIENT, AdapterGradient(step=1, seconds=Seconds(), tensors=adapter(5)))
    for name, matrix in adapter(5).items():
        np.testing.assert_array_equal(arrived.tensors[name], matrix)


def test_the_codec_of_the_adapter_stays_where_that_of_activations_changes() -> None:
    policy = CodecPolicy("coarse", tolerance=0.0)
    policy.update(1, {"coarse": 1.0}, 0.0)
    talk = Talk(COARSE)
    talk.say(Side.CLIENT, AdapterGradient(step=1, seconds=Seconds(), tensors=adapter(5)))
    change, shared, _ = coded_update(adapter(0), adapter(1), COARSE)
    arrived = talk.say(Side.SERVER, EdgeAdapter(step=1, tensors=change))  # type: ignore[arg-type]  # as it is on the wire
    for name, matrix in changed_by(adapter(0), arrived.tensors).items():
        assert matrix.tobytes() == shared[name].tobytes()
    assert DITHERED not in policy.may_use()


# Hostile bytes


def refusal(fields: dict[str, Any], codecs: tuple[str, ...] = (DITHERED, "coarse", "delta"), kind: str = "EdgeAdapter") -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode(frame_of(kind, fields), MAX_BYTES, codecs)
    return str(caught.value)


def extension(codec: str, shape: Any, *parts: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(2, msgpack.packb([codec, shape, *parts]))


ONE = b"\x80\x3f"  # as bfloat16, shuffled


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (
            extension(DITHERED, [1, 3], b"", ONE),
            r"dithered\[1, 3\] has parts of \[0, 2\] bytes, expected 0 of noise, 2 of",
        ),
        (extension(DITHERED, [1, 3]), r"dithered\[1, 3\] has parts of \[\] bytes"),
        (extension(DITHERED, [1, 3], b"noise", ONE, b"12", b"12"), r"has parts of \[5, 2, 2, 2\] bytes, expected 16 of noise"),
        (extension(DITHERED, [3, 1], b"", ONE, b"12", b"12", b""), r"has parts of \[0, 2, 2, 2, 0\] bytes"),
        (extension(DITHERED, [1, 3], b"", ONE * 3, b"12", b"12"), r"has parts of \[0, 6, 2, 2\] bytes"),
        (extension(DITHERED, [1, 65], b"", ONE, b"1" * 33, b"1" * 33), r"has parts of \[0, 2, 33, 33\] bytes, .* 4 of scales"),
        (extension(DITHERED, [1, 3], b"", b"\0\0", b"12", b"12"), "a scale of dithered is not a positive number"),
        (extension(DITHERED, [1, 3], b"", b"\x80\xbf", b"12", b"12"), "a scale of dithered is not a positive number"),
        (extension(DITHERED, [1, 3], b"", b"\xc0\x7f", b"12", b"12"), "a scale of dithered is not a positive number"),
        (extension(DITHERED, [2**20, 2**20], b"", b"", b"", b""), "exceeds the limit"),
        (extension("delta", [1, 3], *[b""] * 9), r"tensors\['a'\]: a tensor in delta, in which none of this field can be"),
    ],
)
def test_a_matrix_that_nobody_codes_is_refused(tensor: msgpack.ExtType, reason: str) -> None:
    assert re.search(reason, refusal({"step": 1, "tensors": {"a": tensor}}))


def test_a_matrix_in_the_codec_of_activations_is_refused() -> None:
    tensor = extension("coarse", [1, 1], b"", b"", b"", ONE, b"1")
    assert "a tensor in coarse, in which none of this field can be" in refusal({"step": 1, "tensors": {"a": tensor}})


def test_a_coded_matrix_in_an_exact_run_is_refused() -> None:
    tensor = extension(DITHERED, [1, 3], b"", ONE, b"12", b"12")
    assert "a tensor in dithered, which was not agreed on" in refusal({"step": 1, "tensors": {"a": tensor}}, codecs=())


# The server's engine


def engine_of(folder: Path, run: RunSettings) -> TorchEngine:
    model, lora = PretrainedModel(folder), LoraConfig(**run.lora())
    begin = initial_adapter(model.config, lora, run.seed)
    trainer = PartTrainer(model, run, begin, weight_dtype=torch.float32, device=torch.device("cpu"))
    return TorchEngine(trainer, run, {name: begin[name] for name in adapter_shapes(model.config, lora, range(run.cut_layer))})


def contributions(engine: TorchEngine, step: int) -> dict[str, Tensors]:
    rng = np.random.default_rng(step)
    shapes = {name: matrix.shape for name, matrix in engine.edge_adapter().items()}
    return {client: {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for client in "ab"}


@both
def test_the_engine_goes_on_from_what_it_sends_and_a_restored_one_sends_the_same(tiny_model: Path, run: RunSettings) -> None:
    engine, others = engine_of(tiny_model, run), engine_of(tiny_model, run)
    weights = {"a": 3, "b": 1}
    on_device = engine.edge_adapter()
    for step in range(1, 6):
        told = contributions(engine, step)
        done = engine.aggregate(step, 10, told, weights)
        assert done.change is not None
        on_device = changed_by(on_device, decoded(dict(done.change)))
        for name, matrix in done.edge_adapter.items():
            assert matrix.tobytes() == on_device[name].tobytes() == engine.adapter()[name].numpy().tobytes()
        if step > 1:
            again = others.aggregate(step, 10, told, weights)
            assert again.change is not None
            assert {name: coded.parts for name, coded in again.change.items()} == {
                name: coded.parts for name, coded in done.change.items()
            }
        others = engine_of(tiny_model, run)
        others.restore({name: tensor.clone() for name, tensor in engine.round_end.items()})


def test_the_average_of_changes_is_that_of_the_matrices(tiny_model: Path) -> None:
    exactly = engine_of(tiny_model, replace(FINE, adapter_codec="exact"))
    coded = engine_of(tiny_model, FINE)
    before, weights = coded.edge_adapter(), {"a": 3, "b": 1}
    trained = contributions(coded, 1)
    coded.aggregate(2, 10, {client: changes(tensors, before) for client, tensors in trained.items()}, weights)
    exactly.aggregate(2, 10, trained, weights)
    for name, matrix in exactly.edge_adapter().items():
        owed = coded.round_end[f"owed/{name}"].numpy()
        np.testing.assert_allclose(coded.edge_adapter()[name] + owed, matrix, rtol=1e-5, atol=1e-5)
