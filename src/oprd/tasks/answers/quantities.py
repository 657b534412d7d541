r"""Answers that are one number: its exact value, its unit, percent, degrees.

Exact rational arithmetic only: nothing here rounds, and nothing evaluates an expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from oprd.tasks.answers.notation import compact

_DECIMAL = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?", re.ASCII)
_RATIO = re.compile(r"([+-]?)(?:\\frac(?:\{([+-]?\d+)\}|(\d)) ?(?:\{([+-]?\d+)\}|(\d))|(\d+)/(\d+))", re.ASCII)
_MAX_DIGITS = 1_000  # int() of a million digits takes seconds


def parse_number(normalized: str) -> Fraction | None:
    r"""Return the exact value of an integer, a decimal, ``a/b`` or ``\frac{a}{b}``, and None for anything else.

    Commas may group thousands. Exponents are not read: `1e999999999` is a short text, but the number would fill the memory.
    """
    if len(normalized) > _MAX_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(normalized):
        sign, whole, decimals = match[1], match[2].replace(",", ""), match[3] or ""
        if not whole and not decimals:
            return None
        value = Fraction(int(whole + decimals), 10 ** len(decimals))
    elif match := _RATIO.fullmatch(normalized):
        sign = match[1]
        top, bottom = (int(next(filter(None, match.group(*groups)))) for groups in ((2, 3, 6), (4, 5, 7)))
        if bottom == 0:
            return None
        value = Fraction(top, bottom)
    else:
        return None
    return -value if sign == "-" else value


_SCIENTIFIC = re.compile(
    r"(?:([+-]?[\d.,]+)(?:[eE]|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*)|([+-]?)10\s*\^\s*)\{?\s*([+-]?\d{1,4})\s*\}?",
    re.ASCII,
)
_LARGEST_EXPONENT = 1_000


def scientific(text: str) -> Fraction | None:
    r"""Value of `1.5e3`, ``1.5 \times 10^{3}`` or `10^3`, with exponents up to 1000 either way."""
    match = _SCIENTIFIC.fullmatch(text)
    if match is None or abs(int(match[3])) > _LARGEST_EXPONENT:
        return None
    mantissa = parse_number(match[1]) if match[1] else Fraction(-1 if match[2] == "-" else 1)
    return None if mantissa is None else mantissa * Fraction(10) ** int(match[3])


_MIXED = re.compile(r"([+-]?)(\d+) ?(\\frac\{?\d+\}? ?\{?\d+\}?)|([+-]?)(\d+) (\d+/\d+)", re.ASCII)


def mixed_number(text: str) -> Fraction | None:
    r"""Value of ``2\frac{1}{2}`` or `2 1/2`: two and a half, not two times a half."""
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    sign, whole, rest = match.group(1, 2, 3) if match[3] else match.group(4, 5, 6)
    part = parse_number(compact(rest))
    if part is None or part >= 1 or len(whole) > _MAX_DIGITS:
        return None
    return (int(whole) + part) * (-1 if sign == "-" else 1)


_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)(?:\\overline\{?(\d+)\}?|\((\d+)\))", re.ASCII)
_DOTTED = re.compile(r"\\overline ?\{(\d)\}(\d*)\\overline ?\{(\d)\}", re.ASCII)  # 0.\dot{1}4285\dot{7}
_GOES_ON = re.compile(r"([+-]?)(\d*)\.(\d*?)(?:(\d)\4{2,}|(\d{2,6}?)\5+) ?\\ldots", re.ASCII)


def repeating_decimal(text: str) -> Fraction | None:
    r"""Value of ``0.1\overline{6}``, `0.1(6)` or `0.1666…`, where a digit stands three times or several digits twice."""
    if len(text) > _MAX_DIGITS:
        return None
    text = _DOTTED.sub(r"\\overline{\1\2\3}", text)
    match = _REPEATING.fullmatch(text) or _GOES_ON.fullmatch(text)
    if match is None:
        return None
    sign, whole, start, block = match[1], match[2] or "0", match[3], match[4] or match[5]
    tail = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(start))
    value = Fraction(int(whole + start), 10 ** len(start)) + tail
    return -value if sign == "-" else value


_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
]  # fmt: skip
_TEN_WORDS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TENS = {word: 10 * n for n, word in enumerate(_TEN_WORDS, 2)}
_PARTS = {
    "half": 2,
    "halve": 2,
    "third": 3,
    "fourth": 4,
    "quarter": 4,
    "fifth": 5,
    "sixth": 6,
    "eighth": 8,
    "tenth": 10,
}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def number_in_words(text: str) -> Fraction | None:
    """Value of `five`, `twenty-five`, `two thirds`, `a dozen`, `3.2 million` and the like."""
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", re.sub(r"\\text|[{}]", " ", text).lower())
    *front, last = text.split() or [""]
    if not front:
        word = _WORDS.index(last) if last in _WORDS else {"dozen": 12, **_TENS}.get(last)
        return None if word is None else Fraction(word)
    if len(front) > 1:
        return None
    first = 1 if front[0] == "a" else _WORDS.index(front[0]) if front[0] in _WORDS else None
    if front[0] in _TENS and last in _WORDS[1:10]:
        return Fraction(_TENS[front[0]] + _WORDS.index(last))
    if (part := _PARTS.get(last.removesuffix("s"))) is not None:
        return None if first is None else Fraction(first, part)
    scale = Fraction(12) if last == "dozen" else Fraction(10) ** _SCALES[last] if last in _SCALES else None
    value = parse_number(front[0]) if first is None else Fraction(first)
    return None if scale is None or value is None else value * scale


def value_of(text: str) -> Fraction | None:
    """The exact value of a plain answer without unit, where it is one number in any notation; else None."""
    text = re.sub(r"^- (?=\d|\\frac)", "-", text.removeprefix("+").strip())
    short = compact(text)
    readings = (
        parse_number(short),
        scientific(text),
        mixed_number(text),
        repeating_decimal(short),
        number_in_words(text),
    )
    return next((value for value in readings if value is not None), None)


@dataclass(frozen=True)
class Unit:
    """What a quantity is measured in.

    Args:
        kind: units of one kind measure the same; "" for words that are no known unit (`24 apples`).
        factor: in terms of the kind's first unit.
        name: as it was written.
    """

    kind: str
    factor: Fraction
    name: str


# A name ends in an s or not; each line is one kind, its factors are relative.
_KINDS = {
    "length": "m meter metre=1 mm millimeter millimetre=0.001 cm centimeter centimetre=0.01 dm=0.1 km kilometer kilometre=1000 "
    "micrometer micrometre microm=0.000001 nm nanometer nanometre=0.000000001 "
    "in inch inche=0.0254 ft foot feet=0.3048 yd yard=0.9144 mi mile=1609.344",
    "mass": "g gram=1 microg microgram=0.000001 "
    "mg milligram=0.001 kg kilogram=1000 t ton tonne=1000000 lb=453.59237 oz ounce=28.349523125",
    "time": "s sec second=1 ms millisecond=0.001 microsecond micros=0.000001 min minute=60 h hr hour=3600 day=86400 week=604800",
    "year": "month=1 year yr=12",
    "volume": "l liter litre=1 ml milliliter millilitre=0.001",
    "dollar": "dollar usd $=1 cent ¢=0.01",
    "euro": "euro eur €=1",
    "pound": "£ gbp=1",
    "rupee": "rupee rs rs. ₹=1",
    "yen": "yen ¥=1",
    "angle": "degree deg=1",
    "radian": "radian rad=1",
    "celsius": "celsius=1",
    "fahrenheit": "fahrenheit=1",
    "force": "n newton=1",
    "energy": "j joule=1",
    "power": "w watt=1",
    "voltage": "v volt=1",
    "resistance": "ohm=1",
    "frequency": "hz hertz=1",
    "pressure": "pa pascal=1",
    "amount": "mol=1",
}
_UNITS = {
    name: (kind, Fraction(factor))
    for kind, line in _KINDS.items()
    for names, factor in re.findall(r"([^=]+)=([\d.]+)", line)
    for name in names.split()
}
_SPEEDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}
_NO_UNIT = re.compile(  # words after a number that change it, or begin something else
    r"\b(?:and|or|to|if|is|are|not|than|when|where|for|with|into|wrong|am|pm|base|least|most|hundred|thousand|million|billion|trillion"
    r"|dozen|plus|minus|times|over|divided|by|factorial|mod|pi|percent|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|gcd|lcm|infinity"
    r")\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantity:
    """A plain answer, taken apart.

    Args:
        text: without unit and percent sign.
        unit: None without one.
        percent: whether it is a percentage.
    """

    text: str
    unit: Unit | None
    percent: bool


_ORDINAL = re.compile(r"(?<=\d) ?\^?\{? ?(?:\\text\{ ?)?(?:st|nd|rd|th) ?\}*$", re.ASCII)
_IN_TEXT = re.compile(r"\\text\{ ?(-?[\d.,/]+) ")
_PERCENT = re.compile(r"(.+?) ?(?:\\%|\\text\{ ?(?:\\%|per ?cent|percentage|pct) ?\}|per ?cent|pct)")
_CURRENCY = r"(?:\\text\{ ?)?(\\?\$|€|£|₹|¥|¢|USD|EUR|GBP|Rs\.?)(?: ?\})?"
_BEFORE, _AFTER = re.compile(rf"([+-]?) ?{_CURRENCY} ?(.+)"), re.compile(rf"(.*\d) ?{_CURRENCY}")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_DEGREES = re.compile(r"(.+?) ?\^ ?\\circ ?(?:\\text\{ ?)?([CF]?) ?\}?")
_TEMPERATURE = {"C": "celsius", "F": "fahrenheit", "": "degrees"}


def quantity(text: str) -> Quantity:
    r"""Take a plain answer apart: `24 cm`, ``\$5``, ``25\%``, ``45^\circ``."""
    text = _IN_TEXT.sub(r"\1 \\text{", re.sub(r" ?\\text\{ ?\}$", "", _ORDINAL.sub("", text)))
    text = _PRODUCT_OF_NAMES.sub(r"\1 ", text)
    text = _MICRO.sub(r" \\text{micro\1}", text)
    if (whole := _in_two_units(text)) is not None:
        return whole
    if match := _BEFORE.fullmatch(text):
        inner = _measured(match[1] + match[3])
        known = inner.unit is not None and inner.unit.kind
        return inner if known else replace(inner, unit=_unit(match[2].removeprefix("\\")))
    return _measured(text)


_MICRO = re.compile(r"(?<=\d) ?\\mu ?(?:\\text ?\{ ?)?([mgs])(?: ?\})?$")
_NUMBER_AND_NAME = r"(\d+(?:\.\d+)?) ?([A-Za-z]+)\.?"
_TWO_UNITS = re.compile(rf"{_NUMBER_AND_NAME},? (?:and )?{_NUMBER_AND_NAME}", re.ASCII)
_ARC_MINUTES = re.compile(r"(\d+) ?\^ ?\\circ ?(\d+(?:\.\d+)?)'(?: ?(\d+(?:\.\d+)?)'')?", re.ASCII)


def _in_two_units(text: str) -> Quantity | None:
    r"""`1 hour 30 minutes`, `5 ft 6 in`, ``30^\circ 30'``: the sum in the larger unit."""
    if match := _ARC_MINUTES.fullmatch(text):
        degrees = sum(Fraction(part or 0) / 60**power for power, part in enumerate(match.groups()))
        return Quantity(str(degrees), _unit(_TEMPERATURE[""]), False)
    match = _TWO_UNITS.fullmatch(" ".join(re.sub(r"\\text|[{}]", " ", text).split()))
    if match is None:
        return None
    large, small = _unit(match[2]), _unit(match[4])
    if not large.kind or large.kind != small.kind or large.factor <= small.factor:
        return None
    return Quantity(str(Fraction(match[1]) + Fraction(match[3]) * small.factor / large.factor), large, False)


_ONE_LETTER = re.compile(r"(.*\d) ([A-Za-z])", re.ASCII)


def with_letter_units(answer: Quantity, truth: Quantity) -> tuple[Quantity, Quantity]:
    """Two quantities, with a single letter after a number (`5 m`) read as a unit where the other is measured in one of its kind."""

    def read(one: Quantity, other: Quantity) -> Quantity:
        match = _ONE_LETTER.fullmatch(one.text) if one.unit is None and not one.percent else None
        unit = _unit(match[2]) if match else None
        if match is None or unit is None or other.unit is None or not unit.kind or unit.kind != other.unit.kind:
            return one
        return Quantity(match[1], unit, False)

    return read(answer, truth), read(truth, answer)


def _measured(text: str) -> Quantity:
    """A quantity without a currency before it."""
    if match := _PERCENT.fullmatch(text):
        return Quantity(match[1].strip(), None, True)
    if match := _AFTER.fullmatch(text):
        return Quantity(match[1].strip(), _unit(match[2].removeprefix("\\")), False)
    if not _TRIGONOMETRY.search(text) and (match := _DEGREES.fullmatch(text)):
        return Quantity(match[1].strip(), _unit(_TEMPERATURE[match[2]]), False)
    return _with_unit_in_text(text) or _with_plain_unit(text) or Quantity(text, None, False)


_POWER = r"(?: ?\^ ?\{?-?\d\}?)?"
_NAME = rf"\\text\{{[^{{}}]*\}}{_POWER}"
_PRODUCT_OF_NAMES = re.compile(rf"({_NAME}) ?\\cdot ?(?=\\text)")
_TEXT_UNIT = re.compile(
    rf"(.*?\S) ?(\\frac\{{ ?{_NAME} ?\}}\{{ ?{_NAME} ?\}}|{_NAME}(?:(?: ?/ ?| )?{_NAME}){{0,3}}|(?<=\d) ?\\Omega)"
)
_PLAIN_UNIT = re.compile(
    r"(.*?(?:(?<=[\d})\]])|(?<=\\pi)(?! ?hr)|(?<=\\pi )(?!hr)))( ?)([A-Za-z][A-Za-z./ ]*(?:\^ ?\{?\d\}?)?(?:/[A-Za-z]+)?)"
)


def _with_unit_in_text(text: str) -> Quantity | None:
    r"""``24 \text{ cm}``: any words may be a unit, but a single letter only if it is known: i is none."""
    match = _TEXT_UNIT.fullmatch(text)
    if match is None:
        return None
    name = match[2].replace(r"\Omega", "ohm")
    name = re.sub(r"\\text|[{}]", " ", re.sub(r"\\frac\{(.*)\}\{(.*)\}", r"\1/\2", name))
    unit = _unit(name)
    if not _may_be_unit(name) or (len(name.strip()) == 1 and not unit.kind):
        return None
    return Quantity(match[1].strip(), unit, False)


def _with_plain_unit(text: str) -> Quantity | None:
    r"""`24 cm`, `24 apples`: here one letter is a variable, and an unknown word has three letters and a space before it."""
    match = _PLAIN_UNIT.fullmatch(text)
    if match is None:
        return None
    name = re.sub(r"[{}]", "", match[3])
    unit, letters = _unit(name), re.findall(r"[A-Za-z]+", name)
    is_known = bool(unit.kind) and len("".join(letters)) > 1
    is_word = bool(match[2]) and all(len(word) > 2 for word in letters)
    if not _may_be_unit(name) or not (is_known or is_word):
        return None
    return Quantity(match[1].strip(), unit, False)


def _may_be_unit(name: str) -> bool:
    words = set(re.findall(r"[A-Za-z]+", name.lower()))
    other_digits = re.sub(r"\^ ?-?\d", "", name)
    return bool(words - set(_POWERS)) and not _NO_UNIT.search(name) and not re.search(r"\d", other_digits)


def _unit(name: str) -> Unit:
    """The unit of a name such as `cm`, `square feet`, `km / h`; of kind "" if a part is unknown."""
    name = " ".join(name.lower().split())
    kinds, factor = [], Fraction(1)
    for place, part in enumerate(re.split(r" ?/ ?| per ", _SPEEDS.get(name, name))):
        power, words = 1, []
        for word in re.sub(r" ?\^ ?", " ^", part).split():
            if word in _POWERS or re.fullmatch(r"\^\d", word):
                power = _POWERS.get(word) or int(word[1:])
            else:
                words.append(word)
        singular = " ".join(words).rstrip(".")
        known = _UNITS.get(singular) or _UNITS.get(singular.removesuffix("s"))
        if known is None:
            return Unit("", Fraction(1), name)
        kinds.append(f"{known[0]}^{power}")
        factor *= known[1] ** (power if place == 0 else -power)
    return Unit("/".join(kinds), factor, name)


def same_value(answer: Quantity, truth: Quantity) -> bool | None:
    """Whether two quantities are the same number; None if one is no plain number.

    Units count only if both are known. A percentage may be written without its sign, or as a fraction.
    """
    a, t = value_of(answer.text), value_of(truth.text)
    if a is None or t is None:
        return None
    if answer.percent != truth.percent:
        share, other, text = (a, t, truth.text) if answer.percent else (t, a, answer.text)
        is_share = abs(other) < 1 and ("frac" in text or "/" in text)
        return share == 100 * other or (share == other and not is_share)
    factors = known_factors(answer, truth)
    if factors is None:
        return a == t
    return a * factors[0] == t * factors[1] if factors else False


def known_factors(answer: Quantity, truth: Quantity) -> tuple[Fraction, Fraction] | tuple[()] | None:
    """Factors that bring two quantities to one unit; () if they measure different things; None if a unit is missing or unknown."""
    units = answer.unit, truth.unit
    if units[0] is None or units[1] is None or not units[0].kind or not units[1].kind:
        return None
    return (units[0].factor, units[1].factor) if units[0].kind == units[1].kind else ()
