"""The live page in a real browser, told what the server would tell it."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from browser import a_browser, a_page, figures, row, violations
from fake_live import EVENTS, NOW, PAGE, FakeLive, a_device, a_snapshot, an_event, an_update, columns, fake_live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STEP_214 = "Step 214 of 900, 3 of 3 devices, 12 min left."
MANY_STEPS = 100_000
LARGEST = 60_000  # bytes of the three files together


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with a_browser() as browser:
        yield browser


@pytest.fixture
def live() -> Iterator[FakeLive]:
    with fake_live(a_snapshot()) as live:
        yield live


def shown(page: "Page", words: str | re.Pattern[str]) -> None:
    page.get_by_text(words).first.wait_for()


def settled(page: "Page") -> None:
    """Everything that the page has been told is drawn."""
    page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")


def test_state_is_the_heading_and_the_title(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        page.get_by_role("heading", name=STEP_214, level=1).wait_for()
        assert page.title() == "step 214 of 900, 3 of 3 devices, 12 min left · kitchens"
        assert page.get_by_role("progressbar").evaluate("(bar) => [bar.value, bar.max]") == [214, 900]
        live.tell(an_update(step=215, sentence="step 215 of 900, 2 of 3 devices, 11 min left"))
        page.get_by_role("heading", name="Step 215 of 900, 2 of 3 devices, 11 min left.", level=1).wait_for()
        assert page.title() == "step 215 of 900, 2 of 3 devices, 11 min left · kitchens"


def test_where_not_all_devices_are_listed_it_says_how_all_of_them_are(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        assert page.locator("#more-devices").is_hidden()
        states = {"connected": 9_000, "late": 12, "lost": 991, "left": 0}
        live.tell(an_update(more_devices=10_000, device_states=states))
        shown(page, "Of 10,003 devices, 9,000 take part, 12 are late, 991 have lost their connection. 3 are listed")
        live.tell(an_update(more_devices=0, device_states=states))
        page.locator("#more-devices").wait_for(state="hidden")


def test_page_is_three_small_files_that_ask_for_nothing_else(browser: "Browser", live: FakeLive) -> None:
    assert sum((PAGE / name).stat().st_size for name in ("page.html", "page.css", "page.js")) <= LARGEST
    assert [file.suffix for file in sorted(PAGE.glob("page.*"))] == [".css", ".html", ".js"]
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
    assert live.asked == {"/": 1, "/page.css": 1, "/page.js": 1, "/live": 1}


def test_token_of_the_address_is_given_to_the_server_that_the_page_is_of(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, f"{live.url}?token=5ecret") as page:
        shown(page, STEP_214)
    assert live.queries["/live"] == {"token=5ecret"}


def test_figures_are_what_the_server_says(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        assert figures(page.locator("#figures")) == {
            "loss": "2.134",
            "held-out perplexity": "8.91",
            "tokens a second": "1,240",
            "bytes a second": "3.1\u00a0MB",
            "last checkpoint": "step 200",
            "running for": "1\u00a0h 30\u00a0min",
        }
        assert figures(row(page, "attic")) == {
            "samples": "9,310",
            "batch": "8",
            "tokens/s": "413",
            "loss": "2.113",
            "up": "1.19\u00a0GB",
            "down": "987\u00a0MB",
        }


def test_slow_device_is_named_at_the_top_and_marked_in_its_row(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        notice = page.locator("#notices > *")
        notice.wait_for()
        assert notice.inner_text().startswith("▲ garage is 2.4 times as slow as the others, who wait for it; 52 % of its time")
        assert row(page, "garage").get_by_text("▲ the slowest device").is_visible()
        assert not row(page, "kitchen").get_by_text("slowest").is_visible()
        notice.get_by_role("link").click()
        assert page.evaluate("() => document.activeElement.textContent") == "●garage"


def test_slow_device_is_named_where_most_time_goes_elsewhere(browser: "Browser", live: FakeLive) -> None:
    bottleneck = {
        "part": "server_compute",
        "client": None,
        "share": 0.6,
        "sentence": "60 % goes to it",
        "advice": "a faster one",
    }
    with a_page(browser, live.url) as page:
        page.locator("#notices > *").wait_for()
        live.tell(an_update(bottleneck=bottleneck))
        shown(page, "60 % goes to it. A faster one.")
        assert page.locator("#notices > *").all_inner_texts() == [
            "▲ garage is 2.4 times as slow as the others.",
            "60 % goes to it. A faster one.",
        ]
        live.tell(an_update(bottleneck=bottleneck, devices=[a_device("kitchen"), a_device("garage")]))
        page.locator(".is-slow").wait_for(state="detached")
        assert page.locator("#notices > *").all_inner_texts() == ["60 % goes to it. A faster one."]


def test_bars_show_seconds_on_one_scale_and_say_their_shares(browser: "Browser") -> None:
    slow, fast = (4.0, 0, 12.0, 0, 4.0, 0, 0), (4.0, 0, 2.0, 0, 4.0, 0, 0)
    devices = [a_device("slow", seconds=slow), a_device("fast", seconds=fast)]
    with fake_live(a_snapshot(devices=devices)) as live, a_page(browser, live.url, reduced_motion="reduce") as page:
        shown(page, "uplink 60\u00a0%, edge compute 20\u00a0%, server compute 20\u00a0%")
        widths = {
            name: row(page, name)
            .locator(".part")
            .evaluate_all("(parts) => parts.map((part) => part.getBoundingClientRect().width)")
            for name in ("slow", "fast")
        }
        full = row(page, "slow").locator(".bar").evaluate("(bar) => bar.getBoundingClientRect().width")
        assert widths["slow"] == pytest.approx([0.2 * full, 0, 0.6 * full, 0, 0, 0.2 * full, 0], abs=0.1)
        assert widths["fast"] == pytest.approx([0.2 * full, 0, 0.1 * full, 0, 0, 0.2 * full, 0], abs=0.1)
        assert row(page, "fast").get_by_role("img").get_attribute("aria-label") == (
            "Time of its last steps: edge compute 40\u00a0%, server compute 40\u00a0%, uplink 20\u00a0%"
        )


def test_no_colour_alone_carries_a_meaning(browser: "Browser") -> None:
    states = ("connected", "late", "lost", "left", "expected")
    devices = [a_device(state, state=state, words="") for state in states]
    with fake_live(a_snapshot(devices=devices)) as live, a_page(browser, live.url) as page:
        shown(page, STEP_214)
        parts = page.locator("#parts .part").evaluate_all(
            "(parts) => parts.map((part) => getComputedStyle(part)).map((style) => style.backgroundImage + style.boxShadow)"
        )
        patterns = [re.sub(r"(rgba?|color)\(.*?\)", "", part) for part in parts]
        assert len(set(patterns)) == 7
        assert len({row(page, state).locator(".sign").inner_text() for state in states}) == len(states)
        assert len({row(page, state).locator(".words").inner_text() for state in states}) == len(states)


def test_late_and_lost_devices_say_so(browser: "Browser") -> None:
    devices = [
        a_device("late", state="late", words="is 13 min late", late_seconds=754.0),
        a_device("lost", state="lost", words="lost its connection 2 min ago", last_heard=NOW - 125, missed_steps=3),
    ]
    with fake_live(a_snapshot(devices=devices)) as live, a_page(browser, live.url) as page:
        shown(page, "is 13 min late, last heard just now")
        shown(page, "lost its connection 2 min ago, missed 3 steps")


def test_words_of_strangers_are_text(browser: "Browser") -> None:
    words = '<img src=x onerror="alert(1)"><script>alert(2)</script>&amp;'
    devices = [a_device(words, words=words, is_slowest=True, slowness=3.0), a_device("b\u202eevil")]
    snapshot = a_snapshot(
        run=words,
        sentence=words,
        codec=words,
        codec_reason=words,
        devices=devices,
        waiting_for=[{"client": words, "seconds": 3.0}],
        bottleneck={"part": "uplink", "client": words, "share": 0.5, "sentence": words, "advice": words},
    )
    snapshot["events"] = [an_event(words, kind="codec", level=words), an_event(words, level="error", client=words)]
    snapshot["marks"].append({"step": 3, "time": NOW, "kind": words})
    for place, client in enumerate(snapshot["evaluations"]["client"]):
        snapshot["evaluations"]["client"][place] = client if client == "garage" else words
    with fake_live(snapshot) as live, a_page(browser, live.url) as page:
        page.get_by_role("heading", level=1, name=words).wait_for()
        settled(page)
        assert page.locator("img, body script").count() == 0
        assert page.title().startswith(words)
        assert page.get_by_text(words, exact=False).count() >= 10


def test_charts_read_values_out_with_arrow_keys(browser: "Browser", live: FakeLive) -> None:
    curve = live.snapshot["curve"]
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        plot = page.get_by_role("slider", name="Loss")
        plot.focus()
        read = []
        for key in ("End", "ArrowLeft", "ArrowLeft", "ArrowRight", "Home", "ArrowLeft", "PageUp"):
            page.keyboard.press(key)
            read.append(plot.get_attribute("aria-valuenow"))
        assert read == ["214", "213", "212", "213", "1", "1", "22"]
        assert plot.get_attribute("aria-valuetext").startswith(f"step 22: {curve['loss'][21]:.3f}, smoothed ")
        assert page.locator(".reading.held").first.inner_text() == plot.get_attribute("aria-valuetext")
        # All charts point at the same step.
        assert "step 22: " in page.locator("figure", has_text="Tokens a second").locator(".reading").inner_text()
        page.keyboard.press("Escape")
        assert page.locator(".reading.held").count() == 0


def test_all_that_can_be_used_is_reached_with_the_keyboard_and_seen_there(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        reached = []
        while True:
            page.keyboard.press("Tab")
            if page.evaluate("() => document.activeElement === document.body"):
                break
            name, outline, top = page.evaluate(
                """() => {
                    const now = document.activeElement;
                    const name = now.getAttribute("aria-label") ?? (now.labels?.[0] ?? now).textContent;
                    return [name, getComputedStyle(now).outlineStyle, now.getBoundingClientRect().top];
                }"""
            )
            assert outline != "none"
            assert top >= 0
            reached.append(name)
        assert reached == [
            "Skip to the devices",
            "garage",
            "What the bars show",
            "steps",
            "whole run",
            "Loss, nats per token, values along the run",
            "Held-out perplexity, values along the run",
            "Tokens a second, values along the run",
            "Bytes a second, values along the run",
            "Learning rate and gradient norm",
        ]
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("() => document.activeElement.id") == "devices"


def test_curves_go_along_steps_or_time_and_over_all_or_the_last_quarter(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        axis = page.get_by_role("slider", name="Loss").locator(".axes text[text-anchor=middle]")
        assert axis.all_text_contents() == ["50", "100", "150", "200"]
        page.get_by_label("last quarter").check()
        assert axis.all_text_contents() == ["170", "180", "190", "200", "210"]
        page.get_by_role("radio", name="time").check()
        assert all(re.fullmatch(r"\d\d:\d\d(:\d\d)?", text) for text in axis.all_text_contents())
        page.get_by_role("slider", name="Loss").press("End")
        assert re.match(r"step 214, .*\d\d:\d\d:\d\d: ", page.locator(".reading.held").first.inner_text())


def test_checkpoints_restarts_and_codecs_are_marks_with_a_legend(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        marks = page.get_by_role("slider", name="Loss").locator(".marks")
        assert {kind: marks.locator(f".{kind}:is(line, polygon)").count() for kind in ("checkpoint", "restart", "codec")} == {
            "checkpoint": 9,
            "restart": 1,
            "codec": 1,
        }
        assert page.locator("#marks").inner_text().split("\n") == ["checkpoint", "restart of the server", "another codec"]
        page.get_by_role("slider", name="Loss").focus()
        for _ in range(64):
            page.keyboard.press("ArrowLeft")
        assert page.get_by_role("slider", name="Loss").get_attribute("aria-valuetext").endswith("; restart of the server")


def test_events_are_the_last_fifty_with_the_newest_first(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        texts = page.locator("#events bdi")
        texts.first.wait_for()
        assert texts.all_inner_texts() == [event["text"] for event in reversed(EVENTS)]
        assert page.locator("#events li.warning strong").inner_text() == "warning"
        live.tell(an_update(events=[an_event(f"event {number}") for number in range(45)]))
        shown(page, "event 44")
        assert texts.count() == 50
        assert texts.all_inner_texts()[:2] == ["event 44", "event 43"]
        assert texts.last.inner_text() == EVENTS[5]["text"]
        assert (
            page.locator("#codecs li")
            .all_inner_texts()[0]
            .endswith("int8 from step 40 on: links take 41 % of the time step 40")
        )


def test_server_that_is_away_is_said_to_be_and_found_again(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        live.stop()
        shown(page, re.compile(r"The server is away since \d\d:\d\d:\d\d, trying again\."))
        assert page.title().startswith("away: step 214")
        assert page.get_by_text(STEP_214).is_visible()
        live.snapshot = a_snapshot(260, sentence="step 260 of 900, 3 of 3 devices, 10 min left", restarts=2)
        live.start()
        shown(page, "Step 260 of 900")
        page.locator("#away").wait_for(state="hidden")
        assert page.title().startswith("step 260")
        plot = page.get_by_role("slider", name="Loss")
        plot.press("End")
        assert plot.get_attribute("aria-valuenow") == "260"
        assert page.locator("#events li").count() == len(EVENTS)  # none of them twice


def test_server_whose_run_is_over_has_ended_and_is_no_alarm(browser: "Browser") -> None:
    over = a_snapshot(state="finished", sentence="the run is complete: 900 steps")
    with fake_live(over) as live, a_page(browser, live.url) as page:
        shown(page, "The run is complete: 900 steps.")
        live.stop()
        shown(page, re.compile(r"The server has ended at \d\d:\d\d:\d\d\."))
        assert page.title().startswith("the run is complete")
        assert page.locator(".is-away").count() == 0
        live.snapshot = a_snapshot(260, sentence="step 260 of 1,200")
        live.start()
        shown(page, "Step 260 of 1,200.")
        page.locator("#away").wait_for(state="hidden")


def test_server_that_is_silent_is_away(browser: "Browser", live: FakeLive) -> None:
    """A link that is cut without a word, as when a laptop sleeps."""
    with a_page(browser, live.url, now=NOW) as page:
        shown(page, STEP_214)
        page.clock.run_for(14_000)
        assert not page.locator("#away").is_visible()
        page.clock.run_for(1_500)
        page.locator("#away").wait_for()
        page.clock.run_for(5_000)
        live.wait_for("/live", 2)


def test_what_is_read_out_is_news_and_not_every_step(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url, now=NOW) as page:
        shown(page, STEP_214)
        page.evaluate(
            """() => {
                window.said = [];
                const region = document.querySelector("[role=status]");
                new MutationObserver(() => said.push(region.textContent)).observe(region, {childList: true});
            }"""
        )
        for step in range(215, 235):
            live.tell(an_update(columns(step, step), step=step, sentence=f"step {step} of 900", events=[an_event("a note")]))
        shown(page, "Step 234 of 900")
        page.clock.run_for(12_000)
        assert page.evaluate("() => said") == []
        lost = [an_event(f"device {number} has lost its connection", kind="lost") for number in range(8)]
        live.tell(an_update(events=lost[:1]))
        live.tell(an_update(sentence="told", events=[an_event("device 0 is back", kind="back")]))
        shown(page, "Told.")
        page.clock.run_for(1_000)
        assert page.evaluate("() => said") == ["Device 0 has lost its connection. Device 0 is back."]
        for event in lost:
            live.tell(an_update(sentence="all told", events=[event]))
        shown(page, "All told.")
        page.clock.run_for(1_000)
        assert len(page.evaluate("() => said")) == 1
        page.clock.run_for(10_000)
        assert page.evaluate("() => said")[1:] == ["8 things have happened; the latest: Device 7 has lost its connection."]


def test_long_run_opens_at_once_and_stays_small(browser: "Browser") -> None:
    with fake_live(a_snapshot(MANY_STEPS, sentence="step 100,000 of 900,000")) as live, a_page(browser, live.url) as page:
        shown(page, "Step 100,000 of 900,000.")
        opened = page.evaluate("() => performance.now()")
        assert opened < 2000
        count = "(line) => line.getAttribute('points').split(' ').length"
        line = page.get_by_role("slider", name="Loss").locator(".smooth polyline")
        assert line.evaluate(count) == 1000
        for first in range(MANY_STEPS + 1, MANY_STEPS + 5001, 1000):
            live.tell(an_update(columns(first, first + 999), sentence=f"step {first + 999:,} of 900,000"))
        shown(page, "Step 105,000 of 900,000.")
        assert line.evaluate(count) == 1050  # as fine as the rest
        plot = page.get_by_role("slider", name="Loss")
        plot.press("End")
        assert plot.get_attribute("aria-valuetext").startswith("steps 104,901 to 105,000: mean ")


def test_points_are_merged_where_there_are_many(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        for first in range(215, 5215, 1000):
            live.tell(an_update(columns(first, first + 999), sentence=f"step {first + 999:,}"))
        shown(page, "Step 5,214.")
        points = page.get_by_role("slider", name="Loss").locator(".smooth polyline").get_attribute("points")
        assert 1000 <= len(points.split(" ")) <= 2000


def test_steps_that_a_server_repeats_stand_there_once(browser: "Browser", live: FakeLive) -> None:
    with a_page(browser, live.url) as page:
        shown(page, STEP_214)
        live.tell(an_update(columns(201, 203), sentence="step 203"))
        shown(page, "Step 203.")
        plot = page.get_by_role("slider", name="Loss")
        plot.press("End")
        assert plot.get_attribute("aria-valuenow") == "203"
        plot.press("ArrowLeft")
        assert plot.get_attribute("aria-valuenow") == "202"


def test_page_of_a_run_that_has_hardly_begun_says_so(browser: "Browser") -> None:
    nothing = {"kind": "snapshot", "overview": {"sentence": "0 of 3 devices are here", "devices": []}, "later": True}
    with fake_live(nothing) as live, a_page(browser, live.url) as page:
        shown(page, "0 of 3 devices are here.")
        for words in ("No device has joined yet.", "Nothing has happened yet.", "No device has measured it."):
            assert page.get_by_text(words).is_visible()
        assert figures(page.locator("#figures"))["loss"] == "\u2013"
        live.tell({"kind": "a kind of a later version"})
        live.tell(an_update(columns(1, 1), sentence="step 1 of 900"))
        shown(page, "Step 1 of 900.")
        assert page.get_by_role("slider", name="Loss").is_visible()


def test_values_that_are_not_numbers_are_left_out(browser: "Browser") -> None:
    unknown = a_snapshot(loss=None, held_out=None, tokens_per_second=None, bottleneck=None, last_checkpoint=None)
    for name in ("loss", "loss_low", "loss_high", "gradient_norm"):
        unknown["curve"][name] = [None if step % 7 == 0 else value for step, value in enumerate(unknown["curve"][name])]
    unknown["curve"]["learning_rate"] = [None] * 214
    unknown["evaluations"]["perplexity"][0] = None
    for device in unknown["overview"]["devices"]:
        device.update(loss=None, last_heard=None, slowness=None, tokens_per_second=None)
    with fake_live(unknown) as live, a_page(browser, live.url) as page:
        shown(page, STEP_214)
        page.get_by_text("Learning rate and gradient norm").click()
        page.get_by_role("slider", name="Gradient norm").wait_for()
        assert page.locator("figure", has_text="Learning rate").get_by_text("Nothing yet.").is_visible()
        assert not re.search(r"NaN|null|undefined|Infinity", page.content())


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(browser: "Browser", width: int) -> None:
    long = a_snapshot(
        run="k" * 120,
        devices=[a_device("d" * 64, is_slowest=True, slowness=123.4, words="w" * 200), a_device("kitchen")],
    )
    long["events"].append(an_event("e" * 300))
    with fake_live(long) as live, a_page(browser, live.url, width=width) as page:
        shown(page, STEP_214)
        page.get_by_text("What the bars show").click()
        page.get_by_text("Learning rate and gradient norm").click()
        settled(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        for title in page.locator("h2").all():
            assert title.bounding_box()["height"] < 40  # a line


def test_hundred_devices_are_shown(browser: "Browser") -> None:
    devices = [a_device(f"device-{number}") for number in range(100)]
    devices[70].update(is_slowest=True, slowness=3.1)
    with fake_live(a_snapshot(devices=devices)) as live, a_page(browser, live.url) as page:
        page.get_by_role("link", name="device-70").click()
        assert row(page, "device-70").get_by_text("slowest").is_visible()
        assert page.evaluate("() => performance.now()") < 4000


def test_nothing_moves_for_people_who_do_not_want_it(browser: "Browser", live: FakeLive) -> None:
    duration = "() => getComputedStyle(document.querySelector('.bar .part')).transitionDuration"
    for wish, expected in (("no-preference", "0.3s"), ("reduce", "0s")):
        with a_page(browser, live.url, reduced_motion=wish) as page:
            shown(page, STEP_214)
            assert page.evaluate(duration) == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(browser: "Browser", scheme: str, width: int) -> None:
    devices = [a_device("kitchen"), a_device("garage", is_slowest=True, slowness=2.4), a_device("attic", state="lost")]
    with (
        fake_live(a_snapshot(devices=devices)) as live,
        a_page(browser, live.url, width=width, color_scheme=scheme, bypass_csp=True) as page,
    ):
        shown(page, STEP_214)
        if page.locator("#legend[open]").count() == 0:
            page.get_by_text("What the bars show").click()
        page.get_by_text("Learning rate and gradient norm").click()
        page.get_by_role("slider", name="Loss").press("ArrowLeft")
        assert violations(page) == []
        live.stop()
        shown(page, "The server is away")
        assert violations(page) == []
