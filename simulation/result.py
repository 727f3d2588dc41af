"""What came of a simulated run."""

from dataclasses import dataclass, field
from statistics import median

from .cost import Spent
from .plan import Plan

__all__ = ["Result", "StepOutcome"]


@dataclass(frozen=True)
class StepOutcome:
    seconds: float
    """Since the step before was finished."""
    devices: int
    """That had their activations in it."""


@dataclass(frozen=True, kw_only=True)
class Result:
    plan: Plan
    steps: list[StepOutcome]
    worked: float
    """Seconds that devices computed."""
    counted: float
    """Seconds of these whose result is in an adapter of the run."""
    bytes_up: float
    bytes_down: float
    losses: int
    """Connections lost."""
    left: int
    """Devices that left before the end."""
    seconds: float
    """From the first device's arrival to the last one's goodbye, simulated."""
    spent: dict[str, Spent] = field(compare=False)
    """Measured: by kind of decision."""
    took: float = field(compare=False)
    """Measured: seconds of one core for the whole simulation."""
    where: str = field(default="", compare=False)
    """The profile, if one was asked for."""

    @property
    def step_seconds(self) -> float:
        """The median step's. The first one, for which there is no deadline yet, is left out where there are others."""
        return median(step.seconds for step in self.steps[1:] or self.steps)

    @property
    def share_that_counts(self) -> float:
        return self.counted / self.worked if self.worked else 1.0

    @property
    def share_in_step(self) -> float:
        """Of the devices, on average over the steps."""
        return sum(step.devices for step in self.steps) / (len(self.steps) * self.plan.devices) if self.steps else 0.0

    @property
    def decisions(self) -> int:
        return sum(spent.calls for spent in self.spent.values())

    @property
    def deciding(self) -> float:
        """Seconds of the federation alone."""
        return sum(spent.seconds for spent in self.spent.values())

    @property
    def decisions_a_second(self) -> float:
        return self.decisions / self.deciding if self.deciding else 0.0
