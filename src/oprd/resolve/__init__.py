"""Makes the objects of a run from its configuration: names become models, tokenizers, layers, engine, task, prompts and loss.

Only this package looks names up and loads models. Trainer, command line and tools use its result.
"""

from __future__ import annotations

from oprd.models.loading import ModelInfo, load, load_tokenizer
from oprd.resolve.datasets import given_rows, prepare
from oprd.resolve.plan import PlannedRun, plan
from oprd.resolve.run import ResolvedRun, cached_positions, check_inputs, load_pair, load_responses, resolve
from oprd.resolve.terms import build_rewards, build_terms, describe_objective

__all__ = [
    "ModelInfo", "PlannedRun", "ResolvedRun", "build_rewards", "build_terms", "cached_positions", "check_inputs",
    "describe_objective", "given_rows", "load", "load_pair", "load_responses", "load_tokenizer", "plan", "prepare", "resolve",
]  # fmt: skip
