"""How a run stands, for whoever asks in a terminal: the overview as a table that fits it."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from terminal import amount, duration, plain

__all__ = ["MOST_DEVICES", "as_table"]

Figures = Mapping[str, Any]
"""See `Overview.as_json`."""

MOST_DEVICES = 100
"""That the table lists."""
IN_STATE = {"connected": "connected", "late": "late", "lost": "away", "left": "left"}
NARROWEST_NAME = 16
"""Columns that a device's name has at least; of longer names the middle is left out."""


def as_table(run: Figures, columns: int) -> str:
    """
    Args:
        run: what `Overview.as_json` says.
        columns: of the terminal. Figures of less weight are left out where it is narrow.
    """
    lines = [line for text in _sentences(run) for line in textwrap.wrap(text, max(20, columns), subsequent_indent="  ")]
    if run["devices"]:
        lines += ["", *_table_of_devices(run, columns)]
    if run["more_devices"]:
        lines += ["", *textwrap.wrap(_of_all_devices(run), max(20, columns))]
    return "\n".join(map(plain, lines))


def _sentences(run: Figures) -> list[str]:
    now = run["now"]
    said = [f"run {run['run']}: {run['sentence']}"]
    held_out, checkpoint, bottleneck = run["held_out"], run["last_checkpoint"], run["bottleneck"]
    figures = [
        None if run["loss"] is None else f"loss {run['loss']:.3f}",
        None
        if held_out is None or held_out["perplexity"] is None
        else f"held-out perplexity {held_out['perplexity']:,.1f} (step {held_out['step']:,})",
        None if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f} tokens/s",
        None if run["bytes_per_second"] is None else f"{amount(run['bytes_per_second'])}/s",
        f"{run['codec']} activations" if run["codec"] else None,
    ]
    said.append(", ".join(filter(None, figures)))
    if checkpoint is not None and run["state"] != "finished":
        said.append(f"checkpoint of step {checkpoint['step']:,}, {_ago(now - checkpoint['time'])}")
    if run["restarts"]:
        said.append(f"restarted {run['restarts']:,} times" if run["restarts"] > 1 else "restarted once")
    if bottleneck is not None:
        said.append(": ".join(filter(None, [bottleneck["sentence"], bottleneck["advice"]])))
    return [text for text in said if text]


def _of_all_devices(run: Figures) -> str:
    """Where the table has only some."""
    number = len(run["devices"]) + run["more_devices"]
    states = ", ".join(f"{run['device_states'][state]:,} {words}" for state, words in IN_STATE.items())
    return f"of {number:,} devices ({states}) those that are late, away or slow are listed first; --json lists all"


def _table_of_devices(run: Figures, columns: int) -> list[str]:
    now = run["now"]
    cells: list[tuple[str, Callable[[Figures], str]]] = [
        ("device", lambda device: str(device["name"])),
        ("state", lambda device: "done" if run["state"] == "finished" else _state(device)),
        ("last heard", lambda device: _ago(now - device["last_heard"]) if device["last_heard"] else "never"),
        ("missed", lambda device: "" if device["missed_steps"] is None else f"{device['missed_steps']:,}"),
        ("slowness", lambda device: "" if device["slowness"] is None else f"{device['slowness']:.1f} x"),
        ("tokens/s", lambda device: "" if device["tokens_per_second"] is None else f"{device['tokens_per_second']:,.0f}"),
        ("sent", lambda device: "" if device["bytes_up"] is None else amount(device["bytes_up"])),
        ("received", lambda device: "" if device["bytes_down"] is None else amount(device["bytes_down"])),
    ]
    rows = [[title for title, _ in cells], *([cell(device) for _, cell in cells] for device in run["devices"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(cells))]
    narrowest = min(NARROWEST_NAME, widths[0])
    while len(widths) > 2 and _width([narrowest, *widths[1:]]) > columns:
        widths.pop()
    widths[0] = max(narrowest, min(widths[0], columns - _width([0, *widths[1:]])))
    return [_line(row, widths) for row in rows]


def _width(widths: list[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _line(row: list[str], widths: list[int]) -> str:
    """Names and states begin below each other, figures end so."""
    name, state, *figures = row[: len(widths)]
    if len(name) > widths[0]:
        behind = (widths[0] - 1) // 2  # names of devices often differ at their ends
        name = f"{name[: widths[0] - 1 - behind]}…{name[-behind:]}"
    words = [name.ljust(widths[0]), state.ljust(widths[1])]
    return "  ".join([*words, *(figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True))]).rstrip()


def _state(device: Figures) -> str:
    if device["state"] == "late":
        return f"{duration(device['late_seconds'])} late"
    return str(IN_STATE.get(device["state"], device["state"]))


def _ago(seconds: float) -> str:
    return f"{duration(max(0.0, seconds))} ago"
