r"""Answers that are one number: its exact value, its unit, percent, degrees.

Exact rational arithmetic only: nothing here rounds, and nothing evaluates an expression.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from oprd.tasks.notation import compact

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
    r"(?:([+-]?[\d.,]+)(?:[eE]|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*)|([+-]?)10\s*\^\s*)\{?\s*([+-]?\d{1,4})\s*\}?", re.ASCII
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
    if part is None or part >= 1:
        return None
    return (int(whole) + part) * (-1 if sign == "-" else 1)


_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)(?:\\overline\{?(\d+)\}?|\((\d+)\))", re.ASCII)
_GOES_ON = re.compile(r"([+-]?)(\d*)\.(\d*?)(?:(\d)\4{2,}|(\d{2,6}?)\5+) ?\\ldots", re.ASCII)


def repeating_decimal(text: str) -> Fraction | None:
    r"""Value of ``0.1\overline{6}``, `0.1(6)` or `0.1666…`, where a digit stands three times or several digits twice."""
    if len(text) > _MAX_DIGITS:
        return None
    match = _REPEATING.fullmatch(text) or _GOES_ON.fullmatch(text)
    if match is None:
        return None
    sign, whole, start, block = match[1], match[2] or "0", match[3], match[4] or match[5]
    tail = Fraction(int(block), (10 ** len(block) - 1) * 10 ** len(start))
    value = Fraction(int(whole + start), 10 ** len(start)) + tail
    return -value if sign == "-" else value


_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
).split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def number_in_words(text: str) -> Fraction | None:
    """Value of `five`, `3.2 million` and the like."""
    *front, last = re.sub(r"\\text|[{}]", " ", text).lower().split() or [""]
    if not front and last in _WORDS:
        return Fraction(_WORDS.index(last))
    if len(front) == 1 and last in _SCALES:
        value = parse_number(front[0]) if front[0] not in _WORDS else Fraction(_WORDS.index(front[0]))
        return None if value is None else value * 10 ** _SCALES[last]
    return None


def value_of(text: str) -> Fraction | None:
    """The exact value of a plain answer without unit, where it is one number in any notation; else None."""
    text = text.removeprefix("+").strip()
    short = re.sub(r"^- (?=\d|\\frac)", "-", text)
    for read in (parse_number, scientific, mixed_number, repeating_decimal, number_in_words):
        value = read(compact(short) if read in (parse_number, repeating_decimal) else short)
        if value is not None:
            return value
    return None


class Unit(NamedTuple):
    """What a quantity is measured in.

    Args:
        kind: units of one kind measure the same; "" for words that are no known unit (`24 apples`).
        factor: in terms of the kind's first unit.
        name: as it was written.
    """

    kind: str
    factor: Fraction
    name: str


def _units() -> dict[str, tuple[str, Fraction]]:
    tables = {
        "length": "m meter meters metre metres=1 mm millimeter millimeters millimetre millimetres=0.001 cm centimeter centimeters "
        "centimetre centimetres=0.01 dm=0.1 km kilometer kilometers kilometre kilometres=1000 in inch inches=0.0254 ft foot feet=0.3048 "
        "yd yard yards=0.9144 mi mile miles=1609.344",
        "mass": "g gram grams=1 mg milligram milligrams=0.001 kg kilogram kilograms=1000 t ton tons tonne tonnes=1000000 lb lbs=453.59237 "
        "oz ounce ounces=28.349523125",
        "time": "s sec secs second seconds=1 ms=0.001 min mins minute minutes=60 h hr hrs hour hours=3600 day days=86400 "
        "week weeks=604800",
        "year": "year years yr yrs=12 month months=1",
        "volume": "l liter liters litre litres=1 ml milliliter milliliters=0.001",
        "dollar": "dollar dollars usd $=1 cent cents ¢=0.01",
        "euro": "euro euros eur €=1",
        "pound": "£ gbp=1",
        "rupee": "rupee rupees rs rs. ₹=1",
        "yen": "yen ¥=1",
        "angle": "degree degrees deg=1",
        "radian": "radian radians rad=1",
        "celsius": "celsius=1",
        "fahrenheit": "fahrenheit=1",
    }
    own = "newton newtons joule joules j watt watts w volt volts v ohm ohms hz pa mol kelvin k"
    found = {}
    for kind, table in tables.items():
        for group in re.findall(r"([^=]+)=([\d.]+)", table):
            found |= {name: (kind, Fraction(group[1])) for name in group[0].split()}
    return found | {name: (name.removesuffix("s"), Fraction(1)) for name in own.split()}


_UNITS = _units()
_CURRENCIES = r"\\?\$|€|£|₹|¥|¢|USD|EUR|GBP|Rs\.?"
_NO_UNIT = (
    "and or to if is are not than when where for with mod pi percent base least most million billion thousand hundred trillion dozen "
    "sin cos tan cot sec csc ln log exp sqrt max min gcd lcm infinity into is wrong am pm"
).split()
_ORDINAL = re.compile(r"(?<=\d) ?\^?\{? ?(?:\\text\{ ?)?(?:st|nd|rd|th) ?\}*$", re.ASCII)
_SPEEDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_OF_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "squared": 2, "cubic": 3, "cu": 3, "cu.": 3, "cubed": 3}
_NUMBER_ENDS = r"(?<=[\d})\]])|(?<=\\pi)|(?<=\\pi )"


class Quantity(NamedTuple):
    """A plain answer, taken apart.

    Args:
        text: without unit and percent sign.
        unit: None without one.
        percent: whether it is a percentage.
    """

    text: str
    unit: Unit | None
    percent: bool


def quantity(text: str) -> Quantity:
    r"""Take a plain answer apart: `24 cm`, ``\$5``, ``25\%``, ``45^\circ``."""
    text = _ORDINAL.sub("", text)
    text = re.sub(r"\\text\{ ?(-?[\d.,/]+) ", r"\1 \\text{", text)  # \text{24 cm}
    if match := re.fullmatch(r"(.+?) ?(?:\\%|\\text\{ ?(?:\\%|per ?cent|percentage|pct) ?\}|per ?cent|pct)(?: ?\\text\{ ?\})?", text):
        return Quantity(match[1].strip(), None, True)
    if match := re.fullmatch(rf"([+-]?) ?(?:\\text\{{ ?)?({_CURRENCIES}) ?\}}? ?(.*)", text):
        inner = quantity(match[1] + match[3])
        unit = _unit(match[2].removeprefix("\\")) if inner.unit is None or not inner.unit.kind else inner.unit
        return Quantity(inner.text, unit, inner.percent)
    if match := re.fullmatch(rf"(.*\d) ?(?:\\text\{{ ?)?({_CURRENCIES})(?: ?\}})?", text):
        return Quantity(match[1].strip(), _unit(match[2].removeprefix("\\")), False)
    if not _OF_ANGLE.search(text) and (match := re.fullmatch(r"(.+?) ?\^ ?\\circ ?(?:\\text\{ ?)?([CF]?) ?\}?(?: ?\\text\{ ?\})?", text)):
        return Quantity(match[1].strip(), _unit({"C": "celsius", "F": "fahrenheit"}.get(match[2], "degrees")), False)
    if found := _written_unit(text):
        return found
    return Quantity(text, None, False)


_TEXT_UNIT = re.compile(r"(.*\S) ?((?:\\frac\{ ?\\text\{[^{}]*\} ?\}\{ ?\\text\{[^{}]*\}(?:\^\{?\d\}?)? ?\}|\\text\{[^{}]*\}(?: ?\^ ?\{?-?\d\}?)?(?: ?/? ?\\text\{[^{}]*\}(?: ?\^ ?\{?-?\d\}?)?)*))")
_PLAIN_UNIT = re.compile(rf"(.*?(?:{_NUMBER_ENDS})) ?([A-Za-z][A-Za-z./ ]*(?:\^ ?\{{?\d\}}?)?)")


def _written_unit(text: str) -> Quantity | None:
    if re.search(r"\d ?\\Omega$", text):
        return Quantity(re.sub(r" ?\\Omega$", "", text), _unit("ohm"), False)
    if match := _TEXT_UNIT.fullmatch(text):
        name = re.sub(r"\\frac\{(.*)\}\{(.*)\}", r"\1/\2", match[2])
        name = re.sub(r"\\text|[{}]", " ", name)
        if _may_be_unit(name):
            return Quantity(match[1].strip(), _unit(name), False)
    if (match := _PLAIN_UNIT.fullmatch(text)) and _may_be_unit(name := re.sub(r"[{}]", "", match[2])):
        unit, apart = _unit(name), match[0][len(match[1])] == " "
        long = all(len(word) > 2 for word in re.findall(r"[A-Za-z]+", name))
        if (unit.kind and len(re.sub(r"[^A-Za-z]", "", name)) > 1) or (apart and long):
            return Quantity(match[1].strip(), unit, False)
    return None


def _may_be_unit(name: str) -> bool:
    words = re.findall(r"[A-Za-z]+", name.lower())
    return bool(words or not name.strip()) and not set(words) & set(_NO_UNIT) and not re.search(r"(?<![\^\d-])(?<!\^ )\d", name)


def _unit(name: str) -> Unit:
    """The unit of a name such as `cm`, `square feet`, `km / h`; of kind "" if a part is unknown."""
    kind, factor = [], Fraction(1)
    name = name.strip().lower()
    parts = re.split(r"/| per ", _SPEEDS.get(name, name))
    for place, part in enumerate(parts):
        power = 1
        words = []
        for word in re.sub(r"\^\s*", " ^", part.replace("~", " ")).split():
            if word in _POWERS or re.fullmatch(r"\^\d", word):
                power = _POWERS.get(word) or int(word[1:])
            else:
                words.append(word)
        known = _UNITS.get(" ".join(words)) or _UNITS.get(" ".join(words).rstrip("."))
        if known is None:
            return Unit("", Fraction(1), " ".join(name.split()))
        kind.append(f"{'/' * (place > 0)}{known[0]}^{power}")
        factor *= known[1] ** (power if place == 0 else -power)
    return Unit(" ".join(kind), factor, name)


def same_value(answer: Fraction, truth: Fraction, a: Quantity, t: Quantity) -> bool:
    """Whether two numbers with their units and percent signs say the same.

    A missing unit is not held against either. A percentage may be written without its sign, or as a fraction.
    """
    if a.percent != t.percent:
        share, other, text = (answer, truth, t.text) if a.percent else (truth, answer, a.text)
        is_share = abs(other) < 1 and ("frac" in text or "/" in text)
        return share == 100 * other or (share == other and not is_share)
    if a.unit and t.unit and a.unit.kind and t.unit.kind:
        return a.unit.kind == t.unit.kind and answer * a.unit.factor == truth * t.unit.factor
    return answer == truth


def same_units(a: Quantity, t: Quantity) -> bool:
    """Whether two quantities are measured in the same unit, where both name a known one."""
    if not (a.unit and t.unit and a.unit.kind and t.unit.kind):
        return True
    return (a.unit.kind, a.unit.factor) == (t.unit.kind, t.unit.factor)
