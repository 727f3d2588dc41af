"""
A device without torch: its speed beside the engine with torch, its memory, its start. GPT-2 small's shape, cut after block 3,
batches of 8 E2E rows.

Speed: one process on two cores. The engines take turns, a batch each; a batch's forward and backward pass are timed.
Memory and start: `splitlora-edge train` against a server on the same machine, with the part in its cache and its data read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contestants
import numpy as np

from edge_client.generation import process_memory
from protocol import RunSettings
from storage import EDGE_WEIGHTS

BATCH_SIZE, CUT_LAYER, RANK = 8, 3, 8
TARGETS = {"c_attn": ("c_attn",), "all": ("c_attn", "c_proj", "c_fc")}
STEPS = 6
STARTS = 3
MOST_MEMORY = {"float32": "300 MB", "float16": "", "int8": "200 MB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], "speed", "memory", "start"], help="all, if none is named")
    parser.add_argument("--rounds", type=int, default=30, help="batches that each engine computes")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    options = parser.parse_args()
    contestants.keep_to(sorted(os.sched_getaffinity(0))[:2])
    measures: dict[str, Callable[[Path, argparse.Namespace], None]] = {"speed": speed, "memory": memory, "start": start}
    with tempfile.TemporaryDirectory() as scratch:
        (model := Path(scratch) / "model").mkdir()
        contestants.make_gpt2_small(model)
        for name, measure in measures.items():
            if not options.parts or name in options.parts:
                print(f"\n{name}\n")
                measure(model, options)


def speed(model: Path, options: argparse.Namespace) -> None:
    rows = []
    for targets in options.targets:
        for dropout in options.dropout:
            seconds = race(model, run_settings(TARGETS[targets], dropout), options.rounds)
            torch_median, torch_least = statistics.median(seconds["torch, float32"]), min(seconds["torch, float32"])
            for name, values in seconds.items():
                median, least = statistics.median(values), min(values)
                milliseconds = [f"{1e3 * value:.0f}" for value in (median, least)]
                ratios = [f"{median / torch_median:.2f}", f"{least / torch_least:.2f}"]
                rows.append([targets, dropout, name, *milliseconds, *ratios])
    header = ["LoRA on", "dropout", "engine, weights", "ms, median", "ms, least", "of torch's median", "of torch's least"]
    print(contestants.markdown(header, rows))


def race(model: Path, settings: RunSettings, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, by engine."""
    from device_parts import make_part

    from edge_client.onnx_engine import OnnxEngine
    from edge_client.part.device_part import DevicePart
    from edge_client.torch_engine import TorchEngine
    from split_model import PretrainedModel

    with tempfile.TemporaryDirectory() as scratch:
        engines: dict[str, Any] = {"torch, float32": TorchEngine(PretrainedModel(model), settings, "cpu", "float32")}
        for weights in EDGE_WEIGHTS:
            part = DevicePart(make_part(Path(scratch) / weights, model, settings, weights))
            engines[f"onnxruntime, {weights}"] = OnnxEngine(part, settings)
        source = np.random.default_rng(0)
        adapter = {
            name: source.normal(0, 0.02, matrix.shape).astype(np.float32)
            for name, matrix in engines["torch, float32"].adapter().items()
        }
        for engine in engines.values():
            engine.load_adapter(adapter)
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for number, batch in enumerate(batches(model, rounds + 1)):
            gradient = source.normal(0, 1e-3, (len(batch.tokens), 768)).astype(np.float32)
            for name, engine in engines.items():
                engine.begin_step()
                began = time.perf_counter()
                engine.forward(batch, number)
                engine.backward(gradient)
                if number:  # the first one makes room
                    seconds[name].append(time.perf_counter() - began)
    return seconds


def batches(folder: Path, count: int) -> Any:
    """Of E2E rows."""
    from edge_client.data import Sample, pack
    from storage import load_tokenizer

    tokenizer = load_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    samples = []
    for prompt, completion in contestants.e2e_rows("train", slice(0, BATCH_SIZE * count)):
        ids = tokenizer.encode(" " + completion.strip()).ids
        tokens = [*tokenizer.encode(prompt.strip()).ids, end, *ids, end]
        samples.append(Sample(np.array(tokens, np.int32), len(ids) + 1))
    return [pack(samples[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]) for index in range(count)]


def run_settings(targets: tuple[str, ...], dropout: float) -> RunSettings:
    from usual_settings import settings

    return settings(cut_layer=CUT_LAYER, lora_rank=RANK, lora_alpha=32.0, lora_targets=targets, lora_dropout=dropout)


def memory(model: Path, options: argparse.Namespace) -> None:
    rows = []
    for weights in EDGE_WEIGHTS:
        peak, _ = device(model, weights)
        rows.append([f"`splitlora-edge train`, onnxruntime, {weights}", f"{peak / 1e6:.0f} MB", MOST_MEMORY[weights]])
    peak, _ = device(model, "float32", flags=["--engine", "torch", "--model", str(model), "--dtype", "float32"])
    rows.append(["`splitlora-edge train`, torch, float32", f"{peak / 1e6:.0f} MB", ""])
    print(contestants.markdown(["peak of resident memory", "measured", "goal"], rows))
    print("\nWhere it goes, in MB: after each stage, and how much more than before.\n")
    stages = {weights: stages_of(model, weights) for weights in ("float32", "int8")}
    rows = []
    for stage in next(iter(stages.values())):
        row = [stage]
        for found in stages.values():
            before = [*found.values()][max(0, [*found].index(stage) - 1)] if stage != next(iter(found)) else 0
            row += [f"{found[stage] / 1e6:.0f}", f"{(found[stage] - before) / 1e6:+.0f}"]
        rows.append(row)
    print(contestants.markdown(["stage", *(cell for weights in stages for cell in (weights, "more"))], rows))


def start(model: Path, options: argparse.Namespace) -> None:
    found = {weights: [device(model, weights)[1] for _ in range(STARTS)] for weights in ("float32", "int8")}
    rows = [[weights, f"{statistics.median(seconds):.2f} s", f"{min(seconds):.2f} s"] for weights, seconds in found.items()]
    print(contestants.markdown(["start of the process to its first activations at the server", "median", "least"], rows))


def device(model: Path, weights: str, flags: list[str] | None = None) -> tuple[int, float]:
    """Bytes of memory and seconds of a device that has been in a run of this server before."""
    from gpu_server import GpuServer
    from gpu_server.federation import Action, Federation
    from protocol import Activations, Message

    peak, arrived = 0, list[float]()
    receive = Federation.receive

    def noting_receive(federation: Federation, name: str, message: Message, now: float) -> list[Action]:
        if isinstance(message, Activations):
            arrived.append(time.monotonic())
        return receive(federation, name, message, now)

    Federation.receive = noting_receive  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            data = contestants.write_rows(
                Path(scratch) / "rows.txt", contestants.e2e_rows("train", slice(0, BATCH_SIZE * STEPS))
            )
            settings = {"steps": STEPS, "lora_rank": RANK, "cut_layer": CUT_LAYER, "dtype": "float32", "micro_batches": 1}
            for run in ("first", "second"):
                server_options = {**settings, "model": str(model), "run_dir": f"{scratch}/{run}", "edge_weights": weights}
                with GpuServer(port=0, **server_options) as server:
                    arrived.clear()
                    command = [str(contestants.PROGRAMS / "splitlora-edge"), "train", "--server", server.url]
                    command += ["--data", str(data), "--state-dir", f"{scratch}/state", *(flags or [])]
                    began = time.monotonic()
                    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
                    for _ in server.train():
                        peak = process_memory("VmHWM", process.pid) or peak
                    process.wait()
    finally:
        Federation.receive = receive  # type: ignore[method-assign]
    if process.returncode:
        sys.exit(f"{command} failed")
    return peak, arrived[0] - began


STAGES = """
import json, resource, sys
sys.path[:0] = {paths!r}
from pathlib import Path

found = {{}}

def stage(name):
    text = Path("/proc/self/status").read_text()
    found[name] = 1024 * int(text.partition("VmHWM:")[2].split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on

stage("Python")
import numpy
stage("numpy")
import websockets.sync.client, msgpack
stage("websockets with TLS, msgpack")
import tokenizers, storage, protocol, edge_client.client
stage("tokenizers, our own modules")
import onnxruntime
stage("onnxruntime")
from edge_client.onnx_engine import OnnxEngine
from edge_client.part.device_part import DevicePart
part = DevicePart(Path({part!r}))
from edge_engine import batches, run_settings
data = batches(Path({part!r}), 12)
stage("reading data: the tokenizer, which then goes")
engine = OnnxEngine(part, run_settings(("c_attn",), 0.0))
stage("the graphs")
engine.infer(data[0])
stage("evaluation: the weights, and one block at a time")
for number, batch in enumerate(data):
    engine.begin_step()
    values = engine.forward(batch, number)
    stage(f"forward {{number}}")
    engine.backward(values)
    stage(f"backward {{number}}")
found["12 steps' forward passes: what backward needs"] = max(found.pop(f"forward {{n}}") for n in range(12))
found["12 steps' backward passes: intermediate values"] = max(found.pop(f"backward {{n}}") for n in range(12))
print(json.dumps(found))
"""


def stages_of(model: Path, weights: str) -> dict[str, int]:
    """Bytes of resident memory at most, by stage, in a process that does what a device does but talk."""
    from device_parts import make_part

    with tempfile.TemporaryDirectory() as scratch:
        part = make_part(Path(scratch) / "part", model, run_settings(("c_attn",), 0.0), weights)
        folder = contestants.REPOSITORY
        paths = [str(path) for path in (folder, folder / "tests", folder / "benchmarks")]
        program = STAGES.format(paths=paths, part=str(part))
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
