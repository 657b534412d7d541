"""E15: a model of which blocks were cut, brought back by its original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work, kept_side_by_side, make_once, read_by_name
from evidence.comparisons import (
    TUNING_SEED,
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    of,
)
from evidence.e15_recovery.perplexity import perplexity, write_text
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.recovery import (
    NAMES,
    RIVALS,
    SHORT,
    Setting,
    cut_original,
    influence_said,
    recover,
    recovered_model,
    tried_rates,
)
from evidence.tuning import tune_inside
from evidence.words import mean_of, percent, points, standings, surely, table
from oprd.tools.compare.interval import mean_and_interval

ID = "E15"
TITLE = "Matching its original's hidden states brings a pruned model back better than output-space distillation"
CLAIM = (
    "A model that lost half of its blocks is recovered by its own original on its own rollouts, compared layer by layer without a "
    "bridge. Not in the paper; published recoveries of pruned models train on fixed text."
)
SETTING = (
    "Original: the wider embedded teacher, which adds numbers of five digits with 6 layers (the teacher of E1 has 4: a cut of one is a quarter). "
    "Cut to 3 (no answer is right any more) and to 4 (two thirds are) by block influence on 64 of its own completions, then 30 steps of 16 rollouts, `layer_map: kept`, three seeds. Rates are chosen on seed "
    "10 for the cut to 3, on grids that are widened, three times at most, until the best is inside, and used for both cuts. Avg@2 on 250 problems a seed. Perplexity per token of the original's "
    "own completions of 128 other problems. On a pretrained model: E25."
)
FILE = Path(__file__).parent / "comparison.yaml"
EMBEDDED = Setting(FILE, "embedded:wider/teacher", (3, 4), "generated:addition", "recovery")


def measure(work: Work) -> dict[str, Any]:
    """Cut the model, choose each objective's rate on one seed, and recover it with three others."""
    known = None if work.tune else committed_tuning(FILE.parent, NAMES)
    return measure_setting(work, EMBEDDED, known)


def measure_setting(work: Work, setting: Setting, tuning: list[Record] | None = None) -> dict[str, Any]:
    """`measure` of any setting.

    Args:
        work: amount of work, and its folder.
        setting: what is cut and recovered.
        tuning: the runs that chose the rates; None: they run now.
    """
    cuts = {keep: cut_original(work, setting, keep) for keep in setting.keeps}
    text = work.folder / "text.json"
    limit = 16 if work.quick else 128
    made_from = read_by_name(setting.original), read_by_name(setting.prompts), limit, setting.tokens
    write = partial(
        write_text, setting.original, setting.prompts, text, limit=limit, tokens=setting.tokens, seed=TUNING_SEED
    )
    make_once(text, made_from, write)
    tuning = _tune(work, setting) if tuning is None else tuning
    rates = {name: best_rate(tuning, name) for name in NAMES}
    chosen, seeds = {name: [rate] for name, rate in rates.items()}, first_seeds(work, setting.seeds)
    runs = {str(keep): recover(work, setting, keep, seeds, chosen) for keep in setting.keeps}
    for keep in setting.keeps:
        _add_perplexity(work, setting, keep, runs[str(keep)], text)
    (original,) = _perplexities(work, text, {"original": setting.original})
    before = dict(
        zip(runs, _perplexities(work, text, {f"cut_{k}": str(c["folder"]) for k, c in cuts.items()}), strict=True)
    )
    return {
        "tuning": tuning, "rates": rates, "runs": runs, "perplexity": {"original": original, "before": before},
        "kept": {str(keep): cut["kept"] for keep, cut in cuts.items()},
        "influence": [row["influence"] for row in cuts[setting.keeps[0]]["layers"]],
    }  # fmt: skip


def _tune(work: Work, setting: Setting) -> list[Record]:
    """Each objective on the tuning seed, on a grid that grows at an edge while its best rate lies there."""
    run = partial(recover, work, setting, setting.keeps[0], [TUNING_SEED])
    return tune_inside(run, dict.fromkeys(NAMES, setting.rates), ladder=setting.ladder, quick=work.quick)


def _add_perplexity(work: Work, setting: Setting, keep: int, records: list[Record], text: Path) -> None:
    """Perplexity of each run's model, into its record."""
    names = {f"{keep}_{r['objective']}_{r['seed']}": str(recovered_model(work, setting, keep, r)) for r in records}
    for record, value in zip(records, _perplexities(work, text, names), strict=True):
        record["perplexity"] = value


def _perplexities(work: Work, text: Path, models: Mapping[str, str]) -> list[float]:
    files = {work.folder / f"perplexity_{name}.json": (read_by_name(model), text) for name, model in models.items()}
    return [float(f"{value:.6g}") for value in kept_side_by_side(work, _perplexity, files)]


def _perplexity(model: Path | str, text: Path) -> float:
    return perplexity(str(model), text)


def judge(result: Result) -> Finding:
    """Holds if with the fewest blocks representation is ahead of the full reverse KL, sampled-token and supervised training in accuracy, and its perplexity
    is not behind theirs; in part if its accuracy is ahead of sampled-token and supervised training.
    """
    first, *others = result["runs"]
    runs = result["runs"][first]
    gaps = {name: difference(runs, "representation", name) for name in RIVALS}
    predicted = {name: difference(_log_perplexity(runs), "representation", name) for name in RIVALS}
    ahead = {name for name in RIVALS if surely(gaps[name][1]) > 0}
    if ahead == {*RIVALS} and not any(surely(gap[1]) > 0 for gap in predicted.values()):
        verdict = "holds"
    else:
        verdict = "partly" if {"sampled_token", "supervised"} <= ahead else "not"
    parts = [_part(result, keep) for keep in (first, *others)]
    text = (
        f"{influence_said(result)}\n\n" + "\n\n".join(parts) + f"\n\nWith {first} blocks representation is "
        f"{standings({NAMES[name]: gaps[name][1] for name in RIVALS})} in accuracy. A lower perplexity is better: 1 is certainty, and the original's is "
        f"{result['perplexity']['original']:.4g}.\n\n{tried_rates(result['tuning'])}"
    )
    rival = min(RIVALS, key=lambda name: gaps[name][0])
    number = (
        f"{first} of {len(result['influence'])} blocks: {mean_of([r['final'] for r in of(runs, 'representation')])} (cut "
        f"{percent(_mean(of(runs, 'representation'), 'before'))}, original {percent(_mean(of(runs, 'representation'), 'teacher'))}); "
        f"{points(*gaps[rival][:2])} against the best other ({NAMES[rival]})"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _mean(records: Sequence[Record], key: str) -> float | None:
    return mean_and_interval([r[key] for r in records])[0]


def _log_perplexity(records: Sequence[Record]) -> list[Record]:
    """The records with the mean negative log-likelihood in place of the accuracy."""
    return [{**r, "final": math.log(r["perplexity"])} for r in records]


def _part(result: Result, keep: str) -> str:
    """The table of one cut."""
    runs, rates = result["runs"][keep], result["rates"]
    gaps = {name: difference(runs, "representation", name) for name in RIVALS}
    rows = [
        [
            NAMES[name],
            f"{rates[name]:g}",
            mean_of([r["final"] for r in of(runs, name)]),
            "" if name == "representation" else points(*gaps[name][:2]),
            f"{math.exp(_mean(_log_perplexity(of(runs, name)), 'final') or 0.0):.4g}",
        ]
        for name in NAMES
    ]
    header = ["objective", "rate", "Avg@2", "representation leads by", "perplexity"]
    before = _mean(of(runs, "representation"), "before")
    return (
        f"**{keep} blocks** ({', '.join(map(str, result['kept'][keep]))}), {len(of(runs, 'representation'))} seeds. After the cut {percent(before)}, perplexity "
        f"{result['perplexity']['before'][keep]:.4g}; the original {percent(_mean(of(runs, 'representation'), 'teacher'))}.\n\n{table(header, rows)}"
    )


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each objective, one panel a cut."""
    figure.set_figheight(2.1 + 1.9 * len(result["runs"]))
    panels = figure.subplots(len(result["runs"]), 1, squeeze=False)[:, 0]
    for axis, (keep, runs) in zip(panels, result["runs"].items(), strict=True):
        found = {SHORT[name]: [r["final"] for r in of(runs, name)] for name in NAMES}
        accuracy_rows(axis, found, ours=[SHORT["representation"]])
        title_above_marks(axis, f"{keep} of {len(result['influence'])} blocks")
        reference_lines(axis, of(runs, "representation"))
    note(figure, SEEDS)
