"""Run by two_ranks_script.py on two processes: student and teacher sharded by torch's `fully_shard`, gloo on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import oprd.training.parallel
import oprd.training.trainer
from ddp_script import trainer_of
from oprd.models.architecture import blocks, num_layers
from oprd.models.sharding import shard_model
from oprd.states.capture import install_state_forward, read_through_forward
from oprd.states.layers import resolve_layers
from oprd.states.requests import request_states
from rank_process import watch
from tiny import PROMPTS, random_rollouts, tiny_model, tiny_trainer

SCENARIOS = ("rollout", "lower_layers", "composite", "grpo", "accumulated", "uneven")  # of ddp_script.py
STEPS = 2
READS = {
    "all": ({}, "all"),
    "low": ({}, [1, 2]),
    "tied": ({"tie_word_embeddings": True}, "last"),
    "gpt2": ({"family": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, [1]),
}


def read_gradients(name: str, shard: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Sums of squares of each layer's states on two sets of rollouts and the gradients they leave, through the model's forward."""
    settings, layers = READS[name]
    model = tiny_model(**settings)
    install_state_forward(model)
    if shard:
        shard_model(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    losses = []
    for seed in (0, 1):
        request = request_states(random_rollouts(seed), resolve_layers(layers, num_layers(model)))
        with torch.no_grad():
            before = read_through_forward(model, request, lambda _, states_ND: states_ND.square().mean())
        values = read_through_forward(model, request, lambda _, states_ND: states_ND.square().mean())
        assert torch.equal(torch.stack(before), torch.stack(values).detach())
        # also where the forward was left early, all have given their weights back
        assert not shard or all(isinstance(p, DTensor) for p in model.parameters())
        torch.stack(values).sum().backward()
        losses += [value.detach() for value in values]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return losses, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def sharded_trainer(name: str, folder, **more):
    """A scenario of ddp_script.py with both models sharded."""
    trainer = trainer_of(name, folder, 2, fully_shard=True, **{"max_steps": STEPS, **more})
    for model in (trainer.model, trainer.pair.teacher.model):
        assert isinstance(model, FSDPModule)
        assert all(isinstance(block, FSDPModule) for block in blocks(model))
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    return trainer


def sampled_trainer(folder, **more):
    """Rollouts from the engine: ranks stop at different lengths and have different numbers of batches."""
    settings = {
        "rows": [{"prompt": p} for p in PROMPTS[:6]], "per_device_train_batch_size": 3, "num_generations": 2,
        "generation_batch_size": 2, "max_steps": 1, "max_completion_length": 12, "ddp_backend": "gloo",
        "fully_shard": True, "eval_dataset": [{"prompt": p} for p in PROMPTS[:3]], "eval_num_generations": 3,
        "eval_strategy": "steps", "eval_steps": 1, **more,
    }  # fmt: skip
    ends = {"eos_token_id": [2, *range(30, 45)]}  # so many that all completions of a rank end before the limit
    return tiny_trainer(folder, tiny_model(**ends), tiny_model(seed=1, **ends), **settings)


def train_all(out: Path, rank: int) -> None:
    """Every scenario on this rank, one of two; results are files in folder `out`."""
    started = time.perf_counter()

    def finish(name, tensors):
        save_file({n: t.detach().clone() for n, t in tensors.items()}, out / f"{name}-{rank}.safetensors")
        print(f"rank {rank}: {name} done, {time.perf_counter() - started:.1f} s after the start", flush=True)
        watch()

    for name in READS:
        losses, gradients = read_gradients(name, shard=True)
        finish(f"read-{name}", {"losses": torch.stack(losses), **gradients})
    plan, groups = oprd.training.parallel.plan_micro_batches, {}
    for name in SCENARIOS:
        counts = groups.setdefault(name, [])
        oprd.training.parallel.plan_micro_batches = lambda *a, counts=counts: counts.append(len(plan(*a))) or plan(*a)
        trainer = sharded_trainer(name, out / name)
        trainer.train(outputs=False)
        finish(name, {n: p.full_tensor() for n, p in trainer.model.named_parameters()})
    oprd.training.parallel.plan_micro_batches = plan
    for steps, resumed in ((2, False), (3, True)):  # saved by two ranks, resumed by two, and by one in the test
        trainer = sharded_trainer("tied", out / "saved", max_steps=steps, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=True if resumed else None, outputs=False)
        finish(f"saved-{steps}", {n: p.full_tensor() for n, p in trainer.model.named_parameters()})
    trainer = sampled_trainer(out / "sampled")
    trainer.train(outputs=False)
    finish("sampled", {n: p.full_tensor() for n, p in trainer.model.named_parameters()})
    (out / f"sampled-lengths-{rank}.json").write_text(json.dumps(trainer.last_step.rollouts.completion_lengths))
    (out / f"groups-{rank}.json").write_text(json.dumps(groups))
