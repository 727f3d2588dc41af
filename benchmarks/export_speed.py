"""
How fast an exported model is on a CPU, beside what else people use. GPT-2 small's shape with random weights, a prompt of 256
tokens, 64 new ones, two threads, a batch of one.

Every contestant is a process of its own; they take turns, round by round, and their medians are compared. How much of the
processors went to other programs meanwhile is measured, too: threads that wait for each other suffer from it more than in
proportion. A process that was disturbed is run again, up to `--tries` times.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
from export_contestants import NEW_TOKENS, PROMPT_TOKENS

from edge_client.generation import open_exported, prepare
from terminal import Progress

HERE = Path(__file__).parent
OTHER_PYTHON = harness.REPOSITORY / ".venv-runtimes/bin/python"
HARDLY = 0.03
"""The share of the processors that others may have."""
KEY_VALUE_ELEMENTS = 2 * 12 * 768 * (PROMPT_TOKENS + NEW_TOKENS // 2)
"""Of the mean sequence while it is decoded."""


@dataclass(frozen=True)
class Contestant:
    title: str
    name: str
    """In `export_contestants.py`."""
    path: str
    weights: str
    """The file that a token's decoding reads once; position embeddings excepted."""
    python: Path = Path(sys.executable)
    cache_bytes: int = 4
    """Of an element of the keys and values."""


CONTESTANTS = [
    Contestant("ours, q8", "q8", "exported", "exported/onnx/model_quantized.onnx_data"),
    Contestant("ours, q8, prepared", "q8 prepared", "exported", "exported/onnx/model_quantized.onnx_data"),
    Contestant("ours, q4", "q4", "exported", "exported/onnx/model_q4.onnx_data"),
    Contestant("ours, q4, prepared", "q4 prepared", "exported", "exported/onnx/model_q4.onnx_data"),
    Contestant("ours, fp32", "fp32", "exported", "exported/onnx/model.onnx_data"),
    Contestant("transformers, KV cache", "transformers", "exported", "exported/model.safetensors"),
    Contestant("optimum's export", "foreign", "optimum/model.onnx", "optimum/model.onnx"),
    Contestant("quantize_dynamic on it", "foreign", "optimum/dynamic.onnx", "optimum/dynamic.onnx"),
    Contestant("CTranslate2 int8", "ctranslate2", "ctranslate2", "ctranslate2/model.bin", OTHER_PYTHON),
    Contestant("llama.cpp Q8_0", "llama.cpp", "gpt2-Q8_0.gguf", "gpt2-Q8_0.gguf", OTHER_PYTHON, 2),
    Contestant("llama.cpp Q4_0", "llama.cpp", "gpt2-Q4_0.gguf", "gpt2-Q4_0.gguf", OTHER_PYTHON, 2),
]
Figures = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep what is raced here, and find it there the next time")
    options = parser.parse_args()
    if not OTHER_PYTHON.exists():
        sys.exit(f"{OTHER_PYTHON} is missing; `make bench-export` makes it")
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models or Path(scratch)
        make_models(models)
        rounds: list[Figures] = []
        with Progress(options.rounds * (len(CONTESTANTS) + 1), unit="process") as progress:
            for _ in range(options.rounds):
                rounds.append(race(models, options.tries, progress))
        report(models, medians(rounds))


def make_models(folder: Path) -> None:
    """The same random weights in everybody's format."""
    steps: dict[str, Callable[[Path], None]] = {
        "base": make_base,
        "exported": make_exported,
        "optimum/model.onnx": make_optimum,
        "optimum/dynamic.onnx": make_dynamic,
        "ctranslate2": make_ctranslate2,
        "gpt2-Q4_0.gguf": make_gguf,
    }
    with Progress(len(steps), unit="format") as progress:
        for name, make in steps.items():
            if not (folder / name).exists():
                make(folder)
            progress.advance(name)


def make_base(folder: Path) -> None:
    (folder / "base").mkdir(parents=True)
    harness.make_gpt2_small(folder / "base")


def make_exported(folder: Path) -> None:
    from export import export_onnx

    export_onnx(str(folder / "base"), folder / "exported", precisions=("fp32", "q8", "q4"))
    list(prepare(open_exported(folder / "exported")))


def make_optimum(folder: Path) -> None:
    task = ["--task", "text-generation-with-past", "--library", "transformers"]
    model = ["--model", folder / "exported"]
    subprocess.run(
        [OTHER_PYTHON, "-m", "optimum.commands.optimum_cli", "export", "onnx", *model, *task, folder / "optimum"], check=True
    )


def make_dynamic(folder: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(folder / "optimum/model.onnx", folder / "optimum/dynamic.onnx")


def make_ctranslate2(folder: Path) -> None:
    script = (
        "import sys; from ctranslate2.converters import TransformersConverter;"
        "TransformersConverter(sys.argv[1]).convert(sys.argv[2], quantization='int8')"
    )
    subprocess.run([OTHER_PYTHON, "-c", script, folder / "exported", folder / "ctranslate2"], check=True)


def make_gguf(folder: Path) -> None:
    command = [OTHER_PYTHON, HERE / "gguf_of_gpt2.py", folder / "exported", folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def race(models: Path, tries: int, progress: Progress) -> Figures:
    """One round: everybody once."""
    figures = {}
    for contestant in CONTESTANTS:
        figures[contestant.title] = run(contestant.python, contestant.name, models / contestant.path, tries)
        progress.advance(f"{contestant.title}: {figures[contestant.title]['decode']:.0f} tokens/s")
    figures["bandwidth"] = run(Path(sys.executable), "bandwidth", models, tries)
    progress.advance(f"memory: {figures['bandwidth']['bytes_per_second'] / 1e9:.0f} GB/s")
    return figures


def run(python: Path, name: str, path: Path, tries: int) -> dict[str, float]:
    """Of the first process that was hardly disturbed, or else of the least disturbed one."""
    found: list[dict[str, float]] = []
    while not found or (found[-1]["disturbance"] > HARDLY and len(found) < tries):
        found.append(run_once(python, name, path))
    return min(found, key=lambda figures: figures["disturbance"])


def run_once(python: Path, name: str, path: Path) -> dict[str, float]:
    command = [python, HERE / "export_contestants.py", name, path]
    began, busy, own = time.monotonic(), busy_seconds(), children_seconds()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, busy, own = time.monotonic() - began, busy_seconds() - busy, children_seconds() - own
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures | {"disturbance": max(0.0, busy - own) / seconds / (os.cpu_count() or 1)}


def busy_seconds() -> float:
    """What all processors together have worked since the start, for whomever."""
    user, nice, system, _idle, _wait, interrupts, soft, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def medians(rounds: list[Figures]) -> Figures:
    return {
        title: {key: statistics.median(figures[title][key] for figures in rounds) for key in rounds[0][title]}
        for title in rounds[0]
    }


def report(models: Path, figures: Figures) -> None:
    bandwidth = figures["bandwidth"]["bytes_per_second"]
    slowest = figures["transformers, KV cache"]["decode"]
    rows = []
    for contestant in CONTESTANTS:
        found = figures[contestant.title]
        weights = (models / contestant.weights).stat().st_size
        read = (weights + KEY_VALUE_ELEMENTS * contestant.cache_bytes) * found["decode"]
        rows.append(
            [
                contestant.title,
                f"{weights / 1e6:.0f}",
                f"{found['prefill']:.0f}",
                f"{found['decode']:.0f}",
                f"{found['decode'] / slowest:.1f} x",
                f"{read / 1e9:.0f} ({read / bandwidth:.0%})",
                f"{found['load_seconds']:.2f}",
                f"{found['load_anonymous'] / 1e6:.0f}",
                f"{found['peak'] / 1e6:.0f}",
                f"{found['disturbance']:.0%}",
            ]
        )
    header = ["", "MB", "prompt, tokens/s", "decoding, tokens/s", "times transformers", "GB/s read"]
    print(harness.markdown([*header, "load, s", "anonymous MB by loading", "peak MB", "others' processor time"], rows))
    print(f"\nTwo threads read {bandwidth / 1e9:.0f} GB/s from this machine's memory.\n")
    print(harness.markdown(["", "measured", "goal", ""], list(goals(figures))))


def goals(figures: Figures) -> list[list[str]]:
    def ratio(what: str, ours: str, theirs: str, goal: float) -> list[str]:
        measured = figures[ours][what] / figures[theirs][what]
        verb = "decoding" if what == "decode" else "prompt"
        return [f"{verb}, {ours} to {theirs}", f"{measured:.2f}", f"{goal:.2f}", "reached" if measured >= goal else "missed"]

    anonymous = figures["ours, q8, prepared"]["load_anonymous"] / 1e6
    reached = "reached" if anonymous < 40 else "missed"
    return [
        ratio("decode", "ours, q8", "llama.cpp Q8_0", 1.2),
        ratio("decode", "ours, q8", "CTranslate2 int8", 2.5),
        ratio("decode", "ours, q4", "llama.cpp Q4_0", 1.1),
        ratio("prefill", "ours, q8", "CTranslate2 int8", 0.75),
        ["anonymous MB that loading q8 takes, prepared", f"{anonymous:.0f}", "40", reached],
    ]


if __name__ == "__main__":
    main()
