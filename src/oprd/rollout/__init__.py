"""Rollout engines: how the student's completions are sampled. One file an engine, one line in `ENGINES`."""

from __future__ import annotations

from collections.abc import Callable

from oprd.rollout.base import RolloutEngine, Sampling, derive_seed, student_writes
from oprd.rollout.transformers_engine import TransformersEngine
from oprd.rollout.vllm_engine import VLLMEngine

ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "transformers": TransformersEngine,
    "vllm": VLLMEngine,
}

__all__ = ["ENGINES", "RolloutEngine", "Sampling", "TransformersEngine", "VLLMEngine", "derive_seed", "student_writes"]
