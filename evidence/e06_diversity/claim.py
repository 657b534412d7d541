"""E6: length and diversity of the trained students' responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator

from evidence.claim import Finding, Result, Work, kept_side_by_side
from evidence.comparisons import first_seeds
from evidence.e01_accuracy.claim import NAMES, SHARED, SHORT, baseline
from evidence.pictures import OTHER, OURS, name_rows, note, title_above_marks
from evidence.words import listed, percent, table
from oprd import Sampling, TransformersEngine
from oprd.data.prompts import prepare_prompts
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.runs.pictures import TEACHER, in_percent, mark
from oprd.tasks.evaluation import evaluate
from oprd.tasks.measures import distinct_n
from oprd.tasks.task import get_task
from oprd.tools.compare.interval import mean_and_interval
from oprd.types import Rollouts

ID = "E6"
TITLE = "OPRD ends nearest to the teacher's response length and diversity"
CLAIM = (
    "OPRD's responses stay near the teacher's in length (5.7k tokens; output-space OPD about 7k), and the bridge's in Dist-4 (20.4; sampled-token "
    "OPD 9.4, teacher 30.3; paper, Tables 1 and 3)."
)
SETTING = (
    "E1's final models of seeds 0 and 1, 16 samples for each of 48 held-out problems, temperature 1. Dist-4: unique 4-grams over all 4-grams of a problem's "
    "16 responses. Matched: all models' responses to a problem are cut to the shortest of them, which removes the effect of length."
)
OBJECTIVES = (
    "representation",
    "full_reverse_kl",
    "sampled_token",
    "top_4",
    "composite_mu_10",
    "grpo",
    "supervised",
    "states_off_policy",
)


def measure(work: Work) -> dict[str, Any]:
    """Sample from E1's models, the student before training and the teacher."""
    seeds = first_seeds(work, 2)
    _, records = baseline(work, OBJECTIVES, seeds)
    wanted = {}
    for seed in seeds:
        models = {
            "teacher": "embedded:tiny/teacher",
            "before": "embedded:tiny/student",
            **{
                r["objective"]: work.folder.parent
                / SHARED
                / "runs"
                / r["objective"]
                / f"lr_{r['learning_rate']!r}"
                / f"seed_{seed}"
                / "model"
                for r in records
                if r["seed"] == seed
            },
        }
        wanted[work.folder / f"seed_{seed}.json"] = (models, seed, *((8, 4) if work.quick else (48, 16)))
    return {"rows": [row for rows in kept_side_by_side(work, _of_seed, wanted) for row in rows]}


def _of_seed(models: dict[str, Path | str], seed: int, problems: int, k: int) -> list[dict[str, Any]]:
    responses: dict[str, list[list[Sequence[int]]]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, path in models.items():
        summary, rollouts = sample(str(path), seed, problems, k)
        own = [list(rollouts.completion_ids[i * k : (i + 1) * k]) for i in range(problems)]
        responses[name] = own
        found[name] = {
            "model": name, "seed": seed, "avg": summary["avg_at_k"], "best": summary["best_at_k"], "length": summary["mean_length"],
            "finished": summary["finished"], "dist_4": distinct_n(own).value,
            "answers": sum(len({_answer(rollouts.texts[i * k + j]) for j in range(k)}) for i in range(problems)) / problems,
        }  # fmt: skip
        print(f"  seed {seed}: {name}", flush=True)
    shortest = [min(len(r) for own in responses.values() for r in own[i]) for i in range(problems)]
    for name, own in responses.items():
        cut = [[response[:n] for response in of_problem] for of_problem, n in zip(own, shortest, strict=True)]
        found[name]["matched_dist_4"] = distinct_n(cut).value
        found[name]["matched_length"] = sum(shortest) / problems
    return [
        {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in found.values()
    ]


def sample(path: str, seed: int, problems: int, k: int) -> tuple[dict[str, Any], Rollouts]:
    """Measures of `k` samples a problem, and the samples."""
    model = load_model(path, dtype=torch.float32).eval()
    tokenizer = load_tokenizer("embedded:tiny/student")
    task = get_task("addition")
    assert task.problems is not None
    prompts = prepare_prompts(
        task.problems(problems, seed, "test"), tokenizer, name="problems", max_completion_length=64, context_length=None
    )
    engine = TransformersEngine(tokenizer, stop_token_ids(model, tokenizer), 128)
    with task.grader() as grader:
        result = evaluate(model, engine, prompts, grader, k=k, sampling=Sampling(64), seed=seed)
    return result.summary, result.rollouts


def _answer(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def judge(result: Result) -> Finding:
    """Holds if no output-space loss is nearer to the teacher in mean length or in matched Dist-4 (means, no intervals); in part if so in one."""
    rows = result["rows"]
    names = ["teacher", "before", *OBJECTIVES]
    means = {name: _means(rows, name) for name in names}
    rivals = ("full_reverse_kl", "sampled_token", "top_4")

    def off(name: str, key: str) -> float:
        return abs(means[name][key] - means["teacher"][key])

    nearest = [
        key
        for key in ("length", "matched_dist_4")
        if off("representation", key) <= min(off(name, key) for name in rivals)
    ]
    verdict = "holds" if len(nearest) == 2 else "partly" if nearest else "not"
    labels = {"teacher": "teacher", "before": "student before", **NAMES}
    lines = [
        [labels[name], percent(m["avg"]), percent(m["best"]), f"{m['length']:.1f}", percent(m["finished"], 0), f"{m['dist_4']:.3f}",
         f"{m['matched_dist_4']:.3f}", f"{m['answers']:.1f}"]
        for name, m in means.items()
    ]  # fmt: skip
    header = ["model", "Avg@16", "Best@16", "length", "finished", "Dist-4", "Dist-4, matched", "distinct answers of 16"]
    spread = max(abs(m["length"] - means["teacher"]["length"]) for m in means.values())
    text = (
        f"{table(header, lines)}\n\nA problem here has one right answer and nearly one right way to write it, so diversity is error: Dist-4 is lowest for "
        f"the {labels[min(means, key=lambda name: means[name]['dist_4'])]} and highest for the {labels[max(means, key=lambda name: means[name]['dist_4'])]}. "
        f"The largest distance of a mean length to the teacher's is {spread:.1f} tokens. Distance of the matched Dist-4 to the teacher's: "
        + ", ".join(f"{labels[name]} {off(name, 'matched_dist_4'):.3f}" for name in ("representation", *rivals))
        + ". The paper reports on long reasoning, whose length grows or collapses. That needs responses of thousands of tokens and is not measured here."
    )
    near = {key: min(rivals, key=lambda name, key=key: off(name, key)) for key in ("matched_dist_4", "length")}
    said = [text for key, text in (("matched_dist_4", "matched Dist-4"), ("length", "length")) if key in nearest]
    number = (
        f"nearest in {listed(said)}; distances to the teacher: matched Dist-4 {off('representation', 'matched_dist_4'):.3f} ({labels[near['matched_dist_4']]} "
        f"{off(near['matched_dist_4'], 'matched_dist_4'):.3f}), length {off('representation', 'length'):.2f} tokens ({labels[near['length']]} "
        f"{off(near['length'], 'length'):.2f}); {len({r['seed'] for r in rows})} seeds"
    )
    return Finding(verdict, number, text)  # type: ignore[arg-type]


def _means(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    own = [r for r in rows if r["model"] == name]
    return {key: mean_and_interval([r[key] for r in own])[0] or 0.0 for key in own[0] if key not in ("model", "seed")}


def draw(result: Result, figure: Any) -> None:
    """Matched Dist-4 and length of every model; a line marks the teacher's."""
    figure.set_figheight(4.3)
    left, right = figure.subplots(1, 2, sharey=True)
    names = ["before", *OBJECTIVES]
    for axis, key, title, unit in (
        (left, "matched_dist_4", "Dist-4 of length-matched text", "unique / all 4-grams, %"),
        (right, "length", "Mean length", "tokens"),
    ):
        for row, name in enumerate(names):
            own = [r[key] for r in result["rows"] if r["model"] == name]
            colour, marker = (OURS, "o") if name in ("representation", "states_off_policy") else (OTHER, "s")
            axis.plot(own, [row] * len(own), marker, color=colour)
        value = _means(result["rows"], "teacher")[key]
        mark(axis, value, f"teacher {percent(value) if axis is left else f'{value:.2f}'}", TEACHER)
        title_above_marks(axis, title)
        axis.set_xlabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(4))
    in_percent(left.xaxis)
    name_rows(left, ["student before", *(SHORT.get(name, NAMES[name]) for name in OBJECTIVES)])
    right.grid(visible=False, axis="y")
    note(figure, "each mark is a seed")
