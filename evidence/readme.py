"""The README's figures and numbers, each block out of committed results: what stands between its two marks is written here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Claim
from evidence.comparisons import gap_closed, of
from evidence.words import VERDICTS, percent, table
from oprd.tools.compare.interval import mean_and_interval

HERE = Path(__file__).parent
_BLOCK = re.compile(r"(<!-- (\w+): written by python -m evidence -->\n).*?(<!-- end -->)", re.DOTALL)

Claims = Sequence[tuple[Path, Claim]]
Results = Mapping[str, Mapping[str, Any]]


def readme(text: str, claims: Claims, results: Results) -> str:
    """The README with every block brought up to date; a block whose claim has no result is left as it is.

    Raises:
        ValueError: a block that is not known, or one that is missing.
    """
    found = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"README.md has the blocks {found}; it must have each of {', '.join(BLOCKS)} once")
    return _BLOCK.sub(lambda match: match[1] + BLOCKS[match[2]](claims, results).strip() + "\n" + match[3], text)


def write_readme(file: Path, claims: Claims, results: Results) -> None:
    """Bring the README up to date."""
    file.write_text(readme(file.read_text(), claims, results))


def _picture(claims: Claims, results: Results) -> str:
    folder = next(folder for folder, claim in claims if claim.ID == "E1")
    runs = results["E1"]["runs"]
    ours = of(runs, "representation")
    before, teacher, after = (mean_and_interval([r[key] for r in ours])[0] for key in ("before", "teacher", "final"))
    rivals = {
        name: mean_and_interval([r["final"] for r in of(runs, name)])[0]
        for name in ("full_reverse_kl", "sampled_token", "supervised")
    }
    return (
        f"![final accuracy of each objective over five seeds, and over learning rates](evidence/{folder.name}/figure.png)\n\n"
        f"*A student that adds 5-digit numbers right {percent(before, 0)} of the time, {ours[0]['steps']} steps of {results['E1']['rollouts']} rollouts, "
        f"{len(ours)} seeds, each objective at the learning rate that was best on another seed: matching hidden states takes it to "
        f"{percent(after)} ({percent(gap_closed(ours)[0], 0)} of the gap to the teacher's {percent(teacher)}), the full reverse KL to "
        f"{percent(rivals['full_reverse_kl'])}, sampled-token distillation to {percent(rivals['sampled_token'])}, supervised training on "
        f"the teacher's responses to {percent(rivals['supervised'])}. [Evidence](docs/evidence.md#e1).*"
    )


def _claims(claims: Claims, results: Results) -> str:
    rows = []
    for _, claim in claims:
        if claim.ID in results:
            finding = claim.judge(results[claim.ID])
            link = f"[{claim.ID}](docs/evidence.md#{claim.ID.lower()})"
            rows.append([link, claim.TITLE, VERDICTS[finding.verdict], finding.measured])
    return table(["", "claim", "verdict", "measured"], rows)


def _demo(claims: Claims, results: Results) -> str:
    run = _read("first_light/demo_summary.json")
    before, after, teacher = (run[name] for name in ("student_before", "student_after", "teacher"))
    low, high = after["ci95"]
    return (
        f"![accuracy, loss, cosine and length of the demo run](docs/demo.png)\n\n*`make demo`: {percent(before['avg_at_k'], 0)} → "
        f"{percent(after['avg_at_k'], 0)} (95 % interval over problems {100 * low:.0f}–{100 * high:.0f} %; teacher "
        f"{percent(teacher['avg_at_k'])}) in {run['steps']} steps and {run['seconds']:.0f} s on one CPU core. Student and teacher are two "
        "snapshots of one training run and come with the package.*"
    )


def _pairs(claims: Claims, results: Results) -> str:
    rows, seeds = [], []
    for pair, what in (
        ("wider", "6 layers of width 160, trained apart (student: 4 of 128)"),
        ("other-tokenizer", "6 layers of width 128, pieces of several characters, other special tokens"),
    ):
        name = pair.replace("-", "_")
        run = _read(f"bridge/demo_{name}_summary.json")
        before, after, teacher = (run[key] for key in ("student_before", "student_after", "teacher"))
        low, high = after["ci95"]
        rows.append([
            f"`{pair}`", what, f"{100 * before['avg_at_k']:.1f} → {percent(teacher['avg_at_k'])}",
            f"{percent(after['avg_at_k'])} [{100 * low:.0f}, {100 * high:.0f}]", percent(run["gap_closed"], 0),
        ])  # fmt: skip
        compared = _read(f"bridge/compare_{name}.json")["rows"]
        seeds.append({row["objective"]: row for row in compared})
    bridges = " and ".join(percent(of_pair["bridge"]["final_avg"]) for of_pair in seeds)
    gaps = " and ".join(percent(of_pair["bridge"]["gap_closed"], 0) for of_pair in seeds)
    header = ["`oprd demo --pair`", "the teacher", "student → teacher, Avg@4", "after 100 steps", "of the gap"]
    return (
        f"{table(header, rows)}\n\nOne seed each ([summaries](evidence/bridge/)); over five seeds {bridges} ({gaps} of the gap). "
        f"Output-space losses on top help the first (composite: {percent(seeds[0]['composite']['final_avg'])}) and wreck the second "
        f"({percent(seeds[1]['composite']['final_avg'], 0)}): [docs/bridge.md](docs/bridge.md) says why, and what else matters."
    )


def _smollm2(claims: Claims, results: Results) -> str:
    lines = [json.loads(line) for line in (HERE / "first_light" / "smollm2_metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    math = _read("first_light/smollm2_math500.json")
    student, teacher = (_read(f"first_light/smollm2_worked_{side}.json") for side in ("student", "teacher"))
    low, high = teacher["ci95"]
    return (
        f"Measured ({len(steps)} steps of {steps[0]['rollouts']:.0f} rollouts of 64 tokens, one busy core): loss {steps[0]['loss']:.1f} → "
        f"{steps[-1]['loss']:.1f}, cosine to the teacher's states {steps[0]['cosine']:.3f} → {steps[-1]['cosine']:.3f} "
        f"([curves](docs/smollm2.png), [numbers](evidence/first_light/)). On {math['problems']} problems of MATH-500 its Avg@{math['k']} is "
        f'{percent(math["avg_at_k"], 0)}, in form already like its teacher ("Step 1: …"): a model of 135 M parameters and sixteen steps '
        f"show that the method runs and converges on a real model, not that it teaches competition mathematics. On {teacher['problems']} "
        f"held-out problems of its own kind the teacher has Avg@{teacher['k']} {percent(teacher['avg_at_k'], 0)} [{100 * low:.0f}, "
        f"{100 * high:.0f}], the student it came from {percent(student['avg_at_k'], 0)} (it writes no box)."
        + (
            " Accuracy on a real model over three seeds: [evidence, E11](docs/evidence.md#e11)."
            if "E11" in results
            else ""
        )
    )


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((HERE / name).read_text())
    return content


BLOCKS: dict[str, Callable[[Claims, Results], str]] = {
    "picture": _picture,
    "claims": _claims,
    "demo": _demo,
    "pairs": _pairs,
    "smollm2": _smollm2,
}
