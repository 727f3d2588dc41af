"""How ranks know their place, what they tell each other, and what they say when they are not alike."""

import re
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.fsdp
from ranks import config_of, ranks
from test_ranks import UNEQUAL, batches

from gpu_server import ConfigError, GpuServer, cli
from gpu_server.ranks.agreement import check_sharding, chosen_backend, differences, introduction
from gpu_server.ranks.packing import NotAMessage, pack, unpack
from gpu_server.ranks.place import Place
from gpu_server.ranks.process_group import MESSAGES, ProcessGroup

TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {**TORCHRUN, "WORLD_SIZE": "1"}])
def test_process_without_others_computes_alone(environment: dict[str, str]) -> None:
    assert Place.here(environment) is None


def test_torchrun_says_which_rank_a_process_is() -> None:
    place = Place.here(TORCHRUN)
    assert place == Place(rank=3, num_ranks=4, local_rank=1, local_ranks=2, port=29500)
    assert not place.leads


def test_processes_that_something_else_has_started_are_on_one_machine() -> None:
    place = Place.here({name: text for name, text in TORCHRUN.items() if not name.startswith("LOCAL")})
    assert place == Place(rank=3, num_ranks=4, local_rank=3, local_ranks=4, port=29500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": ""}, "WORLD_SIZE is 4, and RANK is not set; start the server by torchrun, "),
        ({"MASTER_PORT": ""}, "WORLD_SIZE is 4, and MASTER_PORT is not set; "),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 4, and MASTER_ADDR is not set; "),
        ({"RANK": "4"}, "RANK 4 of WORLD_SIZE 4 and LOCAL_RANK 1 of LOCAL_WORLD_SIZE 2 cannot be; "),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number, got '-1'; "),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'; "),
        ({"WORLD_SIZE": "0"}, "RANK 3 of WORLD_SIZE 0 "),
    ],
)
def test_environment_that_cannot_be_is_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Place.here({**TORCHRUN, **changes})
    assert str(refused.value).startswith(message)


def test_only_the_first_rank_makes_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in TORCHRUN.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match="this process is rank 3 of 4: only rank 0 makes a GpuServer"):
        GpuServer(model="none", run_dir="none", steps=1)


def test_one_rank_has_nobody_to_share_the_model_with(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="shard divides the model over several ranks, and there is one: start them by torchrun "
    ):
        GpuServer(model=str(tiny_model), run_dir=str(tmp_path), steps=1, shard=True)


def test_torch_that_cannot_shard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding()
    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", lambda module, *, mesh: module)  # as it once was
    with pytest.raises(ConfigError, match=rf"shard needs torch 2\.7 or later, and this is {re.escape(torch.__version__)}; "):
        check_sharding()
    monkeypatch.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(ConfigError, match=r"shard needs torch 2\.7 or later"):
        check_sharding()


def test_sweep_starts_its_servers_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {**TORCHRUN, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, text)
    assert cli.main(["sweep", "none.toml"]) == 1
    assert "start it without torchrun" in capsys.readouterr().err
    monkeypatch.setattr(cli, "SECONDS_FOR_THE_FIRST_TO_SPEAK", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "none.toml"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == ""


def test_backend_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    place = Place.here(TORCHRUN)
    assert place is not None
    with pytest.raises(ConfigError, match=r"this torch \(.*\) is built without gloo, by which ranks talk to each other; "):
        ProcessGroup(place, lambda lost: None)


def said(**changes: Any) -> dict[str, Any]:
    """An introduction."""
    versions = {"splitlora": "1.0", "torch": "2.9"}
    devices = {"local_ranks": 2, "cuda_devices": 2, "has_nccl": True, "threads": 1}
    return {"host": "here", "versions": versions, "options": {"lr": "0.1"}, **devices, **changes}


def test_ranks_that_are_alike_differ_in_nothing() -> None:
    assert differences({0: said(), 1: said(host="there", cuda_devices=8)}) == []


def test_every_difference_is_named_with_both_values_and_its_rank() -> None:
    others = {
        1: said(versions={"splitlora": "1.1", "torch": "2.8"}),
        2: said(host="there", options={"lr": "0.2", "lora_targets": "c_attn,c_fc"}),
        3: said(options={}),
    }
    assert differences({0: said(), **others}) == [
        "rank 1 has splitlora 1.1, rank 0 has 1.0",
        "rank 1 has torch 2.8, rank 0 has 2.9",
        "rank 2 on there was given --lora-targets c_attn,c_fc, rank 0 no --lora-targets",
        "rank 2 on there was given --lr 0.2, rank 0 --lr 0.1",
        "rank 3 was given no --lr, rank 0 --lr 0.1",
    ]


def test_settings_that_nobody_has_checked_yet_are_compared_whatever_they_are() -> None:
    place = Place.here(TORCHRUN)
    assert place is not None
    odd = {"lr": date(1979, 5, 27), "lora_targets": [1, 2], "seed": 2**70, "codec": {"name": "int8"}}
    mine, theirs = (unpack(pack(introduction(place, options))) for options in ({}, odd))
    assert [told.partition(" was given ")[2] for told in differences({0: mine, 1: theirs})] == [
        "--codec {'name': 'int8'}, rank 0 no --codec",
        "--lora-targets 1,2, rank 0 no --lora-targets",
        "--lr 1979-05-27, rank 0 no --lr",
        f"--seed {2**70}, rank 0 no --seed",
    ]


def test_gradients_are_added_up_where_the_parts_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = {0: said(), 1: said()}
    assert chosen_backend("cpu", ranks) == ("gloo", "each with 1 thread, as OMP_NUM_THREADS says")
    assert chosen_backend("cuda", ranks) == ("nccl", "each on a CUDA device of its own")
    shared = {rank: said(cuda_devices=1, has_nccl=False) for rank in (0, 1)}
    assert chosen_backend("cuda", shared) == ("gloo", "2 share 1 CUDA device on here, which is slower than one rank a device")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (said(cuda_devices=0), "the ranks cannot compute together: rank 1 has no CUDA device, rank 0 has"),
        (said(has_nccl=False), r"the ranks cannot compute together: rank 1: this torch \(.*\) is built without nccl, by which"),
    ],
)
def test_rank_that_cannot_compute_where_the_others_do_is_named(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_backend("cuda", {0: said(), 1: other})


MESSAGE: dict[str, Any] = {
    "command": "train",
    "seeds": {"a": [0, 2**64 - 1]},
    "nothing": None,
    "batches": {
        "a": {"values": np.arange(12.0).reshape(3, 4).T, "lengths": np.array([1, 2], np.int32)},
        "b": {"values": np.zeros((0, 7), np.float32), "step": np.array(3.0, np.float32)},
    },
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def test_message_comes_out_as_it_went_in() -> None:
    unpacked = unpack(pack(MESSAGE))
    assert same(MESSAGE, unpacked)
    values = unpacked["batches"]["a"]["values"]
    assert (values.flags.aligned, values.flags.writeable, values.flags.c_contiguous) == (True, True, True)


@pytest.mark.parametrize("thing", [object(), {1, 2}, np.array(["text"]), np.array([None])])
def test_nothing_but_plain_values_is_told(thing: Any) -> None:
    with pytest.raises(TypeError, match="cannot be told to another rank"):
        pack({"thing": thing})


def test_whatever_the_bytes_are_they_become_plain_values_or_an_error() -> None:
    packed, rng = pack(MESSAGE), np.random.default_rng(0)
    for _ in range(3000):
        spoilt = packed.copy()
        for position in rng.integers(0, 256, rng.integers(1, 4)):
            spoilt[position] = rng.integers(0, 256)
        cut = rng.integers(0, len(spoilt) + 1) if rng.random() < 0.3 else len(spoilt)
        try:
            unpack(spoilt[:cut])
        except NotAMessage:
            continue


def test_ranks_have_what_was_sent_to_them_though_the_first_fails_meanwhile(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    isend = torch.distributed.isend

    def keep(*arguments: Any, **more: Any) -> Any:
        sent.append((isend(*arguments, **more), more["tag"]))
        return sent[-1][0]

    def fail(**_: object) -> None:
        monkeypatch.setattr(torch.distributed, "isend", isend)
        raise MemoryError

    with ranks(2) as several:
        engine = several.engine(config_of(tiny_model))
        engine._trainer._own.train = fail  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.distributed, "isend", keep)
        with pytest.raises(MemoryError):
            engine.train(1, 1, 0, batches(UNEQUAL, 1, 0))
        messages = [work for work, tag in sent if tag == MESSAGES]
        assert len(messages) == 1
        assert messages[0].is_completed()  # it was waited for
