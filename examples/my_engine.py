"""A rollout engine of your own: it samples several candidates and keeps the shortest one that ends by itself.

In the recipe (YAML), with this file's folder on PYTHONPATH:

    rollout_engine: my_engine:BestOfEngine        # module:attribute
    rollout_engine_kwargs: {candidates: 3}        # further arguments of the class

or on the command line:

    PYTHONPATH=examples oprd train --config tiny --rollout_engine my_engine:BestOfEngine

It shows the protocol (`RolloutEngine` in `oprd.rollouts.engine`), not a better method: selected rollouts are off-policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling
from oprd.rollouts.transformers_engine import TransformersEngine


class BestOfEngine:
    """Wraps `TransformersEngine`. oprd passes the tokenizer, the stop ids, generation_batch_size and rollout_engine_kwargs."""

    can = EngineAbilities(background=True)  # `generate` changes nothing outside itself, so overlap_rollouts is allowed

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], batch_size: int, candidates: int = 2
    ) -> None:
        if candidates < 1:
            raise ValueError(f"candidates: {candidates} is not allowed; at least 1")
        self.inner = TransformersEngine(tokenizer, stop_token_ids, batch_size)
        self.candidates = candidates
        self.pad_token_id, self.stop_token_ids = self.inner.pad_token_id, self.inner.stop_token_ids

    def generate(
        self, model: nn.Module, prompt_ids: Sequence[Sequence[int]], *, num_generations: int, sampling: Sampling,
        seed: int, rows: Sequence[int] | None = None, want_log_probs: bool = False,
    ) -> Sampled:  # fmt: skip
        """Sample `num_generations` completions per prompt, prompt after prompt, from the current weights."""
        count = num_generations * self.candidates
        sampled = self.inner.generate(model, prompt_ids, num_generations=count, sampling=sampling, seed=seed, rows=rows)
        found = sampled.rollouts

        def badness(index: int) -> tuple[bool, int]:
            return found.finish_reasons[index] != "stop", len(found.completion_ids[index])

        starts = range(0, len(found), self.candidates)
        return Sampled(found.select([min(range(i, i + self.candidates), key=badness) for i in starts]))
