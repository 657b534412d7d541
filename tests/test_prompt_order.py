"""Prompts of a step come as often as its rollouts serve, in an order of seed and epoch, and the trainer sees them so."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.data.order import RepeatedSteps
from oprd.tasks.task import FunctionGrader, Task
from tiny import PROMPTS, tiny_trainer


def order(sampler: RepeatedSteps, epoch: int = 0) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**31), st.integers(0, 9))
def test_each_step_is_repeated_and_no_prompt_comes_twice(num_prompts, prompts_a_step, repeats, seed, epoch):
    if num_prompts < prompts_a_step:
        with pytest.raises(
            ValueError, match=f"train_dataset: {num_prompts} prompts do not fill one step of {prompts_a_step}"
        ):
            RepeatedSteps(num_prompts, prompts_a_step, repeats, seed)
        return
    sampler = RepeatedSteps(num_prompts, prompts_a_step, repeats, seed)
    drawn = order(sampler, epoch)
    assert len(drawn) == len(sampler)
    steps = [drawn[i : i + prompts_a_step] for i in range(0, len(drawn), prompts_a_step)]
    groups = [steps[i : i + repeats] for i in range(0, len(steps), repeats)]
    assert len(groups) == num_prompts // prompts_a_step
    assert all(step == group[0] for group in groups for step in group)
    once = [index for group in groups for index in group[0]]
    assert len(set(once)) == len(once)
    assert set(once) <= set(range(num_prompts))
    assert len(once) == num_prompts - num_prompts % prompts_a_step
    assert order(RepeatedSteps(num_prompts, prompts_a_step, repeats, seed), epoch) == drawn


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [order(RepeatedSteps(50, 5, 1, seed), epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(o) for o in orders}) == 9
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert sorted(orders[0]) != orders[0]


def test_over_many_epochs_each_prompt_comes_equally_often():
    """What is left out of an epoch is left out by chance: each of 5 prompts is in 4 of 5 epochs."""
    counts = [0] * 5
    for epoch in range(1000):
        for index in order(RepeatedSteps(5, 2, 1, seed=3), epoch):
            counts[index] += 1
    assert sum(counts) == 4000
    assert all(abs(count - 800) < 5 * (1000 * 0.8 * 0.2) ** 0.5 for count in counts)


def test_repeats_do_not_change_the_order():
    once, thrice = order(RepeatedSteps(9, 3, 1, seed=4), 2), order(RepeatedSteps(9, 3, 3, seed=4), 2)
    assert [thrice[i : i + 3] for i in range(0, 27, 9)] == [once[i : i + 3] for i in range(0, 9, 3)]


@pytest.mark.parametrize("data_seed", [None, 11])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_sees_each_steps_prompts_as_often_as_it_updates(tmp_path, accumulation, data_seed):
    trainer = tiny_trainer(
        tmp_path, scripted=True, rows=[{"prompt": prompt, "answer": "1"} for prompt in PROMPTS[:5]],
        per_device_train_batch_size=2 // accumulation, gradient_accumulation_steps=accumulation, max_steps=12,
        num_iterations=3, num_generations=2, policy_gradient_weight=1.0, task="addition", seed=7, data_seed=data_seed,
        diagnostic_steps=0,
    )  # fmt: skip
    trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda response, answer: True))
    seen, rollouts, sampled = [], [], []
    take, generate = trainer.rollouts.take, trainer.engine.generate

    def recorded(prompts, *arguments):
        seen.extend(prompt.index for prompt in prompts)
        batch = take(prompts, *arguments)
        rollouts.append(batch.rollouts)
        return batch

    trainer.rollouts.take = recorded
    trainer.engine.generate = lambda *a, **k: sampled.append(k["rows"]) or generate(*a, **k)
    trainer.train()
    sampler = RepeatedSteps(5, 2, 3, 7 if data_seed is None else data_seed)
    assert seen == order(sampler, 0) + order(sampler, 1)
    assert seen[:12] != seen[12:]
    # new rollouts every third step, of that step's prompts; between, the very same ones
    assert [index for rows in sampled for index in rows] == [i for k in range(0, 24, 6) for i in seen[k : k + 2]]
    steps = [rollouts[i : i + accumulation] for i in range(0, len(rollouts), accumulation)]
    same = [all(a is b for a, b in zip(one, two, strict=True)) for one, two in pairwise(steps)]
    assert same == [step % 3 != 0 for step in range(1, 12)]


def test_prompts_that_do_not_fill_a_step_are_refused(tmp_path):
    trainer = tiny_trainer(
        tmp_path, scripted=True, rows=[{"prompt": "1", "answer": "1"}] * 3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, num_iterations=2, num_generations=2, policy_gradient_weight=1.0, task="addition",
        max_steps=2,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"train_dataset: 3 prompts do not fill one step of 4 \(per_device_train_batch_size"
    ):
        trainer.train()
