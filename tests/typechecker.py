"""The runtime type checker of the test run: beartype, with an int accepted where a float is annotated (PEP 484)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checked: dict[Any, Any] = {}


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arguments checked.

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
