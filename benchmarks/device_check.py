"""
What there is to check on a machine with a CUDA device, in at most eight minutes.

    make device-check PYTHON=/opt/torch/bin/python3                       # one whose torch finds the card
    python benchmarks/device_check.py --output device-check.json          # the same, where all packages are there already
    python benchmarks/device_check.py --table device-check.json           # the file as tables, in markdown
    python benchmarks/device_check.py --device cpu --output dry-run.json  # the same code without a card, on tiny shapes

Its parts are processes of their own, each with its time; one that fails, crashes or takes too long does not stop the others:

    tests   the tests marked `cuda`: both parts and the server's engine on the card against the CPU
    runs    whole runs over loopback, devices on the CPU and the server on the card, against a server on the CPU
    ranks   a run on two ranks that share the card, against one on one
    steps   training steps of GPT2-S, -M and -XL shapes against transformers + PEFT; see device_steps.py

What a part does not need of its time, the next ones may take. The check ends with status 1 if a part failed or took too long.
Runs are of a tiny model, and of gpt2-mini where the evaluation data is in a folder `shared` beside the checkout.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import harness
from answering import wait_until_it_answers
from ports import free_port

PASSED, FAILED, SKIPPED, TOO_SLOW = "passed", "failed", "skipped", "took too long"

LOSS_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far a run's losses may be from those of a server that computes in float32 on the CPU, relative."""
STEPS, BATCH_SIZE, ROWS_OF_A_DEVICE = 10, 4, 24
DEVICES = ("a", "b")
FREE_BYTES_FOR_TWO_RANKS = 4 * 2**30
"""Each has a CUDA context, which takes half a gigabyte, beside a small model."""

SECONDS_TO_END = 10.0
"""For what a part has started, when it has taken too long."""
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class Skipped(Exception):
    """Why a part has nothing to check here."""


class Failed(Exception):
    """What was found wrong."""


class Part:
    """
    One part of the check while it runs, in its own process.

    Args:
        device: "cuda", or "cpu" in a dry run.
        seconds: that it may take.
        file: where its findings are noted as they come, so that they outlive it.
    """

    def __init__(self, device: str, seconds: float, file: Path, scratch: Path) -> None:
        self.device, self.scratch = device, scratch
        self._ends, self._file, self._figures = time.monotonic() + seconds, file, dict[str, Any]()

    @property
    def seconds_left(self) -> float:
        """Imports take some."""
        return self._ends - time.monotonic()

    def note(self, **figures: Any) -> None:
        self._figures.update(figures)
        self._write(FAILED, "")  # whoever is asked later knows better

    def run(self, check: Callable[["Part"], str]) -> None:
        """Note the verdict of a check, which says in a few words what it has found."""
        self.note()
        try:
            self._write(PASSED, check(self))
        except Skipped as reason:
            self._write(SKIPPED, str(reason))
        except (Failed, SystemExit) as error:  # by which benchmarks end that cannot go on
            self._write(FAILED, str(error))
        except Exception as error:
            traceback.print_exc()
            self._write(FAILED, f"{type(error).__name__}: {error}".partition("\n")[0])

    def _write(self, verdict: str, found: str) -> None:
        unfinished = self._file.with_suffix(".part")
        unfinished.write_text(json.dumps({"verdict": verdict, "found": found, "figures": self._figures}))
        unfinished.replace(self._file)


def run_tests(part: Part) -> str:
    """All tests with the mark, whatever file they are in."""
    tests = harness.REPOSITORY / "tests"
    files = [str(path) for path in sorted(tests.glob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    report = part.scratch / "report.xml"
    # What a newer torch warns of says nothing about the card.
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "-o", "filterwarnings=", f"--junitxml={report}"]
    if part.device == "cpu":
        options += ["-k", "not test_run"]  # whole runs, as in the next part
    environment = {**os.environ, "SPLITLORA_CARD": part.device}
    subprocess.run([sys.executable, "-m", "pytest", *options, *files], cwd=harness.REPOSITORY, env=environment, check=False)
    if not report.exists():
        raise Failed("pytest ended without a report; what it printed says why")
    cases = list(ElementTree.parse(report).iter("testcase"))
    broken = {
        case.get("name", ""): (problem.get("message") or problem.text or "").strip().partition("\n")[0]
        for case in cases
        for problem in (*case.iter("failure"), *case.iter("error"))
    }
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(broken) - len(skipped)
    part.note(passed=passed, skipped=len(skipped), failed=broken)
    if broken:
        raise Failed(f"{len(broken)} of {len(cases)} tests failed: {', '.join(broken)}")
    if not passed:
        raise Failed("no test was run")
    return f"{passed} tests passed" + (f", {len(skipped)} were skipped" if skipped else "")


@dataclass(frozen=True)
class Material:
    """What a run trains, and on what."""

    name: str
    model: Path
    files: dict[str, Path]
    """The data of each device."""
    cut_layer: int


def materials(part: Part) -> list[Material]:
    """The largest last; a dry run has only the tiny one."""
    from conftest import make_model  # loads transformers, which the servers' processes, that import this file too, need not

    folder = part.scratch / "tiny"
    folder.mkdir()
    restaurants = harness.REPOSITORY / "examples/restaurants"
    examples = {name: restaurants / f"client-{number}.jsonl" for number, name in enumerate(DEVICES)}
    found = [Material("tiny", make_model(folder), examples, 2)]
    mini, rows = harness.SHARED / "models/gpt2-mini", harness.SHARED / "data/e2e/train.txt"
    if part.device == "cuda" and mini.exists() and rows.exists():
        files = {}
        for number, name in enumerate(DEVICES):
            some = harness.e2e_rows("train", slice(number * ROWS_OF_A_DEVICE, (number + 1) * ROWS_OF_A_DEVICE))
            files[name] = harness.write_rows(part.scratch / f"{name}.txt", some)
        found.append(Material("gpt2-mini", mini, files, 3))
    return found


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    losses: list[float]
    adapter: dict[str, Any]
    step_seconds: float
    """The median."""

    @classmethod
    def read(cls, run_dir: Path) -> "Outcome":
        from reference import read_adapter

        steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        if len(steps) != STEPS:
            raise Failed(f"the run ended after {len(steps)} of {STEPS} steps")
        seconds = sorted(step["step_seconds"] for step in steps)
        return cls([step["loss"] for step in steps], read_adapter(run_dir / "adapter"), seconds[len(seconds) // 2])

    def beside(self, expected: "Outcome") -> dict[str, float]:
        from reference import relative_difference

        return {
            "loss_difference": max(abs(a - b) / abs(b) for a, b in zip(self.losses, expected.losses, strict=True)),
            "adapter_difference": relative_difference(self.adapter, expected.adapter),
            "step_seconds": self.step_seconds,
            "step_seconds_before": expected.step_seconds,
        }


def server_settings(material: Material, run_dir: Path, device: str, dtype: str) -> dict[str, Any]:
    return {
        "model": str(material.model),
        "run_dir": str(run_dir),
        "clients": len(material.files),
        "cut_layer": material.cut_layer,
        "steps": STEPS,
        "micro_batches": 2,
        "lora_dropout": 0.1,
        "lr": 2e-3,
        "device": device,
        "dtype": dtype,
    }


def take_part(url: str, files: dict[str, Path]) -> None:
    """All devices of a run to its end, on the CPU, with the part of the model that the server hands over."""
    from edge_client import EdgeClient

    errors: list[BaseException] = []

    def train(name: str, data: Path) -> None:
        try:
            with EdgeClient(
                url, data=data, name=name, batch_size=BATCH_SIZE, engine="onnxruntime", device="cpu", give_up_after=30.0
            ) as device:
                for _ in device.train():
                    pass
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=item) for item in files.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise Failed(f"a device could not take part: {errors[0]}")


def run_with(material: Material, scratch: Path, device: str, dtype: str) -> Outcome:
    """A run of one server process."""
    run_dir = scratch / f"{material.name}-{device}-{dtype}-{time.monotonic_ns()}"
    server, url = harness.start_server(server_settings(material, run_dir, device, dtype))
    try:
        take_part(url, material.files)
        server.join()
    finally:
        server.kill()
    return Outcome.read(run_dir)


def compare_runs(part: Part) -> str:
    runs: list[dict[str, Any]] = []
    for material in materials(part):
        expected = run_with(material, part.scratch, "cpu", "float32")
        for dtype, tolerance in LOSS_TOLERANCES.items():
            found = run_with(material, part.scratch, part.device, dtype).beside(expected)
            runs.append({"model": material.name, "dtype": dtype, "tolerance": tolerance, **found})
            print(f"  {material.name}, {dtype}: losses within {found['loss_difference']:.1e} of the CPU's", flush=True)
            part.note(runs=runs)
    wrong = [run for run in runs if not run["loss_difference"] <= run["tolerance"]]
    if wrong:
        raise Failed(
            "; ".join(
                f"losses of {run['model']} in {run['dtype']} are {run['loss_difference']:.1e} from the CPU's, more than "
                f"{run['tolerance']:.0e}"
                for run in wrong
            )
        )
    return f"{len(runs)} runs, losses within " + " and ".join(
        f"{max(run['loss_difference'] for run in runs if run['dtype'] == dtype):.0e} ({dtype})" for dtype in LOSS_TOLERANCES
    )


def compare_ranks(part: Part) -> str:
    import torch
    import torch.distributed

    if not torch.distributed.is_available():
        raise Skipped("this torch is built without torch.distributed")
    if part.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < FREE_BYTES_FOR_TWO_RANKS:
            raise Skipped(
                f"{free / 1e9:.1f} GB of the card are free, and two ranks may need {FREE_BYTES_FOR_TWO_RANKS / 1e9:.1f}"
            )
    material = materials(part)[-1]
    expected = run_with(material, part.scratch, part.device, "float32")
    run_dir, port = part.scratch / "ranks", free_port()
    settings = {**server_settings(material, run_dir, part.device, "float32"), "port": port}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (part.scratch / "ranks.log").open("w+", encoding="utf-8") as log:
        server = subprocess.Popen([*torchrun, "-m", "gpu_server", "serve", *flags], stdout=log, stderr=log)
        try:
            wait_until_it_answers(server, f"ws://127.0.0.1:{port}")
            take_part(f"ws://127.0.0.1:{port}", material.files)
            server.wait()
        finally:
            server.terminate()
            server.wait()
            log.seek(0)
            said = log.read()
            print(said, flush=True)
    if server.returncode:
        raise Failed(f"the server on two ranks ended with {server.returncode}: {said.strip().splitlines()[-1]}")
    found = Outcome.read(run_dir).beside(expected)
    part.note(model=material.name, **found)
    if not found["loss_difference"] <= LOSS_TOLERANCES["float32"]:
        raise Failed(f"losses of two ranks are {found['loss_difference']:.1e} from those of one")
    return (
        f"losses within {found['loss_difference']:.0e} of one rank's; {found['step_seconds']:.3f} s a step, one rank "
        f"{found['step_seconds_before']:.3f}"
    )


def compare_steps(part: Part) -> str:
    from device_steps import measure

    if wrong := measure(part.device, part.seconds_left, part.note):
        raise Failed(wrong)
    return "all contestants compute the same"


PARTS: dict[str, tuple[float, Callable[[Part], str]]] = {
    "tests": (100.0, run_tests),
    "runs": (90.0, compare_runs),
    "ranks": (60.0, compare_ranks),
    "steps": (220.0, compare_steps),
}
"""How many seconds each has, and what it does."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on tiny shapes")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the findings are written, as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print these findings as tables, and check nothing")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="these parts alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # a process of a part
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        try:
            print(tables(json.loads(options.table.read_text(encoding="utf-8"))))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            sys.exit(f"{options.table} is not what a check has written: {error}")
        return 0
    if options.part:
        scratch = options.output.parent
        os.environ["XDG_STATE_HOME"] = str(scratch)  # of the devices
        Part(options.device, options.seconds, options.output, scratch).run(PARTS[options.part][1])
        return 0
    return check(options.device, options.only, options.output)


def check(device: str, names: list[str], output: Path | None) -> int:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            sys.exit(
                f"the check needs a CUDA device, and torch {torch.__version__} finds none here; --device cpu is its dry run"
            )
    began = time.monotonic()
    findings: dict[str, Any] = {"machine": machine(device), "parts": {}, "seconds": 0.0}
    write(findings, output)  # before all the work: it may not be possible
    spared = 0.0
    for name in names:
        seconds = PARTS[name][0] + spared
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        found = findings["parts"][name] = in_a_process(name, device, seconds)
        spared = max(0.0, seconds - found["seconds"])
        print(f"{name}: {found['verdict']} after {found['seconds']:.0f} s: {found['found']}", flush=True)
        findings["seconds"] = round(time.monotonic() - began, 1)
        write(findings, output)
    print(f"\n{tables(findings)}")
    return int(any(found["verdict"] in (FAILED, TOO_SLOW) for found in findings["parts"].values()))


def write(findings: dict[str, Any], output: Path | None) -> None:
    if output:
        try:
            output.write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            sys.exit(f"{output} cannot be written: {error.strerror}")


def in_a_process(name: str, device: str, seconds: float) -> dict[str, Any]:
    """What a part has found."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "findings.json"
        options = {"--part": name, "--device": device, "--output": str(file), "--seconds": str(seconds)}
        command = [sys.executable, __file__, *(word for option in options.items() for word in option)]
        # With all that it starts in a group of its own, which ends with it.
        process = subprocess.Popen(command, env={**os.environ, **QUIET}, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            took_too_long = process.poll() is None
            end_group(process)
        found: dict[str, Any] = {"verdict": FAILED, "found": "", "figures": {}}
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
    found["seconds"] = round(time.monotonic() - began, 1)
    if took_too_long:
        found |= {"verdict": TOO_SLOW, "found": f"it was ended after {seconds:.0f} s"}
    elif process.returncode:
        found |= {"verdict": FAILED, "found": f"its process ended with {process.returncode}; what it printed says why"}
    return found


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """torchrun, which starts its processes in groups of their own, ends them when it is asked to end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        patience = time.monotonic() + SECONDS_TO_END
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < patience:
                process.poll()  # what has ended is gone only when it was asked for
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            break
    process.wait()


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    described: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("splitlora", "torch", "transformers", "peft", "numpy", "onnxruntime")},
    }
    if device == "cuda":
        # In a process of its own, whose context does not take the card's memory from the parts.
        code = (
            "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'card': p.name, "
            "'card_bytes': p.total_memory, 'capability': f'{p.major}.{p.minor}', 'cuda': torch.version.cuda}))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        described |= json.loads(said.splitlines()[-1])
        described["driver"] = driver()
    return described


def installed(package: str) -> str:
    """Its version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def driver() -> str:
    """Its version; empty where nobody says it."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def tables(findings: dict[str, Any]) -> str:
    """In markdown."""
    machine, parts = findings["machine"], findings["parts"]
    where = "the CPU, a dry run on tiny shapes"
    if machine["device"] == "cuda":
        card = f"{machine['card']} ({machine['card_bytes'] / 1e9:.0f} GB)"
        where = f"{card}, driver {machine['driver'] or 'unknown'}, CUDA {machine['cuda']}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "splitlora"))
    texts = [
        f"{where}; {machine['cores']} cores; {versions}; {machine['time']}, {findings['seconds']:.0f} s.",
        harness.markdown(
            ["part", "", "seconds", "found"],
            [[name, found["verdict"], f"{found['seconds']:.0f}", found["found"]] for name, found in parts.items()],
        ),
    ]
    runs = [
        [run["model"], "one process", run["dtype"], *_beside(run)]
        for run in parts.get("runs", {}).get("figures", {}).get("runs", [])
    ]
    of_ranks = parts.get("ranks", {}).get("figures", {})
    if "model" in of_ranks:
        runs.append([of_ranks["model"], "two ranks", "float32", *_beside(of_ranks)])
    if runs:
        of_run = ["run", "server", "weights", "largest difference of a loss", "of the adapter", "s a step", "beside"]
        texts.append(harness.markdown(of_run, runs))
    of_steps = parts.get("steps", {}).get("figures", {})
    header = ["model", "rows, tokens", "", "tokens/s", "ms a step", "peak GB", "parts", "of the step", "same work"]
    for race in dict.fromkeys(case["race"] for case in of_steps.get("cases", [])):
        lines = [line for case in of_steps["cases"] if case["race"] == race for line in _contestants(case)]
        texts.append(harness.markdown(header, lines))
    texts += [f"Left out: {reason}." for reason in of_steps.get("left_out", [])]
    return "\n\n".join(texts)


def _contestants(case: dict[str, Any]) -> Iterator[list[object]]:
    """A line for each, compared with the first."""
    first, *_ = case["contestants"].values()
    for name, of in case["contestants"].items():
        fastest, slowest = of["seconds_of_all"]
        yield [
            case["model"] if of is first else "",
            f"{case['rows']}, {case['tokens']:,}" if of is first else "",
            name,
            f"{of['tokens_per_second']:,.0f}",
            f"{1000 * of['seconds']:.1f} ({1000 * fastest:.1f} - {1000 * slowest:.1f})",
            f"{of['peak_bytes'] / 1e9:.2f}" if of["peak_bytes"] else "",
            of["parts"],
            f"{of['share']:.0%}",
            f"{of['tokens_per_second'] * of['share'] / first['tokens_per_second']:.2f} x",
        ]


def _beside(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['loss_difference']:.1e}",
        f"{figures['adapter_difference']:.1e}",
        f"{figures['step_seconds']:.3f}",
        f"{figures['step_seconds_before']:.3f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
