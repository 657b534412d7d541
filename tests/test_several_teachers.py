"""Several teachers: each rollout learns from its own, as it would alone; one teacher an update; what does not fit is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from oprd.alignment.position_pairs import TeacherReading
from oprd.config import OPRDConfig
from oprd.data.order import OneTeacherSteps
from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.states.layouts import probe_layouts
from oprd.states.requests import request_states
from oprd.states.several import SeveralTeachers, modules_of
from oprd.states.teachers import FrozenTeacher
from oprd.tasks.task import FunctionGrader, Task
from oprd.training.alarm import AlarmWatch, RisingLoss
from oprd.training.metrics import teacher_metrics
from oprd.training.trainer import OPRDTrainer
from tiny import prompt_rows, random_rollouts, tiny_model, tiny_tokenizer, tiny_trainer, weights

SGD = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0.0, "diagnostic_steps": 1, "micro_batch_tokens": 30}
LOSSES = {
    "representation": {},
    "both": {"output_space": "reverse_kl"},
    "output": {"representation_weight": 0.0, "output_space": "forward_kl"},
    "by token": {"reduction": "token"},
}

QUICK = ("both", "by token")
QUICK_AND_FURTHER = [*QUICK, *(pytest.param(name, marks=pytest.mark.further) for name in LOSSES if name not in QUICK)]


def rows(*teacher_ids: str) -> list[dict[str, str]]:
    return [row | {"teacher_id": name} for row, name in zip(prompt_rows(len(teacher_ids)), teacher_ids, strict=True)]


def points(points, **columns):
    """A reward that each row states."""
    return points


def pool() -> dict[str, torch.nn.Module]:
    return {"a": tiny_model(seed=1), "b": tiny_model(seed=2)}


def stepped(folder, teacher, data, **settings):
    """The metrics of one step, and the weights after it."""
    trainer = tiny_trainer(
        folder, teacher=teacher, rows=data, scripted=True, per_device_train_batch_size=len(data), **{**SGD, **settings}
    )
    trainer.train(outputs=False)
    return trainer.last_step.metrics, weights(trainer.model)


def moved(after) -> dict[str, torch.Tensor]:
    before = weights(tiny_model())
    return {name: weight.double() - before[name].double() for name, weight in after.items()}


def counted(metrics, reduction) -> float:
    return metrics["tokens"] if reduction == "token" else metrics["rollouts"]


@pytest.mark.parametrize(
    "loss", [*QUICK, *(pytest.param(name, marks=pytest.mark.further) for name in sorted({*LOSSES} - {*QUICK}))]
)
def test_routed_rows_learn_what_each_teacher_alone_would_teach(tmp_path, loss):
    """Loss and gradient are those of two runs with one teacher each, weighted by their rollouts (or tokens)."""
    settings, teachers = LOSSES[loss], pool()
    data = rows("a", "b", "a", "a")
    both, after = stepped(tmp_path / "both", teachers, data, mix_teachers=True, **settings)
    alone = {
        name: stepped(tmp_path / name, teachers[name], [row for row in data if row["teacher_id"] == name], **settings)
        for name in teachers
    }
    share = {name: counted(found, settings.get("reduction")) for name, (found, _) in alone.items()}
    share = {name: value / sum(share.values()) for name, value in share.items()}
    assert both["loss"] == pytest.approx(sum(share[name] * alone[name][0]["loss"] for name in teachers), rel=1e-5)
    for name, (found, _) in alone.items():
        assert both[f"teacher/{name}/loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert both[f"teacher/{name}/cosine"] == pytest.approx(found["cosine"], rel=1e-5)
        assert both[f"teacher/{name}/rollouts"] == found["rollouts"]
    parts = {name: moved(own) for name, (_, own) in alone.items()}
    for weight, change in moved(after).items():
        expected = sum(share[name] * parts[name][weight] for name in teachers)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize(
    "loss", [*QUICK, *(pytest.param(name, marks=pytest.mark.further) for name in sorted({*LOSSES} - {*QUICK}))]
)
def test_where_all_teachers_read_a_rollout_each_counts_equally(tmp_path, loss):
    """The loss is the mean of the teachers' losses on the same rollouts: a long answer does not weigh more."""
    settings, teachers = LOSSES[loss], pool()
    together, after = stepped(tmp_path / "all", teachers, prompt_rows(), teachers_per_prompt="all", **settings)
    alone = {name: stepped(tmp_path / name, teachers[name], prompt_rows(), **settings) for name in teachers}
    assert together["loss"] == pytest.approx(sum(found["loss"] for found, _ in alone.values()) / 2, rel=1e-5)
    assert together["rollouts"] == 4
    assert together["padding_share"] < 1
    parts = [moved(own) for _, own in alone.values()]
    for weight, change in moved(after).items():
        torch.testing.assert_close(change, (parts[0][weight] + parts[1][weight]) / 2, rtol=1e-3, atol=2e-7)


def test_several_teachers_of_which_one_reads_all_are_that_teacher(tmp_path):
    """To the bit, on the CPU."""
    one, own = stepped(tmp_path / "one", pool()["a"], prompt_rows(), output_space="reverse_kl")
    several, after = stepped(
        tmp_path / "several", pool(), rows("a", "a", "a", "a"), output_space="reverse_kl", mix_teachers=True
    )
    assert several["loss"] == one["loss"]
    assert all(torch.equal(own[name], after[name]) for name in own)
    assert several["teacher/b/rollouts"] == 0
    assert "teacher/b/loss" not in several


def test_a_policy_gradient_counts_a_rollout_once_however_many_teachers_read_it(tmp_path):
    settings = {
        "policy_gradient_weight": 1.0, "num_generations": 2, "representation_weight": 0.0, "diagnostic_steps": 0,
        "reward_funcs": [lambda completion_ids, **_: [float(sum(ids) % 5) for ids in completion_ids]],
    }  # fmt: skip
    one, own = stepped(tmp_path / "one", pool()["a"], prompt_rows(), **settings)
    many, after = stepped(tmp_path / "all", pool(), prompt_rows(), teachers_per_prompt="all", **settings)
    assert many["loss"] == pytest.approx(one["loss"], abs=1e-6)
    for name, change in moved(after).items():
        torch.testing.assert_close(change, moved(own)[name], rtol=1e-3, atol=2e-7)


def test_accuracy_is_counted_by_teacher(tmp_path):
    data = [row | {"points": points} for row, points in zip(rows("a", "b", "a", "b"), [1, 0, 0, 0], strict=True)]
    trainer = tiny_trainer(tmp_path, teacher=pool(), rows=data, scripted=True, mix_teachers=True, reward_funcs=points)
    trainer.train(outputs=False)
    assert trainer.last_step.metrics["accuracy"] == 0.25
    assert trainer.last_step.metrics["teacher/a/accuracy"] == 0.5
    assert trainer.last_step.metrics["teacher/b/accuracy"] == 0.0


@pytest.mark.parametrize("cosine", [True, False])
def test_the_metrics_of_a_teacher_have_the_same_names_whether_it_read_a_rollout_here_or_not(cosine):
    """Processes add metrics up by their place among the sorted names."""
    some = teacher_metrics({"a": TeacherReading([0, 1]), "b": TeacherReading([])}, [True, None], cosine=cosine)
    none = teacher_metrics({"a": TeacherReading([]), "b": TeacherReading([])}, [], cosine=cosine)
    assert [*some] == [*none]
    assert (some["teacher/a/rollouts"], some["teacher/a/correct"], some["teacher/a/graded"]) == (2, 1, 1)
    assert ("teacher/a/cosine" in some) is cosine
    assert teacher_metrics({None: TeacherReading([0])}, [True], cosine=cosine) == {}


# The order of the prompts


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99)
)
def test_each_step_has_one_teacher_and_no_prompt_comes_twice(names, prompts_a_step, repeats, seed):
    if min(names.count(name) for name in {*names}) < prompts_a_step:
        with pytest.raises(ValueError, match="do not fill one step"):
            OneTeacherSteps(names, prompts_a_step, repeats, seed)
        return
    sampler = OneTeacherSteps(names, prompts_a_step, repeats, seed)
    drawn = list(sampler)
    assert len(drawn) == len(sampler)
    steps = [drawn[i : i + prompts_a_step] for i in range(0, len(drawn), prompts_a_step)]
    assert all(len({names[place] for place in step}) == 1 for step in steps)
    groups = [steps[i : i + repeats] for i in range(0, len(steps), repeats)]
    assert all(step == group[0] for group in groups for step in group)
    once = [place for group in groups for place in group[0]]
    assert len({*once}) == len(once)
    left_out = sum(names.count(name) % prompts_a_step for name in {*names})
    assert len(once) == len(names) - left_out
    assert list(OneTeacherSteps(names, prompts_a_step, repeats, seed)) == drawn
    sampler.set_epoch(1)
    again = list(sampler)
    assert len({*again}) == len({*drawn})
    steps = [again[i : i + prompts_a_step] for i in range(0, len(again), prompts_a_step)]
    assert all(len({names[place] for place in step}) == 1 for step in steps)


def test_the_steps_of_the_teachers_are_shuffled_by_seed_and_epoch():
    names = ["a"] * 20 + ["b"] * 20
    found = []
    for seed in (0, 1):
        sampler = OneTeacherSteps(names, 2, 1, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            found.append([*sampler])
    assert len({tuple(order) for order in found}) == 4
    assert all(sorted(order) == list(range(40)) for order in found)
    turns = sum(names[a] != names[b] for a, b in pairwise(found[0][::2]))
    assert turns > 3  # not all of one teacher first


class Seen(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.teachers, self.stop_at = trainer, [], None

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            metrics = self.trainer.last_step.metrics
            self.teachers.append("".join(name for name in "ab" if metrics[f"teacher/{name}/rollouts"]))
            if state.global_step == self.stop_at:
                control.should_training_stop = control.should_save = True


def run(folder, stop_at=None, resume=None, **settings):
    data = [row | {"teacher_id": "ab"[i % 2]} for i, row in enumerate(prompt_rows(9)[:8])]
    trainer = tiny_trainer(
        folder, teacher=pool(), rows=data, max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=100,
        **settings,
    )  # fmt: skip
    seen = Seen(trainer)
    seen.stop_at = stop_at
    trainer.add_callback(seen)
    trainer.train(resume, outputs=False)
    return seen.teachers, weights(trainer.model)


def test_one_teacher_an_update_also_after_resuming_within_an_epoch(tmp_path):
    """8 prompts of two teachers make 4 steps an epoch; the run is stopped in its second epoch."""
    whole, after = run(tmp_path / "whole")
    first, _ = run(tmp_path / "parts", stop_at=5)
    rest, resumed = run(tmp_path / "parts", resume=True)
    assert all(step in ("a", "b") for step in whole)
    assert {*whole} == {"a", "b"}
    assert [*first, *rest] == whole
    assert all(torch.equal(after[name], resumed[name]) for name in after)


@pytest.mark.further
def test_teachers_may_be_mixed_within_an_update(tmp_path):
    steps, _ = run(tmp_path, mix_teachers=True)
    assert "ab" in steps


def test_alarms_compare_the_steps_of_a_teacher_with_each_other(tmp_path):
    """One teacher's loss is a hundredth of the other's, and its rollouts are all correct: that is no rise and no fall."""
    args = OPRDConfig(str(tmp_path), use_cpu=True, alarm_window=4)
    watch, rising = AlarmWatch(4), RisingLoss(args)

    def row(step, name, loss, cosine, accuracy):
        both = {f"teacher/{other}/rollouts": 8.0 * (other == name) for other in "ab"}
        return {
            "step": step, "loss/representation": loss, "loss": loss, "cosine": cosine, "accuracy": accuracy, "rollouts": 8.0,
            **both,
        }  # fmt: skip

    easy, hard = (1e-4, 0.5, 1.0), (1e-2, 0.9, 0.0)
    rows = [row(step, "a", *easy) for step in range(6)] + [row(6 + step, "b", *hard) for step in range(6)]
    assert [watch.watch(each) for each in rows] == [None] * 12
    assert [rising.watch(each) for each in rows] == [None] * 12
    worse = [row(12 + step, "b", 1e-1, 0.9 + step / 100, 0.0) for step in range(6)]
    assert any(rising.watch(each) for each in worse)
    fallen = [row(20 + step, "a", 1e-4, 0.6, 0.0) for step in range(6)]
    assert any(watch.watch(each) for each in fallen)


# Models and memory


def test_a_request_goes_to_the_teacher_that_it_names():
    models = pool()
    several = SeveralTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    request = request_states(random_rollouts(), (1, 3), head=True)
    for name, model in models.items():
        found = several.states(type(request)(**{**vars(request), "teacher": name}))
        expected = FrozenTeacher(model).states(request)
        assert all(torch.equal(a, b) for a, b in zip(found.values, expected.values, strict=True))
        assert torch.equal(found.head_MD, expected.head_MD)
    with pytest.raises(ValueError, match="a request names None; there are a, b"):
        several.states(request)


def test_weights_are_in_memory_once_for_each_model(tmp_path):
    named = {"a": "embedded:tiny/teacher", "b": {"model": "embedded:tiny/teacher"}, "c": "embedded:tiny/student"}
    trainer = OPRDTrainer(
        "embedded:tiny/student", named, OPRDConfig(str(tmp_path), max_completion_length=9, use_cpu=True, teachers_per_prompt="all"),
        train_dataset=[{"prompt": "1+2="}],
    )  # fmt: skip
    several = trainer.pair.teacher
    assert several.teachers["a"] is several.teachers["b"]
    assert len(modules_of(several)) == 2
    assert trainer.run_config.settings()["teachers"] == named


class Elsewhere(torch.nn.Module):
    """A model that notes where it is moved."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))
        self.device = []

    def to(self, device):
        self.device.append(str(device))
        self.weight = torch.nn.Parameter(torch.zeros(1, device="cpu" if "cpu" in str(device) else "meta"))
        return self


def test_offloaded_weights_are_moved_when_another_teacher_is_asked():
    models = {name: Elsewhere() for name in "ab"}

    class Reads:
        def __init__(self, model):
            self.modules, self.info, self.identity = (model,), FrozenTeacher(tiny_model()).info, ""

        def states(self, request):
            raise AssertionError("not asked here")

    several = SeveralTeachers({name: Reads(model) for name, model in models.items()}, offload=True)
    assert several.modules == ()
    for name in ("a", "a", "b", "b", "a"):
        assert several.ready(name, "meta") is several.teachers[name]
    assert models["a"].device == ["cpu", "meta"]
    assert models["b"].device == ["cpu", "meta", "cpu"]
    assert several.take_moved() == 2
    assert several.take_moved() == 0


def test_on_a_cpu_offloading_moves_nothing(tmp_path):
    plain, own = stepped(tmp_path / "plain", pool(), rows("a", "b", "a", "b"), mix_teachers=True)
    moved_, after = stepped(
        tmp_path / "moved", pool(), rows("a", "b", "a", "b"), mix_teachers=True, offload_teachers=True
    )
    assert moved_["teacher_moves"] == 0
    assert "teacher_moves" not in plain
    assert all(torch.equal(own[name], after[name]) for name in own)


def test_each_teacher_is_evaluated_on_its_own_problems(tmp_path):
    data = [row | {"points": int(row["teacher_id"] == "a")} for row in rows("a", "b", "b", "a")]
    trainer = tiny_trainer(
        tmp_path,
        teacher=pool(),
        rows=data,
        eval_dataset=data,
        eval_num_generations=2,
        mix_teachers=True,
        reward_funcs=points,
    )
    found = trainer.evaluate_teacher()
    assert found.summary["by_teacher"] == {"a": 1.0, "b": 0.0}
    assert found.correct == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert found.rollouts.rows == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_resumed_run_names_the_teacher_that_has_changed(tmp_path):
    data = rows("a", "b", "a", "b")

    def made(teachers, steps):
        return tiny_trainer(
            tmp_path,
            teacher=teachers,
            rows=data,
            max_steps=steps,
            save_strategy="steps",
            save_steps=1,
            mix_teachers=True,
        )

    made(pool(), 1).train(outputs=False)
    with pytest.raises(ValueError, match=r"not the run that the checkpoint belongs to:(\n.*)*teacher/b: ") as refused:
        made({**pool(), "b": tiny_model(seed=3)}, 2).train(True, outputs=False)
    assert "teacher/a" not in str(refused.value)


class OwnTeacher(FrozenTeacher):
    """A teacher that a script makes."""


def test_a_run_whose_teachers_are_objects_of_a_script_can_be_resumed(tmp_path):
    """Each process makes objects anew, at other addresses."""

    def made(steps):
        teachers = {name: OwnTeacher(model) for name, model in pool().items()}
        kept.append(teachers)  # so that no address comes twice
        return tiny_trainer(
            tmp_path, teacher=teachers, rows=rows("a", "b", "a", "b"), scripted=True, max_steps=steps, save_strategy="steps",
            save_steps=1, mix_teachers=True,
        )  # fmt: skip

    kept: list[object] = []
    made(1).train(outputs=False)
    resumed = made(2)
    resumed.train(True, outputs=False)
    assert resumed.state.global_step == 2
    assert resumed.identity.settings["teachers"]["a"] == "<OwnTeacher given in Python>"


# What is refused


def recipe(folder, **keys):
    values = {
        "model": "embedded:tiny/student", "teachers": {"math": "embedded:tiny/teacher", "code": "embedded:tiny/teacher"},
        "train_dataset": "rows.jsonl", "output_dir": str(folder), "max_steps": 1, "use_cpu": True,
    }  # fmt: skip
    return RunConfig.parse({**values, **keys})


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (
            {"teacher_id": "maths"},
            "teacher_id 'maths' is none of the teachers: math, code are .* did you mean 'math'",
        ),
        ({}, "the row has no teacher_id"),
        ({"teacher_id": None}, "the row has no teacher_id"),
    ],
)
def test_a_row_without_a_known_teacher_is_named(tmp_path, row, wrong):
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": "1+2=", "teacher_id": "code"}, {"prompt": "3+4=", **row}]
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {wrong}"):
        plan(recipe(tmp_path, train_dataset=str(file))).describe()
    with pytest.raises(ValueError, match=rf"train_dataset row 1: {wrong}"):
        tiny_trainer(tmp_path, teacher={"math": tiny_model(seed=1), "code": tiny_model(seed=2)}, rows=lines)
    plan(recipe(tmp_path, train_dataset=str(file), teachers_per_prompt="all")).describe()


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"teacher_model": "embedded:tiny/teacher"}, "teachers: there is a teacher_model too"),
        ({"teachers": {}}, "teachers: {} has no teacher"),
        ({"teachers": {"a/b": "x"}}, "teachers: 'a/b' is not a teacher_id"),
        ({"teachers": {"a": {"model": "x", "bridge": 3}}}, "teachers: a: bridge: 3 is not a folder"),
        (
            {"teachers": {"a": {"model": "x", "bridge_rank": 3}}},
            "teachers: a: bridge_rank: 3 has no effect without a bridge",
        ),
        (
            {"teachers": {"a": {"model": "x", "bridge": "y", "bridge_rank": 0}}},
            "teachers: a: bridge_rank: 0 is not allowed; 1 or more",
        ),
        (
            {"teachers": {"a": {"model": "x", "dtype": "y"}}},
            "teachers: a: unknown key 'dtype'; allowed are model, init_kwargs, bridge, bridge_rank, chat_template_kwargs, "
            "system_prompt, special_token_map, or use with its arguments",
        ),
        (
            {"teachers": {"a": {"model": "x", "system_prompt": ["Be brief."]}}},
            "teachers: a: system_prompt: ['Be brief.'] is not a text",
        ),
        (
            {"teachers": {"a": {"model": "x", "chat_template_kwargs": "thinking"}}},
            "teachers: a: chat_template_kwargs: 'thinking' is not a mapping",
        ),
        (
            {"teachers": {"a": {"model": "x", "chat_template_kwargs": {"add_generation_prompt": False}}}},
            "teachers: a: chat_template_kwargs: 'add_generation_prompt' is not allowed",
        ),
        (
            {"teachers": {"a": {"model": "x", "special_token_map": {"<a>": 3}}}},
            "teachers: a: special_token_map: 3 is not a token's text",
        ),
        ({"teachers": {"a": {"init_kwargs": {}}}}, "teachers: a: the key 'model' is missing"),
        ({"teachers": {"a": "student"}}, "teachers: a: student is for teacher_model alone"),
        ({"teachers": {"a": "embedded:wider/teacher"}}, "teachers: a: teacher_model: it has"),
        (
            {
                "teachers": {"a": "embedded:wider/teacher"},
                "representation_weight": 0.0,
                "objectives": [{"use": "oprd.objectives.head_metric:HeadMetric", "alpha": 0.5}],
            },
            "teachers: a: teacher_model: it has",
        ),
        (
            {"bridge": "folder"},
            "teachers: they do not go with bridge: folder, which is of one teacher; each has its own",
        ),
        (
            {"teachers_per_prompt": "all", "fully_shard": True},
            "teachers_per_prompt: all does not go with fully_shard, under",
        ),
        ({"mix_teachers": True, "fully_shard": True}, "mix_teachers: True does not go with fully_shard, under"),
        ({"offload_teachers": True, "fully_shard": True}, "offload_teachers: True does not go with fully_shard, which"),
        (
            {"teachers_per_prompt": "all", "mix_teachers": True},
            "mix_teachers: true has no effect with teachers_per_prompt: all",
        ),
        ({"teachers_per_prompt": "each"}, "teachers_per_prompt: 'each' is not one of one, all"),
        (
            {"teachers": None, "teacher_model": "x", "mix_teachers": True},
            "mix_teachers: True has no effect without",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_model_is_loaded(tmp_path, keys, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        plan(recipe(tmp_path, **keys))


def test_a_schedule_by_which_the_student_writes_every_step_is_allowed(tmp_path):
    schedule = {"schedule": "linear", "start": 1.0, "end": 1.0, "steps": 2}
    assert plan(recipe(tmp_path, lmbda=schedule)).several.keys() == {"math", "code"}


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    other = tiny_tokenizer("ABC")
    models = pool()
    with pytest.raises(ValueError, match="teachers: a: teacher_model: "):
        tiny_trainer(
            tmp_path, teacher=models, rows=rows("a", "b", "a", "b"), teacher_processing_class={"a": _reversed(other)}
        )


def _reversed(tokenizer):
    """A tokenizer whose ids stand for other characters."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = list(content["model"]["vocab"])
    content["model"]["vocab"] = dict(zip(names, [0, 1, 2, *range(len(names) - 1, 2, -1)], strict=True))
    from tokenizers import Tokenizer

    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def test_a_step_that_a_teacher_cannot_fill_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, teacher=pool(), rows=rows("a", "a", "a", "b"), per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="1 prompts of teacher_id 'b' do not fill one step of 2"):
        trainer.train(outputs=False)


def test_the_plan_shows_every_teacher(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+2=", "teacher_id": "math"}\n')
    text = "\n".join(plan(recipe(tmp_path, train_dataset=str(file))).describe())
    assert "teacher math: embedded:tiny/teacher: " in text
    assert "teachers: the column teacher_id names it, one an update" in text


def test_each_teacher_is_probed_while_it_is_on_the_device(tmp_path, monkeypatch):
    """With `offload_teachers`, one that is made ready moves the one before back to host memory."""
    seen: list[str] = []
    ready, teachers = SeveralTeachers.ready, pool()
    names = {id(model): name for name, model in teachers.items()}

    def watched(self, teacher_id, device):
        seen.append(f"ready {teacher_id}")
        return ready(self, teacher_id, device)

    def probe(model, *args, **kwargs):
        seen.append(f"probe {names.get(id(model), 'student')}")
        return probe_layouts(model, *args, **kwargs)

    monkeypatch.setattr(SeveralTeachers, "ready", watched)
    monkeypatch.setattr("oprd.training.probe.probe_layouts", probe)
    tiny_trainer(tmp_path, teacher=teachers, rows=rows("a", "b", "a", "b"), mix_teachers=True)
    assert seen[-4:] == ["ready a", "probe a", "ready b", "probe b"]


def test_where_all_teachers_answer_a_problem_it_counts_once(tmp_path):
    """Its grade is the mean over teachers; the interval is over problems."""
    problems = [{"prompt": row["prompt"], "answer": "1"} for row in prompt_rows(3)]
    trainer = tiny_trainer(
        tmp_path,
        teacher=pool(),
        teachers_per_prompt="all",
        task="addition",
        eval_dataset=problems,
        eval_num_generations=2,
    )
    graded: dict[str, list[bool]] = {
        "a": [True, True, False, False, False, False],
        "b": [True, False, True, False, False, False],
    }
    answers = iter([*graded["a"], *graded["b"]])
    trainer.grading.task = Task("fake", "", lambda: FunctionGrader(lambda response, answer: next(answers)))
    found = trainer.evaluate_teacher()
    assert found.measured.by_problem == [0.75, 0.25, 0.0]
    assert (found.summary["problems"], found.summary["k"]) == (3, 2)
    assert found.summary["by_teacher"] == {"a": 2 / 6, "b": 2 / 6}
    # Of the k samples of one teacher, not of all.
    assert found.summary["best_at_k"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found.summary["avg_at_k"] == pytest.approx(1 / 3)
    assert found.rollouts.rows == [row for row in range(3) for _ in range(4)]


def test_prompts_that_fill_no_step_are_said(tmp_path, caplog):
    for name, teacher_ids in (("two", "aaabbb"), ("none", "aabbbb")):
        caplog.clear()
        trainer = tiny_trainer(tmp_path / name, teacher=pool(), rows=rows(*teacher_ids), per_device_train_batch_size=2)
        trainer.train(outputs=False)
        said = [record.getMessage() for record in caplog.records if "left out of each epoch" in record.getMessage()]
        two = "2 of 6 prompts do not fill a step of 2 and are left out of each epoch, other ones each time"
        assert said == ([two] if name == "two" else [])


class Following:
    """A teacher of the user's that changes with the student."""

    def __init__(self):
        self.inner = FrozenTeacher(tiny_model(seed=3))
        self.info, self.modules, self.identity = self.inner.info, self.inner.modules, "following"
        self.states = self.inner.states

    def follow(self, step): ...
    def save(self, folder): ...
    def load(self, folder): ...


def test_one_of_several_that_follows_the_student_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teachers: b: it follows the student, which only a run's only teacher can"):
        tiny_trainer(
            tmp_path, teacher={"a": tiny_model(seed=1), "b": Following()}, rows=rows(*"abab"), mix_teachers=True
        )
