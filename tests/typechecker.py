"""The runtime type checker of the test run: beartype, with an int accepted where a float is annotated (PEP 484).

jaxtyping checks shapes. Its wrapper costs far more than a call of most functions, so functions without an array in their
annotations get beartype's alone.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Any] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments and its result checked.

    What jaxtyping passes is an empty function with the signature of the one to check. It does so anew whenever a `def` within a
    function is executed; the checks of one signature are made once, because making them takes longer than most such functions run.
    """
    optional = len(function.__defaults__ or ()), *(function.__kwdefaults__ or ())
    key = (function.__module__, function.__qualname__, function.__code__, optional, *function.__annotations__.items())
    try:
        return _checked[key]
    except KeyError:
        _checked[key] = checked = _beartype(function)
        return checked
    except TypeError:  # an annotation that cannot be hashed
        return _beartype(function)


_jaxtyped = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Replaces the decorator of that name, which jaxtyping's import hook adds to everything."""

    def decorate(thing: Any) -> Any:
        if isinstance(thing, type):
            init = vars(thing).get("__init__")
            if (
                dataclasses.is_dataclass(thing) and init and not hasattr(init, "__wrapped__")
            ):  # else it is checked already
                thing.__init__ = decorate(init)
            return thing
        if isinstance(thing, types.FunctionType) and "<locals>" not in thing.__qualname__:
            hints = {name: _resolved(hint, thing.__globals__) for name, hint in thing.__annotations__.items()}
            if not any(map(_has_array, hints.values())):
                return _without_shapes(thing, hints)
        return _jaxtyped(thing, typechecker=typechecker)

    return decorate


def _resolved(hint: Any, namespace: dict[str, Any]) -> Any:
    """What an annotation written as text means; Any where it cannot be told yet, as jaxtyping has it."""

    def stub(value): ...

    stub.__annotations__ = {"value": hint}
    try:
        return get_type_hints(stub, namespace, include_extras=True)["value"]
    except Exception:
        return Any


def _has_array(hint: Any) -> bool:
    if isinstance(hint, list | tuple):  # the arguments of a Callable
        return any(map(_has_array, hint))
    return (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_has_array, get_args(hint))
    )


def _without_shapes(function: types.FunctionType, hints: dict[str, Any]) -> Any:
    """Checked by beartype alone. Whoever asks for its signature sees that of `function`."""
    resolved = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    resolved.__kwdefaults__ = function.__kwdefaults__
    resolved.__module__, resolved.__qualname__ = function.__module__, function.__qualname__
    resolved.__annotations__ = hints
    checked = _beartype(resolved)
    return function if checked is resolved else functools.update_wrapper(checked, function)
