"""The report of `oprd diagnose`: every figure about a pair of models, as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oprd.alignment.aligner import AlignmentStats
from oprd.alignment.model_pair import ModelPair
from oprd.alignment.position_pairs import PositionPairs
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.models.pruning import KeptBlocks
from oprd.models.tokens import different_tokens, vocabulary_size
from oprd.objectives.diagnostics import OVERLAP_K
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.sanitize import redacted
from oprd.states.layer_maps import layer_map
from oprd.states.similarity import position_curve
from oprd.tasks.evaluation import evaluate, grade_rollouts, summarize_rollouts
from oprd.tasks.task import get_task
from oprd.tools.diagnose.advice import advise, advised_settings
from oprd.tools.diagnose.rate import find_rate
from oprd.tools.diagnose.read import MEASURES, EndReading, Readings, read_pair
from oprd.tools.diagnose.theory import theory_figures
from oprd.tools.diagnose.verdict import judge
from oprd.types import Rollouts

SIDES = ("student", "teacher")
_DIGITS = 6  # significant digits of every number in the report
_CONTEXT = 12  # tokens shown before a position where the two models differ most


def diagnose_pair(
    pair: ModelPair,
    rows: Sequence[PromptRow],
    *,
    max_completion_length: int = 512,
    seed: int = 0,
    task: str | None = None,
    max_prompt_length: int | None = None,
    micro_batch_tokens: int = 16384,
    batch_size: int = 64,
    sample: int = 1024,
    teacher_dtype: str = "auto",
    prompts_name: str = "PROMPTS",
    options: Mapping[str, Any] | None = None,
    on_rollouts: Callable[[int, int], None] | None = None,
    probe_rate: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Let the student answer the prompts and both models read the answers; report how alike they are and what to set.

    Args:
        pair: student and teacher, of any shapes and tokenizers (`oprd.resolve.load_pair`).
        rows: prompts, one rollout each.
        max_completion_length: maximum tokens per rollout.
        seed: seed of the sampling.
        task: grade the student's rollouts and as many of the teacher's, if rows have answers.
        max_prompt_length: leave out (and count) longer prompts.
        micro_batch_tokens: maximum padded tokens per forward pass.
        batch_size: completions generated together.
        sample: number of positions used for the CKA of all pairs of layers.
        teacher_dtype: as given to `load_pair`; only written into the report.
        prompts_name: source of the rows, for the commands in the report.
        options: how the rows were read and the models loaded, likewise (`split`, `prompt_column`, `trust_remote_code`, …).
        on_rollouts: called with (rollouts read, of all).
        probe_rate: find a learning rate by a few steps, after which the weights are as before.
        say: called with what that will cost.

    Returns:
        The report. docs/diagnose.md describes its keys.

    Raises:
        ValueError: models, tokenizers or prompts that do not fit, or too few positions.
    """
    if task is not None:
        get_task(task)
    prompts = pair.prompts(
        rows, name="prompts", max_completion_length=max_completion_length, max_prompt_length=max_prompt_length
    )
    rollouts = sample_rollouts(pair, prompts, max_completion_length, seed=seed, batch_size=batch_size)
    pairing, stats = pair.align(rollouts, {p.index: p.row for p in prompts})
    readings = read_pair(
        pair, rollouts, pairing, micro_batch_tokens=micro_batch_tokens, sample=sample, seed=seed,
        on_rollouts=on_rollouts,
    )  # fmt: skip
    report = {
        "student": pair.student.info.name,
        "teacher": pair.teacher.info.name,
        "prompts": prompts_name,
        "settings": redacted({
            "max_completion_length": max_completion_length, "seed": seed, "task": task, "sample": sample,
            "teacher_dtype": teacher_dtype, "max_prompt_length": max_prompt_length, **asdict(pair.rendering), **(options or {}),
        }),
        "models": dict(zip(SIDES, (_shape(pair, side) for side in (0, 1)), strict=True)),
        "kept_layers": _kept_layers(pair),
        "tokens": _tokens(pair, stats),
        "rollouts": _rollouts(rollouts, max_completion_length),
        "layers": _layers(readings),
        "cka": _cka(readings, sample),
        "positions": _positions(rollouts, pairing, readings),
        "output": _output(pair, rollouts, readings),
        "ends": _ends(pair, readings.ends),
        "accuracy": None if task is None else _accuracy(pair, prompts, rollouts, task, max_completion_length, seed),
        "theory": theory_figures(pair, readings),
    }  # fmt: skip
    report = rounded(report)
    report["verdict"] = judge(report)
    report["learning_rate_probe"] = None
    if probe_rate:
        sizes: dict[str, Any] = {"max_completion_length": max_completion_length, "max_prompt_length": max_prompt_length}
        sizes |= {"micro_batch_tokens": micro_batch_tokens, "generation_batch_size": batch_size, "seed": seed}
        report["learning_rate_probe"] = rounded(find_rate(pair, rows, {**advised_settings(report), **sizes}, say))
    return {**report, **advise(report)}


def sample_rollouts(
    pair: ModelPair, prompts: Sequence[Prompt], longest: int, *, seed: int, batch_size: int = 64
) -> Rollouts:
    """One completion per prompt, sampled from the student at temperature 1."""
    engine = TransformersEngine(pair.tokenizer, pair.stop_token_ids, batch_size)
    return engine.generate(
        pair.student.model, [p.ids for p in prompts], num_generations=1, sampling=Sampling(longest), seed=seed,
        rows=[p.index for p in prompts],
    ).rollouts  # fmt: skip


def rounded(value: Any) -> Any:
    """Round all floats in nested lists and dictionaries to `_DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def _shape(pair: ModelPair, side: int) -> dict[str, Any]:
    model, tokenizer, info = pair.models[side], pair.tokenizers[side], pair.infos[side]
    return {
        "layers": info.layers, "width": info.width, "vocabulary": vocabulary_size(tokenizer),
        "parameters": sum(p.numel() for p in model.parameters()), "class": type(model).__name__,
    }  # fmt: skip


def _kept_layers(pair: ModelPair) -> list[int] | None:
    """Of a student that was cut from the teacher, the teacher's layers that it kept: by its config, or by equal weights.

    Raises:
        ValueError: the student's config has a record that no pruning writes.
    """
    own, theirs = pair.infos
    shorter = own.width == theirs.width and own.layers < theirs.layers
    if not shorter or pair.aligner is not None:
        return None
    kept = KeptBlocks.of(pair.models[0])
    try:
        return list(kept.in_teacher(theirs.layers, pair.models[1]))
    except ValueError:  # of another original, which is an answer too
        return None


def _tokens(pair: ModelPair, stats: AlignmentStats | None) -> dict[str, Any]:
    """Whether both models have the same ids, and the share of the student's positions with a partner."""
    alone = {"same_ids": not different_tokens(*pair.tokenizers), "own_text": pair.aligner is not None}
    if stats is None:
        return {**alone, "aligned": 1.0, "one_to_one": 1.0, "shared_vocabulary": None, "dropped": {}}
    return {
        **alone, "aligned": stats.share, "one_to_one": stats.one_to_one / max(stats.positions, 1),
        "shared_vocabulary": len(pair.shared_vocabulary().ids[0]), "dropped": dict(stats.dropped),
    }  # fmt: skip


def _rollouts(rollouts: Rollouts, longest: int) -> dict[str, Any]:
    lengths = rollouts.completion_lengths
    finished = sum(reason == "stop" for reason in rollouts.finish_reasons)
    return {
        "count": len(rollouts), "positions": sum(lengths), "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths), "limit": longest, "finished": finished / len(lengths),
    }  # fmt: skip


def _layers(readings: Readings) -> dict[str, Any] | None:
    """Columns by layer for models of equal depth. Figures that need equal widths are None otherwise."""
    if not readings.sums:
        return None
    names = ("cosine", "relative_difference", "squared_difference", "direct_r2")
    raw, directions = ([sums[layer] for layer in sorted(sums)] for sums in (readings.sums, readings.directions))
    columns: dict[str, Any] = {"layer": sorted(readings.sums), "cka": [own.cka() for own in raw]}
    columns |= {name: [getattr(own, name) for own in raw] for name in names}
    return columns | {
        "cka_directions": [own.cka() for own in directions], "direct_r2_directions": [own.direct_r2 for own in directions]
    }  # fmt: skip


def _cka(readings: Readings, sample: int) -> dict[str, Any]:
    """CKA of all pairs of layers; the monotone layer map with the highest CKA, and the paper's map."""
    depths = readings.cka_ST.shape
    maps = {name: list(layer_map(name, *depths, cka_ST=readings.cka_ST)) for name in ("cka", "proportional")}
    along = {name: [float(readings.cka_ST[s, t - 1]) for s, t in enumerate(chosen)] for name, chosen in maps.items()}
    return {
        "sample": sample, "matrix": readings.cka_ST.tolist(), "best_map": maps["cka"], "best": along["cka"],
        "proportional_map": maps["proportional"], "proportional": along["proportional"],
    }  # fmt: skip


def _positions(rollouts: Rollouts, pairing: PositionPairs | None, readings: Readings) -> dict[str, Any]:
    """Means over the first and last k positions, and at the positions that predict the end."""
    matched = [range(n) for n in rollouts.completion_lengths] if pairing is None else pairing.student
    ended = [index for index, reason in enumerate(rollouts.finish_reasons) if reason == "stop"]
    columns = {"cosine": (readings.cosine, matched), "reverse_kl": (readings.output["reverse_kl"], readings.compared)}
    return {name: _curve(values, at, rollouts, ended) for name, (values, at) in columns.items()}


def _curve(
    values: Sequence[Sequence[float]], at: Sequence[Sequence[int]], rollouts: Rollouts, ended: Sequence[int]
) -> dict[str, Any] | None:
    if not any(values):
        return None
    rows = position_curve(values)
    last = [values[i][-1] for i in ended if values[i] and at[i][-1] == rollouts.completion_lengths[i] - 1]
    return {
        "k": [row["k"] for row in rows], "first_k": [row["first"] for row in rows],
        "last_k": [row["last"] for row in rows], "longer": [row["longer"] for row in rows],
        "mean": rows[-1]["first"], "at_end": sum(last) / len(last) if last else None, "ends": len(last),
    }  # fmt: skip


def _output(pair: ModelPair, rollouts: Rollouts, readings: Readings) -> dict[str, Any]:
    """Means over all compared positions, and the positions with the largest reverse KL."""
    count = sum(map(len, readings.compared))
    means = {name: sum(map(sum, readings.output[name])) / count if count else None for name in MEASURES}
    worst = sorted(
        (
            (value, index, place)
            for index, own in enumerate(readings.output["reverse_kl"])
            for place, value in enumerate(own)
        ),
        reverse=True,
    )[:8]
    tokenizer = pair.tokenizer
    most = []
    for value, index, place in worst:
        ids, at = rollouts.completion_ids[index], readings.compared[index][place]
        before = list(ids[max(0, at - _CONTEXT) : at])
        most.append({
            "reverse_kl": value, "row": rollouts.rows[index], "position": at, "of": len(ids),
            "before": tokenizer.decode(before), "token": tokenizer.decode([ids[at]]),
        })  # fmt: skip
    return {"positions": count, **means, "overlap_k": OVERLAP_K, "most_different": most}


def _ends(pair: ModelPair, ends: EndReading) -> dict[str, Any]:
    """End ids in the models' settings, and the predictions of both models where the student ended a text."""
    count = len(ends.likeliest[0])

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    report: dict[str, Any] = {"positions": count}
    for side, name in enumerate(SIDES):
        common = Counter(ends.likeliest[side]).most_common(1)
        tokenizer, stop_ids = pair.tokenizers[side], list(pair.infos[side].stop_token_ids)
        report[name] = {
            "stop_ids": stop_ids,
            "stop_tokens": tokenizer.convert_ids_to_tokens(stop_ids),
            "mass": mean(ends.stop_mass[side]),
            "likeliest": common[0][0] if common else None,
            "likeliest_token": tokenizer.convert_ids_to_tokens([common[0][0]])[0] if common else None,
            "likeliest_share": common[0][1] / count if common else None,
        }
    report["teacher"]["mass_on_students_ids"] = mean(ends.student_ids_mass)
    return report


def _accuracy(
    pair: ModelPair, prompts: Sequence[Prompt], rollouts: Rollouts, task: str, longest: int, seed: int
) -> dict[str, Any] | None:
    """Accuracy of the student's rollouts and of as many teacher rollouts; None without answers."""
    answers = {p.index: p.row.answer for p in prompts}
    if not any(answer is not None for answer in answers.values()):
        return None
    with get_task(task).grader() as grader:
        own = summarize_rollouts(rollouts, grade_rollouts(rollouts, lambda row: answers[row], grader), 1)
        theirs = evaluate(
            pair.models[1],
            TransformersEngine(pair.tokenizers[1], pair.teacher.info.stop_token_ids),
            pair.teacher_prompts(prompts, name="prompts", max_completion_length=longest),
            grader,
            k=1,
            sampling=Sampling(longest),
            seed=seed,
        ).summary
    return {
        name: {
            key: side[of]
            for key, of in (
                ("accuracy", "avg_at_k"),
                ("ci95", "ci95"),
                ("finished", "finished"),
                ("mean_length", "mean_length"),
                ("measure", "measure"),
            )
        }
        for name, side in zip(SIDES, (own, theirs), strict=True)
    }
