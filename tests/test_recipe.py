"""Recipes: every shipped file parses and dry-runs; bad keys and values stop with a message that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from oprd.resolve import plan
from oprd.run_config import RunConfig, find_recipe, parse_overrides, recipe_keys
from oprd.tasks.problems import load_rows

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MINIMAL = {
    "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "train_dataset": "generated:addition",
    "train_limit": 8, "output_dir": "unused",
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_parse_and_dry_run(path, tmp_path):
    content = yaml.safe_load(path.read_text())
    # a hub or a file elsewhere cannot be reached from a test: the plan says so and goes on
    overrides = {"output_dir": str(tmp_path)}
    if content["train_dataset"].endswith(".parquet"):
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n')
        overrides["train_dataset"] = str(tmp_path / "prompts.jsonl")
    lines = "\n".join(plan(RunConfig.load_on_cpu(path, overrides)).describe())
    assert "dry run: nothing was trained or written" in lines
    assert f"learning_rate: {float(content['learning_rate'])}" in lines


def test_the_papers_setting():
    config = RunConfig.load_on_cpu("paper_vanilla", {}).args
    assert (config.layers, config.positions, config.position_k, config.num_generations) == ("all", "last_k", 2000, 2)
    assert (config.learning_rate, config.max_steps, config.max_completion_length) == (1e-5, 500, 16384)
    assert config.per_device_train_batch_size * 8 == 8
    assert (config.temperature, config.top_p, config.top_k) == (1.0, 1.0, 0)
    assert (config.eval_num_generations, config.eval_temperature, config.eval_top_p) == (16, 0.7, 0.95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'\\?"),
        ({"layer": "all"}, "unknown key 'layer'; did you mean 'layers'\\?"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not allowed"),
        ({"num_generations": 0}, "num_generations: 0 is not allowed; it must be at least 1"),
        ({"num_generations": 1.5}, "num_generations: 1.5 is not allowed"),
        ({"positions": "last_k", "position_k": 0}, "position_k: 0 is not allowed"),
        ({"positions": "last_k"}, "position_k: positions='last_k' needs it"),
        ({"position_k": 5}, "position_k: 5 has no effect"),
        ({"eval_num_generations": 0}, "eval_num_generations: 0"),
        ({"layers": "some"}, "layers: 'some' is not one of"),
        ({"reduction": "mean"}, "reduction: 'mean' is not one of rollout, token"),
        ({"temperature": -1}, "temperature: -1"),
        ({"top_p": 0}, "top_p: 0"),
        ({"task": "maths"}, "task: 'maths' is not one of math, exact_match, addition"),
        ({"rollout_engine": "fast"}, "rollout_engine: 'fast' is not one of"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens: 0"),
        ({"representation_weight": 0}, "representation_weight: 0"),
        ({"max_completion_length": 0}, "max_completion_length: 0"),
        ({"train_limit": 0}, "train_limit: 0 is not allowed; at least 1"),
        ({"eval_limit": 0}, "eval_limit: 0 is not allowed; at least 1"),
        ({"eval_limit": -1}, "eval_limit: -1 is not allowed; at least 1"),
        ({"fp16": True}, "fp16: not supported"),
        ({"do_eval": True}, "the key 'do_eval' has no effect here"),
        ({"per_device_eval_batch_size": 2}, "has no effect here; remove it \\(evaluation samples"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0"),
        ({"eval_dataset": "generated:addition"}, "the key 'task' is missing"),
        ({"remove_unused_columns": True}, "remove_unused_columns: must be False"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True hides states"),
        ({"model": ""}, "the key 'model' is missing"),
        ({"teacher_model": None}, "the key 'teacher_model' is missing"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan(RunConfig.parse({**MINIMAL, **change}))


def test_text_numbers_become_numbers():
    # PyYAML reads 1e-5, without a dot, as text
    values = yaml.safe_load("{learning_rate: 1e-5, max_grad_norm: 1, layers: [1, 3]}")
    config = RunConfig.parse({**MINIMAL, **values}).args
    assert config.learning_rate == 1e-5
    assert config.max_grad_norm == 1.0
    assert config.layers == [1, 3]


def test_a_bare_no_means_the_word_where_a_word_is_meant():
    config = RunConfig.parse({**MINIMAL, **yaml.safe_load("{save_strategy: no, log_completions: no}")}).args
    assert config.save_strategy == "no"
    assert config.log_completions is False


def test_the_older_spelling_of_activation_checkpointing_counts():
    config = RunConfig.parse({**MINIMAL, "gradient_checkpointing": True}).args
    assert config.activation_checkpointing is True
    assert config.activation_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(ValueError, match="use_reentrant=True hides states"):
        RunConfig.parse({**MINIMAL, "gradient_checkpointing_kwargs": {"use_reentrant": True}})
    assert RunConfig.parse(MINIMAL).args.activation_checkpointing is False


def test_overrides():
    words = ["--learning-rate", "2e-4", "--layers=[1, 2]", "--bf16", "--teacher_model", "null", "--seed", "3"]
    assert parse_overrides(words) == {
        "learning_rate": 2e-4, "layers": [1, 2], "bf16": True, "teacher_model": None, "seed": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match="--layers: '\\[1,' cannot be read"):
        parse_overrides(["--layers", "[1,"])
    with pytest.raises(ValueError, match="unexpected argument 'stray'"):
        parse_overrides(["stray"])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match=r"no file 'nowhere'; shipped recipes are .*tiny"):
        find_recipe("nowhere")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(ValueError, match="not a YAML file"):
        RunConfig.load(bad)
    bad.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="expected one key: value a line"):
        RunConfig.load(bad)


def test_the_resolved_settings_are_a_recipe_again(tmp_path):
    run = RunConfig.load("tiny", {"output_dir": str(tmp_path), "seed": 7})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run.settings()))
    again = RunConfig.load(file)
    assert {key: getattr(again, key) for key in recipe_keys()} == {key: getattr(run, key) for key in recipe_keys()}
    assert again.args.to_dict() == run.args.to_dict()
    assert again.args.seed == 7


def test_generated_datasets():
    rows = load_rows("generated:addition", "train", 5, 0)
    assert len(rows) == 5
    assert load_rows("generated:addition", "train", 5, 0) == rows
    with pytest.raises(ValueError, match="say how many problems"):
        load_rows("generated:addition", "train", None, 0)
    with pytest.raises(ValueError, match="does not generate problems; there is generated:addition"):
        load_rows("generated:math", "train", 5, 0)


def test_a_teacher_of_another_shape_is_refused_by_the_plan(tmp_path):
    from tiny import tiny_model

    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path / "teacher")
    run = RunConfig.parse({**MINIMAL, "teacher_model": str(tmp_path / "teacher")})
    with pytest.raises(ValueError, match="teacher_model: it has 2 layers of width 32, the student 4 of 128"):
        plan(run)


@pytest.mark.parametrize(("typed", "key"), [("lr", "learning_rate"), ("max_new_tokens", "max_completion_length")])
def test_a_name_of_another_tool_is_told_the_key(typed, key):
    with pytest.raises(ValueError, match=f"unknown key '{typed}'; did you mean '{key}'"):
        RunConfig.parse({"model": "a", "teacher_model": "b", "train_dataset": "c.jsonl", typed: 1})
