"""`oprd report`: the page says what the files say, is inert whatever is in them, and is the same each time."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
import yaml
from PIL import Image

from oprd.alignment.model_pair import ModelPair
from oprd.bridge.teacher import BridgedTeacher
from oprd.models.loading import LoadedModel, ModelInfo
from oprd.runs.columns import MOST_POINTS
from oprd.states.teachers import FrozenTeacher
from oprd.tools.bench.common import byte_tokenizer
from oprd.tools.report import curves, draw
from oprd.tools.report.distances import other_texts, read_rollouts, rounded
from oprd.tools.report.page import render, write_page
from oprd.tools.report.read import read_runs
from oprd.tools.report.rollouts import (
    FORMAT,
    Distances,
    Pair,
    Side,
    as_side,
    best_and_worst,
    choose,
    logged_pairs,
    read_distances,
    spread_rows,
    write_distances,
)
from oprd.tools.report.table import table
from oprd.tools.report.text import shown, shown_token
from tiny import random_rollouts, tiny_model, tiny_tokenizer

STEPS, LAYERS = 60, 3
CONFIG = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "train_limit": 8, "seed": 7, "learning_rate": 2e-3, "max_steps": STEPS, "representation_weight": 1.0, "bridge": None,
    "output_space": "reverse_kl", "output_weight": {"start": 0.0, "end": 2.0, "schedule": "linear", "steps": 10},
    "max_completion_length": 12, "layers": "all",
}  # fmt: skip


def measures(average: float, length: float) -> dict:
    return {
        "avg_at_k": average, "best_at_k": min(1.0, average + 0.2), "ci95": [average - 0.04, average + 0.05], "k": 4,
        "problems": 50, "mean_length": length, "finished": 0.9375, "ungraded": 0,
    }  # fmt: skip


SUMMARY = {
    "student_before": measures(0.255, 52.506), "student_after": measures(0.913, 51.25), "teacher": measures(0.949, 50.0),
    "gap_closed": 0.948, "train_seconds": 246.38, "steps": STEPS, "seconds": 261.31, "seed": 7,
    "software": {"oprd": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


def step_line(step: int, shift: float = 0.0) -> dict:
    """A line of metrics.jsonl whose values are a function of the step."""
    row = {f"cosine/layer_{l:02d}": 0.9 + 0.001 * step / l + shift for l in range(1, LAYERS + 1)}
    row |= {
        "step": step,
        "loss": 3.0 / step + shift,
        "loss/representation": 2.0 / step,
        "loss/output_space": 1.0 / step,
    }
    row |= {"grad_norm": 10.0 / step**2, "learning_rate": 2e-3 * (1 - step / STEPS), "accuracy": step / STEPS}
    row |= {"completions/mean_length": 50.0 + step % 7, "completions/clipped_ratio": 0.5 / step}
    row |= {"time/rollout": 0.2, "time/grade": 0.001, "time/teacher": 0.1, "time/update": 0.3 + step / 100}
    row |= {"time/optimizer": 0.004, "cosine": 0.95, "memory/peak_gib": 1.5 + step / 100}
    if step % 10 == 1:
        row |= {"entropy/student": 0.5 / step, "entropy/teacher": 0.1, "overlap": 0.9, "reverse_kl": 0.3 / step}
    return row


def rollout_line(step: int, prompt: object = "1+1=", completion: str = "2", correct: bool | None = True) -> dict:
    return {
        "step": step, "prompt": prompt, "completion": completion, "tokens": 2, "finish_reason": "stop", "correct": correct,
    }  # fmt: skip


def write_lines(file, rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


DOT = draw.draw_panel(curves.ACCURACY, [])


@pytest.fixture
def pictures():
    """Asked for by tests that look at pictures; the others do without, since drawing takes most of the time."""


@pytest.fixture(autouse=True)
def _dots(request, monkeypatch):
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(draw, "_uri", lambda figure: DOT)
        monkeypatch.setattr(draw, "_name_ends", lambda *arguments: None)


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder, complete unless told otherwise."""

    def make(name="run", *, config=None, summary=SUMMARY, metrics=None, completions=None, distances=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **(config or {})}, sort_keys=False))
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        write_lines(folder / "metrics.jsonl", metrics or [step_line(s) for s in range(1, STEPS + 1)])
        logged = [
            rollout_line(1, completion="3", correct=False),
            rollout_line(STEPS),
            rollout_line(STEPS, "5+5=", "10"),
        ]
        write_lines(folder / "completions.jsonl", completions or logged)
        if distances is not None:
            write_distances(folder, distances)
        return folder

    return make


def found_distances(pairs, logged=(), **changes) -> Distances:
    values = {
        "format": FORMAT, "steps": STEPS, "student": "s", "teacher": "t", "layers": [1, 2, 3], "bridge": None,
        "sampling": "greedy", "unavailable": None, "before_after": list(pairs), "logged": list(logged), "notes": [],
    }  # fmt: skip
    return Distances(**{**values, **changes})


class Page(HTMLParser):
    """A page taken apart: every tag with its attributes, rows of tables, numbers of <data>, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.data: list[list[float]] = []  # numbers of each row
        self.text = ""
        self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
            self.data.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self._cell = True
        if tag == "data" and self.rows:
            self.data[-1].append(float(dict(attributes)["value"]))

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._cell = False

    def handle_data(self, text):
        self.text += text
        if self._cell:
            self.rows[-1][-1] += text

    def row(self, *names: str) -> tuple[list[str], list[float]]:
        """Cells and numbers of the row that begins with `names`."""
        (index,) = [i for i, cells in enumerate(self.rows) if tuple(c.strip() for c in cells[: len(names)]) == names]
        return self.rows[index][len(names) :], self.data[index]

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(*folders) -> str:
    return render(read_runs(list(folders)))


# --- the page says what the files say


def test_the_head_table_is_the_summary(make_run):
    other = {**SUMMARY, "gap_closed": 0.5, "student_after": measures(0.6, 40.0)}
    page = Page(report(make_run("one"), make_run("two", summary=other, config={"seed": 8})))
    assert page.rows[0] == ["run", "Aone", "Btwo"]
    assert page.row("Avg@k before [95 %]") == (["25.5 % [21.5, 30.5] (k = 4)"] * 2, [0.255] * 2)
    assert page.row("Avg@k after [95 %]") == (
        ["91.3 % [87.3, 96.3] (k = 4)", "60.0 % [56.0, 65.0] (k = 4)"],
        [0.913, 0.6],
    )
    assert page.row("Avg@k of the teacher [95 %]")[1] == [0.949] * 2
    assert page.row("gap closed")[1] == [0.948, 0.5]
    assert page.row("mean length after") == (["51.2 tokens", "40.0 tokens"], [51.25, 40.0])
    assert page.row("finished after") == (["93.8 %"] * 2, [0.9375] * 2)
    took = sum(0.605 + step / 100 for step in range(1, STEPS + 1))
    assert page.row("steps took") == ([f"{took:.1f} s"] * 2, [pytest.approx(took)] * 2)
    assert page.row("whole command took") == (["4.4 min"] * 2, [261.31] * 2)
    assert page.row("peak GPU memory")[1] == [1.5 + STEPS / 100] * 2
    assert page.row("steps") == ([str(STEPS)] * 2, [STEPS] * 2)
    assert page.row("seed")[0] == ["7", "8"]
    assert page.row("student")[0] == ["embedded:tiny/student"] * 2
    assert page.row("objective")[0] == ["1 × representation + (0 to 2) × reverse_kl"] * 2
    assert page.row("software")[0] == ["oprd 0.1.0, torch 2.13.0"] * 2


def test_a_resumed_run_counts_the_seconds_of_all_its_steps(make_run):
    resumed = {**SUMMARY, "train_seconds": 3.0, "seconds": 6.0, "resumed_from_step": 50}
    page = Page(report(make_run(summary=resumed)))
    assert page.row("steps took")[1] == [pytest.approx(sum(0.605 + step / 100 for step in range(1, STEPS + 1)))]
    assert page.row("whole command took")[0] == ["6.0 s, from step 50, where it was resumed"]
    untimed = [{"step": 1, "loss": 1.0}]
    assert Page(report(make_run("untimed", summary=resumed, metrics=untimed))).row("steps took")[1] == [3.0]


def test_of_many_runs_a_text_that_all_share_is_written_once(make_run):
    page = Page(report(*(make_run(name) for name in "abcd")))
    assert page.row("student")[0] == ["embedded:tiny/student"]
    assert {cell["colspan"] for cell in page.all("td") if "colspan" in cell} == {"4"}
    assert page.row("gap closed")[1] == [0.948] * 4  # measured: each


def test_the_curves_in_numbers_are_the_metrics(make_run):
    run = make_run()
    page = Page(report(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("accuracy", "loss", "loss/output_space", "grad_norm", "entropy/teacher", "overlap", "learning_rate"):
        values = [line[key] for line in lines if key in line]
        assert page.row(key, "Arun")[1] == [values[0], values[-1], min(values), max(values)]


def test_the_time_split_is_the_mean_over_the_steps(make_run):
    run = make_run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    split = curves.time_split(read_runs([run])[0])
    assert list(split) == list(curves.PHASES)
    for phase in curves.PHASES:
        assert split[phase] == pytest.approx(sum(line[f"time/{phase}"] for line in lines) / STEPS)
    numbers = Page(report(run)).data
    assert [*split.values(), sum(split.values())] in numbers


def test_the_heat_map_holds_every_measured_cosine(pictures, make_run):
    metrics = [step_line(s) for s in range(1, STEPS + 1)]
    metrics[4]["cosine/layer_02"] = None  # a NaN, as a run writes it
    for line in metrics[10:]:
        if line["step"] % 10:  # a loss without states measures now and then
            for key in [key for key in line if key.startswith("cosine")]:
                del line[key]
    record = read_runs([make_run(metrics=metrics)])[0]
    heat = curves.heat(record)
    assert heat.layers == [1, 2, 3]
    assert heat.steps == [*range(1, 11), 20, 30, 40, 50, 60]
    for row, layer in zip(heat.values, heat.layers, strict=True):
        for value, step in zip(row, heat.steps, strict=True):
            expected = metrics[int(step) - 1][f"cosine/layer_{layer:02d}"]
            assert math.isnan(value) if expected is None else value == expected
    picture = Image.open(io.BytesIO(base64.b64decode(draw.draw_heat(heat, 0.9, 1.0).partition(",")[2])))
    assert picture.width > 600
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_layers_are_in_the_order_of_their_numbers(make_run):
    line = {"step": 1, "loss": 1.0, **{f"cosine/layer_{l:02d}": l / 200 for l in range(1, 121)}}
    assert curves.heat(read_runs([make_run(metrics=[line])])[0]).layers == list(range(1, 121))


def test_evaluations_start_before_and_end_after_training(make_run):
    lines = [step_line(s) for s in range(1, STEPS + 1)]
    lines.insert(30, {"step": 30, "eval_avg_at_k": 0.7, "eval_ci95_low": 0.6, "eval_ci95_high": 0.8, "eval_k": 4})
    record = read_runs([make_run(metrics=lines)])[0]
    assert [(p.step, p.value, p.low) for p in curves.evaluations(record)] == [
        (0, 0.255, pytest.approx(0.215)), (30, 0.7, 0.6), (STEPS, 0.913, pytest.approx(0.873)),
    ]  # fmt: skip


def test_a_running_mean_is_centred_and_keeps_straight_lines():
    assert [curves.window(n) for n in (1, 39, 40, 100, 1000)] == [1, 1, 3, 5, 51]
    line = [float(i) for i in range(100)]
    assert curves.running_mean(line) == pytest.approx(line)
    peak = [0.0] * 50 + [5.0] + [0.0] * 49
    assert curves.running_mean(peak)[47:54] == [0, 1, 1, 1, 1, 1, 0]


def test_a_running_mean_is_computed_only_where_it_is_drawn():
    values = [float(i % 7) for i in range(1000)]
    assert curves.running_mean(values, [0, 500, 999]) == [curves.running_mean(values)[i] for i in (0, 500, 999)]


def test_a_long_run_is_drawn_with_few_points_and_keeps_its_numbers(make_run):
    lines = [{"step": s, "loss": 1.0 + s % 10, "cosine/layer_01": 1 / s} for s in range(1, 20_001)]
    lines[7776]["loss"], lines[12_344]["loss"] = 50.0, 0.5
    run = make_run(metrics=lines)
    record = read_runs([run])[0]
    (curve,) = curves.curves([record], curves.Panel("Loss", ("loss",)))
    assert len(curve.steps) == len(curve.values) == len(curve.smooth) <= MOST_POINTS
    assert curves.extent(curve) == (2.0, 1.0, 0.5, 50.0)
    whole = curves.running_mean([line["loss"] for line in lines])
    assert curve.smooth == [whole[int(step) - 1] for step in curve.steps]
    heat = curves.heat(record)
    assert len(heat.steps) == len(heat.values[0]) == MOST_POINTS
    assert (heat.steps[0], heat.steps[-1], heat.measured) == (1, 20_000, 20_000)
    assert heat.values[0] == [1 / step for step in heat.steps]
    page = Page(report(run))
    assert page.row("loss", "Arun")[1] == [2.0, 1.0, 0.5, 50.0]
    assert f"1 layers, {MOST_POINTS} steps of 20000 measured" in page.text


def test_a_panel_is_there_for_what_any_run_measured(make_run):
    plain = [{"step": s, "loss": 1.0 / s, "loss/representation": 1.0 / s} for s in (1, 2)]
    page = report(make_run("plain", metrics=plain, completions=[rollout_line(1)], config={"output_space": None}))
    assert "Loss term" not in page  # one term: it is the loss
    assert "Not measured in this run:" in page
    both = report(make_run("full"))
    for title in (
        "Loss term: representation",
        "Loss term: output_space",
        "Entropy",
        "Gradient norm",
        "Peak GPU memory",
    ):
        assert f"<h3>{title}</h3>" in both
        assert f"<h3>{title}</h3>" not in page


def test_runs_of_one_name_are_told_apart(make_run):
    one, two = make_run("a/lr_1/seed_0"), make_run("b/lr_1/seed_0")
    assert [r.name for r in read_runs([one, two])] == ["a/lr_1/seed_0", "b/lr_1/seed_0"]
    assert [r.name for r in read_runs([one])] == ["seed_0"]


# --- the page is inert

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><a href='https://evil.example'>x</a></div></pre></style>"
    "{{ 7*7 }}\x1b[2J\x00\u202eevil\u2066\u200b\u2028\ue000 ]]>&lt;&amp; a\u0301\u0302\u0303\u0304\u0305\u0306 עברית <!-- "
    + "W"
    * 3000
)
NAME = "<img src=x onerror=alert(1)> $\\frac{ _\x1b[31m\u202e"
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ue000]")
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article", "h1", "h2", "h3", "h4", "h5",
    "p", "ul", "ol", "li", "del", "ins", "a", "div", "span", "strong", "code", "pre", "table", "caption", "thead", "tbody", "tr",
    "th", "td", "data", "figure", "img", "figcaption", "details", "summary", "script", "label", "input", "fieldset", "legend",
    "select", "option", "output",
}  # fmt: skip
ATTRIBUTES = {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "a": {"class", "href"}, "img": {"src", "alt"},
    "th": {"scope", "class"}, "td": {"class", "colspan"}, "data": {"id", "value"}, "nav": {"aria-label"}, "ul": {"class"},
    "li": {"value"},
    "section": {"id", "aria-labelledby"}, "h2": {"id"}, "p": {"class"}, "span": {"class", "title", "aria-hidden", "data-l"},
    "div": {"id", "class", "role", "aria-label", "tabindex", "hidden"}, "article": {"class", "data-verdict"},
    "details": {"class"}, "label": {"for"}, "select": {"id"}, "option": {"data-top"}, "output": {"id", "aria-live"},
    "input": {"type", "id", "name", "value", "checked", "autocomplete", "spellcheck"},
}  # fmt: skip


def assert_inert(html: str) -> Page:
    """No script but our own, no handler, no inline style, nothing from outside, nothing a reader would not see."""
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag in TAGS
        assert set(attributes) <= ATTRIBUTES.get(tag, set()), tag
        assert not any(INVISIBLE.search(value or "") for value in attributes.values())
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+", image["src"]) for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(re.fullmatch(r"#[a-z]+", link["href"]) for link in page.all("a"))
    assert {link["href"][1:] for link in page.all("a")} <= {a["id"] for _, a in page.tags if "id" in a}
    assert not INVISIBLE.search(html)
    digests = []
    for tag in ("style", "script"):
        assert html.count(f"<{tag}>") == 1
        text = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        assert not re.search(r"url\(|@import|expression|https?:|fetch|import\(|innerHTML|eval", text)
        digests.append(base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return page


def hostile_run(make_run, name=NAME):
    tokens = tuple(HOSTILE[i : i + 5] for i in range(0, len(HOSTILE), 5))
    side = Side(HOSTILE, HOSTILE, None, True, HOSTILE, 5, tokens, tuple(0.001 * i for i in range(len(tokens))))
    message = [{"role": HOSTILE, "content": HOSTILE}]
    return make_run(
        name,
        config={"model": HOSTILE, "teacher_model": [HOSTILE], "output_space": HOSTILE, "bridge": HOSTILE, "seed": {"x": 1}},
        summary={**SUMMARY, "software": {HOSTILE: HOSTILE}, "student_after": {**measures(0.5, 1.0), "k": HOSTILE}},
        metrics=[{**step_line(s), f"loss/{HOSTILE}": 1.0, f"cosine/layer_{HOSTILE}": 0.5} for s in (1, 2)],
        completions=[rollout_line(1, HOSTILE, HOSTILE), rollout_line(2, message, HOSTILE)],
        distances=found_distances([Pair(side, side)], teacher=HOSTILE, student=HOSTILE, notes=[HOSTILE], sampling=HOSTILE),
    )  # fmt: skip


def test_hostile_text_is_shown_and_does_nothing(pictures, make_run):
    page = assert_inert(report(hostile_run(make_run)))
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "49" not in page.row("student")[0][0]
    for code in ("U+001B", "U+0000", "U+202E", "U+2066", "U+200B", "U+2028", "U+E000", "U+0306"):
        assert code in page.text
    assert "RIGHT-TO-LEFT OVERRIDE" in {span.get("title") for span in page.all("span")}


def test_a_hostile_reason_is_escaped_where_distances_are_not_available(make_run):
    run = make_run(distances=found_distances([], unavailable=HOSTILE, layers=[]))
    page = assert_inert(report(run))
    assert "Distances by token: not available. <script>alert(1)</script>" in page.text


def test_hostile_files_that_cannot_be_read_are_quoted_harmlessly(make_run):
    run = make_run()
    (run / "summary.json").write_text(HOSTILE)
    (run / "config.yaml").write_text(f"a: [{HOSTILE}")
    (run / "distances.json").write_text(json.dumps({"format": HOSTILE}))
    page = assert_inert(report(run))
    assert "config.yaml cannot be read" in page.text
    assert "distances.json cannot be read" in page.text
    assert "<script>alert(1)" in page.text  # the config is shown as it is


def test_visible_text():
    assert shown("a\tb\nc é 数 🙂") == "a\tb\nc é 数 🙂"
    assert shown("<&\"'>") == "&lt;&amp;&#34;&#39;&gt;"
    assert shown("\r\x7f") == (
        '<span class="ctl" title="control character">U+000D</span><span class="ctl" title="control character">U+007F</span>'
    )
    assert "U+D800" in shown("\ud800")
    assert shown("x" * 12, 5) == 'xxxxx<span class="cut"> … 7 characters left out</span>'
    assert shown_token("a\n") == 'a<span class="ctl" title="line break">↵</span>\n'
    assert "part of a character" in shown_token("")


# --- the same each time, and written whole


def test_the_same_files_give_the_same_bytes(pictures, make_run):
    run = hostile_run(make_run, "hostile")
    assert report(run) == report(run)


def test_the_page_replaces_a_report_and_nothing_else(tmp_path):
    file = tmp_path / "report.html"
    page = "<!doctype html>\n<!-- written by oprd report -->\n"
    write_page(file, page)
    write_page(file, page + "again")
    assert file.read_text().endswith("again")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(ValueError, match="holds something that no report wrote"):
        write_page(other, page)
    assert other.read_text() == "mine"
    with pytest.raises(ValueError, match="is a folder"):
        write_page(tmp_path, page)
    with pytest.raises(ValueError, match="there is no folder"):
        write_page(tmp_path / "no" / "report.html", page)


# --- partial runs, and folders that are none


def test_a_killed_run_is_reported_with_what_is_missing(make_run):
    run = make_run(summary=None, metrics=[step_line(s) for s in range(1, 38)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('not json\n[1]\n{"step": 38, "loss": NaN, "accuracy": 1e999}\n{"step": 39, "lo')
    (run / "completions.jsonl").unlink()
    record = read_runs([run])[0]
    assert record.steps.last_step == 38
    page = assert_inert(report(run))
    for note in (
        "no summary.json: the run was stopped before it could write one, or is still at work",
        "metrics.jsonl:38: no JSON object; 2 of 40 lines cannot be read and are left out",
        "metrics.jsonl:41 was cut off by a kill and is left out",
        "no completions.jsonl: no rollout can be shown",
    ):
        assert note in page.text
    assert page.row("steps") == ([f"38 of {STEPS}, not ended"], [38])
    assert "No rollouts of two steps were logged." in page.text


def test_alarms_are_told_in_their_own_words(make_run):
    lines = [step_line(step) | {"alarm": 1.0, "alarm_text": f"the loss rises {step} ×"} for step in range(1, 8)]
    (record,) = read_runs([make_run("new", metrics=lines)])
    assert "alarm at step 1: the loss rises 1 ×" in record.notes
    assert "2 more alarms, the last at step 7" in record.notes
    (old,) = read_runs([make_run("old", metrics=[step_line(1) | {"alarm": 1.0}])])
    assert "alarm at step 1: see the log of the run" in old.notes


def test_a_run_that_was_killed_after_an_evaluation_shows_it(make_run):
    lines = [step_line(1), {"step": 1, "eval_avg_at_k": 0.5, "eval_ci95_low": 0.4, "eval_ci95_high": 0.6}]
    run = make_run(metrics=lines, summary={"student_before": measures(0.2, 3.0), "teacher": None})
    page = Page(report(run))
    assert page.row("Avg@k after [95 %]") == (["50.0 % [40.0, 60.0] at step 1, the last evaluation"], [0.5])
    assert "summary.json is incomplete" in page.text


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_any_one_file_makes_a_run(make_run, kept):
    run = make_run()
    for file in run.iterdir():
        if file.name != kept:
            file.unlink()
    assert "is still at work" in report(run) or kept == "summary.json"


@pytest.mark.parametrize("line", ["", "{}\n", '{"step": "x", "loss": 1}\n', '{"step": 1, "loss": null}\n', "\xff\n"])
def test_metrics_without_a_number_are_no_crash(make_run, line):
    run = make_run()
    (run / "metrics.jsonl").write_text(line, encoding="latin-1")
    assert_inert(report(run))


@pytest.mark.parametrize("values", [(1e308, -1e308), (1e38, 1.0), (5e-324, 1e38), (0.0, 0.0), (1e-300, 1e-310), (3, 3)])
def test_a_loss_that_ran_away_leaves_the_axis_and_not_the_report(pictures, make_run, values):
    keys = ("loss", "accuracy", "cosine/layer_01", "time/rollout", "completions/clipped_ratio")
    lines = [{"step": 10**12 * i, **dict.fromkeys(keys, value)} for i, value in enumerate(values)]
    assert_inert(report(make_run(metrics=lines)))


def test_what_is_no_run_is_refused_with_the_reason(make_run, tmp_path):
    run = make_run("compare/runs/a/seed_0")
    evaluation, empty, file = tmp_path / "eval", tmp_path / "empty", tmp_path / "file"
    for folder in (evaluation, empty):
        folder.mkdir()
    (evaluation / "eval.json").write_text("{}")
    file.write_text("")
    for folders, reason in (
        ([tmp_path / "nowhere"], "there is no folder"),
        ([file], "is a file; name the folder of a run"),
        ([evaluation], "is what `oprd eval` wrote"),
        ([empty], "is not a run: it has none of config.yaml, metrics.jsonl, summary.json"),
        ([tmp_path / "compare"], f"is not a run; it holds 1, such as {re.escape(str(run))}"),
        ([run, run / ".." / "seed_0"], "is named twice"),
        ([], "name at least one run folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_runs(folders)


# --- rollouts side by side


def test_the_same_prompt_is_paired_across_steps():
    rows = [
        rollout_line(1, "a"), rollout_line(1, "b"), rollout_line(2, "a"), rollout_line(5, "b"), rollout_line(9, "c"),
    ]  # fmt: skip
    assert [(e["prompt"], e["step"], l["step"]) for e, l in logged_pairs(rows, 9)] == [("b", 1, 5), ("a", 1, 2)]
    assert len(logged_pairs(rows, 1)) == 1
    apart = [
        rollout_line(1, "a"),
        rollout_line(1, "b"),
        rollout_line(3, "c"),
        rollout_line(4, "d"),
        rollout_line(4, "e"),
    ]
    pairs = [Pair(as_side(e), as_side(l)) for e, l in logged_pairs(apart, 9)]
    assert [(p.early.prompt, p.late.prompt, p.same_prompt) for p in pairs] == [("a", "d", False), ("b", "e", False)]
    assert logged_pairs([rollout_line(1)], 9) == []
    assert logged_pairs([], 9) == []


class Rows:
    """Rows that can be looped over and not held."""

    def __init__(self, rows):
        self.rows, self.loops = rows, 0

    def __iter__(self):
        self.loops += 1
        return iter(self.rows)


def test_rollouts_are_paired_in_a_few_loops_over_the_file():
    rows = Rows([rollout_line(step, f"question {step % 500}") for step in range(1, 2001)])
    pairs = logged_pairs(rows, 3)
    assert [(e["step"], l["step"]) for e, l in pairs] == [(1, 1501), (2, 1502), (3, 1503)]
    assert rows.loops == 2


def test_logged_rollouts_are_read_from_the_file_in_each_loop(make_run):
    run = make_run(completions=[rollout_line(1), {"step": 2}, {"completion": "a"}, rollout_line(3)])
    with (run / "completions.jsonl").open("a") as file:
        file.write('no\n{"step": 4, "compl')
    record = read_runs([run])[0]
    assert [row["step"] for row in record.completions] == [1, 3]
    assert [row["step"] for row in record.completions] == [1, 3]
    assert "completions.jsonl:5: no JSON object; 1 of 5 lines cannot be read and are left out" in record.notes
    assert "completions.jsonl:6 was cut off by a kill and is left out" in record.notes


def side(correct, *distances) -> Side:
    return Side("p", "t", correct=correct, tokens=tuple("x" for _ in distances), distances=distances)


def test_best_worst_and_most_divergent():
    won, lost = Pair(side(False, 0.1), side(True, 0.1)), Pair(side(True, 0.1), side(False, 0.2))
    kept, far = Pair(side(True, 0.1), side(True, 0.1)), Pair(side(True, 0.1), side(True, 0.1, 0.9))
    assert choose([kept, lost, far, won]) == [("best", won), ("worst", lost), ("most divergent", far)]
    assert choose([kept, far]) == [("best", kept), ("worst (none is wrong in the end) and most divergent", far)]
    wrong = Pair(side(False), side(False))
    assert choose([wrong, wrong])[0] == ("best (none is right in the end)", wrong)
    ungraded = Pair(side(None), side(None))
    assert choose([ungraded, ungraded]) == [("not graded: the first", ungraded)]
    assert choose([]) == []


def test_best_and_worst_are_answers_to_one_problem():
    right, wrong, far = side(True, 0.1), side(False, 0.1), side(True, 0.9)
    assert best_and_worst([right, wrong, far]) == Pair(right, wrong)
    assert best_and_worst([far, right]) == Pair(right, far)  # equal verdicts: the smaller distance
    assert best_and_worst([side(0.25), side(0.75)]) == Pair(side(0.75), side(0.25))
    assert best_and_worst([right, right]) is None
    assert best_and_worst([right]) is None


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (5, [0, 1, 2, 3, 4]), (9, [0, 2, 4, 6, 8])])
def test_logged_rollouts_are_listed_at_equal_distances(count, chosen):
    rows = [{"step": step} for step in range(count)]
    assert spread_rows(rows, 5) == ([rows[i] for i in chosen], count)


def test_logged_rollouts_are_on_the_page_with_their_verdicts(make_run):
    logged = [rollout_line(step, f"{step}+0=", f"is {step}", step % 2 == 0) for step in range(1, 501)]
    page = Page(report(make_run(completions=logged)))
    assert "200 of 500, at equal distances" in page.text
    assert "is 500" in page.text
    listed = [a["data-verdict"] for a in page.all("article") if a.get("class") == "row"]
    assert len(listed) == 200
    assert set(listed) == {"right", "wrong"}


def test_a_token_has_the_colours_of_its_layers(make_run):
    """One digit a scale: the mean over layers, then each layer on its own scale."""
    layers = ((0.1, 0.2, 0.4), (0.0, 0.01, 0.02))
    mean = tuple((a + b) / 2 for a, b in zip(*layers, strict=True))
    one = Side("1+1=", "2", None, True, "stop", 3, ("2", "x", "y"), mean, layers)
    page = Page(report(make_run(distances=found_distances([Pair(one, one)], shown_layers=[1, 3]))))
    scales = [mean[2], 0.4, 0.02]  # each token is there four times: 98 % of the 12 lie below the largest
    digits = [s["data-l"] for s in page.all("span") if "data-l" in s][:3]
    assert [float(o["data-top"]) for o in page.all("option")] == pytest.approx(scales, rel=0.01)
    assert digits == ["".join(str(min(int(10 * v / t), 9)) for v, t in zip(token, scales, strict=True))
                      for token in zip(mean, *layers, strict=True)]  # fmt: skip


def test_a_token_has_the_colour_of_its_distance(make_run):
    before = Side("1+1=", "3", None, False, "stop", 3, ("3", "x", "\n"), (0.0, 0.25, 0.5))
    after = Side("1+1=", "2", None, True, "length", 2, ("2", "<eos>"), (0.125, 0.05))
    page = Page(report(make_run(distances=found_distances([Pair(before, after)]))))
    spans = [
        (s["class"], s["title"]) for s in page.all("span") if re.fullmatch(r"d\d", s.get("class", "")) and "title" in s
    ]
    top = 0.25  # 98 % of five tokens lie below the fourth
    assert spans == [(f"d{min(int(10 * d / top), 9)}", f"{d:.4f}") for d in (0.0, 0.25, 0.5, 0.125, 0.05)]
    assert "mean distance 0.2500" in page.text
    assert "✗ wrong" in page.text
    assert "✓ right" in page.text
    assert "cut off by the limit" in page.text


def test_distances_of_an_earlier_run_or_damaged_ones_are_not_shown(make_run):
    pair = Pair(side(True, 0.1), side(True, 0.1))
    run = make_run(distances=found_distances([pair]))
    assert read_distances(run, STEPS) == (found_distances([pair]), None)
    assert "after 60 steps, the run has 70 now" in read_distances(run, 70)[1]
    assert read_distances(run.parent, STEPS) == (None, None)
    file = run / "distances.json"
    for damage in (
        lambda d: d["before_after"][0]["late"].update(distances=[0.1, 0.2]),
        lambda d: d["before_after"][0]["late"].update(distances=[-1.0]),
        lambda d: d.pop("layers"),
        lambda d: d.update(format=99),
    ):
        content = json.loads(file.read_text())
        damage(content)
        (run / "distances.json").write_text(json.dumps(content))
        found, reason = read_distances(run, STEPS)
        assert found is None
        assert "write it again" in reason
        write_distances(run, found_distances([pair]))
    file.write_bytes(file.read_bytes()[:50])
    assert "write it again" in read_distances(run, STEPS)[1]


# --- distances, measured


def reference_distances(
    student, teacher, rollouts, project=lambda l, s, t: (s, t), partner=lambda l: l, layers=(1, 2, 3)
):
    """The slow, obvious way: every rollout alone, all hidden states, a loop over tokens, in double precision."""
    results = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            states = [m(ids, output_hidden_states=True).hidden_states for m in (student, teacher)]
        own = []
        for t in range(len(completion)):
            at = len(prompt) - 1 + t
            total = 0.0
            for layer in layers:
                pair = project(layer, states[0][layer][:, at], states[1][partner(layer)][:, at])
                s, u = (x[0].double() for x in pair)
                total += 1 - float(s @ u / (s.norm() * u.norm()))
            own.append(total / len(layers))
        results.append(own)
    return results


def token_distances(pair, rollouts) -> list[list[float]]:
    """The distance at every response token of every rollout: the mean over layers."""
    return [rounded(read.distances_LT.mean(0)) for read in read_rollouts(pair, rollouts)]


def flat(nested) -> list[float]:
    return [value for line in nested for value in line]


def compared(student, teacher, layers):
    tokenizer = tiny_tokenizer()
    return ModelPair(LoadedModel(student, tokenizer, ModelInfo.of(student, "m", tokenizer)), teacher, layers=layers)


def test_distances_are_those_of_a_slow_loop():
    student, teacher, rollouts = tiny_model(seed=1), tiny_model(seed=2), random_rollouts(count=7)
    for layers in ((1, 2, 3), (3,), (1, 2)):
        found = token_distances(compared(student, FrozenTeacher(teacher), layers), rollouts)
        assert [len(line) for line in found] == rollouts.completion_lengths
        expected = reference_distances(student, teacher, rollouts, layers=layers)
        assert flat(found) == pytest.approx(flat(expected), abs=2e-6)
    assert set(flat(token_distances(compared(student, FrozenTeacher(student), (1, 2, 3)), rollouts))) == {0.0}


def test_distances_through_a_bridge_are_in_its_space():
    from oprd.bridge import Bridge
    from oprd.bridge.statistics import PairStatistics
    from oprd.models.fingerprint import fingerprint

    student, teacher = tiny_model(seed=1), tiny_model(seed=2, num_hidden_layers=5, hidden_size=48)
    rollouts, maps = random_rollouts(count=7), (1, 3, 5)
    parts = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        statistics = {l: PairStatistics(32, 48) for l in (1, 2, 3)}
        for own in statistics.values():
            own.update(torch.randn(300, 32), torch.randn(300, 48))
        parts.append(statistics)
    prints = [fingerprint(model, tiny_tokenizer(), "m") for model in (student, teacher)]
    bridge = Bridge.fit(*parts, maps, student=prints[0], teacher=prints[1], rank=6)
    found = token_distances(compared(student, BridgedTeacher(FrozenTeacher(teacher), bridge), (1, 2, 3)), rollouts)
    expected = reference_distances(
        student, teacher, rollouts, partner=lambda l: maps[l - 1],
        project=lambda l, s, t: (bridge.project_student(l, s), bridge.project_teacher(l, t)),
    )  # fmt: skip
    assert flat(found) == pytest.approx(flat(expected), abs=1e-5)


class WithoutHead:
    """A teacher elsewhere, of which only states are here."""

    modules, identity = (), "far"

    def __init__(self, teacher):
        self.info, self.states = teacher.info, teacher.states


def test_the_teachers_token_is_the_likeliest_of_its_own_logits():
    student, teacher, rollouts = tiny_model(seed=1), tiny_model(seed=2), random_rollouts(count=7)
    pair = compared(student, FrozenTeacher(teacher), (3,))
    with torch.no_grad():
        expected = [
            teacher(torch.tensor([[*p, *c]])).logits[0, len(p) - 1 : -1].argmax(-1).tolist()
            for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)
        ]
    assert [one.preferred for one in read_rollouts(pair, rollouts)] == expected
    headless = read_rollouts(compared(student, WithoutHead(FrozenTeacher(teacher)), (3,)), rollouts)
    assert [one.preferred for one in headless] == [[]] * 7


def test_the_teachers_text_stands_in_place_of_the_students():
    from tokenizer_kinds import byte_level, wrapped

    tokenizer = wrapped(byte_level())
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b", " ")}
    assert all(len(found) == 1 for found in ids.values())
    a, b, blank = (found[0] for found in ids.values())
    end, other_end = tokenizer.eos_token_id, 1 if tokenizer.eos_token_id != 1 else 2
    found = other_texts(tokenizer, [a, blank, b, end, end], [a, b, blank, other_end, a], [end, other_end])
    assert found == ["", "b", " ", "", "a"]
    assert other_texts(tokenizer, [a, b], [], [end]) == []
    halves = byte_tokenizer(300)  # a token a byte: é and è differ in their second one
    first, acute, grave = halves("é")["input_ids"][0], halves("é")["input_ids"][1], halves("è")["input_ids"][1]
    assert other_texts(halves, [first, acute], [first, grave], [2]) == ["", "è"]


def test_a_wrong_answer_stands_beside_the_right_one(make_run):
    logged = [rollout_line(step, completion="3", correct=False) | {"answer": "<b>2</b>"} for step in (1, STEPS)]
    page = Page(report(make_run(completions=logged)))
    assert "✗ wrong, right: <b>2</b>" in page.text
    assert not page.all("b")


def test_a_page_lists_what_the_teacher_would_have_written(make_run):
    tokens = ("1", "2", "<b>", "x")
    one = Side("1+1=", "12<b>x", None, True, "stop", 4, tokens, (0.1,) * 4, preferred=("", "3", "", "<i>"))
    same = Side("1+1=", "12", None, True, "stop", 2, ("1", "2"), (0.1, 0.2), preferred=("", ""))
    page = Page(report(make_run(distances=found_distances([Pair(one, same)]))))
    assert "the teacher would write another token at 2 of 4" in page.text
    assert [item["value"] for item in page.all("li") if "value" in item][:2] == ["2", "4"]
    assert "12 3" in page.text
    assert "12<b>x <i>" in page.text
    assert not page.all("i")
    assert "The teacher would write each of these tokens too." in page.text
    with pytest.raises(ValueError, match="1 tokens of the teacher for 4 tokens"):
        Side("p", "t", tokens=tokens, preferred=("a",))


def test_tokens_are_the_text_that_each_adds():
    from oprd.tools.report.distances import token_texts
    from tokenizer_kinds import byte_level, wrapped

    tokenizer = wrapped(byte_level())
    text = "The answer: é 数\n🙂 x"
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text + "<end>"
    assert "" in pieces  # bytes of one character in several tokens
    cut = token_texts(tokenizer, tokenizer("🦀", add_special_tokens=False)["input_ids"][:1])
    assert cut == ["\ufffd"]


@pytest.fixture
def trained(make_run, tmp_path):
    """A run folder with models of its own: a "student before", a "student after" and a teacher."""

    def make(teacher_tokenizer=None, teacher=None, **config):
        folders = [tmp_path / name for name in ("before", "teacher")]
        for folder, model, tokenizer in (
            (folders[0], tiny_model(seed=1), tiny_tokenizer()),
            (folders[1], teacher or tiny_model(seed=2), teacher_tokenizer or tiny_tokenizer()),
        ):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        run = make_run(
            config={"model": str(folders[0]), "teacher_model": str(folders[1]), "task": "addition", **config},
            completions=[rollout_line(1, "1+2=", "12#3"), rollout_line(STEPS, "7+2=", "9#9")],
        )
        tiny_model(seed=3).save_pretrained(run / "model")
        return run

    return make


def measured(run, **arguments) -> Distances:
    from oprd.tools.report.before_after import measure_distances

    return measure_distances(read_runs([run])[0], say=lambda line: None, **{"problems": 3, **arguments})


def test_before_and_after_are_written_and_read_by_the_models_of_their_time(trained):
    run = trained()
    found = measured(run)
    assert (found.steps, found.layers, found.unavailable) == (STEPS, [1, 2, 3], None)
    assert found.sampling == "temperature 0.7, top-p 0.95, seed 7, at most 12 tokens"
    assert len(found.before_after) == 3
    tokenizer = tiny_tokenizer()
    for pair in found.before_after:
        assert pair.same_prompt
        assert pair.early.correct is False  # random models
        for one in (pair.early, pair.late):
            assert len(one.tokens) == len(one.distances) == len(one.preferred) == one.length <= 12
    for end, seed in (("early", 1), ("late", 3)):
        (logged,) = [getattr(pair, end) for pair in found.logged]
        assert logged.tokens == (*logged.text, "<eos>")
        assert logged.step == (1 if end == "early" else STEPS)
        ids = [tokenizer(logged.prompt)["input_ids"], [*tokenizer(logged.text)["input_ids"], 2]]
        one = type(random_rollouts())([ids[0]], [ids[1]], ["stop"], [""], [0])
        expected = reference_distances(tiny_model(seed=seed), tiny_model(seed=2), one)
        assert list(logged.distances) == pytest.approx(expected[0], abs=2e-6)
    assert found.notes == ["1 of 1 logged rollouts have another number of tokens than when they were sampled: a run records "
                           "their text, which was split into tokens again"] * 2  # fmt: skip
    assert measured(run) == found
    write_distances(run, found)
    assert_inert(report(run))
    assert {len(p.early.tokens) <= 4 for p in measured(run, longest=4).before_after} == {True}


def test_another_tokenizer_of_the_teacher_is_said_not_hidden(trained):
    run = trained(teacher_tokenizer=reordered_tokenizer())
    found = measured(run)
    assert found.unavailable.startswith("the teacher has another tokenizer, so tokens have no partner")
    assert [p.early.distances for p in found.before_after] == [()] * 3
    write_distances(run, found)
    page = Page(report(run))
    assert "Distances by token: not available. the teacher has another tokenizer" in page.text


def reordered_tokenizer():
    """A tokenizer that gives the digits other ids."""
    from tokenizers import Tokenizer

    plain = tiny_tokenizer()
    content = json.loads(plain.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    return type(plain)(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def test_distances_are_to_the_model_of_a_teacher_beside_fixed_responses(trained, tmp_path):
    folder = str(tmp_path / "teacher")
    run = trained(teacher_model={"model": folder, "responses": "r.jsonl"})
    found = measured(run, problems=1, longest=4)
    assert (found.unavailable, found.teacher) == (None, folder)
    shutil.rmtree(run)
    found = measured(trained(teacher_model={"url": "http://127.0.0.1:1"}), problems=1, longest=4)
    assert found.unavailable.startswith("teacher_model: a model on a server (http://127.0.0.1:1), and distances are to")


def test_other_reasons_why_there_are_no_distances(trained, tmp_path):
    assert "teacher_system_prompt" in measured(trained(teacher_system_prompt="be good")).unavailable
    for name in ("run", "before", "teacher"):
        shutil.rmtree(tmp_path / name)
    run = trained(teacher=tiny_model(seed=2, num_hidden_layers=5))
    assert "3 of 32" in measured(run).unavailable
    shutil.rmtree(tmp_path / "teacher")
    assert "there is no folder" in measured(run).unavailable  # the student is shown all the same
    shutil.rmtree(run / "model")
    with pytest.raises(ValueError, match="has no model/: the run did not come to its end"):
        measured(run)
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no config.yaml that names a model"):
        measured(run)


def test_problems_out_of_reach_are_replaced_by_logged_prompts(trained):
    found = measured(trained(eval_dataset="gone/problems.jsonl"))
    assert [pair.early.prompt for pair in found.before_after] == ["1+2=", "7+2="]
    assert {pair.late.correct for pair in found.before_after} == {None}
    assert "the prompts are logged ones, without answers: eval_dataset cannot be read from here" in found.notes[0]


def test_a_config_cannot_turn_remote_code_on(trained, monkeypatch):
    from oprd.tools.report import before_after

    asked = []
    load = before_after.load
    monkeypatch.setattr(before_after, "load", lambda name, **kwargs: asked.append(kwargs) or load(name, **kwargs))
    measured(trained(trust_remote_code=True, model_init_kwargs={"trust_remote_code": True}))
    assert [kwargs["trust_remote_code"] for kwargs in asked] == [False] * 3
    assert all("trust_remote_code" not in kwargs.get("init_kwargs", {}) for kwargs in asked)


# --- the command line, and a browser


@pytest.fixture
def oprd(monkeypatch, capsys):
    from oprd.cli import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["oprd", "report", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr()

    return run


def test_the_command_that_repeats_a_run_finds_its_config(oprd, trained, monkeypatch, tmp_path):
    run = trained()
    monkeypatch.chdir(run.parent.parent)
    named = run.relative_to(run.parent.parent)
    oprd(named, "--output", tmp_path / "out.html")
    page = assert_inert((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert f"oprd train --config {named}/config.yaml --output_dir {named}-again" in page.text
    assert (named / "config.yaml").is_file()


def test_the_command_line(oprd, trained, make_run, tmp_path):
    run, other, output = trained(), make_run("other", summary=None), tmp_path / "out.html"
    code, printed = oprd(run, "--distances", "--problems", "2", "--max-tokens", "4", "--output", output)
    assert code == 0, printed.err
    assert f"written to {run / 'distances.json'}" in printed.out.replace("\n", "")
    code, printed = oprd(run, other, "--output", output)
    assert code == 0, printed.err
    assert "other: no summary.json" in printed.out
    page = assert_inert(output.read_text(encoding="utf-8"))
    assert "The same problems before and after training" in page.text
    assert "oprd train --config run/config.yaml --output_dir run-again" in page.text
    assert (run / "config.yaml").read_text() in page.text
    code, printed = oprd(tmp_path / "nowhere", "--output", output)
    assert code == 2
    assert "there is no folder" in printed.err
    assert "Traceback" not in printed.err


def test_verdicts_near_the_edge_are_listed_and_counted(make_run):
    def line(step, answer, truth, correct=False):
        return {**rollout_line(step, completion=rf"so \boxed{{{answer}}}", correct=correct), "answer": truth}

    logged = [
        *(line(step, rf"\enclose{{<b>}}{{{step}}}", str(step)) for step in range(1, 31)),
        line(31, "6", "5"),
        line(32, "7", "7", correct=True),
        line(33, "8", None),
        rollout_line(34, completion=r"\boxed{1}", correct=False),  # of an older version: without the reference
    ]
    html = report(make_run("near", completions=logged), make_run("none"))
    page = Page(html)
    assert page.row("step 1") == ([r"\enclose{<b>}{1}", "1"], [])
    assert sum(cells[:1] == [f"step {step}"] for step in range(40) for cells in page.rows) == 20
    assert "30 of them; the first 20." in page.text
    assert "<b>" not in html
    assert page.text.count("None.") == 1


def test_every_row_of_the_table_has_a_cell_a_run(make_run):
    records = read_runs([make_run("a"), make_run("b", summary=None), make_run("c", metrics=[step_line(1)])])
    assert all(len(row.cells) == 3 for row in table(records))
    assert len({draw.letter(i) for i in range(60)}) == 60


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def screenshot(file, picture):
    """Open a page in headless Chromium; returns what its console said."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={picture.parent / 'profile'}", "--window-size=1200,6000", f"--screenshot={picture}", file.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if not picture.exists():
        pytest.skip(f"{CHROMIUM} takes no screenshot here: {result.stderr[-300:]}")
    return "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.further
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_and_refuses_what_the_policy_forbids(pictures, make_run, tmp_path):
    tokens = tuple("abcdefghij" * 30)
    one = Side("1+1=", "x", None, True, "stop", 300, tokens, tuple(0.01 * (i % 10) for i in range(300)))
    html = report(make_run(distances=found_distances([Pair(one, one)])), hostile_run(make_run))
    file, picture = tmp_path / "report.html", tmp_path / "picture.png"
    write_page(file, html)
    assert screenshot(file, picture) == ""
    colours = {colour: count for count, colour in Image.open(picture).convert("RGB").getcolors(1 << 24)}
    for wanted in (
        (0xFE, 0xE3, 0x9F),
        (0xD9, 0x60, 0x0F),
        (0x00, 0x72, 0xB2),
    ):  # d3 and d9 of the style, a run of a picture
        assert colours.get(wanted, 0) > 100
    file.write_text(
        html.replace("</body>", "<script>document.body.innerHTML = ''</script><p style='color:red'>x</p></body>")
    )
    picture.unlink()
    said = screenshot(file, picture)
    assert said.count("Content Security Policy") == 2


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"task": "run_code:make"}, "the run names code for its task, run_code:make; if you trust it, pass --task run_code:make"),
        ({"eval_dataset": "generated:run_code:make"}, "the run names code for it, generated:run_code:make"),
    ],
)  # fmt: skip
def test_a_run_that_names_code_does_not_run_it(trained, tmp_path, monkeypatch, settings, note):
    (tmp_path / "run_code.py").write_text("raise SystemExit('this code of the run is run')")
    monkeypatch.syspath_prepend(tmp_path)
    found = measured(trained(**settings), problems=1, longest=4)
    assert any(note in one for one in found.notes)
    assert found.before_after
    if "task" in settings:
        assert {pair.late.correct for pair in found.before_after} == {None}
        graded = measured(tmp_path / "run", problems=1, longest=4, task="addition")
        assert {pair.late.correct for pair in graded.before_after} == {False}
        assert not any("not graded" in one for one in graded.notes)


def test_the_losses_of_ones_own_are_named(make_run):
    own = [{"use": "oprd.objectives.flow:Flow", "weight": 0.5}, {"use": "my:Loss"}, "broken"]
    config = {**CONFIG, "representation_weight": 0, "objectives": own}
    page = Page(report(make_run(config=config)))
    assert page.row("objective")[0] == ["(0 to 2) × reverse_kl + 0.5 × flow + 1 × loss + 1 × ?"]
