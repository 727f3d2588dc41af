"""What both sides count alike: a message's frames, and how much is kept of samples."""

from dataclasses import dataclass

import pytest

from protocol import MAX_FRAMES
from protocol.limits import CACHES_ON_DEVICE, CACHES_ON_SERVER, VERSIONS_OF_A_SAMPLE, limited_frames

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


@dataclass
class Frame:
    opcode: int
    fin: bool


class TooMany(Exception):
    pass


def test_message_comes_in_as_many_frames_as_are_allowed_and_no_more() -> None:
    received: list[Frame] = []
    receive = limited_frames(received.append, TooMany)
    for _ in range(2):  # the next message is counted anew
        receive(Frame(BINARY, fin=False))
        for _ in range(MAX_FRAMES - 2):
            receive(Frame(CONTINUATION, fin=False))
        receive(Frame(CONTINUATION, fin=True))
    assert len(received) == 2 * MAX_FRAMES
    receive(Frame(TEXT, fin=False))
    for _ in range(MAX_FRAMES - 2):
        receive(Frame(CONTINUATION, fin=False))
    with pytest.raises(TooMany, match="a message in more than 4096 frames"):
        receive(Frame(CONTINUATION, fin=False))
    assert len(received) == 3 * MAX_FRAMES - 1


def test_control_frames_are_counted_with_no_message() -> None:
    received: list[Frame] = []
    receive = limited_frames(received.append, TooMany)
    receive(Frame(BINARY, fin=False))
    for _ in range(MAX_FRAMES):
        for opcode in (PING, PONG, CLOSE):
            receive(Frame(opcode, fin=True))
    for _ in range(MAX_FRAMES - 2):
        receive(Frame(CONTINUATION, fin=False))
    with pytest.raises(TooMany):
        receive(Frame(CONTINUATION, fin=False))


def test_server_takes_more_of_a_sample_than_a_device_plans_with() -> None:
    assert (VERSIONS_OF_A_SAMPLE, CACHES_ON_DEVICE, CACHES_ON_SERVER) == (3, 6, 8)  # PROTOCOL.md, Changes
