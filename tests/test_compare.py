"""Comparisons: what the file may say, the plan, the numbers of synthetic runs by hand, resumption, and one real comparison."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from oprd.bridge import Bridge
from oprd.run_config import RunConfig
from oprd.runs.folder import LOCK, RunFolder
from oprd.runs.grades import problem_key, record_grades
from oprd.tools.compare.bridges import fit_missing, parse_bridges
from oprd.tools.compare.figure import plot_comparison
from oprd.tools.compare.interval import mean_and_interval, t_quantile
from oprd.tools.compare.plan import COMPARISON_FOLDERS, load_comparison, plan_runs
from oprd.tools.compare.process import ForkedProcess
from oprd.tools.compare.report import build_report, markdown, table, write_report
from oprd.tools.compare.results import Point, Run, at_seconds, is_complete, rollouts_a_step, summarize_runs
from oprd.tools.compare.runner import open_runs, run_all

QUICK = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "teacher_model_init_kwargs": {"dtype": "float32"},
    "task": "addition", "train_dataset": "generated:addition", "train_limit": 16, "eval_dataset": "generated:addition",
    "eval_limit": 4, "max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 8, "eval_num_generations": 2,
    "save_strategy": "no", "use_cpu": True, "output_dir": "unused",
}  # fmt: skip


@pytest.fixture
def comparison(tmp_path):
    """Write a recipe and a comparison of it; `changes` replace keys, None removes one."""

    def write(**changes) -> Path:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(QUICK))
        content = {
            "recipe": str(recipe), "output_dir": str(tmp_path / "out"), "seeds": [0, 1], "learning_rates": [1e-3],
            "settings": {"eval_strategy": "steps", "eval_steps": 1},
            "objectives": {"all": {}, "last": {"layers": "last"}}, **changes,
        }  # fmt: skip
        file = tmp_path / "compare.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return file

    return write


def planned(file: Path) -> list[Run]:
    return plan_runs(*reversed(load_comparison(file)))


def finish(run: Run, evaluations: dict[int, float], step_seconds: dict[str, float], **summary) -> Run:
    """A run folder as `oprd train` leaves it; the last evaluation is the final one."""
    run.folder.mkdir(parents=True)
    lines = []
    for step in range(1, max(evaluations) + 1):
        lines.append({"step": step, "loss": 1.0, **{f"time/{name}": s for name, s in step_seconds.items()}})
        if step in evaluations:
            lines.append({"step": step, "eval_avg_at_k": evaluations[step], "eval_k": 4})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "student_before": None, "teacher": None, "steps": max(evaluations),
        "student_after": {"avg_at_k": evaluations[max(evaluations)], "k": 4, "problems": 250}, **summary,
    }  # fmt: skip
    (run.folder / "summary.json").write_text(json.dumps(content))
    (run.folder / "machine.json").write_text(json.dumps({"cpus": 2, "threads": 1, "workers": 1}))
    return run


@pytest.fixture
def four_runs(tmp_path):
    """Two objectives, two seeds: a takes 2 s a step, b 3 s; the student before has 20 %, the teacher 100 %."""
    known = {"student_before": {"avg_at_k": 0.2}, "teacher": {"avg_at_k": 1.0}}
    return [
        finish(Run("a", 1e-3, 0, tmp_path / "a0"), {2: 0.5, 4: 0.4}, {"rollout": 1.5, "update": 0.5}, **known),
        finish(Run("b", 1e-3, 0, tmp_path / "b0"), {2: 0.4, 4: 0.8}, {"rollout": 2.5, "optimizer": 0.5}),
        finish(Run("a", 1e-3, 1, tmp_path / "a1"), {2: 0.6, 4: 0.8}, {"rollout": 1.5, "update": 0.5}, **known),
        finish(Run("b", 1e-3, 1, tmp_path / "b1"), {2: 0.6, 4: 1.0}, {"rollout": 2.5, "optimizer": 0.5}),
    ]


# Student's t


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (101, 1.983731)],
)
def test_t_quantiles_of_the_tables(degrees, expected):
    assert t_quantile(degrees) == pytest.approx(expected, abs=2e-6)


def test_t_quantiles_elsewhere():
    assert t_quantile(5, 0.99) == pytest.approx(4.032143, abs=2e-6)
    assert t_quantile(100_000) == pytest.approx(1.959988, abs=2e-6)
    for degrees, confidence in ((0, 0.95), (3, 1.0)):
        with pytest.raises(ValueError, match="give degrees >= 1 and 0 < confidence < 1"):
            t_quantile(degrees, confidence)


def test_mean_and_interval():
    assert mean_and_interval([]) == (None, None)
    assert mean_and_interval([0.3]) == (0.3, None)
    mean, interval = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])  # s = √2.5
    assert mean == 3.0
    assert interval == pytest.approx([3 - 2.776445 * 0.7071068, 3 + 2.776445 * 0.7071068], abs=1e-5)


# Results


def test_accuracy_at_a_time():
    points = [Point(0, 0.0, 0.2), Point(2, 4.0, 0.4), Point(4, 8.0, 0.8)]
    assert at_seconds(points, 0.0) == 0.2
    assert at_seconds(points, 1.0) == pytest.approx(0.25)
    assert at_seconds(points, 4.0) == pytest.approx(0.4)
    assert at_seconds(points, 7.0) == pytest.approx(0.7)
    assert at_seconds(points, 9.0) == 0.8  # the run had ended
    assert at_seconds(points[1:], 3.0) is None  # nothing was measured before
    assert at_seconds([], 3.0) is None


def test_the_numbers_of_a_comparison(four_runs):
    report = summarize_runs(four_runs)
    a, b = report["rows"]
    assert (a["objective"], a["learning_rate"], a["seeds"], a["missing_seeds"]) == ("a", 1e-3, [0, 1], [])
    assert a["final_avg"] == pytest.approx(0.6)  # of 0.4 and 0.8: s = 0.2·√2, s/√2 = 0.2
    assert a["final_ci95"] == pytest.approx([0.6 - 12.706205 * 0.2, 0.6 + 12.706205 * 0.2], abs=1e-5)
    assert a["best_avg"] == pytest.approx(0.65)  # 0.5 and 0.8
    assert a["gap_closed"] == pytest.approx(0.5)  # 0.2 and 0.6 of 0.8
    assert (a["seconds"], a["steps"]) == (8.0, 4)
    assert a["final_by_seed"] == {"0": 0.4, "1": 0.8}
    assert a["seconds_by_seed"] == {"0": 8.0, "1": 8.0}
    assert a["equal_time_avg"] == pytest.approx(0.6)
    assert a["curve"]["steps"] == [0, 2, 4]
    assert a["curve"]["avg"] == pytest.approx([0.2, 0.55, 0.6])
    assert a["curve"]["seconds"] == [0.0, 4.0, 8.0]
    assert b["seconds"] == 12.0
    assert b["final_avg"] == pytest.approx(0.9)
    # at 8 s, a third of the way from step 2 (6 s) to step 4 (12 s): 0.4 + 0.4/3 and 0.6 + 0.4/3
    assert b["equal_time_avg"] == pytest.approx(0.5 + 0.4 / 3)
    assert b["equal_time_by_seed"] == pytest.approx({"0": 0.4 + 0.4 / 3, "1": 0.6 + 0.4 / 3})
    assert b["equal_time_ci95"] == pytest.approx(
        [0.5 + 0.4 / 3 - 12.706205 * 0.1, 0.5 + 0.4 / 3 + 12.706205 * 0.1], abs=1e-5
    )
    assert report["equal_time"]["seconds"] == 8.0
    assert report["equal_time"]["set_by"] == {"objective": "a", "learning_rate": 1e-3}
    assert report["student_before"]["by_seed"] == {"0": 0.2, "1": 0.2}
    assert report["teacher"]["avg"] == 1.0
    assert report["best_rate"] == {"a": 1e-3, "b": 1e-3}
    assert (report["k"], report["problems"], report["missing"]) == (4, 250, [])
    assert report["machine"] == {"cpus": 2, "threads": 1, "workers": 1}
    json.dumps(report, allow_nan=False)


def test_differences_are_paired_by_seed(four_runs):
    """b − a is 0.4 and 0.2: mean 0.3, s/√2 = 0.1. Unpaired, the intervals of both would overlap far more."""
    a, b = summarize_runs(four_runs)["rows"]
    assert a["difference"] is None
    assert b["difference"]["value"] == pytest.approx(0.3)
    assert b["difference"]["ci95"] == pytest.approx([0.3 - 12.706205 * 0.1, 0.3 + 12.706205 * 0.1], abs=1e-5)
    assert (b["difference"]["over"], b["difference"]["pairs"]) == ("seeds", 2)
    report = summarize_runs(four_runs, baseline="b")
    assert report["baseline"] == {"objective": "b", "learning_rate": 1e-3}
    assert report["rows"][0]["difference"]["value"] == pytest.approx(-0.3)
    (four_runs[2].folder / "failed").write_text("exit code 1\n")  # a, seed 1: only seed 0 is in both
    alone = summarize_runs(four_runs)["rows"][1]["difference"]
    assert (alone["value"], alone["ci95"], alone["over"]) == (pytest.approx(0.4), None, "")
    problems = [problem_key(f"{i}+1", str(i + 1)) for i in range(4)]
    record_grades(four_runs[0].folder, "student_after", problems, [0, 0, 1, 1])
    record_grades(four_runs[1].folder, "student_after", problems[::-1], [1, 1, 1, 0])
    of_problems = summarize_runs(four_runs)["rows"][1]["difference"]
    assert (of_problems["value"], of_problems["over"], of_problems["pairs"]) == (0.25, "problems", 4)
    with pytest.raises(ValueError, match="--baseline: 'c' is none of the objectives; name one of a, b"):
        summarize_runs(four_runs, baseline="c")


def test_the_best_rate_of_each_objective(tmp_path):
    runs = [
        finish(Run(name, rate, 0, tmp_path / f"{name}{rate}"), {1: accuracy}, {"rollout": 1.0})
        for rate, of_rate in ((3e-4, {"a": 0.5, "b": 0.6}), (1e-3, {"a": 0.7, "b": 0.6}))
        for name, accuracy in of_rate.items()
    ]
    report = summarize_runs(runs)
    assert [(row["objective"], row["learning_rate"]) for row in report["rows"]] == [
        ("a", 3e-4), ("a", 1e-3), ("b", 3e-4), ("b", 1e-3),
    ]  # fmt: skip
    assert report["best_rate"] == {"a": 1e-3, "b": 3e-4}
    row = report["rows"][0]
    assert row["final_ci95"] is None  # one seed
    assert row["gap_closed"] is None  # nothing was measured before
    assert report["student_before"] is None
    assert row["curve"]["steps"] == [1]


def test_a_run_without_its_last_evaluation_ends_with_that_after_training(tmp_path):
    run = finish(
        Run("a", 1e-3, 0, tmp_path / "a"), {2: 0.3}, {"rollout": 1.0},
        steps=3, student_after={"avg_at_k": 0.4, "k": 4, "problems": 9},
    )  # fmt: skip
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "time/rollout": 1.0}) + "\n")
    (row,) = summarize_runs([run])["rows"]
    assert (row["final_avg"], row["seconds"], row["steps"]) == (0.4, 3.0, 3)


def test_missing_and_failed_runs_do_not_count(four_runs, tmp_path):
    a0, b0, a1, b1 = four_runs
    partial = json.loads((a0.folder / "summary.json").read_text())
    del partial["steps"]  # killed while it trained: what was measured before still counts
    (a0.folder / "summary.json").write_text(json.dumps(partial))
    (b0.folder / "failed").write_text("exit code 1\n")
    (b1.folder / "summary.json").write_text('{"steps": 4, "stud')
    assert [is_complete(run) for run in four_runs] == [False, False, True, False]
    report = summarize_runs(four_runs)
    a, b = report["rows"]
    assert (a["seeds"], a["missing_seeds"], a["final_avg"], a["final_ci95"]) == ([1], [0], 0.8, None)
    assert (b["seeds"], b["missing_seeds"], b["final_avg"], b["equal_time_avg"]) == ([], [0, 1], None, None)
    assert report["best_rate"] == {"a": 1e-3, "b": None}
    assert report["student_before"]["by_seed"] == {"0": 0.2, "1": 0.2}
    assert report["missing"] == [
        "a, learning rate 0.001, seed 0", "b, learning rate 0.001, seed 0", "b, learning rate 0.001, seed 1",
    ]  # fmt: skip
    full = {**report, "settings": {"recipe": "r", "seeds": [0, 1], "rollouts_a_step": 32}}
    (_, first), (_, second) = table(full)[1]
    assert first[-1] == "1 of 2"
    assert second[2:] == ["–"] * 7 + ["0 of 2"]
    assert "3 of 4 runs are not complete" in markdown(full)
    plot_comparison(full, tmp_path / "partial.png")
    (a1.folder / "failed").touch()
    with pytest.raises(ValueError, match="nothing to report: none of the 4 runs is complete"):
        summarize_runs(four_runs)


def test_runs_without_accuracy_are_refused(tmp_path):
    run = finish(Run("a", 1e-3, 0, tmp_path / "a"), {1: 0.5}, {"rollout": 1.0}, student_after={"avg_at_k": None})
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "time/rollout": 1.0}\n')
    with pytest.raises(ValueError, match="has no graded evaluation; the problems of eval_dataset need answers"):
        summarize_runs([run])
    (run.folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"no metrics\.jsonl; remove the folder to run it again"):
        summarize_runs([run])


def test_runs_of_several_machines_are_told(four_runs):
    (four_runs[0].folder / "machine.json").write_text(json.dumps({"cpus": 2, "threads": 1, "workers": 2}))
    report = summarize_runs(four_runs)
    assert report["machine"] == {"cpus": 2, "threads": 1, "workers": [2, 1]}
    full = {**report, "settings": {"recipe": "r", "seeds": [0, 1], "rollouts_a_step": 32}}
    assert "Runs that share a machine slow each other" in markdown(full)


# The file and the plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": [1]}, "unknown key 'learning_rate'; did you mean 'learning_rates'"),
        ({"objectives": None}, "the key 'objectives' is missing; see comparisons/"),
        ({"seeds": []}, r"seeds: \[\] is not allowed; give at least one"),
        ({"seeds": [1, 2, 1]}, r"seeds: \[1, 2, 1\] names one twice"),
        ({"seeds": [-1]}, "seeds: -1 is not allowed; a seed is 0 to"),
        ({"seeds": ["x"]}, "seeds: 0: 'x' is not allowed"),
        ({"learning_rates": [0.0]}, "learning_rates: 0.0 is not allowed; a rate is above 0"),
        ({"learning_rates": 1e-3}, "learning_rates: 0.001 is not allowed"),
        ({"objectives": {"../up": {}}}, r"objectives: '\.\./up' cannot name a folder"),
        ({"objectives": {"kl": {}, "KL": {}}}, "'KL' and 'kl' are one folder on some disks"),
        ({"objectives": {"a": 3}}, "objectives: a: 3 is not allowed"),
        ({"objectives": {"a": {"seed": 3}}}, "objectives: a: 'seed' cannot be set here: list the seeds under 'seeds'"),
        ({"objectives": {"a": {"output_dir": "x"}}}, "'output_dir' cannot be set here"),
        ({"objectives": {"a": {"learning_rate": 1}}}, "'learning_rate' cannot be set here"),
        ({"objectives": {"a": {"model": "x"}}}, "'model' cannot differ between objectives"),
        ({"objectives": {"a": {"eval_limit": 3}}}, "'eval_limit' cannot differ between objectives"),
        ({"objectives": {"a": {"laiers": "all"}}}, "objectives: a: unknown key 'laiers'; did you mean 'layers'"),
        ({"objectives": {"a": {"learning_rates": []}}}, "objectives: a: learning_rates: .* at least one rate"),
        ({"objectives": {"a": {"learning_rates": [-1.0]}}}, "objectives: a: learning_rates: -1.0 is not allowed"),
        ({"objectives": {"a": {"learning_rates": "all"}}}, "objectives: a: learning_rates: 'all' is not allowed"),
        ({"settings": {"max_stps": 3}}, "settings: unknown key 'max_stps'; did you mean 'max_steps'"),
        ({"settings": {"eval_before": True}}, "settings: 'eval_before' cannot be set here"),
        ({"objectives": {"a": {}, "b": {"layers": [9]}}}, "objective 'b' .*layers: 9 is out of range"),
        ({"objectives": {"a": {"reduction": "sum"}}}, "objective 'a' .*reduction: 'sum' is not one of"),
        ({"settings": {"eval_dataset": None}}, "eval_dataset: there is none"),
        ({"recipe": "nowhere"}, "there is no file 'nowhere'; shipped recipes are"),
        (
            {"objectives": {"a": {}, "b": {"num_generations": 3}}},
            r"'a' takes 2 rollouts a step \(2 × 1 × 1\) and 'b' takes 6 rollouts a step \(2 × 3 × 1\); make",
        ),
    ],
)
def test_bad_files_are_refused(comparison, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        planned(comparison(**changes))
    assert not (tmp_path / "out").exists()


def test_an_objective_may_have_rates_of_its_own(comparison):
    own = {"all": None, "last": {"layers": "last", "learning_rates": ["1e-5", 1e-3]}}
    runs = planned(comparison(learning_rates=[1e-4, 1e-3], objectives=own))
    assert [(run.seed, run.learning_rate, run.objective) for run in runs] == [
        (seed, rate, name)
        for seed in (0, 1)
        for rate, name in ((1e-5, "last"), (1e-4, "all"), (1e-3, "all"), (1e-3, "last"))
    ]
    assert all("learning_rates" not in run.settings for run in runs)


def test_files_that_are_no_comparisons(tmp_path):
    with pytest.raises(ValueError, match="no file 'nowhere'; shipped comparisons are tiny"):
        load_comparison("nowhere")
    bad = tmp_path / "bad.yaml"
    for content, message in (("a: [1", "not a YAML file"), ("- a", "expected one key: value a line, found list")):
        bad.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_comparison(bad)


def test_the_order_and_settings_of_the_plan(comparison, tmp_path):
    runs = planned(comparison(learning_rates=["1e-4", 1e-3], objectives={"all": None, "last": {"layers": "last"}}))
    assert [(r.seed, r.learning_rate, r.objective) for r in runs] == [
        (0, 1e-4, "all"), (0, 1e-4, "last"), (0, 1e-3, "all"), (0, 1e-3, "last"),
        (1, 1e-4, "all"), (1, 1e-4, "last"), (1, 1e-3, "all"), (1, 1e-3, "last"),
    ]  # fmt: skip
    # the student before and the teacher are the same for all runs of a seed
    for key in ("eval_before", "eval_teacher"):
        assert [r.settings[key] for r in runs] == [True, False, False, False] * 2
    last = runs[-1]
    assert last.folder == tmp_path / "out" / "runs" / "last" / "lr_0.001" / "seed_1"
    assert last.settings["output_dir"] == str(last.folder)
    assert (last.settings["seed"], last.settings["learning_rate"], last.settings["layers"]) == (1, 1e-3, "last")
    assert (last.settings["eval_strategy"], last.settings["max_steps"]) == ("steps", 2)
    assert rollouts_a_step(last) == 2
    assert len({r.folder for r in runs}) == 8
    # the settings of a run are a recipe that means the same
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(last.settings))
    again = RunConfig.load(file).settings()
    assert {key: again[key] for key in last.settings} == last.settings
    assert set(again) == set(last.settings)


def test_equal_rollouts_by_other_numbers(comparison):
    runs = planned(comparison(objectives={"a": {}, "b": {"per_device_train_batch_size": 1, "num_generations": 2}}))
    assert {rollouts_a_step(run) for run in runs} == {2}


SHIPPED = sorted(COMPARISON_FOLDERS[1].glob("*.yaml"))
PLANNED_QUICKLY = ("tiny", "tiny_bridge", "tiny_other_tokenizer")


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if p.stem in PLANNED_QUICKLY else [pytest.mark.further]) for p in SHIPPED],
)
def test_shipped_comparisons_are_planned(path, tmp_path, monkeypatch):
    file, found = load_comparison(path.stem)
    assert file.name == path.name
    if found.bridges:
        monkeypatch.chdir(tmp_path)  # where there is no bridge yet
        with pytest.raises(ValueError, match=r"there is no folder runs/.*, nor is it among this file's 'bridges'"):
            planned(path)
        specs = {n: replace(s, limit=10) for n, s in parse_bridges(found.bridges, "the file").items()}
        fit_missing(specs, found.output_dir, found.recipe, found.settings, lambda line: None)
    runs = planned(path)
    rates = [(keys or {}).get("learning_rates", found.learning_rates) for keys in found.objectives.values()]
    assert len(runs) == len(found.seeds) * sum(map(len, rates))
    assert len({run.folder for run in runs}) == len(runs)


# Running, with commands that train nothing


def fake(code: str):
    """A command that runs `code` in the run's folder."""
    return lambda run: [
        sys.executable,
        "-S",
        "-c",
        f"import os, json, sys, time; os.chdir({str(run.folder)!r})\n{code}",
    ]


DONE = "json.dump({'steps': 2, 'seconds': 1.0, 'student_after': {'avg_at_k': 0.5, 'k': 2}}, open('summary.json', 'w'))"


@pytest.mark.parametrize(("teacher", "said"), [(0.4, False), (0.25, True), (0.1, True)])
def test_a_teacher_that_is_not_ahead_is_said_where_it_was_evaluated(comparison, teacher, said):
    measured = f"'student_before': {{'avg_at_k': 0.25}}, 'teacher': {{'avg_at_k': {teacher}}}"
    lines: list[str] = []
    code = DONE.replace("{'steps'", f"{{{measured}, 'steps'")
    run_all(planned(comparison())[:1], workers=1, threads=1, say=lines.append, command=fake(code))
    more = f"; the teacher ({100 * teacher:.1f}%) is not ahead of the student (25.0%): do task and instruction fit?"
    assert lines[0].endswith(f"Avg@2 50.0%, 1 s{more if said else ''}  ETA 0 s")


def test_complete_runs_stay_and_interrupted_ones_start_anew(comparison):
    runs = planned(comparison())
    lines: list[str] = []
    assert open_runs(runs) == runs
    assert run_all(runs[:2], workers=2, threads=3, say=lines.append, command=fake(DONE)) == []
    assert open_runs(runs) == runs[2:]
    assert len(lines) == 2
    assert lines[1].startswith("[2/2] ")
    assert ", seed 0: Avg@2 50.0%, 1 s  ETA 0 s" in lines[1]
    machine = json.loads((runs[0].folder / "machine.json").read_text())
    assert (machine["workers"], machine["threads"], machine["cpus"]) == (2, 3, os.cpu_count())

    (runs[0].folder / "summary.json").write_text('{"student_before": {}}')  # as a killed run leaves it
    (runs[0].folder / "checkpoint-1").mkdir()
    (runs[0].folder / "metrics.jsonl").touch()
    assert open_runs(runs) == [runs[0], *runs[2:]]
    code = "assert not {'summary.json', 'metrics.jsonl', 'checkpoint-1'} & set(os.listdir())\n"
    assert run_all([runs[0]], workers=1, threads=1, say=lines.append, command=fake(code + DONE)) == []


def test_models_of_complete_runs_are_removed_where_none_is_kept(comparison):
    assert load_comparison(comparison(keep_models=False))[1].keep_models is False
    runs = planned(comparison())
    made = "os.mkdir('model'); open('model/model.safetensors', 'w').close()\n"
    assert run_all(runs[:1], workers=1, threads=1, say=str, command=fake(made + DONE), keep_models=False) == []
    assert run_all(runs[1:2], workers=1, threads=1, say=str, command=fake(made + DONE)) == []
    assert (
        run_all(runs[2:3], workers=1, threads=1, say=str, command=fake(made), keep_models=False) == runs[2:3]
    )  # failed
    assert [(run.folder / "model").exists() for run in runs[:3]] == [False, True, True]


def test_other_settings_and_other_peoples_folders_are_refused(comparison):
    run_all(planned(comparison()), workers=2, threads=1, say=str, command=fake(DONE))
    changed = planned(comparison(settings={"eval_strategy": "steps", "eval_steps": 2, "weight_decay": 0.1}))
    with pytest.raises(
        ValueError, match=r"holds a run with other settings: eval_steps was 1.0 and is 2.0; weight_decay was"
    ) as no:
        open_runs(changed)
    assert "eval_before" not in str(no.value)
    (changed[0].folder / "summary.json").unlink()  # also one that is not complete
    with pytest.raises(ValueError, match="other settings"):
        run_all(changed[:1], workers=1, threads=1, say=str, command=fake(DONE))
    assert (changed[0].folder / "recipe.yaml").exists()
    # another objective in the first place: the runs are the same, whichever of them evaluates the teacher
    others = planned(comparison(objectives={"last": {"layers": "last"}, "all": {}}))
    assert [(r.objective, r.seed) for r in open_runs(others)] == [("all", 0)]

    (changed[0].folder / "recipe.yaml").rename(changed[0].folder / "thesis.tex")
    with pytest.raises(ValueError, match="holds something that no comparison wrote"):
        open_runs(others)


def test_a_setting_that_is_newer_than_a_run_has_its_default_there(comparison):
    (run, *_) = planned(comparison())
    run_all([run], workers=1, threads=1, say=str, command=fake(DONE))
    stored = dict(run.settings)
    del stored["normalize"]
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(stored))
    assert open_runs([run]) == []


def test_a_folder_in_use_is_not_emptied(comparison):
    (run, *_) = planned(comparison())
    run_all([run], workers=1, threads=1, say=str, command=fake("pass"))
    with RunFolder(run.folder).hold(), pytest.raises(ValueError, match="is in use by another run"):
        run_all([run], workers=1, threads=1, say=str, command=fake(DONE))
    assert {item.name for item in run.folder.iterdir()} == {"recipe.yaml", "machine.json", "output.log", LOCK}


def test_a_failed_run_is_shown_and_the_others_go_on(comparison):
    runs = planned(comparison())
    lines: list[str] = []

    def command(run: Run) -> list[str]:
        if run.objective == "last":
            return fake(f"{DONE}\nprint('\\n'.join(map(str, range(50))), '\\x1b[2J', flush=True); sys.exit('no luck')")(
                run
            )
        return fake("pass" if run.seed else DONE)(run)

    failed = run_all(runs, workers=1, threads=1, say=lines.append, command=command)
    assert [(r.objective, r.seed) for r in failed] == [("last", 0), ("all", 1), ("last", 1)]
    text = "\n".join(lines)
    assert "[2/4] last, learning rate 0.001, seed 0: FAILED" in text
    assert f"exit code 1; the end of {runs[1].folder / 'output.log'}:" in text
    assert "no complete summary; the end of" in text
    assert "    | no luck" in text
    assert "    | 40" in text
    assert "    | 30" not in text
    assert "\x1b" not in text
    assert open_runs(runs) == failed  # a summary does not make a failed run complete


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def _interruptible():
    """A shell's background jobs start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("_interruptible")
def test_processes_end_with_their_parent(comparison, how):
    runs = planned(comparison())

    def command(run: Run) -> list[str]:
        sleep = "open('pid', 'w').write(str(os.getpid()))\ntime.sleep(100)"
        # the first run ends once the second is up
        wait = f"while not os.path.exists({str(runs[1].folder / 'pid')!r}): time.sleep(0.02)\ntime.sleep(0.1)"
        return fake(wait if run is runs[0] else sleep)(run)

    def interrupt(line: str) -> None:
        os.kill(os.getpid(), how)
        time.sleep(1)

    earlier = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_all(runs, workers=2, threads=1, say=interrupt, command=command)
    assert signal.getsignal(signal.SIGTERM) is earlier
    assert not is_alive(int((runs[1].folder / "pid").read_text()))
    assert not runs[2].folder.exists()


# The report, and a comparison from end to end


def test_the_report_of_a_plan(comparison, tmp_path):
    file, found = load_comparison(comparison(learning_rates=[1e-4, 1e-3]))
    runs = plan_runs(found, file)
    for run in runs:
        finish(run, {2: 0.4 + (run.learning_rate == 1e-3) * 0.2, 4: 0.5}, {"rollout": 1.0})
    report = build_report(found, file, runs)
    assert report["settings"]["objectives"] == {"all": {}, "last": {"layers": "last"}}
    assert report["settings"]["common"]["max_steps"] == 2
    assert not {"seed", "layers", "learning_rate", "output_dir"} & set(report["settings"]["common"])
    write_report(tmp_path / "report", report)
    assert json.loads((tmp_path / "report" / "compare.json").read_text()) == report
    assert (tmp_path / "report" / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report" / "compare.md").read_text()
    assert (
        "| objective | rate | final Avg@4 [95 %] | difference to all [95 %] | best | at 4 s | gap closed | seconds |"
        in text
    )
    assert (
        "| **all** | **0.0001** * | **50.0% [50.0, 50.0]** | baseline | 50.0% | 50.0% [50.0, 50.0] | – | 4.00 | 4 | 2 |"
        in text
    )
    assert "| last | 0.001 | 50.0% [50.0, 50.0] | +0.0 [+0.0, +0.0] | 60.0% |" in text
    for words in ("over the seeds", "optimistic", "without evaluation", "final_by_seed"):
        assert words in text


@pytest.fixture
def oprd(monkeypatch, capsys):
    from oprd.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["oprd", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return run


@pytest.mark.further
def test_a_comparison_from_end_to_end(oprd, comparison, tmp_path):
    file = str(comparison())
    out = tmp_path / "out"
    code, _, errors = oprd("compare", "--config", file, "--report-only")
    assert code == 2
    assert "nothing to report: none of the 4 runs is complete" in errors

    code, _, errors = oprd("compare", "--config", file, "--baseline", "first")
    assert (code, "--baseline: 'first' is none of the objectives; name one of all, last" in errors) == (2, True)
    code, shown, errors = oprd("compare", "--config", file, "--workers", "2")
    assert code == 0, shown + errors
    assert "4 runs (2 objectives, 1 learning rates, 2 seeds), 2 rollouts a step; 4 to do" in shown
    for words in ("[4/4] ", "last, learning rate 0.001, seed 1: Avg@2", "ETA", "final Avg@2", "written to"):
        assert words in shown
    report = json.loads((out / "compare.json").read_text())
    assert [(row["objective"], row["seeds"], row["steps"]) for row in report["rows"]] == [
        ("all", [0, 1], 2), ("last", [0, 1], 2),
    ]  # fmt: skip
    for row in report["rows"]:
        assert row["seconds"] > 0
        assert row["curve"]["steps"] == [0, 1, 2]
    assert set(report["teacher"]["by_seed"]) == set(report["student_before"]["by_seed"]) == {"0", "1"}
    assert report["machine"]["workers"] == 2
    assert "torch" in report["software"]
    summaries = {path: json.loads(path.read_text()) for path in sorted(out.rglob("summary.json"))}
    assert [s["teacher"] is not None for s in summaries.values()] == [True, True, False, False]  # all/, then last/
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "difference to all" in shown
    _two_of_its_runs(oprd, out)

    written = {path: path.stat().st_mtime_ns for path in summaries}
    again, shown, _ = oprd("compare", "--config", file)
    assert again == 0
    assert "; 0 to do" in shown
    assert json.loads((out / "compare.json").read_text()) == report
    gone = next(path for path in written if "last" in path.parts and "seed_1" in path.parts)
    gone.unlink()
    once_more, shown, _ = oprd("compare", "--config", file)
    assert once_more == 0
    assert "; 1 to do" in shown
    assert {path for path, when in written.items() if path.stat().st_mtime_ns != when} == {gone}
    final = json.loads((out / "compare.json").read_text())
    assert final["machine"]["workers"] == [2, 1]
    assert [row["final_by_seed"] for row in final["rows"]] == [row["final_by_seed"] for row in report["rows"]]


def _two_of_its_runs(oprd, out):
    """Two runs by their folders, paired by the grades that the runs recorded."""
    folders = [str(out / "runs" / name / "lr_0.001" / "seed_0") for name in ("all", "last")]
    found = out.parent / "two.json"
    code, shown, errors = oprd("compare", *folders, "--json", str(found))
    assert code == 0, errors
    assert "Differences are paired by problem (4 problems)" in shown
    first, second = json.loads(found.read_text())["runs"]
    assert (first["difference"], second["difference"]["over"]) == (None, "problems")
    assert second["difference"]["value"] == pytest.approx(second["after"] - first["after"])
    assert "layers: all, last" in shown
    code, _, errors = oprd("compare", str(out), folders[0])
    assert code == 2
    assert f"{out} is a comparison of 4 runs, not a run" in errors
    page = out.parent / "page.html"
    code, _, errors = oprd("report", str(out), "--output", str(page))
    assert code == 0, errors
    text = page.read_text()
    assert "<h1>4 runs compared</h1>" in text
    assert "out: every objective and rate." in text
    assert '<th scope="col">difference to all [95 %]</th>' in text
    assert '<th scope="row">Avg@k after, difference to A [95 %]</th>' in text
    assert "(paired, 4 problems)" in text
    report = json.loads((out / "compare.json").read_text())
    del report["baseline"]
    (old := out.parent / "old").mkdir()
    (old / "compare.json").write_text(json.dumps(report))
    code, _, errors = oprd("report", str(old))
    assert code == 2
    assert f"is of an older version, without differences; write it anew: oprd compare --config {out.parent}" in errors


def test_a_failing_comparison_ends_with_an_exit_code(oprd, comparison, monkeypatch):
    from oprd.tools.compare import runner

    def start(run: Run) -> list[str]:
        metrics = """print(json.dumps({'step': 2, 'time/rollout': 1.0}), file=open('metrics.jsonl', 'w'))\n"""
        return fake(metrics + DONE if run.objective == "all" else "sys.exit('out of luck')")(run)

    monkeypatch.setattr(runner, "run_all", partial(run_all, command=start))
    code, shown, errors = oprd("compare", "--config", str(comparison(seeds=[0])))
    assert code == 1
    assert "1 of 2 runs failed: last, learning rate 0.001, seed 0" in errors
    assert "out of luck" in shown
    assert "0 of 1" in shown


# Forked from a process that has everything imported


def wait_for_end(process) -> int:
    end = time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return process.returncode


def test_a_forked_process_is_the_command_line_with_its_own_output_and_session(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = ForkedProcess(["train", "--config", str(tmp_path / "none.yaml")], tmp_path / "first", threads=1)
    assert os.getpgid(first.pid) in (first.pid, os.getpgid(os.getpid()))  # at once, or as soon as it has begun
    assert wait_for_end(first) == 2
    said = (tmp_path / "first").read_text()
    assert said.startswith("oprd: error: ")
    assert "none.yaml" in said
    assert "OMP_NUM_THREADS" not in os.environ
    second = ForkedProcess(["train", "--help"], tmp_path / "second", threads=1)
    assert wait_for_end(second) == 0
    assert "--config" in (tmp_path / "second").read_text()


def test_a_forked_process_can_be_ended(tmp_path):
    recipe = tmp_path / "long.yaml"
    recipe.write_text(yaml.safe_dump({**QUICK, "max_steps": 100_000, "output_dir": str(tmp_path / "run")}))
    process = ForkedProcess(["train", "--config", str(recipe)], tmp_path / "output", threads=1)
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert wait_for_end(process) != 0


# Bridges that a comparison fits


BRIDGED = {
    "settings": {"teacher_model": "embedded:wider/teacher"},
    "bridges": {"one": {"limit": 10, "rank": 4}},
    "objectives": {"a": {"bridge": "one"}, "b": {"bridge": "one", "bridge_rank": 2}},
}


def test_bridges_are_fitted_once_and_named_in_the_runs(comparison, tmp_path):
    path = comparison(**BRIDGED)
    file, found = load_comparison(path)
    specs, said = parse_bridges(found.bridges, str(file)), []
    fit = partial(fit_missing, specs, found.output_dir, found.recipe, found.settings, said.append)
    fit()
    folder = tmp_path / "out" / "bridges" / "one"
    assert said == ["bridge one: rank 4 of 63, verdict: " + Bridge.load(folder).verdict[0]]
    written = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    fit()
    assert len(said) == 1
    assert written == {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    runs = planned(path)
    assert {run.settings["bridge"] for run in runs} == {str(folder)}
    assert [run.settings["bridge_rank"] for run in runs[:2]] == [None, 2]
    changed = {"one": replace(specs["one"], rank=3)}
    with pytest.raises(
        ValueError, match=r"bridges: .*/one was fitted with other options than those of 'bridges: one' \(rank\)"
    ):
        fit_missing(changed, found.output_dir, found.recipe, found.settings, said.append)
    for name, value in {
        "max_completion_length": 20,
        "teacher_model": "embedded:tiny/teacher",
        "train_split": "test",
        "train_limit": 11,
    }.items():
        with pytest.raises(ValueError, match=rf"than those of 'bridges: one' \({name}\); remove the folder"):
            fit_missing(specs, found.output_dir, found.recipe, {**found.settings, name: value}, said.append)
    note = folder.with_suffix(".json")
    note.write_text(json.dumps({key: value for key, value in json.loads(note.read_text()).items() if key != "of"}))
    fit()  # a note of an earlier version
    note.unlink()
    with pytest.raises(ValueError, match="they are not recorded"):
        fit()


def test_a_bridge_is_fitted_to_the_model_of_a_teacher_beside_fixed_responses(comparison, tmp_path):
    beside = {"model": "embedded:wider/teacher", "responses": "r.jsonl"}
    file, found = load_comparison(comparison(**{**BRIDGED, "settings": {"teacher_model": beside, "lmbda": 0.0}}))
    specs, said = parse_bridges(found.bridges, str(file)), []
    elsewhere = {**found.settings, "teacher_model": {"url": "http://127.0.0.1:1"}}
    with pytest.raises(ValueError, match=r"bridges: one: teacher_model: a model on a server \(http://127"):
        fit_missing(specs, found.output_dir, found.recipe, elsewhere, said.append)
    fit_missing(specs, found.output_dir, found.recipe, found.settings, said.append)
    assert Bridge.load(tmp_path / "out" / "bridges" / "one").teacher.name == "embedded:wider/teacher"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bridges": {"one": {"rnak": 4}}}, "bridges: one: rnak: 4 is not allowed"),
        ({"bridges": {"one": {"rank": "four"}}}, "bridges: one: rank: 'four' is not allowed"),
    ],
)
def test_options_of_a_bridge_are_checked_when_the_file_is_read(comparison, changes, message):
    with pytest.raises(ValueError, match=message):
        load_comparison(comparison(**{**BRIDGED, **changes}))
