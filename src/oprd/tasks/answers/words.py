r"""Answers that are no numbers: words, dates, times of day, numbers in a base, letters of choices.

math-verify reads them as products or quotients of symbols, so that `act` would be `cat`, and `12/6/2000` would be `4/2/2000`. Each
rule here takes two plain answers and returns a verdict, or None where it does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from oprd.tasks.answers.notation import compact
from oprd.tasks.answers.quantities import number_in_words

_TEXT = re.compile(r"\\text ?\{([^{}]*)\}")
_FUNCTION = re.compile(r"(?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp|sqrt|max|min|gcd|lcm|det|mod")
_ARTICLES = {"a", "an", "the"}
_SHORT_WORD = re.compile(r"no|on|up|in|is|it|if|of|to|at|by|my|we|he|so|go|do|us")
_LISTING = re.compile(r"[,;]|\b(?:and|or)\b", re.IGNORECASE)
_SYNONYMS = {
    "none": "empty set",
    "no solution": "empty set", "no solutions": "empty set", "no real solution": "empty set", "no real solutions": "empty set",
    "dne": "does not exist", "all reals": "all real numbers",
}  # fmt: skip


def bare(text: str) -> str:
    r"""The text without ``\text{}``, with single spaces."""
    return " ".join(_TEXT.sub(r" \1 ", text).split())


def words_of(text: str) -> tuple[str, ...] | None:
    r"""The words of an answer in words, in lower case without articles; None for anything else, lists of words among it.

    Letters without ``\text{}`` are words if they hold a vowel, as products of variables seldom do: `xy` is no word, nor is `abc`.
    """
    if compact(text) == r"\emptyset":
        return ("empty", "set")
    inner = bare(text).replace("-", " ").removesuffix(".")
    found = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?\.?", inner)
    if not found or "".join(inner.split()) != "".join(found) or _LISTING.search(inner):
        return None
    words = [word.lower().removesuffix(".") for word in found]
    if not (_TEXT.search(text) or any(map(_is_word, words))):
        return None
    if len("".join(words)) < 2 or any(map(_FUNCTION.fullmatch, words)):
        return None
    without = " ".join(words if len(words) == 1 else [word for word in words if word not in _ARTICLES])
    return tuple(_SYNONYMS.get(without, without).split())


_REAL_NUMBERS = {
    "all reals",
    "reals",
    "real numbers",
    "all real numbers",
    "set of all real numbers",
    "set of real numbers",
}
_REAL_LINE = {r"\mathbb{R}", r"(-\infty,\infty)", r"(-\infty,+\infty)", r"x\in\mathbb{R}"}


def same_real_line(answer: str, truth: str) -> bool | None:
    """All real numbers, in words and in signs; None where one of the two is something else."""
    names = [
        " ".join(w for w in bare(text).lower().removesuffix(".").split() if w != "the") for text in (answer, truth)
    ]
    both = all(
        n in _REAL_NUMBERS or compact(text) in _REAL_LINE for n, text in zip(names, (answer, truth), strict=True)
    )
    return True if both else None


def _is_word(letters: str) -> bool:
    if len(letters) < 3:
        return _SHORT_WORD.fullmatch(letters) is not None
    return bool(set(letters) & set("aeiou")) and not set(letters) <= set("abcxyz")


def same_words(answer: str, truth: str) -> bool | None:
    """Words are compared letter by letter: anagrams are other words. A word is no number and no formula."""
    a, t = words_of(answer), words_of(truth)
    if a is not None and t is not None:
        return a == t
    words, other = (a, truth) if t is None else (t, answer)
    if words is None or r"\emptyset" in other or any(number_in_words(text) is not None for text in (answer, truth)):
        return None
    if words == tuple(bare(other).lower().split()):
        return True
    has_words = re.search(r"[^\W\d_]{2,}", re.sub(r"\\(?!text)[A-Za-z]+", "", other))
    return None if has_words else False


_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    "|dec(?:ember)?"
)
_MONTHS = "janfebmaraprmayjunjulaugsepoctnovdec"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_NAMED_DATES = [
    re.compile(rf"(?P<month>{_MONTH})\.? {_DAY}(?:,? (?P<year>\d{{4}}))?"),
    re.compile(rf"{_DAY}(?: of)? (?P<month>{_MONTH})\.?(?:,? (?P<year>\d{{4}}))?"),
]
_YEAR_FIRST = re.compile(r"([12]\d{3})([-/.])(\d{1,2})\2(\d{1,2})", re.ASCII)
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2([12]\d{3})", re.ASCII)


def date_of(text: str) -> tuple[int, ...] | None:
    """(year, month, day) of a date, with year 0 where none is given; (year, a, b, -1) of `a/b/year`, whose order is not known."""
    inner = bare(text)
    if match := _YEAR_FIRST.fullmatch(compact(inner)):
        return int(match[1]), int(match[3]), int(match[4])
    if match := _YEAR_LAST.fullmatch(compact(inner)):
        return int(match[4]), int(match[1]), int(match[3]), -1
    for pattern in _NAMED_DATES:
        if match := pattern.fullmatch(inner.lower()):
            return int(match["year"] or 0), _MONTHS.index(match["month"][:3]) // 3 + 1, int(match["day"])
    return None


def same_date(answer: str, truth: str) -> bool | None:
    """Dates are no differences or quotients; day and month may not be swapped."""
    a, t = date_of(answer), date_of(truth)
    if a is None and t is None:
        return None
    if a is None or t is None:
        return False
    if len(a) != len(t):
        return a[0] == t[0] and sorted(a[1:3]) == sorted(t[1:3])
    return a == t


_TIME = re.compile(r"(\d{1,2})(?: ?: ?([0-5]\d))?(?: ?: ?([0-5]\d))? ?([ap]\.?m\.?)?", re.ASCII | re.IGNORECASE)


def _time_of(text: str) -> tuple[int, int, int, str] | None:
    match = _TIME.fullmatch(bare(text))
    if match is None or not (match[2] or match[4]) or int(match[1]) > 24:
        return None
    half = (match[4] or "").replace(".", "").lower()
    return int(match[1]), int(match[2] or 0), int(match[3] or 0), half


def same_time(answer: str, truth: str) -> bool | None:
    """Times of day, also against 24 hours: 10:30 is not 1:3."""
    a, t = _time_of(answer), _time_of(truth)
    if a is not None and t is not None:
        unsaid = not (a[3] and t[3]) and a[:3] == t[:3]
        return unsaid or _in_24_hours(*a) == _in_24_hours(*t)
    time, other = a or t, truth if t is None else answer
    if time is None or "=" in other:
        return None
    # 12:25 may be the ratio 12/25, but 10:30 is not 1/3.
    return compact(other) in (f"{time[0]}/{time[1]}", rf"\frac{{{time[0]}}}{{{time[1]}}}")


def _in_24_hours(hour: int, minute: int, second: int, half: str) -> tuple[int, int, int]:
    return hour % 12 + 12 * (half == "pm") if half else hour, minute, second


_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
    "sixteen": 16, "binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16,
}  # fmt: skip
_IN_BASE = re.compile(
    r"\(?([0-9A-Za-z][0-9A-Za-z,]*)\)?(?: ?_ ?\{?\(? ?(?:base)? ?(\w+) ?\)?\}?| ?\(? ?(?:in )?base ?-? ?_?(\w+) ?\)?)",
    re.ASCII,
)


def in_base(text: str) -> tuple[str, int] | None:
    """(digits, base) of `52_8`, `52 (base 8)` and the like; None for anything else, `x_1` among it."""
    match = _IN_BASE.fullmatch(bare(text))
    if match is None:
        return None
    name, digits = (match[2] or match[3]).lower(), match[1].replace(",", "").lower()
    base = int(name) if name.isdigit() and len(name) < 3 else _BASES.get(name, 0)
    if base < 2 or (not digits.isdigit() and any(int(digit, 36) >= base for digit in digits)):
        return None
    return digits.lstrip("0") or "0", base


def same_in_base(answer: str, truth: str) -> bool | None:
    """A number in a base equals only the same digits in the same base; math-verify ignores the base."""
    a, t = in_base(answer), in_base(truth)
    if a is not None and t is not None:
        return a == t
    number, other = a or t, compact(bare(truth if t is None else answer)).replace(",", "")
    if number is None or number[0][0].isalpha() or not re.fullmatch(r"[\w.]+", other):
        return None
    return number[1] == 10 and other.lstrip("0").lower() == number[0]


_LETTER = re.compile(r"[(\[]? ?([A-Za-z]) ?[)\]]?[.):]?")
_CONTENT = r"\\(?:frac|sqrt|pi|\$)|\$|-?\.?\d|[A-Za-z]{2}"
_WITH_CONTENT = [
    re.compile(rf"[(\[] ?([A-J]) ?[)\]][.:]? ?(?={_CONTENT}).+"),
    re.compile(rf"([A-J])[.):] ?(?={_CONTENT}).+"),
    re.compile(r"(?:the )?(?:correct )?(?:option|choice|answer)(?: is)? ?:? ?\(?([A-Z])\)?\.?", re.IGNORECASE),
]


def _letter_of(text: str) -> tuple[str, bool] | None:
    """(letter of a choice, whether it stands alone) of `C`, `(C)`, `(C) 12`, `Option C`."""
    inner = bare(text)
    if match := _LETTER.fullmatch(inner):
        return match[1], True
    found = (pattern.fullmatch(inner) for pattern in _WITH_CONTENT)
    return next(((match[1].upper(), False) for match in found if match), None)


def same_choice(answer: str, truth: str) -> bool | None:
    """The letter of a choice, alone or before the choice's content; several letters with or without commas."""
    if letters := _letters_of(truth):
        others = _letters_of(answer)
        return None if others is None else others == letters
    a, t = _letter_of(answer), _letter_of(truth)
    if a is None or t is None:
        return None
    is_variable = t[0].islower() and t[1] and compact(bare(truth)).isalpha()
    return None if is_variable else a[0].upper() == t[0].upper()


def _letters_of(text: str) -> str | None:
    """`ACD` of `ACD` or `A, C, D`: several choices, in the alphabet's order."""
    inner = re.sub(r"[\s,;&()]|\band\b", "", bare(text))
    ordered = "".join(sorted(set(inner)))
    if not re.fullmatch(r"[A-H]{2,8}", inner) or len(ordered) != len(inner):
        return None
    return ordered if inner == ordered or "," in text else None


def same_prose(answer: str, truth: str) -> bool | None:
    """Sentences are the same word for word: algebra would multiply their letters."""
    a, t = _sentence(answer), _sentence(truth)
    return None if a is None or t is None else a == t


def _sentence(text: str) -> tuple[str, ...] | None:
    inner = bare(text).lower()
    words = re.findall(r"(?<!\\)\b[^\W\d_]{3,}", inner)
    is_formula = re.search(r"[\\^_=<>{}]", inner) or _LISTING.search(inner)
    if is_formula or sum(not _FUNCTION.fullmatch(word) for word in words) < 3:
        return None
    return tuple(word for word in re.findall(r"\w+", inner) if word not in _ARTICLES)


_RULES: tuple[Callable[[str, str], bool | None], ...] = (
    same_real_line, same_in_base, same_date, same_time, same_choice, same_words, same_prose,
)  # fmt: skip


def same_text(answer: str, truth: str) -> bool | None:
    """The verdict of the first rule that applies to two plain answers; None if none does."""
    verdicts = (rule(answer, truth) for rule in _RULES)
    return next((verdict for verdict in verdicts if verdict is not None), None)
