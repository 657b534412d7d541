"""The gradients of TRL's full reverse KL and of oprd's on the same eight rollouts: `python -m evidence.e24_trl_real_model.one_batch`.

One step of SGD at rate 1, without clipping, changes the weights by the gradient. TRL samples, and oprd trains on these rollouts. It
needs E11's models, and writes one_batch.json here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer

from evidence.e13_trl.claim import Plan, arguments_of
from evidence.e13_trl.train import TRAINERS, CpuClock, models, resolved_run
from evidence.e24_trl_real_model.claim import PAIR
from oprd.rollouts.engine import Sampled, to_rollouts

SGD = {
    "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant",
}  # fmt: skip
SMALL = {"max_steps": 1, "per_device_train_batch_size": 8, "train_limit": 8, "eval_limit": 2, "diagnostic_steps": 0}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"bf16": False, "teacher_model_init_kwargs": {"dtype": "float32"}, "rollout_engine_kwargs": {}},
    "bfloat16 products": {},
}


def compare(precision: Mapping[str, Any]) -> dict[str, float]:
    """Cosine of the two gradients over all weights, and their norms."""
    import trl

    recipe = {**arguments_of(Plan("full_reverse_kl", 1.0, 0), PAIR, quick=False)[0], **SMALL, **SGD, **precision}
    written: dict[tuple[int, ...], list[int]] = {}
    sample = trl.DistillationTrainer._generate_single_turn

    def remember(trainer: Any, prompt_ids: Any, *arguments: Any, **settings: Any) -> Any:
        found = sample(trainer, prompt_ids, *arguments, **settings)
        written.update((tuple(prompt), list(ids)) for prompt, ids in zip(prompt_ids, found, strict=True))
        return found

    with tempfile.TemporaryDirectory() as folder:
        run = resolved_run(recipe, folder)
        start = {name: weight.detach().clone() for name, weight in models(run)[0].named_parameters()}
        with patch.object(trl.DistillationTrainer, "_generate_single_turn", remember):
            theirs = TRAINERS["distillation"](run, SGD, CpuClock())[0]

    def repeat(model: Any, prompt_ids: Any, *, rows: Any, **settings: Any) -> Sampled:
        ids = [[*prompt] for prompt in prompt_ids]  # those of the layout probe are no training prompts
        answers = [written.get(tuple(prompt), [run.engine.stop_token_ids[0]]) for prompt in ids]
        return Sampled(to_rollouts(ids, answers, [*rows], run.pair.tokenizer, run.engine.stop_token_ids))

    with tempfile.TemporaryDirectory() as folder:
        run = resolved_run(recipe, folder)
        with patch.object(run.engine, "generate", repeat):
            ours = TRAINERS["oprd"](run, {}, CpuClock())[0]
    one, other = (_change(start, model) for model in (theirs, ours))
    return {
        "cosine": float(torch.dot(one, other) / one.norm() / other.norm()),
        "norm_trl": float(one.norm()),
        "norm_oprd": float(other.norm()),
        "tokens": sum(map(len, written.values())),
    }


def _change(start: Mapping[str, torch.Tensor], model: Any) -> torch.Tensor:
    return torch.cat([(start[name] - weight.detach()).flatten().double() for name, weight in model.named_parameters()])


def main() -> None:
    """Compare in both precisions."""
    found = {name: compare(precision) for name, precision in PRECISIONS.items()}
    Path(__file__).with_name("one_batch.json").write_text(json.dumps(found, indent=1) + "\n")
    typer.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
