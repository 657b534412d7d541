"""Samples with transformers' continuous batching: no padding, and a finished completion makes room for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from oprd.faults import RunStopped
from oprd.models.architecture import causal_lm, evaluating
from oprd.models.memory import HalvedSize, ran_out_of_memory
from oprd.models.sharding import is_sharded
from oprd.models.tokens import vocabulary_size
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling, padding_id, repeat_prompts, to_rollouts
from oprd.rollouts.transformers_engine import LOWER_LENGTH, SAMPLING

_ADVICE = "set rollout_engine: transformers"
# Settings of ContinuousBatchingConfig that this engine sets itself, to keep the contract of `RolloutEngine`.
_OWN = {"page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch", "seed", "max_queue_size"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PREFILL_TOKENS = 1024  # most prompt tokens of one forward pass, unless more completions run at the same time


class TransformersContinuousEngine:
    """Samples with transformers' `ContinuousBatchingManager`: a paged cache, and one row of tokens for all running completions.

    The manager, its thread and its cache exist during one `generate`, so the weights are current and the update has the memory.
    All requests are queued before the thread starts, so that batches do not depend on timing. Where memory runs out, the whole
    `generate` runs again with half as many completions at the same time, and with the cache that they need.

    Tested on CPU with transformers 5.24. Not tested: GPUs, tensor parallelism.

    Args:
        tokenizer: decodes completions.
        stop_token_ids: ids that end a completion, which includes the one that was drawn.
        batch_size: completions generated at the same time.
        page_size: tokens of a page of the cache, at least 4.
        num_blocks: pages of the cache, in each layer; None for as many as `batch_size` of the longest completions need. With fewer,
            completions wait for room or are computed again.
        max_batch_tokens: tokens of one forward pass; None for the larger of `batch_size` and the prompts' tokens, up to 1024.
        batching_kwargs: further fields of transformers' `ContinuousBatchingConfig`.

    Attributes:
        at_once: completions generated at the same time; at first `batch_size`.
        on_batch: called after each completion with (completions done, completions in all), for a progress display.

    Raises:
        ValueError: transformers is too old, a size is too small, or `batching_kwargs` has a field that is unknown or set here.
    """

    can = EngineAbilities()  # not in the background: it draws from the global random state, which training uses too

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        *,
        page_size: int = 32,
        num_blocks: int | None = None,
        max_batch_tokens: int | None = None,
        batching_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = (("generation_batch_size", batch_size, 1), ("page_size", page_size, 4), ("num_blocks", num_blocks, 1))
        for name, value, least in (*sizes, ("max_batch_tokens", max_batch_tokens, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}: {value} is not allowed; at least {least}")
        _, config_class = _import_continuous_batching()
        free = sorted({field.name for field in fields(config_class)} - _OWN)
        for name in batching_kwargs or {}:
            if name not in free:
                raise ValueError(f"batching_kwargs: {name!r} is not allowed; one of {', '.join(free)}")
        self.tokenizer = tokenizer
        self.stop_token_ids = list(stop_token_ids)
        self.batch_size = batch_size
        self.at_once = HalvedSize("generation_batch_size", batch_size)
        self.page_size = page_size
        self.num_blocks = num_blocks
        self.max_batch_tokens = max_batch_tokens
        # Keep the attention that the student trains with.
        self.batching_kwargs = {"auto_switch_to_flash": False, **(batching_kwargs or {})}
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
        """Sample as `RolloutEngine.generate` says; without log-probabilities.

        All completions draw from one random stream, so they depend on the engine's sizes too. The global random state, the model's
        train/eval mode and its attention implementation are restored.

        Raises:
            ValueError: `num_generations` < 1, a model that continuous batching does not support, or a cache too small.
            RuntimeError: the generation failed; the message gives the cause.
            RunStopped: memory does not hold one completion.
        """
        prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
        check_supported(model)
        lm = causal_lm(model)
        completions: list[list[int]] = []
        while not completions:
            sizes = self.sizes(prompts, sampling)
            advice = (
                LOWER_LENGTH if self.num_blocks is None else f"lower num_blocks ({self.num_blocks}), or {LOWER_LENGTH}"
            )
            with (
                self.at_once.or_halve(sizes["max_requests_per_batch"], SAMPLING, advice),
                _state_restored(model, lm),
                _cast_to_cache_dtype(),
            ):
                completions = self._complete(lm, prompts, sampling, {**self.batching_kwargs, **sizes, "seed": seed})
        return Sampled(to_rollouts(prompts, completions, owners, self.tokenizer, self.stop_token_ids))

    def sizes(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict[str, int]:
        """Sizes of cache and batch for these prompts, as fields of `ContinuousBatchingConfig`.

        transformers would derive them from the free memory, which differs from run to run and would change what is drawn.

        Raises:
            ValueError: `num_blocks` holds less than the longest prompt with its completion.
        """
        running = min(self.at_once.value, len(prompts))
        longest = max(len(prompt) for prompt in prompts) + sampling.max_completion_length
        pages = -(-longest // self.page_size)
        if self.num_blocks is not None and self.num_blocks < pages:
            raise ValueError(
                f"num_blocks: {self.num_blocks} pages of {self.page_size} tokens are too few; prompt and completion may take "
                f"{longest} tokens: at least {pages}, or leave it out"
            )
        prefill = min(sum(len(prompt) for prompt in prompts), _PREFILL_TOKENS)
        return {
            "page_size": self.page_size,
            "num_blocks": self.num_blocks or running * (pages + 1),
            "max_batch_tokens": self.max_batch_tokens or max(running, prefill),
            "max_requests_per_batch": running,
        }

    def _complete(
        self, lm: PreTrainedModel, prompts: list[list[int]], sampling: Sampling, settings: dict[str, Any]
    ) -> list[list[int]]:
        manager_class, config_class = _import_continuous_batching()
        manager = manager_class(lm, self._generation_config(sampling), config_class(**settings))
        processors = manager.logit_processor
        processors.logits_processor.insert(0, _MaskPaddingRows(self.vocab_size))
        processors.do_processing = True
        # transformers adds the rank to the seed; our caller has chosen the seed of this rank.
        manager.continuous_batching_config.seed -= manager.distributed_helper.dp_rank
        names = manager.add_requests(prompts, max_new_tokens=sampling.max_completion_length)
        done: dict[str, list[int]] = {}
        finished = False
        manager.start()
        try:
            while len(done) < len(names):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        cause = manager.background_thread_status.fatal_error
                        raise _failure(f"stopped ({cause})", cause) from cause
                    continue
                if result.error is not None:
                    raise _failure(f"failed: {result.error}")
                done[result.request_id] = list(result.generated_tokens)
                if self.on_batch is not None:
                    self.on_batch(len(done), len(names))
            finished = True
        finally:
            manager.stop(block=True, hard_stop=not finished)
            manager.destroy()
        return [done[name] for name in names]

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.min_p > 0:
            drawn["min_p"] = sampling.min_p
        return GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=self.stop_token_ids,
            pad_token_id=self.pad_token_id,
            **(drawn if sampling.temperature > 0 else {}),
        )


def _failure(what: str, cause: BaseException | None = None) -> RuntimeError:
    """The error that ends the run, or one that says that memory ran out, after which fewer completions are tried."""
    error = RuntimeError(f"rollout_engine: transformers_continuous {what}")
    if ran_out_of_memory(error) or (cause is not None and ran_out_of_memory(cause)):
        return error
    return RunStopped(f"{error}; {_ADVICE}")


class _MaskPaddingRows(LogitsProcessor):
    """Masks rows of the head beyond the vocabulary, which only pad the matrix."""

    supports_continuous_batching = True

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[-1], device=scores.device)
        return scores.masked_fill(rows >= self.vocab_size, -torch.inf)


def check_supported(model: nn.Module) -> None:
    """Refuse a model for which continuous batching fails or silently ignores the cache.

    Raises:
        ValueError: a sharded model, no paged attention for the model or its attention implementation, or layers without attention.
    """
    engine = "rollout_engine: transformers_continuous is not supported for"
    if is_sharded(model):
        raise ValueError(f"{engine} a sharded model (fully_shard: true); {_ADVICE}")
    lm = causal_lm(model)
    attention = lm.config._attn_implementation
    if attention not in ("eager", "sdpa", "paged|eager") and "flash" not in attention:
        raise ValueError(
            f"{engine} attn_implementation={attention!r}; sdpa, eager or a flash attention is allowed (model_init_kwargs), "
            f"or {_ADVICE}"
        )
    text = lm.config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if getattr(text, "kv_lora_rank", None):
        other.add("latent attention")  # keys and values of two widths
    if other or lm.config.is_encoder_decoder or not getattr(lm, "_supports_attention_backend", False):
        found = f" with layers {', '.join(sorted(other))}" if other else ""
        raise ValueError(
            f"{engine} {type(lm).__name__}{found}; it supports decoders with full and sliding attention that use transformers' "
            f"attention interface; {_ADVICE}"
        )
    if getattr(lm, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            f"{engine} a model that already holds a manager; call its destroy_cached_continuous_batching_manager()"
        )


def _import_continuous_batching() -> tuple[Any, Any]:
    try:
        from transformers import ContinuousBatchingConfig
        from transformers.generation.continuous_batching import ContinuousBatchingManager
    except ImportError as error:
        raise ValueError(
            f"rollout_engine: transformers_continuous needs transformers >= 5.18 ({error}); update it, or {_ADVICE}"
        ) from error
    if "page_size" not in {field.name for field in fields(ContinuousBatchingConfig)}:
        raise ValueError(f"rollout_engine: transformers_continuous needs transformers >= 5.18; update it, or {_ADVICE}")
    return ContinuousBatchingManager, ContinuousBatchingConfig


@contextmanager
def _cast_to_cache_dtype() -> Iterator[None]:
    """Cast keys and values to the dtype of the paged cache, and back.

    The cache has the model's dtype and accepts no other, but autocast computes 16-bit values beside keys rotated in float32.
    """
    from transformers.generation.continuous_batching import PagedAttentionCache

    update = PagedAttentionCache.update

    def cast(cache: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        stored = update(cache, key_states.to(cache.dtype), value_states.to(cache.dtype), *args, **kwargs)
        keys, values = (states.to(key_states.dtype) for states in stored)
        return keys, values

    PagedAttentionCache.update = cast
    try:
        yield
    finally:
        PagedAttentionCache.update = update


@contextmanager
def _state_restored(model: nn.Module, lm: PreTrainedModel) -> Iterator[None]:
    """Restore mode, attention implementation and random state, which the manager changes, also after an error."""
    attention = lm.config._attn_implementation
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with evaluating(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        if lm.config._attn_implementation != attention:
            lm.set_attn_implementation(attention)
