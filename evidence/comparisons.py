"""Training runs of a claim: runs a comparison file through `oprd compare`'s functions, one record a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Work, contents
from evidence.words import mean_of, points
from oprd.files import write_json
from oprd.run_config import find_recipe, read_yaml
from oprd.runs.folder import RunFolder
from oprd.tools.compare.bridges import fit_missing, parse_bridges
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.compare.plan import load_comparison, plan_runs
from oprd.tools.compare.results import Run, read_result, summary_of
from oprd.tools.compare.runner import open_runs, run_all

Record = dict[str, Any]
GETS_WORSE = "the model gets worse"
"""Is in the text of the alarm for states that come closer while the model gets worse, and of no other."""
TUNING_SEED = 10  # its problems choose learning rates; otherwise only quick runs use it
QUICK = {"max_steps": 4, "eval_limit": 40, "eval_steps": 4}
"""Settings of a quick run, which only checks that the code works."""


def run_comparison(
    file: Path,
    work: Work,
    *,
    folder: str,
    seeds: Sequence[int] | None = None,
    rates: Mapping[str, Sequence[float]] | None = None,
    objectives: Collection[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Record]:
    """Run what is missing of a comparison and read all of it.

    Args:
        file: the comparison; its `output_dir` is not used.
        work: amount of work, and its folder.
        folder: folder of the runs, beside the claim's folder. Claims on the same pair share one, so a shared run happens once.
        seeds: replace the file's.
        rates: objective → its learning rates, replacing the file's.
        objectives: objectives of the file to run (default: all, or those of `rates`).
        settings: further settings of all runs.

    Returns:
        One record a run: objective, learning_rate, seed, final, best and points (Avg@k by step), cosine, length, dist_4,
        finished, alarms and cosine_alarms (steps), steps, seconds; before and teacher (Avg@k of the seed's problems).

    Raises:
        ValueError: an invalid file, or runs that failed.
    """
    file, comparison = load_comparison(file)
    wanted = list(rates or {}) if objectives is None and rates else list(objectives or comparison.objectives)
    chosen: dict[str, dict[str, Any] | None] = {}
    for name in wanted:
        changes = dict(comparison.objectives[name] or {})
        if rates and name in rates:
            changes["learning_rates"] = list(rates[name])
        chosen[name] = changes
    comparison = dataclasses.replace(
        comparison,
        output_dir=str(work.folder.parent / folder),
        seeds=list(seeds if seeds is not None else comparison.seeds),
        objectives=chosen,
        settings={**comparison.settings, **(QUICK if work.quick else {}), **(settings or {})},
    )
    with RunFolder(Path(comparison.output_dir)).hold():
        refuse_other_models(
            Path(comparison.output_dir), {**read_yaml(find_recipe(comparison.recipe)), **comparison.settings}
        )
        bridges = parse_bridges(comparison.bridges, str(file))
        fit_missing(bridges, comparison.output_dir, comparison.recipe, comparison.settings, work.say)
        runs = plan_runs(comparison, file)
        missing = open_runs(runs)
        work.say(f"{len(runs)} runs, {len(missing)} to do")
        failed = run_all(missing, workers=work.workers, threads=1, say=work.say, keep_models=comparison.keep_models)
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {'; '.join(map(str, failed))}. Called again, they run again")
    known = _of_a_seed(Path(comparison.output_dir))
    return [_record(run, known.get(run.seed, {})) for run in runs]


def refuse_other_models(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with runs of other models that had the same names.

    Raises:
        ValueError: the weights of a model changed since the runs in `folder` began.
    """
    file = folder / "models.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    entries = [settings.get("model"), settings.get("teacher_model"), *(settings.get("teachers") or {}).values()]
    for name in (entry.get("model") if isinstance(entry, Mapping) else entry for entry in entries):
        if isinstance(name, str) and Path(name).is_dir():
            now = {file: digest for file, digest in contents(Path(name)).items() if file.endswith(".safetensors")}
            if known.setdefault(name, now) != now:
                raise ValueError(f"{folder}: its runs had another {name}; remove the folder, or bring the model back")
    write_json(file, known)


def run_each_seed(
    file: Path,
    work: Work,
    *,
    folder: str,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
    settings: Callable[[int], Mapping[str, Any]],
) -> list[Record]:
    """`run_comparison` seed by seed, where each has settings of its own: `settings` gives them."""
    return [
        record
        for seed in seeds
        for record in run_comparison(file, work, folder=folder, seeds=[seed], rates=rates, settings=settings(seed))
    ]


def with_known(
    run: Callable[[Mapping[str, Sequence[float]]], list[Record]],
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    known: Sequence[Record],
) -> list[Record]:
    """Records of runs, of which those in `known` are not made again.

    Args:
        run: makes runs with all of `seeds`, of objective → rates, and returns their records.
        rates: objective → rates that are wanted.
        seeds: that are wanted.
        known: records of an earlier measurement. A rate of which a seed is missing is run with all seeds.
    """
    lacking = {
        name: [rate for rate in own if not {*seeds} <= {r["seed"] for r in of(known, name, rate)}]
        for name, own in rates.items()
    }
    lacking = {name: own for name, own in lacking.items() if own}
    kept = [
        r for name, own in rates.items() for rate in own if rate not in lacking.get(name, ())
        for r in of(known, name, rate) if r["seed"] in seeds
    ]  # fmt: skip
    return [*kept, *(run(lacking) if lacking else [])]


def committed_tuning(folder: Path, names: Collection[str]) -> list[Record]:
    """The tuning runs in the committed result of the claim in `folder`.

    Raises:
        ValueError: there is no result, or an objective has no run in it.
    """
    file = folder / "result.json"
    found: list[Record] = json.loads(file.read_text())["tuning"] if file.is_file() else []
    if missing := set(names) - {record["objective"] for record in found}:
        raise ValueError(f"{file}: no rate was chosen for {', '.join(sorted(missing))}; choose with --tune")
    return found


def first_seeds(work: Work, count: int) -> list[int]:
    """The seeds 0, 1, … of a claim; in a quick run the tuning seed, whose runs exist already."""
    return [TUNING_SEED] if work.quick else list(range(count))


def diagnosed(work: Work) -> dict[str, Any]:
    """The report of `oprd diagnose` on the embedded pair before training, on problems of the tuning seed."""
    from oprd.resolve import load_pair
    from oprd.tasks.problems import load_rows
    from oprd.tools.diagnose import diagnose_pair

    rows = load_rows("generated:addition", "train", 32 if work.quick else 128, TUNING_SEED)
    pair = load_pair("embedded:tiny/student", "embedded:tiny/teacher")
    return diagnose_pair(pair, rows, max_completion_length=64, probe_rate=False)


def _record(run: Run, of_seed: Mapping[str, float]) -> Record:
    result = read_result(run, of_seed.get("student_before"))
    after = summary_of(run)["student_after"]
    lines = [line for line in RunFolder(run.folder).read_metrics() if "loss" in line]
    cosines = [line["cosine"] for line in lines if "cosine" in line]
    return {
        "objective": run.objective,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "final": _round(result.final.avg),
        "best": _round(result.best),
        "points": [[point.step, _round(point.avg)] for point in result.points],
        "cosine": [_round(cosines[0]), _round(cosines[-1])] if cosines else None,
        "length": _round(after["mean_length"]),
        "dist_4": _round(after["dist_4"]),
        "finished": _round(after["finished"]),
        "alarms": [line["step"] for line in lines if line.get("alarm")],
        "cosine_alarms": [line["step"] for line in lines if GETS_WORSE in line.get("alarm_text", "")],
        "steps": result.final.step,
        "seconds": _round(result.final.seconds),
        "before": of_seed.get("student_before"),
        "teacher": of_seed.get("teacher"),
    }


def _of_a_seed(folder: Path) -> dict[int, dict[str, float]]:
    """Seed → Avg@k of the student before and of the teacher on its problems, from the first run in `folder` that measured them."""
    found: dict[int, dict[str, float]] = {}
    for file in sorted(folder.glob("runs/*/*/seed_*/summary.json")):
        summary = json.loads(file.read_text())
        for name in ("student_before", "teacher"):
            if summary.get(name):
                own = found.setdefault(int(file.parent.name.removeprefix("seed_")), {})
                own.setdefault(name, summary[name]["avg_at_k"])
    return found


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def of(records: Sequence[Record], objective: str, rate: float | None = None) -> list[Record]:
    """The records of one objective, by seed."""
    own = [r for r in records if r["objective"] == objective and (rate is None or r["learning_rate"] == rate)]
    return sorted(own, key=lambda r: r["seed"])


def best_rate(records: Sequence[Record], objective: str) -> float:
    """The rate with the best mean final accuracy (the smaller one on a tie)."""
    rates = sorted({r["learning_rate"] for r in of(records, objective)})
    return max(rates, key=lambda rate: mean_and_interval([r["final"] for r in of(records, objective, rate)])[0] or 0.0)


def difference(
    records: Sequence[Record], one: str, other: str, key: str = "final"
) -> tuple[float, list[float] | None, int]:
    """Mean over the shared seeds of `one` − `other`, its 95 % t-interval, and the number of seeds."""
    mine, theirs = ({r["seed"]: r[key] for r in of(records, name)} for name in (one, other))
    gaps = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    mean, interval = mean_and_interval(gaps)
    if mean is None:
        raise ValueError(f"{one!r} and {other!r} have no seed in common")
    return mean, interval, len(gaps)


def at_its_rate(result: Mapping[str, Any], name: str, lead: tuple[float, list[float] | None, int] | None) -> list[str]:
    """Cells of an objective: its tuned rate, its final accuracy with interval, its lead; without a lead the last is empty.

    Args:
        result: of a claim, with `runs` and `rates`.
        name: of the objective.
        lead: as `difference` gives it.
    """
    accuracy = mean_of([r["final"] for r in of(result["runs"], name)])
    return [f"{result['rates'][name]:g}", accuracy, "" if lead is None else points(*lead[:2])]


def gap_closed(records: Sequence[Record]) -> tuple[float | None, list[float] | None]:
    """Share of the teacher's lead that training closed: mean over seeds and its 95 % t-interval."""
    return mean_and_interval([(r["final"] - r["before"]) / (r["teacher"] - r["before"]) for r in records])
