"""How prompts of student and teacher are rendered, and whether the teacher needs its own prompts and tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner
from oprd.alignment.privileged import fields_of
from oprd.data.chat_template import check_template_kwargs, parse_date, with_date
from oprd.models.tokens import check_same_tokens, different_tokens
from oprd.states.teacher_settings import PROMPT_KEYS, describes_model

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class TeacherPromptSettings:
    """Settings that render the prompts of student and teacher. Each in `OF_TEACHER` gives the teacher its own prompts.

    Args:
        chat_template_kwargs: arguments of the student's chat template.
        teacher_chat_template_kwargs: arguments of the teacher's chat template; {} for the template as it is.
        teacher_system_prompt: system prompt of the teacher alone, in place of the row's.
        teacher_prompt: what the teacher reads in place of the prompt (`oprd.alignment.privileged`).
        special_token_map: special token of the student → the teacher's with the same meaning; end tokens need no entry.
        split_special_tokens: tokenise control tokens in a plain prompt as ordinary text; False where prompts are rendered
            already.
        chat_template_date: what templates print as today's date, in ISO format; None: the clock's.

    Raises:
        ValueError: arguments that oprd sets itself, a date in another format, or a teacher_prompt that is no template.
    """

    OF_TEACHER: ClassVar = (
        "teacher_chat_template_kwargs", "teacher_system_prompt", "teacher_prompt", "special_token_map",
    )  # fmt: skip

    chat_template_kwargs: Mapping[str, Any] | None = None
    teacher_chat_template_kwargs: Mapping[str, Any] | None = None
    teacher_system_prompt: str | None = None
    teacher_prompt: str | None = None
    special_token_map: Mapping[str, str] | None = None
    split_special_tokens: bool = True
    chat_template_date: str | None = None

    def __post_init__(self) -> None:
        check_template_kwargs("chat_template_kwargs", self.chat_template_kwargs)
        check_template_kwargs("teacher_chat_template_kwargs", self.teacher_chat_template_kwargs)
        if self.teacher_prompt is not None:
            fields_of(self.teacher_prompt)
        if self.chat_template_date is not None:
            parse_date(self.chat_template_date)

    @classmethod
    def of(cls, settings: Any) -> TeacherPromptSettings:
        """The settings of an object with attributes of these names, such as an `OPRDConfig`."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})

    def of_one(self, entry: Any) -> TeacherPromptSettings:
        """The settings of one of several teachers: those that its entry of `teachers` has replace the run's.

        Args:
            entry: the entry; one that is no mapping, and None, replaces none.

        Raises:
            ValueError: as the class itself.
        """
        if not describes_model(entry):
            return self
        return replace(self, **{setting: entry[key] for key, setting in PROMPT_KEYS.items() if key in entry})

    @property
    def own_prompt_settings(self) -> list[str]:
        """Names of the settings that are set and give the teacher its own prompts."""
        return [name for name in self.OF_TEACHER if getattr(self, name) is not None]

    def student_kwargs(self, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any] | None:
        """Arguments of the student's chat template, with the date that it prints."""
        return with_date(tokenizer, self.chat_template_kwargs, self.chat_template_date)

    def reads_own(
        self, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase | None
    ) -> bool:
        """Whether a teacher reads prompts or tokens of its own; False where its tokenizer is unknown (None)."""
        if teacher_tokenizer is None:
            return False
        return bool(self.own_prompt_settings or different_tokens(student_tokenizer, teacher_tokenizer))

    def aligner(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        student_stop_ids: Sequence[int],
        teacher_stop_ids: Sequence[int],
    ) -> Aligner | None:
        """The aligner that turns rollouts into the teacher's tokens; None where the teacher reads the student's tokens.

        Args:
            student_tokenizer: the student's.
            teacher_tokenizer: the teacher's; None when unknown.
            student_stop_ids: ids that end the student's turn.
            teacher_stop_ids: ids that end the teacher's turn. The student's end tokens become the end token of the
                teacher's tokenizer, or the lowest of these ids if it has none.

        Raises:
            ValueError: tokens that cannot be aligned, a special token that one side does not have, or settings for a teacher whose
                tokenizer is unknown.
        """
        if teacher_tokenizer is None:
            if self.own_prompt_settings:
                raise ValueError(
                    f"{self.own_prompt_settings[0]}: it needs the teacher's tokenizer; pass teacher_processing_class"
                )
            return None
        if not self.reads_own(student_tokenizer, teacher_tokenizer):
            if student_tokenizer.chat_template != teacher_tokenizer.chat_template:
                logger.warning(
                    "the teacher has another chat template, but reads prompts rendered with the student's; "
                    "teacher_chat_template_kwargs: {} makes it use its own"
                )
            return None
        end = teacher_tokenizer.eos_token_id
        teacher_ends = {*teacher_stop_ids, *([] if end is None else [end])} or {*student_stop_ids}
        special_map = _special_ids(self.special_token_map or {}, student_tokenizer, teacher_tokenizer)
        _check_map(special_map, self.special_token_map or {}, {*student_stop_ids}, teacher_ends)
        return Aligner(
            student_tokenizer,
            teacher_tokenizer,
            student_stop_ids=student_stop_ids,
            teacher_end_id=end if end is not None else min(teacher_ends),
            special_map=special_map,
            chat_template_kwargs=self.student_kwargs(student_tokenizer),
            teacher_chat_template_kwargs=with_date(
                teacher_tokenizer, self.teacher_chat_template_kwargs, self.chat_template_date
            ),
            teacher_system_prompt=self.teacher_system_prompt,
            teacher_prompt=self.teacher_prompt,
            split_special_tokens=self.split_special_tokens,
        )


def check_shared_vocabulary(aligner: Aligner, *, compares_states: bool) -> None:
    """Refuse two vocabularies where hidden states are compared without a bridge: models of one origin share their tokens.

    Raises:
        ValueError: names the first ids that differ.
    """
    if compares_states and not aligner.same_ids:
        check_same_tokens(aligner.student_tokenizer, aligner.teacher_tokenizer)


def _special_ids(
    names: Mapping[str, str], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> dict[int, int]:
    """The map of tokens as a map of token ids."""
    known = {"student": student.get_vocab(), "teacher": teacher.get_vocab()}
    for pair in names.items():
        for side, token in zip(known, pair, strict=True):
            if token not in known[side]:
                raise ValueError(
                    f"special_token_map: {token!r} is no token of the {side}'s tokenizer; it maps the student's special tokens on "
                    "the teacher's, such as {<think>: <reasoning>}"
                )
    return {known["student"][ours]: known["teacher"][theirs] for ours, theirs in names.items()}


def _check_map(special_map: Mapping[int, int], names: Mapping[str, str], *ends: set[int]) -> None:
    """Refuse a map with an end token, or with one token of the teacher twice."""
    for (ours, theirs), (i, j) in zip(names.items(), special_map.items(), strict=True):
        for side, token, ending in (("student", ours, i in ends[0]), ("teacher", theirs, j in ends[1])):
            if ending:
                raise ValueError(
                    f"special_token_map: {token!r} is an end token of the {side}; end tokens are paired with each other and need "
                    "no entry"
                )
        if list(special_map.values()).count(j) > 1:
            raise ValueError(
                f"special_token_map: several of the student's tokens map to {theirs!r}; map only one to it"
            )
