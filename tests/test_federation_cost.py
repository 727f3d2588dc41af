"""A message costs the federation the same work, however many devices there are."""

import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from federation_cost import TO_COMPUTE, WAYS, Act, Crowd

from gpu_server.federation import Action, Checkpoint, Member

FEW, MANY = 20, 150


class Work:
    """Instructions of Python, and what its built-in functions do with the names of devices and with the members."""

    def __init__(self) -> None:
        self.units = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self.units += event == "opcode"
            return trace

        before = sys.gettrace()
        # The collector comes when it likes, and what it calls, for garbage of other tests, would count here.
        gc.disable()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
            gc.enable()

    def name(self, text: str) -> str:
        """One that counts how often it is compared, as by `sorted`, or looked up."""
        work = self

        class Name(str):
            def __lt__(self, other: str) -> bool:
                work.units += 1
                return super().__lt__(other)

            def __hash__(self) -> int:
                work.units += 1
                return super().__hash__()

        return Name(text)

    def members(self) -> dict[str, Member]:
        """They count how often somebody goes through them."""
        work = self

        class Members(dict[str, Member]):
            def __iter__(self) -> Iterator[str]:
                for name in super().__iter__():
                    work.units += 1
                    yield name

            def items(self) -> Any:
                return [(name, self[name]) for name in self]

            def values(self) -> Any:
                return [self[name] for name in self]

            keys = __iter__  # type: ignore[assignment]

        return Members()


def work_of_a_run(devices: int, **way: Any) -> tuple[dict[str, int], float]:
    """The most that one message of each kind takes, and what computations take by device."""
    work, most, computing = Work(), defaultdict[str, int](int), 0

    def spend(kind: str, act: Act) -> list[Action]:
        nonlocal computing
        before = work.units
        with work.counted():
            actions = act()
        spent = work.units - before
        if kind == "step" or any(isinstance(action, Checkpoint | TO_COMPUTE) for action in actions):
            computing += spent
        else:
            most[kind] = max(most[kind], spent)
        return actions

    crowd = Crowd(devices, spend=spend, names_in_a_pong=10, **way)
    crowd.names = [work.name(name) for name in crowd.names]
    crowd.federation._roster.members = work.members()
    crowd.play()
    return most, computing / devices


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_work_of_a_message_does_not_grow_with_the_number_of_devices(way: dict[str, Any]) -> None:
    work_of_a_run(FEW, **way)  # Python 3.12 counts no instruction of some functions when it sees them for the first time
    few, few_computing = work_of_a_run(FEW, **way)
    many, many_computing = work_of_a_run(MANY, **way)
    assert {kind for kind, work in many.items() if work > 1.05 * few[kind]} == set()
    assert set(few) >= {"join", "activations", "lost", "back", "tick", "ping", "gradient", "done", "goodbye"}
    assert many_computing <= 1.1 * few_computing  # of each device
