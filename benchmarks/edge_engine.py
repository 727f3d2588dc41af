"""
A device's engine without torch: its speed beside the engine with torch, and where its memory goes. GPT-2 small's shape, or
that of SmolLM2-135M, cut after block 3, batches of 8 E2E rows. `device_weight.py` measures the whole program.

Speed: one process on two cores. The engines take turns, a batch each; a batch's forward and backward pass are timed.

Labels: the same where the labels are on the device, whose head computes the loss and its gradient between the two passes.
Counted is the time of the processor, that of both cores together, which other programs hardly lengthen. Memory is
what one process for each case has resident at most (VmHWM).
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

import harness
import numpy as np

from protocol import RunSettings
from storage import EDGE_WEIGHTS

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads wait at full speed, which counts as computing

BATCH_SIZE, CUT_LAYER, RANK = 8, 3, 8
USUAL, ALL = "usual", "all"
"""Which layers are adapted: PEFT's default for the family, or all linear layers of a block."""
MODELS: dict[str, Callable[[Path], Path]] = {"gpt2-small": harness.make_gpt2_small, "smollm2-135m": harness.make_smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], "speed", "memory", "labels"], help="all, if none is named")
    parser.add_argument("--rounds", type=int, default=30, help="batches that each engine computes")
    parser.add_argument("--model", choices=MODELS, default="gpt2-small", help="whose shape")
    parser.add_argument("--targets", nargs="+", choices=(USUAL, ALL), default=[USUAL, ALL])
    parser.add_argument("--cuts", nargs="+", type=int, default=[1, 3, 6], help="of the part about labels")
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    options = parser.parse_args()
    harness.keep_to(sorted(os.sched_getaffinity(0))[:2])
    measures: dict[str, Callable[[Path, argparse.Namespace], None]] = {"speed": speed, "memory": memory, "labels": labels}
    with tempfile.TemporaryDirectory() as scratch:
        (model := Path(scratch) / "model").mkdir()
        MODELS[options.model](model)
        for name, measure in measures.items():
            if not options.parts or name in options.parts:
                print(f"\n{name}\n")
                measure(model, options)


def speed(model: Path, options: argparse.Namespace) -> None:
    rows = []
    for targets in options.targets:
        for dropout in options.dropout:
            seconds = race(model, run_settings(targets_of(model, targets), dropout), options.rounds)
            torch_median, torch_least = statistics.median(seconds["torch, float32"]), min(seconds["torch, float32"])
            for name, values in seconds.items():
                median, least = statistics.median(values), min(values)
                milliseconds = [f"{1e3 * value:.0f}" for value in (median, least)]
                ratios = [f"{median / torch_median:.2f}", f"{least / torch_least:.2f}"]
                rows.append([targets, dropout, name, *milliseconds, *ratios])
    header = ["LoRA on", "dropout", "engine, weights", "ms, median", "ms, least", "of torch's median", "of torch's least"]
    print(harness.markdown(header, rows))


def race(model: Path, settings: RunSettings, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward, by engine."""
    from device_parts import make_part

    from edge_client.onnx_engine import OnnxEngine
    from edge_client.part.device_part import DevicePart
    from edge_client.torch_engine import TorchEngine
    from split_model import PretrainedModel

    with tempfile.TemporaryDirectory() as scratch:
        base = PretrainedModel(model)
        engines: dict[str, Any] = {"torch, float32": TorchEngine(base, settings, "cpu", "float32")}
        width = base.config.width
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
            gradient = source.normal(0, 1e-3, (len(batch.tokens), width)).astype(np.float32)
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
    for prompt, completion in harness.e2e_rows("train", slice(0, BATCH_SIZE * count)):
        ids = tokenizer.encode(" " + completion.strip()).ids
        tokens = [*tokenizer.encode(prompt.strip()).ids, end, *ids, end]
        samples.append(Sample(np.array(tokens, np.int32), len(ids) + 1))
    return [pack(samples[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]) for index in range(count)]


def targets_of(model: Path, which: str) -> tuple[str, ...]:
    from split_model import PretrainedModel

    config = PretrainedModel(model).config
    return config.family.usual_targets if which == USUAL else config.lora_targets


def run_settings(targets: tuple[str, ...], dropout: float, **more: Any) -> RunSettings:
    from usual_settings import settings

    lora = {"lora_rank": RANK, "lora_alpha": 32.0, "lora_targets": targets, "lora_dropout": dropout}
    return settings(**{"cut_layer": CUT_LAYER, **lora, **more})


def labels(model: Path, options: argparse.Namespace) -> None:
    """A step where the labels, and the head, are on the server, and where they are on the device."""
    rows = []
    for cut in options.cuts:
        for name, engine in [("torch, float32", "torch"), *((f"onnxruntime, {weights}", weights) for weights in EDGE_WEIGHTS)]:
            found = {where: labels_case(model, cut, engine, where, options.rounds) for where in ("server", "device")}
            passes, head = (1e3 * found["device"][key] for key in ("passes", "head"))
            peaks = [found[where]["peak"] / 1e6 for where in ("server", "device")]
            times = [f"{value:.0f}" for value in (passes, head, passes + head)]
            rows.append([cut, name, *times, f"{1 + head / passes:.1f}", *(f"{peak:.0f}" for peak in peaks)])
    header = ["cut", "engine, weights", "ms, labels on the server", "ms, head", "ms, on the device", "times"]
    print(harness.markdown([*header, "MB, on the server", "MB, on the device"], rows))


LABELS = """
import json, sys
sys.path[:0] = {paths!r}
from edge_engine import labels_process
print(json.dumps(labels_process({model!r}, {targets!r}, {cut}, {engine!r}, {where!r}, {rounds})))
"""


def labels_case(model: Path, cut: int, engine: str, where: str, rounds: int) -> dict[str, float]:
    """What `labels_process` finds in a process of its own."""
    paths = [str(path) for path in (harness.REPOSITORY / name for name in ("", "tests", "benchmarks"))]
    with tempfile.TemporaryDirectory() as scratch:
        targets = targets_of(model, USUAL)
        run, folder = run_settings(targets, 0.0, cut_layer=cut, labels=where), model
        if engine != "torch":
            from device_parts import make_part

            folder = make_part(Path(scratch) / "part", model, run, engine)
        given = {"model": str(folder), "targets": targets, "cut": cut, "engine": engine, "where": where, "rounds": rounds}
        program = LABELS.format(paths=paths, **given)
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def labels_process(folder: str, targets: tuple[str, ...], cut: int, engine: str, where: str, rounds: int) -> dict[str, float]:
    """Seconds of the processor for a batch's passes, and its head, each the median; bytes resident at most."""
    run = run_settings(targets, 0.0, cut_layer=cut, labels=where)
    computer: Any
    if engine == "torch":
        from edge_client.torch_engine import TorchEngine
        from split_model import PretrainedModel

        computer = TorchEngine(PretrainedModel(Path(folder)), run, "cpu", "float32")
    else:
        from edge_client.onnx_engine import OnnxEngine
        from edge_client.part.device_part import DevicePart

        computer = OnnxEngine(DevicePart(Path(folder)), run)
    seconds: dict[str, list[float]] = {"passes": [], "head": []}
    for number, batch in enumerate(batches(Path(folder), rounds + 1)):
        computer.begin_step()
        began = time.process_time()
        activations = computer.forward(batch, number)
        forward = time.process_time()
        if where == "device":
            computer.losses_and_gradient(activations[: len(batch.labels)], batch.labels)
        head = time.process_time()
        computer.backward(activations)
        if number:  # the first one makes room
            seconds["head"].append(head - forward)
            seconds["passes"].append(time.process_time() - began - (head - forward))
    peak = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return {"peak": peak, **{name: statistics.median(values) for name, values in seconds.items()}}


def memory(model: Path, _: argparse.Namespace) -> None:
    """Of resident memory: the most in each stage, and how much more than in the stage before."""
    stages = {weights: stages_of(model, weights) for weights in ("float32", "int8")}
    rows = []
    for number, stage in enumerate(stages["float32"]):
        row = [stage]
        for found in stages.values():
            values = [0, *found.values()]
            row += [f"{values[number + 1] / 1e6:.0f}", f"{(values[number + 1] - values[number]) / 1e6:+.0f}"]
        rows.append(row)
    print(harness.markdown(["stage", *(cell for weights in stages for cell in (f"MB, {weights}", "more"))], rows))


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
engine = OnnxEngine(part, run_settings({targets!r}, 0.0))
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
        targets = targets_of(model, USUAL)
        part = make_part(Path(scratch) / "part", model, run_settings(targets, 0.0), weights)
        folder = harness.REPOSITORY
        paths = [str(path) for path in (folder, folder / "tests", folder / "benchmarks")]
        program = STAGES.format(paths=paths, part=str(part), targets=targets)
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
