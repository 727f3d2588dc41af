"""Which of several processes this one is. It needs no torch: that is asked before anything is loaded."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["LEADER", "Place", "check_port"]

LEADER = 0
"""The rank that listens, decides and writes."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one process among all that compute a server's part together, as torchrun tells each by its environment."""

    rank: int
    """0, 1, ... of all processes."""
    num_ranks: int
    local_rank: int
    """0, 1, ... of those on this machine."""
    local_ranks: int
    """How many are on this machine."""
    port: int
    """Of the rendezvous: on the machine of rank 0 it is taken."""

    @property
    def leads(self) -> bool:
        return self.rank == LEADER

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Place | None":
        """
        This process'; None where it computes alone.

        Raises:
            ConfigError: the environment says that there are several, and not which of them this one is.
        """
        if environment.get("WORLD_SIZE", "") in ("", "1"):
            return None
        num_ranks, rank = _number("WORLD_SIZE", environment), _number("RANK", environment)
        local_rank = _number("LOCAL_RANK", environment, rank)
        local_ranks = _number("LOCAL_WORLD_SIZE", environment, num_ranks)
        if not (rank < num_ranks and local_rank < local_ranks <= num_ranks):
            raise ConfigError(
                f"RANK {rank} of WORLD_SIZE {num_ranks} and LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE {local_ranks} cannot "
                "be; torchrun sets all four"
            )
        if not environment.get("MASTER_ADDR"):
            raise ConfigError(f"WORLD_SIZE is {num_ranks}, and MASTER_ADDR is not set; {ALTERNATIVES}")
        return cls(
            rank=rank,
            num_ranks=num_ranks,
            local_rank=local_rank,
            local_ranks=local_ranks,
            port=_number("MASTER_PORT", environment),
        )


ALTERNATIVES = "start the server by torchrun, which sets all of these, or alone: without WORLD_SIZE"


def _number(name: str, environment: Mapping[str, str], default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text:
        raise ConfigError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, and {name} is not set; {ALTERNATIVES}")
    if not text.isdecimal() or len(text) > 9:
        raise ConfigError(f"{name} must be a whole number, got {text!r}; {ALTERNATIVES}")
    return int(text)


def check_port(place: Place, port: int) -> None:
    """
    Raises:
        ConfigError: the port on which devices are to be listened for is the rendezvous' own.
    """
    if port == place.port:
        raise ConfigError(
            f"port {port} is the one at which the ranks meet (MASTER_PORT): give the server another --port, or torchrun "
            "another --master-port"
        )
