"""What was measured, for whoever reads it in a terminal, and as JSON for programs."""

import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from terminal import count as counted
from terminal import duration, plain, version

from .controls import Planted, Shuffled
from .meter import QUANTILES, Cost, Findings, Measured, Reading
from .observation import Setting, Target
from .statistics import Counts, Estimate, Ratio

__all__ = ["as_json", "as_text", "title_of"]

NARROWEST, WIDEST = 60, 100
SEED = 0
"""Of the intervals' draws."""

NOT_MEASURED = (
    "many steps together: noise averages out over the visits of a text, and adapters learn what they are trained on",
    "a server that does not follow the protocol, and sends weights or gradients that make devices tell more",
    "neural networks trained to invert activations or gradients, and language models larger than this one as a prior",
    "other adapters than the one given, other texts than those drawn, and texts longer than --max-length",
    "the sum of losses that a device sends with its gradients, held-out texts, and adapters that are sent after several steps",
    "when messages come, how long they take, and who sends them",
    "what other devices, and users of the finished adapter, can learn from it",
    "dropout, which changes activations in training",
)


def as_text(findings: Findings, *, width: int) -> str:
    """
    Args:
        width: columns of the terminal; no line is wider, down to 60.
    """
    width = min(WIDEST, max(NARROWEST, width))
    blocks = [
        *_verdict(findings),
        *_subject(findings),
        *(block for measured in findings.measured for block in _setting(findings, measured, width)),
        *_norms(findings),
        "Not measured:",
        *(f"- {item};" for item in NOT_MEASURED[:-1]),
        f"- {NOT_MEASURED[-1]}.",
        "",
    ]
    return "\n".join(line for block in blocks for line in _wrapped(block, width))


def _wrapped(block: str, width: int) -> list[str]:
    if len(block) <= width:
        return [block]
    indent = " " * (len(block) - len(block.lstrip(" -")))
    return textwrap.wrap(block, width, subsequent_indent=indent, break_on_hyphens=False)


def _verdict(findings: Findings) -> Iterator[str]:
    failures = findings.failures
    if failures:
        yield "A control failed: do not rely on any figure below."
        yield from (f"- {failure}" for failure in failures)
    else:
        planted = [control for control, reading in _planted(findings) if not reading.finds_nothing]
        least, most = min(each.found.value for each in planted), max(each.found.value for each in planted)
        dose = sum(each.dose for each in planted) / len(planted)
        yield (
            f"Controls passed: of a planted leak of {_percent(dose)} of the tokens, attacks found {_percent(least)} to "
            f"{_percent(most)}, as much as they find where nothing is masked; on shuffled texts none reads more than guesses."
        )
    blind = sorted({_name(reading) for control, reading in _planted(findings) if reading.finds_nothing})
    if blind:
        yield (
            f"No better than guesses even without codec and noise, so their figures tell nothing of these channels: "
            f"{'; '.join(blind)}."
        )
    controlled = {_name(reading) for _, reading in _planted(findings)}
    others = sorted({_name(reading) for each in findings.measured for reading in each.readings} - controlled)
    if others:
        yield f"Tried only where something is masked, hence without a planted leak to find: {'; '.join(others)}."
    yield ""


def _planted(findings: Findings) -> list[tuple[Planted, Reading]]:
    return [(control, reading) for each in findings.measured for reading in each.readings for control in reading.planted]


def _subject(findings: Findings) -> Iterator[str]:
    plan = findings.plan
    yield (
        "What a server that holds the model, the adapter and all that crosses the wire in one step recovers of "
        f"{plain(findings.data)}: "
        f"{counted(plan.num_texts, 'text')} of {findings.num_samples:,}"
        + (f", drawn anew for each of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else f" (seed {plan.seeds[0]})")
        + f"; the attacker learns from {plan.num_own} others. Model {plain(findings.model)}, "
        + (f"adapter {plain(findings.adapter)}" if findings.adapter else "adapter as a run begins")
        + f". Took {duration(findings.seconds)}."
    )
    yield ""
    yield (
        "tokens: share recovered, with the 95 % interval over texts. guess: share that is right without what is attacked: "
        "the commonest each time, or, if that is better, what the attack makes of everything else; of labels, that is the "
        "model's own likeliest token. rare: of the rarest tenth of the tokens. whole: texts recovered without an error."
    )
    yield ""


def title_of(setting: Setting) -> str:
    """A setting in a line."""
    parts = [f"cut {setting.cut_layer}", setting.codec]
    for name, noise, clip in (
        ("activations", setting.activation_noise, setting.activation_clip),
        ("gradients", setting.gradient_noise, setting.gradient_clip),
    ):
        if noise:
            parts.append(f"{name} with noise {noise:g} x {clip:g}")
        elif clip:
            parts.append(f"{name} clipped to {clip:g}")
    if not (setting.activation_noise or setting.gradient_noise):
        parts.append("no noise")
    parts.append(f"labels on the {setting.labels}")
    if setting.label_rows == "hidden":
        parts.append("label rows hidden")
    return ", ".join(parts)


HEADINGS = ("tokens", "", "guess", "rare", "whole")
WIDTHS = (6, 15, 7, 6, 8)


def _setting(findings: Findings, measured: Measured, width: int) -> Iterator[str]:
    title = title_of(measured.setting)
    yield title[0].upper() + title[1:]
    room = width - sum(WIDTHS) - 2
    yield "  " + " " * room + _cells(HEADINGS)
    for reading in measured.readings:
        what = textwrap.wrap(_name(reading), room - 1, subsequent_indent=" ")
        yield f"  {what[0]:{room}}{_cells(_figures(reading))}"
        yield from (f"  {line}" for line in what[1:])
    if measured.not_attacked:
        yield f"  not tried: {'; '.join(f'{name} ({reason})' for name, reason in measured.not_attacked)}"
    yield f"  cost: {_cost(measured.cost, findings.nats[measured.setting.cut_layer])}"
    if measured.epsilons:
        worth = "; ".join(f"{what}: {epsilon:.3g}" for what, epsilon in measured.epsilons.items())
        yield f"  noise is worth, sent once, at delta {findings.plan.noise_delta:g}, an epsilon of: {worth}"
    yield ""


def _name(reading: Reading) -> str:
    name = f"{reading.channel}: {reading.attack}"
    return name if reading.target in (Target.TOKENS, Target.LABELS) else f"{name}, {reading.target.value}"


def _cells(values: tuple[str, ...]) -> str:
    return "".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS, strict=True)).rstrip()


def _figures(reading: Reading) -> tuple[str, ...]:
    counts = reading.counts
    tokens, rare = counts.tokens.estimate(SEED), counts.rare.estimate(SEED)
    whole = f"{int(counts.whole.above.sum())}/{int(counts.whole.below.sum())}"
    if tokens is None:
        return ("-", "", "", "", whole)
    interval = f"[{_number(tokens.low)}, {_number(tokens.high)}]"
    return (_percent(tokens.value), interval, _percent(reading.guess), "-" if rare is None else _percent(rare.value), whole)


def _number(share: float) -> str:
    return "100" if share == 1 else "0" if share == 0 else f"{100 * share:.1f}"


def _percent(share: float) -> str:
    return f"{_number(share)}%"


def _cost(cost: Cost, nats: float) -> str:
    forward = cost.forward.estimate(SEED)
    text = f"{_nats(forward)} nats a label more than the {nats:.3f} without codec and noise, with the same adapter"
    if cost.trained is not None:
        text += f"; {_nats(cost.trained.estimate(SEED))} after {counted(cost.training_steps, 'step')} of training each"
    return text


def _nats(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _norms(findings: Findings) -> Iterator[str]:
    names = ", ".join("largest" if quantile == 1 else f"{quantile:.0%}" for quantile in QUANTILES)
    yield f"Norms of rows of this text, to choose a clip from ({names}):"
    for norms in findings.norms:
        for what, values in (
            ("activations behind the centre", norms.activations),
            ("gradients at hidden states", norms.gradients),
        ):
            yield f"  cut {norms.cut_layer}, {what}: {', '.join(f'{value:.3g}' for value in values)}"
    yield ""


def as_json(findings: Findings) -> dict[str, Any]:
    """
    Shares are from 0 to 1; every estimate has its value and the bounds of its 95 % interval over texts. An infinite epsilon is
    null.
    """
    plan = findings.plan
    return {
        "splitlora": version(),
        "data": findings.data,
        "model": findings.model,
        "adapter": findings.adapter,
        "samples": findings.num_samples,
        "samples_cut": findings.num_cut,
        "sequences": plan.num_texts,
        "attacker_texts": plan.num_own,
        "seeds": list(plan.seeds),
        "noise_delta": plan.noise_delta,
        "seconds": findings.seconds,
        "controls_failed": findings.failures,
        "settings": [_measured(each, findings.nats[each.setting.cut_layer]) for each in findings.measured],
        "norms": {"quantiles": QUANTILES, "by_cut": [asdict(norms) for norms in findings.norms]},
        "not_measured": list(NOT_MEASURED),
    }


def _measured(measured: Measured, nats: float) -> dict[str, Any]:
    cost = measured.cost
    return {
        **asdict(measured.setting),
        "readings": [_reading(reading) for reading in measured.readings],
        "not_tried": dict(measured.not_attacked),
        "nats_without": nats,
        "extra_nats": _estimate(cost.forward),
        "extra_nats_after_training": None if cost.trained is None else _estimate(cost.trained),
        "training_steps": cost.training_steps,
        "epsilon": {what: epsilon if math.isfinite(epsilon) else None for what, epsilon in measured.epsilons.items()},
        "frame_bytes": measured.frame_bytes,
    }


def _reading(reading: Reading) -> dict[str, Any]:
    return {
        "channel": reading.channel,
        "attack": reading.attack,
        "target": reading.target.value,
        "seconds": reading.seconds,
        **_shares(reading.counts),
        "by_seed": [_shares(counts) for counts in reading.by_seed],
        "guess_commonest": _shares(reading.commonest),
        "guess_unseen": _shares(reading.unseen),
        "finds_nothing": reading.finds_nothing,
        "shuffled": [_control(control) for control in reading.shuffled],
        "planted": [_control(control) for control in reading.planted],
    }


def _shares(counts: Counts) -> dict[str, Any]:
    return {
        "tokens": _estimate(counts.tokens),
        "rare": _estimate(counts.rare),
        "whole": int(counts.whole.above.sum()),
        "whole_of": int(counts.whole.below.sum()),
    }


def _estimate(ratio: Ratio) -> dict[str, float] | None:
    estimate = ratio.estimate(SEED)
    return None if estimate is None else asdict(estimate)


def _control(control: Planted | Shuffled) -> dict[str, Any]:
    return {**asdict(control), "passed": control.passed}
