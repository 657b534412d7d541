"""The numbers of many metric rows by key, and which of them a picture needs."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

MOST_POINTS = 1000
"""Points of a curve in a picture: more than the picture has columns of pixels."""

_LARGEST_NUMBER = 1e100  # far above float32, far below the overflow of sums in float64


class Columns:
    """The numbers of metric rows, ordered by step: 16 bytes a number, so that a run of a million steps can be read.

    Args:
        rows: to begin with; each has a number `step`.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._steps = array("d")
        self._columns: dict[str, tuple[array[int], array[float]]] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row. A value that is no usable number is kept as NaN."""
        place = len(self._steps)
        self._steps.append(float(row["step"]))
        for key in row:
            places, values = self._columns.setdefault(key, (array("q"), array("d")))
            found = number(row, key)
            places.append(place)
            values.append(math.nan if found is None else found)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def keys(self) -> list[str]:
        """The keys that any row has."""
        return list(self._columns)

    @property
    def last_step(self) -> float:
        """The highest step."""
        return max(self._steps)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps at which `key` has a number, ascending, and these numbers."""
        if key not in self._columns:
            return [], []
        places, values = (np.asarray(column) for column in self._columns[key])
        there = ~np.isnan(values)
        steps, values = np.asarray(self._steps)[places[there]], values[there]
        order = np.argsort(steps, kind="stable")
        return steps[order].tolist(), values[order].tolist()

    def table(self, keys: Sequence[str]) -> tuple[list[float], list[list[float]]]:
        """Steps of the rows that have any of the keys, ascending, and for each key one value a step, NaN where there is none."""
        columns = [self._columns[key] for key in keys]
        rows = np.unique(np.concatenate([np.zeros(0, int), *(np.asarray(places) for places, _ in columns)]))
        rows = rows[np.argsort(np.asarray(self._steps)[rows], kind="stable")]
        dense = np.full(len(self._steps), math.nan)
        values = []
        for places, column in columns:
            dense[:] = math.nan
            dense[np.asarray(places)] = column
            values.append(dense[rows].tolist())
        return np.asarray(self._steps)[rows].tolist(), values


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`; None if there is none, or if it is not finite or beyond 1e100."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) <= _LARGEST_NUMBER else None


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices at equal distances, with the first and the last."""
    return list(range(count)) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


def drawn(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Indices of at most `most` values whose line looks like that of all: the ends, and least and largest of each stretch."""
    if len(values) <= most:
        return list(range(len(values)))
    array_ = np.asarray(values)
    borders = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(values) - 1}
    for start, end in pairwise(borders):
        part = array_[start:end]
        chosen |= {int(start + part.argmin()), int(start + part.argmax())}
    return sorted(chosen)


def row_seconds(row: Mapping[str, Any]) -> float:
    """Seconds of one step (`time/*`); 0 where times were not recorded. Evaluation is not in them."""
    return math.fsum(number(row, key) or 0.0 for key in row if key.startswith("time/"))


def step_seconds(steps: Columns) -> float | None:
    """Seconds of all steps, also of those before a resume (`time/*`); None where times were not recorded."""
    found = [seconds for key in steps.keys if key.startswith("time/") for seconds in steps.series(key)[1]]
    return math.fsum(found) if found else None
