"""The style of pictures: colours, names beside lines, and what a run without accuracy shows."""

from __future__ import annotations

import json
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from figure_texts import covered
from oprd.runs.curves import draw_run
from oprd.runs.pictures import (
    COLOURS,
    FONT,
    WIDTH,
    End,
    band,
    level,
    look,
    name_ends,
    name_two,
    new_figure,
    spread,
    style,
)


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
    for (one, a), (other, b) in pairwise(zip(moved, heights, strict=True)):
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


def test_names_with_a_dollar_are_no_formulas():
    with style():
        figure = new_figure(2.4)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1])
        name_ends((axes, [End("$a_b", 1, 1), End("$a_{$", 1, 0.5)]))
        figure.draw_without_rendering()
    assert [(text.get_text(), text.get_parse_math()) for text in axes.texts] == [("$a_{$", False), ("$a_b", False)]


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
