"""The settings under which a run evaluated its student, for an evaluation of the model that it left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oprd.data.rows import for_dataset
from oprd.run_config import recipe_types
from oprd.runs.folder import CONFIG, METRICS, MODEL, RUN, SUMMARY, read_mapping
from oprd.tasks.problems import GENERATED

_IN_RUN = re.compile(rf"{MODEL}|checkpoint-\d+")


@dataclass(frozen=True)
class SettingsOfRun:
    """What `oprd eval` takes from a run.

    Args:
        folder: of the run.
        model: folder of the model.
        values: option of `oprd eval` → value.
        task_missing: why the run has no task to grade by; empty where it has one.
    """

    folder: Path
    model: Path
    values: Mapping[str, Any]
    task_missing: str = ""


def settings_of_run(model: str, given: Mapping[str, Any]) -> SettingsOfRun | None:
    """The settings of the run that a model is from; None where it is not from a run's folder.

    Names of code (`module:attribute`) and `trust_remote_code` are not taken: the folder may come from someone else, and these would
    run code.

    Args:
        model: a run's folder, or its `model/` or `checkpoint-…/`.
        given: options of the command line, which are not taken.

    Raises:
        ValueError: the run left no model, a value of its `config.yaml` is not allowed, or the run names code for the task or the
            problems, and the command line does not.
    """
    found = _places(Path(model).expanduser())
    if found is None:
        return None
    folder, weights = found
    config = read_mapping(folder / CONFIG, yaml.safe_load) or {}
    if "max_completion_length" not in given and config.get("eval_max_completion_length") is None:
        config = {**config, "eval_max_completion_length": config.get("max_completion_length")}
    dataset = given.get("dataset")
    of_training = dataset is not None and dataset == config.get("train_dataset") != config.get("eval_dataset")
    kind = "train" if of_training else "eval"
    known = dataset is None or dataset == config.get(f"{kind}_dataset")
    values = {}
    for name, (key, applies) in _OPTIONS.items():
        if name in given or not applies(dataset, known) or _is_object(config.get(key)):
            continue
        value = _typed(folder / CONFIG, config, key)
        values[name] = for_dataset(value, kind) if key in _BY_DATASET else value
    for name in ("task", "dataset"):
        if code := named_code(name, values.get(name)):
            raise ValueError(
                f"{name}: the run {folder} names code for it, {code}; if you trust that code, pass --{name} {code}"
            )
    values = {name: value for name, value in values.items() if value is not None}
    missing = "" if "task" in {*values, *given} else _why_no_task(config)
    return SettingsOfRun(folder, weights, values, missing)


def _always(dataset: str | None, known: bool) -> bool:
    return True


def _of_same_dataset(dataset: str | None, known: bool) -> bool:
    return known


def _without_dataset(dataset: str | None, known: bool) -> bool:
    return dataset is None


_OPTIONS: dict[str, tuple[str, Callable[[str | None, bool], bool]]] = {
    "dataset": ("eval_dataset", _without_dataset),
    "split": ("eval_split", _without_dataset),
    "limit": ("eval_limit", _without_dataset),
    "seed": ("seed", _without_dataset),
    "dataset_config": ("dataset_config", _of_same_dataset),
    "task": ("task", _always),
    "answer_format": ("answer_format", _always),
    "prompt_column": ("prompt_column", _always),
    "answer_column": ("answer_column", _always),
    "merge_system_prompt": ("merge_system_prompt", _always),
    "instruction": ("eval_instruction", _always),
    "k": ("eval_num_generations", _always),
    "max_completion_length": ("eval_max_completion_length", _always),
    "temperature": ("eval_temperature", _always),
    "top_p": ("eval_top_p", _always),
    "chat_template_kwargs": ("chat_template_kwargs", _always),
    "chat_template_date": ("chat_template_date", _always),
    "split_special_tokens": ("split_special_tokens", _always),
    "max_prompt_length": ("max_prompt_length", _of_same_dataset),
}
"""Option of `oprd eval` → key of the run, and whether it is taken: (dataset of the command line, whether it is the run's)."""
_BY_DATASET = ("prompt_column", "answer_column", "answer_format", "dataset_config")


def _places(path: Path) -> tuple[Path, Path] | None:
    """The run's folder and the model's in it."""
    if _is_run(path) and not any(path.glob("*.safetensors")):
        if not (path / MODEL).is_dir():
            saved = sorted(path.glob("checkpoint-*"), key=lambda folder: (len(folder.name), folder.name))
            instead = f"name a checkpoint, such as {saved[-1]}" if saved else "let it end"
            raise ValueError(f"model: the run {path} has no {MODEL}/, because it did not end; {instead}")
        return path, path / MODEL
    folder = path.parent if path.name else path.absolute().parent  # "." has no name
    return (folder, path) if path.is_dir() and _IN_RUN.fullmatch(path.absolute().name) and _is_run(folder) else None


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (RUN, METRICS, SUMMARY))


def _is_object(value: Any) -> bool:
    """Whether a setting was an object of a Python script."""
    return isinstance(value, str) and value.endswith(" given in Python>")


def _typed(file: Path, config: Mapping[str, Any], key: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(recipe_types()[key], config=ConfigDict(arbitrary_types_allowed=True))
    if config.get(key) is None:
        return None
    try:
        return adapter.validate_python(config[key])
    except ValidationError as error:
        raise ValueError(f"{file}: {key}: {config[key]!r} is not allowed: {error.errors()[0]['msg']}") from None


def named_code(name: str, value: Any) -> str:
    """A run's task or dataset, if it names code (`module:attribute`), which its reader would run; else empty.

    Args:
        name: "task", or a dataset's name.
        value: of the run's config.
    """
    code = str(value or "").removeprefix(GENERATED) if name == "task" or str(value).startswith(GENERATED) else ""
    return str(value) if ":" in code else ""


def _why_no_task(config: Mapping[str, Any]) -> str:
    if config.get("reward_funcs") and not config.get("task"):
        return "was graded by reward functions, which oprd eval does not call"
    return "has an object of a Python script as its task" if _is_object(config.get("task")) else "has no task"
