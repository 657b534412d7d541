"""Shared data types: `Rollouts` (sampled completions) and `States` (hidden states at selected positions).

Tensor names in this project end in dimension letters:

    B  rows of a model batch          T  padded length of a row
    L  selected layers                N  packed positions: the selected response positions of all rollouts, concatenated
    D  hidden width                   R  rollouts
    M  packed response positions, selected or not (M = N when every position is selected)
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
    """Prompts and the student's sampled completions, as token ids without padding.

    Args:
        prompt_ids: token ids of each rollout's prompt, at least one.
        completion_ids: token ids of each completion, including the end-of-sequence token if it was generated.
        finish_reasons: "stop" if the model ended the completion, "length" if the length limit cut it.
        texts: each completion as text, without special tokens.
        rows: index of each rollout's dataset row.
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
        """Response tokens of each rollout, including a generated EOS."""
        return [len(completion) for completion in self.completion_ids]

    @property
    def input_lengths(self) -> list[int]:
        """Tokens that a model reads per rollout: prompt and completion, without the completion's last token."""
        return [len(p) + len(c) - 1 for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: Sequence[int]) -> Rollouts:
        """The rollouts at `indices`, in that order."""
        columns: Any = ([getattr(self, f.name)[i] for i in indices] for f in fields(self))
        return Rollouts(*columns)

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """The rollouts of all `parts`, in order."""
        columns: Any = ([item for part in parts for item in getattr(part, f.name)] for f in fields(Rollouts))
        return Rollouts(*columns)


@dataclass(frozen=True)
class States:
    """Hidden states at selected layers and positions, packed: positions are concatenated without padding.

    Args:
        layers: 1-based layer numbers, ascending. The model's last layer is the state after the final norm.
        values: one tensor `[N, D]` per layer, in the order of `layers`. Row n is the same token in every layer. D is the same in
            every layer, unless the model projects its last state (OPT-350M).
        rollout_index: `[N]`, the index of each position's rollout.
        num_rollouts: number of rollouts read, including those without a selected position.
        head_MD: `[M, E]`, the LM head's input at every response position, if requested. E may differ from D when a bridge
            has projected `values`.
        attention: `[N, H, T]` for each layer whose attention rows were requested: H heads over T tokens.
    """

    layers: tuple[int, ...]
    values: tuple[Float[Tensor, "N _"], ...]
    rollout_index: Int[Tensor, " N"]
    num_rollouts: int
    head_MD: Float[Tensor, "M E"] | None = None
    attention: tuple[Float[Tensor, "N _ _"], ...] = ()

    def stacked(self) -> Float[Tensor, "L N D"]:
        """`values` as one tensor `[L, N, D]` (a copy)."""
        return torch.stack(self.values)
