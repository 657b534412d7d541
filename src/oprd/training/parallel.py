"""What the training processes do together: placing models, even rounds of micro-batches, exchanging gradients, totals of a step.

One process exchanges nothing. Most of what differs between DDP, FSDP2 (`fully_shard`, or accelerate's) and DeepSpeed is here.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend, gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.nn.parallel import DistributedDataParallel

from oprd.alignment.position_pairs import input_lengths
from oprd.config import OPRDConfig
from oprd.models.lm_head import embedding_gradient_by_rows
from oprd.models.memory import ran_out_of_memory
from oprd.models.sharding import is_sharded, max_over_ranks, shard_models
from oprd.objectives.batch import Batch
from oprd.objectives.composite import StepTotals
from oprd.states.requests import plan_micro_batches
from oprd.states.teacher_settings import check_sharded, refuse_following_when_sharded
from oprd.training.processes import check_joined

logger = logging.getLogger("oprd")


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch that goes through both models at once.

    Args:
        batch: its rollouts.
        indices: their places in the whole batch.
        number: which micro-batch it is, from 0.
        last: gradients are exchanged in its backward pass.
        idle: a filler. It runs because another rank has one more micro-batch; its loss is multiplied by 0.
    """

    batch: Batch
    indices: Sequence[int]
    number: int
    last: bool
    idle: bool


class Parallel:
    """The training processes of a run, or the only one.

    Args:
        accelerator: the trainer's.
        args: the run's settings.
        student: the model in training, before accelerate wraps it.
        teacher_modules: the teacher's models in this process. They move to the device; accelerate's FSDP has them sharded.

    Raises:
        ValueError: a way of launching that does not train as it should.
    """

    def __init__(
        self,
        accelerator: Any,
        args: OPRDConfig,
        student: nn.Module,
        teacher_modules: Sequence[nn.Module] = (),
    ) -> None:
        self.accelerator, self.args = accelerator, args
        self.student, self.teacher_modules = student, tuple(teacher_modules)
        check_launch(args.fully_shard, accelerator)
        check_launcher_config(args.bf16, accelerator)
        check_joined(accelerator)
        check_shards(args, accelerator)
        self.deepspeed = getattr(accelerator.state, "deepspeed_plugin", None) is not None
        self.fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
        if self.fsdp:  # accelerate shards the student when training begins, and never the teacher
            shard_models(self.teacher_modules, args.device)
        for model in self.teacher_modules:  # also where Trainer leaves the student's place to DeepSpeed
            model.to(accelerator.device)
        if args.overlap_rollouts and (self.fsdp or self.deepspeed):
            raise ValueError(
                "overlap_rollouts: not with a sharded student, of which no process has a copy; set it to false"
            )

    @property
    def sharded(self) -> bool:
        """Whether torch's `fully_shard` shards the student, so that saving gathers its weights.

        Under accelerate's FSDP this becomes true when training begins.
        """
        return isinstance(self.student, FSDPModule)

    @property
    def in_place(self) -> bool:
        """Whether gradients may be added to a weight directly: with one unsharded process, where no gradient hook runs."""
        return self.args.world_size == 1 and not (self.sharded or self.fsdp or self.deepspeed)

    @property
    def sees_whole_gradients(self) -> bool:
        """Whether every process holds all gradients, as plain tensors."""
        return not (self.sharded or self.fsdp or self.deepspeed)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model inside accelerate's wrappers."""
        return self.accelerator.unwrap_model(model)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the student is trained in."""
        return self.accelerator.autocast()

    def sampling_precision(self) -> AbstractContextManager[Any]:
        """`autocast` around a whole sampling, where every pass uses the weights that the first one cast.

        Of a sharded student, whose gathered weights would be kept, each pass casts them again.
        """
        if self.sharded and self.args.bf16:
            return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=False)
        return self.autocast()

    @contextmanager
    def student_on_device(self) -> Iterator[None]:
        """Hold the student on the device where Trainer leaves it on the CPU until training begins: accelerate's FSDP, DeepSpeed.

        It stays on the CPU, with a warning, where a device cannot hold all of it.
        """
        device, before = self.accelerator.device, next(self.student.parameters()).device
        if before.type == device.type or self.sharded:
            yield
            return
        try:
            self.student.to(device)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            self.student.to(before)
            clear_device_cache()
            logger.warning(
                "one device cannot hold the whole student, so it is evaluated on the CPU before training, which is slow; "
                "eval_before: false leaves the evaluation out"
            )
        try:
            yield
        finally:
            self.student.to(before)

    def step_totals(self, counts: Sequence[int], share: float) -> StepTotals:
        """Counts over the whole step, the mean over ranks.

        Args:
            counts: rollouts, positions, tokens and compared positions of this rank's batch.
            share: the batch's fraction of this rank's part of the step.
        """
        totals = torch.tensor(counts, dtype=torch.float64, device=self.args.device) / share
        if self.args.world_size > 1:  # DDP averages gradients over ranks, so the mean count gives a mean over all
            totals = self.accelerator.reduce(totals, "mean")
        return StepTotals(*totals.clamp_min(1e-9).tolist())  # avoid dividing by zero when no position is selected

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum over all processes, in host memory."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()

    def names_of_ranks(self, names: list[str]) -> list[str]:
        """The names that any process has, in one order on all: a sum over processes needs as many numbers of each.

        Args:
            names: of this process, sorted.
        """
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return names
        digest = zlib.crc32("\n".join(names).encode())
        parts = torch.tensor([digest >> 16, digest & 0xFFFF, len(names)], dtype=torch.float64)  # squares stay exact
        totals, squares = self.sum_over_ranks(torch.stack([parts, parts**2]))
        return names if torch.equal(ranks * squares, totals**2) else sorted({*gather_object(names)})

    def micro_batches(self, batch: Batch, token_budget: int, model: nn.Module) -> list[MicroBatch]:
        """The batch cut into micro-batches by token budget. Where a model is sharded, every rank gets the same number of them.

        Args:
            batch: this rank's rollouts.
            token_budget: most padded tokens of a micro-batch.
            model: the student as accelerate wrapped it.
        """
        teacher_ids, groups = plan_for_teachers(batch, token_budget)
        rounds = even_rounds(groups, (model, *self.teacher_modules), self.accelerator)
        last = len(rounds) - 1
        return [
            MicroBatch(
                batch.select(group, teacher_ids[min(number, len(groups) - 1)]), group, number, number == last,
                number >= len(groups),
            )
            for number, group in enumerate(rounds)
        ]  # fmt: skip

    @contextmanager
    def accumulate(self, model: nn.Module, part: MicroBatch) -> Iterator[None]:
        """Let this micro-batch's backward add to the gradients, and exchange them between ranks in the last one."""
        with ExitStack() as stack:
            stack.enter_context(local_gradients(model, self.accelerator, last=part.last))
            if self.in_place:
                stack.enter_context(embedding_gradient_by_rows(self.student))
            try:
                yield
            except Exception:
                if isinstance(model, DistributedDataParallel):
                    # DDP's forward began with the exchange of buffers, once a step; another rank would not join a second one.
                    model.require_forward_param_sync = False
                raise

    def may_run_again(self, part: MicroBatch) -> bool:
        """Whether this process alone may run a micro-batch again whose pass failed: no other process took part in it."""
        if self.sharded or self.fsdp or self.deepspeed:
            return False
        return self.args.world_size == 1 or not part.last

    def backward(self, loss: Tensor, part: MicroBatch) -> None:
        """Add the gradients of a micro-batch's loss; an idle one adds zeros."""
        # DeepSpeed would divide by the number of accumulated batches; the loss is a share of the step already.
        settings = {"scale_wrt_gas": False} if self.deepspeed else {}
        self.accelerator.backward(loss * 0.0 if part.idle else loss, **settings)


def plan_for_teachers(batch: Batch, token_budget: int) -> tuple[list[str | None], list[list[int]]]:
    """The micro-batches of a batch, each read by one teacher: its teacher_id (None where there is one teacher) and its rollouts.

    Args:
        batch: rollouts.
        token_budget: most padded tokens of a micro-batch.
    """
    found: list[tuple[str | None, list[int]]] = []
    for teacher_id, reading in batch.readings.items():
        lengths = input_lengths(batch.rollouts.select(reading.places), reading.pairs)
        planned = plan_micro_batches(lengths, token_budget)
        found += [(teacher_id, [reading.places[i] for i in group]) for group in planned]
    return [teacher_id for teacher_id, _ in found], [group for _, group in found]


def check_launch(fully_sharded: bool, accelerator: Any) -> None:
    """Refuse the ways of launching with accelerate's own FSDP that go wrong, some of them silently.

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
            "accelerate's FSDP silently does not shard on a CPU; launch without it and set fully_shard: true"
        )
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: {plugin.fsdp_version} is not supported; set it to 2 in accelerate's config")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type: {plugin.state_dict_type} saves no model; set FULL_STATE_DICT in accelerate's config"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "fsdp_offload_params: set it to false in accelerate's config; sampling needs the weights on the device"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: set it to false in accelerate's config; it would leave the teacher of all ranks but "
            "the first without weights"
        )


def check_launcher_config(bf16: bool, accelerator: Any) -> None:
    """Refuse a precision, or compilation, that only the launcher's config asks for: oprd reads its own settings.

    Args:
        bf16: the setting.
        accelerator: the trainer's.

    Raises:
        ValueError: says what to change.
    """
    compiles = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", DynamoBackend.NO)
    if compiles != DynamoBackend.NO:
        raise ValueError(
            f"dynamo_backend: set it to 'no' in accelerate's config (it is {compiles.value}); see torch_compile"
        )
    asked, ours = accelerator.mixed_precision, "bf16" if bf16 else "no"
    if asked != ours:
        raise ValueError(
            f"bf16: it is {str(bf16).lower()}, and accelerate's mixed_precision is {asked!r}; set mixed_precision to {ours!r} in "
            "accelerate's config" + ("" if bf16 or asked != "bf16" else ", or bf16: true")
        )


def check_shards(args: OPRDConfig, accelerator: Any) -> None:
    """Refuse settings that need whole weights where accelerate's FSDP, or DeepSpeed ZeRO-3, splits them.

    The settings `fully_shard` and `deepspeed` are refused before a model is loaded; the launcher's choice is known only here.

    Args:
        args: the run's settings.
        accelerator: the trainer's.

    Raises:
        ValueError: names the key and its value.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        by = "accelerate's FSDP"
        check_sharded(args, by)
        if args.student_quantization is not None:
            raise ValueError(
                f"student_quantization: {args.student_quantization} is not supported with {by}, which splits weights; use DDP"
            )
    elif deepspeed is not None and deepspeed.zero_stage == 3:
        refuse_following_when_sharded(args, "DeepSpeed ZeRO-3")
        if args.rollout_engine.startswith("vllm"):
            raise ValueError(
                f"rollout_engine: {args.rollout_engine} is not supported with DeepSpeed ZeRO-3, which splits the "
                "weights that it is sent; use ZeRO-2, or fully_shard: true"
            )
    if deepspeed is not None and args.nan_policy == "skip":
        raise ValueError(
            "nan_policy: skip is not supported with DeepSpeed, which takes the step within the backward pass; set it to stop"
        )


@contextmanager
def _inner_backward(accelerator: Any) -> Iterator[None]:
    """Under accelerate, DeepSpeed updates the weights in every backward pass that is not marked as an inner one."""
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


def even_rounds(groups: list[list[int]], models: Sequence[nn.Module], accelerator: Any) -> list[list[int]]:
    """This rank's micro-batches, padded with idle ones of one rollout to the largest number on any rank.

    A sharded model needs all ranks in each of its passes, DeepSpeed in each backward pass.

    Args:
        groups: indices of each micro-batch's rollouts.
        models: those that run once for each micro-batch.
        accelerator: the trainer's.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if not (deepspeed or any(is_sharded(model) for model in models)):
        return groups
    missing = max_over_ranks(len(groups), accelerator.device) - len(groups)
    return [*groups, *[groups[-1][:1]] * missing]


def local_gradients(model: nn.Module, accelerator: Any, *, last: bool) -> AbstractContextManager[None]:
    """Exchange gradients between ranks in the last micro-batch's backward only; a sharded model does so in each, to keep shards."""
    if last:
        return nullcontext()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _inner_backward(accelerator)
    return nullcontext() if is_sharded(model) else accelerator.no_sync(model)
