"""Evaluates a run's models by sampling: the problems are shared among the training processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from accelerate.utils import gather_object
from torch import nn

from oprd.alignment.model_pair import ModelPair
from oprd.config import OPRDConfig
from oprd.data.prompts import Prompt
from oprd.rollouts.engine import RolloutEngine, derive_seed
from oprd.rollouts.engines import make_engine
from oprd.states.several import SeveralTeachers
from oprd.states.teacher_settings import naming_teacher
from oprd.states.teachers import CanSample, Teacher
from oprd.tasks.evaluation import Evaluation, Grading, evaluate, join_parts, join_ranks, join_samples
from oprd.training.parallel import Parallel


class Evaluator:
    """Samples k completions a problem and grades them.

    Args:
        pair: student and teacher.
        engine: samples from the student.
        args: the run's settings.
        grading: the task's grader.
        parallel: the training processes.
    """

    def __init__(
        self, pair: ModelPair, engine: RolloutEngine, args: OPRDConfig, grading: Grading, parallel: Parallel
    ) -> None:
        self.pair, self.engine, self.args, self.grading, self.parallel = pair, engine, args, grading, parallel

    def model(self, model: nn.Module, prompts: Sequence[Prompt], engine: RolloutEngine | None = None) -> Evaluation:
        """Evaluate any model on `prompts`; with an `engine` for its tokenizer if that is not the student's."""
        k, rank, world = self.args.eval_num_generations, self.args.process_index, self.args.world_size
        share = prompts[rank::world] or prompts[:1]  # a rank without a problem repeats one, which is dropped below
        with self.grading.open() as grader, ExitStack() as stack:
            # Before training the student is neither wrapped nor, with DeepSpeed, on its device.
            if model is self.pair.student.model:
                stack.enter_context(self.parallel.student_on_device())
                stack.enter_context(self.parallel.sampling_precision())
            part = evaluate(
                self.parallel.unwrap(model), engine or self.engine, share, grader, k=k,
                sampling=self.args.eval_sampling, seed=derive_seed(self.args.seed, rank), rewards=self.grading.rewards,
            )  # fmt: skip
        if world == 1:
            return part
        return join_ranks(gather_object([part]), len(prompts), k)

    def teacher(self, prompts: Sequence[Prompt]) -> Evaluation:
        """Evaluate the teacher, with prompts and tokens of its own where it has them; of several, each on its own problems.

        Raises:
            ValueError: the teacher cannot sample here, or cannot read a prompt.
        """
        if not isinstance(self.pair.teacher, SeveralTeachers):
            return self._one(self.pair.teacher, prompts)
        several, k = self.pair.teacher, self.args.eval_num_generations
        teacher_ids = self.pair.teacher_ids(prompts)  # None: every teacher answers all problems
        places = {
            name: [place for place in range(len(prompts)) if teacher_ids is None or teacher_ids[place] == name]
            for name in several.teachers
        }
        parts = {
            name: self._one(several.ready(name, self.args.device), [prompts[place] for place in own], name)
            for name, own in places.items() if own
        }  # fmt: skip
        if teacher_ids is None:
            joined = join_samples([*parts.values()], k)
        else:
            joined = join_parts([*parts.values()], [places[name] for name in parts], k)
        by_teacher = {name: part.summary["avg_at_k"] for name, part in parts.items()}
        return replace(joined, summary={**joined.summary, "by_teacher": by_teacher})

    def _one(self, teacher: Teacher, prompts: Sequence[Prompt], teacher_id: str | None = None) -> Evaluation:
        args, aligner = self.args, self.pair.aligners.get(teacher_id)
        if not isinstance(teacher, CanSample):
            raise ValueError(
                f"eval_teacher: {type(teacher).__name__} cannot sample here; set eval_teacher: false to train without its "
                "measures"
            )
        with teacher.sampler() as model:
            if aligner is None:
                if (ends := self.pair.other_ends.get(teacher_id)) is None:
                    return self.model(model, prompts)
                own = make_engine(args.rollout_engine, self.pair.tokenizer, ends, **args.engine_kwargs)
                return self.model(model, prompts, own)
            length = args.eval_sampling.max_completion_length
            with naming_teacher(teacher_id):
                theirs = self.pair.teacher_prompts(
                    prompts, name="eval_dataset", max_completion_length=length, teacher_id=teacher_id
                )
            stops = sorted({*self.pair.shared_vocabulary(teacher_id).teacher_stop_ids})  # as where it writes
            engine = make_engine(args.rollout_engine, aligner.teacher_tokenizer, stops, **args.engine_kwargs)
            return self.model(model, theirs, engine)
