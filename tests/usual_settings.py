"""The settings of a small run, for tests that are about something else."""

from typing import Any

from protocol import RunSettings


def settings(**changes: Any) -> RunSettings:
    """Of one pass over the data of every client, in rounds of one step, unless ``changes`` say otherwise."""
    usual: dict[str, Any] = {
        "cut_layer": 1,
        "lora_rank": 2,
        "lora_alpha": 4.0,
        "lora_dropout": 0.0,
        "lora_targets": ("c_attn",),
        "clients": 2,
        "epochs": 1,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "seed": 0,
        "precision": "float32",
    }
    return RunSettings(**{**usual, **changes})
