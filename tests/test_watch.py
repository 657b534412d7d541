"""`oprd watch` says where runs stand, from the files that a run writes."""

from __future__ import annotations

import io
import json
import os
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from oprd.cli import app
from oprd.cli.progress import StepBar, progress_bar
from oprd.tools.watch import QUIET, RunWatch


def step(number: int, **more: float) -> dict[str, float]:
    return {"step": number, "loss": 1 / number, "cosine": 0.9, "time/rollout": 2.0, "time/update": 1.0, **more}


def write(folder, name, *rows, mode="a"):
    folder.mkdir(exist_ok=True)
    with (folder / name).open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def begin(folder, max_steps=100):
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": {"max_steps": max_steps}, "finished": False}))


def watch(*words):
    return CliRunner().invoke(app, ["watch", *map(str, words)])


def test_a_run_that_is_at_work(tmp_path):
    run = RunWatch(tmp_path / "a")
    assert run.status().state == "waiting"
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1), step(2, accuracy=0.25))
    found = run.status()
    assert (found.state, found.step, found.steps, found.loss, found.accuracy) == ("running", 2, 100, 0.5, 0.25)
    assert (found.seconds_a_step, found.seconds_left) == (3.0, 98 * 3.0)
    alarm = step(3, alarm=1.0) | {"alarm_text": "the loss rises"}
    write(tmp_path / "a", "metrics.jsonl", alarm, {"step": 3, "eval_avg_at_k": 0.75})
    later = run.status()
    assert later.alarm_text == "the loss rises"
    assert (later.step, later.evaluated, later.alarms, later.accuracy) == (3, 0.75, (3,), None)


def test_a_line_that_is_not_whole_yet_is_read_when_it_is(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1))
    run = RunWatch(tmp_path / "a")
    text = json.dumps(step(2)) + "\n"
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(text[:20])
    assert run.status().step == 1
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(text[20:])
    assert run.status().step == 2


def test_a_resumed_run_is_read_from_the_start(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", *(step(i, alarm=1.0) for i in range(1, 6)))
    run = RunWatch(tmp_path / "a")
    assert run.status().alarms == (1, 2, 3, 4, 5)
    write(tmp_path / "a", "metrics.jsonl", step(1), step(2, alarm=1.0), mode="w")  # cut back to its checkpoint
    found = run.status()
    assert (found.step, found.alarms) == (2, (2,))


def test_a_run_without_news_is_quiet_and_one_that_ended_is_finished(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1))
    long_ago = time.time() - 2 * QUIET
    for name in ("metrics.jsonl", "run.json"):
        os.utime(tmp_path / "a" / name, (long_ago, long_ago))
    assert RunWatch(tmp_path / "a").status().state == "quiet"
    (tmp_path / "a" / "run.json").write_text(json.dumps({"settings": {"max_steps": 100}, "finished": True}))
    measures = {"student_before": 0.2, "student_after": 0.6, "teacher": 0.8}
    evaluated = {name: {"avg_at_k": value, "ci95": [value - 0.02, value + 0.02]} for name, value in measures.items()}
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"steps": 100, **evaluated}))
    found = RunWatch(tmp_path / "a").status()
    assert found.state == "finished"
    assert found.seconds_left is None
    assert found.evaluated == 0.6
    assert found.verdict.startswith("closed 67%")


def test_the_command_prints_a_table_and_rollouts_where_there_is_no_terminal(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1), step(2, accuracy=0.25, alarm=1.0))
    old, new = (
        {"step": i, "prompt": f"{i} + 1 =", "completion": text, "correct": i == 2}
        for i, text in ((1, "5"), (2, "3\x1b[2J"))
    )
    write(tmp_path / "a", "completions.jsonl", old, new)
    done = watch(tmp_path / "a", tmp_path / "b", "--completions", 2, "--json", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    for shown in ("2/100", "25%", "waiting", "2 + 1 =", "right", "\\x1b[2J"):
        assert shown in done.output
    for hidden in ("1 + 1 =", "\x1b[2J"):
        assert hidden not in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found[str(tmp_path / "a")]["alarms"] == [2]


def test_a_reward_beside_a_task_has_its_own_column_and_a_wrong_answer_its_reference(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1, accuracy=0.25, reward=0.375))
    row = {"step": 1, "prompt": "2 + 1 =", "completion": "5", "correct": False, "answer": "3"}
    write(tmp_path / "a", "completions.jsonl", row)
    done = watch(tmp_path / "a", "--completions", 1)
    assert "reward" in done.output
    assert "0.375" in done.output
    assert "wrong: 3" in done.output
    begin(tmp_path / "b")
    write(tmp_path / "b", "metrics.jsonl", step(1, accuracy=0.25))
    assert "reward" not in watch(tmp_path / "b").output


def test_a_run_that_a_signal_has_stopped_says_so(tmp_path):
    begin(tmp_path / "a")
    write(tmp_path / "a", "metrics.jsonl", step(1), step(2))
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(record | {"stopped_at": 2}))
    found = RunWatch(tmp_path / "a").status()
    assert (found.state, found.seconds_left) == ("stopped", None)
    assert "stopped at step 2; go on with oprd train --config … --resume auto" in " ".join(
        watch(tmp_path / "a").output.split()
    )


def test_a_file_and_a_run_named_twice_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for words, problem in (((tmp_path / "file",), "is a file"), ((tmp_path, tmp_path), "named twice")):
        done = watch(*words)
        assert isinstance(done.exception, ValueError)
        assert problem in str(done.exception)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_live_line_keeps_steps_time_loss_and_accuracy(width):
    from types import SimpleNamespace

    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=True, color_system=None)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1000, max_steps=2500)
    logs = {
        "loss": 0.012345,
        "accuracy": 0.87,
        "cosine": 0.987,
        "completions/mean_length": 1234.0,
        "time/rollout": 1000.0,
    }
    with progress_bar(console) as progress:
        bar = StepBar(progress)
        bar.on_train_begin(None, state, None)
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs=logs)
        progress.refresh()
    lines = [line for line in drawn.getvalue().replace("\r", "\n").splitlines() if "loss" in line]
    assert lines
    shown = [
        "1000/2500",
        "ETA",
        "loss 0.01235",
        *(["accuracy 87%"] if width >= 80 else []),
        *(["rollout 100%"] if width == 200 else []),
    ]
    assert [text for text in shown if text not in lines[-1]] == []
