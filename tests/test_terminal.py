"""What a person sees."""

import io
import sys

import pytest

from terminal import Progress, count, duration, listed, run_program


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_gets_a_bar_with_loss_rates_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress(4) as progress:
        for number, loss in ((1, 3.0), (2, 2.5)):
            progress.update(number, loss, tokens=100, num_bytes=5_000)
    shown = terminal.getvalue()
    assert "loss 2.500" in shown
    assert "tokens/s" in shown
    assert "B/s" in shown
    assert "2/4" in shown


def test_file_gets_plain_lines_and_always_the_last_one(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, done=1) as progress:
        progress.update(2, 3.0, tokens=100, num_bytes=5_000)
        progress.update(3, 2.0, tokens=100, num_bytes=5_000)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert said.splitlines()[-1].startswith("step 3/3: loss 2.000, ")


def test_expected_error_is_one_sentence_and_another_one_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ValueError("7 is too much")

    assert run_program("program", fail, lambda: (ValueError,)) == 1
    assert capsys.readouterr().err == "program: 7 is too much\n"
    with pytest.raises(ValueError, match="7 is too much"):
        run_program("program", fail, lambda: (KeyError,))


def test_interruption_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_program("program", interrupt, lambda: ()) == 130
    assert capsys.readouterr().err == "program: interrupted\n"


def test_numbers_names_and_durations_read_as_people_write_them() -> None:
    assert [count(number, "client") for number in (0, 1, 2, 12345)] == ["0 clients", "1 client", "2 clients", "12,345 clients"]
    assert (count(1, "batch", "batches"), count(3, "batch", "batches")) == ("1 batch", "3 batches")
    assert [listed("abc"[:number]) for number in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert listed("abcde", most=2) == "a, b and 3 more"
    assert [duration(seconds) for seconds in (0, 1, 42.4, 119, 180, 3600, 7500, 90000, 273600, 259200)] == [
        *("0.0 s", "1.0 s", "42 s", "119 s", "3 min", "1 h", "2 h 5 min", "25 h", "3 d 4 h", "3 d"),
    ]
