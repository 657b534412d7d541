"""Gradients of one batch under each estimator, and their scatter over new draws of the next tokens (Theorem 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oprd import Rollouts, capture_states, position_weights, representation_loss
from oprd.models.lm_head import LMHead, lm_head_of, match_heads
from oprd.objectives.output_space import OutputTerm

SAMPLED = {
    "sampled_token": OutputTerm("sampled_token"),
    "with_baseline": OutputTerm("sampled_token", baseline=True),
    "tail_sampled_4": OutputTerm("tail_sampled", top_k=4),
}
EXACT = {"full_reverse_kl": OutputTerm("reverse_kl"), "top_4": OutputTerm("top_k", top_k=4)}


class FixedPrefixes:
    """Both models' states at the response positions of one batch, for repeated gradients of any loss on them.

    Args:
        student: the model that gets the gradients.
        teacher: the model to compare with.
        rollouts: the prefixes.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, rollouts: Rollouts) -> None:
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        with torch.no_grad():
            self.teacher = capture_states(teacher, rollouts, "all")
        self.student = capture_states(student, rollouts, "all")
        self.heads: tuple[LMHead, LMHead] = match_heads(lm_head_of(student), lm_head_of(teacher))
        self.weights_N = position_weights(self.student.rollout_index, len(rollouts), "token")
        with torch.no_grad():
            self.probabilities_NV = self.heads[0].event_logits(self.student.values[-1]).softmax(-1)

    def draw(self, generator: torch.Generator) -> Tensor:
        """`[N]`, a next token ~ p at every prefix."""
        return torch.multinomial(self.probabilities_NV, 1, generator=generator)[:, 0]

    def loss(self, term: OutputTerm, tokens_N: Tensor) -> Tensor:
        """Mean over positions of an output-space loss."""
        error_N = term(self.heads[0], self.student.values[-1], self.heads[1], self.teacher.values[-1], tokens_N)
        return (error_N * self.weights_N).sum()

    def representation(self) -> Tensor:
        """Eq. 6, all layers, as a token mean."""
        student, teacher = self.student, self.teacher
        return representation_loss(student.values, teacher.values, student.rollout_index, reduction="token")

    def gradient(self, loss: Tensor) -> Tensor:
        """`[P]`, double precision: of all parameters, those that the loss does not reach as zeros."""
        found = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts]).double()


def scatter(samples: Sequence[Tensor], mean: Tensor | None = None) -> dict[str, float]:
    """Unbiased |g|² of the mean gradient and trace of the covariance of one sample, from K of them.

    Args:
        samples: K ≥ 2 gradients `[P]`.
        mean: the expectation where it is known; else it is estimated, and |g|² corrected for its noise.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(f"scatter: {len(samples)} samples; it needs 2 or more")
    if mean is not None:
        trace = sum(float((s - mean).square().sum()) for s in samples) / len(samples)
        return {"g2": float(mean.square().sum()), "trace": trace}
    estimate = torch.stack(list(samples)).mean(0)
    trace = sum(float((s - estimate).square().sum()) for s in samples) / (len(samples) - 1)
    return {"g2": max(float(estimate.square().sum()) - trace / len(samples), 0.0), "trace": trace}


def state_noise(prefixes: FixedPrefixes, draws: int, generator: torch.Generator) -> dict[str, float]:
    """Theorem 1's variance of the sampled-token gradient with respect to the states that the LM head reads, twice.

    `enumerated`: Σ_t E[u²·|∇ log p|²] − |ḡ_t|², over the whole vocabulary. `drawn`: the same from `draws` redraws through the loss.
    """
    states_ND = prefixes.student.values[-1].detach().requires_grad_()
    student, teacher = prefixes.heads
    with torch.no_grad():
        log_p_NV = student.event_logits(states_ND).log_softmax(-1).double()
        log_q_NV = teacher.event_logits(prefixes.teacher.values[-1]).log_softmax(-1).double()
        p_NV, u_NV = log_p_NV.exp(), log_p_NV - log_q_NV
        weight_VD = student.weight[: student.rows].double() * student.scale
        centred_NVD = weight_VD[None] - (p_NV @ weight_VD)[:, None]  # ∇_h log p(v)
        mean_ND = ((p_NV * u_NV)[..., None] * centred_NVD).sum(1)
        second_N = (p_NV * u_NV.square() * centred_NVD.square().sum(-1)).sum(1)
        scale_N = prefixes.weights_N.double().square()
        enumerated = float(((second_N - mean_ND.square().sum(-1)) * scale_N).sum())
    exact = (mean_ND * prefixes.weights_N.double()[:, None]).reshape(-1)
    term, samples = SAMPLED["sampled_token"], []
    for _ in range(draws):
        error_N = term(student, states_ND, teacher, prefixes.teacher.values[-1], prefixes.draw(generator))
        (gradient,) = torch.autograd.grad((error_N * prefixes.weights_N).sum(), states_ND)
        samples.append(gradient.reshape(-1).double())
    return {"enumerated": enumerated, "drawn": scatter(samples, exact)["trace"]}


def at_checkpoint(prefixes: FixedPrefixes, draws: int, generator: torch.Generator) -> dict[str, Any]:
    """Every estimator's gradient at fixed prefixes: |g|², trace of its covariance, one-sample cosine, bias, mean KL."""
    none = prefixes.draw(generator)  # exact losses do not look at it
    kl = prefixes.loss(EXACT["full_reverse_kl"], none)
    exact = prefixes.gradient(kl)
    norm = float(exact.norm())
    found: dict[str, Any] = {"delta": float(kl.detach()), "states": state_noise(prefixes, 4 * draws, generator)}
    for name, term in SAMPLED.items():
        samples = [prefixes.gradient(prefixes.loss(term, prefixes.draw(generator))) for _ in range(draws)]
        cosine = sum(float(s @ exact) / (float(s.norm()) * norm) for s in samples) / draws
        found[name] = {**scatter(samples, exact), "cosine": cosine}
    for name, term in EXACT.items():
        twice = [prefixes.gradient(prefixes.loss(term, prefixes.draw(generator))) for _ in range(2)]
        bias = float((twice[0] - exact).norm()) / norm
        found[name] = {
            "g2": float(twice[0].square().sum()), "trace": float((twice[0] - twice[1]).square().sum()) / 2, "bias": bias,
        }  # fmt: skip
    twice = [prefixes.gradient(prefixes.representation()) for _ in range(2)]
    found["representation"] = {
        "g2": float(twice[0].square().sum()), "trace": float((twice[0] - twice[1]).square().sum()) / 2,
    }  # fmt: skip
    return found
