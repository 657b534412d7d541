"""A setting that does nothing without another one is refused before any model is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

from oprd.config import OPRDConfig
from oprd.objectives.output_space import OUTPUT_SPACE, WITH_SUPPORT, OutputTerm
from oprd.resolve import plan, resolve
from oprd.resolve.no_effect import NEEDS, check_effects
from oprd.resolve.terms import build_terms
from oprd.run_config import RunConfig

RECIPE = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "task": "addition", "train_limit": 4, "use_cpu": True, "report_to": "none",
}  # fmt: skip
KL, TOP_K = {"output_space": "reverse_kl"}, {"output_space": "top_k"}
UNREAD = {**KL, "representation_weight": 0, "diagnostic_steps": 0}
GRPO = {"policy_gradient_weight": 1.0, "num_generations": 2}
SERVER = {"teacher_model": {"url": "http://127.0.0.1:1"}}

# Settings, what is said of them, and what they need.
ALONE = [
    ({"teacher_sync_steps": 5}, "teacher_sync_steps: 5 has no effect without teacher_update_rate, which moves the teacher; set it, "
     "such as 0.05, or leave teacher_sync_steps out",
     {"teacher_update_rate": 0.1, "teacher_model": "student", "teacher_prompt": "{prompt} {answer}"}),
    ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}, **SERVER},
     "teacher_model_init_kwargs: {'dtype': 'bfloat16'} has no effect where no teacher is loaded by name; name one",
     {"teacher_model": "embedded:tiny/teacher"}),
    ({"positions": "last_k", "position_k": 5, **UNREAD},
     "positions: last_k has no effect where no states are compared (the positions of a loss on distributions are "
     "output_positions); set representation_weight, or diagnostic_steps to measure the cosine, or leave positions out",
     {"representation_weight": 1}),
    ({"normalize": True, **KL, "representation_weight": 0},
     "normalize: true has no effect with representation_weight: 0.0; set that, or leave normalize out",
     {"representation_weight": 1}),
    ({"output_weight": 2.0}, "output_weight: 2.0 has no effect without output_space; set it, or", KL),
    ({"output_top_k": 4}, "output_top_k: 4 has no effect without output_space; set it, or", TOP_K),
    ({"output_support": "teacher"}, "output_support: teacher has no effect without output_space; set it, or", TOP_K),
    ({"output_beta": 0.1}, "output_beta: 0.1 has no effect without output_space; set it, or", {"output_space": "jsd"}),
    ({"output_baseline": True}, "output_baseline: true has no effect without output_space; set it, or",
     {"output_space": "sampled_token"}),
    ({"output_temperature": 2.0}, "output_temperature: 2.0 has no effect without output_space or objectives; set one of", KL),
    ({"output_top_k": 4, **KL}, "output_top_k: 4 has no effect with output_space: reverse_kl, which is no top-k loss; "
     "set one of top_k, top_k_forward_kl, tail_sampled, or", TOP_K),
    ({"output_support": "union", **KL}, "output_support: union has no effect with output_space: reverse_kl", TOP_K),
    ({"output_beta": 0.1, **TOP_K}, "output_beta: 0.1 has no effect with output_space: top_k; set jsd", {"output_space": "jsd"}),
    ({"epsilon": 0.1}, "epsilon: 0.1 has no effect with policy_gradient_weight: 0.0; set that, or", GRPO),
    ({"epsilon_high": 0.3}, "epsilon_high: 0.3 has no effect with policy_gradient_weight: 0.0; set that, or", GRPO),
    ({"scale_rewards": "none"}, "scale_rewards: none has no effect without a policy gradient; set policy_gradient_weight", GRPO),
    ({"top_p": 0.9, "temperature": 0.0},
     "top_p: 0.9 has no effect with temperature: 0.0, which draws the likeliest token; set a temperature above 0, or",
     {"temperature": 0.7}),
    ({"top_k": 5, "temperature": 0.0}, "top_k: 5 has no effect with temperature: 0.0", {"temperature": 0.7}),
    ({"min_p": 0.1, "temperature": 0.0}, "min_p: 0.1 has no effect with temperature: 0.0", {"temperature": 0.7}),
    ({"max_skipped_steps": 9}, "max_skipped_steps: 9 has no effect with nan_policy: stop; set skip, or", {"nan_policy": "skip"}),
    ({"num_completions_to_log": 9, "log_completions": False},
     "num_completions_to_log: 9 has no effect with log_completions: false; set true, or", {"log_completions": True}),
]  # fmt: skip
NAMES = ["+".join(settings) for settings, _, _ in ALONE]


def recipe(folder, **settings) -> RunConfig:
    return RunConfig.parse({**RECIPE, "output_dir": str(folder), **settings})


@pytest.mark.parametrize(("settings", "message", "needed"), ALONE, ids=NAMES)
def test_alone_it_is_refused_and_with_what_it_needs_it_passes(tmp_path, settings, message, needed):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        plan(recipe(tmp_path, **settings))
    assert str(refused.value).startswith(message)
    run = recipe(tmp_path, **{**settings, **needed})
    check_effects(run, build_terms(run))


def test_every_key_of_the_table_is_tried():
    assert {key for needs in NEEDS for key in needs.keys} == {next(iter(settings)) for settings, _, _ in ALONE}


@pytest.mark.parametrize(
    "settings",
    [
        {"output_space": "top_k", "output_weight": 0.0, "output_top_k": 4},  # switched off, and described
        {"output_weight": 1.0, "output_top_k": 16, "teacher_sync_steps": 1},  # defaults, written out
        {"objectives": [{"use": "oprd.objectives.flow:Flow"}], "output_temperature": 2.0},
        {
            "teacher_model": None,
            "teachers": {"a": "embedded:tiny/teacher"},
            "teacher_model_init_kwargs": {"dtype": "float32"},
        },
        {
            "extrapolation": 1.25,
            "base_model": "embedded:tiny/student",
            "teacher_model_init_kwargs": {"dtype": "float32"},
        },
        {
            "policy_gradient_weight": {"schedule": "linear", "start": 0.0, "end": 1.0, "steps": 5},
            "num_generations": 2,
            "epsilon": 0.1,
        },
    ],
)
def test_what_has_an_effect_or_is_the_default_passes(tmp_path, settings):
    run = recipe(tmp_path, **settings)
    check_effects(run, build_terms(run))


def test_a_trainer_refuses_it_before_models_are_loaded(tmp_path):
    args = OPRDConfig(str(tmp_path), teacher_sync_steps=3, use_cpu=True, report_to="none")
    run = RunConfig(args, "no/such-student", "no/such-teacher", [{"prompt": "1+1="}])
    with pytest.raises(ValueError, match=r"^teacher_sync_steps: 3 has no effect without teacher_update_rate"):
        resolve(run)


@pytest.mark.parametrize("kind", OUTPUT_SPACE)
def test_which_losses_read_the_settings_of_the_support_and_beta(kind):
    def arguments(**changes):
        _, _, read = OUTPUT_SPACE[kind]
        found = read(OutputTerm(kind, **changes), torch.zeros(1, dtype=torch.long))
        return {name: value for name, value in found.items() if name != "tokens_N"}

    assert (arguments(top_k=3) != arguments(top_k=4)) == (kind in WITH_SUPPORT)
    assert (arguments(support="student") != arguments(support="teacher")) == (kind in WITH_SUPPORT)
    assert (arguments(beta=0.2) != arguments(beta=0.3)) == (kind == "jsd")


def brevity(completions, **columns):
    return [-float(len(completion)) for completion in completions]


# Every other setting, by why it needs no entry in the table.
REFUSED_ELSEWHERE = {  # key → settings that another check refuses
    "bridge_rank": {"bridge_rank": 4},
    "inside_tokens": {"inside_tokens": "interpolate"},
    "crossfade_steps": {"crossfade_steps": 5},
    "num_iterations": {"num_iterations": 2},
    "output_positions": {"output_positions": "first_k", "output_position_k": 2},
    "output_position_k": {"output_position_k": 2, **KL},
    "position_k": {"position_k": 2},
    "reward_weights": {"reward_weights": [1.0]},
    "reward_funcs": {"reward_funcs": [f"{__name__}:brevity"], "lmbda": 0.0},
    "mix_teachers": {"mix_teachers": True},
    "offload_teachers": {"offload_teachers": True},
    "teachers_per_prompt": {"teachers_per_prompt": "all"},
    "teacher_update_rate": {"teacher_update_rate": 0.1},
    "extrapolation": {"extrapolation": 1.25, "representation_weight": 0, **KL},
    "layer_map": {"layer_map": "kept", "teacher_model": None, "lora": {"r": 2}},
    "rollout_engine_kwargs": {"rollout_engine_kwargs": {"enforce_eager": True}, "max_completion_length": 8},
    "policy_gradient_weight": {"policy_gradient_weight": 1.0, "num_generations": 2, "task": None},
    "output_space": {"output_space": "cross_entropy"},
}
READ_BY_EVERY_RUN = {
    "alarm_window", "bridge", "chat_template_date", "dataset_config", "diagnostic_steps", "end_of_turn", "fully_shard",
    "generation_batch_size", "layers", "lmbda", "log_completions", "max_completion_length", "max_prompt_length",
    "max_useless_steps", "merge_system_prompt", "micro_batch_tokens", "nan_policy", "num_generations", "objectives",
    "overlap_rollouts", "prompt_column", "reduction", "representation_weight", "rollout_engine", "save_seconds",
    "split_special_tokens", "special_token_map", "student_quantization", "task", "teacher_prompt", "teacher_system_prompt",
    "temperature", "trust_remote_code",
}  # fmt: skip
READ_WHERE_SOMETHING_ELSE_IS_THERE = {  # a dataset's answers, a conversation, a model by name: not a key, so it is not known here
    "answer_column", "answer_format", "chat_template_kwargs", "teacher_chat_template_kwargs", "model_init_kwargs",
    "eval_instruction", "eval_max_completion_length", "eval_num_generations", "eval_temperature", "eval_top_p",  # evaluate(rows)
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED_ELSEWHERE)
def test_what_the_table_leaves_to_another_check_is_refused_there(tmp_path, key):
    check = resolve if key == "rollout_engine_kwargs" else plan  # an engine says what it takes when it is made
    with pytest.raises(ValueError, match=rf"\b{key}\b"):
        check(recipe(tmp_path, **REFUSED_ELSEWHERE[key]))


def test_every_setting_is_decided_on():
    ours = {f.name for f in dataclasses.fields(OPRDConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    table = {key for needs in NEEDS for key in needs.keys}
    parts = (table, REFUSED_ELSEWHERE, READ_BY_EVERY_RUN, READ_WHERE_SOMETHING_ELSE_IS_THERE)
    assert sorted(key for part in parts for key in part) == sorted(ours)
