"""The learning rate of a report: the probe of `learning_rate: auto`, with the settings that the report advises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from oprd.alignment.model_pair import ModelPair
from oprd.config import OPRDConfig
from oprd.data.rows import PromptRow
from oprd.faults import RunStopped
from oprd.models.memory import explaining_out_of_memory
from oprd.resolve import resolve
from oprd.run_config import GivenObjects, RunConfig
from oprd.training.rate_probe import describe_cost, probe_learning_rate

LONG_RUN = 100  # steps of the run that the rate is for


def find_rate(
    pair: ModelPair, rows: Sequence[PromptRow], settings: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Probe learning rates from the student's weights, which are as before afterwards.

    Args:
        pair: student and teacher, both loaded here.
        rows: prompts.
        settings: the advised ones, with lengths and seed.
        say: called with what it will cost.

    Returns:
        `RateProbe.as_json`; or "problem": why there is none.
    """
    if settings.get("bridge"):
        return {"problem": "a bridge must be fitted first"}
    (student, teacher), tokenizers = pair.models, pair.tokenizers
    args = OPRDConfig(
        "diagnose", max_steps=LONG_RUN, use_cpu=not torch.cuda.is_available(), report_to="none", **settings
    )
    say(describe_cost(args))
    student.requires_grad_(True)  # loaded to be read
    try:
        run = RunConfig(args, student, teacher, rows, given=GivenObjects(*tokenizers))
        with explaining_out_of_memory("the learning-rate probe", "lower --micro-batch-tokens, or pass --no-probe-rate"):
            return probe_learning_rate(resolve(run)).as_json()
    except (ValueError, RunStopped) as error:  # the report itself is whole
        return {"problem": str(error)}
    finally:
        student.requires_grad_(False)
