"""Measures on the loaded model whether `generate` gives a text in a left-padded batch the logits of the text alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from oprd.models.architecture import causal_lm, evaluating
from oprd.models.sharding import is_sharded
from oprd.rollouts.transformers_engine import left_padded, replace_generation_config
from oprd.states.layouts import Probe, deviation, rounding, short_texts

DECODING = "decoding"
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

    The logits alone come from one pass without cache.

    Args:
        model: as `TransformersEngine` samples from it; sharded on all processes.
    """
    lm = causal_lm(model)
    texts, device = short_texts(model, spare=_STEPS), lm.device
    following = texts[0][:1] * _STEPS
    generate = getattr(model, "generate", lm.generate)
    input_ids, attention_mask = left_padded(texts, texts[0][0], device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_STEPS,
        pad_token_id=texts[0][0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    together = {"synced_gpus": True} if is_sharded(model) else {}
    with evaluating(model), replace_generation_config(lm, config):
        alone = []
        for text in texts:
            output = model(input_ids=torch.tensor([[*text, *following]], device=device), use_cache=False)
            alone.append(output.logits[0, len(text) - 1 : -1])
        logits_SBV = torch.stack(
            generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config,
                logits_processor=LogitsProcessorList([_Follow(following)]), **together,
            ).logits
        )  # fmt: skip
        dtype, allowed = rounding(next(model.parameters()))
    off = float(torch.tensor([deviation(logits_SBV[:, i], single) for i, single in enumerate(alone)]).max())
    return Probe(type(lm).__name__, dtype, {DECODING: off}, {DECODING: _TIMES_ROUNDING * allowed})


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
