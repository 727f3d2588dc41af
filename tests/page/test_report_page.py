"""The page of a report in a real browser."""

from pathlib import Path

import pytest
from browser import a_browser, a_page, violations
from written_runs import evaluation, write_run

pytest.importorskip("matplotlib")

from gpu_server.report import write_report


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_is_whole_without_javascript_or_a_network_and_for_everybody(scheme: str, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / codec, evaluations=[evaluation(4, "a", 1.0, 1)], codec=codec) for codec in ("int8", "int4")]
    url = write_report(runs, tmp_path / "report").as_uri()
    with a_browser() as browser:
        with a_page(browser, url, width=390, color_scheme=scheme, java_script_enabled=False) as page:
            assert page.get_by_role("heading", level=1).inner_text() == "2 runs that differ in codec"
            assert page.get_by_role("img").count() == 7
        with a_page(browser, url, width=390, color_scheme=scheme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == 390  # only tables scroll
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            drawn = page.locator("svg").first.locator("path").first.evaluate("(path) => getComputedStyle(path).fill")
            assert drawn == background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 25, 29)")
            assert violations(page) == []
