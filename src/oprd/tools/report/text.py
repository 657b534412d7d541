"""Text that nobody vouches for, as HTML: escaped, cut to a length, and with what a reader could not see made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from markupsafe import Markup, escape

LONGEST = 20_000  # characters of one text that a page shows

# Controls, bidirectional and other invisible formats, surrogates, private use, unassigned; line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SEEN = frozenset("\n\t")
_MOST_MARKS = 3  # combining marks on one letter; more are a tower that covers the lines above


def shown(text: object, longest: int = LONGEST) -> Markup:
    """`text` for the body of a page. Control characters become boxes with their code; line breaks and tabs stay.

    What is longer than `longest` characters is cut, and the page says how much was left out.
    """
    whole = str(text)
    parts = [escape(plain) if code is None else _box(code) for plain, code in _pieces(whole[:longest])]
    if len(whole) > longest:
        parts.append(Markup('<span class="cut"> … {} characters left out</span>').format(len(whole) - longest))
    return Markup("").join(parts)


def shown_token(piece: str) -> Markup:
    """One token for the body of a page: as `shown`, and a line break is seen before it breaks the line."""
    if not piece:  # the first bytes of a character that a later token completes
        return Markup('<span class="ctl" title="part of a character">·</span>')
    return Markup('<span class="ctl" title="line break">↵</span>\n').join(shown(part) for part in piece.split("\n"))


def plain(text: object, longest: int = 60) -> str:
    """`text` for a picture or an attribute: one line, Latin letters and signs, everything else as '?'."""
    line = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in str(text))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _box(character: str) -> Markup:
    name = unicodedata.name(character, "control character")
    return Markup('<span class="ctl" title="{}">U+{}</span>').format(name, f"{ord(character):04X}")


def _pieces(text: str) -> Iterator[tuple[str, str | None]]:
    """Runs of plain text as (run, None), characters to be boxed as ("", character)."""
    run: list[str] = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if (category in _UNSEEN and character not in _SEEN) or marks > _MOST_MARKS:
            if run:
                yield "".join(run), None
                run = []
            yield "", character
        else:
            run.append(character)
    if run:
        yield "".join(run), None
