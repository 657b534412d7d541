"""Run by two_ranks_script.py on two processes: settings that are rarely combined, which once failed with several processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from oprd.tasks.task import FunctionGrader, Task
from rank_process import watch
from tiny import PROMPTS, prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer

BEST_AT = 1
COMMON = {"ddp_backend": "gloo", "max_completion_length": 4, "diagnostic_steps": 0}


def best_trainer(folder: Path, **more):
    """Only the weights of step `BEST_AT` are right, and those of the last step are not the model's at the end."""
    trainer = tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), rows=prompt_rows(6), per_device_train_batch_size=1, max_steps=3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, task="addition",
        metric_for_best_model="eval_avg_at_k", eval_num_generations=1,
        eval_dataset=[{"prompt": p, "answer": "1"} for p in PROMPTS[:2]],
        **COMMON, **more,
    )  # fmt: skip
    trainer.grading.task = Task("x", "", lambda: FunctionGrader(lambda r, a: trainer.state.global_step == BEST_AT))
    return trainer


def skipping_trainer(folder: Path, rank: int):
    """Two batches a step; on rank 0 the teacher's states are not finite in the first step."""
    trainer = tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), rows=prompt_rows(8), per_device_train_batch_size=1, max_steps=2,
        gradient_accumulation_steps=2, fully_shard=True, nan_policy="skip", **COMMON,
    )  # fmt: skip
    if rank == 0:
        trainer.pair.teacher.model.model.norm.register_forward_hook(
            lambda _, __, states: states * (float("nan") if trainer.state.global_step == 0 else 1.0)
        )
    return trainer


def mixed_trainer(folder: Path, rank: int):
    """Prompts as text and as messages in turn, so that a rank may have no conversation; the template ends a turn with `<bos>`."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<bos>{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    rows = [{"prompt": f"{i}+1="} if i % 2 else {"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(8)]
    return tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), rows=rows, per_device_train_batch_size=1, max_steps=4,
        processing_class=tokenizer, **COMMON,
    )  # fmt: skip


def train_all(out: Path, rank: int) -> None:
    """Every scenario on this rank, one of two; results are files in folder `out`."""

    def finish(name, trainer):
        whole = {
            n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for n, p in trainer.model.named_parameters()
        }
        save_file(whole, out / f"{name}-{rank}.safetensors")
        best = trainer.state.best_model_checkpoint
        (out / f"{name}-{rank}.json").write_text(
            json.dumps({"best": best and Path(best).name, "step": trainer.state.global_step})
        )
        watch()

    for name, more in (("best", {}), ("best_sharded", {"fully_shard": True})):
        trainer = best_trainer(out / name, **more)
        trainer.train(outputs=False)
        finish(name, trainer)
    for name, make in (("skipping", skipping_trainer), ("mixed", mixed_trainer)):
        trainer = make(out / name, rank)
        trainer.train(outputs=False)
        finish(name, trainer)
    assert torch.distributed.is_initialized()
