"""Models with weights sharded over the processes (FSDP2): sharding, and gathering or loading full weights and optimizer state.

Forward and backward of a sharded model are collective: every block gathers its weights from all ranks. All ranks must therefore
run the same number of passes; a rank with less work repeats one and discards the result. Full weights exist only inside the
model's own `forward`, so states must be read through it (`oprd.states.capture.read_through_forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from oprd.models.architecture import blocks

_OLDEST_TORCH = (2, 13)


def shard_model(model: nn.Module, device: torch.device | str = "cpu", **settings: Any) -> None:
    """Shard a causal LM over all processes, in place, with torch's `fully_shard`: first each block, then the rest.

    Every process calls it with the same weights. Blocks move to `device` one at a time, so the device does not hold the full
    model. Freeze parameters and install forwards before; create the optimizer afterwards, because sharding replaces parameters.

    Args:
        model: a plain transformers causal LM, without wrapper or adapter.
        device: this process's device.
        settings: further arguments of `fully_shard`, such as `mp_policy`.

    Raises:
        ValueError: the model is not plain or already sharded, there is no process group, or torch is too old to train it.

    Example:
        >>> install_state_forward(student); install_state_forward(teacher)
        >>> shard_model(student); shard_model(teacher)
        >>> losses = read_through_forward(student, request, read)
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"fully_shard: {type(model).__name__} is not a plain model of transformers; adapters (peft_config) are not supported "
            "with it, use DDP for them"
        )
    if is_sharded(model):
        raise ValueError("fully_shard: the model is already sharded; leave this setting off")
    if any(p.requires_grad for p in model.parameters()) and _torch_version() < _OLDEST_TORCH:
        raise ValueError(
            f"fully_shard: torch {torch.__version__} is too old; the backward pass crashes with 2.11, and 2.13 is the oldest "
            "tested version"
        )
    if not dist.is_initialized():
        raise ValueError(
            "fully_shard: there is one process; start several with `accelerate launch`, or set fully_shard to false"
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    # Reshard the root after its forward as well (torch's default keeps it gathered), so that optimizer and checkpoint always
    # see sharded parameters between two passes.
    settings = {"mesh": mesh, "reshard_after_forward": True, **settings}
    for block in blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def shard_models(models: Sequence[nn.Module], device: torch.device | str) -> None:
    """Shard each model over all processes; one that is sharded already stays as it is.

    Raises:
        ValueError: as `shard_model`.
    """
    for model in models:
        if not is_sharded(model):
            shard_model(model, device)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP or DeepSpeed ZeRO-3 shards the model's weights, which makes its forward collective."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # attribute set by ZeRO-3


def max_over_ranks(count: int, device: torch.device | str) -> int:
    """The maximum of `count` over all processes. A collective call."""
    if not dist.is_initialized():
        return count
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def whole(tensor: Any) -> Any:
    """Gather a sharded tensor from all processes, without gradient (a collective call). Other values are returned unchanged.

    Raises:
        ValueError: gradients are enabled for the tensor; they would not reach the other processes' shards.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "a sharded weight was read outside its model's forward, where its gradient would be lost: read states and compute "
            "the loss through read_through_forward, or use torch.no_grad()"
        )
    full: Any = tensor.detach()
    return full.full_tensor()


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """This process's shard of a full tensor, in the layout of `target`; the full tensor if `target` is not sharded.

    Needs no communication.
    """
    if not isinstance(target, DTensor):
        return value
    local = value.to(target.device)
    return distribute_tensor(local, target.device_mesh, target.placements, src_data_rank=None)


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Gather a sharded model's weights and buffers one by one into host memory, under their `state_dict` names.

    A collective call.

    Args:
        model: the sharded model.
        keep: whether this process keeps the result; if False, it takes part and returns an empty dict.
    """
    gathered: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        full = whole(value)
        if keep:
            gathered[name] = full.detach().cpu()
    return gathered


@torch.no_grad()
def load_whole_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy full weights into a sharded model; each process keeps its shard. Weights missing from `weights` (tied ones) stay.

    Raises:
        ValueError: the model does not have a weight of this name.
    """
    own = model.state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"resume_from_checkpoint: the model has no weight {', '.join(unknown[:3])}")
    for name, value in weights.items():
        own[name].copy_(sharded_like(value, own[name]))


def whole_state(state: dict[int, dict[str, Any]], *, keep: bool) -> dict[int, dict[str, Any]]:
    """Gather the `state` of a sharded model's optimizer into unsharded form. A collective call.

    Args:
        state: parameter index → name → value.
        keep: whether this process keeps the result; if False, it takes part and returns an empty dict.
    """
    gathered: dict[int, dict[str, Any]] = {}
    for index, entries in state.items():
        for name, value in entries.items():
            full = whole(value)
            if keep:
                gathered.setdefault(index, {})[name] = full.detach().cpu() if isinstance(full, Tensor) else full
    return gathered


def sharded_state(state: dict[int, dict[str, Any]], param_groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The inverse of `whole_state`: this process's shard of an unsharded optimizer state."""
    parameters = [parameter for group in param_groups for parameter in group["params"]]

    def laid_out(value: Any, parameter: Tensor) -> Any:
        own = isinstance(value, Tensor) and value.shape == parameter.shape  # false for the step count
        return sharded_like(value, parameter) if own else value

    return {
        index: {name: laid_out(value, parameters[index]) for name, value in entries.items()}
        for index, entries in state.items()
    }
