"""What settings alone forbid, before any model is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from oprd.config import AUTO
from oprd.models.adapters import find_adapter
from oprd.models.loading import resolve_name
from oprd.objectives.composite import Term
from oprd.objectives.schedules import bounds
from oprd.objectives.terms import HeadTerm, LayerTerm, is_supervised
from oprd.resolve.attention import check_attention_settings
from oprd.resolve.no_effect import check_effects
from oprd.resolve.terms import have_kind
from oprd.run_config import RunConfig
from oprd.runs.reporting import check_trackers
from oprd.states.cache.folder import read_index
from oprd.states.layer_maps import KEPT
from oprd.states.sources import TeacherSource, teacher_source
from oprd.states.teacher_settings import check_teachers, is_student
from oprd.states.teachers import CanSample, HasHead


def check_settings(run: RunConfig, terms: Mapping[str, Term]) -> TeacherSource | None:
    """Refuse settings that do not go together, before any model is read. Returns where the teacher is, if it is not a model's name.

    Raises:
        ValueError: names the key, the value, and what to set.
    """
    check_trackers(run.args.report_to)
    _check_one_adapter(run)
    check_teachers(run)
    check_attention_settings(run, terms)
    check_effects(run, terms)
    _check_extrapolation(run, terms)
    _check_layer_map(run)
    _check_quantized(run)
    return _source(run)


def _check_one_adapter(run: RunConfig) -> None:
    """Refuse settings for an adapter where the student is one already: what is saved would not load on its base model.

    Raises:
        ValueError: says what to leave out.
    """
    if run.lora is None and run.given.peft_config is None:
        return
    key = "lora" if run.lora is not None else "peft_config"
    if _is_adapter(run):
        name = f"{run.model!r}" if isinstance(run.model, str) else "the given model"
        raise ValueError(
            f"{key}: {name} is an adapter already, and adapters are not stacked: leave {key} out to continue its training, or "
            "merge it into its base model first (merge_and_unload) and name the merged model"
        )


def _is_adapter(run: RunConfig) -> bool:
    """Whether the student is an adapter that was trained before."""
    if isinstance(run.model, str):
        return find_adapter(resolve_name(run.model), run.args.model_init_kwargs) is not None
    return isinstance(run.model, nn.Module) and hasattr(run.model, "peft_config")


def _check_extrapolation(run: RunConfig, terms: Mapping[str, Term]) -> None:
    """Refuse an extrapolation past the teacher that has no effect, or for which no base is known.

    Raises:
        ValueError: says what to set.
    """
    strength, base = run.args.extrapolation, run.base_model
    if strength == 1:
        if base is not None:
            raise ValueError(
                "base_model: it has no effect with extrapolation: 1; set extrapolation, such as 1.25, or leave base_model out"
            )
        return
    if not have_kind(terms, LayerTerm):
        raise ValueError(
            f"extrapolation: {strength} moves the target of losses on hidden states, and this run has none; set "
            "representation_weight, or extrapolation: 1"
        )
    if run.teachers is not None:
        raise ValueError(
            f"extrapolation: {strength} is for one teacher_model; leave teachers out, or set extrapolation: 1"
        )
    named = run.teacher_model.get("model") if isinstance(run.teacher_model, Mapping) else run.teacher_model
    if base is not None and (base is named or (isinstance(base, str) and base == named)):
        raise ValueError("base_model: it is the teacher itself; name the model that the teacher was trained from")
    if base is not None:
        return
    why = None
    if run.teacher_model is None:
        why = "the teacher is the student without its adapter, which is the student's start too"
    elif is_student(run.teacher_model):
        why = "the teacher has the student's own weights"
    elif run.args.student_quantization is not None:
        why = "the student computes with rounded weights from its start on"
    elif run.args.bridge is not None:
        why = "through a bridge the student is not what the teacher was trained from"
    elif _is_adapter(run):
        why = "the student is an adapter that was trained before, and without it the student is not as at its start"
    if why is not None:
        raise ValueError(f"extrapolation: {why}; name the model that the teacher was trained from: base_model")


def _check_quantized(run: RunConfig) -> None:
    """Refuse quantised weights without an adapter, and two quantisations of one student.

    Raises:
        ValueError: says what to set.
    """
    kwargs, kind = run.args.model_init_kwargs or {}, run.args.student_quantization
    has_lora = run.lora is not None or run.given.peft_config is not None
    if wrong := next((key for key in ("load_in_4bit", "load_in_8bit") if kwargs.get(key)), None):
        raise ValueError(
            f"model_init_kwargs: {wrong} is no argument of from_pretrained; write quantization_config: "
            f"{{quant_method: bitsandbytes, {wrong}: true}}"
        )
    quantized = kwargs.get("quantization_config")
    adapter = "an adapter on a quantised model is lora with quantization_config in model_init_kwargs"
    if kind is not None and (has_lora or quantized is not None):
        other = "lora" if has_lora else "quantization_config in model_init_kwargs"
        raise ValueError(
            f"student_quantization: {kind} trains all weights so that they round well, and does not go with {other}; leave one "
            f"of the two out ({adapter})"
        )
    full = quantized is None or _of(quantized, "dequantize")
    named = isinstance(run.model, str) and not has_lora
    if named and not full and find_adapter(resolve_name(run.model), kwargs) is None:
        raise ValueError(
            "model_init_kwargs: quantization_config loads weights that no step changes, so without lora there is nothing to train; "
            "add lora: {r: 16}, or load the full weights and set student_quantization: int8 or int4"
        )
    four_bits = _of(quantized, "quant_method") == "bitsandbytes" and _of(quantized, "load_in_4bit")
    if four_bits and run.args.device.type == "cpu":
        raise ValueError(
            "model_init_kwargs: bitsandbytes trains nothing on 4-bit weights on a CPU (once it has sampled with them it passes no "
            "gradient through); run it on a GPU, or set load_in_8bit: true"
        )


def _of(settings: Any, name: str) -> Any:
    """A setting of a mapping or of an object."""
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


def _check_layer_map(run: RunConfig) -> None:
    """Refuse a `layer_map` with several teachers, an extrapolation or a cache, and `kept` without a teacher_model.

    Raises:
        ValueError: says what to set.
    """
    if run.args.layer_map is None:
        return
    if run.teachers is not None or run.args.extrapolation != 1:
        other = "teachers" if run.teachers is not None else "extrapolation"
        raise ValueError(
            f"layer_map: {run.args.layer_map} is for one teacher_model whose own states are the target; leave {other} or "
            "layer_map out"
        )
    if isinstance(run.teacher_model, Mapping) and "cache" in run.teacher_model:
        raise ValueError(
            f"layer_map: {run.args.layer_map} is not for a cache, which holds the states of the layers that it was written for; "
            "name a model or a server as teacher_model"
        )
    if run.args.layer_map == KEPT and run.teacher_model is None:
        raise ValueError(
            "layer_map: kept needs a teacher_model, the original that the student was cut from; without one the teacher is the "
            "student itself, whose layers are the student's: leave layer_map out"
        )


def check_probed_rate(run: RunConfig) -> None:
    """Refuse to find the learning rate of a sharded student. Called by what trains, or plans to.

    Raises:
        ValueError: says what to do.
    """
    if run.args.learning_rate == AUTO and run.args.splits_weights:
        raise ValueError(
            f"learning_rate: {AUTO} does not work with a sharded student (fully_shard, FSDP, DeepSpeed), of which no process has a "
            "copy; give learning_rate a number (oprd diagnose shows the same probe)"
        )


def _source(run: RunConfig) -> TeacherSource | None:
    """Where the teacher is, if `teacher_model` is a server, a cache, or has fixed responses.

    Raises:
        ValueError: it is not allowed, or not with the other settings.
    """
    source = teacher_source(run.teacher_model)
    if source is None:
        return None
    source.check_writer(run.args.lmbda)
    if run.args.learning_rate == AUTO and source.fixed:
        raise ValueError(
            f"learning_rate: {AUTO!r} samples rollouts of its own, and responses are fixed; give a number, or find it in "
            "a run with a model or a server as teacher_model"
        )
    if source.cache is not None:
        if own := run.args.prompt_rendering.own_prompt_settings:
            raise ValueError(
                f"{own[0]}: the cache {source.cache} has the teacher's states of the prompts and tokens that the student reads; "
                f"leave {own[0]} out, or name a model or a server as teacher_model"
            )
        read_index(source.cache)
    return source


def check_teacher(run: RunConfig, terms: Mapping[str, Term], teacher: Any, source: TeacherSource | None = None) -> None:
    """Refuse a run that needs an LM head or sampling of a teacher without it.

    Args:
        run: the configuration.
        terms: of the loss.
        teacher: the teacher, or its class.
        source: where it and its responses are.

    Raises:
        ValueError: a term reads the teacher's LM head and there is none, or the teacher must write completions and cannot sample.
    """
    name = teacher.__name__ if isinstance(teacher, type) else type(teacher).__name__
    comparing = [
        term
        for term, found in terms.items()
        if isinstance(found.objective, HeadTerm) and not is_supervised(found.objective)
    ]
    if comparing and not isinstance(teacher, HasHead):
        raise ValueError(
            f"teacher_model: {name} has no LM head here, and {', '.join(comparing)} compares next-token distributions; give it a "
            "method head (oprd.states.teachers.HasHead) or leave these terms out"
        )
    if isinstance(teacher, CanSample):
        return
    if bounds(run.args.lmbda)[0] < 1 and not (source is not None and source.fixed):
        raise ValueError(
            f"lmbda: {run.args.lmbda} lets the teacher write, and {name} cannot sample here; set lmbda: 1, or give it a method "
            "sampler (oprd.states.teachers.CanSample)"
        )
    if run.eval_teacher and run.eval_dataset:
        raise ValueError(
            f"eval_teacher: {name} cannot sample here, so it cannot be evaluated; set eval_teacher: false, or give it a method "
            "sampler (oprd.states.teachers.CanSample)"
        )
