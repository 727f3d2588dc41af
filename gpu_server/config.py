"""All settings of a run in one table, from which the flags, the keys of --config and those of run.json are made."""

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from protocol import DELTA, EXACT, RunSettings, gradient_codec
from protocol.settings import CODEC_NAMES, DITHERED, FLOAT32, LARGEST_COUNT, LR_SCHEDULES, codec_name, codec_named
from terminal import user_text_path

from .errors import ConfigError
from .options import flag_name, option, typed, typed_settings

if TYPE_CHECKING:  # --help loads no torch
    from split_model import ModelConfig

__all__ = ["OF_THE_RUN", "ServerConfig", "described", "is_loopback", "resumed", "with_whole_paths"]

DERIVED = {"precision", "activation_codec", "gradient_codec", "adapter_codec"}
OF_THE_RUN = {item.name for item in fields(RunSettings)} - DERIVED | {
    "lora_rslora",
    "init_adapter",
    "dtype",
    "residual",
    "codec",
    "adapter_codec",
    "edge_weights",
    "early_stopping_threshold",
}
"""A run that goes on may do so elsewhere, and with other limits; what it computes stays what it was."""

SINCE_BEFORE = {"adapter_codec": FLOAT32}
"""What runs have been of whom an earlier version did not record it, where that is not what runs are by default since."""
ALL_LINEAR = ("all-linear",)
"""PEFT's word for all linear layers of a block; which these are, the model says."""
PATHS = {"model", "run_dir", "init_adapter", "tls_cert", "tls_key", "next_tls_cert", "clients_file"}
COUNTS = ("checkpoint_every", "quorum", "max_batch_tokens", "max_connections", "max_strangers", "max_pages", "max_queue")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """
    The settings of one run.

    Raises:
        ConfigError: a value is out of range, or both or neither of ``steps`` and ``epochs`` are given.
    """

    model: str = option("base model: a Hugging Face folder, or a hub name such as gpt2", required=True)
    run_dir: str = option("folder for the run's adapter, metrics and checkpoints", required=True)
    cut_layer: int = option("number of blocks that run on the devices", 3)
    lora_rank: int = option("rank of the LoRA adapters", 8)
    lora_alpha: float = option("LoRA's alpha: an adapter's update is scaled by alpha / rank", 32.0)
    lora_dropout: float = option("probability of dropping an input of the adapters", 0.0)
    lora_rslora: bool = option("scale by alpha / sqrt(rank) instead, so that a high rank learns as fast as a low one", False)
    lora_targets: tuple[str, ...] | None = option(
        "adapted layers, separated by commas, such as q_proj,v_proj; or all-linear, for all linear layers of a block (default: "
        "those that PEFT adapts of such a model)"
    )
    clients: int = option("number of devices to wait for before training starts", 1)
    steps: int | None = option("length of the run in steps")
    epochs: int | None = option("length of the run in passes of every device over its data")
    micro_batches: int | None = option(
        "parts of a batch: while one is on its way, a device computes the next (default: 2; 1 where only this machine reaches "
        "the server, since both sides then share its cores)"
    )
    aggregate_every: int = option("steps in a round: with 1, gradients are summed; with more, adapters are averaged", 1)
    lr: float = option("peak learning rate of AdamW", 1e-3)
    lr_schedule: str = option(
        "learning rate after the warm-up: constant, or down to 0, linear or as half a cosine", "constant", choices=LR_SCHEDULES
    )
    warmup_steps: int = option("steps in which the learning rate rises from 0", 0)
    warmup_ratio: float = option("the same as a part of the run's steps, such as 0.03; rounded up", 0.0)
    weight_decay: float = option("weight decay of AdamW", 0.01)
    max_grad_norm: float = option(
        "largest norm of the gradient by the adapters of devices and server together; a longer one is shortened before the "
        "optimiser's step, which then waits for the devices' part of it; needs --aggregate-every 1; 0: none is",
        0.0,
    )
    label_smoothing: float = option(
        "spread this part of each label's weight over the whole vocabulary, such as 0.1; the losses of steps are then those of "
        "smoothed labels, held-out texts are measured without",
        0.0,
    )
    early_stopping_patience: int = option(
        "end the run when so many evaluations of the devices' held-out texts in a row were not better than those before; needs "
        "devices with --eval-data and --eval-every; 0: it does not end early",
        0,
    )
    early_stopping_threshold: float = option("nats/token by which a held-out loss must be lower to count as better", 0.0)
    final_adapter: str = option(
        "the adapter with which the run ends: the last, or the best, under which the held-out texts lost least",
        "last",
        choices=("last", "best"),
    )
    seed: int = option("random seed", 0)
    init_adapter: str | None = option("PEFT folder of an adapter to start from")
    device: str = option("where the server computes", "auto", choices=("auto", "cpu", "cuda"))
    shard: bool = option(
        "keep only a part of the frozen weights on each rank, for a model that is too large for one; needs torchrun", False
    )
    dtype: str = option("precision of the server's frozen weights", "auto", choices=("auto", "float32", "bfloat16"))
    residual: str = option(
        "precision of what flows through the server's blocks; bfloat16 needs --dtype bfloat16, takes a third less memory in a "
        "step, and changes the loss a little more",
        "float32",
        choices=("float32", "bfloat16"),
    )
    edge_weights: str = option(
        "precision of the frozen weights that devices without a model get: float32 is exact, float16 takes half of the bytes, "
        "int8 a quarter, and both change the loss a little",
        "float32",
        choices=("float32", "float16", "int8"),  # storage.EDGE_WEIGHTS, whose import would be slow
    )
    codec: str = option(
        "how activations and their gradients travel: float32 is exact, auto is int8, or int4 where links are slow",
        FLOAT32,
        choices=("auto", *CODEC_NAMES, DELTA),
    )
    adapter_codec: str | None = option(
        "how LoRA matrices travel between devices and server: float32 is exact, dithered takes a tenth of its bytes or less "
        "(default: dithered; float32 with --codec float32)",
        choices=(FLOAT32, DITHERED),
    )
    edge_adapter: str = option(
        "by what the devices' part learns: lora; or none, it learns nothing: devices compute no gradient, no adapter crosses "
        "the link, and a sample's activations cross only once",
        "lora",
        choices=("lora", "none"),
    )
    codec_tolerance: float = option("nats/token by which a codec may change the loss before a richer one is used", 0.01)
    check_codec_every: int | None = option(
        "steps between two checks of that; 0 never checks (default: 100; 0 where devices keep the labels, for the server then "
        "computes no loss, and with --edge-adapter none, with which a sample crosses once)"
    )
    cache_bytes: int = option(
        "bytes of a device's samples that are kept on the disk: by both sides for codec delta, by the server for "
        "--edge-adapter none",
        2**30,
    )
    labels: str = option(
        "who has the tokens to predict: the server, or each device, which then computes the loss itself and sends no labels",
        "server",
        choices=("server", "device"),
    )
    label_rows: str = option(
        "where devices keep the labels, whether the server knows which rows have one; hidden sends all rows alike, which costs "
        "bytes, and needs --gradient-noise",
        "shown",
        choices=("shown", "hidden"),
    )
    activation_noise: float = option(
        "standard deviation of the Gaussian noise that devices add to every element of their activations, in multiples of "
        "--activation-clip; 0: none",
        0.0,
    )
    activation_clip: float = option(
        "largest distance of a row of activations from a public centre (Euclidean norm); longer ones are shortened; 0: none is",
        0.0,
    )
    gradient_noise: float = option(
        "the same for gradients that devices send where they keep the labels, in multiples of --gradient-clip; 0: none", 0.0
    )
    gradient_clip: float = option("largest norm of a row of such a gradient; longer ones are shortened; 0: none is", 0.0)
    noise_delta: float = option(
        "delta of the (epsilon, delta) that the noise is reported to be worth; below 1 / samples of every device", 1e-6
    )
    host: str = option("address to listen on", "127.0.0.1")
    port: int = option("port to listen on; 0 takes a free one", 8765)
    resume: bool = option("go on with the run in --run-dir; its settings need not be given again", False)
    resume_or_start: bool = option("go on with the run in --run-dir if there is one, else start it: for services", False)
    checkpoint_every: int | None = option(
        "rounds between two checkpoints; if not given, as many as keep their writing below 1 MB/s and a hundredth of the time, "
        "with codec delta 10"
    )
    quorum: int | None = option("devices with which a step goes on after its deadline; all, if not given")
    step_deadline: float | None = option("seconds until a step goes on with a quorum; measured, if not given")
    linger: float = option("grace period: seconds a finished run waits for devices that have not fetched the adapter", 60.0)
    tls_cert: str | None = option("certificate of the server, PEM; it makes its own, if not given")
    tls_key: str | None = option("private key of --tls-cert, PEM")
    next_tls_cert: str | None = option("certificate, PEM, of the server's next key, of which enrolled devices are told")
    insecure: bool = option("listen without encryption on an address that other machines reach", False)
    page: str = option(
        "whether a browser sees the run, and Prometheus its metrics: with auto, where only this machine reaches the server, "
        "or with --page-token",
        "auto",
        choices=("auto", "on", "off"),
    )
    page_token: bool = option(
        "show the page only to who has its token, which is part of the URL that is printed; needed where other machines reach "
        "the server",
        False,
    )
    clients_file: str | None = option("file of enrolled devices; RUN_DIR/clients.json, if not given")
    max_batch_tokens: int = option("most tokens of one device in one step", 65536)
    max_connections: int = option("most connections at a time", 256)
    max_strangers: int = option("most connections at a time that have not said who they are", 32)
    max_pages: int = option("most pages that show the run at a time, in browsers; they come on top of max-connections", 128)
    handshake_seconds: float = option("seconds for each of TLS, HTTP and the first message", 10.0)
    max_messages_per_second: float = option("messages of one device in a second; more have to wait", 1000.0)
    report_to: tuple[str, ...] = option(
        "who else is told of every step: tensorboard, whose files are then in RUN_DIR/tensorboard; none",
        (),
        choices=("tensorboard", "none"),
    )
    max_queue: int = option("messages of one device that are held before its socket is no longer read", 2)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either steps or epochs" if self.steps is None else "give steps or epochs, not both")
        self._shared(cut_layer=1, **({} if self.names_targets else {"lora_targets": ("any",)}))  # of both the model says more
        for name in COUNTS:
            self._require(name, lambda value: value is None or 1 <= value <= LARGEST_COUNT, f"1 to {LARGEST_COUNT}")
        for name in ("codec_tolerance", "early_stopping_threshold"):
            self._require(name, lambda value: value >= 0, "at least 0")
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise ConfigError(
                f"early-stopping-threshold {self.early_stopping_threshold:g} is for runs that may end early: add "
                "--early-stopping-patience, or leave it out"
            )
        for name in ("handshake_seconds", "max_messages_per_second", "step_deadline"):
            self._require(name, lambda value: value is None or value > 0, "positive")
        self._require("linger", lambda value: value >= 0, "at least 0")
        needed = self.clients + 1
        self._require("max_connections", lambda value: value >= needed, f"at least {needed}: one for every device, and a spare")
        self._require("quorum", lambda value: value is None or value <= self.clients, f"at most clients, {self.clients}")
        self._require("report_to", lambda value: "none" not in value or value == ("none",), "none alone, or others")
        self._require("port", lambda value: 0 <= value < 65536, "a port, 0 to 65535")
        if self.page == "on" and not self.page_token and not is_loopback(self.host):
            raise ConfigError(
                f"page on, where other machines reach the server (host {self.host}), would show the run to everybody: add "
                "--page-token, or leave --page out"
            )

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        if (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
            raise ConfigError(f"{flag_name(name)} must be {wanted}, got {value}")

    @property
    def has_page(self) -> bool:
        """Whether the server shows the run to browsers and to tools that read metrics."""
        return self.page == "on" or (self.page == "auto" and (self.page_token or is_loopback(self.host)))

    def settled(self, dtype: str) -> "ServerConfig":
        """
        The same with what was left open: ``dtype``, as it was chosen; the number of micro-batches, how often the codec is
        checked, and the codec of LoRA matrices, which are chosen here.

        Raises:
            ConfigError: the residual stream is to be in bfloat16, and the weights are not.
        """
        checks = self.check_codec_every
        if checks is None:
            checks = 0 if self.labels == "device" or self.edge_adapter == "none" else 100
        if self.residual == "bfloat16" and dtype != "bfloat16":
            raise ConfigError(
                f"residual bfloat16 needs dtype bfloat16, and the run has {dtype}: leave --residual out or add --dtype bfloat16"
            )
        micro_batches = self.micro_batches or (1 if is_loopback(self.host) else 2)
        settled = replace(self, dtype=dtype, micro_batches=micro_batches, check_codec_every=checks)
        return replace(settled, adapter_codec=settled._codec_of_adapter)

    @property
    def _codec(self) -> str:
        """In which a run begins, as its devices are told."""
        if self.codec == "auto":
            return EXACT if self.dtype == "float64" else "int8"
        return codec_named(self.codec)

    @property
    def _codec_of_adapter(self) -> str:
        return self.adapter_codec or (FLOAT32 if self._codec == EXACT or self.edge_adapter == "none" else DITHERED)

    @property
    def names_targets(self) -> bool:
        """Whether the adapted layers are named, and not left to the model's family."""
        return self.lora_targets not in (None, ALL_LINEAR)

    def for_model(self, config: "ModelConfig") -> "ServerConfig":
        """The same with the names of the adapted layers, where they are left to the model's family."""
        if self.names_targets:
            return self
        return replace(self, lora_targets=config.lora_targets if self.lora_targets else config.family.usual_targets)

    def settings(self) -> RunSettings:
        """What every client is told of these settings, which are `settled`, and `for_model`."""
        return self._shared()

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of ``split_model.LoraConfig``, as the run's adapter is saved."""
        return self.settings().lora() | {"alpha": self.lora_alpha, "rslora": self.lora_rslora}

    def _shared(self, **instead: Any) -> RunSettings:
        precision = "float64" if self.dtype == "float64" else "float32"
        shared = {item.name: getattr(self, item.name) for item in fields(RunSettings) if item.name not in DERIVED}
        codec, of_adapter = self._codec, codec_named(self._codec_of_adapter)
        if codec != EXACT and precision == "float64":
            raise ConfigError(
                f"codec {codec_name(codec)} is for runs in float32; a run in float64 has --codec float32, which is exact"
            )
        if precision == "float64" and self.edge_weights != "float32":
            raise ConfigError(f"edge-weights {self.edge_weights} is for runs in float32; in float64 every device has a model")
        if self.lora_rslora and self.lora_rank > 0:
            shared["lora_alpha"] = self.lora_alpha * math.sqrt(self.lora_rank)
        if of_adapter != EXACT and precision == "float64":
            raise ConfigError(f"adapter-codec {of_adapter} is for runs in float32; in float64 matrices travel as they are")
        shared |= {
            "precision": precision,
            "activation_codec": codec,
            "gradient_codec": gradient_codec(codec),
            "adapter_codec": of_adapter,
        }
        try:
            return RunSettings(**{**shared, **instead})
        except ValueError as error:
            known = "|".join(item.name for item in fields(RunSettings))
            what = re.sub(rf"\b({known})\b", lambda name: flag_name(name[0]), str(error))
            alone = "; all-linear stands alone" if set(ALL_LINEAR) < set(self.lora_targets or ()) else ""
            raise ConfigError(what + alone) from None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "ServerConfig":
        """
        The settings that these values make, by the fields' names. Each value is checked for its type.

        Raises:
            ConfigError: an unknown name (the nearest known one is named), a value of another type, a required one missing.
        """
        return cls(**typed_settings(cls, options))


def with_whole_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """
    The options with every path as the user meant it, whether it came from a flag, TOML or Python.

    Raises:
        PathError: one cannot be.
    """
    return {
        name: user_text_path(value) if name in PATHS and isinstance(value, str | os.PathLike) else value
        for name, value in options.items()
    }


def described() -> str:
    """A line for every setting: its name, its default and its meaning."""
    lines = []
    for item in fields(ServerConfig):
        default = "" if item.default is None else f", {item.default!r}"
        lines.append(f"    {item.name}{default}: {item.metadata['help']}")
    return "\n".join(lines)


def resumed(options: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, Any]:
    """
    The settings with which a run was served before, and over them those that are given again.

    ``steps`` may be more than before where the learning rate does not depend on the run's length.

    Raises:
        ConfigError: one that is given again would make it another run.
    """
    # What is to be chosen was chosen when the run began.
    options = {name: value for name, value in options.items() if (name, value) != ("dtype", "auto")}
    where = options["run_dir"]
    another = f"or start another run from its adapter: --init-adapter {where}/adapter with another --run-dir"
    # What an earlier version did not record is what it has been by default since.
    defaults = {item.name: item.default for item in fields(ServerConfig) if item.default is not None}
    recorded = {**defaults, **SINCE_BEFORE, **previous}
    for name in OF_THE_RUN & options.keys() & recorded.keys():
        given, before = options[name], recorded[name]
        if isinstance(before, list | tuple):
            names = typed(name, given, tuple[str, ...], {"choices": None})
            if names == ALL_LINEAR:  # these are compared under their names, which the model gives
                continue
            given, before = (",".join(sorted(each)) for each in (names, before))
        if given == before:
            continue
        if name == "steps" and type(given) is type(before) is int:
            if given < before:
                raise ConfigError(f"{where} holds a run of {before} steps, which cannot be made shorter; leave --steps out")
            if recorded["lr_schedule"] == "constant" and not recorded["warmup_ratio"]:
                continue
            which = ", ".join(
                f"{flag_name(name)} {recorded[name]}" for name in ("lr_schedule", "warmup_ratio") if recorded[name]
            )
            raise ConfigError(
                f"{where} holds a run of {before} steps whose learning rate depends on their number ({which}), so it cannot be "
                f"made longer; leave --steps out, {another}"
            )
        shown = [f"{flag_name(name)} {value}" if value is not None else f"no {flag_name(name)}" for value in (before, given)]
        raise ConfigError(
            f"{where} holds a run with {shown[0]}; it cannot go on with {shown[1]}. Leave --{flag_name(name)} out, {another}"
        )
    known = {item.name for item in fields(ServerConfig)}
    return {**SINCE_BEFORE, **{name: value for name, value in previous.items() if name in known}, **options}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
