"""Full training steps of our trainer and TRL's on the same models and prompts.

All trainers share models, prompts, student rollouts (temperature 1, no top-k or top-p), optimizer (fused AdamW), learning rate,
gradient clipping, float32, no activation checkpointing, and one micro-batch. Rollouts have their full length, or the lengths that
the model gives them: random models then stop at one of many tokens, so that the average is `MEAN_LENGTH`. Divergences are reverse
KL at temperature 1. If vLLM is installed, our trainer also runs with it, in float32 like the rest, and in bfloat16, which does less
work.
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

MEAN_LENGTH = 45
PROMPT = "What is {:04d} times {:04d}? Answer: "


@dataclass(frozen=True)
class Setup:
    """Models, prompts and lengths of the benchmark.

    Args:
        model: the student, a folder or an embedded name; None: a random Llama of `shape`.
        teacher: the teacher, given in the same way.
        prompts: prompts per step.
        completion: most tokens per rollout.
        generations: rollouts per prompt. TRL's trainers get each prompt so many times, because they sample one each.
        drawn: rollouts end where the model ends them; otherwise all have `completion` tokens.
        seed: of the rollouts.
        steps: timed steps per process, after one warm-up step.
        shape: `LlamaConfig` settings of the random models; the vocabulary has at least 259 tokens.
    """

    model: str | None = None
    teacher: str | None = None
    prompts: int = 8
    completion: int = 64
    generations: int = 1
    drawn: bool = False
    seed: int = 0
    steps: int = 2
    shape: dict[str, Any] = field(default_factory=lambda: dict(SHAPES["smollm2-135m"][1]))

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.prompts * self.generations

    def texts(self) -> list[str]:
        """The prompts, all with the same length in bytes."""
        return [PROMPT.format(37 * (i + 1), 101 + 59 * i) for i in range(self.prompts)]

    def build(self) -> tuple[Any, Any, PreTrainedTokenizerBase]:
        """Build the student, the teacher and the student's tokenizer."""
        student, tokenizer = self._one(self.model, seed=0)
        teacher, _ = self._one(self.teacher, seed=1, tokenizer=tokenizer)
        if self.drawn and self.model is None:  # a random model draws all tokens about equally often
            stops = list(range(tokenizer.eos_token_id, self.shape["vocab_size"], MEAN_LENGTH))
            student.generation_config.eos_token_id = teacher.generation_config.eos_token_id = stops
        return student, teacher.eval().requires_grad_(False), tokenizer

    def _one(self, name: str | None, seed: int, tokenizer: Any = None) -> tuple[Any, Any]:
        if name is not None:
            loaded = load(name, dtype=torch.float32, tokenizer=tokenizer)
            return loaded.model, loaded.tokenizer
        torch.manual_seed(seed)
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**self.shape, **special}))
        return model, byte_tokenizer(self.shape["vocab_size"]) if tokenizer is None else tokenizer


class StepWatch(TrainerCallback):
    """Times each step from the end of the previous one, times `generate` within it, and counts tokens.

    Args:
        completion: tokens that each rollout must have; 0 for as many as the model gives it.
        memory: whether to reset the peak memory after the first step.
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
        """Wrap a model's `generate` to time it and count tokens."""
        inner = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.completion:
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
        """Wrap one of our rollout engines. Full-length rollouts have no stop tokens."""
        inner = engine.generate
        if self.completion:
            engine.stop_token_ids = []

        def generate(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            sampled = inner(*args, **kwargs)
            self._now["rollout_seconds"] += time.perf_counter() - start
            self._now["prompt_tokens"] += sum(map(len, sampled.rollouts.prompt_ids))
            self._now["generated_tokens"] += sum(sampled.rollouts.completion_lengths)
            return sampled

        engine.generate = generate

    def count_trained(self, owner: Any, method: str, count: Callable[[Any, Any], int]) -> None:
        """Wrap a method so that each call adds `count(arguments, result)`, the tokens in the loss."""
        inner = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            self._now["trained_tokens"] += count(args, result)
            return result

        setattr(owner, method, counted)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the step. The first step only starts the clock."""
        now = time.perf_counter()
        if self._ended is not None:
            self.steps.append({"seconds": now - self._ended, **self._now})
        elif self.memory:
            settle_memory()
        self._now = self._nothing()
        self._ended = time.perf_counter()


def settings(setup: Setup) -> dict[str, Any]:
    """Training arguments shared by all trainers."""
    return {
        "max_steps": 1 + setup.steps, "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0, "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "seed": setup.seed, "temperature": 1.0,
    }  # fmt: skip


def ours(**own: Any) -> Callable[..., Any]:
    """A builder of `OPRDTrainer` with extra settings for the objective or the rollout engine."""

    def build(setup: Setup, models: tuple[Any, Any, Any], folder: str, watch: StepWatch) -> OPRDTrainer:
        student, teacher, tokenizer = models
        args = OPRDConfig(
            folder, **settings(setup), per_device_train_batch_size=setup.prompts, num_generations=setup.generations,
            max_completion_length=setup.completion, **own,
        )  # fmt: skip
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
    """TRL's `DistillationTrainer` with beta 1: reverse KL over the full vocabulary, in chunks."""
    import trl
    from datasets import Dataset

    args = trl.DistillationConfig(
        folder, **settings(setup), per_device_train_batch_size=setup.rollouts, max_completion_length=setup.completion,
        beta=1.0, gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{"prompt": text} for text in setup.texts() for _ in range(setup.generations)]
    trainer = trl.DistillationTrainer(
        models[0], models[1], args, Dataset.from_list(rows), processing_class=models[2], callbacks=[watch]
    )
    watch.count_trained(trainer, "compute_loss", lambda args, loss: int(args[1]["completion_mask"].sum()))
    return trainer


def trl_gkd(setup: Setup, models: tuple[Any, Any, Any], folder: str, watch: StepWatch) -> Any:
    """TRL's `GKDTrainer` with lmbda 1 (all rollouts from the student) and beta 1 (reverse KL). It computes all logits at once."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, tokenizer = models
    # It requires an answer for each prompt but uses only its length, as a divisor of the loss.
    rows = []
    for text in (text for text in setup.texts() for _ in range(setup.generations)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        answer = [ids[0]] * setup.completion
        rows.append({"prompt": text, "input_ids": ids + answer, "completion_mask": [0] * len(ids) + [1] * len(answer)})
    args = GKDConfig(
        folder, **settings(setup), per_device_train_batch_size=setup.rollouts, max_new_tokens=setup.completion, beta=1.0,
        lmbda=1.0, max_length=None, gradient_checkpointing=False,
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
    """The trainers whose packages are installed. TRL is always required; some trainers need vLLM."""
    return [name for name in TRAINERS if "vllm" not in name or find_spec("vllm") is not None]


def require_trl() -> None:
    """Check that TRL is installed.

    Raises:
        ValueError: TRL is not installed.
    """
    if find_spec("trl") is None:
        raise ValueError("oprd bench step: TRL, which it compares with, is not installed; pip install 'oprd[dev]'")


def run_trainer(name: str, setup: Setup, *, memory: bool = False) -> dict[str, Any]:
    """Train with one trainer in this process.

    Args:
        name: a name in `TRAINERS`.
        setup: models, prompts and lengths.
        memory: measure memory (Linux only); the times are then not valid.

    Returns:
        `steps`: for each timed step its `seconds`, the seconds in `generate` (`rollout_seconds`), and the numbers of prompt,
        generated and trained tokens. With `memory` also `peak_bytes`: peak resident memory in these steps beyond that before the
        models were built.

    Raises:
        ValueError: the trainer is unknown, TRL is missing, or a model cannot be loaded.
    """
    if name not in TRAINERS:
        raise ValueError(f"trainer: {name!r} is not one of {', '.join(TRAINERS)}")
    if name.startswith("trl"):
        require_trl()
    before = settle_memory() if memory else 0
    watch = StepWatch(0 if setup.drawn else setup.completion, memory=memory)
    with tempfile.TemporaryDirectory() as folder:
        models = setup.build()
        trainer = TRAINERS[name](setup, models, f"{folder}/run", watch)
        if name.startswith("trl"):
            watch.watch(models[0])
            trainer.train()
        else:
            watch.watch_engine(trainer.engine)
            trainer.train(outputs=False)
    found: dict[str, Any] = {"steps": watch.steps}
    return {**found, "peak_bytes": resident_bytes("VmHWM") - before} if memory else found


if __name__ == "__main__":  # runs one trainer for `oprd.tools.bench.step`
    torch.set_num_threads(int(sys.argv[4]))
    measured = run_trainer(sys.argv[1], Setup(**json.loads(sys.argv[2])), memory=sys.argv[3] == "memory")
    print(json.dumps(measured))
