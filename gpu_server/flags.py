"""Flags of a command line, made from the fields of a table of settings."""

import argparse
import types
from collections.abc import Collection
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["add_flags"]


def add_flags(command: argparse.ArgumentParser, table: Any, names: Collection[str] | None = None) -> None:
    """
    Args:
        table: a dataclass whose fields are made by `config.option`.
        names: the fields that get a flag; None: all do. A flag that is left out does not appear among the parsed options.
    """
    kinds = get_type_hints(table)
    for item in fields(table):
        if names is not None and item.name not in names:
            continue
        flag, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
        if kinds[item.name] is bool:
            command.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        command.add_argument(
            flag,
            type=_flag_type(kinds[item.name]),
            choices=None if isinstance(item.default, tuple) else item.metadata["choices"],  # of a list each is checked later
            default=argparse.SUPPRESS,
            help=text + _default(item.default),
        )


def _flag_type(kind: Any) -> type:
    if get_origin(kind) is types.UnionType:  # X | None
        kind = get_args(kind)[0]
    return str if get_origin(kind) is tuple else kind


def _default(value: Any) -> str:
    if value is None:
        return ""
    return f" (default: {','.join(value) if isinstance(value, tuple) else value})"
