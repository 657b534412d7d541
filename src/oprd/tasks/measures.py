"""Measures over sampled answers: k samples per problem, then a mean over problems (method.md, section 7).

Pure functions of plain sequences. `summarize` returns all measures in one dict, ready for JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_REWARD_KEY = re.compile(r"rewards/(.+)/mean")


def avg_at_k(correct: Sequence[Sequence[bool | float]]) -> float:
    """Avg@k = mean over problems of (1/k)·Σ_i correct_i.

    Args:
        correct: `correct[problem][sample]`, verdicts or rewards.

    Raises:
        ValueError: there are no problems or samples, k differs between problems, or a value is not finite.
    """
    return float(_problems_by_samples(correct).mean(axis=1).mean())


def best_at_k(correct: Sequence[Sequence[bool | float]]) -> float:
    """Best@k = mean over problems of max_i correct_i: the best reward; with verdicts, the share of problems with a
    correct sample.

    Never below Avg@k. Arguments and errors as for `avg_at_k`.
    """
    return float(_problems_by_samples(correct).max(axis=1).mean())


def mean_and_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (divided by n − 1) of values; None where there are too few."""
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


ACCURACY, REWARD = "accuracy", "reward"
"""What Avg@k is the mean of (`measure` in a summary): verdicts, or rewards that may lie outside [0, 1]."""


def measure_of(correct: Iterable[bool | float | None], *, rewarded: bool = False) -> str:
    """ACCURACY where all grades are 0 or 1, else REWARD.

    Args:
        correct: verdicts (bool) or rewards; None: not graded.
        rewarded: whether there are reward functions: then a number is a reward, also where it is 0 or 1.
    """
    numbers = [value for value in correct if value is not None and not isinstance(value, bool)]
    return REWARD if numbers and (rewarded or any(value not in (0, 1) for value in numbers)) else ACCURACY


def in_words(value: float | None, measure: str = ACCURACY, percent: str = ".1%") -> str:
    """An accuracy as percent, a reward as a number; a dash where there is none."""
    return "–" if value is None else format(value, percent if measure == ACCURACY else ".3g")


class DistinctN(NamedTuple):
    """Result of `distinct_n`: the mean (None if no problem has an n-gram) and the number of problems left out."""

    value: float | None
    left_out: int


def distinct_n(responses_by_problem: Sequence[Sequence[Sequence[int]]], n: int = 4) -> DistinctN:
    """Dist-n = mean over problems of |unique n-grams| / |n-grams|, over all responses of a problem.

    n-grams do not span responses. A problem with only responses shorter than n has no ratio; it is left out of the mean and
    counted. Longer responses give lower values, so report the mean length as well.

    Args:
        responses_by_problem: token ids, `responses_by_problem[problem][response]`.
        n: tokens per n-gram.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: an n-gram has 1 token or more")
    ratios = []
    for responses in responses_by_problem:
        grams = [tuple(ids[i : i + n]) for ids in map(list, responses) for i in range(len(ids) - n + 1)]
        if grams:
            ratios.append(len(set(grams)) / len(grams))
    return DistinctN(float(np.mean(ratios)) if ratios else None, len(responses_by_problem) - len(ratios))


def bootstrap_ci(
    values_per_problem: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over problems (Efron 1979): (low, high).

    Each resample draws as many problems as there are, with replacement. The ends are the (1 ± confidence)/2 quantiles of the
    resampled means. The same arguments give the same interval. It covers the choice of problems, not of samples or seeds. With
    one problem or equal values its width is 0, which does not mean certainty.

    Raises:
        ValueError: there are no values, a value is not finite, confidence is outside (0, 1), or resamples is below 1.
    """
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"values_per_problem has shape {values.shape}: give one finite number per problem, at least one"
        )
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence is {confidence}, resamples is {resamples}: give 0 < confidence < 1, resamples >= 1"
        )
    generator = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // values.size)  # 16 MB of indices
    means = [
        values[generator.integers(values.size, size=(min(at_once, resamples - done), values.size))].mean(axis=1)
        for done in range(0, resamples, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Sample:
    """One graded response: correct (None if the problem has no answer), length in tokens, whether it ended itself, token ids."""

    correct: bool | float | None
    num_tokens: int
    finished: bool
    token_ids: Sequence[int] = ()


def summarize(problems: Sequence[Sequence[Sample]], *, seed: int = 0) -> dict[str, Any]:
    """Return the measures of `problems[problem][sample]` as a dict, ready for JSON.

    Keys: `avg_at_k`, `best_at_k`, `ci95` ([low, high] of avg_at_k), `k`, `problems`, `dist_4`, `dist_4_left_out`,
    `mean_length`, `finished` (share of samples), `accuracy_given_finished`, `ungraded` (samples).
    Accuracies cover the graded samples: of a problem that is graded in part, its mean and best are of those. They are None if no
    sample was graded (for `accuracy_given_finished`: if no graded sample finished).

    Raises:
        ValueError: there are no problems or samples, or k differs.
    """
    if not problems:
        raise ValueError("no problems: give at least one")
    sizes = sorted({len(samples) for samples in problems})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"problems have {sizes} samples: all need the same number, at least 1")
    everything = [sample for samples in problems for sample in samples]
    graded = [own for samples in problems if (own := [float(s.correct) for s in samples if s.correct is not None])]
    means = [float(np.mean(own)) for own in graded]
    whole = len({*map(len, graded)}) == 1  # then every sample weighs the same, as in the published measure
    finished = [float(s.correct) for s in everything if s.finished and s.correct is not None]
    distinct = distinct_n([[sample.token_ids for sample in samples] for samples in problems], n=4)
    return {
        "avg_at_k": (avg_at_k(graded) if whole else float(np.mean(means))) if graded else None,
        "best_at_k": (best_at_k(graded) if whole else float(np.mean([max(own) for own in graded]))) if graded else None,
        "ci95": list(bootstrap_ci(means, seed=seed)) if graded else None,
        "k": sizes[0],
        "problems": len(problems),
        "dist_4": distinct.value,
        "dist_4_left_out": distinct.left_out,
        "mean_length": float(np.mean([sample.num_tokens for sample in everything])),
        "finished": float(np.mean([sample.finished for sample in everything])),
        "accuracy_given_finished": float(np.mean(finished)) if finished else None,
        "ungraded": sum(sample.correct is None for sample in everything),
    }


def _problems_by_samples(correct: Sequence[Sequence[bool | float]]) -> np.ndarray:
    sizes = sorted({len(samples) for samples in correct})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"problems have {sizes} samples: give at least one problem, all with the same k >= 1")
    values = np.asarray([[float(value) for value in samples] for samples in correct], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("correct holds a value that is not finite: allowed are verdicts and finite rewards")
    return values


def reward_keys(keys: Iterable[str]) -> dict[str, str]:
    """Reward function → key of its mean, among the keys of a step's metrics or of an evaluation."""
    return {found[1]: key for key in keys if (found := _REWARD_KEY.fullmatch(key))}
