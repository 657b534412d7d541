r"""Whether two answers are the same, part by part.

math-verify confuses some structures (a pair with an open interval or a set, a list with its first equation). Here each kind has its
rule, and only single expressions go to algebra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from oprd.tasks.answers.decide import decide, stated
from oprd.tasks.answers.notation import compact
from oprd.tasks.answers.quantities import known_factors, quantity
from oprd.tasks.answers.structures import Part, is_name, parse, split
from oprd.tasks.answers.words import words_of

Verdict = bool | None  # None: it cannot be read
Relation = tuple[str, str, str]  # left side, one of `=`, `<` and `\le`, right side


@runtime_checkable
class Algebra(Protocol):
    """Decides about expressions of plain LaTeX. The `same_…` methods return None for what they cannot read."""

    def same_expression(self, answer: str, truth: str) -> Verdict:
        """Whether two expressions have the same value, for all values of their variables."""

    def same_relation(self, answer: Relation, truth: Relation) -> Verdict:
        """Whether two equations or inequalities have the same solutions."""

    def close(self, first: str, second: str) -> bool:
        """Whether one number may be an approximation of the other."""


def all_of(verdicts: Iterable[Verdict]) -> Verdict:
    """False if one is; else None if one is; else True."""
    found: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        found = None if verdict is None else found
    return found


def any_of(verdicts: Iterable[Verdict]) -> Verdict:
    """True if one is; else None if one is; else False."""
    found: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        found = None if verdict is None else found
    return found


_SPACED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")


def same_answer(answer: str, truth: str, algebra: Algebra) -> Verdict:
    """Whether two answers, as written, are the same; None if that cannot be found out."""
    texts = [_SPACED.sub(lambda m: m[0].replace(" ", ""), stated(text)) for text in (answer, truth)]  # 12 000
    a, t = (parse(text) for text in texts)
    if (a.kind == "set") != (t.kind == "set"):  # {5} for 5
        a, t = (part.items[0] if part.kind == "set" and len(part.items) == 1 else part for part in (a, t))
    verdict = Comparison(algebra).same(a, t)
    if verdict is not False or "one" not in (a.kind, t.kind):
        return verdict
    relations = [split(text, r"<|>|\\le|\\ge") for text in texts]
    if all(len(relation) == 2 for relation in relations):  # 2x > 6 for x > 3
        return algebra.same_relation(_relation(*relations[0]), _relation(*relations[1]))
    if any(map(_STRUCTURES.search, texts)):
        return algebra.same_expression(texts[0], texts[1])
    return verdict


_STRUCTURES = re.compile(r"\\(?:cap|setminus|backslash)(?![A-Za-z])|\\begin.*\\begin")  # a sum of matrices


def _relation(left: tuple[str, str], right: tuple[str, str]) -> Relation:
    """(smaller side, sign, larger side) of a split inequality."""
    sign = "<" if right[0] in "<>" else r"\le"
    return (left[1], sign, right[1]) if right[0] in ("<", r"\le") else (right[1], sign, left[1])


_DOTS = r"\ldots"
_ANY_DEGREE = re.compile(r"\^ ?\\circ(?![A-Za-z])")


class Comparison:
    """Compares split answers.

    Args:
        algebra: decides about single expressions.
    """

    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra
        self._rules: dict[tuple[str, str], Callable[[Part, Part], Verdict]] = {
            ("one", "one"): self._expressions,
            ("list", "one"): lambda a, t: all_of(self.same(item, t) for item in a.items),  # 1/2 or 0.5
            ("list", "list"): self._in_any_order,
            ("list", "set"): self._in_any_order,
            ("set", "list"): self._in_any_order,
            ("union", "union"): self._in_any_order,
            ("list", "union"): self._in_any_order,
            ("union", "list"): self._in_any_order,
            ("set", "set"): self._sets,
            ("bracket", "bracket"): self._brackets,
            ("list", "bracket"): self._tuple_without_brackets,
            ("bracket", "list"): self._tuple_without_brackets,
            ("bracket", "matrix"): self._vector,
            ("matrix", "bracket"): lambda a, t: self._vector(t, a),
            ("matrix", "matrix"): self._matrices,
            ("ratio", "ratio"): self._ratios,
            ("ratio", "one"): lambda a, t: self._expressions(_quotient(a), t),
            ("one", "ratio"): lambda a, t: self._expressions(a, _quotient(t)),
        }

    def same(self, answer: Part, truth: Part) -> Verdict:
        """Whether two answers are the same; None if that cannot be found out."""
        if "equation" in (answer.kind, truth.kind):
            return self._with_equation(answer, truth)
        if "about" in (answer.kind, truth.kind):
            return self._with_approximation(answer, truth)
        rule = self._rules.get((answer.kind, truth.kind))
        return False if rule is None else rule(answer, truth)

    def _in_order(self, answer: Sequence[Part], truth: Sequence[Part]) -> Verdict:
        if len(answer) != len(truth):
            return False
        return all_of(self.same(a, t) for a, t in zip(answer, truth, strict=True))

    def _in_any_order(self, answer: Part, truth: Part) -> Verdict:
        """Each value as often as in the truth. With dots, or names in the truth only, the order matters."""
        if not _may_be_one_name(answer, truth):
            return False
        has_dots = any(_DOTS in item.text for part in (answer, truth) for item in part.items)
        if has_dots or (_has_names(truth.items) and not _has_names(answer.items)):
            return self._in_order(answer.items, truth.items)
        rest = list(answer.items)
        if len(rest) > len(truth.items):  # a value that is said twice
            rest = [item for place, item in enumerate(rest) if not any(self.same(item, one) for one in rest[:place])]
        if len(rest) != len(truth.items):
            return False
        unread = False
        for item in truth.items:
            verdict, place = self._found_among(rest, item)
            if verdict is False:
                return False
            unread |= verdict is None
            if verdict:
                del rest[place]
        return None if unread else True

    def _found_among(self, answers: Sequence[Part], truth: Part) -> tuple[Verdict, int]:
        found: Verdict = False
        for place, item in enumerate(answers):
            verdict = self.same(item, truth) if _may_be_one_label(item, truth) else False
            if verdict:
                return True, place
            found = None if verdict is None else found
        return found, 0

    def _sets(self, answer: Part, truth: Part) -> Verdict:
        """Each value of one in the other: a set holds no value twice."""
        verdicts = [[self.same(a, t) for t in truth.items] for a in answer.items]
        return all_of(
            [*(any_of(row) for row in verdicts), *(any_of(row[i] for row in verdicts) for i in range(len(truth.items)))]
        )

    def _brackets(self, answer: Part, truth: Part) -> Verdict:
        if answer.text != truth.text or not _may_be_one_name(answer, truth):
            return False
        return self._in_order(answer.items, truth.items)

    def _tuple_without_brackets(self, answer: Part, truth: Part) -> Verdict:
        """`2, 7` or `x=2, y=7` for (2, 7), in this order. An interval needs its brackets."""
        bracket, listed = (answer, truth) if answer.kind == "bracket" else (truth, answer)
        if bracket.text != "()" or bracket.name:
            return False
        if all(item.kind == "equation" for item in listed.items):
            values = [item.items[0] for item in listed.items]
            return self._in_order(bracket.items, values)
        return self._in_order(answer.items, truth.items)

    def _vector(self, bracket: Part, matrix: Part) -> Verdict:
        """A column or row as a tuple."""
        cells = [cell for row in matrix.items for cell in row.items]
        if bracket.text == "[]" and all(row.kind == "bracket" and row.text == "[]" for row in bracket.items):
            return self._matrices(bracket, matrix)  # [[1, 2], [3, 4]], as programs write it
        if bracket.text != "()" or bracket.name or (len(matrix.items) > 1 and len(cells) > len(matrix.items)):
            return False
        return self._in_order(bracket.items, cells)

    def _matrices(self, answer: Part, truth: Part) -> Verdict:
        if len(answer.items) != len(truth.items):
            return False
        return all_of(self._in_order(a.items, t.items) for a, t in zip(answer.items, truth.items, strict=True))

    def _ratios(self, answer: Part, truth: Part) -> Verdict:
        """Ratios in any terms: 6:8 is 3:4."""
        if len(answer.items) != len(truth.items):
            return False
        as_written = self._in_order(answer.items, truth.items)
        if as_written or _DOTS in answer.text + truth.text:
            return as_written
        first = answer.items[0].text, truth.items[0].text
        return all_of(
            self._expressions(
                Part("one", rf"({a.text})\cdot({first[1]})"), Part("one", rf"({t.text})\cdot({first[0]})")
            )
            for a, t in zip(answer.items[1:], truth.items[1:], strict=True)
        )

    def _with_equation(self, answer: Part, truth: Part) -> Verdict:
        """`x = 5` for 5 and the other way; a left side that is no name needs an equation on the other side too."""
        if answer.kind == truth.kind:
            return self._equations(answer, truth)
        if truth.kind == "equation":
            return self.same(answer, truth.items[0]) if is_name(truth.name) else False
        if not is_name(answer.name) and answer.items[0].text == "0":  # x + y = 0 is a line
            return False
        verdict = self.same(answer.items[0], truth)
        has_letters = re.search(r"[A-Za-z|]", re.sub(r"\\(?!text)[A-Za-z]+", "", answer.name))
        if verdict and not has_letters and not is_name(answer.name):  # 2+3 = 5, but not 7 = 5
            return self.same(parse(answer.name), truth)
        return verdict

    def _equations(self, answer: Part, truth: Part) -> Verdict:
        names = compact(answer.name), compact(truth.name)
        is_function = "y" in names and any(re.fullmatch(r"[a-z]\([a-z]\)", name) for name in names)  # y or f(x)
        if names[0] == names[1] or is_function:
            return self.same(answer.items[0], truth.items[0])
        if answer.items[0].kind != "one" or truth.items[0].kind != "one":
            return False
        sides = [(part.name, "=", part.items[0].text) for part in (answer, truth)]
        return self._algebra.same_relation(sides[0], sides[1])

    def _with_approximation(self, answer: Part, truth: Part) -> Verdict:
        r"""``x \approx 2.7`` is 2.7. ``\sqrt{2} \approx 1.41`` says both, if they are close."""
        answers, truths = self._said(answer), self._said(truth)
        return any_of(self.same(a, t) for a in answers for t in truths)

    def _said(self, part: Part) -> list[Part]:
        if part.kind != "about":
            return [part]
        if not part.name or is_name(part.name):
            return list(part.items)
        value = part.items[0]
        if value.kind != "one" or not self._algebra.close(part.name, value.text):
            return []
        return [value, parse(part.name)]

    def _expressions(self, answer: Part, truth: Part) -> Verdict:
        """Two single expressions, with units, percent signs and degrees."""
        verdict, _ = decide(answer.text, truth.text)
        if verdict is not None:
            return verdict
        if words_of(answer.text) or words_of(truth.text):
            return False
        a, t = quantity(answer.text), quantity(truth.text)
        texts = [rf"({part.text})^\circ" if part.unit and part.unit.name == "degrees" else part.text for part in (a, t)]
        if any(_ANY_DEGREE.search(text) for text in texts):  # 90^\circ may stand for 90 or for \pi/2
            without = [_ANY_DEGREE.sub("", text) for text in texts]
            return any_of(self._algebra.same_expression(*pair) for pair in (without, texts))
        if a.percent != t.percent:
            share, other = (a.text, t.text) if a.percent else (t.text, a.text)
            return any_of(self._algebra.same_expression(text, other) for text in (share, rf"\frac{{{share}}}{{100}}"))
        factors = known_factors(a, t)
        if factors == ():
            return False
        if factors and factors[0] != factors[1]:
            texts = [
                rf"({text})\cdot\frac{{{f.numerator}}}{{{f.denominator}}}"
                for text, f in zip(texts, factors, strict=True)
            ]
        return self._algebra.same_expression(texts[0], texts[1])


def _quotient(ratio: Part) -> Part:
    if len(ratio.items) != 2:
        return ratio
    return Part("one", rf"\frac{{{ratio.items[0].text}}}{{{ratio.items[1].text}}}")


def _may_be_one_name(a: Part, b: Part) -> bool:
    """Whether two intervals may be of one variable: `x > 3` and `y > 3` are not."""
    return not (a.name and b.name) or compact(a.name) == compact(b.name)


def _has_names(items: Sequence[Part]) -> bool:
    """Whether the items are equations of different variables (`x=2, y=7`); x_1 and x_2 are one variable."""
    names = [re.sub(r"_.*", "", item.name) for item in items if item.kind == "equation"]
    return len(names) == len(items) and len(set(names)) > 1


def _may_be_one_label(a: Part, b: Part) -> bool:
    """In a list of labelled numbers (`5 apples and 3 pears`) a label belongs to its number."""
    units = [quantity(part.text).unit for part in (a, b)]
    if units[0] is None or units[1] is None:
        return True
    return units[0].name == units[1].name or bool(units[0].kind and units[1].kind)
