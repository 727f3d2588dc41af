"""How a server is. Loads no torch: the answer comes at once."""

import os
import time
from dataclasses import dataclass

from protocol import Ping, Pong

from .access import Access
from .enrolment import state_folder

__all__ = ["ServerStatus", "ping"]

SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class ServerStatus:
    """What `ping` finds."""

    seconds: float
    """One question and its answer."""
    pong: Pong


def ping(
    server: str, *, name: str | None = None, state_dir: str | os.PathLike[str] | None = None, within: float = SECONDS_TO_ANSWER
) -> ServerStatus:
    """
    Ask the server at an address how it is.

    Args:
        name: of this device there, where it is enrolled under several.
        state_dir: where its enrolments are.
        within: seconds to wait for the answer.

    Raises:
        ConnectionFailed: nobody answers, or not in time.
        RemoteProtocolError: somebody else answers.
        Refused, CertificateChanged, EnrolmentError: this device is not enrolled there, or not as it should be.
    """
    with Access.to(server, state_folder(state_dir), name).connect() as connection:
        asked = time.perf_counter()
        pong = connection.exchange(Ping(), Pong, within=within)
        return ServerStatus(time.perf_counter() - asked, pong)
