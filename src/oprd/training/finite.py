"""Nothing that is not finite gets into the weights: loss and gradients are checked before the optimizer moves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from oprd.alignment.model_pair import ModelPair
from oprd.config import OPRDConfig
from oprd.files import write_json
from oprd.models.finite import count_not_finite, first_not_finite
from oprd.models.memory import HalvedSize
from oprd.objectives.batch import Batch
from oprd.objectives.composite import StepObjective
from oprd.states.capture import read_through_forward
from oprd.states.requests import HEAD, attention_key
from oprd.states.several import modules_of
from oprd.training.parallel import Parallel

logger = logging.getLogger("oprd")

_CAUSES = {
    "weight of the student": "an earlier update was too large: lower learning_rate or max_grad_norm",
    "weight of the teacher": "its files are damaged",
    "state of the teacher": "the teacher overflows in its dtype: load it in float32 or bfloat16 (teacher_model_init_kwargs)",
    "state of the student": "the student's weights have grown too large: lower learning_rate or max_grad_norm",
    "loss": "a term of the loss overflows or divides by zero: look at loss/* in metrics.jsonl",
    "norm of the gradients": "the gradients are finite, but so large that their norm overflows: lower the weight of the loss",
    "gradient": "an earlier update was too large (lower learning_rate), or a callback or hook has changed the gradient",
}


class FiniteGuard(TrainerCallback):
    """Checks loss and gradients of each step before the optimizer moves. It reuses the gradient norm, so the check is nearly free.

    It must be the last callback. Where another callback may have changed gradients after the norm was taken, they are read again.
    When a value is not finite, the step is taken on no rank: the run stops, or the step is skipped (`nan_policy`).
    `<output_dir>/failed_step_N/rank_R.json` then holds the batch and the name of the first bad tensor.

    Args:
        pair: student and teacher, to search for the tensor.
        args: the run's settings.
        parallel: the training processes.
        token_budget: most padded tokens of a micro-batch, for that search.
        observe: takes the metric `skipped_steps`.
        callbacks: all callbacks of the trainer.

    Attributes:
        gradient_norm: of the running step; the trainer sets it.
    """

    def __init__(
        self,
        pair: ModelPair,
        args: OPRDConfig,
        parallel: Parallel,
        *,
        token_budget: HalvedSize,
        observe: Callable[..., None],
        callbacks: Callable[[], Sequence[TrainerCallback]],
    ) -> None:
        self.pair, self.args, self.parallel, self.token_budget = pair, args, parallel, token_budget
        self._observe, self._callbacks = observe, callbacks
        self.gradient_norm: float | Tensor | None = None
        self._batches: list[tuple[Batch, StepObjective, Tensor]] = []
        self._skipped_in_a_row = 0

    def watch(self, batch: Batch, terms: StepObjective, loss: Tensor) -> None:
        """Remember a batch of the running step and what it adds to the loss, until the optimizer has moved."""
        self._batches.append((batch, terms, loss))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the step.

        Raises:
            FloatingPointError: a value is not finite and `nan_policy` is "stop", or too many steps in a row were skipped.
        """
        batches, self._batches = self._batches, []
        if not self._anything_bad(batches, model):
            self._skipped_in_a_row = 0
            return
        step = state.global_step + 1
        norm_overflows = self.gradient_norm is not None and not _finite(self.gradient_norm)
        what = self._first_bad(batches, model)
        what = what or ("norm of the gradients" if norm_overflows else "loss or gradient of another rank")
        message = self._describe(what, step)
        self._write(batches, step, what, message)
        for parameter in model.parameters():
            parameter.grad = None  # so that an optimizer neither moves a weight nor its own state
        self._skipped_in_a_row += 1
        if self.args.nan_policy == "stop":
            raise FloatingPointError(f"{message}; or go on without such steps: nan_policy: skip")
        if self._skipped_in_a_row > self.args.max_skipped_steps:
            raise FloatingPointError(f"{message}; {self._skipped_in_a_row} steps in a row (max_skipped_steps)")
        logger.warning("%s; the step is skipped", message)
        self._observe(skipped_steps=1.0)

    @contextmanager
    def explaining(self, step: int) -> Iterator[None]:
        """Where a pass fails because the student's weights are not finite, as after too large an update, say so.

        Args:
            step: that is running, counted from 1.

        Raises:
            FloatingPointError: names the first such weight.
        """
        try:
            yield
        except RuntimeError as error:
            name = first_not_finite(self.parallel.student.named_parameters())
            if name is None:
                raise
            what = f"weight of the student {name}"
            message = self._describe(what, step)
            self._write(self._batches, step, what, message)
            raise FloatingPointError(message) from error

    def _anything_bad(self, batches: list[tuple[Batch, StepObjective, Tensor]], model: nn.Module) -> bool:
        """Whether any rank has a loss or gradient that is not finite. All ranks get the same answer."""
        values = [loss for _, _, loss in batches]
        norm = self.gradient_norm
        bad = not all(map(_finite, values if norm is None else [*values, norm]))
        if not bad and self._gradients_may_have_changed():
            bad = first_not_finite(_gradients(model)) is not None
        return bool(self.parallel.sum_over_ranks(torch.tensor([float(bad)]))[0])

    def _gradients_may_have_changed(self) -> bool:
        theirs = (other.__class__.on_pre_optimizer_step for other in self._callbacks() if other is not self)
        return any(method is not TrainerCallback.on_pre_optimizer_step for method in theirs)

    def _first_bad(self, batches: list[tuple[Batch, StepObjective, Tensor]], model: nn.Module) -> str | None:
        """Name of the first tensor that is not finite, in the order in which a step computes them."""
        student = self.parallel.unwrap(model)
        weight = self._bad_weight(student)
        if self.parallel.sum_over_ranks(torch.tensor([float(weight is not None)]))[0]:
            return weight or "weight of the student on another rank"
        # A sharded model needs all ranks in each pass, so each rank reads all of its batches.
        states = [self._first_bad_state(batch, terms, model) for batch, terms, _ in batches]
        if found := next((state for state in states if state), None):
            return found
        if not all(_finite(loss) for _, _, loss in batches):
            return "loss"
        name = first_not_finite(_gradients(student))
        return None if name is None else f"gradient of {name}"

    def _bad_weight(self, student: nn.Module) -> str | None:
        """The first weight of this rank that is not finite."""
        if name := first_not_finite(student.named_parameters()):
            return f"weight of the student {name}"
        for module in modules_of(self.pair.teacher):
            if name := first_not_finite(module.named_parameters()):
                return f"weight of the teacher {name}"
        return None

    @torch.no_grad()
    def _first_bad_state(self, batch: Batch, terms: StepObjective, model: nn.Module) -> str | None:
        """Run both models once more and look at the states that the loss reads."""
        student, found = self.parallel.unwrap(model), None
        for part in self.parallel.micro_batches(batch, self.token_budget.value, model):
            request, theirs = self.pair.requests(
                part.batch.rollouts, part.batch.pairs,
                layers=terms.needs_layers, head=terms.needs_head, device=self.args.device,
                teacher_id=part.batch.teacher_id,
            )  # fmt: skip
            if terms.needs_teacher:
                states = self.pair.teacher.states(theirs)
                for layer, values in zip((*states.layers, HEAD), (*states.values, states.head_MD), strict=True):
                    if values is not None and count_not_finite(values):
                        found = found or f"state of the teacher at {_layer_name(layer)}"
            with self.parallel.autocast():
                bad = read_through_forward(
                    student, request, lambda layer, values: layer if count_not_finite(values) else None
                )
            found = found or next((f"state of the student at {_layer_name(i)}" for i in bad if i is not None), None)
        return found

    def _describe(self, what: str, step: int) -> str:
        cause = next((cause for kind, cause in _CAUSES.items() if what.startswith(kind)), "look at that rank's message")
        return (
            f"step {step}, rank {self.args.process_index}: the {what} is not finite (NaN or infinity), "
            f"{'and DeepSpeed has taken the step; ' if self.parallel.deepspeed else 'so the step was not taken and '}"
            f"nothing was saved. Usual cause: {cause}. The batch is in {self._folder(step)}"
        )

    def _folder(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"failed_step_{step}"

    def _write(self, batches: list[tuple[Batch, StepObjective, Tensor]], step: int, what: str, message: str) -> None:
        """Write the step's batches of this rank, with token ids, dataset rows and seed."""
        rollouts = [batch.rollouts for batch, _, _ in batches]
        norm = None if self.gradient_norm is None else float(self.gradient_norm)
        folder = self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "step": step,
            "rank": self.args.process_index,
            "first_bad_tensor": what,
            "message": message,
            "gradient_norm": _text(norm),
            "losses": [_text(float(loss)) for _, _, loss in batches],
            "seed": self.args.seed,
            "batches": [
                {
                    "rows": list(sampled.rows),
                    "prompt_ids": [list(map(int, ids)) for ids in sampled.prompt_ids],
                    "completion_ids": [list(map(int, ids)) for ids in sampled.completion_ids],
                    "finish_reasons": list(sampled.finish_reasons),
                }
                for sampled in rollouts
            ],
        }
        write_json(folder / f"rank_{self.args.process_index}.json", content)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm`, unless it is not finite. 0: do not.

    torch's `clip_grad_norm_` would make every gradient NaN if one is, so that the first bad one could not be named.

    Returns:
        The norm before.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm([gradient for _, gradient in _gradients(model)])
    if max_norm > 0 and torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
    return norm


def _gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, weight.grad) for name, weight in model.named_parameters() if weight.grad is not None)


def _layer_name(layer: int) -> str:
    if layer < HEAD:
        return f"the attention of layer {attention_key(layer)}"
    return "the LM head's input" if layer == HEAD else f"layer {layer}"


def _finite(value: float | Tensor) -> bool:
    return math.isfinite(float(value))


def _text(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or math.isfinite(value) else str(value)
