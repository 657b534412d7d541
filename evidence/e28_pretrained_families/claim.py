"""E28: E22 on pretrained models of two families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import at_its_rate, difference, gap_closed, of
from evidence.e11_real_model.claim import QUICK, ROOT, STUDENT, build_teacher, get_public
from evidence.e23_far_pair.claim import gains_said, measure_pair
from evidence.pictures import draw_objectives
from evidence.tuning import edges_said, never_better_said
from evidence.words import mean_of, percent, points, standing, surely, table
from oprd.bridge import Bridge
from oprd.bridge.curve import USABLE_PREDICTABLE
from oprd.tools.compare.bridges import bridge_folder
from oprd.tools.compare.interval import mean_and_interval

ID = "E28"
TITLE = "Between pretrained models of two families, a Procrustes projector makes a better bridge than least squares"
CLAIM = "As E22, with pretrained models of two families, two tokenizers and two widths (this project's own claim)."
SETTING = (
    "Student SmolLM2-135M-Instruct (30 layers, width 576). Teacher Gemma 3 270M (18 layers, width 640) after 140 supervised steps on 64 worked chain sums, as E11's teacher. Public files hold "
    "both models' weights in 4 bits. Bridges of rank 64 from 400 rollouts. 40 steps of 32 rollouts of at most 24 tokens, linear schedule, Avg@2 on 150 held-out problems a seed, three seeds. "
    "Rates from 1e-5 to 1e-3 are tuned on seed 10, on a grid that is widened, three times at most, until the best is inside. "
    "Supervised training is on the teacher's responses, decoded and tokenised again for the student."
)
HERE = Path(__file__).parent
FILE = HERE / "comparison.yaml"
BASE, TEACHER = ROOT / "models" / "gemma-3-270m", ROOT / "models" / "gemma-3-270m-chain-sum"
TEACHER_BUILD = ("--steps", "140", "--batch", "64", "--learning-rate", "3e-4", "--bf16")
NAMES = {
    "least_squares": "states by least squares",
    "procrustes": "states by Procrustes",
    "supervised": "supervised on the teacher's responses",
    "output_space": "full reverse KL on shared tokens",
}
GRIDS = {
    "least_squares": (1.0e-4, 3.0e-4, 1.0e-3),
    "procrustes": (1.0e-4, 3.0e-4, 1.0e-3),
    "supervised": (3.0e-5, 1.0e-4, 3.0e-4),
    "output_space": (1.0e-5, 3.0e-5, 1.0e-4),
}
"""Rates to begin with."""
LADDER = (1.0e-5, 3.0e-5, 1.0e-4, 3.0e-4, 1.0e-3)
"""Rates that may be tried. A run takes four to six minutes of a core."""


def measure(work: Work) -> dict[str, Any]:
    """Get both models, train the teacher, tune the losses on one seed, measure all on three others."""
    get_public("get_smollm2.py", STUDENT)
    get_public("get_gemma.py", BASE)
    build_teacher(BASE, TEACHER, *TEACHER_BUILD)
    settings, folder = QUICK if work.quick else {}, "pretrained_families"
    found = measure_pair(FILE, work, folder=folder, grids=GRIDS, settings=lambda seed: settings, ladder=LADDER)
    bridge = Bridge.load(bridge_folder(str(work.folder.parent / folder), "least_squares"))
    predictable = {str(layer): round(pair.report.predictable, 4) for layer, pair in bridge.pairs.items()}
    return {**found, "bridge": {"verdict": bridge.verdict[0], "predictable": predictable}}


def _fit_said(bridge: Mapping[str, Any]) -> str:
    """What the fit found on held-out rollouts: its verdict, and how much of the teacher's variance the student predicts."""
    shares = {int(layer): share for layer, share in bridge["predictable"].items()}
    lower = next((layer for layer in sorted(shares) if shares[layer] < USABLE_PREDICTABLE), max(shares) + 1)
    below, above = ([share for layer, share in shares.items() if (layer < lower) is early] for early in (True, False))
    said = [f"at least {percent(min(below), 0)} on layers 1 to {lower - 1}"] if below else []
    said += [f"at most {percent(max(above), 0)} on layers {lower} to {max(shares)}"] if above else []
    return f"`oprd bridge fit` says *{bridge['verdict']}*: of the variance of the teacher's states the student predicts {' and '.join(said)}."


def judge(result: Result) -> Finding:
    """Holds if Procrustes is ahead of least squares and of the student before training; in part if ahead of least squares alone."""
    runs = result["runs"]
    leads = {name: difference(runs, name, "least_squares") for name in NAMES if name != "least_squares"}
    lead = leads["procrustes"]
    gain = mean_and_interval([r["final"] - r["before"] for r in of(runs, "procrustes")])
    learns = surely(gain[1]) > 0
    verdict = "not" if surely(lead[1]) <= 0 else "holds" if learns else "partly"
    rows = [
        [NAMES[name], *at_its_rate(result, name, leads.get(name)), percent(gap_closed(of(runs, name))[0], 0)]
        for name in NAMES
    ]
    first = of(runs, "least_squares")
    header = ["loss", "rate", f"Avg@2 after {first[0]['steps']} steps", "against least squares", "gap closed"]
    before, teacher = (mean_of([r[key] for r in first]) for key in ("before", "teacher"))
    edges = edges_said(result["tuning"], NAMES) + never_better_said(result["tuning"], NAMES)
    said = (
        f"Procrustes is {standing(lead[1])} least squares ({points(*lead[:2])}) and {'' if learns else 'not significantly '}ahead of "
        f"the student before training ({points(*gain)})"
    )
    text = f"Student before {before}, teacher {teacher}.{gains_said(runs, NAMES)} {_fit_said(result['bridge'])}\n\n{table(header, rows)}\n\n{edges}"
    return Finding(verdict, said, text)  # type: ignore[arg-type]


def draw(result: Result, figure: Any) -> None:
    """Accuracy of every loss."""
    runs = result["runs"]
    draw_objectives(
        figure,
        runs,
        {**NAMES, "supervised": "supervised", "output_space": "full reverse KL"},
        ours=[name for name, text in NAMES.items() if text.startswith("states")],
        reference="least_squares",
        title="SmolLM2-135M from Gemma 3 270M",
        unit=f"Avg@2 after {runs[0]['steps']} steps, %",
    )
