"""Samples with a loop of its own over the model's forward: the default engine.

Unlike `generate` it reads each distinct prompt once, drops rows that have ended, and draws from the inverse of the distribution
function. A row's tokens depend on its prompt, the seed, which generation of the prompt it is, and the weights; not on the rows
beside it, except for the rounding of logits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from oprd.faults import RunStopped
from oprd.models.architecture import causal_lm, evaluating
from oprd.models.lm_head import contiguous_head_input
from oprd.models.loading import parse_dtype
from oprd.models.memory import ran_out_of_memory
from oprd.models.sharding import is_sharded
from oprd.rollouts.cached_rows import CachedRows, why_not
from oprd.rollouts.draw import draw_tokens
from oprd.rollouts.engine import (
    Completion,
    EngineAbilities,
    Sampled,
    Sampling,
    cut_at_stop,
    derive_seed,
    repeat_prompts,
    to_rollouts,
)
from oprd.rollouts.probe import CACHED, check_decoding, probe_cached, probe_decoding
from oprd.rollouts.transformers_engine import LOWER_LENGTH, SAMPLING, TransformersEngine
from oprd.rollouts.weights_copy import WeightsCopies
from oprd.states.layouts import Probe, rounding

logger = logging.getLogger("oprd")

_LEAVE_SHARE = 1 / 8  # ended rows leave the batch once they are this share of it; leaving copies a part of the cache
_LOOK_EVERY = {"cpu": 1}  # steps between two checks for ended rows; on a GPU a check waits for the device
_LOOK_EVERY_ELSEWHERE = 8


@dataclass(frozen=True)
class Row:
    """A completion to be written.

    Args:
        prompt: token ids.
        seed: of its drawing.
        limit: most tokens.
    """

    prompt: tuple[int, ...]
    seed: int
    limit: int


@dataclass
class _Live:
    """The rows that are still in the batch.

    Args:
        place_B: which row of the batch each is.
        seed_B: of its drawing.
        limit_B: most tokens.
        ended_B: whether it has drawn a stop token or its last one.
    """

    place_B: Int[Tensor, " B"]
    seed_B: Int[Tensor, " B"]
    limit_B: Int[Tensor, " B"]
    ended_B: Tensor

    def take(self, rows_R: Int[Tensor, " R"]) -> _Live:
        return _Live(self.place_B[rows_R], self.seed_B[rows_R], self.limit_B[rows_R], self.ended_B[rows_R])


@dataclass
class _Written:
    """The tokens drawn at each step, of the rows that were live then."""

    rows: int
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def completions(self, limits: Sequence[int], stop_token_ids: Sequence[int]) -> list[Completion]:
        """What each row has drawn up to its end."""
        tokens_BT = self._table([(place_B, tokens_B) for place_B, tokens_B, _ in self.steps])
        given = [(place_B, values_B) for place_B, _, values_B in self.steps if values_B is not None]
        values_BT = self._table(given) if given else [[] for _ in limits]
        found = []
        for tokens, values, limit in zip(tokens_BT, values_BT, limits, strict=True):
            ids = cut_at_stop(tokens[:limit], stop_token_ids)
            found.append(Completion(ids, values[: len(ids)]))
        return found

    def _table(self, steps: list[tuple[Tensor, Tensor]]) -> list[list[Any]]:
        table_BT = steps[0][1].new_zeros(self.rows, len(steps))
        for step, (place_B, values_B) in enumerate(steps):
            table_BT[place_B, step] = values_B
        return table_BT.tolist()


@torch.no_grad()
def complete_rows(
    model: nn.Module,
    rows: Sequence[Row],
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    *,
    pad_token_id: int,
    vocab_size: int,
    want_log_probs: bool = False,
) -> list[Completion]:
    """Write the rows' completions, all at once. The model is in eval mode.

    Args:
        model: one for which `why_not` gives None.
        rows: equal prompts are read once.
        sampling: how tokens are drawn; each row has its own limit.
        stop_token_ids: ids that end a completion.
        pad_token_id: pads prompts.
        vocab_size: ids from here on are never drawn.
        want_log_probs: report log-probabilities too.

    Raises:
        RunStopped: logits are not finite.
    """
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    device, most = causal_lm(model).device, max(row.limit for row in rows)
    look_every = _LOOK_EVERY.get(device.type, _LOOK_EVERY_ELSEWHERE)

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=device)

    stops = numbers(stop_token_ids)
    place_B = torch.arange(len(rows), device=device)
    live = _Live(
        place_B, numbers(row.seed for row in rows), numbers(row.limit for row in rows), torch.zeros_like(place_B).bool()
    )
    written, sound_B = _Written(len(rows)), torch.ones_like(live.ended_B)
    with contiguous_head_input(model):
        cached = CachedRows(model, [list(prompt) for prompt in prompts], pad_token_id)
        place_of = {prompt: place for place, prompt in enumerate(prompts)}
        if len(rows) > len(prompts):
            cached.take(numbers(place_of[row.prompt] for row in rows))
        for step in range(most):
            drawn = draw_tokens(cached.logits_BV[:, :vocab_size], sampling, live.seed_B, step)
            tokens_B = drawn.tokens_B
            log_probs_B = _log_probs(cached.logits_BV, tokens_B) if want_log_probs else None
            written.steps.append((live.place_B, tokens_B, log_probs_B))
            sound_B[live.place_B] &= drawn.sound_B | live.ended_B
            live.ended_B |= torch.isin(tokens_B, stops) | (live.limit_B <= step + 1)
            if (step + 1) % look_every == 0:
                _check_sound(sound_B)
                staying = _staying(live.ended_B)
                if not len(staying):
                    break
                if len(staying) <= (1 - _LEAVE_SHARE) * len(tokens_B):
                    cached.take(staying)
                    live, tokens_B = live.take(staying), tokens_B[staying]
            if step + 1 < most:
                cached.append(tokens_B)
    _check_sound(sound_B)
    return written.completions([row.limit for row in rows], stop_token_ids)


def _staying(ended_B: Tensor) -> Tensor:
    """Places of the rows that have not ended. The last ones take the places of ended ones, so that few change theirs."""
    staying = (~ended_B).nonzero()[:, 0]
    count = len(staying)
    places = torch.arange(count, device=ended_B.device)
    places[ended_B[:count]] = staying[staying >= count]
    return places


def _log_probs(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    logits_BV = logits_BV.float()
    return logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)


def _check_sound(sound_B: Tensor) -> None:
    if not bool(sound_B.all()):
        raise RunStopped(
            f"sampling: the model's logits are not finite in {int((~sound_B).sum())} of {len(sound_B)} rows, so that no token can "
            "be drawn; its weights are not finite or its dtype overflows: resume from an earlier checkpoint, or use float32"
        )


class DecodeEngine:
    """Samples with `complete_rows`, or with `generate` if the model has no usable cache or its cached logits are wrong.

    The logits are compared on each model before its first rollout. A fall-back is logged once. Where memory runs out, fewer
    rows are written at once from then on, with the same tokens but for the rounding of logits.

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion, which includes the one that was drawn.
        batch_size: completions written together.
        weights_dtype: sample from a copy of the weights in this dtype, made anew for each `generate`; None: from the model itself.
            The copy is off-policy by its rounding, which `rollout_log_prob_gap` measures.

    Attributes:
        at_once: completions that run through the model together.

    Raises:
        ValueError: `batch_size` < 1, or no such dtype.
    """

    can = EngineAbilities(background=True, log_probs=True)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        *,
        weights_dtype: str | None = None,
    ) -> None:
        self.reference = TransformersEngine(tokenizer, stop_token_ids, batch_size)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.stop_token_ids, self.pad_token_id = self.reference.stop_token_ids, self.reference.pad_token_id
        self.vocab_size, self.at_once = self.reference.vocab_size, self.reference.at_once
        self._copies = None if weights_dtype is None else WeightsCopies(_checked_dtype(weights_dtype))
        self._probes: WeakKeyDictionary[nn.Module, dict[torch.dtype, Probe | str]] = WeakKeyDictionary()
        self._said: set[str] = set()

    @property
    def on_batch(self) -> Callable[[int, int], None] | None:
        """Called after each batch with (completions done, completions in all), for a progress display."""
        return self.reference.on_batch

    @on_batch.setter
    def on_batch(self, call: Callable[[int, int], None] | None) -> None:
        self.reference.on_batch = call

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        rows: Sequence[int] | None = None,
        want_log_probs: bool = False,
    ) -> Sampled:
        """Sample as `RolloutEngine.generate` says. The model's train/eval mode is restored.

        Raises:
            ValueError: `num_generations` < 1, or a sharded model whose weights cannot be copied.
            RunStopped: memory does not hold one completion, or logits are not finite.
        """
        writer = self._writer(model)
        if self._falls_back(writer):
            return self.reference.generate(
                writer, prompt_ids, num_generations=num_generations, sampling=sampling, seed=seed, rows=rows,
                want_log_probs=want_log_probs,
            )  # fmt: skip
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        wanted = to_rows(prompts, sampling.max_completion_length, seed)
        # Prompts of similar length share a batch, which keeps left padding small; equal prompts lie side by side.
        order = sorted(range(len(wanted)), key=lambda i: (len(wanted[i].prompt), wanted[i].prompt, i))
        done: dict[int, Completion] = {}
        with evaluating(writer):
            while len(done) < len(order):
                part = order[len(done) :][: self.at_once.value]
                with self.at_once.or_halve(len(part), SAMPLING, LOWER_LENGTH):
                    completions = complete_rows(
                        writer, [wanted[i] for i in part], sampling, self.stop_token_ids,
                        pad_token_id=self.pad_token_id, vocab_size=self.vocab_size, want_log_probs=want_log_probs,
                    )  # fmt: skip
                    done.update(zip(part, completions, strict=True))
                    if self.on_batch is not None:
                        self.on_batch(len(done), len(order))
        ordered = [done[i] for i in range(len(order))]
        found = to_rollouts(prompts, [one.token_ids for one in ordered], owners, self.tokenizer, self.stop_token_ids)
        return Sampled(found, [one.log_probs for one in ordered] if want_log_probs else None)

    def probe(self, model: nn.Module) -> dict[str, Any]:
        """Measure whether completions of this model are right, which its first rollout would do otherwise. Logs a fall-back.

        Returns:
            For `summary.json`: `decode` → the measure, or why `generate` samples instead, whose measure is then beside it.

        Raises:
            ValueError: completions would depend on what is sampled beside them.
        """
        writer = self._writer(model)
        verdict = self._verdict(writer)
        if not self._falls_back(writer):
            assert isinstance(verdict, Probe), "otherwise it falls back"
            return {CACHED: verdict.as_json()[CACHED]}
        found = probe_decoding(writer)
        check_decoding(found)
        own = verdict if isinstance(verdict, str) else verdict.as_json()[CACHED]
        return {CACHED: own, **{key: value for key, value in found.as_json().items() if key != "dtype"}}

    def _writer(self, model: nn.Module) -> nn.Module:
        """The model that is sampled from."""
        if self._copies is None:
            return model
        if is_sharded(model):
            raise ValueError(
                "weights_dtype: not with a sharded model, whose weights no process can copy; leave it out of rollout_engine_kwargs"
            )
        return self._copies.current(model)

    def _falls_back(self, model: nn.Module) -> bool:
        verdict = self._verdict(model)
        if isinstance(verdict, Probe):
            if verdict.equal(CACHED):
                return False
            verdict = f"its logits differ from those of each text alone ({verdict.deviation(CACHED)})"
        sentence = f"{type(causal_lm(model)).__name__} is sampled with generate, not with the faster decode: {verdict}"
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("%s", sentence)
        return True

    def _verdict(self, model: nn.Module) -> Probe | str:
        """What was measured on the model, once for each precision, or why it cannot be."""
        reason = why_not(model)  # each time: a model may be sharded after its first rollout
        if reason is not None:
            return reason
        precision = rounding(next(model.parameters()))[0]
        found = self._probes.setdefault(model, {})
        if precision not in found:
            try:
                found[precision] = probe_cached(model)
            except Exception as error:  # other people's forward, with arguments that they may not expect
                if ran_out_of_memory(error):
                    raise
                found[precision] = (
                    f"its forward fails on a cache ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
                )
        return found[precision]


def to_rows(prompts: Sequence[Sequence[int]], limit: int, seed: int) -> list[Row]:
    """The rows of these prompts. Equal prompts are told apart by how many of them come before.

    Args:
        prompts: token ids, one a row.
        limit: most tokens of a completion.
        seed: of the drawing.
    """
    before: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in map(tuple, prompts):
        rows.append(Row(prompt, derive_seed(seed, before[prompt], *prompt), limit))
        before[prompt] += 1
    return rows


def _checked_dtype(name: str) -> torch.dtype:
    try:
        return parse_dtype(name)
    except ValueError as error:
        raise ValueError(
            f"weights_dtype: {name!r} is not allowed in rollout_engine_kwargs; bfloat16 or float16, or leave it out"
        ) from error
