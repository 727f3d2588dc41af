"""The import table of ARCHITECTURE.md, and what an import may load."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONGEST, REPOSITORY

STDLIB = sys.stdlib_module_names | {"tomllib"}  # of 3.11 and later
OURS = {"privacy", "protocol", "split_model", "storage", "terminal"}
MAY_IMPORT = {
    "contestants": {*("edge_client", "gpu_server", "protocol", "split_model", "storage", "terminal"), *("numpy", "torch")},
    "privacy": {"dp_accounting", "numpy"},
    "protocol": {"backports", "compression", "msgpack", "numpy"},
    "simulation": {*("gpu_server", "protocol", "terminal"), *("matplotlib", "numpy")},
    "split_model": {"storage", "numpy", "safetensors", "tokenizers", "torch"},
    "storage": {"huggingface_hub", "jinja2", "numpy", "tokenizers"},
    "graphs": {"storage", "split_model", "ml_dtypes", "numpy", "onnx", "safetensors"},
    "terminal": {"onnxruntime", "tqdm"},
    "edge_client": OURS
    | {"numpy", "onnxruntime", "platformdirs", "tokenizers", "torch", "websockets"}
    | {"matplotlib", "pyarrow"},
    "export": {
        *("graphs", "split_model", "storage", "terminal"),
        *("ml_dtypes", "numpy", "onnx", "onnxruntime", "peft", "safetensors", "tokenizers", "torch", "transformers"),
    },
    "gpu_server": OURS
    | {"graphs", "cryptography", "filelock", "matplotlib", "numpy", "prometheus_client", "safetensors", "tensorboard"}
    | {"msgpack", "tomli", "torch", "websockets"},
}
# Within a package: a room that may import its own modules and these of others, and nothing else of the package around it.
ROOMS = {
    "edge_client/generation": {"numpy", "onnxruntime", "storage", "terminal", "tokenizers"},
    "gpu_server/federation": {"numpy", "protocol", "storage", "terminal"},
}
ONLY_IN = {
    "dp_accounting": {"privacy/accounting.py"},
    "websockets": {
        "edge_client/connection.py",
        *("gpu_server/serving/http_handshake.py", "gpu_server/serving/peer.py", "gpu_server/serving/viewers.py"),
    },
    "asyncio": {
        *("gpu_server/serving/http_handshake.py", "gpu_server/serving/conversation.py", "gpu_server/serving/handing_over.py"),
        *("gpu_server/page/live.py", "gpu_server/serving/event_relay.py", "gpu_server/serving/lifetime.py"),
        *("gpu_server/serving/peer.py", "gpu_server/serving/performer.py", "gpu_server/serving/run_server.py"),
    },
    "jinja2": {"storage/chat_template.py"},
    "msgpack": {"protocol/encoding.py", "gpu_server/ranks/packing.py"},
    "matplotlib": {"edge_client/leak/picture.py", "gpu_server/report/pictures.py", "simulation/pictures.py"},
    "onnxruntime": {"terminal/packages.py"},
    "pyarrow": {"edge_client/text_file.py"},
    "prometheus_client": {"gpu_server/prometheus.py"},
    "peft": {"export/peft_merge.py"},
    "tensorboard": {"gpu_server/tensorboard.py"},
    "transformers": {"export/peft_merge.py"},
}


@functools.cache  # every library asks all files
def imported_by(file: Path) -> set[str]:
    """Top-level names of everything a file imports from elsewhere."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_its_row_allows(package: str) -> None:
    files = list((REPOSITORY / package).rglob("*.py"))
    assert files
    for file in files:
        assert imported_by(file) - STDLIB <= MAY_IMPORT[package] | {package}, file


@pytest.mark.parametrize("room", ROOMS)
def test_room_of_a_package_imports_nothing_else_of_the_package(room: str) -> None:
    files = list((REPOSITORY / room).glob("*.py"))
    assert files
    for file in files:
        assert imported_by(file) - STDLIB <= ROOMS[room], file
        around = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        assert all(node.level < 2 for node in around), file


def test_contestants_read_data_as_devices_do_and_write_what_a_server_writes_and_take_part_in_no_run() -> None:
    allowed = {
        *("edge_client", "edge_client.data", "gpu_server", "gpu_server.config", "gpu_server.errors", "gpu_server.flags"),
        *("gpu_server.history", "gpu_server.options", "gpu_server.run_directory", "gpu_server.sweep.settings"),
    }
    for file in (REPOSITORY / "contestants").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        found = {node.module: {alias.name for alias in node.names} for node in nodes if node.level == 0 and node.module}
        assert {module for module in found if module.startswith(("edge_client", "gpu_server"))} <= allowed, file
        names = found.get("edge_client", set()) | found.get("gpu_server", set())
        assert names <= {"DataError", "StateError", "ServerConfig", "StepRecord"}, file


def test_simulation_knows_of_the_server_only_what_decides() -> None:
    for file in (REPOSITORY / "simulation").glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
        modules = {node.module for node in nodes if node.level == 0 and node.module}
        assert {module for module in modules if module.startswith("gpu_server")} <= {"gpu_server.federation"}, file


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_known_only_to_its_own_files(library: str) -> None:
    files = {file for package in MAY_IMPORT for file in (REPOSITORY / package).rglob("*.py") if library in imported_by(file)}
    assert {file.relative_to(REPOSITORY).as_posix() for file in files} == ONLY_IN[library]


@pytest.mark.parametrize("pure", ["protocol", "gpu_server/federation"])
def test_what_decides_knows_no_clock_and_no_socket(pure: str) -> None:
    for file in (REPOSITORY / pure).rglob("*.py"):
        assert not imported_by(file) & {"time", "datetime", "socket", "ssl", "asyncio"}, file


def test_nothing_is_pickled() -> None:
    for package in MAY_IMPORT:
        for file in (REPOSITORY / package).rglob("*.py"):
            assert not imported_by(file) & {"pickle", "marshal", "shelve", "dill", "joblib"}, file
            assert "torch.load" not in file.read_text(encoding="utf-8"), file


def test_packages_are_those_that_are_installed() -> None:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["setuptools"]["packages"]["find"]["include"]) == {f"{package}*" for package in MAY_IMPORT}


def test_packages_are_those_that_an_image_is_built_with() -> None:
    copied = re.findall(r"^!(\w+)$", (REPOSITORY / ".dockerignore").read_text(encoding="utf-8"), re.M)
    assert set(copied) - {"LICENSE"} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", ["edge_client.client", "gpu_server.sdk"])
def test_neither_side_imports_transformers_or_peft(package: str) -> None:
    pytest.importorskip("torch")
    check = f"import sys, {package}; sys.exit(bool({{'transformers', 'peft', 'accelerate'}} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True)


NOT_ON_A_DEVICE = ("jinja2", "pyarrow", "torch", "safetensors", "transformers", "onnx", "huggingface_hub", "dp_accounting")


def modules_of(package: str) -> list[str]:
    files = (file.relative_to(REPOSITORY).with_suffix("") for file in (REPOSITORY / package).rglob("*.py"))
    return [".".join(file.parts).removesuffix(".__init__") for file in files if file.name != "__main__"]


def test_device_needs_nothing_that_the_base_package_does_not_bring() -> None:
    """Every module of a device, but for the engine with torch and the meter, is imported where nothing else is installed."""
    modules = [
        name for package in ("privacy", "protocol", "storage", "terminal", "edge_client") for name in modules_of(package)
    ]
    with_torch = ("edge_client.torch_engine", "edge_client.leak.")
    modules = [name for name in modules if not name.startswith(with_torch) or name == "edge_client.leak.flags"]
    assert len(modules) > 50
    check = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({NOT_ON_A_DEVICE}))
for name in {modules}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize("package", ["gpu_server.door", "gpu_server.federation", "gpu_server.report", "graphs", "simulation"])
def test_what_computes_nothing_itself_loads_no_torch(package: str) -> None:
    """Enrolling a device need not wait the seconds that torch takes to load."""
    check = f"import sys, {package}; sys.exit(bool({{'torch', 'split_model'}} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=REPOSITORY)


def test_engine_with_torch_is_known_only_where_it_is_made() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in (REPOSITORY / "edge_client").rglob("*.py")}
    made = {"client.py", "observation.py"}
    assert {name for name, text in files.items() if "TorchEngine" in text} == {*made, "engine.py", "torch_engine.py"}
    importing = {name for name, text in files.items() if re.search(r"from \.+torch_engine import", text)}
    assert importing == made


def test_nothing_of_a_device_imports_the_meter() -> None:
    """But for the program that has it among its commands, and imports it when it is asked for."""
    files = [file for file in (REPOSITORY / "edge_client").glob("*.py") if ".leak" in file.read_text(encoding="utf-8")]
    assert [file.name for file in files] == ["cli.py"]


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = [path for package in (*MAY_IMPORT, "tests") for path in (REPOSITORY / package).rglob("*")]
    there = {path.relative_to(REPOSITORY).as_posix() for path in paths} | MAY_IMPORT.keys()
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", text))
    assert len(named) > 30
    for name in named:
        path = name.rstrip("/")
        assert path in there or any(each.endswith(f"/{path}") for each in there), name


def test_every_file_of_tests_that_is_named_elsewhere_is_there() -> None:
    for place, pattern in (
        (".ci/run", r"tests/test_\{([\w,]+)\}\.py"),
        ("Makefile", r"addprefix tests/test_,([\w. \\\n\t]+)\)"),
    ):
        (names,) = re.findall(pattern, (REPOSITORY / place).read_text(encoding="utf-8"))
        files = re.split(r"[,\s\\]+", names.replace(".py", "").strip())
        assert len(files) > 5
        for name in files:
            assert (REPOSITORY / "tests" / f"test_{name}.py").is_file(), f"{place}: {name}"
    for name in LONGEST.split():
        assert (REPOSITORY / "tests" / f"test_{name}.py").is_file(), name
