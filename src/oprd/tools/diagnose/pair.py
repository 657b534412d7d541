"""A student and a teacher as they are, whatever their shapes and tokenizers: loaded, sampled from, and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner, AlignmentStats, with_system
from oprd.alignment.position_pairs import PositionPairs, pair_positions
from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import PromptRow
from oprd.models.architecture import context_length
from oprd.models.lm_head import LMHead, check_head, lm_head_of, match_heads, share_events
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import different_tokens, stop_token_ids, vocabulary_size
from oprd.rollouts.engine import Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.types import Rollouts


@dataclass(frozen=True)
class ModelPair:
    """Student and teacher, in this order in every tuple.

    Args:
        names: as given by the user.
        models: in eval mode, without gradients.
        tokenizers: theirs.
        stop_ids: ids that end a text for each.
        aligner: gives the teacher its own prompt and tokens; None where it reads the student's.
        text: how prompts are rendered.
    """

    names: tuple[str, str]
    models: tuple[PreTrainedModel, PreTrainedModel]
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
    stop_ids: tuple[tuple[int, ...], tuple[int, ...]]
    aligner: Aligner | None
    text: TeacherPromptSettings

    @cached_property
    def same_tokens(self) -> bool:
        """Whether the student's ids are the same tokens for the teacher."""
        return not different_tokens(*self.tokenizers)

    @cached_property
    def sampling_ends(self) -> list[int]:
        """Ids that end a rollout: the student's, and where ids are shared the teacher's too."""
        return sorted({*self.stop_ids[0], *(self.stop_ids[1] if self.aligner is None else ())})

    @cached_property
    def _teacher_ends(self) -> tuple[int, ...]:
        assert self.aligner is not None
        alike = [i for i in self.aligner.pair.stop_ids if i in self.aligner.same_ids]
        return (*self.stop_ids[1], self.aligner.pair.end_id, *alike)

    @cached_property
    def shared(self) -> tuple[list[int], list[int]]:
        """Ids of both vocabularies that mean the same, where the teacher reads a text of its own."""
        assert self.aligner is not None
        return self.aligner.shared_vocabulary(self._teacher_ends)

    def prompts(self, rows: Sequence[PromptRow], longest: int, max_prompt_length: int | None) -> list[Prompt]:
        """The prompts as the student reads them.

        Raises:
            ValueError: as `oprd.data.prompts.prepare_prompts`.
        """
        limits = [context_length(model) for model in self.models]
        common = min((limit for limit in limits if limit is not None), default=None)
        return prepare_prompts(
            rows, self.tokenizers[0], name="prompts", max_completion_length=longest,
            context_length=common if self.aligner is None else limits[0], max_prompt_length=max_prompt_length,
            chat_template_kwargs=self.text.chat_template_kwargs,
        )  # fmt: skip

    def teacher_prompts(self, prompts: Sequence[Prompt], longest: int) -> list[Prompt]:
        """The same prompts as the teacher reads them."""
        if self.aligner is None:
            return list(prompts)
        return prepare_prompts(
            [with_system(p.row, self.aligner.system_prompt) for p in prompts], self.tokenizers[1], name="prompts",
            max_completion_length=longest, context_length=context_length(self.models[1]),
            chat_template_kwargs=self.aligner.teacher_kwargs,
        )  # fmt: skip

    def sample(self, prompts: Sequence[Prompt], longest: int, seed: int, batch_size: int = 64) -> Rollouts:
        """One completion a prompt from the student's own distribution."""
        engine = TransformersEngine(self.tokenizers[0], self.sampling_ends, batch_size)
        return engine.generate(
            self.models[0], [p.ids for p in prompts], num_generations=1, sampling=Sampling(longest), seed=seed,
            rows=[p.index for p in prompts],
        ).rollouts  # fmt: skip

    def align(
        self, rollouts: Rollouts, rows: Mapping[int, PromptRow]
    ) -> tuple[PositionPairs | None, AlignmentStats | None]:
        """The rollouts as the teacher reads them; None where it reads them as they are.

        Raises:
            ValueError: more tokens than the teacher can read.
        """
        if self.aligner is None:
            return None, None
        theirs, alignments, stats = self.aligner.align(rollouts, rows)
        limit, longest = context_length(self.models[1]), max(theirs.input_lengths)
        if limit is not None and longest > limit:
            raise ValueError(
                f"teacher: a rollout has {longest} tokens in its tokenizer, more than its context of {limit}; shorten "
                "max_completion_length or leave long prompts out with max_prompt_length"
            )
        ends = self.aligner.pair.stop_ids
        events = {i: event for event, i in enumerate(self.shared[0])}
        events |= dict.fromkeys(ends, events[ends[0]])  # whatever ended a response, it is one event
        return pair_positions(rollouts, theirs, alignments, events), stats

    def own_heads(self) -> tuple[LMHead, LMHead]:
        """Each model's LM head over its own ids, every id an event of its own.

        Raises:
            ValueError: a model without an LM head, or one that is not understood.
        """
        heads = []
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            head = lm_head_of(model)
            check_head(head, model)
            heads.append(lm_head_of(model, vocab_size=min(vocabulary_size(tokenizer), head.size)))
        return heads[0], heads[1]

    def shared_heads(self) -> tuple[LMHead, LMHead]:
        """Both over the same events: padding rows cut off, every end of text one event, of two vocabularies what they share."""
        student, teacher = self.own_heads()
        if self.aligner is None:
            size = min(student.size, teacher.size)
            return match_heads(student, teacher, vocab_size=size, stop_token_ids=tuple(self.sampling_ends))
        return share_events(
            student, teacher, self.shared, student_stop_ids=self.stop_ids[0], teacher_stop_ids=self._teacher_ends
        )


def load_pair(
    student: str, teacher: str, text: TeacherPromptSettings, *, teacher_dtype: str, trust_remote_code: bool
) -> ModelPair:
    """Load both; on a GPU where there is one.

    Raises:
        ValueError: a model or tokenizer that cannot be loaded, or tokens that cannot be aligned.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = (student, teacher)
    models = [
        load_model(name, dtype=dtype, trust_remote_code=trust_remote_code).to(device).eval().requires_grad_(False)  # type: ignore
        for name, dtype in zip(names, (torch.float32, teacher_dtype), strict=True)
    ]
    tokenizers = [load_tokenizer(name, trust_remote_code=trust_remote_code) for name in names]
    stops = [tuple(stop_token_ids(*side)) for side in zip(models, tokenizers, strict=True)]
    aligner = text.aligner(tokenizers[0], tokenizers[1], stops[0], stops[1])
    return ModelPair(names, (models[0], models[1]), (tokenizers[0], tokenizers[1]), (stops[0], stops[1]), aligner, text)
