"""The teacher's responses as rollouts of the student (`lmbda` below 1), also of a teacher with its own prompts and tokens.

Such a teacher answers its own prompt in its own tokens. Its response is decoded to bytes and tokenised again for the student, which
reads its own prompt; `oprd.alignment` then pairs the positions as it does for the student's own rollouts.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from oprd.alignment.aligner import Aligner
from oprd.alignment.boundaries import Alignment, align_completion
from oprd.alignment.model_pair import ModelPair
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.rollouts.engine import RolloutEngine, Sampling, to_rollouts
from oprd.rollouts.engines import make_engine
from oprd.sanitize import printable
from oprd.states.several import SeveralTeachers
from oprd.states.teacher_settings import naming_teacher
from oprd.states.teachers import CanSample, Teacher
from oprd.types import FinishReason, Rollouts

_LOST = {
    "special_token": "a special token that the student lacks",
    "unknown_to_teacher": "text that the student's tokenizer cannot write",
    "invalid_utf8": "bytes that are no text",
}
_WHY = {**_LOST, "cut_character": "a part of a character, and no more, before the length limit"}


@dataclass(frozen=True)
class RewriteCounts:
    """What happened to the teacher's responses on their way into the student's tokens.

    Args:
        responses: number that the teacher wrote.
        cut: number shortened to `max_completion_length` student tokens.
        incomplete: number kept only up to the first part that the student's tokens cannot write.
        left_out: number dropped because nothing precedes that part.
        reasons: why they are incomplete or left out → number of responses.
        example: the beginning of the first of these.
    """

    responses: int
    cut: int
    incomplete: int
    left_out: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    example: str = ""

    def __add__(self, other: RewriteCounts) -> RewriteCounts:
        """The counts of both."""
        return RewriteCounts(
            self.responses + other.responses, self.cut + other.cut, self.incomplete + other.incomplete,
            self.left_out + other.left_out, dict(Counter(self.reasons) + Counter(other.reasons)), self.example or other.example,
        )  # fmt: skip

    def shares(self) -> dict[str, float]:
        """Metrics, as shares of the responses."""
        counts = {"cut": self.cut, "incomplete": self.incomplete, "left_out": self.left_out}
        return {f"teacher_text/{name}": count / self.responses for name, count in counts.items()}

    def warning(self) -> str:
        """One sentence about what is lost; empty if nothing is."""
        if not self.reasons:
            return ""
        why = ", ".join(f"{_WHY[reason]} ({count})" for reason, count in sorted(self.reasons.items()))
        return (
            f"of {self.responses} responses of the teacher, {self.incomplete} are kept only up to what the student's tokens cannot "
            f"write and {self.left_out} are left out: {why}; the first begins {self.example!r}"
        )


@dataclass(frozen=True)
class Written:
    """The teacher's responses to a batch of prompts.

    Args:
        rollouts: with the student's prompts, in the student's tokens.
        places: place of each among all responses, prompt after prompt; none is missing unless responses are left out.
        counts: None where all teachers read the student's prompts and tokens.
    """

    rollouts: Rollouts
    places: Sequence[int]
    counts: RewriteCounts | None = None


class TeacherWriter:
    """Samples responses from the teacher; of several, from the one that each prompt's row names.

    Args:
        pair: student and teacher.
        engine: the student's; samples from a teacher that reads the student's prompts and tokens, and ends as the student does.
        rollout_engine: name of the engine for another teacher.
        **engine_kwargs: its arguments.
    """

    def __init__(self, pair: ModelPair, engine: RolloutEngine, rollout_engine: str, **engine_kwargs: Any) -> None:
        self.pair, self.engine = pair, engine
        self._rewriters: dict[str | None, Rewriter] = {}
        self._engines: dict[str | None, RolloutEngine] = {}  # of teachers with tokens or ends of their own
        for teacher_id, stops in pair.other_ends.items():
            self._engines[teacher_id] = make_engine(rollout_engine, pair.tokenizer, stops, **engine_kwargs)
        for teacher_id, aligner in pair.aligners.items():
            stops = sorted({*pair.shared_vocabulary(teacher_id).teacher_stop_ids})
            self._rewriters[teacher_id] = Rewriter(aligner, stops, pair.turn_end_ids)
            self._engines[teacher_id] = make_engine(rollout_engine, aligner.teacher_tokenizer, stops, **engine_kwargs)

    def engine_of(self, teacher_id: str | None = None) -> RolloutEngine:
        """The engine that samples from a teacher: the student's, or one for the teacher's own tokens or ends."""
        return self._engines.get(teacher_id, self.engine)

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> Written:
        """The teacher's responses to `prompts`, as rollouts of the student, prompt after prompt.

        Args:
            prompts: as the student reads them.
            num_generations: responses a prompt.
            sampling: how they are drawn. `max_completion_length` holds in the tokens of both models.
            seed: of the drawing.
            device: for teachers whose weights are offloaded to host memory.

        Raises:
            ValueError: a teacher's template cannot render a prompt, or the student's tokens can write nothing of any response.
        """
        parts: list[Written] = []
        for teacher_id, teacher, places in self._writers(prompts, device):
            assert isinstance(teacher, CanSample), "checked when the run was resolved"
            rewriter, own = self._rewriters.get(teacher_id), [prompts[place] for place in places]
            with naming_teacher(teacher_id):
                ids = [p.ids if rewriter is None else rewriter.aligner.render(p.row)[0] for p in own]
            with teacher.sampler() as model:
                found = self.engine_of(teacher_id).generate(
                    model, ids,
                    num_generations=num_generations, sampling=sampling, seed=seed, rows=[p.index for p in own],
                )  # fmt: skip
            if rewriter is None:  # counted too, so that all processes have the same metrics
                counts = RewriteCounts(len(found.rollouts), 0, 0, 0) if self._rewriters else None
                part = Written(found.rollouts, range(len(found.rollouts)), counts)
            else:
                of_prompts = [prompt for prompt in own for _ in range(num_generations)]
                part = rewriter.rewrite(found.rollouts, of_prompts, sampling.max_completion_length)
            among_all = [place * num_generations + number for place in places for number in range(num_generations)]
            parts.append(replace(part, places=[among_all[place] for place in part.places]))
        return _joined(parts)

    def _writers(
        self, prompts: Sequence[Prompt], device: torch.device | str
    ) -> Iterator[tuple[str | None, Teacher, Sequence[int]]]:
        """Each teacher that writes, with its teacher_id, on its device, and the places of its prompts."""
        several = self.pair.teacher
        if not isinstance(several, SeveralTeachers):
            yield None, several, range(len(prompts))
            return
        teacher_ids = self.pair.teacher_ids(prompts)
        assert teacher_ids is not None, "where all teachers read a prompt, none may write"
        for teacher_id, places in several.readers(teacher_ids).items():
            if places:
                yield teacher_id, several.ready(teacher_id, device), places


def _joined(parts: Sequence[Written]) -> Written:
    """What several teachers wrote, in the order of the prompts.

    Raises:
        ValueError: the student's tokens can write nothing of any response.
    """
    places = [place for part in parts for place in part.places]
    counted = [part.counts for part in parts if part.counts is not None]
    counts = sum(counted[1:], start=counted[0]) if counted else None
    if counts is not None and not places:
        raise ValueError(f"lmbda: {counts.warning()}; give the teacher other prompts, or set lmbda: 1")
    order = sorted(range(len(places)), key=places.__getitem__)
    rollouts = Rollouts.concatenate([part.rollouts for part in parts]).select(order)
    return Written(rollouts, [places[i] for i in order], counts)


class Rewriter:
    """Writes the teacher's responses in the student's tokens. The bytes are the same.

    Args:
        aligner: of the two tokenizers.
        teacher_stop_ids: ids that end the teacher's turn.
        turn_end_ids: id that the student's chat template writes after an answer; by default its tokenizer's end.
    """

    def __init__(self, aligner: Aligner, teacher_stop_ids: Sequence[int], turn_end_ids: Sequence[int] = ()) -> None:
        self.aligner = aligner
        self.turn_end_ids = [i for i in turn_end_ids if i in aligner.pair.stop_ids]
        self.mirror = aligner.pair.mirrored(teacher_stop_ids)
        self.same_ids = self.mirror.same_ids() if aligner.same_ids else frozenset()

    def rewrite(self, written: Rollouts, prompts: Sequence[Prompt], limit: int) -> Written:
        """The teacher's rollouts as the student's.

        Args:
            written: in the teacher's tokens.
            prompts: of each, as the student reads them.
            limit: most tokens of a completion; a longer one ends there.
        """
        kept: dict[int, list[int]] = {}
        cut, incomplete, reasons, examples = 0, 0, Counter[str](), []
        openings: dict[int, tuple[str, str]] = {}  # of each dataset row
        for place, prompt in enumerate(prompts):
            if prompt.index not in openings:
                openings[prompt.index] = self._openings(prompt)
            response = written.completion_ids[place], written.finish_reasons[place]
            ids, reason = self._rewrite(*response, prompt.row, *openings[prompt.index])
            if reason := reason or ("" if ids else "cut_character"):
                reasons[reason] += 1
                text = self.aligner.teacher_tokenizer.decode(written.completion_ids[place])  # special tokens too
                examples.append(printable(str(text))[:80])
            if not ids:
                continue
            incomplete += bool(reason)
            cut += len(ids) > limit
            kept[place] = ids[:limit]
        left_out = len(prompts) - len(kept)
        counts = RewriteCounts(len(prompts), cut, incomplete, left_out, dict(reasons), next(iter(examples), ""))
        rollouts = to_rollouts(
            [prompts[place].ids for place in kept], [*kept.values()], [prompts[place].index for place in kept],
            self.aligner.student_tokenizer, self.aligner.pair.stop_ids,
        )  # fmt: skip
        return Written(rollouts, [*kept], counts)

    def _openings(self, prompt: Prompt) -> tuple[str, str]:
        """The whitespace before a response that is not part of it: of the teacher and of the student."""
        theirs, own_space, teacher_space = self.aligner.render(prompt.row)
        return self.mirror.student.opening(theirs, teacher_space), self.mirror.teacher.opening(prompt.ids, own_space)

    def _rewrite(
        self, completion: Sequence[int], finished: FinishReason, row: PromptRow, opening: str, own_opening: str
    ) -> tuple[list[int], str]:
        """One response in the student's ids, none if nothing of it can be written; and why a part is missing, "" if none is."""
        found = align_completion(
            self.mirror,
            self.same_ids,
            completion,
            finish_reason=finished,
            student_opening=opening,
            teacher_opening=own_opening,
        )
        ids = list(found.teacher_ids)
        if ids[-1:] == [self.mirror.end_id]:  # also where it only marks the last position of a response without an end
            ids.pop()
        if found.ended:
            ids.append(self._end(row))
        # The student writes the whitespace before a response itself.
        return [*found.teacher_opening, *ids] if ids else [], self._lost(found, completion, finished, opening)

    def _end(self, row: PromptRow) -> int:
        """The id with which the student ends a response: a turn as its chat template does, if that id ends a rollout."""
        return self.mirror.end_id if isinstance(row.prompt, str) else next(iter(self.turn_end_ids), self.mirror.end_id)

    def _lost(self, found: Alignment, completion: Sequence[int], finished: FinishReason, opening: str) -> str:
        """Why a part of the response is missing; "" if none is. A character that the length limit cuts does not count."""
        why = next((name for name in _LOST if name in found.dropped), "")
        if why or finished == "stop":
            return why or ("" if found.ended else "special_token")
        # The last token of a response without an end has no position after it, so that no count of positions shows it.
        pieces, mapped = self.mirror.student.pieces, self.mirror.special_map
        if any(i not in pieces and i not in mapped and i not in self.same_ids for i in completion):
            return "special_token"
        text = b"".join(b"\xff" if i in mapped else pieces.get(i, b"") for i in completion)
        rest = text.removeprefix(opening.encode())[len(found.content) :].replace(b"\xff", b"")
        try:
            unwritten = getincrementaldecoder("utf-8")().decode(rest)  # takes a part of a character at the end
        except UnicodeDecodeError:
            return "invalid_utf8"
        return "unknown_to_teacher" if unwritten else ""
