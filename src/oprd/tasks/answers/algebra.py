r"""Algebra on single expressions with math-verify and sympy. Runs in the guarded process of `oprd.tasks.grading_worker`.

math-verify compares numbers by rounding to 6 or 15 decimals, so that all tiny numbers are equal to it, and its simplification
misses some equal expressions. So both expressions are evaluated exactly enough, at a few points where they have variables;
math-verify decides about what has no values, such as sets.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_POINTS = ("37/23", "-41/31", "59/19", "7/43", "-13/47", "83/29", "5/53", "131/61", "211/31", "401/37")
_NEEDED = 3  # points at which both expressions have a real value
_DIGITS, _EQUAL = 30, 1e-20
_MANY_DIGITS, _VERY_EQUAL = 150, "1e-120"  # of numbers: 1 + 10^-50 is not 1
_ROUNDED = 1e-6  # a decimal number may be rounded by math-verify's rule, if this close


def readable(text: str) -> str:
    r"""Plain LaTeX as latex2sympy reads it: without ``\text{}``, with names for primed symbols."""
    text = re.sub(r"\\text ?\{ ?([^{}]*?) ?\}", r" \1 ", text)
    text = re.sub(r"([A-Za-z]|\})('+)", lambda m: f"{m[1]}_{{{'prime' * len(m[2])}}}", text)
    text = re.sub(r"(?<=\d)[eE](?=[+-]?\d)([+-]?\d+)", r"\\times 10^{\1}", text)
    return re.sub(r"\\?\$", "", text).strip().removeprefix("+")


@lru_cache(maxsize=256)
def parsed(text: str, keep_case: bool) -> Any:
    """The sympy expression of plain LaTeX; None if it cannot be read."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify.grader import should_treat_as_complex

    # units=False: otherwise math-verify reads the t of 3t as a unit.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    text = readable(text)
    try:
        return latex2sympy(
            text,
            is_real=not should_treat_as_complex(text),
            normalization_config=config,
            convert_degrees=True,
            conversion_config=ConversionConfig(lowercase_symbols=not keep_case),
        )
    except Exception:  # the grammar raises a bare Exception
        return None


def _both_cases(*texts: str) -> bool:
    """Whether a letter stands in both cases, as R and r of a ring: then case matters."""
    letters = set(re.sub(r"\\[A-Za-z]+", "", "".join(texts)))
    return any(letter.isupper() and letter.lower() in letters for letter in letters)


class MathVerify:
    """The `Algebra` of `oprd.tasks.answers.comparison`."""

    def same_expression(self, answer: str, truth: str) -> bool | None:
        """Whether two expressions have the same value wherever both are real; None if one cannot be read."""
        import math_verify

        keep_case = _both_cases(answer) or _both_cases(truth)
        a, t = (parsed(text, keep_case) for text in (answer, truth))
        if a is None or t is None:
            return None
        agreed = agreement(a, t)
        return bool(math_verify.verify(t, a, timeout_seconds=None)) if agreed is None else agreed

    def same_relation(self, answer: tuple[str, str, str], truth: tuple[str, str, str]) -> bool | None:
        """Whether the differences of the sides are multiples of each other, or math-verify finds the same solutions.

        A negative multiple of an inequality is another one.
        """
        import math_verify

        if answer[1] != truth[1]:
            return False
        keep_case = _both_cases(*answer) or _both_cases(*truth)
        sides = [parsed(side, keep_case) for side in (*answer[::2], *truth[::2])]
        wholes = [parsed(" ".join(relation), keep_case) for relation in (answer, truth)]
        if None in sides or None in wholes:
            return None
        a, t = difference(sides[0], sides[1]), difference(sides[2], sides[3])
        if a is not None and t is not None:
            values = [pair for pair in values_of(a, t) if pair is not None]
            if any(all(abs(pair[side]) < _EQUAL for pair in values) for side in (0, 1)):
                return False  # of 0 = 0 everything is a solution
            ratios = [first / second for first, second in values if second]
            if len(ratios) >= _NEEDED and all(abs(ratio - ratios[0]) <= _EQUAL * abs(ratio) for ratio in ratios):
                return truth[1] == "=" or bool(ratios[0] > 0)
        return bool(math_verify.verify(wholes[1], wholes[0], timeout_seconds=None))

    def close(self, first: str, second: str) -> bool:
        """Whether two numbers differ by less than 5 %; True if they cannot be evaluated."""
        a, b = exact(parsed(first, False)), exact(parsed(second, False))
        values = None if a is None or b is None else values_of(a, b)[0]
        return values is None or bool(abs(values[0] - values[1]) <= 0.05 * max(map(abs, values)))


def exact(expression: Any) -> Any:
    """An expression to be evaluated: decimals as fractions, applied functions as symbols, i as the imaginary unit.

    Returns:
        None for what is no expression, such as a set or a matrix.
    """
    import sympy
    from sympy.core.function import AppliedUndef

    if not isinstance(expression, sympy.Expr) or not expression.is_scalar:
        return None
    expression = expression.replace(sympy.UnevaluatedExpr, lambda inner: inner)
    expression = expression.xreplace({number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)})
    expression = expression.xreplace({call: sympy.Symbol(str(call)) for call in expression.atoms(AppliedUndef)})
    if expression.has(sympy.Derivative, sympy.Integral, sympy.Limit, sympy.Sum, sympy.Product):
        expression = expression.doit()
    return expression.xreplace({symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"})


def difference(left: Any, right: Any) -> Any:
    """Left minus right side of an equation; None if a side is no expression."""
    a, b = exact(left), exact(right)
    return None if a is None or b is None else a - b


def agreement(first: Any, second: Any) -> bool | None:
    """Whether two expressions have the same values; None if too few points decide it, or only rounding differs."""
    import sympy

    try:
        a, b = exact(first), exact(second)
        if a is None or b is None:
            return None
        if a.is_infinite or b.is_infinite:
            return None if sympy.zoo in (a, b) else bool(a == b)
        pairs = [pair for pair in values_of(a, b) if pair is not None]
        if len(pairs) < (_NEEDED if a.free_symbols | b.free_symbols else 1):
            return None
        if not all(_near(*pair, _EQUAL) for pair in pairs):
            rounded = first.has(sympy.Float) or second.has(sympy.Float)
            return None if rounded and all(_near(*pair, _ROUNDED) for pair in pairs) else False
        if a.free_symbols | b.free_symbols or a == b:
            return True
        many = values_of(a, b, _MANY_DIGITS)[0]
        return None if many is None else _near(*many, sympy.Float(_VERY_EQUAL, 15))
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        return None


def _near(first: Any, second: Any, relative: Any) -> bool:
    return bool(abs(first - second) <= relative * max(abs(first), abs(second)))


def values_of(first: Any, second: Any, digits: int = _DIGITS) -> list[tuple[Any, Any] | None]:
    """Values of two expressions at the same points: one for numbers. None where one is not finite, or not real without i."""
    import sympy

    complex_allowed = first.has(sympy.I) or second.has(sympy.I)
    symbols = sorted(first.free_symbols | second.free_symbols, key=lambda symbol: symbol.name)
    if not symbols:
        return [_values(first, second, digits, complex_allowed)]
    found: list[tuple[Any, Any] | None] = []
    for start in range(len(_POINTS)):
        point = {symbol: sympy.Rational(_POINTS[(start + at) % len(_POINTS)]) for at, symbol in enumerate(symbols)}
        found.append(_values(first.subs(point), second.subs(point), digits, complex_allowed))
    return found


def _values(first: Any, second: Any, digits: int, complex_allowed: bool) -> tuple[Any, Any] | None:
    from sympy.core.evalf import PrecisionExhausted

    try:
        values = first.evalf(digits, strict=True), second.evalf(digits, strict=True)
    except (PrecisionExhausted, ArithmeticError, NotImplementedError):
        return None
    if not all(value.is_number and value.is_finite for value in values):
        return None
    if not complex_allowed and not all(value.is_real for value in values):
        return None
    return values
