"""The live page of real runs: a server and devices in processes of their own, a browser, and what the run has written."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import a_browser, a_page, figures, row, violations
from conftest import metrics
from ports import free_port
from programs import arguments, program, read_until
from shaped_link import LinkProfile, ShapedLink

from gpu_server import GpuServer, RunEndedEarly
from gpu_server.checkpoints import Checkpoints
from gpu_server.history import RunFiles, row_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STEPS = 40
SLOW = LinkProfile(up=300_000, down=600_000, round_trip=0.05)
"""A weak link, over which a step takes a quarter of a second; without it, it takes a few milliseconds."""
MANY_STEPS = 100_000


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with a_browser() as browser:
        yield browser


def serve(*words: str) -> AbstractContextManager["subprocess.Popen[str]"]:
    return program("gpu_server", "serve", *words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def take_part(name: str, port: int, data: Path, *words: str) -> AbstractContextManager["subprocess.Popen[str]"]:
    flags = {"server": f"ws://127.0.0.1:{port}", "name": name, "data": data, "batch_size": 4, "state_dir": data.parent / name}
    return program("edge_client", "train", *arguments(flags), *words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def amount(num_bytes: float) -> str:
    """As the page says it, in three digits."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{float(f'{num_bytes:.3g}'):g}\u00a0{unit}"
        num_bytes /= 1000
    return f"{float(f'{num_bytes:.3g}'):g}\u00a0GB"


def says(page: "Page", words: str) -> None:
    """The heading does, which is a sentence of its own."""
    page.get_by_role("heading", level=1, name=re.compile(words, re.IGNORECASE)).wait_for()


def test_page_shows_a_run_to_its_end_whatever_happens(
    browser: "Browser", tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]
) -> None:
    port, run_dir = free_port(), tmp_path / "run"
    settings = {"model": tiny_model, "cut_layer": 1, "lora_rank": 2, "clients": 3, "steps": STEPS, "checkpoint_every": 5}
    data = {name: pairs_file(name, 60, 100 * place) for place, name in enumerate(("kitchen", "garage", "attic"))}
    with ExitStack() as stack:
        server = stack.enter_context(serve(*arguments({**settings, "run_dir": run_dir, "port": port})))
        read_until(server, "listening on")
        page = stack.enter_context(a_page(browser, f"http://127.0.0.1:{port}/"))
        says(page, "0 of 3 devices")
        link = stack.enter_context(ShapedLink(port, SLOW))
        held_out = ("--eval-data", str(data["attic"]), "--eval-every", "10")
        stack.enter_context(take_part("kitchen", port, data["kitchen"], *held_out))
        stack.enter_context(take_part("garage", link.port, data["garage"]))
        attic = stack.enter_context(take_part("attic", port, data["attic"]))
        says(page, r"step \d+ of 40, 3 of 3 devices")

        page.locator("#notices .slow").wait_for()
        assert page.locator(".is-slow h3 bdi").inner_text() == "garage"

        attic.kill()
        page.locator(".devices > li:is([data-state=lost], [data-state=late])").get_by_role("heading", name="attic").wait_for()
        assert violations(page) == []
        stack.enter_context(take_part("attic", port, data["attic"]))
        page.locator(".devices > li[data-state=connected]").get_by_role("heading", name="attic").wait_for()
        says(page, r"step (1\d|2\d) of 40, 3 of 3 devices")

        server.send_signal(signal.SIGKILL)
        page.locator("#away").wait_for()
        assert page.title().startswith("away: ")
        server.wait()
        again = stack.enter_context(serve("--resume", *arguments({"run_dir": run_dir, "port": port})))
        page.locator("#away").wait_for(state="hidden")
        says(page, r"step \d+ of 40, 3 of 3 devices")
        again.wait()

        page.get_by_text("The server has ended").first.wait_for()
        shows_what_was_written(page, run_dir)


def shows_what_was_written(page: "Page", run_dir: Path) -> None:
    rows = metrics(run_dir)
    assert [line["step"] for line in rows] == list(range(1, STEPS + 1))
    assert figures(page.locator("#figures"))["loss"] == f"{rows[-1]['loss']:.3f}"
    for name in ("kitchen", "garage", "attic"):
        shown = figures(row(page, name))
        assert shown["samples"] == "60"
        assert shown["batch"] == "4"
        assert shown["loss"] == f"{rows[-1]['clients'][name]['loss']:.3f}"
        assert shown["up"] == amount(sum(line["clients"][name]["bytes_up"] for line in rows))
        assert shown["down"] == amount(sum(line["clients"][name]["bytes_down"] for line in rows))
    plot = page.get_by_role("slider", name="Loss")
    plot.press("Home")
    for line in rows:
        assert plot.get_attribute("aria-valuetext").startswith(f"step {line['step']}: {line['loss']:.3f}, smoothed ")
        plot.press("ArrowRight")

    evaluations = list(RunFiles(run_dir).evaluations())
    assert evaluations
    held_out = page.get_by_role("slider", name="Held-out perplexity")
    held_out.press("End")
    last = evaluations[-1]
    assert held_out.get_attribute("aria-valuetext") == f"step {last.step}: {float(f'{last.perplexity:.3g}'):g}"

    assert page.get_by_role("slider", name="Loss").locator("line.restart").count() == 1
    told = [event.text for event in RunFiles(run_dir).events() if event.level != "debug" and event.kind != "checkpoint"][-50:]
    assert page.locator("#events bdi").all_inner_texts() == told[::-1]


def test_page_with_a_token_is_shown_to_who_has_it(browser: "Browser", tiny_model: Path, tmp_path: Path) -> None:
    flags = {"model": tiny_model, "cut_layer": 1, "clients": 3, "steps": STEPS, "run_dir": tmp_path, "port": free_port()}
    with serve("--page-token", *arguments(flags)) as server:
        url = read_until(server, "the run in a browser: ").split()[-1]
        with a_page(browser, url) as page:
            says(page, "0 of 3 devices")
        answer = browser.new_page().goto(url.partition("?")[0])
        assert answer.status == 401
        assert "the token of the page is missing or wrong" in answer.text()


@pytest.fixture
def long_run(tiny_model: Path, tmp_path: Path, pairs_file: Callable[..., Path]) -> Path:
    """A folder of a run of 100,000 steps, of which all but two are made up."""
    from edge_client import EdgeClient

    run_dir = tmp_path / "long"
    settings = {"model": str(tiny_model), "cut_layer": 1, "lora_rank": 2, "steps": 3 * MANY_STEPS, "checkpoint_every": 1}
    with GpuServer(**settings, run_dir=run_dir, port=0) as server:
        with EdgeClient(server.url, name="kitchen", data=pairs_file("kitchen", 8), state_dir=tmp_path / "state") as client:
            steps = client.train()
            next(steps)
            next(steps)
        server.stop()
        with pytest.raises(RunEndedEarly):
            list(server.train())
    files = RunFiles(run_dir)
    (first, *_) = files.steps()
    with (run_dir / "metrics.jsonl").open("w") as lines:
        for step in range(1, MANY_STEPS + 1):
            made_up = replace(
                first, number=step, time=first.time - 0.1 * (MANY_STEPS - step), step_seconds=0.1, loss=1 + 5 / step**0.3
            )
            lines.write(json.dumps(row_of(made_up)) + "\n")
    checkpoints = Checkpoints(run_dir / "checkpoints")
    saved = checkpoints.latest(files.description.run)
    assert saved is not None
    checkpoints.write(replace(saved, step=MANY_STEPS))
    return run_dir


def test_run_of_many_steps_opens_at_once(browser: "Browser", long_run: Path) -> None:
    port = free_port()
    with serve("--resume", *arguments({"run_dir": long_run, "port": port})) as server:
        read_until(server, "listening on")
        url = f"http://127.0.0.1:{port}/"
        with a_page(browser, url) as page:
            says(page, "100,000 of 300,000")  # once the server has read what the run has written
        before = time.monotonic()
        with a_page(browser, url) as page:
            says(page, "100,000 of 300,000")
            plot = page.get_by_role("slider", name="Loss")
            plot.wait_for()
            seconds = time.monotonic() - before
            points = plot.locator(".smooth polyline").get_attribute("points")
            assert 500 <= len(points.split(" ")) <= 1000
            plot.press("End")
            assert re.search(r"^steps [\d,]+ to 100,000: mean 1\.158, ", plot.get_attribute("aria-valuetext"))
        assert seconds < 2
