"""Ranks that are not alike would compute something else than one process, or nothing: they are compared before they begin."""

import os
import platform
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist

from storage import part_that_differs
from terminal import count, version

from ..errors import ConfigError
from ..options import flag_name
from .place import LEADER, Place

__all__ = [
    "agreed",
    "check_sharding",
    "chosen_backend",
    "differences",
    "introduction",
    "other_models",
    "own_device",
    "without_backend",
]

OF_EACH_RANK = {"model"}
"""Settings that need not be alike: a model may lie somewhere else on another machine, and is compared itself."""

Said = Mapping[str, Any]


def introduction(place: Place, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a rank says of itself.

    Args:
        options: as they were given to it.
    """
    return {
        "host": platform.node(),
        "versions": {"splitlora": version(), "torch": str(torch.__version__)},
        "options": {name: _shown(value) for name, value in options.items() if name not in OF_EACH_RANK},
        "local_ranks": place.local_ranks,
        "cuda_devices": torch.cuda.device_count(),
        "has_nccl": dist.is_nccl_available(),
        "threads": torch.get_num_threads(),
    }


def agreed(faults: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: there are any.
    """
    if faults:
        raise ConfigError(f"the ranks cannot compute together: {'; '.join(faults)}")


def differences(ranks: Mapping[int, Said]) -> list[str]:
    """What each has otherwise than the leader, with both values, by their introductions."""
    first, told = ranks[LEADER], []
    for rank, other in ranks.items():
        where = _where(rank, ranks)
        for name, version_here in first["versions"].items():
            if (there := other["versions"].get(name)) != version_here:
                told.append(f"{where} has {name} {there}, rank {LEADER} has {version_here}")
        for name in sorted(first["options"].keys() | other["options"].keys()):
            there, here = (_given(name, said["options"]) for said in (other, first))
            if there != here:
                told.append(f"{where} was given {there}, rank {LEADER} {here}")
    return told


def other_models(ranks: Mapping[int, Said]) -> list[str]:
    """
    Which have another model than the leader, or none.

    Args:
        ranks: what each says of its: "model", where it is, and "fingerprint"; or an "error".
    """
    first, told = ranks[LEADER], []
    for rank, other in ranks.items():
        if "error" in other:
            told.append(f"rank {rank}: {other['error']}")
        elif other["fingerprint"] != first["fingerprint"]:
            what = part_that_differs(other["fingerprint"], first["fingerprint"])
            told.append(
                f"rank {rank} has another {what}: the fingerprint of {other['model']} there is {other['fingerprint']}, that of "
                f"{first['model']} on rank {LEADER} is {first['fingerprint']}"
            )
    return told


def chosen_backend(device: str, ranks: Mapping[int, Said]) -> tuple[str, str]:
    """
    By which backend of torch.distributed gradients are added up, and what a user should know of it, if anything.

    Args:
        device: where all ranks compute: cpu or cuda.
        ranks: their introductions.

    Raises:
        ConfigError: not all can compute there, or this torch cannot connect them.
    """
    if device == "cpu":
        threads = sorted({said["threads"] for said in ranks.values()})
        whence = "as OMP_NUM_THREADS says" if "OMP_NUM_THREADS" in os.environ else "as torch chooses"
        return "gloo", f"each with {' or '.join(map(str, threads))} {'thread' if threads == [1] else 'threads'}, {whence}"
    without = [rank for rank, said in ranks.items() if not said["cuda_devices"]]
    agreed([f"{_where(rank, ranks)} has no CUDA device, rank {LEADER} has" for rank in without])
    sharing = next((said for said in ranks.values() if said["local_ranks"] > said["cuda_devices"]), None)
    if sharing is not None:
        devices = count(sharing["cuda_devices"], "CUDA device")
        return "gloo", f"{sharing['local_ranks']} share {devices} on {sharing['host']}, which is slower than one rank a device"
    agreed([f"{_where(rank, ranks)}: {without_backend('nccl')}" for rank, said in ranks.items() if not said["has_nccl"]])
    return "nccl", "each on a CUDA device of its own"


def check_sharding() -> None:
    """
    Raises:
        ConfigError: this torch, which is that of all ranks, cannot shard what is frozen and leave whole what is trained.
    """
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        can = False
    else:
        can = "ignored_params" in signature(fully_shard).parameters
    if not can:
        raise ConfigError(
            f"shard needs torch 2.7 or later, and this is {torch.__version__}; install a later one on every rank, or leave "
            "--shard out"
        )


def own_device(device: str, place: Place) -> torch.device:
    """
    Where a rank computes.

    Args:
        device: where all do: cpu or cuda.
    """
    if device == "cpu":
        return torch.device(device)
    mine = torch.device(device, place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(mine)
    return mine


def without_backend(name: str) -> str:
    """What is said where torch has no such backend."""
    return (
        f"this torch ({torch.__version__}) is built without {name}, by which ranks talk to each other; install one that has "
        "it, or start the server without torchrun"
    )


def _where(rank: int, ranks: Mapping[int, Said]) -> str:
    host = ranks[rank]["host"]
    return f"rank {rank}" if host == ranks[LEADER]["host"] else f"rank {rank} on {host}"


def _shown(value: Any) -> str:
    """Of a setting that nobody has checked yet: a file may hold what no rank can tell another, such as a date."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _given(name: str, options: Mapping[str, str]) -> str:
    return f"--{flag_name(name)} {options[name]}" if name in options else f"no --{flag_name(name)}"
