"""Read a comparison file and plan its runs. All runs are checked before the first one starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from oprd.config import OPRDConfig
from oprd.files import shipped_folders
from oprd.resolve import plan
from oprd.rollouts.engine import Sampling
from oprd.run_config import RunConfig, read_yaml, recipe_keys
from oprd.sanitize import redacted_keys
from oprd.tools.compare.bridges import bridge_folder, parse_bridges
from oprd.tools.compare.results import ROLLOUTS, Run, run_folder

COMPARISON_FOLDERS = shipped_folders("comparisons")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

# Keys that the comparison sets itself, with the way to change them.
_SET_BY_COMPARISON = {
    "seed": "list the seeds under 'seeds'",
    "output_dir": "it is the comparison's 'output_dir'",
    "learning_rate": "list the rates under 'learning_rates'",
    "eval_before": "the student before is evaluated once a seed",
    "eval_teacher": "the teacher is evaluated once a seed",
    "resume_from_checkpoint": "an interrupted run is started anew",
    "load_best_model_at_end": "the final evaluation must be that of the last step",
}
# Keys that must be equal for all objectives, so that differences come from the objectives.
_SHARED = (
    "model", "teacher_model", "teachers", "model_init_kwargs", "teacher_model_init_kwargs", "train_dataset", "train_split",
    "train_limit", "task",
)  # fmt: skip
# The same, of evaluated problems; an older comparison, whose runs differ in them, can still be reported.
_EVALUATED = (
    "prompt_column", "answer_column", "answer_format", "dataset_config", "merge_system_prompt", "chat_template_kwargs",
    "chat_template_date", "split_special_tokens", "max_prompt_length",
)  # fmt: skip
_RATES = "learning_rates"
_SHARED_PREFIX = "eval_"


@dataclass(frozen=True)
class Comparison:
    """A comparison file.

    Args:
        recipe: base settings of all runs: a recipe file or the name of a shipped recipe.
        output_dir: folder of the runs and the report.
        seeds: seeds of problems, prompt order, rollouts and evaluation; every objective runs with each.
        learning_rates: every objective runs at each rate, unless it has its own `learning_rates`.
        objectives: name → recipe keys that this objective replaces.
        settings: recipe keys replaced in all runs.
        bridges: name → options of `oprd bridge fit`. The comparison fits these bridges; the key `bridge` accepts their names.
        keep_models: keep the trained model of each run.
    """

    recipe: str
    output_dir: str
    seeds: list[int]
    learning_rates: list[float]
    objectives: dict[str, dict[str, Any] | None]
    settings: dict[str, Any] = field(default_factory=dict)
    bridges: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    keep_models: bool = True


def load_comparison(path: str | Path) -> tuple[Path, Comparison]:
    """Read and check a comparison file. `plan_runs` checks its recipes.

    Args:
        path: a YAML file, or the name of a shipped comparison ("tiny").

    Returns:
        The path of the file, and its content.

    Raises:
        ValueError: the file does not exist or is not YAML, a key is unknown (the nearest is suggested), or a value is not allowed.
    """
    file = _find(path)
    comparison = Comparison(**_typed(read_yaml(file), file))
    _check_grid(comparison, file)
    _check_keys(comparison, file)
    _refuse_different(comparison, file, _SHARED, _SHARED_PREFIX)
    parse_bridges(comparison.bridges, str(file))
    return file, comparison


def plan_runs(comparison: Comparison, file: Path, *, report_only: bool = False) -> list[Run]:
    """Plan and check all runs. Seeds are the outermost loop, so an interrupted comparison has the same seeds for every objective.

    Only the first run of a seed evaluates the student before training and the teacher, since all runs of a seed share these
    results. Another seed draws other problems or samples.

    Args:
        comparison: what `load_comparison` read.
        file: its file, for messages.
        report_only: runs whose evaluations differ are not refused.

    Raises:
        ValueError: a recipe is invalid, has no evaluation, or takes another number of rollouts than the others.
    """
    if not report_only:
        _refuse_different(comparison, file, _EVALUATED)
    runs: list[Run] = []
    rollouts: dict[str, dict[str, int]] = {}
    sampled: dict[str, Sampling] = {}
    for seed in comparison.seeds:
        first = len(runs)
        for rate, name, changes in _grid(comparison):
            folder = run_folder(comparison.output_dir, name, rate, seed)
            own = {"seed": seed, "learning_rate": rate, "output_dir": str(folder)}
            own |= dict.fromkeys(("eval_before", "eval_teacher"), len(runs) == first)
            values = {**comparison.settings, **changes, **own}
            if values.get("bridge") in comparison.bridges:
                values["bridge"] = str(bridge_folder(comparison.output_dir, values["bridge"]))
            run = _checked(comparison.recipe, values, f"{file}: objective {name!r}", name in rollouts)
            rollouts[name] = {key: getattr(run.args, key) for key in ROLLOUTS}
            sampled[name] = run.args.eval_sampling
            runs.append(Run(name, rate, seed, folder, run.settings()))
    if not report_only:
        _check_sampling(sampled, file)
    _check_rollouts(rollouts, file)
    return runs


def _refuse_different(comparison: Comparison, file: Path, keys: Collection[str], prefix: str | None = None) -> None:
    """Refuse objectives that have a setting of their own among `keys`, or one that begins with `prefix`."""
    for name, changes in comparison.objectives.items():
        for key in changes or {}:
            if key in keys or (prefix is not None and key.startswith(prefix)):
                raise ValueError(
                    f"{file}: objectives: {name}: {key!r} cannot differ between objectives, which share models, problems and "
                    "evaluation; set it under 'settings'"
                )


def _check_sampling(sampled: Mapping[str, Sampling], file: Path) -> None:
    """Refuse objectives whose evaluations sample differently, as where one has another max_completion_length."""
    (first, expected), *others = sampled.items()
    for name, own in others:
        if own != expected:
            raise ValueError(
                f"{file}: objectives: {name!r} is evaluated with {own.max_completion_length} tokens a completion, {first!r} with "
                f"{expected.max_completion_length}; set eval_max_completion_length under 'settings'"
            )


def _grid(comparison: Comparison) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """All (rate, objective, keys it replaces), with ascending rates as the outer loop."""
    changes = {name: dict(keys or {}) for name, keys in comparison.objectives.items()}
    rates = {name: _rates(keys.pop(_RATES, comparison.learning_rates), name) for name, keys in changes.items()}
    for rate in sorted({rate for own in rates.values() for rate in own}):
        yield from ((rate, name, keys) for name, keys in changes.items() if rate in rates[name])


def _find(path: str | Path) -> Path:
    for candidate in (Path(path), *(folder / f"{path}.yaml" for folder in COMPARISON_FOLDERS)):
        if candidate.is_file():
            return candidate
    shipped = sorted({p.stem for folder in COMPARISON_FOLDERS for p in folder.glob("*.yaml")})
    raise ValueError(f"config: there is no file {str(path)!r}; shipped comparisons are {', '.join(shipped)}")


def _typed(content: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Convert the file's values to the types of `Comparison`."""
    types = get_type_hints(Comparison)
    for key in content:
        _refuse_unknown(key, types, f"{file}", f"; allowed are {', '.join(types)}")
    for needed in dataclasses.fields(Comparison):
        required = needed.default is needed.default_factory is dataclasses.MISSING
        if required and content.get(needed.name) is None:
            raise ValueError(f"{file}: the key {needed.name!r} is missing; see comparisons/ for complete files")
    typed = {}
    for key, value in content.items():
        if value is None:
            continue
        try:
            typed[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = ": ".join([key, *map(str, first["loc"])])
            raise ValueError(f"{file}: {where}: {first['input']!r} is not allowed: {first['msg']}") from None
    return typed


def _check_grid(comparison: Comparison, file: Path) -> None:
    for key in ("seeds", "learning_rates", "objectives"):
        values: Any = getattr(comparison, key)
        if not values:
            raise ValueError(f"{file}: {key}: {values!r} is not allowed; give at least one")
        if len(set(values)) != len(values):
            raise ValueError(f"{file}: {key}: {values!r} names one twice; leave out the second")
    for seed in comparison.seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"{file}: seeds: {seed} is not allowed; a seed is 0 to {2**32 - 1}")
    _rates(comparison.learning_rates, f"{file}: learning_rates")
    lower: dict[str, str] = {}
    for name in comparison.objectives:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{file}: objectives: {name!r} cannot name a folder; use up to 64 letters, digits, '_' and '-', the first a "
                "letter or digit"
            )
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            raise ValueError(f"{file}: objectives: {name!r} and {twin!r} are one folder on some disks; rename one")


def _rates(values: Any, where: str) -> list[float]:
    try:
        rates = TypeAdapter(list[float]).validate_python(values)  # converts text too
    except ValidationError:
        raise ValueError(f"{where}: {values!r} is not allowed; give a list of rates, such as [3.0e-4]") from None
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"{where}: {rate} is not allowed; a rate is above 0")
    if not rates or len(set(rates)) != len(rates):
        raise ValueError(f"{where}: {values!r} is not allowed; give at least one rate, each once")
    return rates


def _check_keys(comparison: Comparison, file: Path) -> None:
    """Check for recipe keys that are unknown or not allowed here."""
    known = [*recipe_keys(), *(f.name for f in dataclasses.fields(OPRDConfig))]
    places: dict[str, Mapping[str, Any]] = {"settings": comparison.settings}
    places |= {f"objectives: {name}": changes or {} for name, changes in comparison.objectives.items()}
    for place, changes in places.items():
        for key in changes:
            if key == _RATES and place != "settings":
                _rates(changes[key], f"{file}: {place}: {key}")
                continue
            _refuse_unknown(key, known, f"{file}: {place}", " (all keys: docs/configuration.md)")
            if key in _SET_BY_COMPARISON:
                raise ValueError(f"{file}: {place}: {key!r} cannot be set here: {_SET_BY_COMPARISON[key]}")


def _refuse_unknown(key: Any, known: Iterable[str], where: str, allowed: str) -> None:
    known = list(known)
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: unknown key {key!r}{hint}{allowed}")


def _checked(recipe: str, values: Mapping[str, Any], where: str, planned: bool) -> RunConfig:
    """Load and check the recipe with `values`. `planned`: its models and datasets were checked for another seed or rate."""
    try:
        run = RunConfig.load(recipe, values)
        if not run.eval_dataset:
            raise ValueError("eval_dataset: there is none, so nothing would be compared; set it under 'settings'")
        if run.args.load_best_model_at_end:
            raise ValueError(
                f"load_best_model_at_end: True is not allowed: {_SET_BY_COMPARISON['load_best_model_at_end']}"
            )
        if secrets := list(redacted_keys(run.settings())):
            raise ValueError(
                f"{', '.join(secrets)}: a comparison hands settings to its runs in files, which hold no secrets; take it out and "
                "set an environment variable (HF_TOKEN for the hub, VLLM_API_KEY for a rollout server), which the runs inherit"
            )
        bridge = run.args.bridge
        if bridge is not None and not Path(bridge).is_dir():
            raise ValueError(
                f"bridge: there is no folder {bridge}, nor is it among this file's 'bridges'; make one with oprd bridge fit"
            )
        if not planned:
            plan(run).describe()  # raises where models, tokenizers or datasets do not fit
    except ValueError as error:
        raise ValueError(f"{where} (recipe {recipe!r} with the settings of this file): {error}") from error
    return run


def _check_rollouts(rollouts: Mapping[str, Mapping[str, int]], file: Path) -> None:
    (first, ours), *others = rollouts.items()
    for name, theirs in others:
        if math.prod(ours.values()) != math.prod(theirs.values()):
            counts = " and ".join(
                f"{objective!r} takes {math.prod(parts.values())} rollouts a step ({' × '.join(map(str, parts.values()))})"
                for objective, parts in ((first, ours), (name, theirs))
            )
            raise ValueError(f"{file}: objectives: {counts}; make {' × '.join(ROLLOUTS)} agree")
