"""GRPO: policy gradient on a verifiable reward (DeepSeekMath, arXiv 2402.03300), as a term beside distillation.

Pure functions: rewards `[R]` to advantages `[R]`, then per-position values `[N]`, unreduced. `reduction.position_weights` reduces
them to a loss: "rollout" first averages over the tokens of a rollout (GRPO as published; TRL's loss_type "grpo"), "token" averages
over all tokens of the step (DAPO, arXiv 2503.14476; TRL's "dapo").

Notation: p is the policy being updated, p_old the policy that sampled the rollouts, A the advantage, ρ = p(ŷ)/p_old(ŷ) at one
position. There is no KL term; `output_space` has the KL terms of distillation.

    advantage_R = group_advantages(rewards_R, group_size=8)
    log_p_N = log_probs(lm_head_of(model), states.values[-1], tokens_N, temperature=sampling_temperature)
    loss_N = clipped_policy_loss(log_p_N, None, advantage_R[states.rollout_index])
    loss = (loss_N * position_weights(states.rollout_index, states.num_rollouts)).sum()
"""

from __future__ import annotations

from math import log1p
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Scale = Literal["group", "none"]

# TRL's value. In a group with equal rewards it avoids 0/0 and keeps rounding errors from becoming advantages of size 1.
_STD_FLOOR = 1e-4


@torch.no_grad()
def group_advantages(rewards_R: Float[Tensor, " R"], group_size: int, scale: Scale = "group") -> Float[Tensor, " R"]:
    """Advantage of each rollout over the other rollouts of its prompt.

    "group" (DeepSeekMath): A = (r − mean)/(std + 1e-4) over the rollout's group, with the unbiased std (divided by G − 1) and
    TRL's 1e-4, so A lies within ±(G − 1)/√G. "none" (Dr. GRPO, arXiv 2503.20783): A = r − mean, which does not weight prompts by
    difficulty. If all rewards of a group are equal, A = 0 and the group gives no gradient.

    The mean includes the rollout's own reward. With "none", the expected gradient is therefore (G − 1)/G times that of the
    expected reward. With "group" its direction differs, unless rewards take only two values.

    Args:
        rewards_R: `[R]`, with the `group_size` rollouts of a prompt next to each other.
        group_size: G, rollouts per prompt.
        scale: "group" or "none".

    Returns:
        `[R]`, float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: the scale is unknown, G is below 2, R is not a multiple of G, or a reward is not finite.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale: {scale!r} is not one of {', '.join(get_args(Scale))}")
    if group_size < 2:
        raise ValueError(
            f"group_size: {group_size} is below 2; an advantage compares the rollouts of a prompt: sample more"
        )
    if len(rewards_R) % group_size:
        raise ValueError(
            f"group_size: {len(rewards_R)} rewards are not a multiple of {group_size}; "
            "pass every rollout of every prompt, the rollouts of a prompt one after another"
        )
    bad = (~rewards_R.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ValueError(
            f"rewards_R: {len(bad)} of {len(rewards_R)} are not finite (nan means ungraded), the first at {bad[0]}; "
            "leave out the groups they are in or give them a reward, such as 0"
        )
    rewards_PG = rewards_R.to(torch.promote_types(rewards_R.dtype, torch.float32)).reshape(-1, group_size)
    advantage_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if scale == "group":
        std_P1 = (advantage_PG.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
        advantage_PG = advantage_PG / (std_P1 + _STD_FLOOR)
    return advantage_PG.reshape(-1)


def clipped_policy_loss(
    log_p_N: Float[Tensor, " N"],
    old_log_p_N: Float[Tensor, " N"] | None,
    advantage_N: Float[Tensor, " N"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, " N"]:
    """Clipped surrogate −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)·A), ρ = exp(log p − log p_old) (from PPO, as in GRPO).

    The gradient is −A·ρ·∇log p. It is 0 where ρ is past the clip in the direction of A: above 1 + ε_high for A > 0, below
    1 − ε for A < 0. The opposite side is not clipped.

    At ρ = 1 the value is −A and the gradient is that of REINFORCE, −A·∇log p. The advantages of a group sum to 0, so this
    value does not show progress; watch the reward.

    Args:
        log_p_N: `[N]`, log p(ŷ) of the sampled tokens, at the sampling temperature; gets the gradient.
        old_log_p_N: `[N]`, log p_old(ŷ) from before the first update on these rollouts; gets no gradient. None on the first
            update: ρ = exp(log p − sg(log p)) = 1, with gradient.
        advantage_N: `[N]`, the advantage of each position's rollout, `advantage_R[rollout_index]`; gets no gradient.
        epsilon: ε, the clip below 1.
        epsilon_high: ε_high, the clip above 1 (DAPO's clip-higher: 0.28 with ε = 0.2). Default: ε.

    Returns:
        `[N]`, in the dtype of the arguments.

    Raises:
        ValueError: ε is not between 0 and 1, ε_high is not above 0, or the shapes differ.
    """
    log_ratio_N, low, high = _log_ratio(log_p_N, old_log_p_N, advantage_N, epsilon, epsilon_high)
    advantage_N = advantage_N.detach()
    # For A ≥ 0 the minimum is A·min(ρ, 1 + ε_high), else A·max(ρ, 1 − ε). Clip the logarithm, not ρ: if exp overflowed, the
    # branch that min() discards would contribute 0·inf = nan to the gradient.
    clipped_N = torch.where(advantage_N < 0, log_ratio_N.clamp(min=low), log_ratio_N.clamp(max=high))
    return -advantage_N * clipped_N.exp()


@torch.no_grad()
def clipped_share(
    log_p_N: Float[Tensor, " N"],
    old_log_p_N: Float[Tensor, " N"] | None,
    advantage_N: Float[Tensor, " N"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, " N"]:
    """1 where `clipped_policy_loss` is clipped and has no gradient, else 0. A metric; its token mean is TRL's clip_ratio.

    Clipped means ρ < 1 − ε with A < 0, or ρ > 1 + ε_high with A > 0. All 0 on the first update. Arguments as in
    `clipped_policy_loss`.

    Returns:
        `[N]`, without gradient.

    Raises:
        ValueError: as `clipped_policy_loss`.
    """
    log_ratio_N, low, high = _log_ratio(log_p_N, old_log_p_N, advantage_N, epsilon, epsilon_high)
    cut_N = ((log_ratio_N < low) & (advantage_N < 0)) | ((log_ratio_N > high) & (advantage_N > 0))
    return cut_N.to(log_ratio_N.dtype)


def check_clip(epsilon: float, epsilon_high: float | None = None) -> None:
    """Check the clip range.

    Raises:
        ValueError: ε is not between 0 and 1, or ε_high is not above 0.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon: {epsilon} is not between 0 and 1, both excluded; 0.2 is usual")
    if epsilon_high is not None and not epsilon_high > 0:
        raise ValueError(f"epsilon_high: {epsilon_high} is not above 0; 0.28 is usual, None takes epsilon")


def _log_ratio(
    log_p_N: Tensor, old_log_p_N: Tensor | None, advantage_N: Tensor, epsilon: float, epsilon_high: float | None
) -> tuple[Tensor, float, float]:
    """Log ρ, and the logarithms of 1 − ε and 1 + ε_high."""
    check_clip(epsilon, epsilon_high)
    old_log_p_N = log_p_N if old_log_p_N is None else old_log_p_N
    if not log_p_N.shape == old_log_p_N.shape == advantage_N.shape:
        raise ValueError(
            f"log_p_N {tuple(log_p_N.shape)}, old_log_p_N {tuple(old_log_p_N.shape)} and advantage_N "
            f"{tuple(advantage_N.shape)} must have the same shape; expand advantages of rollouts to positions with "
            "advantage_R[rollout_index]"
        )
    return log_p_N - old_log_p_N.detach(), log1p(-epsilon), log1p(epsilon if epsilon_high is None else epsilon_high)
