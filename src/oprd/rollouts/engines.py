"""Rollout engines: how the student's completions are sampled. One file an engine, one line in `ENGINES`."""

from __future__ import annotations

from collections.abc import Callable

from oprd.rollouts.engine import RolloutEngine, Sampling, derive_seed, student_writes
from oprd.rollouts.transformers_continuous import TransformersContinuousEngine
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.rollouts.vllm.engine import VLLMEngine
from oprd.rollouts.vllm.server import VLLMServerEngine

ENGINES: dict[str, Callable[..., RolloutEngine]] = {
    "transformers": TransformersEngine,
    "transformers_continuous": TransformersContinuousEngine,
    "vllm": VLLMEngine,
    "vllm_server": VLLMServerEngine,
}

__all__ = [
    "ENGINES", "RolloutEngine", "Sampling", "TransformersContinuousEngine", "TransformersEngine", "VLLMEngine",
    "VLLMServerEngine", "derive_seed", "student_writes",
]  # fmt: skip
