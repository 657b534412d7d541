"""The whole method as a short loop in PyTorch, with the functional core of oprd.

    python examples/minimal_loop.py            # embedded pair, about two minutes on one CPU core

`OPRDTrainer` adds schedules, checkpoints, micro-batches, LoRA, mixed precision, several processes, logs.
"""

from __future__ import annotations

import argparse
import random

import torch

from oprd import Sampling, TransformersEngine, capture_states, representation_loss
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tokens import stop_token_ids
from oprd.tasks.task import get_task


def main(steps: int, prompts_per_step: int, learning_rate: float, seed: int, problems: int = 250) -> None:
    """Distil the embedded teacher into the embedded student and print accuracy before and after."""
    torch.set_num_threads(1)
    student = load_model("embedded:tiny/student", dtype=torch.float32)
    teacher = load_model("embedded:tiny/teacher", dtype=torch.float32).eval()
    tokenizer = load_tokenizer("embedded:tiny/student")
    engine = TransformersEngine(tokenizer, stop_token_ids(student, tokenizer))
    sampling = Sampling(max_completion_length=64)
    task = get_task("addition")
    assert task.problems is not None
    train, test = task.problems(4096, seed, "train"), task.problems(problems, seed, "test")
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)

    def sample(rows: list, rollout_seed: int):  # the student writes
        prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
        return engine.generate(student, prompts, num_generations=1, sampling=sampling, seed=rollout_seed).rollouts

    def accuracy() -> float:
        with task.grader() as grader:
            verdicts = grader.grade(sample(test, -1).texts, [str(row.answer) for row in test])
        return sum(verdicts) / len(verdicts)

    print(f"before: {accuracy():.1%}")
    order = random.Random(seed)
    for step in range(1, steps + 1):
        rollouts = sample(order.sample(train, prompts_per_step), step)
        with torch.no_grad():
            target = capture_states(teacher, rollouts, layers="all", positions="all")  # the teacher reads
        student.train()
        states = capture_states(student, rollouts, layers="all", positions="all")  # the student reads
        loss = representation_loss(states.values, target.values, states.rollout_index)  # Eq. 6
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == 1:
            print(f"step {step:>4}: loss {loss.item():.4f}")
    print(f"after:  {accuracy():.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.steps, arguments.prompts_per_step, arguments.learning_rate, arguments.seed)
