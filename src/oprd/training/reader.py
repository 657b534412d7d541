"""What a training step reads of student and teacher: which tokens, which positions, which LM heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner, AlignmentStats, with_system
from oprd.alignment.position_pairs import Pairing, pair_positions, request_pair
from oprd.config import OPRDConfig, needs_head
from oprd.config_checks import check_default_ends
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import PromptRow
from oprd.models.architecture import context_length
from oprd.models.lm_head import Heads, LMHead, check_head, lm_head_of, match_heads, share_events
from oprd.models.tokens import vocabulary_size
from oprd.objectives.schedules import is_on
from oprd.objectives.step_loss import Batch, StepTerms
from oprd.rollouts.engine import RolloutEngine
from oprd.states.positions import Positions, select_before_end, select_positions
from oprd.states.requests import StateRequest
from oprd.states.teachers import Teacher
from oprd.types import Rollouts

logger = logging.getLogger("oprd")


class PairReader:
    """Knows how the two models of a run read the same responses, so that the loss need not.

    Args:
        student: the model in training.
        teacher: what it is compared with.
        aligner: gives the teacher its own prompt and tokens; None where it reads the student's.
        tokenizer: the student's.
        engine: what samples, for its stop tokens.
        layers: student layers whose states are matched; none where the two models' states cannot be compared.
        args: the run's settings.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        aligner: Aligner | None,
        tokenizer: PreTrainedTokenizerBase,
        engine: RolloutEngine,
        layers: Sequence[int],
        args: OPRDConfig,
    ) -> None:
        self.student, self.teacher, self.aligner, self.engine = student, teacher, aligner, engine
        self.layers, self.args = tuple(layers), args
        # Under bf16 a GPU multiplies in it, and adds up in float32; a CPU gains nothing by rounding.
        self.product_dtype = torch.bfloat16 if args.bf16 and args.device.type == "cuda" else None
        self.head_in_place = False  # see `LMHead.in_place`; the trainer knows whether a wrapper waits for the gradient
        self._vocab_size = vocabulary_size(tokenizer)
        self._shared: tuple[list[int], list[int]] = ([], [])
        self._event_of: dict[int, int] = {}
        self._teacher_ends: tuple[int, ...] = ()
        if aligner is not None:
            check_default_ends(args)
            ends = aligner.pair.stop_ids
            # What ends a text for the student ends it for a teacher that gives the id the same meaning.
            alike = [i for i in ends if i in aligner.same_ids]
            self._teacher_ends = (*teacher.stop_token_ids, aligner.pair.end_id, *alike)
            self._shared = aligner.shared_vocabulary(self._teacher_ends)
            logger.info(
                "the teacher reads its own prompts and tokens; %d of the student's %d tokens are among its %d",
                len(self._shared[0]), len(tokenizer), len(aligner.teacher_tokenizer),
            )  # fmt: skip
            events = {i: event for event, i in enumerate(self._shared[0])}
            self._event_of = events | dict.fromkeys(ends, events[ends[0]])  # whatever ended a response, it is one event

    def pair(self, rollouts: Rollouts, rows: Mapping[int, PromptRow]) -> tuple[Pairing | None, AlignmentStats | None]:
        """The rollouts as the teacher reads them, with counts; None where it reads them as they are.

        Raises:
            ValueError: a prompt that the teacher's template cannot render, or more tokens than the teacher can read.
        """
        if self.aligner is None:
            return None, None
        theirs, alignments, stats = self.aligner.align(rollouts, rows)
        limit, longest = self.teacher_context, max(theirs.input_lengths)
        if limit is not None and longest > limit:
            raise ValueError(
                f"teacher_model: a rollout has {longest} tokens in its tokenizer, more than its context of {limit}; shorten "
                "max_completion_length, or leave long prompts out with max_prompt_length"
            )
        where = {"positions": self.args.positions, "position_k": self.args.position_k}
        return pair_positions(rollouts, theirs, alignments, self._event_of, **where), stats  # type: ignore[arg-type]

    def teacher_prompts(self, prompts: Sequence[Prompt], name: str, max_completion_length: int) -> list[Prompt]:
        """The same prompts as the teacher reads them.

        Raises:
            ValueError: one that its template cannot render, or that leaves no room for a completion; names the row.
        """
        if self.aligner is None:
            return list(prompts)
        try:
            return prepare_prompts(
                [with_system(p.row, self.aligner.system_prompt) for p in prompts],
                self.aligner.teacher_tokenizer,
                name=name,
                max_completion_length=max_completion_length,
                context_length=self.teacher_context,
                chat_template_kwargs=self.aligner.teacher_kwargs,
            )
        except ValueError as error:
            raise ValueError(f"the teacher's prompts: {error}") from error

    @property
    def teacher_context(self) -> int | None:
        """Tokens that the teacher can read; None when unknown."""
        with self.teacher.sampler() as model:
            return context_length(model)

    def requests(self, batch: Batch, terms: StepTerms) -> tuple[StateRequest, StateRequest]:
        """What is read of the student and of the teacher for the terms of a step."""
        student, teacher = request_pair(
            batch.rollouts,
            batch.pairing,
            self.layers if terms.reads_layers else (),
            chosen=self._matched(batch.rollouts),
            compared=self._compared(batch.rollouts),
            pad_token_id=self.engine.pad_token_id if self.aligner is None else 0,
            head=terms.needs_head or terms.measuring,
        )
        return student.to(self.args.device), teacher.to(self.args.device)

    def counts(self, batch: Batch) -> list[int]:
        """Rollouts, positions whose states are matched, response tokens, and those whose distributions are compared."""
        lengths, pairing = batch.rollouts.completion_lengths, batch.pairing
        if pairing is not None:
            return [len(lengths), pairing.num_matched, sum(lengths), pairing.num_compared]
        matched, compared = self._matched(batch.rollouts), self._compared(batch.rollouts)
        compared_tokens = sum(lengths) if compared is None else sum(map(len, compared))
        return [len(lengths), sum(map(len, matched)), sum(lengths), compared_tokens]

    def _matched(self, rollouts: Rollouts) -> Positions:
        """The positions of each rollout whose states are matched, where both models read the same ids."""
        return self._select(rollouts, self.args.positions, self.args.position_k)

    def _compared(self, rollouts: Rollouts) -> Positions | None:
        """Likewise, those whose next-token distributions are compared; None: all."""
        if self.args.output_positions == "all" and self.args.end_of_turn != "skip":
            return None
        return self._select(rollouts, self.args.output_positions, self.args.output_position_k)

    def _select(self, rollouts: Rollouts, positions: str, k: int | None) -> Positions:
        if self.args.end_of_turn != "skip":
            return [select_positions(n, positions, k) for n in rollouts.completion_lengths]
        lengths = zip(rollouts.completion_lengths, rollouts.finish_reasons, strict=True)
        return [select_before_end(n, reason == "stop", positions, k) for n, reason in lengths]

    def heads(self) -> Heads:
        """LM heads over the same events: padding rows cut off, every end of text one event, of two vocabularies what they share."""
        student = replace(lm_head_of(self.student), in_place=self.head_in_place, product_dtype=self.product_dtype)
        teacher = self.teacher.head()
        stops = tuple(self.engine.stop_token_ids)
        if self.aligner is None:
            size = min(self._vocab_size, student.size, teacher.size)
            ends = () if self.args.end_of_turn == "by_id" else stops
            student, teacher = match_heads(student, teacher, vocab_size=size, stop_token_ids=ends)
            return Heads(student, student, teacher)
        size = min(self._vocab_size, student.size)
        policy, _ = match_heads(student, student, vocab_size=size, stop_token_ids=stops)
        shared = share_events(
            student, teacher, self._shared, student_stop_ids=stops, teacher_stop_ids=self._teacher_ends
        )
        return Heads(policy, *shared)

    def check_terms(self, prompts: Sequence[Prompt], *, deepspeed: bool) -> None:
        """Make sure that answers and next-token distributions can be had, where a term or a measurement wants them.

        Where only a measurement does, it is turned off with a warning.

        Raises:
            ValueError: a term needs them, and there is no head or it is not understood; or rows without an answer to reward.
        """
        args = self.args
        if is_on(args.policy_gradient_weight):
            unanswered = next((p.row.source for p in prompts if p.row.answer is None), None)
            if unanswered:
                raise ValueError(f"{unanswered}: no answer to grade rollouts by, which policy_gradient_weight needs")
        if args.diagnostic_steps == 0 and not needs_head(args):
            return
        try:
            if deepspeed:
                raise ValueError(
                    "output_space, policy_gradient_weight: not with DeepSpeed (it shards the LM head); use fully_shard or DDP"
                )
            self.check_heads()
        except ValueError as error:
            if needs_head(args):
                raise
            logger.warning("diagnostics are off: %s", error)
            args.diagnostic_steps = 0

    @torch.no_grad()
    def check_heads(self) -> None:
        """Make sure that both models' LM heads are understood.

        Raises:
            ValueError: there is none, or its logits are not the model's.
        """

        def whole(head: LMHead) -> LMHead:
            return LMHead(head.weight, head.bias, head.softcap, head.scale)

        heads = self.heads()
        check_head(whole(heads.student), self.student)
        with self.teacher.sampler() as model:
            check_head(whole(heads.teacher), model)
