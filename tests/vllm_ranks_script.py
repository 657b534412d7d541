"""Run by test_vllm_server_ranks.py on two processes: both sample by the servers that FOLDER/urls.json names.

    RANK=… LOCAL_RANK=… WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 python vllm_ranks_script.py FOLDER

Guards against hanging, and the way it ends, are in rank_process.py, which says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fake_vllm import total_of_weights
from oprd.models.sharding import shard_model, whole
from oprd.rollouts.engine import Sampling
from oprd.rollouts.vllm.server import VLLMServerEngine
from rank_process import join, run_and_leave, watch
from tiny import WIDE, prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer

PROMPTS = {0: [[5, 6, 7], [8], [30, 31, 32, 33, 34]], 1: [[40, 41]]}  # of each rank
STEPS = 3


def engine_for(url: str, folder, **settings) -> VLLMServerEngine:
    settings = {"wait": 20, "timeout": 20, **settings}
    return VLLMServerEngine(tiny_tokenizer(), [3], 2, weights_dir=str(folder), base_url=url, **settings)


def sample(engine, model, rank: int) -> list[list[int]]:
    """What a rank asks for, in one process or in two."""
    sampling = Sampling(6)
    sampled = engine.generate(model, PROMPTS[rank], num_generations=2, sampling=sampling, seed=10 + rank)
    return list(sampled.rollouts.completion_ids)


@torch.no_grad()
def update(model) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.013)


def total_of(model) -> int:
    """What FakeVLLM keeps of the weights that it was sent."""
    return total_of_weights(whole(tensor.detach()).numpy() for tensor in model.state_dict().values())


def steps(engine, model, rank: int) -> dict:
    """Sampled, updated, sampled, …"""
    completions, totals = [], []
    for _ in range(STEPS):
        completions.append(sample(engine, model, rank))
        totals.append(total_of(model))
        update(model)
    return {"completions": completions, "totals": totals, "pushes": engine.requests.pushes}


def trained(url: str, out: Path) -> dict:
    trainer = tiny_trainer(
        out / "trained", tiny_model(), tiny_model(seed=1), rollout_engine="vllm_server", ddp_backend="gloo",
        rollout_engine_kwargs={"weights_dir": str(out / "weights-trained"), "base_url": url, "wait": 20},
        rows=prompt_rows(8), per_device_train_batch_size=2, max_steps=STEPS,
    )  # fmt: skip
    generate, totals, completions = trainer.engine.generate, [], []

    def watched(model, *arguments, **settings):
        totals.append(total_of(model))
        sampled = generate(model, *arguments, **settings)
        completions.append([*sampled.rollouts.completion_ids])
        return sampled

    trainer.engine.generate = watched
    trainer.train(outputs=False)
    return {
        "totals": totals,
        "completions": completions,
        "after": total_of(trainer.model),
        "step": trainer.state.global_step,
    }


def scenario(name: str, url: str, out: Path, rank: int) -> dict:
    if name == "trained":
        return trained(url, out)
    settings = {"absent": {"wait": 0.3}, "fails": {"wait": 0.3}, "real": {"timeout": 60}}.get(name, {"retries": 1})
    engine = engine_for(url, out / f"weights-{name}", **settings)
    model = tiny_model(tie_word_embeddings=name == "sharded")
    if name == "sharded":
        shard_model(model)
    if name == "real":
        model = tiny_model(**WIDE)
    if name in ("steps", "sharded", "real"):
        return steps(engine, model, rank)
    try:
        return {"completions": [sample(engine, model, rank)], "pushes": engine.requests.pushes}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main(out: Path) -> None:
    rank = join(out)
    for name, url in json.loads((out / "urls.json").read_text()).items():
        found = scenario(name, url, out, rank)
        (out / f"{name}-{rank}.json").write_text(json.dumps(found))
        print(f"rank {rank}: {name} done", flush=True)
        watch()


if __name__ == "__main__":
    run_and_leave(main)
