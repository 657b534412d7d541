r"""Whether two answers are the same, part by part: lists, tuples, sets, intervals, inequalities, equations, matrices, ratios.

math-verify confuses some of these (a pair with an open interval or a set, a list with its first equation). Here the text is split
where LaTeX itself separates, and only single expressions go to algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol, runtime_checkable

from oprd.tasks.answers import decide, stated
from oprd.tasks.notation import compact, plain
from oprd.tasks.quantities import Quantity, quantity, value_of
from oprd.tasks.words import words_of

Verdict = bool | None  # None: it cannot be read


@runtime_checkable
class Algebra(Protocol):
    """What decides about expressions of plain LaTeX. Each method returns None for what it cannot read."""

    def same_expression(self, answer: str, truth: str) -> Verdict:
        """Whether two expressions have the same value, for all values of their variables."""

    def same_equation(self, answer: tuple[str, str], truth: tuple[str, str]) -> Verdict:
        """Whether two equations, each a left and a right side, have the same solutions."""

    def close(self, first: str, second: str) -> bool:
        """Whether one number may be an approximation of the other."""


@dataclass(frozen=True)
class Part:
    """An answer, split.

    Args:
        kind: "one" expression, "list", "bracket", "set", "union", "matrix", "ratio", "equation", "about" (an approximation).
        text: of the whole; of a bracket or a matrix what encloses it, such as "(]".
        items: its parts; of an equation or approximation the right side.
        name: of an equation or approximation the left side; of an interval from an inequality its variable.
    """

    kind: str
    text: str
    items: tuple[Part, ...] = ()
    name: str = ""


# --- Splitting -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\\text ?\{[^{}]*\}|\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_REVERSED = re.compile(r"\](.*[,;].*)([\[\]])|\[(.*[,;].*)(\[)")
_OPEN, _CLOSE = {"(", "[", "{", r"\{", r"\langle", r"\begin"}, {")", "]", "}", r"\}", r"\rangle", r"\end"}


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


_AND_OR = re.compile(r",? ?(?:\\text\{ ?,? ?(and|or) ?,? ?\}|(?<![A-Za-z\\{])(and|or)(?![A-Za-z}])|\\(lor|land|vee|wedge)(?![A-Za-z])) ?")
_DOTS = re.compile(r"\\ldots")


def parse(text: str) -> Part:
    """Split a plain answer into its parts."""
    text = re.sub(r"^\\text ?\{([^{}]*)\}$", r"\1", _set_in_text(text)).strip()
    if (match := _REVERSED.fullmatch(text)) and "[" not in (match[1] or match[3]):  # ]1, 2[ as in France
        text = f"({match[1]}{')' if match[2] == '[' else ']'}" if match[1] else f"[{match[3]})"
    if value_of(quantity(text).text) is not None:
        return Part("one", text)
    for reading in (_empty, _set_builder, _list, _approximation, _relation, _union, _bracketed, _matrix, _ratio, _plus_minus):
        part = reading(text)
        if part is not None:
            return part
    return Part("one", text)


def _set_in_text(text: str) -> str:
    r"""``\text{\{1, 2\}}`` as ``\{1, 2\}``."""
    return re.sub(r"^\\text ?\{ ?(\\\{.*\\\}) ?\}$", r"\1", text)


def _empty(text: str) -> Part | None:
    return Part("set", text) if words_of(text) == ("empty", "set") else None


def _list(text: str) -> Part | None:
    ways = [m[1] or m[2] or m[3] for m in _AND_OR.finditer(text)]
    split_at = r",|;"
    if re.search(r"\d,\d{3}(?!\d)", text) and re.search(r", |;", text):  # 1,200, 3,400
        text, split_at = re.sub(r",(?=\d{3}(?!\d))", "\0", text), r",|;"
    parts = [part.replace("\0", ",") for _, part in split(_AND_OR.sub(" ; ", text), split_at)]
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return parse(parts[0]) if ways and parts else None
    items = [parse(part) for part in parts]
    if (
        items[0].kind == "equation" and all(item.kind == "one" for item in items[1:]) and _is_name(items[0].name)
    ):  # n = 1, 2, 3
        whole = Part("list", text, (*items[0].items, *items[1:]))
        return Part("equation", text, (whole,), items[0].name)
    if all(item.kind in ("bracket", "union") and item.name for item in items):
        return _conditions(text, items, "or" in ways or bool({"lor", "vee"} & set(ways)))
    flat = [inner for item in items for inner in (item.items if item.kind == "list" else (item,))]
    return Part("list", text, tuple(flat))


def _conditions(text: str, items: Sequence[Part], either: bool) -> Part:
    """Inequalities of one variable: a union, or where two of them are bounds of one interval, that interval."""
    one_name = len({item.name for item in items}) == 1
    if not either and one_name and len(items) == 2 and all(item.kind == "bracket" for item in items):
        first, second = items
        if first.items[1].text == r"\infty" and second.items[0].text == r"-\infty":
            return Part("bracket", first.text[0] + second.text[1], (first.items[0], second.items[1]), first.name)
        if second.items[1].text == r"\infty" and first.items[0].text == r"-\infty":
            return Part("bracket", second.text[0] + first.text[1], (second.items[0], first.items[1]), first.name)
    flat = [inner for item in items for inner in (item.items if item.kind == "union" else (item,))]
    return Part("union" if either or one_name else "list", text, tuple(flat), items[0].name if one_name else "")


def _approximation(text: str) -> Part | None:
    text = re.sub(r"^\\text\{ ?(?:approximately|about|approx\.?|roughly) ?\}|^(?:approximately|about|approx\.?) ", r"\\approx ", text)
    parts = split(text, r"\\approx|\\sim|\\simeq|\\doteq")
    if len(parts) < 2 or not parts[-1][1]:
        return None
    return Part("about", text, (parse(parts[-1][1]),), parts[0][1])


_NAME = re.compile(
    r"(?:\\text ?\{[^{}]*\}|[A-Za-z]'*(?:_\{?\w+\}?)?|\\[a-z]+(?:_\{?\w+\}?)?|\\?\|?[A-Za-z]\|?|[A-Z]{2,3}|(?:m ?)?\\angle ?[A-Z]{1,3}|[A-Za-z]{3,}(?: [A-Za-z]+)*"
    r"|[A-Za-z]'*(?:\^\{?-1\}?)? ?\([^()]*\)|\(\w(?:, ?\w)+\)|\\vec\{\w\}|\\overline\{[A-Z]+\})"
)


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in (r"\pi", r"\infty", "e")


_SIDES = {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\neq": "!="}
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}


def _relation(text: str) -> Part | None:
    parts = split(text, r"\\in|\\notin|<|>|\\le|\\ge|\\neq|=")
    signs, sides = [sign for sign, _ in parts[1:]], [side for _, side in parts]
    if not signs or not all(sides):
        return None
    if signs == [r"\in"]:
        inner = parse(sides[1])
        return replace(inner, name=sides[0]) if inner.kind in ("bracket", "union") else Part("equation", text, (inner,), sides[0])
    if all(sign in _SIDES for sign in signs):
        return _inequality(text, sides, [_SIDES[sign] for sign in signs])
    if all(sign == "=" for sign in signs):
        first, last = sides[0], sides[-1]
        if _is_name(last) and not _is_name(first) and len(sides) == 2:
            first, last = last, first
        return Part("equation", text, (parse(last),), first)
    return Part("one", text)


def _inequality(text: str, sides: Sequence[str], signs: Sequence[str]) -> Part | None:
    """An inequality as the interval of its variable."""
    low, high = Part("one", r"-\infty"), Part("one", r"\infty")
    if len(signs) == 1:
        left, right, sign = *sides, signs[0]
        if not _is_name(left):
            left, right, sign = right, left, _FLIPPED[sign]
        if not _is_name(left) or sign == "!=" and _is_name(right):
            return Part("one", text)
        end = parse(right)
        if sign == "!=":
            return Part("union", text, (Part("bracket", "()", (low, end), left), Part("bracket", "()", (end, high), left)), left)
        brackets = ("(" + (")" if sign == "<" else "]")) if sign[0] == "<" else (("(" if sign == ">" else "[") + ")")
        return Part("bracket", brackets, (low, end) if sign[0] == "<" else (end, high), left)
    if len(signs) == 2 and _is_name(sides[1]) and "!=" not in signs and signs[0][0] == signs[1][0]:
        ends, order = [parse(sides[0]), parse(sides[2])], list(signs)
        if signs[0][0] == ">":
            ends, order = ends[::-1], order[::-1]
        brackets = ("[" if "=" in order[0] else "(") + ("]" if "=" in order[1] else ")")
        return Part("bracket", brackets, tuple(ends), sides[1])
    return Part("one", text)


def _union(text: str) -> Part | None:
    parts = split(text, r"\\cup")
    return Part("union", text, tuple(parse(part) for _, part in parts)) if len(parts) > 1 else None


_REALS = (r"\mathbb{R}", r"\mathbf{R}")


def _bracketed(text: str) -> Part | None:
    if compact(text) in _REALS or words_of(text) == ("all", "real", "numbers"):
        return Part("bracket", "()", (Part("one", r"-\infty"), Part("one", r"\infty")))
    text = re.sub(r"^[A-Z]'? ?(?=\([^()]*,[^()]*\)$)", "", text)  # the point P(2,7)
    for left, right, kind in (("(", ")", "()"), ("[", "]", "[]"), ("(", "]", "(]"), ("[", ")", "[)"), (r"\langle", r"\rangle", "()"), (r"\{", r"\}", "{}")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            inner = text[len(left) : -len(right)].strip()
            if not _is_balanced(inner):
                continue
            items = [part for _, part in split(_AND_OR.sub(", ", inner), r",|;")]
            if kind == "{}":
                return _set(text, inner)
            if len(items) > 1 and all(items):
                return Part("bracket", kind, tuple(parse(item) for item in items))
    return None


def _is_balanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _set(text: str, inner: str) -> Part:
    content = parse(inner) if inner else Part("list", "")
    items = content.items if content.kind == "list" else (content,)
    return Part("set", text, items)


def _set_builder(text: str) -> Part | None:
    r"""``\{x \mid 3 \le x < 8\}`` as its condition."""
    if not (text.startswith(r"\{") and text.endswith(r"\}")):
        return None
    parts = split(text[2:-2], r"\||:")
    if len(parts) != 2 or not _is_name(re.sub(r" ?\\in.*", "", parts[0][1])):
        return None
    return parse(re.sub(r"\\text\{ ?\}", "", parts[1][1]))


_ENVIRONMENT = re.compile(r"([(\[|]?) ?\\begin\{(\w*matrix|array)\}(?: ?\{[^{}]*\})?(.*)\\end\{\2\} ?([)\]|]?)", re.DOTALL)


def _matrix(text: str) -> Part | None:
    match = _ENVIRONMENT.fullmatch(text)
    if match is None or r"\begin" in match[3]:
        return None
    around = "|" if match[2] in ("vmatrix", "Vmatrix") or match[1] == "|" else "("
    rows = [row for _, row in split(match[3], r"\\\\") if row]
    return Part("matrix", around, tuple(Part("list", row, tuple(parse(cell) for _, cell in split(row, "&"))) for row in rows))


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
        values = [text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+")]
    else:
        for _ in range(count):
            values = [value.replace(r"\pm", sign, 1) for value in values for sign in "+-"]
    return Part("list", text, tuple(Part("one", value.removeprefix("+").strip()) for value in values))


# --- Comparing -------------------------------------------------------------------------------------------------------


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """False if one is; else None if one is; else True."""
    found: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            found = None
    return found


class Comparison:
    """Compares answers part by part.

    Args:
        algebra: decides about single expressions.
    """

    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra

    def same(self, answer: Part, truth: Part) -> Verdict:
        """Whether two answers are the same; None if that cannot be found out."""
        if "equation" in (answer.kind, truth.kind):
            return self._with_equation(answer, truth)
        if "about" in (answer.kind, truth.kind):
            return self._with_approximation(answer, truth)
        rule = self._rules().get((answer.kind, truth.kind))
        return False if rule is None else rule(answer, truth)

    def _rules(self) -> dict[tuple[str, str], Callable[[Part, Part], Verdict]]:
        return {
            ("one", "one"): lambda a, t: self.same_single(a.text, t.text),
            ("list", "list"): self._unordered,
            ("list", "set"): self._unordered,
            ("set", "list"): self._unordered,
            ("set", "set"): self._each_in_the_other,
            ("union", "union"): self._unordered,
            ("list", "union"): self._unordered,
            ("union", "list"): self._unordered,
            ("bracket", "bracket"): self._brackets,
            ("bracket", "list"): self._tuple_without_brackets,
            ("list", "bracket"): self._tuple_without_brackets,
            ("bracket", "matrix"): self._vector,
            ("matrix", "bracket"): lambda a, t: self._vector(t, a),
            ("matrix", "matrix"): self._matrices,
            ("ratio", "ratio"): self._ratios,
            ("ratio", "one"): lambda a, t: self.same_single(_quotient(a), t.text),
            ("one", "ratio"): lambda a, t: self.same_single(a.text, _quotient(t)),
        }

    def _ordered(self, answer: Sequence[Part], truth: Sequence[Part]) -> Verdict:
        if len(answer) != len(truth):
            return False
        return all_of(self.same(a, t) for a, t in zip(answer, truth, strict=True))

    def _unordered(self, answer: Part, truth: Part) -> Verdict:
        """Lists in any order, each value as often; with dots, in their order."""
        if answer.kind == "union" and truth.kind == "union" and answer.name and truth.name and answer.name != truth.name:
            return False
        if len(answer.items) != len(truth.items):
            return False
        dotted = [any(_DOTS.search(item.text) for item in part.items) for part in (answer, truth)]
        if any(dotted) or _distinct_names(truth.items) and not _distinct_names(answer.items):
            return self._ordered(answer.items, truth.items)
        rest, unread = list(answer.items), False
        for item in truth.items:
            verdicts = []
            for other in rest:
                verdicts.append(self.same(other, item) if _same_labels(other, item) else False)
                if verdicts[-1]:
                    break
            if True in verdicts:
                del rest[verdicts.index(True)]
            elif None in verdicts:
                unread = True
            else:
                return False
        return None if unread else True

    def _each_in_the_other(self, answer: Part, truth: Part) -> Verdict:
        if not answer.items or not truth.items:
            return not answer.items and not truth.items
        pairs = [(a, t) for a in answer.items for t in truth.items]
        if len(answer.items) == len(truth.items) and self._unordered(answer, truth):
            return True
        found = {(a, t): self.same(a, t) for a, t in pairs}
        covered = [any(found[a, t] for t in truth.items) for a in answer.items]
        covered += [any(found[a, t] for a in answer.items) for t in truth.items]
        return True if all(covered) else None if None in found.values() else False

    def _brackets(self, answer: Part, truth: Part) -> Verdict:
        if answer.text != truth.text or (answer.name and truth.name and compact(answer.name) != compact(truth.name)):
            return False
        return self._ordered(answer.items, truth.items)

    def _tuple_without_brackets(self, answer: Part, truth: Part) -> Verdict:
        """`2, 7` for (2, 7), in this order. An interval needs its brackets."""
        bracket = answer if answer.kind == "bracket" else truth
        if bracket.text != "()" or bracket.name:
            return False
        values = [part.items for part in (answer, truth)]
        if all(item.kind == "equation" for item in (answer if bracket is truth else truth).items):
            values = [[_value(item) for item in items] for items in values]
        return self._ordered(*values)

    def _vector(self, bracket: Part, matrix: Part) -> Verdict:
        """A column as a tuple."""
        if bracket.text != "()" or bracket.name or matrix.text == "|" or any(len(row.items) != 1 for row in matrix.items):
            return False
        return self._ordered(bracket.items, [row.items[0] for row in matrix.items])

    def _matrices(self, answer: Part, truth: Part) -> Verdict:
        if answer.text != truth.text or len(answer.items) != len(truth.items):
            return False
        return all_of(self._ordered(a.items, t.items) for a, t in zip(answer.items, truth.items, strict=True))

    def _ratios(self, answer: Part, truth: Part) -> Verdict:
        """Ratios in any terms: 6:8 is 3:4."""
        if len(answer.items) != len(truth.items):
            return False
        plainly = self._ordered(answer.items, truth.items)
        if plainly or any(_DOTS.search(part.text) for part in (answer, truth)):
            return plainly
        first = answer.items[0].text, truth.items[0].text
        return all_of(
            self.same_single(rf"({a.text})\cdot({first[1]})", rf"({t.text})\cdot({first[0]})")
            for a, t in zip(answer.items[1:], truth.items[1:], strict=True)
        )

    def _with_equation(self, answer: Part, truth: Part) -> Verdict:
        if answer.kind == truth.kind:
            return self._equations(answer, truth)
        if answer.kind == "equation":
            if truth.kind == "list" and _distinct_names(truth.items):
                return False
            verdict = self.same(answer.items[0], truth)
            constant = not re.search(r"[A-Za-z|]", re.sub(r"\\[A-Za-z]+", "", answer.name))
            if verdict and constant:  # 2+3 = 5, but not 7 = 5
                return self.same(parse(answer.name), truth)
            return verdict
        if not _is_name(truth.name):
            return False
        return self.same(answer, truth.items[0])

    def _equations(self, answer: Part, truth: Part) -> Verdict:
        a, t = compact(answer.name), compact(truth.name)
        if a == t or (_is_name(answer.name) and _is_name(truth.name) and {"y"} < {a, t} and "(" in a + t):  # y or f(x)
            return self.same(answer.items[0], truth.items[0])
        if answer.items[0].kind != "one" or truth.items[0].kind != "one":
            return False
        sides = [(part.name, part.items[0].text) for part in (answer, truth)]
        return self._algebra.same_equation(sides[0], sides[1])

    def _with_approximation(self, answer: Part, truth: Part) -> Verdict:
        """``x \\approx 2.7`` is 2.7. ``\\sqrt{2} \\approx 1.41`` says both, if they are close."""
        if truth.kind == "about":
            truths = [*truth.items, *([parse(truth.name)] if truth.name and not _is_name(truth.name) else [])]
        else:
            truths = [truth]
        if answer.kind != "about":
            return _any_of(self.same(answer, one) for one in truths)
        answers = list(answer.items)
        if answer.name and not _is_name(answer.name):
            if answer.items[0].kind != "one" or not self._algebra.close(answer.name, answer.items[0].text):
                return False
            answers.append(parse(answer.name))
        return _any_of(self.same(a, t) for a in answers for t in truths)

    def same_single(self, answer: str, truth: str) -> Verdict:
        """Two single expressions, with their units."""
        verdict, _ = decide(answer, truth)
        if verdict is not None:
            return verdict
        a, t = quantity(plain(answer)), quantity(plain(truth))
        degrees = [part.unit is not None and part.unit.name == "degrees" for part in (a, t)]
        if not all(degrees) and any(degrees):
            straight = self._algebra.same_expression(a.text, t.text)
            in_radians = [rf"({part.text})\cdot\frac{{\pi}}{{180}}" if is_degrees else part.text for part, is_degrees in zip((a, t), degrees, strict=True)]
            return _any_of((straight, self._algebra.same_expression(*in_radians)))
        if a.percent != t.percent:
            share, other = (a.text, t.text) if a.percent else (t.text, a.text)
            return _any_of(self._algebra.same_expression(text, other) for text in (share, rf"\frac{{{share}}}{{100}}"))
        if a.unit and t.unit and a.unit.kind and t.unit.kind:
            if a.unit.kind != t.unit.kind:
                return False
            if a.unit.factor != t.unit.factor:
                return self._algebra.same_expression(*(rf"({part.text})\cdot {_factor(part)}" for part in (a, t)))
        return self._algebra.same_expression(a.text, t.text)


def _factor(part: Quantity) -> str:
    factor = part.unit.factor if part.unit else Fraction(1)
    return rf"\frac{{{factor.numerator}}}{{{factor.denominator}}}"


def _any_of(verdicts: Iterable[Verdict]) -> Verdict:
    found: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            found = None
    return found


def _quotient(ratio: Part) -> str:
    if len(ratio.items) != 2:
        return ratio.text
    return rf"\frac{{{ratio.items[0].text}}}{{{ratio.items[1].text}}}"


def _value(item: Part) -> Part:
    return item.items[0] if item.kind == "equation" else item


def _distinct_names(items: Sequence[Part]) -> bool:
    """Whether the items are equations of different variables (`x=2, y=7`), whose order matters; x_1 and x_2 are one variable."""
    names = [re.sub(r"_.*", "", item.name) for item in items if item.kind == "equation"]
    return len(names) == len(items) and len(set(names)) > 1


def _same_labels(a: Part, b: Part) -> bool:
    """In a list of labelled numbers (`5 apples and 3 pears`) a label belongs to its number."""
    units = [quantity(part.text).unit for part in (a, b)]
    return units[0] is None or units[1] is None or units[0].name == units[1].name or bool(units[0].kind and units[1].kind)


def same_answer(answer: str, truth: str, algebra: Algebra) -> Verdict:
    """Whether two answers, as written, are the same; None if that cannot be found out."""
    a, t = parse(stated(answer)), parse(stated(truth))
    if (a.kind == "set") != (t.kind == "set"):
        a, t = (part.items[0] if part.kind == "set" and len(part.items) == 1 else part for part in (a, t))
    return Comparison(algebra).same(a, t)
