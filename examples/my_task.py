"""A task of your own with partial credit: each digit of a sum is checked by itself.

In the recipe (YAML), with this file's folder on PYTHONPATH:

    task: "my_task:partial_credit"                            # grades rollouts and evaluations
    train_dataset: "generated:my_task:partial_credit"         # or any file with the columns prompt and answer
    eval_dataset: "generated:my_task:partial_credit"
    train_limit: 512                                          # problems to generate
    eval_limit: 128
    policy_gradient_weight: 0.1                               # optional: GRPO with these rewards
    num_generations: 4

or on the command line:

    PYTHONPATH=examples oprd train --config tiny --task my_task:partial_credit

A reward is true, false or any finite number. `accuracy` and Avg@k are mean rewards, Best@k is the mean of each problem's best
reward. From Python: `OPRDTrainer(…, task=partial_credit)`.
"""

from __future__ import annotations

import random

from oprd.data.rows import PromptRow
from oprd.tasks.task import FunctionGrader, Task


def share_of_digits(response: str, answer: str) -> float:
    """Share of the digits after "#" that are right, counted from the last one; missing and surplus digits count as wrong."""
    written = response.rpartition("#")[2].strip()
    right = sum(a == b for a, b in zip(reversed(written), reversed(answer), strict=False))
    return right / max(len(written), len(answer))


def problems(n: int, seed: int, split: str) -> list[PromptRow]:
    """`n` sums of two five-digit numbers; equal arguments give equal problems, another split gives others."""
    draw = random.Random(f"{seed} {split}")
    pairs = [(draw.randrange(10_000, 100_000), draw.randrange(10_000, 100_000)) for _ in range(n)]
    return [PromptRow(f"{a}+{b}=", str(a + b), source=f"{split} problem {i}") for i, (a, b) in enumerate(pairs)]


partial_credit = Task(
    name="partial_credit",
    description="five-digit addition, rewarded digit by digit",
    # To hold processes, write a class with grade, __enter__ and __exit__.
    grader=lambda: FunctionGrader(share_of_digits),
    problems=problems,
)
