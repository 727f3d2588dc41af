"""What the federation costs: seconds by kind of decision, where they go, and memory a member."""

import cProfile
import io
import pstats
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpu_server.federation import Federation
from protocol import Hello

from .messages import activations, join

__all__ = ["Meter", "Spent", "bytes_a_member"]


@dataclass
class Spent:
    """On one kind of decision."""

    calls: int = 0
    seconds: float = 0.0
    longest: float = 0.0

    @property
    def microseconds(self) -> float:
        """Of a call, on average."""
        return 1e6 * self.seconds / self.calls if self.calls else 0.0


@dataclass
class Meter:
    """
    Times calls, by this thread's time on its core: others may use the machine. Nothing simulated depends on what it measures.

    Args:
        profile: gathers where the time goes, which takes more of it.
    """

    profile: cProfile.Profile | None = None
    spent: dict[str, Spent] = field(default_factory=dict)

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.profile is not None:
            self.profile.enable()
        began = time.thread_time()
        result = function(*arguments)
        seconds = time.thread_time() - began
        if self.profile is not None:
            self.profile.disable()
        spent = self.spent.get(name)
        if spent is None:
            spent = self.spent[name] = Spent()
        spent.calls += 1
        spent.seconds += seconds
        spent.longest = max(spent.longest, seconds)
        return result

    def where(self, most: int = 15) -> str:
        """The functions in which most of the time was spent."""
        if self.profile is None:
            return ""
        text = io.StringIO()
        pstats.Stats(self.profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(most)
        return text.getvalue().strip()


def bytes_a_member(make: Callable[[], Federation], members: int) -> float:
    """
    Memory that the federation keeps for a member which has asked its first question, without the question's own arrays.

    Args:
        make: a federation whose run starts with so many ``members``.
    """
    federation, question, joins = make(), activations(1, 0), join(0, 1)
    names = [name_of(number) for number in range(members)]
    began_here = not tracemalloc.is_tracing()
    if began_here:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for name in names:
            federation.welcome(Hello(name=name, fingerprint=""))
            federation.join(name, joins, 0.0)
        for name in names:
            federation.receive(name, question, 1.0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        if began_here:
            tracemalloc.stop()
    return (after - before) / members


def name_of(number: int) -> str:
    return f"device-{number:06}"
