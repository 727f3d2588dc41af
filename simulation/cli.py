"""The program: python -m simulation."""

import cProfile
import json
import math
import sys
from argparse import ArgumentTypeError, Namespace
from dataclasses import asdict, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from terminal import Parser, Progress, count, duration, run_program, user_path

from .cost import Meter, bytes_a_member
from .events import RunStuck, make_federation, simulate
from .plan import Fleet, Plan, PlanError, Server
from .result import Result, StepOutcome
from .tables import growth_table, quorum_of, run_table, server_table
from .traffic import CODECS

__all__ = ["main"]

MEMBERS_FOR_MEMORY = 2000
OF_ONE_RUN = ("devices", "quorum", "deadline", "fleet", "server")
EXAMPLE = "example: python -m simulation --devices 100 1000 --quorum 0.8 0.9 1 --pictures docs/pictures"


def main() -> int:
    return run_program("simulation", _run, lambda: (PlanError, RunStuck, OSError), install="splitlora[server]")


def _parser() -> Parser:
    plan, fleet, server = Plan(devices=1), Fleet(), Server()
    parser = Parser(
        prog="simulation",
        description="Simulate runs of many devices: the server's federation is the real one, all around it is a model. "
        "Defaults are of public measurements, which simulation/plan.py names; docs/scale.md says what follows.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("--devices", type=int, nargs="+", default=[100], metavar="N", help="each is a run of its own (default: 100)")
    add(
        "--quorum",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="SHARE",
        help="share of the devices with which a step goes on after its deadline; 1: all. Each is a run of its own (default: 1)",
    )
    for name, kind, text in (
        ("steps", int, "of a run"),
        ("seed", int, "of all draws"),
        ("aggregate-every", int, "steps in a round"),
        ("micro-batches", int, "of a device's batch"),
        ("in-flight", int, "micro-batches that a device has under way at once"),
        ("checkpoint-every", int, "rounds between two checkpoints"),
        ("tokens", int, "rows of a device's batch"),
        ("width", int, "of the model"),
        ("cut-layer", int, "blocks on the device"),
        ("lora-rank", int, "of the devices' adapter"),
    ):
        default = getattr(plan, name.replace("-", "_"))
        add(f"--{name}", type=kind, default=default, metavar="N", help=f"{text} (default: {default})")
    add(
        "--deadline",
        type=_deadline,
        nargs="+",
        default=[None],
        metavar="SECONDS",
        help='of a step with a quorum; "measured": the server derives it from what devices take (default). '
        "Each is a run of its own",
    )
    add("--codec", default=plan.codec, choices=tuple(CODECS), help=f"of activations and gradients (default: {plan.codec})")
    for defaults, name, text in (
        (fleet, "device-speed", "tokens/s of the median device, through three blocks of GPT-2 small and back"),
        (fleet, "device-spread", "standard deviation of the logarithm of devices' speeds"),
        (fleet, "jitter", "the same of one device's computations"),
        (fleet, "uplink", "Mbit/s of the median device"),
        (fleet, "downlink", "Mbit/s of the median device"),
        (fleet, "round-trip", "seconds of the median device"),
        (fleet, "link-spread", "standard deviation of the logarithm of links' speeds"),
        (fleet, "connected", "seconds until a connection is lost, the mean; 0: never"),
        (fleet, "away", "seconds until a lost device is back, the mean"),
        (fleet, "leaving", "share of losses after which a device does not come back"),
        (fleet, "arrival", "seconds in which the devices join"),
        (server, "server-speed", "tokens a second that one GPU trains"),
        (server, "server-overhead", "seconds of a computation, whatever its size"),
        (server, "ranks", "GPUs that share the computation"),
        (server, "rank-efficiency", "what each of several ranks does of what one alone would"),
        (server, "exchange", "seconds of the thread that serves, for a question and its answer"),
        (server, "gigabits", "Gbit/s of the server's link"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        shown = f"{default:.4g}" if default < 1000 else f"{default:.0f}"
        add(f"--{name}", type=type(default), default=default, metavar="X", help=f"{text} (default: {shown})")
    add("--profile", action="store_true", help="show in which functions the federation spends its time")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--pictures", type=Path, metavar="FOLDER", help="draw the curves there, as fleet.svg and fleet.png; needs matplotlib")
    return parser


def _run() -> None:
    options = _parser().parse_args()
    plans = _plans(options)
    _check_places(options)
    if options.pictures is not None:
        from .pictures import draw  # before all the work: matplotlib may be missing
    results: list[Result] = []
    with Progress(sum(plan.steps for plan in plans), unit="step") as progress:
        for plan in plans:
            results.append(_simulate(plan, progress, profiled=options.profile))
    members = min(MEMBERS_FOR_MEMORY, plans[0].devices)
    memory = bytes_a_member(lambda: make_federation(_like(plans[0], devices=members)), members)
    _say(run_table(results))
    _say(server_table(results))
    _say(growth_table(results))
    _say(f"A device more takes {memory / 1000:.2f} kB of the federation's memory, its question's own arrays aside.")
    for result in results:
        if result.where:
            _say(f"{count(result.plan.devices, 'device')}, quorum {quorum_of(result.plan)}:\n{result.where}")
    if options.json is not None:
        text = json.dumps({"memory_a_member": memory, "runs": [_as_json(result) for result in results]}, indent=1)
        user_path(options.json).write_text(text + "\n", encoding="utf-8")
    if options.pictures is not None:
        for path in draw(results, user_path(options.pictures)):
            _say(f"drawn: {path}")


def _check_places(options: Namespace) -> None:
    """Before all the work."""
    if options.json is not None and not user_path(options.json).absolute().parent.is_dir():
        raise PlanError(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.json is not None and user_path(options.json).is_dir():
        raise PlanError(f"--json {options.json} is a folder; give a file's name")
    if options.pictures is not None and user_path(options.pictures).exists() and not user_path(options.pictures).is_dir():
        raise PlanError(f"--pictures {options.pictures} is a file; give a folder")
    for flag, given, folder in (
        ("--json", options.json, options.json and user_path(options.json).absolute().parent),
        ("--pictures", options.pictures, options.pictures and user_path(options.pictures)),
    ):
        if given is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                TemporaryFile(dir=folder).close()
            except OSError as error:
                raise PlanError(f"{flag} {given}: nothing can be written there: {error.strerror}") from None


def _simulate(plan: Plan, progress: Progress, *, profiled: bool) -> Result:
    of = f"{count(plan.devices, 'device')} with quorum {quorum_of(plan)}"

    def told(step: StepOutcome) -> None:
        progress.advance(f"{of}: a step of {duration(step.seconds)}")

    result = simulate(plan, told=told, meter=Meter(cProfile.Profile() if profiled else None))
    if len(result.steps) < plan.steps:  # all have left early
        progress.advance(of, plan.steps - len(result.steps))
    return result


def _plans(options: Namespace) -> list[Plan]:
    """One for each number of devices, each deadline and each quorum."""
    given = vars(options)
    fleet = Fleet(**{item.name: given[item.name] for item in fields(Fleet)})
    server = Server(**{item.name: given[item.name] for item in fields(Server) if item.name in given})
    shared = {item.name: given[item.name] for item in fields(Plan) if item.name not in OF_ONE_RUN}
    return [
        Plan(devices=devices, quorum=quorum, deadline=deadline, fleet=fleet, server=server, **shared)
        for devices in options.devices
        for deadline in options.deadline
        for quorum in options.quorum
        if quorum < 1 or deadline == options.deadline[0]  # without a quorum no deadline acts
    ]


def _deadline(given: str) -> float | None:
    if given == "measured":
        return None
    try:
        return float(given)
    except ValueError:
        raise ArgumentTypeError(f'a deadline is a number of seconds, or "measured", got {given[:40]!r}') from None


def _like(plan: Plan, **changes: Any) -> Plan:
    return Plan(**{**{item.name: getattr(plan, item.name) for item in fields(Plan)}, **changes})


def _as_json(result: Result) -> dict[str, Any]:
    named = ("step_seconds", "share_that_counts", "share_in_step", "decisions", "deciding", "decisions_a_second")
    figures = {**asdict(result), **{name: getattr(result, name) for name in named}}
    return {name: value for name, value in figures.items() if not isinstance(value, float) or math.isfinite(value)}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n\n")
