"""Bridges that a comparison fits itself, before its runs are planned: the same rollouts, fitted in different ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oprd.bridge.collect import fit_bridge
from oprd.resolve import load_pair
from oprd.run_config import RunConfig
from oprd.tasks.problems import load_rows


@dataclass(frozen=True)
class BridgeSpec:
    """How a bridge is fitted; the options of `oprd bridge fit`. Models, prompts and templates are those of the comparison."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    limit: int = 2000
    layers: str | list[int] = "all"
    layer_map: str | list[int] = "proportional"
    rank: int | None = None
    max_rank: int | None = None
    scale: str = "mean"
    projector: str = "least_squares"
    ridge: float | str = 1e-4
    intercept: bool = True
    held_out: float = 0.2
    seed: int = 0

    def fitting(self) -> dict[str, Any]:
        """Arguments of `fit_bridge`."""
        values = asdict(self)
        return {"maps": values.pop("layer_map"), **{k: v for k, v in values.items() if k != "limit"}}


def bridge_folder(output_dir: str, name: str) -> Path:
    """Where a comparison keeps the bridge of this name."""
    return Path(output_dir) / "bridges" / name


def parse_bridges(bridges: Mapping[str, Any], where: str) -> dict[str, BridgeSpec]:
    """The `bridges` of a comparison file, checked.

    Raises:
        ValueError: an unknown option, or a value of another type.
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
    """Fit the bridges that are not there yet.

    Args:
        bridges: by name.
        output_dir: the comparison's.
        recipe: gives models, prompts and the length of rollouts.
        settings: keys of the recipe that the comparison replaces.
        say: called with a line a bridge.
        threads: CPU threads.

    Raises:
        ValueError: a bridge that is there, and was fitted in another way; or as `fit_bridge`.
    """
    torch.set_num_threads(threads)
    for name, spec in bridges.items():
        folder = bridge_folder(output_dir, name)
        note = folder.with_suffix(".json")
        wanted = json.dumps(asdict(spec), indent=1, sort_keys=True) + "\n"
        if folder.exists():
            if not note.exists() or note.read_text() != wanted:
                raise ValueError(
                    f"bridges: {folder} was fitted in another way than 'bridges: {name}' asks for; remove the folder to fit it "
                    "anew, or choose another output_dir"
                )
            continue
        run = RunConfig.load(recipe, {**settings, "bridge": None})
        args = run.args
        rows = load_rows(run.train_dataset, run.train_split, spec.limit, spec.seed)
        pair = load_pair(
            run.model, str(run.teacher_model), args.prompt_rendering, trust_remote_code=args.trust_remote_code
        )
        bridge = fit_bridge(
            pair, rows, max_completion_length=args.max_completion_length, max_prompt_length=args.max_prompt_length,
            **spec.fitting(),
        )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(wanted)
        bridge.save(folder)
        say(f"bridge {name}: rank {bridge.rank} of {bridge.max_rank}, verdict: {bridge.verdict[0]}")
