"""Tables of completions, the verdict and the curves in trackers; model output is hostile text. TensorBoard's files are real."""

from __future__ import annotations

import html
import logging
import math
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from oprd import capture_states
from oprd.sanitize import printable
from oprd.training.recorder import StepRecord, distances_of
from oprd.training.tracker_media import (
    LONGEST,
    ShowCompletions,
    Table,
    as_markdown,
    completions_table,
    markdown_text,
    show_results,
)
from oprd.training.trackers import Tracker, kept_open
from oprd.types import Rollouts
from tiny import scripted_generate, tiny_model, tiny_trainer

with warnings.catch_warnings():  # of its own copy of html5lib
    warnings.simplefilter("ignore")
    from tensorboard.plugin_util import markdown_to_safe_html

HOSTILE = "a | b\n<img src=http://evil.example/x.png> ![x](http://evil.example/y.png) [l](javascript:1) `c` **d** \x1b[2J\udc80"


def cells(markdown: str) -> list[list[str]]:
    """The rows of a Markdown table as TensorBoard shows them."""
    page = markdown_to_safe_html(markdown)
    assert not re.search(r"<(img|a|code|strong|script|em)\b", page)
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with hostile completions, what TensorBoard reads of it, and the distances of its steps."""
    folder = tmp_path_factory.mktemp("tracked")
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    trainer = tiny_trainer(
        folder, report_to="tensorboard", max_steps=4, diagnostic_steps=2, num_completions_to_log=3, rows=rows, eval_dataset=rows,
        task="addition", eval_num_generations=2, per_device_train_batch_size=2, num_generations=2, micro_batch_tokens=16,
    )  # fmt: skip

    def generate(*args, **kwargs):
        sampled = scripted_generate(*args, **kwargs)
        texts = [HOSTILE if index else "2" for index in range(len(sampled.rollouts))]
        return replace(sampled, rollouts=replace(sampled.rollouts, texts=texts))

    trainer.engine.generate = generate
    records = []

    class Keep(TrainerCallback):
        def on_log(self, *_, **__):
            records.append(trainer.last_step)

    trainer.add_callback(Keep())
    trainer.train()
    (file,) = folder.rglob("events.out.tfevents*")  # one: the tracker was open to the end
    events = EventAccumulator(str(file), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return trainer, events, {record.step: record for record in records}


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")}


def test_tensorboard_gets_a_table_of_completions_after_each_step_that_measures(tracked):
    _, events, records = tracked
    tables = texts(events, "completions")
    assert [*tables] == [1, 3]
    for step, markdown in tables.items():
        head, *rows = cells(markdown)
        assert head == ["step", "prompt", "completion", "correct", "distance"]
        assert len(rows) == 3
        assert {row[0] for row in rows} == {str(step)}
        assert [float(row[4]) for row in rows] == pytest.approx(records[step].distances[:3], rel=1e-3)
        for row in rows[1:]:
            assert row[2] == printable(printable(HOSTILE, "\n"), "\n").replace("\n", " ↵ ")
        assert [row[3] for row in rows] == [str(verdict) for verdict in records[step].rewards[:3]]


def test_tensorboard_gets_the_verdict_and_the_curves_at_the_end(tracked):
    trainer, events, _ = tracked
    ((step, text),) = texts(events, "verdict").items()
    assert step == 4
    assert html.unescape(text) == trainer.summary["verdict"]
    (curves,) = events.Images("curves")
    with Image.open(trainer.run_folder.path / "curves.png") as picture:
        assert (curves.step, curves.width, curves.height) == (4, *picture.size)


def test_distances_are_those_of_the_states_of_each_rollout(tracked):
    """1 − cosine, mean over layers and positions, whatever the micro-batches; their mean is the step's cosine."""
    trainer, _, records = tracked
    assert [any(d is not None for d in records[step].distances) for step in (1, 2, 3, 4)] == [True, False, True, False]
    record = records[1]
    assert trainer.recorder.last_step.metrics["micro_batches"] > 1
    assert 1 - sum(record.distances) / 4 == pytest.approx(record.metrics["cosine"], rel=1e-5)
    start, teacher = tiny_model(), tiny_model(seed=1)
    for place, distance in enumerate(record.distances):
        alone = record.rollouts.select([place])
        with torch.no_grad():
            ours, theirs = (capture_states(model, alone).stacked() for model in (start, teacher))
        expected = 1 - torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        assert distance == pytest.approx(float(expected), rel=1e-4)


def test_distances_find_their_rollouts():
    measured = [
        torch.tensor(values) for values in ([1.0, 2.0], [3.0, 4.0], [5.0], [7.0])
    ]  # two layers of [2, 0], then of [1]
    assert distances_of(measured, [[2, 0], [1]], 3).tolist() == [3.0, 6.0, 2.0]
    both = [torch.tensor([1.0, math.nan]), torch.tensor([2.0, 3.0])]  # two teachers read the same rollouts
    first, second = distances_of(both, [[0, 1], [0, 1]], 2).tolist()
    assert first == 1.5
    assert math.isnan(second)
    assert all(math.isnan(d) for d in distances_of([], [[0], [1]], 2).tolist())


@given(st.text(max_size=60))
def test_any_text_is_one_cell_that_reads_as_written(text):
    ((head,), (cell,)) = cells(as_markdown(Table(["x"], [[text]])))
    assert head == "x"
    assert cell.split() == markdown_line(text).split()


def markdown_line(text: str) -> str:
    return printable(text, keep="\n").replace("\n", " ↵ ")


def record_of(count: int, **more) -> StepRecord:
    rollouts = Rollouts([[1]] * count, [[2]] * count, ["stop"] * count, ["x" * (LONGEST + 7)] * count, [0] * count)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    return StepRecord(
        7,
        [messages] * count,
        rollouts,
        **{"rewards": [None] * count, "rewards_by_function": {}, "losses": {}, "metrics": {}, **more},
    )


def test_a_table_shows_rewards_cuts_long_texts_and_leaves_out_what_is_not_known():
    plain = completions_table(record_of(3), 2)
    assert plain.columns == ["step", "prompt", "completion"]
    assert plain.rows == [(7, "u", "x" * LONGEST + " … (7 characters left out)")] * 2
    rewarded = record_of(2, rewards=[0.5, None], rewards_by_function={"short": [1.0, None]}, distances=[0.25, None])
    table = completions_table(rewarded, 9)
    assert table.columns == ["step", "prompt", "completion", "reward", "rewards/short", "distance"]
    assert [row[3:] for row in table.rows] == [(0.5, 1.0, 0.25), (None, None, None)]


class Board(TensorBoardCallback):
    """Stands for a tracker; its writer keeps what it gets."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.got, self.fault, self.ended = [], fault, 0
        self.tb_writer = SimpleNamespace(add_text=self._add, add_image=self._add, add_scalar=self._add)

    def _add(self, name, value, step, **_):
        if self.fault:
            raise self.fault
        self.got.append((name, step))

    def on_train_begin(self, *_, **__):
        pass

    def on_log(self, *_, **__):
        self.got.append("numbers")

    def on_train_end(self, *_, **__):
        self.ended += 1


def shown(steps: range, *, every: int = 2, most: int = 4, main: bool = True) -> list:
    board = Board()
    tracker, current = Tracker(board, "board"), {}
    show = ShowCompletions(every=every, most=most, last_step=lambda: current.get("record"), callbacks=[tracker])
    state = SimpleNamespace(global_step=steps.start, is_world_process_zero=main)
    show.on_train_begin(None, state, None)
    for step in steps:
        show.on_step_begin(None, state, None)
        state.global_step, current["record"] = step + 1, replace(record_of(1), step=step + 1)
    show.on_train_end(None, state, None)
    tracker.on_save(None, {}, None)
    tracker.on_log(None, {}, None)  # waits: training has not begun for this tracker
    return [step for name, step in (got for got in board.got if got != "numbers") if name == "completions"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 3, 5]), ({"every": 1}, [1, 2, 3, 4, 5]), ({"every": 0}, []), ({"most": 0}, []), ({"main": False}, []),
    ],
)  # fmt: skip
def test_steps_of_the_tables(settings, expected):
    assert shown(range(5), **settings) == expected


def test_a_resumed_run_does_not_show_the_step_before_again():
    assert shown(range(2, 5)) == [3, 5]


def test_a_tracker_that_does_not_take_tables_goes_on_with_numbers(caplog):
    board = Board(AttributeError("no Table here"))
    tracker = Tracker(board, "board")
    with caplog.at_level(logging.WARNING):
        tracker.on_train_begin(None, {}, None)
        with kept_open([tracker]):
            for step in (1, 2):
                tracker.on_log(None, {"step": step}, None)
                tracker.send("completions", lambda: board.tb_writer.add_text("completions", "", 1))
            tracker.on_train_end(None, {}, None)
            show_results([tracker], {"verdict": "v", "gap_closed": 0.5, "steps": 2}, Path("none"))
    assert board.got == ["numbers", "numbers"]
    assert board.ended == 1
    assert [record.getMessage() for record in caplog.records] == [
        "report_to: board does not take completions (AttributeError: no Table here); from here on it gets numbers only, and the "
        "run goes on"
    ]


def test_the_end_is_told_after_the_results_and_also_after_an_error(tmp_path):
    board = Board()
    tracker = Tracker(board, "board")
    summary = {"verdict": "v", "gap_closed": 0.5, "steps": 2}
    tracker.on_train_begin(None, {}, None)
    show_results([tracker], summary, tmp_path / "none")  # it is not open: a finished run that was only restored

    def fails() -> None:
        with kept_open([tracker, TrainerCallback()]):
            tracker.on_train_end(None, {}, None)
            assert tracker.open
            assert not board.ended
            show_results([tracker], summary, tmp_path / "none")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fails()
    assert board.ended == 1
    assert board.got == [("verdict", 2), ("gap_closed", 2)]
    assert not tracker.open


@pytest.mark.parametrize(("kind", "package"), [(WandbCallback, "wandb"), (TrackioCallback, "trackio")])
def test_wandb_and_trackio_are_called_by_their_public_names(kind, package, monkeypatch, tmp_path):
    """Of both packages only what this fake has is used."""
    logged, summary = [], {}
    fake = SimpleNamespace(
        log=logged.append, run=SimpleNamespace(summary=summary), Table=lambda columns, data: ("table", columns, data),
        Image=lambda file: ("image", file), Markdown=lambda text: ("markdown", text),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, package, fake)
    callback = kind.__new__(kind)
    monkeypatch.setattr(kind, "on_train_end", lambda *_, **__: None)
    tracker = Tracker(callback, package)
    (tmp_path / "curves.png").write_bytes(b"")
    record = record_of(1)
    show = ShowCompletions(every=1, most=1, last_step=lambda: record, callbacks=[tracker])
    with kept_open([tracker]):
        show.on_train_end(None, SimpleNamespace(global_step=7, is_world_process_zero=True), None)
        tracker.on_train_end(None, {}, None)
        show_results([tracker], {"verdict": "v", "gap_closed": 0.5, "steps": 7}, tmp_path / "curves.png")
    table = ("table", ["step", "prompt", "completion"], [[7, "u", "x" * LONGEST + " … (7 characters left out)"]])
    curves = {"curves": ("image", str(tmp_path / "curves.png")), "train/global_step": 7}
    if package == "wandb":
        assert logged == [{"completions": table, "train/global_step": 7}, curves]
        assert summary == {"verdict": "v", "gap_closed": 0.5}
    else:
        verdict = {"verdict": ("markdown", "v"), "gap_closed": 0.5, "train/global_step": 7}
        assert logged == [{"completions": table, "train/global_step": 7}, verdict, curves]


def test_markdown_of_numbers():
    assert cells(as_markdown(Table(["a", "b"], [[1.23456789, None], [True, 3]]))) == [
        ["a", "b"],
        ["1.235", ""],
        ["True", "3"],
    ]
    assert markdown_text("a_b") == "a&#95;b"
