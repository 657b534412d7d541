"""What a rollout engine is asked and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.types import FinishReason, Rollouts


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults are the method's: the student's own distribution, nothing cut off.

    Args:
        max_completion_length: most tokens of a completion; a completion that reaches it has finish reason "length".
        temperature: 0 for greedy.
        top_p: 1.0 for no nucleus truncation.
        top_k: 0 for no top-k truncation.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length: {self.max_completion_length} is not allowed; at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is not allowed; 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not allowed; it lies in (0, 1], 1 truncates nothing")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is not allowed; 0 (no truncation) or more")


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the current student. `TransformersEngine` is the reference that others are tested against."""

    pad_token_id: int
    stop_token_ids: list[int]

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> Rollouts:
        """`num_generations` completions a prompt, prompt after prompt; a pure function of weights, prompts and seed."""
        ...


def padding_id(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> int:
    """The id that an engine pads with. Any will do: padding is masked in the prompt and cut off after the end."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_token_ids[0]


def repeat_prompts(
    prompt_ids: Sequence[Sequence[int]], num_generations: int, rows: Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    """Each prompt `num_generations` times in a row, and the dataset row that each of them belongs to.

    Raises:
        ValueError: `num_generations` < 1.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations: {num_generations} is not allowed; at least 1")
    names = rows if rows is not None else range(len(prompt_ids))
    prompts = [list(prompt) for prompt in prompt_ids for _ in range(num_generations)]
    return prompts, [row for row in names for _ in range(num_generations)]


def to_rollouts(
    prompts: list[list[int]],
    completions: list[list[int]],
    owners: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
) -> Rollouts:
    """Sampled completions as rollouts: "stop" where the last token is one that ends a completion, texts without special tokens."""
    reasons: list[FinishReason] = ["stop" if c[-1] in stop_token_ids else "length" for c in completions]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollouts(prompts, completions, reasons, texts, owners)


def student_writes(lmbda: float, seed: int, step: int) -> bool:
    """Whether the student writes this step's rollouts, not the teacher: true for a share `lmbda` of steps, alike on all ranks."""
    return derive_seed(seed, step, "writer") < lmbda * 2**56


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all `parts` and on nothing else: any step can be repeated without those before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
