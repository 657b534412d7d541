"""The measured figures and numbers of README.md and of pages below evidence/, written from committed results into marked blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Claim
from evidence.comparisons import difference, gap_closed, of
from evidence.e05_cost.claim import gpu_saving, gpu_time_saving, update_saving
from evidence.e11_real_model.claim import DRAWN, best_output_space, uncertain
from evidence.e11_real_model.claim import NAMES as OBJECTIVES
from evidence.e13_trl.claim import best_of_trl
from evidence.real_model_gpu.picture import best_runs, curves, rows
from evidence.words import VERDICTS, less, mean_of, percent, points, table
from oprd.tools.compare.interval import mean_and_interval

HERE = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- (\w+): written by python -m evidence -->\n).*?(<!-- end -->)", re.DOTALL)

Claims = Sequence[tuple[Path, Claim]]
Results = Mapping[str, Mapping[str, Any]]


def with_blocks(name: str, text: str, claims: Claims, results: Results) -> str:
    """The text of a document with every block brought up to date.

    Args:
        name: one of `BLOCKS`.
        text: the document.
        claims: in their order, with their folders.
        results: claim → its result.

    Raises:
        ValueError: a block is unknown, missing or there twice.
    """
    found, blocks = [match[2] for match in _BLOCK.finditer(text)], BLOCKS[name]
    if sorted(found) != sorted(blocks):
        raise ValueError(f"{name} has the blocks {found}; it must have each of {', '.join(blocks)} once")
    return _BLOCK.sub(lambda match: match[1] + blocks[match[2]](claims, results).strip() + "\n" + match[3], text)


def write_blocks(root: Path, name: str, claims: Claims, results: Results) -> None:
    """Bring the blocks of a document up to date."""
    file = root / name
    file.write_text(with_blocks(name, file.read_text(), claims, results))


def _folder(claims: Claims, name: str) -> str:
    return next(folder.name for folder, claim in claims if name == claim.ID)


def _picture(claims: Claims, results: Results) -> str:
    runs, long = results["E11"]["runs"], curves()
    ours, given, supervised, forward, full, top, sampled = (
        percent(mean_and_interval([r["final"] for r in of(runs, name)])[0]) for name in DRAWN
    )
    own = of(runs, "representation")
    teacher, start = (percent(mean_and_interval([r[key] for r in own])[0]) for key in ("teacher", "before"))
    best = best_runs(long["runs"])["representation"]
    return (
        f"![accuracy of seven objectives on a real model](evidence/{_folder(claims, 'E11')}/figure.png)\n\n"
        f"*SmolLM2-135M learns chain sums from a copy of itself trained on worked solutions ({teacher}): {own[0]['steps']} steps of 32 "
        f"rollouts, tuned rates, means of {len(own)} seeds. Hidden states {ours} (on the teacher's responses {given}), supervised {supervised}, "
        f"forward KL {forward}, full reverse KL {full}, top-16 {top}, sampled-token {sampled}, start {start} ([E11](evidence/{_folder(claims, 'E11')}/README.md)). "
        f"One seed on a GPU, {best['points'][-1][0]} steps of {long['rollouts']}: {percent(best['final'])}, teacher "
        f"{percent(long['teacher'])} ([curves](evidence/real_model_gpu/README.md)).*"
    )


def _curves(claims: Claims, results: Results) -> str:
    found = curves()
    steps = [str(step) for step, _ in found["runs"][0]["points"]]
    header = ["objective", "best rate tried", *(f"step {step}" for step in steps), "interval", "other rates: end"]
    return f"![accuracy of six objectives against steps](figure.png)\n\n{table(header, rows(found))}"


def _claims(claims: Claims, results: Results) -> str:
    verdicts = [claim.judge(results[claim.ID]).verdict for _, claim in claims if claim.ID in results]
    count = {name: sum(verdict == name for verdict in verdicts) for name in VERDICTS}
    lines = [
        _LINES[name](results[name], VERDICTS[_judged(claims, results, name)]) for name in _LINES if name in results
    ]
    return (
        f"Of {len(claims)} claims, {len(verdicts)} are measured: {count['holds']} hold, {count['partly']} hold in part, {count['not']} do not "
        "([rules](docs/evidence.md)).\n\n" + "\n".join(f"- {line}" for line in lines)
    )


def _judged(claims: Claims, results: Results, name: str) -> str:
    return next(claim.judge(results[name]).verdict for _, claim in claims if name == claim.ID)


def _accuracy(result: Mapping[str, Any], verdict: str) -> str:
    lead = difference(result["runs"], "representation", "full_reverse_kl")
    off_policy = difference(result["runs"], "representation", "states_off_policy")
    closed = percent(gap_closed(of(result["runs"], "representation"))[0], 0)
    return (
        f"**Accuracy** ({verdict}): {closed} of the gap closed; {points(*lead[:2])} over the full reverse KL, {points(*off_policy[:2])} over "
        "hidden states on the teacher's responses."
    )


def _cost(result: Mapping[str, Any], verdict: str) -> str:
    saved = less(gpu_saving(result["gpu"], "top16")), less(gpu_time_saving(result["gpu"], "top16"))
    return (
        f"**Cost** ({verdict}): {saved[0]} GPU memory and {saved[1]} time than chunked top-16; {less(gpu_saving(result['gpu'], 'dense_top16'))} memory than "
        f"dense ({less(update_saving(result['gpu'], 'dense_top16'))} without weights; paper: 54)."
    )


def _positions(result: Mapping[str, Any], verdict: str) -> str:
    finals = {
        name: mean_of([r["final"] for r in of(result["runs"], name)])
        for name in ("states_last", "states_last_slowly", "representation")
    }
    return (
        f"**Last k positions** ({verdict}): {finals['states_last']}, at another rate {finals['states_last_slowly']}; all positions "
        f"{finals['representation']}."
    )


def _other_teachers(result: Mapping[str, Any], verdict: str) -> str:
    closed, alone = (
        [percent(gap_closed(of(result[key], name))[0], 0) for key in ("wider", "other_tokenizer")]
        for name in ("rank_16", "output_alone")
    )
    return f"**Bridge** ({verdict}): {closed[0]} of the gap to a wider teacher (full reverse KL alone {alone[0]}), {closed[1]} across tokenizers ({alone[1]})."


def _real_model(result: Mapping[str, Any], verdict: str) -> str:
    rival = best_output_space(result)
    output, supervised = (
        points(*difference(result["runs"], "representation", name)[:2]) for name in (rival, "supervised")
    )
    return (
        f"**A pretrained model** ({verdict}): {output} over the best output-space loss ({OBJECTIVES[rival].removeprefix('full ')}), {supervised} over supervised "
        f"training{uncertain(result)}."
    )


def _beside_trl(result: Mapping[str, Any], verdict: str, pair: str = "") -> str:
    best = best_of_trl(result["runs"])
    tuned, lead = (points(*difference(result["runs"], "representation", name)[:2]) for name in ("distillation", best))
    better = "" if best == "distillation" else f"; with oprd's warm-up {lead}"
    return f"**Beside TRL{pair}** ({verdict}): {tuned} over its tuned `DistillationTrainer`{better}."


_LINES: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "E1": _accuracy,
    "E5": _cost,
    "E3": _positions,
    "E10": _other_teachers,
    "E11": _real_model,
    "E13": _beside_trl,
    "E24": partial(_beside_trl, pair=", pretrained"),
}


def _demo(claims: Claims, results: Results) -> str:
    run = _read("first_light/demo_summary.json")
    before, after, teacher = (run[name] for name in ("student_before", "student_after", "teacher"))
    low, high = after["ci95"]
    return (
        f"![the demo run](docs/demo.png)\n\n*`make demo`: {percent(before['avg_at_k'], 0)} → "
        f"{percent(after['avg_at_k'], 0)} (95 % interval over problems {100 * low:.0f}–{100 * high:.0f} %; teacher "
        f"{percent(teacher['avg_at_k'])}), {run['steps']} steps, {run['seconds']:.0f} s on one CPU core.*"
    )


def _smollm2(claims: Claims, results: Results) -> str:
    lines = [json.loads(line) for line in (HERE / "first_light" / "smollm2_metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    math = _read("first_light/smollm2_math500.json")
    student, teacher = (_read(f"first_light/smollm2_worked_{side}.json") for side in ("student", "teacher"))
    low, high = teacher["ci95"]
    boxed = 1 - student["grading"]["missing"] / sum(student["grading"].values())
    return (
        f"![loss and cosine of the SmolLM2 run](../../docs/smollm2.png)\n\n{len(steps)} steps of {steps[0]['rollouts']:.0f} rollouts of 64 tokens "
        f"on one busy core: loss {steps[0]['loss']:.1f} → {steps[-1]['loss']:.1f}, cosine to the teacher's states {steps[0]['cosine']:.3f} → "
        f"{steps[-1]['cosine']:.3f}. On {math['problems']} problems of MATH-500 its Avg@{math['k']} is {percent(math['avg_at_k'], 0)}: the run "
        f"shows that the loss falls on a real model, not that the student learns competition mathematics. On {teacher['problems']} held-out "
        f"problems of the teacher's own kind the teacher has Avg@{teacher['k']} {percent(teacher['avg_at_k'], 0)} [{100 * low:.0f}, "
        f"{100 * high:.0f}]; the student that it was trained from has {percent(student['avg_at_k'], 0)} (it boxes {percent(boxed, 0)} of its answers)."
    )


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / name).read_text())
    return content


BLOCKS: dict[str, dict[str, Callable[[Claims, Results], str]]] = {
    "README.md": {"picture": _picture, "demo": _demo, "claims": _claims},
    "evidence/first_light/README.md": {"smollm2": _smollm2},
    "evidence/real_model_gpu/README.md": {"curves": _curves},
}
"""Document → the blocks that it must have."""
