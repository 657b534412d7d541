r"""How answers are written: brings notations of the same thing to one, as text.

Each rule here changes only how an answer looks, never its value. What compares values is in `oprd.tasks.answers.quantities`.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

_SIGNS = {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∗": "*", "±": r"\pm ", "∓": r"\mp ",
    "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\neq ", "≈": r"\approx ", "∼": r"\sim ", "∶": ":",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∉": r"\notin ", "∅": r"\emptyset ", "∣": "|", "⟨": r"\langle ", "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "∞": r"\infty ", "°": r"^\circ ", "º": r"^\circ ", "∘": r"\circ ", "∠": r"\angle ", "…": r"\ldots ", "⋯": r"\ldots ",
    "′": "'", "″": "''", "‴": "'''", "‘": "'", "’": "'", "“": '"', "”": '"', "⁄": "/", "∕": "/", "µ": r"\mu ",
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", r"\,"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
}  # fmt: skip
_UNICODE = str.maketrans(_SIGNS)
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n", strict=True))


def from_unicode(text: str) -> str:
    """Write characters that keyboards lack as LaTeX: dashes, roots, fractions, raised and lowered digits, Greek, signs."""
    if text.isascii():
        return text
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda m: "_{" + "".join(_LOWERED[c] for c in m[0]) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", _vulgar_fraction, text)
    text = re.sub("[\uff01-\uff0c\uff0e-\uff5e]", lambda m: chr(ord(m[0]) - 0xFEE0), text)  # fullwidth forms
    text = re.sub(r"([√∛])\s*", lambda m: "sqrt" if m[1] == "√" else r"\sqrt[3]", text)
    text = re.sub(r"\\?sqrt(\[3\])?(\d+|\w)", lambda m: rf"\sqrt{m[1] or ''}{{{m[2]}}}", text)
    text = re.sub("[Α-ωϕϵ]", _greek, text)
    return text.translate(_UNICODE)


def _greek(match: re.Match[str]) -> str:
    """`π` as ``\\pi``. Capitals keep their Greek name."""
    _, size, _, name, *_ = unicodedata.name(unicodedata.normalize("NFKC", match[0])).split()
    name = {"LAMDA": "LAMBDA", "FINAL": "SIGMA"}.get(name, name).lower()
    return f"\\{name} " if size == "SMALL" else f"\\{name.capitalize()} "


def _vulgar_fraction(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKD", match[0]).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}"


_FONT = re.compile(
    r"math(?:bf|it|sf|tt|normal|op|ord)|boldsymbol|bm|pmb|underline|uline|hl|boxed|fbox|framebox|ensuremath|bf|it|sf|tt|rm|boldmath"
    r"|(?:display|text|script|scriptscript)style|limits|nolimits|large|Large|LARGE|huge|Huge|small|tiny|normalsize|left|right|middle"
    r"|[bB]igg?[lrm]?|noindent|(?:math)?strut|centering"
)
_TEXT = re.compile(r"text(?:bf|it|rm|tt|sf|sc|normal|up)|emph|mbox|hbox|mathrm|operatorname\*?")
_SAME_COMMAND = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "sfrac": "frac", "nicefrac": "frac",
    "lg": "log_{10}", "tbinom": "binom", "dbinom": "binom", "bar": "overline", "dot": "overline",
    "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge", "ne": "neq", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots",
    "varnothing": "emptyset",
}  # fmt: skip
_PLAIN_COMMAND = {
    "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "vert": "|", "lvert": "|", "rvert": "|", "mid": "|",
    "colon": ":", "lt": "<", "gt": ">",
}  # fmt: skip
_COMMAND = re.compile(r"\\\\|\\([A-Za-z]+\*?)\s*")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|max|min|gcd|lcm|det"
_OPERATOR = re.compile(rf"\\(?:operatorname|mathrm|text|mbox)\*?\s*\{{\s*({_FUNCTIONS})\s*\}}")
_HTML = re.compile(r"<(b|i|u|em|strong|mark|span|center)(?:\s[^<>]*)?>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_FONT_SWITCH = re.compile(r"\{\s*\\(?:rm|mathrm)(?![A-Za-z])\s*([^{}]*)\}")
_SIUNITX = re.compile(r"\\(?:(?:SI|qty)\s*\{([^{}]*)\}|si|unit)\s*\{([^{}]*)\}|\\(num|ang)\s*\{([^{}]*)\}")
_ROWS = re.compile(r"\\begin|\\substack")
_SPACES = r"(?:(?<!\\)\\[,;: ]|~|\\(?:thinspace|enspace|quad|qquad)(?![A-Za-z]))"


def without_markup(text: str) -> str:
    """Remove what changes only the look: math delimiters, Markdown, quotation marks, fonts, colours, sizes, underlining, boxes."""
    if not _ROWS.search(text):
        text = re.sub(r"\\\\(?=[A-Za-z{}()\[\]$%,;!])", r"\\", text)  # as a response in JSON has it
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    if len(re.findall(r"(?<!\\)\$", text)) > 1:  # a single one is a currency
        text = re.sub(r"(?<!\\)\$", "", text)
    text = _FONT_SWITCH.sub(r"\\text{\1}", _SIUNITX.sub(_measured, _HTML.sub(r"\2", text)))
    text = _OPERATOR.sub(r"\\\1 ", _unquoted(text.strip()))
    text = re.sub(r"\\bbox\s*(?:\[[^][]*\])?|\\enclose\s*\{[^{}]*\}", "", text)
    text = re.sub(r"\\(?:text|f)?color(?:box)?\s*(?:\[[^][]*\])?\s*\{[^{}]*\}\s*", "", text)
    text = re.sub(r"\\(?:[hv]?phantom|[hv]space\*?|label|tag)\s*\{[^{}]*\}", "", text)
    text = re.sub(r"\\(?:left|right)\s*\.", "", text)
    text = _COMMAND.sub(_plain_command, text)
    text = re.sub(r"\\text *\{([^{}]*)\\text *\{([^{}]*)\}([^{}]*)\}", r"\\text{\1\2\3}", text)
    return re.sub(r"(^|(?<=\s))\*\*([^*]+)\*\*(?=$|[\s.,;])", r"\2", _unquoted(text.strip()))


def _measured(match: re.Match[str]) -> str:
    r"""The package siunitx: ``\SI{5}{\meter\per\second}`` as ``5 \text{meter / second}``."""
    if match[3]:
        return match[4] + (r"^\circ" if match[3] == "ang" else "")
    unit = re.sub(r"\\(kilo|mega|deci|centi|milli|micro|nano)\s*\\", r"\\\1", match[2])
    unit = unit.replace(r"\per", " / ").replace(r"\squared", "^2").replace(r"\cubed", "^3")
    return f"{match[1] or ''} \\text{{{' '.join(unit.replace(chr(92), ' ').split())}}}"


def _plain_command(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    if _FONT.fullmatch(match[1]):
        return ""
    if match[1] in _PLAIN_COMMAND:
        return _PLAIN_COMMAND[match[1]]
    name = "text" if _TEXT.fullmatch(match[1]) else _SAME_COMMAND.get(match[1], match[1])
    return f"\\{name} " if match[0][-1].isspace() else f"\\{name}"


def _unquoted(text: str) -> str:
    """Without Markdown's signs or quotation marks around the whole."""
    for mark in ("**", "__", "*", "`", '"', "'"):
        inner = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and mark not in inner:
            return _unquoted(inner.strip())
    return text


_GROUPED = re.compile(
    rf"(?<![\d.,\\])(\d{{1,3}})((?:(?:{_SPACES}|\{{,\}}|,?\\!\s*)\d{{3}})+)(?!\d|{_SPACES}\d|\{{,\}}\d)"
)
_FUNCTION = re.compile(rf"(?<![A-Za-z\\])(sqrt|{_FUNCTIONS})(?=\s*[({{\d\\]|\s+\w)")
_SIGN = re.compile(r"(?<![A-Za-z\\])(pi|infinity|theta|alpha|beta|gamma|lambda|omega)(?![A-Za-z])", re.IGNORECASE)
_PRIME_OR_DEGREE = re.compile(r"\^\s*(?:\{\s*)?\\(prime|circ)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])")
_ROOT = re.compile(r"\\sqrt(?:\s+(?=[{\[])|(?=\w))")
_LAYOUT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\text *\{ *([:;,]) *\}", r"\1"),
        (r"\\!\s*", ""),
        (r"\{,\}", "."),  # beside digit groups of three, which are joined before: a decimal comma
        (r"\{:\}", ":"),
        (rf"{_SPACES}", " "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\neq "),
        (r"\.\.\.+", r"\\ldots "),
        (r"\\\{\s*\\\}", r"\\emptyset "),
        (r"(?<!\\)%", r"\\%"),
        (r"\{([^{}]*)\\over(?![A-Za-z])\s*([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])\s*([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\\binom\s*(\d)\s*(\d)", r"\\binom{\1}{\2}"),
        (r"\\overline ?\{([A-Z]{2,})\}", r"\1"),  # a segment
        (r"\*\*", "^"),
        (r"(?<=\d) ?x ?(?=10 ?\^)", r"\\times "),
        (r"(\\text ?\{[^{}]*)\^ ?\{(-?\d)\}", r"\1^\2"),
        (r"\\\\\s*\[[^][]*\]", r"\\\\ "),  # a matrix row with its height
    ]
]


def plain(answer: str) -> str:
    r"""Bring an answer to plain LaTeX: one notation for each sign, no markup, single spaces.

    Kept: everything that may be part of the value: units, percent and dollar signs, degrees, case, order, and spaces.
    """
    text = without_markup(from_unicode(answer))
    text = _GROUPED.sub(_joined, text)
    for pattern, replacement in _LAYOUT:
        text = pattern.sub(replacement, text)
    if r"\pm" not in text:
        text = text.replace(r"\mp", r"\pm")  # alone, both mean plus and minus
    text = _PRIME_OR_DEGREE.sub(lambda m: "'" if m[1] == "prime" else r"^\circ ", text)
    text = _ROOT.sub(lambda m: r"\sqrt" if m[0][-1].isspace() else r"\sqrt ", text)
    text = _SIGN.sub(lambda m: r"\infty " if m[1].lower() == "infinity" else f"\\{m[1]} ", text)
    text = _with_rooted_brackets(_FUNCTION.sub(r"\\\1", text))
    text = _without_loose_braces(_without_outer_braces(" ".join(text.split())))
    return _unpunctuated(text)


def _joined(match: re.Match[str]) -> str:
    """Digit groups without their spaces; commas, of which LaTeX has several kinds, become plain ones."""
    comma = "," if "," in re.sub(r"\\,", "", match[2]) else ""
    return comma.join([match[1], *re.findall(r"\d{3}", match[2])])


def _with_rooted_brackets(text: str) -> str:
    r"""``\sqrt(2)`` as ``\sqrt{2}``: LaTeX would draw the root over the bracket alone."""
    characters, opened = list(text), list[tuple[int, bool]]()
    for match in re.finditer(r"\\sqrt\s*\(|[()]", text):
        if match[0] != ")":
            opened.append((match.end() - 1, match[0] != "("))
        elif opened:
            start, is_root = opened.pop()
            if is_root:
                characters[start], characters[match.start()] = "{", "}"
    return "".join(characters)


def _unpunctuated(text: str) -> str:
    """Without a full stop or comma at the end and an equals sign at the start."""
    text = re.sub(r"\\text\{\s*[.,;]?\s*\}\s*$", "", text).strip()
    if text.endswith((".", ",", ";")) and not text.endswith("\\,"):
        text = text[:-1].rstrip()
    return text.removeprefix("=").strip()


def _without_outer_braces(text: str) -> str:
    """Without braces around the whole."""
    while text.startswith("{") and text.endswith("}"):
        depths = accumulate((c == "{") - (c == "}") for c in re.sub(r"\\.", "  ", text))
        if 0 in [*depths][:-1]:
            return text
        text = text[1:-1].strip()
    return text


_LOOSE = re.compile(r"(^|[\s(\[,;=+*/:<>|{-])\{([^{}\\]*|(?:[^{}]|(?<=\\)[{}])*)\}(?!\s*[_^]|\s*\\over)")


def _without_loose_braces(text: str) -> str:
    """Without braces that are no argument of a command, as markup leaves them."""
    text = re.sub(r"(\\[A-Za-z]+|\}) (?=\{)", r"\1", text)
    for _ in range(8):
        changed = _LOOSE.sub(r"\1\2", text)
        if changed == text:
            return text
        text = changed
    return text


_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")


def compact(text: str) -> str:
    """A plain answer without the spaces and braces that do not matter; equal results mean equal answers.

    A space before a digit stays where it distinguishes `1, 200` from `1,200` and `1 2` from `12`.
    """
    text = re.sub(r"(?<![\d,]) | (?!\d)", "", " ".join(text.split()))
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = whole[1].removesuffix(".")
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def normalize_answer(answer: str) -> str:
    """Remove differences in notation and layout; equal results mean equal answers. Kept: case, order, units."""
    return compact(plain(answer))
