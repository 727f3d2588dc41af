"""Asks a server how its run is doing. Loads no torch, so that the answer comes at once."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from protocol import Ping, Pong
from protocol.invitation import Invitation
from storage import ModelError, is_hub_name

from .access import Access
from .client_state import ClientState
from .connection import ConnectionFailed
from .enrolment import state_folder

__all__ = ["ServerStatus", "model_of_server", "ping"]

SECONDS_TO_ANSWER = 10.0


@dataclass(frozen=True)
class ServerStatus:
    """What `ping` returns."""

    seconds: float
    """Between the question and its answer."""
    pong: Pong


def ping(
    server: str, *, name: str | None = None, state_dir: str | os.PathLike[str] | None = None, within: float = SECONDS_TO_ANSWER
) -> ServerStatus:
    """
    Ask the server at an address how its run is doing.

    Args:
        name: of this device there, if it is enrolled under several names.
        state_dir: where its enrolments are; None is the user's folder for state.
        within: seconds to wait for the answer.

    Raises:
        ConnectionFailed: nobody answers, or not in time.
        RemoteProtocolError: what answers is no such server.
        Refused, CertificateChanged, EnrolmentError: this device is not enrolled there, or the server is not the one it knows.
    """
    with Access.to(server, state_folder(state_dir), name).connect() as connection:
        asked = time.perf_counter()
        pong = connection.exchange(Ping(), Pong, within=within)
        return ServerStatus(time.perf_counter() - asked, pong)


def model_of_server(invitation: Invitation, state_folder: Path) -> str:
    """
    The name on the hub of the base model that the server has. While the server is down: of the model with which this device
    took part in its run before.

    Raises:
        ModelError: the server has its model from a folder, or names none that could be on the hub.
        ConnectionFailed, RemoteProtocolError, Refused, CertificateChanged, EnrolmentError: as `ping`.
    """
    try:
        model = ping(invitation.url, name=invitation.name, state_dir=state_folder).pong.model
    except ConnectionFailed:
        known = ClientState(state_folder, invitation.url, invitation.name).model()
        if known is None:
            raise
        return known
    if not model:
        raise ModelError("the server has its base model from a folder: give --model with a copy of it")
    if not is_hub_name(model):
        raise ModelError(f"the server names the model {model[:80]!a}, which is not a name on the hub; give --model")
    return model
