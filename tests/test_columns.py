"""Metrics of long runs as columns, and the few points of them that a picture draws."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from oprd.runs.columns import MOST_POINTS, Columns, drawn, number
from oprd.runs.curves import plot_run


def test_columns_hold_the_numbers_by_step():
    rows = [
        {"step": 3, "loss": 0.3, "a": None},
        {"step": 1, "loss": 0.1, "b": "text", "a": True},
        {"step": 2, "loss": math.inf, "a": 2},
        {"step": 3, "loss": 0.4, "a": 10**400},
    ]
    columns = Columns(iter(rows))
    assert len(columns) == 4
    assert columns.keys == ["step", "loss", "a", "b"]
    assert columns.last_step == 3
    assert columns.series("loss") == ([1, 3, 3], [0.1, 0.3, 0.4])  # equal steps in the order of the file
    assert columns.series("a") == ([2], [2])
    assert columns.series("b") == columns.series("none") == ([], [])


def test_a_table_has_every_row_with_one_of_the_keys():
    rows = [{"step": 2, "a": 2.0}, {"step": 1, "b": 1.0}, {"step": 4}, {"step": 3, "a": 3.0, "b": None}]
    steps, (a, b) = Columns(rows).table(["a", "b"])
    assert steps == [1, 2, 3]
    assert [-1 if math.isnan(v) else v for v in a] == [-1, 2, 3]
    assert [-1 if math.isnan(v) else v for v in b] == [1, -1, -1]
    assert Columns(rows).table([]) == ([], [])


@pytest.mark.parametrize("value", [None, "1", True, math.nan, math.inf, 1e101, 10**400, [1]])
def test_what_is_no_usable_number(value):
    assert number({"a": value}, "a") is None
    assert number({}, "a") is None


def test_few_points_keep_the_ends_and_the_peaks():
    values = np.random.default_rng(0).normal(size=54_321)
    values[[1234, 50_000]] = 99.0, -99.0
    chosen = drawn(values.tolist(), 100)
    assert len(chosen) <= 100
    assert chosen == sorted(set(chosen))
    assert {0, 54_320, 1234, 50_000} <= set(chosen)
    assert drawn([3.0, 1.0, 2.0], 3) == [0, 1, 2]
    assert drawn([]) == []


def write_run(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def step_line(step, **values):
    lengths = {"completions/mean_length": 9.0, "completions/clipped_ratio": 0.1}
    return {"step": step, "loss": 1 / step, **lengths, **values}


def test_the_picture_of_a_run_has_few_points_of_a_long_run(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn_points = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axis, x, y, *a, **k: (drawn_points.append(len(x)), plot(axis, x, y, *a, **k))[1]
    )
    lines = [step_line(step, **{"accuracy": 0.5, "cosine/layer_01": 0.5}) for step in range(1, 3001)]
    plot_run(write_run(tmp_path, [*lines, {"step": 3000, "eval_avg_at_k": 0.5}]), tmp_path / "curves.png")
    assert sorted(drawn_points) == [1, *[len(drawn([0.0] * 3000))] * 4, len(drawn([1 / s for s in range(1, 3001)]))]
    assert max(drawn_points) <= MOST_POINTS
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width == 1088


def test_a_damaged_line_or_a_loss_that_is_null_does_not_lose_the_picture(tmp_path, caplog):
    write_run(tmp_path, [step_line(1), step_line(2, loss=None), step_line(3)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    plot_run(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
    assert "metrics.jsonl:4 was cut off by a kill and is left out" in caplog.text
    write_run(tmp_path, [])
    with pytest.raises(ValueError, match="has no metrics to draw"):
        plot_run(tmp_path, tmp_path / "curves.png")
