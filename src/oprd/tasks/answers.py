r"""Whether two answers are the same, as far as no algebra is needed (`oprd.tasks.structures` goes on from there)."""

from __future__ import annotations

import re

from oprd.tasks.notation import normalize_answer, plain
from oprd.tasks.quantities import quantity, same_value, value_of
from oprd.tasks.words import same_text

_INTRODUCED = re.compile(
    r"(?:\\text\{ ?)?(?:(?:therefore|thus|hence|so|then),? ?\}? ?)?(?:\\text\{ ?)?(?:(?:the |my )?(?:final |correct )?(?:answer|result|value|total|solution)"
    r" ?(?:is|are|:|=|equals)[ :]*)\}? ?",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"\\text\{ ?[A-Za-z ]+: ?\} ?|\\text\{ ?(?:therefore|thus|hence|so|then),? ?\} ?", re.IGNORECASE)


def stated(answer: str) -> str:
    """A plain answer without words before it, such as `The answer is`."""
    text = plain(answer)
    for pattern in (_LABELLED, _INTRODUCED):
        if (match := pattern.match(text)) and len(match[0]) < len(text):
            text = plain(text[match.end() :])
            if match[0].count("{") > match[0].count("}"):
                text = plain(text.removesuffix("}"))
    return text


def decide(answer: str, truth: str) -> tuple[bool | None, str]:
    """Compare without algebra. Returns (verdict, how): verdict None means undecided, `how` is "exact" or "numeric".

    Numbers are compared exactly, so 0.333 is not 1/3.
    """
    if normalize_answer(answer) == normalize_answer(truth):
        return True, "exact"
    answer, truth = stated(answer), stated(truth)
    verdict = same_text(answer, truth)
    if verdict is not None:
        return verdict, "exact"
    a, t = quantity(answer), quantity(truth)
    values = value_of(a.text), value_of(t.text)
    if values[0] is not None and values[1] is not None:
        return same_value(values[0], values[1], a, t), "numeric"
    return None, ""


_MEANS = (
    "frac sqrt pi infty pm mp cup cap in notin times cdot div le ge neq approx sin cos tan cot sec csc ln log exp arcsin arccos arctan "
    "binom emptyset circ langle rangle ldots alpha beta gamma delta theta lambda omega overline prime mathbb sum prod int lim to"
).split()


def near_miss(answer: str, truth: str) -> bool:
    r"""Whether two answers read the same without markup: what a checker that calls them different may have misread.

    Markup: braces, spaces, quotation marks, Markdown, and all commands but those that mean something, such as ``\frac``.
    """
    return _skeleton(answer) == _skeleton(truth) != ""


def _skeleton(answer: str) -> str:
    text = re.sub(r"\\([A-Za-z]+)((?:\{[^{}]*\})*)", _unmarked, plain(answer))
    return re.sub(r"[\s{}\\$*`\"~]", "", text).lower().rstrip(".,;")


def _unmarked(match: re.Match[str]) -> str:
    """A command as its name and arguments; one that only marks, as its last argument."""
    return f"{match[1]}{match[2]}" if match[1] in _MEANS else match[2].rpartition("{")[2]
