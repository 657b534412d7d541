"""Reward functions of your own, with the signature of TRL's `GRPOTrainer`.

In the recipe (YAML), with this file's folder on PYTHONPATH:

    task: addition
    reward_funcs: [task, "my_reward:brevity", "my_reward:last_digit"]    # task: the verdict of the task
    reward_weights: [1.0, 0.2, 0.5]                                      # default: 1 each
    policy_gradient_weight: 0.1                                          # optional: GRPO learns from the weighted sum
    num_generations: 4

or on the command line:

    PYTHONPATH=examples oprd train --config tiny --reward_funcs '["my_reward:brevity"]'

The log has `rewards/brevity/mean` and `rewards/brevity/std`. From Python: `OPRDTrainer(…, reward_funcs=[brevity, last_digit])`.
"""

from __future__ import annotations

from typing import Any


def brevity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Falls from 1 with the number of tokens."""
    return [1 / len(ids) for ids in completion_ids]


async def last_digit(completions: list[str], answer: list[str | None], **columns: Any) -> list[float | None]:
    """Whether the last digit is right; None, which leaves the function out, for a row without an answer.

    `answer` is a column of the dataset. All async functions of a batch run at the same time: await a judge here.
    """
    pairs = zip(completions, answer, strict=True)
    return [None if right is None else float(text.strip()[-1:] == right[-1]) for text, right in pairs]
