"""The figures as tables of Markdown."""

import math
from collections.abc import Sequence

from terminal import amount, duration

from .plan import Plan
from .result import Result

__all__ = ["growth_table", "quorum_of", "run_table", "server_table"]


def quorum_of(plan: Plan) -> str:
    """With the deadline, where one is given."""
    if plan.quorum == 1:
        return "all"
    return f"{plan.quorum:g}" + ("" if plan.deadline is None else f" after {plan.deadline:g} s")


def run_table(results: Sequence[Result]) -> str:
    """What is simulated."""
    header = ["devices", "quorum", "a step, median", "of the devices in it", "work that counts", "lost connections", "left"]
    return _markdown(
        [*header, "bytes up, a device and step", "down"],
        [
            [
                f"{result.plan.devices:,}",
                quorum_of(result.plan),
                _seconds(result.step_seconds),
                f"{result.share_in_step:.1%}",
                f"{result.share_that_counts:.1%}",
                f"{result.losses:,}",
                f"{result.left:,}",
                *(amount(of / result.plan.devices / max(1, len(result.steps))) for of in (result.bytes_up, result.bytes_down)),
            ]
            for result in results
        ],
    )


def server_table(results: Sequence[Result]) -> str:
    """What was measured while it was simulated."""
    return _markdown(
        [
            "devices",
            "quorum",
            "decisions",
            "decisions a second",
            "a message, µs",
            "and its share of steps, µs",
            "simulated",
            "took a core",
        ],
        [
            [
                f"{result.plan.devices:,}",
                quorum_of(result.plan),
                f"{result.decisions:,}",
                f"{result.decisions_a_second:,.0f}",
                f"{result.spent['receive'].microseconds:.1f}",
                f"{1e6 * result.deciding / result.spent['receive'].calls:.1f}",
                duration(result.seconds),
                duration(result.took),
            ]
            for result in results
        ],
    )


def growth_table(results: Sequence[Result]) -> str:
    """
    Microseconds of a call by kind, from the fewest devices to the most, and the power of their number with which it grows: 0
    does not, 1 in proportion.
    """
    by_devices = {result.plan.devices: result for result in reversed(results)}
    numbers = sorted(by_devices)
    kinds = dict.fromkeys(kind for number in numbers for kind in by_devices[number].spent)
    rows = []
    for kind in kinds:
        found = {number: by_devices[number].spent[kind] for number in numbers if kind in by_devices[number].spent}
        cells = [f"{found[number].microseconds:,.1f}" if number in found else "" for number in numbers]
        longest = max(spent.longest for spent in found.values())
        rows.append([kind, *cells, _power({number: spent.microseconds for number, spent in found.items()}), f"{longest:.3g}"])
    return _markdown(["µs a call", *(f"{number:,} devices" for number in numbers), "grows with power", "longest, s"], rows)


def _power(microseconds: dict[int, float]) -> str:
    """Between the fewest and the most."""
    first, last = min(microseconds), max(microseconds)
    if first == last or not microseconds[first] or not microseconds[last]:
        return ""
    return f"{math.log(microseconds[last] / microseconds[first]) / math.log(last / first):.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
