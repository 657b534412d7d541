"""The workload of one device: model shapes, batch sizes, loss terms, and sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oprd.config import OPRDConfig
from oprd.objectives.schedules import is_on
from oprd.objectives.terms import HeadTerm, LayerTerm
from oprd.run_config import RunConfig
from oprd.states.layer_maps import compared_layers
from oprd.states.positions import select_positions
from oprd.states.teacher_settings import BridgeSettings, bridges_of, is_student, model_here, model_of_entry
from oprd.tools.doctor.shape import Shape, read_shape

GPU_BYTES = 80e9
"""Memory of an H100 SXM."""
SHARDING = ("none", "ddp", "fsdp")
_LORA_RANK, _LORA_TARGETS = 8, ("q_proj", "v_proj")  # peft's defaults, for Llama and Qwen2


@dataclass(frozen=True)
class Lora:
    """An adapter.

    Args:
        rank: r.
        targets: names of the linear layers with an adapter.
    """

    rank: int = _LORA_RANK
    targets: tuple[str, ...] = _LORA_TARGETS


@dataclass(frozen=True)
class Workload:
    """One device's share of a training step. All lengths are maximum lengths, so predictions are upper bounds.

    Args:
        student: the student's shape.
        teacher: the teacher's shape; None: the teacher is the student without its adapter.
        base: shape of the base of an extrapolation past the teacher; None: there is none, or it is the student without its adapter.
        rollouts: rollouts of a batch, on a device.
        accumulation: batches of a step (gradient_accumulation_steps).
        prompt: tokens per prompt.
        completion: tokens per completion.
        micro_batch_tokens: maximum padded tokens of a forward and backward pass.
        layers: layers whose states are compared, ascending; () without a representation term and diagnostics.
        positions: positions per completion whose states are compared.
        compared: positions per completion whose next-token distributions are compared.
        bridge_rank: dimensions of the teacher's projected states; None without a bridge.
        compares_states: whether the loss has a term on hidden states.
        output_space: kind of the output-space term, or None.
        policy_gradient: whether the loss has a policy-gradient term.
        diagnostics: whether some steps measure next-token distributions in addition to the loss.
        checkpointing: whether activations are recomputed.
        lora: the adapter, or None for full training.
        bf16: whether the student computes in bfloat16 (autocast).
        student_bytes: bytes per element of the student's weights; an adapter has 4.
        teacher_bytes: bytes per element of the teacher's weights and states.
        base_bytes: bytes per element of the base's.
        padded: whether rollouts of a micro-batch differ in length, which needs an attention mask.
        generation_batch: completions generated together.
        prompt_readers: completions of a prompt that share one reading of it.
        overlap: whether the next step's rollouts are sampled during the update.
        devices: number of devices.
        sharding: none, ddp (a copy per device) or fsdp (student and teacher split, like the setting fully_shard).
        accelerator: whether the device is not a CPU; accelerators use larger chunks of logits.
        several: teacher_id → bytes of the weights, where there are several teachers; `teacher` is the largest of them. A model
            named under two ids is counted once, under the first.
        offload: only one of them is on the device at a time; "auto": as `oprd.states.offload` chooses.
        device_bytes: memory of the device, for that choice.
        eager: the student keeps its attention maps for backward (attn_implementation: eager).
        attention_layers: layers whose attention rows the loss compares.
    """

    student: Shape
    teacher: Shape | None
    rollouts: int = 32
    accumulation: int = 1
    prompt: int = 256
    completion: int = 512
    micro_batch_tokens: int = 16384
    layers: tuple[int, ...] = ()
    positions: int = 512
    compared: int = 512
    bridge_rank: int | None = None
    compares_states: bool = True
    output_space: str | None = None
    policy_gradient: bool = False
    diagnostics: bool = False
    checkpointing: bool = False
    lora: Lora | None = None
    bf16: bool = False
    student_bytes: int = 4
    teacher_bytes: int = 4
    base_bytes: int = 4
    padded: bool = True
    generation_batch: int = 64
    prompt_readers: int = 1
    overlap: bool = False
    devices: int = 1
    sharding: str = "none"
    accelerator: bool = True
    several: Mapping[str, float] = field(default_factory=dict)
    offload: bool | str = False
    device_bytes: float = GPU_BYTES
    base: Shape | None = None
    eager: bool = False
    attention_layers: int = 0

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
        """Tokens that a model reads per rollout: all but the last."""
        return self.prompt + self.completion - 1

    @property
    def rows(self) -> int:
        """Rollouts per micro-batch."""
        return min(self.rollouts, max(1, self.micro_batch_tokens // self.length))

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step."""
        return self.accumulation * -(-self.rollouts // self.rows)

    @property
    def tokens(self) -> int:
        """Padded tokens per micro-batch."""
        return self.rows * self.length

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what the student's matrix products read."""
        return 2 if self.bf16 else self.student_bytes

    @property
    def head_term(self) -> bool:
        """Whether a loss term uses the LM head."""
        return self.output_space is not None or self.policy_gradient

    @property
    def reads_head(self) -> bool:
        """Whether some step computes logits during the update."""
        return self.head_term or self.diagnostics

    @property
    def top(self) -> int:
        """The highest trained layer."""
        return self.student.layers if self.head_term else self.layers[-1]

    @property
    def top_run(self) -> int:
        """The highest layer that the update runs."""
        return self.student.layers if self.reads_head else self.top

    @property
    def trainable(self) -> int:
        """Number of parameters with gradients."""
        if self.lora is None:
            return self.student.trainable(self.top, self.head_term)
        sizes = {name: inputs + outputs for name, inputs, outputs in self.student.linears}
        return self.top * self.lora.rank * sum(sizes[name] for name in self.lora.targets)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher reads the rollouts in some step."""
        return self.compares_states or self.output_space is not None or self.diagnostics


def workload_of(
    run: RunConfig,
    *,
    prompt: int | None = None,
    devices: int = 1,
    sharding: str | None = None,
    bf16: bool | None = None,
    accelerator: bool = True,
    device_bytes: float = GPU_BYTES,
) -> Workload:
    """The workload of a recipe on each device.

    Args:
        run: models, adapter and settings.
        prompt: tokens of the longest prompt; default: max_prompt_length, else 256.
        devices: number of devices.
        sharding: none, ddp or fsdp; default: none for one device, ddp for more.
        bf16: compute in bfloat16; default: as in the config.
        accelerator: see `Workload`.
        device_bytes: see `Workload`.

    Raises:
        ValueError: a model config cannot be read, the formulas do not cover its architecture, a layer is out of range, or the
            adapter targets layers other than the block's projections.
    """
    config = run.args
    own = config.model_init_kwargs or {}
    student = read_shape(run.model, own, trust_remote_code=config.trust_remote_code)
    student_bytes = _weight_bytes(own.get("dtype", "float32"), student)
    teacher, teacher_bytes, several = _teachers(run, student, student_bytes)
    base, base_bytes = _base(run, student, student_bytes)
    own_terms = _own_terms(run)
    compares = config.diagnostic_steps > 0 or _on_states(config, own_terms)
    length = config.max_completion_length
    longest_prompt = prompt or config.max_prompt_length or 256
    above_budget = (
        longest_prompt + length - 1 > config.micro_batch_tokens
    )  # then the trainer runs blocks again in any case
    return Workload(
        student=student,
        teacher=teacher,
        rollouts=config.per_device_train_batch_size * config.num_generations,
        accumulation=config.gradient_accumulation_steps,
        prompt=longest_prompt,
        completion=length,
        micro_batch_tokens=config.micro_batch_tokens,
        layers=compared_layers(config.layer_map, config.layers, student.layers) if compares else (),
        positions=len(select_positions(length, config.positions, config.position_k)),
        compared=len(select_positions(length, config.output_positions, config.output_position_k)),
        bridge_rank=_bridge_rank(run),
        compares_states=_on_states(config, own_terms),
        output_space=config.output_term.kind if config.output_term else _kind_of(own_terms),
        policy_gradient=is_on(config.policy_gradient_weight),
        diagnostics=config.diagnostic_steps > 0,
        checkpointing=bool(config.activation_checkpointing) or above_budget,
        lora=_lora(run.lora),
        bf16=config.bf16 if bf16 is None else bf16,
        student_bytes=student_bytes,
        teacher_bytes=teacher_bytes,
        several=several,
        offload=config.offload_teachers,
        device_bytes=device_bytes,
        base=base,
        base_bytes=base_bytes,
        eager=own.get("attn_implementation") == "eager",
        attention_layers=_attention_layers(run),
        generation_batch=config.generation_batch_size,
        prompt_readers=config.num_generations if config.rollout_engine == "decode" else 1,
        overlap=config.overlap_rollouts,
        devices=devices,
        sharding=sharding or ("none" if devices == 1 else "ddp"),
        accelerator=accelerator,
    )


def _own_terms(run: RunConfig) -> list[Any]:
    """The objectives that the recipe names."""
    if not run.args.objectives:
        return []
    from oprd.resolve.terms import build_terms

    return [term.objective for term in build_terms(run).values()]


def _on_states(config: OPRDConfig, terms: Sequence[Any]) -> bool:
    """Whether some objective reads hidden states."""
    return is_on(config.representation_weight) or any(isinstance(term, LayerTerm) for term in terms)


def _kind_of(terms: Sequence[Any]) -> str | None:
    """An own objective on next-token distributions is counted as a divergence over the whole vocabulary."""
    return "reverse_kl" if any(isinstance(term, HeadTerm) for term in terms) else None


def not_counted(run: RunConfig) -> list[str]:
    """Settings of a run that change memory or time, and that the formulas leave out."""
    args, lora = run.args, run.lora or {}
    kwargs = [args.model_init_kwargs, args.teacher_model_init_kwargs]
    found = {
        "num_iterations": args.num_iterations > 1, "lmbda": not args.student_writes,
        "optim": not str(getattr(args.optim, "value", args.optim)).startswith("adamw_torch"),
        "student_quantization": args.student_quantization is not None,
        "quantization_config": any("quantization_config" in (own or {}) for own in kwargs),
        "lora: modules_to_save": bool(lora.get("modules_to_save")),
        "lora: layers_to_transform": bool(lora.get("layers_to_transform")),
        "rollout_engine_kwargs: weights_dtype": "weights_dtype" in (args.rollout_engine_kwargs or {}),
    }  # fmt: skip
    return [name for name, is_set in found.items() if is_set]


def _attention_layers(run: RunConfig) -> int:
    if not run.args.objectives:
        return 0
    from oprd.resolve.attention import attention_layers
    from oprd.resolve.terms import build_terms

    return len(attention_layers(build_terms(run)))


def _teachers(run: RunConfig, student: Shape, student_bytes: int) -> tuple[Shape | None, int, dict[str, float]]:
    """The teacher's shape, or the largest one's of several; bytes of its weights; and bytes of the weights of each of several."""
    others = run.args.teacher_model_init_kwargs
    if run.teachers is None:
        if is_student(run.teacher_model):
            copied = run.args.teacher_update_rate > 0 or run.lora is None
            return student if copied else None, student_bytes, {}
        if run.teacher_model is None:
            return None, student_bytes, {}
        return *_shape_of_teacher(run, run.teacher_model, others), {}
    found: dict[str, tuple[Shape, int]] = {}
    several: dict[str, float] = {}
    seen = set()
    for teacher_id, entry in run.teachers.items():
        name, init_kwargs = model_of_entry(entry, others)
        shape, width = found[teacher_id] = _shape_of_teacher(run, name, init_kwargs)
        several[teacher_id] = 0.0 if (key := repr((name, init_kwargs))) in seen else float(width * shape.parameters)
        seen.add(key)
    return *found[max(several, key=lambda name: several[name])], several


def _shape_of_teacher(run: RunConfig, teacher: Any, init_kwargs: Mapping[str, Any] | None) -> tuple[Shape, int]:
    name = model_here(teacher) if isinstance(teacher, Mapping) else teacher
    if name is None:
        raise ValueError(
            "teacher_model: the doctor reads sizes from a config file, and this teacher has none here; name a model of its size"
        )
    given = dict(init_kwargs or {})
    shape = read_shape(name, given, trust_remote_code=run.args.trust_remote_code)
    return shape, _weight_bytes(given.get("dtype", "auto"), shape)


def _base(run: RunConfig, student: Shape, student_bytes: int) -> tuple[Shape | None, int]:
    """Shape and bytes a weight of what an extrapolation past the teacher keeps in memory besides the other two models."""
    if run.args.extrapolation == 1 or (run.base_model is None and run.lora is not None):
        return None, student_bytes
    if run.base_model is None:
        return student, student_bytes
    base = read_shape(run.base_model, trust_remote_code=run.args.trust_remote_code)
    return base, _weight_bytes((run.args.teacher_model_init_kwargs or {}).get("dtype", "auto"), base)


def _bridge_rank(run: RunConfig) -> int | None:
    """The rank of the states that are kept; of several teachers the largest, None where one has no bridge."""
    config, several = run.args, bridges_of(run.teachers)
    if config.bridge is not None:
        return _rank_of(BridgeSettings(config.bridge, config.bridge_rank))
    if not several or len(several) < len(run.teachers or {}):
        return None
    return max(map(_rank_of, several.values()))


def _rank_of(bridge: BridgeSettings) -> int:
    if bridge.rank is not None:
        return bridge.rank
    from oprd.bridge import Bridge

    return Bridge.load(bridge.folder).rank


def _weight_bytes(dtype: object, shape: Shape) -> int:
    """Bytes per weight of a model loaded with this `dtype`; "auto": as in the checkpoint."""
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
            f"lora: target_modules: oprd doctor has no size for {unknown[0]!r}; it supports {', '.join(known)} and all-linear"
        )
    return Lora(int(settings.get("r", _LORA_RANK)), tuple(names))
