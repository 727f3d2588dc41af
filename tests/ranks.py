"""A server whose part several processes compute: this one leads, the others replay run after run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from ports import free_port

from gpu_server.config import ServerConfig
from gpu_server.part_trainer import make_trainer
from gpu_server.ranks.leader import Leader
from gpu_server.ranks.place import Place
from gpu_server.torch_engine import TorchEngine
from split_model import LoraConfig, PretrainedModel, adapter_shapes, initial_adapter

__all__ = ["Ranks", "config_of", "engine_of", "environments", "ranks"]

CPU = torch.device("cpu")
FOLLOWER = """
import os

from gpu_server.ranks import follower
from gpu_server.ranks.place import Place
from gpu_server.ranks.process_group import ProcessGroup


class Again(Exception):
    pass


def again(trainer):
    raise Again


follower.COMMANDS["again"] = again
group = ProcessGroup(Place.here(), lambda lost: os._exit(0 if lost is None else 1))
while True:
    try:
        follower._compute(group, follower._trainer(group, {}))
    except Again:
        pass
"""


def environments(num_ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each process."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [{**common, "RANK": str(rank)} for rank in range(num_ranks)]


def config_of(folder: Path, **changes: Any) -> ServerConfig:
    usual = {"cut_layer": 1, "lora_rank": 2, "lora_targets": ("c_attn", "c_fc"), "dtype": "float64", "micro_batches": 1}
    options = {"model": str(folder), "run_dir": "unused", "steps": 100, "lr": 1e-2, "port": 0, **usual, **changes}
    return ServerConfig.from_options(options).settled(str(options["dtype"]))


class Ranks:
    """
    Several, of which this process is the first. Every run is over when the next begins.

    Args:
        shard: whether each has only a part of the frozen weights.
    """

    def __init__(self, leader: Leader, *, shard: bool) -> None:
        self._leader, self._shard, self._is_first = leader, shard, True

    def engine(self, config: ServerConfig) -> TorchEngine:
        group = self._leader._group
        if not self._is_first:
            group.send({rank: {"command": "again"} for rank in group.partners})
            for rank in group.partners:
                group.receive(rank)  # its introduction
        self._is_first = False
        return engine_of(replace(config, shard=self._shard), self._leader)


def engine_of(config: ServerConfig, leader: Leader | None = None) -> TorchEngine:
    """With an adapter whose B is not zero, since A has no gradient where it is; on this process alone, unless it leads."""
    model, lora = PretrainedModel(Path(config.model)), LoraConfig(**config.settings().lora())
    generator = torch.Generator().manual_seed(7)
    initial = initial_adapter(model.config, lora, config.seed)
    adapter = {name: torch.randn(matrix.shape, generator=generator) / 10 for name, matrix in initial.items()}
    if leader is not None:
        leader.prepare(config, CPU)
    trainer = (make_trainer if leader is None else leader.trainer)(config, model, adapter, CPU)
    edge = adapter_shapes(model.config, lora, range(config.cut_layer))
    return TorchEngine(trainer, config.settings(), {name: adapter[name] for name in edge})


@contextmanager
def ranks(number: int, *, shard: bool = False) -> Iterator[Ranks]:
    mine, *others = environments(number)
    with ExitStack() as started, pytest.MonkeyPatch.context() as patch:
        for environment in others:
            program = [sys.executable, "-c", FOLLOWER]
            process = started.enter_context(subprocess.Popen(program, env={**os.environ, **environment}, cwd=REPOSITORY))
            started.callback(process.kill)
        for name, value in mine.items():
            patch.setenv(name, value)
        place = Place.here()
        assert place is not None
        leader = Leader(place, {})
        started.callback(leader.close)
        yield Ranks(leader, shard=shard)
