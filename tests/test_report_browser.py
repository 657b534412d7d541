"""The report in a real browser: widths, light and dark, contrast, keyboard, filter, layer selector, and what the policy forbids.

Needs playwright (`pip install playwright`) and a Chromium: the machine's own, or the one of `playwright install chromium`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from oprd.tools.report.page import render, write_page
from oprd.tools.report.read import read_runs
from oprd.tools.report.rollouts import FORMAT, Distances, Pair, Side, write_distances

pytestmark = pytest.mark.further
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

# The contrast of every visible text with the background behind it (WCAG 2.2), where it is below 4.5.
PALE = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !node.checkVisibility() || node.closest("script, .letter, .skip")) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) found.push([node.tagName, node.className, contrast.toFixed(2), walk.currentNode.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here: {error.message.splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page about one run with distances by layer and a hundred logged rollouts."""
    folder = tmp_path_factory.mktemp("report") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"model": "a/student", "teacher_model": "a/teacher", "max_steps": 50})
    )
    (folder / "summary.json").write_text(json.dumps({"steps": 50, "train_seconds": 5.0, "seconds": 9.0}))
    steps = [
        {"step": i, "loss": 100 / i**2, "cosine": 0.9, "accuracy": i / 50, "time/rollout": 0.2} for i in range(1, 51)
    ]
    steps = [step | {f"cosine/layer_{l:02d}": 0.9 + step["step"] / 1000 for l in (1, 2)} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    logged = [
        {
            "step": i // 2 + 1,
            "prompt": f"{i}+1=",
            "completion": f"the answer is {i + 1}",
            "tokens": 5,
            "correct": i % 3 != 0,
        }
        for i in range(100)
    ]
    (folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
    tokens = tuple("abcdefghij")
    layers = tuple(tuple(0.01 * abs(i - shift) for i in range(10)) for shift in (0, 9))
    mean = tuple((a + b) / 2 + 0.001 * i for i, (a, b) in enumerate(zip(*layers, strict=True)))
    wrong, right = (Side("2+2=", text, None, text == "4", "stop", 10, tokens, mean, layers) for text in ("5", "4"))
    write_distances(
        folder,
        Distances(
            FORMAT,
            50,
            "s",
            "t",
            [1, 2],
            None,
            "greedy",
            None,
            [Pair(wrong, right)],
            [],
            [],
            [1, 2],
            [Pair(right, wrong)],
        ),
    )
    file = folder.parent / "report.html"
    write_page(file, render(read_runs([folder])))
    return file


@contextmanager
def opened(browser, file, *, width=1280, scheme="light", scripts=True):
    """The page, and everything it said or asked for outside of itself."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
    )
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.goto(file.as_uri())
    try:
        yield page, said
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 2560])
def test_it_fits_every_width_and_can_be_read_in_light_and_dark(browser, report, width, scheme):
    with opened(browser, report, width=width, scheme=scheme) as (page, said):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for details in page.locator("details").all():
            details.evaluate("node => node.open = true")
        assert page.evaluate(PALE) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(26, 26, 26)")
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 100)")
        assert said == []


def test_words_and_verdicts_filter_the_rollouts(browser, report):
    with opened(browser, report) as (page, said):
        shown = page.locator("article[data-verdict]:not([hidden])")
        everything = shown.count()
        page.get_by_label("Search").fill("IS 77+1=")
        assert page.locator("article.row:not([hidden])").count() == 1
        assert page.get_by_text("the answer is 78").is_visible()  # its list was opened
        assert page.locator("#found").inner_text() == f"1 of {everything} rollouts"
        page.get_by_label("Search").fill("")
        page.get_by_label("wrong").check()
        assert {a.get_attribute("data-verdict") for a in shown.all()} == {"wrong"}
        page.get_by_label("all", exact=True).check()
        assert shown.count() == everything
        assert said == []


def test_the_layer_selector_colours_tokens_by_one_layer(browser, report):
    with opened(browser, report) as (page, said):
        token = page.locator("[data-l]").first
        digits = token.get_attribute("data-l")
        assert len(digits) == 3
        assert len(set(digits)) > 1
        assert token.get_attribute("class") == f"d{digits[0]}"
        page.get_by_label("Distance").select_option("layer 2")
        assert token.get_attribute("class") == f"d{digits[2]}"
        assert page.locator("#top").inner_text() == page.locator("#layer option").nth(2).get_attribute("data-top")
        assert said == []


def test_the_keyboard_reaches_everything_and_readers_find_names(browser, report):
    with opened(browser, report) as (page, _):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the summary"
        assert page.locator(".skip").is_visible()
        reached = set()
        for _step in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"search", "layer", "SUMMARY", "A", "DIV"} <= reached
        nameless = page.locator("[tabindex='0']:not([aria-label])")
        assert nameless.count() == 0
        assert page.locator("img:not([alt]), img[alt='']").count() == 0
        assert page.locator("h1").count() == page.locator("main").count() == 1


def test_it_is_whole_without_scripts(browser, report):
    with opened(browser, report, scripts=False) as (page, _):
        assert page.get_by_label("Search").is_hidden()
        assert page.get_by_text("before training").first.is_visible()


def test_a_script_that_is_not_ours_does_not_run(browser, report, tmp_path):
    file = tmp_path / "hostile.html"
    attack = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
    file.write_text(report.read_text().replace("</main>", f"{attack}</main>"))
    with opened(browser, file) as (page, said):
        assert page.title() != "taken"
        assert sum("Content Security Policy" in text for text in said) >= 2
