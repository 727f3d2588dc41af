"""What a sweep may set: of the server, of the devices; and what of it each way to train knows."""

from dataclasses import dataclass, fields

from ..config import ServerConfig
from ..errors import ConfigError
from ..options import option

__all__ = ["MODES", "DeviceConfig", "device_names", "known_of_device", "known_of_server"]

MODES = ("split", "federated", "centralised")

OF_ANY_TRAINING = {
    *("model", "lora_rank", "lora_alpha", "lora_dropout", "lora_rslora", "lora_targets", "init_adapter", "steps", "epochs"),
    *("lr", "lr_schedule", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "label_smoothing"),
    *("seed", "device", "dtype"),
}
"""Of the server's settings, what is not about splitting."""
OF_ANY_DATA = {"batch_size", "max_length", "long", "loss_on", "no_shuffle"}
"""The same of a device's."""


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """
    Flags of `splitlora-edge train` that a sweep may set, the same for all devices. What says where a device finds its server,
    its data and its state is the sweep's own.

    Raises:
        ConfigError: a value is out of range.
    """

    batch_size: int = option("samples in a step", 8)
    max_length: int = option("the greatest number of tokens in a sample", 512)
    long: str = option(
        "a longer sample: keep its beginning, make several of it, or leave it out", "cut", choices=("cut", "split", "skip")
    )
    loss_on: str | None = option("what is learnt of an entry", choices=("all", "completion", "assistant"))
    no_shuffle: bool = option("take the samples in the order of the file", False)
    engine: str = option(
        "what computes on devices: onnxruntime, on what the server hands over, or torch, on the server's --model",
        "auto",
        choices=("auto", "onnxruntime", "torch"),
    )
    device: str = option("where devices compute", "auto", choices=("auto", "cpu", "cuda"))
    dtype: str = option("precision of the devices' frozen weights", "auto", choices=("auto", "float32", "bfloat16"))
    in_flight: int = option("parts of a batch that may be under way at once", 2)
    cache_bytes: int | None = option("codec delta: most bytes of activations kept on a device's disk")

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 2), ("in_flight", 1), ("cache_bytes", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, got {value}")


def known_of_server(mode: str) -> set[str]:
    """The fields of `ServerConfig` on which the result of this way to train depends."""
    if mode == "split":
        return {item.name for item in fields(ServerConfig)}
    return OF_ANY_TRAINING | ({"aggregate_every"} if mode == "federated" else set())


def known_of_device(mode: str) -> set[str]:
    """The same of `DeviceConfig`."""
    return {item.name for item in fields(DeviceConfig)} if mode == "split" else OF_ANY_DATA


def device_names(number: int) -> list[str]:
    """Of the devices that train on so many files, in the files' order. A name decides the order of a device's samples."""
    return [f"device-{place}" for place in range(1, number + 1)]
