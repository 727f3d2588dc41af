"""Takes the pictures of the page that the documents show: `make pictures`."""

import io
from typing import Any

from browser import a_browser, a_page
from conftest import REPOSITORY
from fake_live import NOW, a_snapshot, fake_live
from PIL import Image

PICTURES = REPOSITORY / "docs/pictures"
COLOURS = 128  # few enough for small files
WIDE, PHONE = {"width": 1280, "height": 1440}, {"width": 390, "height": 1240}
SHOTS: dict[str, dict[str, Any]] = {
    "page-light": {**WIDE, "color_scheme": "light"},
    "page-dark": {**WIDE, "color_scheme": "dark"},
    "page-phone": {**PHONE, "color_scheme": "light", "device_scale_factor": 1.5},
}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    snapshot = a_snapshot()
    snapshot["overview"]["loss"] = snapshot["curve"]["loss"][-1]
    with fake_live(snapshot) as live, a_browser() as browser:
        for name, settings in SHOTS.items():
            with a_page(browser, live.url, now=NOW, reduced_motion="reduce", **settings) as page:
                page.locator("#notices .slow").wait_for()
                picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                picture.quantize(COLOURS).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
