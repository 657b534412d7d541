"""GRPO's advantages and clipped surrogate: numbers by hand, gradients, both sides of the clip, expectations by enumeration."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.objectives.batch import Batch
from oprd.objectives.policy_gradient import clipped_policy_loss, clipped_share, group_advantages
from oprd.objectives.reduction import position_weights
from oprd.types import Rollouts


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def literal(log_p, old, advantage, low, high):
    """The formula as it is printed."""
    ratio = (log_p - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


# --- advantages


def test_advantages_by_hand():
    rewards = doubles(1, 0, 0, 1, 3, 1, 2, 2)  # means ½ and 2; Σ(r − mean)² = 1 and 2, over G − 1 = 3
    assert group_advantages(rewards, 4, "none").tolist() == [0.5, -0.5, -0.5, 0.5, 1, -1, 0, 0]
    first, second = math.sqrt(1 / 3) + 1e-4, math.sqrt(2 / 3) + 1e-4
    expected = [0.5 / first, -0.5 / first, -0.5 / first, 0.5 / first, 1 / second, -1 / second, 0, 0]
    assert group_advantages(rewards, 4).tolist() == pytest.approx(expected, rel=1e-12)


def test_advantages_of_a_batch_and_none_where_a_rollout_was_not_graded():
    rollouts = Rollouts([[3]] * 4, [[4]] * 4, ["stop"] * 4, [""] * 4, [0, 0, 1, 1])
    batch = Batch(rollouts, [True, False, 0.25, 0.25]).with_advantages(2, "none")
    assert batch.advantages == [0.5, -0.5, 0, 0]
    assert batch.zero_advantage_share == 0.5
    assert batch.select([1, 3]).advantages == [-0.5, 0]
    with pytest.raises(ValueError, match="1 of 4 are not finite"):
        Batch(rollouts, [True, False, None, 0.5]).with_advantages(2, "none")


def test_a_group_without_a_difference_has_nothing_to_learn_from():
    for scale in ("group", "none"):
        assert group_advantages(torch.tensor([1.0, 1, 1, 0, 0, 0]), 3, scale).tolist() == [0] * 6
        assert group_advantages(torch.zeros(0), 3, scale).shape == (0,)
    assert group_advantages(torch.full((3,), 0.1), 3).abs().max() < 1e-3  # 0.1 is rounded; the 1e-4 keeps that small


def test_advantages_are_float32_or_better_and_have_no_gradient():
    assert group_advantages(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), 2).dtype == torch.float32
    advantage = group_advantages(doubles(1, 0).requires_grad_(), 2)
    assert advantage.dtype == torch.float64
    assert not advantage.requires_grad


GROUPS = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.integers(-9, 9), min_size=size, max_size=size), min_size=1, max_size=4)
)


@given(groups=GROUPS, shift=st.floats(-100, 100), factor=st.floats(0.5, 100), scale=st.sampled_from(["group", "none"]))
def test_what_advantages_do_not_depend_on(groups, shift, factor, scale):
    size, rewards = len(groups[0]), torch.tensor(groups, dtype=torch.float64).flatten()
    ours = group_advantages(rewards, size, scale)
    torch.testing.assert_close(group_advantages(rewards + shift, size, scale), ours, rtol=1e-9, atol=1e-9)
    scaled = group_advantages(rewards * factor, size, scale)
    if scale == "group":  # up to the 1e-4: std is at least 0.4 here where it is not 0
        torch.testing.assert_close(scaled, ours, rtol=3e-4, atol=1e-9)
        assert ours.abs().max() < (size - 1) / math.sqrt(size)
    else:
        torch.testing.assert_close(scaled, ours * factor, rtol=1e-9, atol=1e-9)
    assert ours.reshape(-1, size).sum(1).abs().max() < 1e-9
    order = torch.randperm(size)
    shuffled = group_advantages(rewards.reshape(-1, size)[:, order].flatten(), size, scale)
    torch.testing.assert_close(shuffled.reshape(-1, size), ours.reshape(-1, size)[:, order], rtol=1e-9, atol=1e-9)
    alone = [group_advantages(torch.tensor(g, dtype=torch.float64), size, scale) for g in groups]
    torch.testing.assert_close(torch.cat(alone), ours, rtol=1e-12, atol=1e-12)


# --- the surrogate


def test_the_surrogate_by_hand():
    ratio = doubles(1.5, 1.5, 0.5, 0.5, 1.1, 1.25, 0.7)
    advantage = doubles(2, -2, 2, -2, -2, 2, -3)
    # clipped to 1.2; followed; followed; clipped to 0.8; followed; clipped, or under 1.28 not; clipped to 0.8
    loss = clipped_policy_loss(ratio.log(), doubles(*[0] * 7), advantage)
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6, 2.2, -2.4, 2.4], rel=1e-12)
    loss = clipped_policy_loss(ratio.log(), doubles(*[0] * 7), advantage, epsilon_high=0.28)
    assert loss.tolist() == pytest.approx([-2.56, 3.0, -1.0, 1.6, 2.2, -2.5, 2.4], rel=1e-12)
    loss = clipped_policy_loss(ratio.log(), doubles(*[0] * 7), advantage, epsilon=0.4, epsilon_high=0.2)
    assert loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.2, 2.2, -2.4, 2.1], rel=1e-12)
    share = clipped_share(ratio.log(), doubles(*[0] * 7), advantage, epsilon=0.2, epsilon_high=0.28)
    assert share.tolist() == [1, 0, 0, 1, 0, 0, 1]


@given(
    seed=st.integers(0, 10**6),
    epsilon=st.floats(0.01, 0.9),
    epsilon_high=st.none() | st.floats(0.01, 5),
    spread=st.floats(0.01, 2),
)
def test_the_surrogate_is_the_printed_formula(seed, epsilon, epsilon_high, spread):
    generator = torch.Generator().manual_seed(seed)
    log_p, old, advantage = torch.randn(3, 50, generator=generator, dtype=torch.float64) * spread
    advantage[:5] = 0
    log_p.requires_grad_()
    high = epsilon if epsilon_high is None else epsilon_high
    ours = clipped_policy_loss(log_p, old, advantage, epsilon=epsilon, epsilon_high=epsilon_high)
    printed = literal(log_p, old, advantage, epsilon, high)
    torch.testing.assert_close(ours, printed, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours.sum(), log_p)
    torch.testing.assert_close(gradient, *torch.autograd.grad(printed.sum(), log_p), rtol=1e-12, atol=1e-12)
    share = clipped_share(log_p, old, advantage, epsilon=epsilon, epsilon_high=epsilon_high)
    assert torch.equal(share == 1, (gradient == 0) & (advantage != 0))  # cut is where a gradient was taken away


def test_the_clip_cuts_one_side_of_each_sign():
    log_p = doubles(2, -2, 2, -2).requires_grad_()
    advantage, old = doubles(1, 1, -1, -1), doubles(0, 0, 0, 0)
    loss = clipped_policy_loss(log_p, old, advantage)
    (gradient,) = torch.autograd.grad(loss.sum(), log_p)
    up, down = math.exp(2), math.exp(-2)
    # A > 0: no reason left to raise a token that has been raised; one that has fallen is pulled back. A < 0: the reverse.
    assert gradient.tolist() == pytest.approx([0, -down, up, 0], rel=1e-12)
    assert clipped_share(log_p, old, advantage).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("first_update", [True, False])
def test_gradients_by_finite_differences(first_update):
    generator = torch.Generator().manual_seed(0)
    log_p, advantage = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    old = log_p + 0.3 * torch.randn(30, generator=generator, dtype=torch.float64)
    log_p.requires_grad_()
    if (
        first_update
    ):  # its ρ is 1 everywhere, so what its gradient is the derivative of is the ratio to where log p is now
        here = log_p.detach().clone()
        torch.testing.assert_close(
            torch.autograd.grad(clipped_policy_loss(log_p, None, advantage).sum(), log_p),
            torch.autograd.grad(clipped_policy_loss(log_p, here, advantage).sum(), log_p),
            rtol=0, atol=0,
        )  # fmt: skip
        old = here
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantage), (log_p,))
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old, advantage, epsilon=0.1, epsilon_high=0.3), (log_p,)
    )


def test_the_first_update_is_reinforce():
    advantage = doubles(2, -1, 0.5, 0)
    log_p = doubles(-1, -2, -0.1, -5).requires_grad_()
    loss = clipped_policy_loss(log_p, None, advantage)
    assert torch.equal(loss, -advantage)
    (gradient,) = torch.autograd.grad(loss.sum(), log_p)
    assert torch.equal(gradient, *torch.autograd.grad((-advantage * log_p).sum(), log_p))
    assert torch.equal(clipped_share(log_p, None, advantage), torch.zeros(4, dtype=torch.float64))


def test_old_log_probabilities_and_advantages_get_no_gradient():
    log_p, old, advantage = (torch.randn(5, requires_grad=True) for _ in range(3))
    clipped_policy_loss(log_p, old, advantage).sum().backward()
    assert log_p.grad is not None
    assert old.grad is None
    assert advantage.grad is None
    assert not clipped_share(log_p, old, advantage).requires_grad


def test_ratios_out_of_range_leave_finite_gradients_where_they_are_clipped():
    log_p = torch.tensor([0.0, -1e4, -1e4], requires_grad=True)  # ρ: above float32's range, 0, 0
    old, advantage = torch.tensor([-1e4, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    loss = clipped_policy_loss(log_p, old, advantage)
    assert loss.tolist() == pytest.approx([-1.2, 0, 0.8])
    loss.sum().backward()
    assert log_p.grad.tolist() == [0, 0, 0]
    no_advantage = clipped_policy_loss(log_p, old, torch.zeros(3))
    assert no_advantage.tolist() == [0, 0, 0]
    assert torch.autograd.grad(no_advantage.sum(), log_p)[0].tolist() == [0, 0, 0]


# --- expectations, by going through every set of rollouts that could be drawn

VOCAB, END = 3, 0
# Texts of at most two tokens; END ends one. So lengths differ.
TEXTS = [(END,), *[(first, second) for first in (1, 2) for second in range(VOCAB)]]


def policy(seed: int = 0, sharpness: float = 1.0):
    """Logits of the first token and of the second given the first, for every text: its tokens' log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = (sharpness * torch.randn(VOCAB + 1, VOCAB, generator=generator, dtype=torch.float64)).requires_grad_()
    log_p = logits.log_softmax(-1)
    return logits, [torch.stack([log_p[0, t[0]], *(log_p[1 + t[0], x] for x in t[1:])]) for t in TEXTS]


def expected_reward_gradient(logits, log_p_of, rewards):
    return torch.autograd.grad(
        sum(log_p.sum().exp() * r for log_p, r in zip(log_p_of, rewards, strict=True)), logits, retain_graph=True
    )[0]


def expected_gradient(logits, log_p_of, rewards, group_size, scale, reduction):
    """−E[gradient of the loss] over all groups of `group_size` texts, the first update on each. Order makes no difference."""
    total = logits.new_zeros(())
    for drawn in itertools.combinations_with_replacement(range(len(TEXTS)), group_size):
        advantage = group_advantages(rewards[list(drawn)], group_size, scale)
        index = torch.cat([torch.full((len(TEXTS[d]),), i) for i, d in enumerate(drawn)])
        loss = clipped_policy_loss(torch.cat([log_p_of[d] for d in drawn]), None, advantage[index])
        weight = 1 / group_size if reduction == "sum" else position_weights(index, group_size, reduction).double()
        orders = math.factorial(group_size) / math.prod(math.factorial(drawn.count(d)) for d in set(drawn))
        probability = orders * sum(log_p_of[d].sum().detach() for d in drawn).exp()
        total = total + probability * (loss * weight).sum()
    return -torch.autograd.grad(total, logits, retain_graph=True)[0]


def cosine(a, b):
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_the_expected_first_update_climbs_the_expected_reward(group_size):
    # Holds exactly for A = r − mean and the sum over a rollout's tokens, times (G − 1)/G: E[r_i ∇log p(y_i)] is ∇E[r], and of
    # the mean only its own share r_i/G depends on y_i; the others' part has expectation 0.
    logits, log_p_of = policy()
    rewards = doubles(0.3, 1, -2, 0, 0.5, 4, 1)
    exact = expected_reward_gradient(logits, log_p_of, rewards)
    ours = expected_gradient(logits, log_p_of, rewards, group_size, "none", "sum")
    torch.testing.assert_close(ours, (group_size - 1) / group_size * exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("reduction", "at_most"), [("rollout", 0.985), ("token", 0.9995)])
def test_dividing_by_lengths_changes_the_direction(reduction, at_most):
    # The length bias that Dr. GRPO names: both means divide by lengths that were drawn together with the rewards, "rollout" by
    # the rollout's own, "token" by that of all, which depends on it less.
    logits, log_p_of = policy(sharpness=0.1)
    rewards = doubles(1, 0, 0, 1, 0, 0, 1)
    exact = expected_reward_gradient(logits, log_p_of, rewards)
    assert 0.9 < cosine(expected_gradient(logits, log_p_of, rewards, 2, "none", reduction), exact) < at_most


def test_dividing_by_the_groups_std_reweighs_prompts_and_bends_the_direction():
    # With two reward values the direction is that of ∇E[r], but its length depends on how hard the prompt is: largest where
    # one of the two is rare. With more values it is another direction.
    factors, success = [], []
    for sharpness in (0.1, 3.0):
        logits, log_p_of = policy(sharpness=sharpness)
        right = doubles(0, 1, 1, 0, 0, 0, 0)
        exact = expected_reward_gradient(logits, log_p_of, right)
        ours = expected_gradient(logits, log_p_of, right, 4, "group", "sum")
        assert cosine(ours, exact) == pytest.approx(1, abs=1e-9)
        factors.append(float(ours.norm() / exact.norm()))
        success.append(sum(log_p_of[i].sum().exp().item() for i in (1, 2)))
    assert success[1] < 0.01 < 0.2 < success[0]
    assert factors[1] / factors[0] > 1.04
    logits, log_p_of = policy()
    several = doubles(0.3, 1, -2, 0, 0.5, 9, 1)
    bent = expected_gradient(logits, log_p_of, several, 4, "group", "sum")
    assert cosine(bent, expected_reward_gradient(logits, log_p_of, several)) < 0.95


# --- settings


def test_bad_arguments_are_refused():
    x = doubles(0, 0, 0)
    advantages, loss, share = (inspect.unwrap(f) for f in (group_advantages, clipped_policy_loss, clipped_share))
    for message, call in {
        "scale: 'batch' is not one of group, none": lambda: advantages(x, 3, "batch"),
        "group_size: 1 is below 2": lambda: advantages(x, 1),
        "group_size: 3 rewards are not a multiple of 2; pass every rollout": lambda: advantages(x, 2),
        "rewards_R: 2 of 3 are not finite .nan means ungraded., the first at 1; leave out": lambda: advantages(
            doubles(0, math.nan, math.inf), 3
        ),
        "epsilon: 0 is not between 0 and 1": lambda: loss(x, x, x, epsilon=0),
        "epsilon: 1.0 is not between 0 and 1": lambda: share(x, x, x, epsilon=1.0),
        "epsilon: nan is not between 0 and 1": lambda: loss(x, x, x, epsilon=math.nan),
        "epsilon_high: 0.0 is not above 0": lambda: loss(x, None, x, epsilon_high=0.0),
        r"advantage_N \(1,\) must have the same shape; .* advantage_R\[rollout_index\]": lambda: loss(x, None, x[:1]),
        r"old_log_p_N \(2,\)": lambda: share(x, x[:2], x),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
