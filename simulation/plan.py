"""
What is simulated. Every default that describes the world is a public measurement, named where it stands; the few that nobody
seems to have published are called assumptions.
"""

import math
from dataclasses import dataclass, field

from protocol import RunSettings

from .traffic import CODECS

__all__ = ["Fleet", "Plan", "PlanError", "Server"]

SECONDS_OF_A_ROUND = 130.0
"""
Among phones: "about 2-3 minutes", 3,000 rounds in 5 days (Bonawitz et al. 2019, Towards federated learning at scale: system
design, arXiv:1902.01046, section 8, Next word prediction).
"""
LOST_IN_A_ROUND = 0.08
"""Of a round's devices 6 to 10 % drop out, on average (the same, section 9)."""
SPREAD_OF_90_PERCENT = 2 * 1.645
SPREAD_OF_80_PERCENT = 2 * 1.282
"""Standard deviations of a normal distribution between its 5th and 95th, and its 10th and 90th percentile."""


class PlanError(ValueError):
    """What was asked for cannot be simulated."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """
    The devices and their links. A speed is its median times a log-normal factor, drawn once for each device.
    """

    device_speed: float = 1650.0
    """
    Tokens a second of the median device, forward and backward through three blocks of GPT-2 small: what one core of this
    project's benchmark machine does (benchmarks/README.md, How fast a device computes: 412 rows in 250 ms of the processor).
    Other widths and cuts are scaled from it.
    """
    device_spread: float = math.log(10) / SPREAD_OF_90_PERCENT
    """
    Standard deviation of the logarithm of devices' speeds: 5 % and 95 % are ten times apart, as the peak performance of phones
    is (Wu et al. 2019, Machine learning at Facebook: understanding inference at the edge, HPCA, Fig. 1: over an order of
    magnitude among the chips of 85 % of the market).
    """
    jitter: float = 0.083
    """
    The same, of one device from one computation to the next: the coefficient of variation of 98 inferences on an idle phone
    (EdgeGate, 100 inference runs on Snapdragon 8 Gen 3: 8.3 %). A phone in use varies more.
    """
    uplink: float = 9.3
    """
    Mbit/s of the median device. This and the next two: Ookla, Speedtest Global Index, United States, mobile, end of 2022, as
    POTs and PANs reports it (Final 2022 statistics from Ookla).
    """
    downlink: float = 78.9
    """Mbit/s of the median device."""
    round_trip: float = 0.031
    """Seconds of the median device."""
    link_spread: float = math.log(10) / SPREAD_OF_80_PERCENT
    """
    Standard deviation of the logarithm of links' speeds, and of their round trips, the other way. The tenth of users with the
    fastest 5G has ten times what the slowest tenth has, 1,266 against 127 Mbit/s in the Emirates and South Korea (Ookla, as
    Digital Information World reports it, February 2023); that this holds elsewhere, and upwards, is an assumption. A device's
    link is slow, or fast, in everything.
    """
    connected: float = SECONDS_OF_A_ROUND / LOST_IN_A_ROUND
    """Seconds from a device's connection to its loss, exponentially distributed, the mean; 0: it is never lost."""
    away: float = 180.0
    """Seconds from the loss to the next connection, the same. An assumption: no public measurement of it is known to us."""
    leaving: float = 0.0
    """The share of losses after which the device does not come back, and says so. An assumption."""
    arrival: float = 60.0
    """Seconds in which all devices join, at uniformly distributed times. An assumption, of no consequence for the steps."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the server takes for its work, besides deciding."""

    server_speed: float = 230_000.0
    """
    Tokens a second that one GPU trains of GPT-2 small. 10 billion tokens in about 90 minutes on 8 A100 80GB SXM (Karpathy 2024,
    Reproducing GPT-2 (124M) in llm.c in 90 minutes for $20): with all gradients, so the server's part alone should be faster.
    `make device-check` measures the card that is at hand.
    """
    server_overhead: float = 0.005
    """Seconds of each computation, whatever its size: launches and the optimiser's step. An assumption."""
    ranks: int = 1
    """GPUs that share the computation."""
    rank_efficiency: float = 0.9
    """What each of several ranks does of what one alone would. Two are to be 1.8 times as fast as one."""
    exchange: float = 0.0018
    """
    Seconds of the thread that serves, a question and its answer: decoding, checking, deciding, encoding. Measured by
    benchmarks/server_scale.py while other work ran on both cores: of a step of 16 clients a quarter is no arithmetic, 55 ms
    for 32 exchanges. Without other work it is 0.8 ms; the larger one is kept as a reserve. It holds the federation's own part,
    which is measured here besides.
    """
    gigabits: float = 10.0
    """Gbit/s of the server's link, each way."""
    adding: float = 4e9
    """Bytes of adapters that it adds up in a second, to aggregate them. An assumption: a core's memory bandwidth."""

    def seconds_of(self, tokens: float) -> float:
        """Of a micro-batch."""
        speed = self.server_speed * self.ranks * (self.rank_efficiency if self.ranks > 1 else 1.0)
        return self.server_overhead + tokens / speed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    One simulated run.

    Raises:
        PlanError: a number is out of bounds.
    """

    devices: int
    steps: int = 20
    quorum: float = 1.0
    """The share of devices with which a step goes on after its deadline; 1: no quorum, all are waited for."""
    deadline: float | None = None
    """Seconds; None: the server derives it from what devices take."""
    aggregate_every: int = 1
    micro_batches: int = 2
    in_flight: int = 2
    """Micro-batches that a device has under way at once."""
    checkpoint_every: int = 10
    """Rounds."""
    tokens: int = 412
    """Rows of a device's batch: eight sentences of E2E NLG."""
    width: int = 768
    cut_layer: int = 3
    lora_rank: int = 8
    codec: str = "int8"
    seed: int = 0
    fleet: Fleet = field(default_factory=Fleet)
    server: Server = field(default_factory=Server)

    def __post_init__(self) -> None:
        largest = {"devices": 1_000_000, "micro_batches": 64, "lora_rank": 10_000, "cut_layer": 1000}
        for name in ("devices", "steps", "aggregate_every", "micro_batches", "in_flight", "checkpoint_every"):
            _require(name, getattr(self, name), 1, largest.get(name, 10**7))
        for name in ("tokens", "width", "cut_layer", "lora_rank"):
            _require(name, getattr(self, name), 1, largest.get(name, 10**7))
        if not 0 < self.quorum <= 1:
            raise PlanError(f"quorum is a share of the devices, above 0 and up to 1, got {self.quorum:g}")
        if self.deadline is not None:
            _require("deadline", self.deadline, 0, 1e9)
        if self.codec not in CODECS:
            raise PlanError(f"codec must be one of {', '.join(CODECS)}, got {self.codec[:40]!r}")
        _require("seed", self.seed, 0, 2**63 - 1)
        fleet, server = self.fleet, self.server
        for name in ("device_speed", "uplink", "downlink"):
            _require(name, getattr(fleet, name), 1e-6, 1e12)
        for name in ("device_spread", "jitter", "link_spread"):
            _require(name, getattr(fleet, name), 0, 3)
        for name in ("round_trip", "connected", "away", "arrival"):
            _require(name, getattr(fleet, name), 0, 1e9)
        _require("leaving", fleet.leaving, 0, 1)
        for name in ("server_speed", "gigabits", "adding"):
            _require(name, getattr(server, name), 1e-6, 1e15)
        for name in ("server_overhead", "exchange"):
            _require(name, getattr(server, name), 0, 1e6)
        _require("ranks", server.ranks, 1, 100_000)
        _require("rank_efficiency", server.rank_efficiency, 0.01, 1)

    @property
    def needed(self) -> int | None:
        """The quorum as the federation has it, a number of devices."""
        return None if self.quorum == 1 else max(1, math.ceil(self.quorum * self.devices))

    @property
    def block_share(self) -> float:
        """What a device computes, of three blocks of GPT-2 small."""
        return self.cut_layer / 3 * (self.width / 768) ** 2

    def settings(self) -> RunSettings:
        return RunSettings(
            cut_layer=self.cut_layer,
            lora_rank=self.lora_rank,
            lora_alpha=float(self.lora_rank),
            lora_dropout=0.0,
            lora_targets=("c_attn",),
            clients=self.devices,
            steps=self.steps,
            aggregate_every=self.aggregate_every,
            micro_batches=self.micro_batches,
            lr=1e-3,
            lr_schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            seed=0,
            precision="float32",
        )


def _require(name: str, value: float, least: float, most: float) -> None:
    """
    Args:
        name: of a field, and of the program's flag.
    """
    if not least <= value <= most:  # a NaN is not either
        raise PlanError(f"{name.replace('_', '-')} must be {_shown(least)} to {_shown(most)}, got {_shown(value)}")


def _shown(number: float) -> str:
    return f"{number:,d}" if isinstance(number, int) else f"{number:g}"
