"""Settings that do nothing without another one: given alone, they are refused before any model is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from oprd.config import OPRDConfig
from oprd.objectives.composite import Term
from oprd.objectives.output_space import WITH_SUPPORT
from oprd.objectives.schedules import is_on
from oprd.objectives.terms import AttentionTerm, LayerTerm, PolicyTerm
from oprd.resolve.terms import have_kind
from oprd.run_config import NO_EFFECT, RunConfig

Terms = Mapping[str, Term]


@dataclass(frozen=True)
class Needs:
    """Settings that are read only where something else is set.

    Args:
        keys: the settings.
        met: whether they are read.
        without: what is missing; names of settings in braces stand for their values.
        mend: what to set.
    """

    keys: tuple[str, ...]
    met: Callable[[RunConfig, Terms], bool]
    without: str
    mend: str


def _loads_teacher_by_name(run: RunConfig) -> bool:
    """Whether `teacher_model_init_kwargs` are arguments of a teacher, of one of several, or of the base.

    The dtype float32 passes: a recipe that names it may be pointed at another teacher.
    """
    if run.args.teacher_model_init_kwargs == {"dtype": "float32"}:
        return True
    teacher = run.teacher_model
    elsewhere = isinstance(teacher, Mapping) and bool({"url", "cache", "use"} & {*teacher})
    return run.teachers is not None or run.base_model is not None or not (teacher is None or elsewhere)


def _is_elsewhere(run: RunConfig) -> bool:
    """Whether the teacher's states come from a server or cache, which is asked for certain positions."""
    return isinstance(run.teacher_model, Mapping)


NEEDS = (
    Needs(
        ("teacher_sync_steps",), lambda run, _: run.args.teacher_update_rate > 0,
        "without teacher_update_rate, which moves the teacher", "set it, such as 0.05",
    ),
    Needs(
        ("teacher_model_init_kwargs",), lambda run, _: _loads_teacher_by_name(run),
        "where no teacher is loaded by name", "name one as teacher_model",
    ),
    Needs(
        ("positions",),
        lambda run, terms: have_kind(terms, LayerTerm | AttentionTerm) or run.args.diagnostic_steps > 0 or _is_elsewhere(run),
        "where no states are compared (the positions of a loss on distributions are output_positions)",
        "set representation_weight, or diagnostic_steps to measure the cosine",
    ),
    Needs(
        ("normalize",), lambda run, _: is_on(run.args.representation_weight),
        "with representation_weight: {representation_weight}", "set that",
    ),
    Needs(
        ("output_weight", "output_top_k", "output_support", "output_beta", "output_baseline"),
        lambda run, _: run.args.output_space is not None, "without output_space", "set it",
    ),
    Needs(
        ("output_temperature",),
        lambda run, _: run.args.output_space is not None or bool(run.args.objectives),
        "without output_space or objectives", "set one of them",
    ),
    Needs(
        ("output_top_k", "output_support"), lambda run, _: run.args.output_space in (None, *WITH_SUPPORT),
        "with output_space: {output_space}, which is no top-k loss", f"set one of {', '.join(WITH_SUPPORT)}",
    ),
    Needs(
        ("output_beta",), lambda run, _: run.args.output_space in (None, "jsd"),
        "with output_space: {output_space}", "set jsd",
    ),
    Needs(
        ("epsilon", "epsilon_high"), lambda run, _: is_on(run.args.policy_gradient_weight),
        "with policy_gradient_weight: {policy_gradient_weight}", "set that",
    ),
    Needs(
        ("scale_rewards",), lambda _, terms: have_kind(terms, PolicyTerm),
        "without a policy gradient", "set policy_gradient_weight",
    ),
    Needs(
        ("top_p", "top_k", "min_p"), lambda run, _: run.args.temperature > 0,
        "with temperature: {temperature}, which draws the likeliest token", "set a temperature above 0",
    ),
    Needs(
        ("max_skipped_steps",), lambda run, _: run.args.nan_policy == "skip",
        "with nan_policy: {nan_policy}", "set skip",
    ),
    Needs(
        ("num_completions_to_log",), lambda run, _: run.args.log_completions,
        "with log_completions: false", "set true",
    ),
)  # fmt: skip
"""Read in this order: the first that is not met is refused. Keys at their defaults pass."""


def check_effects(run: RunConfig, terms: Terms) -> None:
    """Refuse a setting, other than its default, that this run would not read.

    Args:
        run: the configuration.
        terms: of the loss.

    Raises:
        ValueError: names the key, its value, what is missing, and what to set.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(OPRDConfig)}
    for key, why in NO_EFFECT.items():  # of a recipe they are refused where it is read
        if not key.startswith("do_") and getattr(run.args, key) != defaults[key]:  # which transformers sets itself
            raise ValueError(f"{key}: it has no effect here; leave it out ({why})")
    for needs in NEEDS:
        given = next((key for key in needs.keys if getattr(run.args, key) != defaults[key]), None)
        if given is not None and not needs.met(run, terms):
            value, without = getattr(run.args, given), needs.without.format(**vars(run.args))
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{given}: {shown} has no effect {without}; {needs.mend}, or leave {given} out")
