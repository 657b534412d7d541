"""Samples with transformers' `generate`: any device, no further package. The reference that other engines are tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oprd.models.architecture import causal_lm, evaluating
from oprd.models.lm_head import contiguous_head_input
from oprd.models.memory import HalvedSize, explaining_out_of_memory
from oprd.models.sharding import is_sharded, max_over_ranks
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import (
    EngineAbilities,
    Sampled,
    Sampling,
    cut_at_stop,
    padding_id,
    repeat_prompts,
    to_rollouts,
)

SAMPLING = "sampling"
LOWER_LENGTH = "lower max_completion_length, load the models in bfloat16, or sample with another rollout_engine"


class TransformersEngine:
    """Samples with `model.generate` in batches of similar prompt length.

    Where memory runs out, batches are generated in smaller parts from then on. The completions stay the same: each row draws the
    random numbers that it draws in the whole batch (its logits may differ by rounding, as with any other batch size).

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion, which includes the one that was drawn.
        batch_size: completions generated together.

    Attributes:
        at_once: rows of a batch that run through the model together.
        on_batch: called after each batch with (completions done, completions in all), for a progress display.

    Raises:
        ValueError: `batch_size` < 1.
    """

    can = EngineAbilities(background=True)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int], batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"generation_batch_size: {batch_size} is not allowed; at least 1")
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.batch_size = batch_size
        self.at_once = HalvedSize("generation_batch_size", batch_size)
        self.vocab_size = vocabulary_size(tokenizer)
        self.on_batch: Callable[[int, int], None] | None = None
        self.pad_token_id = padding_id(tokenizer, self.stop_token_ids)

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
        """Sample as `RolloutEngine.generate` says; without log-probabilities. The model's train/eval mode is restored.

        Raises:
            ValueError: `num_generations` < 1.
            RunStopped: memory does not hold one completion, or a batch of a sharded model.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        completions: dict[int, list[int]] = {}
        # Prompts of similar length share a batch, which keeps left padding small; ties keep their order.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        with _sampling_mode(model):
            for start in self._starts(model, len(order)):
                # A sharded model needs every rank for each token, so a rank that is done repeats a prompt.
                indices = order[start : start + self.batch_size] or order[:1]
                batch = self._generate_batch(model, [prompts[i] for i in indices], sampling, generator)
                if start < len(order):
                    completions.update(zip(indices, batch, strict=True))
                if self.on_batch is not None:
                    self.on_batch(len(completions), len(order))
        ordered = [completions[i] for i in range(len(prompts))]
        return Sampled(to_rollouts(prompts, ordered, owners, self.tokenizer, self.stop_token_ids))

    def _starts(self, model: nn.Module, count: int) -> range:
        batches = -(-count // self.batch_size)
        if is_sharded(model):
            batches = max_over_ranks(batches, next(model.parameters()).device)
        return range(0, batches * self.batch_size, self.batch_size)

    def _generate_batch(
        self, model: nn.Module, prompts: list[list[int]], sampling: Sampling, generator: torch.Generator
    ) -> list[list[int]]:
        """The completions of one batch, in parts where memory does not hold it at once."""
        if is_sharded(model):
            advice = f"lower generation_batch_size ({self.batch_size}); it is not halved with a sharded model"
            with explaining_out_of_memory(SAMPLING, advice):
                return self._generate_rows(model, prompts, sampling, Draw(generator))
        before, after, most = generator.get_state(), generator.get_state(), 0
        completions: list[list[int]] = []
        while len(completions) < len(prompts):
            part = prompts[len(completions) :][: self.at_once.value]
            with self.at_once.or_halve(len(part), SAMPLING, LOWER_LENGTH):
                generator.set_state(before)
                draw = Draw(generator, first=len(completions), batch=len(prompts))
                completions += self._generate_rows(model, part, sampling, draw)
                if draw.count > most:  # the whole batch draws until its longest completion ends
                    after, most = generator.get_state(), draw.count
        generator.set_state(after)
        return completions

    @torch.no_grad()
    def _generate_rows(
        self, model: nn.Module, prompts: list[list[int]], sampling: Sampling, draw: Draw
    ) -> list[list[int]]:
        lm = causal_lm(model)
        input_ids, attention_mask = left_padded(prompts, self.pad_token_id, lm.device)
        config = self._generation_config(sampling, lm.get_output_embeddings())
        with replace_generation_config(lm, config):
            generate = getattr(model, "generate", lm.generate)
            # Sharded: every rank runs until the last completion of all ranks is done.
            together = {"synced_gpus": True} if is_sharded(model) else {}
            output = generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config,
                logits_processor=drawing_processors(sampling, draw), **together,
            )  # fmt: skip
        return [cut_at_stop(row, self.stop_token_ids) for row in output[:, input_ids.shape[1] :].tolist()]

    def _generation_config(self, sampling: Sampling, head: nn.Module | None) -> GenerationConfig:
        weight = getattr(head, "weight", torch.empty(0))
        rows = getattr(weight, "ds_shape", weight.shape)[0]  # under ZeRO-3 the weight itself is empty
        padding = list(range(self.vocab_size, rows))  # rows of the head beyond the vocabulary
        return GenerationConfig(
            do_sample=False,  # `drawing_processors` draw the token
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=self.stop_token_ids,
            pad_token_id=self.pad_token_id,
            suppress_tokens=padding or None,
        )


def left_padded(
    texts: Sequence[list[int]], pad_token_id: int, device: torch.device | str
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids padded on the left, and their attention mask."""
    width = max(map(len, texts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(ids)) + ids for ids in texts], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in texts], device=device)
    return input_ids, attention_mask


class Draw(LogitsProcessor):
    """Draws one token a row from `generator` and masks all others.

    `generate` itself would draw from the global random state, which training in another thread uses too.

    Args:
        generator: source of randomness, on the device of the logits `[rows, vocabulary]`.
        first: place of the first row in the batch that it is a part of.
        batch: rows of that batch; None for as many as there are. The part draws the whole batch's random numbers.

    Attributes:
        count: tokens drawn of each row.
    """

    def __init__(self, generator: torch.Generator, first: int = 0, batch: int | None = None) -> None:
        self.generator, self.first, self.batch, self.count = generator, first, batch, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores `[rows, vocabulary]`, −inf but for the drawn token."""
        self.count += 1
        drawn_B1 = self._draw(scores.softmax(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B1, 0.0)

    def _draw(self, weights_BV: Tensor) -> Tensor:
        rows = len(weights_BV)
        if self.batch in (None, rows):
            return torch.multinomial(weights_BV, num_samples=1, generator=self.generator)
        batch_BV = weights_BV.new_ones(self.batch, weights_BV.shape[1])
        mine = slice(self.first, self.first + rows)
        batch_BV[mine] = weights_BV
        return torch.multinomial(batch_BV, num_samples=1, generator=self.generator)[mine]


def drawing_processors(sampling: Sampling, draw: Draw) -> LogitsProcessorList:
    """The processors of `generate(do_sample=True)` in its order, and the draw itself; none for greedy decoding.

    Args:
        sampling: how completions are drawn.
        draw: draws the tokens.
    """
    if sampling.temperature == 0:
        return LogitsProcessorList()
    warpers: list[LogitsProcessor] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return LogitsProcessorList([*warpers, draw])


@contextmanager
def _sampling_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode (no dropout, no activation checkpointing) while it samples, its LM head's input contiguous."""
    with evaluating(model), contiguous_head_input(model):
        yield


@contextmanager
def replace_generation_config(lm: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the model's generation config, from which `generate` fills every unset value.

    Many checkpoints set temperature 0.6, top-p 0.95 or a repetition penalty, which would make rollouts silently off-policy.
    """
    saved = lm.generation_config
    lm.generation_config = config
    try:
        yield
    finally:
        lm.generation_config = saved
