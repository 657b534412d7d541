"""The command `oprd bridge fit` that advice prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_DEFAULTS = {
    "max_completion_length": 512, "max_prompt_length": None, "split": "train", "prompt_column": None, "dataset_config": None,
    "merge_system_prompt": False, "chat_template_kwargs": None, "chat_template_date": None, "teacher_chat_template_kwargs": None,
    "teacher_system_prompt": None, "special_token_map": None, "split_special_tokens": True, "teacher_dtype": "auto",
    "trust_remote_code": False,
}  # fmt: skip
"""Options that make the rollouts and what both models read, with their defaults."""


def fit_command(student: str, teacher: str, prompts: str, out: str, settings: Mapping[str, Any]) -> str:
    """The command that fits a bridge on the rollouts of a run or a report, quoted for a shell.

    Args:
        student: the student's name.
        teacher: the teacher's.
        prompts: source of the prompts.
        out: folder of the bridge.
        settings: option → value; those that are missing or have their default are left out, and so is what is no option.
    """
    words = ["oprd", "bridge", "fit", "--student", student, "--teacher", teacher, "--prompts", prompts, "--out", out]
    for name, default in _DEFAULTS.items():
        value, option = settings.get(name, default), name.replace("_", "-")
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return shlex.join(words)
