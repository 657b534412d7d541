"""How far a model's next-token distributions are from its original's, on text of either."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from evidence.e15_recovery.perplexity import write_text
from oprd import Rollouts, capture_states, lm_head_of, log_probs
from oprd.models.lm_head import Divergence, divergence
from oprd.models.loading import load_model

ROWS = 16


def distances(
    model: Path, original: Path, prompts: Path, text: Path, own: str, limit: int, tokens: int
) -> dict[str, float]:
    """Distances of a model from its original over held-out prompts, in nats a token; 0 where the two are the same.

    Args:
        model: the recovered model.
        original: the model that it is compared with.
        prompts: file of the held-out prompts.
        text: file with the original's completions of them.
        own: name of the file for the model's own completions of them, which are written at temperature 1.
        limit: how many prompts.
        tokens: most tokens of a completion.

    Returns:
        forward_kl: mean KL(original ‖ model) at the tokens of `text`. reverse_kl: mean KL(model ‖ original) at the tokens of `own`.
        perplexity: the model's, of `text`.
    """
    write_text(str(model), str(prompts), Path(own), limit=limit, tokens=tokens, seed=0)
    models = [load_model(str(folder), dtype=torch.float32).eval() for folder in (model, original)]
    forward, nll = _mean_divergence(models, text, "forward_kl")
    reverse, _ = _mean_divergence(models, Path(own), "reverse_kl")
    return {"forward_kl": forward, "reverse_kl": reverse, "perplexity": math.exp(nll)}


@torch.no_grad()
def _mean_divergence(models: list[torch.nn.Module], file: Path, kind: Divergence) -> tuple[float, float]:
    """Means over the tokens of the completions in `file`: the divergence of the two models, and the first one's negative log-likelihood."""
    prompts, completions = json.loads(file.read_text())
    heads, total, nll, count = [lm_head_of(model) for model in models], 0.0, 0.0, 0
    for start in range(0, len(prompts), ROWS):
        own, written = prompts[start : start + ROWS], completions[start : start + ROWS]
        rollouts = Rollouts(own, written, ["length"] * len(own), [""] * len(own), list(range(len(own))))
        first, second = (capture_states(model, rollouts, "last").values[0] for model in models)
        tokens = torch.tensor([token for ids in written for token in ids])
        total += float(divergence(heads[0], first, heads[1], second, kind).double().sum())
        nll -= float(log_probs(heads[0], first, tokens).double().sum())
        count += len(tokens)
    return total / count, nll / count
