r"""Verdicts near the edge: answers that were graded wrong, but read the same as the reference without markup.

Markup: braces, spaces, quotation marks, Markdown, and all commands but those that mean something, such as ``\frac``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from oprd.tasks.answers.notation import plain
from oprd.tasks.grading import last_boxed

_LONGEST = 1_000  # characters of an answer; longer ones are not graded either
_MEANING = re.compile(
    r"[dtc]?frac|sqrt|pi|infty|pm|mp|cup|cap|in|notin|times|cdot|div|le|ge|neq|approx|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp"
    r"|binom|emptyset|circ|langle|rangle|ldots|alpha|beta|gamma|delta|theta|lambda|omega|phi|overline|mathbb|sum|prod|int|lim|to"
)


@dataclass(frozen=True)
class NearMiss:
    """One answer.

    Args:
        where: names the problem or step.
        answer: the content of the response's last box; the whole response where it has none.
        truth: the reference answer.
    """

    where: str
    answer: str
    truth: str


@dataclass(frozen=True)
class NearMisses:
    """How many there are, and the first of them."""

    count: int
    first: tuple[NearMiss, ...]


def near_misses(wrong: Iterable[tuple[str, str, str]], most: int = 20) -> NearMisses:
    """Find the near misses among responses that were graded wrong, in time linear in their length.

    Args:
        wrong: (where, response, reference answer) of each.
        most: maximum number of those that are kept.
    """
    count, first = 0, list[NearMiss]()
    for where, response, truth in wrong:
        answer = _boxed(response) or response.strip()
        if near_miss(answer, _boxed(truth) or truth):
            count += 1
            if len(first) < most:
                first.append(NearMiss(where, answer, truth))
    return NearMisses(count, tuple(first))


def _boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    return None if start < 0 else last_boxed(text[start:]) or last_boxed(text)


def near_miss(answer: str, truth: str) -> bool:
    """Whether two answers read the same without markup: what a checker that calls them different may have misread."""
    if max(len(answer), len(truth)) > _LONGEST or not _may_read_the_same(answer, truth):
        return False
    return _skeleton(answer) == _skeleton(truth) != ""


def _may_read_the_same(answer: str, truth: str) -> bool:
    """False if the digits rule it out: markup may hold digits, but removing it keeps the order of the others."""
    if not (answer.isascii() and truth.isascii()):
        return True
    fewer, more = sorted(("".join(re.findall(r"\d", text)) for text in (answer, truth)), key=len)
    rest = iter(more)
    return all(digit in rest for digit in fewer)


def _skeleton(answer: str) -> str:
    text = re.sub(r"\\([A-Za-z]+)((?:\{[^{}]*\})*)", _unmarked, plain(answer))
    return re.sub(r"[\s{}\\$*`\"~]", "", text).lower().rstrip(".,;")


def _unmarked(match: re.Match[str]) -> str:
    """A command as its name and arguments; one that only marks, as its last argument."""
    return f"{match[1]}{match[2]}" if _MEANING.fullmatch(match[1]) else match[2].rpartition("{")[2]
