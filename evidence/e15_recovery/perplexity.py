"""How well a model predicts what another one writes: perplexity per token of fixed held-out text of the other's own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from oprd import Sampling, capture_states, lm_head_of, log_probs
from oprd.data.prompts import prepare_prompts
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.rollouts.engines import make_engine
from oprd.tasks.problems import load_rows
from oprd.types import Rollouts


def write_text(model: str, prompts: str, file: Path, *, limit: int, tokens: int, seed: int) -> None:
    """Let a model answer held-out prompts once each at temperature 1, and keep the token ids in `file`."""
    loaded, tokenizer = load_model(model, dtype=torch.float32).eval(), load_tokenizer(model)
    rows = load_rows(prompts, "test", limit, seed)
    ready = prepare_prompts(rows, tokenizer, name=prompts, max_completion_length=tokens, context_length=None)
    engine = make_engine("decode", tokenizer, stop_token_ids(loaded, tokenizer), batch_size=64)
    found = engine.generate(
        loaded, [prompt.ids for prompt in ready], num_generations=1, sampling=Sampling(tokens), seed=seed
    ).rollouts
    file.write_text(json.dumps([found.prompt_ids, found.completion_ids]))


@torch.no_grad()
def perplexity(model: str, file: Path) -> float:
    """exp of the mean negative log-likelihood of a completion's token, over all tokens of the text in `file`."""
    loaded = load_model(model, dtype=torch.float32).eval()
    prompts, completions = json.loads(file.read_text())
    head, total, count = lm_head_of(loaded), 0.0, 0
    for start in range(0, len(prompts), 16):
        own, written = prompts[start : start + 16], completions[start : start + 16]
        rollouts = Rollouts(own, written, ["length"] * len(own), [""] * len(own), list(range(len(own))))
        tokens = torch.tensor([token for ids in written for token in ids])
        total -= float(log_probs(head, capture_states(loaded, rollouts, "last").values[0], tokens).double().sum())
        count += len(tokens)
    return math.exp(total / count)
