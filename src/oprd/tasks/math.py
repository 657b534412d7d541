r"""Mathematics with the answer in ``\boxed{}``. Problems come from a file or the hub; `oprd.tasks.grading` grades them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from oprd.tasks.grading import MathGrader, VerdictCache, last_boxed

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""The instruction that published evaluations append to a problem."""


MAX_ANSWER_CHARS = 1_000
"""A longer answer, of a model or of a dataset, is not compared."""

_BRACE = re.compile(r"\\.|([{}])", re.DOTALL)
_CHOICE = re.compile(r"\(?[A-Z][).:](\s.*)?|\([A-Z]\)(\s.*)?", re.DOTALL)
_SENTENCE = re.compile(
    r"(?:so|thus|hence|therefore|the)?,?\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)", re.IGNORECASE
)
_NO_ANSWER = ("nan", "null", "n/a", "<na>", "?", "-")
_LIST = re.compile(r"""\[\s*(['"]).*\1\s*,?\s*\]""", re.DOTALL)
_TAGGED = re.compile(r"<(\w+)>.*</\1>.*", re.DOTALL | re.IGNORECASE)
_BOXES = re.compile(r"(?:\s|\$|,|;|\band\b|\bor\b|\\boxed\s*\{[^{}]*\})*")
_SOLUTION = re.compile(
    r"(?:we|let|since|first|because|note|suppose|consider|given|there (?:is|are)|to (?:find|solve))\b", re.IGNORECASE
)
_MOST_WORDS = 25  # of an answer in words

_VERDICTS = VerdictCache()  # of this task, whatever part of a run asks


class BoxedGrader:
    """A `Grader` that grades the last box with a `MathGrader`. The `with` block ends its worker processes.

    All graders of a process share the verdicts that workers have found.

    Args:
        workers: see `MathGrader`.
        timeout_s: likewise.
        batch_timeout_s: likewise.
    """

    in_processes = True

    def __init__(self, workers: int | None = None, timeout_s: float = 5.0, batch_timeout_s: float = 20.0) -> None:
        self._math = MathGrader(workers, timeout_s, MAX_ANSWER_CHARS, batch_timeout_s=batch_timeout_s, cache=_VERDICTS)

    @property
    def stats(self) -> Counter[str]:
        """Number of pairs by how they were decided (see `MathGrader`)."""
        return self._math.stats

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return for each response whether its boxed answer is correct.

        Raises:
            ValueError: the lengths differ, or an answer is empty.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses, {len(answers)} answers: give one answer for each response")
        return self._math.grade(list(zip(responses, answers, strict=True)))

    def __enter__(self) -> BoxedGrader:
        return self

    def __exit__(self, *error: object) -> None:
        self._math.close()


def check_answer(answer: str) -> None:
    r"""Refuse a reference answer that no response can equal: empty, too long, broken, or more than the answer.

    A worked solution is taken if it has a box; the last one is the answer.

    Raises:
        ValueError: says why, without the answer.
    """
    boxed = last_boxed(answer)
    stated = (answer if boxed is None else boxed).strip()
    if not re.sub(r"[$\s.{}]|\\boxed|\\text", "", stated):
        raise ValueError("is empty")
    if stated == "None" or stated.lower() in _NO_ANSWER:
        raise ValueError("stands for no answer (leave it null; if it is the answer, write it in \\text{})")
    if len(stated) > MAX_ANSWER_CHARS:
        raise ValueError(f"has {len(stated)} characters, and at most {MAX_ANSWER_CHARS} are compared")
    if "####" in stated:
        raise ValueError("has its result after ####")
    if boxed is None and _is_solution(stated):
        raise ValueError("is a worked solution without a box, and not the answer alone")
    if answer.count("\\boxed") > 1 and _BOXES.fullmatch(answer):
        raise ValueError("has several boxes, of which only the last is read: put all of it into one")
    if _LIST.fullmatch(stated):
        raise ValueError("is a list as text: write what it holds, without brackets and quotation marks")
    if _TAGGED.match(stated):
        raise ValueError("stands in tags: write what is between them")
    if _CHOICE.fullmatch(stated):
        raise ValueError("is the letter of a choice with more than the letter")
    depth = 0
    for brace in _BRACE.finditer(stated):
        depth += {"{": 1, "}": -1}.get(brace[1] or "", 0)
        if depth < 0:
            break
    if depth:
        raise ValueError("cannot be read: its braces do not match")


def _is_solution(stated: str) -> bool:
    """Whether an answer is more than the answer: several lines, a sentence that leads to it, or more words than one has."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", stated)
    several_lines = "\n" in stated and "\\begin" not in stated
    begins = _SOLUTION.match(stated) is not None and len(words) > 4
    return several_lines or _SENTENCE.match(stated) is not None or begins or len(words) > _MOST_WORDS
