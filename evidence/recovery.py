"""Models of which blocks are cut, and the runs that bring them back: what the claims on recovery share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evidence.claim import Result, Work, make_once, read_by_name
from evidence.comparisons import TUNING_SEED, Record, of, run_comparison
from evidence.tuning import GRID, LADDER, Rates, edges_said, never_better_said
from oprd.files import write_json
from oprd.tools.prune import Choice, PromptFile, prune_model

NAMES = {
    "representation": "representation (OPRD-Vanilla)",
    "full_reverse_kl": "full reverse KL",
    "sampled_token": "sampled-token OPD",
    "supervised": "supervised on the original's responses",
}
SHORT = NAMES | {"representation": "representation", "supervised": "supervised on the\noriginal's responses"}
RIVALS = ("full_reverse_kl", "sampled_token", "supervised")


@dataclass(frozen=True)
class Setting:
    """What is cut and recovered.

    Args:
        file: the comparison.
        original: the model that is cut, and the teacher.
        keeps: numbers of blocks that are kept; the rates are chosen for the first.
        prompts: of the completions on which blocks are measured.
        folder: of the runs, with the number of blocks appended.
        tokens: most tokens of a completion.
        rates: with which the grid begins.
        ladder: rates at which it may grow.
        seeds: how many.
        settings: of all runs.
        quick: of a quick run, beside `evidence.comparisons.QUICK`.
    """

    file: Path
    original: str
    keeps: tuple[int, ...]
    prompts: str
    folder: str
    tokens: int = 64
    rates: tuple[float, ...] = GRID
    ladder: tuple[float, ...] = LADDER
    seeds: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)


def cut_original(work: Work, setting: Setting, keep: int) -> dict[str, Any]:
    """Cut the original once; what was found, and the `folder` of the cut model."""
    folder, file = work.folder / f"cut_{keep}", work.folder / f"cut_{keep}.json"
    prompts = PromptFile(
        setting.prompts, limit=64, max_completion_length=setting.tokens, split="train", seed=TUNING_SEED
    )

    def cut() -> None:
        found = prune_model(setting.original, Choice("cosine", keep), folder, prompts=prompts, dtype="float32")
        write_json(file, found)

    made_from = read_by_name(setting.original), keep, read_by_name(setting.prompts), setting.tokens
    make_once(folder, made_from, cut)
    return {**json.loads(file.read_text()), "folder": folder}


def recover(work: Work, setting: Setting, keep: int, seeds: Sequence[int], rates: Rates) -> list[Record]:
    """Recover the model that `cut_original` wrote, for each objective of `rates`, rate and seed."""
    quick = setting.quick if work.quick else {}
    settings = {**setting.settings, **quick, "model": str(work.folder / f"cut_{keep}")}
    return run_comparison(
        setting.file, work, folder=_folder(setting, keep), seeds=seeds, rates=rates, settings=settings
    )


def recovered_model(work: Work, setting: Setting, keep: int, record: Record) -> Path:
    """Folder of the model that a run left."""
    runs = work.folder.parent / _folder(setting, keep) / "runs"
    return runs / record["objective"] / f"lr_{record['learning_rate']!r}" / f"seed_{record['seed']}" / "model"


def _folder(setting: Setting, keep: int) -> str:
    return f"{setting.folder}_{keep}"


def tried_rates(tuning: Sequence[Record]) -> str:
    """The rates that were tried for each objective, and a sentence on those whose best lies at an end, or below the start."""
    tried = {name: sorted(r["learning_rate"] for r in of(tuning, name)) for name in NAMES}
    grids = "; ".join(f"{NAMES[n]} {', '.join(f'{rate:g}' for rate in tried[n])}" for n in NAMES)
    return f"**Learning rates** tried on the tuning seed: {grids}. {edges_said(tuning, NAMES)}{never_better_said(tuning, NAMES)}"


def influence_said(result: Result) -> str:
    """A sentence with the influence of each block."""
    values = ", ".join(f"{layer}: {value:.3f}" for layer, value in enumerate(result["influence"], start=1))
    return f"Block influence on the original's own completions: {values}."
