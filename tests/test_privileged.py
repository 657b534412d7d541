"""A teacher that reads a prompt which the student does not see; a student that is its own teacher; and what rollouts give away."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from oprd import capture_states, representation_loss
from oprd.alignment.privileged import fields_of, privileged_row, quotes
from oprd.data.rows import PromptRow
from oprd.models.loading import ModelInfo
from oprd.resolve import plan
from oprd.run_config import RunConfig, parse_overrides
from oprd.states.self_teacher import FollowingTeacher
from oprd.states.teachers import AdapterOffTeacher, FrozenTeacher
from oprd.types import Rollouts
from tiny import prompt_rows, tiny_model, tiny_tokenizer, tiny_trainer, weights

BOTH = {"output_space": "reverse_kl", "diagnostic_steps": 1, "optim": "sgd", "learning_rate": 1e-2}


def hinted(count: int = 4) -> list[dict[str, str]]:
    return [row | {"answer": str(i), "hint": "it is " + "abcd"[i]} for i, row in enumerate(prompt_rows(count))]


def stepped(folder, teacher, **settings):
    trainer = tiny_trainer(folder, teacher=teacher, rows=hinted(), scripted=True, **settings)
    trainer.train(outputs=False)
    return trainer, trainer.last_step.metrics, weights(trainer.model)


@pytest.mark.parametrize("settings", [{}, BOTH], ids=["representation", "with reverse_kl"])
def test_a_teacher_prompt_like_the_prompt_changes_no_bit(tmp_path, settings):
    tokenizer = tiny_tokenizer()
    plain = stepped(tmp_path / "a", tiny_model(seed=1), teacher_processing_class=tokenizer, **settings)
    same = stepped(
        tmp_path / "b", tiny_model(seed=1), teacher_processing_class=tokenizer, teacher_prompt="{prompt}", **settings
    )
    assert same[1]["loss"] == plain[1]["loss"]
    assert all(torch.equal(plain[2][name], same[2][name]) for name in plain[2])
    assert same[1]["privileged/quoted"] == 0
    assert "privileged/quoted" not in plain[1]


def test_the_loss_is_that_of_a_teacher_which_reads_the_hint(tmp_path):
    """By hand: the same responses behind two prompts, position by position."""
    tokenizer, student, teacher = tiny_tokenizer(), tiny_model(), tiny_model(seed=1)
    trainer = tiny_trainer(
        tmp_path, student=tiny_model(), teacher=teacher, rows=hinted(), scripted=True, teacher_processing_class=tokenizer,
        teacher_prompt="{prompt} {hint} {answer}",
    )  # fmt: skip
    trainer.train(outputs=False)
    rollouts = trainer.last_step.rollouts
    prompts = [tokenizer(f"{row['prompt']} {row['hint']} {row['answer']}")["input_ids"] for row in hinted()]
    theirs = Rollouts(
        [prompts[row] for row in rollouts.rows],
        rollouts.completion_ids,
        rollouts.finish_reasons,
        rollouts.texts,
        rollouts.rows,
    )
    with torch.no_grad():
        own, other = capture_states(student, rollouts), capture_states(teacher, theirs)
    expected = representation_loss(own.stacked(), other.stacked(), own.rollout_index)
    assert trainer.last_step.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_all_columns_of_a_given_row_can_be_in_the_prompt():
    row = PromptRow("1+2=", "3", "file:7", {"hint": "odd", "n": 5})
    assert privileged_row(row, "{prompt} {{it is}} {hint}, {answer}, {n}").prompt == "1+2= {it is} odd, 3, 5"
    assert privileged_row(row, None) is row
    assert privileged_row(row, "{hint}").prompt == "odd"


TALK = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "1+2="}, {"role": "assistant", "content": "?"},
    {"role": "user", "content": "now"}, {"role": "assistant", "content": "so:"},
]  # fmt: skip


def test_in_a_conversation_the_last_user_message_changes():
    row = PromptRow(TALK, "3", "file:7", {"teacher_prompt": [{"role": "user", "content": "other"}], "text": "new"})
    changed = privileged_row(row, "{prompt} ({answer})").prompt
    assert changed == [*TALK[:3], {"role": "user", "content": "now (3)"}, TALK[4]]
    assert privileged_row(row, "{text}").prompt[3] == {"role": "user", "content": "new"}
    assert privileged_row(row, "{teacher_prompt}").prompt == [{"role": "user", "content": "other"}]
    assert row.prompt == TALK
    only_system = PromptRow(TALK[:1], "3", "file:7")
    with pytest.raises(ValueError, match="file:7: the prompt has no user message"):
        privileged_row(only_system, "{prompt} {answer}")


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("{", "cannot be read: "),
        ("hint", "names no column"),
        ("{prompt.__class__}", "is not the name of a column"),
        ("{prompt!r}", "is not the name of a column"),
        ("{prompt:>9}", "is not the name of a column"),
        ("{0}", "is not the name of a column"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, template, wrong):
    with pytest.raises(ValueError, match=f"teacher_prompt: .*{wrong}"):
        fields_of(template)
    with pytest.raises(ValueError, match=f"teacher_prompt: .*{wrong}"):
        recipe(tmp_path, teacher_prompt=template)


def test_a_row_without_the_column_is_named(tmp_path):
    data = [row if i != 2 else row | {"hint": None} for i, row in enumerate(hinted())]
    with pytest.raises(ValueError, match="train_dataset row 2: the row has no column 'hint', which teacher_prompt"):
        tiny_trainer(tmp_path, rows=data, teacher_processing_class=tiny_tokenizer(), teacher_prompt="{prompt}{hint}")


# What rollouts quote


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("so I write: First, add the TENS.", True),
        ("first add the units", False),
        ("add the tens first", False),
        ("what is 3 plus 4", False),  # the student's prompt says so too
        ("then first add the", False),
        ("", False),
    ],
)
def test_a_quotation_is_four_words_in_a_row_that_only_the_teacher_was_shown(text, quoted):
    shown = "What is 3 plus 4?"
    assert quotes([text], f"{shown} Hint: first add the tens.", shown) == [quoted]
    as_messages = [{"role": "user", "content": shown}, {"role": "user", "content": "Hint: first add the tens."}]
    assert quotes([text], as_messages, shown) == [quoted]


WORDS = st.lists(st.sampled_from("abc"), max_size=12)


@given(WORDS, WORDS, WORDS)
def test_quotations_agree_with_a_search_by_text(text, hidden, shown):
    def has(words, run):
        return f" {' '.join(run)} " in f" {' '.join(words)} "

    runs = [text[i : i + 4] for i in range(len(text) - 3)]
    expected = any(has(hidden, run) and not has(shown, run) for run in runs)
    assert quotes([" ".join(text)], " ".join(hidden), " ".join(shown)) == [expected]


def test_quotations_are_counted_and_the_others_graded_apart(tmp_path):
    data = [row | {"hint": "say a b c d", "points": i % 2} for i, row in enumerate(prompt_rows())]
    texts = iter(["a b c d", "c d", "say a b c", ""])
    trainer = tiny_trainer(
        tmp_path, teacher="student", rows=data, scripted=True, teacher_prompt="{prompt} {hint}",
        reward_funcs=lambda points, **columns: points,
    )  # fmt: skip
    generate = trainer.engine.generate

    def written(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        for place in range(4):
            sampled.rollouts.texts[place] = next(texts)
        return sampled

    trainer.engine.generate = written
    trainer.train(outputs=False)
    metrics = trainer.last_step.metrics
    assert metrics["privileged/quoted"] == 0.5
    assert metrics["privileged/accuracy_unquoted"] == 1.0  # the second and the fourth
    assert metrics["accuracy"] == 0.5


# The student as its own teacher


def test_the_start_of_the_student_stays_the_teacher(tmp_path):
    start = weights(tiny_model())
    trainer, _, after = stepped(tmp_path, "student", teacher_prompt="{prompt} {hint}", max_steps=3)
    assert isinstance(trainer.pair.teacher, FrozenTeacher)
    assert all(torch.equal(start[name], weight) for name, weight in weights(trainer.pair.teacher.model).items())
    assert any(not torch.equal(start[name], after[name]) for name in start)


def test_a_fresh_adapter_is_turned_off_instead_of_a_copy(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        teacher="student",
        rows=hinted(),
        teacher_prompt="{prompt} {hint}",
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    assert isinstance(trainer.pair.teacher, AdapterOffTeacher)
    assert trainer.pair.teacher.modules == ()


@pytest.mark.parametrize(("rate", "every"), [(0.25, 1), (0.25, 2), (1.0, 3)])
def test_the_teacher_follows_by_the_closed_form(rate, every):
    """After moves at students w_1, w_2, …: (1 − r)^n w_0 + Σ r (1 − r)^(n − i) w_i."""
    student = tiny_model()
    teacher = FollowingTeacher(student, ModelInfo.of(student), update_rate=rate, sync_steps=every)
    first, seen = weights(student), []
    for step in range(1, 7):
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        teacher.follow(step)
        if step % every == 0:
            seen.append(weights(student))
    n = len(seen)
    for name, weight in teacher.teacher.model.named_parameters():
        expected = (1 - rate) ** n * first[name].double()
        for i, at in enumerate(seen, 1):
            expected += rate * (1 - rate) ** (n - i) * at[name].double()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
        assert not weight.requires_grad
        if rate == 1:
            assert torch.equal(weight, seen[-1][name])


def following(folder, steps, resume=None, **settings):
    trainer = tiny_trainer(
        folder, teacher="student", rows=hinted(), teacher_prompt="{prompt} {hint}", teacher_update_rate=0.1, max_steps=steps,
        save_strategy="steps", save_steps=2, max_completion_length=5, **settings,
    )  # fmt: skip
    trainer.train(resume, outputs=False)
    return weights(trainer.model), weights(trainer.pair.teacher.teacher.model)


def test_a_resumed_run_goes_on_with_the_same_teacher(tmp_path):
    whole = following(tmp_path / "whole", 4)
    following(tmp_path / "parts", 2)
    resumed = following(tmp_path / "parts", 4, resume=True)
    for model, again in zip(whole, resumed, strict=True):
        assert all(torch.equal(model[name], again[name]) for name in model)
    assert any(not torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def test_a_checkpoint_without_the_teacher_is_refused(tmp_path):
    student = tiny_model()
    teacher = FollowingTeacher(student, ModelInfo.of(student), update_rate=0.5)
    with pytest.raises(ValueError, match=r"following_teacher\.safetensors is missing"):
        teacher.load(tmp_path)
    wide = FollowingTeacher(tiny_model(hidden_size=64), ModelInfo.of(student), update_rate=0.5)
    wide.save(tmp_path)
    with pytest.raises(ValueError, match="holds other weights"):
        teacher.load(tmp_path)


def test_the_teacher_is_evaluated_with_the_hint(tmp_path):
    trainer = tiny_trainer(
        tmp_path, teacher="student", rows=hinted(), eval_dataset=hinted(), teacher_prompt="{prompt} {hint}",
        eval_num_generations=1, reward_funcs=lambda completions, **columns: [1.0] * len(completions),
    )  # fmt: skip
    read = trainer.evaluate_teacher().rollouts.prompt_ids
    expected = [trainer.pair.tokenizer(f"{row['prompt']} {row['hint']}")["input_ids"] for row in hinted()]
    assert [list(ids) for ids in read] == expected


# What is refused


def recipe(folder, **keys):
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in hinted()))
    values = {
        "model": "embedded:tiny/student", "teacher_model": "student", "train_dataset": str(file), "output_dir": str(folder),
        "teacher_prompt": "{prompt} {answer}", "use_cpu": True, "max_steps": 1,
    }  # fmt: skip
    return RunConfig.parse({**values, **keys})


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"teacher_prompt": None, "teacher_update_rate": 0.1}, "teacher_model: student reads what the student reads"),
        (
            {
                "teacher_prompt": None,
                "policy_gradient_weight": {"schedule": "linear", "start": 0.0, "end": 0.0, "steps": 2},
            },
            "teacher_model: student reads what the student reads",
        ),
        (
            {"teacher_model_init_kwargs": {"dtype": "bfloat16"}},
            "teacher_model_init_kwargs: .* has no effect with teacher_model",
        ),
        (
            {"teacher_model_init_kwargs": {"revision": "a"}},
            "teacher_model_init_kwargs: .* has no effect with teacher_model",
        ),
        ({"bridge": "folder"}, "bridge: it does not go with teacher_model: student"),
        ({"teacher_update_rate": 0.1, "fully_shard": True}, "teacher_update_rate: 0.1 does not go with fully_shard"),
        (
            {"teacher_update_rate": 0.1, "teacher_model": "embedded:tiny/teacher"},
            "teacher_update_rate: 0.1 is for a teacher that",
        ),
        ({"teacher_update_rate": 1.5}, "teacher_update_rate: 1.5 is not allowed; a number from 0 to 1"),
        ({"teacher_sync_steps": 0}, "teacher_sync_steps: 0 is not allowed"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_model_is_loaded(tmp_path, keys, wrong):
    with pytest.raises(ValueError, match=wrong):
        plan(recipe(tmp_path, **keys))


def test_a_template_may_begin_with_what_yaml_does_not_read_as_text():
    words = ["--teacher_prompt", "#{answer} {prompt}", "--teachers", "{a: b}", "--task", "null"]
    assert parse_overrides(words) == {"teacher_prompt": "#{answer} {prompt}", "teachers": {"a": "b"}, "task": None}
    assert parse_overrides(["--teacher-prompt={prompt}{answer}"]) == {"teacher_prompt": "{prompt}{answer}"}


def test_the_plan_says_who_teaches(tmp_path):
    assert "teacher: the student, as it starts" in plan(recipe(tmp_path)).describe()
    text = "\n".join(plan(recipe(tmp_path, teacher_update_rate=0.05)).describe())
    assert "teacher: the student, moving towards it by 0.05 every 1 step(s)" in text
