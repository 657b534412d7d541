"""Every committed picture, drawn from the committed data, can be read: its texts, its axes, its colours."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from evidence.__main__ import claims
from evidence.pictures import committed
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from oprd.bridge.show import draw_bridge
from oprd.pictures import (
    COLOURS,
    DPI,
    FONT,
    WIDTH,
    End,
    band,
    level,
    look,
    name_ends,
    name_two,
    new_figure,
    save,
    spread,
    style,
)
from oprd.runs.curves import draw_run
from oprd.tools.compare.figure import draw_comparison

ROOT = Path(__file__).parent.parent
PICTURES = {str(file.relative_to(ROOT)): (file, draw) for file, draw in committed(claims()).items()}


def is_colour_bar(axes):
    return axes.get_label() == "<colorbar>"


def shown_texts(figure):
    """Every text that a reader sees: tick labels inside their axis, and all other texts."""
    ticks, shown = set(), []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {id(tick.label1), id(tick.label2)}
                if low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    shown += [tick.label1, tick.label2]
    shown += [text for text in figure.findobj(Text) if id(text) not in ticks]
    return [text for text in shown if text.get_visible() and text.get_text().strip()]


def covered(figure):
    """Pairs of texts that cover each other, and texts that leave the figure. Without the lines that lead to names."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), Text.get_window_extent(text).shrunk(0.98, 0.85)) for text in shown_texts(figure)]
    pairs = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    inside = figure.bbox.padded(2)
    return pairs + [a for a, box in boxes if not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1))]


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


def test_text_can_be_read_at_400_pixels():
    assert FONT / 72 * 400 / WIDTH >= 8  # pixels


def linear(colour):
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def lightness(colour):
    return 116 * luminance(colour) ** (1 / 3) - 16


DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]  # Machado et al. 2009
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]


def test_colours_differ_in_grey_and_for_colour_blind_readers_and_stand_out_from_white():
    assert all(1.05 / (luminance(colour) + 0.05) >= 3 for colour in COLOURS)  # WCAG 2.2, 1.4.11
    assert all(abs(lightness(a) - lightness(b)) >= 7 for a, b in combinations(COLOURS[:6], 2))
    for seen in (DEUTERANOPIA, PROTANOPIA):
        for a, b in combinations(COLOURS[:6], 2):
            one, other = (np.clip(np.array(seen) @ linear(c), 0, 1) ** (1 / 2.2) for c in (a, b))
            assert np.linalg.norm(one - other) > 0.1, (a, b)


def test_lines_differ_also_without_colour():
    looks = {(str(found["marker"]), str(found["linestyle"])) for found in map(look, range(16))}
    assert len(looks) == 16


sizes = st.lists(st.tuples(st.floats(0, 100), st.floats(1, 30)), max_size=8)


@given(sizes, st.floats(120, 300))
def test_texts_are_moved_apart_and_stay_below_the_top(texts, top):
    texts = sorted(texts)
    middles, heights = [m for m, _ in texts], [h for _, h in texts]
    moved = spread(middles, heights, top)
    for (one, a), (other, b) in zip(
        zip(moved, heights, strict=True), list(zip(moved, heights, strict=True))[1:], strict=False
    ):
        assert other - one >= min(1, top / max(sum(heights), 1e-9)) * (a + b) / 2 - 1e-6
    assert all(place <= top + 1e-6 for place in moved)


def test_texts_that_are_apart_stay():
    assert spread([10.0, 50.0], [12.0, 12.0], 100) == [10.0, 50.0]
    assert spread([10.0, 11.0], [12.0, 12.0], 100) == [10.0, 22.0]
    assert spread([99.0, 99.5], [10.0, 10.0], 100) == [85.0, 95.0]


def test_names_at_the_ends_of_lines_that_end_together():
    with style():
        figure = new_figure(2.4)
        axes = figure.subplots()
        ends = [level(axes, 0.5, "teacher", "--")]
        for index in range(6):
            axes.plot([0, 1], [0, 0.5], **look(index))
            band(axes, [0, 1], [0, 0.4], [0.1, 0.6], look(index)["color"])
            ends.append(End(f"line {index}", 1, 0.5, look(index)["color"]))
        name_ends((axes, ends))
        assert covered(figure) == []
        names = {text.get_text(): text for text in axes.texts}
        assert set(names) == {"teacher", *(f"line {index}" for index in range(6))}
        assert names["line 3"].get_color() == COLOURS[3]
        assert len({round(Text.get_window_extent(text).x0) for text in names.values()}) == 1  # one column


def test_two_lines_are_named_where_they_are_farthest_apart():
    with style():
        axes = new_figure(2.4).subplots()
        name_two(axes, [1, 2, 3], {"low": [0.0, 0.1, 0.5], "high": [0.1, 0.9, 0.5]})
    (low, high) = axes.texts
    assert (low.xy, low.get_va()) == ((2, 0.1), "top")
    assert (high.xy, high.get_va()) == ((2, 0.9), "bottom")


def write_metrics(file, **values):
    rows = [{"step": step, "loss": 1 / step, "completions/mean_length": 9.0, **values} for step in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"accuracy": 0.0}, "Accuracy is not drawn: it is 0 % in each of 4 steps."),
        ({}, "Accuracy is not drawn: there are no graded answers."),
    ],
)
def test_a_panel_that_would_show_nothing_is_replaced_by_a_sentence(tmp_path, values, sentence):
    with style():
        figure = draw_run(write_metrics(tmp_path / "m.jsonl", **values), {})
    assert figure.get_supxlabel() == sentence
    assert "Accuracy" not in [axes.get_title("left") for axes in figure.axes]


def test_a_run_that_never_was_right_shows_the_line_of_its_teacher(tmp_path):
    with style():
        metrics = write_metrics(tmp_path / "m.jsonl", accuracy=0.0)
        figure = draw_run(metrics, {"teacher": {"avg_at_k": 0.985, "ci95": [0.97, 0.99]}})
        assert covered(figure) == []
    accuracy = figure.axes[0]
    assert [text.get_text() for text in accuracy.texts] == ["rollouts in training", "teacher 98.5 %"]
    assert accuracy.get_ylabel() == "correct, %"


@pytest.mark.parametrize("copies", [1, 6])
def test_a_bridge_of_few_and_of_many_layers(copies):
    layers = json.loads((ROOT / "evidence/e09_rank/result.json").read_text())["layers"]
    with style():
        figure = draw_bridge({"layers": layers * copies, "rank": 16})
        assert covered(figure) == []
    cosine, r2 = figure.axes
    assert sorted(text.get_text() for text in cosine.texts if text.get_text())[0] == "layers 1 ← 1"
    assert len(cosine.texts) - 1 == len(layers) * copies == len(r2.lines) - 1  # a mark at the rank, a line at one half


def test_names_with_a_dollar_are_no_formulas(tmp_path):
    report = json.loads((ROOT / "evidence/bridge/compare_wider.json").read_text())
    renamed = json.loads(json.dumps(report).replace("bridge_then_output", "$a_b$"))
    with style():
        figure = draw_comparison(renamed)
        save(figure, tmp_path / "new.png")
    assert any(text.get_text() == "$a_b$ (0.001)" and not text.get_parse_math() for text in figure.findobj(Text))
