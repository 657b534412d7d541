"""Position sets P(ŷ): which response positions carry the loss (OPRD section 2).

A response of T tokens has positions 0..T−1 (the paper counts 1..T). Position t is the state that *predicts* token t.
To add a set, write a function `(length, k) -> range or list of positions` and add it to `POSITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

EndOfTurn = Literal["merge", "by_id", "skip"]
Positions = Sequence[Sequence[int]]
"""The positions of each rollout, ascending."""


def all_positions(length: int, k: int) -> Sequence[int]:
    """All response positions, including the one that predicts EOS."""
    return range(length)


def last_position(length: int, k: int) -> Sequence[int]:
    """The last response position."""
    return range(max(0, length - 1), length)


def last_k_positions(length: int, k: int) -> Sequence[int]:
    """The last k positions, or all of a shorter response (the paper uses k = 2000)."""
    return range(max(0, length - k), length)


def first_k_positions(length: int, k: int) -> Sequence[int]:
    """The first k positions, or all of a shorter response."""
    return range(min(k, length))


POSITIONS: dict[str, Callable[[int, int], Sequence[int]]] = {
    "all": all_positions,
    "last": last_position,
    "last_k": last_k_positions,
    "first_k": first_k_positions,
}
NEEDS_K = frozenset({"last_k", "first_k"})


def check_positions(positions: str, k: int | None, names: tuple[str, str] = ("positions", "position_k")) -> None:
    """Check the name of a position set and its k.

    Args:
        positions: name of the set.
        k: number of positions for "last_k" and "first_k"; None for the other sets.
        names: names of the two settings, for the error message.

    Raises:
        ValueError: the set is unknown, or its k is missing, not allowed or not positive.
    """
    if positions not in POSITIONS:
        raise ValueError(f"{names[0]}: {positions!r} is not one of {', '.join(POSITIONS)}")
    if k is not None and k <= 0:
        raise ValueError(f"{names[1]}: {k} is not allowed; it counts response tokens and must be at least 1")
    if positions in NEEDS_K and k is None:
        raise ValueError(f"{names[1]}: {names[0]}={positions!r} needs it (the paper uses 2000 with last_k)")
    if positions not in NEEDS_K and k is not None:
        raise ValueError(
            f"{names[1]}: {k} has no effect with {names[0]}={positions!r}; remove it or use one of "
            f"{', '.join(sorted(NEEDS_K))}"
        )


def select_positions(length: int, positions: str = "all", k: int | None = None) -> Sequence[int]:
    """The positions P(ŷ) of a response of `length` tokens, ascending, counted from 0.

    Raises:
        ValueError: the set is unknown, or k does not fit it.
    """
    check_positions(positions, k)
    return POSITIONS[positions](length, k or 0)


def select_before_end(length: int, ended: bool, positions: str = "all", k: int | None = None) -> Sequence[int]:
    """`select_positions` without the position that predicts the end of the turn.

    Args:
        length: number of response tokens, including a final end token.
        ended: whether the last token is an end token.
        positions: name of the set.
        k: number of positions for "last_k" and "first_k".
    """
    return select_positions(length - ended, positions, k)


def check_end_of_turn(choice: str) -> None:
    """Check the setting `end_of_turn`.

    Raises:
        ValueError: the value is not allowed.
    """
    if choice not in get_args(EndOfTurn):
        raise ValueError(f"end_of_turn: {choice!r} is not one of {', '.join(get_args(EndOfTurn))}")
