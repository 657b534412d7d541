"""`--dry-run`: what a recipe would do, and every check that needs neither weights nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from oprd.alignment.teacher_text import TeacherText, check_one_text
from oprd.bridge import Bridge
from oprd.config import OPRDConfig
from oprd.models.loading import load_tokenizer, resolve_name
from oprd.objectives.schedules import is_on
from oprd.run_config import Recipe, load_recipe, resolved
from oprd.states.layers import resolve_layers
from oprd.tasks.problems import GENERATED, load_rows


def load_for_plan(path: str | Path, overrides: Mapping[str, Any]) -> tuple[Recipe, OPRDConfig]:
    """`load_recipe`, as for a CPU where there is no GPU: transformers refuses `bf16` there, and a plan runs nothing.

    Raises:
        ValueError: as `load_recipe`.
    """
    on_cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
    return load_recipe(path, {**overrides, **on_cpu})


def describe_plan(recipe: Recipe, config: OPRDConfig) -> list[str]:
    """Lines that say what the run would do; what cannot be checked here (no hub, no file) is said too.

    Raises:
        ValueError: a setting, a reachable model pair or a reachable dataset that does not fit.
    """
    lines = [f"{key}: {value}" for key, value in resolved(recipe, config).items()]
    rollouts = config.per_device_train_batch_size * config.num_generations * config.gradient_accumulation_steps
    lines.append("")
    lines.append(
        f"plan: {rollouts} rollouts a step and device of up to {config.max_completion_length} tokens, "
        f"{config.max_steps if config.max_steps > 0 else f'{config.num_train_epochs} epoch(s) of'} steps"
    )
    lines.append(f"loss: {describe_objective(config)}")
    student, teacher = (_model_config(name, config) for name in (recipe.model, recipe.teacher_model))
    lines += [_model_line("student", recipe.model, student), _model_line("teacher", recipe.teacher_model, teacher)]
    if student is not None:
        lines.append(f"layers: {len(resolve_layers(config.layers, student[0]))} of {student[0]}")
    compares = is_on(config.representation_weight)
    if student is not None and teacher is not None and student != teacher and config.bridge is None and compares:
        raise ValueError(
            f"teacher_model: {teacher[0]} layers of width {teacher[1]}, the student {student[0]} of {student[1]}; OPRD-Vanilla "
            "needs both to agree (for a teacher of another shape fit a bridge: oprd bridge fit, then the key 'bridge')"
        )
    if config.bridge is not None:
        lines.append(_bridge_line(config.bridge, recipe, config, student, teacher))
    lines.append(_tokenizer_line(recipe, config))
    lines += [
        _dataset_line("train", recipe.train_dataset, recipe.train_split, recipe.train_limit, config.seed),
        _dataset_line("eval", recipe.eval_dataset, recipe.eval_split, recipe.eval_limit, config.seed),
    ]
    return [*lines, "dry run: nothing was trained or written"]


def describe_objective(config: OPRDConfig) -> str:
    """The sum that a run minimises, such as `10 x representation + 1 x reverse_kl, a mean over response tokens`."""
    output = config.output_term.kind if config.output_term else ""
    weights = (
        (config.representation_weight, "representation"),
        (config.output_weight if output else 0, output),
        (config.policy_gradient_weight, "GRPO"),
    )
    terms = [f"{_weight(weight)} x {name}" for weight, name in weights if is_on(weight)]
    fading = f", crossfade over {config.crossfade_steps} steps" if config.crossfade_steps else ""
    of = "rollouts" if config.reduction == "rollout" else "response tokens"
    return f"{' + '.join(terms)}{fading}, a mean over {of}"


def _weight(weight: Any) -> str:
    if isinstance(weight, Mapping):
        return f"({weight['start']:g} to {weight['end']:g}, {weight['schedule']} in {weight['steps']} steps)"
    return f"{weight:g}"


def _model_config(name: str | None, config: OPRDConfig) -> tuple[int, int] | None:
    """Depth and width of a model, None where its config cannot be reached."""
    if name is None:
        return None
    try:
        found = AutoConfig.from_pretrained(resolve_name(name), trust_remote_code=config.trust_remote_code)
    except OSError:
        return None
    text = found.get_text_config()
    return text.num_hidden_layers, text.hidden_size


def _model_line(role: str, name: str | None, shape: tuple[int, int] | None) -> str:
    if name is None:
        return f"{role}: the student without its adapter"
    return f"{role}: {name}: " + (
        f"{shape[0]} layers of width {shape[1]}" if shape else "not reachable from here, not checked"
    )


def _bridge_line(
    folder: str, recipe: Recipe, config: OPRDConfig, student: tuple[int, int] | None, teacher: tuple[int, int] | None
) -> str:
    if recipe.teacher_model is None:
        raise ValueError("bridge: it is for a teacher_model of another shape, and there is no teacher_model")
    if not Path(folder).exists() and (student is None or teacher is None):  # nor could it be fitted here
        return (
            f"bridge: {folder} IS NOT THERE YET, and training will stop without it; fit it first: oprd bridge fit --student "
            f"{recipe.model} --teacher {recipe.teacher_model} --prompts {recipe.train_dataset} --out {folder}"
        )
    layers = None if student is None else resolve_layers(config.layers, student[0])
    bridge = Bridge.load(folder, rank=config.bridge_rank)
    for side, known, shape in (("student", bridge.student, student), ("teacher", bridge.teacher, teacher)):
        if shape is not None and shape != (known.layers, known.width):
            raise ValueError(
                f"bridge: it was fitted for the {side} {known.name} of {known.layers} layers of width {known.width}, this {side} "
                f"has {shape[0]} of {shape[1]}; fit a bridge for this one: oprd bridge fit"
            )
    if layers is not None:
        bridge = bridge.for_layers(layers)
    return f"bridge: {folder}: rank {bridge.rank} of {bridge.max_rank}, verdict: {bridge.verdict[0]}; model weights not checked"


def _tokenizer_line(recipe: Recipe, config: OPRDConfig) -> str:
    if recipe.teacher_model is None:
        return "tokenizers: one"
    try:
        names = [resolve_name(name) for name in (recipe.model, recipe.teacher_model)]
    except ValueError:
        return "tokenizers: not reachable from here, not checked"
    if not all(Path(name).is_dir() for name in names):
        return "tokenizers: on the hub, not checked"
    student, teacher = (load_tokenizer(name, trust_remote_code=config.trust_remote_code) for name in names)
    # What ends a turn does not matter here; without their models only the tokenizers' own ends are known.
    ends = ([end] if (end := side.eos_token_id) is not None else [0] for side in (student, teacher))
    aligner = TeacherText.of(config).aligner(student, teacher, *ends)
    if aligner is None:
        return "tokenizers: the teacher gives the student's ids the same tokens"
    check_one_text(aligner, compares_states=is_on(config.representation_weight) and config.bridge is None)
    shared = len(aligner.shared_vocabulary()[0])
    return (
        f"tokenizers: the teacher reads its own prompts and tokens; {shared} of the student's {len(student)} are among its "
        f"{len(teacher)}"
    )


def _dataset_line(role: str, name: str | None, split: str, limit: int | None, seed: int) -> str:
    if name is None:
        return f"{role} dataset: none"
    is_file = name.startswith(GENERATED) or name.endswith((".parquet", ".jsonl", ".json"))
    if not is_file:
        return f"{role} dataset: {name} (hub, not checked)"
    rows: list[Any] = load_rows(name, split, limit, seed)
    return f"{role} dataset: {name}: {len(rows)} rows, {sum(r.answer is not None for r in rows)} with an answer"
