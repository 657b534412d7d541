"""Mean over a few seeds with its Student t interval, without scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence


def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The t with P(|T| ≤ t) = `confidence`, where T has Student's t distribution with `degrees` (an integer) degrees of freedom.

    Raises:
        ValueError: degrees is below 1, or confidence is outside (0, 1).
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"degrees is {degrees}, confidence is {confidence}: give degrees >= 1 and 0 < confidence < 1")
    low, high = 0.0, math.pi / 2  # bisect over the angle atan(t / √degrees), which is bounded
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _probability_within(angle: float, degrees: int) -> float:
    """P(|T| ≤ √degrees·tan(angle)), by the finite sums of Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even)."""
    odd, cosine = degrees % 2, math.cos(angle)
    term, total = cosine if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def mean_and_interval(values: Sequence[float]) -> tuple[float | None, list[float] | None]:
    """The mean and its 95 % interval mean ± t·s/√n as [low, high].

    Without values the mean is None; one value has no interval. The ends are not clipped to [0, 1].
    """
    n = len(values)
    if n == 0:
        return None, None
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * deviation / math.sqrt(n)
    return mean, [mean - half, mean + half]
