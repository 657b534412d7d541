"""The slow, obvious versions that tests (and benchmarks) compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from oprd.types import Rollouts


def loss_by_loops(
    student_LND: Tensor,
    teacher_LND: Tensor,
    rollout_index: list[int],
    normalize: bool = False,
    reduction: str = "rollout",
) -> float:
    """Eq. 6 with one Python loop a mean, in double precision."""
    student, teacher = student_LND.double().tolist(), teacher_LND.double().tolist()
    layers = []
    for student_ND, teacher_ND in zip(student, teacher, strict=True):
        errors = []
        for s, t in zip(student_ND, teacher_ND, strict=True):
            if normalize:
                s = [x * len(s) ** 0.5 / sum(y * y for y in s) ** 0.5 for x in s]
                t = [x * len(t) ** 0.5 / sum(y * y for y in t) ** 0.5 for x in t]
            errors.append(sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s))
        if reduction == "token":
            layers.append(sum(errors) / len(errors))
        else:
            means = []
            for rollout in sorted(set(rollout_index)):
                own = [e for e, r in zip(errors, rollout_index, strict=True) if r == rollout]
                means.append(sum(own) / len(own))
            layers.append(sum(means) / len(means))
    return sum(layers) / len(layers)


@torch.no_grad()
def states_one_by_one(model: torch.nn.Module, rollouts: Rollouts, layers: tuple[int, ...]) -> Tensor:
    """States at every response position: one unpadded full forward a rollout, every hidden state kept, then sliced."""
    parts = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        first = len(prompt) - 1
        parts.append(torch.stack([hidden[layer][0, first : first + len(completion)] for layer in layers]))
    return torch.cat(parts, dim=1)
