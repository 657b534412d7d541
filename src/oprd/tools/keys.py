"""The keys of a recipe, as `oprd keys` and `oprd train --help` show them.

They are read from the JSON schema beside the shipped recipes, without an import of torch or transformers.
`scripts/write_configuration_doc.py` writes the schema from the settings' help texts, as it writes docs/configuration.md.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.files import shipped_folders

SCHEMA = "schema.json"
OF_TRAINER = "transformers' TrainingArguments"
FIRST = (
    "model", "teacher_model", "train_dataset", "output_dir", "learning_rate", "max_steps", "per_device_train_batch_size",
    "max_completion_length",
)  # fmt: skip
"""The keys that say what a run is and what it costs."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Args:
        name: of the key.
        default: its default, as JSON; None also where the key must be given.
        unit: what a number counts; empty without a unit.
        meaning: one line.
        group: of related keys.
    """

    name: str
    default: Any
    unit: str
    meaning: str
    group: str

    def as_json(self) -> dict[str, Any]:
        """The key for a JSON file."""
        return dict(vars(self))


def schema_file() -> Path:
    """The JSON schema of a recipe (draft 2020-12), for editors.

    Raises:
        OSError: the installation is incomplete.
    """
    for folder in shipped_folders("recipes"):
        if (folder / SCHEMA).is_file():
            return folder / SCHEMA
    raise FileNotFoundError(f"{shipped_folders('recipes')[0] / SCHEMA} is not there; install oprd again")


def read_keys() -> list[Key]:
    """All keys, group by group, those of transformers' `TrainingArguments` last."""
    properties = json.loads(schema_file().read_text(encoding="utf-8"))["properties"]
    return [
        Key(name, entry.get("default"), entry.get("x-unit", ""), entry["description"], entry["x-group"])
        for name, entry in properties.items()
    ]


def find_keys(keys: Sequence[Key], word: str) -> list[Key]:
    """The keys with a part of their name that begins with `word`, or else with it anywhere in name, meaning or group.

    Raises:
        ValueError: there is none; names the nearest key.
    """
    wanted = word.lower().replace("-", "_")
    found = [key for key in keys if f"_{wanted}" in f"_{key.name}".lower()]
    found = found or [key for key in keys if word.lower() in f"{key.name} {key.meaning} {key.group}".lower()]
    if not found:
        near = difflib.get_close_matches(wanted, [key.name for key in keys], n=1, cutoff=0.5)
        raise ValueError(
            f"keys: no key has {word!r} in it{f'; did you mean {near[0]!r}?' if near else '; oprd keys lists all'}"
        )
    return found
