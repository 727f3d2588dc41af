"""What a person reads about where the time went."""

from collections.abc import Mapping
from dataclasses import fields

import pytest

import edge_client.cli
import gpu_server.history
from protocol import Seconds
from terminal import where_time_went

ADVICE = {"edge_client": edge_client.cli.ADVICE, "gpu_server": gpu_server.history.ADVICE}


@pytest.mark.parametrize("program", ADVICE)
def test_every_part_of_the_time_has_advice(program: str) -> None:
    assert set(ADVICE[program]) == {field.name for field in fields(Seconds)}


def test_shares_are_of_the_whole_and_the_largest_is_named() -> None:
    seconds = vars(Seconds(edge_compute=1.0, uplink=2.5, server_compute=1.5))
    shares, advice = where_time_went(seconds, ADVICE["edge_client"]).splitlines()
    assert shares == (
        "time: edge compute 20 %, encode 0 %, uplink 50 %, queue 0 %, server compute 30 %, downlink 0 %, decode 0 %"
    )
    assert advice.startswith("most of it goes to uplink: a leaner --codec on the server")


@pytest.mark.parametrize("advice", ADVICE.values())
def test_advice_is_about_the_largest(advice: Mapping[str, str]) -> None:
    for part, text in advice.items():
        assert where_time_went({**vars(Seconds()), part: 1.0}, advice).endswith(text)


def test_no_time_has_no_shares() -> None:
    assert where_time_went(vars(Seconds()), ADVICE["edge_client"]) == ""
