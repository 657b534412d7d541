"""The terms of the loss and the reward functions that settings turn on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oprd.config import OPRDConfig
from oprd.objectives.composite import Term
from oprd.objectives.own import check_terms, given_terms, named_terms
from oprd.objectives.schedules import bounds, is_on, scaled
from oprd.objectives.terms import OutputSpace, PolicyGradient, Representation
from oprd.run_config import RunConfig
from oprd.tasks.rewards import RewardFunctions, reward_functions


def build_terms(run: RunConfig) -> dict[str, Term]:
    """The terms of the loss, by name: those that the settings turn on, and the user's.

    Raises:
        ValueError: an objective of the user's that cannot be imported or is invalid; no term; or settings that do not fit the
            terms.
    """
    args, terms = run.args, {}
    if is_on(args.representation_weight):
        # RIDE: the target lies λ times as far, and its squared distance is λ² times as much; that of directions is not.
        weight = scaled(args.representation_weight, 1.0 if args.normalize else args.extrapolation**-2)
        terms["representation"] = Term(Representation(args.normalize), weight, "out")
    if (loss := args.output_term) is not None:
        terms["output_space"] = Term(OutputSpace(loss), args.output_weight, "in")
    if is_on(args.policy_gradient_weight):
        terms["policy_gradient"] = Term(PolicyGradient(args.epsilon, args.epsilon_high), args.policy_gradient_weight)
    terms |= named_terms(args.objectives or [], {*terms}, args.loss_temperature)
    terms |= given_terms(run.given.objectives or {}, {*terms})
    check_terms(terms, args, graded=_graded(run) or _reward_funcs(run) is not None)
    return terms


def build_rewards(run: RunConfig) -> RewardFunctions | None:
    """The reward functions of a run; None without any.

    Raises:
        ValueError: one of the user's that cannot be imported or is none, weights that do not fit, or nothing that would call them.
    """
    args = run.args
    rewards = reward_functions(args.reward_funcs, run.given.reward_funcs, args.reward_weights, graded=_graded(run))
    if rewards is None:
        return None
    if bounds(args.lmbda)[1] == 0 and not run.eval_dataset:
        raise ValueError(
            f"reward_funcs: nothing would call {', '.join(rewards.names)}: with lmbda: 0 the teacher writes all rollouts, and "
            "there is no eval_dataset; leave them out, or set one of the two"
        )
    if is_on(args.policy_gradient_weight) and not any(function.weight for function in rewards.functions):
        raise ValueError(
            f"reward_weights: {args.reward_weights} leaves policy_gradient_weight nothing to learn from; give a weight other than 0"
        )
    return rewards


def _reward_funcs(run: RunConfig) -> Any:
    return run.args.reward_funcs if run.given.reward_funcs is None else run.given.reward_funcs


def _graded(run: RunConfig) -> bool:
    return run.given.task is not None or run.args.task is not None


def have_kind(terms: Mapping[str, Term], kind: Any) -> bool:
    """Whether any term is of this kind."""
    return any(isinstance(term.objective, kind) for term in terms.values())


def describe_objective(args: OPRDConfig, terms: Mapping[str, Term]) -> str:
    """The sum that a run minimises, such as `10 x representation + 1 x reverse_kl, a mean over response tokens`."""
    summands = [f"{_weight(term.weight)} x {_shown_name(name, term)}" for name, term in terms.items()]
    fading = f", crossfade over {args.crossfade_steps} steps" if args.crossfade_steps else ""
    of = "rollouts" if args.reduction == "rollout" else "response tokens"
    past = ""
    if args.extrapolation != 1:
        beyond = f"{args.extrapolation - 1:g}"
        past = f"; states match h_T + {beyond}·(h_T − h_base)"
        if not args.normalize:
            past += f", and the representation weight holds 1/{args.extrapolation:g}²"
    return f"{' + '.join(summands)}{fading}, a mean over {of}{past}"


def _shown_name(name: str, term: Term) -> str:
    if isinstance(term.objective, OutputSpace):
        return term.objective.loss.kind
    return "GRPO" if isinstance(term.objective, PolicyGradient) else name


def _weight(weight: Any) -> str:
    if isinstance(weight, Mapping):
        return f"({weight['start']:g} to {weight['end']:g}, {weight['schedule']} in {weight['steps']} steps)"
    return f"{weight:g}"
