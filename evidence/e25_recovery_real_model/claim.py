"""E25: a pretrained model of which blocks were cut, brought back by its original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evidence.claim import Work
from evidence.comparisons import committed_tuning
from evidence.e11_real_model.claim import LADDER, START, TEACHER, TEACHER_BUILD, get_models
from evidence.e15_recovery.claim import draw, judge, measure_setting
from evidence.recovery import NAMES, Setting

__all__ = ["CLAIM", "ID", "SETTING", "TITLE", "draw", "judge", "measure"]

ID = "E25"
TITLE = "Matching hidden states brings a pruned pretrained model back better than output-space distillation"
CLAIM = (
    "A pretrained model that lost a third of its blocks is recovered by its own original on its own rollouts, compared layer by layer without a "
    "bridge. Not in the paper; published recoveries of pruned models train on fixed text."
)
SETTING = (
    "Original: E11's teacher, SmolLM2-135M after worked chain sums (30 blocks). Cut to 20 and to 24 by block influence on 64 of its own completions, then "
    "24 steps of 16 rollouts of chain sums, `layer_map: kept`, linear schedule, means over tokens, three seeds. Rates a factor of three apart are chosen on "
    "seed 10 for the cut to 20, on grids that are widened, three times at most, until the best is inside, and used for both cuts. Avg@2 on 150 problems a seed. Perplexity per "
    "token of the original's own completions of 128 other problems."
)
FILE = Path(__file__).parent / "comparison.yaml"
SMOLLM2 = Setting(
    FILE,
    "models/SmolLM2-135M-chain-sum",
    (20, 24),
    "generated:chain_sum",
    "recovery_smollm2",
    tokens=24,
    rates=START,
    ladder=LADDER,
    quick={"max_steps": 2, "eval_limit": 8, "eval_num_generations": 1},
)


def measure(work: Work) -> dict[str, Any]:
    """Get E11's teacher, cut it, choose each objective's rate on one seed, and recover it with three others."""
    known = None if work.tune or work.quick else committed_tuning(FILE.parent, NAMES)
    get_models(TEACHER, *TEACHER_BUILD)
    return measure_setting(work, SMOLLM2, known)
