"""
python -m contestants federated|centralised: what `splitlora-server sweep` starts beside split runs.

Flags are those of `splitlora-server serve` and `splitlora-edge train`, as far as they mean something here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_server.config import ServerConfig
from gpu_server.errors import ConfigError, ServerError
from gpu_server.flags import add_flags
from gpu_server.options import typed_settings
from gpu_server.sweep.settings import DeviceConfig, known_of_device, known_of_server
from terminal import Parser, run_program

if TYPE_CHECKING:
    from .training import Contestant

__all__ = ["build_parser", "main"]

PROGRAM = "contestants"

WORDS = {
    "federated": "train the whole model on every client, and average their adapters",
    "centralised": "train one model on the texts of all clients",
}


def build_parser() -> Parser:
    parser = Parser(prog=f"python -m {PROGRAM}", description="Train with LoRA, without splitting the model.")
    commands = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    for mode, words in WORDS.items():
        command = commands.add_parser(mode, help=words, description=f"{words[0].upper()}{words[1:]}.")
        of_server, of_device = known_of_server(mode), known_of_device(mode)
        add_flags(command, ServerConfig, of_server | {"run_dir"})
        add_flags(command, DeviceConfig, of_device)
        command.add_argument(
            "--data", action="append", required=True, type=Path, metavar="FILE", help="a client's texts; give it once a client"
        )
        command.add_argument("--eval-data", type=Path, metavar="FILE", help="held-out texts")
        command.add_argument("--eval-every", type=int, metavar="N", help="steps between two evaluations of them")
        command.add_argument("--token-folder", type=Path, metavar="DIR", help="where encoded texts are kept for the next run")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error with one sentence on standard error, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return run_program(f"{PROGRAM} {options.mode}", lambda: run(options), _errors_of_users, install="splitlora[server]")


def run(options: argparse.Namespace) -> None:
    from .centralised import Centralised
    from .federated import Federated
    from .training import Task, train

    given = vars(options)
    of_server, of_device = (
        {item.name: given[item.name] for item in fields(table) if item.name in given} for table in (ServerConfig, DeviceConfig)
    )
    if options.eval_every is not None and options.eval_every < 1:
        raise ConfigError(f"eval-every must be at least 1, got {options.eval_every}")
    task = Task(
        mode=options.mode,
        config=ServerConfig.from_options({**of_server, "clients": len(options.data)}),
        device=DeviceConfig(**typed_settings(DeviceConfig, of_device)),
        files=options.data,
        eval_data=options.eval_data,
        eval_every=options.eval_every,
        token_folder=options.token_folder,
    )
    model = task.model()
    contestant: Contestant
    if options.mode == "federated":
        contestant = Federated(model, task.settings, task.names)
    else:
        contestant = Centralised(model, task.settings, task.num_bytes())
    train(task, model, contestant)


def _errors_of_users() -> tuple[type[Exception], ...]:
    from edge_client import DataError, StateError
    from protocol import TrainingDiverged
    from storage import AdapterError, ModelError

    return (ServerError, ModelError, AdapterError, DataError, StateError, TrainingDiverged)
