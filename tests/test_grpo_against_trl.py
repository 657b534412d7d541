"""GRPO's loss and gradients against TRL's GRPOTrainer on the same batch, to float precision.

TRL's own code runs on its side: `_generate_and_score_completions` (padding, rewards, advantages, old log-probabilities), with
completions handed to it through its `rollout_func`, and then `compute_loss`, or all of `train`.
"""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

import oprd
from oprd.models.lm_head import lm_head_of, log_probs
from oprd.objectives.policy_gradient import clipped_policy_loss, clipped_share, group_advantages
from oprd.objectives.reduction import position_weights
from oprd.types import Rollouts
from tiny import tiny_model, tiny_tokenizer, weights

trl = pytest.importorskip("trl")

QUESTIONS = ["30+4=", "6=", "100+1="]
GROUP, COMPLETIONS = 4, 12
REDUCTIONS = {"grpo": "rollout", "bnpo": "token", "dapo": "token"}  # TRL's loss_type → ours
# Graded 0/1, one group without a difference, and one with rewards of several values.
REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0, -1.0, 0.25]


@pytest.fixture(autouse=True)
def _contained(monkeypatch):
    """Nothing is reported to a hub, and what TRL's settings leave in accelerate's shared state goes no further than a test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setattr(trl.GRPOTrainer, "_send_telemetry", lambda self: None)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is an experimental feature
    shared = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    yield
    for state, content in zip(shared, before, strict=True):
        state.clear()
        state.update(content)


def batch() -> Rollouts:
    """Groups of `GROUP` rollouts of one prompt; prompts and completions of different lengths."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(0)
    prompts = [tokenizer(QUESTIONS[i // GROUP]).input_ids for i in range(COMPLETIONS)]
    lengths = torch.randint(1, 10, (COMPLETIONS,), generator=generator).tolist()
    completions = [torch.randint(3, len(tokenizer), (n,), generator=generator).tolist() for n in lengths]
    return Rollouts(prompts, completions, ["stop"] * COMPLETIONS, [""] * COMPLETIONS, list(range(COMPLETIONS)))


def trl_trainer(folder, model, trainer_class=None, **settings):
    """TRL's trainer, all of whose completions are those of `batch()`. Settings are arguments of `GRPOConfig`."""
    rollouts = batch()

    def written(prompts, trainer):
        places = [QUESTIONS.index(p) * GROUP for p in prompts]
        assert len(prompts) == COMPLETIONS
        order = [first + i % GROUP for i, first in enumerate(places)]
        return {
            "prompt_ids": [list(rollouts.prompt_ids[i]) for i in order],
            "completion_ids": [list(rollouts.completion_ids[i]) for i in order],
            "logprobs": None,
            "place": order,
        }

    def graded(prompts, completions, place, **_):
        return [REWARDS[i] for i in place]

    defaults = {
        "num_generations": GROUP, "per_device_train_batch_size": COMPLETIONS, "max_completion_length": 9, "beta": 0.0,
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.5, "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "max_steps": 1, "logging_strategy": "no",
    }  # fmt: skip
    args = trl.GRPOConfig(str(folder), **{**defaults, **settings})
    prompts = Dataset.from_list([{"prompt": p} for p in QUESTIONS])
    trainer = (trainer_class or trl.GRPOTrainer)(
        model, graded, args, prompts, processing_class=tiny_tokenizer(), rollout_func=written
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # `train` would set it
    return trainer


def scored(trainer):
    """What TRL makes of the batch: its padded ids, masks, advantages and old log-probabilities."""
    return trainer._generate_and_score_completions([{"prompt": QUESTIONS[i // GROUP]} for i in range(COMPLETIONS)])


def own_log_probs(model, rollouts: Rollouts, temperature: float = 1.0):
    """Log-probability of each response token, packed, and the rollout that each is of."""
    states = oprd.capture_states(model, rollouts, layers="last")
    tokens = torch.tensor([token for completion in rollouts.completion_ids for token in completion])
    return log_probs(lm_head_of(model), states.values[-1], tokens, temperature=temperature), states.rollout_index


def own_loss(
    model, rollouts, old, advantage_R, reduction, temperature=1.0, step_rollouts=None, step_positions=None, **clip
):
    log_p, index = own_log_probs(model, rollouts, temperature)
    weights = position_weights(
        index, len(rollouts), reduction, step_rollouts=step_rollouts, step_positions=step_positions
    )
    if log_p.dtype == torch.float64:
        weights = 1 / (1 / weights.double()).round()  # they are float32, and 1 over a whole number
    loss = (clipped_policy_loss(log_p, old, advantage_R[index], **clip) * weights).sum()
    return loss, clipped_share(log_p, old, advantage_R[index], **clip), index


def moved(model, size: float) -> None:
    """Put the policy at some distance from the one that the old log-probabilities are of."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(ours, theirs, relative):
    """Every parameter's gradient, relative to its own length."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert theirs[name].norm() > 0, name
        error = float((gradient - theirs[name]).norm() / theirs[name].norm())
        assert error < relative, f"{name}: {error:.2e}"


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages(tmp_path, scale):
    theirs = scored(trl_trainer(tmp_path, tiny_model(), scale_rewards=scale))["advantages"]
    ours = group_advantages(torch.tensor(REWARDS), GROUP, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert ours[GROUP : 2 * GROUP].tolist() == [0] * GROUP


@pytest.mark.parametrize(
    ("temperature", "epsilon", "epsilon_high", "distance"),
    [(1.0, 0.2, None, None), (0.7, 0.2, 0.28, 0.04), (1.3, 0.1, 0.3, 0.1)],
    ids=["first_update", "clipped", "clipped_much"],
)
@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_loss_and_gradients(tmp_path, family, loss_type, temperature, epsilon, epsilon_high, distance):
    model, rollouts = tiny_model(family), batch()
    trainer = trl_trainer(
        tmp_path, model, loss_type=loss_type, temperature=temperature, epsilon=epsilon, epsilon_high=epsilon_high,
        num_iterations=1 if distance is None else 2,
    )  # fmt: skip
    inputs = scored(trainer)
    old = None
    if distance is not None:
        with torch.no_grad():
            old, _ = own_log_probs(model, rollouts, temperature)
        theirs = inputs["old_per_token_logps"][inputs["completion_mask"].bool()]
        torch.testing.assert_close(old, theirs, rtol=1e-5, atol=1e-6)
        moved(model, distance)
    assert ("old_per_token_logps" in inputs) is (old is not None)
    their_loss = trainer.compute_loss(model, inputs)
    theirs = gradients(their_loss, model)
    loss, share, index = own_loss(
        model, rollouts, old, group_advantages(torch.tensor(REWARDS), GROUP), REDUCTIONS[loss_type], temperature,
        epsilon=epsilon, epsilon_high=epsilon_high,
    )  # fmt: skip
    # Absolute: advantages are of size 1, and at ρ = 1 they cancel out in the mean of "grpo".
    torch.testing.assert_close(loss, their_loss, rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(loss, model), theirs, 2e-5)

    metrics = trainer._metrics["train"]
    assert float(share.mean()) == pytest.approx(metrics["clip_ratio/region_mean"][-1], abs=1e-6)
    positive = group_advantages(torch.tensor(REWARDS), GROUP)[index] > 0
    assert float((share * positive).mean()) == pytest.approx(metrics["clip_ratio/high_mean"][-1], abs=1e-6)
    assert float((share * ~positive).mean()) == pytest.approx(metrics["clip_ratio/low_mean"][-1], abs=1e-6)
    cut = [metrics[f"clip_ratio/{side}_mean"][-1] for side in ("low", "high")]
    assert (min(cut) > 0.02) if old is not None else cut == [0, 0]


class _InDoublePrecision(trl.GRPOTrainer):
    """TRL's fused head computes in float32 whatever the model's dtype; this one is plain log_softmax. The loss stays TRL's."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *_, **__):
        # positions counted from the first real token: float32 rotary angles of shifted ones differ by 1e-7
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        log_p = (logits / self.temperature).log_softmax(-1)[:, -logits_to_keep - 1 : -1]
        own = log_p.gather(-1, input_ids[:, -logits_to_keep:, None])[..., 0]
        return own, -(log_p.exp() * log_p).sum(-1), None


@pytest.mark.parametrize("distance", [None, 0.1], ids=["first_update", "clipped"])
@pytest.mark.parametrize("loss_type", REDUCTIONS)
def test_loss_and_gradients_in_double_precision(tmp_path, loss_type, distance):
    model, rollouts = tiny_model(dtype=torch.float64), batch()
    trainer = trl_trainer(
        tmp_path, model, _InDoublePrecision, loss_type=loss_type, temperature=0.7, epsilon=0.2, epsilon_high=0.28,
        num_iterations=1 if distance is None else 2,
    )  # fmt: skip
    inputs = scored(trainer)
    advantage = group_advantages(torch.tensor(REWARDS, dtype=torch.float64), GROUP)
    inputs["advantages"] = advantage  # TRL's are float32
    old = None
    if distance is not None:
        with torch.no_grad():
            old, _ = own_log_probs(model, rollouts, 0.7)
        moved(model, distance)
    their_loss = trainer.compute_loss(model, inputs)
    theirs = gradients(their_loss, model)
    loss, share, _ = own_loss(
        model, rollouts, old, advantage, REDUCTIONS[loss_type], 0.7, epsilon=0.2, epsilon_high=0.28
    )
    torch.testing.assert_close(loss, their_loss, rtol=1e-9, atol=1e-9)
    assert_same_gradients(gradients(loss, model), theirs, 1e-9)
    assert (share.sum() > 0) == (old is not None)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_whole_runs_end_at_the_same_weights(tmp_path, loss_type, accumulation):
    """Two sets of rollouts, two updates on each, by `train` of TRL and by a loop of ours. What is the same is the movement."""
    model, rollouts, advantage = tiny_model(), batch(), group_advantages(torch.tensor(REWARDS), GROUP)
    start = weights(model)
    tokens = sum(rollouts.completion_lengths)
    optimizer, cut = torch.optim.SGD(model.parameters(), lr=2.0), []
    for _ in range(2):
        with torch.no_grad():
            old, index = own_log_probs(model, rollouts)
        for _ in range(2):
            for first in range(0, COMPLETIONS, COMPLETIONS // accumulation):
                part = list(range(first, first + COMPLETIONS // accumulation))
                loss, share, _ = own_loss(
                    model, rollouts.select(part), old[torch.isin(index, torch.tensor(part))], advantage[part],
                    REDUCTIONS[loss_type], step_rollouts=COMPLETIONS, step_positions=tokens,
                )  # fmt: skip
                loss.backward()
                cut.append(float(share.sum()))
            optimizer.step()
            optimizer.zero_grad()
    ours = weights(model)

    other = tiny_model()
    trainer = trl_trainer(
        tmp_path, other, loss_type=loss_type, num_iterations=2, max_steps=4, learning_rate=2.0,
        per_device_train_batch_size=COMPLETIONS // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer.train()
    assert sum(cut) > 0
    for name, value in weights(other).items():
        moved_by = (value - start[name]).norm()
        error = float((ours[name] - value).norm() / moved_by)
        assert error < 1e-3, f"{name}: {error:.2e}"


def test_trls_bnpo_is_the_token_mean_of_a_micro_batch_not_of_the_step(tmp_path):
    """Why "token" here is TRL's "dapo" where gradients are accumulated."""
    from trl.trainer.utils import split_tensor_dict

    model, rollouts, advantage = tiny_model(), batch(), group_advantages(torch.tensor(REWARDS), GROUP)
    whole = gradients(own_loss(model, rollouts, None, advantage, "token")[0], model)
    for loss_type, same in (("dapo", True), ("bnpo", False)):
        trainer = trl_trainer(
            tmp_path, model, loss_type=loss_type, per_device_train_batch_size=COMPLETIONS // 3,
            gradient_accumulation_steps=3,
        )  # fmt: skip
        parts = split_tensor_dict(scored(trainer), 3)
        theirs = gradients(sum(trainer.compute_loss(model, part) for part in parts), model)
        if same:
            assert_same_gradients(whole, theirs, 2e-5)
        else:
            assert all((whole[n] - g).norm() > 0.02 * g.norm() for n, g in theirs.items())
