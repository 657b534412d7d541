"""Write docs/configuration.md and recipes/schema.json from the settings' help texts (a test compares both)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from transformers import TrainingArguments

from oprd.config import RANGES, OPRDConfig
from oprd.run_config import NO_EFFECT, RunConfig, recipe_keys, recipe_types
from oprd.tools.keys import OF_TRAINER, Key

ROOT = Path(__file__).parent.parent
HEAD = """# Configuration

`oprd keys WORD` finds keys; editors read `recipes/schema.json`.

A recipe is one flat YAML file. `--key value` on the command line overrides a key; an unknown key is refused with the nearest
known one. Keys are those of the tables below and all arguments of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
(`max_steps`, `bf16`, `activation_checkpointing`, `save_steps`, `report_to`, …). `per_device_train_batch_size` counts prompts;
each gives `num_generations` rollouts.

Different from `TrainingArguments` by default: {changed}.

Your own code: `objectives`, `reward_funcs`, `rollout_engine`, `task` and `teacher_model` ([extend](extend.md)). """

MODELS_AND_DATA = "models and datasets"
# The first key of each group, in the order of `OPRDConfig`.
GROUPS = {
    "model_init_kwargs": "loading models", "prompt_column": "reading datasets", "chat_template_kwargs": "prompts",
    "max_prompt_length": "rollouts", "representation_weight": "objective", "layers": "representation term",
    "output_positions": "output-space term", "num_iterations": "policy-gradient term", "micro_batch_tokens": "training step",
    "task": "grading, evaluation, logs",
}  # fmt: skip
# What the number of a key counts, by the key or the end of its name; the first that fits.
UNITS = {
    "num_generations": "rollouts a prompt", "eval_num_generations": "samples a problem",
    "generation_batch_size": "completions", "num_completions_to_log": "completions",
    "per_device_train_batch_size": "prompts", "num_train_epochs": "epochs", "warmup_steps": "steps, or a share below 1",
    "gradient_accumulation_steps": "batches", "ddp_timeout": "s", "num_iterations": "updates", "position_k": "positions",
    "output_top_k": "tokens", "top_k": "tokens", "ddp_bucket_cap_mb": "MB", "dataloader_num_workers": "processes",
    "save_total_limit": "checkpoints", "_limit": "rows", "_length": "tokens", "_tokens": "tokens", "_steps": "steps",
    "_window": "steps", "_seconds": "s", "bridge_rank": "directions",
}  # fmt: skip
# In place of the help texts of TrainingArguments, which say something else than what happens here.
HERE = {
    "output_dir": "Folder of the run.",
    "per_device_train_batch_size": "Prompts a step and device; each gives num_generations rollouts.",
    "max_steps": "Optimizer steps; -1: num_train_epochs.",
}


def table(rows: list[Key]) -> str:
    """A Markdown table of key, default and meaning."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for row in rows:
        meaning = row.meaning.replace("|", "\\|")
        lines.append(f"| `{row.name}` | `{row.default}` | {meaning} |")
    return "\n".join(lines)


def unit_of(name: str, annotation: Any) -> str:
    """What the number of a key counts; empty for a key that holds none."""
    if annotation in (str, bool) or "_strategy" in name:
        return ""
    return next((unit for end, unit in UNITS.items() if name == end or (end[0] == "_" and name.endswith(end))), "")


def recipe_rows() -> list[Key]:
    """The keys that are not settings of `OPRDConfig`."""
    documented = inspect.cleandoc(RunConfig.__doc__ or "") + "\n"
    described = dict(re.findall(r"^ {4}(\w+): (.+?)(?=\n {4}\w+: |\n\Z)", documented, flags=re.M | re.S))
    types = recipe_types()
    return [
        Key(f.name, f.default, unit_of(f.name, types[f.name]), " ".join(described[f.name].split()), MODELS_AND_DATA)
        for f in dataclasses.fields(RunConfig)
        if f.name in recipe_keys()
    ]


def own_rows() -> list[Key]:
    """The settings of `OPRDConfig` alone."""
    base, types, group, rows = {f.name for f in dataclasses.fields(TrainingArguments)}, recipe_types(), "", []
    for f in dataclasses.fields(OPRDConfig):
        if f.name not in base:
            group = GROUPS.get(f.name, group)
            rows.append(Key(f.name, f.default, unit_of(f.name, types[f.name]), f.metadata["help"], group))
    return rows


def trainer_rows() -> list[Key]:
    """The settings of transformers' `TrainingArguments` that have an effect, in one sentence each."""
    base, types, rows = {f.name for f in dataclasses.fields(TrainingArguments)}, recipe_types(), []
    for f in dataclasses.fields(OPRDConfig):
        if f.name in base and f.name not in NO_EFFECT:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            text = HERE.get(f.name) or " ".join(f.metadata.get("help", "").replace("%%", "%").split())
            sentence = re.split(r"(?<=[a-z)`\]'][.]) ", text)[0]
            rows.append(Key(f.name, default, unit_of(f.name, types[f.name]), sentence, OF_TRAINER))
    return rows


def render() -> str:
    """The whole document."""
    base = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    changed = [f for f in dataclasses.fields(OPRDConfig) if f.name in base and f.default != base[f.name].default]
    parts = [
        HEAD.format(changed=", ".join(f"`{f.name}: {f.default}`" for f in changed)),
        "## Models and datasets\n\n" + table(recipe_rows()),
        "## Rollouts, objective, evaluation\n\n" + table(own_rows()),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def json_type(annotation: Any, shared: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a key's type; `shared` receives what it refers to. Of a type that JSON lacks, anything."""
    try:
        found = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True)).json_schema()
    except (PydanticInvalidForJsonSchema, PydanticUserError):  # the latter: the type has a configuration of its own
        return {}
    shared |= found.pop("$defs", {})
    return {key: value for key, value in found.items() if key not in ("title", "description")}


def schema() -> str:
    """The JSON schema of a recipe."""
    types, shared, properties = recipe_types(), {}, {}
    for key in (*recipe_rows(), *own_rows(), *trainer_rows()):
        _, low, high = RANGES.get(key.name, ("", -math.inf, math.inf))
        limits = {"minimum": low, "maximum": high} if low != math.ulp(0.0) else {"exclusiveMinimum": 0, "maximum": high}
        properties[key.name] = {
            **json_type(types[key.name], shared),
            **{name: value for name, value in limits.items() if math.isfinite(value)},
            "description": key.meaning,
            **({} if key.default in (None, "") else {"default": key.default}),
            **({"x-unit": key.unit} if key.unit else {}),
            "x-group": key.group,
        }
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of oprd",
        "type": "object",
        "properties": properties,
        "required": ["model", "train_dataset", "output_dir"],
        "additionalProperties": False,
        "$defs": shared,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False, default=lambda value: value.value) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(render())
    (ROOT / "recipes" / "schema.json").write_text(schema())
