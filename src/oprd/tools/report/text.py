"""Untrusted text as HTML: escaped, cut to a maximum length, with invisible characters made visible."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from markupsafe import Markup, escape

LONGEST = 20_000  # maximum characters of one text on a page

# Controls, bidirectional and other invisible formats, surrogates, private use, unassigned; line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SEEN = frozenset("\n\t")
_MOST_MARKS = 3  # combining marks per letter; more would cover the lines above


def shown(text: object, longest: int = LONGEST) -> Markup:
    """Render `text` for the body of a page. Control characters become boxes with their code; line breaks and tabs stay.

    Text beyond `longest` characters is cut, with a note of how much was left out.
    """
    whole = str(text)
    parts = [escape(plain) if code is None else _box(code) for plain, code in _pieces(whole[:longest])]
    if len(whole) > longest:
        parts.append(Markup('<span class="cut"> … {} characters left out</span>').format(len(whole) - longest))
    return Markup("").join(parts)


def shown_token(piece: str) -> Markup:
    """Render one token as `shown` does, with a visible sign before each line break."""
    if not piece:  # the first bytes of a character that a later token completes
        return Markup('<span class="ctl" title="part of a character">·</span>')
    return Markup('<span class="ctl" title="line break">↵</span>\n').join(shown(part) for part in piece.split("\n"))


def plain(text: object, longest: int = 60) -> str:
    """Render `text` for a picture or an attribute: one line of Latin characters; others become '?'."""
    line = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in str(text))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _box(character: str) -> Markup:
    name = unicodedata.name(character, "control character")
    return Markup('<span class="ctl" title="{}">U+{}</span>').format(name, f"{ord(character):04X}")


def _pieces(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield plain text as (text, None) and characters to be boxed as ("", character)."""
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
