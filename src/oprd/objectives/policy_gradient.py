"""GRPO: the policy gradient on a verifiable reward (DeepSeekMath, arXiv 2402.03300), a term to train beside distillation.

Pure functions, unreduced: rewards `[R]` to advantages `[R]`, then one value a packed response position, `[N]` in and out.
`reduction.position_weights` turns those into a loss: "rollout" averages the tokens of a rollout first (GRPO as published; TRL's
loss_type "grpo"), "token" averages over all tokens of the step (DAPO, arXiv 2503.14476; TRL's "dapo").

p is the policy that is being updated, p_old the one that wrote the rollouts, A the advantage, ρ = p(ŷ)/p_old(ŷ) at one position.
There is no KL term here: distillation has its own, in `output_space`.

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

# TRL's. Keeps 0/0 out of a group whose rewards are all the same, and rounding from becoming advantages of size 1 there.
_STD_FLOOR = 1e-4


@torch.no_grad()
def group_advantages(rewards_R: Float[Tensor, " R"], group_size: int, scale: Scale = "group") -> Float[Tensor, " R"]:
    """How much better a rollout did than the others on its prompt.

    "group" (DeepSeekMath): A = (r − mean)/(std + 1e-4) over the rollout's group, with the unbiased std (divided by G − 1) and
    the 1e-4 of TRL, so |A| < (G − 1)/√G. "none" (Dr. GRPO, arXiv 2503.20783): A = r − mean,
    which does not weigh prompts by how hard they are. A group whose rewards are all the same has A = 0: nothing to learn from.

    The mean contains the rollout's own reward, so the expected gradient with "none" is (G − 1)/G times that of the expected
    reward; with "group" it is a different direction, unless rewards take two values.

    Args:
        rewards_R: `[R]`, group after group: the rollouts of one prompt are neighbours, `group_size` of them.
        group_size: rollouts a prompt, G.
        scale: "group" or "none".

    Returns:
        `[R]`, float32 (float64 for float64 rewards), without gradient.

    Raises:
        ValueError: unknown scale, a group of fewer than 2, rewards that are not whole groups, a reward that is not finite.
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale: {scale!r} is not one of {', '.join(get_args(Scale))}")
    if group_size < 2:
        raise ValueError(f"group_size: {group_size} is below 2; one rollout has nothing to be better than: sample more")
    if len(rewards_R) % group_size:
        raise ValueError(
            f"group_size: {len(rewards_R)} rewards are not whole groups of {group_size}; "
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
    """The clipped surrogate −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)·A), ρ = exp(log p − log p_old) (PPO's, as GRPO uses it).

    Its gradient is −A·ρ·∇log p, and 0 where ρ has already gone past the clip in the direction A asks for: above 1 + ε_high
    for A > 0, below 1 − ε for A < 0. On the other side nothing is clipped, however far ρ has gone.

    At ρ = 1 its value is −A and its gradient REINFORCE's, −A·∇log p. As the A of a group add up to 0, such a value says nothing
    about progress; the reward does.

    Args:
        log_p_N: log p(ŷ) of the sampled tokens; gets the gradient. At the temperature of the sampling.
        old_log_p_N: log p_old(ŷ) from before the first update on these rollouts; no gradient. None: this is that first
            update, so ρ = exp(log p − sg(log p)) = 1, with gradient.
        advantage_N: A of the rollout whose each position is, `advantage_R[rollout_index]`; no gradient.
        epsilon: ε, how far below 1 a ratio is still followed.
        epsilon_high: the same above 1 (clip-higher of DAPO, which takes 0.28 with ε = 0.2). Default: ε.

    Returns:
        `[N]`, in the dtype of its arguments.

    Raises:
        ValueError: ε not between 0 and 1, ε_high not above 0, shapes differ.
    """
    log_ratio_N, low, high = _log_ratio(log_p_N, old_log_p_N, advantage_N, epsilon, epsilon_high)
    advantage_N = advantage_N.detach()
    # For A ≥ 0 the minimum is A·min(ρ, 1 + ε_high), else A·max(ρ, 1 − ε). Clipping the logarithm, before exp, rather than ρ:
    # an exp that overflowed would send 0·inf = nan back through the side that min() did not choose.
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
    """1 where the clip of `clipped_policy_loss` takes the gradient away, else 0; a metric (its token mean: TRL's clip_ratio).

    Arguments as there. That is ρ < 1 − ε with A < 0, or ρ > 1 + ε_high with A > 0; all 0 on the first update.

    Raises:
        ValueError: as `clipped_policy_loss`.
    """
    log_ratio_N, low, high = _log_ratio(log_p_N, old_log_p_N, advantage_N, epsilon, epsilon_high)
    cut_N = ((log_ratio_N < low) & (advantage_N < 0)) | ((log_ratio_N > high) & (advantage_N > 0))
    return cut_N.to(log_ratio_N.dtype)


def check_clip(epsilon: float, epsilon_high: float | None = None) -> None:
    """Refuse clip ranges that clip nothing or everything.

    Raises:
        ValueError: ε not between 0 and 1, ε_high not above 0.
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
            f"{tuple(advantage_N.shape)} must have the same shape; advantages of rollouts become those of positions by "
            "advantage_R[rollout_index]"
        )
    return log_p_N - old_log_p_N.detach(), log1p(-epsilon), log1p(epsilon if epsilon_high is None else epsilon_high)
