"""Cleans text and settings before they are written or shown: `<redacted>` replaces secrets, escapes replace control characters.

A secret is known by the name of its key (`token`, `api_key`, `password`, …) or by its shape (`hf_…`, `sk-…`, user info of a URL).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

REDACTED = "<redacted>"

# The last word of a name that holds a secret, unless the word before it names something else: pad_token, prompt_key.
_SECRET = frozenset((
    "token", "key", "apikey", "secret", "secrets", "password", "passwords", "passwd", "pwd", "passphrase", "passcode",
    "credential", "credentials", "authorization", "auth", "bearer", "cookie", "cookies", "jwt",
))  # fmt: skip
_PLURAL = frozenset(("tokens", "keys"))  # secret only after one of these: max_new_tokens is a number
_MAKES_PLURAL_SECRET = frozenset(("api", "access", "auth", "bearer", "hf", "hub", "private", "refresh", "secret"))
_IGNORED_LAST = frozenset(("header", "pem"))  # auth_header, private_key_pem; but query_key_value is a layer
_HARMLESS_BEFORE = frozenset((
    "pad", "eos", "bos", "unk", "mask", "sep", "cls", "stop", "end", "start", "begin", "special", "next", "per", "first", "last",
    "image", "audio", "video", "prompt", "answer", "text", "label", "sort", "column", "primary", "row", "input", "output",
    "metric", "cache", "public", "sampled", "likeliest",
))  # fmt: skip
_NAME = re.compile(r"[\w.-]+")  # a special token such as <tool_token> is none
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

_SHAPES = re.compile(
    "|".join((
        r"(?<![A-Za-z0-9])(?:"
        r"(?:hf|api_org|hf_oauth)_[A-Za-z0-9]{16,}"  # Hugging Face
        r"|sk-[\w-]*?[A-Za-z0-9]{16,}[\w-]*"  # OpenAI, Anthropic
        r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"  # GitHub, GitLab
        r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"  # AWS
        r"|(?:xox[a-z]|xapp)-[\w-]{10,}"  # Slack
        r"|AIza[\w-]{30,}"  # Google
        r"|(?:nvapi-|gsk_|r8_|npm_|pypi-|wandb_v1_)(?=[\w-]*\d)[\w-]{20,}"
        r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # a JSON web token
        r")",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"(?<=://)[^/?#\s'\"<>]+(?=@)",  # user info of a URL
        r"(?i:(?<=\bbearer ))(?=\S*\d|\S{16})[\w.~+/=-]{6,}",
        r"(?i:(?<=\bauthorization: ))(?:\w+ )?[\w.~+/=-]{4,}",
    )),
    re.DOTALL,
)  # fmt: skip
# 'token': 'x' and "token": "x" as Python and JSON write it; ?token=x, HF_TOKEN=x and --api-key=x; --hub_token x; api_key: x.
_QUOTED = re.compile(
    r"""(?P<head>(?P<q>['"])(?P<name>[\w.-]+)(?P=q)\s*:\s*)(?P<v>['"])(?P<value>(?:\\.|(?!(?P=v)).)*)(?P=v)?"""
)
_ASSIGNED = re.compile(
    r"""(?P<head>(?P<before>[?&]|(?<![\w.]))(?P<name>[A-Za-z][\w.-]*)=['"]?)(?P<value>[^\s&'",;#)\]}<>]+)"""
)

_GIVEN = r"""(?P<value>'[^']*'|"[^"]*"|\[[^\]\n]*\]|[^\s'",\[\]{}<>()]+)"""
_OPTION = re.compile(rf"""(?P<head>(?<![\w-])["']?--(?P<name>[A-Za-z][\w.-]*)["']?,?[ \t]+)(?!--){_GIVEN}""")
# A name of several words anywhere, one of a single word where a line, a mapping or a quotation begins.
_LONG, _SHORT = r"(?<![\w.-])(?P<long>[A-Za-z]\w*(?:[_-]\w+)+)", r"""(?:^[ \t-]*|[{,][ \t]*|['"])(?P<short>[A-Za-z]+)"""
_LISTED = re.compile(rf"""(?m:(?P<head>(?:{_LONG}|{_SHORT})['"]?:[ \t]+){_GIVEN})""")
_NO_SECRET = ("true", "false", "null", "none", "value")


def redacted(value: Any, *, by_name: bool = True) -> Any:
    """A copy of nested settings in which `<redacted>` replaces each secret. Objects other than text and containers are kept.

    Args:
        value: settings, or what was measured.
        by_name: replace what is under a key that names a secret, besides text with the shape of one. False for what was measured:
            there, a "token" is one of a model's.
    """
    if isinstance(value, str):
        return redacted_text(value) if by_name else _SHAPES.sub(REDACTED, value)
    if isinstance(value, Mapping):
        named = names_secret if by_name else (lambda _: False)
        return {key: _hidden(v) if named(key) else redacted(v, by_name=by_name) for key, v in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(redacted(item, by_name=by_name) for item in value)
    return value


def redacted_text(text: str) -> str:
    """`text` with `<redacted>` in place of what has the shape of a secret, or is assigned to a name of one."""
    text = _SHAPES.sub(REDACTED, text)
    text = _QUOTED.sub(lambda m: f"{m['head']}{m['v']}{REDACTED}{m['v']}" if names_secret(m["name"]) else m[0], text)
    text = _OPTION.sub(lambda m: _given(m, m["name"]), text)
    text = _LISTED.sub(lambda m: _given(m, m["long"] or m["short"], prose=True), text)
    return _ASSIGNED.sub(_assignment, text)


def names_secret(name: object) -> bool:
    """Whether a setting, header or variable of this name holds a secret: `hub_token`, `X-Api-Key`, `HF_TOKEN`; not `pad_token`."""
    words = [word.lower() for word in _WORDS.findall(str(name))] if _NAME.fullmatch(str(name)) else []
    while len(words) > 1 and (words[-1] in _IGNORED_LAST or (words[-1].isdigit() and len(words) > 2)):  # api_key_1
        words.pop()
    if len(words) > 1 and words[-1] in _PLURAL:
        return words[-2] in _MAKES_PLURAL_SECRET
    return bool(words) and words[-1] in _SECRET and (len(words) < 2 or words[-2] not in _HARMLESS_BEFORE)


def _given(found: re.Match[str], name: str, *, prose: bool = False) -> str:
    """The text that was found, with what follows the name of a secret redacted.

    Args:
        found: with the groups `head` and `value`.
        name: that the value follows.
        prose: the text may be a sentence, `token: unknown`: a value of letters alone counts only if nothing follows it on its line.
    """
    value, whole = found["value"], found.string
    ending = value[len(value.rstrip(",;.")) :] if value[0] not in "'\"[" else ""
    word = value.removesuffix(ending)
    bare = word.strip("'\"").lower()
    rest = whole[found.end() :].split("\n", 1)[0].strip()
    sentence = prose and word.isalpha() and len(word) < 16 and bool(rest) and rest[0] not in "}],;'\""
    if (
        not names_secret(name)
        or name.lower() == "key"
        or bare in _NO_SECRET
        or REDACTED in value
        or _is_number(bare)
        or sentence
    ):
        return found[0]
    shown = f"[{REDACTED}]" if value[0] == "[" else f"{value[0]}{REDACTED}{value[0]}" if value[0] in "'\"" else REDACTED
    return f"{found['head']}{shown}{ending}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def without_redacted(value: Any) -> Any:
    """A copy of redacted settings without the keys whose value was a secret; a mapping that held nothing else becomes None."""
    if type(value) in (list, tuple):
        return type(value)(without_redacted(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    kept = {key: without_redacted(v) for key, v in value.items() if v != REDACTED}
    return kept if kept or not value else None


def redacted_keys(value: Any, name: str = "") -> Iterator[str]:
    """The dotted keys of nested settings whose text holds `<redacted>`."""
    if isinstance(value, str) and REDACTED in value:
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from redacted_keys(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from redacted_keys(inner, name)


def printable(text: object, keep: str = "") -> str:
    r"""`text` on one line, with control, format and surrogate characters shown as escapes such as `\x1b` and `\n`.

    These move a cursor, hide text, reverse its direction or cannot be encoded: C0, C1, bidirectional marks, lone surrogates.

    Args:
        text: any object; its `str`.
        keep: characters to leave as they are.
    """
    whole = str(text)
    if whole.isprintable():
        return whole
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in whole
    )


class RedactingFilter(logging.Filter):
    """Redacts the message of each log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the record's message; keep the record."""
        record.msg, record.args = redacted_text(record.getMessage()), None
        return True


def _hidden(value: Any) -> Any:
    """The value of a key that names a secret. Switches and an absent value say nothing and are kept."""
    if value is None or value == "" or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {key: _hidden(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_hidden(inner) for inner in value)
    return REDACTED


def _assignment(found: re.Match[str]) -> str:
    name, in_a_url = found["name"].lower(), bool(found["before"])
    # In prose, `key=length` and `token=5` are no secrets.
    harmless = not in_a_url and (name == "key" or found["value"].isdigit())
    secret = names_secret(found["name"]) or (in_a_url and name.endswith(("sig", "signature")))
    return f"{found['head']}{REDACTED}" if secret and not harmless else found[0]
