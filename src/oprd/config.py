"""`OPRDConfig`: every setting of a training run, its one default, and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from oprd.layers import LAYERS
from oprd.objectives.reduction import Reduction
from oprd.positions import check_positions
from oprd.rollout import ENGINES, Sampling
from oprd.tasks import TASKS


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class OPRDConfig(TrainingArguments):
    """Settings of `OPRDTrainer`, on top of transformers' `TrainingArguments`.

    Defaults that differ from `TrainingArguments`: learning rate 1e-5 with 3 % warm-up and cosine decay (the paper's), one log
    line a step, `remove_unused_columns=False`, `ddp_find_unused_parameters=False`, and a NaN loss is shown rather than filtered.
    `per_device_train_batch_size` counts *prompts*; each gives `num_generations` rollouts.

    Raises:
        ValueError: a value outside what is allowed; the message names the key, the value and what is.
    """

    # Defaults of TrainingArguments that differ here.
    learning_rate: float = field(default=1e-5, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(default="cosine", metadata=_help("Learning rate schedule."))
    warmup_steps: float = field(default=0.03, metadata=_help("Warm-up steps; below 1 a share of all steps."))
    logging_steps: float = field(default=1, metadata=_help("Steps between two reports to `report_to`."))
    logging_nan_inf_filter: bool = field(default=False, metadata=_help("Hide NaN losses. Off: a NaN should be seen."))
    activation_checkpointing: bool | None = field(
        default=None, metadata=_help("Recompute activations to save memory (also spelled gradient_checkpointing).")
    )
    activation_checkpointing_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Its arguments; use_reentrant stays False.")
    )
    remove_unused_columns: bool = field(default=False, metadata=_help("Must stay off: prompts are no model inputs."))
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Must stay off: what the loss does not reach is frozen, and DDP would miscount.")
    )

    # Models
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of from_pretrained for a student given by name.")
    )
    teacher_model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of from_pretrained for a teacher given by name.")
    )
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that comes with a model."))

    # Prompts and rollouts
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of the chat template, such as enable_thinking.")
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata=_help("Leave out (and count) prompts of more tokens. None: a prompt too long is an error."),
    )
    max_completion_length: int = field(default=512, metadata=_help("Most tokens of a rollout."))
    num_generations: int = field(default=1, metadata=_help("Rollouts a prompt."))
    temperature: float = field(default=1.0, metadata=_help("Sampling temperature; 1 is on-policy."))
    top_p: float = field(default=1.0, metadata=_help("Nucleus truncation; 1 is on-policy."))
    top_k: int = field(default=0, metadata=_help("Top-k truncation; 0 is on-policy."))
    rollout_engine: str = field(default="transformers", metadata=_help(f"One of {', '.join(ENGINES)}."))
    rollout_engine_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Further arguments of the engine, such as gpu_memory_utilization of vllm.")
    )
    generation_batch_size: int = field(default=64, metadata=_help("Completions generated together."))

    # The representation objective (OPRD Eq. 6)
    layers: Any = field(default="all", metadata=_help(f"{', '.join(LAYERS)}, or a list of layers counted from 1."))
    positions: str = field(default="all", metadata=_help("Response positions: all, last, last_k, first_k."))
    position_k: int | None = field(default=None, metadata=_help("k of last_k and first_k."))
    normalize: bool = field(default=False, metadata=_help("Compare directions: 2 − 2·cos instead of raw states."))
    reduction: str = field(default="rollout", metadata=_help("rollout: each counts the same; token: each token does."))
    representation_weight: float = field(default=1.0, metadata=_help("Factor on the representation loss."))
    micro_batch_tokens: int = field(
        default=16384, metadata=_help("Most padded tokens of one forward and backward pass; memory grows with it.")
    )

    # Grading, evaluation, logs
    task: str | None = field(default=None, metadata=_help(f"How answers are graded: {', '.join(TASKS)}; None: not."))
    eval_num_generations: int = field(default=4, metadata=_help("Samples a problem (k of Avg@k)."))
    eval_temperature: float = field(default=0.7, metadata=_help("Sampling temperature of evaluation."))
    eval_top_p: float = field(default=0.95, metadata=_help("Nucleus truncation of evaluation."))
    eval_instruction: bool = field(
        default=True,
        metadata=_help("Append the task's instruction to problems that do not say how to answer (how many is logged)."),
    )
    eval_max_completion_length: int | None = field(
        default=None, metadata=_help("Most tokens of an evaluated completion (default: max_completion_length).")
    )
    log_completions: bool = field(default=True, metadata=_help("Write sampled completions to the run folder."))
    num_completions_to_log: int = field(default=4, metadata=_help("Completions written a logged step."))

    def __post_init__(self) -> None:
        self._check_objective()
        self._check_rollouts()
        self._take_older_spelling()
        self._check_training()
        chosen: str | None = getattr(self, "metric_for_best_model", None)
        if self.load_best_model_at_end and chosen is None:
            self.metric_for_best_model, self.greater_is_better = "eval_avg_at_k", True  # an evaluation here has no loss
        super().__post_init__()

    def _check_objective(self) -> None:
        check_positions(self.positions, self.position_k)
        if isinstance(self.layers, str) and self.layers not in LAYERS:
            raise ValueError(f"layers: {self.layers!r} is not one of {', '.join(LAYERS)} nor a list of layer numbers")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction: {self.reduction!r} is not one of {', '.join(get_args(Reduction))}")
        if self.reduction == "token" and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps} does not go with reduction='token', whose mean "
                "is over the tokens of the whole step; raise per_device_train_batch_size instead (micro_batch_tokens and "
                "generation_batch_size bound the memory)"
            )
        if self.representation_weight <= 0:
            raise ValueError(f"representation_weight: {self.representation_weight} is not allowed; it must be above 0")
        _at_least_one(self, "micro_batch_tokens")

    def _check_rollouts(self) -> None:
        for name in (
            "num_generations", "generation_batch_size", "eval_num_generations", "max_prompt_length",
            "per_device_train_batch_size", "gradient_accumulation_steps",
        ):  # fmt: skip
            _at_least_one(self, name)
        if self.rollout_engine not in ENGINES:
            raise ValueError(f"rollout_engine: {self.rollout_engine!r} is not one of {', '.join(ENGINES)}")
        if self.task is not None and self.task not in TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(TASKS)}")
        # Built once here so that a bad sampling value stops the run before any model is loaded.
        _ = self.sampling, self.eval_sampling

    def _take_older_spelling(self) -> None:
        """`gradient_checkpointing*`, the name before transformers 5.23, counts where the newer one is not set."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {"use_reentrant": False}

    def _check_training(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: must be False; a prompt is not an argument of the model's forward")
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters: must be False; what the loss does not reach is frozen already"
            )
        if self.fp16:
            raise ValueError(
                "fp16: not supported (its loss scaler is saved as a pickle, and small updates underflow); use bf16"
            )
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "activation_checkpointing_kwargs: use_reentrant=True hides states from the loss; set it to False"
            )
        if self.activation_checkpointing and "__call__" in vars(GradientCheckpointingLayer):
            raise ValueError(
                "activation_checkpointing: needs transformers 5.23 or newer; before, it recomputed the hooks that read the states"
            )

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """Arguments of the rollout engine; under bf16, vLLM computes in it as the trainer's autocast does."""
        own = {"dtype": "bfloat16"} if self.rollout_engine == "vllm" and self.bf16 else {}
        return {"batch_size": self.generation_batch_size, **own, **(self.rollout_engine_kwargs or {})}

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        return Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k)

    @property
    def eval_sampling(self) -> Sampling:
        """How evaluated completions are drawn."""
        length = self.eval_max_completion_length or self.max_completion_length
        return Sampling(length, self.eval_temperature, self.eval_top_p)


def _at_least_one(config: OPRDConfig, name: str) -> None:
    value = getattr(config, name)
    if value is not None and value < 1:
        raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")
