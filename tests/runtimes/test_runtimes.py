"""
One folder, loaded as it is by every runtime that people deploy with: each with its real package, its own tokenizer and its
own loop, in an environment where it can live. `make test-runtimes` makes the environments and runs this.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from family_models import make_family_model

from edge_client import Generator
from edge_client.generation import open_exported
from export import export_onnx

HERE = Path(__file__).parent
OTHER_PYTHON = REPOSITORY / ".venv-runtimes/bin/python"
NODE_PACKAGES = REPOSITORY / ".venv-node"

PROMPTS = (
    "name : The Wrestlers | food : French<|endoftext|>",
    "A restaurant in the city centre",
    "naïve café → 10 €",
    "x",
)
CODE = re.findall(r"```(python|javascript)\n(.*?)```", (REPOSITORY / "docs/deploy.md").read_text(encoding="utf-8"), re.S)
FILES = {"fp32": "model.onnx", "q8": "model_quantized.onnx", "q4": "model_q4.onnx"}


@dataclass(frozen=True)
class Runtime:
    program: str
    needs: Path
    """What `make test-runtimes` installs it into."""
    script: str
    precisions: tuple[str, ...] = ("fp32", "q8", "q4")


RUNTIMES = {
    "transformers": Runtime(sys.executable, Path(sys.executable), "with_transformers.py", ("fp32",)),
    "onnxruntime": Runtime(sys.executable, Path(sys.executable), "with_onnxruntime.py"),
    "optimum": Runtime(str(OTHER_PYTHON), OTHER_PYTHON, "with_optimum.py"),
    "onnxruntime-genai": Runtime(str(OTHER_PYTHON), OTHER_PYTHON, "with_genai.py"),
    "transformers.js": Runtime("node", NODE_PACKAGES, "with_transformers_js.mjs"),
}
CASES = [(name, precision) for name, runtime in RUNTIMES.items() for precision in runtime.precisions]
MODELS: dict[str, Callable[[Path], Path]] = {
    "the project's own": lambda _: REPOSITORY / "examples/base_model",
    "grouped heads, scaled angles": lambda folder: make_family_model(folder, "llama-llama3", tie_word_embeddings=True),
    # With heads that are as wide as optimum takes those of any model of this family to be.
    "windows, normed heads": lambda folder: make_family_model(
        folder, "qwen3", head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=2, eos_token_id=[0, 11]
    ),
}


FOLDERS = [(model, attention) for model in MODELS for attention in ("gqa", "attn23")]


@pytest.fixture(scope="module", params=FOLDERS, ids=", ".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, attention = request.param
    scratch = tmp_path_factory.mktemp("exported")
    export_onnx(str(MODELS[model](scratch)), scratch / "out", precisions=tuple(FILES), attention=attention)
    return scratch / "out"


class Program:
    """A runtime's. It answers each line with a line, and is started once: its libraries take seconds to load."""

    def __init__(self, runtime: Runtime, log: Path) -> None:
        if not runtime.needs.exists():
            pytest.fail(f"{runtime.needs} is missing; `make test-runtimes` installs it")
        program = shutil.which(runtime.program)
        assert program is not None, f"{runtime.program} is not installed"
        self._log = log
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [program, HERE / runtime.script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env={**os.environ, "NODE_PACKAGES": str(NODE_PACKAGES), "HF_HUB_OFFLINE": "1"},
            )

    def continued(self, folder: Path, precision: str) -> list[list[int]]:
        """Tokens of prompts and continuations, these without a token that ends them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        ends = open_exported(folder).ends
        task: dict[str, Any] = {"folder": str(folder), "file": FILES[precision], "dtype": precision, "ends": ends}
        self._process.stdin.write(json.dumps({**task, "prompts": PROMPTS, "max_new_tokens": 24}) + "\n")
        self._process.stdin.flush()
        answers: list[list[int]] = next((json.loads(line) for line in self._process.stdout if line.startswith("[[")), [])
        assert answers, self._log.read_text()
        return [answer[:-1] if answer[-1] in ends else answer for answer in answers]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Program]]:
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as ends:

        @functools.cache
        def started(name: str) -> Program:
            program = Program(RUNTIMES[name], logs / name)
            ends.callback(program.end)
            return program

        yield started


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_greedy_tokens_are_the_same_everywhere(
    folder: Path, programs: Callable[[str], Program], name: str, precision: str
) -> None:
    expected = list(continued_here(folder, precision))
    assert any(len(answer) > 30 for answer in expected)
    assert programs(name).continued(folder, precision) == expected


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """
    By the runtime to be installed, and made once: as docs/deploy.md installs it, onnxruntime, numpy, tokenizers and this
    package, without its other dependencies.
    """

    @functools.cache
    def made(runtime: str) -> Path:
        environment = tmp_path_factory.mktemp("device")
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        install = [environment / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, runtime, "numpy", "tokenizers"], check=True)
        subprocess.run([*install, "--no-deps", "--editable", REPOSITORY], check=True)
        return environment

    return made


@pytest.mark.parametrize("runtime", ["onnxruntime==1.23.2", "onnxruntime"], ids=["oldest", "newest"])
def test_device_without_torch_generates(folder: Path, environments: Callable[[str], Path], runtime: str) -> None:
    environment = environments(runtime)
    for precision in FILES:
        command = ["generate", folder, "--prompt", PROMPTS[0], "--precision", precision]
        done = subprocess.run([environment / "bin/splitlora-edge", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == Generator(folder, precision=precision).text(PROMPTS[0]) + "\n"


@pytest.mark.parametrize(
    "name", ["edge_client", "onnxruntime_genai", "AutoTokenizer, env", "optimum", "import AutoModelForCausalLM\n"]
)
@pytest.mark.parametrize("folder", FOLDERS[:2], ids=", ".join, indirect=True)
def test_what_the_document_shows_runs(folder: Path, tmp_path: Path, name: str) -> None:
    (language, code), *others = [block for block in CODE if name in block[1]]
    assert not others
    (tmp_path / "deployed").symlink_to(folder)
    (tmp_path / "node_modules").symlink_to(NODE_PACKAGES / "node_modules")
    script = tmp_path / ("script.mjs" if language == "javascript" else "script.py")
    script.write_text(code)
    elsewhere = name in ("onnxruntime_genai", "optimum")
    program = "node" if language == "javascript" else str(OTHER_PYTHON) if elsewhere else sys.executable
    done = subprocess.run([program, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print" not in code


def continued_here(folder: Path, precision: str) -> Iterator[list[int]]:
    generator = Generator(folder, precision=precision)
    for prompt in PROMPTS:
        ids = generator.encode(prompt, raw=True)
        yield [*ids, *generator.tokens(ids, max_new_tokens=24)]
