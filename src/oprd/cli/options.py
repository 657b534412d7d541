"""Options that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oprd.files import write_json
from oprd.sanitize import redacted

if TYPE_CHECKING:
    from oprd.alignment.teacher_prompts import TeacherPromptSettings
    from oprd.data.rows import Reading

TEACHER_MODEL = typer.Option(help="Folder, hub name, or embedded:tiny/teacher; any depth, width and tokenizer.")
TeacherModel = Annotated[str, TEACHER_MODEL]
PromptColumn = Annotated[
    str | None, typer.Option(help="Column of the prompt (a.b: nested); without it, the usual ones are tried.")
]
AnswerColumn = Annotated[
    str | None, typer.Option(help="Column of the answer (a.b: nested); without it, the usual ones are tried.")
]
AnswerFormat = Annotated[str | None, typer.Option(help="How answers are written: plain, gsm8k, boxed, number, letter.")]
DatasetConfig = Annotated[
    str | None, typer.Option(help="Subset of a hub dataset or folder; name:subset says the same.")
]
MergeSystem = Annotated[
    bool, typer.Option(help="Put a system message at the head of the first user message, for templates that refuse it.")
]
Template = Annotated[str | None, typer.Option(help="Arguments of the student's chat template (JSON); as in training.")]
TemplateDate = Annotated[str | None, typer.Option(help="What a template prints as today's date (ISO); as in training.")]
TeacherTemplate = Annotated[
    str | None, typer.Option(help="Arguments of the teacher's chat template (JSON), to render its prompts with it.")
]
TeacherSystem = Annotated[str | None, typer.Option(help="System prompt that the teacher alone reads.")]
SpecialMap = Annotated[
    str | None, typer.Option(help="Student's special tokens and the teacher's of the same meaning (JSON).")
]

SplitSpecial = Annotated[
    bool,
    typer.Option(
        help="Read control tokens in plain prompts as text; turn it off for prompts that are rendered already."
    ),
]

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all results to this JSON file.")]


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the command line gives an option."""
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"


def check_json(json_file: Path | None) -> None:
    """Refuse a file that cannot be written, before the work.

    Raises:
        ValueError: it is a folder, or is to be in one that does not exist.
    """
    if json_file is not None and json_file.is_dir():
        raise ValueError(f"--json: {json_file} is a folder; name a file")
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json: there is no folder {json_file.parent}")


def write_report(json_file: Path | None, report: Any) -> None:
    """Write what a verb has found where `--json` asks for it, without secrets, and say so."""
    if json_file is not None:
        write_json(json_file, redacted(report, by_name=False))
        typer.echo(f"written to {json_file}")


def reading(
    prompt_column: str | None, answer_column: str | None, dataset_config: str | None, merge_system_prompt: bool
) -> Reading:
    """How the rows of a dataset are read, from the options above."""
    from oprd.data.rows import Reading

    return Reading(prompt_column, answer_column, dataset_config, merge_system_prompt)


def prompt_settings(
    template: str | None,
    teacher_template: str | None,
    teacher_system: str | None,
    special_map: str | None,
    split_special_tokens: bool,
    template_date: str | None = None,
) -> TeacherPromptSettings:
    """How both models' prompts are rendered, from the options above.

    Raises:
        ValueError: an option that is not a JSON object, or a setting that is not allowed.
    """
    from oprd.alignment.teacher_prompts import TeacherPromptSettings

    return TeacherPromptSettings(
        chat_template_kwargs=mapping_option("chat_template_kwargs", template),
        teacher_chat_template_kwargs=mapping_option("teacher_chat_template_kwargs", teacher_template),
        teacher_system_prompt=teacher_system,
        special_token_map=mapping_option("special_token_map", special_map),
        split_special_tokens=split_special_tokens,
        chat_template_date=template_date,
    )


def mapping_option(name: str, text: str | None) -> dict[str, Any] | None:
    """An option that is a JSON object.

    Raises:
        ValueError: it is none.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {text!r} is not JSON ({error}); such as '{{\"enable_thinking\": false}}'") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {text!r} is not allowed; an object such as '{{\"enable_thinking\": false}}'")
    return value
