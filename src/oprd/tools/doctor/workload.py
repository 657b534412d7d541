"""What is run: two shapes, how much is read at once, which terms the loss has, and how it is split across devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oprd.config import OPRDConfig
from oprd.objectives.schedules import is_on
from oprd.run_config import RunConfig
from oprd.states.layers import resolve_layers
from oprd.states.positions import select_positions
from oprd.tools.doctor.shape import Shape, read_shape

SHARDING = ("none", "ddp", "fsdp")
_LORA_RANK, _LORA_TARGETS = 8, ("q_proj", "v_proj")  # peft's defaults, for Llama and Qwen2


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Args:
        rank: r.
        targets: names of linear layers that have one.
    """

    rank: int = _LORA_RANK
    targets: tuple[str, ...] = _LORA_TARGETS


@dataclass(frozen=True)
class Workload:
    """One device's share of a training step. All lengths are the longest there can be: what is predicted is an upper end.

    Args:
        student: its shape; weights in float32.
        teacher: its shape; None: the student without its adapter.
        rollouts: of a step and device.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        micro_batch_tokens: most padded tokens of a forward and backward pass.
        layers: layers whose states are matched, ascending; () without a representation term or diagnostics.
        positions: matched positions of a completion.
        compared: its positions whose distributions are compared.
        bridge_rank: numbers that the teacher's states are projected to; None without a bridge.
        representation: whether there is a representation term.
        output_space: kind of the output-space term, or None.
        policy_gradient: whether there is one.
        diagnostics: whether some steps measure next-token distributions, whatever the loss.
        checkpointing: recompute activations.
        lora: the adapter, or None for full training.
        bf16: the student computes in bfloat16 (autocast).
        teacher_bytes: bytes of one of the teacher's weights and states.
        padded: rollouts of a micro-batch differ in length (an attention mask is needed).
        generation_batch: completions generated together.
        overlap: the next step's rollouts are sampled during the update.
        devices: how many.
        sharding: none, ddp (a copy a device) or fsdp (student and teacher split, as the setting fully_shard does).
        accelerator: not a CPU; chunks of logits are larger there.
    """

    student: Shape
    teacher: Shape | None
    rollouts: int = 32
    prompt: int = 256
    completion: int = 512
    micro_batch_tokens: int = 16384
    layers: tuple[int, ...] = ()
    positions: int = 512
    compared: int = 512
    bridge_rank: int | None = None
    representation: bool = True
    output_space: str | None = None
    policy_gradient: bool = False
    diagnostics: bool = False
    checkpointing: bool = False
    lora: Lora | None = None
    bf16: bool = False
    teacher_bytes: int = 4
    padded: bool = True
    generation_batch: int = 64
    overlap: bool = False
    devices: int = 1
    sharding: str = "none"
    accelerator: bool = True

    def __post_init__(self) -> None:
        if self.sharding not in SHARDING:
            raise ValueError(f"--sharding: {self.sharding!r} is not one of {', '.join(SHARDING)}")
        if self.devices < 1:
            raise ValueError(f"--devices: {self.devices} is not allowed; at least 1")
        if self.devices > 1 and self.sharding == "none":
            raise ValueError(
                f"--devices: {self.devices} with --sharding none; choose ddp (a copy each) or fsdp (split)"
            )

    @property
    def length(self) -> int:
        """Tokens that a model reads of a rollout: all but the last."""
        return self.prompt + self.completion - 1

    @property
    def rows(self) -> int:
        """Rollouts of a micro-batch."""
        return min(self.rollouts, max(1, self.micro_batch_tokens // self.length))

    @property
    def micro_batches(self) -> int:
        """Of a step."""
        return -(-self.rollouts // self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.length

    @property
    def head_term(self) -> bool:
        """Whether a term of the loss goes through the LM head."""
        return self.output_space is not None or self.policy_gradient

    @property
    def reads_head(self) -> bool:
        """Whether some step makes logits during the update."""
        return self.head_term or self.diagnostics

    @property
    def top(self) -> int:
        """Highest layer that is trained."""
        return self.student.layers if self.head_term else self.layers[-1]

    @property
    def top_run(self) -> int:
        """Highest layer that is run."""
        return self.student.layers if self.reads_head else self.top

    @property
    def trainable(self) -> int:
        """Parameters that get gradients."""
        if self.lora is None:
            return self.student.trainable(self.top, self.head_term)
        sizes = {name: inputs + outputs for name, inputs, outputs in self.student.linears}
        return self.top * self.lora.rank * sum(sizes[name] for name in self.lora.targets)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher reads the rollouts in some step."""
        return self.representation or self.output_space is not None or self.diagnostics


def workload_of(
    run: RunConfig,
    *,
    prompt: int | None = None,
    devices: int = 1,
    sharding: str | None = None,
    bf16: bool | None = None,
    accelerator: bool = True,
) -> Workload:
    """What a recipe runs on each device.

    Args:
        run: models, adapter and settings.
        prompt: tokens of the longest prompt; default max_prompt_length, else 256.
        devices: how many.
        sharding: none, ddp or fsdp; default none for one device, ddp for more.
        bf16: compute in bfloat16; default what the config says.
        accelerator: see `Workload`.

    Raises:
        ValueError: a config that cannot be read, an architecture that the formulas do not know, layers out of range, or an
            adapter on other layers than the block's projections.
    """
    config = run.args
    student = read_shape(run.model, trust_remote_code=config.trust_remote_code)
    teacher = None
    if run.teacher_model is not None:
        teacher = read_shape(run.teacher_model, trust_remote_code=config.trust_remote_code)
    compares = is_on(config.representation_weight) or config.diagnostic_steps > 0
    length = config.max_completion_length
    return Workload(
        student=student,
        teacher=teacher,
        rollouts=config.per_device_train_batch_size * config.num_generations,
        prompt=prompt or config.max_prompt_length or 256,
        completion=length,
        micro_batch_tokens=config.micro_batch_tokens,
        layers=resolve_layers(config.layers, student.layers) if compares else (),
        positions=len(select_positions(length, config.positions, config.position_k)),
        compared=len(select_positions(length, config.output_positions, config.output_position_k)),
        bridge_rank=_bridge_rank(config),
        representation=is_on(config.representation_weight),
        output_space=config.output_term.kind if config.output_term else None,
        policy_gradient=is_on(config.policy_gradient_weight),
        diagnostics=config.diagnostic_steps > 0,
        checkpointing=bool(config.activation_checkpointing),
        lora=_lora(run.lora),
        bf16=config.bf16 if bf16 is None else bf16,
        teacher_bytes=_teacher_bytes(config, student if teacher is None else teacher, teacher is None),
        generation_batch=config.generation_batch_size,
        overlap=config.overlap_rollouts,
        devices=devices,
        sharding=sharding or ("none" if devices == 1 else "ddp"),
        accelerator=accelerator,
    )


def _bridge_rank(config: OPRDConfig) -> int | None:
    if config.bridge is None:
        return None
    if config.bridge_rank is not None:
        return config.bridge_rank
    from oprd.bridge import Bridge

    return Bridge.load(config.bridge).rank


def _teacher_bytes(config: OPRDConfig, shape: Shape, is_student: bool) -> int:
    if is_student:  # without its adapter it is read in the student's precision
        return 4
    dtype = (config.teacher_model_init_kwargs or {}).get("dtype", "auto")
    if dtype == "auto":
        return shape.bytes_a_weight
    from oprd.models.loading import parse_dtype

    return parse_dtype(str(dtype)).itemsize


def _lora(settings: dict[str, Any] | None) -> Lora | None:
    if settings is None:
        return None
    targets = settings.get("target_modules") or _LORA_TARGETS
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    if targets == "all-linear":
        targets = known
    names = [targets] if isinstance(targets, str) else list(targets)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"lora: target_modules: {unknown[0]!r} is not one that oprd doctor can size; it knows {', '.join(known)} and all-linear"
        )
    return Lora(int(settings.get("r", _LORA_RANK)), tuple(names))
