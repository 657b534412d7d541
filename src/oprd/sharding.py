"""Models whose weights are spread over the processes (FSDP2), and what those processes then have to do together.

A sharded model's forward and backward are collective acts: every block gathers its weights from all ranks. So all ranks run the
same number of them, and a rank with less to do repeats something whose result it throws away. Weights are whole only inside the
model's own `forward`, which is why states are read through it (`oprd.capture.read_through_forward`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from oprd.models import blocks

_OLDEST_TORCH = (2, 13)


def shard_model(model: nn.Module, device: torch.device | str = "cpu", **settings: Any) -> None:
    """Shard a causal LM over all processes, in place, by torch's `fully_shard`: block by block, then what is left.

    Every process calls it with the same weights. Blocks go to `device` one at a time, so it never holds the whole model. Freeze
    and install what you need first; make the optimizer afterwards, since it needs the new parameters.

    Args:
        model: a causal LM of transformers itself: no wrapper, no adapter.
        device: where this process computes.
        settings: further arguments of `fully_shard`, such as `mp_policy`.

    Raises:
        ValueError: another model, one that is sharded already, no process group, or a torch that a trained model would crash with.

    Example:
        >>> shard_model(student); shard_model(teacher)
        >>> install_state_forward(student); install_state_forward(teacher)
        >>> losses = read_through_forward(student, request, read)
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"fully_shard: {type(model).__name__} is not a plain model of transformers; adapters (peft_config) are not supported "
            "with it, use DDP for them"
        )
    if is_sharded(model):
        raise ValueError("fully_shard: the model is sharded already; leave the setting off for it")
    if any(p.requires_grad for p in model.parameters()) and _torch_version() < _OLDEST_TORCH:
        raise ValueError(
            f"fully_shard: torch {torch.__version__} is too old; with 2.11 the backward pass crashed, and 2.13 is what it was "
            "tested with"
        )
    if not dist.is_initialized():
        raise ValueError(
            "fully_shard: there is one process; start several with `accelerate launch`, or set it to false"
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    # The root too gives its weights back after its forward (torch's default keeps them): between two passes all parameters are
    # then the sharded ones, whoever asks for them: an optimizer, a checkpoint.
    settings = {"mesh": mesh, "reshard_after_forward": True, **settings}
    for block in blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def shard_pair(student: nn.Module | None, teacher: nn.Module | None, device: torch.device) -> None:
    """Shard those models of a run that are given; a model that came sharded stays as it is.

    Raises:
        ValueError: as `shard_model`.
    """
    for model in (student, teacher):
        if model is not None and not is_sharded(model):
            shard_model(model, device)


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


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's forward is a collective act: its weights are sharded by FSDP or DeepSpeed ZeRO-3."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO-3's mark


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


def most_of_ranks(count: int, device: torch.device | str) -> int:
    """The highest `count` that any process has. All processes must ask."""
    if not dist.is_initialized():
        return count
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


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


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered from all processes (all must ask), without gradient; anything else as it is.

    Raises:
        ValueError: a gradient could be wanted, which would not reach the other processes' parts.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "a sharded weight was asked for outside its model's forward, where its gradient would be lost: read states and compute "
            "the loss by read_through_forward, or wrap this in torch.no_grad()"
        )
    full: Any = tensor.detach()
    return full.full_tensor()


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as `target` is where that is sharded; else the whole. No communication."""
    if not isinstance(target, DTensor):
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """A sharded model's weights and buffers, gathered one by one into host memory under the names of its `state_dict`.

    Args:
        model: the model; all processes must ask.
        keep: whether this process wants them; else it takes part and gets an empty dict.
    """
    gathered: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        full = whole(value)
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


@torch.no_grad()
def load_whole_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into a sharded model; each process keeps its part. Names that `weights` leaves out (tied ones) stay.

    Raises:
        ValueError: a name that the model does not have.
    """
    own = model.state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"resume_from_checkpoint: the model has no weight {', '.join(unknown[:3])}")
    for name, value in weights.items():
        own[name].copy_(sharded_like(value, own[name]))


def whole_state(state: dict[int, dict[str, Any]], *, keep: bool) -> dict[int, dict[str, Any]]:
    """The `state` of a sharded model's optimizer as one process would have it.

    Args:
        state: parameter index → name → value.
        keep: whether this process wants it; else it takes part and gets an empty dict.
    """
    gathered: dict[int, dict[str, Any]] = {}
    for index, entries in state.items():
        for name, value in entries.items():
            full = whole(value)
            if keep:
                gathered.setdefault(index, {})[name] = full.detach().cpu() if isinstance(full, Tensor) else full
    return gathered


def sharded_state(state: dict[int, dict[str, Any]], param_groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What `whole_state` gathered, each process keeping the part that belongs to its part of the parameters."""
    parameters = [parameter for group in param_groups for parameter in group["params"]]

    def laid_out(value: Any, parameter: Tensor) -> Any:
        own = isinstance(value, Tensor) and value.shape == parameter.shape  # not the count of steps
        return sharded_like(value, parameter) if own else value

    return {
        index: {name: laid_out(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state.items()
    }
