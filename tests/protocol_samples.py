"""A message of every kind, and the encoding written a second time, from PROTOCOL.md alone."""

import dataclasses
import hashlib
import struct
from typing import Any

import msgpack
import numpy as np

from protocol import (
    ActivationGradient,
    Activations,
    AdapterGradient,
    AdapterWeights,
    Array,
    AskPart,
    AskPiece,
    Done,
    EdgeAdapter,
    Evaluation,
    EvaluationLoss,
    EvaluationStates,
    Failure,
    Goodbye,
    HeldOutLoss,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    Noted,
    Part,
    PartFile,
    Piece,
    Ping,
    Pong,
    RunEnd,
    RunSettings,
    Seconds,
    Session,
    Start,
    Welcome,
    zstd,
)
from protocol.codecs import Coded
from protocol.session import OpenBatch, Stage

SETTINGS = RunSettings(
    cut_layer=1,
    lora_rank=2,
    lora_alpha=32.0,
    lora_dropout=0.05,
    lora_targets=("c_attn", "c_fc"),
    clients=3,
    steps=100,
    aggregate_every=5,
    micro_batches=2,
    lr=2e-4,
    lr_schedule="linear",
    warmup_steps=10,
    weight_decay=0.01,
    seed=7,
    precision="float32",
    activation_codec="int8",
    gradient_codec="bfloat16",
    check_codec_every=50,
    cache_bytes=1000,
)


WITH_NOISE = dataclasses.replace(SETTINGS, activation_noise=0.5, activation_clip=4.0, noise_delta=1e-7)

_NAME = "base_model.model.transformer.h.0.attn.c_attn.lora_"
_MATRICES = {
    f"{_NAME}A.weight": np.array([[0.5, -1.0, 2.0], [0.25, 0.0, -0.0]], np.float32),
    f"{_NAME}B.weight": np.array([[1e-30, 3.0]], np.float32),
}
_BATCH: dict[str, Any] = {
    "lengths": np.array([2, 1], np.int32),
    "label_counts": np.array([1, 0], np.int32),
    "labels": np.array([50256], np.int32),
    "values": np.array([[0.1, -0.2], [0.3, 1e20], [-1.5, 0.0]], np.float32),
}

_SECONDS = Seconds(edge_compute=0.125, encode=0.25, uplink=1.5, queue=2.0, server_compute=3.0, downlink=0.5, decode=0.0625)

SAMPLES: dict[str, Message] = {
    type(message).__name__: message
    for message in [
        Ping(index=2),
        Pong(
            index=2,
            software="0.1.0",
            run="20250102-030405",
            clients=3,
            joined=1,
            step=0,
            model="openai-community/gpt2",
            waiting_for=("hall", "kitchen"),
            waiting_seconds=42.5,
            edge_weights="float16",
        ),
        Hello(
            name="jetson-1.kitchen_A",
            fingerprint="0123456789abcdef0123456789abcdef",
            codecs=("bfloat16", "int8"),
            abilities=("device-labels", "noise"),
            instance="5f" * 16,
        ),
        Welcome(
            run="20250102-030405",
            settings=WITH_NOISE,
            fingerprint="0123456789abcdef0123456789abcdef",
            restarts=1,
            next_pin="ab" * 32,
            abilities=("held-out-loss",),
        ),
        AskPart(index=4),
        Part(
            index=4,
            files=(
                PartFile(name="part.json", size=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
                PartFile(name="block-0.safetensors", size=2**40, sha256="0123456789abcdef" * 4),
            ),
        ),
        AskPiece(index=5, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", offset=2**33),
        Piece(index=5, data=b"bc\x00\xff"),
        Join(num_samples=1000, batch_size=8, longest=512, step=7, kept=6),
        Start(step=7, total_steps=100, adapter=_MATRICES, round=5, codec="exact"),
        Activations(
            **_BATCH,
            step=1,
            micro_batch=1,
            seconds=_SECONDS,
            samples=np.array([3, -1], np.int32),
            exact=_BATCH["values"] / 2,
        ),
        HiddenStates(step=1, micro_batch=1, values=_BATCH["values"][1:2], queue_seconds=0.5, compute_seconds=0.25),
        HiddenGradient(
            step=1, micro_batch=1, seconds=_SECONDS, summed_loss=2.5, labelled_tokens=1, values=_BATCH["values"][2:]
        ),
        ActivationGradient(
            step=1,
            micro_batch=1,
            loss=3.5,
            labelled_tokens=7,
            values=_BATCH["values"].astype(np.float64),
            codec="exact",
            queue_seconds=0.5,
            compute_seconds=0.25,
        ),
        AdapterGradient(step=1, seconds=Seconds(), tensors=_MATRICES),
        AdapterWeights(step=5, seconds=_SECONDS, tensors={name: matrix.astype(float) for name, matrix in _MATRICES.items()}),
        EdgeAdapter(step=10, tensors=_MATRICES, checkpoint=5, queue_seconds=0.125, compute_seconds=0.0625),
        Evaluation(**_BATCH, index=3),
        EvaluationLoss(index=3, summed_loss=12.75),
        EvaluationStates(index=3, values=_BATCH["values"][:1]),
        HeldOutLoss(step=10, loss=2.25, labelled_tokens=300),
        Noted(step=10, reached=11),
        Done(step=100),
        RunEnd(step=100, tensors=_MATRICES, best_step=80),
        Goodbye(),
        Failure(reason="der Name ist vergeben: „jetson“", retry_after=10.0),
    ]
}


def make_due(session: Session, message: Message) -> None:
    """In a session whose state was set: open the micro-batch that the message belongs to, as far as it has to be."""
    if isinstance(message, HiddenStates | HiddenGradient):
        rows, width = message.values.shape
        stage = Stage.ASKED if isinstance(message, HiddenStates) else Stage.ASKED_BACK
        session._open = {(Activations, message.step, message.micro_batch): OpenBatch((rows, width), stage)}


def assert_same(left: Any, right: Any) -> None:
    """Equal to the bit, types included."""
    assert type(left) is type(right)
    if isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for name in left:
            assert_same(left[name], right[name])
    elif dataclasses.is_dataclass(left):
        for item in dataclasses.fields(left):
            assert_same(getattr(left, item.name), getattr(right, item.name))
    else:
        assert left == right


def tensor_of(dtype: Any, shape: Any, data: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb([dtype, shape, data]))


def tensor(array: Array) -> msgpack.ExtType:
    data = array.tobytes()
    planes = b"".join(data[byte :: array.itemsize] for byte in range(array.itemsize))
    return tensor_of(array.dtype.name, array.shape, planes)


def coded(values: Array, codec: str) -> msgpack.ExtType:
    made = Coded.of(values, codec)
    return msgpack.ExtType(2, msgpack.packb([made.codec, made.shape, *made.parts]))


def _bfloat16(raw: bytes) -> list[float]:
    low, high = raw[: len(raw) // 2], raw[len(raw) // 2 :]
    return [struct.unpack("<f", bytes((0, 0, *pair)))[0] for pair in zip(low, high, strict=True)]


def decoded(coded: msgpack.ExtType) -> Array:
    """What a coded tensor means, one element at a time."""
    codec, (num_rows, width), *parts = msgpack.unpackb(coded.data)
    if codec == "bfloat16":
        return np.array(_bfloat16(parts[0]), np.float32).reshape(num_rows, width)
    if codec == "dithered":
        return _undithered((num_rows, width), *parts)
    centre, outlier_values, scales = (_bfloat16(parts[index]) for index in (0, 2, 3))
    num_outliers = len(parts[1]) // 4
    outliers = [int.from_bytes(parts[1][k::num_outliers], "little") for k in range(num_outliers)]
    values = np.empty((num_rows, width), np.float32)
    for n, c in np.ndindex(num_rows, width):
        code = parts[4][n * width + c]
        value = np.float32(code if code < 128 else code - 256) * np.float32(scales[n])
        if c in outliers:
            value = np.float32(outlier_values[outliers.index(c) * num_rows + n])
        values[n, c] = value + np.float32(centre[c] if centre else 0)
    return values


def _undithered(shape: tuple[int, int], noise: bytes, scales: bytes, *halves: bytes) -> Array:
    size = shape[0] * shape[1]
    lower, upper = ([half for byte in plane for half in (byte % 16, byte // 16)] for plane in halves)
    drawn, units, values = hashlib.shake_128(noise).digest(size), _bfloat16(scales), []
    for number in range(size):
        folded = lower[number] + 16 * upper[number]
        code = -(folded + 1) // 2 if folded % 2 else folded // 2
        values.append(np.float32((code - (2 * drawn[number] - 255) / 512 if noise else code) * units[number // 64]))
    flat = np.array(values, np.float32)
    return flat.reshape(shape[::-1]).T if shape[0] > shape[1] else flat.reshape(shape)


def plain(value: Any) -> Any:
    """A message, or a part of one, as msgpack knows it."""
    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return tensor(value) if isinstance(value, np.ndarray) else value


def compress(packed: bytes) -> bytes:
    return zstd.compress(packed)


def inflate(data: bytes) -> bytes:
    return zstd.ZstdDecompressor().decompress(data)


def frame(unpacked: Any) -> bytes:
    return compress(msgpack.packb(unpacked))


def frame_of(kind: str, fields: Any) -> bytes:
    return frame([3, kind, fields])
