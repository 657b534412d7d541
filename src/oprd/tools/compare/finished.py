"""Compare finished runs by their folders: results, differences to one of them, and the settings that are not the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd.runs.columns import number
from oprd.runs.folder import CONFIG
from oprd.runs.grades import read_grades
from oprd.tasks.measures import in_words
from oprd.tools.compare.difference import PROBLEMS, Difference, over_problems, unpaired, why_not_paired
from oprd.tools.compare.results import ROLLOUTS
from oprd.tools.compare.words import difference_in_words, with_interval
from oprd.tools.report.read import RunRecord, interval, measured, objective_of, read_runs

_NOT_COMPARED = ("output_dir", "run_name", "chat_template_date")
_LONGEST_VALUE = 60
_AFTER = "student_after"


def compare_runs(folders: Sequence[Path], baseline: str | None = None) -> dict[str, Any]:
    """Compare runs by their evaluation after training.

    Args:
        folders: of two or more runs.
        baseline: folder or name of the run that the others are compared with; None: the first.

    Returns:
        `baseline` (a name), `measure` ("accuracy" or "reward"), `runs` (a dict for each: results, and `difference` with `value`,
        `ci95`, `over`, `pairs`, `why_unpaired`, or None), `settings` (key → the value of each run, of keys that differ).

    Raises:
        ValueError: fewer than two runs, a folder that is no run, an unknown baseline, a run without a graded evaluation after
            training, or runs that are graded in different units.
    """
    if len(folders) < 2:
        raise ValueError(
            f"compare: {folders[0] if folders else 'nothing'} is one run; name two or more, or a comparison by --config FILE"
        )
    records = read_runs(folders, verb="compare")
    first = _baseline(records, folders, baseline)
    for record in records:
        if number(measured(record, _AFTER), "avg_at_k") is None:
            raise ValueError(
                f"compare: {record.folder} has no graded evaluation after training; let it end (oprd train --config "
                f"{record.folder / CONFIG} --resume auto), or evaluate its model with oprd eval"
            )
    units = {record.name: record.measure for record in records}
    if len({*units.values()}) > 1:
        raise ValueError(
            f"compare: runs are graded in different units ({', '.join(f'{name}: {unit}' for name, unit in units.items())}); "
            "compare runs of one task and one reward"
        )
    return {
        "baseline": first.name,
        "measure": units[first.name],
        "runs": [_result(record, first) for record in records],
        "settings": _differing([{**record.config, **_shape(record)} for record in records]),
    }


def between(ours: RunRecord, baseline: RunRecord) -> Difference | None:
    """Difference in Avg@k after training, paired by problem where both runs have the same; None where one has no grade."""
    (mine, left), (theirs, right) = (
        (number(measures, "avg_at_k"), interval(measures))
        for measures in (measured(ours, _AFTER), measured(baseline, _AFTER))
    )
    if mine is None or theirs is None:
        return None
    grades = read_grades(ours.folder), read_grades(baseline.folder)
    if grades[0] and grades[1] and (paired := over_problems(grades[0], grades[1])) is not None:
        return paired
    return unpaired((mine, left), (theirs, right), why_not_paired(*grades, (ours.name, baseline.name)))


def runs_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and a row for each run."""
    measure, runs = report["measure"], report["runs"]
    name = f"Avg@{runs[0]['k']}" if measure == "accuracy" else "reward"
    header = [
        "run", "loss", f"{name} before", f"{name} after [95 %]", f"difference to {report['baseline']} [95 %]", "teacher",
        "gap closed", "steps", "seconds of steps",
    ]  # fmt: skip
    rows = [
        [
            run["run"], run["objective"], in_words(run["before"], measure), with_interval(run["after"], run["ci95"], measure),
            "baseline" if run["run"] == report["baseline"] else difference_in_words(run["difference"], measure),
            in_words(run["teacher"], measure), in_words(run["gap_closed"]), _whole(run["steps"]), _whole(run["seconds"]),
        ]
        for run in runs
    ]  # fmt: skip
    return header, rows


def runs_notes(report: Mapping[str, Any]) -> list[str]:
    """How the differences are computed, what could not be paired, and which settings are not the same."""
    found = {run["run"]: run["difference"] for run in report["runs"] if run["difference"]}
    lines = []
    if pairs := sorted({d["pairs"] for d in found.values() if d["over"] == PROBLEMS}):
        count = " or ".join(map(str, pairs))
        lines.append(
            f"Differences are paired by problem ({count} problems), with a 95 % bootstrap interval over problems: where it "
            "leaves 0 out, the runs differ on problems of this kind. The spread over training seeds is not in it: for that, "
            "train several seeds (oprd compare --config FILE)."
        )
    lines += [
        f"{name}: {d['why_unpaired']}: the interval is not paired but made of both runs' own ones, which is wider."
        for name, d in found.items()
        if d["why_unpaired"]
    ]
    if settings := report["settings"]:
        said = "; ".join(f"{key}: {', '.join(map(_short, values))}" for key, values in settings.items())
        lines.append(f"Settings that are not the same, in the order of the runs: {said}.")
    else:
        lines.append("All settings are the same.")
    return lines


def _baseline(records: Sequence[RunRecord], folders: Sequence[Path], asked: str | None) -> RunRecord:
    if asked is None:
        return records[0]
    for record, folder in zip(records, folders, strict=True):
        if asked in (record.name, str(folder)) or Path(asked).resolve() == folder.resolve():
            return record
    raise ValueError(f"--baseline: {asked!r} is none of the runs; name one of {', '.join(r.name for r in records)}")


def _result(record: RunRecord, baseline: RunRecord) -> dict[str, Any]:
    after = measured(record, _AFTER)
    ends = interval(after)
    difference = None if record is baseline else between(record, baseline)
    return {
        "run": record.name,
        "folder": str(record.folder),
        "objective": objective_of(record.config) or None,
        "before": number(measured(record, "student_before"), "avg_at_k"),
        "after": number(after, "avg_at_k"),
        "ci95": list(ends) if ends else None,
        "k": after.get("k"),
        "problems": after.get("problems"),
        "teacher": number(measured(record, "teacher"), "avg_at_k"),
        "gap_closed": number(record.summary, "gap_closed"),
        "steps": number(record.summary, "steps"),
        "seconds": record.step_seconds,
        "difference": None if difference is None else difference.as_json(),
    }


def _shape(record: RunRecord) -> dict[str, Any]:
    """What no setting says alone: processes, the rollouts of a step over all of them, and changes on the way."""
    processes = record.summary.get("processes")
    sizes = [size for size in (processes, *map(record.config.get, ROLLOUTS)) if isinstance(size, int)]
    known = len(sizes) == 1 + len(ROLLOUTS)
    changed = [str(part["step"]) for part in record.summary.get("resumed") or () if part["changes"]]
    return {
        "processes": processes,
        **({"rollouts a step": math.prod(sizes)} if known else {}),
        "settings changed after step": ", ".join(changed) or None,
    }


def _differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key → the value of each run, of the settings that are not the same in all runs."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _NOT_COMPARED)
    found = {key: [config.get(key) for config in configs] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
