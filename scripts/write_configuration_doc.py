"""Write docs/configuration.md from the settings' help texts (a test compares)."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from transformers import TrainingArguments

from oprd.config import OPRDConfig
from oprd.run_config import RunConfig, recipe_keys

HEAD = """# Configuration

`scripts/write_configuration_doc.py` writes this page from the settings' help texts.

A recipe is one flat YAML file. `--key value` on the command line overrides a key; an unknown key is refused with the nearest
known one. Keys are those of the tables below and all arguments of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)
(`max_steps`, `bf16`, `activation_checkpointing`, `save_steps`, `report_to`, …). `per_device_train_batch_size` counts prompts;
each gives `num_generations` rollouts.

Different from `TrainingArguments` by default: {changed}.

Your own code: `objectives`, `rollout_engine`, `task` and `teacher_model` also take `module:attribute`; a part with arguments is
`{{use: "module:attribute", argument: value}}` ([ARCHITECTURE.md](../ARCHITECTURE.md#your-own-parts)). """


def table(rows: list[tuple[str, object, str]]) -> str:
    """A Markdown table of key, default and meaning."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, default, text in rows:
        meaning = text.replace("|", "\\|")
        lines.append(f"| `{name}` | `{default}` | {meaning} |")
    return "\n".join(lines)


def render() -> str:
    """The whole document."""
    base = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    changed = [f for f in dataclasses.fields(OPRDConfig) if f.name in base and f.default != base[f.name].default]
    own = [f for f in dataclasses.fields(OPRDConfig) if f.name not in base]
    documented = inspect.cleandoc(RunConfig.__doc__ or "") + "\n"
    described = dict(re.findall(r"^ {4}(\w+): (.+?)(?=\n {4}\w+: |\n\Z)", documented, flags=re.M | re.S))
    recipe = [f for f in dataclasses.fields(RunConfig) if f.name in recipe_keys()]
    recipe_rows = [(f.name, f.default, " ".join(described[f.name].split())) for f in recipe]
    parts = [
        HEAD.format(changed=", ".join(f"`{f.name}: {f.default}`" for f in changed)),
        "## Models and datasets\n\n" + table(recipe_rows),
        "## Rollouts, objective, evaluation\n\n" + table([(f.name, f.default, f.metadata["help"]) for f in own]),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs", "configuration.md").write_text(render())
