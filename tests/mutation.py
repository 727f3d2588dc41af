"""Frames that are nearly messages, without end, and what the decoder, the session and the federation make of them."""

import copy
import dataclasses
import random
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import protocol_samples

from gpu_server.federation import Federation, ModelLimits, Trained
from protocol import (
    CODECS,
    PROTOCOL_VERSION,
    TRANSITIONS,
    ActivationGradient,
    Activations,
    AdapterGradient,
    Contribution,
    Done,
    Evaluation,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    Message,
    RemoteProtocolError,
    Session,
    Side,
    Start,
    State,
    Welcome,
    decode,
    encode,
    zstd,
)
from protocol.session import Codecs
from protocol.settings import ABILITIES

MAX_BYTES = 2**20
EDGES = [0, 1, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
STRANGE: list[Any] = [
    *(None, True, False, -1, *EDGES, 0.0, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), 5e-324),
    *("", "a", "../../etc/passwd", "\x1b[2J\r\n", "\u202e", "x" * 5000, b"", b"\x00" * 100, [], {}, [[[]]], {"": {}}),
    *(msgpack.ExtType(1, b""), msgpack.ExtType(2, b"x"), msgpack.ExtType(1, b"\xc1"), msgpack.Timestamp(1)),
]
WITH_AN_OUTLIER = np.outer([1, -2, 3], [*range(16), 1000]).astype(np.float32)
CHOOSING = (Welcome, Start, ActivationGradient)
"""Those that name a codec."""
OUTCOMES = {
    "peer speaks protocol version": "another version",
    "unknown kind of message": "unknown kind",
    "unknown msgpack extension": "unknown extension",
    "a tensor in": "another codec",
    "the server chose": "another codec",
    "this run needs": "another ability",
    "not a message: the zstd": "no announced size",
    "not a message: more than": "too many elements",
    "not a message": "no message",
    "message of": "announces too much",
    "client sent": "out of turn",
    "server sent": "out of turn",
}


class ByteMutator:
    """Bytes that are nearly the ones given."""

    def __init__(self, random: random.Random) -> None:
        self.random = random

    def _random_bytes(self, longest: int) -> bytes:
        return self.random.randbytes(self.random.randrange(longest))

    def mutated(self, data: bytes) -> bytes:
        mutated = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 3, 8))):
            self.random.choice((self._flip, self._put, self._insert, self._remove, self._repeat, self._write_edge))(mutated)
        return bytes(mutated)

    def _place(self, data: bytearray) -> int:
        return self.random.randrange(len(data)) if data else 0

    def _flip(self, data: bytearray) -> None:
        if data:
            data[self._place(data)] ^= 1 << self.random.randrange(8)

    def _put(self, data: bytearray) -> None:
        if data:
            data[self._place(data)] = self.random.choice(
                (0, 0x7F, 0x80, 0xC1, 0xC9, 0xDD, 0xDF, 0xFF, self.random.randrange(256))
            )

    def _insert(self, data: bytearray) -> None:
        place = self._place(data)
        data[place:place] = self._random_bytes(9)

    def _remove(self, data: bytearray) -> None:
        place = self._place(data)
        del data[place : place + self.random.choice((1, 2, 8, len(data)))]

    def _repeat(self, data: bytearray) -> None:
        place, end = sorted((self._place(data), self._place(data)))
        data[end:end] = data[place:end] * self.random.choice((1, 2, 16))

    def _write_edge(self, data: bytearray) -> None:
        """A number at one of its limits, where a size or a count may stand."""
        form = self.random.choice((">B", ">H", ">I", ">Q", "<H", "<I", "<Q"))
        place = self._place(data)
        number = struct.pack(form, self.random.choice(EDGES) % 256 ** struct.calcsize(form))
        data[place : place + len(number)] = number


class Mutator(ByteMutator):
    """
    Args:
        seed: the same frames for the same seed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(random.Random(seed))
        self._frames = [encode(message) for message in protocol_samples.SAMPLES.values()]
        gradient = ActivationGradient(step=1, loss=1.0, labelled_tokens=1, values=WITH_AN_OUTLIER)
        self._frames += [encode(gradient, codec) for codec in CODECS]
        self._packed = [protocol_samples.inflate(frame) for frame in self._frames]
        self._levels: dict[str, Callable[[], bytes]] = {
            "random bytes": lambda: self._random_bytes(200),
            "random bytes, compressed": lambda: self._compressed(self._random_bytes(200)),
            "mutated frame": lambda: self.mutated(self.random.choice(self._frames)),
            "mutated msgpack": lambda: self._compressed(self.mutated(self.random.choice(self._packed))),
            "mutated fields": lambda: self._compressed(self._of_mutated_fields()),
            "valid": lambda: self.random.choice(self._frames),
        }
        self._weights = [1, 1, 3, 4, 5, 1]

    def frame(self) -> tuple[str, bytes]:
        """How it was made, and the frame."""
        level = self.random.choices(list(self._levels), self._weights)[0]
        return level, self._levels[level]()

    def nearly(self, message: Message) -> bytes:
        """A frame that is nearly this message."""
        what = self.random.randrange(3)
        if what == 0:
            return self.mutated(encode(message))
        if what == 1:
            return self._compressed(self.mutated(protocol_samples.inflate(encode(message))))
        unpacked = [PROTOCOL_VERSION, type(message).__name__, protocol_samples.plain(message)]
        for _ in range(self.random.choice((1, 1, 2, 4))):
            self._change_something(unpacked[2], {})
        return self._compressed(bytes(msgpack.packb(unpacked)))

    def _compressed(self, packed: bytes) -> bytes:
        return zstd.compress(packed, 1)

    def _of_mutated_fields(self) -> bytes:
        kind, other = self.random.choices(list(protocol_samples.SAMPLES), k=2)
        fields, fields_of_other = (protocol_samples.plain(protocol_samples.SAMPLES[name]) for name in (kind, other))
        if "values" in fields and self.random.random() < 0.7:
            fields["values"] = protocol_samples.coded(WITH_AN_OUTLIER, self.random.choice(CODECS))
        message = [PROTOCOL_VERSION, kind, fields]
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self._change_something(message if self.random.random() < 0.1 else message[2], fields_of_other)
        return bytes(msgpack.packb(message))

    def _change_something(self, container: Any, others: Any) -> None:
        """Somewhere inside of a list or map: another value, none, one more, or a tensor that is not quite one."""
        while isinstance(container, dict | list):
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            if not keys:
                return
            key = self.random.choice(keys)
            inner = container[key]
            if not isinstance(inner, dict | list) or not inner or self.random.random() < 0.1:
                break
            container = inner
        else:
            return
        what = self.random.randrange(6)
        if what == 0 and isinstance(container, dict):
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[self.random.choice(("later", "\x1b[0m", "x" * 300, 7, b"bytes"))] = self._strange()
        elif what == 2 and isinstance(inner, msgpack.ExtType):
            container[key] = self._nearly_a_tensor(inner)
        elif what == 3 and isinstance(others, dict) and others:
            container[key] = copy.deepcopy(self.random.choice(list(others.values())))
        else:
            container[key] = self._strange()

    def _strange(self) -> Any:
        return copy.deepcopy(self.random.choice(STRANGE))  # it may be changed itself, later

    def _nearly_a_tensor(self, tensor: msgpack.ExtType) -> msgpack.ExtType:
        if tensor.code == 2 and self.random.random() < 0.8:
            return self._nearly_a_coded_tensor(tensor)
        what = self.random.randrange(5)
        try:
            parts = msgpack.unpackb(tensor.data)
        except (ValueError, msgpack.UnpackException):
            parts = None
        # It may have been changed before.
        if what == 0 or not isinstance(parts, list) or [type(part) for part in parts] != [str, list, bytes]:
            return msgpack.ExtType(tensor.code, self.mutated(tensor.data))
        if what == 1:
            parts[0] = self.random.choice(("float32", "float64", "int32", "float16", "object", "O", "V8", 3, None))
        elif what == 2:
            parts[1] = [self.random.choice((*EDGES, -1, None, 1.5, *parts[1])) for _ in range(self.random.randrange(20))]
        elif what == 3:
            parts[2] = self.mutated(parts[2])
        else:
            parts[self.random.randrange(3)] = self._strange()
        return msgpack.ExtType(1, msgpack.packb(parts))

    def _nearly_a_coded_tensor(self, tensor: msgpack.ExtType) -> msgpack.ExtType:
        """Another codec, shape or number of parts; a part cut, longer, or of other numbers."""
        try:
            parts = msgpack.unpackb(tensor.data)
        except (ValueError, msgpack.UnpackException):
            parts = None
        if not isinstance(parts, list) or len(parts) < 3:  # changed before
            return msgpack.ExtType(2, self.mutated(tensor.data))
        index = self.random.randrange(len(parts))
        if self.random.random() < 0.1:
            parts[index] = self._strange()
        elif self.random.random() < 0.1:
            parts.insert(index, b"")
        elif index == 0:
            parts[0] = self.random.choice((*CODECS, "exact", "int3", None))
        elif index == 1:
            parts[1] = [self.random.choice((*EDGES, -1, *range(9))) for _ in range(self.random.choice((2, 2, 2, 1, 3)))]
        elif isinstance(parts[index], bytes):
            parts[index] = self._other_numbers(parts[index])
        return msgpack.ExtType(2, msgpack.packb(parts))

    def _other_numbers(self, part: bytes) -> bytes:
        if self.random.random() < 0.3:
            return self.mutated(part)
        mutated = bytearray(part)
        for _ in range(min(len(mutated), self.random.choice((1, 2, 9)))):
            mutated[self._place(mutated)] = self.random.choice((0, 1, 0x7F, 0x80, 0xBF, 0xFF))  # of signs and exponents
        return bytes(mutated)


class Judge:
    """
    Lets frames in at random moments of a conversation, and whatever is a message into a run.

    Any exception besides `RemoteProtocolError` gets out, and so does a session that is not where the table says.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._run, self._asking_back = _a_run(), _a_run_that_asks_back()
        self.outcomes: Counter[str] = Counter()

    def judge(self, frame: bytes) -> None:
        self.outcomes[self._decoded(frame)] += 1

    def _decoded(self, frame: bytes) -> str:
        self._codec = self._random.choice(CODECS)
        try:
            message = decode(frame, MAX_BYTES, [self._codec, "bfloat16"])
        except RemoteProtocolError as error:
            self._session_refuses(frame)
            return _outcome(error)
        outcome = self._received(frame, message)
        return outcome if outcome != "accepted" else self._asked(message)

    def _session_refuses(self, frame: bytes) -> None:
        session = self._session()
        before = session.state
        try:
            session.receive(frame)
        except RemoteProtocolError:
            assert session.state is (State.CLOSED if before is State.CLOSED else State.BROKEN)
            return
        raise AssertionError("the session takes what the decoder refuses")

    def _received(self, frame: bytes, message: Message) -> str:
        session = self._session()
        if self._random.random() < 0.5:  # else it is hardly ever its turn
            turns = [(state, sender) for state, sender, kind in TRANSITIONS if kind is type(message)]
            session.state, sender = self._random.choice(turns)
            session.side = sender.peer
            protocol_samples.make_due(session, message)
        expected = TRANSITIONS.get((session.state, session.side.peer, type(message)))
        try:
            received = session.receive(frame)
        except RemoteProtocolError as error:
            outcome = _outcome(error)
            # To a client that has said no Hello, any codec is one that it did not offer.
            allowed = {"another codec", "another ability"} if isinstance(message, CHOOSING) else set()
            if isinstance(message, HiddenStates | HiddenGradient):
                allowed.add("out of turn")  # nobody asked
            assert expected is None or outcome in allowed
            return outcome
        assert session.state is expected
        assert type(received) is type(message)
        state = session.state
        assert session.receive(frame) is None  # delivered twice
        assert session.state is state
        return "accepted"

    def _session(self) -> Session:
        session = Session(self._random.choice(list(Side)), MAX_BYTES)
        session.codecs = session._codecs_before = Codecs(self._codec, self._codec)
        session.state = self._random.choice(list(State))
        return session

    def _asked(self, message: Message) -> str:
        run, actions, outcome = self._run, [], "message"
        try:
            if isinstance(message, Hello):
                run.welcome(message)
            elif isinstance(message, Join):
                run.disconnected("member", 1.0)  # who is connected is refused a second Welcome
                actions = run.join("member", message, 1.0)
            elif isinstance(message, Activations | Contribution | Evaluation | Done):
                actions = run.receive("member", message, 1.0)
            elif isinstance(message, HiddenGradient) and self._asking_back.receive("member", message, 1.0):
                self._asking_back = _a_run_that_asks_back()
        except RemoteProtocolError:
            outcome = "message that does not fit the run"
        if actions or isinstance(message, Hello | Join):
            self._run = _a_run()
        return outcome


def _outcome(error: RemoteProtocolError) -> str:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 1000, text
    return next((outcome for start, outcome in OUTCOMES.items() if text.startswith(start)), "a wrong field")


def _a_run_that_asks_back() -> Federation:
    """One that fits the samples: its only member is to reply what the last micro-batch of step 1 has lost."""
    run = _a_run(labels="device", check_codec_every=0)
    states, gradient, batch = (protocol_samples.SAMPLES[kind] for kind in ("HiddenStates", "HiddenGradient", "Activations"))
    assert isinstance(states, HiddenStates)
    assert isinstance(gradient, HiddenGradient)
    assert isinstance(batch, Activations)
    for part in (0, 1):
        fitting = {"values": np.zeros_like(batch.values), "labels": np.empty(0, np.int32), "samples": None, "exact": None}
        asked = dataclasses.replace(batch, micro_batch=part, **fitting)  # type: ignore[arg-type]
        run.receive("member", asked, 0.0)
        run.forwarded({"member": states.values}, 0.1, 0.0)
        if part == 0:
            run.receive("member", dataclasses.replace(gradient, micro_batch=0), 0.0)
            trained = Trained(loss=1.0, labelled_tokens=1, gradients={"member": batch.values})
            run.trained(trained, 0.1, 0.0)
    return run


def _a_run(**changes: Any) -> Federation:
    """One that fits the samples: its only member is to send the batch of step 1."""
    batch = protocol_samples.SAMPLES["Activations"]
    assert isinstance(batch, Activations)
    gradient = protocol_samples.SAMPLES["AdapterGradient"]
    assert isinstance(gradient, AdapterGradient)
    limits = ModelLimits(
        fingerprint="0123456789abcdef0123456789abcdef",
        width=batch.values.shape[1],
        vocabulary_size=50257,
        num_positions=1024,
        max_batch_tokens=65536,
        edge_shapes={name: tensor.shape for name, tensor in gradient.tensors.items()},
    )
    settings = dataclasses.replace(protocol_samples.SETTINGS, clients=1, **changes)
    zeros = {name: np.zeros_like(tensor) for name, tensor in gradient.tensors.items()}
    run = Federation("run", settings, limits, zeros)
    run.welcome(Hello(name="member", fingerprint=limits.fingerprint, codecs=CODECS, abilities=ABILITIES))
    run.join("member", Join(num_samples=1000, batch_size=8, longest=512), 0.0)
    return run
