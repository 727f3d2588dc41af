"""Runs that nobody has trained: their files, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["ABSENT", "PARTS", "evaluation", "row", "write_run"]

PARTS = ("edge_compute", "encode", "uplink", "queue", "server_compute", "downlink", "decode")
ABSENT = object()


def row(step: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: two devices, 100 bytes up and 50 down each, half a second of each part."""
    devices = changes.pop("devices", ("a", "b"))
    client = {"bytes_up": 100, "bytes_down": 50, "seconds": dict.fromkeys(PARTS, 0.5)}
    return {
        "step": step,
        "time": 1e9 + 3600 * step,  # of which no figure may depend
        "step_seconds": 2.0,
        "loss": loss,
        "labelled_tokens": 10,
        "tokens": 40,
        "deadline": 1.0,
        "codec": "float32",
        "server_compute": 0.1,
        "clients": dict.fromkeys(devices, client),
        **changes,
    }


def evaluation(step: int, client: str, loss: float, labelled_tokens: int) -> dict[str, Any]:
    return {"step": step, "time": 1e9, "client": client, "loss": loss, "labelled_tokens": labelled_tokens}


def write_run(
    folder: Path,
    rows: Sequence[dict[str, Any]] = tuple(row(step, 4 / step) for step in range(1, 5)),
    *,
    evaluations: Sequence[dict[str, Any]] = (),
    events: Sequence[dict[str, Any]] = (),
    restarts: int = 0,
    **config: Any,
) -> Path:
    """
    As a server would have.

    Args:
        rows, evaluations, events: lines of metrics.jsonl, evaluations.jsonl and events.jsonl.
        config: what run.json says of the settings; `ABSENT`: nothing.
    """
    folder.mkdir(parents=True)
    settings = {
        "model": "gpt2",
        "run_dir": str(folder),
        "port": 8765,
        "cut_layer": 3,
        "codec": "float32",
        "steps": 4,
        **config,
    }
    description: dict[str, Any] = {
        "run": folder.name,
        "restarts": restarts,
        "fingerprint": "ab" * 32,
        "dtype": "float32",
        "versions": {"splitlora": "0.1.0"},
    }
    description["config"] = {name: value for name, value in settings.items() if value is not ABSENT}
    (folder / "run.json").write_text(json.dumps(description))
    for file, lines in (("metrics", rows), ("evaluations", evaluations), ("events", events)):
        if lines:
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
