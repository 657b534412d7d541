"""A student and its teacher: which of their tokens, positions and LM heads are compared when both read the same rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.alignment.aligner import Aligner, AlignmentStats
from oprd.alignment.position_pairs import InsideTokens, PositionPairs, TeacherReading, pair_positions, request_pair
from oprd.alignment.privileged import quotes
from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.compact import OnAccess
from oprd.data.prompts import Prompt, prepare_prompts
from oprd.data.rows import TEACHER_ID, PromptRow
from oprd.models.lm_head import Heads, LMHead, check_head, lm_head_of, match_heads, share_events
from oprd.models.loading import LoadedModel, ModelInfo
from oprd.models.tokens import check_token_ids, turn_end_ids, vocabulary_size
from oprd.states.positions import EndOfTurn, Positions, select_before_end, select_positions
from oprd.states.requests import StateRequest
from oprd.states.several import HoldsTeachers, SeveralTeachers, asked_by_id, teachers_of
from oprd.states.teacher_settings import naming_teacher
from oprd.states.teachers import CanSample, FrozenTeacher, ProjectsStudent, Teacher, has_head
from oprd.types import Rollouts


@dataclass(frozen=True)
class ComparedPositions:
    """Settings: the response positions at which the two models are compared.

    Args:
        positions: position set of the hidden states (`oprd.states.positions.POSITIONS`).
        position_k: k of last_k and first_k.
        output_positions: position set of the next-token distributions.
        output_position_k: k of last_k and first_k for these.
        end_of_turn: how ids that end a text are treated (`OPRDConfig.end_of_turn`).
        inside_tokens: what is matched inside a token of a teacher with its own tokens (`OPRDConfig.inside_tokens`).
    """

    positions: str = "all"
    position_k: int | None = None
    output_positions: str = "all"
    output_position_k: int | None = None
    end_of_turn: EndOfTurn = "merge"
    inside_tokens: InsideTokens = "skip"


@dataclass(frozen=True)
class SharedVocabulary:
    """The tokens that two vocabularies have in common, for a teacher that reads its own tokens.

    Args:
        ids: ids of the student and of the teacher with the same meaning, two lists of equal length.
        event_of: student id → index in these lists; all ids that end a response have the index of the first.
        teacher_stop_ids: ids that end a response for the teacher.
    """

    ids: tuple[list[int], list[int]]
    event_of: Mapping[int, int]
    teacher_stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, aligner: Aligner, teacher_stop_ids: Sequence[int]) -> SharedVocabulary:
        """The shared vocabulary of an aligner's two tokenizers."""
        stops = aligner.pair.stop_ids
        # Where an id means the same for both models, it ends a response for both.
        same = [i for i in stops if i in aligner.same_ids]
        theirs = (*teacher_stop_ids, aligner.pair.end_id, *same)
        ids = aligner.shared_vocabulary(theirs)
        events = {i: event for event, i in enumerate(ids[0])}
        return cls(ids, events | dict.fromkeys(stops, events[stops[0]]), theirs)


class ModelPair:
    """A student and its teacher, and how both read the same rollouts.

    Args:
        student: the student; its tokenizer must be known.
        teacher: the teacher.
        aligner: gives the teacher its own prompts and tokens; None where it reads the student's. Of several teachers: teacher_id →
            aligner, of those that read their own.
        teacher_tokenizer: the teacher's tokenizer; None when unknown. Of several teachers: teacher_id → tokenizer.
        layers: student layers whose states are compared; empty where the two models' states cannot be compared.
        rendering: how both models' prompts are rendered.
        compared: the positions at which the two are compared.
        head_dtype: dtype of products with the LM heads; None for that of the weights.
        attention: layers whose attention rows are compared, ascending.
    """

    def __init__(
        self,
        student: LoadedModel,
        teacher: Teacher,
        aligner: Aligner | Mapping[Any, Aligner] | None = None,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | Mapping[Any, PreTrainedTokenizerBase | None] | None = None,
        layers: Sequence[int] = (),
        rendering: TeacherPromptSettings | None = None,
        compared: ComparedPositions | None = None,
        head_dtype: torch.dtype | None = None,
        attention: Sequence[int] = (),
    ) -> None:
        assert student.tokenizer is not None, "a student always has a tokenizer"
        self.student, self.teacher, self.layers = student, teacher, tuple(layers)
        self.aligners: Mapping[str | None, Aligner] = keyed_by_teacher(aligner)
        self.tokenizer: PreTrainedTokenizerBase = student.tokenizer
        self.teacher_tokenizers: Mapping[str | None, PreTrainedTokenizerBase | None] = keyed_by_teacher(
            teacher_tokenizer
        )
        self._shared_vocabularies: dict[str | None, SharedVocabulary] = {}
        self.rendering = rendering or TeacherPromptSettings()
        self.compared = compared or ComparedPositions()
        self.head_dtype, self.attention = head_dtype, tuple(attention)

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher, for code that reads the weights of both.

        Raises:
            ValueError: the teacher is not a model in this process.
        """
        if not isinstance(self.teacher, FrozenTeacher):
            raise ValueError(f"teacher_model: {type(self.teacher).__name__} is not a model that is loaded here")
        return self.student.model, self.teacher.model

    @property
    def aligner(self) -> Aligner | None:
        """The aligner of an only teacher."""
        assert not isinstance(self.teacher, SeveralTeachers), "each of several teachers has its own"
        return self.aligners.get(None)

    @property
    def teacher_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of an only teacher."""
        assert not isinstance(self.teacher, SeveralTeachers), "each of several teachers has its own"
        return self.teacher_tokenizers.get(None)

    @property
    def projects(self) -> bool:
        """Whether a bridge projects the student's states for some teacher."""
        return any(isinstance(teacher, ProjectsStudent) for teacher in teachers_of(self.teacher))

    def project_student(self, layer: int, states_ND: Tensor, teacher_id: str | None = None) -> Tensor:
        """The student's states `[N, D]` of a layer in the space of the teacher's: `[N, r]` through a bridge, else as they are.

        Args:
            layer: the student's.
            states_ND: its states.
            teacher_id: the teacher that they are compared with, where there are several.
        """
        reader = self._reader(teacher_id)
        return reader.project_student(layer, states_ND) if isinstance(reader, ProjectsStudent) else states_ND

    @property
    def has_teacher_head(self) -> bool:
        """Whether next-token distributions of every teacher can be computed here."""
        return all(has_head(teacher) for teacher in teachers_of(self.teacher))

    def readings(
        self, rollouts: Rollouts, rows: Mapping[int, PromptRow]
    ) -> tuple[dict[str | None, TeacherReading], AlignmentStats | None]:
        """What each teacher reads of the student's rollouts, with counts of all that read their own tokens; None if none does.

        Args:
            rollouts: the student's.
            rows: the dataset rows that `rollouts.rows` points into.

        Raises:
            ValueError: as `align`.
        """
        places: Mapping[Any, Sequence[int]] = {None: range(len(rollouts))}
        if isinstance(self.teacher, SeveralTeachers):
            places = self.teacher.readers([str(rows[row].columns.get(TEACHER_ID)) for row in rollouts.rows])
        found: dict[str | None, TeacherReading] = {}
        counted: list[AlignmentStats] = []
        for teacher_id, own in places.items():
            with naming_teacher(teacher_id):
                pairs, stats = self.align(rollouts.select(own), rows, teacher_id=teacher_id)
            found[teacher_id] = TeacherReading(own, pairs)
            counted += [] if stats is None else [stats]
        return found, sum(counted, start=AlignmentStats()) if counted else None

    def teacher_ids(self, prompts: Sequence[Prompt]) -> list[str] | None:
        """The teacher_id of each prompt; None where one teacher, or all of them, read every prompt."""
        if not isinstance(self.teacher, SeveralTeachers) or self.teacher.per_prompt == "all":
            return None
        return [str(prompt.row.columns[TEACHER_ID]) for prompt in prompts]

    def quotes(self, rollouts: Rollouts, rows: Mapping[int, PromptRow]) -> list[bool] | None:
        """Whether each rollout quotes what only the teacher was shown; None without a `teacher_prompt`."""
        first = next(iter(self.aligners.values()), None)
        if first is None or first.teacher_prompt is None:  # which is the same for all teachers
            return None
        found = []
        for row, text in zip(rollouts.rows, rollouts.texts, strict=True):
            aligner = self.aligners.get(str(rows[row].columns.get(TEACHER_ID)), first)
            found += quotes([text], aligner.teacher_row(rows[row]).prompt, rows[row].prompt)
        return found

    @property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
        """Tokenizers of student and teacher.

        Raises:
            ValueError: the teacher's is unknown.
        """
        if self.teacher_tokenizer is None:
            raise ValueError("teacher_processing_class: the teacher's tokenizer is needed here, and is not known")
        return self.tokenizer, self.teacher_tokenizer

    @property
    def infos(self) -> tuple[ModelInfo, ModelInfo]:
        """Facts of student and teacher."""
        return self.student.info, self.teacher.info

    def shared_vocabulary(self, teacher_id: str | None = None) -> SharedVocabulary:
        """The tokens that the student shares with a teacher which reads its own tokens."""
        if teacher_id not in self._shared_vocabularies:
            stops = self._reader(teacher_id).info.stop_token_ids
            self._shared_vocabularies[teacher_id] = SharedVocabulary.of(self.aligners[teacher_id], stops)
        return self._shared_vocabularies[teacher_id]

    @cached_property
    def infos_of_same_tokens(self) -> dict[str | None, ModelInfo]:
        """teacher_id → facts of the teachers that read the student's tokens."""
        asked = asked_by_id(self.teacher).items()
        return {teacher_id: one.info for teacher_id, one in asked if teacher_id not in self.aligners}

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end a rollout: the student's, and those of teachers that read the same ids, if end tokens are merged."""
        return sorted({*self.student.info.stop_token_ids, *self.teacher_stop_ids})

    @cached_property
    def teacher_stop_ids(self) -> list[int]:
        """Ids that end a rollout although only a teacher names them as an end; they are in `stop_token_ids`."""
        merged = self.infos_of_same_tokens if self.compared.end_of_turn != "by_id" else {}
        theirs = {i for info in merged.values() for i in info.stop_token_ids}
        return sorted(theirs - {*self.student.info.stop_token_ids})

    @cached_property
    def other_ends(self) -> dict[str | None, list[int]]:
        """teacher_id → its end ids, of teachers that read the student's tokens and do not end what they write as rollouts end."""
        if self.compared.end_of_turn != "by_id":
            return {}
        ends = {teacher_id: sorted({*info.stop_token_ids}) for teacher_id, info in self.infos_of_same_tokens.items()}
        return {teacher_id: own for teacher_id, own in ends.items() if own and own != self.stop_token_ids}

    @cached_property
    def template_kwargs(self) -> Mapping[str, Any] | None:
        """Arguments of the student's chat template."""
        return self.rendering.student_kwargs(self.tokenizer)

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """The token that the student's chat template writes after an assistant's turn; empty if it writes none."""
        return turn_end_ids(self.tokenizer, self.template_kwargs)

    @cached_property
    def off_template_stop_ids(self) -> list[int]:
        """Ids that end a rollout although the student's chat template ends a turn with another; empty if that is unknown."""
        return sorted({*self.stop_token_ids} - {*self.turn_end_ids}) if self.turn_end_ids else []

    @property
    def pad_token_id(self) -> int:
        """A token id that all models have. Padded positions are masked."""
        if self.aligners:
            return 0
        own = self.tokenizer.pad_token_id
        return own if own is not None else self.stop_token_ids[0]

    @property
    def context_length(self) -> int | None:
        """Maximum tokens of a prompt with its completion, in the student's tokens; None if unknown."""
        infos = (self.student.info, *self.infos_of_same_tokens.values())
        return min((info.context_length for info in infos if info.context_length is not None), default=None)

    def prompts(
        self, rows: Sequence[PromptRow], *, name: str, max_completion_length: int, max_prompt_length: int | None = None
    ) -> Sequence[Prompt]:
        """The prompts as the student reads them.

        Raises:
            ValueError: as `oprd.data.prompts.prepare_prompts`, or a token id that a model which reads it has no embedding for.
        """
        prompts = prepare_prompts(
            rows, self.tokenizer, name=name, max_completion_length=max_completion_length,
            context_length=self.context_length, max_prompt_length=max_prompt_length,
            chat_template_kwargs=self.template_kwargs,
            split_special_tokens=self.rendering.split_special_tokens,
        )  # fmt: skip
        check_token_ids(prompts, self.tokenizer, self.student.info.embedding_rows, "student")
        for teacher_id, info in self.infos_of_same_tokens.items():
            with naming_teacher(teacher_id):
                check_token_ids(prompts, self.tokenizer, info.embedding_rows, "teacher")
        return prompts

    def teacher_prompts(
        self, prompts: Sequence[Prompt], *, name: str, max_completion_length: int, teacher_id: str | None = None
    ) -> Sequence[Prompt]:
        """The same prompts as the teacher reads them.

        Args:
            prompts: as the student reads them.
            name: of the dataset, for messages.
            max_completion_length: most tokens of a completion.
            teacher_id: the teacher, where there are several.

        Raises:
            ValueError: a prompt that its template cannot render, or that leaves no room for a completion; names the row.
        """
        aligner = self.aligners.get(teacher_id)
        if aligner is None:
            return prompts
        info = self._reader(teacher_id).info
        try:
            theirs = prepare_prompts(
                OnAccess(lambda i: aligner.teacher_row(prompts[i].row), range(len(prompts))),
                aligner.teacher_tokenizer,
                name=f"the teacher's {name}",
                max_completion_length=max_completion_length,
                context_length=info.context_length,
                chat_template_kwargs=aligner.teacher_kwargs,
                split_special_tokens=self.rendering.split_special_tokens,
            )
            check_token_ids(theirs, aligner.teacher_tokenizer, info.embedding_rows, "teacher")
            return theirs
        except ValueError as error:
            raise ValueError(f"the teacher's prompts: {error}") from error

    def align(
        self, rollouts: Rollouts, rows: Mapping[int, PromptRow], *, heads: bool = True, teacher_id: str | None = None
    ) -> tuple[PositionPairs | None, AlignmentStats | None]:
        """The rollouts as the teacher reads them, with counts; None if it reads the student's tokens.

        Args:
            rollouts: the student's.
            rows: the dataset rows that `rollouts.rows` points into.
            heads: also pair positions whose next-token distributions are compared.
            teacher_id: the teacher, where there are several.

        Raises:
            ValueError: a prompt that the teacher's template cannot render, or more tokens than the teacher can read.
        """
        aligner = self.aligners.get(teacher_id)
        if aligner is None:
            return None, None
        theirs, alignments, stats = aligner.align(rollouts, rows)
        limit, longest = self._reader(teacher_id).info.context_length, max(theirs.input_lengths, default=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"teacher_model: a rollout has {longest} tokens in its tokenizer, more than its context of {limit}; shorten "
                "max_completion_length, or leave long prompts out with max_prompt_length"
            )
        event_of = self.shared_vocabulary(teacher_id).event_of if heads else {}
        where = self.compared
        pairs = pair_positions(
            rollouts, theirs, alignments, event_of, positions=where.positions, position_k=where.position_k,
            inside_tokens=where.inside_tokens,
        )  # fmt: skip
        return pairs, stats

    def requests(
        self,
        rollouts: Rollouts,
        pairs: PositionPairs | None,
        *,
        layers: bool,
        head: bool,
        device: torch.device | str = "cpu",
        teacher_id: str | None = None,
    ) -> tuple[StateRequest, StateRequest]:
        """The requests for student and teacher: what to read of each.

        Args:
            rollouts: the student's.
            pairs: pairs of positions, where the teacher reads its own tokens.
            layers: request the states of the compared layers.
            head: request the states that the LM heads read.
            device: where the models compute.
            teacher_id: the teacher that reads them, where there are several.
        """
        student, teacher = request_pair(
            rollouts,
            pairs,
            self.layers if layers else (),
            chosen=self._matched(rollouts),
            compared=self._compared(rollouts),
            pad_token_id=self.pad_token_id,
            head=head,
        )
        if not self.has_teacher_head:
            teacher = replace(teacher, head=None)
        if teacher_id is not None:
            teacher = replace(teacher, teacher=teacher_id)
        if layers and self.attention:
            student, teacher = (replace(one, attention=self.attention) for one in (student, teacher))
        return student.to(device), teacher.to(device)

    def count(self, rollouts: Rollouts, readings: Mapping[Any, TeacherReading]) -> list[int]:
        """Numbers of rollouts, positions with matched states, response tokens, positions with compared distributions.

        A rollout counts once for each teacher that reads it, so that a mean over rollouts is also one over their teachers.

        Args:
            rollouts: of a batch.
            readings: teacher_id → what it reads of them.
        """
        counts = [self._count(rollouts.select(reading.places), reading.pairs) for reading in readings.values()]
        return [sum(column) for column in zip(*counts, strict=True)]

    def _count(self, rollouts: Rollouts, pairs: PositionPairs | None) -> list[int]:
        lengths = rollouts.completion_lengths
        if pairs is not None:
            return [len(lengths), pairs.num_matched, sum(lengths), pairs.num_compared]
        matched, compared = self._matched(rollouts), self._compared(rollouts)
        compared_tokens = sum(lengths) if compared is None else sum(map(len, compared))
        return [len(lengths), sum(map(len, matched)), sum(lengths), compared_tokens]

    def heads(self, teacher_id: str | None = None, *, in_place: bool = False) -> Heads:
        """Both LM heads over the same events: no padding rows, one event for all end tokens, only tokens that both models have.

        For a teacher without a head (`HasHead`) the student's takes its place; terms of such a run read `policy` alone.

        Args:
            teacher_id: the teacher whose head is compared, where there are several.
            in_place: let the student's head add its gradient to the weight's (`LMHead.in_place`).
        """
        student = replace(lm_head_of(self.student.model), in_place=in_place, product_dtype=self.head_dtype)
        stops, vocabulary = tuple(self.stop_token_ids), vocabulary_size(self.tokenizer)
        reader = self._reader(teacher_id)
        teacher = reader.head() if has_head(reader) else student
        if teacher_id not in self.aligners:
            size = min(vocabulary, student.size, teacher.size)
            ends = () if self.compared.end_of_turn == "by_id" else stops
            student, teacher = match_heads(student, teacher, vocab_size=size, stop_token_ids=ends)
            return Heads(student, student, teacher)
        policy, _ = match_heads(student, student, vocab_size=min(vocabulary, student.size), stop_token_ids=stops)
        if not has_head(reader):
            return Heads(policy, policy, policy)
        shared = self.shared_vocabulary(teacher_id)
        both = share_events(
            student, teacher, shared.ids, student_stop_ids=stops, teacher_stop_ids=shared.teacher_stop_ids
        )
        return Heads(policy, *both)

    @torch.no_grad()
    def check_heads(self) -> None:
        """Check that both LM heads give their models' logits.

        Raises:
            ValueError: a model without an LM head, or with one whose logits are computed in an unknown way.
        """
        ids: list[Any] = [*self.teacher.teachers] if isinstance(self.teacher, HoldsTeachers) else [None]
        for teacher_id in ids:
            if isinstance(self.teacher, SeveralTeachers):
                self.teacher.ready(teacher_id, next(self.student.model.parameters()).device)
            heads, reader = self.heads(teacher_id), self._reader(teacher_id)
            _check_whole(heads.student, self.student.model)
            if has_head(reader) and isinstance(reader, CanSample):
                with reader.sampler() as model:
                    _check_whole(heads.teacher, model)

    def _reader(self, teacher_id: str | None) -> Teacher:
        if teacher_id is None or not isinstance(self.teacher, HoldsTeachers):
            return self.teacher
        return self.teacher.teachers[teacher_id]

    def _matched(self, rollouts: Rollouts) -> Positions:
        """Positions of each rollout whose states are matched, if both models read the same ids."""
        return self._select(rollouts, self.compared.positions, self.compared.position_k)

    def _compared(self, rollouts: Rollouts) -> Positions | None:
        """Positions of each rollout whose next-token distributions are compared; None: all."""
        if self.compared.output_positions == "all" and self.compared.end_of_turn != "skip":
            return None
        return self._select(rollouts, self.compared.output_positions, self.compared.output_position_k)

    def _select(self, rollouts: Rollouts, positions: str, k: int | None) -> Positions:
        if self.compared.end_of_turn != "skip":
            return [select_positions(n, positions, k) for n in rollouts.completion_lengths]
        lengths = zip(rollouts.completion_lengths, rollouts.finish_reasons, strict=True)
        return [select_before_end(n, reason == "stop", positions, k) for n, reason in lengths]


def keyed_by_teacher(value: Any) -> dict[Any, Any]:
    """`value` by teacher_id. A value for an only teacher gets the id None; None gives an empty map."""
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else {None: value}


def _check_whole(head: LMHead, model: nn.Module) -> None:
    """Check a head over all rows of its weight: no merged end tokens, and padding rows included."""
    check_head(LMHead(head.weight, head.bias, head.softcap, head.scale), model)
