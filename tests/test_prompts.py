"""From rows to token ids: template, lengths, and errors that name the row."""

from __future__ import annotations

import logging
import re

import pytest

from oprd.data.prompts import prepare_prompts, render
from oprd.data.rows import PromptRow, Reading, as_prompt_rows, parse_row
from oprd.models.tokens import check_token_ids
from tiny import tiny_tokenizer

MESSAGES = [{"role": "system", "content": "ab"}, {"role": "user", "content": "1+1"}]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


def prepare(prompts, **settings):
    rows = [PromptRow(p, source=f"file.jsonl:{i + 1}") for i, p in enumerate(prompts)]
    return prepare_prompts(
        rows, tiny_tokenizer(chat=True), **{"name": "train_dataset", "max_completion_length": 8, **settings}
    )


def test_messages_go_through_the_chat_template_with_its_generation_prompt():
    assert render(PromptRow(MESSAGES), tiny_tokenizer(chat=True), None) == ids("ab1+1#")


def test_template_arguments_are_passed_on():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if thinking %}yes{% else %}no{% endif %}"
    assert render(PromptRow(MESSAGES), tokenizer, {"thinking": True}) == ids("abyes")
    assert render(PromptRow(MESSAGES), tokenizer, None) == ids("abno")


def test_text_is_taken_as_it_is():
    assert render(PromptRow("1+1"), tiny_tokenizer(chat=True), None) == ids("1+1")


def test_messages_without_a_template_name_the_row():
    with pytest.raises(
        ValueError, match=r"data\.jsonl:7: the prompt is a list of messages, and the tokenizer has no chat"
    ):
        render(PromptRow(MESSAGES, source="data.jsonl:7"), tiny_tokenizer(), None)


def test_text_of_another_column_without_a_template_says_what_to_rename():
    row = parse_row({"question": "1+1", "answer": "2"}, "data.jsonl:7")
    message = (
        "data.jsonl:7: the prompt is read as a user's message, as the text of every column but 'prompt' is, and the tokenizer has "
        "no chat template to render it with; name the column 'prompt', which is read as plain text, or give the tokenizer one "
        "(chat_template.jinja in the model's folder; in Python tokenizer.chat_template)"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        render(row, tiny_tokenizer(), None)
    renamed = parse_row({"prompt": "1+1", "answer": "2"}, "data.jsonl:7")
    assert render(renamed, tiny_tokenizer(), None) == ids("1+1")


def test_a_prompt_that_renders_to_nothing_names_the_row():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if false %}{% endif %}"
    with pytest.raises(ValueError, match=r"data\.jsonl:7: the prompt has no token"):
        render(PromptRow(MESSAGES, source="data.jsonl:7"), tokenizer, None)


def test_order_index_and_row_are_kept():
    prompts = prepare(["1", "22", "333"])
    assert [(p.index, p.ids, p.row.prompt) for p in prompts] == [
        (0, ids("1"), "1"), (1, ids("22"), "22"), (2, ids("333"), "333")
    ]  # fmt: skip


def test_longer_prompts_are_left_out_and_counted(caplog):
    with caplog.at_level(logging.WARNING, logger="oprd"):
        prompts = prepare(["1", "4444", "22", "55555", "333"], max_prompt_length=3)
    assert [p.index for p in prompts] == [0, 2, 4]  # places in the dataset, not in what is left
    assert "train_dataset: left out 2 of 5 prompts, longer than max_prompt_length=3 tokens" in caplog.text
    caplog.clear()
    assert len(prepare(["1", "22"], max_prompt_length=2)) == 2
    assert not caplog.records


def test_nothing_left_is_an_error_that_says_how_short_the_shortest_is():
    with pytest.raises(
        ValueError, match="max_prompt_length: 2 leaves no prompt of train_dataset; the shortest has 4 tokens"
    ):
        prepare(["55555", "4444"], max_prompt_length=2)


def test_a_prompt_that_leaves_no_room_names_row_and_numbers():
    assert len(prepare(["1" * 12], context_length=20)) == 1  # 12 + 8 fit exactly
    message = (
        r"file\.jsonl:2: the prompt has 13 tokens, which with max_completion_length=8 exceeds the model's context of 20; "
        r"shorten max_completion_length, or leave such prompts out with max_prompt_length=12"
    )
    with pytest.raises(ValueError, match=message):
        prepare(["1", "1" * 13], context_length=20)
    assert len(prepare(["1", "1" * 13], context_length=20, max_prompt_length=12)) == 1


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="train_dataset: the dataset is empty"):
        prepare([])
    with pytest.raises(ValueError, match="train_dataset"):
        as_prompt_rows([], "train_dataset")


def test_a_prompt_with_a_token_that_the_model_has_no_embedding_for_is_refused():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert len(tokenizer) == 46
    written = [
        PromptRow("1<think>2", source="p.jsonl:1"),
        PromptRow([{"role": "user", "content": "<think>"}], source="p.jsonl:2"),
        PromptRow("12", source="p.jsonl:3"),
    ]
    for split in (True, False):
        prompts = prepare_prompts(written, tokenizer, name="x", max_completion_length=4, split_special_tokens=split)
        check_token_ids(prompts, tokenizer, 46, "student")
        check_token_ids(prompts, tokenizer, None, "teacher")
        check_token_ids(prompts[2:], tokenizer, 45, "student")  # the tokenizer may be larger, if nobody uses it
        for prompt in prompts[:2]:
            message = rf"^{prompt.row.source}: the prompt has the token '<think>' \(id 45\), and the embedding of the student has "
            with pytest.raises(ValueError, match=message):
                check_token_ids([prompts[2], prompt], tokenizer, 45, "student")
    with pytest.raises(
        ValueError, match=r"the prompt has the token '2' \(id 5\), and the embedding of the m has 5 rows"
    ):
        check_token_ids(prompts[2:], tokenizer, 5, "m")
    tokenizer.add_special_tokens({"pad_token": "<pad2>"})
    with pytest.raises(
        ValueError, match=r"^tokenizer: its pad_token '<pad2>' has the id 46, .*or set pad_token to the end token"
    ):
        check_token_ids(prompts[2:], tokenizer, 46, "student")


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role\x1b not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}#"
)


def with_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_refuses_the_system_role_names_the_row_and_the_key_that_helps():
    rows = [PromptRow(MESSAGES[1:], source="f:1"), PromptRow(MESSAGES, source="f:2")]
    with pytest.raises(ValueError, match=r"^f:2: the chat template cannot render") as error:
        prepare_prompts(rows, with_template(REFUSES_SYSTEM), name="d", max_completion_length=8)
    assert str(error.value) == (
        r"f:2: the chat template cannot render the prompt, whose roles are system, user (TemplateError: System role\x1b not "
        "supported). Set merge_system_prompt: true, which puts the system message into the user's turn"
    )
    merged = as_prompt_rows([{"prompt": MESSAGES}], "d", Reading(merge_system_prompt=True))
    tokenizer = with_template("{{ messages[0].role }}{{ messages|length }}")
    assert render(merged[0], tokenizer, None) == ids("user1")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[9].content.strip() }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{% if %}", "TemplateSyntaxError: "),
        ("{{ messages[0].content + 1 }}", "TypeError: "),
    ],
)
def test_whatever_a_template_raises_names_the_row(template, why):
    with pytest.raises(
        ValueError, match=r"^f:7: the chat template cannot render the prompt, whose roles are system, user \("
    ) as error:
        render(PromptRow(MESSAGES, source="f:7"), with_template(template), None)
    assert f"({why}" in str(error.value)
    assert str(error.value).endswith("Change the roles of the row, or give another template with chat_template_kwargs")


def test_a_template_that_refuses_a_row_with_a_control_token_names_it():
    tokenizer = with_template(REFUSES_SYSTEM)
    token = tokenizer.eos_token
    rows = PromptRow([MESSAGES[0], {"role": "user", "content": f"1{token}"}], source="f:3")
    with pytest.raises(ValueError, match=r"^f:3: the chat template cannot render .*Set merge_system_prompt: true"):
        render(rows, tokenizer, None)


def test_text_that_the_tokenizer_refuses_names_the_row():
    with pytest.raises(
        ValueError, match=r"^f:3: the tokenizer cannot read the prompt '1\\ud8001' \(.*\)\. Change or remove the row"
    ):
        render(PromptRow("1\ud8001", source="f:3"), tiny_tokenizer(), None)
