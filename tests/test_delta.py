"""Codec delta: both sides keep the same, errors do not pile up, and nothing is built on what is not there."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import protocol_samples
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.client_state import DeviceCache
from protocol import (
    CODECS,
    DELTA,
    ActivationGradient,
    Activations,
    Array,
    EdgeAdapter,
    Evaluation,
    Hello,
    HiddenGradient,
    HiddenStates,
    Join,
    LocalProtocolError,
    Message,
    RemoteProtocolError,
    Seconds,
    Session,
    Side,
    Start,
    State,
    Welcome,
    decode,
    encode,
)
from protocol.codecs import Coded, quantised_parts
from protocol.delta import arrived, coded
from protocol.rounding import from_bfloat16, to_bfloat16
from protocol.session import Codecs
from protocol.settings import ABILITIES
from storage import CacheFolder

WIDTH, MAX_BYTES = 24, 2**22
LENGTHS = {0: 5, 1: 9, 2: 3, 3: 7}


def batch(step: int, numbers: list[int], values: Array | None = None, micro_batch: int = 0) -> Activations:
    """Of samples with values of their own, a little other in every step."""
    lengths = np.array([LENGTHS[max(0, number)] for number in numbers], np.int32)
    if values is None:
        parts = [np.random.default_rng(number + 1).normal(size=(LENGTHS[max(0, number)], WIDTH)) for number in numbers]
        drift = np.random.default_rng(99).normal(size=(1, WIDTH)) * 0.05 * step
        values = (np.concatenate(parts) + drift).astype(np.float32)
    return Activations(
        step=step,
        micro_batch=micro_batch,
        seconds=Seconds(),
        samples=np.array(numbers, np.int32),
        lengths=lengths,
        label_counts=np.zeros_like(lengths),
        labels=np.empty(0, np.int32),
        values=values,
    )


@dataclasses.dataclass
class Ends:
    """What device and server keep."""

    device: CacheFolder
    server: CacheFolder

    def send(self, message: Activations) -> tuple[Activations, Activations]:
        """As it is sent, and as it arrives; it is answered, too."""
        sent = coded(message, self.device)
        came = arrived(decode(encode(sent), MAX_BYTES, [DELTA]), self.server)  # type: ignore[arg-type]
        for cache in (self.device, self.server):
            cache.confirm(message.step, message.micro_batch)
        return sent, came


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(CacheFolder(tmp_path / "device", 10**7), CacheFolder(tmp_path / "server", 10**7))


def error(came: Activations, message: Activations) -> float:
    return float(np.linalg.norm(came.values - message.values) / np.linalg.norm(message.values))


def since(sent: Activations) -> list[int]:
    assert isinstance(sent.values, Coded)
    return np.frombuffer(sent.values.parts[0], np.uint8).reshape(4, -1).T.copy().view("<i4").ravel().tolist()


def test_first_visit_is_int8(ends: Ends) -> None:
    message = batch(1, [0, 1])
    sent, came = ends.send(message)
    assert since(sent) == [0, 0]
    assert came.values.tobytes() == Coded.of(message.values, "int8").decode().tobytes()


def test_later_visit_is_a_change_and_both_sides_keep_the_same(ends: Ends) -> None:
    ends.send(batch(1, [0, 1]))
    ends.send(batch(2, [2, 3]))
    message = batch(3, [1, 2])
    sent, came = ends.send(message)
    assert since(sent) == [1, 2]
    assert error(came, message) < 0.05
    for number in (1, 2):
        versions = [cache.version(number, 3) for cache in (ends.device, ends.server)]
        assert versions[0].tobytes() == versions[1].tobytes()  # type: ignore[union-attr]
    kept_rows = from_bfloat16(np.concatenate([ends.device.version(1, 3), ends.device.version(2, 3)]))  # type: ignore[list-item]
    assert np.array_equal(kept_rows, from_bfloat16(to_bfloat16(came.values)))


def test_new_and_known_samples_travel_in_one_message(ends: Ends) -> None:
    ends.send(batch(1, [1]))
    message = batch(2, [3, 1, 0])
    sent, came = ends.send(message)
    assert since(sent) == [0, 1, 0]
    fresh = np.r_[0 : LENGTHS[3], LENGTHS[3] + LENGTHS[1] : len(message.values)]
    assert came.values[fresh].tobytes() == Coded.of(message.values[fresh], "int8").decode().tobytes()


def test_bytes_mean_what_the_document_says(ends: Ends) -> None:
    """left and right as lists of numbers, one product and one sum after the other; of rows 0 to 4 there is a version."""
    ends.send(batch(1, [0]))
    version = from_bfloat16(ends.server.version(0, 1))  # type: ignore[arg-type]
    left, right = [[1, -2, 3, 0, 127], [5, 4, -128, 2, 1]], [list(range(-12, 12)), [7] * WIDTH]
    as_bytes = [bytes(number % 256 for row in factor for number in row) for factor in (left, right)]
    nothing = quantised_parts(np.empty((0, WIDTH), np.float32), "int8", None)
    made = Coded(DELTA, (5, WIDTH), [steps(1), *nothing, *as_bytes, bfloat16(0.375)])
    came = arrived(dataclasses.replace(batch(2, [0]), values=made), ends.server)  # type: ignore[arg-type]
    for row, channel in np.ndindex(came.values.shape):
        product = sum(left[k][row] * right[k][channel] for k in range(2))
        assert came.values[row, channel] == np.float32(version[row, channel] + np.float32(product) * np.float32(0.375**2))


def test_errors_do_not_pile_up(ends: Ends) -> None:
    still = batch(1, [0, 1, 2, 3])
    errors = [error(ends.send(batch(step, [0, 1, 2, 3], still.values))[1], still) for step in range(1, 30)]
    assert max(errors[10:]) <= errors[0] * 1.5


def test_change_of_few_directions_is_nearly_exact_and_much_smaller(ends: Ends) -> None:
    numbers = [0, 1, 2, 3]
    rows = sum(LENGTHS.values())
    random = np.random.default_rng(0)
    first = batch(1, numbers, random.normal(size=(rows, WIDTH)).astype(np.float32))
    ends.send(first)
    change = random.normal(size=(rows, 2)) @ random.normal(size=(2, WIDTH)) * 0.1
    second = batch(2, numbers, (first.values + change).astype(np.float32))
    sent, came = ends.send(second)
    assert error(came, second) < 0.03
    assert sum(map(len, sent.values.parts)) < 0.4 * second.values.size  # type: ignore[attr-defined]


def test_nothing_more_is_kept_where_there_is_no_room(tmp_path: Path) -> None:
    ends = Ends(DeviceCache(tmp_path / "device", plan=2500), CacheFolder(tmp_path / "server", 10**7))
    sizes = []
    for step in range(1, 12):
        _, came = ends.send(batch(step, [step % 4]))
        sizes.append(ends.device.num_bytes)
        assert error(came, batch(step, [step % 4])) < 0.1
        assert ends.server.num_bytes == ends.device.num_bytes
    assert sizes[-1] == sizes[-4] >= 1500


def test_samples_that_are_not_kept_are_always_new(ends: Ends) -> None:
    for step in (1, 2):
        sent, _ = ends.send(batch(step, [-1, 2]))
        assert since(sent) == [0, step - 1]
    assert list(ends.device.latest(2, 9)[1].shape) == [LENGTHS[2], WIDTH]  # type: ignore[index]
    assert ends.device.latest(-1, 9) is None


def test_batch_of_nothing_travels(ends: Ends) -> None:
    nothing = dataclasses.replace(
        batch(1, [0]),
        **{name: np.empty(0, np.int32) for name in ("lengths", "label_counts", "labels", "samples")},
        values=np.empty((0, WIDTH), np.float32),
    )
    _, came = ends.send(nothing)
    assert came.values.shape == (0, WIDTH)


@given(st.data())
@settings(max_examples=150)
def test_both_sides_stay_the_same_whatever_happens_to_the_run(data: st.DataObject) -> None:
    """
    Steps are taken, repeated, lost before they are answered, taken back, and no longer needed. The run may also go on without
    the device, which has not heard an answer: the server then has more versions, and still those that the device builds on.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ends = Ends(CacheFolder(Path(folder) / "device", 10**7), CacheFolder(Path(folder) / "server", 10**7))
        step = earliest = 0
        unacknowledged: int | None = None
        """The step of a `Start` of which the server does not know whether it has arrived."""
        goes_on_without_it = data.draw(st.booleans())
        moves = ["send", "send", "send", "lose", "twice", "back", "collect", "kill"]
        moves += ["unheard", "unheard", "back and on"] * goes_on_without_it

        def connect(*, hears: bool) -> None:
            nonlocal unacknowledged
            ends.server.forget_after(ends.device.newest - 1)  # as `Join` says
            if hears:
                ends.device.forget_after(step)
                unacknowledged = step

        def acknowledge() -> None:
            nonlocal unacknowledged
            if unacknowledged is not None:
                ends.server.forget_after(unacknowledged)
            unacknowledged = None

        for _ in range(data.draw(st.integers(1, 16))):
            move = data.draw(st.sampled_from(moves))
            numbers = data.draw(st.lists(st.sampled_from(list(LENGTHS)), min_size=1, max_size=4, unique=True))
            if move in ("send", "twice"):
                step += 1
                acknowledge()
                for _ in range(1 + (move == "twice")):
                    ends.send(batch(step, numbers))
            elif move == "lose":  # on its way: the device starts anew and says where it stands
                coded(batch(step + 1, numbers), ends.device)
                connect(hears=True)
            elif move == "unheard":
                step += 1
                sent = coded(batch(step, numbers), ends.device)
                acknowledge()
                arrived(decode(encode(sent), MAX_BYTES, [DELTA]), ends.server)  # type: ignore[arg-type]
                ends.server.confirm(step, 0)
                connect(hears=True)
            elif move == "back":
                step = data.draw(st.integers(earliest, step))
                connect(hears=True)
            elif move == "back and on":  # without the device, which may have heard that it went back
                step = data.draw(st.integers(earliest, step))
                connect(hears=data.draw(st.booleans()))
                step += data.draw(st.integers(0, 8))
                connect(hears=True)
            elif move == "collect" and unacknowledged is None:
                earliest = data.draw(st.integers(earliest, step))
                ends.server.forget_before(earliest)
                if data.draw(st.booleans()):
                    ends.device.forget_before(earliest)
            else:
                ends.device = CacheFolder(Path(folder) / "device", 10**7)
            for number in LENGTHS:
                newest, at_the_server = (cache.latest(number, step + 1) for cache in (ends.device, ends.server))
                if newest is not None:
                    version = ends.server.version(number, newest[0])
                    assert version is not None
                    assert version.tobytes() == newest[1].tobytes()
                if not goes_on_without_it and unacknowledged is None:
                    assert (newest and newest[0]) == (at_the_server and at_the_server[0])


def test_device_that_heard_where_the_run_is_and_was_not_heard_itself_builds_on_what_the_server_has(ends: Ends) -> None:
    for step in (1, 4, 6):
        ends.send(batch(step, [0]))
    ends.device.forget_after(2)  # the server does not know whether its Start arrived, and keeps all
    ends.server.forget_after(ends.device.newest - 1)  # the next Join
    for cache in (ends.device, ends.server):
        cache.forget_after(8)  # the next Start
    ends.send(batch(9, [1]))
    ends.server.forget_before(7)
    sent, _ = ends.send(batch(10, [0]))
    assert since(sent) == [1]


# What arrives is not believed


def refusal(message: Activations, cache: CacheFolder) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        arrived(message, cache)
    return str(caught.value)


def with_parts(sent: Activations, **parts: Any) -> Activations:
    names = ["since", "centre", "outliers", "outlier_values", "scales", "codes", "left", "right", "unit"]
    made: Any = sent.values
    changed = [parts.get(name, part) for name, part in zip(names, made.parts, strict=True)]
    return dataclasses.replace(sent, values=dataclasses.replace(made, parts=changed))


def steps(*numbers: int) -> bytes:
    return np.array(numbers, "<i4").view(np.uint8).reshape(-1, 4).T.tobytes()


def bfloat16(value: float) -> bytes:
    return to_bfloat16(np.array([value], np.float32)).tobytes()


@pytest.fixture
def second_visit(ends: Ends) -> Activations:
    ends.send(batch(1, [0, 1]))
    return coded(batch(2, [0, 1]), ends.device)


def test_change_since_a_step_that_is_not_kept_is_refused(ends: Ends, second_visit: Activations) -> None:
    assert refusal(with_parts(second_visit, since=steps(7, 1)), ends.server) == (
        "a change of sample 0 since step 7, which is not in the cache"
    )
    stranger = dataclasses.replace(second_visit, samples=np.array([0, 3], np.int32))
    assert refusal(stranger, ends.server) == "a change of sample 3 since step 1, which is not in the cache"
    nowhere = dataclasses.replace(second_visit, samples=None)
    assert refusal(nowhere, ends.server) == "a change of sample -1 since step 1, which is not in the cache"


def test_change_of_a_sample_of_another_length_is_refused(ends: Ends) -> None:
    ends.send(batch(1, [0, 1]))
    sent = coded(batch(2, [0, 1]), ends.device)
    swapped = dataclasses.replace(sent, samples=np.array([1, 0], np.int32))
    assert (
        refusal(swapped, ends.server)
        == f"a change of {LENGTHS[0]} rows of {WIDTH}; in the cache it has [{LENGTHS[1]}, {WIDTH}]"
    )


@pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf"), 2.0**31, 2.0**-61])
def test_unit_that_cannot_be_is_refused(ends: Ends, second_visit: Activations, unit: float) -> None:
    assert refusal(with_parts(second_visit, unit=bfloat16(unit)), ends.server) == (
        "the unit of delta is not a number from 2^-60 to 2^30"
    )


@pytest.mark.parametrize(
    "parts",
    [
        {"left": b"\x01"},
        {"right": b"\x01" * 7},
        {"unit": b""},
        {"left": b"\x01" * 14 * 30, "right": b"\x01" * WIDTH * 30},
        {"since": b"\x01"},
        {"codes": b"\x01"},
        {"since": steps(0, 1)},
        {"since": steps(-1, 1)},
    ],
)
def test_parts_of_other_sizes_are_refused(ends: Ends, second_visit: Activations, parts: dict[str, bytes]) -> None:
    before = ends.server.num_bytes
    assert refusal(with_parts(second_visit, **parts), ends.server)
    assert ends.server.num_bytes == before


def test_more_parts_are_refused(ends: Ends, second_visit: Activations) -> None:
    made: Any = second_visit.values
    more = dataclasses.replace(second_visit, values=dataclasses.replace(made, parts=[*made.parts, b""]))
    assert refusal(more, ends.server) == "delta has 10 parts, expected 9"


def test_more_than_may_be_kept_is_refused(tmp_path: Path) -> None:
    ends = Ends(CacheFolder(tmp_path / "device", 10**7), CacheFolder(tmp_path / "server", 100))
    sent = coded(batch(1, [0, 1]), ends.device)
    assert refusal(sent, ends.server).endswith("at most 100 are kept")


# In a conversation


@pytest.fixture(params=["server", "device"])
def talk(ends: Ends, request: pytest.FixtureRequest) -> Callable[[Side, Message], Message | None]:
    """What one side says, as the other hears it; wherever the labels are, of which these batches have none."""
    sessions = {side: Session(side, MAX_BYTES) for side in Side}
    sessions[Side.CLIENT].activation_cache, sessions[Side.SERVER].activation_cache = ends.device, ends.server

    def say(side: Side, message: Message) -> Message | None:
        return sessions[side.peer].receive(sessions[side].send(message))

    settings = dataclasses.replace(
        protocol_samples.SETTINGS, activation_codec=DELTA, gradient_codec="coarse", check_codec_every=3, cache_bytes=10**6
    )
    if request.param == "device":
        settings = dataclasses.replace(settings, labels="device", check_codec_every=0)
    say(Side.CLIENT, Hello(name="a", fingerprint="f", codecs=(*CODECS, DELTA), abilities=ABILITIES))
    say(Side.SERVER, Welcome(run="r", settings=settings, fingerprint="f"))
    say(Side.CLIENT, Join(num_samples=4, batch_size=2, longest=9))
    say(Side.SERVER, Start(step=0, total_steps=100, adapter={}))
    return say


def gradient(step: int, message: Activations, codec: str = "") -> ActivationGradient:
    return ActivationGradient(step=step, loss=1.0, labelled_tokens=1, values=message.values, codec=codec)


Talk = Callable[[Side, Message], Any]


def test_both_sides_confirm_with_the_answer_collect_with_the_adapter_and_go_back_with_a_start(talk: Talk, ends: Ends) -> None:
    for step in (1, 2, 3):
        message = batch(step, [0, 1])
        assert error(talk(Side.CLIENT, message), message) < 0.1
        assert ends.device.version(0, step) is ends.server.version(0, step) is None
        talk(Side.SERVER, gradient(step, message))
        assert ends.device.version(0, step) is not None
        assert ends.server.version(0, step) is not None
    talk(Side.CLIENT, batch(4, [0, 1]))
    talk(Side.SERVER, Start(step=2, total_steps=100, adapter={}))
    # Of step 3 the device may still ask the micro-batches that are not answered: what counts of it stays.
    assert [cache.latest(0, 99)[0] for cache in (ends.device, ends.server)] == [3, 3]  # type: ignore[index]
    talk(Side.CLIENT, batch(3, [0, 1]))
    talk(Side.SERVER, gradient(3, message))
    talk(Side.CLIENT, protocol_samples.SAMPLES["AdapterGradient"])
    talk(Side.SERVER, EdgeAdapter(step=3, tensors={}, checkpoint=3))
    assert ends.device.version(0, 1) is ends.server.version(0, 1) is None


def test_what_a_start_takes_back_the_server_keeps_until_it_knows_that_the_start_arrived(talk: Talk, ends: Ends) -> None:
    for step in (1, 2, 3):
        message = batch(step, [0, 1])
        talk(Side.CLIENT, message)
        talk(Side.SERVER, gradient(step, message))
    talk(Side.CLIENT, batch(4, [0, 1]))
    talk(Side.SERVER, Start(step=1, total_steps=100, adapter={}))
    assert ends.device.version(0, 3) is None
    assert ends.server.version(0, 3) is not None
    talk(Side.CLIENT, batch(2, [0, 1]))
    assert ends.server.version(0, 3) is None


@pytest.mark.parametrize("talk", ["device"], indirect=True)
def test_what_goes_back_and_forth_between_question_and_answer_leaves_the_versions(talk: Talk, ends: Ends) -> None:
    nothing = np.empty((0, WIDTH), np.float32)
    for step in (1, 2):
        message = batch(step, [0, 1])
        assert error(talk(Side.CLIENT, message), message) < 0.1
        talk(Side.SERVER, HiddenStates(step=step, values=nothing))
        talk(Side.CLIENT, HiddenGradient(step=step, seconds=Seconds(), summed_loss=0.0, labelled_tokens=0, values=nothing))
        assert ends.device.version(0, step) is ends.server.version(0, step) is None
        talk(Side.SERVER, gradient(step, message))
        assert ends.device.version(0, step) is not None
        assert ends.server.version(0, step) is not None


@pytest.mark.parametrize("talk", ["server"], indirect=True)
def test_steps_that_check_the_codec_come_nearly_exactly_as_well(talk: Talk) -> None:
    for step in (1, 2, 3, 4):
        message = batch(step, [0, 1])
        came = talk(Side.CLIENT, message)
        assert (came.exact is not None) == (step in (1, 4))
        if came.exact is not None:
            assert came.exact.tobytes() == Coded.of(message.values, "bfloat16").decode().tobytes()
        talk(Side.SERVER, gradient(step, message))


def test_run_that_goes_on_in_another_codec_does_so_with_the_next_step(talk: Talk) -> None:
    message = batch(1, [0, 1])
    talk(Side.CLIENT, message)
    talk(Side.SERVER, gradient(1, message, codec="bfloat16"))
    second = batch(2, [0, 1])
    came = talk(Side.CLIENT, second)
    assert came.values.tobytes() == Coded.of(second.values, "bfloat16").decode().tobytes()


def test_held_out_texts_come_in_bfloat16(talk: Talk) -> None:
    message = batch(1, [0, 1])
    fields = {name: getattr(message, name) for name in ("lengths", "label_counts", "labels", "values")}
    came = talk(Side.CLIENT, Evaluation(index=1, **fields))
    assert came.values.tobytes() == Coded.of(message.values, "bfloat16").decode().tobytes()


def test_delta_where_nothing_is_kept_is_refused(ends: Ends) -> None:
    client, server = Session(Side.CLIENT), Session(Side.SERVER)
    hello = client.send(Hello(name="a", fingerprint="f", codecs=(*CODECS, DELTA)))
    server.receive(hello)
    with pytest.raises(RemoteProtocolError, match="a tensor in delta, which was not agreed on"):
        server.receive(encode(coded(batch(1, [0]), ends.device)))


def test_only_values_come_in_delta(ends: Ends) -> None:
    message = batch(1, [0, 1])
    made = coded(message, ends.device).values
    fields = {name: getattr(message, name) for name in ("lengths", "label_counts", "labels")}
    for words in (dataclasses.replace(message, exact=made), Evaluation(index=1, values=made, **fields)):
        server = Session(Side.SERVER, MAX_BYTES)
        server.codecs, server.state, server.activation_cache = Codecs(DELTA), State.READY, ends.server
        with pytest.raises(RemoteProtocolError, match=f"{type(words).__name__} in delta, which this run does not use"):
            server.receive(encode(words))


def test_device_without_a_place_for_samples_says_so() -> None:
    client = Session(Side.CLIENT)
    client.codecs = Codecs(DELTA)
    client.state = State.READY
    with pytest.raises(LocalProtocolError, match="delta needs an activation cache"):
        client.send(batch(1, [0]))
