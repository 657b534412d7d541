"""Methods of transformers' Trainer, and of TRL's trainers, that a subclass may override and that are never called here."""

from __future__ import annotations

_LOSS = "the loss is a sum of terms: give objectives={name: Term(…)} (docs/extend.md), or override training_step"
_EVALUATION = (
    "evaluate samples completions and grades them: give a task or reward_funcs (docs/extend.md), or override evaluate"
)
_BATCH = "a batch is a list of prompts, which the rollout engine completes: override training_step"
_ROLLOUTS = "completions come from the rollout engine: give rollout_engine=… (docs/extend.md)"
_REWARDS = "rewards come from functions: give reward_funcs=[…] (docs/extend.md)"

NOT_CALLED = {
    **dict.fromkeys(
        ("compute_loss", "compute_loss_context_manager", "autocast_smart_context_manager", "_compute_loss"), _LOSS
    ),
    **dict.fromkeys(
        ("prediction_step", "evaluation_loop", "predict", "get_eval_dataloader", "get_test_dataloader", "_get_eval_sampler"),
        _EVALUATION,
    ),
    **dict.fromkeys(("_prepare_input", "_prepare_inputs", "_get_num_items_in_batch"), _BATCH),
    **dict.fromkeys(("_generate", "_generate_and_score_completions", "generate_on_policy_outputs"), _ROLLOUTS),
    "_calculate_rewards": _REWARDS,
}  # fmt: skip
"""Method → what to do instead. Those of TRL's trainers do not exist here."""


def refuse_overrides(kind: type, base: type) -> None:
    """Refuse a subclass whose method would never be called.

    Args:
        kind: the subclass, or `base` itself.
        base: the trainer.

    Raises:
        ValueError: names the method and what to do instead.
    """
    for name, instead in NOT_CALLED.items():
        if getattr(kind, name, None) is not getattr(base, name, None):
            raise ValueError(f"{kind.__name__}.{name} would never be called: {instead}")
