"""Writes docs/report.png: parts of the report of a run, light and dark, as Chromium shows them.

Usage: python scripts/shoot_report.py runs/demo    (after oprd demo; needs playwright and a Chromium, see make test-browser)
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from oprd.tools.report.before_after import measure_distances
from oprd.tools.report.page import render, write_page
from oprd.tools.report.read import read_runs
from oprd.tools.report.rollouts import write_distances

PICTURE = Path(__file__).parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1000, 1500


def main() -> None:
    """Measure distances of the run, write its page, and take its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    folder = parser.parse_args().run
    (record,) = read_runs([folder])
    write_distances(folder, measure_distances(record, problems=6))
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        file = Path(temporary) / "report.html"
        write_page(file, render(read_runs([folder])))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        curves = shoot(browser, file, "light", "#curves", 690)
        rollouts = shoot(browser, file, "dark", "#rollouts", 760)
        browser.close()
    whole = Image.new("RGB", (WIDTH, curves.height + rollouts.height), "white")
    whole.paste(curves, (0, 0))
    whole.paste(rollouts, (0, curves.height))
    whole.quantize(256).save(PICTURE, optimize=True)


def shoot(browser: Browser, file: Path, scheme: str, section: str, height: int) -> Image.Image:
    """The first `height` pixels of a section."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(file.as_uri())
    box = page.locator(section).bounding_box()
    assert box is not None, "every report has the section"
    clip = {"x": 0, "y": box["y"] - 8, "width": WIDTH, "height": height}
    return Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
