r"""Whether two answers are the same, as far as no algebra is needed (`oprd.tasks.answers.comparison` goes on from there)."""

from __future__ import annotations

import re

from oprd.tasks.answers.notation import normalize_answer, plain
from oprd.tasks.answers.quantities import quantity, same_value, with_letter_units
from oprd.tasks.answers.words import same_text

_SO = r"(?:therefore|thus|hence|so|then),?"
_INTRODUCED = re.compile(
    rf"(?:\\text\{{ ?)?(?:{_SO} ?\}}? ?)?(?:\\text\{{ ?)?(?:(?:the|my) )?(?:(?:final|correct) )?"
    r"(?:answer|result|value|total|solution) ?(?:is|are|:|=|equals)[ :]*\}? ?",
    re.IGNORECASE,
)
_FOR_ALL = re.compile(
    r",? ?(?:\\text ?\{ ?)?for (?:all|any|every) (?:real (?:numbers? )?)?\}? ?[a-z](?: ?\\in ?\\mathbb\{R\})?\}?$"
)
_LABELLED = re.compile(rf"\\text\{{ ?[A-Za-z ]+: ?\}} ?|\\text\{{ ?{_SO} ?\}} ?", re.IGNORECASE)


def stated(answer: str) -> str:
    """A plain answer without words before it, such as `The answer is`."""
    text = plain(answer)
    for pattern in (_LABELLED, _INTRODUCED):
        if (match := pattern.match(text)) and len(match[0]) < len(text):
            rest = text[match.end() :]
            if match[0].count("{") > match[0].count("}"):  # the text goes on: \text{The answer is 36}
                rest = rf"\text{{{rest}"
            text = plain(rest)
    return _FOR_ALL.sub("", text)


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
    verdict = same_value(*with_letter_units(quantity(answer), quantity(truth)))
    return verdict, "" if verdict is None else "numeric"
