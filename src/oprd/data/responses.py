"""Fixed responses to prompts, read from a file.

They are the rollouts of an off-policy run (`lmbda: 0`), and the responses that a cache holds states of.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from oprd.data.compact import IdsColumn, JsonColumn
from oprd.data.prompts import Prompt
from oprd.types import FinishReason, Rollouts

logger = logging.getLogger("oprd")

COLUMNS = ("completion", "completion_ids", "finish_reason")


@dataclass(frozen=True)
class Response:
    """One response, in the student's tokens.

    Args:
        prompt_ids: of its prompt.
        completion_ids: with the end token, where it ends.
        finish_reason: "stop", or "length" where it was cut off.
        text: without special tokens.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    finish_reason: FinishReason
    text: str


class FixedResponses(Sequence[Response]):
    """Responses in order, found by the token ids of their prompt.

    Args:
        responses: at least one.
        name: where they come from, for messages.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, responses: Iterable[Response], name: str) -> None:
        self.name = name
        self._prompts, self._completions, self._rest = IdsColumn(), IdsColumn(), JsonColumn()
        self._of_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, response in enumerate(responses):
            self._prompts.append(response.prompt_ids)
            self._completions.append(response.completion_ids)
            clean = response.text.encode("utf-8", errors="replace").decode()
            self._rest.append([response.finish_reason, clean])
            self._of_prompt.setdefault(tuple(response.prompt_ids), []).append(place)
        if not len(self._rest):
            raise ValueError(f"responses: {name} holds none")

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return Response(list(self._prompts[place]), list(self._completions[place]), *self._rest[place])

    def check(self, prompts: Sequence[Prompt], num_generations: int) -> None:
        """Check that every prompt has enough responses.

        Raises:
            ValueError: names the first that has not.
        """
        for prompt in prompts:
            found = len(self._of_prompt.get(tuple(prompt.ids), ()))
            if not found:
                raise ValueError(
                    f"train_dataset: {prompt.name} has no response in {self.name}; train on the prompts that the responses are of, "
                    "with the same tokenizer and chat template, or add its response"
                )
            if found < num_generations:
                raise ValueError(
                    f"num_generations: {num_generations}, and {prompt.name} has {found} response{'s' * (found > 1)} in "
                    f"{self.name}; set num_generations: {found}"
                )

    def rollouts(
        self, prompt_ids: Sequence[Sequence[int]], *, num_generations: int, seed: int, rows: Sequence[int]
    ) -> Rollouts:
        """Responses of some prompts, prompt after prompt: all in their order, or a draw where a prompt has more.

        Args:
            prompt_ids: token ids of each prompt; `check` has seen it.
            num_generations: responses a prompt.
            seed: of the draw.
            rows: dataset row of each prompt.
        """
        chosen: list[Response] = []
        for place, ids in enumerate(prompt_ids):
            own = self._of_prompt[tuple(ids)]
            if len(own) > num_generations:
                own = sorted(random.Random(f"{seed} {place}").sample(own, num_generations))
            chosen += [self[i] for i in own]
        owners = [row for row in rows for _ in range(num_generations)]
        return as_rollouts(chosen, owners)


def as_rollouts(responses: Sequence[Response], rows: Sequence[int] | None = None) -> Rollouts:
    """Responses as rollouts.

    Args:
        responses: at least one.
        rows: dataset row of each; None: 0, 1, 2, ….
    """
    return Rollouts(
        [r.prompt_ids for r in responses],
        [r.completion_ids for r in responses],
        [r.finish_reason for r in responses],
        [r.text for r in responses],
        list(rows) if rows is not None else list(range(len(responses))),
    )


def read_responses(
    prompts: Sequence[Prompt],
    tokenize: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    end_of: Callable[[Prompt], int],
    *,
    longest: int,
    most: int,
    ends: Collection[int],
) -> Iterable[Response]:
    """The responses in the rows of prompts; logs how many are cut.

    A row has `completion` (text, or messages of which the last is the response) or `completion_ids` (token ids, the end token
    included), and may have `finish_reason`: "stop" (the default: an end token follows the text) or "length".

    Args:
        prompts: rendered, with the other columns of their rows (`Reading.columns`).
        tokenize: token ids of a response's text.
        decode: text of token ids.
        end_of: the token that ends a response to a prompt.
        longest: tokens; what is longer is cut there.
        most: token ids of the student, 0 to `most` - 1.
        ends: tokens that end a response; `completion_ids` of one that is not cut off end in one of them.

    Raises:
        ValueError: a row without a response, one of another type, or token ids that the student does not have or that do not end;
            names the row.
    """
    cut = 0
    for prompt in prompts:
        ids, reason = _completion(prompt, tokenize, end_of)
        _check_ids(prompt, ids, reason, most, ends)
        if len(ids) > longest:
            ids, reason, cut = ids[:longest], "length", cut + 1
        yield Response(list(prompt.ids), ids, reason, decode(ids))
    if cut:
        logger.warning("responses: %d of %d are cut at max_completion_length=%d tokens", cut, len(prompts), longest)


def _check_ids(prompt: Prompt, ids: Sequence[int], reason: FinishReason, most: int, ends: Collection[int]) -> None:
    if max(ids) >= most:
        raise ValueError(
            f"{prompt.name}: the response has token {max(ids)}, and the student has 0 to {most - 1}; write completion_ids with its "
            "tokenizer"
        )
    if reason == "stop" and ids[-1] not in ends:
        known = ", ".join(map(str, sorted(ends)))
        raise ValueError(
            f"{prompt.name}: completion_ids: they end in {ids[-1]}, which ends no response; append one of {known}, or set "
            "finish_reason: length"
        )


def _completion(
    prompt: Prompt, tokenize: Callable[[str], Sequence[int]], end_of: Callable[[Prompt], int]
) -> tuple[list[int], FinishReason]:
    columns = prompt.row.columns
    text, ids, reason = (columns.get(name) for name in COLUMNS)
    if reason not in (None, "stop", "length"):
        raise ValueError(f"{prompt.name}: finish_reason: {reason!r} is not one of stop, length")
    ending: FinishReason = "length" if reason == "length" else "stop"
    if ids is not None:
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"{prompt.name}: completion_ids: a list of at least one token id is allowed, not {str(ids)[:40]}"
            )
        return ids, ending
    if isinstance(text, list) and text and isinstance(text[-1], dict):
        text = text[-1].get("content")
    if not isinstance(text, str):
        raise ValueError(
            f"{prompt.name}: completion: the row has no response; a text, messages whose last one is the response, or "
            "completion_ids"
        )
    found = list(tokenize(text)) + ([end_of(prompt)] if ending == "stop" else [])
    if not found:
        raise ValueError(f"{prompt.name}: completion: it is empty and has no end; leave the row out")
    return found, ending
