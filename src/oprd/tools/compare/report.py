"""Report a comparison: `compare.json`, and the same numbers as a table in `compare.md` and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oprd.files import write_json, write_text
from oprd.tasks.measures import ACCURACY, REWARD, in_words
from oprd.tools.compare.difference import PROBLEMS, SEEDS
from oprd.tools.compare.figure import plot_comparison
from oprd.tools.compare.results import Run, rollouts_a_step, summarize_runs
from oprd.tools.compare.words import difference_in_words, with_interval

if TYPE_CHECKING:  # it reads the settings of a run, for which torch is imported
    from oprd.tools.compare.plan import Comparison

NAMES = ("compare.json", "compare.md", "compare.png")


def build_report(
    comparison: Comparison, file: Path, runs: Sequence[Run], baseline: str | None = None
) -> dict[str, Any]:
    """Results from the run folders, with the settings of the runs.

    Args:
        comparison: its file's content.
        file: its file.
        runs: of its plan.
        baseline: objective that the others are compared with; None: the first.

    Raises:
        ValueError: no run is complete, a complete run has no accuracy, or there is no such objective.
    """
    first = runs[0].settings
    common = {k: v for k, v in first.items() if all(k in run.settings and run.settings[k] == v for run in runs)}
    return {
        **summarize_runs(runs, baseline),
        "settings": {
            "file": str(file),
            "recipe": comparison.recipe,
            "seeds": comparison.seeds,
            "learning_rates": comparison.learning_rates,
            "settings": comparison.settings,
            "bridges": comparison.bridges,
            "objectives": {name: changes or {} for name, changes in comparison.objectives.items()},
            "rollouts_a_step": rollouts_a_step(runs[0]),
            "common": common,
        },
    }


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `compare.json`, `compare.md` and `compare.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text, picture = (folder / name for name in NAMES)
    write_json(data, report)
    write_text(text, markdown(report))
    plot_comparison(report, picture)


def table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """The header, and for each row whether it is its objective's best rate, with its cells."""
    measure, asked = report["measure"], len(report["settings"]["seeds"])
    name = f"Avg@{report['k']}" if measure == ACCURACY else REWARD
    header = [
        "objective", "rate", f"final {name} [95 %]", f"difference to {report['baseline']['objective']} [95 %]", "best",
        f"at {report['equal_time']['seconds']:.3g} s", "gap closed", "seconds", "steps", "seeds",
    ]  # fmt: skip
    rows = []
    for row in report["rows"]:
        best = row["final_avg"] is not None and report["best_rate"][row["objective"]] == row["learning_rate"]
        cells = [
            row["objective"], f"{row['learning_rate']:g}", with_interval(row["final_avg"], row["final_ci95"], measure),
            _difference(report, row), in_words(row["best_avg"], measure),
            with_interval(row["equal_time_avg"], row["equal_time_ci95"], measure),
            _gap_closed(row), _number(row["seconds"], 2), _number(row["steps"], 0),
            str(asked) if len(row["seeds"]) == asked else f"{len(row['seeds'])} of {asked}",
        ]  # fmt: skip
        rows.append((best, cells))
    return header, rows


def _gap_closed(row: Mapping[str, Any]) -> str:
    """The mean share of the gap, and how many seeds have none to close."""
    left_out = row.get("seeds_without_gap", 0)
    return in_words(row["gap_closed"]) + (f" ({left_out} seed(s) without a gap left out)" if left_out else "")


def notes(report: Mapping[str, Any]) -> list[str]:
    """Explanations of the table, one paragraph each."""
    setting, machine, equal = report["settings"], report["machine"], report["equal_time"]
    lines = [
        f"Recipe {setting['recipe']}, {setting['rollouts_a_step']} rollouts a step, seeds {_list(setting['seeds'])}; "
        f"{report['problems']} problems, {report['k']} samples each. {_reference(report, 'student_before', 'Student before')}; "
        f"{_reference(report, 'teacher', 'teacher')}.",
        "Means are over seeds. Intervals are mean ± t·s/√n over the seeds (Student's t): if seeds scatter normally, 95 % of such "
        "intervals cover the mean over all seeds. A seed draws its own rollouts and evaluation samples (and its own problems, "
        "where they are generated), so that this is part of the scatter; they are no intervals over problems. One seed has none.",
        _how_differences(report),
        "`best` is the mean over seeds of each run's best evaluation, and `*` marks each objective's rate of the best final "
        "accuracy; both are chosen by the problems that measure them, and so are optimistic.",
        f"The time of training is that of rollouts, grading, teacher, update and optimizer, without evaluation. Accuracy at "
        f"{equal['seconds']:.3g} s, the mean time of the fastest row ({equal['set_by']['objective']}, "
        f"{equal['set_by']['learning_rate']:g}): {equal['method']}.",
        f"Measured with {machine.get('threads', '?')} CPU thread(s) a run, {machine.get('workers', '?')} run(s) at a time, "
        f"{machine.get('cpus', '?')} CPU(s).",
    ]
    if machine.get("workers", 1) != 1:
        lines.append(
            "Runs that share a machine slow each other: read the times with care, or measure again with one at a time."
        )
    if report["missing"]:
        lines.append(
            f"{len(report['missing'])} of {report['runs']} runs are not complete and not in these numbers: "
            f"{'; '.join(report['missing'])}."
        )
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """The table with its notes, as Markdown."""
    header, rows = table(report)
    lines = ["# Comparison of objectives", "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for best, cells in rows:
        marked = [f"**{cell}**" for cell in cells[:3]] if best else cells[:3]
        marked[1] += " *" if best else ""
        lines.append(f"| {' | '.join([*marked, *cells[3:]])} |")
    return "\n".join([*lines, "", "\n\n".join(notes(report)), "", "![accuracy](compare.png)", ""])


def _reference(report: Mapping[str, Any], key: str, name: str) -> str:
    found = report[key]
    return (
        f"{name} {with_interval(found['avg'], found['ci95'], report['measure'])}" if found else f"{name} not evaluated"
    )


def _difference(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    base = report["baseline"]
    is_base = (row["objective"], row["learning_rate"]) == (base["objective"], base["learning_rate"])
    return "baseline" if is_base else difference_in_words(row["difference"], report["measure"])


def _how_differences(report: Mapping[str, Any]) -> str:
    base = report["baseline"]
    if base["learning_rate"] is None:
        return f"There is no complete run of the baseline, {base['objective']}, and so no difference to it."
    overs = {row["difference"]["over"] for row in report["rows"] if row["difference"]}
    over = {
        SEEDS: "seed by seed: all objectives share the seeds, and the t-interval is that of the mean difference "
        "(`final_by_seed` in compare.json)",
        PROBLEMS: "problem by problem where there is one seed: the interval is a bootstrap over problems, without the spread over "
        "seeds",
        "": "of one seed, without an interval",
    }
    how = "; ".join(text for name, text in over.items() if name in overs) or "of the seeds that both have"
    unit = "percentage points" if report["measure"] == ACCURACY else "reward"
    return f"Differences to {base['objective']} at {base['learning_rate']:g}, its best rate, are in {unit}, {how}."


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
