"""What the server decides for everybody, and announces in `Welcome`."""

import math
import re
from dataclasses import dataclass
from typing import Any

from .limits import LARGEST_VALUE

__all__ = [
    "ABILITIES",
    "BOUNDS",
    "COARSE",
    "CODECS",
    "CODEC_NAMES",
    "DELTA",
    "DITHERED",
    "EXACT",
    "FLOAT32",
    "LARGEST_COUNT",
    "LR_SCHEDULES",
    "OFFERED",
    "SERVER_ABILITIES",
    "RunSettings",
    "codec_name",
    "codec_named",
    "gradient_codec",
    "out_of_bounds",
    "states_codec",
]

EXACT = "exact"
"""Floats as they are, in the run's precision. Everybody has it."""
FLOAT32 = "float32"
"""What people call EXACT: almost every run is in float32."""
COARSE = "coarse"
"""As int8, but in a unit so coarse that zstd makes about four bits of a code: see `CODES_OF_THE_RMS` in `codecs.py`."""
INT4 = "int4"
"""What people call COARSE. On the wire this is the name of codes of 4 bits, which earlier releases had in its place."""
CODECS = ("bfloat16", "int8", COARSE)
"""What else there is, for runs in float32; from many bytes to few."""
DELTA = "delta"
"""Of activations: what a sample's have changed since its last visit, for both sides keep these."""
DITHERED = "dithered"
"""Of gradients and LoRA matrices: few bits, and noise that the receiver subtracts again. See `quantise_dithered`."""
OFFERED = (*CODECS, DELTA, DITHERED)
"""All codecs but EXACT, which a client of this release has."""

_NAMES = {EXACT: FLOAT32, COARSE: INT4}


def codec_name(codec: str) -> str:
    """What flags, metrics and people call a codec."""
    return _NAMES.get(codec, codec)


def codec_named(name: str) -> str:
    """The codec that a person has named."""
    return next((codec for codec, usual in _NAMES.items() if usual == name), name)


CODEC_NAMES = tuple(map(codec_name, (EXACT, *CODECS)))
"""What people call those that code each message by itself."""


def gradient_codec(codec: str, at_first: str = DITHERED) -> str:
    """
    In which codec gradients travel while activations travel in this one. They change too much for `DELTA`.

    Args:
        at_first: the gradients' codec with which the run has begun: servers of earlier releases know no `DITHERED`.
    """
    return DITHERED if at_first == DITHERED and codec in ("int8", COARSE, DELTA) else states_codec(codec)


def states_codec(codec: str) -> str:
    """In which codec hidden states travel while activations travel in this one."""
    return COARSE if codec == DELTA else codec


NEXT_PIN = "next-pin"
"""A client that has a pin for the server keeps the one that `Welcome` announces beside it. No run needs this of a client."""

ABILITIES = ("device-labels", "noise", "schedules", "early-end", "label-smoothing", "frozen-edge", NEXT_PIN)
"""What a client of this release can do for a run, besides what the first ones of this version could."""

SERVER_ABILITIES = ("held-out-loss",)
"""What a server of this release can do for its clients, besides what the first ones of this version could."""

LR_SCHEDULES = ("constant", "linear", "cosine")
"""What becomes of the learning rate after the warm-up."""

NAME_OF_LAYER, MOST_TARGETS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}"), 64
"""What can be a layer's name. Whether a model has it, is checked where settings meet the model."""
LARGEST_COUNT = 2**31 - 1  # far below the largest integer that a message may hold

LARGEST_NOISE = LARGEST_VALUE / 10
"""The most that a standard deviation may be: no Gaussian number is ten of these from its mean, and the server takes it."""

BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("cut_layer", "lora_rank", "clients", "steps", "epochs", "aggregate_every"), (1, LARGEST_COUNT)),
    "micro_batches": (1, 1024),  # each is a message, and both sides prepare for all of them
    **dict.fromkeys(("lora_alpha", "lr"), (1e-30, 1e30)),  # a float32 holds them, and their inverses
    "weight_decay": (0, 1e30),
    "lora_dropout": (0, 0.999),  # what is kept of an input is multiplied by a thousand at most
    **dict.fromkeys(("warmup_steps", "seed", "check_codec_every", "early_stopping_patience"), (0, LARGEST_COUNT)),
    "warmup_ratio": (0, 0.999),
    "max_grad_norm": (0, 1e30),
    "label_smoothing": (0, 0.999),
    "cache_bytes": (0, 2**50),
    **dict.fromkeys(("activation_noise", "activation_clip", "gradient_noise", "gradient_clip"), (0, 1e4)),
    "noise_delta": (1e-30, 0.999),
}
"""The least and the most that a setting may be. What the model has to say of it (blocks, width) comes on top."""


def out_of_bounds(name: str, value: float) -> str | None:
    """What the setting must be, if ``value`` is not."""
    least, most = BOUNDS[name]
    return None if least <= value <= most else f"must be {least:.10g} to {most:.16g}, got {value}"


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One run's configuration. Exactly one of ``steps`` and ``epochs`` is given."""

    cut_layer: int
    """Blocks [0, cut_layer) are on the edge."""
    lora_rank: int
    lora_alpha: float
    """An adapter's update is scaled by lora_alpha / lora_rank; what a run calls its alpha may be another number."""
    lora_dropout: float
    lora_targets: tuple[str, ...]
    clients: int
    """How many clients the run starts with."""
    steps: int | None = None
    epochs: int | None = None
    aggregate_every: int = 1
    """Steps in a round. 1: gradients are summed at every step. More: adapters are averaged at each round's end."""
    micro_batches: int = 1
    """Parts of every client's batch, each computed together with the other clients' of its number."""
    lr: float
    lr_schedule: str
    """"constant"; or "linear" or "cosine": down to zero at the run's end. All after a linear warm-up."""
    warmup_steps: int
    weight_decay: float
    seed: int
    precision: str
    """"float32" or "float64": of activations, gradients and adapters on the wire."""
    activation_codec: str = EXACT
    """EXACT, DELTA or one of CODECS: how clients send activations at first."""
    gradient_codec: str = EXACT
    """How the server sends their gradients at first."""
    check_codec_every: int = 0
    """Steps from one check of the codec to the next, beginning with the first step; 0: it is not checked."""
    cache_bytes: int = 0
    """The most that each side keeps of one client's samples, where any are kept: see `keeps_samples`."""
    adapter_codec: str = EXACT
    """
    EXACT or DITHERED: how LoRA matrices of the edge part cross the link between two rounds. In DITHERED they cross as changes
    since
    the round began, but for gradients, which they are in rounds of one step from a client.
    """
    labels: str = "server"
    """Who has the tokens to predict, and computes the loss: "server", or "device", which then sends none."""
    label_rows: str = "shown"
    """Where devices keep the labels: "shown", the server knows which rows have one; "hidden", all rows are treated alike."""
    activation_noise: float = 0.0
    """Clients add Gaussian noise to activations, of this many times ``activation_clip`` in every element; 0: none."""
    activation_clip: float = 0.0
    """The most that a row of activations is away from a public centre, as a Euclidean norm; 0: it is not clipped."""
    gradient_noise: float = 0.0
    """The same for the gradient at the hidden states, of ``gradient_clip``."""
    gradient_clip: float = 0.0
    """The most that a row of this gradient is long; 0: it is not clipped."""
    noise_delta: float = 1e-6
    """Delta of the (epsilon, delta) that is reported of the noise."""
    warmup_ratio: float = 0.0
    """The warm-up as a part of the run's steps, rounded up, where it is not given as `warmup_steps`."""
    max_grad_norm: float = 0.0
    """
    The most that the gradient of the mean loss by both parts' adapters together is long, as a Euclidean norm; a longer one is
    shortened before the optimiser's step. 0: none is.
    """
    early_stopping_patience: int = 0
    """Evaluations of held-out texts in a row, none better than those before, after which the run ends; 0: it does not."""
    final_adapter: str = "last"
    """With which adapter the run ends: the "last", or the "best", under which held-out texts lost least."""
    label_smoothing: float = 0.0
    """
    In steps, this part of each label's weight is spread evenly over the whole vocabulary. Held-out texts are measured without.
    """
    edge_adapter: str = "lora"
    """
    By what the edge part learns: "lora"; or "none", it learns nothing (SplitFrozen, arXiv 2503.18986). Then no gradient comes
    back to devices, no adapter crosses the link, and a sample's activations cross once: see `recall.py`.
    """

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"exactly one of steps and epochs is given, got {self.steps} and {self.epochs}")
        for name in BOUNDS:
            value = getattr(self, name)
            if value is not None and (wrong := out_of_bounds(name, value)):
                raise ValueError(f"{name} {wrong}")
        targets = self.lora_targets
        if not 1 <= len(set(targets)) == len(targets) <= MOST_TARGETS or not all(map(NAME_OF_LAYER.fullmatch, targets)):
            got = ", ".join(target[:40] for target in targets[:10])
            raise ValueError(f"lora_targets must be names of layers, without dots, each once; got {ascii(got)[1:-1] or 'none'}")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule must be one of {', '.join(LR_SCHEDULES)}; got {self.lr_schedule[:40]!r}")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio:g} both say how long the warm-up is: "
                "give one of them"
            )
        if self.max_grad_norm and self.aggregate_every > 1:
            raise ValueError(
                f"max_grad_norm {self.max_grad_norm:g} needs aggregate_every 1: it is the norm of both parts' gradients "
                f"together, and in rounds of {self.aggregate_every} steps every device takes steps of its own, with a gradient "
                "that nobody else has"
            )
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"precision must be float32 or float64, got {self.precision[:40]!r}")
        for name, known in (
            ("activation_codec", (EXACT, *CODECS, DELTA)),
            ("gradient_codec", (EXACT, *CODECS, DITHERED)),
            ("adapter_codec", (EXACT, DITHERED)),
        ):
            codec = getattr(self, name)
            if codec not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {codec[:40]!r}")
            if codec != EXACT and self.precision != "float32":
                raise ValueError(f"{name} must be {EXACT} in a run of {self.precision}, got {codec!r}")

        for name, either in (
            ("labels", ("server", "device")),
            ("label_rows", ("shown", "hidden")),
            ("final_adapter", ("last", "best")),
            ("edge_adapter", ("lora", "none")),
        ):
            value = getattr(self, name)
            if value not in either:
                raise ValueError(f"{name} must be {' or '.join(either)}, got {value[:40]!r}")
        if not self.trains_edge:
            self._check_frozen_edge()
        self._check_noise()

    def _check_frozen_edge(self) -> None:
        """What the edge part would need an adapter for."""
        for name, needs, remedy in (
            ("aggregate_every", self.aggregate_every > 1, "a round ends in a new edge adapter; leave it out"),
            ("adapter_codec", self.codes_adapter, "no LoRA matrix crosses the link; leave it out"),
            ("activation_codec", self.activation_codec == DELTA, "activations do not change; take int8 or int4"),
            ("check_codec_every", self.check_codec_every, "a sample crosses only once, exactly or in a codec; set it to 0"),
        ):
            if needs:
                raise ValueError(f"{name} {getattr(self, name)} does not go with edge_adapter none, with which {remedy}")

    def _check_noise(self) -> None:
        for kind in ("activation", "gradient"):
            noise, clip = getattr(self, f"{kind}_noise"), getattr(self, f"{kind}_clip")
            if noise and not clip:
                raise ValueError(
                    f"{kind}_noise {noise:g} is a multiple of {kind}_clip, which is not given; choose how far a row may reach"
                )
            if noise * clip > LARGEST_NOISE:
                raise ValueError(
                    f"{kind}_noise {noise:g} times {kind}_clip {clip:g} is more than {LARGEST_NOISE:g}: training would seem to "
                    f"diverge"
                )
        if self.activation_noise and self.activation_codec == DELTA:
            raise ValueError(
                f"activation_noise {self.activation_noise:g} does not go with codec {DELTA}, which sends changes: with each "
                f"visit of a text they would give away more of it; choose another codec"
            )
        if self.labels == "device":
            if self.check_codec_every:
                raise ValueError(
                    f"check_codec_every must be 0 where labels stay on the device, got {self.check_codec_every}: the server "
                    f"computes no loss to compare"
                )
            if self.label_rows == "hidden" and not self.gradient_noise:
                raise ValueError(
                    "label_rows hidden needs gradient_noise: without it rows without a label are known by their gradient, 0"
                )
            return
        if self.label_rows == "hidden":
            raise ValueError("label_rows hidden needs labels device: a server that has the labels knows their rows")
        for name in ("gradient_noise", "gradient_clip"):
            if getattr(self, name):
                raise ValueError(f"{name} needs labels device: else the server computes this gradient itself")

    def abilities(self) -> set[str]:
        """Those of ABILITIES that a client must have."""
        noise = self.activation_noise or self.activation_clip or self.gradient_noise or self.gradient_clip
        needed = {
            "device-labels": self.labels == "device",
            "noise": noise,
            "schedules": self.lr_schedule == "cosine" or self.warmup_ratio,
            "early-end": self.may_end_early or self.final_adapter == "best",
            "label-smoothing": self.label_smoothing and self.labels == "device",
            "frozen-edge": not self.trains_edge,
        }
        return {name for name, is_needed in needed.items() if is_needed}

    def codecs(self) -> set[str]:
        """What a client has to offer, besides EXACT."""
        of_states = states_codec(self.activation_codec) if self.labels == "device" else EXACT
        return {self.activation_codec, self.gradient_codec, of_states, self.adapter_codec} - {EXACT}

    @property
    def trains_edge(self) -> bool:
        """Whether devices learn anything."""
        return self.edge_adapter == "lora"

    @property
    def keeps_samples(self) -> bool:
        """Whether both sides keep what has crossed of a sample, in an `ActivationCache`."""
        return self.activation_codec == DELTA or not self.trains_edge

    @property
    def codes_adapter(self) -> bool:
        """Whether LoRA matrices travel in fewer bytes, and changes of them in their place."""
        return self.adapter_codec != EXACT

    def checks_codec(self, step: int) -> bool:
        """Whether clients send their first micro-batch of ``step`` exactly as well."""
        return self.check_codec_every > 0 and (step - 1) % self.check_codec_every == 0

    def lora(self) -> dict[str, Any]:
        """The keyword arguments of ``split_model.LoraConfig``."""
        return {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "targets": self.lora_targets,
            "first_block": 0 if self.trains_edge else self.cut_layer,
        }

    def optimiser(self) -> dict[str, Any]:
        """The keyword arguments of ``split_model.OptimiserConfig``."""
        return {"learning_rate": self.lr, "weight_decay": self.weight_decay}

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """
        The rate of step 1, 2, ... ``total_steps``; the same as transformers' schedulers give.

        Here and not beside AdamW, since it is a function of the settings alone: whoever takes a step asks for it, with torch
        or without.
        """
        taken = step - 1
        warmup_steps = self.warmup_steps or math.ceil(total_steps * self.warmup_ratio)
        if taken < warmup_steps:
            return self.lr * taken / warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        falling_steps = max(1, total_steps - warmup_steps)
        if self.lr_schedule == "linear":
            return self.lr * (total_steps - taken) / falling_steps
        return self.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((taken - warmup_steps) / falling_steps))))

    @property
    def may_end_early(self) -> bool:
        """Whether the server may end the run before the last step for which its clients have data."""
        return self.early_stopping_patience > 0

    @property
    def rate_depends_on_length(self) -> bool:
        """Whether the learning rate of a step is another one in a longer run, which therefore cannot be made longer."""
        return self.lr_schedule != "constant" or self.warmup_ratio > 0

    def steps_of_client(self, num_samples: int, batch_size: int) -> int:
        """In how many steps a client with this much data takes part: ``steps``, or its own ``epochs`` to the last sample."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 0) * -(-num_samples // batch_size)

    def ends_round(self, step: int) -> bool:
        """Whether adapters are averaged after ``step``, the run's last step aside."""
        return step % self.aggregate_every == 0
