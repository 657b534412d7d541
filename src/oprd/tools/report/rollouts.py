"""Pairs of rollouts before and after training: which pairs a report shows, and `distances.json`, where they are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from oprd.files import write_json
from oprd.runs.columns import spaced

DISTANCES = "distances.json"
FORMAT = 3


@dataclass(frozen=True)
class Side:
    """One rollout.

    Args:
        prompt: the prompt as text.
        text: the completion.
        step: the training step that logged it; None if it was sampled for the report.
        correct: its verdict or reward, None where it has none.
        finish_reason: "stop" or "length".
        length: number of tokens.
        tokens: text of each token; empty without distances.
        distances: distance between student and teacher at each token (`oprd.tools.report.distances`).
        by_layer: the same for each of `Distances.shown_layers`; empty without.
        answer: the reference answer, None where there is none.
        preferred: text of the teacher's likeliest token at each token, "" where it is the written one; empty without.
    """

    prompt: str
    text: str
    step: int | None = None
    correct: bool | float | None = None
    finish_reason: str = ""
    length: int | None = None
    tokens: tuple[str, ...] = ()
    distances: tuple[float, ...] = ()
    by_layer: tuple[tuple[float, ...], ...] = ()
    answer: str | None = None
    preferred: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.distances and len(self.distances) != len(self.tokens):
            raise ValueError(f"{len(self.distances)} distances for {len(self.tokens)} tokens")
        if any(len(line) != len(self.tokens) for line in self.by_layer):
            raise ValueError(f"a layer has a different number of distances than there are tokens ({len(self.tokens)})")
        if self.preferred and len(self.preferred) != len(self.tokens):
            raise ValueError(f"{len(self.preferred)} tokens of the teacher for {len(self.tokens)} tokens")
        if self.correct is not None and not math.isfinite(self.correct):
            raise ValueError("a reward is not finite")
        if not all(math.isfinite(d) and d >= 0 for line in (self.distances, *self.by_layer) for d in line):
            raise ValueError("a distance is negative or not finite")

    @property
    def mean_distance(self) -> float | None:
        """Mean over the tokens; None without distances."""
        return math.fsum(self.distances) / len(self.distances) if self.distances else None


@dataclass(frozen=True)
class Disagreement:
    """A token in whose place the teacher would write another one.

    Args:
        token: its number, from 1.
        before: the text before it.
        written: the student's token.
        preferred: the teacher's likeliest token there.
    """

    token: int
    before: str
    written: str
    preferred: str


def disagreements(side: Side) -> list[Disagreement]:
    """Where the teacher would write another token, in the order of the rollout."""
    return [
        Disagreement(place + 1, "".join(side.tokens[:place]), side.tokens[place], preferred)
        for place, preferred in enumerate(side.preferred)
        if preferred
    ]


@dataclass(frozen=True)
class Pair:
    """Two rollouts shown side by side: one of an earlier student, one of a later."""

    early: Side
    late: Side

    @property
    def same_prompt(self) -> bool:
        """Whether both have the same prompt."""
        return self.early.prompt == self.late.prompt


@dataclass(frozen=True)
class Distances:
    """The content of `distances.json`: results of `oprd report --distances` and their settings.

    Args:
        format: version of the file format.
        steps: steps of the run when it was read; None if its summary does not say.
        student: name of the student before training, from the run's config.
        teacher: name of the teacher, from the run's config.
        layers: the student's layers that the distance averages over.
        bridge: folder of the run's bridge; None without one.
        sampling: the sampling settings, in words.
        unavailable: why there are no distances; None if there are.
        before_after: answers to the same problems by the student before and after training.
        logged: logged rollouts of the run, an early and a late one each.
        notes: remarks for the reader, one sentence each.
        shown_layers: the layers of `Side.by_layer`.
        best_worst: best and worst answer to the same problem after training.
    """

    format: int
    steps: int | None
    student: str
    teacher: str
    layers: list[int]
    bridge: str | None
    sampling: str
    unavailable: str | None
    before_after: list[Pair]
    logged: list[Pair]
    notes: list[str]
    shown_layers: list[int] = field(default_factory=list)
    best_worst: list[Pair] = field(default_factory=list)


def write_distances(folder: Path, found: Distances) -> Path:
    """Write `distances.json` into a run folder in one step: to a temporary file, then renamed."""
    file = folder / DISTANCES
    write_json(file, asdict(found))
    return file


def read_distances(folder: Path, steps: Any) -> tuple[Distances | None, str | None]:
    """Read `distances.json` of a run folder.

    Args:
        folder: the run folder.
        steps: current number of steps of the run, from its summary.

    Returns:
        The content, or None; and a sentence that says why it cannot be used, or None. Both None: there is no file.
    """
    file = folder / DISTANCES
    if not file.is_file():
        return None, None
    try:
        found = TypeAdapter(Distances).validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return None, f"{DISTANCES} cannot be read ({where}: {first['msg']}); write it again with --distances"
    if found.format != FORMAT:
        return None, f"{DISTANCES} has format {found.format}, this version of oprd reads {FORMAT}; write it again"
    if found.steps != steps:
        return None, (
            f"{DISTANCES} was written after {found.steps} steps, the run has {steps} now; run oprd report --distances again"
        )
    return found, None


def logged_pairs(
    completions: Iterable[Mapping[str, Any]], most: int
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pair early with late logged rollouts (lines of `completions.jsonl`).

    Takes the first and the last rollout of each prompt, those with the most steps between them first. If no prompt was logged at
    two steps, pairs the rollouts of the first logged step with those of the last, in order.

    Args:
        completions: is looped over twice or more, so that no more than the chosen rows are held.
        most: maximum number of pairs.
    """
    first: dict[bytes, tuple[float, int]] = {}  # digest of the prompt -> step and index of the row
    last: dict[bytes, tuple[float, int]] = {}
    steps: list[float] = []  # the first logged step and the last
    for index, row in enumerate(completions):
        step = row["step"]
        steps = [min(steps[0], step), max(steps[1], step)] if steps else [step, step]
        key = blake2b(json.dumps(row.get("prompt"), sort_keys=True).encode(), digest_size=16).digest()
        first.setdefault(key, (step, index))
        if key not in last or step > last[key][0]:
            last[key] = (step, index)
    apart = [(first[key], last[key]) for key in first if last[key][0] > first[key][0]]
    if apart:
        apart = sorted(apart, key=lambda pair: pair[0][0] - pair[1][0])[:most]
        wanted = {index for pair in apart for _, index in pair}
        rows = {index: row for index, row in enumerate(completions) if index in wanted}
        return [(rows[early], rows[late]) for (_, early), (_, late) in apart if early in rows and late in rows]
    if not steps or steps[0] == steps[1]:
        return []
    early_rows, late_rows = ([*islice(_of_step(completions, end), most)] for end in steps)
    return list(zip(early_rows, late_rows, strict=False))


def _of_step(completions: Iterable[Mapping[str, Any]], step: float) -> Iterator[Mapping[str, Any]]:
    return (row for row in completions if row["step"] == step)


def spread_rows(completions: Iterable[Mapping[str, Any]], most: int) -> tuple[list[Mapping[str, Any]], int]:
    """At most `most` of a run's logged rollouts, at equal distances over the run, and how many were logged.

    Args:
        completions: is looped over twice, so that no more than the chosen rows are held.
        most: maximum number of rows, 2 or more.
    """
    count = sum(1 for _ in completions)
    wanted = {*spaced(count, most)}
    return [row for index, row in enumerate(completions) if index in wanted], count


def best_and_worst(answers: Sequence[Side]) -> Pair | None:
    """The best and the worst of several answers to one problem; None where none is better than another.

    An answer is better by its verdict or reward, and between equal ones by its smaller mean distance.
    """
    if len(answers) < 2:
        return None

    def rank(side: Side) -> tuple[float, float]:
        return _score(side.correct), -(side.mean_distance or 0.0)

    best, worst = max(answers, key=rank), min(answers, key=rank)
    return None if rank(best) == rank(worst) else Pair(best, worst)


def as_side(row: Mapping[str, Any]) -> Side:
    """Convert a line of `completions.jsonl`."""
    reward, tokens = row.get("correct"), row.get("tokens")
    return Side(
        prompt=prompt_text(row.get("prompt")),
        text=row["completion"],
        step=int(row["step"]),
        correct=reward if isinstance(reward, bool | float) and math.isfinite(reward) else None,
        finish_reason=str(row.get("finish_reason", "")),
        length=tokens if isinstance(tokens, int) else None,
        answer=row["answer"] if isinstance(row.get("answer"), str) else None,
    )


def is_wrong(row: Mapping[str, Any]) -> bool:
    """Whether a line of `completions.jsonl` was graded wrong against a reference answer that it holds."""
    return row.get("correct") is False and isinstance(row.get("answer"), str)


def as_wrong(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """(step, completion, reference answer) of such a line."""
    return f"step {int(row['step'])}", row["completion"], row["answer"]


def prompt_text(prompt: Any) -> str:
    """A prompt as readable text; messages are preceded by their roles."""
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)


def choose(pairs: Sequence[Pair]) -> list[tuple[str, Pair]]:
    """Choose and label the best, the worst and the most divergent pair. A pair with several labels appears once.

    Best: right after training, preferably wrong before. Worst: wrong after, preferably right before. Ties go to the smaller
    mean distance for the best, to the larger for the worst.
    Rewards that are numbers are compared as they are. Most divergent: the late rollout with the largest mean distance.
    """
    names: dict[int, list[str]] = {}

    def name(label: str, index: int) -> None:
        names.setdefault(index, []).append(label)

    def rank(index: int) -> tuple[float, ...]:
        early, late = (_score(side.correct) for side in (pairs[index].early, pairs[index].late))
        return (late, late - early, -(pairs[index].late.mean_distance or 0.0), -index)

    graded = [i for i, pair in enumerate(pairs) if pair.late.correct is not None]
    read = [i for i, pair in enumerate(pairs) if pair.late.mean_distance is not None]
    if graded:
        rewards = [pairs[i].late.correct for i in graded]
        numbers = any(not isinstance(reward, bool) for reward in rewards)
        name("best" if numbers or True in rewards else "best (none is right in the end)", max(graded, key=rank))
        if len(graded) > 1:
            name("worst" if numbers or False in rewards else "worst (none is wrong in the end)", min(graded, key=rank))
    if read:
        name("most divergent", max(read, key=lambda i: (pairs[i].late.mean_distance or 0.0, -i)))
    if not names and pairs:
        name("not graded: the first", 0)
    return [(" and ".join(labels), pairs[index]) for index, labels in names.items()]


def _score(correct: bool | float | None) -> float:
    if isinstance(correct, float):
        return correct
    return 0 if correct is None else 1 if correct else -1
