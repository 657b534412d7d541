"""What a run did to its student, in one sentence with its interval: for the last line of the command, the summary and the card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oprd.runs.measure import measure_of_run
from oprd.tasks.measures import REWARD

_STANDARD_ERRORS = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Verdict:
    """Judgement of a run.

    Args:
        text: one sentence, without a full stop.
        gap_closed: share of the teacher's lead in Avg@k that training closed; None where there is no lead or it was not measured.
        ci95: its 95 % interval.
        worse: whether the student is worse than before, beyond the interval of the change.
    """

    text: str
    gap_closed: float | None = None
    ci95: tuple[float, float] | None = None
    worse: bool = False


def judge_run(summary: Mapping[str, Any]) -> Verdict | None:
    """Judge a run by its evaluations before and after, and the teacher's.

    The intervals come from those of the evaluations, taken as independent. All evaluations share their problems, so that the
    real ones are a little narrower. The spread over training seeds is not in them.

    Args:
        summary: the run's `summary.json`; old ones and those of other programs may lack anything.

    Returns:
        None where accuracy before and after was not measured.
    """
    before, after, teacher = (_measured(summary, name) for name in ("student_before", "student_after", "teacher"))
    if before is None or after is None:
        return None
    change = after[0] - before[0]
    spread = _STANDARD_ERRORS * math.hypot(before[1], after[1])
    worse, better = change + spread < 0, change - spread > 0
    points = _change_in_words(summary, change, spread)
    if teacher is None or teacher[0] <= before[0]:
        why = "was not evaluated" if teacher is None else "was not ahead of the student, so there was no gap to close"
        word = "worse" if worse else "better" if better else "not told apart from the start"
        return Verdict(f"the student is {word}: {points}; the teacher {why}", worse=worse)
    lead = teacher[0] - before[0]
    share = change / lead
    # The accuracy before enters change and lead.
    error = math.sqrt(after[1] ** 2 + ((share - 1) * before[1]) ** 2 + (share * teacher[1]) ** 2) / lead
    ci95 = share - _STANDARD_ERRORS * error, share + _STANDARD_ERRORS * error
    interval = f"[{100 * ci95[0]:.0f}, {100 * ci95[1]:.0f}]"
    if worse:
        text = f"the student got worse: the gap to the teacher grew by {-share:.0%}"
    elif better:
        text = f"closed {share:.0%} {interval} of the gap to the teacher"
    else:  # without the share's interval, which may exclude 0 where that of the change does not
        text = f"no change beyond chance in this evaluation: {share:.0%} of the gap to the teacher"
    return Verdict(f"{text}; {points}", share, ci95, worse)


def _change_in_words(summary: Mapping[str, Any], change: float, spread: float) -> str:
    """`+10.0 points [+5.0, +15.0] of Avg@k`, or `+0.1 [+0.05, +0.15] of mean reward`."""
    if measure_of_run({}, summary) == REWARD:
        return f"{change:+.3g} [{change - spread:+.3g}, {change + spread:+.3g}] of mean reward"
    low, high = (f"{100 * end:+.1f}" for end in (change - spread, change + spread))
    return f"{100 * change:+.1f} points [{low}, {high}] of Avg@k"


def _measured(summary: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Avg@k and its standard error (0 where there is no interval); None without one."""
    found = summary.get(name) or {}
    average, ends = found.get("avg_at_k"), found.get("ci95")
    if average is None:
        return None
    return average, (ends[1] - ends[0]) / (2 * _STANDARD_ERRORS) if ends else 0.0
