"""Turns a name in the user's configuration into an object: one that oprd ships, or `module:attribute` of the user's own code.

Only user configuration may name code, since `module:attribute` imports a module and so runs it. Never pass text here that comes
with a model, a checkpoint or a data set.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def resolve_object(key: str, name: str, known: Mapping[str, T]) -> T:
    """The object that a setting names.

    Args:
        key: the setting, for messages, such as "rollout_engine".
        name: a name in `known`, or `module:attribute`. The module is imported as Python imports any: from the installed packages or
            a folder on PYTHONPATH. The imported object is returned as it is; the caller checks that it fits.
        known: shipped objects by name.

    Raises:
        ValueError: `name` has neither form, the module cannot be imported, or it has no such attribute.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        if known:
            allowed = f"one of {', '.join(known)}, nor module:attribute of your own code{hint}"
        else:
            allowed = "of the form module:attribute, such as my_package.my_module:MyClass"
        raise ValueError(f"{key}: {name!r} is not {allowed}")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"{key}: {name!r} is not of the form module:attribute, such as my_package.my_module:MyClass"
            + (f"; or set one of {', '.join(known)}" if known else "")
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise ValueError(
            f"{key}: {name!r} needs the module {module_name}, which cannot be imported ({type(error).__name__}: {error}); install "
            "it or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; is another module {module_name} earlier on PYTHONPATH?"
        origin = getattr(module, "__file__", None) or "built in"
        raise ValueError(f"{key}: the module {module_name} ({origin}) has no attribute {attribute!r}{hint}")
    return getattr(module, attribute)


def resolve_with_arguments(key: str, entry: Any, known: Mapping[str, T]) -> tuple[T, dict[str, Any]]:
    """The object that a setting names, and the arguments given with it.

    Args:
        key: the setting, for messages.
        entry: what the configuration holds: a name as in `resolve_object`, or `{use: name, **arguments}`.
        known: shipped objects by name.

    Returns:
        The object and its arguments, `{}` for a bare name.

    Raises:
        ValueError: see `resolve_object`; or `entry` is neither a name nor a mapping with a name under `use`.
    """
    name, arguments = entry, {}
    if isinstance(entry, Mapping):
        name, arguments = entry.get("use"), {k: v for k, v in entry.items() if k != "use"}
    if not isinstance(name, str) or not all(isinstance(k, str) for k in arguments):
        raise ValueError(
            f"{key}: {entry!r} is neither a name nor a mapping {{use: name, argument: value, …}}; name is "
            + (f"one of {', '.join(known)}, or " if known else "")
            + "module:attribute of your own code"
        )
    return resolve_object(key, name, known), arguments


def arguments_problem(make: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why `make(*args, **kwargs)` does not fit its signature; None if it does, or if it has no signature to read."""
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # some functions of C have none
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return f"{error}; its arguments are {signature}"
    return None


def term_name(use: str) -> str:
    """Name of a term in the log: the attribute of `module:attribute`, in lower case."""
    return use.rpartition(":")[2].lower()
