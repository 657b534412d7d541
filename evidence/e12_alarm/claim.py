"""E12: cosine up, accuracy down, and the alarm for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import TUNING_SEED, Record, first_seeds, of, run_comparison
from evidence.e01_accuracy.claim import FILE as MAIN
from evidence.e01_accuracy.claim import NAMES, SHARED, chosen_rates, tune
from evidence.e10_bridge.claim import HERE as BRIDGES
from evidence.permuted import save_permuted
from evidence.words import listed, percent, table
from oprd.runs.pictures import INK, MARKERS, colour, in_percent

ID = "E12"
TITLE = "Cosine can rise while accuracy falls, and the alarm reports it"
CLAIM = "Matching all layers of unrelated models raises cosine while accuracy collapses (LastOPD, RIDE: 25 → 46 → 11). oprd's alarm detects such runs."
SETTING = (
    "Embedded pairs: a teacher whose hidden dimensions are permuted (the same function, no common origin), E1's runs (all rates of its tuning seed, and its seeds), "
    "and E10's two other teachers with bridges of several ranks, at the rates of their files. The alarm that cosine rises while the model gets worse, at its default, "
    "`alarm_window: 20`; others do not count. A bad run: cosine rises over the run and the student ends below its start. The alarm's standard error of the sampled reverse KL was mended after "
    "these settings and seeds had been seen (it then rang in 9 of 80 good runs), so that they do not test the mend independently."
)
RATE = 1.0e-3
ENOUGH = 29  # bad runs: if all of them ring, a share below 90 % is excluded at 95 %
FILE = Path(__file__).parent / "comparison.yaml"


def measure(work: Work) -> dict[str, Any]:
    """Runs that fail, and those of E1 and of E10's other teachers, each with its alarms."""
    seeds = first_seeds(work, 2)
    teacher = work.folder.parent / "permuted"
    if not (teacher / "config.json").exists():
        save_permuted("embedded:tiny/teacher", teacher, 0)
    found = {
        "same shape, other origin": run_comparison(
            FILE,
            work,
            folder="permuted_teacher",
            seeds=seeds,
            rates={"other_origin": [RATE]},
            settings={"teacher_model": str(teacher)},
        )
    }
    tuning = tune(work)
    tried = {name: sorted({r["learning_rate"] for r in of(tuning, name)}) for name in NAMES}
    rates = {name: [rate] for name, rate in chosen_rates(tuning).items()}
    found["E1"] = run_comparison(MAIN, work, folder=SHARED, seeds=first_seeds(work, 5), rates=rates)
    if not work.quick:  # again where the committed result has them: it does not say which alarm a run had
        found["E1"] += run_comparison(MAIN, work, folder=SHARED, seeds=[TUNING_SEED], rates=tried)
    names = ["rank_4", "rank_16"] if work.quick else ["rank_4", "rank_8", "rank_16", "rank_32", "rank_64", "paper"]
    found["wider teacher"] = run_comparison(
        BRIDGES / "comparison.yaml", work, folder="wider", seeds=seeds, objectives=names
    )
    found["other tokenizer"] = run_comparison(
        BRIDGES / "other_tokenizer.yaml", work, folder="other_tokenizer", seeds=seeds
    )
    keys = ("objective", "learning_rate", "seed", "before", "final", "cosine")
    return {
        "runs": [
            {"of": where, **{key: r[key] for key in keys}, "alarms": r["cosine_alarms"]}
            for where, runs in found.items()
            for r in runs
        ]
    }


def is_bad(record: Record) -> bool:
    """Whether cosine rose over the run and accuracy ended below where it began."""
    return bool(record["cosine"]) and record["cosine"][1] > record["cosine"][0] and record["final"] < record["before"]


def judge(result: Result) -> Finding:
    """Holds if the alarm rings in 90 % of the bad runs and in at most 10 % of those that end no worse than they began; in part if it rings in half of the
    bad ones.
    """
    runs = result["runs"]
    bad = [r for r in runs if is_bad(r)]
    good = [r for r in runs if r["final"] >= r["before"]]
    caught, false = sum(bool(r["alarms"]) for r in bad), sum(bool(r["alarms"]) for r in good)
    worse = [r for r in runs if r["final"] < r["before"] and not is_bad(r)]
    verdict = "not"
    if bad and caught >= 0.9 * len(bad):
        verdict = "holds" if false <= 0.1 * len(good) else "partly"
    elif bad and caught >= 0.5 * len(bad):
        verdict = "partly"
    rows = [
        [where, _name(name), f"{rate:g}", len(own), _span(own, "before"), _span(own, "final"),
         f"{min(r['cosine'][0] for r in own):.2f} → {max(r['cosine'][1] for r in own):.2f}",
         f"{sum(bool(r['alarms']) for r in own)} of {len(own)}", ", ".join(str(r["alarms"][0]) for r in own if r["alarms"])]
        for (where, name, rate), own in _groups(bad).items()
    ]  # fmt: skip
    header = ["runs of", "loss", "rate", "runs", "before", "after", "cosine", "alarm", "first at step"]
    text = (
        f"{len(runs)} runs: {len(good)} end at or above their start, {len(bad)} below it although cosine rises (the table), {len(worse)} below it "
        f"with cosine falling or not measured.\n\n{table(header, rows)}\n\nThe alarm rings in {caught} of the {len(bad)} bad runs ({len(_groups(bad))} "
        f"settings), in {false} of the {len(good)} good ones{_steps(good)} and in {sum(bool(r['alarms']) for r in worse)} of the {len(worse)} others."
        + (f" With {len(bad)} bad runs a share of 90 % cannot be shown." if len(bad) < ENOUGH else "")
    )
    number = (
        f"alarm in {caught} of {len(bad)} bad runs ({len(_groups(bad))} settings), in {false} of {len(good)} good ones"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _steps(runs: list[Record]) -> str:
    """The steps at which the alarm rings in some runs, in brackets."""
    steps = sorted(step for r in runs for step in r["alarms"])
    return f" (at step {listed(map(str, steps))})" if steps else ""


def _name(objective: str) -> str:
    return {**NAMES, "other_origin": "representation, all layers"}.get(objective, objective.replace("_", " "))


def _groups(runs: list[Record]) -> dict[tuple[str, str, float], list[Record]]:
    groups: dict[tuple[str, str, float], list[Record]] = {}
    for r in runs:
        groups.setdefault((r["of"], r["objective"], r["learning_rate"]), []).append(r)
    return groups


def _span(runs: list[Record], key: str) -> str:
    low, high = min(r[key] for r in runs), max(r[key] for r in runs)
    return (
        percent(low, 0)
        if percent(low, 0) == percent(high, 0)
        else f"{percent(low, 0).removesuffix(' %')}–{percent(high, 0)}"
    )


def draw(result: Result, figure: Any) -> None:
    """Change of cosine against change of accuracy; filled where the alarm rang."""
    figure.set_figheight(3.4)
    names = {
        "E1": "E1's pair",
        "wider teacher": "wider teacher",
        "other tokenizer": "other tokenizer",
        "same shape, other origin": "other origin",
    }
    axes = figure.subplots(1, len(names), sharex=True, sharey=True)
    for index, (axis, where) in enumerate(zip(axes, names, strict=True)):
        for rang in (True, False):
            own = [r for r in result["runs"] if r["of"] == where and r["cosine"] and bool(r["alarms"]) is rang]
            axis.plot(
                [r["cosine"][1] - r["cosine"][0] for r in own], [r["final"] - r["before"] for r in own], MARKERS[index],
                color=colour(index), mfc=colour(index) if rang else "none", markersize=6,
            )  # fmt: skip
        axis.axhline(0, color=INK, linewidth=0.9)
        axis.axvline(0, color=INK, linewidth=0.9)
        axis.set_title(names[where])
        in_percent(axis.yaxis)
    axes[0].margins(x=0.1)
    axes[0].set_ylabel("change of Avg@2, points")
    figure.supxlabel("change of cosine over the run, where measured (filled: the alarm rang)")
