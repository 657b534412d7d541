"""The protocol of a rollout engine, its input and output types, and helpers that engines share."""

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
    """How completions are drawn. The defaults sample from the student's own distribution, without truncation.

    Args:
        max_completion_length: most tokens of a completion; a completion that reaches it has finish reason "length".
        temperature: 0 for greedy.
        top_p: 1.0 for no nucleus truncation.
        top_k: 0 for no top-k truncation.
        min_p: a token below this share of the most probable token's probability is not drawn; 0 for no such truncation.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length: {self.max_completion_length} is not allowed; at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is not allowed; 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p} is not allowed; it lies in (0, 1], 1 truncates nothing")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} is not allowed; 0 (no truncation) or more")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: {self.min_p} is not allowed; it lies in [0, 1], 0 truncates nothing")


@dataclass(frozen=True)
class EngineAbilities:
    """What an engine can do beyond sampling.

    Args:
        background: it may sample from a copy of the student in another thread during the update (`overlap_rollouts`). It then draws
            from a random generator of its own and keeps no state that the update changes.
        log_probs: it reports the log-probability of each sampled token where the caller asks for it.
    """

    background: bool = False
    log_probs: bool = False


@dataclass(frozen=True)
class Completion:
    """One completion of an engine.

    Args:
        token_ids: its tokens, the stop token included where one was drawn.
        log_probs: of each token: nats, at temperature 1, over the whole vocabulary, before truncation; empty if not asked for.
    """

    token_ids: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Sampled:
    """What one `generate` returns.

    Args:
        rollouts: the completions.
        log_probs: of each rollout, the log-probability of each of its tokens: nats, at temperature 1, over the whole vocabulary,
            before truncation. None where the caller did not ask or the engine cannot report them.
    """

    rollouts: Rollouts
    log_probs: Sequence[Sequence[float]] | None = None


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples completions from the current student. Tests compare every engine with `TransformersEngine`.

    `make_engine` calls an engine's class as `Class(tokenizer, stop_token_ids, batch_size=…, **rollout_engine_kwargs)`.

    Attributes:
        can: what the engine can do. Set it on the class: `overlap_rollouts` is checked before an engine is built.
        pad_token_id: the id that pads batches.
        stop_token_ids: ids that end a completion.
    """

    can: EngineAbilities
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
        want_log_probs: bool = False,
    ) -> Sampled:
        """Sample `num_generations` completions a prompt, prompt after prompt; a pure function of weights, prompts and seed.

        Args:
            model: the model to sample from: a causal LM, perhaps with an adapter, without a wrapper for training.
            prompt_ids: token ids of each prompt, without padding.
            num_generations: completions a prompt, at least 1.
            sampling: how they are drawn.
            seed: of the drawing; the global random state plays no part.
            rows: dataset row of each prompt, which its rollouts carry; default: 0, 1, 2, ….
            want_log_probs: report the tokens' log-probabilities; ignored by an engine that cannot.
        """
        ...


@runtime_checkable
class CanInterrupt(Protocol):
    """An engine or teacher that waits for another process."""

    @property
    def failing(self) -> bool:
        """Whether a running `generate` may never end: the other process has failed since it last gave something."""
        ...

    def interrupt(self) -> None:
        """Make a running `generate` raise a KeyboardInterrupt soon; do nothing where none runs."""
        ...


def padding_id(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> int:
    """The id that an engine pads with. Any id will do: padding is masked in the prompt and cut off after the end."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_token_ids[0]


def repeat_prompts(
    prompt_ids: Sequence[Sequence[int]], num_generations: int, rows: Sequence[int] | None
) -> tuple[list[list[int]], list[int]]:
    """Each prompt `num_generations` times in a row, and the dataset row of each.

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
    """Completions as rollouts: finish reason "stop" where the last token is a stop token, texts without special tokens.

    Args:
        prompts: token ids of each completion's prompt.
        completions: token ids, the stop token included where one was drawn.
        owners: dataset row of each.
        tokenizer: decodes them.
        stop_token_ids: ids that end a completion.
    """
    reasons: list[FinishReason] = ["stop" if c[-1] in stop_token_ids else "length" for c in completions]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollouts(prompts, completions, reasons, texts, owners)


def cut_at_stop(completion: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    """The completion up to and including its first stop token; all of it where there is none."""
    for index, token in enumerate(completion):
        if token in stop_token_ids:
            return completion[: index + 1]
    return completion


def student_writes(lmbda: float, seed: int, step: int) -> bool:
    """Whether the student (not the teacher) samples this step's rollouts: in a share `lmbda` of steps, alike on all ranks."""
    return derive_seed(seed, step, "writer") < lmbda * 2**56


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on `parts` alone, so that any step can be repeated without the steps before it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
