"""Several teachers whose responses the student learns from: each writes the rows that name it, as it would alone."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from oprd.alignment.model_pair import ModelPair
from oprd.data.prompts import Prompt
from oprd.data.rows import PromptRow
from oprd.models.loading import LoadedModel, ModelInfo
from oprd.resolve import plan
from oprd.rollouts.engine import EngineAbilities, Sampled, Sampling, repeat_prompts, student_writes
from oprd.rollouts.engines import DecodeEngine
from oprd.rollouts.teacher_text import TeacherWriter
from oprd.states.several import SeveralTeachers
from oprd.states.teachers import FrozenTeacher
from oprd.training.rate_probe import probe_learning_rate
from oprd.types import Rollouts
from test_distributed import run_two_ranks
from test_off_policy import logits_of
from test_rate_probe import resolved
from test_several_teachers import SGD, counted, moved, pool, recipe, rows
from test_teacher_text import stop_at
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

SUPERVISED = {
    "representation_weight": 0.0, "output_space": "cross_entropy", "lmbda": 0.0, **SGD, "diagnostic_steps": 0,
}  # fmt: skip


STUDENT = LoadedModel(tiny_model(), tiny_tokenizer(), ModelInfo.of(tiny_model()))


SEED = 15
"""With it and `lmbda: 0.5` a teacher writes the steps 2 and 4."""


class Named(torch.nn.Module):
    """A model that has nothing but a name."""

    def __init__(self, number):
        super().__init__()
        self.number = number


class Writes:
    """A teacher that can do nothing but write."""

    def __init__(self, number):
        self.model, self.modules, self.identity = Named(number), (), ""
        self.info = STUDENT.info

    def states(self, request):
        raise AssertionError("not asked here")

    def sampler(self):
        return nullcontext(self.model)


def says_who_and_what(model, prompt_ids, *, num_generations, sampling, seed, rows=None, want_log_probs=False):
    """Completions that say which model wrote them, for which prompt, and which generation of it they are."""
    prompts, owners = repeat_prompts(prompt_ids, num_generations, rows)
    completions = [[10 + model.number, prompt[0], 20 + i % num_generations] for i, prompt in enumerate(prompts)]
    return Sampled(Rollouts(prompts, completions, ["length"] * len(prompts), [""] * len(prompts), owners))


class Engine:
    can = EngineAbilities()
    pad_token_id, stop_token_ids = 0, [2]
    generate = staticmethod(says_who_and_what)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), st.integers(1, 3))
def test_each_prompt_is_written_by_its_teacher_in_its_place(names, generations):
    several = SeveralTeachers({name: Writes(number) for number, name in enumerate("abc")})
    prompts = [Prompt(100 + i, [i + 1, 9], PromptRow("", columns={"teacher_id": name})) for i, name in enumerate(names)]
    writer = TeacherWriter(ModelPair(STUDENT, several), Engine(), "decode")
    written = writer.write(prompts, num_generations=generations, sampling=Sampling(9), seed=0)
    expected = [
        [10 + "abc".index(name), i + 1, 20 + number] for i, name in enumerate(names) for number in range(generations)
    ]
    assert written.rollouts.completion_ids == expected
    assert written.rollouts.rows == [100 + i for i in range(len(names)) for _ in range(generations)]
    assert [*written.places] == [*range(len(expected))]


def prompts_of(names):
    """A prompt for each teacher_id."""
    ids = [tiny_tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    return [Prompt(i, ids[i], PromptRow(PROMPTS[i], columns={"teacher_id": name})) for i, name in enumerate(names)]


def test_a_row_is_written_as_its_teacher_alone_would_write_it():
    """Whatever is beside it in the batch, and whoever writes that."""
    models, found = pool(), {}
    several = SeveralTeachers({name: FrozenTeacher(model) for name, model in models.items()})
    engine = DecodeEngine(tiny_tokenizer(), [2])
    writer = TeacherWriter(ModelPair(STUDENT, several), engine, "decode")
    asked = {"num_generations": 2, "sampling": Sampling(9), "seed": 5}
    for names in ("abab", "abba", "aaaa", "bbbb"):
        written = writer.write(prompts_of(names), **asked).rollouts
        for place, name in enumerate(names):
            mine = range(2 * place, 2 * place + 2)
            found.setdefault((place, name), []).append([written.completion_ids[i] for i in mine])
    for (place, name), ways in found.items():
        alone = engine.generate(models[name], [prompts_of("aaaa")[place].ids], **asked).rollouts.completion_ids
        assert all(way == alone for way in ways)
    assert all(found[place, "a"] != found[place, "b"] for place in range(4))


def one_step(folder, teacher, data, **settings):
    """One step on what the teachers really write: metrics, rollouts and the weights after it."""
    trainer = tiny_trainer(
        folder, teacher=teacher, rows=data, per_device_train_batch_size=len(data), **{**SUPERVISED, **settings}
    )
    trainer.train(outputs=False)
    return trainer.last_step.metrics, trainer.last_step.rollouts, weights(trainer.model)


@pytest.mark.parametrize("reduction", ["token", "rollout"])
def test_supervised_training_on_the_responses_of_several_teachers_by_hand(tmp_path, reduction):
    """The loss by the definition, and the step as that of two runs with one teacher each."""
    teachers, data = pool(), rows("a", "b", "a", "a")
    both, rollouts, after = one_step(tmp_path / "both", teachers, data, mix_teachers=True, reduction=reduction)
    nats = [
        -float(log_p.gather(1, torch.tensor(ids)[:, None]).sum())
        for log_p, ids in zip(logits_of(tiny_model(), rollouts), rollouts.completion_ids, strict=True)
    ]
    count = sum(rollouts.completion_lengths) if reduction == "token" else 4
    assert both["loss"] == pytest.approx(sum(nats) / count, rel=1e-5)
    mine = [place for place, row in enumerate(rollouts.rows) if data[row]["teacher_id"] == "b"]
    own = sum(rollouts.completion_lengths[place] for place in mine) if reduction == "token" else len(mine)
    assert both["teacher/b/loss"] == pytest.approx(sum(nats[place] for place in mine) / own, rel=1e-5)
    assert both["student_wrote"] == 0
    alone = {
        name: one_step(
            tmp_path / name, teachers[name], [row for row in data if row["teacher_id"] == name], reduction=reduction
        )
        for name in teachers
    }
    share = {name: counted(found, reduction) for name, (found, *_) in alone.items()}
    share = {name: value / sum(share.values()) for name, value in share.items()}
    parts = {name: moved(own) for name, (*_, own) in alone.items()}
    for weight, change in moved(after).items():
        expected = sum(share[name] * parts[name][weight] for name in teachers)
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=2e-7)


def test_several_teachers_of_which_one_writes_all_are_that_teacher(tmp_path):
    """To the bit: also the responses of a run with one teacher are as before."""
    settings = {"representation_weight": 1.0, "output_space": "forward_kl", "num_generations": 2}
    one, written, own = one_step(tmp_path / "one", pool()["b"], prompt_rows(), **settings)
    several, again, after = one_step(
        tmp_path / "several", pool(), rows("b", "b", "b", "b"), mix_teachers=True, **settings
    )
    assert again == written
    assert several["loss"] == one["loss"]
    assert all(torch.equal(own[name], after[name]) for name in own)


def run(folder, resume=None, stop=None, **settings):
    data = [row | {"teacher_id": "ab"[i % 2]} for i, row in enumerate(prompt_rows(9)[:8])]
    trainer = tiny_trainer(
        folder, teacher=pool(), rows=data, max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
        seed=SEED, **{**SUPERVISED, "representation_weight": 0.1, "lmbda": 0.5, "mix_teachers": True, **settings},
    )  # fmt: skip
    if stop:
        trainer.add_callback(stop_at(stop))
    trainer.train(resume, outputs=False)
    return without_times(trainer.run_folder.read_metrics()), weights(trainer.model)


def test_a_run_is_the_same_when_it_is_resumed_and_where_weights_wait_in_host_memory(tmp_path):
    whole, after = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=2)
    resumed = run(tmp_path / "parts", resume=True)
    offloaded, moved_ = run(tmp_path / "offloaded", offload_teachers=True)
    assert [row["student_wrote"] for row in whole] == [float(student_writes(0.5, SEED, step)) for step in range(4)]
    assert {row["student_wrote"] for row in whole} == {0.0, 1.0}
    assert any(row["teacher/a/rollouts"] and row["teacher/b/rollouts"] for row in whole if not row["student_wrote"])
    assert resumed[0] == whole
    for name, weight in after.items():
        assert torch.equal(weight, resumed[1][name])
        assert torch.equal(weight, moved_[name])
    assert [{k: v for k, v in row.items() if k != "teacher_moves"} for row in offloaded] == whole
    assert all("teacher_moves" in row for row in offloaded)


def test_a_teacher_is_where_it_runs_before_it_writes(tmp_path):
    trainer = tiny_trainer(
        tmp_path, teacher=pool(), rows=rows("a", "b", "b", "a"), mix_teachers=True, lmbda=0.0, offload_teachers=True
    )
    several, writer, seen = trainer.pair.teacher, trainer.rollouts.teacher_writer, []
    ready, generate = several.ready, trainer.engine.generate
    several.ready = lambda name, device: seen.append((name, device)) or ready(name, device)
    trainer.engine.generate = lambda model, ids, **more: seen.append(model) or generate(model, ids, **more)
    writer.write([*trainer.train_dataset], num_generations=1, sampling=Sampling(9), seed=0, device="cpu")
    models = [several.teachers[name].model for name in "ab"]
    assert seen == [("a", "cpu"), models[0], ("b", "cpu"), models[1]]


def test_one_teacher_writes_an_update_where_they_are_not_mixed(tmp_path):
    metrics, _ = run(tmp_path, mix_teachers=False, lmbda=0.0)
    read = [(row["teacher/a/rollouts"], row["teacher/b/rollouts"]) for row in metrics]
    assert {*read} == {(4.0, 0.0), (0.0, 4.0)}


def test_teachers_that_see_more_write_their_rows_too(tmp_path):
    """Each reads its own prompt, and its response stands under the student's."""
    data = [row | {"answer": "7"} for row in rows("a", "b", "b", "a")]
    trainer = tiny_trainer(
        tmp_path, teacher=pool(), rows=data, mix_teachers=True, teacher_prompt="{answer}#{prompt}", **SUPERVISED
    )
    asked = []

    def spy(generate, model, ids, **more):
        asked.append((model, [trainer.pair.tokenizer.decode(prompt) for prompt in ids]))
        return generate(model, ids, **more)

    for name in "ab":
        engine = trainer.rollouts.teacher_writer.engine_of(name)
        engine.generate = partial(spy, engine.generate)
    trainer.train(outputs=False)
    several = trainer.pair.teacher.teachers
    texts = {id(model): sorted(text.removeprefix("<bos>") for text in ids) for model, ids in asked}
    for name, own in (("a", (0, 3)), ("b", (1, 2))):
        assert texts[id(several[name].model)] == sorted(f"7#{PROMPTS[place]}" for place in own)
    written = trainer.last_step.rollouts
    for prompt, row in zip(written.prompt_ids, written.rows, strict=True):
        assert trainer.pair.tokenizer.decode(prompt).removeprefix("<bos>") == PROMPTS[row]


@pytest.mark.further
def test_the_rate_is_found_on_the_responses_of_all(tmp_path):
    """`learning_rate: auto` asks each teacher for its rows."""
    data = [row | {"teacher_id": "ab"[i % 2]} for i, row in enumerate(prompt_rows(9))]
    asked: list[int] = []

    class Watched(Engine):
        @staticmethod
        def generate(model, prompt_ids, *, rows, **more):
            asked.append(len(rows))
            return scripted_generate(model, prompt_ids, rows=rows, **more)

    probe = probe_learning_rate(resolved(tmp_path, data, teacher=pool(), engine=Watched(), lmbda=0.0))
    assert probe.learning_rate > 0
    assert len(asked) == 2


@pytest.mark.further
@pytest.mark.timeout(700)
def test_two_sharded_processes_write_as_one_does(tmp_path):
    """All processes of a step ask one teacher, so that its shards are gathered by all."""
    run_two_ranks("writers_ranks_script.py", tmp_path)
    from writers_ranks_script import trainer_of

    trainer = trainer_of(tmp_path / "one", 1)
    trainer.train(outputs=False)
    for rank in (0, 1):
        for name, weight in load_file(tmp_path / f"sharded-{rank}.safetensors").items():
            torch.testing.assert_close(weight, weights(trainer.model)[name], rtol=1e-5, atol=1e-6)


# What is refused


class MuteTeacher:
    """A teacher of a configuration that cannot write."""

    info = identity = modules = None

    def states(self, request):
        raise AssertionError("not asked here")


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        (
            {"lmbda": 0.5, "teachers_per_prompt": "all"},
            "teachers_per_prompt: all does not go with lmbda: 0.5, which lets a teacher write: no one teacher owns a prompt "
            "that all read; set teachers_per_prompt: one, where the row's teacher_id names the writer, or lmbda: 1",
        ),
        (
            {"lmbda": {"schedule": "linear", "start": 1.0, "end": 0.5, "steps": 2}, "teachers_per_prompt": "all"},
            "teachers_per_prompt: all does not go with lmbda: {'schedule': 'linear'",
        ),
        (
            {"lmbda": 0.0, "teachers": {"a": {"model": "x", "responses": "r.jsonl"}}},
            "teachers: a: responses is for one teacher_model; name a model, which writes the responses of its own rows",
        ),
        ({"lmbda": 0.0, "teachers": {"a": {"cache": "folder"}}}, "teachers: a: cache is for one teacher_model"),
        (
            {"lmbda": 0.5, "teachers": {"a": {"use": "test_teachers_write:MuteTeacher"}}, "eval_teacher": False},
            "teachers: a: lmbda: 0.5 lets the teacher write, and MuteTeacher cannot sample here",
        ),
        (
            {"teachers": {"a": {"use": "test_teachers_write:SUPERVISED"}}},
            "teachers: a: teacher_model: 'test_teachers_write:SUPERVISED' is a dict; name a class",
        ),
        (
            {"lmbda": 0.0, "mix_teachers": True, "fully_shard": True},
            "mix_teachers: True does not go with fully_shard",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_model_is_loaded(tmp_path, keys, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        plan(recipe(tmp_path, **keys))


def test_the_settings_that_let_each_write_its_rows_are_allowed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1+2=", "teacher_id": "math"}))
    supervised = {"lmbda": 0.0, "output_space": "cross_entropy", "representation_weight": 0.0}
    for keys in (supervised, {"lmbda": 0.5, "mix_teachers": True}, {"lmbda": 0.5, "fully_shard": True}):
        plan(recipe(tmp_path, train_dataset=str(file), **keys)).describe()
