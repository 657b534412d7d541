"""E15: a model of which blocks were cut, brought back by its original."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work, kept_side_by_side
from evidence.comparisons import (
    TUNING_SEED,
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    of,
    run_comparison,
)
from evidence.e15_recovery.perplexity import perplexity, write_text
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.tuning import GRID, LADDER, Rates, edges_said, tune_inside
from evidence.words import mean_of, percent, points, standings, surely, table
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.prune import Choice, PromptFile, prune_model

ID = "E15"
TITLE = "Matching its original's hidden states brings a pruned model back better than output-space distillation"
CLAIM = (
    "A model that lost half of its blocks is recovered by its own original on its own rollouts, compared layer by layer without a "
    "bridge. Not in the paper; published recoveries of pruned models train on fixed text."
)
SETTING = (
    "Original: the wider embedded teacher, which adds numbers of five digits with 6 layers (the other embedded teacher has 4: a cut of one is a quarter). "
    "Cut to 3 (no answer is right any more) and to 4 (two thirds are) by block influence on 64 of its own completions, then 30 steps of 16 rollouts, `layer_map: kept`, three seeds. Rates are chosen on seed "
    "10 for the cut to 3, on grids that grow until the best is inside, and used for both cuts. Avg@2 on 250 problems a seed. Perplexity per token of the original's "
    "own completions of 128 other problems. On a pretrained model: E25."
)
FILE = Path(__file__).parent / "comparison.yaml"
NAMES = {
    "representation": "representation (OPRD-Vanilla)",
    "full_reverse_kl": "full reverse KL",
    "sampled_token": "sampled-token OPD",
    "supervised": "supervised on the original's responses",
}
SHORT = {"representation": "representation", "supervised": "supervised on the\noriginal's responses"}
RIVALS = ("full_reverse_kl", "sampled_token", "supervised")
_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """What is cut and recovered.

    Args:
        file: the comparison.
        original: the model that is cut, and the teacher.
        keeps: numbers of blocks that are kept; the rates are chosen for the first.
        prompts: of the completions on which blocks are measured, and of the held-out text.
        folder: of the runs, with the number of blocks appended.
        tokens: most tokens of a completion.
        rates: with which the grid begins.
        ladder: rates at which it may grow.
        seeds: how many.
        quick: of a quick run, beside `evidence.comparisons.QUICK`.
    """

    file: Path
    original: str
    keeps: tuple[int, ...]
    prompts: str
    folder: str
    tokens: int = _TOKENS
    rates: tuple[float, ...] = GRID
    ladder: tuple[float, ...] = LADDER
    seeds: int = 3
    quick: Mapping[str, Any] = field(default_factory=dict)


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
    cuts = {keep: _cut(work, setting, keep) for keep in setting.keeps}
    text = work.folder / "text.json"
    if not text.is_file():
        limit = 16 if work.quick else 128
        write_text(setting.original, setting.prompts, text, limit=limit, tokens=setting.tokens, seed=TUNING_SEED)
    tuning = _tune(work, setting, cuts) if tuning is None else tuning
    rates = {name: best_rate(tuning, name) for name in NAMES}
    runs = {
        str(keep): _runs(
            work, setting, keep, cuts, first_seeds(work, setting.seeds), {n: [r] for n, r in rates.items()}
        )
        for keep in setting.keeps
    }
    for keep, records in runs.items():
        _add_perplexity(work, setting, keep, records, text)
    (original,) = _perplexities(work, text, {"original": setting.original})
    before = dict(
        zip(runs, _perplexities(work, text, {f"cut_{k}": str(c["folder"]) for k, c in cuts.items()}), strict=True)
    )
    return {
        "tuning": tuning, "rates": rates, "runs": runs, "perplexity": {"original": original, "before": before},
        "kept": {str(keep): cut["kept"] for keep, cut in cuts.items()},
        "influence": [row["influence"] for row in cuts[setting.keeps[0]]["layers"]],
    }  # fmt: skip


def _cut(work: Work, setting: Setting, keep: int) -> dict[str, Any]:
    """Cut the original once; what was found."""
    folder, file = work.folder / f"cut_{keep}", work.folder / f"cut_{keep}.json"
    if not (folder / "config.json").is_file():
        prompts = PromptFile(
            setting.prompts, limit=64, max_completion_length=setting.tokens, split="train", seed=TUNING_SEED
        )
        file.write_text(
            json.dumps(prune_model(setting.original, Choice("cosine", keep), folder, prompts=prompts, dtype="float32"))
        )
    return {**json.loads(file.read_text()), "folder": folder}


def _runs(
    work: Work,
    setting: Setting,
    keep: int,
    cuts: Mapping[int, Any],
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[float]],
) -> list[Record]:
    settings = {**(setting.quick if work.quick else {}), "model": str(cuts[keep]["folder"])}
    return run_comparison(
        setting.file, work, folder=_folder(setting, keep), seeds=seeds, rates=rates, settings=settings
    )


def _folder(setting: Setting, keep: int | str) -> str:
    return f"{setting.folder}_{keep}"


def _tune(work: Work, setting: Setting, cuts: Mapping[int, Any]) -> list[Record]:
    """Each objective on the tuning seed, on a grid that grows at an edge while its best rate lies there."""

    def run(rates: Rates) -> list[Record]:
        return _runs(work, setting, setting.keeps[0], cuts, [TUNING_SEED], rates)

    return tune_inside(run, dict.fromkeys(NAMES, setting.rates), ladder=setting.ladder, quick=work.quick)


def _add_perplexity(work: Work, setting: Setting, keep: str, records: list[Record], text: Path) -> None:
    """Perplexity of each run's model, into its record."""
    names = {}
    for record in records:
        folder = work.folder.parent / _folder(setting, keep) / "runs" / record["objective"]
        folder = folder / f"lr_{record['learning_rate']!r}" / f"seed_{record['seed']}" / "model"
        names[f"{keep}_{record['objective']}_{record['seed']}"] = str(folder)
    for record, value in zip(records, _perplexities(work, text, names), strict=True):
        record["perplexity"] = value


def _perplexities(work: Work, text: Path, models: Mapping[str, str]) -> list[float]:
    files = {work.folder / f"perplexity_{name}.json": (model, text) for name, model in models.items()}
    return [float(f"{value:.6g}") for value in kept_side_by_side(work, _perplexity, _as_text(files))]


def _as_text(files: Mapping[Path, tuple[str, Path]]) -> dict[Path, tuple[Any, ...]]:
    return {file: (model, str(text)) for file, (model, text) in files.items()}


def _perplexity(model: str, text: str) -> float:
    return perplexity(model, Path(text))


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
        f"{_influence(result)}\n\n" + "\n\n".join(parts) + f"\n\nWith {first} blocks representation is "
        f"{standings({NAMES[name]: gaps[name][1] for name in RIVALS})} in accuracy. A lower perplexity is better: 1 is certainty, and the original's is "
        f"{result['perplexity']['original']:.4g}.\n\n{_edges(result)}"
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


def _influence(result: Result) -> str:
    values = ", ".join(f"{layer}: {value:.3f}" for layer, value in enumerate(result["influence"], start=1))
    return f"Block influence on the original's own completions: {values}."


def _edges(result: Result) -> str:
    tried = {name: sorted(r["learning_rate"] for r in of(result["tuning"], name)) for name in NAMES}
    grids = "; ".join(f"{NAMES[n]} {', '.join(f'{rate:g}' for rate in tried[n])}" for n in NAMES)
    return f"**Learning rates** tried on the tuning seed: {grids}. {edges_said(result['tuning'], NAMES)}"


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each objective, one panel a cut."""
    figure.set_figheight(2.1 + 1.9 * len(result["runs"]))
    panels = figure.subplots(len(result["runs"]), 1, squeeze=False)[:, 0]
    short = {name: SHORT.get(name, text) for name, text in NAMES.items()}
    for axis, (keep, runs) in zip(panels, result["runs"].items(), strict=True):
        found = {short[name]: [r["final"] for r in of(runs, name)] for name in NAMES}
        accuracy_rows(axis, found, ours=[short["representation"]])
        title_above_marks(axis, f"{keep} of {len(result['influence'])} blocks")
        reference_lines(axis, of(runs, "representation"))
    note(figure, SEEDS)
