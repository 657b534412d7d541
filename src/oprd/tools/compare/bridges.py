"""Bridges that a comparison fits before it plans its runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oprd.bridge.fit import DEFAULT_PROJECTOR
from oprd.data.rows import Reading
from oprd.files import write_text
from oprd.run_config import RunConfig
from oprd.sanitize import redacted
from oprd.tools.fit_for_run import fit_for_run


@dataclass(frozen=True)
class BridgeSpec:
    """Options of a bridge fit, as in `oprd bridge fit`. Models, prompts and templates come from the comparison."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    limit: int = 2000
    layers: str | list[int] = "all"
    layer_map: str | list[int] = "proportional"
    rank: int | None = None
    max_rank: int | None = None
    scale: str = "mean"
    projector: str = DEFAULT_PROJECTOR
    ridge: float | str = 1e-4
    intercept: bool = True
    held_out: float = 0.2
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The options as arguments of `fit_for_run`."""
        values = asdict(self)
        fitting = {name: values.pop(name) for name in ("rank", "max_rank", "scale", "projector", "ridge", "intercept")}
        return {"maps": values.pop("layer_map"), "fitting": fitting, **values}


def bridge_folder(output_dir: str, name: str) -> Path:
    """The folder of the bridge `name` in a comparison."""
    return Path(output_dir) / "bridges" / name


def parse_bridges(bridges: Mapping[str, Any], where: str) -> dict[str, BridgeSpec]:
    """Check the `bridges` of a comparison file and return their options.

    Raises:
        ValueError: an option is unknown, or its value has the wrong type.
    """
    specs = {}
    for name, options in bridges.items():
        try:
            specs[name] = TypeAdapter(BridgeSpec).validate_python(options or {})
        except ValidationError as error:
            first = error.errors()[0]
            at = ": ".join(map(str, first["loc"]))
            raise ValueError(
                f"{where}: bridges: {name}: {at}: {first['input']!r} is not allowed: {first['msg']}"
            ) from None
    return specs


def fit_missing(
    bridges: Mapping[str, BridgeSpec],
    output_dir: str,
    recipe: str,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    threads: int = 1,
) -> None:
    """Fit the bridges that do not exist yet.

    Args:
        bridges: options by name.
        output_dir: the comparison's output folder.
        recipe: recipe with models, prompts and rollout length.
        settings: recipe keys that the comparison replaces.
        say: called with one line per bridge.
        threads: CPU threads.

    Raises:
        ValueError: an existing bridge was fitted with other options; or as `fit_bridge`.
    """
    torch.set_num_threads(threads)
    for name, spec in bridges.items():
        folder = bridge_folder(output_dir, name)
        note = folder.with_suffix(".json")
        run = RunConfig.load(recipe, {**settings, "bridge": None})
        wanted = {**asdict(spec), "of": _of_run(run)}
        if folder.exists():
            if other := _differences(note, wanted):
                raise ValueError(
                    f"bridges: {folder} was fitted with other options than those of 'bridges: {name}' ({', '.join(other)}); remove "
                    "the folder to fit it again, or choose another output_dir"
                )
            continue
        try:
            bridge = fit_for_run(run, **spec.arguments())
        except ValueError as error:
            raise ValueError(f"bridges: {name}: {error}") from error
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(wanted, indent=1, sort_keys=True) + "\n")
        bridge.save(folder)
        say(f"bridge {name}: rank {bridge.rank} of {bridge.max_rank}, verdict: {bridge.verdict[0]}")


def _of_run(run: RunConfig) -> dict[str, Any]:
    """What a fit takes from the comparison's models, prompts and templates."""
    args = run.args
    values = {
        "model": run.model, "teacher_model": run.teacher_model, "model_init_kwargs": args.model_init_kwargs,
        "teacher_model_init_kwargs": args.teacher_model_init_kwargs, "train_dataset": run.train_dataset,
        "train_limit": run.train_limit, "task": args.task, "answer_format": args.answer_format,
        "train_split": run.train_split, "max_completion_length": args.max_completion_length,
        "max_prompt_length": args.max_prompt_length, "reading": asdict(Reading.of(vars(args), "train")),
        **asdict(args.prompt_rendering),
    }  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(redacted(values), default=str))
    return found


def _differences(note: Path, wanted: Mapping[str, Any]) -> list[str]:
    """Names of the options that differ from those of a fit's note; all are unknown without one."""
    if not note.exists():
        return ["they are not recorded"]
    fitted = json.loads(note.read_text())
    of_run = fitted.pop("of", {})  # a note of an earlier version has none
    found = [name for name in (*fitted, *wanted) if name != "of" and fitted.get(name) != wanted.get(name)]
    return list(dict.fromkeys([*found, *(name for name in of_run if of_run[name] != wanted["of"].get(name))]))
