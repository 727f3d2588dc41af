"""What distinguishes runs: the settings that differ, and names that are made of them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from terminal import in_words, plain

from ..config import OF_THE_RUN, ServerConfig
from .measured_run import MeasuredRun

__all__ = ["NONE", "Settings", "folder_names", "labels_of", "settings_of", "split_settings"]

LONGEST_LABEL = 28
NONE = "none"

OTHERS = {"model", "init_adapter", "device", "quorum", "step_deadline"}
"""Settings that may change what comes of a run or how long it takes, beside `OF_THE_RUN`. All others say where it is served."""
OF_SERVING = {item.name for item in fields(ServerConfig)} - OF_THE_RUN - OTHERS

Settings: TypeAlias = Mapping[str, str]


def settings_of(run: MeasuredRun) -> Settings:
    """
    What a run was made with, by the setting's name: all of the server's configuration but what only says where the run is
    served; what a contestant has written that is no server; and what devices have told.
    """
    config = {name: value for name, value in run.description.config.items() if name not in OF_SERVING}
    told = {"mode": "split", **config}
    if run.description.device:
        told["device"] = run.description.device  # as it was chosen
    for name in ("batch_size", "samples"):
        values = [device[name] for device in run.devices.values() if name in device]
        if values and len(values) == len(run.devices):
            told[name] = values[0] if len(set(values)) == 1 else values
    told["base_model"] = run.description.fingerprint[:12]
    if "splitlora" in run.description.versions:
        told["version"] = run.description.versions["splitlora"]
    return {_in_words(name): _shown(value) for name, value in told.items()}


def split_settings(settings: Sequence[Settings]) -> tuple[list[str], list[str]]:
    """
    The names of those that differ between runs that have them, and of all others. A setting that some runs do not have, such as
    the cut layer where nothing is split, does not differ by that.
    """
    names = list(dict.fromkeys(name for each in settings for name in each))
    differ = [name for name in names if len({each[name] for each in settings if name in each}) > 1]
    return differ, [name for name in names if name not in differ]


def labels_of(runs: Sequence[MeasuredRun], settings: Sequence[Settings]) -> list[str]:
    """A name for every run: what differs, where that is short and tells all of them apart, else the folder's name."""
    differ, _ = split_settings(settings)
    differ = [name for name in differ if name not in NOT_IN_LABELS]
    labels = [", ".join(_short(name, each[name]) for name in differ if name in each) for each in settings]
    folders = folder_names([run.path for run in runs])
    is_short = max(map(len, labels)) <= max(LONGEST_LABEL, *map(len, folders))
    return labels if is_short and all(labels) and len(set(labels)) == len(labels) else folders


def folder_names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, each with as many of the folders around it as it takes to tell all apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    lengths = [1] * len(paths)
    while True:
        names = ["/".join(each[-length:]) for each, length in zip(parts, lengths, strict=True)]
        often = {name for name, number in Counter(names).items() if number > 1}
        longer = [
            length + 1 if name in often and length < len(each) else length
            for name, each, length in zip(names, parts, lengths, strict=True)
        ]
        if longer == lengths:
            return [plain(name) for name in names]
        lengths = longer


NOT_IN_LABELS = {"base model", "version", "samples"}
"""They mostly differ because something else does."""

ALONE = {"codec", "mode"}
"""Settings whose values say what they are."""
SHORTER = {
    "cut layer": "cut",
    "lora rank": "rank",
    "lora alpha": "alpha",
    "lora dropout": "dropout",
    "aggregate every": "aggregate",
    "batch size": "batch",
}
AFTER = {"clients": "devices", "steps": "steps", "epochs": "epochs"}


def _short(name: str, value: str) -> str:
    if name in ALONE:
        return value
    if name in AFTER:
        return f"{value} {AFTER[name]}"
    return f"{SHORTER.get(name, name)} {value}"


def _in_words(name: str) -> str:
    return plain(in_words(name))


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"
    return plain(str(value))
