"""Finds the learning rate of a run: a few steps from the same weights at several rates, judged on held-out rollouts.

`probe_learning_rate` is called before there is a trainer. It leaves weights and random generators as it found them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer

from oprd.bridge.teacher import place_bridges
from oprd.config import AUTO, OPRDConfig
from oprd.data.prompts import Prompt
from oprd.models.architecture import evaluating
from oprd.models.recomputation import recomputed_blocks
from oprd.objectives.batch import Batch
from oprd.objectives.composite import CompositeObjective, StepObjective, StepTotals
from oprd.objectives.schedules import weight_at
from oprd.objectives.terms import AttentionTerm, HeadTerm, LayerTerm, Representation, drop_metrics
from oprd.resolve import ResolvedRun
from oprd.rollouts.engine import derive_seed, student_writes
from oprd.rollouts.teacher_text import TeacherWriter
from oprd.states.capture import read_through_forward
from oprd.training.finite import clip_gradients
from oprd.training.parallel import plan_for_teachers

RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 0) for digit in (1, 3))
"""What may be tried, a factor of about three apart."""
FIRST = 3e-4
STEPS, ROLLOUTS, HELD_OUT = 6, 8, 16
TOLERATED, SHORT_RUN = 1.5, 30  # fitted in benchmarks/learning_rate.py
_USUAL = 3  # rates that a search tries, for the cost that is said before it
_GIVE = "give learning_rate a number (oprd diagnose shows the same probe)"


@dataclass(frozen=True)
class RateProbe:
    """What a probe found.

    Args:
        learning_rate: the rate to train with.
        curve: rate → held-out loss after the steps; infinite where the loss or the gradients were not finite.
        before: held-out loss of the start weights.
        loss_factor: multiple of `before` up to which a loss was accepted; 0: the lowest loss was taken.
        left_out: terms of the objective that the probe leaves out.
        seconds: that it took.
    """

    learning_rate: float
    curve: Mapping[float, float]
    before: float
    loss_factor: float = 0.0
    left_out: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def rule(self) -> str:
        """How the rate was chosen, in words."""
        if self.loss_factor:
            return f"the highest rate whose held-out loss stays below {self.loss_factor:g} × that before"
        return "the rate with the lowest held-out loss"

    def as_json(self) -> dict[str, Any]:
        """For the run folder; a loss that is not finite is None."""
        losses = [loss if math.isfinite(loss) else None for loss in self.curve.values()]
        return {
            "learning_rate": self.learning_rate, "rule": self.rule, "rates": [*self.curve], "held_out_loss": losses,
            "held_out_loss_before": self.before, "steps": STEPS, "rollouts_a_step": ROLLOUTS, "held_out_rollouts": HELD_OUT,
            "left_out": [*self.left_out], "seconds": round(self.seconds, 2),
        }  # fmt: skip

    def describe(self) -> str:
        """One line: the rate, and the curve that it is read from."""
        curve = ", ".join(f"{rate:g}: {loss:.4g}" for rate, loss in self.curve.items())
        without = f"; without {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"learning_rate: {self.learning_rate:g}, {self.rule} after {STEPS} steps: {curve}; before {self.before:.4g}{without} "
            f"({self.seconds:.1f} s)"
        )


def describe_cost(args: OPRDConfig) -> str:
    """What a probe will cost, said before it."""
    # A rollout of a step is sampled and updates the weights, about as much work each; a held-out one is only read.
    work = _USUAL * (STEPS * ROLLOUTS + HELD_OUT / 2) + STEPS * ROLLOUTS + HELD_OUT
    a_step = 2 * args.per_device_train_batch_size * args.num_generations * args.gradient_accumulation_steps
    of = f" of {args.max_steps}" if args.max_steps > 0 else ""
    return (
        f"learning_rate: {AUTO}: {STEPS} steps of {ROLLOUTS} rollouts at about {_USUAL} rates, judged on {HELD_OUT} held-out "
        f"rollouts; about the work of {max(work / a_step, 0.1):.2g}{of} steps"
    )


def probe_learning_rate(resolved: ResolvedRun) -> RateProbe:
    """Find a learning rate by the held-out loss after a few steps. Every process of a run calls it and gets the same rate.

    The rollouts are drawn once, from the start weights, and the rates are constant. The objective is the run's own with the weights
    of its first step; terms that need fresh rollouts (policy gradient, sampled tokens) are left out.

    Args:
        resolved: the run; its models are moved to the run's device.

    Raises:
        ValueError: the run cannot be probed, or no rate lowers the loss; says what to do.
    """
    started = time.perf_counter()
    args, pair = resolved.run.args, resolved.pair
    objective, left_out = _objective(resolved)
    train, held_out = _choose_prompts(resolved.train_prompts, args.seed)
    model = pair.student.model.to(args.device)
    for part in pair.teacher.modules:
        part.to(args.device)
    place_bridges(pair.teacher, args.device)
    cuda = [args.device] if args.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(evaluating(model))
        *batches, apart = _draw(resolved, model, [*train, held_out])
        learner = _Learner(resolved, objective, model, batches, apart)
        stack.enter_context(learner.restoring())
        if args.activation_checkpointing:
            stack.enter_context(recomputed_blocks(model))
        before = learner.held_out_loss()
        loss_factor = tolerance(args, objective, len(resolved.train_prompts or ())) if not left_out else 0.0
        curve = search(learner.loss_at, before, loss_factor)
    # That of the first process: GPUs may differ in the last bits.
    (rate,) = broadcast_object_list([choose(curve, before, loss_factor)])
    return RateProbe(rate, curve, before, loss_factor, left_out, time.perf_counter() - started)


def search(loss_at: Callable[[float], float], before: float, loss_factor: float = 0.0) -> dict[float, float]:
    """Try rates of `RATES` from `FIRST` on, upwards and else downwards, while the loss falls or is accepted.

    Args:
        loss_at: rate → held-out loss after the steps.
        before: held-out loss of the start weights.
        loss_factor: multiple of it up to which a loss is accepted; 0: the lowest loss is searched.

    Returns:
        Rate → loss, ascending.
    """
    tried: dict[float, float] = {}

    def loss(place: int) -> float:
        if RATES[place] not in tried:
            tried[RATES[place]] = loss_at(RATES[place])
        return tried[RATES[place]]

    first = highest = lowest = RATES.index(FIRST)
    loss(first)
    while highest + 1 < len(RATES) and (loss(highest + 1) <= loss_factor * before or loss(highest + 1) < loss(highest)):
        highest += 1
    if loss_factor:
        while lowest > 0 and min(tried.values()) >= before:
            lowest -= 1
            loss(lowest)
    elif highest == first:
        while lowest > 0 and (not math.isfinite(loss(lowest)) or loss(lowest - 1) < loss(lowest)):
            lowest -= 1
    return dict(sorted(tried.items()))


def choose(curve: Mapping[float, float], before: float, loss_factor: float = 0.0) -> float:
    """The rate to train with: that of the lowest loss, or the highest one whose loss is accepted.

    Args:
        curve: rate → held-out loss.
        before: held-out loss of the start weights.
        loss_factor: as in `search`.

    Raises:
        ValueError: no rate lowers the loss.
    """
    best = min(curve, key=lambda rate: curve[rate])
    if not curve[best] < before:
        raise ValueError(
            f"learning_rate: {AUTO} found no rate that lowers the held-out loss: {before:.4g} before, {curve[best]:.4g} after "
            f"{STEPS} steps at {best:g}; check the pair (oprd diagnose), or {_GIVE}"
        )
    return max((rate for rate, loss in curve.items() if loss <= loss_factor * before), default=best)


def tolerance(args: OPRDConfig, objective: CompositeObjective, prompts: int) -> float:
    """The multiple of the start's loss up to which the probe accepts a held-out loss; 0: it takes the lowest loss.

    A squared distance of states overshoots in Adam's first steps, then recovers, and a higher rate gets further. A short run has
    no time to recover, and a bounded loss on distributions hides how far it overshot.

    Args:
        args: the run's settings.
        objective: what is probed.
        prompts: of the train_dataset.
    """
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * prompts / a_step
    terms = [term.objective for term in objective.terms.values()]
    squared = all(isinstance(term, Representation) and not term.normalize for term in terms)
    return TOLERATED if squared and steps >= SHORT_RUN else 0.0


def _draw(resolved: ResolvedRun, model: nn.Module, batches: Sequence[Sequence[Prompt]]) -> list[Batch]:
    """One rollout of each prompt. Batch i is written by the model that writes step i; each model samples once."""
    args, pair = resolved.run.args, resolved.pair
    found: dict[int, Batch] = {}
    by_student = _writers(args, len(batches))
    for student in sorted({*by_student}):
        steps = [step for step, own in enumerate(by_student) if own is student]
        prompts = [prompt for step in steps for prompt in batches[step]]
        drawn: dict[str, Any] = {"num_generations": 1, "sampling": args.sampling}
        drawn["seed"] = derive_seed(args.seed, "learning_rate", int(student))
        with _precision(args):
            if student:
                ids, rows = [p.ids for p in prompts], [p.index for p in prompts]
                rollouts = resolved.engine.generate(model, ids, rows=rows, **drawn).rollouts
                places: Sequence[int] = range(len(rollouts))
            else:
                writer = TeacherWriter(pair, resolved.engine, args.rollout_engine, **args.engine_kwargs)
                written = writer.write(prompts, device=args.device, **drawn)
                rollouts, places = written.rollouts, written.places
        start = 0
        for step in steps:
            mine = range(start, start := start + len(batches[step]))
            own = rollouts.select([i for i, place in enumerate(places) if place in mine])
            if not len(own):
                raise ValueError(
                    f"learning_rate: {AUTO} has no rollouts for a step: the student's tokens can write none of the teacher's "
                    f"responses; {_GIVE}"
                )
            by_row = {p.index: p.row for p in batches[step]}
            readings, _ = pair.readings(own, by_row)
            found[step] = Batch(own, [None] * len(own), readings=readings)
    return [found[step] for step in range(len(batches))]


def _writers(args: OPRDConfig, steps: int) -> list[bool]:
    """Whether the student writes the rollouts of each step."""
    return [student_writes(weight_at(args.lmbda, step), args.seed, step) for step in range(steps)]


class _Learner:
    """Steps on fixed rollouts from the same weights, and the loss on held-out ones."""

    def __init__(
        self,
        resolved: ResolvedRun,
        objective: CompositeObjective,
        model: nn.Module,
        batches: Sequence[Batch],
        held_out: Batch,
    ) -> None:
        self.args, self.pair, self.model = resolved.run.args, resolved.pair, model
        self.batches, self.held_out = batches, held_out
        *self.terms, self.held_out_terms = [
            objective.at(0, on_policy=own) for own in _writers(self.args, len(batches) + 1)
        ]
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._start = {name: weight.detach().to("cpu", copy=True) for name, weight in self.trained.items()}

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Give the start weights back at the end."""
        try:
            yield
        finally:
            self._restore()

    def loss_at(self, rate: float) -> float:
        """Held-out loss after one step on each batch at this rate; infinite if loss or gradients are not finite."""
        self._restore()
        optimizer = self._optimizer(rate)
        for step, batch in enumerate(self.batches):
            torch.manual_seed(derive_seed(self.args.seed, step, "learning_rate dropout"))
            self.model.train()
            loss = self._loss(batch, self.terms[step], learn=True)
            self.model.eval()
            norm = clip_gradients(self.model, self.args.max_grad_norm)
            if not (math.isfinite(loss) and torch.isfinite(norm)):
                return math.inf
            optimizer.step()
            optimizer.zero_grad()
        loss = self.held_out_loss()
        return loss if math.isfinite(loss) else math.inf

    def held_out_loss(self) -> float:
        """The loss of the weights as they are."""
        with torch.no_grad():
            return self._loss(self.held_out, self.held_out_terms, learn=False)

    def _loss(self, batch: Batch, terms: StepObjective, *, learn: bool) -> float:
        counts = [max(float(count), 1e-9) for count in self.pair.count(batch.rollouts, batch.readings)]
        totals, sums = StepTotals(*counts), 0.0
        for reader, group in zip(*plan_for_teachers(batch, self.args.micro_batch_tokens), strict=True):
            part = batch.select(group, reader)
            request, asked = self.pair.requests(
                part.rollouts, part.pairs, layers=terms.needs_layers, head=terms.needs_head, device=self.args.device,
                teacher_id=reader,
            )  # fmt: skip
            teacher = self.pair.teacher.states(asked) if terms.needs_teacher else None
            heads = partial(self.pair.heads, reader)
            losses = terms.on(part, request, teacher, totals, heads=heads, observe=drop_metrics)
            with _precision(self.args):
                loss: Tensor = torch.stack(read_through_forward(self.model, request, losses.read)).sum()
            if learn:
                loss.backward()
            sums += float(loss.detach())
        return sums

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)) or {"params", "model"} & {*kwargs}:
            raise ValueError(f"learning_rate: {AUTO} does not work with optim={self.args.optim}; {_GIVE}")
        return make([*self.trained.values()], **{**kwargs, "lr": rate})

    @torch.no_grad()
    def _restore(self) -> None:
        for name, weight in self.trained.items():
            weight.copy_(self._start[name])
            weight.grad = None


def _objective(resolved: ResolvedRun) -> tuple[CompositeObjective, list[str]]:
    """The objective without the terms whose loss says nothing on rollouts that are not fresh, and their names.

    Raises:
        ValueError: no other term has a weight in the first step.
    """
    objective = resolved.objective.without_measurements()
    usable = {
        name: term
        for name, term in objective.terms.items()
        if isinstance(term.objective, LayerTerm | HeadTerm | AttentionTerm)
        and not getattr(term.objective, "on_policy_only", False)
    }
    left_out = [name for name in objective.terms if name not in usable]
    kept = objective.with_terms(usable)
    if not any(kept.at(0, on_policy=False).weights.values()):
        raise ValueError(
            f"learning_rate: {AUTO} needs a loss that says how near the student is to its teacher; that of "
            f"{', '.join(left_out) or 'the first step'} does not; {_GIVE}"
        )
    return kept, left_out


def _choose_prompts(prompts: Sequence[Prompt] | None, seed: int) -> tuple[list[list[Prompt]], list[Prompt]]:
    """The prompts of each step, and those held out. Few prompts are used several times; none is on both sides.

    Raises:
        ValueError: there are not two prompts.
    """
    count = len(prompts or [])
    if prompts is None or count < 2:
        raise ValueError(
            f"learning_rate: {AUTO} needs 2 prompts or more, some to learn from and some to hold out; train_dataset has {count}: "
            "add prompts, or give learning_rate a number"
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "learning_rate prompts"))
    order = torch.randperm(count, generator=generator).tolist()
    held = min(HELD_OUT, max(1, count // 3))
    out, kept = order[:held], order[held:]
    learnt = [prompts[kept[i % len(kept)]] for i in range(STEPS * ROLLOUTS)]
    steps = [learnt[i : i + ROLLOUTS] for i in range(0, len(learnt), ROLLOUTS)]
    return steps, [prompts[out[i % held]] for i in range(HELD_OUT)]


def _precision(args: OPRDConfig) -> Any:
    return torch.autocast(args.device.type, torch.bfloat16) if args.bf16 else nullcontext()
