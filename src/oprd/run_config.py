"""`RunConfig`: everything that describes a run, from a recipe (one flat YAML file) or from Python, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oprd.config import OPRDConfig
from oprd.data.yaml_text import load_yaml
from oprd.files import shipped_folders
from oprd.models.adapters import is_adapter_folder
from oprd.objectives.presets import find_preset, keys_of_presets
from oprd.sanitize import REDACTED, redacted, redacted_keys, redacted_text, without_redacted

RECIPE_FOLDERS = shipped_folders("recipes")


@dataclass(frozen=True)
class GivenObjects:
    """Objects that Python code gives in place of names.

    Args:
        processing_class: the student's tokenizer.
        teacher_processing_class: the teacher's tokenizer; of several teachers teacher_id → tokenizer.
        peft_config: adapter to train; in place of `lora`.
        objectives: name → `oprd.objectives.composite.Term`; beside those that the settings turn on.
        rollout_engine: in place of `OPRDConfig.rollout_engine`.
        task: in place of `OPRDConfig.task`.
        reward_funcs: a function, or a list of functions and names; in place of `OPRDConfig.reward_funcs`.
    """

    processing_class: Any = None
    teacher_processing_class: Any = None
    peft_config: Any = None
    objectives: Mapping[str, Any] | None = None
    rollout_engine: Any = None
    task: Any = None
    reward_funcs: Any = None


@dataclass(repr=False)
class RunConfig:
    """Models, datasets and settings of a run. In a recipe, the keys of `args` are on the same level as the others.

    Args:
        args: all other settings.
        model: student: folder, hub name, `embedded:tiny/student`, adapter to continue, or a model.
        teacher_model: teacher, likewise; {url: http://HOST:PORT} of oprd serve-teacher; {cache: FOLDER} of oprd cache-teacher;
            {model: NAME, responses: FILE} for fixed responses; {use: module:attribute, further arguments}; None with an adapter:
            the student without it; `student`: the student as it is when the run begins, or following it (`teacher_update_rate`).
        train_dataset: .parquet, .jsonl, .json, hub name, `generated:<task>`, or rows.
        train_split: split of a hub dataset or generated task.
        train_limit: use the first rows only; of a generated task, how many.
        eval_dataset: problems with answers; None: no evaluation.
        eval_split: split of a hub dataset or generated task.
        eval_limit: use the first rows only; of a generated task, how many.
        eval_before: evaluate the student before training.
        eval_teacher: evaluate the teacher.
        lora: arguments of `peft.LoraConfig`: train an adapter.
        teachers: several teachers in place of teacher_model: teacher_id → name, {model: name, init_kwargs: {…}, bridge: folder,
            bridge_rank: n, system_prompt: …, chat_template_kwargs: {…}, special_token_map: {…}} or {use: …}.
        base_model: what the teacher was trained from, for `extrapolation`; None: the student as it is at the start.
        preset: a published objective; the recipe's own keys take precedence (oprd keys --preset NAME): oprd, lastopd,
            latent_mopd, ride or phf.
        given: objects from Python.
    """

    args: OPRDConfig
    model: Any = ""
    teacher_model: Any = None
    train_dataset: Any = ""
    train_split: str = "train"
    train_limit: int | None = None
    eval_dataset: Any = None
    eval_split: str = "test"
    eval_limit: int | None = None
    eval_before: bool = True
    eval_teacher: bool = True
    lora: dict[str, Any] | None = None
    teachers: dict[str, Any] | None = None
    base_model: Any = None
    preset: str | None = None
    given: GivenObjects = field(default_factory=GivenObjects)

    def __post_init__(self) -> None:
        if self.preset is not None:
            raise ValueError(
                f"preset: it is a key of recipes; in Python give its keys: OPRDConfig(…, **preset({self.preset!r})), from "
                "oprd.objectives.presets"
            )
        # TRL gives several teachers as `teacher_model={id: …}`. The words below describe one.
        given = self.teacher_model
        one = {"use", "url", "cache", "model", "responses"}
        named = isinstance(given, Mapping) and not one & {*given} and not any(_is_plain(v) for v in given.values())
        if named and self.teachers is None:
            self.teachers, self.teacher_model = dict(given), None

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a recipe, apply `overrides`, and check all keys and values.

        Args:
            path: a YAML file, or the name of a shipped recipe ("tiny").
            overrides: keys that replace those of the file.

        Raises:
            ValueError: no such file, not YAML, unknown key (nearest suggested), or a value that is not allowed.
        """
        file = find_recipe(path)
        return cls.parse(_merged(read_yaml(file), overrides or {}), str(file))

    @classmethod
    def load_on_cpu(cls, path: str | Path, overrides: Mapping[str, Any]) -> RunConfig:
        """`load` for commands that do not train. Without a GPU it sets use_cpu, because transformers refuses bf16 otherwise.

        Raises:
            ValueError: as `load`.
        """
        on_cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
        return cls.load(path, {**overrides, **on_cpu})

    @staticmethod
    def asks_for_cpu(path: str | Path, overrides: Mapping[str, Any]) -> bool:
        """Whether the recipe with its overrides sets use_cpu itself.

        Raises:
            ValueError: no such file, or not YAML.
        """
        return {**read_yaml(find_recipe(path)), **overrides}.get("use_cpu") is True

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "recipe") -> RunConfig:
        """Check keys and values of a recipe.

        Args:
            values: key → value, as YAML reads them.
            where: the file, for messages.

        Raises:
            ValueError: unknown key (nearest suggested), value of another type, value not allowed, or a missing key.
        """
        types, values = recipe_types(), with_preset(values)
        _check_keys(values, where)
        refuse_redacted(values, where)
        refuse_given(values, where)
        typed = {key: _typed(key, value, types[key], where) for key, value in values.items()}
        _check_needed(typed, where)
        own = {key: typed.pop(key) for key in recipe_keys() if key in typed}
        own.pop("preset", None)  # its keys are among the values
        return cls(args=OPRDConfig(**typed), **own)

    def settings(self) -> dict[str, Any]:
        """The settings to record, as a recipe: all keys of oprd, some of Trainer's, and others that are not at their default.

        `<redacted>` stands for each secret; `parse` refuses it.
        Defaults come from the fields, because a second `OPRDConfig` to compare with would reset accelerate's shared state.
        """
        base = {f.name for f in dataclasses.fields(OPRDConfig.__mro__[1])}
        values, types = self.args.to_dict(), typing.get_type_hints(OPRDConfig)
        shown = {}
        for setting in dataclasses.fields(OPRDConfig):
            name = setting.name
            ours = name not in base or name in _ALWAYS_SHOWN
            hidden = name in _NEVER_SHOWN or name in NO_EFFECT or (name in _SHOWN_IF_SET and values[name] is None)
            if not hidden and (ours or values[name] != setting.default):
                whole = type(values[name]) is int and types[name] in (float, float | None)  # as a recipe reads it
                shown[name] = float(values[name]) if whole else values[name]
        return redacted({**{key: getattr(self, key) for key in recipe_keys() if key != "preset"}, **shown})

    @classmethod
    def chosen(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Of a run's `settings`, those that are not at their default, and what every recipe chooses."""
        defaults = {
            f.name: f.default
            for f in (*dataclasses.fields(OPRDConfig), *dataclasses.fields(cls))
            if f.default is not dataclasses.MISSING
        }
        defaults |= _FILLED_IN
        return {k: v for k, v in settings.items() if k in _ALWAYS_CHOSEN or k not in defaults or v != defaults[k]}

    def shown(self) -> dict[str, Any]:
        """`settings` for people and files: objects that Python code gives are named there in words, which `parse` refuses."""
        given = {
            "lora": self.given.peft_config, "objectives": self.given.objectives, "rollout_engine": self.given.rollout_engine,
            "task": self.given.task, "reward_funcs": self.given.reward_funcs,
        }  # fmt: skip
        settings = self.settings()
        if settings["teachers"] is not None:
            settings["teachers"] = {name: entry_in_words(entry) for name, entry in settings["teachers"].items()}
        for key in ("model", "teacher_model", "base_model", "train_dataset", "eval_dataset"):
            if not isinstance(settings[key], str | Mapping | None):
                settings[key] = _in_words(settings[key])
        return settings | {key: _in_words(value) for key, value in given.items() if value is not None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings()})"


_GIVEN = " given in Python>"


def _in_words(value: Any) -> str:
    """A loaded model by the name that it was loaded by, any other object by its name or its kind."""
    loaded_by = getattr(getattr(value, "config", None), "name_or_path", "")
    if isinstance(loaded_by, str) and loaded_by:
        return loaded_by
    if isinstance(value, list | tuple) and not isinstance(value[0] if value else None, Mapping):
        return ", ".join(map(_in_words, value))
    name = value if isinstance(value, str) else getattr(value, "name", None) or getattr(value, "__name__", None)
    count = f" of {len(value)}" if isinstance(value, Sized) and not isinstance(value, str) else ""
    return f"<{name or type(value).__name__}{count}{_GIVEN}"


def _is_plain(value: Any) -> bool:
    """Whether a value cannot be a teacher: a number, a list or nothing."""
    return value is None or isinstance(value, int | float | list)


def entry_in_words(entry: Any) -> Any:
    """One of several teachers, its model in words where Python gives an object."""
    if isinstance(entry, Mapping):
        return {
            key: value if key != "model" or isinstance(value, str) else _in_words(value) for key, value in entry.items()
        }
    return entry if isinstance(entry, str) else _in_words(entry)


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, completed by the keys of their `preset`; a key in both keeps its own value.

    Keys that other presets set and this one does not are at their defaults: a preset is a whole objective.

    Raises:
        ValueError: there is no preset of this name.
    """
    if values.get("preset") is None:
        return dict(values)
    found = find_preset(values["preset"])
    defaults = {f.name: f.default for f in dataclasses.fields(OPRDConfig) if f.name in keys_of_presets()}
    return {**defaults, **found.keys, **values}


def _merged(file: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, replaced by `overrides`. A preset among `overrides` replaces the recipe's objective."""
    if "preset" in overrides:
        file = {key: value for key, value in file.items() if key != "preset"}
    return {**with_preset(file), **with_preset(overrides)}


def recipe_keys() -> list[str]:
    """The keys of a recipe that are not settings of `OPRDConfig`."""
    return [f.name for f in dataclasses.fields(RunConfig) if f.name not in ("args", "given")]


# In YAML these keys are text; in Python they may be objects.
_RECIPE_TYPES: dict[str, Any] = typing.get_type_hints(RunConfig) | {
    "model": str, "teacher_model": str | dict[str, Any] | None, "base_model": str | None, "train_dataset": str,
    "eval_dataset": str | None,
}  # fmt: skip


def recipe_types() -> dict[str, Any]:
    """The type of each key of a recipe."""
    return typing.get_type_hints(OPRDConfig) | {key: _RECIPE_TYPES[key] for key in recipe_keys()}


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ValueError: not a YAML file, or not a mapping.
    """
    try:
        content = load_yaml(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not a YAML file: {_yaml_problem(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected one key: value a line, found {type(content).__name__}")
    return content


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the line itself, which may hold a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return redacted_text(str(error))
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def refuse_redacted(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings of a file that a run has written, in which a secret is left out.

    Raises:
        ValueError: names the keys.
    """
    if keys := list(redacted_keys(values)):
        raise ValueError(
            f"{where}: {', '.join(keys)}: {REDACTED!r} stands for a secret, which is not written to files; write the secret there, "
            "or take the key out and set an environment variable (HF_TOKEN for the hub, VLLM_API_KEY for a rollout server)"
        )


def refuse_given(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings of a file that a Python script has left, in which objects are named in words.

    Raises:
        ValueError: names the keys.
    """
    if keys := [key for key, value in values.items() if isinstance(value, str) and value.endswith(_GIVEN)]:
        raise ValueError(
            f"{where}: {', '.join(keys)}: {values[keys[0]]!r} stands for an object of a Python script, which no file holds; name a "
            "file, a hub name or module:attribute there, or go on in that script"
        )


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe: `path` itself, or the shipped recipe of that name.

    Raises:
        ValueError: there is no such file.
    """
    candidates = [Path(path), *(folder / f"{path}.yaml" for folder in RECIPE_FOLDERS)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({p.stem for folder in RECIPE_FOLDERS for p in folder.glob("*.yaml")})
    raise ValueError(f"config: there is no file {str(path)!r}; shipped recipes are {', '.join(shipped)}")


_SAMPLED = "evaluation samples completions: see eval_num_generations and generation_batch_size"
NO_EFFECT = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command decides it"),
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
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "oprd orders rollouts by length itself"),
    "torch_empty_cache_steps": "where memory runs out, oprd lowers micro_batch_tokens and generation_batch_size",
}


_OTHER_NAMES = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_new_tokens": "max_completion_length",
    "student": "model",
    "teacher": "teacher_model",
}
"""What users of other tools type → the key here."""


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    known = {*recipe_keys(), *(f.name for f in dataclasses.fields(OPRDConfig))}
    for key in values:
        if key not in known:
            near = [_OTHER_NAMES[key]] if key in _OTHER_NAMES else difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown key {key!r}{hint} (all keys: oprd keys)")
        if key in NO_EFFECT:
            raise ValueError(f"{where}: the key {key!r} has no effect here; remove it ({NO_EFFECT[key]})")


def _check_needed(values: Mapping[str, Any], where: str) -> None:
    for key in ("model", "train_dataset"):
        if not values.get(key):
            raise ValueError(f"{where}: the key {key!r} is missing; see recipes/ for complete files")
    none = values.get("teacher_model") is None and values.get("teachers") is None
    if none and values.get("lora") is None and not is_adapter_folder(values["model"]):
        raise ValueError(
            f"{where}: the key 'teacher_model' is missing, and so is 'teachers' (only with 'lora', or an adapter as 'model', the "
            "base model can be the teacher; rewards alone need none: teacher_model: student, eval_teacher: false)"
        )
    if values.get("eval_dataset") and not values.get("task") and not values.get("reward_funcs"):
        raise ValueError(
            f"{where}: the key 'task' is missing: eval_dataset needs to know how answers are graded, here or by reward_funcs"
        )
    for key in ("train_limit", "eval_limit"):
        if (value := values.get(key)) is not None and value < 1:
            raise ValueError(f"{where}: {key}: {value} is not allowed; at least 1, or leave it out for all rows")
    if "output_dir" not in values:
        raise ValueError(f"{where}: the key 'output_dir' is missing; say where the run shall be written")


def _typed(key: str, value: Any, annotation: Any, where: str) -> Any:
    """Convert `value` to the type `annotation`: YAML reads 1 as an integer, and 0100 as text."""
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if isinstance(value, bool):  # YAML reads a bare `no` as false; save_strategy, among others, expects the word
            with suppress(ValidationError):
                return adapter.validate_python("yes" if value else "no")
        shown = redacted({key: value})[key]
        raise ValueError(f"{where}: {key}: {shown!r} is not allowed: {error.errors()[0]['msg']}") from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--key value`, `--key=value` and `--flag` (true) as a dict; values are read as YAML.

    The value of a key that holds text is taken as it is, unless it is in quotes or null.

    Raises:
        ValueError: a word without a key, a key that is no flag without a value, or a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ValueError(f"unexpected argument {word!r}; settings are given as --key value")
        key, equals, text = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and _may_be_flag(key.replace("-", "_")):
            text = "true"
        if not text.strip():
            raise ValueError(f"--{key}: the value is missing; write --{key} VALUE, or --{key} null to unset it")
        name = key.replace("-", "_")
        if _takes_text(name) and not _is_quoted(text.strip()) and text.strip().lower() not in ("null", "~"):
            overrides[name] = text.strip()  # which YAML could take for a comment, a mapping, a number or a switch
            continue
        try:
            overrides[name] = load_yaml(text)
        except yaml.YAMLError as error:
            shown = redacted_text(text)
            raise ValueError(f"--{key}: {shown!r} cannot be read: {_yaml_problem(error)}") from error
    return overrides


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _takes_text(key: str) -> bool:
    """Whether the value of a key is text, or none."""
    return recipe_types().get(key) in (str, str | None)


def _may_be_flag(key: str) -> bool:
    """Whether a key may be given without a value; so may one that does not exist, whose own message says more."""
    annotation = recipe_types().get(key, bool)
    return bool in (annotation, *typing.get_args(annotation))


_ALWAYS_SHOWN = (
    "output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "weight_decay", "max_grad_norm", "optim", "seed", "bf16",
)  # fmt: skip
_ALWAYS_CHOSEN = (
    "model", "train_dataset", "output_dir", "learning_rate", "max_steps", "per_device_train_batch_size", "seed",
)  # fmt: skip
_FILLED_IN = {"activation_checkpointing": False, "activation_checkpointing_kwargs": {"use_reentrant": False}}
"""What stands for a default of None."""
_NEVER_SHOWN = (
    "hub_token",  # a secret
    "resume_from_checkpoint",
    "gradient_checkpointing", "gradient_checkpointing_kwargs",  # deprecated twins of activation_checkpointing*
    "disable_tqdm", "include_for_metrics", "debug", "dataloader_pin_memory", "report_to", "accelerator_config",
)  # fmt: skip  # the last row: filled in by transformers, the same for every run unless set


_SHOWN_IF_SET = ("objectives", "reward_funcs", "reward_weights")


# Settings that may change when a run resumes: its length, what is recorded and where, and memory.
_MAY_CHANGE = frozenset((
    "output_dir", "max_steps", "num_train_epochs", "micro_batch_tokens", "generation_batch_size", "rollout_engine_kwargs",
    "run_name", "use_cpu", "dataloader_num_workers", "diagnostic_steps", "alarm_window",
    "nan_policy", "max_skipped_steps", "max_useless_steps", "fully_shard", "offload_teachers",
    "preset",  # a name: its keys are compared themselves
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


def changed_settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two calls and may not where a run resumes, because some of them would have no effect.

    A key that one side lacks is at its default there.

    Secrets are not compared: they change nothing that a run computes.

    Args:
        stored: settings that the run began with.
        now: those of this call.

    Returns:
        Key → (before, now).
    """
    return {key: change for key, change in _differing(stored, now).items() if not _may_change(key)}


def allowed_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between two calls and may, such as the run's length; as `changed_settings`."""
    return {key: change for key, change in _differing(stored, now).items() if _may_change(key)}


def _may_change(key: str) -> bool:
    return key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_PREFIXES)


def _differing(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    stored, now = ({key: without_redacted(v) for key, v in redacted(side).items()} for side in (stored, now))
    defaults = {f.name: f.default for f in dataclasses.fields(OPRDConfig)}
    pairs = {
        key: (stored.get(key, defaults.get(key)), now.get(key, defaults.get(key))) for key in sorted({*stored, *now})
    }
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}
