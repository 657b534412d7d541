"""E24: accuracy beside TRL's distillation trainer on a pretrained pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evidence.claim import Work
from evidence.comparisons import committed_tuning
from evidence.e11_real_model.claim import FILE, TEACHER, TEACHER_BUILD, WARM, get_models
from evidence.e13_trl.claim import OURS, Pair, draw, judge, measure_pair

__all__ = ["CLAIM", "ID", "SETTING", "TITLE", "draw", "judge", "measure"]

ID = "E24"
TITLE = "On a pretrained model, matching hidden states beats TRL's tuned trainer"
CLAIM = (
    "E13's claim on E11's models: OPRD-Vanilla is more accurate than TRL's `DistillationTrainer` with a tuned rate, and oprd's full reverse KL is as "
    "accurate as TRL's (this project's own claim)."
)
HERE = Path(__file__).parent


def _one_batch() -> str:
    """What `one_batch.py` found, in a sentence."""
    found = json.loads((HERE / "one_batch.json").read_text())
    said = [
        f"{name}: cosine {own['cosine']:.6f}, norms {own['norm_trl']:.4f} (TRL) and {own['norm_oprd']:.4f}"
        for name, own in found.items()
    ]
    return f"Gradients of both reverse KLs on the same eight rollouts (`one_batch.py`): {'; '.join(said)}."


SETTING = (
    "E11's models, prompts, steps, rollouts and evaluation; oprd's runs are E11's, trained again, with the rates and the warm-up "
    "that E11 chose. TRL's "
    "`DistillationTrainer` (reverse KL) gets the same steps, rollouts, sampling, attention, precision (weights in float32, products and the teacher in "
    "bfloat16) and no activation checkpointing; the rest is its default: linear decay without warm-up, AdamW, clipping at 1, and `generate` on the float32 weights "
    "(oprd samples from a bfloat16 copy with its own engine, so the same loss takes fewer seconds). Its rate is tuned on seed 10, "
    "a factor of three apart, on a grid that is widened, three times at most, until the best is inside. GKD and GOLD want an answer for each prompt and are left out; at TRL's default rate one seed is run. Seconds: "
    "CPU seconds of the training process (one thread, two processes side by side), without evaluation and the first step. "
    + _one_batch()
)
PAIR = Pair(
    FILE,
    (*OURS, "distillation_as_ours", "distillation", "distillation_default"),
    {"distillation": (1.5e-5, 5.0e-5, 1.5e-4)},
    3,
    {"distillation_default": 1},
    WARM[True],
)


def measure(work: Work) -> dict[str, Any]:
    """Get E11's models, tune TRL's rate on one seed, and train all on three others."""
    known = None if work.tune or work.quick else committed_tuning(HERE, PAIR.rates)
    get_models(TEACHER, *TEACHER_BUILD)
    return measure_pair(work, PAIR, known)
