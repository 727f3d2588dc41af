"""What a person sees and types."""

import argparse
import io
import os
import subprocess
import sys
from importlib import import_module, metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from conftest import REPOSITORY

import protocol
from edge_client.cli import build_parser as edge_parser
from export.cli import build_parser as export_parser
from gpu_server.cli import build_parser as server_parser
from terminal import (
    PackageMissing,
    PathError,
    Progress,
    count,
    duration,
    importing,
    listed,
    run_program,
    show_log,
    user_path,
    user_text_path,
    version,
)


class Screen(io.StringIO):
    """
    A terminal of so many columns, as far as a bar uses it: what stands on its lines. Like most, it breaks a line that no longer
    fits when it becomes narrower, and its cursor goes with the character it stood at.
    """

    encoding = "utf-8"

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.lines = [""]
        self.row = self.column = 0

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        for part in text.replace("\x1b[K", "\x00").replace("\x1b[B", "\x01").replace("\x1b[A", "\x02"):
            line = self.lines[self.row]
            match part:
                case "\r":
                    self.column = 0
                case "\n":
                    self.row += 1
                    self.lines += [""] * (self.row == len(self.lines))
                case "\x00":
                    self.lines[self.row] = line[: self.column]
                case "\x01":
                    self.row = min(self.row + 1, len(self.lines) - 1)
                case "\x02":
                    self.row = max(self.row - 1, 0)
                case _:
                    assert self.column < self.columns, "the line is longer than the terminal is wide"
                    self.lines[self.row] = line[: self.column].ljust(self.column) + part + line[self.column + 1 :]
                    self.column += 1
        return len(text)

    def resize(self, columns: int) -> None:
        self.columns = columns
        lines: list[str] = []
        for number, line in enumerate(self.lines):
            if number == self.row:
                assert self.column == 0
                row = len(lines)
            lines += [line[start : start + columns] for start in range(0, max(1, len(line)), columns)]
        self.lines, self.row = lines, row


def on_screen(monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> Screen:
    """Not a fixture: between those and the test, standard error is replaced."""
    screen = Screen(columns)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("terminal.progress._columns", lambda _: screen.columns)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def steps(progress: Progress, *numbers: int) -> None:
    for number in numbers:
        progress.update(step=number, loss=2.5, tokens=100, num_bytes=5_000)
        progress._bar.refresh()


def test_terminal_gets_a_bar_with_loss_rates_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    with Progress(4) as progress:
        steps(progress, 1, 2)
        (line,) = screen.lines
        for part in ("50%", "2/4", "loss 2.500", "0 s left", "tokens/s", "B/s"):
            assert part in line


@pytest.mark.parametrize(
    ("columns", "there", "left_out"),
    [
        (60, ["█", "3/4", "loss 2.500", "s left"], ["B/s"]),
        (40, ["█", "3/4", "loss 2.500"], ["tokens/s"]),
        (20, ["3/4", "loss 2.500"], ["%", "█"]),
        (5, ["3/4"], ["loss"]),
    ],
)
def test_bar_fits_a_narrow_terminal_and_says_what_matters_most(
    monkeypatch: pytest.MonkeyPatch, columns: int, there: list[str], left_out: list[str]
) -> None:
    screen = on_screen(monkeypatch, columns)
    with Progress(4) as progress:
        steps(progress, 1, 2, 3)
        (line,) = screen.lines
        assert len(line) < columns
        assert all(part in line for part in there)
        assert not any(part in line for part in left_out)


def test_terminal_that_becomes_narrower_keeps_no_stale_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = on_screen(monkeypatch)
    print("before", file=screen)
    with Progress(8) as progress:
        steps(progress, 1, 2)
        for number, columns in enumerate((60, 40, 20, 70, 9), start=3):
            screen.resize(columns)
            steps(progress, number)
            assert [line for line in screen.lines if line] == ["before", screen.lines[1]]
            assert f"{number}/8" in screen.lines[1]


def test_speed_is_not_measured_over_a_step_that_nobody_saw_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1) as progress:
        progress.update(step=1, loss=3.0, tokens=10**9, num_bytes=10**9)
    assert capsys.readouterr().err == "step 1/1: loss 3.000\n"


def test_file_gets_plain_lines_and_always_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, done=1) as progress:
        progress.update(step=2, loss=3.0, tokens=100, num_bytes=5_000)
        progress.update(step=3, loss=2.0, tokens=100, num_bytes=5_000)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.splitlines()[-1].startswith("step 3/3: loss 2.000, ")


def test_lines_of_a_long_run_become_rarer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("terminal.progress.time.monotonic", lambda: now)
    lines = {}
    with Progress(10**6) as progress:
        for hour in range(24):
            while now < 3600 * (hour + 1):
                now += 10.0
                progress.advance("")
            lines[hour] = len(capsys.readouterr().err.splitlines())
    assert 50 < lines[0] < 70
    assert lines[1] < 20
    assert lines[23] == 6


# How a program ends


def test_expected_error_is_one_sentence_and_another_one_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("7 is too much")

    assert run_program("program", fail, lambda: (ValueError,)) == 1
    assert capsys.readouterr().err == "program: 7 is too much\n"
    with pytest.raises(ValueError, match="7 is too much"):
        run_program("program", fail, lambda: (KeyError,))


def test_interruption_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_program("program", interrupt, lambda: ()) == 130
    assert capsys.readouterr().err == "program: interrupted\n"


def test_checkout_that_nobody_has_installed_has_no_version_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    assert version() == metadata.version("splitlora")
    monkeypatch.setattr(metadata, "version", not_found)
    assert version() == "unknown"


def test_numbers_names_and_durations_read_as_people_write_them() -> None:
    assert [count(number, "client") for number in (0, 1, 2, 12345)] == ["0 clients", "1 client", "2 clients", "12,345 clients"]
    assert (count(1, "batch", "batches"), count(3, "batch", "batches")) == ("1 batch", "3 batches")
    assert [listed("abc"[:number]) for number in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert listed("abcde", most=2) == "a, b and 3 more"
    assert listed("abc", of=5000) == "a, b, c and 4,997 more"
    assert [duration(seconds) for seconds in (0, 1, 42.4, 119, 180, 3600, 7500, 90000, 273600, 259200)] == [
        *("0.0 s", "1.0 s", "42 s", "119 s", "3 min", "1 h", "2 h 5 min", "25 h", "3 d 4 h", "3 d"),
    ]


def shell(script: str, redirection: str, **environment: str) -> tuple[list[int], str]:
    """Exit statuses of a program that prints and of what it is piped to, and everything that was said."""
    program = (
        f"import sys\nfrom terminal import run_program\ndef run():\n    {script}\nsys.exit(run_program('program', run, tuple))"
    )
    command = f'"$PYTHON" -c "$PROGRAM" {redirection}; echo "status ${{PIPESTATUS[@]}}" >&2'
    variables = {**os.environ, **environment, "PYTHON": sys.executable, "PROGRAM": program}
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env=variables, capture_output=True, encoding="utf-8", errors="replace"
    )
    *said, statuses = done.stderr.splitlines()
    return [int(word) for word in statuses.split()[1:]], "\n".join([*done.stdout.splitlines(), *said])


MUCH = "for i in range(100_000): print('line', i)"


@pytest.mark.parametrize(
    ("redirection", "statuses", "said"),
    [
        ("| head -1", [141, 0], "line 0"),
        ("> /dev/full", [1], "program: standard output cannot be written: No space left on device"),
        (">&-", [1], "program: standard output cannot be written: it is closed"),
    ],
)
def test_output_that_cannot_be_written_ends_the_program_with_a_sentence_or_quietly(
    redirection: str, statuses: list[int], said: str
) -> None:
    assert shell(MUCH, redirection) == (statuses, said)


@pytest.mark.parametrize("redirection", ["2> /dev/full", "2>&-", "2> >(true)"])
def test_program_goes_on_where_nobody_reads_what_it_says_of_itself(redirection: str) -> None:
    script = "[print('step', i, file=sys.stderr) for i in range(100_000)]; print('done')"
    assert shell(script, f"{redirection} | cat") == ([0, 0], "done")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_has_not_is_replaced(encoding: str) -> None:
    statuses, said = shell("print('price \\u20ac \\udc80 \\U0001f600!')", "", PYTHONIOENCODING=encoding)
    assert statuses == [0]
    assert said.startswith("price ")
    assert said.endswith("!")


# What a user types


@pytest.mark.parametrize(
    ("parser", "words", "said"),
    [
        (server_parser, ["enroll", "phone"], "there is no command 'enroll'; did you mean enrol?"),
        (edge_parser, ["enroll", "x"], "there is no command 'enroll'; did you mean join?"),
        (edge_parser, ["jion", "x"], "there is no command 'jion'; did you mean join?"),
        (edge_parser, ["xyz"], "there is no command 'xyz'; there are train, "),
        (edge_parser, ["train", "--serverr", "ws://x"], "there is no --serverr; did you mean --server?"),
        (edge_parser, ["--verson"], "there is no --verson; did you mean --version?"),
        (server_parser, ["serve", "--qorum=3"], "there is no --qorum; did you mean --quorum?"),
        (export_parser, ["onx"], "there is no command 'onx'; did you mean onnx?"),
        (export_parser, ["onnx", "--model", "m", "--output", "o", "--attention", "gqq"], "no value 'gqq'; did you mean gqa?"),
    ],
)
def test_near_miss_is_answered_with_what_was_meant(
    parser: "type[argparse.ArgumentParser]", words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words)
    assert said in capsys.readouterr().err


def test_words_that_look_like_flags_in_values_are_left_alone() -> None:
    assert edge_parser().parse_args(["generate", "d", "--prompt=--no-flag -x"]).prompt == "--no-flag -x"
    assert edge_parser().parse_args(["generate", "--prompt", "-- a dash", "d"]).prompt == "-- a dash"
    assert edge_parser().parse_args(["generate", "--max-new", "3", "--prompt", "x", "d"]).max_new_tokens == 3


def test_help_to_a_pipe_that_closes_is_quiet() -> None:
    command = [sys.executable, "-m", "gpu_server", "serve", "--help"]
    done = subprocess.run(["bash", "-c", f"{' '.join(command)} | true; exit ${{PIPESTATUS[0]}}"], stderr=subprocess.PIPE)
    assert (done.returncode in (0, 141), done.stderr) == (True, b"")


def test_tilde_is_the_home_folder_wherever_it_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == tmp_path / "runs"
    assert user_path(Path("~")) == tmp_path
    assert user_text_path("./gpt2") == "./gpt2"
    assert user_text_path("org/name") == "org/name"
    for text in ("~nobody-of-this-name/runs", "a\0b"):
        with pytest.raises(PathError):
            user_path(text)


@pytest.mark.parametrize(("wanted", "shown"), [("debug", True), ("", False), ("nonsense", False)])
def test_ignored_messages_are_shown_to_who_asks_for_them(
    wanted: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITLORA_LOG", wanted)
    ping = protocol.encode(protocol.Ping(index=3))
    server = protocol.Session(protocol.Side.SERVER)
    with show_log("gpu_server"):
        assert server.receive(ping) is not None
        assert server.receive(ping) is None
    assert ("DEBUG server (no name yet): ignored Ping 3" in capsys.readouterr().err) is shown


# What is not installed


def test_missing_library_is_one_sentence_that_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(PackageMissing) as caught, importing("a server", install="splitlora[server]"):
        import_module("onnx")
    assert str(caught.value) == "a server needs onnx, which is not installed: pip install 'splitlora[server]'"

    def run() -> None:
        import onnx  # noqa: F401

    assert run_program("program", run, tuple) == 1
    assert capsys.readouterr().err == "program: this command needs onnx, which is not installed: pip install splitlora\n"


def test_library_that_cannot_be_loaded_is_said_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"torn{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PackageMissing, match=r"torn, which cannot be loaded here \(.+\)"), importing("a device", "splitlora"):
        import_module("torn")


def test_ctrl_c_while_a_library_is_loaded_is_none_of_its_errors() -> None:
    with pytest.raises(KeyboardInterrupt), importing("a device", install="splitlora"):
        raise ImportError("initialization failed") from KeyboardInterrupt()


def test_onnxruntime_reports_nothing_to_its_maker(tmp_path: Path) -> None:
    program = """
from terminal import import_onnxruntime
onnxruntime = import_onnxruntime("a device", install="splitlora")
onnxruntime.SessionOptions()
"""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", program], check=True, env={**environment, "HOME": str(tmp_path)})
    assert not list(tmp_path.rglob("*"))


def test_name_that_a_module_does_not_have_is_a_defect() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nothing'"), importing("a device", install="splitlora"):
        from terminal import nothing  # noqa: F401


@pytest.mark.parametrize(
    ("package", "name", "library", "install"),
    [
        ("edge_client", "EdgeClient", "tokenizers", "splitlora"),
        ("gpu_server", "GpuServer", "torch", "'splitlora[server]'"),
        ("export", "export_onnx", "onnx", "'splitlora[export]'"),
    ],
)
def test_name_that_needs_a_missing_library_says_what_installs_it(package: str, name: str, library: str, install: str) -> None:
    check = f"""
import sys
sys.modules[{library!r}] = None
import {package}
try:
    {package}.{name}
except ImportError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.stderr.endswith(f"needs {library}, which is not installed: pip install {install}\n")


@pytest.mark.parametrize(
    ("package", "command", "library", "extra"),
    [
        ("gpu_server", "serve --model gpt2 --run-dir nowhere", "torch", "server"),
        ("gpu_server", "clients --run-dir nowhere", "filelock", "server"),
        ("export", "onnx --model gpt2 --output nowhere", "onnx", "export"),
        ("export", "merge --model gpt2 --output nowhere", "torch", "export"),
        ("export", "verify nowhere", "torch", "export"),
    ],
)
def test_program_that_misses_a_library_says_which_extra_brings_it(
    tmp_path: Path, package: str, command: str, library: str, extra: str
) -> None:
    check = f"import sys; sys.modules[{library!r}] = None; from {package}.cli import main; sys.exit(main({command.split()}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith(f"needs {library}, which is not installed: pip install 'splitlora[{extra}]'\n")
