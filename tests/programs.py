"""The programs as people start them, in processes of their own."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["arguments", "program", "read_until"]


def arguments(flags: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


@contextmanager
def program(package: str, *words: str, **more: Any) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-m", package, *words], stderr=subprocess.PIPE, text=True, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: "subprocess.Popen[str]", words: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if words in line:
            return line
    pytest.fail(f"the program never said {words!r}")
