"""Suggest settings that lower the peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from oprd.resolve.checks import check_probed_rate, check_settings
from oprd.resolve.terms import build_terms
from oprd.run_config import RunConfig
from oprd.tools.doctor.memory import predict_memory, teachers_wait
from oprd.tools.doctor.workload import Lora, Workload


@dataclass(frozen=True)
class Advice:
    """A change of one setting.

    Args:
        setting: the setting as written in a recipe or on the command line.
        peak: peak memory with this setting, in bytes.
    """

    setting: str
    peak: float


def allowed_in(config: str | Path, overrides: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a run accepts a setting: what is advised must not be refused. All are accepted where the recipe itself is refused.

    Args:
        config: the recipe.
        overrides: keys that replace those of the recipe.
    """

    def accepted(settings: Mapping[str, Any]) -> bool:
        try:
            run = RunConfig.load_on_cpu(config, {**overrides, **settings})
            check_settings(run, build_terms(run))
            check_probed_rate(run)
        except ValueError:
            return False
        return True

    as_it_is = accepted({})
    return lambda setting: not as_it_is or accepted(yaml.safe_load(setting))


def advise(
    work: Workload, least: float = 0.02, *, allowed: Callable[[str], bool] = lambda setting: True
) -> list[Advice]:
    """Changes that lower the peak by at least the share `least`, most helpful first. Only LoRA changes what is trained.

    Args:
        work: the workload.
        least: share of the peak.
        allowed: whether the run accepts a setting, `key: value`.
    """
    changes: dict[str, Workload] = {}
    if work.rows > 1:
        tokens = max(work.length, work.rows * work.length // 2)
        changes[f"micro_batch_tokens: {tokens}"] = replace(work, micro_batch_tokens=tokens)
    if not work.checkpointing:
        changes["activation_checkpointing: true"] = replace(work, checkpointing=True)
    if min(work.generation_batch, work.rollouts) > 1:
        half = min(work.generation_batch, work.rollouts) // 2
        changes[f"generation_batch_size: {half}"] = replace(work, generation_batch=half)
    if work.lora is None and work.sharding != "fsdp":
        changes["lora: {r: 8, target_modules: [q_proj, v_proj]}"] = replace(work, lora=Lora())
    if work.teacher is not None and not work.several and work.teacher_bytes > 2:
        changes["teacher_model_init_kwargs: {dtype: bfloat16}"] = replace(work, teacher_bytes=2)
    if len(work.several) > 1 and not teachers_wait(work)[0] and work.sharding != "fsdp":
        changes["offload_teachers: true"] = replace(work, offload=True)
    if work.devices > 1 and work.sharding == "ddp" and work.lora is None:
        changes["fully_shard: true"] = replace(work, sharding="fsdp")
    if not work.bf16 and work.accelerator:
        changes["bf16: true"] = replace(work, bf16=True)
    now = predict_memory(work).peak
    found = [Advice(setting, predict_memory(changed).peak) for setting, changed in changes.items()]
    helpful = [a for a in found if a.peak <= (1 - least) * now and allowed(a.setting)]
    return sorted(helpful, key=lambda a: a.peak)
