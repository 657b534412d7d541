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


def dense_log_probs(
    weight: Tensor,
    hidden: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocab_size: int | None = None,
    stops: tuple[int, ...] = (),
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities `[N, events]` with every logit in memory: the events are the ordinary ids in order, then the stop event."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits[:, :vocab_size] / temperature, dim=-1)
    if not stops:
        return log_p
    ordinary = [i for i in range(log_p.shape[1]) if i not in stops]
    return torch.cat([log_p[:, ordinary], log_p[:, list(stops)].logsumexp(-1, keepdim=True)], dim=1)


def dense_divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """The textbook sums, of finite log-probabilities of student and teacher."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)
