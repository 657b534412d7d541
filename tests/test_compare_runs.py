"""Finished runs compared by their folders: pairs of problems, intervals, and what is said where they cannot be paired."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import yaml

from oprd.runs.grades import problem_key, read_grades, record_grades
from oprd.tasks.measures import bootstrap_ci
from oprd.tools.compare.difference import over_problems, unpaired
from oprd.tools.compare.finished import compare_runs, runs_notes, runs_table

EASY = [0.0, 0.25, 0.5, 1.0, 1.0, 0.75, 0.0, 1.0]
BETTER = [0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0]


SIZES = {"per_device_train_batch_size": 4, "num_generations": 2, "gradient_accumulation_steps": 3}


def evaluation(grades, **more) -> dict:
    low, high = bootstrap_ci(grades)
    return {"avg_at_k": float(np.mean(grades)), "ci95": [low, high], "k": 4, "problems": len(grades), **more}


@pytest.fixture
def run(tmp_path):
    """A run folder as `oprd train` leaves it."""

    def make(name: str, grades, keys=None, measure="accuracy", recorded=True, **settings):
        folder = tmp_path / name
        folder.mkdir()
        keys = [problem_key(f"{i}+1=", str(i + 1)) for i in range(len(grades))] if keys is None else keys
        if recorded:
            record_grades(folder, "student_after", keys, grades)
        summary = {"student_after": evaluation(grades, measure=measure), "steps": 10, "seconds": 5.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "learning_rate": 1e-3, **settings}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
        return folder

    return make


def test_runs_on_the_same_problems_are_paired(run):
    """The interval is the bootstrap of the differences of each problem, in whatever order a run has them."""
    keys = [problem_key(f"{i}+1=", str(i + 1)) for i in range(8)]
    folders = [run("a", EASY), run("b", BETTER[::-1], keys[::-1], learning_rate=3e-3, layers="last")]
    report = compare_runs(folders)
    a, b = report["runs"]
    differences = [ours - theirs for _, ours, theirs in sorted(zip(keys, BETTER, EASY, strict=True))]
    assert (report["baseline"], a["difference"]) == ("a", None)
    assert b["difference"]["value"] == pytest.approx(np.mean(BETTER) - np.mean(EASY)) == 1.25 / 8
    assert b["difference"]["ci95"] == list(bootstrap_ci(differences))
    assert (b["difference"]["over"], b["difference"]["pairs"]) == ("problems", 8)
    assert report["settings"] == {"learning_rate": [1e-3, 3e-3], "layers": [None, "last"]}
    assert compare_runs(folders) == report
    apart = unpaired((b["after"], b["ci95"]), (a["after"], a["ci95"]), "").ci95
    low, high = b["difference"]["ci95"]
    assert high - low < (apart[1] - apart[0]) / 2  # what pairing is for
    header, (first, second) = runs_table(report)
    assert header[4] == "difference to a [95 %]"
    assert (first[4], second[4]) == ("baseline", f"+15.6 [{100 * low:+.1f}, {100 * high:+.1f}]")
    text = " ".join(runs_notes(report))
    assert "paired by problem (8 problems)" in text
    assert "learning_rate: 0.001, 0.003; layers: None, last" in text


def test_processes_and_the_rollouts_of_a_step_are_among_what_differs(run):
    folders = [run("a", EASY, **SIZES), run("b", EASY, **SIZES), run("c", EASY, **{**SIZES, "num_generations": 4})]
    for folder, processes in zip(folders, (1, 2, 1), strict=True):
        file = folder / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"processes": processes}))
    found = compare_runs(folders)["settings"]
    assert found == {"num_generations": [2, 2, 4], "processes": [1, 2, 1], "rollouts a step": [24, 48, 48]}


def test_seconds_are_those_of_all_steps_also_before_a_resume(run):
    a, b = run("a", EASY), run("b", EASY)
    steps = [{"step": i, "loss": 1.0, "time/rollout": 1.5, "time/update": 0.25 * i} for i in (1, 2, 3)]
    (a / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (b / "summary.json").write_text(json.dumps(json.loads((b / "summary.json").read_text()) | {"train_seconds": 4.0}))
    assert [found["seconds"] for found in compare_runs([a, b])["runs"]] == [6.0, 4.0]


def test_the_baseline_may_be_any_run(run):
    folders = [run("a", EASY), run("b", BETTER)]
    for asked in ("b", str(folders[1]), f"{folders[1]}/"):
        report = compare_runs(folders, asked)
        assert report["baseline"] == "b"
        assert report["runs"][0]["difference"]["value"] == pytest.approx(-1.25 / 8)
    with pytest.raises(ValueError, match="--baseline: 'c' is none of the runs; name one of a, b"):
        compare_runs(folders, "c")


def test_what_cannot_be_paired_is_said_and_not_paired(run):
    keys = [problem_key(f"{i}+1=", str(i + 1)) for i in range(8)]
    other = [*keys[:3], *(problem_key(f"{i}+2=", str(i + 2)) for i in range(5))]
    base = run("a", EASY)
    report = compare_runs([base, run("b", BETTER, other), run("old", BETTER, recorded=False)])
    a, b, old = report["runs"]
    ends = [(r["ci95"][1] - r["ci95"][0]) / 2 for r in (a, b)]
    assert b["difference"]["ci95"] == pytest.approx([1.25 / 8 - np.hypot(*ends), 1.25 / 8 + np.hypot(*ends)])
    assert (b["difference"]["over"], b["difference"]["pairs"]) == ("unpaired", 0)
    text = " ".join(runs_notes(report))
    assert "b: the problems are not the same (b has 8, a 8, and 3 are in both): the interval is not paired" in text
    assert "old: old did not record the grade of each problem (eval_grades.json): the interval is not paired" in text
    assert "paired by problem (" not in text
    assert old["difference"]["ci95"] == b["difference"]["ci95"]
    assert runs_table(report)[1][2][4].endswith("unpaired")


def test_a_problem_that_is_there_twice_counts_twice():
    ours, base = [("x", 1.0), ("y", 0.0), ("x", 0.0)], [("x", 0.0), ("x", 0.0), ("y", 0.0)]
    found = over_problems(ours, base)
    assert (found.value, found.pairs) == (pytest.approx(1 / 3), 3)
    assert over_problems(ours, base[:2]) is None


def test_grades_of_other_problems_and_damaged_files_are_not_taken(tmp_path):
    record_grades(tmp_path, "student_before", ["p", "q"], [1.0, None])
    record_grades(tmp_path, "student_after", ["p", "q"], [0.0, 1.0])
    assert read_grades(tmp_path, "student_before") == [("p", 1.0)]
    assert read_grades(tmp_path) == [("p", 0.0), ("q", 1.0)]
    record_grades(tmp_path, "student_after", ["r"], [1.0])  # the run goes on with another eval_dataset
    assert (read_grades(tmp_path, "student_before"), read_grades(tmp_path)) == (None, [("r", 1.0)])
    for text in ('{"problems": ["p"], "student_after": []}', '{"problems": ["p"], "stud', "[]"):
        (tmp_path / "eval_grades.json").write_text(text)
        assert read_grades(tmp_path) is None


def test_a_large_comparison_shows_the_runs_of_its_first_seed(tmp_path, monkeypatch):
    """14 objectives of one seed each fit; of two seeds, those of the first are shown, and the page says so."""
    from oprd.tools.report import comparison

    names, where = [f"o{i}" for i in range(7)], tmp_path / "c"
    rows = [{"objective": name, "learning_rate": rate, "seeds": [5, 6]} for name in names for rate in (1e-3, 1e-2)]
    report = {"rows": rows, "best_rate": dict.fromkeys(names, 1e-2), "baseline": {}, "settings": {"seeds": [5, 6]}}
    where.mkdir()
    (where / "compare.json").write_text(json.dumps(report))
    monkeypatch.setattr(comparison, "table", lambda report: ([], []))
    monkeypatch.setattr(comparison, "notes", lambda report: [])
    runs, (found,) = comparison.unfold([tmp_path / "run", where])
    assert runs == [tmp_path / "run", *(where / "runs" / name / "lr_0.01" / "seed_5" for name in names)]
    assert "seed 5" in found.notes[0]
    report["rows"] = rows[:12]
    (where / "compare.json").write_text(json.dumps(report))
    runs, (found,) = comparison.unfold([where])
    assert (len(runs), found.notes) == (12, [])


def test_rewards_are_numbers(run):
    report = compare_runs([run("a", [1.5, 2.0, -1.0], measure="reward"), run("b", [2.0, 2.0, -1.0], measure="reward")])
    header, (_, second) = runs_table(report)
    assert header[3] == "reward after [95 %]"
    assert second[3].startswith("1 [")
    assert second[4] == "+0.167 [+0, +0.5]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare: give the folders of two or more runs, or --config FILE"),
        (["a", "b", "--config", "tiny"], "compare: give the folders of two or more runs, or --config FILE, not both"),
        (["a"], "is one run; name two or more"),
        (["a", "a"], "is named twice"),
        (["a", "nothing"], "compare: there is no folder"),
        (["a", "open"], "has no graded evaluation after training; let it end"),
        (["a", "rewarded"], "graded in different units (a: accuracy, rewarded: reward)"),
    ],
)
def test_what_is_refused(run, monkeypatch, capsys, tmp_path, words, message):
    from oprd.cli import main

    run("a", EASY)
    run("b", BETTER)
    run("rewarded", [2.0, 0.5], measure="reward")
    (run("open", EASY) / "summary.json").write_text('{"student_before": null}')
    named = [str(tmp_path / word) if i < 2 and not word.startswith("-") else word for i, word in enumerate(words)]
    monkeypatch.setattr(sys, "argv", ["oprd", "compare", *named])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
