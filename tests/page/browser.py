"""Debian's Chromium, driven by playwright, with a page that must not complain."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from conftest import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

__all__ = ["a_browser", "a_page", "figures", "row", "violations"]

AXE = REPOSITORY / ".venv-axe/node_modules/axe-core/axe.min.js"


@contextmanager
def a_browser() -> Iterator["Browser"]:
    """The tests that want one are skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which `make test-page` installs")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=root)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def a_page(
    browser: "Browser", url: str, *, width: int = 1280, height: int = 900, now: float | None = None, **settings: Any
) -> Iterator["Page"]:
    """
    Open a page, and ask nobody but the server for anything.

    Args:
        now: what its clock shows at first, in seconds since 1970; the test may let it run. None leaves it as it is.
        settings: of the browser's context, such as color_scheme="dark".
    """
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    page = context.new_page()
    elsewhere: list[str] = []
    errors: list[str] = []
    host = url.partition("//")[2].partition("/")[0]
    page.on("request", lambda request: elsewhere.append(request.url) if _host_of(request.url) not in ("", host) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if _is_complaint(message) else None)
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    page.set_default_timeout(20_000)
    if now is not None:
        page.clock.install(time=datetime.fromtimestamp(now, timezone.utc))
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert not elsewhere
    assert not errors


def row(page: "Page", name: str) -> "Locator":
    """What is shown of a device."""
    return page.locator(".devices > li").filter(has=page.get_by_role("heading", name=name))


def figures(place: "Locator") -> dict[str, str]:
    """Of a list of figures, by their names."""
    return dict(zip(place.locator("dt").all_inner_texts(), place.locator("dd:not(.more)").all_inner_texts(), strict=True))


def violations(page: "Page") -> list[str]:
    """What axe-core finds wrong with a page for people who cannot see it, or not well."""
    if not AXE.exists():
        pytest.skip("needs axe-core, which `make test-page` installs")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    return [f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']]}" for each in found["violations"]]


def _host_of(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return "" if scheme == "data" or not rest else rest.partition("/")[0]


def _is_complaint(message: Any) -> bool:
    # That the server is away is something the page says itself, in words.
    return message.type in ("error", "warning") and "WebSocket connection to" not in message.text
