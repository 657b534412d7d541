"""Output-space, policy-gradient and composite runs equal plain PyTorch with every logit in memory, and log what they should."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import GenerationConfig, TrainerCallback

from oprd.config import OPRDConfig
from oprd.resolve import build_terms
from oprd.rollouts.engine import Sampled, Sampling
from oprd.rollouts.transformers_engine import TransformersEngine
from oprd.run_config import RunConfig
from oprd.tasks.task import FunctionGrader, Task
from oprd.types import Rollouts
from reference import DenseObjective
from tiny import (
    PROMPTS,
    prompt_rows,
    scripted_generate,
    tiny_model,
    tiny_tokenizer,
    tiny_trainer,
    weights,
    without_times,
)

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_epsilon": 1e-4, "max_grad_norm": 0.2}
OUTPUT = {"representation_weight": 0.0, "diagnostic_steps": 0}
GRPO = {
    "representation_weight": 0.0, "policy_gradient_weight": 1.0, "num_generations": 4, "task": "addition", "diagnostic_steps": 0,
}  # fmt: skip


def reward(completion) -> float:
    """Stands in for a verdict: about half of the completions are right, and the completions of some prompts are alike."""
    return float(completion[-1] % 3 == 0)


class TokenGrader(FunctionGrader):
    """Grades the ids that `record` writes into the texts."""

    def __init__(self) -> None:
        super().__init__(lambda response, answer: bool(reward(json.loads(response))))


def record(trainer, *, last_tokens=(), by_seed: bool = False) -> list[Rollouts]:
    """Script a trainer's completions, and collect them.

    Args:
        last_tokens: stand in the last place of the completions in turn; 0 leaves the place alone.
        by_seed: completions depend on the seed that the engine is given too.
    """
    seen: list[Rollouts] = []

    def generate(model, prompt_ids, *, seed, **settings):
        rollouts = scripted_generate(model, prompt_ids, seed=seed, **settings).rollouts
        shift = seed % 37 if by_seed else 0
        completions = [[3 + (token - 3 + shift) % 42 for token in c] for c in rollouts.completion_ids]
        for index, completion in enumerate(completions):
            if last_tokens and last_tokens[index % len(last_tokens)]:
                completion[-1] = last_tokens[index % len(last_tokens)]
        seen.append(replace(rollouts, completion_ids=completions, texts=[json.dumps(c) for c in completions]))
        return Sampled(seen[-1])

    trainer.engine.generate = generate
    if trainer.task is not None:
        trainer.grading.task = Task("fake", "", TokenGrader)
    return seen


def assert_same(one: dict, other: dict, atol: float = 2e-6) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def moved(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def answered_rows(count: int = 4) -> list[dict[str, str]]:
    return [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS[:count]]


def check_against_plain_pytorch(
    folder, objective: DenseObjective, step_weights: list[dict[str, float]], *, student=None, teacher=None, per_step: int = 1,
    repeats: int = 1, recording=None, adam=ADAM, unlike: tuple[str, ...] = (), **settings,
):  # fmt: skip
    """Train, train by hand on the same rollouts, and compare weights and metrics.

    Args:
        step_weights: by hand, the weight of each term at each step.
        per_step: calls of the engine a step (gradient accumulation).
        repeats: steps on the same rollouts.
        unlike: metrics not to compare.
    """
    student, teacher = student or tiny_model(), teacher or tiny_model(seed=1)
    defaults = {"max_steps": len(step_weights), "num_generations": 2, "micro_batch_tokens": 30, "rows": answered_rows()}
    trainer = tiny_trainer(folder, student, teacher, **{**defaults, **adam, **settings})
    trainer.pair.teacher.states = counted = CountedCalls(trainer.pair.teacher.states)
    start = weights(trainer.model)
    plain, plain_teacher = copy.deepcopy(trainer.model), copy.deepcopy(teacher)
    seen = record(trainer, **(recording or {}))
    trainer.train()
    assert len(seen) == len(step_weights) * per_step // repeats
    steps = [Rollouts.concatenate(seen[i : i + per_step]) for i in range(0, len(seen), per_step)]
    batches = [rollouts for rollouts in steps for _ in range(repeats)]
    rows = objective.train(plain, plain_teacher, list(zip(batches, step_weights, strict=True)), **adam)
    assert_same(weights(trainer.model), weights(plain))
    assert moved(weights(plain), start) > 1e-4
    logged = trainer.run_folder.read_metrics()
    assert [row["step"] for row in logged] == [*range(1, len(step_weights) + 1)]
    for row, expected in zip(logged, rows, strict=True):
        for name, value in ((n, v) for n, v in expected.items() if n not in unlike):
            assert row[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
        assert {name for name in row if name.startswith("loss")} == {n for n in expected if n.startswith("loss")}
    trainer.counted = counted
    return trainer, logged, start


class CountedCalls:
    def __init__(self, function) -> None:
        self.function, self.count = function, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.function(*args, **kwargs)


TOP_K = {"output_top_k": 6}
KINDS = [
    ({"output_space": "reverse_kl"}, {}),
    ({"output_space": "forward_kl"}, {}),
    ({"output_space": "jsd", "output_beta": 0.3}, {"beta": 0.3}),
    ({"output_space": "sampled_token"}, {}),
    ({"output_space": "sampled_token", "output_baseline": True}, {"baseline": True}),
    *(
        ({"output_space": kind, "output_support": support, **TOP_K}, {"support": support, "k": 6})
        for kind in ("top_k", "top_k_forward_kl")
        for support in ("student", "teacher", "union", "intersection")
    ),
    ({"output_space": "tail_sampled", **TOP_K}, {"k": 6}),
    ({"output_space": "tail_sampled", "output_support": "teacher", **TOP_K}, {"support": "teacher", "k": 6}),
]


@pytest.mark.parametrize(("settings", "dense"), KINDS, ids=lambda x: "-".join(map(str, x.values())) or "-")
def test_two_steps_of_each_output_space_loss_equal_plain_pytorch(tmp_path, settings, dense):
    trainer, logged, _ = check_against_plain_pytorch(
        tmp_path,
        DenseObjective(kind=settings["output_space"], **dense),
        [{"output_space": 1.0}] * 2,
        **OUTPUT,
        **settings,
    )
    assert "cosine" not in logged[0]
    assert "loss/representation" not in logged[0]
    assert trainer.model.lm_head.weight.requires_grad  # untied, and trained


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [1, pytest.param(16384, marks=pytest.mark.further)])
@pytest.mark.parametrize("reduction", ["rollout", "token"])
def test_neither_the_micro_batches_nor_a_tied_head_matter(tmp_path, reduction, micro_batch_tokens, tied):
    trainer, logged, start = check_against_plain_pytorch(
        tmp_path,
        DenseObjective(kind="reverse_kl", reduction=reduction, temperature=0.7),
        [{"output_space": 2.5}] * 2,
        student=tiny_model(tie_word_embeddings=tied),
        teacher=tiny_model(seed=1, tie_word_embeddings=tied),
        micro_batch_tokens=micro_batch_tokens,
        reduction=reduction,
        output_space="reverse_kl",
        output_weight=2.5,
        output_temperature=0.7,
        **OUTPUT,
    )
    assert logged[0]["micro_batches"] == (8 if micro_batch_tokens == 1 else 1)
    head = trainer.model.get_output_embeddings().weight
    assert (head is trainer.model.get_input_embeddings().weight) is tied
    assert head.requires_grad
    if not tied:
        assert not torch.equal(head[:45], start["lm_head.weight"][:45])


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, False),
        ({"layers": [1], "diagnostic_steps": 1}, False),
        ({"output_space": "jsd"}, True),
        ({"output_space": "jsd", "output_weight": 0.0}, False),
        ({"layers": [1], "output_space": "jsd"}, True),
        (GRPO, True),
    ],
    ids=str,
)
def test_an_untied_head_is_trained_where_the_loss_reaches_it(tmp_path, settings, trained):
    model = tiny_trainer(tmp_path, scripted=True, rows=answered_rows(), **settings).model
    assert model.lm_head.weight.requires_grad is trained
    top = model.model.layers[2].mlp.down_proj.weight.requires_grad
    assert top is (trained or "layers" not in settings)


def test_the_output_temperature_is_the_samplings_unless_it_is_set(tmp_path):
    check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="sampled_token", temperature=1.7), [{"output_space": 1.0}],
        output_space="sampled_token", temperature=1.7, **OUTPUT,
    )  # fmt: skip


COMPOSITES = {
    "constant": (
        {"representation_weight": 3.0, "output_weight": 0.5, "reduction": "token"},
        [{"representation": 3.0, "output_space": 0.5}] * 3,
    ),
    "linear": (
        {
            "representation_weight": {"schedule": "linear", "start": 2.0, "end": 1.0, "steps": 2},
            "output_weight": {"schedule": "cosine", "start": 0.0, "end": 0.8, "steps": 4},
        },
        [
            {"representation": 2.0, "output_space": 0.0},
            {"representation": 1.5, "output_space": 0.8 * (2 - 2**0.5) / 4},
            {"representation": 1.0, "output_space": 0.4},
        ],
    ),
    "crossfade": (
        {"representation_weight": 2.0, "crossfade_steps": 2},
        [
            {"representation": 2.0, "output_space": 0.0},
            {"representation": 1.0, "output_space": 0.5},
            {"representation": 0.0, "output_space": 1.0},
        ],
    ),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_equals_plain_pytorch(tmp_path, name):
    """The representation at the last two positions of layers 1 and 3, the output space at all positions."""
    settings, by_hand = COMPOSITES[name]
    _, logged, _ = check_against_plain_pytorch(
        tmp_path,
        DenseObjective(
            kind="forward_kl", layers=(1, 3), positions=lambda n: range(n)[-2:],
            reduction=settings.get("reduction", "rollout"),
        ),
        by_hand, output_space="forward_kl", layers="odd", positions="last_k", position_k=2, diagnostic_steps=0, **settings,
    )  # fmt: skip
    for row, weight in zip(logged, by_hand, strict=True):
        total = sum(value * row[f"loss/{term}"] for term, value in weight.items())
        assert row["loss"] == pytest.approx(total, rel=1e-6)
    assert "cosine/layer_01" in logged[0]
    assert "cosine/layer_02" not in logged[0]


def test_lower_layers_do_not_cut_off_the_head(tmp_path):
    check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="reverse_kl", layers=(1,)), [{"representation": 1.0, "output_space": 1.0}] * 2,
        layers=[1], output_space="reverse_kl", diagnostic_steps=0,
    )  # fmt: skip


def test_accumulated_batches_are_one_step(tmp_path):
    """Six prompts as 4 + 2."""
    check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="reverse_kl"), [{"representation": 1.0, "output_space": 1.0}] * 2,
        per_step=2, rows=prompt_rows(6), gradient_accumulation_steps=2, output_space="reverse_kl", diagnostic_steps=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({}, {}),
        ({"reduction": "token", "scale_rewards": "none"}, {"reduction": "token", "scale": "none"}),
        ({"temperature": 1.5, "micro_batch_tokens": 1}, {"sampling_temperature": 1.5}),
    ],
    ids=["defaults", "token", "temperature"],
)
def test_grpo_equals_plain_pytorch_and_does_not_ask_the_teacher(tmp_path, settings, dense):
    trainer, logged, _ = check_against_plain_pytorch(
        tmp_path,
        DenseObjective(reward=reward, group=4, **dense),
        [{"policy_gradient": 1.0}] * 2,
        **{**GRPO, **settings},
    )
    assert trainer.counted.count == 0
    assert 0 < logged[0]["frac_reward_zero_std"] < 1  # both kinds of groups were there
    assert logged[0]["clip_ratio"] == 0.0
    assert 0 < logged[0]["accuracy"] < 1


def test_the_teacher_is_asked_on_measuring_steps_alone(tmp_path):
    trainer, logged, _ = check_against_plain_pytorch(
        tmp_path, DenseObjective(reward=reward, group=4), [{"policy_gradient": 1.0}] * 3,
        **{**GRPO, "diagnostic_steps": 2, "micro_batch_tokens": 16384},
    )  # fmt: skip
    assert trainer.counted.count == 2
    assert ["overlap" in row for row in logged] == [True, False, True]


@pytest.mark.parametrize("reduction", ["rollout", "token"])
def test_all_three_terms_together_equal_plain_pytorch(tmp_path, reduction):
    """The first is at the last two positions only, the others are at all of them."""
    schedule = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 1}
    check_against_plain_pytorch(
        tmp_path,
        DenseObjective(
            kind="sampled_token", reward=reward, group=4, reduction=reduction, positions=lambda n: range(n)[-2:]
        ),
        [{"representation": 0.5, "output_space": 0.25, "policy_gradient": w} for w in (0.0, 1.0)],
        **{**GRPO, "representation_weight": 0.5, "output_space": "sampled_token", "output_weight": 0.25, "reduction": reduction,
           "policy_gradient_weight": schedule, "positions": "last_k", "position_k": 2},
    )  # fmt: skip


def test_a_crossfade_leaves_the_policy_gradient_alone(tmp_path):
    """Whose value is 0, a ratio of 1 times centred advantages: its weight shows in the gradient's norm and in the weights."""
    by_hand = [
        {"representation": 2.0, "output_space": 0.0, "policy_gradient": 0.5},
        {"representation": 1.0, "output_space": 0.25, "policy_gradient": 0.5},
        {"representation": 0.0, "output_space": 0.5, "policy_gradient": 0.5},
    ]
    _, logged, _ = check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="forward_kl", reward=reward, group=4), by_hand,
        **{**GRPO, "representation_weight": 2.0, "output_space": "forward_kl", "output_weight": 0.5, "crossfade_steps": 2,
           "policy_gradient_weight": 0.5},
    )  # fmt: skip
    for row, weight in zip(logged, by_hand, strict=True):
        assert row["loss"] == pytest.approx(sum(w * row[f"loss/{term}"] for term, w in weight.items()), rel=1e-6)


@pytest.mark.parametrize(("updates", "epsilon_high"), [(2, None), (3, 0.2)])
def test_several_updates_on_the_same_rollouts_are_clipped_against_the_policy_that_wrote_them(
    tmp_path, updates, epsilon_high
):
    adam = {**ADAM, "learning_rate": 2e-2, "max_grad_norm": 1.0}
    _, logged, _ = check_against_plain_pytorch(
        tmp_path, DenseObjective(reward=reward, group=4, epsilon=0.05, epsilon_high=epsilon_high),
        [{"policy_gradient": 1.0}] * 2 * updates, repeats=updates, recording={"by_seed": True}, adam=adam,
        **{**GRPO, "num_iterations": updates, "epsilon": 0.05, "epsilon_high": epsilon_high, "rows": answered_rows(8)},
    )  # fmt: skip
    for first in (0, updates):
        clipped, *later = (row["clip_ratio"] for row in logged[first : first + updates])
        assert clipped == 0.0
        assert min(later) > 0.05
    for column in ("tokens", "accuracy"):
        values = [row[column] for row in logged]
        assert values == [values[0]] * updates + [values[-1]] * updates
    assert logged[0]["tokens"] != logged[-1]["tokens"]


def test_clipping_is_counted_over_all_tokens_whichever_positions_the_other_terms_have(tmp_path):
    """Three counts that differ: the last two states of a rollout, its first three distributions, and all of its tokens."""
    _, logged, _ = check_against_plain_pytorch(
        tmp_path,
        DenseObjective(
            kind="reverse_kl", reward=reward, group=4, epsilon=0.05,
            positions=lambda n: range(n)[-2:], output_positions=lambda n: range(n)[:3],
        ),
        [{"representation": 0.5, "output_space": 0.25, "policy_gradient": 1.0}] * 2, repeats=2,
        adam={**ADAM, "learning_rate": 2e-2, "max_grad_norm": 1.0},
        **{**GRPO, "num_iterations": 2, "epsilon": 0.05, "representation_weight": 0.5, "output_space": "reverse_kl",
           "output_weight": 0.25, "positions": "last_k", "position_k": 2,
           "output_positions": "first_k", "output_position_k": 3},
    )  # fmt: skip
    assert logged[0]["clip_ratio"] == 0.0
    assert logged[1]["clip_ratio"] > 0.05  # equal to the reference's, as all that is logged


def test_accumulated_batches_are_kept_for_the_second_update(tmp_path):
    """The clip ratio is a token mean of each batch, then a mean over batches, and so not the token mean of the step."""
    check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="reverse_kl", reward=reward, group=4, epsilon=0.05),
        [{"output_space": 0.1, "policy_gradient": 1.0}] * 4, per_step=2, repeats=2, recording={"by_seed": True},
        adam={**ADAM, "learning_rate": 1e-2}, unlike=("clip_ratio",),
        **{**GRPO, "num_iterations": 2, "epsilon": 0.05, "rows": answered_rows(9), "per_device_train_batch_size": 2,
           "gradient_accumulation_steps": 2, "output_space": "reverse_kl", "output_weight": 0.1},
    )  # fmt: skip


# Vocabularies


def test_padding_rows_do_not_count_and_get_no_gradient(tmp_path):
    student, teacher = tiny_model(), tiny_model(seed=1, vocab_size=72)
    with torch.no_grad():
        student.lm_head.weight[45:] *= 40  # would take nearly all of the probability
        teacher.lm_head.weight[45:] *= 40
    trainer, _, start = check_against_plain_pytorch(
        tmp_path, DenseObjective(kind="jsd", reward=reward, group=2),
        [{"representation": 1.0, "output_space": 1.0, "policy_gradient": 1.0}] * 2, student=student, teacher=teacher,
        teacher_processing_class=tiny_tokenizer(), output_space="jsd", policy_gradient_weight=1.0, task="addition",
        adam={**ADAM, "weight_decay": 0.0},
    )  # fmt: skip
    now = trainer.model.lm_head.weight
    assert torch.equal(now[45:], start["lm_head.weight"][45:])
    assert not torch.equal(now[:45], start["lm_head.weight"][:45])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_never_samples_a_padding_id(temperature):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[45:] *= 40
    ids = []
    for extra in ("", "ABCDEFGHIJKLMNOPQRS"):  # with 19 letters more, all 64 rows are tokens
        engine = TransformersEngine(tiny_tokenizer(extra), [2])
        rollouts = engine.generate(
            model, [[5, 6], [9]], num_generations=20, sampling=Sampling(8, temperature=temperature), seed=0
        ).rollouts
        ids.append([token for completion in rollouts.completion_ids for token in completion])
    assert max(ids[0]) < 45
    assert sum(token >= 45 for token in ids[1]) > len(ids[1]) / 2


def test_what_ends_a_text_for_either_model_ends_rollouts_and_is_one_event(tmp_path):
    student, teacher = tiny_model(), tiny_model(seed=1)
    student.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0)
    teacher.generation_config = GenerationConfig(eos_token_id=[9, 2], pad_token_id=0)
    with torch.no_grad():
        student.lm_head.weight[7] = 4 * student.lm_head.weight[2]
        teacher.lm_head.weight[9] = 4 * teacher.lm_head.weight[2]
    probe = tiny_trainer(tmp_path / "probe", copy.deepcopy(student), copy.deepcopy(teacher))
    assert probe.engine.stop_token_ids == [2, 7, 9]
    rollouts = probe.engine.generate(probe.model, [[5, 6]], num_generations=200, sampling=Sampling(30), seed=0).rollouts
    ends = {
        c[-1] for c, reason in zip(rollouts.completion_ids, rollouts.finish_reasons, strict=True) if reason == "stop"
    }
    assert ends == {2, 7, 9}
    assert not {2, 7, 9} & {token for completion in rollouts.completion_ids for token in completion[:-1]}
    check_against_plain_pytorch(
        tmp_path / "run", DenseObjective(kind="sampled_token", baseline=True, stops=(2, 7, 9), reward=reward, group=2),
        [{"output_space": 1.0, "policy_gradient": 1.0}] * 2, student=student, teacher=teacher,
        recording={"last_tokens": (2, 7, 9, 0)}, policy_gradient_weight=1.0, task="addition",
        output_space="sampled_token", output_baseline=True, **OUTPUT,
    )  # fmt: skip


# Adapters and precision


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"], **settings})


def perturb(model) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["adapter", "adapter and head"])
@pytest.mark.parametrize("own_teacher", [False, True], ids=["base", "teacher"])
def test_an_adapter_with_an_output_space_loss_equals_plain_pytorch(tmp_path, own_teacher, saved):
    teacher = tiny_model(seed=1) if own_teacher else tiny_model()
    trainer = tiny_trainer(
        tmp_path, tiny_model(), teacher if own_teacher else None, peft_config=lora(modules_to_save=saved), max_steps=2,
        output_space="reverse_kl", micro_batch_tokens=30, num_generations=2, diagnostic_steps=1, **ADAM,
    )  # fmt: skip
    perturb(trainer.model)
    plain, start = copy.deepcopy(trainer.model), weights(trainer.model)
    seen = record(trainer)
    trainer.train()
    by_hand = [(rollouts, {"representation": 1.0, "output_space": 1.0}) for rollouts in seen]
    rows = DenseObjective(kind="reverse_kl").train(plain, copy.deepcopy(teacher), by_hand, **ADAM)
    assert_same(weights(trainer.model), weights(plain))
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "lora_" in name or "modules_to_save" in name}
    assert any("lm_head" in name for name in changed) is bool(saved)
    for row, expected in zip(trainer.run_folder.read_metrics(), rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-4)


def test_a_fresh_adapter_agrees_with_its_base(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=lora(), scripted=True, output_space="reverse_kl", max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    row = trainer.run_folder.read_metrics()[0]
    assert (row["loss/output_space"], row["loss/representation"], row["overlap"], row["reverse_kl"]) == (0, 0, 1, 0)
    assert_equal(weights(trainer.model), before)


def test_asking_the_base_leaves_frozen_adapters_frozen(tmp_path):
    trainer = tiny_trainer(tmp_path, peft_config=lora(), scripted=True, layers=[1, 2], diagnostic_steps=1)

    def trained():
        return {name for name, p in trainer.model.named_parameters() if p.requires_grad}

    expected = {name for name in weights(trainer.model) if "lora_" in name and ".layers.2." not in name}
    assert trained() == expected
    trainer.train()
    assert trained() == expected


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "adapter"])
def test_bf16_runs_finite_and_close_to_float32(tmp_path, peft_config):
    settings = {"peft_config": peft_config} if peft_config is not None else {}
    losses = []
    for bf16 in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(bf16), tiny_model(), tiny_model(seed=1), max_steps=2, bf16=bf16, output_space="jsd",
            policy_gradient_weight=0.1, task="addition", num_generations=4, num_iterations=2, rows=answered_rows(),
            diagnostic_steps=1, **settings,
        )  # fmt: skip
        record(trainer)
        trainer.train()
        rows = without_times(trainer.run_folder.read_metrics())
        assert all(value == value and abs(value) < 1e6 for row in rows for value in row.values())
        losses.append(
            [row[name] for row in rows for name in ("loss", "loss/output_space", "reverse_kl", "entropy/student")]
        )
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.05, abs=0.02)
    assert losses[1] != losses[0]


def test_activation_checkpointing_changes_nothing(tmp_path):
    results = []
    for on in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(on), tiny_model("gpt2"), tiny_model("gpt2", 1), activation_checkpointing=on, max_steps=2,
            adam_epsilon=1e-4, micro_batch_tokens=30, output_space="reverse_kl", policy_gradient_weight=1.0, task="addition",
            num_generations=2, rows=answered_rows(), diagnostic_steps=1,
        )  # fmt: skip
        record(trainer)
        trainer.train()
        assert trainer.model.is_activation_checkpointing is on
        results.append(weights(trainer.model))
    assert_same(*results, atol=1e-7)


# Diagnostics


class Snapshots(TrainerCallback):
    """The student as it was before chosen steps (counted from 1)."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.models = steps, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            self.models[state.global_step + 1] = copy.deepcopy(model)


MEASURED = ("entropy/student", "entropy/teacher", "overlap", "reverse_kl", "reverse_kl_error")
WITH_DIAGNOSTICS = {
    "representation": {"layers": [2], "positions": "last_k", "position_k": 2, "micro_batch_tokens": 30},
    "output space": {"representation_weight": 0.0, "output_space": "top_k", "layers": "odd", "output_temperature": 2.0},
    "policy gradient": {**GRPO, "reduction": "token"},
}


@pytest.mark.parametrize("name", WITH_DIAGNOSTICS)
def test_every_tenth_step_measures_both_distributions(tmp_path, name):
    settings = WITH_DIAGNOSTICS[name]
    snapshots, teacher = Snapshots(1, 11), tiny_model(seed=1)
    trainer = tiny_trainer(
        tmp_path, tiny_model(), teacher, max_steps=12, callbacks=[snapshots], rows=answered_rows(3),
        **{"num_generations": 2, **settings, "diagnostic_steps": 10},
    )  # fmt: skip
    seen = record(trainer, by_seed=True)
    trainer.train()
    layers = {"representation": (2,), "output space": (1, 3), "policy gradient": (1, 2, 3)}[name]
    dense = DenseObjective(
        layers=layers, reduction=settings.get("reduction", "rollout"),
        positions=(lambda n: range(n)[-2:]) if "positions" in settings else (lambda n: range(n)),
    )  # fmt: skip
    rows = trainer.run_folder.read_metrics()
    for row in rows:
        assert all((key in row) is (row["step"] in (1, 11)) for key in MEASURED)
        cosines = {key for key in row if key.startswith("cosine/")}
        expected = {f"cosine/layer_{layer:02d}" for layer in layers}
        assert cosines == (expected if row["step"] in (1, 11) or name == "representation" else set())
        assert ("cosine" in row) is bool(cosines)
    for step in (1, 11):
        measured = dense.diagnostics(snapshots.models[step], teacher, seen[step - 1])
        assert {key: rows[step - 1][key] for key in measured} == pytest.approx(measured, rel=1e-4)
    assert rows[0]["reverse_kl"] != rows[10]["reverse_kl"]
    assert 0 < rows[0]["overlap"] < 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": [1]},
        {"layers": [1], "micro_batch_tokens": 30, "reduction": "token"},
        {"representation_weight": 0.0, "output_space": "tail_sampled"},
        {**GRPO, "num_iterations": 2},
    ],
    ids=["all layers", "layer 1", "micro-batches", "output space", "policy gradient"],
)
def test_measuring_changes_no_bit_of_the_weights(tmp_path, settings):
    """With dropout, and rollouts of the engine: neither random state may notice."""
    results, rows = [], []
    for steps in (0, 1):
        trainer = tiny_trainer(
            tmp_path / str(steps), tiny_model("gpt2"), tiny_model("gpt2", 1), max_steps=4, rows=answered_rows(6),
            **{"num_generations": 2, **settings, "diagnostic_steps": steps},
        )  # fmt: skip
        if trainer.task is not None:
            trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda r, a: len(r) % 2 == 0))
        trainer.train()
        results.append(weights(trainer.model))
        rows.append(without_times(trainer.run_folder.read_metrics()))
    assert moved(results[0], weights(tiny_model("gpt2"))) > 1e-4
    assert_equal(*results)
    assert not [key for row in rows[0] for key in row if key in MEASURED]
    assert all(key in row for row in rows[1] for key in MEASURED)
    for without, with_ in zip(*rows, strict=True):
        assert without == {key: with_[key] for key in without}


def test_dropout_is_new_in_each_step_batch_and_micro_batch(tmp_path):
    states = []
    trainer = tiny_trainer(
        tmp_path, tiny_model("gpt2"), tiny_model("gpt2", 1), scripted=True, max_steps=2, micro_batch_tokens=1,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    trainer.train()
    assert len(states) == 8
    assert len({bytes(state.tolist()) for state in states}) == 8


def test_the_lm_head_module_never_runs_in_a_step(tmp_path):
    student, teacher = tiny_model(), tiny_model(seed=1)
    trainer = tiny_trainer(
        tmp_path, student, teacher, max_steps=2, diagnostic_steps=1, output_space="reverse_kl", policy_gradient_weight=1.0,
        task="addition", num_generations=2, rows=answered_rows(),
    )  # fmt: skip

    def raising(*args, **kwargs):
        raise AssertionError("the LM head ran")

    student.lm_head.forward = teacher.lm_head.forward = raising
    record(trainer)
    trainer.train()
    assert len(trainer.run_folder.read_metrics()) == 2


def test_a_head_that_is_not_understood_stops_a_term_but_not_a_diagnostic(tmp_path, caplog):
    def odd_model():
        model = tiny_model()
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 1.5 * forward(hidden)
        return model

    with pytest.raises(ValueError, match="Qwen2ForCausalLM: its logits differ by"):
        tiny_trainer(tmp_path / "a", odd_model(), output_space="reverse_kl")
    with caplog.at_level("WARNING", logger="oprd"):
        trainer = tiny_trainer(tmp_path / "b", odd_model(), scripted=True)
    assert "diagnostics are off: Qwen2ForCausalLM: its logits differ" in caplog.text
    trainer.train()
    assert not set(MEASURED) & set(trainer.run_folder.read_metrics()[0])


# Resuming

RESUMED = {
    "schedule": (
        {
            "output_space": "tail_sampled", "crossfade_steps": 3, "gradient_accumulation_steps": 2, "diagnostic_steps": 2,
            "output_weight": {"schedule": "cosine", "start": 0.1, "end": 1.0, "steps": 4}, "save_steps": 1, "max_steps": 4,
        },
        (1, 2, 3),
    ),
    "two updates": (
        {**GRPO, "num_generations": 3, "num_iterations": 2, "epsilon": 0.01, "save_steps": 2, "max_steps": 10,
         "diagnostic_steps": 3},
        (2, 4, 6, 8),
    ),
}  # fmt: skip


def resumable(name: str, folder):
    """Dropout, sampled rollouts, and 5 prompts by twos: two batches an epoch (three with an odd one, without repeats)."""
    trainer = tiny_trainer(
        folder, tiny_model("gpt2"), tiny_model("gpt2", 1), rows=answered_rows(5), per_device_train_batch_size=2,
        save_strategy="steps", lr_scheduler_type="cosine", **{"num_generations": 2, **RESUMED[name][0]},
    )  # fmt: skip
    if trainer.task is not None:
        trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda r, a: len(r) % 2 == 0))
    return trainer


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_after_any_saved_step_ends_at_the_same_bits(tmp_path, name):
    whole = resumable(name, tmp_path / "whole")
    whole.train()
    expected = without_times(whole.run_folder.read_metrics())
    completions = read_lines(tmp_path / "whole" / "completions.jsonl")
    last = f"checkpoint-{len(expected)}"
    for k in RESUMED[name][1]:
        folder = tmp_path / f"stopped-{k}"
        shutil.copytree(tmp_path / "whole", folder)
        for checkpoint in folder.glob("checkpoint-*"):
            if int(checkpoint.name.removeprefix("checkpoint-")) > k:
                shutil.rmtree(checkpoint)
        trainer = resumable(name, folder)
        torch.rand(100 + k)
        trainer.train(resume_from_checkpoint=True)
        assert_equal(weights(trainer.model), weights(whole.model))
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert_equal(load_file(folder / last / file), load_file(tmp_path / "whole" / last / file))
        assert without_times(trainer.run_folder.read_metrics()) == expected, k
        assert read_lines(folder / "completions.jsonl") == completions
    if name == "two updates":
        assert any(row["clip_ratio"] > 0 for row in expected[1::2])


# Refusals

LINEAR = {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 10}
PAIR = {"policy_gradient_weight": 1.0, "num_generations": 2, "task": "addition"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "most"}, "layers: 'most' is not one of last, all, even, odd, last_three nor a list"),
        ({"positions": "middle"}, "positions: 'middle' is not one of all, last, last_k, first_k"),
        ({"positions": "last_k"}, "position_k: positions='last_k' needs it"),
        ({"reduction": "mean"}, "reduction: 'mean' is not one of rollout, token"),
        (
            {"reduction": "token", "gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: 4 does not go with reduction='token'",
        ),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens: 0 is not allowed; it must be at least 1"),
        (
            {"crossfade_steps": 0, "output_space": "jsd"},
            "crossfade_steps: 0 is not allowed; it must be at least 1",
        ),
        ({"num_iterations": 0, **PAIR}, "num_iterations: 0 is not allowed; it must be at least 1"),
        ({"diagnostic_steps": -1}, r"diagnostic_steps: -1 is not allowed; 0 \(never\) or more"),
        ({"alarm_window": -2}, r"alarm_window: -2 is not allowed; 0 \(never\) or more"),
        ({"representation_weight": -1.0}, "representation_weight: -1.0 is not allowed; it must be 0"),
        ({"output_weight": float("nan"), "output_space": "jsd"}, "output_weight: nan is not allowed; it must be 0"),
        ({"policy_gradient_weight": {**LINEAR, "steps": 0}}, "policy_gradient_weight: steps 0 is not allowed; it must be a whole"),
        ({"representation_weight": 0.0}, "representation_weight: 0 leaves nothing to learn from; set output_space, policy"),
        ({"representation_weight": 0.0, "output_space": "jsd", "output_weight": 0}, "representation_weight: 0 leaves nothing"),
        ({"crossfade_steps": 5}, "crossfade_steps: it goes over from representation_weight to output_space, and one of the two"),
        ({"crossfade_steps": 5, "output_space": "jsd", "representation_weight": 0}, "crossfade_steps: .* one of the two is off"),
        ({"num_iterations": 2}, r"num_iterations: 2 is for GRPO \(policy_gradient_weight\)"),
        ({**PAIR, "num_generations": 1}, "num_generations: 1 is not allowed with policy_gradient_weight: .*; at least 2"),
        ({**PAIR, "task": None}, "task: policy_gradient_weight needs one"),
        ({**PAIR, "epsilon": 1.0}, "epsilon: 1.0 is not between 0 and 1"),
        ({**PAIR, "epsilon_high": 0.0}, "epsilon_high: 0.0 is not above 0"),
        ({**PAIR, "scale_rewards": "batch"}, "scale_rewards: 'batch' is not one of group, none"),
        ({**PAIR, "num_iterations": 2, "max_steps": 5}, "max_steps: 5 is not allowed with num_iterations=2: .* a multiple"),
        (
            {**PAIR, "num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3},
            "save_steps: 3 is not allowed with num_iterations=2: .* a multiple of it",
        ),
        (
            {**PAIR, "num_iterations": 2, "max_steps": 6, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3},
            "eval_steps: 3 is not allowed with num_iterations=2: .* a multiple of it",
        ),
        ({"output_space": "kl"}, "output_space: 'kl' is not one of sampled_token, reverse_kl, forward_kl, jsd, top_k, top_k_for"),
        ({"output_space": "top_k", "output_top_k": 0}, "output_top_k: 0 is not allowed; it must be at least 1"),
        (
            {"output_space": "top_k", "output_support": "both"},
            "output_support: 'both' is not one of student, teacher, union, intersection, the choices of output_space=top_k",
        ),
        (
            {"output_space": "tail_sampled", "output_support": "union"},
            "output_support: 'union' is not one of student, teacher, the choices of output_space=tail_sampled",
        ),
        ({"output_space": "jsd", "output_beta": 1.0}, "output_beta: 1.0 is not allowed; it lies between 0 and 1"),
        ({"output_space": "jsd", "output_beta": 0.0}, "output_beta: 0.0 is not allowed; it lies between 0 and 1"),
        ({"output_space": "jsd", "output_baseline": True}, "output_baseline: true has no effect on output_space=jsd; it is for"),
        ({"output_space": "jsd", "output_temperature": -1.0}, "output_temperature: -1.0 is not allowed; it must be above 0"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_an_objective_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_terms(RunConfig(OPRDConfig(str(tmp_path), use_cpu=True, **settings)))


@pytest.mark.parametrize(
    "settings",
    [
        {"representation_weight": 0.0, "output_space": "sampled_token", "output_baseline": True},
        {"representation_weight": {**LINEAR, "start": 1.0, "end": 0.0}, "output_space": "jsd", "output_weight": LINEAR},
        {**PAIR, "representation_weight": 0, "num_iterations": 2, "max_steps": 6, "save_steps": 4},
        {**PAIR, "num_iterations": 2, "max_steps": 6, "save_strategy": "no", "save_steps": 3},
        {**PAIR, "num_iterations": 2, "save_strategy": "epoch"},
    ],
    ids=str,
)
def test_an_objective_that_can_be_is_taken(tmp_path, settings):
    build_terms(RunConfig(OPRDConfig(str(tmp_path), use_cpu=True, **settings)))


def test_a_row_without_an_answer_is_named(tmp_path):
    rows = [*answered_rows(2), {"prompt": PROMPTS[2]}, {"prompt": PROMPTS[3], "answer": "1"}]
    with pytest.raises(
        ValueError, match=r"^train_dataset row 2: no answer to grade rollouts by, which policy_gradient_weight"
    ):
        tiny_trainer(tmp_path, rows=rows, **GRPO)
    tiny_trainer(tmp_path, rows=rows, **{**GRPO, "policy_gradient_weight": 0.0, "representation_weight": 1.0})


def test_a_support_larger_than_the_vocabulary_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, scripted=True, output_space="top_k", output_top_k=46)
    with pytest.raises(ValueError, match="top_k: k = 46 is not between 1 and the 45 events of the vocabulary"):
        trainer.train()
