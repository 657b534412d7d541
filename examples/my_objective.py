"""Objectives of your own: a function of hidden states, one of log-probabilities, and a class that sees layers and weights.

In the recipe (YAML), with this file's folder on PYTHONPATH:

    objectives:
      - {use: "my_objective:huber", weight: 0.5, delta: 1.0}      # further keys are arguments
      - {use: "my_objective:skewed_kl", reads: log_probs, weight: 0.1}
      - {use: "my_objective:UpperLayers", weight: 0.1, first: 3}

or on the command line:

    PYTHONPATH=examples oprd train --config tiny --objectives '[{use: "my_objective:huber", delta: 1.0}]'

oprd adds them to the terms of the settings; with `representation_weight: 0` only yours remain. The log has `loss/huber` and
`loss/upperlayers`, before their weights. From Python, give objects: `PYTHONPATH=examples python examples/my_objective.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oprd import OPRDConfig, OPRDTrainer
from oprd.objectives.composite import Term
from oprd.objectives.terms import LayerError, PackedPositions


def huber(student_ND: Tensor, teacher_ND: Tensor, delta: float = 1.0) -> Tensor:
    """Huber loss between hidden states: one error per position, `[N]`.

    Args:
        student_ND: `[N, D]`, response positions of all rollouts, one after another; receives the gradient.
        teacher_ND: `[N, D]`, without gradient.
        delta: distance from which an outlier counts linearly.
    """
    return torch.nn.functional.huber_loss(student_ND, teacher_ND, reduction="none", delta=delta).mean(-1)


def skewed_kl(student_NV: Tensor, teacher_NV: Tensor, share: float = 0.1) -> Tensor:
    """KL of the student from a mixture of both models: one error per position, `[N]`.

    Args:
        student_NV: `[N, V]`, log-probabilities of the next token, of some of the positions; receives the gradient.
        teacher_NV: `[N, V]`, without gradient.
        share: of the student in the mixture.
    """
    mixture_NV = torch.logaddexp(student_NV + math.log(share), teacher_NV + math.log1p(-share))
    return (student_NV.exp() * (student_NV - mixture_NV)).sum(-1)


class UpperLayers:
    """Cosine distance, from layer `first` upwards. To read LM heads or log-probabilities, write `head_loss` or `policy_loss`."""

    # The gradient does not depend on who wrote the tokens, so lmbda and overlap_rollouts are allowed.
    on_policy_only = False

    def __init__(self, first: int = 1) -> None:
        if first < 1:
            raise ValueError(f"first: {first} is not allowed; layers count from 1")
        self.first = first

    def layer_loss(self, layer: int, student_ND: Tensor, teacher_ND: Tensor, at: PackedPositions) -> Tensor:
        """Return the scalar Σ_n weights_n · error_n of one layer. `at.weights` are those of a mean over the whole step."""
        if layer < self.first:
            return student_ND.new_zeros(())
        error_N = 1 - torch.cosine_similarity(student_ND, teacher_ND)
        at.observe(upper_distance=error_N.detach())  # logged as a mean over positions, summed over layers
        return (error_N * at.weights).sum()


def main(output_dir: str = "runs/my_objective", **settings: object) -> OPRDTrainer:
    """Train the embedded tiny student with these objectives alone; `settings` are any of `OPRDConfig`."""
    own = {"max_steps": 10, "learning_rate": 1e-3, "max_completion_length": 16, "representation_weight": 0, **settings}
    trainer = OPRDTrainer(
        "embedded:tiny/student", "embedded:tiny/teacher", args=OPRDConfig(output_dir, **own),
        train_dataset=[{"prompt": "12345+67890="}, {"prompt": "11111+22222="}],
        objectives={
            "huber": Term(LayerError(huber), weight=0.5),
            "upper": Term(UpperLayers(first=3), weight={"schedule": "linear", "start": 0.0, "end": 0.1, "steps": 5}),
        },
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
