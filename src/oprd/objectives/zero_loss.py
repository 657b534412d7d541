"""Settings under which a term is 0 at every step, whatever the two models: a run would learn nothing from it, without a word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from oprd.objectives.composite import CompositeObjective, Term
from oprd.objectives.schedules import bounds
from oprd.objectives.terms import is_supervised
from oprd.states.positions import NEEDS_K, select_positions


def refuse_zero_loss(terms: Mapping[str, Term], config: Any, label: Callable[[str], str]) -> None:
    """Refuse settings under which a term, or the whole loss, is 0.

    Args:
        terms: of the run.
        config: the settings.
        label: from a term's name to the setting that turns it on.

    Raises:
        ValueError: a term compares more positions of a rollout than are chosen, reads only responses that the teacher never
            writes, or no term has a weight in any step.
    """
    for name, term in terms.items():
        _check_positions(label(name), getattr(term.objective, "needs_positions", 1), config)
        if is_supervised(term.objective) and bounds(config.lmbda)[0] == 1:
            raise ValueError(
                f"lmbda: {config.lmbda} lets the student write every response, and {label(name)} learns from the teacher's alone "
                "(supervised): its loss would be 0; lower lmbda, such as lmbda: 0"
            )
    if config.max_steps > 0 and not _weighs(terms, config):
        raise ValueError(
            f"max_steps: {config.max_steps} ends the run before any term of the loss has a weight "
            f"({', '.join(map(label, terms))}); raise max_steps, or start the schedule, crossfade_steps or lmbda earlier"
        )


def _check_positions(label: str, needed: int, config: Any) -> None:
    """Refuse a choice of positions that leaves a rollout fewer than a term needs.

    Raises:
        ValueError: names the key that leaves too few.
    """
    chosen = len(select_positions(config.max_completion_length, config.positions, config.position_k))
    if chosen >= needed:
        return
    if config.max_completion_length < needed:
        key, mend = "max_completion_length", f"set it to {needed} or more"
    elif config.positions in NEEDS_K:
        key, mend = "position_k", f"set it to {needed} or more"
    else:
        key, mend = "positions", "set it to all"
    raise ValueError(
        f"{key}: {getattr(config, key)} leaves {chosen} position(s) of a rollout, and {label} compares {needed} or more with each "
        f"other: its loss would be 0; {mend}"
    )


def _weighs(terms: Mapping[str, Term], config: Any) -> bool:
    """Whether some term has a weight in some step."""
    loss = CompositeObjective(
        terms, num_layers=1, crossfade_steps=config.crossfade_steps, lmbda=config.lmbda, seed=config.seed
    )
    return any(any(loss.at(step).weights.values()) for step in range(config.max_steps))
