"""The grade of every evaluation problem, so that two runs can be compared problem by problem: `eval_grades.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oprd.files import write_json
from oprd.runs.folder import GRADES, read_mapping

PROBLEMS = "problems"


def problem_key(prompt: Any, answer: str | None) -> str:
    """What names a problem in every run: the first 16 hex digits of the SHA-256 of prompt (text or messages) and answer."""
    return hashlib.sha256(json.dumps([prompt, answer], sort_keys=True).encode()).hexdigest()[:16]


def record_grades(folder: Path, who: str, problems: Sequence[str], grades: Sequence[float | None]) -> None:
    """Write a model's grades into the run's folder, beside those of other models on the same problems.

    Args:
        folder: of the run.
        who: "student_before", "student_after" or "teacher".
        problems: `problem_key` of each problem.
        grades: mean over the samples of each problem; None where it was not graded.
    """
    known = read_mapping(folder / GRADES, json.loads) or {}
    others = known if known.get(PROBLEMS) == list(problems) else {}
    write_json(folder / GRADES, {**others, PROBLEMS: list(problems), who: list(grades)})


def read_grades(folder: Path, who: str = "student_after") -> list[tuple[str, float]] | None:
    """(`problem_key`, grade) of each graded problem of a run; None where its folder has no grades of that model."""
    found: Mapping[str, Any] = read_mapping(folder / GRADES, json.loads) or {}
    problems, grades = found.get(PROBLEMS), found.get(who)
    if not isinstance(problems, list) or not isinstance(grades, list) or len(problems) != len(grades):
        return None
    graded = [(str(key), float(grade)) for key, grade in zip(problems, grades, strict=True) if _is_grade(grade)]
    return graded or None


def _is_grade(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
