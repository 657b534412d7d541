"""Position sets P(ŷ): which response positions carry the loss (OPRD section 2).

A response of T tokens has positions 0..T−1 here (the paper counts 1..T); position t is the state that *predicts* token t.
To add a set, write a function `(length, k) -> range or list of positions` and add one line to `POSITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

EndOfTurn = Literal["merge", "by_id", "skip"]
Positions = Sequence[Sequence[int]]
"""Ascending positions of each rollout."""


def all_positions(length: int, k: int) -> Sequence[int]:
    """Every response position, the one that predicts the EOS included."""
    return range(length)


def last_position(length: int, k: int) -> Sequence[int]:
    """The last response position alone."""
    return range(max(0, length - 1), length)


def last_k_positions(length: int, k: int) -> Sequence[int]:
    """The last k positions; all of them when the response is shorter (the paper's choice, k = 2000)."""
    return range(max(0, length - k), length)


def first_k_positions(length: int, k: int) -> Sequence[int]:
    """The first k positions; all of them when the response is shorter."""
    return range(min(k, length))


POSITIONS: dict[str, Callable[[int, int], Sequence[int]]] = {
    "all": all_positions,
    "last": last_position,
    "last_k": last_k_positions,
    "first_k": first_k_positions,
}
NEEDS_K = frozenset({"last_k", "first_k"})


def check_positions(positions: str, k: int | None, names: tuple[str, str] = ("positions", "position_k")) -> None:
    """Refuse an unknown position set, or one whose k is missing, superfluous or not positive.

    Args:
        positions: name of the set.
        k: of the sets that have one.
        names: the two settings' names, for the message.

    Raises:
        ValueError: names the key, the value and what is allowed.
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
    """Positions of P(ŷ) for a response of `length` tokens, ascending, 0-based.

    Raises:
        ValueError: unknown set, or a k that does not fit it.
    """
    check_positions(positions, k)
    return POSITIONS[positions](length, k or 0)


def select_before_end(length: int, ended: bool, positions: str = "all", k: int | None = None) -> Sequence[int]:
    """`select_positions` among the positions that predict anything but the end of the turn.

    Args:
        length: response tokens, the end token included where there is one.
        ended: whether the last of them is an end token.
        positions: name of the set.
        k: of the sets that have one.
    """
    return select_positions(length - ended, positions, k)


def check_end_of_turn(choice: str) -> None:
    """Refuse an unknown way to treat the end of a turn.

    Raises:
        ValueError: names the key and what is allowed.
    """
    if choice not in get_args(EndOfTurn):
        raise ValueError(f"end_of_turn: {choice!r} is not one of {', '.join(get_args(EndOfTurn))}")
