"""The slow, obvious versions that tests (and benchmarks) compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


def read_one_by_one(model: torch.nn.Module, rollouts: Rollouts) -> list[tuple[Tensor, list[Tensor]]]:
    """Logits `[T, V]` and the states `[T, D]` of layers 0, 1, … at a rollout's response positions: one full forward each."""
    reads = []
    for prompt, completion in zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True):
        output = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True, use_cache=False)
        span = slice(len(prompt) - 1, len(prompt) - 1 + len(completion))
        reads.append((output.logits[0, span].float(), [hidden[0, span] for hidden in output.hidden_states]))
    return reads


@dataclass
class DenseObjective:
    """What a run minimises, written out with every logit in memory and autograd.

    Events are the ordinary ids in order, then the end of text; `size` ids exist, the model's further rows do not.
    """

    size: int = 45
    stops: tuple[int, ...] = (2,)
    reduction: str = "rollout"
    layers: tuple[int, ...] = (1, 2, 3)
    positions: Callable[[int], Sequence[int]] = lambda length: range(length)
    output_positions: Callable[[int], Sequence[int]] = lambda length: range(length)
    kind: str | None = None
    k: int = 16
    support: str = "student"
    beta: float = 0.5
    baseline: bool = False
    temperature: float = 1.0
    reward: Callable[[Sequence[int]], float] | None = None
    group: int = 2
    scale: str = "group"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    sampling_temperature: float = 1.0
    old: dict[int, list[Tensor]] = field(default_factory=dict)

    def log_probs(self, logits: Tensor, temperature: float) -> Tensor:
        log_p = torch.log_softmax(logits[:, : self.size] / temperature, dim=-1)
        ordinary = [i for i in range(self.size) if i not in self.stops]
        return torch.cat([log_p[:, ordinary], log_p[:, list(self.stops)].logsumexp(-1, keepdim=True)], dim=1)

    def event(self, token: int) -> int:
        ordinary = [i for i in range(self.size) if i not in self.stops]
        return len(ordinary) if token in self.stops else ordinary.index(token)

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """Of one tensor a rollout: each rollout counts the same, or each token does."""
        if self.reduction == "token":
            return torch.cat(list(values)).mean()
        return torch.stack([value.mean() for value in values]).mean()

    def sum_mean(self, values: Sequence[Tensor]) -> Tensor:
        """Summed over a completion and averaged over rollouts, or averaged over tokens."""
        if self.reduction == "token":
            return torch.cat(list(values)).mean()
        return torch.stack([value.sum() for value in values]).mean()

    def representation(self, student: list[list[Tensor]], teacher: list[list[Tensor]]) -> Tensor:
        errors = []
        for ours, theirs in zip(student, teacher, strict=True):
            chosen = list(self.positions(len(ours[0])))
            errors.append(torch.stack([(ours[l] - theirs[l])[chosen].square().mean(-1) for l in self.layers]).mean(0))
        return self.mean(errors)

    def output_space(self, log_p: Tensor, log_q: Tensor, tokens: Sequence[int]) -> Tensor:
        if self.kind in ("reverse_kl", "forward_kl", "jsd"):
            return dense_divergence(log_p, log_q, self.kind, self.beta)
        return torch.stack([self._position(p, q, self.event(t)) for p, q, t in zip(log_p, log_q, tokens, strict=True)])

    def _position(self, log_p: Tensor, log_q: Tensor, sampled: int) -> Tensor:
        ratio = (log_p - log_q).detach()
        if self.kind == "sampled_token":
            kl = (log_p.detach().exp() * ratio).sum() if self.baseline else 0.0
            return ratio[sampled] + (ratio[sampled] - kl) * (log_p[sampled] - log_p[sampled].detach())
        ours, theirs = (set(x.topk(self.k).indices.tolist()) for x in (log_p, log_q))
        chosen = {"student": ours, "teacher": theirs, "union": ours | theirs, "intersection": ours & theirs}
        kept = sorted(chosen[self.support])
        if self.kind == "tail_sampled":
            value = (log_p[kept].exp() * ratio[kept]).sum()
            if sampled not in kept:
                value = value + ratio[sampled] * (1 + log_p[sampled] - log_p[sampled].detach())
            return value
        if not kept:
            return 0.0 * log_p.sum()
        a, b = log_p[kept].log_softmax(0), log_q[kept].log_softmax(0)
        return (a.exp() * (a - b)).sum() if self.kind == "top_k" else (b.exp() * (b - a)).sum()

    def advantages(self, rollouts: Rollouts) -> list[float]:
        rewards = torch.tensor([self.reward(c) for c in rollouts.completion_ids], dtype=torch.float64)
        groups = rewards.reshape(-1, self.group)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4) if self.scale == "group" else centred).flatten().tolist()

    def policy_gradient(self, logits: list[Tensor], rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
        advantages, losses, cut = self.advantages(rollouts), [], []
        log_p = []
        for row, tokens in zip(logits, rollouts.completion_ids, strict=True):
            events = [self.event(t) for t in tokens]
            log_p.append(self.log_probs(row, self.sampling_temperature)[range(len(tokens)), events])
        old = self.old.setdefault(id(rollouts), [x.detach() for x in log_p])
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        for advantage, now, before in zip(advantages, log_p, old, strict=True):
            ratio = (now - before).exp()
            clipped = ratio.clamp(1 - self.epsilon, 1 + high)
            losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
            cut.append((clipped * advantage < ratio * advantage).double().detach())
        silent = sum(a == 0 for a in advantages) / len(advantages)
        metrics = {"clip_ratio": torch.cat(cut).mean().item(), "frac_reward_zero_std": silent}
        return self.mean(losses), metrics

    def loss(
        self, student: torch.nn.Module, teacher: torch.nn.Module | None, rollouts: Rollouts, weights: dict[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, and what a run logs of it."""
        ours = read_one_by_one(student, rollouts)
        theirs = []
        if teacher is not None:
            with torch.no_grad():
                theirs = read_one_by_one(teacher, rollouts)
        parts, metrics = {}, {}
        if "representation" in weights:
            parts["representation"] = self.representation([s for _, s in ours], [s for _, s in theirs])
        if "output_space" in weights:
            values = [
                self.output_space(self.log_probs(z, self.temperature), self.log_probs(w, self.temperature), tokens)
                for (z, _), (w, _), tokens in zip(ours, theirs, rollouts.completion_ids, strict=True)
            ]
            parts["output_space"] = self.sum_mean([value[list(self.output_positions(len(value)))] for value in values])
        if "policy_gradient" in weights:
            parts["policy_gradient"], metrics = self.policy_gradient([z for z, _ in ours], rollouts)
        loss = sum(weights[name] * value for name, value in parts.items())
        return loss, {"loss": loss.item(), **{f"loss/{n}": v.item() for n, v in parts.items()}, **metrics}

    def train(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module | None,
        steps: Sequence[tuple[Rollouts, dict[str, float]]],
        *,
        learning_rate: float,
        weight_decay: float,
        adam_epsilon: float,
        max_grad_norm: float,
    ) -> list[dict[str, float]]:
        """AdamW and clipping by hand; `student` is trained in place. What a run logs, step by step."""
        trained = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, eps=adam_epsilon)
        rows = []
        for rollouts, weights in steps:
            optimizer.zero_grad()
            loss, metrics = self.loss(student, teacher, rollouts, weights)
            loss.backward()
            metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
            optimizer.step()
            rows.append(metrics)
        return rows

    @torch.no_grad()
    def diagnostics(
        self, student: torch.nn.Module, teacher: torch.nn.Module, rollouts: Rollouts, k: int = 16
    ) -> dict[str, float]:
        """What is watched: means over all response tokens; cosines over the chosen positions."""
        ours, theirs = read_one_by_one(student, rollouts), read_one_by_one(teacher, rollouts)
        columns: dict[str, list[float]] = {}
        by_rollout: list[list[float]] = []
        for (z, _), (w, _), tokens in zip(ours, theirs, rollouts.completion_ids, strict=True):
            by_rollout.append([])
            for p, q, token in zip(self.log_probs(z, 1.0), self.log_probs(w, 1.0), tokens, strict=True):
                likeliest = [set(x.topk(k).indices.tolist()) for x in (p, q)]
                found = {
                    "entropy/student": -(p.exp() * p).sum().item(), "entropy/teacher": -(q.exp() * q).sum().item(),
                    "overlap": len(likeliest[0] & likeliest[1]) / k,
                    "reverse_kl": (p - q)[self.event(token)].item(),
                }  # fmt: skip
                by_rollout[-1].append(found["reverse_kl"])
                for name, value in found.items():
                    columns.setdefault(name, []).append(value)
        result = {name: sum(values) / len(values) for name, values in columns.items()}
        result |= error_over_rollouts(by_rollout)
        for layer in self.layers:
            cosines = []
            for (_, s), (_, t) in zip(ours, theirs, strict=True):
                chosen = list(self.positions(len(s[0])))
                cosines.append(torch.nn.functional.cosine_similarity(s[layer][chosen], t[layer][chosen], dim=-1))
            result[f"cosine/layer_{layer:02d}"] = self.mean(cosines).item()
        return result


def error_over_rollouts(values: list[list[float]]) -> dict[str, float]:
    """Standard error of the mean over all values, which depend on each other within a rollout; empty of one rollout."""
    values = [own for own in values if own]
    if len(values) < 2:
        return {}
    count = sum(map(len, values))
    mean = sum(map(sum, values)) / count
    squares = sum(sum(value - mean for value in own) ** 2 for own in values)
    return {"reverse_kl_error": (squares * len(values) / (len(values) - 1)) ** 0.5 / count}


def chi_squared(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean; tokens that are expected less than 5 times taken together."""
    expected = probability.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / (2 * freedom) ** 0.5)
