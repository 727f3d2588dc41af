"""Arguments as a program gives them: held to their types, as a command line holds its flags to theirs, and to their bounds."""

from collections.abc import Sequence
from numbers import Integral, Real

from storage import shown

from .text_file import DataError

__all__ = ["number", "one_of", "switch", "text", "whole_number"]

LARGEST = 2**63 - 1
"""Messages and files take no larger number."""


def whole_number(what: str, given: object, least: int, unit: str = "") -> int:
    """As Python's own, since a message takes no other, such as numpy's."""
    if not isinstance(given, Integral):
        raise DataError(f"{what} must be a whole number, got {given!r}")
    if not least <= int(given) <= LARGEST:
        bound = f"at least {least}{unit}" if int(given) < least else f"at most {LARGEST}{unit}"
        raise DataError(f"{what} must be {bound}, got {given}")
    return int(given)


def number(what: str, given: object, least: float) -> float:
    if not isinstance(given, Real):
        raise DataError(f"{what} must be a number, got {given!r}")
    if not (value := float(given)) >= least:  # NaN is not
        raise DataError(f"{what} must be at least {least:g}, got {given}")
    return value


def text(what: str, given: object) -> str:
    if not isinstance(given, str):
        raise DataError(f"{what} must be a text, got {shown(given)}")
    return given


def switch(what: str, given: object) -> bool:
    if not isinstance(given, bool):
        raise DataError(f"{what} must be True or False, got {shown(given)}")
    return given


def one_of(what: str, given: object, known: Sequence[str]) -> str:
    if not isinstance(given, str) or given not in known:
        raise DataError(f"{what} must be {', '.join(known[:-1])} or {known[-1]}, got {given!r}")
    return given
