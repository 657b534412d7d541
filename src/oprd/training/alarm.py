"""Alarms: states come closer while the model gets worse (all-layer matching of unrelated models), the loss rises, and steps teach
nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from oprd.config import OPRDConfig
from oprd.faults import RunStopped
from oprd.objectives.composite import Term
from oprd.objectives.schedules import bounds, is_on
from oprd.objectives.terms import ON_POLICY_KINDS, PolicyTerm
from oprd.tasks.measures import ACCURACY, REWARD, in_words

_STANDARD_ERRORS = 3.0  # a fall in accuracy must be this many of them: about one false alarm in 700 comparisons
_KL_FACTOR = 1.5  # the sampled KL must also have grown by half: its error is of few rollouts
_KL_FLOOR = 0.01  # nats; below it the sampled KL is noise around zero
_CLOSER = 0.9  # loss and 1 − cosine must have fallen below this share, where accuracy did not rise
_SOLVES = 0.05  # below this accuracy a lack of progress does not count: the student may begin late
_TOP = 0.5  # above this one it does not either: the student may be done
_SURE = 0.05  # the gain in accuracy must be below this, by two standard errors
_RISE = 2.0  # a loss must have grown by this factor, and its logarithm by more than the standard errors above
_MEAN_OF = 5  # steps: of one step the loss is noisy
_OF_ROLLOUTS = (
    "accuracy",
    "accuracy_std",
    "graded",
    "reverse_kl",
    "reverse_kl_error",
)  # what further updates on them repeat
_UNEQUAL = 100.0  # ratio; the noise of one step is far smaller
_SCALES_AT = 5  # the one step whose terms are compared, so that a resumed run gives the same warning


class AlarmWatch:
    """Compares the halves of the last `window` steps and reports when cosine rose while accuracy or KL worsened, or accuracy
    stood still.

    After an alarm it is quiet until a whole new window has passed. Steps of one of several teachers have a window of their own.

    Args:
        window: steps looked at; 0: never.
        earlier: lines of metrics.jsonl before, when a run is resumed (`recall`); read once.
        num_iterations: steps on the same rollouts, of which only the first says how good these are.
    """

    def __init__(self, window: int, earlier: Iterable[Mapping[str, Any]] = (), *, num_iterations: int = 1) -> None:
        self.window, self.num_iterations = window, num_iterations
        self._rows: dict[str, deque[Mapping[str, Any]]] = {}
        for row in earlier:
            if "loss" in row:
                self.recall(row)

    def recall(self, row: Mapping[str, Any]) -> None:
        """Take a row of a step before, when a run is resumed. Only one with `alarm` can have ended a window."""
        if not self.window:
            return
        rows = self._window_of(row)
        if row.get("alarm"):  # another alarm may have been logged there
            self._judge(rows)

    def watch(self, row: Mapping[str, Any]) -> str | None:
        """Take one step's metrics; a sentence when there is something to worry about."""
        if not self.window:
            return None
        return self._judge(self._window_of(row))

    def _window_of(self, row: Mapping[str, Any]) -> deque[Mapping[str, Any]]:
        rows = self._rows.setdefault(only_teacher(row), deque(maxlen=self.window))
        again = (row.get("step", 1) - 1) % self.num_iterations > 0  # on rollouts of a step before
        rows.append({key: value for key, value in row.items() if key not in _OF_ROLLOUTS} if again else row)
        return rows

    def _judge(self, rows: deque[Mapping[str, Any]]) -> str | None:
        if len(rows) < self.window:
            return None
        alarm = find_alarm(list(rows))
        if alarm:
            rows.clear()
        return alarm


def only_teacher(row: Mapping[str, Any]) -> str:
    """teacher_id of the one of several teachers that read all rollouts of a step; empty where there is one teacher, or they mix.

    Args:
        row: metrics of the step.
    """
    read = [key for key, value in row.items() if key.startswith("teacher/") and key.endswith("/rollouts") and value]
    return read[0].split("/")[1] if len(read) == 1 else ""


class RisingLoss:
    """Reports when a term's loss has risen to a multiple of the lowest so far: the usual sign of too high a learning rate.

    It watches the representation loss, and an output-space loss that is a distance, before their weights. It compares geometric
    means over five steps, since a loss varies by factors; the loss of the first step counts as one too. After an alarm it is
    quiet for `alarm_window` steps. Steps of one of several teachers are compared with each other.

    A loss is not watched where more than the rate may raise it: a scheduled weight, rewards, rollouts of two models.

    Args:
        args: the run's settings; with `alarm_window: 0` it never reports.
    """

    def __init__(self, args: OPRDConfig) -> None:
        self.args, self._steps, self._quiet_until = args, 0, 0
        self._last: dict[str, deque[float]] = {}
        self._lowest: dict[str, tuple[float, Any, float]] = {}  # mean logarithm, its last step, variance of the mean
        alone = args.crossfade_steps is None and args.lmbda in (0, 1) and not is_on(args.policy_gradient_weight)
        distance = args.output_term is not None and args.output_term.kind not in ON_POLICY_KINDS
        weights = {"representation": args.representation_weight, "output_space": args.output_weight if distance else 0}
        watched = args.alarm_window > 0 and alone
        self._terms = [n for n, weight in weights.items() if watched and is_on(weight) and not isinstance(weight, dict)]

    def watch(self, row: Mapping[str, Any]) -> str | None:
        """Take one step's metrics; a sentence when a loss has risen."""
        self._steps += 1
        found = [text for name in self._terms if (text := self._look(name, row))]
        if not found or self._steps <= self._quiet_until:
            return None
        self._quiet_until = self._steps + self.args.alarm_window
        rate = float(self.args.learning_rate)
        return f"{' and '.join(found)}; lower learning_rate (now {rate:g}), for example to {rate / 3:.2g} or {rate / 10:.2g}"

    def _look(self, name: str, row: Mapping[str, Any]) -> str | None:
        loss = row.get(f"loss/{name}")
        if loss is None or not loss > 0:
            return None
        series = f"{name} {only_teacher(row)}"
        last = self._last.setdefault(series, deque(maxlen=_MEAN_OF))
        last.append(math.log(loss))
        if series not in self._lowest:
            self._lowest[series] = last[0], row.get("step", "?"), 0.0
        if len(last) < _MEAN_OF:
            return None
        mean = sum(last) / _MEAN_OF
        variance = sum((value - mean) ** 2 for value in last) / (_MEAN_OF - 1) / _MEAN_OF
        lowest, since, its_variance = self._lowest[series]
        if mean < lowest:
            self._lowest[series] = mean, row.get("step", "?"), variance
            return None
        if mean - lowest < math.log(_RISE) or mean - lowest < _STANDARD_ERRORS * math.sqrt(variance + its_variance):
            return None
        what = "" if len(self._terms) == 1 else f" ({name})"
        rise, low, now = (math.exp(value) for value in (mean - lowest, lowest, mean))
        return f"the loss{what} rises: {_times(rise)} × since step {since} ({low:.3g} -> {now:.3g})"


class UselessSteps:
    """Counts the steps in a row from which there may be nothing to learn, on all ranks alike.

    A step counts if every completion is empty (its first token ends it), or every completion was cut off by the length limit, or,
    with a policy-gradient term that has a weight, all rewards of each prompt are equal. A representation or output-space loss still
    learns from completions that were cut off, and beside a policy gradient of 0; set `max_useless_steps` (off by default) to end
    such a run.

    Args:
        args: the run's settings: the limit is `max_useless_steps`, a warning is logged after `alarm_window` steps.
        before: steps counted before the run was resumed.
    """

    def __init__(self, args: OPRDConfig, before: int = 0) -> None:
        self.args, self._in_a_row, self._reason = args, before, ""

    def count(self, totals: Mapping[str, float]) -> int:
        """Take a step's counts of rollouts (all, `empty`, `finished`, `alike`) over all ranks; how many steps in a row count."""
        rollouts, length = totals["rollouts"], self.args.max_completion_length
        if totals["empty"] == rollouts:
            self._reason = "every completion was empty; check prompts, chat template and stop tokens"
        elif totals["finished"] == 0:
            self._reason = (
                f"every completion was cut off at max_completion_length={length}; raise it, or check the stop tokens (a "
                "representation loss learns from such completions, rewards do not)"
            )
        elif totals["alike"] == rollouts:
            self._reason = (
                "the rewards of each prompt were all equal, so that the policy gradient was 0; check the task and its answers, "
                "take prompts that the student solves sometimes, or raise num_generations"
            )
        else:
            self._reason = ""
        self._in_a_row = self._in_a_row + 1 if self._reason else 0
        return self._in_a_row

    def alarm(self) -> str | None:
        """A sentence once the count reaches `alarm_window`."""
        if self._in_a_row and self._in_a_row == self.args.alarm_window:
            return f"{self._in_a_row} steps in a row may have taught nothing: in the last one {self._reason}"
        return None

    def check(self, step: int) -> None:
        """End the run at the limit.

        Raises:
            RunStopped: gives the reason.
        """
        if 0 < self.args.max_useless_steps <= self._in_a_row:
            raise RunStopped(
                f"{self._in_a_row} steps in a row taught nothing (max_useless_steps={self.args.max_useless_steps}): in step "
                f"{step} {self._reason}"
            )


def find_alarm(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong between the first and the second half of `rows`, None if nothing is.

    Cosine must have risen, and either accuracy fallen by more than three standard errors (over the graded rollouts of each half;
    binomial for verdicts) or the sampled reverse KL grown by half and by more than three standard errors (over the rollouts of
    each half). Otherwise loss and 1 − cosine must both have fallen by more than a tenth while an accuracy of 5 to 50 % did not
    rise: a far pair, whose teacher says little about what the student writes.

    Args:
        rows: metrics of steps, with `loss`, `cosine`, `accuracy`, `accuracy_std` and `graded`, `reverse_kl`,
            `reverse_kl_error` and `tokens` where they were measured.
    """
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    cosines = [_mean(half, "cosine") for half in halves]
    if None in cosines or not cosines[1] > cosines[0]:  # type: ignore[operator]
        return None
    found = [text for text in (_accuracy_fell(*halves), _kl_grew(*halves)) if text]
    rose = f"cosine rose {cosines[0]:.3f} -> {cosines[1]:.3f} over steps {rows[0].get('step', '?')} to {rows[-1].get('step', '?')}"
    if not found:
        stood = _accuracy_stood_still(*halves)
        return f"{rose}, {stood}" if stood else None
    return (
        f"{rose} while {' and '.join(found)}: the states come closer and the model gets worse; try fewer layers (layers: last), a "
        "lower learning rate, or an output-space term (docs/objectives.md)"
    )


def _accuracy_fell(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str | None:
    (n, right), (m, later) = _graded(before), _graded(after)
    error = _accuracy_error(before, after)
    if error and right / n - later / m > _STANDARD_ERRORS * error:
        unit = _unit(before, after)
        return f"{unit} fell {in_words(right / n, unit)} -> {in_words(later / m, unit)}"
    return None


def _accuracy_stood_still(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str | None:
    (n, right), (m, later) = _graded(before), _graded(after)
    error = _accuracy_error(before, after)
    first, second = ((_mean(half, "loss") or 0.0, 1 - (_mean(half, "cosine") or 0.0)) for half in (before, after))
    nearer = all(now < _CLOSER * then for then, now in zip(first, second, strict=True))
    if not error or not nearer or not right / n >= _SOLVES or not later / m < _TOP:
        return None
    gain = later / m - right / n
    if gain > 0 or gain + 2 * error > _SURE:
        return None
    unit = _unit(before, after)
    return (
        f"the loss fell {first[0]:.3g} -> {second[0]:.3g}, and {unit} did not rise ({in_words(right / n, unit)} -> "
        f"{in_words(later / m, unit)}): the "
        "student comes closer on responses in its own style; let the teacher write them in half of the steps (docs/choose.md, far "
        "pairs), or check the task's answers"
    )


def _unit(*halves: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy, or reward where some grades are neither 0 nor 1."""
    return REWARD if any(row.get("accuracy_std") is not None for half in halves for row in half) else ACCURACY


def _graded(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Number of graded rollouts, and the sum of their rewards."""
    graded = [(_count(row), row["accuracy"]) for row in rows if row.get("accuracy") is not None]
    return sum(n for n, _ in graded), sum(n * a for n, a in graded)


def _count(row: Mapping[str, Any]) -> float:
    """Graded rollouts of a step; in a log of an earlier version, all rollouts."""
    return float(row.get("graded", row["rollouts"]))


def _accuracy_error(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> float:
    """Standard error of the difference between the accuracies of two sets of steps; 0 where it is not known."""
    (n, right), (m, later) = _graded(before), _graded(after)
    # Rewards that are not 0 or 1: Σ(r² − r), by which their variance differs from that of verdicts with the same mean.
    rewarded = [row for row in (*before, *after) if row.get("accuracy_std") is not None]
    excess = sum(_count(r) * (r["accuracy_std"] ** 2 + r["accuracy"] ** 2 - r["accuracy"]) for r in rewarded)
    if not n or not m:
        return 0.0
    pooled = (right + later) / (n + m)
    return math.sqrt(max(pooled * (1 - pooled) + excess / (n + m), 0.0) * (1 / n + 1 / m))


def _kl_grew(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str | None:
    found = []
    for half in (before, after):
        measured = [
            (row["tokens"], row["reverse_kl"], row["reverse_kl_error"])
            for row in half
            if row.get("reverse_kl") is not None and row.get("reverse_kl_error") is not None
        ]
        tokens = sum(n for n, _, _ in measured)
        if not tokens:
            return None
        mean = sum(n * kl for n, kl, _ in measured) / tokens
        found.append((mean, sum((n * error) ** 2 for n, _, error in measured) / tokens**2))
    (first, variance), (second, later_variance) = found
    error = math.sqrt(variance + later_variance)
    if second - first > _STANDARD_ERRORS * error and second > _KL_FACTOR * max(first, _KL_FLOOR):
        return f"the sampled reverse KL grew {first:.3g} -> {second:.3g}"
    return None


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def silent_terms(row: Mapping[str, Any], terms: Mapping[str, Term]) -> list[str]:
    """Names of the distances that are exactly 0 in the first step, while the loss is not: of layers or positions that are not read.

    Args:
        row: metrics of a step, with `loss/<term>`.
        terms: of the loss.
    """
    if row.get("step") != 1 or not row.get("loss"):
        return []
    return [name for name, term in terms.items() if row.get(f"loss/{name}") == 0 and not _sampled(term)]


def _sampled(term: Term) -> bool:
    """Whether a term's value does not say how large its gradient is."""
    return bool(getattr(term.objective, "on_policy_only", isinstance(term.objective, PolicyTerm)))


def unequal_terms(row: Mapping[str, Any], terms: Mapping[str, Term]) -> tuple[float, str] | None:
    """Whether one distance's part of the loss is a hundred times another's: the ratio, and a sentence; else None.

    It looks at one early step, at full weights: a fade is not a difference of scale. Terms on rewards and sampled tokens are left
    out, since their value does not say how large their gradient is.

    Args:
        row: metrics of a step, with `loss/<term>`.
        terms: of the loss.
    """
    if row.get("step") != _SCALES_AT:
        return None
    parts: dict[str, float] = {}
    for name, term in terms.items():
        part = abs(row.get(f"loss/{name}", 0.0)) * bounds(term.weight)[1]
        if not _sampled(term) and part > 0:
            parts[name] = part
    if len(parts) < 2:
        return None
    small, large = min(parts, key=lambda name: parts[name]), max(parts, key=lambda name: parts[name])
    ratio = parts[large] / parts[small]
    if ratio < _UNEQUAL:
        return None
    return ratio, (
        f"{large} is {ratio:.3g} times as much of the loss as {small} ({parts[large]:.3g} and {parts[small]:.3g}, with their "
        f"weights): {small} may teach nothing; change a weight, if that is not meant"
    )


def _times(ratio: float) -> str:
    """A ratio with two digits, without an exponent."""
    return f"{ratio:.2g}" if ratio < 100 else f"{ratio:,.0f}"
