"""Several teachers of which some stand behind a bridge of their own: each teaches what it would teach alone."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.bridge import Bridge, curve
from oprd.bridge.teacher import BridgedTeacher
from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.runs.model_card import model_card
from oprd.states.several import modules_of
from oprd.states.teacher_settings import bridge_in_words
from oprd.states.teachers import FrozenTeacher
from test_bridge_training import WIDE, fit
from test_several_teachers import SGD, counted, moved, rows
from tiny import tiny_model, tiny_tokenizer, tiny_trainer, weights

LOSSES = {
    "both": {"output_space": "reverse_kl"},
    "by token": {"reduction": "token"},
    "representation": {"layers": [1, 3]},
}
QUICK = ["both", *(pytest.param(name, marks=pytest.mark.further) for name in LOSSES if name != "both")]


def wide(seed=1):
    return tiny_model(seed=seed, **WIDE)


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    """A bridge from `wide()` to `tiny_model()`."""
    folder = tmp_path_factory.mktemp("several") / "bridge"
    fit(tiny_model(), wide()).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def other_bridge(tmp_path_factory):
    """One more between the same models, from other rollouts."""
    folder = tmp_path_factory.mktemp("several") / "other"
    fit(tiny_model(), wide(), seed=1).save(folder)
    return str(folder)


def pool(bridge, **entry):
    return {"a": tiny_model(seed=2), "b": {"model": wide(), "bridge": bridge, **entry}}


def trained(folder, teacher, data, *, scripted=True, **settings):
    """The trainer after one step on `data`."""
    trainer = tiny_trainer(
        folder,
        teacher=teacher,
        rows=data,
        scripted=scripted,
        per_device_train_batch_size=len(data),
        **{**SGD, **settings},
    )
    trainer.train(outputs=False)
    return trainer


@pytest.mark.parametrize("loss", QUICK)
def test_each_teacher_teaches_what_it_would_alone(tmp_path, bridge, loss):
    """One has the student's shape, one is wider, deeper and behind a bridge: loss and gradient are those of two runs."""
    settings, data = LOSSES[loss], rows("a", "b", "a", "a")
    both = trained(tmp_path / "both", pool(bridge), data, mix_teachers=True, **settings)
    alone = {
        "a": trained(tmp_path / "a", tiny_model(seed=2), [data[0], data[2], data[3]], **settings),
        "b": trained(tmp_path / "b", wide(), [data[1]], bridge=bridge, **settings),
    }
    found = {name: trainer.last_step.metrics for name, trainer in alone.items()}
    share = {name: counted(metrics, settings.get("reduction")) for name, metrics in found.items()}
    share = {name: value / sum(share.values()) for name, value in share.items()}
    together = both.last_step.metrics
    assert together["loss"] == pytest.approx(sum(share[name] * found[name]["loss"] for name in share), rel=1e-5)
    for name, metrics in found.items():
        assert together[f"teacher/{name}/cosine"] == pytest.approx(metrics["cosine"], rel=1e-5)
    parts = {name: moved(weights(trainer.model)) for name, trainer in alone.items()}
    for weight, change in moved(weights(both.model)).items():
        expected = sum(share[name] * parts[name][weight] for name in share)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-7)


def test_a_run_of_which_all_rows_go_to_the_bridged_teacher_is_the_run_with_that_bridge(tmp_path, bridge):
    """To the bit, on the CPU, at a rank of the entry's own; also where the weights wait in host memory."""
    data = rows("b", "b", "b", "b")
    one = trained(tmp_path / "one", wide(), data, bridge=bridge, bridge_rank=3)
    for offload in (False, True):
        several = trained(
            tmp_path / str(offload), pool(bridge, bridge_rank=3), data, mix_teachers=True, offload_teachers=offload
        )
        own, after = weights(one.model), weights(several.model)
        assert all(torch.equal(own[name], after[name]) for name in own)
        assert several.last_step.metrics["loss"] == one.last_step.metrics["loss"]


def test_the_bridged_teacher_writes_its_rows(tmp_path, bridge):
    """To the bit, on the CPU: the run with one bridged teacher that writes all responses."""
    data = rows("b", "b", "b", "b")
    one = trained(tmp_path / "one", wide(), data, scripted=False, bridge=bridge, lmbda=0.0)
    several = trained(tmp_path / "several", pool(bridge), data, scripted=False, mix_teachers=True, lmbda=0.0)
    assert several.last_step.rollouts.completion_ids == one.last_step.rollouts.completion_ids
    own, after = weights(one.model), weights(several.model)
    assert all(torch.equal(own[name], after[name]) for name in own)


def test_where_all_read_a_rollout_the_bridged_one_counts_as_much(tmp_path, bridge):
    data = rows("a", "b", "a", "a")
    together = trained(tmp_path / "all", pool(bridge), data, teachers_per_prompt="all").last_step.metrics["loss"]
    a = trained(tmp_path / "a", tiny_model(seed=2), data).last_step.metrics["loss"]
    b = trained(tmp_path / "b", wide(), data, bridge=bridge).last_step.metrics["loss"]
    assert together == pytest.approx((a + b) / 2, rel=1e-5)


def test_a_model_behind_two_bridges_is_in_memory_once(tmp_path, bridge, other_bridge):
    model = wide()
    teachers = {"a": {"model": model, "bridge": bridge}, "b": {"model": model, "bridge": other_bridge}}
    trainer = tiny_trainer(tmp_path, teacher=teachers, rows=rows("a", "b", "a", "b"), mix_teachers=True)
    found = trainer.pair.teacher.teachers
    assert all(isinstance(one, BridgedTeacher) for one in found.values())
    assert found["a"].digest != found["b"].digest
    assert modules_of(trainer.pair.teacher) == [model]
    assert trainer.probe["teacher/b"] == trainer.probe["teacher/a"] != trainer.probe["student"]


def test_each_is_evaluated_by_its_own_completions(tmp_path, bridge):
    data = [row | {"points": int(row["teacher_id"] == "b")} for row in rows("a", "b", "b", "a")]
    trainer = tiny_trainer(
        tmp_path, teacher=pool(bridge), rows=data, eval_dataset=data, eval_num_generations=1, mix_teachers=True,
        reward_funcs=lambda points, **_: points,
    )  # fmt: skip
    assert trainer.evaluate_teacher().summary["by_teacher"] == {"a": 0.0, "b": 1.0}


# Resuming


def test_a_resumed_run_names_the_bridge_that_has_changed(tmp_path, bridge, other_bridge):
    def made(folder, steps):
        return tiny_trainer(
            tmp_path / "run", teacher=pool(str(folder)), rows=rows("a", "b", "a", "b"), max_steps=steps, save_strategy="steps",
            save_steps=1, mix_teachers=True,
        )  # fmt: skip

    used = tmp_path / "bridge"
    shutil.copytree(bridge, used)
    made(used, 1).train(outputs=False)
    made(used, 2).train(True, outputs=False)
    shutil.rmtree(used)
    shutil.copytree(other_bridge, used)
    with pytest.raises(ValueError, match="bridge_content/b: ") as refused:
        made(used, 3).train(True, outputs=False)
    assert "teacher/" not in str(refused.value)


# What is refused and shown


@pytest.mark.parametrize(
    ("seed", "entry", "wrong"),
    [
        (3, {}, "teachers: b: bridge: it was fitted for the teacher teacher"),
        (1, {"bridge_rank": 99}, "teachers: b: rank: 99 is out of range"),
        (1, {"bridge": "nowhere"}, "teachers: b: .*nowhere"),
    ],
)
def test_a_bridge_that_does_not_fit_is_refused_with_the_teachers_name(tmp_path, bridge, seed, entry, wrong):
    teachers = {"a": tiny_model(seed=2), "b": {"model": wide(seed), "bridge": bridge, **entry}}
    with pytest.raises((ValueError, OSError), match=wrong):
        tiny_trainer(tmp_path, teacher=teachers, rows=rows("a", "b", "a", "b"), mix_teachers=True)


def test_a_teacher_of_another_shape_without_a_bridge_is_still_refused(tmp_path, bridge):
    with pytest.raises(ValueError, match="teachers: c: teacher_model: it has 5 layers"):
        tiny_trainer(tmp_path, teacher={**pool(bridge), "c": wide()}, rows=rows("a", "b", "c", "b"), mix_teachers=True)


@pytest.fixture(scope="module")
def named(tmp_path_factory, bridge):
    """A recipe of both teachers by name, and its bridge."""
    folder = tmp_path_factory.mktemp("named")
    for name, model in (("student", tiny_model()), ("a", tiny_model(seed=2)), ("b", wide())):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    lines = [{"prompt": row["prompt"], "teacher_id": row["teacher_id"]} for row in rows("a", "b")]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "model": str(folder / "student"), "train_dataset": str(folder / "rows.jsonl"), "output_dir": str(folder / "run"),
        "teachers": {"a": str(folder / "a"), "b": {"model": str(folder / "b"), "bridge": bridge}},
        "max_completion_length": 9, "max_steps": 1, "use_cpu": True,
    }  # fmt: skip


def test_the_plan_says_which_teacher_has_which_bridge(named, bridge):
    text = "\n".join(plan(RunConfig.parse(named)).describe())
    assert f"teacher b: bridge: {bridge}: rank 6 of " in text
    missing = {**named["teachers"], "b": {**named["teachers"]["b"], "model": "org/not-here", "bridge": "nowhere"}}
    text = "\n".join(plan(RunConfig.parse({**named, "teachers": missing})).describe())
    assert "teacher b: bridge: nowhere IS NOT THERE YET" in text
    assert "oprd bridge fit --config RECIPE --out nowhere --teacher-id b" in text
    swapped = {**named["teachers"], "b": {**named["teachers"]["b"], "model": named["teachers"]["a"]}}
    with pytest.raises(
        ValueError, match=r"teachers: b: bridge: it was fitted for the teacher .* of 5 layers of width 48"
    ):
        plan(RunConfig.parse({**named, "teachers": swapped})).describe()


def test_a_plan_says_the_whole_command_that_fits_the_bridge(named, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(Path(named["train_dataset"]).read_text().replace('"prompt"', '"question"'))
    settings = {"train_dataset": str(file), "prompt_column": {"train": "question"}, "merge_system_prompt": True}
    settings |= {
        "split_special_tokens": False,
        "max_prompt_length": 20,
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
        "special_token_map": {"<a b>": "<c>"},
        "teacher_model": "org/not-here",
        "teachers": None,
        "bridge": "my bridge",
    }
    (line,) = (one for one in plan(RunConfig.parse({**named, **settings})).describe() if "IS NOT" in one)
    assert shlex.split(line.partition("fit it first: ")[2]) == [
        "oprd", "bridge", "fit", "--student", named["model"], "--teacher", "org/not-here", "--prompts", str(file),
        "--out", "my bridge", "--max-completion-length", "9", "--max-prompt-length", "20", "--prompt-column", "question",
        "--merge-system-prompt", "--special-token-map", '{"<a b>": "<c>"}', "--no-split-special-tokens",
        "--teacher-dtype", "bfloat16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_prompt": "{prompt} {teacher_id}"},
        {"teacher_model_init_kwargs": {"revision": "v2"}},
        {"model_init_kwargs": {"revision": "v2"}, "model": "org/nor-here"},
    ],
    ids=str,
)
def test_a_plan_names_the_recipe_where_a_setting_is_no_option(named, settings):
    one = {"teacher_model": "org/not-here", "teachers": None, "bridge": "my bridge"}
    text = "\n".join(plan(RunConfig.parse({**named, **settings, **one})).describe())
    assert "fit it first: oprd bridge fit --config RECIPE --out 'my bridge'\n" in text


def test_a_bridge_of_other_prompts_is_said(named, bridge, tmp_path, caplog):
    text = asdict(TeacherPromptSettings(teacher_system_prompt="Be good.", chat_template_date="2026-01-01"))
    fitted = Bridge.load(bridge)
    for name, prompt in (("other", "Be good."), ("same", None)):
        folder = tmp_path / name
        replace(fitted, options={**fitted.options, "text": text | {"teacher_system_prompt": prompt}}).save(folder)
        caplog.clear()
        tiny_trainer(tmp_path, teacher=pool(str(folder)), rows=rows("a", "b", "a", "b"), mix_teachers=True)
        warned = "fitted on prompts with another teacher_system_prompt; its projections may not suit" in caplog.text
        teachers = {**named["teachers"], "b": {**named["teachers"]["b"], "bridge": str(folder)}}
        planned = "\n".join(plan(RunConfig.parse({**named, "teachers": teachers})).describe())
        said = "model weights not checked; FITTED ON PROMPTS OF ANOTHER teacher_system_prompt" in planned
        assert warned is said is (name == "other")


@pytest.mark.parametrize("least", [0.0, 1.1])
def test_a_hopeless_bridge_is_said_with_what_else_to_do(bridge, tmp_path, caplog, monkeypatch, run, least):
    for name in ("USABLE_PREDICTABLE", "USABLE_CKA"):
        monkeypatch.setattr(curve, name, least)
    tiny_trainer(tmp_path, teacher=pool(bridge), rows=rows("a", "b", "a", "b"), mix_teachers=True)
    shown = " ".join(run("bridge", "inspect", str(bridge)).stdout.split())
    for text in (caplog.text, shown):
        assert ("set representation_weight: 0, with output_space: reverse_kl, or with" in text) is (least > 1)


def test_the_card_names_the_bridges(named, bridge):
    assert bridge_in_words(named) == f"b: {bridge}"
    assert f"`b: {bridge}`" in model_card({}, named)
    assert bridge_in_words({"bridge": "one"}) == "one"
    assert bridge_in_words({"teachers": {"a": "x", "b": {"use": "m:f", "bridge": 1}}}) is None


def test_states_of_a_teacher_without_a_bridge_are_compared_as_they_are(tmp_path, bridge):
    trainer = tiny_trainer(tmp_path, teacher=pool(bridge), rows=rows("a", "b", "a", "b"), mix_teachers=True)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(trainer.pair.teacher.teachers["a"], FrozenTeacher)
    assert torch.equal(trainer.pair.project_student(1, states, "a"), states)
    through = trainer.pair.teacher.teachers["b"].bridge
    assert torch.equal(trainer.pair.project_student(1, states, "b"), through.project_student(1, states))
