"""Position sets P(ŷ): which response positions carry the loss (OPRD section 2).

A response of T tokens has positions 0..T−1 here (the paper counts 1..T); position t is the state that *predicts* token t.
To add a set, write a function `(length, k) -> range or list of positions` and add one line to `POSITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def all_positions(length: int, k: int) -> Sequence[int]:
    """Every response position, the one that predicts the EOS included."""
    return range(length)


def last_position(length: int, k: int) -> Sequence[int]:
    """The last response position alone."""
    return range(length - 1, length)


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


def check_positions(positions: str, k: int | None) -> None:
    """Refuse an unknown position set, or one whose k is missing, superfluous or not positive.

    Raises:
        ValueError: names the key, the value and what is allowed.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions: {positions!r} is not one of {', '.join(POSITIONS)}")
    if k is not None and k <= 0:
        raise ValueError(f"position_k: {k} is not allowed; it counts response tokens and must be at least 1")
    if positions in NEEDS_K and k is None:
        raise ValueError(f"position_k: positions={positions!r} needs it (the paper uses 2000 with last_k)")
    if positions not in NEEDS_K and k is not None:
        raise ValueError(
            f"position_k: {k} has no effect with positions={positions!r}; remove it or use one of "
            f"{', '.join(sorted(NEEDS_K))}"
        )


def select_positions(length: int, positions: str = "all", k: int | None = None) -> Sequence[int]:
    """Positions of P(ŷ) for a response of `length` tokens, ascending, 0-based.

    Raises:
        ValueError: unknown set, or a k that does not fit it.
    """
    check_positions(positions, k)
    return POSITIONS[positions](length, k or 0)
