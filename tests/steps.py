"""A finished step as tests need one."""

from typing import Any

from gpu_server.federation import StepRecord
from protocol import Seconds

__all__ = ["a_step"]


def a_step(number: int, **more: Any) -> StepRecord:
    """Of two devices, with something of everything; ``more`` replaces some of it."""
    usual: dict[str, Any] = {
        "loss": 2.5,
        "labelled_tokens": 12,
        "tokens": 30,
        "seconds": {"a": Seconds(edge_compute=0.25, queue=0.5), "b": Seconds(uplink=0.5)},
        "deadline": 60.0,
        "codec": "int8",
        "server_compute": 0.125,
        "bytes_up": {"a": 100, "b": 200},
        "bytes_down": {"a": 300, "b": 400},
        "time": 1e9 + number,
        "step_seconds": 0.5,
        "learning_rate": 0.25,
        "gradient_norm": 2.0,
        "losses": {"a": 1.0, "b": 4.0},
        "labelled": {"a": 6, "b": 6},
        "samples": {"a": 1, "b": 1},
        "tokens_of": {"a": 10, "b": 20},
    }
    return StepRecord(number=number, **{**usual, **more})
