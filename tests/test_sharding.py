"""Ranks that keep a part of the frozen weights each compute to the bit what ranks compute that have all of them."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from family_models import make_family_model
from ranks import config_of, engine_of, ranks
from test_ranks import ONE_SEQUENCE, UNEQUAL, Devices, held_out, run
from torch.distributed.tensor import DTensor

from gpu_server.ranks.leader import RankedTrainer
from gpu_server.torch_engine import TorchEngine
from split_model import PretrainedModel, ServerPart

SHAPES = [UNEQUAL, ONE_SEQUENCE]


def part_of(engine: TorchEngine) -> ServerPart:
    """That of this process."""
    trainer = engine._trainer
    return (trainer._own if isinstance(trainer, RankedTrainer) else trainer)._part  # type: ignore[attr-defined, no-any-return]


def trained(folder: Path, *, shard: bool, **changes: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Everything that two ranks give out in a run, and the adapter that it ends with."""
    config = config_of(folder, micro_batches=len(SHAPES), **changes)
    with ranks(2, shard=shard) as several:
        engine = several.engine(config)
        on_devices = config.labels == "device"
        steps = Devices(folder).run(engine, SHAPES) if on_devices else run(engine, SHAPES)
        told: list[Any] = [
            (step.loss, {client: gradient.tobytes() for client, gradient in step.gradients.items()}) for step in steps
        ]
        told.append(engine.infer(held_out()).tobytes() if on_devices else engine.evaluate(held_out()))
        return told, engine.adapter()


@pytest.mark.parametrize("labels", ["server", "device"])
def test_sharding_changes_no_bit(tiny_model: Path, labels: str) -> None:
    (whole, adapter), (sharded, of_sharded) = (
        trained(tiny_model, shard=shard, labels=labels, lora_dropout=0.2) for shard in (False, True)
    )
    assert sharded == whole
    assert {name: matrix.numpy().tobytes() for name, matrix in of_sharded.items()} == {
        name: matrix.numpy().tobytes() for name, matrix in adapter.items()
    }


def test_sharding_changes_no_bit_of_a_model_with_rotary_positions(tmp_path: Path) -> None:
    make_family_model(tmp_path, "llama-biases")
    targets = PretrainedModel(tmp_path).config.lora_targets
    (whole, _), (sharded, _) = (trained(tmp_path, shard=shard, lora_targets=targets) for shard in (False, True))
    assert sharded == whole


@pytest.mark.parametrize("number", [2, 3])
def test_a_rank_keeps_its_part_of_the_rows_also_after_it_has_computed(tiny_model: Path, number: int) -> None:
    config = config_of(tiny_model)
    with ranks(number, shard=True) as several:
        engine = several.engine(config)
        for _ in run(engine, [UNEQUAL]):
            pass
        part = part_of(engine)
        frozen = [parameter for parameter in part.parameters() if not parameter.requires_grad]
        kept = [parameter.to_local() for parameter in frozen if isinstance(parameter, DTensor)]
        assert len(kept) == len(frozen)
        assert [len(rows) for rows in kept] == [-(-len(whole) // number) for whole in frozen]  # of rank 0, the largest
        assert not [buffer for buffer in part.buffers() if buffer.dim() == 2]
    whole = part_of(engine_of(config))
    matrices = [buffer for buffer in whole.buffers() if buffer.dim() == 2]
    assert sorted(matrix.shape for matrix in matrices) == sorted(parameter.shape for parameter in frozen)


def test_who_shards_nothing_needs_no_torch_that_can() -> None:
    check = "import sys, split_model, gpu_server.part_trainer; sys.exit('split_model.sharding' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


MEMORY = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from split_model.sharding import Sharding

def own_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

def large():
    return torch.ones(4 * 2**20)  # 16 MB

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
if sys.argv[1] == "shards":
    Sharding(dist.group.WORLD, torch.device("cpu"))
large()  # which has been freed: glibc takes such sizes from its heap from now on
before, kept = own_megabytes(), []
for _ in range(8):
    gathered = [large() for _ in range(2)]
    kept.append(torch.ones(2**17))  # 0.5 MB behind them
    del gathered
    kept.append(torch.ones(2**20))  # 4 MB in the gap
print(own_megabytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return what is freed as they like")
def test_where_weights_are_gathered_again_and_again_what_is_freed_is_returned() -> None:
    grown = {
        how: int(subprocess.run([sys.executable, "-c", MEMORY, how], check=True, cwd=REPOSITORY, capture_output=True).stdout)
        for how in ("shards", "does not")
    }
    assert grown["shards"] < 8 * 4.5 + 4 < grown["does not"]
