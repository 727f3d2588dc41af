"""Which codec a run uses in which step: it may cost bytes or quality, and quality goes first."""

from dataclasses import dataclass, field
from typing import Any

from protocol import DELTA, EXACT
from protocol.settings import COARSE, codec_name, codec_named

__all__ = ["CodecPolicy"]

LEANER_TO_RICHER = {DELTA: "int8", COARSE: "int8", "int8": "bfloat16", "bfloat16": EXACT}
LEANER_THAN_INT8 = COARSE
FORGETTING = 0.5
"""Each check halves the weight of those before it."""
CHECKS_TO_TRUST = 3
LINK_IS_THE_BOTTLENECK = 0.5
"""From this share of the devices' time on."""


@dataclass
class Smoothed:
    """A mean of all that was seen, the latest counting most."""

    total: float = 0.0
    weight: float = 0.0
    count: int = 0

    def update(self, value: float) -> float:
        self.total = value + FORGETTING * self.total
        self.weight = 1 + FORGETTING * self.weight
        self.count += 1
        return self.total / self.weight


@dataclass
class CodecPolicy:
    """
    Begins with ``codec``, and goes to a richer one where a check shows that it changes the loss too much.

    Whatever is decided holds: its `state` is saved before anybody hears of it, and a run that goes back to a checkpoint decides
    nothing twice.

    Args:
        tolerance: nats per labelled token by which a codec may change the loss.
        allow_int4: whether int8 may become int4, where the links are the bottleneck.
    """

    codec: str
    tolerance: float
    allow_int4: bool = False
    decisions: list[tuple[int, str]] = field(default_factory=list)
    """The step from which on, and the codec."""
    last_checked: int = 0
    """The last step whose check has counted."""
    seen: dict[str, Smoothed] = field(default_factory=dict)
    """Changes of the loss by codec, nats per labelled token."""

    def codec_of(self, step: int) -> str:
        return next((codec for first, codec in reversed(self.decisions) if first <= step), self.codec)

    def may_use(self) -> set[str]:
        """All codecs that the run may come to."""
        codec, richer = self.codec, {self.codec}
        while codec in LEANER_TO_RICHER:
            codec = LEANER_TO_RICHER[codec]
            richer.add(codec)
        return richer | ({LEANER_THAN_INT8} if self.allow_int4 else set())

    def alternatives(self, step: int) -> list[str]:
        """Codecs to be tried in a check, besides the step's own."""
        return [LEANER_THAN_INT8] if self._may_still_step_down(step) else []

    def update(self, step: int, changes: dict[str, float], link_share: float) -> str | None:
        """
        Decide about the steps after this one.

        Args:
            changes: of the loss, by codec, in nats per labelled token.
            link_share: of the devices' time since the check before.

        Returns:
            What to tell the operator, if something is decided.
        """
        if step <= self.last_checked:
            return None
        self.last_checked, codec = step, self.codec_of(step)
        smoothed = {name: self.seen.setdefault(name, Smoothed()).update(change) for name, change in changes.items()}
        return self._step_up(step, codec, smoothed) or self._step_down(step, smoothed, link_share)

    def _step_up(self, step: int, codec: str, smoothed: dict[str, float]) -> str | None:
        change = smoothed.get(codec, 0.0)
        if abs(change) <= self.tolerance or codec not in LEANER_TO_RICHER:
            return None
        richer = LEANER_TO_RICHER[codec]
        self.decisions.append((step + 1, richer))
        return (
            f"codec {codec_name(codec)} changes the loss by {change:+.4f} nats/token, more than {self.tolerance:g}: "
            f"{codec_name(richer)} from step {step + 1} on"
        )

    def _step_down(self, step: int, smoothed: dict[str, float], link_share: float) -> str | None:
        leaner = LEANER_THAN_INT8
        if leaner not in smoothed or not self._may_still_step_down(step) or link_share < LINK_IS_THE_BOTTLENECK:
            return None
        if self.seen[leaner].count < CHECKS_TO_TRUST or abs(smoothed[leaner]) > self.tolerance:
            return None
        self.decisions.append((step + 1, leaner))
        return (
            f"links take {100 * link_share:.0f} % of the time, and codec {codec_name(leaner)} changes the loss by "
            f"{smoothed[leaner]:+.4f} nats/token: {codec_name(leaner)} from step {step + 1} on"
        )

    def _may_still_step_down(self, step: int) -> bool:
        """Once: a codec that was tried and left is not tried again."""
        return self.allow_int4 and self.codec_of(step) == "int8" and not self.decisions

    def state(self) -> dict[str, Any]:
        """As JSON; see `restore`."""
        seen = {codec_name(codec): dict(vars(smoothed)) for codec, smoothed in self.seen.items()}
        decisions = [(step, codec_name(codec)) for step, codec in self.decisions]
        return {"checked": self.last_checked, "decisions": decisions, "seen": seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.last_checked = state["checked"]
        self.decisions = [(step, codec_named(codec)) for step, codec in state["decisions"]]
        self.seen = {codec_named(codec): Smoothed(**fields) for codec, fields in state["seen"].items()}
