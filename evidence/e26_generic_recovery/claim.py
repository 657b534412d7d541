"""E26: a pruned pretrained model, brought back by its original on generic instructions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work, kept_side_by_side, make_once
from evidence.comparisons import (
    TUNING_SEED,
    Record,
    best_rate,
    committed_tuning,
    difference,
    first_seeds,
    of,
)
from evidence.e11_real_model.claim import LADDER, START, STUDENT, get_public
from evidence.e15_recovery.perplexity import write_text
from evidence.e26_generic_recovery.distance import distances
from evidence.e26_generic_recovery.prompts import write as write_prompts
from evidence.pictures import note, seed_rows
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
from evidence.tuning import Rates, tune_inside
from evidence.words import listed, percent, standings, surely, table
from oprd.runs.pictures import INK
from oprd.tools.compare.interval import mean_and_interval

ID = "E26"
TITLE = "On generic instructions, matching hidden states brings a pruned pretrained model nearest to its original"
CLAIM = (
    "A public model that lost a third of its blocks is recovered by its own original on prompts of no one task. Not in the paper; published recoveries "
    "of pruned models train on fixed text."
)
SETTING = (
    "Original: SmolLM2-135M-Instruct (30 blocks), read from a public file that holds its weights in 4 bits. Cut to 20 and to 24 by block influence on 64 of its own completions, then 24 steps of 16 rollouts "
    "of at most 64 tokens, `layer_map: kept`, linear schedule, means over tokens, three seeds. 960 instructions on 48 topics as chat messages (`evidence/e26_generic_recovery/prompts.py`). "
    "Distance: mean KL to the original in nats a token, in both directions: KL(original ‖ model) on the original's completions of 120 instructions on six other "
    "topics, KL(model ‖ original) on the model's own; both at temperature 1, over the whole vocabulary. Rates a factor of three apart are chosen on seed 10 for the cut to 20 by the sum of both, on six "
    "further topics, on grids that are widened, three times at most, until the best is inside, and used for both cuts. Perplexity: of the original's completions, a "
    "token. Chain sums, which no instruction asks for: 100 raw problems a seed. All seeds start from the same cut and are judged on the same instructions: intervals are over "
    "training alone."
)
FILE = Path(__file__).parent / "comparison.yaml"
SMOLLM2 = Setting(
    FILE,
    "models/SmolLM2-135M-Instruct",
    (20, 24),
    "train.jsonl",
    "recovery_generic",
    tokens=64,
    rates=START,
    ladder=LADDER,
    quick={"max_steps": 2, "eval_limit": 8},
)
"""`measure` puts the folder of its work before the name of the prompts."""
DIRECTIONS = ("forward_kl", "reverse_kl")
TUNED_ON, MEASURED_ON = "tune", "test"
HELD_OUT = 120


def measure(work: Work) -> dict[str, Any]:
    """Get the model, cut it, choose each objective's rate by the distance on one seed, and recover it with three others."""
    known = None if work.tune or work.quick else committed_tuning(FILE.parent, NAMES)
    get_public("get_smollm2.py", STUDENT)
    write_prompts(work.folder)
    prompts = str(work.folder / SMOLLM2.prompts)
    setting = dataclasses.replace(SMOLLM2, prompts=prompts, settings={"train_dataset": prompts})
    cuts = {keep: cut_original(work, setting, keep) for keep in setting.keeps}
    for name in (TUNED_ON, MEASURED_ON):
        text, held_out, limit = work.folder / f"text_{name}.json", work.folder / f"{name}.jsonl", _held_out(work)
        write = partial(
            write_text, setting.original, str(held_out), text, limit=limit, tokens=setting.tokens, seed=TUNING_SEED
        )
        make_once(text, (Path(setting.original), held_out, limit, setting.tokens), write)
    run = partial(_recovered, work, setting, setting.keeps[0], [TUNING_SEED])
    start = dict.fromkeys(NAMES, setting.rates)
    tuning = tune_inside(run, start, ladder=setting.ladder, quick=work.quick) if known is None else known
    rates = {name: best_rate(tuning, name) for name in NAMES}
    chosen, seeds = {name: [rate] for name, rate in rates.items()}, first_seeds(work, setting.seeds)
    runs = {str(keep): _recovered(work, setting, keep, seeds, chosen) for keep in setting.keeps}
    untrained = {str(keep): cut["folder"] for keep, cut in cuts.items()} | {"original": Path(setting.original)}
    return {
        "tuning": tuning, "rates": rates, "runs": runs, "distances": _distances(work, MEASURED_ON, untrained),
        "kept": {str(keep): cut["kept"] for keep, cut in cuts.items()},
        "influence": [row["influence"] for row in cuts[setting.keeps[0]]["layers"]],
    }  # fmt: skip


def _held_out(work: Work) -> int:
    return 16 if work.quick else HELD_OUT


def _recovered(work: Work, setting: Setting, keep: int, seeds: Sequence[int], rates: Rates) -> list[Record]:
    """Runs with their distances: `before` and `final` are negative sums of both directions, accuracies are `chain_sums…`."""
    records = recover(work, setting, keep, seeds, rates)
    names = [f"{keep}_{r['objective']}_{r['learning_rate']:g}_{r['seed']}" for r in records]
    models = [recovered_model(work, setting, keep, record) for record in records]
    text = TUNED_ON if [*seeds] == [TUNING_SEED] else MEASURED_ON
    found = _distances(work, text, {str(keep): work.folder / f"cut_{keep}", **dict(zip(names, models, strict=True))})
    start = -_total(found[str(keep)])
    return [
        {
            **record, **found[name], "chain_sums": record["final"], "chain_sums_before": record["before"], "final": -_total(found[name]),
            "before": start,
        }
        for name, record in zip(names, records, strict=True)
    ]  # fmt: skip


def _total(found: Mapping[str, Any]) -> float:
    return sum(float(found[name]) for name in DIRECTIONS)


def _distances(work: Work, text: str, models: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Distance of each model from the original on the held-out prompts of a file."""
    folder, limit = work.folder, _held_out(work)
    arguments = {
        folder / f"distance_{text}_{name}.json": (
            model, Path(SMOLLM2.original), folder / f"{text}.jsonl", folder / f"text_{text}.json",
            str(folder / f"own_{text}_{name}.json"), limit, SMOLLM2.tokens,
        )
        for name, model in models.items()
    }  # fmt: skip
    found = kept_side_by_side(work, distances, arguments)
    rounded = [{key: float(f"{value:.5g}") for key, value in one.items()} for one in found]
    return dict(zip(models, rounded, strict=True))


def judge(result: Result) -> Finding:
    """Holds if with the fewest blocks representation is nearer to the original, by the sum of both distances, than the cut model, the full reverse KL,
    sampled-token and supervised training; in part if nearer than the cut model, sampled-token and supervised training.
    """
    first, *others = result["runs"]
    runs, total = result["runs"][first], len(result["influence"])
    leads = {name: difference(runs, "representation", name) for name in RIVALS}
    ahead = {name for name in RIVALS if surely(leads[name][1]) > 0}
    cut, ours = _total(result["distances"][first]), _mean_total(runs, "representation")
    if ours >= cut or not {"sampled_token", "supervised"} <= ahead:
        verdict = "not"
    else:
        verdict = "holds" if ahead == {*RIVALS} else "partly"
    by_direction = {
        direction: standings({NAMES[name]: _lead(runs, name, direction)[1] for name in RIVALS})
        for direction in DIRECTIONS
    }
    parts = "\n\n".join(_part(result, keep) for keep in (first, *others))
    text = (
        f"{influence_said(result)}\n\n{parts}\n\nLower is nearer. With {first} blocks, in KL(original ‖ model), representation is {by_direction['forward_kl']}. In "
        f"KL(model ‖ original) it is {by_direction['reverse_kl']}.{_farther(result)}\n\n{tried_rates(result['tuning'])}"
    )
    rival = min(RIVALS, key=lambda name: leads[name][0])
    number = (
        f"{first} of {total} blocks: {_nats(ours)} nats a token from the original (after the cut {_nats(cut)}), "
        f"{_nearer(leads[rival])} than the best other ({NAMES[rival]})"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _lead(runs: Sequence[Record], name: str, direction: str) -> tuple[float, list[float] | None, int]:
    """How much nearer representation is in one direction."""
    return difference([{**r, direction: -r[direction]} for r in runs], "representation", name, key=direction)


def _mean_total(runs: Sequence[Record], name: str) -> float:
    return -(mean_and_interval([r["final"] for r in of(runs, name)])[0] or 0.0)


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:#.3g}".rstrip(".")


def _difference(lead: tuple[float, list[float] | None, int]) -> str:
    """Representation's distance less another's: below 0 where representation is nearer."""
    mean, interval = lead[:2]
    half = "" if interval is None else f" ± {(interval[1] - interval[0]) / 2:.2g}"
    return f"{-mean:+.2g}{half} nats".replace("-", "−")


def _nearer(lead: tuple[float, list[float] | None, int]) -> str:
    """A lead in words: "0.1 ± 0.02 nats nearer", or farther."""
    said = _difference(lead)
    return f"{said[1:]} {'nearer' if said[0] == '−' else 'farther'}"


def _farther(result: Result) -> str:
    """The objectives that leave a cut model farther from the original than it was, in a sentence; empty without any."""
    said = []
    for keep, runs in result["runs"].items():
        cut = _total(result["distances"][keep])
        if found := [NAMES[name] for name in NAMES if of(runs, name) and _mean_total(runs, name) > cut]:
            said.append(f" With {keep} blocks, farther from the original than the cut model: {listed(found)}.")
    return "".join(said)


def _part(result: Result, keep: str) -> str:
    """The table of one cut."""
    runs, cut = result["runs"][keep], result["distances"][keep]
    header = [
        "objective", "rate", "KL(original ‖ model)", "KL(model ‖ original)", "sum", "representation's less this", "perplexity", "chain sums",
    ]  # fmt: skip
    rows = []
    for name in NAMES:
        own = of(runs, name)
        means = {key: mean_and_interval([r[key] for r in own])[0] for key in (*DIRECTIONS, "perplexity", "chain_sums")}
        lead = "" if name == "representation" else _difference(difference(runs, "representation", name))
        rows.append([
            NAMES[name], f"{result['rates'][name]:g}", *(_nats(means[key]) for key in DIRECTIONS), _nats(_mean_total(runs, name)), lead,
            _nats(means["perplexity"]), percent(means["chain_sums"]),
        ])  # fmt: skip
    solved = {
        key: mean_and_interval([r[key] for r in of(runs, "representation")])[0]
        for key in ("chain_sums_before", "teacher")
    }
    return (
        f"**{keep} blocks** ({', '.join(map(str, result['kept'][keep]))}), {len(of(runs, 'representation'))} seeds. After the cut {_nats(cut['forward_kl'])} and "
        f"{_nats(cut['reverse_kl'])} nats, perplexity {_nats(cut['perplexity'])} (the original's is {_nats(result['distances']['original']['perplexity'])}), chain sums "
        f"{percent(solved['chain_sums_before'])} (the original {percent(solved['teacher'])}).\n\n{table(header, rows)}"
    )


def draw(result: Result, figure: Any) -> None:
    """Distance of each objective, one panel a cut."""
    figure.set_figheight(2.1 + 1.9 * len(result["runs"]))
    panels = figure.subplots(len(result["runs"]), 1, squeeze=False)[:, 0]
    for axis, (keep, runs) in zip(panels, result["runs"].items(), strict=True):
        found = {SHORT[name]: [-r["final"] for r in of(runs, name)] for name in NAMES}
        seed_rows(axis, found, ours=[SHORT["representation"]], number=_nats)
        cut = _total(result["distances"][keep])
        after_cut = f"after the cut {_nats(cut)}"
        if shown := cut <= 1.5 * max(value for values in found.values() for value in values):
            axis.axvline(cut, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        axis.set_title(f"{keep} of {len(result['influence'])} blocks ({after_cut}{', dotted' if shown else ''})")
        axis.set(xlim=(0, None), xlabel="KL to the original, both directions summed, nats a token")
    note(figure, "dots: seeds; band: 95 % interval of the mean over seeds")
