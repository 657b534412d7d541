"""What the training processes do together: launch checks, even rounds of micro-batches, gradient exchange."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate.utils import DistributedType
from torch import nn

from oprd.models.sharding import is_sharded, most_of_ranks


def check_launch(fully_sharded: bool, accelerator: Any) -> None:
    """Refuse the ways of launching with accelerate's own FSDP that would go wrong, some of them silently.

    Args:
        fully_sharded: whether the setting `fully_shard` is on.
        accelerator: the trainer's.

    Raises:
        ValueError: says what to change.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if not asked:
        return
    if fully_sharded:
        raise ValueError("fully_shard: accelerate's FSDP is on too; use one of them (docs/scale.md)")
    if plugin is None or accelerator.device.type == "cpu":
        raise ValueError(
            "accelerate's FSDP does not shard on a CPU, and says nothing; launch without it and set fully_shard: true"
        )
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: {plugin.fsdp_version} is not supported; set it to 2 in accelerate's config")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type: {plugin.state_dict_type} saves no model; set FULL_STATE_DICT in accelerate's config"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: set it to false in accelerate's config; it would leave the teacher of all ranks but "
            "the first without weights"
        )


def leave_sharding_alone(trainer: Any) -> None:
    """Keep transformers' Trainer from wrapping a student that is sharded already, by its own name for such models.

    Raises:
        ValueError: it is too old to know one.
    """
    if not hasattr(trainer, "is_distributed_loading_by_transformers"):
        raise ValueError("fully_shard: needs transformers 5.23 or newer")
    trainer.is_distributed_loading_by_transformers = True


@contextmanager
def _inner_backward(accelerator: Any) -> Iterator[None]:
    """DeepSpeed under accelerate takes its step in every backward pass that is not said to be an inner one."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


def even_rounds(groups: list[list[int]], models: Sequence[nn.Module], accelerator: Any) -> list[list[int]]:
    """The micro-batches of this rank; where it has fewer than another, filled up with a rollout that is to count for nothing.

    A sharded model takes every rank for each of its passes, and DeepSpeed for each of its backward passes. Others need no company.

    Args:
        groups: indices of each micro-batch's rollouts.
        models: those that run once for each of them.
        accelerator: the trainer's.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not (deepspeed or any(is_sharded(model) for model in models)):
        return groups
    missing = most_of_ranks(len(groups), accelerator.device) - len(groups)
    return [*groups, *[groups[-1][:1]] * missing]


def local_gradients(model: nn.Module, accelerator: Any, *, last: bool) -> AbstractContextManager[None]:
    """Let ranks exchange gradients once a step, in the last micro-batch's backward; if sharded in each, to keep only shards."""
    if last:
        return nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _inner_backward(accelerator)
    return nullcontext() if is_sharded(model) else accelerator.no_sync(model)
