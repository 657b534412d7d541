"""`OPRDConfig`: every setting of a training run, its one default, and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from oprd.alignment.model_pair import ComparedPositions
from oprd.alignment.position_pairs import InsideTokens
from oprd.alignment.teacher_prompts import TeacherPromptSettings
from oprd.data.rows import RUN_DATASETS, for_dataset
from oprd.models.quantization import GRIDS
from oprd.objectives.output_space import OUTPUT_SPACE, OutputTerm
from oprd.objectives.own import check_entries
from oprd.objectives.policy_gradient import Scale, check_clip
from oprd.objectives.reduction import Reduction
from oprd.objectives.schedules import bounds, check_weight, is_on
from oprd.objectives.terms import ON_POLICY_KINDS
from oprd.rollouts.engine import Sampling
from oprd.rollouts.engines import ENGINES, engine_abilities
from oprd.sanitize import redacted
from oprd.states.layer_maps import check_setting
from oprd.states.layers import LAYERS
from oprd.states.positions import check_end_of_turn, check_positions
from oprd.states.teacher_settings import check_offload, check_per_prompt
from oprd.tasks.answer_formats import FORMATS, check_format
from oprd.tasks.rewards import check_weights, reward_functions
from oprd.tasks.task import TASKS, get_task

NAN_POLICIES = ("stop", "skip")
AUTO = "auto"
"""Value of `learning_rate`: a probe finds the rate before the run (`oprd.training.rate_probe`)."""
_OPTIMIZERS_OF_ANOTHER_STEP = ("schedule_free", "lomo", "adalomo")


class Range(NamedTuple):
    """The least and most value of a setting, and how a message says it."""

    text: str
    least: float
    most: float


_ANY = Range("0 or more", 0, math.inf)
_ABOVE_0 = Range("more than 0", math.ulp(0.0), math.inf)
_SHARE = Range("a number from 0 to 1", 0, 1)
_SEED = Range("a whole number from 0 to 4294967295", 0, 2**32 - 1)
RANGES = {
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "logging_steps", "num_completions_to_log",
         "dataloader_num_workers", "eval_delay"),
        _ANY,
    ),
    **dict.fromkeys(("num_train_epochs", "save_steps", "eval_steps", "adam_epsilon", "save_seconds", "ddp_timeout"), _ABOVE_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "teacher_update_rate"), _SHARE),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
}  # fmt: skip
"""Key → what is allowed, of keys whose range depends on nothing else."""


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(repr=False)
class OPRDConfig(TrainingArguments):
    """Settings of `OPRDTrainer`, on top of transformers' `TrainingArguments`.

    Defaults that differ from `TrainingArguments`: learning rate 1e-5 with 3 % warm-up and cosine decay (the paper's), one log
    line a step, `remove_unused_columns=False`, `ddp_find_unused_parameters=False`, and a NaN loss is shown rather than filtered.
    `per_device_train_batch_size` counts *prompts*; each gives `num_generations` rollouts.

    Raises:
        ValueError: a value outside what is allowed; the message names the key, the value and the allowed values.
    """

    # Defaults of TrainingArguments that differ here.
    learning_rate: float | Literal["auto"] = field(  # a number once the run has begun
        default=1e-5,
        metadata=_help("Peak learning rate. auto: a short probe on held-out rollouts finds it (oprd train only)."),
    )
    lr_scheduler_type: str = field(default="cosine", metadata=_help("Learning rate schedule."))
    warmup_steps: float = field(default=0.03, metadata=_help("Warm-up steps; below 1 a share of all steps."))
    logging_steps: float = field(default=1, metadata=_help("Steps between two reports to `report_to`."))
    logging_nan_inf_filter: bool = field(default=False, metadata=_help("Hide NaN losses from the log."))
    activation_checkpointing: bool | None = field(
        default=None, metadata=_help("Recompute activations to save memory (also spelled gradient_checkpointing).")
    )
    activation_checkpointing_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of activation checkpointing; use_reentrant must be False.")
    )
    remove_unused_columns: bool = field(
        default=False, metadata=_help("Must be off: prompts are not arguments of the model's forward.")
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("Must be off: parameters that the loss does not reach are frozen already.")
    )

    # Models
    model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of from_pretrained for a student given by name.")
    )
    student_quantization: str | None = field(
        default=None,
        metadata=_help(
            f"Train a student that computes with rounded weights: {', '.join(GRIDS)} (channels, groups of 32); None: as they are."
        ),
    )
    teacher_model_init_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of from_pretrained for a teacher given by name.")
    )
    teachers_per_prompt: str = field(
        default="one",
        metadata=_help(
            "With several teachers: one: the column teacher_id names it; all: every one reads every rollout, and counts equally."
        ),
    )
    mix_teachers: bool = field(
        default=False,
        metadata=_help(
            "Take prompts of several teachers in one update. Off: one teacher an update; in arXiv 2610.02381 "
            "mixing ended at 9.8, one teacher an update at 91.7."
        ),
    )
    offload_teachers: bool | str = field(
        default=AUTO,
        metadata=_help(
            "Keep each of several teachers in host memory until it is used; auto: where all of them and the student's training "
            "state would leave a step less than a quarter of the GPU."
        ),
    )
    teacher_update_rate: float = field(
        default=0.0,
        metadata=_help(
            "With teacher_model: student, the share by which the teacher moves to the student (EMA); 0: it stays the start."
        ),
    )
    teacher_sync_steps: int = field(default=1, metadata=_help("Steps between two moves by teacher_update_rate."))
    fully_shard: bool = field(
        default=False,
        metadata=_help("Shard student and teacher over all processes (FSDP2; docs/scale.md)."),
    )
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that comes with a model."))
    bridge: str | None = field(
        default=None, metadata=_help("Folder of a fitted bridge, for a teacher of another shape (oprd bridge fit).")
    )
    bridge_rank: int | None = field(
        default=None, metadata=_help("Directions of the bridge to use (default: the rank that it was saved with).")
    )

    # Datasets; {train: …, eval: …} where the two differ
    prompt_column: str | dict[str, str] | None = field(
        default=None,
        metadata=_help("Column of the prompt (`a.b`: nested); None: the usual names."),
    )
    answer_column: str | dict[str, str] | None = field(
        default=None,
        metadata=_help("Column of the answer; None: the usual names."),
    )
    answer_format: str | dict[str, str] | None = field(
        default=None,
        metadata=_help(f"How answers are written: {', '.join(FORMATS)}; None: plain."),
    )
    dataset_config: str | dict[str, str] | None = field(
        default=None, metadata=_help("Subset of a dataset; `name:subset` takes precedence.")
    )
    merge_system_prompt: bool = field(
        default=False,
        metadata=_help("Put system messages into the user's turn, for templates that refuse them."),
    )

    # Prompts and rollouts
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Arguments of the chat template, such as enable_thinking.")
    )
    chat_template_date: str | None = field(
        default=None,
        metadata=_help(
            "What a template prints as today's date (ISO); None: the date when the run begins, which it keeps."
        ),
    )
    teacher_chat_template_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata=_help("Render the teacher's prompts with its own chat template and these arguments ({} for none)."),
    )
    teacher_system_prompt: str | None = field(
        default=None, metadata=_help("System prompt of the teacher alone, in place of the row's.")
    )
    teacher_prompt: str | None = field(
        default=None,
        metadata=_help(
            "What the teacher reads in place of the prompt: a text with columns in braces, such as "
            "'{prompt} The answer is {answer}.', or '{teacher_prompt}' for that column."
        ),
    )
    special_token_map: dict[str, str] | None = field(
        default=None,
        metadata=_help("Student's special tokens and the teacher's of the same meaning, without end tokens."),
    )
    split_special_tokens: bool = field(
        default=True,
        metadata=_help("Read control tokens in plain prompts as text; false for prompts that are rendered already."),
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata=_help("Leave out (and count) prompts with more tokens. None: too long a prompt is an error."),
    )
    max_completion_length: int = field(default=512, metadata=_help("Maximum tokens of a rollout."))
    num_generations: int = field(default=1, metadata=_help("Rollouts per prompt."))
    temperature: float = field(default=1.0, metadata=_help("Sampling temperature; 1 is on-policy."))
    top_p: float = field(default=1.0, metadata=_help("Nucleus truncation; 1 is on-policy."))
    top_k: int = field(default=0, metadata=_help("Top-k truncation; 0 is on-policy."))
    min_p: float = field(
        default=0.0,
        metadata=_help("Tokens below this share of the most probable one's probability are not drawn; 0 is on-policy."),
    )
    rollout_engine: str = field(
        default="decode", metadata=_help(f"One of {', '.join(ENGINES)}, or module:attribute of your own.")
    )
    rollout_engine_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("Further arguments of the engine, such as gpu_memory_utilization of vllm.")
    )
    overlap_rollouts: bool = field(
        default=False,
        metadata=_help("Sample the next step's rollouts during the update, one step off-policy."),
    )
    lmbda: float | dict[str, Any] = field(
        default=1.0,
        metadata=_help(
            "Share of steps in which the student writes the rollouts, else the teacher; 1 is on-policy; may be a schedule."
        ),
    )
    generation_batch_size: int = field(default=64, metadata=_help("Completions generated together."))

    # The objective: representation_weight·L_OPRD + output_weight·L_OPD + policy_gradient_weight·L_GRPO (docs/objectives.md)
    representation_weight: float | dict[str, Any] = field(
        default=1.0, metadata=_help("Factor on the representation loss (Eq. 6); 0 is off; may be a schedule.")
    )
    output_space: str | None = field(
        default=None, metadata=_help(f"Output-space loss to add: {', '.join(OUTPUT_SPACE)}; None is off.")
    )
    output_weight: float | dict[str, Any] = field(
        default=1.0, metadata=_help("Factor on the output-space loss; may be a schedule.")
    )
    policy_gradient_weight: float | dict[str, Any] = field(
        default=0.0,
        metadata=_help("Factor on GRPO's loss, rewarded by task or reward_funcs; 0 is off; may be a schedule."),
    )
    crossfade_steps: int | None = field(
        default=None,
        metadata=_help("Fade linearly from the representation to the output-space loss over this many steps."),
    )
    objectives: list[Any] | None = field(
        default=None,
        metadata=_help(
            "Terms of your own to add: a list of {use: module:attribute, weight: 1.0, further arguments} (docs/extend.md)."
        ),
    )
    reduction: str = field(
        default="rollout", metadata=_help("rollout: all rollouts weigh the same; token: all response tokens do.")
    )

    # Its representation term
    layers: Any = field(default="all", metadata=_help(f"{', '.join(LAYERS)}, or a list of layers counted from 1."))
    layer_map: Any = field(
        default=None,
        metadata=_help(
            "For a student of another depth, same width and tokens: proportional, kept (a pruned student's own layers), [[student "
            "layer, teacher layer], …], or the teacher layer of each student layer."
        ),
    )
    positions: str = field(default="all", metadata=_help("Response positions: all, last, last_k, first_k."))
    position_k: int | None = field(default=None, metadata=_help("k of last_k and first_k."))
    normalize: bool = field(default=False, metadata=_help("Compare directions (2 − 2·cos) instead of raw states."))
    extrapolation: float = field(
        default=1.0,
        metadata=_help(
            "Match states past the teacher: h_T + (extrapolation − 1)·(h_T − h_base), weighed by 1/extrapolation² (RIDE); 1 is off."
        ),
    )

    end_of_turn: str = field(
        default="merge",
        metadata=_help(
            "merge: ids that end a text for either model are one event; by_id: they are different events; skip: do "
            "not distil where the end is predicted."
        ),
    )

    inside_tokens: str = field(
        default="skip",
        metadata=_help(
            "With a bridge across tokenizers, at positions inside a token of the teacher: skip, or interpolate its states "
            "(experimental)."
        ),
    )

    # Its output-space term
    output_positions: str = field(
        default="all", metadata=_help("Response positions of the output-space loss: all, last, last_k, first_k.")
    )
    output_position_k: int | None = field(default=None, metadata=_help("k of output_positions."))
    output_top_k: int = field(default=16, metadata=_help("Tokens in the support of top_k* and tail_sampled."))
    output_support: str = field(
        default="student",
        metadata=_help(
            "Whose likeliest tokens to use: student, teacher, union, intersection (tail_sampled: the first two)."
        ),
    )
    output_beta: float = field(
        default=0.5,
        metadata=_help("β of jsd, above 0 (like forward_kl) and below 1 (like reverse_kl)."),
    )
    output_baseline: bool = field(
        default=False, metadata=_help("sampled_token: subtract the closed-form baseline (less noise, one more pass).")
    )
    output_temperature: float | None = field(
        default=None, metadata=_help("Divides both models' logits (default: the sampling temperature).")
    )

    # Its policy-gradient term
    num_iterations: int = field(default=1, metadata=_help("Updates on each set of rollouts."))
    epsilon: float = field(default=0.2, metadata=_help("Clip range of the probability ratio."))
    epsilon_high: float | None = field(default=None, metadata=_help("Upper clip range (default: epsilon)."))
    scale_rewards: str = field(
        default="group", metadata=_help("group: divide advantages by the group's standard deviation; none: do not.")
    )

    micro_batch_tokens: int = field(
        default=16384,
        metadata=_help(
            "Maximum tokens of one forward and backward pass, with padding; memory grows with it. A longer rollout runs alone, and "
            "backward recomputes its blocks."
        ),
    )
    diagnostic_steps: int = field(
        default=10,
        metadata=_help("Steps between two measurements of entropy, top-16 overlap, sampled KL and cosine; 0: never."),
    )
    nan_policy: str = field(
        default="stop",
        metadata=_help("When loss or gradients are not finite: stop: end the run; skip: leave the step out and go on."),
    )
    max_skipped_steps: int = field(default=3, metadata=_help("Steps in a row that nan_policy=skip may leave out."))
    alarm_window: int = field(
        default=20,
        metadata=_help("Warn when cosine rises while accuracy or KL worsens over this many steps; 0: never."),
    )

    max_useless_steps: int = field(
        default=0,
        metadata=_help(
            "End after this many steps in a row whose completions are all empty, all cut off, or (policy gradient) rewarded "
            "alike; 0: never."
        ),
    )

    save_seconds: float | None = field(
        default=None, metadata=_help("Save a checkpoint when this long has passed since the last, besides save_steps.")
    )

    # Grading, evaluation, logs
    task: str | None = field(
        default=None,
        metadata=_help(
            f"How answers are graded: {', '.join(TASKS)}, or module:attribute of your own; None: they are not."
        ),
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata=_help(
            "Reward functions: a list of module:function with TRL's signature; `task` is the task's verdict (docs/extend.md)."
        ),
    )
    reward_weights: list[float] | None = field(
        default=None, metadata=_help("Weight of each reward function in the reward (default: 1 each).")
    )
    eval_num_generations: int = field(default=4, metadata=_help("Samples per problem (k of Avg@k)."))
    eval_temperature: float = field(default=0.7, metadata=_help("Sampling temperature of evaluation."))
    eval_top_p: float = field(default=0.95, metadata=_help("Nucleus truncation of evaluation."))
    eval_instruction: bool = field(
        default=True,
        metadata=_help("Append the task's instruction to problems that do not say how to answer (how many is logged)."),
    )
    eval_max_completion_length: int | None = field(
        default=None, metadata=_help("Maximum tokens of an evaluated completion (default: max_completion_length).")
    )
    log_completions: bool = field(
        default=True, metadata=_help("Write sampled completions to the run folder, and show some to `report_to`.")
    )
    num_completions_to_log: int = field(default=4, metadata=_help("Completions to write per logged step."))

    def __post_init__(self) -> None:
        _check_objective(self)
        _check_quantization(self)
        self._check_numbers()
        self._check_rollouts()
        self._take_older_spelling()
        self._check_training()
        chosen: str | None = getattr(self, "metric_for_best_model", None)
        if self.load_best_model_at_end and chosen is None:
            self.metric_for_best_model, self.greater_is_better = "eval_avg_at_k", True  # an evaluation here has no loss
        super().__post_init__()

    def _check_rollouts(self) -> None:
        for name in (
            "num_generations", "generation_batch_size", "eval_num_generations", "max_prompt_length",
            "per_device_train_batch_size", "gradient_accumulation_steps", "teacher_sync_steps",
        ):  # fmt: skip
            _check_at_least_one(self, name)
        check_per_prompt(self.teachers_per_prompt)
        check_offload(self.offload_teachers)
        abilities = engine_abilities(self.rollout_engine)
        if self.task is not None:
            get_task(self.task)
        _check_rewards(self)
        _check_datasets(self)
        if self.output_temperature is not None and not self.output_temperature > 0:
            raise ValueError(f"output_temperature: {self.output_temperature} is not allowed; it must be above 0")
        _ = self.prompt_rendering  # checks its settings
        if self.overlap_rollouts:
            _check_overlap(self, abilities.background)
        # Built once here so that a bad sampling value stops the run before any model is loaded.
        _ = self.sampling, self.eval_sampling

    def _take_older_spelling(self) -> None:
        """Take `gradient_checkpointing*`, the name before transformers 5.23, where `activation_checkpointing*` is not set."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        if self.activation_checkpointing_kwargs is None:
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs or {"use_reentrant": False}

    def _check_numbers(self) -> None:
        """Refuse NaN in any setting, numbers out of `RANGES`, and infinity where a step would multiply by it."""
        for setting in fields(self):
            value = getattr(self, setting.name, None)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{setting.name}: {value} is not allowed; a number")
        for name, allowed in RANGES.items():
            value = getattr(self, name, None)
            if isinstance(value, int | float) and not allowed.least <= value <= allowed.most:
                raise ValueError(f"{name}: {value} is not allowed; {allowed.text}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(
                f"max_steps: {self.max_steps} is not allowed; 1 or more, or -1 to train for num_train_epochs"
            )
        for name in ("learning_rate", "temperature", "eval_temperature"):
            value = getattr(self, name)
            if name == "learning_rate" and value == AUTO:
                continue
            if isinstance(value, str) or not math.isfinite(value):
                or_auto = f", or {AUTO}" if name == "learning_rate" else ""
                raise ValueError(f"{name}: {value} is not allowed; a finite number{or_auto}")

    def _check_training(self) -> None:
        if self.nan_policy not in NAN_POLICIES:
            raise ValueError(f"nan_policy: {self.nan_policy!r} is not one of {', '.join(NAN_POLICIES)}")
        _check_at_least_one(self, "max_skipped_steps")
        if getattr(self, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint: oprd saves a checkpoint on SIGTERM, SIGINT and SIGHUP itself; leave it out"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: must be False; a prompt is not an argument of the model's forward")
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "ddp_find_unused_parameters: must be False; what the loss does not reach is frozen already"
            )
        if self.save_on_each_node:
            raise ValueError(
                "save_on_each_node: must be False; one process writes output_dir, which all machines share"
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile: not supported (lengths change and hooks read states, so it compiles anew each time); leave it out"
            )
        if str(getattr(self.optim, "value", self.optim)).startswith(_OPTIMIZERS_OF_ANOTHER_STEP):
            raise ValueError(
                f"optim: {getattr(self.optim, 'value', self.optim)} is not supported (it needs calls inside transformers' own "
                "step); choose another, such as adamw_torch"
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

    def to_dict(self) -> dict[str, Any]:
        """The settings as trackers and `training_args.json` receive them, without secrets."""
        return redacted(super().to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_json_string()})"

    __str__ = __repr__

    @property
    def output_term(self) -> OutputTerm | None:
        """The output-space loss, None where it is off."""
        if self.output_space is None or not is_on(self.output_weight):
            return None
        return OutputTerm(
            self.output_space,
            self.output_top_k,
            self.output_support,
            self.output_beta,
            self.output_baseline,
            self.loss_temperature,
        )

    @property
    def loss_temperature(self) -> float:
        """What divides the logits of losses on next-token distributions."""
        return self.output_temperature if self.output_temperature is not None else self.temperature or 1.0

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """dtype of the student's products in training; None: that of its weights."""
        return torch.bfloat16 if self.bf16 else None

    @property
    def prompts_a_step(self) -> int:
        """Prompts of an update, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def student_writes(self) -> bool:
        """Whether the student writes the rollouts of every step."""
        return bounds(self.lmbda)[0] == 1

    @property
    def splits_weights(self) -> bool:
        """Whether no process has the whole student: `fully_shard`, accelerate's FSDP or DeepSpeed."""
        launched = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        asked = any(os.environ.get(flag, "").lower() in ("1", "true") for flag in launched)
        return bool(self.fully_shard or self.deepspeed) or asked

    @property
    def learns_from_rewards(self) -> bool:
        """Whether the policy gradient counts in some step."""
        return is_on(self.policy_gradient_weight)

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """Arguments of the rollout engine. Under bf16, vLLM computes in bfloat16, as the trainer's autocast does."""
        own = {"dtype": "bfloat16"} if self.rollout_engine in ("vllm", "vllm_server") and self.bf16 else {}
        return {"batch_size": self.generation_batch_size, **own, **(self.rollout_engine_kwargs or {})}

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are sampled."""
        return Sampling(self.max_completion_length, self.temperature, self.top_p, self.top_k, self.min_p)

    @property
    def eval_sampling(self) -> Sampling:
        """How evaluated completions are sampled."""
        length = self.eval_max_completion_length or self.max_completion_length
        return Sampling(length, self.eval_temperature, self.eval_top_p)

    @property
    def compared_positions(self) -> ComparedPositions:
        """The response positions at which the two models are compared."""
        return ComparedPositions(
            self.positions,
            self.position_k,
            self.output_positions,
            self.output_position_k,
            self.end_of_turn,  # type: ignore[arg-type]
            self.inside_tokens,  # type: ignore[arg-type]
        )

    @property
    def prompt_rendering(self) -> TeacherPromptSettings:
        """How the prompts of both models are rendered."""
        return TeacherPromptSettings.of(self)


def _check_rewards(config: OPRDConfig) -> None:
    """Import the reward functions that the settings name, and check their weights."""
    check_weights(config.reward_weights)
    if config.reward_funcs is not None:  # whether there is a task is not known here
        reward_functions(config.reward_funcs, None, config.reward_weights, graded=True)


def _check_datasets(config: OPRDConfig) -> None:
    """Check the settings that say how datasets are read: one value, or one for each of the two."""
    for name in ("prompt_column", "answer_column", "answer_format", "dataset_config"):
        value = getattr(config, name)
        if isinstance(value, dict) and not {*value} <= {*RUN_DATASETS}:
            raise ValueError(f"{name}: {value!r} is not allowed; one value, or {{train: …, eval: …}}")
        for kind in RUN_DATASETS:
            chosen = for_dataset(value, kind)
            if chosen is not None and not (isinstance(chosen, str) and chosen.strip()):
                raise ValueError(f"{name}: {chosen!r} is not allowed; a name, or leave it out")
            if name == "answer_format":
                check_format(chosen)


def _check_at_least_one(config: Any, name: str) -> None:
    """Refuse a count below 1; None passes.

    Raises:
        ValueError: names the key and the value.
    """
    value = getattr(config, name)
    if value is not None and value < 1:
        raise ValueError(f"{name}: {value} is not allowed; it must be at least 1")


def _check_objective(config: Any) -> None:
    """Check the settings of the loss. Whether they fit its terms is checked by `oprd.objectives.own.check_terms`.

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    check_positions(config.positions, config.position_k)
    check_positions(config.output_positions, config.output_position_k, ("output_positions", "output_position_k"))
    check_end_of_turn(config.end_of_turn)
    if isinstance(config.layers, str) and config.layers not in LAYERS:
        raise ValueError(f"layers: {config.layers!r} is not one of {', '.join(LAYERS)} nor a list of layer numbers")
    check_setting(config.layer_map)
    if config.layer_map is not None and config.bridge is not None:
        raise ValueError(
            f"layer_map: {config.layer_map!r} does not go with a bridge, which was fitted with a layer map of its own (oprd "
            "bridge fit --layer-map); leave one of the two out"
        )
    if config.reduction not in get_args(Reduction):
        raise ValueError(f"reduction: {config.reduction!r} is not one of {', '.join(get_args(Reduction))}")
    if config.reduction == "token" and config.gradient_accumulation_steps > 1:
        raise ValueError(
            f"gradient_accumulation_steps: {config.gradient_accumulation_steps} does not go with reduction='token', whose mean "
            "is over the tokens of the whole step; raise per_device_train_batch_size instead (micro_batch_tokens and "
            "generation_batch_size bound the memory)"
        )
    if config.inside_tokens not in get_args(InsideTokens):
        raise ValueError(f"inside_tokens: {config.inside_tokens!r} is not one of {', '.join(get_args(InsideTokens))}")
    if config.inside_tokens != "skip" and config.bridge is None:
        raise ValueError(
            f"inside_tokens: {config.inside_tokens!r} has no effect without a bridge; set bridge to its folder, or leave it at skip"
        )
    if config.bridge_rank is not None and config.bridge is None:
        raise ValueError(f"bridge_rank: {config.bridge_rank} has no effect without a bridge; set bridge to its folder")
    if not 1 <= config.extrapolation < math.inf:
        raise ValueError(
            f"extrapolation: {config.extrapolation} is not allowed; 1 (off) or more, such as 1.25 (the paper's)"
        )
    for name in ("micro_batch_tokens", "crossfade_steps", "num_iterations", "bridge_rank"):
        _check_at_least_one(config, name)
    for name in ("diagnostic_steps", "alarm_window", "max_useless_steps"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: {getattr(config, name)} is not allowed; 0 (never) or more")
    for name in ("representation_weight", "output_weight", "policy_gradient_weight"):
        check_weight(name, getattr(config, name))
    check_entries(config.objectives)
    _check_writer(config)
    check_clip(config.epsilon, config.epsilon_high)
    if config.scale_rewards not in get_args(Scale):
        raise ValueError(f"scale_rewards: {config.scale_rewards!r} is not one of {', '.join(get_args(Scale))}")
    _check_iterations(config)


def _check_quantization(config: Any) -> None:
    """Refuse what would read the student's full weights where its rounded ones are meant.

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    kind = config.student_quantization
    if kind is None:
        return
    if kind not in GRIDS:
        raise ValueError(
            f"student_quantization: {kind!r} is not one of {', '.join(GRIDS)}; leave it out for full weights"
        )
    if config.fully_shard or config.deepspeed:
        key = "fully_shard" if config.fully_shard else "deepspeed"
        raise ValueError(f"student_quantization: {kind} is not supported with {key}, which splits weights; use DDP")
    if config.rollout_engine in ("vllm", "vllm_server"):
        raise ValueError(
            f"student_quantization: {kind} does not go with rollout_engine={config.rollout_engine}, which would sample with the "
            "full weights; set rollout_engine: decode"
        )
    if "weights_dtype" in (config.rollout_engine_kwargs or {}):
        raise ValueError(
            f"student_quantization: {kind} does not go with weights_dtype in rollout_engine_kwargs: weights that are rounded "
            "twice are others; leave weights_dtype out"
        )


def _check_writer(config: Any) -> None:
    """Refuse a writer of the rollouts from whom the loss cannot learn."""
    if isinstance(config.lmbda, Mapping):
        check_weight("lmbda", config.lmbda)
    least, greatest = bounds(config.lmbda)
    if not 0 <= least <= greatest <= 1:
        raise ValueError(
            f"lmbda: {config.lmbda} is not allowed; a share from 0 (the teacher writes) to 1 (the student)"
        )
    kind = None if config.output_term is None else config.output_term.kind
    if least < 1 and (kind in ON_POLICY_KINDS or is_on(config.policy_gradient_weight)):
        raise ValueError(
            f"lmbda: {config.lmbda} is not allowed with output_space={', '.join(ON_POLICY_KINDS)} or "
            "policy_gradient_weight, whose gradients are expectations over the student's own tokens; set it to 1"
        )
    if kind == "cross_entropy" and least == 1:
        raise ValueError(
            "output_space: cross_entropy on the student's own tokens has no gradient in expectation; let the teacher write "
            "(lmbda: 0)"
        )


def _check_overlap(config: Any, engine_can: bool) -> None:
    """Refuse `overlap_rollouts` where the loss needs rollouts of the current weights, or the engine cannot sample in a thread.

    Args:
        config: the settings, with `overlap_rollouts` on.
        engine_can: whether the rollout engine may sample in another thread during the update (`can.background`).

    Raises:
        ValueError: names the key, the value, what is allowed.
    """
    kind = None if config.output_term is None else config.output_term.kind
    if kind in ON_POLICY_KINDS or is_on(config.policy_gradient_weight):
        raise ValueError(
            f"overlap_rollouts: not with output_space={', '.join(ON_POLICY_KINDS)} or policy_gradient_weight, whose "
            "gradients are expectations over tokens that the student of the same step has drawn; set it to false"
        )
    if bounds(config.lmbda)[0] < 1:
        raise ValueError(
            f"overlap_rollouts: not with lmbda={config.lmbda}, which lets the teacher write; set one of the two off"
        )
    if config.fully_shard:
        raise ValueError(
            "overlap_rollouts: not with fully_shard: no process has a copy of the student; set one of the two off"
        )
    if not engine_can:
        raise ValueError(
            f"overlap_rollouts: not with rollout_engine={config.rollout_engine}, which cannot sample in another thread during the "
            "update (can.background of its class is False); set it to decode or vllm_server, or overlap_rollouts to false"
        )


def refuse_settings_for_own_tokens(config: Any) -> None:
    """Refuse settings that are not supported with a teacher that reads its own prompts and tokens.

    Raises:
        ValueError: names the key and the value.
    """
    if bounds(config.lmbda)[0] < 1 and config.rollout_engine in ("vllm", "vllm_server"):
        raise ValueError(
            f"rollout_engine: {config.rollout_engine!r} holds one model, and with lmbda={config.lmbda} a teacher with its own "
            "prompts and tokens writes too; set rollout_engine to decode, or lmbda to 1"
        )
    for name, default in (("output_positions", "all"), ("end_of_turn", "merge")):
        if getattr(config, name) != default:
            raise ValueError(
                f"{name}: {getattr(config, name)!r} is not supported with a teacher that reads its own prompts and tokens (another "
                f"tokenizer, template or system prompt); leave it at {default!r}"
            )


def _check_iterations(config: Any) -> None:
    """Refuse a checkpoint or the end of training between two updates on the same rollouts."""
    if config.num_iterations == 1:
        return
    steps = {"max_steps": config.max_steps}
    if config.save_strategy == "steps":
        steps["save_steps"] = config.save_steps
    if config.save_strategy == "best" and config.eval_strategy == "steps":
        steps["eval_steps"] = config.eval_steps or config.logging_steps
    for name, value in steps.items():
        if value > 0 and value % config.num_iterations:
            raise ValueError(
                f"{name}: {value} is not allowed with num_iterations={config.num_iterations}: a checkpoint between two updates on "
                "the same rollouts could not be resumed from; take a multiple of it"
            )


def _documented(kind: type[Any]) -> str:
    """The class's docstring with a line for each of its settings, those of transformers last."""
    base = {setting.name for setting in fields(TrainingArguments)}
    lines: tuple[list[str], list[str]] = ([], [])
    for setting in fields(kind):
        text = " ".join(str(setting.metadata.get("help", "")).replace("%%", "%").split())
        lines[setting.name in base].append(f"    {setting.name}: {text or 'see TrainingArguments.'}")
    own, inherited = ("\n".join(part) for part in lines)
    return f"{cleandoc(kind.__doc__ or '')}\n\nArgs:\n{own}\n\nOf TrainingArguments:\n{inherited}\n"


OPRDConfig.__doc__ = _documented(OPRDConfig)
