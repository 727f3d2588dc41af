"""
Tables of settings: dataclasses whose fields are options. Values come from flags, from a TOML file or from a caller. There
"cut-layer" and "cut_layer" are one setting.
"""

import difflib
import functools
import types
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from terminal import user_path

from .errors import ConfigError

__all__ = [
    "flag_name",
    "in_one_spelling",
    "option",
    "options_from_toml",
    "toml_table",
    "typed",
    "typed_settings",
    "typed_value",
]


def option(help: str, default: Any = None, *, choices: tuple[str, ...] | None = None, required: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "required": required})


def flag_name(name: str) -> str:
    """Of a setting, without the dashes before it."""
    return name.replace("_", "-")


def typed_settings(table: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    The values in the types of a dataclass' fields, each made by `option`.

    Raises:
        ConfigError: as `typed_value`, or a required value is missing.
    """
    values = {name: typed_value(table, name, value) for name, value in options.items()}
    for item in fields(table):
        if item.metadata["required"] and item.name not in options:
            raise ConfigError(f"{flag_name(item.name)} is missing: {item.metadata['help']}")
    return values


def typed_value(table: Any, name: str, value: Any) -> Any:
    """
    The same of one value.

    Raises:
        ConfigError: the name is unknown (the nearest known one is named), or the value of another type.
    """
    known = {item.name: item for item in fields(table)}
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown setting {name!r}; the nearest known one is {flag_name(nearest)!r}")
    return typed(name, value, _types(table)[name], known[name].metadata)


@functools.cache
def _types(table: Any) -> dict[str, Any]:
    """By field; they are evaluated once, and not at each of a server's settings."""
    return get_type_hints(table)


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def typed(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """``value``, which came from a flag, TOML or a caller, in the type of its field."""
    if get_origin(kind) is types.UnionType:  # X | None
        if value is None:
            return None
        kind = get_args(kind)[0]
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts):
            names = tuple(part.strip() for part in parts)
            _check_choice(name, names, metadata["choices"])
            return names
    elif kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    elif type(value) is kind:
        if not (name == "dtype" and value == "float64"):
            _check_choice(name, (value,), metadata["choices"])
        return value
    raise ConfigError(f"{flag_name(name)} must be {KINDS.get(kind, 'a list of names')}, got {value!r}")


def _check_choice(name: str, values: tuple[Any, ...], choices: tuple[str, ...] | None) -> None:
    for value in values:
        if choices and value not in choices:
            raise ConfigError(f"{flag_name(name)} must be one of {', '.join(choices)}; got {value!r}")


def options_from_toml(path: Path) -> dict[str, Any]:
    """
    The settings of a TOML file, under the fields' names.

    Raises:
        ConfigError: the file cannot be read, or says a setting twice, in both spellings.
    """
    return in_one_spelling(path, toml_table(path))


def toml_table(path: Path) -> dict[str, Any]:
    """
    What a TOML file holds.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        # Some editors begin a file with a byte order mark.
        return dict(tomllib.loads(user_path(path).read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, and brackets without end
        raise ConfigError(f"{path} is not TOML: {error}") from None


def in_one_spelling(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    """
    The table with "cut_layer" for "cut-layer", which are the same.

    Raises:
        ConfigError: it says a setting twice, in both spellings.
    """
    for name in table:
        if "_" in name and flag_name(name) in table:
            raise ConfigError(f"{path} gives both {name} and {flag_name(name)}, which are the same setting; delete one of them")
    return {name.replace("-", "_"): value for name, value in table.items()}
