"""How a server is. Loads no torch: the answer comes at once."""

import time
from dataclasses import dataclass

from protocol import Ping, Pong

from .connection import Connection

__all__ = ["ServerStatus", "ping"]


@dataclass(frozen=True)
class ServerStatus:
    """What `ping` finds."""

    seconds: float
    """One question and its answer."""
    pong: Pong


def ping(server: str) -> ServerStatus:
    """
    Ask the server at an address how it is.

    Raises:
        ConnectionFailed: nobody answers.
        RemoteProtocolError: somebody else answers.
    """
    with Connection(server) as connection:
        asked = time.perf_counter()
        pong = connection.exchange(Ping(), Pong)
        return ServerStatus(time.perf_counter() - asked, pong)
