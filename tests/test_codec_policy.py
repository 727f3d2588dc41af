"""Which codec a run uses is decided by what it does to the loss, once, and for good."""

import json
from typing import Any

import pytest

from gpu_server.federation import CodecPolicy


def policy(codec: str = "int8", tolerance: float = 0.01, **more: Any) -> CodecPolicy:
    return CodecPolicy(codec, tolerance, **more)


def observe(policy: CodecPolicy, *changes: float, every: int = 10, link_share: float = 0.0, others: Any = None) -> list[str]:
    """Checks in steps 1, 11, 21, ... after the last one; the notes to the operator."""
    notes = []
    for change in changes:
        step = 1 if not policy.last_checked else policy.last_checked + every
        seen = {policy.codec_of(step): change, **dict.fromkeys(policy.alternatives(step), others)}
        notes.append(policy.update(step, seen, link_share))
    return [note for note in notes if note is not None]


def test_codec_that_changes_the_loss_within_the_tolerance_stays() -> None:
    quiet = policy()
    assert observe(quiet, 0.009, -0.009, 0.0099) == []
    assert quiet.codec_of(10**6) == "int8"


@pytest.mark.parametrize("change", [0.02, -0.02])
def test_codec_that_changes_the_loss_too_much_gives_way_to_the_next_richer(change: float) -> None:
    loud = policy("coarse")
    (note,) = observe(loud, change)
    assert note == f"codec int4 changes the loss by {change:+.4f} nats/token, more than 0.01: int8 from step 2 on"
    assert [loud.codec_of(step) for step in (1, 2, 100)] == ["coarse", "int8", "int8"]


@pytest.mark.parametrize(
    ("codec", "ladder"),
    [("delta", ["int8", "bfloat16", "exact"]), ("coarse", ["int8", "bfloat16", "exact"]), ("bfloat16", ["exact"])],
)
def test_ladder_ends_with_what_is_exact(codec: str, ladder: list[str]) -> None:
    loud = policy(codec)
    assert len(observe(loud, *[1.0] * (len(ladder) + 3))) == len(ladder)
    assert [name for _, name in loud.decisions] == ladder
    assert loud.may_use() == {codec, *ladder}


def test_one_odd_batch_among_many_decides_nothing() -> None:
    smooth = policy()
    assert observe(smooth, 0.0, 0.0, 0.0, 0.015, 0.0) == []


def test_lasting_change_is_seen_however_quiet_it_was_before() -> None:
    late = policy()
    assert len(observe(late, 0.0, 0.0, 0.0, *[0.015] * 2)) == 1


def test_int8_becomes_int4_where_the_link_is_the_bottleneck_and_quality_allows() -> None:
    auto = policy(allow_int4=True)
    assert observe(auto, 0.0, 0.0, link_share=0.7, others=0.001) == []
    (note,) = observe(auto, 0.0, link_share=0.7, others=0.001)
    assert note == "links take 70 % of the time, and codec int4 changes the loss by +0.0010 nats/token: int4 from step 22 on"
    assert auto.codec_of(22) == "coarse"


@pytest.mark.parametrize(
    ("codec", "link_share", "others", "allow_int4"),
    [("int8", 0.4, 0.001, True), ("int8", 0.7, 0.02, True), ("int8", 0.7, 0.001, False), ("bfloat16", 0.7, 0.001, True)],
)
def test_it_does_not_go_down_otherwise(codec: str, link_share: float, others: float, allow_int4: bool) -> None:
    steady = policy(codec, allow_int4=allow_int4)
    assert observe(steady, *[0.0] * 9, link_share=link_share, others=others) == []


def test_codec_that_was_tried_and_left_is_not_tried_again() -> None:
    auto = policy(allow_int4=True)
    observe(auto, *[0.0] * 3, link_share=0.9, others=0.0)
    observe(auto, *[0.5] * 2, link_share=0.9)
    assert [codec for _, codec in auto.decisions] == ["coarse", "int8", "bfloat16"]
    assert auto.alternatives(999) == []


def test_what_was_decided_is_not_decided_again_after_going_back() -> None:
    first = policy("coarse")
    observe(first, 0.004, 0.004, 0.1)
    again = policy("coarse")
    again.restore(json.loads(json.dumps(first.state())))
    assert again == policy("coarse", decisions=first.decisions, last_checked=21, seen=first.seen)
    assert again.update(11, {"coarse": 5.0}, 0.0) is None  # the step is done again, and its check has counted
    assert again.decisions == first.decisions == [(22, "int8")]


def test_state_does_not_change_when_the_policy_does() -> None:
    one = policy(tolerance=1.0)
    observe(one, 0.5)
    before = one.state()
    observe(one, 0.25)
    assert before["seen"]["int8"]["count"] == 1


def test_change_that_is_just_tolerated_decides_nothing() -> None:
    assert observe(policy(tolerance=0.25), 0.25) == []
    auto = policy(tolerance=0.25, allow_int4=True)
    assert len(observe(auto, *[0.0] * 3, link_share=0.5, others=0.25)) == 1  # as is the link at half of the time
    assert auto.decisions == [(22, "coarse")]


def test_check_of_a_step_counts_once() -> None:
    once = policy(tolerance=1.0)
    observe(once, 0.5)
    assert once.update(1, {"int8": 9.0}, 0.0) is None
    assert once.seen["int8"].count == 1


def test_codec_that_was_not_measured_stays() -> None:
    auto = policy(allow_int4=True)
    assert auto.update(1, {"coarse": 0.0}, 0.9) is None
    assert auto.decisions == []
