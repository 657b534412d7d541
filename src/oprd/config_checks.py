"""Checks of the settings that say what is minimised; `OPRDConfig` calls them before anything is loaded."""

from __future__ import annotations

from typing import Any, get_args

from oprd.objectives.policy_gradient import Scale, check_clip
from oprd.objectives.reduction import Reduction
from oprd.objectives.schedules import check_weight, is_on
from oprd.states.layers import LAYERS
from oprd.states.positions import check_end_of_turn, check_positions


def check_at_least_one(config: Any, name: str) -> None:
    """Refuse a count below 1; None passes.

    Raises:
        ValueError: names the key and the value.
    """
    value = getattr(config, name)
    if value is not None and value < 1:
        raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")


def check_objective(config: Any) -> None:
    """Refuse an objective that cannot be, or that has nothing in it.

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    check_positions(config.positions, config.position_k)
    check_positions(config.output_positions, config.output_position_k, ("output_positions", "output_position_k"))
    check_end_of_turn(config.end_of_turn)
    if isinstance(config.layers, str) and config.layers not in LAYERS:
        raise ValueError(f"layers: {config.layers!r} is not one of {', '.join(LAYERS)} nor a list of layer numbers")
    if config.reduction not in get_args(Reduction):
        raise ValueError(f"reduction: {config.reduction!r} is not one of {', '.join(get_args(Reduction))}")
    if config.reduction == "token" and config.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps: {config.gradient_accumulation_steps} does not go with reduction='token', whose mean "
            "is over the tokens of the whole step; raise per_device_train_batch_size instead (micro_batch_tokens and "
            "generation_batch_size bound the memory)"
        )
    if config.bridge_rank is not None and config.bridge is None:
        raise ValueError(f"bridge_rank: {config.bridge_rank} has no effect without a bridge; set bridge to its folder")
    for name in ("micro_batch_tokens", "crossfade_steps", "num_iterations", "bridge_rank"):
        check_at_least_one(config, name)
    for name in ("diagnostic_steps", "alarm_window"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: {getattr(config, name)} is not allowed; 0 (never) or more")
    for name in ("representation_weight", "output_weight", "policy_gradient_weight"):
        check_weight(name, getattr(config, name))
    _check_terms(config)
    _check_writer(config)
    if is_on(config.policy_gradient_weight):
        _check_policy_gradient(config)


def _check_terms(config: Any) -> None:
    matching, comparing = is_on(config.representation_weight), config.output_term is not None
    rewarding = is_on(config.policy_gradient_weight)
    if not (matching or comparing or rewarding):
        raise ValueError(
            "representation_weight: 0 leaves nothing to learn from; set output_space or policy_gradient_weight"
        )
    if config.crossfade_steps is not None and not (matching and comparing):
        raise ValueError(
            "crossfade_steps: it goes over from representation_weight to output_space, and one of the two is off"
        )
    if config.num_iterations > 1 and not rewarding:
        raise ValueError(
            f"num_iterations: {config.num_iterations} is for GRPO (policy_gradient_weight); the distillation losses are "
            "on-policy and take new rollouts each step"
        )


# Losses whose gradient is an expectation over tokens that the student has drawn.
_DRAWN_BY_THE_STUDENT = ("sampled_token", "tail_sampled")


def _check_writer(config: Any) -> None:
    """Whose rollouts a loss can be learnt from."""
    if not 0 <= config.lmbda <= 1:
        raise ValueError(
            f"lmbda: {config.lmbda} is not allowed; a share from 0 (the teacher writes) to 1 (the student)"
        )
    kind = None if config.output_term is None else config.output_term.kind
    if config.lmbda < 1 and (kind in _DRAWN_BY_THE_STUDENT or is_on(config.policy_gradient_weight)):
        raise ValueError(
            f"lmbda: {config.lmbda} is not allowed with output_space={', '.join(_DRAWN_BY_THE_STUDENT)} or "
            "policy_gradient_weight, whose gradients are expectations over the student's own tokens; set it to 1"
        )
    if kind == "cross_entropy" and config.lmbda == 1:
        raise ValueError(
            "output_space: cross_entropy on the student's own tokens has no gradient in expectation; let the teacher write "
            "(lmbda: 0)"
        )
    if kind is None and config.output_positions != "all":
        raise ValueError(f"output_positions: {config.output_positions!r} has no effect without output_space; remove it")


def check_overlap(config: Any, engine_can: bool) -> None:
    """Refuse to sample during the update where the loss wants fresh rollouts or the engine cannot.

    Args:
        config: the settings, with `overlap_rollouts` on.
        engine_can: whether the rollout engine may sample in another thread during the update (`can.background`).

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    kind = None if config.output_term is None else config.output_term.kind
    if kind in _DRAWN_BY_THE_STUDENT or is_on(config.policy_gradient_weight):
        raise ValueError(
            f"overlap_rollouts: not with output_space={', '.join(_DRAWN_BY_THE_STUDENT)} or policy_gradient_weight, whose "
            "gradients are expectations over tokens that the student of the same step has drawn; set it to false"
        )
    if config.lmbda < 1:
        raise ValueError(
            f"overlap_rollouts: not with lmbda={config.lmbda}, which lets the teacher write; set one of the two off"
        )
    if config.fully_shard:
        raise ValueError(
            "overlap_rollouts: not with fully_shard: no process has a copy of the student; set one of the two off"
        )
    if not engine_can:
        raise ValueError(
            f"overlap_rollouts: not with rollout_engine={config.rollout_engine}, which cannot sample in another thread during the "
            "update (can.background of its class is False); set it to transformers or vllm_server, or overlap_rollouts to false"
        )


def check_default_ends(config: Any) -> None:
    """Refuse what is not done for a teacher that reads a text of its own.

    Raises:
        ValueError: names the key and the value.
    """
    for name, default in (("output_positions", "all"), ("end_of_turn", "merge"), ("lmbda", 1.0)):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}: {getattr(config, name)!r} is not done with a teacher that reads a text of its own (another tokenizer, "
                f"template or system prompt); leave it at {default!r}"
            )


def _check_policy_gradient(config: Any) -> None:
    if config.num_generations < 2:
        raise ValueError(
            f"num_generations: {config.num_generations} is not allowed with policy_gradient_weight: a rollout's advantage is "
            "over the mean of its prompt's rollouts; at least 2"
        )
    if config.task is None:
        raise ValueError("task: policy_gradient_weight needs one, to grade the rollouts that it rewards")
    check_clip(config.epsilon, config.epsilon_high)
    if config.scale_rewards not in get_args(Scale):
        raise ValueError(f"scale_rewards: {config.scale_rewards!r} is not one of {', '.join(get_args(Scale))}")
    if config.num_iterations == 1:
        return
    steps = {"max_steps": config.max_steps}
    if config.save_strategy == "steps":
        steps["save_steps"] = config.save_steps
    if config.save_strategy == "best" and config.eval_strategy == "steps":
        steps["eval_steps"] = config.eval_steps or config.logging_steps
    for name, value in steps.items():
        if value > 0 and value % config.num_iterations:
            raise ValueError(
                f"{name}: {value} is not allowed with num_iterations={config.num_iterations}: a checkpoint between two updates on "
                "the same rollouts could not be resumed from; take a multiple of it"
            )
