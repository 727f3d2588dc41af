"""How a program begins and ends: what its user meant, and well, with one sentence, or by Ctrl-C."""

import argparse
import difflib
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .packages import PackageMissing, importing

__all__ = ["Parser", "PathError", "plain", "run_program", "user_path", "user_text_path", "version"]

SECRET_OF_INVITATION = re.compile(r"(splitlora:(?:[^\s#]*#[^\s/]*/)?)\S+", re.I)
ENDED_BY_SIGPIPE = 128 + 13  # what a shell calls it


class PathError(ValueError):
    """A path that a user gave cannot be one."""


class OutputFailed(OSError):
    """Standard output takes no more."""


def run_program(
    name: str,
    run: Callable[[], None],
    expected: Callable[[], tuple[type[Exception], ...]],
    *,
    install: str = "splitlora",
) -> int:
    """
    Run a program and give its exit status: 0, 1 after an error a user can cause, 130 after Ctrl-C, 141 where nobody reads its
    output any more.

    Standard output is what was asked for: where it cannot be written, the program ends. Standard error is for whoever watches:
    the program goes on without. Characters that a stream's encoding has not are replaced.

    Args:
        expected: gives the types of the errors a user can cause; called only after an error, for it may import much.
            Any other error is a defect of ours and keeps its traceback.
        install: what pip is to install where a library that the program imports is missing.
    """
    # Threads of torch that wait for each other give their core away instead of spinning: on a machine that does anything
    # else beside, such as a second client, a step is 2.5 times faster. It has to be said before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with _careful_output():
        try:
            with importing("this command", install):
                run()
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)  # noqa: T201
            return 130
        except OutputFailed as error:
            return _end_without_output(name, error)
        except Exception as error:
            if not isinstance(error, (PackageMissing, PathError)) and not isinstance(error, expected()):
                raise
            print(f"{name}: {plain(str(error))}", file=sys.stderr)  # noqa: T201
            return 1
        return 0


class Parser(argparse.ArgumentParser):
    """
    Names what is nearest to a command, a flag or a choice that there is not.

    Args:
        meant: commands that there are not, and what people mean by them.
        options: of ArgumentParser.
    """

    def __init__(self, *, meant: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._meant = {} if meant is None else meant

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        self._check_flags(given)
        return super().parse_known_args(given, namespace)

    def _check_flags(self, given: Sequence[str]) -> None:
        """Before argparse misses a required flag whose name has a slip."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in given:
            flag = word.partition("=")[0]
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows is not ours
            if flag.startswith("--") and " " not in flag and not any(known.startswith(flag) for known in flags):
                self.error(f"there is no {flag}{_did_you_mean(flag, flags)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = action.choices
        if choices is not None and value not in choices:
            names = [str(choice) for choice in choices]
            what = "command" if isinstance(action, argparse._SubParsersAction) else "value"
            hint = _did_you_mean(str(value), names, self._meant) or f"; there are {', '.join(names)}"
            raise argparse.ArgumentError(None if what == "command" else action, f"there is no {what} {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        super().error(plain(message))

    def _print_message(self, message: str, file: Any = None) -> None:
        is_error = file is None or file is sys.stderr
        with _careful_output():
            try:
                print(message, end="", file=sys.stderr if is_error else sys.stdout, flush=True)
            except OutputFailed as error:
                sys.exit(_end_without_output(self.prog, error))


def _end_without_output(name: str, error: OutputFailed) -> int:
    """The exit status; quietly where somebody reads no further, as `head` does."""
    if error.errno == errno.EPIPE:
        return ENDED_BY_SIGPIPE
    print(f"{name}: standard output cannot be written: {error.strerror}", file=sys.stderr)  # noqa: T201
    return 1


def _did_you_mean(given: str, known: Iterable[str], meant: Mapping[str, str] = {}) -> str:  # never changed
    nearest = difflib.get_close_matches(given, [*known, *meant], n=1)
    return f"; did you mean {meant.get(nearest[0], nearest[0])}?" if nearest else ""


def user_path(given: str | os.PathLike[str]) -> Path:
    """
    The file or folder that a user means: ``~`` is the home folder, wherever the path came from; shells expand it in few places.

    Raises:
        PathError: there is no such home folder.
    """
    return Path(user_text_path(given))


def user_text_path(given: str | os.PathLike[str]) -> str:
    """As `user_path`, of what may be something else than a path, such as a name on the hub: all but ``~`` is left alone."""
    text = os.fspath(given)
    if "\0" in text:
        raise PathError(f"{text!a} is not a path")
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text and not os.path.lexists(text):
        raise PathError(f"there is no home folder for {text}: give the whole path")
    return expanded


def plain(text: str) -> str:
    """
    Somebody else's text on one line: what would move the cursor or imitate another line is shown as its escape, and of an
    invitation no secret.
    """
    text = SECRET_OF_INVITATION.sub(r"\1…", text)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def version() -> str:
    """Of the installed distribution."""
    try:
        return metadata.version("splitlora")
    except metadata.PackageNotFoundError:  # run from a checkout that nobody has installed
        return "unknown"


class _Stream:
    """A stream of text, as it is but for what is written."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()


class _Output(_Stream):
    def write(self, text: str) -> int:
        if self._stream is None:
            raise OutputFailed(errno.EBADF, "it is closed")
        with self._failing(self._stream):
            return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is not None:
            with self._failing(self._stream):
                self._stream.flush()

    @contextmanager
    def _failing(self, stream: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _forget(stream)
            raise OutputFailed(error.errno, error.strerror) from None


class _Errors(_Stream):
    def write(self, text: str) -> int:
        with suppress(OSError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if self._stream is not None:
                self._stream.flush()


@contextmanager
def _careful_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(before[0]), _Errors(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                if stream is not None:
                    stream.flush()
            except OSError:
                _forget(stream)


def _forget(stream: TextIO) -> None:
    """What it still holds goes nowhere: Python would complain of it when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
