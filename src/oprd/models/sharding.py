"""Models whose weights are spread over the processes (FSDP2), and what those processes then have to do together.

A sharded model's forward and backward are collective acts: every block gathers its weights from all ranks. So all ranks run the
same number of them, and a rank with less to do repeats something whose result it throws away. Weights are whole only inside the
model's own `forward`, which is why states are read through it (`oprd.states.capture.read_through_forward`).
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


def shard_models(models: Sequence[nn.Module], device: torch.device | str) -> None:
    """Shard each model over all processes; one that is sharded already stays as it is.

    Raises:
        ValueError: as `shard_model`.
    """
    for model in models:
        if not is_sharded(model):
            shard_model(model, device)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's forward is a collective act: its weights are sharded by FSDP or DeepSpeed ZeRO-3."""
    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # ZeRO-3's mark


def most_of_ranks(count: int, device: torch.device | str) -> int:
    """The highest `count` that any process has. All processes must ask."""
    if not dist.is_initialized():
        return count
    counts = torch.tensor(count, device=device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


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
