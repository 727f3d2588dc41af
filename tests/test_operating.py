"""What the documents tell people to type can be typed, and the services start them as they can be started."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

import edge_client.cli
import gpu_server.cli
from gpu_server import ServerConfig
from gpu_server.options import options_from_toml

DOCUMENT = (REPOSITORY / "docs/operating.md").read_text(encoding="utf-8")
SERVICES = REPOSITORY / "services"
PARSERS = {"splitlora-edge": edge_client.cli.build_parser(), "splitlora-server": gpu_server.cli.build_parser()}


def blocks(language: str) -> list[str]:
    return [str(found) for found in re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.S)]


def test_settings_of_the_service_are_settings(tmp_path: Path) -> None:
    (settings,) = blocks("toml")
    (tmp_path / "run.toml").write_text(settings)
    told = ServerConfig.from_options(options_from_toml(tmp_path / "run.toml"))
    assert (told.clients, told.epochs, told.run_dir) == (3, 10, "runs/kitchens")


@pytest.mark.parametrize(
    ("document", "program", "count"),
    [
        ("operating", "splitlora-server", 9),
        ("devices", "splitlora-edge", 5),
        ("training", "splitlora-edge", 3),
        ("privacy", "splitlora-edge", 2),
    ],
)
def test_commands_are_commands(document: str, program: str, count: int) -> None:
    text = (REPOSITORY / f"docs/{document}.md").read_text(encoding="utf-8")
    commands = re.findall(rf"^ {{4}}{program} (.*)$", text.replace("\\\n", ""), re.M)
    assert len(commands) == count
    for command in commands:
        PARSERS[program].parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("program", PARSERS)
def test_service_starts_its_program_as_it_can_be_started(program: str) -> None:
    unit = (SERVICES / f"{program}@.service").read_text(encoding="utf-8")
    (start,) = re.findall(rf"^ExecStart=/srv/splitlora/.venv/bin/{program} (.*)$", unit, re.M)
    PARSERS[program].parse_args(shlex.split(start))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("program", PARSERS)
def test_systemd_knows_every_line_of_a_service(program: str, tmp_path: Path) -> None:
    unit = (SERVICES / f"{program}@.service").read_text(encoding="utf-8")
    # Neither the program nor its user need be on this machine.
    unit = unit.replace(f"/srv/splitlora/.venv/bin/{program}", sys.executable).replace("User=splitlora\n", "")
    (tmp_path / f"{program}@.service").write_text(unit)
    words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / f"{program}@.service")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("program", PARSERS)
def test_service_that_was_killed_is_started_again_at_once_and_one_that_has_said_why_in_a_minute(
    program: str, tmp_path: Path
) -> None:
    unit = (SERVICES / f"{program}@.service").read_text(encoding="utf-8")
    assert re.findall(r"^Restart(?:Sec)?=(.*)$", unit, re.M) == ["on-failure", "1"]
    (script,) = re.findall(r"^ExecStopPost=/bin/sh -c '(.*)'$", unit, re.M)
    (tmp_path / "sleep").write_text("#!/bin/sh\necho $1\n")
    (tmp_path / "sleep").chmod(0o700)
    for result, pause in {"success": "", "signal": "", "oom-kill": "", "exit-code": "60\n"}.items():
        environment = {"SERVICE_RESULT": result, "PATH": str(tmp_path)}
        words = ["/bin/sh", "-c", script.replace("$$", "$")]  # as systemd reads it
        assert subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout == pause


@pytest.mark.parametrize(("image", "program"), [("device", "splitlora-edge"), ("server", "splitlora-server")])
def test_image_starts_its_program_as_it_can_be_started(image: str, program: str) -> None:
    recipe = (SERVICES / f"Containerfile.{image}").read_text(encoding="utf-8")
    assert f'ENTRYPOINT ["/opt/splitlora/bin/{program}"]' in recipe
    (run,) = re.findall(rf"podman run --rm .* splitlora-{image} (.*)$", recipe.replace("\\\n#", ""), re.M)
    PARSERS[program].parse_args(shlex.split(run))


def test_every_command_among_those_of_others_is_one() -> None:
    lines = "".join(blocks("sh") + blocks("ini"))
    commands = re.findall(r"/bin/(?:splitlora-server|torchrun .* -m gpu_server) (\S.*)$", lines, re.M)
    assert len(commands) == 3
    for command in commands:
        PARSERS["splitlora-server"].parse_args(shlex.split(command))


def test_every_flag_that_is_named_is_one() -> None:
    commands = [parser._subparsers._group_actions[0].choices for parser in PARSERS.values()]  # type: ignore[union-attr]
    known = {flag for each in commands for command in each.values() for flag in command._option_string_actions}  # type: ignore[union-attr]
    ours = re.sub(r"```sh\n.*?```", "", DOCUMENT, flags=re.S)
    for others in ("certbot --reuse-key", "tensorboard --logdir", "torchrun --master-port", "torchrun --max-restarts"):
        ours = ours.replace(others, "")
    ours = re.sub(r"/bin/torchrun .* -m gpu_server", "", ours)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


def test_log_that_is_rotated_is_where_the_drop_in_writes_it() -> None:
    (written,) = re.findall(r"StandardError=append:(\S+)", "".join(blocks("ini")))
    (rotated,) = re.findall(r"^(\S+) \{$", (SERVICES / "logrotate.conf").read_text(encoding="utf-8"), re.M)
    assert rotated == written.replace("%i", "*")
    assert "copytruncate" in (SERVICES / "logrotate.conf").read_text(encoding="utf-8")  # systemd keeps the file open
