"""Every committed picture, drawn from the committed data, can be read: its texts, its axes, its colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evidence.__main__ import claims
from evidence.pictures import committed
from PIL import Image

from figure_texts import covered, shown_texts
from oprd.runs.pictures import DPI, FONT, WIDTH, style
from oprd.tools.show_bridge import draw_bridge

ROOT = Path(__file__).parent.parent
PICTURES = {str(file.relative_to(ROOT)): (file, draw) for file, draw in committed(claims()).items()}


def is_colour_bar(axes):
    return axes.get_label() == "<colorbar>"


def has_label(axes, side):
    """Its own label, that of a panel that shares the axis, of its figure, or names instead of numbers."""
    shared = getattr(axes, f"get_shared_{side}_axes")().get_siblings(axes)
    ticks = [text.get_text() for text in getattr(axes, f"get_{side}ticklabels")()]
    around = (axes.figure, axes.figure.figure)
    return (
        any(getattr(panel, f"get_{side}label")() for panel in shared)
        or any(getattr(figure, f"get_sup{side}label")() for figure in around)
        or not ticks
        or any(any(letter.isalpha() for letter in text.replace("e-", "")) for text in ticks)
    )


@pytest.fixture(scope="module", params=PICTURES)
def picture(request):
    with style():
        figure = PICTURES[request.param][1]()
        yield request.param, figure


def test_no_text_covers_another_or_leaves_the_picture(picture):
    assert covered(picture[1]) == []


def test_all_text_has_one_size(picture):
    assert {text.get_fontsize() for text in shown_texts(picture[1])} == {FONT}


def test_a_panel_has_one_y_axis_and_every_axis_a_label(picture):
    panels = [axes for axes in picture[1].axes if not is_colour_bar(axes)]
    places = {tuple(np.round(axes.get_window_extent().bounds, 1)) for axes in panels}
    assert len(places) == len(panels)
    for axes in panels:
        assert has_label(axes, "x"), axes.get_title("left")
        assert has_label(axes, "y"), axes.get_title("left")


def test_the_committed_file_has_the_drawn_size_on_white(picture):
    name, figure = picture
    with Image.open(PICTURES[name][0]) as image:
        assert image.width == round(WIDTH * DPI)
        assert image.height == pytest.approx(figure.get_figheight() * DPI, abs=1)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)  # also on a dark page


def test_all_committed_pictures_are_drawn_from_data():
    known = {"docs/report.png"}  # the page of a browser
    there = {str(f.relative_to(ROOT)) for folder in ("docs", "evidence") for f in (ROOT / folder).rglob("*.png")}
    assert there == set(PICTURES) | known


@pytest.mark.parametrize("copies", [1, 6])
def test_a_bridge_of_few_and_of_many_layers(copies):
    layers = json.loads((ROOT / "evidence/e09_rank/result.json").read_text())["layers"]
    with style():
        figure = draw_bridge({"layers": layers * copies, "rank": 16})
        assert covered(figure) == []
    cosine, r2 = figure.axes
    assert sorted(text.get_text() for text in cosine.texts if text.get_text())[0] == "layers 1 ← 1"
    assert len(cosine.texts) - 1 == len(layers) * copies == len(r2.lines) - 1  # a mark at the rank, a line at one half
