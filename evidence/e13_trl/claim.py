"""E13: accuracy beside TRL's distillation trainers, after equal steps and after equal seconds."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from evidence.claim import Finding, Result, Work, kept_side_by_side, read_by_name
from evidence.comparisons import (
    QUICK,
    TUNING_SEED,
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    gap_closed,
    of,
)
from evidence.e01_accuracy.claim import FILE as MAIN
from evidence.e13_trl.train import reference, train
from evidence.pictures import SEEDS, accuracy_rows, note, reference_lines, title_above_marks
from evidence.tuning import FURTHER
from evidence.words import mean_of, percent, points, standing, surely, table
from oprd.config import OPRDConfig
from oprd.run_config import find_recipe, read_yaml
from oprd.runs.pictures import End, colour, in_percent, look, name_ends
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.compare.plan import load_comparison

ID = "E13"
TITLE = "Matching hidden states beats TRL's tuned trainers, after equal steps and equal seconds"
CLAIM = (
    "On the same pair, prompts, steps and rollouts, OPRD-Vanilla is more accurate than TRL's distillation trainers with a tuned rate, and oprd's full "
    "reverse KL is as accurate as TRL's (this project's own claim; the paper compares with no other library)."
)
SETTING = (
    "E1's pair, prompts, steps, rollouts (temperature 1) and evaluation; oprd's runs are E1's, trained again. TRL's `DistillationTrainer` (reverse KL), "
    "`GKDTrainer` and `GOLDTrainer` (Jensen-Shannon divergence, their default; the last two with `lmbda` 1 and temperature 1). Steps, rollouts, "
    "sampling, float32 and no activation checkpointing are set for TRL; the rest is its default: linear decay without warm-up, AdamW, "
    "clipping at 1. Each trainer draws the order of the prompts and the rollouts itself. TRL's rates are tuned on seed 10, on grids that grow "
    "until the best rate is inside; GOLD takes GKD's, because its loss is the same. GKD and GOLD divide the loss by the number of tokens of a given answer that they do "
    "not train on: it is a worked solution here, as long as a rollout. Seconds: CPU seconds of the training process (one thread; "
    "`time.process_time`), because the machine is shared; without evaluation and the first step. Other "
    "processes still slow them, so they are provisional: the table has their range over seeds."
)
FACTOR = 3.0  # from the edge of a grid to the next rate
NEAR = 0.05
"""Half of the interval of the difference between oprd's reverse KL and TRL's must be below this; a wider one says nothing."""
OURS = ("representation", "full_reverse_kl")
TRL: dict[str, str] = {
    "distillation_as_ours": "distillation",
    "distillation_default": "distillation",
    "distillation": "distillation",
    "gkd": "gkd",
    "gold": "gold",
}
"""Runs of TRL → trainer."""
TUNED = ("distillation", "gkd")
RIVALS = ("distillation", "distillation_as_ours", "gkd", "gold")
EQUAL_TIME = "equal_time"
NAMES = {
    "representation": "oprd, representation",
    "full_reverse_kl": "oprd, full reverse KL",
    "distillation_as_ours": "TRL Distillation, rate and schedule of oprd's full reverse KL",
    "distillation": "TRL Distillation, tuned rate",
    "gkd": "TRL GKD, tuned rate",
    "gold": "TRL GOLD, GKD's rate",
    "distillation_default": "TRL Distillation, its default rate",
}
SHORT = {
    "representation": "oprd,\nrepresentation",
    "full_reverse_kl": "oprd,\nfull reverse KL",
    "distillation_as_ours": "TRL Distillation,\noprd's schedule",
    "distillation": "TRL Distillation,\ntuned",
    "gkd": "TRL GKD,\ntuned",
    "gold": "TRL GOLD,\nGKD's rate",
    "distillation_default": "TRL Distillation,\ndefault rate",
}
"""Names in two lines, for pictures."""
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
"""TRL's trainers report their use to a server unless told not to."""
SCHEDULE = {
    field.name: field.default
    for field in dataclasses.fields(OPRDConfig)
    if field.name in ("lr_scheduler_type", "warmup_steps")
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """What is compared on.

    Args:
        file: a claim's comparison with the objectives `OURS`: models, prompts, steps, rollouts; beside it, its result, which
            has their rates.
        names: of `NAMES`, what is trained.
        rates: trainer of TRL → its rates on the tuning seed.
        seeds: how many are measured.
        fewer: of `names` or `EQUAL_TIME`, how many are measured of some.
        warm: settings of the warm-up, where the claim chose between with and without.
    """

    file: Path
    names: tuple[str, ...]
    rates: dict[str, tuple[float, ...]]
    seeds: int
    fewer: Mapping[str, int]
    warm: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def seeds_of(self, name: str, seeds: Sequence[int]) -> Sequence[int]:
        """Those of some seeds on which a run is measured."""
        return seeds[: self.fewer.get(name, self.seeds)]

    def committed(self) -> dict[str, Any]:
        """The claim's committed result."""
        found: dict[str, Any] = json.loads((self.file.parent / "result.json").read_text())
        return found

    def chosen(self, name: str) -> dict[str, Any]:
        """The settings that the claim chose for an objective: its learning rate, and a warm-up where it chose one."""
        found = self.committed()
        if "rates" in found:
            return {"learning_rate": found["rates"][name]}
        own = found["settings"][name]
        return {"learning_rate": own["rate"], **(self.warm if own["warm_up"] else {})}


TINY = Pair(
    MAIN,
    tuple(NAMES),
    {
        "distillation": (1.0e-4, 2.0e-4, 3.0e-4, 5.0e-4, 7.0e-4, 1.0e-3),
        "gkd": (1.0e-4, 3.0e-4, 5.0e-4, 1.0e-3),
    },
    5,
    {"gkd": 3, "gold": 3, "distillation_default": 3},
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run.

    Args:
        name: one of `NAMES`.
        rate: learning rate; None: TRL's default.
        seed: of problems, prompts and rollouts.
        steps: None: those of the comparison.
    """

    name: str
    rate: float | None
    seed: int
    steps: int | None = None


def measure(work: Work) -> dict[str, Any]:
    """Tune TRL's rates on one seed, train all on five others, and the best of TRL's again for as long as the representation loss took."""
    known = None if work.tune else committed_tuning(Path(__file__).parent, TUNED)
    return measure_pair(work, TINY, known)


def measure_pair(work: Work, pair: Pair, tuning: list[Record] | None = None) -> dict[str, Any]:
    """`measure` on any pair of models.

    Args:
        work: amount of work, and its folder.
        pair: what is compared on.
        tuning: the runs that chose TRL's rates; None: they run now.

    Raises:
        ValueError: TRL is not installed.
    """
    if find_spec("trl") is None:
        raise ValueError("E13 compares with TRL, which is not installed; pip install 'oprd[dev]'")
    main = pair.committed()
    tuned = list(pair.rates)
    tuning = tune(work, pair) if tuning is None else [r for r in tuning if r["objective"] in tuned]
    rates: dict[str, float | None] = {name: pair.chosen(name)["learning_rate"] for name in OURS}
    rates |= {name: best_rate(tuning, name) for name in tuned}
    rates |= {"distillation_as_ours": rates["full_reverse_kl"], "gold": rates.get("gkd"), "distillation_default": None}
    seeds = first_seeds(work, pair.seeds)
    plans = [
        Plan(name, rates[name], seed) for seed in seeds for name in pair.names if seed in pair.seeds_of(name, seeds)
    ]
    runs = train_all(work, pair, plans)
    rival = best_of_trl(runs)
    timed = pair.seeds_of(EQUAL_TIME, seeds)
    steps = equal_steps([r for r in runs if r["seed"] in timed], rival)
    again = train_all(work, pair, [Plan(rival, rates[rival], seed, steps) for seed in timed])
    ends = references(work, pair, seeds)
    keys = ("objective", "learning_rate", "seed", "final")
    return {
        "tuning": [*tuning, *({key: r[key] for key in keys} for r in main["tuning"] if r["objective"] in OURS)],
        "runs": [{**r, **ends[r["seed"]]} for r in (*runs, *({**r, "objective": EQUAL_TIME} for r in again))],
        "committed": [{key: r[key] for key in keys} for r in main["runs"] if r["objective"] in OURS],
        "trl": version("trl"),
    }


def tune(work: Work, pair: Pair) -> list[Record]:
    """TRL's trainers on the tuning seed, at more rates as long as the best one is the lowest or the highest."""
    records = []
    for name, grid in pair.rates.items():
        rates = {grid[-1]} if work.quick else set(grid)
        for growths in range(FURTHER + 1):
            own = train_all(work, pair, [Plan(name, rate, TUNING_SEED) for rate in sorted(rates)])
            further = beyond(best_rate(own, name), rates)
            if work.quick or further is None or growths == FURTHER:
                break
            rates.add(further)
        records += own
    return records


def beyond(best: float, rates: Collection[float]) -> float | None:
    """The rate to try next if the best one is at the edge of the grid; None if it is inside."""
    if best not in (min(rates), max(rates)):
        return None
    return float(f"{best * FACTOR if best == max(rates) else best / FACTOR:.3g}")


def train_all(work: Work, pair: Pair, plans: Sequence[Plan]) -> list[Record]:
    """The records of runs. Each run is kept."""
    found = _kept(
        work,
        train,
        {f"{p.name}_{p.rate}_{p.seed}_{p.steps}": arguments_of(p, pair, quick=work.quick) for p in plans},
    )
    return [{"objective": plan.name, "seed": plan.seed, **run} for plan, run in zip(plans, found, strict=True)]


def references(work: Work, pair: Pair, seeds: Sequence[int]) -> dict[int, dict[str, float]]:
    """Seed → accuracy of the student before training and of the teacher."""
    recipes = {f"reference_{seed}": recipe_of(pair, seed, quick=work.quick) for seed in seeds}
    return dict(zip(seeds, _kept(work, reference, {name: (own,) for name, own in recipes.items()}), strict=True))


def _kept(work: Work, function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    files = {work.folder / f"{name}.json": (_with_models(own[0]), *own[1:]) for name, own in arguments.items()}
    with patch.dict(os.environ, QUIET):  # of the processes that this starts
        return kept_side_by_side(work, function, files)


def _with_models(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with local models as `Path`s, whose contents count."""
    return {**recipe, **{key: read_by_name(recipe[key]) for key in ("model", "teacher_model")}}


def recipe_of(pair: Pair, seed: int, *, quick: bool) -> dict[str, Any]:
    """The comparison's recipe without an objective; `quick` for a few steps."""
    comparison = load_comparison(pair.file)[1]
    recipe = {**read_yaml(find_recipe(comparison.recipe)), **comparison.settings, **(QUICK if quick else {})}
    recipe.pop("eval_steps", None)
    return {**recipe, "eval_strategy": "no", "seed": seed}


def arguments_of(plan: Plan, pair: Pair, *, quick: bool) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Arguments of `train`."""
    recipe = recipe_of(pair, plan.seed, quick=quick)
    if plan.name in OURS:
        changes = {
            key: v
            for key, v in (load_comparison(pair.file)[1].objectives[plan.name] or {}).items()
            if key != "learning_rates"
        }
        return {**recipe, **changes, **pair.chosen(plan.name), "learning_rate": plan.rate}, "oprd", {}
    own: dict[str, Any] = {} if plan.rate is None else {"learning_rate": plan.rate}
    if plan.name == "distillation_as_ours":
        own |= SCHEDULE | {
            key: value for key, value in {**recipe, **pair.chosen("full_reverse_kl")}.items() if key in SCHEDULE
        }
    own |= {} if plan.steps is None else {"max_steps": plan.steps}
    return recipe, TRL[plan.name], own


def best_of_trl(runs: Sequence[Record]) -> str:
    """The run of TRL, at a rate that was chosen, that comes nearest to the representation loss: on the measured seeds, in TRL's favour."""
    return min(
        (name for name in RIVALS if of(runs, name)), key=lambda name: difference(runs, "representation", name)[0]
    )


def equal_steps(runs: Sequence[Record], rival: str) -> int:
    """Steps of a trainer of TRL that take as long as all steps of the representation loss."""
    ours, theirs = (_mean(runs, name, "seconds") for name in ("representation", rival))
    return max(2, round(_mean(runs, rival, "steps") * ours / theirs))


def _mean(runs: Sequence[Record], name: str, key: str) -> float:
    return mean_and_interval([r[key] for r in of(runs, name)])[0] or 0.0


def judge(result: Result) -> Finding:
    """Holds if representation is ahead of TRL's best after equal steps and equal CPU seconds, and oprd's reverse KL less TRL's is 0 within at most ± 5 points; in
    part if it is ahead after either.
    """
    runs = result["runs"]
    rival = best_of_trl(runs)
    kl = difference(runs, "full_reverse_kl", "distillation_as_ours")
    leads = [difference(runs, "representation", name) for name in (rival, EQUAL_TIME)]
    ahead = [surely(lead[1]) > 0 for lead in leads]
    verdict = "holds" if all(ahead) and agrees(kl[1]) else "partly" if any(ahead) else "not"
    names = [name for name in NAMES if of(runs, name)]
    rows = [
        [text, f"{of(runs, name)[0]['learning_rate']:g}", len(of(runs, name)), round(_mean(runs, name, "steps")),
         mean_of([r["final"] for r in of(runs, name)]), percent(gap_closed(of(runs, name))[0], 0),
         "" if name == "representation" else points(*difference(runs, "representation", name)[:2]),
         _seconds(runs, name)]
        for name, text in (*((name, NAMES[name]) for name in names), (EQUAL_TIME, f"{NAMES[rival]}, equal seconds"))
    ]  # fmt: skip
    header = ["trainer", "rate", "seeds", "steps", "Avg@2", "gap closed", "representation leads by", "CPU seconds"]
    before, teacher = (_mean(runs, "representation", key) for key in ("before", "teacher"))
    text = (
        f"Student before {percent(before)}, teacher {percent(teacher)}; TRL {result['trl']}.\n\n"
        f"{table(header, rows)}\n\n{_two_libraries(runs, kl)}\n\n{_leads(runs, rival, leads)}\n\n{_grids(result['tuning'])}\n\n{_again(result)}"
    )
    number = (
        f"{points(*leads[0][:2])} against {_trainer(rival)} after equal steps, {points(*leads[1][:2])} after equal seconds; reverse KL, oprd against TRL: "
        f"{points(*kl[:2])}"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _seconds(runs: Sequence[Record], name: str) -> str:
    own = [r["seconds"] for r in of(runs, name)]
    return f"{_mean(runs, name, 'seconds'):.1f} ({min(own):.1f} to {max(own):.1f})"


def agrees(interval: Sequence[float] | None) -> bool:
    """Whether a difference contains 0 in an interval narrow enough to say so."""
    return interval is not None and surely(interval) == 0 and (interval[1] - interval[0]) / 2 <= NEAR


def _two_libraries(runs: Sequence[Record], kl: tuple[float, list[float] | None, int]) -> str:
    wide = "are not significantly different, in an interval too wide to call it agreement"
    word = "agree within noise" if agrees(kl[1]) else "differ" if surely(kl[1]) else wide
    return (
        f"**The same loss in both libraries.** With the same rate, warm-up and decay, oprd's full reverse KL and TRL's (`beta` 1) {word}: "
        f"{points(*kl[:2])}, seed by seed, where only the order of the prompts and the draws of the rollouts differ. Agreement: the interval contains 0 and "
        f"is at most {100 * NEAR:.0f} points wide to each side. CPU seconds: {_mean(runs, 'full_reverse_kl', 'seconds'):.1f} against "
        f"{_mean(runs, 'distillation_as_ours', 'seconds'):.1f}."
    )


def _leads(runs: Sequence[Record], rival: str, leads: Sequence[tuple[float, list[float] | None, int]]) -> str:
    steps, again = (round(_mean(runs, name, "steps")) for name in ("representation", EQUAL_TIME))
    said = [f"{standing(lead[1])} it ({points(*lead[:2])})" for lead in leads]
    return (
        f"**Lead.** TRL's best, by the measured seeds, is {NAMES[rival]}. After {steps} steps of both, the representation loss is {said[0]}. After equal CPU "
        f"seconds it is {said[1]}: TRL's trainer then runs for {again} steps instead of {steps}, with its schedule over these steps and at the same rate, and "
        f"takes {_mean(runs, EQUAL_TIME, 'seconds'):.1f} s where the representation loss takes {_mean(runs, 'representation', 'seconds'):.1f}."
    )


def _grids(tuning: Sequence[Record]) -> str:
    parts = []
    for name in dict.fromkeys(r["objective"] for r in tuning):
        grid = sorted(of(tuning, name), key=lambda r: r["learning_rate"])
        said = ", ".join(f"{r['learning_rate']:g}: {percent(r['final'], 0).removesuffix(' %')}" for r in grid)
        edge = best_rate(tuning, name) in (grid[0]["learning_rate"], grid[-1]["learning_rate"])
        parts.append(f"{_family(name)} {said}{' (best at the edge of the grid)' if edge else ''}")
    return f"**Rates**, Avg@2 in percent on the tuning seed: {'; '.join(parts)}. oprd's rates are those that its comparison chose."


def _trainer(name: str) -> str:
    """The name of TRL's trainer, without its rate."""
    return NAMES[name].split(",")[0]


def _family(name: str) -> str:
    return NAMES[name].removesuffix(", tuned rate")


ROUNDING = 1e-6
"""Records keep six digits."""


def _again(result: Result) -> str:
    """How oprd's runs differ from the committed ones of their comparison."""
    known = {(r["objective"], r["seed"]): r["final"] for r in result["committed"]}
    own = [r for r in result["runs"] if (r["objective"], r["seed"]) in known]
    gaps = [abs(r["final"] - known[r["objective"], r["seed"]]) for r in own]
    return (
        f"**Against the committed runs** of their comparison: {sum(gap < ROUNDING for gap in gaps)} of oprd's {len(own)} runs have exactly the same accuracy; "
        f"the largest difference is {100 * max(gaps, default=0):.1f} points. Where they differ, the teacher, the engine, a version or the "
        "processor does."
    )


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each trainer, and accuracy over rates."""
    figure.set_figheight(4.4)
    runs, rival = result["runs"], best_of_trl(result["runs"])
    final, grid = figure.subplots(1, 2, width_ratios=(1, 1))
    rows = {SHORT[name]: [r["final"] for r in of(runs, name)] for name in NAMES if of(runs, name)}
    rows[f"{_trainer(rival)},\nequal seconds"] = [r["final"] for r in of(runs, EQUAL_TIME)]
    accuracy_rows(final, rows, ours=[SHORT[name] for name in OURS])
    title_above_marks(final, "After training")
    reference_lines(final, of(runs, "representation"), numbers=False)
    ends = []
    for index, name in enumerate(name for name in (*OURS, *TUNED) if of(result["tuning"], name)):
        own = sorted(of(result["tuning"], name), key=lambda r: r["learning_rate"])
        rates, values = ([r[key] for r in own] for key in ("learning_rate", "final"))
        grid.plot(rates, values, **look(index))
        ends.append(End(_family(name).replace(", ", ",\n"), rates[-1], values[-1], colour(index)))
    grid.set(xscale="log", xlabel="learning rate", ylabel="Avg@2, %", ylim=(-0.03, 1.03))
    grid.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-"))
    in_percent(grid.yaxis)
    title_above_marks(grid, "Over rates, tuning seed")
    note(figure, "After training, " + SEEDS)
    name_ends((grid, ends))
