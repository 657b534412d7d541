"""The user's terms, named in the setting `objectives` or given as objects, and checks of all terms of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from oprd.objectives.composite import Fade, Term
from oprd.objectives.schedules import bounds, check_weight, is_on
from oprd.objectives.terms import (
    AttentionTerm,
    HeadTerm,
    LayerError,
    LayerTerm,
    LogProbError,
    Objective,
    PolicyTerm,
    SeesSteps,
)
from oprd.objectives.zero_loss import refuse_zero_loss
from oprd.registry import arguments_problem, resolve_with_arguments, term_name

_METHODS = "a method layer_loss, head_loss, policy_loss or attention_loss (oprd.objectives.terms)"
READS = ("states", "log_probs")
"""What a function of the user's reads of both models."""
_FREE_FORM = "each entry is a mapping such as {use: my_losses:huber, weight: 0.5, delta: 1.0}"


def check_entries(entries: Any) -> None:
    """Check the form of the entries of `objectives`. Imports nothing.

    Raises:
        ValueError: names the entry and what is allowed.
    """
    if entries is not None and (isinstance(entries, str | Mapping) or not isinstance(entries, Sequence)):
        raise ValueError(f"objectives: {entries!r} is not a list; {_FREE_FORM}")
    for number, entry in enumerate(entries or []):
        name = f"objectives[{number}]"
        if not isinstance(entry, Mapping) or "use" not in entry:
            raise ValueError(f"{name}: {entry!r} has no key 'use'; {_FREE_FORM}")
        if not isinstance(entry["use"], str):
            raise ValueError(
                f"{name}: use: {entry['use']!r} is not text of the form module:attribute; give objects to "
                "OPRDTrainer(objectives={name: Term(…)})"
            )
        if entry.get("reads", "states") not in READS:
            raise ValueError(f"{name}: reads: {entry['reads']!r} is not one of {', '.join(READS)}")
        check_weight(f"{name}.weight", entry.get("weight", 1.0))


def named_terms(entries: Sequence[Mapping[str, Any]], taken: set[str], temperature: float = 1.0) -> dict[str, Term]:
    """The terms that `objectives` names: `use` is a function of both models' states or log-probabilities, or a class of terms.

    Args:
        entries: as `check_entries` takes them. Keys other than `use`, `weight` and `reads` are arguments of the function or class.
        taken: names of terms that exist already; an entry with such a name gets its number as a suffix.
        temperature: divides the logits of both models before a function reads log-probabilities.

    Raises:
        ValueError: an entry that cannot be imported, is not an objective, or does not accept its arguments.
    """
    terms: dict[str, Term] = {}
    for number, entry in enumerate(entries):
        weight = entry.get("weight", 1.0)
        own = {k: v for k, v in entry.items() if k not in ("weight", "reads")}
        found = _objective(f"objectives[{number}]", own, entry.get("reads"), temperature)
        name = term_name(entry["use"])
        if name in taken or name in terms:
            name = f"{name}_{number}"
        if is_on(weight):
            terms[name] = Term(found, weight)
    return terms


def given_terms(terms: Any, taken: set[str]) -> dict[str, Term]:
    """Check the terms that Python code gives as objects, and return those with a weight other than 0.

    Raises:
        ValueError: not a mapping of names to `Term`, a name that is taken, or an invalid term.
    """
    if not isinstance(terms, Mapping):
        raise ValueError(f"objectives: {type(terms).__name__} is not a mapping of names to Term(objective, weight)")
    for name, term in terms.items():
        if name in taken:
            raise ValueError(f"objectives: the name {name!r} is taken by a term of the settings; choose another")
        if not isinstance(term, Term):
            raise ValueError(f"objectives: {name}: {term!r} is no term; write Term(objective, weight=1.0)")
        check_weight(f"objectives: {name}: weight", term.weight)
        if term.fade not in get_args(Fade):
            raise ValueError(f"objectives: {name}: fade: {term.fade!r} is not one of {', '.join(get_args(Fade))}")
        if isinstance(term.objective, type) or not isinstance(term.objective, Objective):
            raise ValueError(
                f"objectives: {name}: {term.objective!r} is no objective; it needs to be an object with {_METHODS}, or "
                "LayerError(function) of (student, teacher) states, or LogProbError(function) of their log-probabilities"
            )
    return {name: term for name, term in terms.items() if is_on(term.weight)}


def check_terms(terms: Mapping[str, Term], config: Any, *, graded: bool) -> None:
    """Refuse settings that do not fit the terms of the loss, both shipped ones and the user's.

    Args:
        terms: of the run.
        config: the settings.
        graded: whether a task grades the rollouts.

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    if not terms:
        raise ValueError(
            "representation_weight: 0 leaves nothing to learn from; set output_space, policy_gradient_weight or objectives"
        )
    policies = [_label(name) for name, term in terms.items() if isinstance(term.objective, PolicyTerm)]
    if config.crossfade_steps is not None and not {"in", "out"} <= {term.fade for term in terms.values()}:
        raise ValueError(
            "crossfade_steps: it goes over from representation_weight to output_space, and one of the two is off"
        )
    if config.num_iterations > 1 and not policies:
        raise ValueError(
            f"num_iterations: {config.num_iterations} is for GRPO (policy_gradient_weight); the distillation losses are "
            "on-policy and take new rollouts each step"
        )
    if config.output_positions != "all" and not any(isinstance(term.objective, HeadTerm) for term in terms.values()):
        raise ValueError(f"output_positions: {config.output_positions!r} has no effect without output_space; remove it")
    below = [_label(name) for name, term in terms.items() if compares_heads_inputs(term)]
    if below and config.bridge is not None:
        raise ValueError(
            f"bridge: {below[0]} compares the states that the LM heads read dimension by dimension, and a bridge does not project "
            "them; leave one of the two out (HeadMetric: alpha: 1 compares the logits alone)"
        )
    if policies and config.num_generations < 2:
        raise ValueError(
            f"num_generations: {config.num_generations} is not allowed with {policies[0]}: a rollout's advantage is over the mean "
            "of its prompt's rollouts; at least 2"
        )
    if policies and not graded:
        raise ValueError(f"task: {policies[0]} needs one, to grade the rollouts that it rewards")
    watching = [_label(name) for name, term in terms.items() if isinstance(term.objective, SeesSteps)]
    if watching and config.world_size > 1:
        raise ValueError(
            f"{watching[0]}: it changes with the metrics of earlier steps, which one process keeps; train on one device, or take "
            "crossfade_steps"
        )
    _check_fresh(terms, config)
    refuse_zero_loss(terms, config, _label)


def compares_heads_inputs(term: Term) -> bool:
    """Whether a term on next-token distributions also compares the states below them: its attribute `compares_states`."""
    return isinstance(term.objective, HeadTerm) and bool(getattr(term.objective, "compares_states", False))


def compares_states(terms: Mapping[str, Term]) -> bool:
    """Whether some term compares hidden states dimension by dimension."""
    layerwise = LayerTerm | AttentionTerm
    return any(isinstance(term.objective, layerwise) or compares_heads_inputs(term) for term in terms.values())


def _check_fresh(terms: Mapping[str, Term], config: Any) -> None:
    """Refuse settings that train on other rollouts than the current student's, where a term needs those."""
    for name, term in terms.items():
        if not getattr(term.objective, "on_policy_only", isinstance(term.objective, PolicyTerm)):
            continue
        if bounds(config.lmbda)[0] < 1:
            raise ValueError(
                f"lmbda: {config.lmbda} is not allowed with {_label(name)}, whose gradient is an expectation over the student's "
                "own tokens (on_policy_only); set it to 1"
            )
        if config.overlap_rollouts:
            raise ValueError(
                f"overlap_rollouts: not with {_label(name)}, whose gradient is an expectation over tokens that the student of the "
                "same step has drawn (on_policy_only); set it to false"
            )


def _objective(key: str, entry: Mapping[str, Any], reads: str | None, temperature: float) -> Objective:
    use = entry["use"]
    found: Any
    found, arguments = resolve_with_arguments(key, entry, {})
    is_term = not isinstance(found, type) and isinstance(found, Objective)
    if reads is not None and (is_term or isinstance(found, type)):
        raise ValueError(
            f"{key}: reads: {reads!r} is for a function; the methods of {use!r} say what it reads. Remove it"
        )
    if is_term and arguments:
        raise ValueError(f"{key}: {use!r} is an object and takes no arguments; remove {', '.join(arguments)}")
    if is_term:
        return found
    if not callable(found):
        raise ValueError(
            f"{key}: {use!r} is a {type(found).__name__} and no objective: it needs {_METHODS}, or to be a function of (student, "
            "teacher) states"
        )
    states = () if isinstance(found, type) else (None, None)
    if problem := arguments_problem(found, *states, **arguments):
        called = ", ".join([*(["student", "teacher"] if states else []), *(f"{name}=…" for name in arguments)])
        raise ValueError(
            f"{key}: {use!r} cannot be called with ({called}): {problem}. Keys other than use, weight and reads are its arguments"
        )
    if not isinstance(found, type):
        error = partial(found, **arguments) if arguments else found
        return LogProbError(error, temperature) if reads == "log_probs" else LayerError(error)
    made = found(**arguments)
    if not isinstance(made, Objective):
        raise ValueError(f"{key}: {use!r} makes a {type(made).__name__}, which is no objective: it needs {_METHODS}")
    return made


def _label(name: str) -> str:
    """The setting that turns a term on."""
    shipped = {"representation": "representation_weight", "policy_gradient": "policy_gradient_weight"}
    return name if name == "output_space" else shipped.get(name, f"objectives: {name}")
