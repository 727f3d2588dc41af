"""From a sweep's file to its cells: every combination of the values that are given, and of each mode only what it knows."""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from terminal import listed, user_path

from ..config import ServerConfig
from ..errors import ConfigError
from ..options import flag_name, in_one_spelling, toml_table, typed_value
from .settings import MODES, DeviceConfig, known_of_device, known_of_server

__all__ = ["Cell", "Sweep", "read_sweep"]

OWN_FOLDER = "every cell has a folder of its own in that of the sweep"
ONLY_HERE = "only devices of this machine take part"
OF_THE_SWEEP = {
    **dict.fromkeys(("run_dir", "resume", "resume_or_start"), OWN_FOLDER),
    **dict.fromkeys(("host", "port", "insecure", "tls_cert", "tls_key", "clients_file"), ONLY_HERE),
    "clients": "there is a device for every file in data",
}
"""Settings of a server that are no choice in a sweep, and why."""
TABLES: dict[str, tuple[Any, Any]] = {"server": (ServerConfig, known_of_server), "device": (DeviceConfig, known_of_device)}
KEYS = ("mode", "data", "eval_data", "eval_every", "output", *TABLES)
LONGEST_NAME = 120
DIGITS = 8
"""Of the digest in a cell's name."""

Axis = tuple[str, str, list[Any]]
"""Table, name and values of a setting; of the mode, the table is empty."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """One combination of values: one run."""

    mode: str
    server: Mapping[str, Any]
    """Of the settings that are given, those that the mode knows."""
    device: Mapping[str, Any]
    words: str
    """The values in which it differs from other cells."""
    digest: str
    """Of everything on which its result depends."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.words[:LONGEST_NAME]}-{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's file asks for."""

    data: Sequence[Path]
    """A device's texts each."""
    eval_data: Path | None
    eval_every: int | None
    output: Path | None
    cells: Sequence[Cell]
    """In the order of the file: the last setting that has several values changes fastest."""


def read_sweep(path: Path) -> Sweep:
    """
    Raises:
        ConfigError: the file cannot be read, a key or a value in it is wrong, or a file that it names is not there.
    """
    table = in_one_spelling(path, toml_table(path))
    try:
        return _sweep(path, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _sweep(path: Path, table: Mapping[str, Any]) -> Sweep:
    for key in table:
        if key not in KEYS:
            raise ConfigError(_unknown(key))
    data = _texts("data", table.get("data", []))
    if not data:
        raise ConfigError('data names no file; give one for every device, such as data = ["a.jsonl", "b.jsonl"]')
    eval_data, eval_every = table.get("eval_data"), table.get("eval_every")
    if eval_data is not None:
        (eval_data,) = _texts("eval-data", [eval_data])
    if eval_every is not None and (type(eval_every) is not int or eval_every < 1):
        raise ConfigError(f"eval-every must be a whole number from 1 on, got {eval_every!r}")
    if eval_every is not None and eval_data is None:
        raise ConfigError("eval-every needs eval-data, the file of held-out texts")
    output = table.get("output")
    sweep = Sweep(
        data=[user_path(file) for file in data],
        eval_data=None if eval_data is None else user_path(eval_data),
        eval_every=eval_every,
        output=None if output is None else user_path(_texts("output", [output])[0]),
        cells=[],
    )
    return replace(sweep, cells=_cells(_axes(path, table), sweep))


def _unknown(key: str) -> str:
    homes = [name for name, (kind, _) in TABLES.items() if key in {item.name for item in fields(kind)}]
    if homes:
        return f"{flag_name(key)} belongs below [{listed(homes).replace(' and ', '] or [')}]"
    nearest = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
    return f"unknown key {key!r}; the nearest known one is {flag_name(nearest)!r}"


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(part, str) and part for part in value):
        raise ConfigError(f"{name} must be {'a list of texts' if name == 'data' else 'a text'}, got {value!r}")
    return value


def _axes(path: Path, table: Mapping[str, Any]) -> list[Axis]:
    """Every setting that is given, with its values in their types."""
    modes = _values("mode", table.get("mode", "split"))
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"mode must be among {', '.join(MODES)}; got {mode!r}")
    axes: list[Axis] = [("", "mode", modes)]
    for home, (kind, known) in TABLES.items():
        given = table.get(home, {})
        if not isinstance(given, dict):
            raise ConfigError(f"{home} must be a table, [{home}], got {given!r}")
        for name, values in in_one_spelling(path, given).items():
            if home == "server" and name in OF_THE_SWEEP:
                raise ConfigError(f"{flag_name(name)} is the sweep's own: {OF_THE_SWEEP[name]}; delete it")
            typed = [typed_value(kind, name, value) for value in _values(flag_name(name), values)]
            if "float64" in typed:
                raise ConfigError(f"{flag_name(name)} float64 is for programs in Python; a sweep's are float32 or bfloat16")
            if not any(name in known(mode) for mode in modes):
                raise ConfigError(f"{flag_name(name)} means nothing to mode {listed(modes)}; delete it, or add a mode")
            axes.append((home, name, typed))
    for _, name, values in axes:
        for number, value in enumerate(values):
            if value in values[:number]:
                raise ConfigError(f"{flag_name(name)} has the value {_shown(value)} twice: two cells would have one name")
    return axes


def _values(name: str, given: Any) -> list[Any]:
    """A list is tried value by value."""
    values = given if isinstance(given, list) else [given]
    if not values:
        raise ConfigError(f"{name} has no value: the grid is empty; give one or several")
    return values


def _cells(axes: Sequence[Axis], sweep: Sweep) -> list[Cell]:
    content = {
        "data": [_digest_of(file) for file in sweep.data],
        "held out": None if sweep.eval_data is None else [_digest_of(sweep.eval_data), sweep.eval_every],
    }
    cells: dict[str, Cell] = {}
    for values in itertools.product(*(values for _, _, values in axes)):
        mode = str(values[0])
        chosen = list(zip(axes, values, strict=True))[1:]
        # What a mode does not know changes nothing for it: all combinations that differ in nothing else are one cell.
        settings = {
            home: {name: value for (place, name, _), value in chosen if place == home and name in known(mode)}
            for home, (_, known) in TABLES.items()
        }
        words = [
            mode,
            *(
                f"{flag_name(name)}-{_shown(value)}"
                for (home, name, several), value in chosen
                if len(several) > 1 and name in settings[home]
            ),
        ]
        cell = Cell(
            mode=mode,
            **settings,
            words=re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)),
            digest=_digest({"mode": mode, **{home: _without_defaults(home, settings[home]) for home in TABLES}, **content}),
        )
        _check(cell, len(sweep.data))
        before = cells.setdefault(cell.name, cell)
        if (before.server, before.device) != (cell.server, cell.device):
            raise ConfigError(f"two cells would have the name {cell.name}; change any setting a little")
    return list(cells.values())


def _check(cell: Cell, clients: int) -> None:
    """
    Raises:
        ConfigError: its values do not go together.
    """
    try:
        ServerConfig.from_options({**cell.server, "run_dir": cell.name, "clients": clients})
        DeviceConfig(**cell.device)
    except ConfigError as error:
        raise ConfigError(f"{error} (cell {cell.words})") from None


def _without_defaults(home: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """So that a cell is the same whether a default is written down or not."""
    defaults = {item.name: item.default for item in fields(TABLES[home][0])}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _digest_of(file: Path) -> str:
    try:
        with file.open("rb") as content:
            digest = hashlib.sha256()
            while piece := content.read(2**20):
                digest.update(piece)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
