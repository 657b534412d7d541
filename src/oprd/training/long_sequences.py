"""A rollout longer than a micro-batch's token budget: less is kept of it, and more is computed again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from oprd.models.recomputation import chunked_mlps, recomputed_blocks

logger = logging.getLogger("oprd")


class LongSequences:
    """Keeps memory nearly flat in the length of a rollout that exceeds `micro_batch_tokens`, with the same gradients.

    Such a rollout is a micro-batch of its own. The student keeps the inputs of its blocks and runs each block again in backward;
    MLPs of student and teacher run by chunks of `micro_batch_tokens` tokens. Shorter rollouts are not changed.

    Args:
        student: the model in training; it may be wrapped.
        teachers: the teacher's models in this process.
        recomputed: the student's blocks are run again for every rollout (`activation_checkpointing`).
        deepspeed: DeepSpeed runs the student. It gathers weights from all ranks in every pass of a module, so that one rank cannot
            run a module more often than another; long rollouts then run as the others.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module] = (),
        *,
        recomputed: bool = False,
        deepspeed: bool = False,
    ) -> None:
        self.student, self.recomputed, self.deepspeed = student, recomputed, deepspeed
        self.models = tuple(dict.fromkeys((student, *teachers)))
        self._said: set[str] = set()

    def needs(self, longest: int, token_budget: int) -> bool:
        """Whether a micro-batch whose longest rollout has so many tokens runs with less memory."""
        return longest > token_budget and not self.deepspeed

    @contextmanager
    def sparing(self, longest: int, token_budget: int) -> Iterator[None]:
        """Around both models' passes and backward of a micro-batch: spare memory if its longest rollout exceeds the budget.

        Args:
            longest: tokens of its longest rollout, of the model that reads more of them.
            token_budget: most padded tokens of a micro-batch.
        """
        if longest <= token_budget:
            yield
            return
        begin = f"a rollout of {longest} tokens is longer than micro_batch_tokens ({token_budget})"
        if self.deepspeed:
            self._say_once(
                f"{begin} and runs whole: under DeepSpeed, set activation_checkpointing: true to spare memory"
            )
            yield
            return
        self._say_once(
            f"{begin}: the student's blocks run again in backward, and MLPs {token_budget} tokens at a time, which takes about a "
            "third longer; the metric long_sequences counts such rollouts"
        )
        with ExitStack() as stack:
            uncut = [stack.enter_context(chunked_mlps(model, token_budget)) for model in self.models]
            if not self.recomputed:
                stack.enter_context(recomputed_blocks(self.student))
            yield
        self._say_uncut(name for names in uncut for name in names)

    def _say_uncut(self, names: Iterable[str]) -> None:
        for name in sorted(set(names)):
            self._say_once(
                f"{name} does not run by chunks of tokens: its MLP takes memory for a long rollout as a whole",
                about=name,
            )

    def _say_once(self, text: str, about: str = "") -> None:
        if about not in self._said:
            self._said.add(about)
            logger.warning("%s", text)
