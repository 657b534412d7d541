"""Chat templates: the generation prompt, a turn that is continued, and the date."""

from __future__ import annotations

import json
import logging
import shutil
import time
from datetime import datetime

import pytest
import yaml

from oprd.alignment.aligner import Aligner
from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.config import OPRDConfig
from oprd.data.chat_template import answer_opening, prints_date, rendered, with_date
from oprd.data.prompts import prepare_prompts, render
from oprd.data.rows import PromptRow
from oprd.models.loading import load
from oprd.rollouts.engine import Sampling
from oprd.run_config import RunConfig
from oprd.runs.checkpoints import list_checkpoints
from oprd.tools.evaluate import evaluate_checkpoint
from oprd.training.run import train_and_evaluate
from oprd.training.trainer import OPRDTrainer
from oprd.types import Rollouts
from tiny import tiny_tokenizer

USER = {"role": "user", "content": "1+2"}
ANSWER = {"role": "assistant", "content": "3 "}
TURNS = (
    "{% for m in messages %}{{ '#' if m.role == 'user' else '=' }}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'user' %}-{{ m.content }}-{% else %} {{ m.content }}{% endif %}{% endfor %}"
)
HEADERS_ONLY = "{% for m in messages %}{{ '#' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}"


def with_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, *messages, **kwargs) -> str:
    return tokenizer.decode(render(PromptRow([*messages], source="f:1"), tokenizer, kwargs or None))


def prepared(tokenizer, *prompts, **settings):
    rows = [PromptRow(prompt, source=f"f:{i + 1}") for i, prompt in enumerate(prompts)]
    return prepare_prompts(rows, tokenizer, name="d", max_completion_length=4, **settings)


def test_an_assistants_last_turn_is_left_open():
    tokenizer = with_template(TURNS)
    assert text_of(tokenizer, USER) == "#1+2<eos>="
    assert text_of(tokenizer, USER, ANSWER) == "#1+2<eos>=3 "
    assert text_of(tokenizer, USER, ANSWER, USER) == "#1+2<eos>=3 <eos>#1+2<eos>="
    assert text_of(with_template(BRACKETS), USER, ANSWER) == "-1+2- 3 "
    control = {"role": "assistant", "content": "3<eos>4"}  # is read as text, in the open turn too
    assert text_of(tokenizer, USER, control) == "#1+2<eos>=3<pad>eos<pad>4"  # "<" has no token here


def test_continued_turns_are_counted(caplog):
    with caplog.at_level(logging.INFO, logger="oprd"):
        prepared(with_template(TURNS), [USER], [USER, ANSWER], "1+1", [USER, ANSWER])
        prepared(with_template(TURNS), [USER], "1+1")
    assert [record.getMessage() for record in caplog.records] == [
        "d: 2 of 4 prompts end with an assistant's turn, which is continued"
    ]


def test_a_turn_that_the_template_cannot_leave_open_is_refused():
    hides = "{% for m in messages if m.role == 'user' %}#{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    with pytest.raises(ValueError, match=r"^f:2: .*roles are user, assistant .*last turn open.*: remove this turn$"):
        prepared(with_template(hides), [USER], [USER, ANSWER])


PARTS = (
    "{% for m in messages %}#{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
SYSTEM = {"role": "system", "content": "9"}


@pytest.mark.parametrize(
    ("template", "messages", "why"),
    [
        (PARTS, [USER], "message 0, of the role 'user', .* reads only contents that are lists of parts; write {{ message"),
        (TURNS.replace("m.content", "m.text"), [USER], "message 0, of the role 'user'"),
        (TURNS.replace("m.content", "m.content[:2]"), [USER], "message 0, .*; give another template"),
        (TURNS.replace("in messages", "in messages[-1:]"), [USER, ANSWER, USER], "message 0, of the role 'user'"),
        (TURNS.replace("in messages", "in messages if m.role != 'system'"), [SYSTEM, USER],
         "message 0, of the role 'system', .*; set merge_system_prompt: true"),
    ],
)  # fmt: skip
def test_a_template_that_leaves_out_what_a_message_says_is_refused(template, messages, why):
    with pytest.raises(ValueError, match=f"^f:3: the chat template leaves out the text of {why}"):
        prepared(with_template(template), "1+1", "1+2", messages)


def test_a_template_may_change_what_a_message_says():
    for change in ("m.content | trim", "m.content.split('-')[-1] if m.role == 'assistant' else m.content"):
        assert prepared(with_template(TURNS.replace("m.content", change)), [USER, ANSWER, USER])


def test_an_argument_that_the_template_does_not_read_is_said(caplog):
    tokenizer = with_template("{{ '9' if thinking else '' }}" + TURNS)
    prepared(tokenizer, [USER], chat_template_kwargs={"thinkng": False})
    assert "does not read 'thinkng' of chat_template_kwargs, so it changes nothing" in caplog.text
    caplog.clear()
    prepared(tokenizer, [USER], chat_template_kwargs={"thinking": False, "chat_template": TURNS + "{{ thinking }}"})
    assert not caplog.text


def test_both_models_continue_the_same_turn():
    student, teacher = with_template(TURNS), with_template(BRACKETS)
    row = PromptRow([USER, {"role": "assistant", "content": "30"}], source="f:1")
    prompt = render(row, student, None)
    ids = student("45", add_special_tokens=False)["input_ids"]
    rollouts = Rollouts([prompt], [ids], ["length"], ["45"], [0])
    theirs, alignments, stats = Aligner(student, teacher).align(rollouts, [row])
    assert teacher.decode(theirs.prompt_ids[0]) == "-1+2- 30"
    assert theirs.completion_ids == [ids]
    assert (stats.paired, len(alignments)) == (2, 1)


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (TURNS, ""),
        (BRACKETS, " "),
        (HEADERS_ONLY, "="),
        ("{% for m in messages %}#{{ m.content }}{% endfor %}=", None),  # always ends so
        ("{% for m in messages if m.role == 'user' %}#{{ m.content }}{% endfor %}", None),  # has no answers
        ("{{ raise_exception('no') if messages|length > 1 else '#' }}", None),
        # the answer of a last turn begins otherwise than the generation prompt, as with thinking turned off
        (TURNS.replace("else '='", "else '=--'"), "--"),
    ],
)
def test_only_a_template_that_leaves_out_the_words_of_a_turn_is_refused(template, opening):
    tokenizer = with_template(template)
    assert answer_opening(tokenizer, PromptRow([USER])) == opening
    if template != HEADERS_ONLY:
        assert prepared(tokenizer, [USER])
        return
    with pytest.raises(ValueError, match=r"^f:2: the chat template takes no notice of add_generation_prompt: .* '=', "):
        prepared(tokenizer, "1+1", [USER])
    assert prepared(tokenizer, "1+1", [USER, ANSWER])  # no turn is begun
    assert prepared(tokenizer, [USER], chat_template_kwargs={"chat_template": TURNS})


@pytest.mark.parametrize("name", ["chat_template_kwargs", "teacher_chat_template_kwargs"])
def test_arguments_that_oprd_sets_are_refused(name, tmp_path):
    for key in ("add_generation_prompt", "continue_final_message", "tokenize"):
        with pytest.raises(ValueError, match=f"^{name}: {key!r} is not allowed, because oprd sets it"):
            OPRDConfig(output_dir=str(tmp_path), **{name: {"a": 1, key: False}})
    OPRDConfig(output_dir=str(tmp_path), **{name: {"chat_template": TURNS, "enable_thinking": False}})


DATES = [
    "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}",
    "{%- if strftime_now is defined %}\n{%- set day = strftime_now('%Y-%m-%d') %}\n{%- else %}\n{%- set day = 'never' %}\n"
    "{%- endif %}\n{{- 'Today: ' + day + '\n' }}{{ messages[0].content }}",
    "\n  {% if true %}x{% endif %}\n{% for m in messages %}{{ strftime_now('%A, %-d %B, %H:%M:%S') }}{{ m.content }}{% endfor %}\n",
    "{% set f = '%-m/%-d/%y %I %p %j' %}{% macro turn(m) %}{{ strftime_now(f) }}{{ m.content }}{% endmacro %}"
    "{{ turn(messages[0]) }}",
    "{{ strftime_now('%%Y %k %s %z|%Z') }}{{ messages[0].content }}",
]
DAY = datetime(2024, 7, 6, 8, 5, 9)


@pytest.mark.parametrize("template", DATES)
def test_a_date_is_printed_as_transformers_prints_todays(template, monkeypatch):
    tokenizer = with_template(template)
    assert prints_date(tokenizer)
    frozen = with_date(tokenizer, {"more": 1}, DAY.isoformat())
    found = rendered(tokenizer, [USER], frozen)
    # what transformers writes, with each call of its clock replaced
    by_hand = template
    for call, written in [
        ("strftime_now('%d %b %Y')", "'06 Jul 2024'"),
        ("strftime_now('%Y-%m-%d')", "'2024-07-06'"),
        ("strftime_now('%A, %-d %B, %H:%M:%S')", "'Saturday, 6 July, 08:05:09'"),
        ("strftime_now(f)", "'7/6/24 08 AM 188'"),
        ("strftime_now('%%Y %k %s %z|%Z')", f"'%Y  8 {DAY:%s} |'"),
    ]:
        by_hand = by_hand.replace(call, written)
    assert by_hand != template
    assert found == rendered(with_template(by_hand), [USER], None)
    assert tokenizer.chat_template == template  # what is saved with the model
    assert with_date(tokenizer, {"more": 1}, None) == {"more": 1}


def test_a_template_without_a_date_is_not_changed():
    assert not prints_date(with_template(TURNS))
    assert not prints_date(tiny_tokenizer())
    assert with_date(with_template(TURNS), None, "2024-07-06") is None
    assert prints_date(with_template(TURNS), {"chat_template": DATES[0]})
    with pytest.raises(ValueError, match=r"^chat_template_date: 'yesterday' is not allowed; a date such as 2026-11-28"):
        TeacherPromptSettings(chat_template_date="yesterday")


DATED = (
    "{{ strftime_now('%d%m%Y') }}"
    + "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def dated_pair(tmp_path):
    """Folders of a student and a teacher whose templates print the date, and a file of prompts."""
    names = []
    for name in ("student", "teacher"):
        loaded = load(f"embedded:tiny/{name}", dtype="float32")
        loaded.model.save_pretrained(tmp_path / name)
        loaded.tokenizer.chat_template = DATED
        loaded.tokenizer.save_pretrained(tmp_path / name)
        names.append(str(tmp_path / name))
    rows = [{"prompt": [{"role": "user", "content": f"{n}+6"}], "answer": str(n + 6)} for n in range(10, 14)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return *names, str(tmp_path / "p.jsonl")


@pytest.fixture
def day_in(monkeypatch):
    """Sets the time zone; `AAA+12` and `BBB-12` are always a day apart."""

    def zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield zone
    monkeypatch.delenv("TZ")
    time.tzset()


@pytest.mark.further
def test_a_resumed_run_prints_the_date_of_its_first_day(dated_pair, day_in, tmp_path, caplog):
    student, teacher, prompts = dated_pair

    settings_of_all = {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2,
        "max_completion_length": 4, "report_to": "none", "lr_scheduler_type": "constant", "use_cpu": True,
    }  # fmt: skip
    models = {"model": student, "teacher_model": teacher, "train_dataset": prompts}

    def train(folder, *, resume=None, from_python=False, **changes):
        if from_python:
            args = OPRDConfig(output_dir=str(folder), **settings_of_all)
            OPRDTrainer(**models, args=args).train(resume_from_checkpoint=resume, outputs=True)
        else:
            run = RunConfig.parse({**models, "output_dir": str(folder), **settings_of_all, **changes})
            train_and_evaluate(run, say=lambda _: None, resume_from_checkpoint=resume)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines], yaml.safe_load((folder / "config.yaml").read_text())

    day_in("AAA+12")
    with caplog.at_level(logging.INFO, logger="oprd"):
        losses, settings = train(tmp_path / "whole")
    date = settings["chat_template_date"]
    assert f"the chat template prints the date: chat_template_date is {date} in this run" in caplog.text
    assert datetime.fromisoformat(date).date() == datetime.now().date()
    for name in ("auto", "named", "python"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-2")
    day_in("BBB-12")
    assert datetime.fromisoformat(date).date() != datetime.now().date()
    assert train(tmp_path / "auto", resume="auto") == (losses, {**settings, "output_dir": str(tmp_path / "auto")})
    from_python = train(tmp_path / "python", resume=True, from_python=True)
    assert from_python == (losses, {**settings, "output_dir": str(tmp_path / "python")})
    checkpoint = str(list_checkpoints(tmp_path / "named")[-1])
    assert train(tmp_path / "named", resume=checkpoint)[1]["chat_template_date"] == date
    again, _ = train(tmp_path / "again", chat_template_date=date)  # as with the run's config.yaml
    assert again == losses
    other, _ = train(tmp_path / "other")
    assert other != losses


def test_an_evaluation_takes_arguments_and_records_the_date(dated_pair, tmp_path):
    student, _, prompts = dated_pair
    sampling = Sampling(max_completion_length=4, temperature=0.0)
    plain = {"task": "addition", "k": 1, "sampling": sampling, "output_dir": tmp_path / "eval"}
    summary = evaluate_checkpoint(student, prompts, **plain)
    assert datetime.fromisoformat(summary["chat_template_date"]).date() == datetime.now().date()
    assert summary["chat_template_kwargs"] is None
    short = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ sign }}"}
    rendering = TeacherPromptSettings({**short, "sign": "="}, chat_template_date="2024-07-06")
    shutil.rmtree(tmp_path / "eval")
    summary = evaluate_checkpoint(student, prompts, rendering=rendering, **plain)
    assert summary["chat_template_kwargs"] == {**short, "sign": "="}
    assert summary["chat_template_date"] is None  # this template prints none
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["chat_template_kwargs"]["sign"] == "="
