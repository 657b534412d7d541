"""A mean reward is called a reward, and is a number; an accuracy is percent: everywhere a person reads either."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from oprd.cli.progress import describe_step, measure_of_step
from oprd.runs.columns import Columns
from oprd.runs.curves import draw_run
from oprd.runs.measure import measure_of_run
from oprd.runs.model_card import model_card
from oprd.runs.pictures import style
from oprd.runs.rewards import reward_changes, rewards_in_words
from oprd.runs.verdict import judge_run
from oprd.tasks.evaluation import describe_accuracy
from oprd.tasks.measures import in_words, measure_of
from oprd.training.alarm import find_alarm
from test_cli import oprd  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPE = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_limit": 8, "max_steps": 2,
    "train_dataset": "generated:addition", "eval_dataset": "generated:addition", "eval_limit": 3, "eval_num_generations": 2,
    "reward_funcs": ["my_reward:brevity"], "per_device_train_batch_size": 2, "max_completion_length": 8, "use_cpu": True,
    "save_strategy": "no", "seed": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("grades", "rewarded", "measure"),
    [
        ([True, False, None], False, "accuracy"),
        ([1.0, 0.0, 1], False, "accuracy"),
        ([1.0, 0.5], False, "reward"),
        ([1.0, 0.0], True, "reward"),
        ([True, False], True, "accuracy"),  # a task's verdicts beside reward functions
        ([None, None], True, "accuracy"),
        ([-1, 1], False, "reward"),
    ],
)
def test_grades_are_rewards_unless_all_are_0_or_1(grades, rewarded, measure):
    assert measure_of(grades, rewarded=rewarded) == measure


@pytest.mark.parametrize(
    ("settings", "summary", "metrics", "measure"),
    [
        ({"task": "math"}, {"teacher": {"avg_at_k": 0.5, "measure": "accuracy"}}, {"accuracy"}, "accuracy"),
        ({"task": "math", "reward_funcs": ["m:f"]}, {}, {"accuracy"}, "accuracy"),
        ({"reward_funcs": ["m:f"]}, {}, {"accuracy"}, "reward"),
        ({"task": "m:f"}, {"student_before": {"avg_at_k": 0.5, "measure": "reward"}}, (), "reward"),
        ({"task": "m:f"}, {}, {"accuracy", "accuracy_std"}, "reward"),
        ({}, {"student_before": {"avg_at_k": -0.2}}, (), "reward"),  # of an older version
        ({}, {"student_before": None, "teacher": {"avg_at_k": None}}, (), "accuracy"),
    ],
)
def test_a_run_is_rewarded_by_its_settings_its_evaluations_or_its_steps(settings, summary, metrics, measure):
    assert measure_of_run(settings, summary, metrics) == measure


def test_a_step_of_a_rewarded_run_stays_a_reward():
    step = {"loss": 1.0, "accuracy": 0.5, "completions/mean_length": 3.0}
    assert "accuracy 50%" in describe_step(step)
    assert "reward 0.5 " in describe_step(step | {"accuracy_std": 0.2})
    args = SimpleNamespace(reward_funcs=None, task="m:f")
    first = measure_of_step(args, step | {"accuracy_std": 0.2}, None)
    assert measure_of_step(args, step, first) == "reward"
    assert in_words(None, "reward") == "–"


def test_beside_a_task_the_reward_is_shown_too():
    step = {"loss": 1.0, "accuracy": 0.5, "reward": 0.375, "completions/mean_length": 3.0}
    assert "accuracy 50%  reward 0.375  length 3" in describe_step(step)
    assert "reward" not in describe_step({key: value for key, value in step.items() if key != "reward"})
    graded = {
        "avg_at_k": 0.5,
        "best_at_k": 0.5,
        "ci95": [0.25, 0.75],
        "k": 1,
        "mean_length": 3.0,
        "finished": 1.0,
        "ungraded": 0,
    }
    given = {"rewards/task/mean": 0.5, "rewards/brevity/mean": 0.125, "rewards/last/mean": None}
    assert "Best@1  50.0%  brevity 0.125  length 3" in describe_accuracy(graded | given)
    alone = {"measure": "reward", "rewards/brevity/mean": 0.5}
    assert "brevity" not in describe_accuracy(graded | alone)  # the mean reward is this one's
    assert "brevity 0.5  last 0" in describe_accuracy(graded | alone | {"rewards/last/mean": 0.0})


def test_the_change_of_each_reward_is_that_between_the_ends_of_the_run():
    rows = [{"step": i, "rewards/a/mean": float(i), **({"rewards/b:c/mean": 1.0} if i > 28 else {})} for i in range(30)]
    assert reward_changes(Columns(rows)) == {"a": (1.0, 28.0), "b:c": (1.0, 1.0)}  # over three steps of thirty
    assert reward_changes(Columns([{"step": 1, "loss": 1.0, "reward": 1.0}])) == {}
    both = reward_changes(Columns(row | {"reward": 2.0 * row["step"]} for row in rows))
    assert list(both.items())[-1] == ("weighted sum", (2.0, 56.0))
    alone = [{"step": 1, "rewards/a/mean": 1.0, "reward": 0.5}]
    assert reward_changes(Columns(alone)) == {"a": (1.0, 1.0)}
    assert reward_changes(Columns({"step": i, "rewards/a/mean": float(i)} for i in range(1000))) == {"a": (4.5, 994.5)}
    assert rewards_in_words({"a": (1.0, 28.0), "b": [0.5, 0.25]}) == "a 1 → 28, b 0.5 → 0.25"


def test_an_alarm_names_what_fell():
    rows = [
        {"step": i, "loss": 1.0, "cosine": 0.5 + i / 100, "accuracy": 0.9 if i < 10 else 0.1, "rollouts": 100.0}
        for i in range(20)
    ]
    assert "accuracy fell 90.0% -> 10.0%" in find_alarm(rows)
    assert "reward fell 0.9 -> 0.1" in find_alarm([row | {"accuracy_std": 0.1} for row in rows])


def test_the_verdict_of_rewards_has_no_points():
    one = {"avg_at_k": 1.0, "ci95": [0.9, 1.1], "measure": "reward"}
    found = judge_run(
        {"student_before": one, "student_after": one | {"avg_at_k": 2.5, "ci95": [2.4, 2.6]}, "teacher": None}
    )
    assert found.text.startswith("the student is better: +1.5 [+1.36, +1.64] of mean reward; the teacher")


def test_a_run_by_a_reward_function_is_told_as_one(oprd, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(EXAMPLES))
    run, page = tmp_path / "run", tmp_path / "page.html"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "output_dir": str(run)}))
    done = oprd("train", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[name] for name in ("student_before", "student_after"))
    assert (before["measure"], after["measure"]) == ("reward", "reward")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "accuracy" in rows[0]
    assert "measure" not in {key for row in rows for key in row}
    assert f"reward {before['avg_at_k']:.3g}" in re.sub(" +", " ", done.stdout)
    assert "of mean reward" in done.stdout
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert all(f"reward {row['accuracy']:.3g}" in line for row, line in zip(rows, steps, strict=True))
    for words in ("accuracy", "Avg@"):
        assert words not in done.stdout
    first, last = summary["rewards"]["brevity"]
    assert (first, last) == tuple(row["accuracy"] for row in rows)
    assert f"means over the first and the last tenth of the steps: brevity {first:.3g} → {last:.3g}" in done.stdout
    card = model_card(summary, yaml.safe_load((run / "config.yaml").read_text()))
    assert "| model | mean reward | 95 % interval |" in card
    assert f"| student after | {after['avg_at_k']:.3g} |" in card
    assert "graded by the mean reward of `my_reward:brevity`" in card
    with style():
        figure = draw_run(run / "metrics.jsonl", summary)
    titles = [axis.get_title("left") for axis in figure.axes]
    assert "Reward" in titles
    assert "Accuracy" not in titles
    shown = oprd("watch", str(run)).stdout
    assert f"{after['avg_at_k']:.3g}" in shown
    assert "accuracy" not in shown
    assert oprd("report", str(run), "--output", str(page)).returncode == 0
    text = page.read_text()
    assert "<h3>Reward</h3>" in text
    assert "reward after [95 %]" in text
    assert "Accuracy" not in text
    assert "Avg@k" not in text


def test_an_accuracy_stays_percent():
    found = {
        "avg_at_k": 0.5, "best_at_k": 1.0, "ci95": [0.25, 0.75], "k": 4, "mean_length": 3.0, "finished": 1.0, "ungraded": 0,
    }  # fmt: skip
    assert describe_accuracy(found).startswith("Avg@4  50.0% [25.0%, 75.0%]  Best@4 100.0%  length 3")
    rewarded = describe_accuracy({**found, "measure": "reward"})
    assert rewarded.startswith("reward    0.5 [0.25, 0.75]  best of 4      1  length 3")
