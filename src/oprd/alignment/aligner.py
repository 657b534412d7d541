"""Rewrite the student's rollouts for a teacher with another tokenizer or template, and pair the positions (OPRD section 4).

The teacher's chat template renders the prompt, and its tokenizer splits the text of the student's response. Student ids are never
passed to a teacher with another vocabulary. `oprd.alignment.boundaries` pairs positions that have read the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from oprd.alignment.boundaries import Alignment, DropReason, TokenizerPair, align_completion
from oprd.alignment.privileged import privileged_row
from oprd.alignment.token_bytes import TokenBytes
from oprd.data.chat_template import answer_opening
from oprd.data.prompts import PromptRenderer
from oprd.data.rows import PromptRow
from oprd.types import FinishReason, Rollouts


@dataclass(frozen=True)
class AlignmentStats:
    """Alignment counts over rollouts. The metric is `share`, the share of student positions with a partner.

    Args:
        positions: number of student response positions.
        paired: number of student positions with a partner.
        one_to_one: number of pairs whose next tokens have equal bytes.
        teacher_positions: number of teacher response positions.
        dropped: number of student positions without a partner, by reason.
    """

    positions: int = 0
    paired: int = 0
    one_to_one: int = 0
    teacher_positions: int = 0
    dropped: Mapping[DropReason, int] = field(default_factory=dict)

    @classmethod
    def of(cls, alignments: Iterable[Alignment]) -> AlignmentStats:
        """Sum the counts of `alignments`."""
        items = list(alignments)
        dropped: Counter[DropReason] = Counter()
        for item in items:
            dropped.update(item.dropped)
        paired = sum(len(item.student_positions) for item in items)
        return cls(
            positions=paired + dropped.total(),
            paired=paired,
            one_to_one=sum(sum(item.one_to_one) for item in items),
            teacher_positions=sum(len(item.teacher_ids) for item in items),
            dropped=dict(dropped),
        )

    def __add__(self, other: AlignmentStats) -> AlignmentStats:
        """The counts of both."""
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "dropped"}
        return AlignmentStats(**counts, dropped=dict(Counter(self.dropped) + Counter(other.dropped)))

    def counts(self) -> dict[str, float]:
        """Counts for the log, which sums them over batches. Every reason has a key, because ranks sum the values by index."""
        dropped = {f"alignment/{reason}": float(self.dropped.get(reason, 0)) for reason in get_args(DropReason)}
        return {
            "alignment/positions": self.positions, "alignment/paired": self.paired, "alignment/one_to_one": self.one_to_one,
            **dropped,
        }  # fmt: skip

    @property
    def share(self) -> float:
        """Share of the student's positions with a partner; 0 without positions."""
        return self.paired / self.positions if self.positions else 0.0


def with_system(row: PromptRow, system_prompt: str | None) -> PromptRow:
    """The row with `system_prompt` in place of its own; unchanged if `system_prompt` is None.

    Raises:
        ValueError: a system prompt is given for a plain-text prompt.
    """
    if system_prompt is None:
        return row
    if isinstance(row.prompt, str):
        raise ValueError(
            f"{row.source}: teacher_system_prompt is {system_prompt[:40]!r}, but the prompt is plain text, which has no system "
            "message; give the prompt as messages or leave teacher_system_prompt out"
        )
    rest = [message for message in row.prompt if message["role"] != "system"]
    return replace(row, prompt=[{"role": "system", "content": system_prompt}, *rest])


def template_space(
    row: PromptRow, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """The whitespace that a chat template inserts between generation prompt and answer ("[/INST]" and " Yes"); often none."""
    space = answer_opening(tokenizer, row, chat_template_kwargs) or ""
    return space if space.isspace() else ""


class Aligner:
    """Converts the student's rollouts to the teacher's tokens. Build it once per pair of tokenizers and use it at every step.

    Args:
        student_tokenizer: the tokenizer that the rollouts were sampled with.
        teacher_tokenizer: the teacher's tokenizer.
        student_stop_ids: ids that end the student's turn (`oprd.models.tokens.stop_token_ids`); None: the tokenizer's EOS.
        teacher_end_id: id that ends the teacher's turn; None: its tokenizer's EOS.
        special_map: student id → teacher id of other special tokens with the same meaning.
        chat_template_kwargs: arguments of the student's chat template.
        teacher_chat_template_kwargs: arguments of the teacher's chat template.
        teacher_system_prompt: system prompt for the teacher; None keeps the row's.
        teacher_prompt: template of what the teacher reads in place of the prompt (`oprd.alignment.privileged`).
        split_special_tokens: tokenise control tokens in a plain prompt as ordinary text.

    Raises:
        ValueError: the bytes of a tokenizer's tokens cannot be determined, or the teacher lacks an end or mapped id.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        student_stop_ids: Collection[int] | None = None,
        teacher_end_id: int | None = None,
        special_map: Mapping[int, int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_chat_template_kwargs: Mapping[str, Any] | None = None,
        teacher_system_prompt: str | None = None,
        teacher_prompt: str | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        teacher = TokenBytes.of(teacher_tokenizer, "teacher's tokenizer")
        usual = student_tokenizer.eos_token_id
        stops = student_stop_ids if student_stop_ids is not None else [i for i in [usual] if i is not None]
        end = teacher_end_id if teacher_end_id is not None else teacher_tokenizer.eos_token_id
        for what, i in [("teacher_end_id", end), *(("special_map", i) for i in (special_map or {}).values())]:
            if i not in teacher.pieces and i not in teacher.control:
                raise ValueError(
                    f"{what}: {i} is not an id of the teacher's tokenizer; give the id of one of its tokens"
                )
        self.pair = TokenizerPair(
            student=TokenBytes.of(student_tokenizer, "student's tokenizer"),
            teacher=teacher,
            stop_ids=tuple(sorted(stops, key=lambda i: (i != usual, i))),
            end_id=end,
            special_map=dict(special_map or {}),
        )
        self.same_ids = self.pair.same_ids()
        self.student_kwargs, self.teacher_kwargs = chat_template_kwargs, teacher_chat_template_kwargs
        self.system_prompt, self.teacher_prompt = teacher_system_prompt, teacher_prompt
        self.teacher_renderer = PromptRenderer(teacher_tokenizer, teacher_chat_template_kwargs, split_special_tokens)

    def align(
        self, rollouts: Rollouts, rows: Sequence[PromptRow] | Mapping[int, PromptRow]
    ) -> tuple[Rollouts, list[Alignment], AlignmentStats]:
        """Convert `rollouts` to the teacher's prompts and ids. Returns them with one alignment per rollout and the counts.

        Args:
            rollouts: the student's rollouts.
            rows: the dataset rows that `rollouts.rows` refers to.

        Raises:
            ValueError: the teacher's template cannot render a prompt; the message names the row.
        """
        rendered: dict[int, tuple[list[int], str, str]] = {}
        prompts, alignments = [], []
        for index, number in enumerate(rollouts.rows):
            if number not in rendered:
                rendered[number] = self.render(rows[number])
            prompt, student_space, teacher_space = rendered[number]
            alignment = align_completion(
                self.pair,
                self.same_ids,
                rollouts.completion_ids[index],
                finish_reason=rollouts.finish_reasons[index],
                student_opening=self.pair.student.opening(rollouts.prompt_ids[index], student_space),
                teacher_opening=self.pair.teacher.opening(prompt, teacher_space),
            )
            prompts.append([*prompt, *alignment.teacher_opening])
            alignments.append(alignment)
        reasons: list[FinishReason] = ["stop" if a.ended else "length" for a in alignments]
        texts = [a.content.replace(b"\xff", b"").decode(errors="replace") for a in alignments]
        completions = [list(a.teacher_ids) for a in alignments]
        teacher_rollouts = Rollouts(prompts, completions, reasons, texts, list(rollouts.rows))
        return teacher_rollouts, alignments, AlignmentStats.of(alignments)

    def teacher_row(self, row: PromptRow) -> PromptRow:
        """The row as the teacher reads it, before its template renders it.

        Raises:
            ValueError: a column of `teacher_prompt` that the row lacks, or a system prompt for plain text.
        """
        return with_system(privileged_row(row, self.teacher_prompt), self.system_prompt)

    def shared_vocabulary(self, teacher_stop_ids: Collection[int] = ()) -> tuple[list[int], list[int]]:
        """Pairs of ids with the same meaning, as two lists of equal length, ascending by the student's id.

        Pairs are tokens with equal bytes, special tokens in `special_map`, and the student's usual end of turn with the teacher's.
        If several ids of a side have the same bytes, the one that its tokenizer writes is used (a letter, not its byte token). Ids
        in `same_ids`, special tokens included, pair with themselves. The student's other stop ids also end the turn: add their
        probability to the end of turn before comparing.

        Args:
            teacher_stop_ids: further ids that end the teacher's turn; they are not paired with text.
        """
        theirs = _ids_by_bytes(self.pair.teacher)
        shared = {ours: theirs[piece] for piece, ours in _ids_by_bytes(self.pair.student).items() if piece in theirs}
        shared = {ours: i for ours, i in shared.items() if i not in self.same_ids} | {i: i for i in self.same_ids}
        meant = {**self.pair.special_map, **dict.fromkeys(self.pair.stop_ids[:1], self.pair.end_id)}
        taken = {*meant.values(), *teacher_stop_ids}
        shared = {ours: i for ours, i in shared.items() if ours not in self.pair.stop_ids and i not in taken} | meant
        return sorted(shared), [shared[i] for i in sorted(shared)]

    def render(self, row: PromptRow) -> tuple[list[int], str, str]:
        """The teacher's prompt, and the whitespace that the student's and the teacher's template insert before a response.

        Raises:
            ValueError: the teacher's template cannot render the prompt; the message names the row.
        """
        theirs = self.teacher_row(row)
        return (
            self.teacher_renderer.render(theirs),
            template_space(row, self.student_tokenizer, self.student_kwargs),
            template_space(theirs, self.teacher_tokenizer, self.teacher_kwargs),
        )


def _ids_by_bytes(table: TokenBytes) -> dict[bytes, int]:
    ids: dict[bytes, int] = {}
    for i in sorted(table.pieces):
        piece = table.pieces[i]
        if piece not in ids or table.encode(piece.decode(errors="replace")) == [i]:
            ids[piece] = i
    return ids
