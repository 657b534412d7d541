"""Run by two_ranks_script.py on two processes: trains every scenario and leaves what each rank ended with."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import oprd.training.parallel
import oprd.training.trainer
from oprd.rollouts.engine import Sampled
from oprd.tasks.task import FunctionGrader, Task
from rank_process import watch
from tiny import PROMPTS, prompt_rows, scripted_generate, tiny_model, tiny_trainer, weights

# name → (settings, what differs in the models); two ranks see twice the prompts of `per_device_train_batch_size`
SCENARIOS = {
    "rollout": ({}, {}),
    "token": ({"reduction": "token"}, {}),
    "tied": ({"positions": "last_k", "position_k": 2, "reduction": "token"}, {"tie_word_embeddings": True}),
    "lower_layers": ({"layers": [1, 2], "activation_checkpointing": True}, {}),
    "composite": (
        {
            "output_space": "reverse_kl",
            "output_weight": 0.5,
            "reduction": "token",
            "positions": "last_k",
            "position_k": 2,
            "diagnostic_steps": 1,
        },
        {"tie_word_embeddings": True},
    ),
    "grpo": (
        {
            "representation_weight": 0.0,
            "policy_gradient_weight": 1.0,
            "task": "addition",
            "num_generations": 4,
            "num_iterations": 2,
            "epsilon": 0.05,
            "diagnostic_steps": 0,
        },
        {},
    ),
    "accumulated": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, {}),
    "uneven": (
        {"num_generations": 4, "micro_batch_tokens": 10},
        {},
    ),  # other numbers of micro-batches and of long rollouts
    "far": (
        {
            "representation_weight": 0.0,
            "output_space": "cross_entropy",
            "lmbda": 0.0,
            "reduction": "token",
            "diagnostic_steps": 0,
        },
        {},
    ),  # the teacher writes in its own tokens; the student lacks some, so that the ranks have other numbers of rollouts
}
COMMON = {
    "rows": [{**row, "answer": "1"} for row in prompt_rows(8)],
    "num_generations": 2, "max_steps": 4, "micro_batch_tokens": 20, "adam_epsilon": 1e-4,
    **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}),
}  # fmt: skip


def trainer_of(name: str, folder, world_size: int, **more):
    settings, model = SCENARIOS[name]
    merged = {"per_device_train_batch_size": 2, **COMMON, **settings, **more}
    if world_size == 1:
        merged["per_device_train_batch_size"] *= 2
    if name == "far":
        merged["teacher_processing_class"] = other_tokenizer()
    trainer = tiny_trainer(folder, tiny_model(**model), tiny_model(seed=1, **model), scripted=True, **merged)
    if name == "far":
        trainer.rollouts.teacher_writer.engine_of().generate = scripted_generate
    if "task" in settings:
        reward_last_tokens(trainer)
    return trainer


def other_tokenizer() -> PreTrainedTokenizerFast:
    """The characters of `tiny_tokenizer` backwards, eight of which it does not have."""
    vocab = ["<pad>", "<bos>", "<eos>", *reversed("0123456789+-*= #abcdefghijklmnopqrABCDEFGH")]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def reward_last_tokens(trainer) -> None:
    """A completion is right when its last id is a multiple of 3; ids stand in for texts."""

    def generate(*arguments, **settings):
        rollouts = scripted_generate(*arguments, **settings).rollouts
        return Sampled(replace(rollouts, texts=[str(ids[-1]) for ids in rollouts.completion_ids]))

    trainer.engine.generate = generate
    trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda response, answer: int(response) % 3 == 0))


def lora_trainer(folder, **more):
    settings = {
        **COMMON,
        "per_device_train_batch_size": 2,
        "peft_config": LoraConfig(task_type="CAUSAL_LM", r=4),
        **more,
    }
    return tiny_trainer(folder, tiny_model(), tiny_model(seed=1), scripted=True, **settings)


def greedy_trainer(folder, world_size: int):
    """Rollouts from the engine, greedy so that they do not depend on which rank draws them; evaluated after two steps."""
    return tiny_trainer(
        folder, tiny_model(), tiny_model(seed=1), temperature=0.0, **{**COMMON, "max_steps": 2, "num_generations": 1},
        per_device_train_batch_size=4 // world_size, eval_dataset=[{"prompt": p} for p in PROMPTS[:3]],
        eval_temperature=0.0, eval_num_generations=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip


def train_all(out: Path, rank: int) -> None:
    """Every scenario on this rank, one of two; results are files in folder `out`."""
    plan, groups = oprd.training.parallel.plan_micro_batches, {}
    started = time.perf_counter()

    def finish(name, trainer):
        save_file(weights(trainer.model), out / f"{name}-{rank}.safetensors")
        print(f"rank {rank}: {name} done, {time.perf_counter() - started:.1f} s after the start", flush=True)
        watch()

    for name in SCENARIOS:
        counts = groups.setdefault(name, [])
        oprd.training.parallel.plan_micro_batches = lambda *a, counts=counts: counts.append(len(plan(*a))) or plan(*a)
        trainer = trainer_of(name, out / name, 2)
        trainer.train(outputs=False)
        finish(name, trainer)
    oprd.training.parallel.plan_micro_batches = plan
    trainer = lora_trainer(out / "lora")
    trainer.train(outputs=False)
    finish("lora", trainer)
    trainer = greedy_trainer(out / "greedy", 2)
    trainer.train(outputs=False)
    finish("greedy", trainer)
    for count in (3, 1):  # one problem for two ranks: one of them has none
        rollouts = trainer.evaluate_model(trainer.model, trainer.eval_dataset[:count]).rollouts
        evaluated = [[*rollouts.prompt_ids], [*rollouts.completion_ids], [*rollouts.rows]]
        (out / f"evaluated-{count}-{rank}.json").write_text(json.dumps(evaluated))
    # sampled rollouts and dropout: saved by two ranks, resumed by two
    # (whether to resume is said here: asking the disk, a slow rank would find what a fast one has just begun)
    for name, steps, resumed in (("whole", 4, False), ("stopped", 2, False), ("stopped", 4, True)):
        trainer = tiny_trainer(
            out / name, tiny_model("gpt2"), tiny_model("gpt2", 1), save_strategy="steps", save_steps=1,
            **{**COMMON, "max_steps": steps, "per_device_train_batch_size": 2},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=True if resumed else None, outputs=False)
        finish(name, trainer)
    (out / f"groups-{rank}.json").write_text(json.dumps(groups))
