r"""Splits an answer into its parts: lists, tuples, sets, intervals, inequalities, equations, matrices, ratios.

The text is split where LaTeX itself separates. What is left in one piece is an expression; nothing here reads those.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from oprd.tasks.answers.notation import compact
from oprd.tasks.answers.quantities import quantity, value_of
from oprd.tasks.answers.words import words_of


@dataclass(frozen=True)
class Part:
    """An answer, split.

    Args:
        kind: "one" expression, "list", "bracket" (a tuple or an interval), "set", "union", "matrix", "ratio", "equation", "about"
            (an approximation).
        text: of the whole; of a bracket what encloses it, such as "(]".
        items: its parts; of an equation or approximation the right side.
        name: of an equation or approximation the left side; of an interval from an inequality its variable.
    """

    kind: str
    text: str
    items: tuple[Part, ...] = ()
    name: str = ""


_TOKEN = re.compile(r"\\text ?\{[^{}]*\}|\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\end"}


def split(text: str, separators: str) -> list[tuple[str, str]]:
    """Split at separators (a regular expression of a whole token) outside brackets.

    Returns:
        (separator before the part, the part), the first with an empty separator.
    """
    parts, depth, before, start = [], 0, "", 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth <= 0 and re.fullmatch(separators, token[0]):
            parts.append((before, text[start : token.start()].strip()))
            before, start = token[0], token.end()
    return [*parts, (before, text[start:].strip())]


def _is_balanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


_WHOLE_TEXT = re.compile(r"\\text ?\{ ?(\\\{.*\\\}|[^{}]*) ?\}")
_REVERSED = re.compile(r"\](?P<both>.*[,;].*)(?P<end>[\[\]])|\[(?P<right>.*[,;].*)\[")


def parse(text: str) -> Part:
    """Split a plain answer into its parts."""
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole[1].strip()
    if (match := _REVERSED.fullmatch(text)) and not re.search(r"[\[\]]", text[1:-1]):  # ]1, 2[ as in France
        text = f"[{match['right']})" if match["right"] else f"({match['both']}{')' if match['end'] == '[' else ']'}"
    if value_of(quantity(text).text) is not None:
        return Part("one", text)
    readings = (
        _empty,
        _set_builder,
        _list,
        _approximation,
        _relation,
        _union,
        _bracketed,
        _matrix,
        _ratio,
        _plus_minus,
    )
    parts = (reading(text) for reading in readings)
    return next((part for part in parts if part is not None), Part("one", text))


_NAME = re.compile(
    r"\\text ?\{[^{}]*\}|[A-Za-z]{3,}(?: [A-Za-z]+)*|[A-Z]{2}|\| ?(?:[A-Za-z]|[A-Z]{2,3}) ?\||(?:m ?)?\\angle ?[A-Z]{1,3}"
    r"|(?:[A-Za-z]|\\[a-z]+)'*(?:_\{?\w+\}?)?|\\vec ?\{\w\}|[A-Za-z]'*(?:\^\{?-1\}?)? ?\([^()]*\)|\(\w(?:, ?\w)+\)"
)
_QUOTIENT = re.compile(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}|([^:/]+)[:/]([^:/]+)")


def is_name(text: str) -> bool:
    r"""Whether a left side only names the right one: `x`, `x_1`, `f(x)`, `AB`, `|S|`, ``\angle ABC``, ``\text{Area}``, `a:b`."""
    if text in (r"\pi", r"\infty", "e"):
        return False
    if match := _QUOTIENT.fullmatch(text):
        return all(_NAME.fullmatch(part.strip()) for part in match.groups() if part)
    return bool(_NAME.fullmatch(text))


def _empty(text: str) -> Part | None:
    return Part("set", text) if words_of(text) == ("empty", "set") else None


def _set_builder(text: str) -> Part | None:
    r"""``\{x \mid 3 \le x < 8\}`` as its condition."""
    if not (text.startswith(r"\{") and text.endswith(r"\}")):
        return None
    match = re.fullmatch(r"([^|:]*?) ?[|:] ?(.+)", text[2:-2].strip())
    if match is None or not is_name(re.sub(r" ?\\in.*", "", match[1])):
        return None
    return parse(match[2])


_AND_OR = re.compile(
    r",? ?(?:\\text\{ ?,? ?(and|or) ?,? ?\}|(?<![A-Za-z\\{])(and|or)(?![A-Za-z}])|\\(lor|land|vee|wedge)(?![A-Za-z])) ?"
)


def _list(text: str) -> Part | None:
    either = {match[1] or match[2] or match[3] for match in _AND_OR.finditer(text)} & {"or", "lor", "vee"}
    texts = _listed(_AND_OR.sub(" , ", text))
    if len(texts) < 2:
        return parse(texts[0]) if texts and texts[0] != text and either else None
    items = [parse(part) for part in texts]
    first, rest = items[0], items[1:]
    if first.kind == "equation" and is_name(first.name) and all(item.kind == "one" for item in rest):  # n = 1, 2, 3
        return Part("equation", text, (Part("list", text, (*first.items, *rest)),), first.name)
    if all(item.kind in ("bracket", "union") and item.name for item in items):
        return _conditions(text, items, bool(either))
    return Part("list", text, tuple(value for item in items for value in _values(item)))


def _values(item: Part) -> Sequence[Part]:
    r"""An item of a list; of ``\pm 2`` and ``x = \pm 2`` both."""
    if r"\pm" not in item.text:
        return (item,)
    if item.kind == "equation" and item.items[0].kind == "list":
        return [replace(item, items=(value,)) for value in item.items[0].items]
    return item.items if item.kind == "list" else (item,)


def _listed(text: str) -> list[str]:
    """Texts between commas, or between semicolons where there are both (`p=5, q=2; p=7, q=2`).

    Where commas group digits as well (`1,200, 3,400`), those with a space separate.
    """
    if re.search(r"\d,\d{3}(?!\d)", text) and ", " in text:
        text = re.sub(r",(?=\d{3}(?!\d))", "\0", text)
    for separator in (";", ","):
        parts = [part.replace("\0", ",") for _, part in split(text, separator) if part]
        if len(parts) > 1:
            break
    return parts


def _conditions(text: str, items: Sequence[Part], either: bool) -> Part:
    """Inequalities: of one variable their union, or the interval that they bound together; else a list."""
    name = items[0].name if len({item.name for item in items}) == 1 else ""
    lower = [item for item in items if item.kind == "bracket" and item.items[1].text == r"\infty"]
    upper = [item for item in items if item.kind == "bracket" and item.items[0].text == r"-\infty"]
    if name and not either and len(items) == 2 and len(lower) == len(upper) == 1:
        return Part("bracket", lower[0].text[0] + upper[0].text[1], (lower[0].items[0], upper[0].items[1]), name)
    flat = tuple(inner for item in items for inner in (item.items if item.kind == "union" else (item,)))
    return Part("union" if either or name else "list", text, flat, name)


_ABOUT = re.compile(
    r"^(?:\\text\{ ?(?:approximately|about|approx\.?|roughly|around) ?\}|(?:approximately|about|approx\.?|roughly|around) )"
)


def _approximation(text: str) -> Part | None:
    parts = split(_ABOUT.sub(r"\\approx ", text), r"\\approx|\\sim|\\simeq|\\doteq")
    if len(parts) < 2 or not parts[-1][1]:
        return None
    return Part("about", text, (parse(parts[-1][1]),), parts[0][1])


_SIGNS = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\neq": "!="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _relation(text: str) -> Part | None:
    parts = split(text, r"\\in|\\notin|<|>|\\le|\\ge|\\neq|=")
    signs, sides = [sign for sign, _ in parts[1:]], [side for _, side in parts]
    if not signs or not all(sides):
        return None
    if signs == [r"\in"]:
        inner = parse(sides[1])
        is_interval = inner.kind in ("bracket", "union")
        return replace(inner, name=sides[0]) if is_interval else Part("equation", text, (inner,), sides[0])
    if all(sign in _SIGNS for sign in signs):
        return _inequality(text, sides, [_SIGNS[sign] for sign in signs])
    if any(sign != "=" for sign in signs):
        return Part("one", text)
    first, last = sides[0], sides[-1]
    if is_name(last) and not is_name(first) and len(sides) == 2:  # 5 = x
        first, last = last, first
    return Part("equation", text, (parse(last),), first)


def _inequality(text: str, sides: Sequence[str], signs: Sequence[str]) -> Part:
    """An inequality as the interval of its variable, or two of them."""
    if len(signs) == 1:
        name, end, sign = sides[0], sides[1], signs[0]
        if not is_name(name):
            name, end, sign = end, name, _FLIPPED[sign]
        if not is_name(name) or is_name(end):
            return Part("one", text)
        limit = parse(end)
        if sign == "!=":
            return _without(text, [limit], name)
        if absolute := _ABSOLUTE.fullmatch(name):
            return _distance(text, absolute[1], limit, sign)
        if sign[0] == "<":
            return Part("bracket", "(]" if sign == "<=" else "()", (_LOW, limit), name)
        return Part("bracket", "[)" if sign == ">=" else "()", (limit, _HIGH), name)
    if len(signs) == 2 and is_name(sides[1]) and signs[0][0] == signs[1][0] != "!":
        ends, order = [parse(sides[0]), parse(sides[2])], list(signs)
        if signs[0][0] == ">":
            ends, order = ends[::-1], order[::-1]
        around = ("[" if "=" in order[0] else "(") + ("]" if "=" in order[1] else ")")
        between = Part("bracket", around, tuple(ends), sides[1])
        absolute = _ABSOLUTE.fullmatch(sides[1])
        return _mirrored(text, between, absolute[1]) if absolute and (value_of(ends[0].text) or 0) > 0 else between
    return Part("one", text)


_ABSOLUTE = re.compile(r"\| ?([a-z]) ?\|")


def _mirrored(text: str, positive: Part, name: str) -> Part:
    """`1 < |x| < 2` as (-2, -1) and (1, 2)."""
    low, high = positive.items
    around = ("[" if positive.text[1] == "]" else "(") + ("]" if positive.text[0] == "[" else ")")
    negative = Part("bracket", around, (Part("one", f"-{high.text}"), Part("one", f"-{low.text}")), name)
    return Part("union", text, (negative, replace(positive, name=name)), name)


def _distance(text: str, name: str, limit: Part, sign: str) -> Part:
    """`|x| < a` as (-a, a), and `|x| > a` as what is outside."""
    negative = Part("one", f"-{limit.text}")
    if sign[0] == "<":
        return Part("bracket", "[]" if sign == "<=" else "()", (negative, limit), name)
    outside = (
        Part("bracket", "(]" if sign == ">=" else "()", (_LOW, negative), name),
        Part("bracket", "[)" if sign == ">=" else "()", (limit, _HIGH), name),
    )
    return Part("union", text, outside, name)


def _without(text: str, points: Sequence[Part], name: str) -> Part:
    """All real numbers but some, which are in ascending order."""
    ends = [_LOW, *points, _HIGH]
    return Part("union", text, tuple(Part("bracket", "()", pair, name) for pair in pairwise(ends)), name)


_REALS_WITHOUT = re.compile(r"\\mathbb ?\{R\} ?(?:\\setminus|\\backslash|-) ?\\\{(.*)\\\}")


def _union(text: str) -> Part | None:
    if match := _REALS_WITHOUT.fullmatch(text):
        points = [parse(part) for part in _listed(match[1])]
        values = [value for point in points if (value := value_of(point.text)) is not None]
        in_order = len(points) == 1 or (len(values) == len(points) and values == sorted(values))
        return _without(text, points, "") if in_order else Part("one", text)
    texts = [part for _, part in split(text, r"\\cup")]
    if len(texts) < 2:
        return None
    parts = [parse(part) for part in texts]
    if all(part.kind == "set" for part in parts):
        return Part("set", text, tuple(item for part in parts for item in part.items))
    return Part("union", text, tuple(parts))


_LOW, _HIGH = Part("one", r"-\infty"), Part("one", r"\infty")
_BRACKETS = [
    ("(", ")", "()"), ("[", "]", "[]"), ("(", "]", "(]"), ("[", ")", "[)"), (r"\langle", r"\rangle", "()"), (r"\{", r"\}", "{}"),
]  # fmt: skip
_POINT = re.compile(r"^[A-Z]'? ?(?=\([^()]*,[^()]*\)$)")


def _bracketed(text: str) -> Part | None:
    if compact(text) == r"\mathbb{R}" or words_of(text) == ("all", "real", "numbers"):
        return Part("bracket", "()", (_LOW, _HIGH))
    text = _POINT.sub("", text)  # P(2,7)
    for left, right, around in _BRACKETS:
        inner = text.removeprefix(left).removesuffix(right).strip()
        if not (text.startswith(left) and text.endswith(right) and inner and _is_balanced(inner)):
            continue
        if around == "{}":
            content = parse(inner)
            return Part("set", text, content.items if content.kind == "list" else (content,))
        items = _listed(_AND_OR.sub(", ", inner))
        if len(items) > 1:
            return Part("bracket", around, tuple(parse(item) for item in items))
    return None


_ENVIRONMENT = re.compile(
    r"([(\[|]?) ?\\begin\{(\w*matrix|array)\}(?: ?\{[^{}]*\})?(.*)\\end\{\2\} ?[)\]|]?", re.DOTALL
)


def _matrix(text: str) -> Part | None:
    match = _ENVIRONMENT.fullmatch(text)
    if match is None or r"\begin" in match[3]:
        return None
    if match[2] in ("vmatrix", "Vmatrix") or match[1] == "|":  # a determinant is a number
        return Part("one", text)
    rows = [split(row, "&") for _, row in split(match[3], r"\\\\") if row]
    return Part("matrix", text, tuple(Part("list", "", tuple(parse(cell) for _, cell in row)) for row in rows))


def _ratio(text: str) -> Part | None:
    text = re.sub(r"(?<=[\d}]) ?(?:\\text\{ ?to ?\}|to) ?(?=[\d\\])", ":", text)
    parts = [part for _, part in split(text, ":")]
    if len(parts) < 2 or not all(parts):
        return None
    return Part("ratio", text, tuple(Part("one", part) for part in parts))


def _plus_minus(text: str) -> Part | None:
    r"""``3 \pm 2`` as the list 5, 1; of several signs all combinations, and ``\mp`` against ``\pm``."""
    count = text.count(r"\pm")
    if not 1 <= count <= 3:
        return None
    values = [text]
    if r"\mp" in text:
        values = [text.replace(r"\pm", pm).replace(r"\mp", mp) for pm, mp in ("+-", "-+")]
    else:
        for _ in range(count):
            values = [value.replace(r"\pm", sign, 1) for value in values for sign in "+-"]
    return Part("list", text, tuple(Part("one", value.removeprefix("+").strip()) for value in values))
