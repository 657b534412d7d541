"""Measures on the loaded model whether a text that is sampled in a batch gets the logits of the text alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from oprd.models.architecture import causal_lm, evaluating
from oprd.models.memory import ran_out_of_memory
from oprd.models.sharding import is_sharded
from oprd.rollouts.cached_rows import CachedRows
from oprd.rollouts.transformers_engine import left_padded, replace_generation_config
from oprd.states.layouts import Probe, deviation, rounding, short_texts

DECODING, CACHED = "decoding", "decode"
_STEPS = 3
_TIMES_ROUNDING = 4  # a cached step multiplies matrices of other shapes than a whole text


class _Follow(LogitsProcessor):
    """Makes every row go on with given tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = iter(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.full_like(scores[:, :1], next(self.tokens), dtype=torch.long)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


@torch.no_grad()
def probe_decoding(model: nn.Module) -> Probe:
    """Generate three given tokens after two short texts together, and compare their logits with those of each text alone.

    The logits of each text alone come from one pass without cache.

    Args:
        model: as `TransformersEngine` samples from it; sharded on all processes.

    Raises:
        ValueError: its own code fails; names the model.
    """
    try:
        return _generated_together(model)
    except Exception as error:  # other people's forward
        if ran_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model: {type(causal_lm(model)).__name__} cannot generate for two texts together ({type(error).__name__}: {text}); "
            "take another model, or sample with vllm"
        ) from error


def _generated_together(model: nn.Module) -> Probe:
    lm = causal_lm(model)
    texts, following = _texts(model)
    generate = getattr(model, "generate", lm.generate)
    input_ids, attention_mask = left_padded(texts, texts[0][0], lm.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_STEPS,
        pad_token_id=texts[0][0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    together = {"synced_gpus": True} if is_sharded(model) else {}
    with evaluating(model), replace_generation_config(lm, config):
        alone = _alone(model, texts, following)
        logits_SBV = torch.stack(
            generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config,
                logits_processor=LogitsProcessorList([_Follow(following)]), **together,
            ).logits
        )  # fmt: skip
        dtype, allowed = rounding(next(model.parameters()))
    off = [deviation(logits_SBV[:, i], single) for i, single in enumerate(alone)]
    return _probe(model, DECODING, off, dtype, allowed)


@torch.no_grad()
def probe_cached(model: nn.Module) -> Probe:
    """As `probe_decoding`, with the rows of `DecodeEngine`: a text is repeated, and its copy leaves.

    Args:
        model: one for which `oprd.rollouts.cached_rows.why_not` gives None.
    """
    texts, following = _texts(model)
    steps = []
    with evaluating(model):
        alone = _alone(model, texts, following)
        rows = CachedRows(model, texts, texts[0][0])
        for now, taken in zip(following, ([0, 0, 1], [1, 2], [1, 0]), strict=True):
            rows.take(torch.tensor(taken, device=rows.logits_BV.device))
            steps.append(rows.logits_BV[[0, -1]])
            rows.append(torch.full((len(taken),), now, device=rows.logits_BV.device))
        dtype, allowed = rounding(next(model.parameters()))
    steps[-1] = steps[-1].flip(0)
    off = [deviation(torch.stack(steps)[:, i], single) for i, single in enumerate(alone)]
    return _probe(model, CACHED, off, dtype, allowed)


def _texts(model: nn.Module) -> tuple[list[list[int]], list[int]]:
    """Two short texts, and the tokens that follow both."""
    texts = short_texts(model, spare=_STEPS)
    return texts, texts[0][:1] * _STEPS


def _alone(model: nn.Module, texts: list[list[int]], following: list[int]) -> list[Tensor]:
    """Logits `[steps, vocabulary]` of the following tokens, of each text alone, without cache."""
    device, found = causal_lm(model).device, []
    for text in texts:
        output = model(input_ids=torch.tensor([[*text, *following]], device=device), use_cache=False)
        found.append(output.logits[0, len(text) - 1 : -1])
    return found


def _probe(model: nn.Module, way: str, off: list[float], dtype: torch.dtype, allowed: float) -> Probe:
    worst = float(torch.tensor(off).max())  # NaN where one is
    return Probe(type(causal_lm(model)).__name__, dtype, {way: worst}, {way: _TIMES_ROUNDING * allowed})


def check_decoding(probe: Probe) -> None:
    """Refuse a model whose completions would depend on what is sampled beside them.

    Raises:
        ValueError: names the model, the deviation, and what to do.
    """
    if not probe.equal(DECODING):
        raise ValueError(
            f"model: {probe.model} generates with other logits in a left-padded batch than for each text alone "
            f"({probe.deviation(DECODING)}), so completions would depend on what is sampled beside them; sample with vllm, or take "
            "another model"
        )
