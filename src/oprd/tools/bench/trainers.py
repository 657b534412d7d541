"""Whole training steps of ours and of TRL's trainers on the same models and prompts.

Alike in all: models, prompts, rollouts of full length from the student (temperature 1, nothing truncated), optimizer (fused
AdamW), learning rate, gradient clipping, float32, no activation checkpointing, one micro-batch. The divergences are reverse KL at
temperature 1. Ours also samples by vLLM where that is installed, in float32 as the rest, and in bfloat16, which does less work.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from oprd.config import OPRDConfig
from oprd.resolve import load
from oprd.tools.bench.common import byte_tokenizer
from oprd.tools.bench.memory import resident_bytes, settle_memory
from oprd.tools.bench.update import SHAPES
from oprd.training.trainer import OPRDTrainer

PROMPT = "What is {:04d} times {:04d}? Answer: "


@dataclass(frozen=True)
class Setup:
    """What is trained, and on what.

    Args:
        model: student, a folder or an embedded name; None: a random Llama of `shape`.
        teacher: likewise.
        prompts: prompts a step; one rollout each.
        completion: tokens of each rollout.
        steps: timed steps of one process, after one that warms up.
        shape: settings of `LlamaConfig` for random models, a vocabulary of at least 259 among them.
    """

    model: str | None = None
    teacher: str | None = None
    prompts: int = 8
    completion: int = 64
    steps: int = 2
    shape: dict[str, Any] = field(default_factory=lambda: dict(SHAPES["smollm2-135m"][1]))

    def texts(self) -> list[str]:
        """The prompts, all of one length in bytes."""
        return [PROMPT.format(37 * (i + 1), 101 + 59 * i) for i in range(self.prompts)]

    def build(self) -> tuple[Any, Any, PreTrainedTokenizerBase]:
        """Student, teacher and the student's tokenizer."""
        student, tokenizer = self._one(self.model, seed=0)
        teacher, _ = self._one(self.teacher, seed=1, tokenizer=tokenizer)
        return student, teacher.eval().requires_grad_(False), tokenizer

    def _one(self, name: str | None, seed: int, tokenizer: Any = None) -> tuple[Any, Any]:
        if name is not None:
            loaded = load(name, dtype=torch.float32, tokenizer=tokenizer)
            return loaded.model, loaded.tokenizer
        torch.manual_seed(seed)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**self.shape, **special}))
        return model, tokenizer or byte_tokenizer(self.shape["vocab_size"])


class StepWatch(TrainerCallback):
    """Times whole steps from the end of one to the end of the next, and in them `generate`; counts tokens on the way.

    Args:
        completion: tokens that every rollout is made to have, by `min_new_tokens`, in whichever trainer calls `generate`.
        memory: whether the high-water mark of memory is started anew after the first step.
    """

    def __init__(self, completion: int, *, memory: bool = False) -> None:
        self.completion, self.memory = completion, memory
        self.steps: list[dict[str, float]] = []
        self._ended: float | None = None
        self._now = self._nothing()

    @staticmethod
    def _nothing() -> dict[str, float]:
        return {"rollout_seconds": 0.0, "prompt_tokens": 0, "generated_tokens": 0, "trained_tokens": 0}

    def watch(self, model: Any) -> None:
        """Put a clock and a counter around a model's `generate`."""
        inner = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            kwargs["generation_config"].min_new_tokens = self.completion
            start = time.perf_counter()
            output = inner(*args, **kwargs)
            self._now["rollout_seconds"] += time.perf_counter() - start
            mask = kwargs["attention_mask"]
            ids = output if isinstance(output, torch.Tensor) else output.sequences
            self._now["prompt_tokens"] += int(mask.sum())
            self._now["generated_tokens"] += len(ids) * (ids.shape[1] - mask.shape[1])
            return output

        model.generate = generate

    def watch_engine(self, engine: Any) -> None:
        """Likewise around a rollout engine that does not call the model's `generate`: no token ends its completions."""
        inner, engine.stop_token_ids = engine.generate, []

        def generate(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            sampled = inner(*args, **kwargs)
            self._now["rollout_seconds"] += time.perf_counter() - start
            self._now["prompt_tokens"] += sum(map(len, sampled.rollouts.prompt_ids))
            self._now["generated_tokens"] += sum(sampled.rollouts.completion_lengths)
            return sampled

        engine.generate = generate

    def count_trained(self, owner: Any, method: str, count: Callable[[Any, Any], int]) -> None:
        """Count, at each call of a method, the tokens that the loss is made of: `count(arguments, result)`."""
        inner = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self._now["trained_tokens"] += count(args, result)
            return result

        setattr(owner, method, counted)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended: the first one only starts the clock."""
        now = time.perf_counter()
        if self._ended is not None:
            self.steps.append({"seconds": now - self._ended, **self._now})
        elif self.memory:
            settle_memory()
        self._now = self._nothing()
        self._ended = time.perf_counter()


def settings(setup: Setup) -> dict[str, Any]:
    """Training arguments that all trainers share."""
    return {
        "max_steps": 1 + setup.steps, "per_device_train_batch_size": setup.prompts, "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0, "temperature": 1.0,
    }  # fmt: skip


def ours(**own: Any) -> Callable[..., Any]:
    """`OPRDTrainer` with settings of the objective or of the rollout engine."""

    def build(setup: Setup, models: tuple[Any, Any, Any], folder: str, watch: StepWatch) -> OPRDTrainer:
        student, teacher, tokenizer = models
        args = OPRDConfig(folder, **settings(setup), max_completion_length=setup.completion, **own)
        trainer = OPRDTrainer(
            student, teacher, args=args, train_dataset=[{"prompt": text} for text in setup.texts()],
            processing_class=tokenizer, teacher_processing_class=tokenizer, callbacks=[watch],
        )  # fmt: skip

        def count(args: Any, requests: Any) -> int:
            request = requests[0]
            return len(request.flat_index if request.head is None else request.head.flat_index)

        watch.count_trained(trainer.pair, "requests", count)
        return trainer

    return build


def trl_distillation(setup: Setup, models: tuple[Any, Any, Any], folder: str, watch: StepWatch) -> Any:
    """TRL's `DistillationTrainer` at beta 1, the reverse KL over the whole vocabulary by chunks."""
    import trl
    from datasets import Dataset

    args = trl.DistillationConfig(
        folder, **settings(setup), max_completion_length=setup.completion, beta=1.0, gradient_checkpointing=False
    )
    trainer = trl.DistillationTrainer(
        models[0], models[1], args, Dataset.from_list([{"prompt": text} for text in setup.texts()]),
        processing_class=models[2], callbacks=[watch],
    )  # fmt: skip
    watch.count_trained(trainer, "compute_loss", lambda args, loss: int(args[1]["completion_mask"].sum()))
    return trainer


def trl_gkd(setup: Setup, models: tuple[Any, Any, Any], folder: str, watch: StepWatch) -> Any:
    """TRL's `GKDTrainer` at lmbda 1 (all rollouts the student's) and beta 1 (reverse KL), which makes all logits."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = models
    # It wants an answer for each prompt, which it throws away but for its length: that divides the loss.
    rows = []
    for text in setup.texts():
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer = [ids[0]] * setup.completion
        rows.append({"prompt": text, "input_ids": ids + answer, "completion_mask": [0] * len(ids) + [1] * len(answer)})
    args = GKDConfig(
        folder, **settings(setup), max_new_tokens=setup.completion, beta=1.0, lmbda=1.0, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GKDTrainer(
        student, teacher, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[watch]
    )
    watch.count_trained(trainer, "compute_loss", lambda args, loss: int((args[1]["labels"][:, 1:] != -100).sum()))
    return trainer


TRAINERS: dict[str, Callable[..., Any]] = {
    "representation": ours(layers="all"),
    "full_kl": ours(representation_weight=0.0, output_space="reverse_kl", reduction="token"),
    "trl_distillation": trl_distillation,
    "trl_gkd": trl_gkd,
    "representation_vllm": ours(layers="all", rollout_engine="vllm"),
    "representation_vllm_bf16": ours(layers="all", rollout_engine="vllm", rollout_engine_kwargs={"dtype": "bfloat16"}),
}
TITLES = {
    "representation": "oprd, representation, all layers",
    "full_kl": "oprd, full reverse KL",
    "trl_distillation": "TRL DistillationTrainer",
    "trl_gkd": "TRL GKDTrainer",
    "representation_vllm": "oprd, representation, rollouts by vLLM",
    "representation_vllm_bf16": "oprd, representation, rollouts by vLLM in bf16",
}


def installed_trainers() -> list[str]:
    """The trainers whose packages are there: those that sample by vLLM want vLLM. (Without TRL there is no comparison.)"""
    return [name for name in TRAINERS if "vllm" not in name or find_spec("vllm") is not None]


def require_trl() -> None:
    """Make sure that TRL is there.

    Raises:
        ValueError: it is not.
    """
    if find_spec("trl") is None:
        raise ValueError("oprd bench step: TRL, which it compares with, is not installed; pip install 'oprd[dev]'")


def run_trainer(name: str, setup: Setup, *, memory: bool = False) -> dict[str, Any]:
    """Train with one trainer in this process.

    Args:
        name: one of `TRAINERS`.
        setup: what is trained.
        memory: measure memory (Linux only); the times then are none.

    Returns:
        `steps`: for each timed step its `seconds`, those in `generate` (`rollout_seconds`), and tokens of prompts, generated and
        trained on. `peak_bytes`, with `memory`: highest resident memory in these steps beyond what was there before the models.

    Raises:
        ValueError: the trainer is not known, TRL is missing, or a model cannot be loaded.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer: {name!r} is not one of {', '.join(TRAINERS)}")
    if name.startswith("trl"):
        require_trl()
    before = settle_memory() if memory else 0
    watch = StepWatch(setup.completion, memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        models = setup.build()
        trainer = TRAINERS[name](setup, models, f"{folder}/run", watch)
        if "vllm" in name:
            watch.watch_engine(trainer.engine)
        else:
            watch.watch(models[0])
        trainer.train()
    found: dict[str, Any] = {"steps": watch.steps}
    return {**found, "peak_bytes": resident_bytes("VmHWM") - before} if memory else found


if __name__ == "__main__":  # one trainer in a process of its own, for `oprd.tools.bench.step`
    torch.set_num_threads(int(sys.argv[4]))
    measured = run_trainer(sys.argv[1], Setup(**json.loads(sys.argv[2])), memory=sys.argv[3] == "memory")
    print(json.dumps(measured))
