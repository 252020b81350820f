"""Takes the pictures of the page in docs/, and says how long a user waits: python -m benchmarks.page_pictures [FOLDER].

Needs the extra `web`, Playwright and Chromium. The embedded generator is shown.
"""

from __future__ import annotations

import argparse
import io
import shutil
import time
from pathlib import Path

from lorag.tasks.finding import find_tasks
from lorag.web.serving import serving
from lorag.web.session import Session

_COLOURS = 96  # keeps a picture below 150 kB
ASKED = ("summarise legal text", "which day was this match played?", "who is the patient in this medical note? as JSON")
SIGHTS = {
    "web-light": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "light"},
    "web-dark": {"viewport": {"width": 1180, "height": 900}, "color_scheme": "dark"},
    "web-narrow": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}


def main(folder: Path) -> None:
    """Serves the page, uses it as a user would, and writes one picture for each kind of screen."""
    from PIL import Image
    from playwright.sync_api import Page, sync_playwright

    def ask(page: Page, text: str) -> float:
        """Seconds from the press of the button to the answer."""
        page.locator("#description textarea").fill(text)
        start = time.perf_counter()
        page.locator("#generate").click()
        page.get_by_text(f"Adapters for “{text}”").wait_for(timeout=120_000)
        return time.perf_counter() - start

    start = time.perf_counter()
    example = find_tasks("sandbox", "test")["legal-summarise-plain"].split("test")
    with (
        serving(Session.from_folders([]), inputs="\n".join(one.input for one in example[:2])) as address,
        sync_playwright() as playwright,
    ):
        print(f"served after {time.perf_counter() - start:.1f} s")  # noqa: T201
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for number, (name, sight) in enumerate(SIGHTS.items()):
            page = browser.new_page(**sight)
            page.goto(address)
            page.locator("#description textarea").wait_for(timeout=120_000)
            if number == 0:
                waits = [f"{ask(page, text):.2f} s" for text in ASKED]
                print(f"first generation {waits[0]}, later ones {', '.join(waits[1:])}")  # noqa: T201
            ask(page, ASKED[0])
            began = time.perf_counter()
            page.locator("#run").click()
            page.locator("#answers tbody tr").first.wait_for(timeout=120_000)
            print(f"base and adapted answers {time.perf_counter() - began:.2f} s")  # noqa: T201
            page.mouse.move(5, 5)
            with Image.open(io.BytesIO(page.screenshot(full_page=True))) as picture:
                picture.convert("RGB").quantize(_COLOURS, method=Image.Quantize.MAXCOVERAGE).save(folder / f"{name}.png", optimize=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs"), help="gets the pictures")
    main(parser.parse_args().folder)
