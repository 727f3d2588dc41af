"""docs/operate.md says what the server does."""

import re
import shlex
from pathlib import Path

import edge_client.cli
import gpu_server.cli
from gpu_server import ServerConfig
from gpu_server.config import options_from_toml

DOCUMENT = (Path(__file__).parent.parent / "docs/operate.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)
    return str(found)


def test_settings_of_the_service_are_settings(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(block("toml"))
    told = ServerConfig.from_options(options_from_toml(tmp_path / "run.toml"))
    assert (told.clients, told.epochs, told.run_dir) == (3, 10, "runs/kitchens")


def test_commands_are_commands() -> None:
    (service,) = re.findall(r"^ExecStart=\S+/(splitlora-server .*)$", block("ini"), re.M)
    commands = [service, *re.findall(r"^ {4}(splitlora-server .*)$", DOCUMENT, re.M)]
    assert len(commands) == 5
    for command in commands:
        _, *words = shlex.split(command)
        gpu_server.cli.build_parser().parse_args(words)


def test_every_flag_that_is_named_is_one() -> None:
    known = {f"--{name.replace('_', '-')}" for name in ServerConfig.__dataclass_fields__} | {"--config", "--help", "--address"}
    commands = edge_client.cli.build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, index]
    known |= {flag for name in ("train", "ping") for flag in commands[name]._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCUMENT)) - {"--now"}  # systemctl's
    assert named <= known
