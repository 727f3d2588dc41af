"""`--edge-adapter none`: a sample crosses once, nothing stands for what is not there, what needs an adapter is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import protocol_samples
import pytest
import reference
from conftest import make_model, run_split
from test_parity import Federation, rows, write_pairs

from gpu_server import GpuServer
from gpu_server.config import ServerConfig
from gpu_server.errors import ConfigError
from protocol import Activations, RemoteProtocolError, Seconds, kept_since
from protocol.agreement import Agreement
from protocol.recall import note_sent, with_all_rows
from storage import AdapterError, CacheFolder

WIDTH, MAX_BYTES = 6, 2**20
LENGTHS = {0: 5, 1: 9, 2: 3}


def batch(step: int, numbers: list[int], device: CacheFolder | None = None, *, since: list[int] | None = None) -> Activations:
    """As a device with this cache asks it, or with ``since`` as it is given. A sample's rows are filled with its number."""
    samples = np.array(numbers, np.int32)
    steps = kept_since(samples, step, device) if device is not None else np.array(since, np.int32)
    assert steps is not None
    lengths = np.array([LENGTHS[max(0, number)] for number in numbers], np.int32)
    came = [whole(number) for number, kept in zip(numbers, steps.tolist(), strict=True) if not kept]
    return Activations(
        step=step,
        seconds=Seconds(),
        samples=samples,
        since=steps,
        lengths=lengths,
        label_counts=np.zeros_like(lengths),
        labels=np.empty(0, np.int32),
        values=np.concatenate([np.empty((0, WIDTH)), *came]),
    )


def whole(number: int) -> np.ndarray[Any, Any]:
    return np.full((LENGTHS[max(0, number)], WIDTH), float(number))


@dataclasses.dataclass
class Ends:
    device: CacheFolder
    server: CacheFolder

    def send(self, message: Activations) -> Activations:
        """As the server computes with it; it is answered, too."""
        note_sent(message, self.device)
        came = with_all_rows(message, self.server, MAX_BYTES)
        for cache in (self.device, self.server):
            cache.confirm(message.step, message.micro_batch)
        return came


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(CacheFolder(tmp_path / "device", 10**7), CacheFolder(tmp_path / "server", 10**7))


# What crosses


def test_sample_comes_once_and_then_as_its_number_among_others_that_are_new(ends: Ends) -> None:
    ends.send(batch(1, [1], ends.device))
    message = batch(2, [0, 1, 2], ends.device)
    assert message.since is not None
    assert message.since.tolist() == [0, 1, 0]
    assert len(message.values) == LENGTHS[0] + LENGTHS[2]
    came = ends.send(message)
    assert came.values.tobytes() == np.concatenate([whole(0), whole(1), whole(2)]).tobytes()
    assert came.since is None


def test_question_that_is_asked_again_has_the_same_rows_as_before(ends: Ends) -> None:
    """Also when its answer has made its samples count: a repeated step is told nothing else than the first time."""
    first = batch(3, [0, 2], ends.device)
    ends.send(first)
    again = batch(3, [0, 2], ends.device)
    assert again.values.tobytes() == first.values.tobytes()
    assert ends.send(again).values.tobytes() == first.values.tobytes()


def test_sample_that_is_not_numbered_comes_every_time(ends: Ends) -> None:
    ends.send(batch(1, [-1, 1], ends.device))
    message = batch(2, [-1, 1], ends.device)
    assert message.since is not None
    assert message.since.tolist() == [0, 1]


def test_device_keeps_no_rows(ends: Ends) -> None:
    ends.send(batch(1, [0, 1, 2], ends.device))
    assert ends.device.version(1, 1).shape == (0, WIDTH)  # type: ignore[union-attr]
    assert ends.server.version(1, 1).tobytes() == whole(1).tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (batch(5, [2], since=[1]), "sample 2 as in step 1, which is not in the cache"),
        (batch(5, [1], since=[4]), "sample 1 as in step 4, which is not in the cache"),
        (
            dataclasses.replace(batch(5, [1], since=[1]), lengths=np.array([4], np.int32)),
            "sample 1 of 4 rows of 6; .* has .9, 6",
        ),
        (batch(5, [1] * 3000, since=[1] * 3000), "stand for 27000 rows of 48 bytes, more than 1048576 together"),
    ],
    ids=["another sample", "another step", "another length", "too many"],
)
def test_server_refuses_what_stands_for_nothing_that_it_has(ends: Ends, message: Activations, reason: str) -> None:
    ends.send(batch(1, [1], ends.device))
    with pytest.raises(RemoteProtocolError, match=reason):
        with_all_rows(message, ends.server, MAX_BYTES)


@pytest.mark.parametrize("since", [[5], [-1], [0, 0]], ids=["not earlier", "negative", "too many"])
def test_step_since_which_a_sample_is_kept_is_an_earlier_one(since: list[int]) -> None:
    with pytest.raises(ValueError, match="step"):
        dataclasses.replace(batch(5, [1], since=[0]), since=np.array(since, np.int32))


def test_samples_may_not_be_left_out_where_the_edge_learns() -> None:
    agreed = Agreement()
    agreed.note(protocol_samples.SAMPLES["Welcome"])
    message = batch(5, [1], since=[1])
    replaced = dataclasses.replace(message, values=message.values.astype(np.float32))
    with pytest.raises(RemoteProtocolError, match="without rows of some samples, and in this run the edge adapter changes"):
        agreed.check(replaced)


# What is refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aggregate_every": 5}, "aggregate-every 5 does not go with edge-adapter none"),
        ({"adapter_codec": "dithered", "codec": "int8"}, "adapter-codec dithered does not go with edge-adapter none"),
        ({"codec": "delta"}, "delta does not go with edge-adapter none, .* take int8 or int4"),
        ({"check_codec_every": 5, "codec": "int8"}, "check-codec-every 5 does not go with edge-adapter none"),
        ({"edge_adapter": "some"}, "edge-adapter must be one of lora, none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_needs_an_edge_adapter_is_refused_by_name(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        ServerConfig.from_options({"model": "m", "run_dir": "r", "steps": 3, "edge_adapter": "none", **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("four-blocks"))


def test_adapter_to_start_from_adapts_the_blocks_that_the_run_does(base: Path, tmp_path: Path) -> None:
    of_all = reference.make_adapter(base, tmp_path / "all", targets=("c_attn",))
    of_some = reference.make_adapter(base, tmp_path / "some", targets=("c_attn",), blocks=(2, 3))
    run = {"model": str(base), "steps": 1, "lora_rank": 4, "lora_alpha": 8.0, "cut_layer": 2, "lora_targets": ("c_attn",)}
    for edge, start in (("none", of_all), ("lora", of_some)):
        options = {**run, "run_dir": str(tmp_path / edge), "init_adapter": str(start), "edge_adapter": edge}
        with pytest.raises(AdapterError, match=r"it adapts the blocks .*with --edge-adapter none the blocks before"):
            GpuServer(**options)


# What comes of it


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_peft_loads_the_adapter_and_loses_what_the_device_has_measured(base: Path, tmp_path: Path, codec: str) -> None:
    federation = Federation(tmp_path, [2, 3], 6)
    clients = federation.clients(eval_data=write_pairs(tmp_path / "held-out.jsonl", rows(4, offset=40)))
    server = {"model": str(base), "steps": 6, "cut_layer": 2, "edge_adapter": "none", "codec": codec, "lr": 5e-3}
    result = run_split({**server, "run_dir": str(tmp_path / "run")}, clients)
    adapter = tmp_path / "run" / "adapter"
    assert not [name for name in reference.read_adapter(adapter) if ".h.0." in name or ".h.1." in name]
    model = reference.load_peft(base, adapter)
    samples = reference.encode(rows(4, offset=40), base)
    before, after = result.perplexity["client-0"]
    assert after < before
    tolerance = 1e-4 if codec == "float32" else 1e-2  # held-out texts come in bfloat16 there
    assert reference.perplexity(model, samples) == pytest.approx(after, rel=tolerance)
