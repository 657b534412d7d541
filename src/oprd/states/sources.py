"""The forms of `teacher_model` other than a name: a server, a cache, and fixed responses beside a model or a server."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from oprd.states.remote import TOKEN_ENV
from oprd.states.remote.teacher import RemoteSettings

_SECRETS = ("token", "api_key", "key", "password")


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher and its responses are. One of the first three is set.

    Args:
        model: folder, hub name or `embedded:…`, loaded here.
        remote: a server.
        cache: folder of a cache, which holds responses too.
        responses: file of fixed responses (`oprd.data.responses.read_responses`); None: they are written as `lmbda` says.
    """

    model: str | None = None
    remote: RemoteSettings | None = None
    cache: Path | None = None
    responses: Path | None = None

    @property
    def fixed(self) -> bool:
        """Whether the responses exist before the run."""
        return self.cache is not None or self.responses is not None

    def check_writer(self, lmbda: float | Mapping[str, Any]) -> None:
        """Check who writes the rollouts.

        Raises:
            ValueError: the student would, and they are fixed.
        """
        if lmbda == 0 or not self.fixed:
            return
        if self.cache is not None:
            raise ValueError(
                f"lmbda: {lmbda} lets the student write, and the cache {self.cache} has the teacher's states of its own responses "
                "alone; set lmbda: 0, or name a model or a server as teacher_model to train on-policy"
            )
        raise ValueError(
            f"lmbda: {lmbda} lets the student write, and teacher_model names responses; set lmbda: 0, or leave them out"
        )


def teacher_source(entry: Any) -> TeacherSource | None:
    """What `teacher_model` says, where it is a mapping other than `{use: …}`; None where it is something else.

    Raises:
        ValueError: an unknown key, a value of another type, or not one of model, url and cache.
    """
    if not isinstance(entry, Mapping) or "use" in entry or not {*entry} & {"model", "url", "cache", "responses"}:
        return None
    named = [key for key in ("model", "url", "cache") if key in entry]
    if len(named) != 1:
        raise ValueError(
            f"teacher_model: {', '.join(named) or 'responses alone'} is not allowed; one of model, url and cache (or use, for "
            "code of your own)"
        )
    remote_keys = [field.name for field in fields(RemoteSettings)]
    allowed = {"model": ["model", "responses"], "url": [*remote_keys, "responses"], "cache": ["cache"]}[named[0]]
    for key in entry:
        _check_key(str(key), allowed, named[0])
    for key in ("model", "cache", "responses"):
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            raise ValueError(f"teacher_model: {key}: {entry[key]!r} is not allowed; a text")
    responses = Path(entry["responses"]).expanduser() if "responses" in entry else None
    if responses is not None and not responses.is_file():
        raise ValueError(f"teacher_model: responses: there is no file {responses}")
    remote = None
    if named[0] == "url":
        try:
            remote = TypeAdapter(RemoteSettings).validate_python(
                {key: entry[key] for key in entry if key in remote_keys}
            )
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "value_error":  # our own message, already complete
                raise ValueError(first["msg"].removeprefix("Value error, ")) from None
            raise ValueError(f"teacher_model: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    cache = Path(entry["cache"]).expanduser() if "cache" in entry else None
    return TeacherSource(entry.get("model"), remote, cache, responses)


def _check_key(key: str, allowed: list[str], form: str) -> None:
    if key in allowed:
        return
    if key.lower() in _SECRETS:
        raise ValueError(
            f"teacher_model: {key} is not allowed, since settings are written to files; put it into the environment variable "
            f"{TOKEN_ENV}, or into another one that token_env names"
        )
    near = difflib.get_close_matches(key, allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"teacher_model: {key!r} is not one of {', '.join(allowed)}, which go with {form}{hint}")
