"""`oprd bridge fit --config`: a bridge is fitted with the models, prompts and templates that a run of the recipe has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from oprd.bridge import Bridge
from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.tools.compare.bridges import fit_missing, parse_bridges
from tiny import tiny_model, tiny_tokenizer

FIT = ("--limit", "12", "--rank", "6")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe of a student and a teacher of another shape, and returns its name."""
    monkeypatch.chdir(tmp_path)
    wide = {"hidden_size": 48, "num_hidden_layers": 5}
    for name, model in (
        ("small", tiny_model()),
        ("wide", tiny_model(**wide)),
        ("wide/other", tiny_model(seed=5, **wide)),
    ):
        model.save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    rows = [
        {"prompt": f"{n} + {n} =", "hint": "ab"[n % 2] * n, "teacher_id": "ab"[n % 2], "answer": f"so\n#### {n}"}
        for n in range(1, 41)
    ]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(**settings):
        values = {
            "model": "small", "teacher_model": "wide", "train_dataset": "rows.jsonl", "output_dir": "runs/mine",
            "max_completion_length": 9, "bridge": "mine-bridge", "use_cpu": True,
        }  # fmt: skip
        values |= settings
        Path("mine.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return "mine.yaml"

    return write


def projections(folder):
    bridge = Bridge.load(folder)
    return torch.cat([pair.fit.student_RD.flatten() for pair in bridge.pairs.values()])


def test_the_recipe_stands_for_the_options(run, recipe):
    fitted = run("bridge", "fit", "--config", recipe(), *FIT)
    assert fitted.returncode == 0, fitted.stderr
    assert "written to mine-bridge" in fitted.stdout
    options = ("--student", "small", "--teacher", "wide", "--prompts", "rows.jsonl", "--max-completion-length", "9")
    assert run("bridge", "fit", *options, "--out", "by-options", *FIT).returncode == 0
    assert torch.equal(projections("mine-bridge"), projections("by-options"))
    shorter = run("bridge", "fit", "--config", "mine.yaml", "--out", "shorter", "--max-completion-length", "3", *FIT)
    assert shorter.returncode == 0
    assert not torch.equal(projections("mine-bridge"), projections("shorter"))
    assert "rank 6 of" in "\n".join(plan(RunConfig.load("mine.yaml")).describe())


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_prompt": "{prompt} {hint}"},
        {"teacher_model_init_kwargs": {"subfolder": "other"}},
        {"max_completion_length": 3},
    ],
    ids=str,
)
def test_what_the_recipe_says_about_prompts_and_loading_counts(run, recipe, settings):
    assert run("bridge", "fit", "--config", recipe(), "--out", "plain", *FIT).returncode == 0
    fitted = run("bridge", "fit", "--config", recipe(**settings), *FIT)
    assert fitted.returncode == 0, fitted.stderr
    assert not torch.equal(projections("mine-bridge"), projections("plain"))
    planned = "\n".join(plan(RunConfig.load("mine.yaml")).describe())
    assert "FITTED ON PROMPTS OF ANOTHER" not in planned


def test_answers_are_read_as_in_training(run, recipe):
    prompt = {"teacher_prompt": "{prompt} {answer}"}
    fitted = run("bridge", "fit", "--config", recipe(**prompt, task="exact_match", answer_format="gsm8k"), *FIT)
    assert fitted.returncode == 0, fitted.stderr
    Path("rows.jsonl").write_text(Path("rows.jsonl").read_text().replace("so\\n#### ", ""))
    assert run("bridge", "fit", "--config", recipe(**prompt, bridge="plain"), *FIT).returncode == 0
    assert torch.equal(projections("mine-bridge"), projections("plain"))


def test_no_more_prompts_are_used_than_in_training(run, recipe):
    assert run("bridge", "fit", "--config", recipe(train_limit=12), "--limit", "30", "--rank", "6").returncode == 0
    assert run("bridge", "fit", "--config", recipe(bridge="limited"), *FIT).returncode == 0
    assert torch.equal(projections("mine-bridge"), projections("limited"))


def test_a_comparison_fits_with_the_same_settings(run, recipe):
    prompt = {"teacher_prompt": "{prompt} {hint}"}
    assert run("bridge", "fit", "--config", recipe(**prompt), *FIT).returncode == 0
    fit_missing(parse_bridges({"one": {"limit": 12, "rank": 6}}, "the file"), "out", "mine.yaml", {}, print)
    assert torch.equal(projections("mine-bridge"), projections("out/bridges/one"))


OWN = {"model": "wide", "bridge": "b-bridge", "system_prompt": "Be b.", "init_kwargs": {"subfolder": "other"}}
"""A teacher with settings of its own."""


@pytest.mark.parametrize("per_prompt", ["one", "all"])
def test_one_of_several_teachers_is_fitted_with_its_own_settings(run, recipe, per_prompt):
    for folder in ("small", "wide", "wide/other"):
        tiny_tokenizer(chat=True).save_pretrained(folder)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    several = {"teacher_model": None, "bridge": None, "teachers": {"a": "wide", "b": OWN}}
    fitted = run(
        "bridge", "fit", "--config", recipe(**several, teachers_per_prompt=per_prompt), "--teacher-id", "b", *FIT
    )
    assert fitted.returncode == 0, fitted.stderr
    own = [row for row in rows if per_prompt == "all" or row["teacher_id"] == "b"]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, own)))
    alone = {"teacher_system_prompt": OWN["system_prompt"], "teacher_model_init_kwargs": OWN["init_kwargs"]}
    assert run("bridge", "fit", "--config", recipe(bridge="alone", **alone), *FIT).returncode == 0
    assert torch.equal(projections("b-bridge"), projections("alone"))


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({}, ("--prompts", "x"), "prompts: it does not go with --config; set train_dataset in mine.yaml"),
        (
            {},
            ("--teacher-dtype", "auto"),
            "teacher_dtype: it does not go with --config; set teacher_model_init_kwargs in",
        ),
        ({}, ("--prompt-column", "x"), "prompt_column: it does not go with --config; set prompt_column in mine.yaml"),
        ({"bridge": None}, (), "out: mine.yaml names no bridge; say where to write it: --out FOLDER"),
        ({}, ("--teacher-id", "b"), "teacher_id: 'b' names one of several teachers, and the run has one"),
        ({"bridge": "wide"}, (), "bridge: wide exists already"),
        ({"limit": 3}, (), "unknown key 'limit'"),
        ({"teacher_model": {"url": "http://127.0.0.1:1"}}, (), "teacher_model: a model on a server"),
    ],
    ids=str,
)
def test_a_recipe_that_gives_no_bridge_is_refused(run, recipe, settings, words, message):
    result = run("bridge", "fit", "--config", recipe(**settings), *FIT, *words)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("entry", "words", "message"),
    [
        (
            "wide",
            (),
            "the run's teachers are a, b, and a bridge is fitted to one; choose one: oprd bridge fit --config",
        ),
        ("wide", ("--teacher-id", "c"), "the run's teachers are a, b, and 'c' is none of them"),
        ({"model": "wide", "system_promt": "x"}, ("--teacher-id", "b"), "teachers: b: unknown key 'system_promt'"),
    ],
    ids=str,
)
def test_a_teacher_must_be_chosen_and_described(run, recipe, entry, words, message):
    several = {"teacher_model": None, "bridge": None, "teachers": {"a": "wide", "b": entry}}
    result = run("bridge", "fit", "--config", recipe(**several), "--out", "new", *FIT, *words)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "prompts: it is missing; give --student, --teacher, --prompts and --out, or --config RECIPE"),
        (("--prompts", "x", "--teacher-id", "b"), "teacher_id: 'b' names a teacher of --config, which is missing"),
    ],
)
def test_without_a_recipe_all_names_are_needed(run, recipe, words, message):
    result = run("bridge", "fit", "--student", "small", "--teacher", "wide", "--out", "new", *words)
    assert result.returncode == 2
    assert message in result.stderr
