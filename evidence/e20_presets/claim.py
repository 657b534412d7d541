"""E20: the presets on the embedded pair, at equal steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Finding, Result, Work
from evidence.comparisons import at_its_rate, difference, first_seeds
from evidence.pictures import draw_objectives
from evidence.tuning import edges_said, tuned_runs
from evidence.words import standings, surely, table
from oprd.objectives.presets import PRESETS

ID = "E20"
TITLE = "On a pair of one origin, OPRD's own objective is not beaten by our presets of those published after it"
CLAIM = (
    "Later papers replace OPRD's objective: LastOPD (last layer, fading into a top-16 KL), Latent-MOPD (last three layers, likewise), RIDE (a target past "
    "the teacher), PHF (directions of token-to-token steps beside a KL). Each reports to be better than what came before."
)
SETTING = (
    "Embedded pair, presets as shipped: what the papers leave open is filled in or left out (`oprd keys --preset NAME` says what). Their weights are not tuned, 60 steps of 16 rollouts, Avg@2 on 250 generated problems "
    "a seed, three seeds. Each preset's rate is chosen on seed 10. The teacher is near 100 %, so RIDE cannot pass it here (E18 asks that); PHF's teacher reads no solution. "
    "The adaptive switch goes over from states to the reverse KL where the gain of states falls below half of its largest."
)
FILE = Path(__file__).parent / "comparison.yaml"
NAMES = {
    "oprd": "OPRD",
    "lastopd": "LastOPD",
    "latent_mopd": "Latent-MOPD",
    "ride": "RIDE",
    "phf": "PHF",
    "adaptive": "adaptive switch",
}
LATER = tuple(name for name in NAMES if name in PRESETS and name != "oprd")


def measure(work: Work) -> dict[str, Any]:
    """Tune each preset on one seed, and measure it on three others."""
    return tuned_runs(FILE, work, folder="tiny_presets", names=list(NAMES), seeds=first_seeds(work, 3))


def judge(result: Result) -> Finding:
    """Holds if OPRD is behind no preset and ahead of those for LastOPD, Latent-MOPD and PHF; in part if behind none."""
    leads = {name: difference(result["runs"], "oprd", name) for name in NAMES if name != "oprd"}
    signs = {name: surely(leads[name][1]) for name in LATER}
    behind_none = min(signs.values()) >= 0
    ahead = all(signs[name] > 0 for name in LATER if name != "ride")
    verdict = "holds" if behind_none and ahead else "partly" if behind_none else "not"
    rows = [
        [text, PRESETS[name].source if name in PRESETS else "this project", *at_its_rate(result, name, leads.get(name))]
        for name, text in NAMES.items()
    ]
    stands = standings({NAMES[name]: leads[name][1] for name in LATER})
    switch = f"OPRD is {standings({'the adaptive switch': leads['adaptive'][1]})}, which no paper has and the verdict leaves out."
    text = (
        f"{table(['preset', 'source', 'rate', 'Avg@2 after 60 steps', 'OPRD leads by'], rows)}\n\n{edges_said(result['tuning'], NAMES)} A crossfade of ten "
        f"steps leaves fifty to the KL here; its papers train for 62 and more. {switch}"
    )
    return Finding(verdict, f"OPRD is {stands}", text)  # type: ignore[arg-type]


def draw(result: Result, figure: Any) -> None:
    """Accuracy of each preset."""
    draw_objectives(
        figure, result["runs"], NAMES, ours=["oprd"], reference="oprd", title="Published objectives, equal steps",
        unit="Avg@2 after 60 steps, %",
    )  # fmt: skip
