"""What a person reads about where the time went."""

from dataclasses import fields

import pytest

from protocol import Seconds
from terminal import where_time_went
from terminal.bottleneck import ADVICE


def test_every_part_of_the_time_has_advice() -> None:
    assert [field.name for field in fields(Seconds)] == list(dict.fromkeys(vars(Seconds())))
    assert ADVICE.keys() == vars(Seconds()).keys()


def test_shares_are_of_the_whole_and_the_largest_is_named() -> None:
    shares, advice = where_time_went(vars(Seconds(edge_compute=1.0, uplink=2.5, server_compute=1.5))).splitlines()
    assert shares == (
        "time: edge compute 20 %, encode 0 %, uplink 50 %, queue 0 %, server compute 30 %, downlink 0 %, decode 0 %"
    )
    assert advice.startswith("most of it goes to uplink: a leaner --codec on the server")


@pytest.mark.parametrize("part", ADVICE)
def test_advice_is_about_the_largest(part: str) -> None:
    assert ADVICE[part] in where_time_went({**vars(Seconds()), part: 1.0})


def test_no_time_has_no_shares() -> None:
    assert where_time_went(vars(Seconds())) == ""
