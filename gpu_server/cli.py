"""The command splitlora-server. Its flags are the fields of `ServerConfig`."""

import argparse
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terminal import Parser, PathError, Progress, count, listed, run_program, show_log, user_path, version, where_time_went

from .config import ServerConfig
from .errors import ServerError
from .flags import add_flags
from .options import options_from_toml

if TYPE_CHECKING:
    from .attendance import Seen
    from .enrolment import Enrolments

__all__ = ["build_parser", "main"]

PROGRAM = "splitlora-server"
SECONDS_A_DAY = 86400.0
SECONDS_FOR_THE_FIRST_TO_SPEAK = 5.0
MOST_DAYS = 36500  # a hundred years: longer than there have been runs


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description="Train the server part of a split model for all devices of a run.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve one run to its end", description="Serve one run to its end.")
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file of the same settings; flags override it")
    add_flags(serve, ServerConfig)
    serve.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: a line an event on standard error (default: text)"
    )
    serve.set_defaults(run=run_serve)

    enrol = commands.add_parser(
        "enrol", help="enrol a device", description="Enrol a device, and print the invitation it joins with."
    )
    enrol.add_argument("name", metavar="NAME", help="name of the device in the run")
    _add_where(enrol)
    enrol.add_argument(
        "--address", metavar="HOST:PORT", help="address at which devices reach the server (default: this machine's, port 8765)"
    )
    enrol.add_argument("--tls-cert", metavar="FILE", help="the server's certificate, if it is started with --tls-cert")
    enrol.add_argument("--insecure", action="store_true", help="the server is started with --insecure: no encryption")
    enrol.add_argument(
        "--renew",
        action="store_true",
        help="give a device that is enrolled already a new secret; the old one is worth nothing from then on, and the device "
        "keeps its place in the run",
    )
    enrol.set_defaults(run=run_enrol)

    revoke = commands.add_parser(
        "revoke",
        help="revoke a device's enrolment",
        description="Revoke a device's enrolment. If a run is under way, the device has left it within a second.",
    )
    who = revoke.add_mutually_exclusive_group(required=True)
    who.add_argument("name", metavar="NAME", nargs="?", help="name of the device in the run")
    who.add_argument(
        "--not-seen-for",
        type=int,
        metavar="DAYS",
        help="every device that was not in the run of --run-dir for so many days, nor enrolled or renewed since",
    )
    _add_where(revoke)
    revoke.set_defaults(run=run_revoke)

    renew_key = commands.add_parser(
        "renew-key",
        help="give the server another key",
        description="Give the server another key, without enrolling its devices again. First the key is announced, and every "
        "device hears of it when it is connected; this says who has. With --now the server has it.",
    )
    _add_where(renew_key)
    renew_key.add_argument("--now", action="store_true", help="the server has the announced key from now on")
    renew_key.add_argument(
        "--force", action="store_true", help="with --now: also where devices have not heard of it, which must be enrolled again"
    )
    renew_key.set_defaults(run=run_renew_key)

    clients = commands.add_parser(
        "clients",
        help="list the enrolled devices",
        description="List the enrolled devices: since when and by whom, and when each was in the run of --run-dir last.",
    )
    _add_where(clients)
    clients.set_defaults(run=run_clients)

    status = commands.add_parser(
        "status",
        help="say how a run stands",
        description="Say how a run stands, whether it is served or not: how far it is, and how each of its devices is.",
    )
    status.add_argument("--run-dir", metavar="DIR", required=True, help="folder of the run")
    status.add_argument("--json", action="store_true", help="for programs: an object of JSON")
    status.set_defaults(run=run_status)

    report = commands.add_parser(
        "report",
        help="lay runs side by side: a page, pictures and tables",
        description="Lay runs side by side: a page, pictures and tables of what they have written. Needs splitlora[report].",
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, whether it is served, finished or neither")
    report.add_argument(
        "--output", metavar="FOLDER", required=True, help="folder to write; an earlier report in it is replaced"
    )
    report.set_defaults(run=run_report)

    sweep = commands.add_parser(
        "sweep",
        help="run a grid of settings, one run after the other, on this machine",
        description="Run every combination of the values in a file, with devices as processes of this machine, and lay the "
        "runs side by side. What is finished is not run again: a sweep that was stopped goes on by the same command.",
    )
    sweep.add_argument("file", type=Path, metavar="FILE", help="TOML file of settings; see docs/training.md, Comparing")
    sweep.add_argument("--output", type=Path, metavar="DIR", help="folder for the runs and their report (default: the file's)")
    sweep.set_defaults(run=run_sweep)
    return parser


def _add_where(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run-dir", metavar="DIR", help="folder of the run")
    command.add_argument(
        "--clients-file", metavar="FILE", help="file of enrolled devices, if the server is started with --clients-file"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error with one sentence on standard error, 130 after Ctrl-C, 143 after SIGTERM."""
    with _said_once(), redirect_stderr(sys.stderr if _is_first_here() else io.StringIO()):
        options = build_parser().parse_args(arguments)
    with ExitStack() as signals:
        if options.command in ("serve", "sweep") and threading.current_thread() is threading.main_thread():
            signals.enter_context(_ending_once())
        return run_program(PROGRAM, lambda: options.run(options), _errors_of_users, install="splitlora[server]")


def _is_first_here() -> bool:
    """Among the processes that torchrun has started on this machine, if it has."""
    return "0" in (os.environ.get("LOCAL_RANK", "0"), os.environ.get("RANK", "0"))


@contextmanager
def _said_once() -> Iterator[None]:
    """
    What keeps one process of a machine from meeting the others keeps all: the first says it. Meanwhile the others wait, since
    torchrun ends all as soon as one has ended.
    """
    try:
        yield
    except (SystemExit, ServerError, PathError) as error:
        if _is_first_here() or (isinstance(error, SystemExit) and not error.code):
            raise
        time.sleep(SECONDS_FOR_THE_FIRST_TO_SPEAK)
        sys.exit(1)


@contextmanager
def _ending_once() -> Iterator[None]:
    """
    The first Ctrl-C or SIGTERM ends the program, which saves the run. More of them meanwhile change nothing: what is being
    written must not be torn.
    """

    def end(number: int, frame: types.FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, lambda *_: None)  # not SIG_IGN: of one that has just come Python would tell
        if number == signal.SIGTERM:
            sys.exit(128 + number)  # what a shell calls the end by this signal
        raise KeyboardInterrupt

    # A shell's background programs are started with Ctrl-C ignored, and stay so.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_serve(options: argparse.Namespace) -> None:
    from protocol import Seconds

    from .history import ADVICE
    from .ranks.place import Place
    from .sdk import GpuServer

    place = Place.here()
    if place is not None and not place.leads:
        from .ranks.follower import follow

        with _said_once():
            follow(place, _given(options))
    as_json = options.log_format == "json"
    with show_log("gpu_server", options.log_format), GpuServer(**_given(options)) as server:
        devices = count(server.config.clients, "device")
        say = _log if as_json else _say
        say(f"listening on {server.url} for {devices}; the run goes to {server.config.run_dir}; {'; '.join(server.choices)}")
        if server.page_url:
            # A log is read by many: it is told where the token is, and not the token.
            url = server.page_url.partition("?")[0] if as_json and server.config.page_token else server.page_url
            token = f"; its token is in {server.config.run_dir}/page-token" if url != server.page_url else ""
            say(f"the run in a browser: {url}{token}")
        spent = Seconds()
        with ExitStack() as shown:
            progress = None
            for step in server.train():
                if progress is None:
                    progress = shown.enter_context(Progress(server.total_steps, step.number - 1, silent=as_json))
                progress.update(step=step.number, loss=step.loss, tokens=step.tokens, num_bytes=step.num_bytes)
                spent = sum(step.seconds.values(), spent)
        if where := where_time_went(vars(spent), ADVICE):
            for line in f"all devices' {where}".splitlines():
                say(line)
        say(f"done: the adapter is in {server.adapter_folder}")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of the flags, and of the file where no flag says otherwise."""
    given = {name: value for name, value in vars(options).items() if name not in ("command", "run", "config", "log_format")}
    from_file = options_from_toml(options.config) if options.config else {}
    for flag, opposite in (("steps", "epochs"), ("epochs", "steps")):
        if flag in given:
            from_file.pop(opposite, None)
    return {**from_file, **given}


def run_enrol(options: argparse.Namespace) -> None:
    from .door import enrolments_of, invite

    enrolments = enrolments_of(options.run_dir, options.clients_file)
    invitation = invite(
        enrolments,
        options.name,
        run_dir=options.run_dir,
        address=options.address,
        tls_cert=options.tls_cert,
        insecure=options.insecure,
        renew=options.renew,
    )
    try:
        print(invitation.text(), flush=True)  # noqa: T201
    except OSError:
        if not options.renew:
            enrolments.revoke(options.name)  # nobody has seen its secret, and nobody will
        raise
    _say(
        f"whoever has this invitation is {options.name}. On the device: splitlora-edge join - --data FILE, and paste it; "
        "or keep it in a file: splitlora-edge join @FILE ..."
    )


def run_revoke(options: argparse.Namespace) -> None:
    from .door import enrolments_of

    enrolments = enrolments_of(options.run_dir, options.clients_file)
    names = [options.name] if options.not_seen_for is None else _not_seen_for(options, enrolments)
    if names:
        enrolments.revoke(*names)
    for name in names:
        _say(f"the enrolment of {name} is revoked")
    if not names:
        _say(f"every device was in the run within the last {count(options.not_seen_for, 'day')}")


def _not_seen_for(options: argparse.Namespace, enrolments: "Enrolments") -> list[str]:
    from .attendance import not_seen_since
    from .errors import ConfigError
    from .history import RunFiles

    if options.run_dir is None:
        raise ConfigError("--not-seen-for needs --run-dir: the run's files say when its devices were seen")
    if not 0 <= options.not_seen_for <= MOST_DAYS:
        raise ConfigError(f"--not-seen-for takes a number of days from 0 to {MOST_DAYS}, got {options.not_seen_for}")
    files = RunFiles(user_path(options.run_dir))
    if enrolments.path.parent.resolve() != files.path.resolve():
        raise ConfigError(
            f"{enrolments.path} may be that of other runs, too, in which its devices were seen: revoke them one by one"
        )
    return not_seen_since(time.time() - options.not_seen_for * SECONDS_A_DAY, enrolments.clients(), files)


def run_clients(options: argparse.Namespace) -> None:
    from storage.run_description import RUN_FILE

    from .attendance import attendance
    from .door import enrolments_of
    from .history import RunFiles

    clients = enrolments_of(options.run_dir, options.clients_file).clients()
    folder = None if options.run_dir is None else user_path(options.run_dir)
    # Devices are enrolled before a run is served for the first time.
    seen = None if folder is None or not (folder / RUN_FILE).exists() else attendance(RunFiles(folder))
    for name, client in clients.items():
        what = [f"enrolled {_date(client.enrolled.timestamp())}" + (f" by {client.enrolled_by}" if client.enrolled_by else "")]
        if client.renewed is not None:
            what.append(f"a new secret {_date(client.renewed.timestamp())}")
        if seen is not None:
            what.append(_when_seen(seen.get(name)))
        print(f"{name:<24} {', '.join(what)}")  # noqa: T201


def run_renew_key(options: argparse.Namespace) -> None:
    from .errors import ConfigError
    from .key_change import announce, change

    if options.run_dir is None:
        raise ConfigError("--run-dir is missing: the run's files say which devices have heard of its server's next key")
    if options.now:
        change(options.run_dir, options.clients_file, though_unknown=options.force)
        _say("the server has its new key; one that runs takes it within a second")
        return
    announced = announce(options.run_dir, options.clients_file)
    _say(f"the next key is {announced.pin[:16]}…")
    if announced.knowing:
        _say(f"known to {listed(announced.knowing)}")
    if announced.unknowing:
        _say(f"not known to {listed(announced.unknowing)}: devices hear of it when they are connected; ask again later")
    elif announced.is_brought:
        _say("no device needs to hear of it any more: put it and its certificate where --tls-key and --tls-cert are")
    else:
        _say("no device needs to hear of it any more: renew-key --now gives it to the server")


def _when_seen(seen: "Seen | None") -> str:
    if seen is None:
        return "never seen"
    whence = f" at {seen.address}" if seen.address else ""
    if seen.is_connected:
        return f"connected{whence}"
    return f"last seen {_date(seen.time)}{whence}" if seen.time else "seen before it was noted when"


def _date(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"


def run_status(options: argparse.Namespace) -> None:
    from .history import Overview, RunFiles
    from .status import MOST_DEVICES, as_table

    most_devices = None if options.json else MOST_DEVICES
    run = Overview.of_files(RunFiles(user_path(options.run_dir))).as_json(time.time(), most_devices)
    text = json.dumps(run, indent=2) if options.json else as_table(run, shutil.get_terminal_size().columns)
    print(text, flush=True)  # noqa: T201


def run_report(options: argparse.Namespace) -> None:
    from .report import write_report

    _say(f"the report is {write_report([user_path(run) for run in options.runs], user_path(options.output))}")


def run_sweep(options: argparse.Namespace) -> None:
    from .errors import ConfigError
    from .ranks.place import Place
    from .sweep.loop import run_sweep

    with _said_once():
        if Place.here() is not None:
            raise ConfigError("a sweep starts its servers itself, and each on one process: start it without torchrun")
    run_sweep(options.file, None if options.output is None else user_path(options.output))


def _log(line: str) -> None:
    logging.getLogger("gpu_server").info("%s", line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _errors_of_users() -> tuple[type[Exception], ...]:
    from protocol import InvalidName
    from protocol.invitation import InvalidInvitation
    from storage import ModelError

    from .errors import ServerError

    simple = (ServerError, InvalidName, InvalidInvitation, ModelError)
    if "torch" not in sys.modules:
        return simple
    from protocol import TrainingDiverged
    from storage import AdapterError

    from .sdk import RunEndedEarly

    return (*simple, AdapterError, TrainingDiverged, RunEndedEarly)
