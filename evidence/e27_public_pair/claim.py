"""E27: E23 with two public models of two families, and nothing of this project in between."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Work
from evidence.comparisons import TUNING_SEED
from evidence.e11_real_model.claim import ROOT, STUDENT, get_public
from evidence.e23_far_pair.claim import draw, judge, measure_pair
from evidence.e27_public_pair.questions import write

__all__ = ["CLAIM", "ID", "SETTING", "TITLE", "draw", "judge", "measure"]

ID = "E27"
TITLE = "With two public models of two families, the teacher's responses first make matching its states work better"
CLAIM = "As E23, with two models that are published, of two families and two tokenizers. No public result of hidden states on such a pair was found."
SETTING = (
    'Student SmolLM2-135M-Instruct, teacher Qwen2.5-Coder-1.5B-Instruct, eleven times its size; both read from public files that hold their weights in 4 bits. Short arithmetic questions as chat messages ("What is 25 - 82 + 60? '
    'Answer with the number only."). Bridge of rank 32 from 400 rollouts. 24 steps of 16 rollouts of at most 24 tokens, Avg@2 on 100 problems a seed, three seeds. Rates a factor '
    "of three apart are chosen on seed 10, on grids that are widened until the best is inside; the lowest rate is 1e-5. The teacher's responses are decoded and tokenised again for the student."
)
FILE = Path(__file__).parent / "comparison.yaml"
TEACHER = ROOT / "models" / "Qwen2.5-Coder-1.5B-Instruct"
LOSSES = ("supervised", "states", "supervised_then_states", "mixed")
START = (3.0e-5, 1.0e-4, 3.0e-4)
LADDER = (1.0e-5, *START, 1.0e-3, 3.0e-3)
"""Rates that may be tried. It ends at 1e-5: one more rate takes twelve minutes, and the student learns next to nothing at any rate."""
QUICK = {"max_steps": 2, "eval_limit": 8, "eval_num_generations": 1, "eval_steps": 1, "per_device_train_batch_size": 4}


def measure(work: Work) -> dict[str, Any]:
    """Get both models, tune every loss on one seed, measure on three others."""
    get_public("get_smollm2.py", STUDENT)
    get_public("get_qwen_coder.py", TEACHER)
    write(work.folder)
    grids = dict.fromkeys(LOSSES, START)
    return measure_pair(FILE, work, folder="public_pair", grids=grids, settings=partial(_settings, work), ladder=LADDER)


def _settings(work: Work, seed: int) -> dict[str, Any]:
    """Each seed is judged by questions of its own, which the tuning seed does not see."""
    test = "test.jsonl" if seed == TUNING_SEED else f"test_{seed}.jsonl"
    data = {"train_dataset": str(work.folder / "train.jsonl"), "eval_dataset": str(work.folder / test)}
    return {**data, **(QUICK if work.quick else {})}
