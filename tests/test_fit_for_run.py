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
from tiny import tiny_model, tiny_tokenizer

FIT = ("--limit", "12", "--rank", "6")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe of a student and two teachers of another shape, and returns its name."""
    monkeypatch.chdir(tmp_path)
    wide = {"hidden_size": 48, "num_hidden_layers": 5}
    for name, model in (
        ("student", tiny_model()),
        ("wide", tiny_model(**wide)),
        ("wide/other", tiny_model(seed=5, **wide)),
    ):
        model.save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    rows = [{"prompt": f"{n} + {n} =", "hint": "ab"[n % 2] * n, "teacher_id": "ab"[n % 2]} for n in range(1, 41)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(**settings):
        values = {
            "model": "student", "teacher_model": "wide", "train_dataset": "rows.jsonl", "output_dir": "runs/mine",
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
    options = ("--student", "student", "--teacher", "wide", "--prompts", "rows.jsonl", "--max-completion-length", "9")
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


def test_one_of_several_teachers_is_fitted_on_its_own_rows(run, recipe):
    several = {"a": "student", "b": {"model": "wide", "bridge": "b-bridge", "system_prompt": None}}
    settings = {"teacher_model": None, "bridge": None, "teachers": several}
    fitted = run("bridge", "fit", "--config", recipe(**settings), "--teacher-id", "b", *FIT)
    assert fitted.returncode == 0, fitted.stderr
    rows = [line for line in Path("rows.jsonl").read_text().splitlines() if json.loads(line)["teacher_id"] == "b"]
    Path("rows.jsonl").write_text("\n".join(rows))
    assert run("bridge", "fit", "--config", recipe(bridge="alone"), *FIT).returncode == 0
    assert torch.equal(projections("b-bridge"), projections("alone"))


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({}, ("--prompts", "x"), "prompts: the recipe mine.yaml says it; set it there, or leave one of the two out"),
        ({}, ("--teacher-dtype", "auto"), "teacher_dtype: the recipe mine.yaml says it"),
        ({"bridge": None}, (), "out: mine.yaml names no bridge; say where to write it: --out FOLDER"),
        ({}, ("--teacher-id", "b"), "teacher_id: 'b' chooses one of several teachers, and the recipe has one"),
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
    ("words", "message"),
    [
        ((), "the recipe's teachers are a, b, and a bridge is fitted to one; choose with --teacher-id"),
        (("--teacher-id", "c"), "the recipe's teachers are a, b, and 'c' is none of them"),
    ],
)
def test_a_teacher_must_be_chosen(run, recipe, words, message):
    several = {"teacher_model": None, "bridge": None, "teachers": {"a": "student", "b": "wide"}}
    result = run("bridge", "fit", "--config", recipe(**several), "--out", "new", *FIT, *words)
    assert result.returncode == 2
    assert message in result.stderr


def test_without_a_recipe_all_names_are_needed(run, recipe):
    result = run("bridge", "fit", "--student", "student", "--teacher", "wide", "--out", "new")
    assert result.returncode == 2
    assert "prompts: it is missing; give --student, --teacher, --prompts and --out, or --config RECIPE" in result.stderr
