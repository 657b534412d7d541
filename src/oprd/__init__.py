"""OPRD: on-policy distillation of language models by hidden states (arXiv 2606.06021).

    from oprd import OPRDConfig, OPRDTrainer

`evaluate` measures a model, `load_run` reads a run's folder. Functions for your own loop: `capture_states`, `representation_loss`,
`full_vocabulary_loss`, …. Start reading at `training/trainer.py`; each package's `__init__` says what it holds.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from oprd.sanitize import RedactingFilter

if TYPE_CHECKING:
    __version__: str
    from oprd.config import OPRDConfig
    from oprd.models.lm_head import lm_head_of, log_probs, match_heads
    from oprd.objectives.composite import Term
    from oprd.objectives.output_space import full_vocabulary_loss, sampled_token_loss, tail_sampled_loss, top_k_loss
    from oprd.objectives.policy_gradient import clipped_policy_loss, group_advantages
    from oprd.objectives.reduction import position_weights, representation_loss
    from oprd.objectives.representation import representation_error
    from oprd.objectives.terms import LayerError, LogProbError
    from oprd.rollouts.engine import Sampling
    from oprd.rollouts.transformers_engine import TransformersEngine
    from oprd.runs.loaded import LoadedRun, load_run
    from oprd.states.capture import capture_states
    from oprd.states.layers import resolve_layers
    from oprd.states.positions import select_positions
    from oprd.states.requests import plan_micro_batches, request_states
    from oprd.tasks.task import Task
    from oprd.tools.evaluate import evaluate
    from oprd.training.recorder import StepRecord
    from oprd.training.trainer import OPRDTrainer
    from oprd.types import Rollouts, States

_HOME = {
    "LayerError": "oprd.objectives.terms",
    "LoadedRun": "oprd.runs.loaded",
    "LogProbError": "oprd.objectives.terms",
    "OPRDConfig": "oprd.config",
    "OPRDTrainer": "oprd.training.trainer",
    "Rollouts": "oprd.types",
    "Sampling": "oprd.rollouts.engines",
    "States": "oprd.types",
    "StepRecord": "oprd.training.recorder",
    "Task": "oprd.tasks.task",
    "Term": "oprd.objectives.composite",
    "TransformersEngine": "oprd.rollouts.engines",
    "capture_states": "oprd.states.capture",
    "clipped_policy_loss": "oprd.objectives.policy_gradient",
    "evaluate": "oprd.tools.evaluate",
    "full_vocabulary_loss": "oprd.objectives.output_space",
    "group_advantages": "oprd.objectives.policy_gradient",
    "lm_head_of": "oprd.models.lm_head",
    "load_run": "oprd.runs.loaded",
    "log_probs": "oprd.models.lm_head",
    "match_heads": "oprd.models.lm_head",
    "plan_micro_batches": "oprd.states.requests",
    "position_weights": "oprd.objectives.reduction",
    "representation_error": "oprd.objectives.representation",
    "representation_loss": "oprd.objectives.reduction",
    "request_states": "oprd.states.requests",
    "resolve_layers": "oprd.states.layers",
    "sampled_token_loss": "oprd.objectives.output_space",
    "select_positions": "oprd.states.positions",
    "tail_sampled_loss": "oprd.objectives.output_space",
    "top_k_loss": "oprd.objectives.output_space",
}

__all__ = [  # written out for type checkers
    "LayerError",
    "LoadedRun",
    "LogProbError",
    "OPRDConfig",
    "OPRDTrainer",
    "Rollouts",
    "Sampling",
    "States",
    "StepRecord",
    "Task",
    "Term",
    "TransformersEngine",
    "capture_states",
    "clipped_policy_loss",
    "evaluate",
    "full_vocabulary_loss",
    "group_advantages",
    "lm_head_of",
    "load_run",
    "log_probs",
    "match_heads",
    "plan_micro_batches",
    "position_weights",
    "representation_error",
    "representation_loss",
    "request_states",
    "resolve_layers",
    "sampled_token_loss",
    "select_positions",
    "tail_sampled_loss",
    "top_k_loss",
]

logging.getLogger("oprd").addFilter(RedactingFilter())


def __getattr__(name: str) -> Any:
    # Late, so that `import oprd` (and `oprd --help`) does not import torch and transformers.
    if name == "__version__":
        from importlib.metadata import version

        return version("oprd")
    if name not in _HOME:
        raise AttributeError(f"module 'oprd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
