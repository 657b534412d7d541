"""A million rows in little memory: flat arrays instead of one object a value; items are built on access."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class OnAccess(Sequence[T], Generic[T]):
    """A sequence whose items are made each time they are asked for. A slice is a view. It equals a list of equal items.

    Args:
        make: the item of a place.
        places: the place of each item.
    """

    def __init__(self, make: Callable[[int], T], places: range | np.ndarray) -> None:
        self._make, self._places = make, places

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> OnAccess[T]: ...
    def __getitem__(self, index: int | slice) -> T | OnAccess[T]:
        if isinstance(index, slice):
            return OnAccess(self._make, self._places[index])
        return self._make(int(self._places[index]))

    def __len__(self) -> int:
        return len(self._places)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OnAccess | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} items, the first {self[0]!r}>" if len(self) else "<0 items>"


class JsonColumn:
    """JSON values one after another in one block of UTF-8. Text must not hold lone surrogates."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])

    def append(self, value: Any) -> None:
        """Add a value."""
        self._text += json.dumps(value, ensure_ascii=False).encode()
        self._ends.append(len(self._text))

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]].decode())

    def __len__(self) -> int:
        return len(self._ends) - 1


class IdsColumn:
    """Lists of token ids one after another in one block, 4 bytes an id."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])

    def append(self, ids: Iterable[int]) -> None:
        """Add a list."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    @property
    def lengths(self) -> np.ndarray:
        """The length of each list."""
        return np.diff(np.asarray(self._ends))

    def __getitem__(self, index: int) -> list[int]:
        return self._ids[self._ends[index] : self._ends[index + 1]].tolist()
