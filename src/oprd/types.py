"""The nouns of the project: `Rollouts` (what the student wrote) and `States` (what a model thought while reading it).

Dimension letters used as suffixes of tensor names throughout the project:

    B  rows of a model batch          T  padded length of a row
    L  layers chosen                  N  packed positions: all selected response positions of all rollouts, one after another
    D  hidden width                   R  rollouts
    M  all response positions, packed likewise (N of them when every position is selected)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Rollouts:
    """Completions that the student sampled, with the prompts they answer. Plain token ids, no padding.

    Args:
        prompt_ids: token ids of each rollout's prompt, at least one each.
        completion_ids: token ids of each completion, the end-of-sequence token included when it was generated.
        finish_reasons: "stop" when the model ended the completion itself, "length" when the limit cut it.
        texts: each completion as text, special tokens left out.
        rows: index of the dataset row each rollout belongs to.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    finish_reasons: Sequence[FinishReason]
    texts: Sequence[str]
    rows: Sequence[int]

    def __post_init__(self) -> None:
        columns = (self.completion_ids, self.finish_reasons, self.texts, self.rows)
        if any(len(column) != len(self.prompt_ids) for column in columns):
            raise ValueError(
                f"Rollouts: all columns must have one entry a rollout, got lengths "
                f"{[len(column) for column in (self.prompt_ids, *columns)]}"
            )
        for index, (prompt, completion) in enumerate(zip(self.prompt_ids, self.completion_ids, strict=True)):
            if not prompt:
                raise ValueError(
                    f"rollout {index}: the prompt has no token, so no state predicts the first response token"
                )
            if not completion:
                raise ValueError(f"rollout {index}: the completion has no token (an immediate end still has its EOS)")

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def completion_lengths(self) -> list[int]:
        """Response tokens of each rollout, EOS included when generated."""
        return [len(completion) for completion in self.completion_ids]

    @property
    def input_lengths(self) -> list[int]:
        """Tokens a model must read for every response position: prompt + completion without its last token."""
        return [len(p) + len(c) - 1 for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: Sequence[int]) -> Rollouts:
        """The rollouts at `indices`, in that order."""
        columns: Any = ([getattr(self, f.name)[i] for i in indices] for f in fields(self))
        return Rollouts(*columns)

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """All rollouts of `parts`, one after another."""
        columns: Any = ([item for part in parts for item in getattr(part, f.name)] for f in fields(Rollouts))
        return Rollouts(*columns)


@dataclass(frozen=True)
class States:
    """Hidden states at selected layers and positions, packed: no padding, one position after another.

    Args:
        layers: 1-based layer numbers, ascending; the model's last layer is the state after the final norm.
        values: one tensor `[N, D]` a layer, in the order of `layers`. Position n of every layer is the same token.
        rollout_index: `[N]`, whose each position is (an index into the rollouts that were read).
        num_rollouts: rollouts that were read, those without a selected position included.
        head_MD: what the LM head reads at every response position, where that was asked for; wider than projected `values`.
    """

    layers: tuple[int, ...]
    values: tuple[Float[Tensor, "N D"], ...]
    rollout_index: Int[Tensor, " N"]
    num_rollouts: int
    head_MD: Float[Tensor, "M E"] | None = None

    def stacked(self) -> Float[Tensor, "L N D"]:
        """One tensor `[L, N, D]` (a copy)."""
        return torch.stack(self.values)
