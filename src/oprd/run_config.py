"""A recipe: one flat YAML file that says everything about a run, checked key by key before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oprd.config import OPRDConfig

_PACKAGE = Path(__file__).parent
RECIPE_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent.parent / "recipes")


@dataclass
class Recipe:
    """Models and datasets of a run; every other key of the file is one of `OPRDConfig`.

    Args:
        model: student: folder, hub name, or `embedded:tiny/student`.
        teacher_model: teacher; left out with `lora`: the student without its adapter.
        train_dataset: .parquet, .jsonl, .json, hub name, or `generated:<task>`.
        train_split: split of a hub dataset or generated task.
        train_limit: use the first rows only; how many problems to generate.
        eval_dataset: problems with answers; None: no evaluation.
        eval_split: split of a hub dataset or generated task.
        eval_limit: use the first rows only; how many problems to generate.
        eval_before: evaluate the student before training.
        eval_teacher: evaluate the teacher.
        lora: arguments of `peft.LoraConfig`: train an adapter.
    """

    model: str = ""
    teacher_model: str | None = None
    train_dataset: str = ""
    train_split: str = "train"
    train_limit: int | None = None
    eval_dataset: str | None = None
    eval_split: str = "test"
    eval_limit: int | None = None
    eval_before: bool = True
    eval_teacher: bool = True
    lora: dict[str, Any] | None = None


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> tuple[Recipe, OPRDConfig]:
    """Read a recipe file, apply `overrides`, and check every key and value.

    Args:
        path: a YAML file, or the name of a shipped recipe ("tiny").
        overrides: keys that replace those of the file.

    Raises:
        ValueError: no such file, no YAML, unknown key (nearest suggested), or a value that is not allowed.
    """
    file = find_recipe(path)
    return parse_recipe({**read_yaml(file), **(overrides or {})}, str(file))


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: not a YAML file, or not a mapping.
    """
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected one key: value a line, found {type(content).__name__}")
    return content


def find_recipe(path: str | Path) -> Path:
    """The file that `path` means: itself, or a shipped recipe of that name.

    Raises:
        ValueError: there is none.
    """
    candidates = [Path(path), *(folder / f"{path}.yaml" for folder in RECIPE_FOLDERS)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({p.stem for folder in RECIPE_FOLDERS for p in folder.glob("*.yaml")})
    raise ValueError(f"config: there is no file {str(path)!r}; shipped recipes are {', '.join(shipped)}")


_SAMPLED = "evaluation samples completions: see eval_num_generations and generation_batch_size"
_NO_EFFECT = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the verb says what is done"),
    **dict.fromkeys(
        (
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "bf16_full_eval",
            "fp16_full_eval",
            "prediction_loss_only",
        ),
        _SAMPLED,
    ),
    **dict.fromkeys(("label_smoothing_factor", "label_names", "neftune_noise_alpha"), "there are no labels"),
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name"), "rollouts are sorted by length, prompts are drawn"
    ),
}


def parse_recipe(values: Mapping[str, Any], where: str = "recipe") -> tuple[Recipe, OPRDConfig]:
    """Check keys and values and build the two halves of a run's settings.

    Raises:
        ValueError: unknown key (nearest suggested), value of another type, value not allowed, or a key that must be there.
    """
    recipe_types, config_types = typing.get_type_hints(Recipe), typing.get_type_hints(OPRDConfig)
    known = {f.name for f in dataclasses.fields(Recipe)} | {f.name for f in dataclasses.fields(OPRDConfig)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}{hint} (all keys: docs/configuration.md)")
        if key in _NO_EFFECT:
            raise ValueError(f"{where}: the key {key!r} has no effect here; remove it ({_NO_EFFECT[key]})")
    recipe_fields = {f.name for f in dataclasses.fields(Recipe)}
    typed = {
        k: _typed(k, v, (recipe_types if k in recipe_fields else config_types)[k], where) for k, v in values.items()
    }
    recipe = Recipe(**{k: v for k, v in typed.items() if k in recipe_fields})
    for key in ("model", "train_dataset"):
        if not getattr(recipe, key):
            raise ValueError(f"{where}: the key {key!r} is missing; see recipes/ for complete files")
    if recipe.teacher_model is None and recipe.lora is None:
        raise ValueError(
            f"{where}: the key 'teacher_model' is missing (only with 'lora' the base model can be the teacher)"
        )
    if recipe.eval_dataset and not typed.get("task"):
        raise ValueError(f"{where}: the key 'task' is missing: eval_dataset needs to know how answers are graded")
    for key in ("train_limit", "eval_limit"):
        if (value := getattr(recipe, key)) is not None and value < 1:
            raise ValueError(f"{where}: {key}: {value} is not allowed; at least 1, or leave it out for all rows")
    if "output_dir" not in typed:
        raise ValueError(f"{where}: the key 'output_dir' is missing; say where the run shall be written")
    return recipe, OPRDConfig(**{k: v for k, v in typed.items() if k not in recipe_fields})


def _typed(key: str, value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` wants it: YAML reads 1e-5 as text, and 1 where a float is meant."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if isinstance(value, bool):  # YAML reads a bare `no` as false; save_strategy, among others, means the word
            with suppress(ValidationError):
                return adapter.validate_python("yes" if value else "no")
        raise ValueError(f"{where}: {key}: {value!r} is not allowed: {error.errors()[0]['msg']}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and `--flag` (true) as a dict; values are read as YAML.

    Raises:
        ValueError: a word that belongs to no key.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ValueError(f"unexpected argument {word!r}; settings are given as --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        try:
            overrides[key.replace("-", "_")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key}: {text!r} cannot be read: {error}") from error
    return overrides


_ALWAYS_SHOWN = (
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "weight_decay", "max_grad_norm", "optim", "seed", "bf16",
)  # fmt: skip
_NEVER_SHOWN = (
    "hub_token",  # a secret
    "resume_from_checkpoint",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # deprecated twins of activation_checkpointing*
    "disable_tqdm", "include_for_metrics", "debug", "dataloader_pin_memory", "report_to", "accelerator_config",
)  # fmt: skip  # the last row: filled in by transformers, the same for every run unless set


def resolved(recipe: Recipe, config: OPRDConfig) -> dict[str, Any]:
    """Every setting of the run that is ours, always of interest, or not at its default: a recipe again, JSON and YAML safe.

    Defaults are read off the fields: making a second `OPRDConfig` to compare with would reset accelerate's shared state.
    """
    base = {f.name for f in dataclasses.fields(OPRDConfig.__mro__[1])}
    values = config.to_dict()
    shown = {}
    for field in dataclasses.fields(OPRDConfig):
        ours = field.name not in base or field.name in _ALWAYS_SHOWN
        if (
            field.name not in _NEVER_SHOWN
            and field.name not in _NO_EFFECT
            and (ours or values[field.name] != field.default)
        ):
            shown[field.name] = values[field.name]
    return {**dataclasses.asdict(recipe), **shown}


# What may differ when a run goes on: how long, how often and where it is recorded, and how much memory it takes.
_MAY_CHANGE = frozenset((
    "output_dir", "max_steps", "num_train_epochs", "micro_batch_tokens", "generation_batch_size", "rollout_engine_kwargs",
    "run_name", "use_cpu", "dataloader_num_workers", "diagnostic_steps", "alarm_window",
))  # fmt: skip
_MAY_CHANGE_PREFIXES = (
    "eval_",
    "save_",
    "log_",
    "logging_",
    "num_completions_to_log",
    "hub_",
    "push_to_hub",
    "ddp_",
    "load_best",
)


def check_resumed(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings than it began with: half of them would not take effect.

    Args:
        stored: `resolved` settings that the run began with.
        now: those of this call.

    Raises:
        ValueError: names every setting that differs and may not.
    """
    changed = [
        f"{key} was {stored.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*stored, *now})
        if stored.get(key) != now.get(key) and key not in _MAY_CHANGE and not key.startswith(_MAY_CHANGE_PREFIXES)
    ]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint: the run began with other settings: {'; '.join(changed)}. Keep them, or start anew"
        )
