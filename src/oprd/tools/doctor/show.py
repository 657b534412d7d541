"""Show the doctor's estimates as text lines, as JSON, and as the table of well-known sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from oprd.tools.doctor.advice import advise
from oprd.tools.doctor.memory import predict_memory, teachers_wait
from oprd.tools.doctor.shape import CHECKED, KNOWN, known_shape
from oprd.tools.doctor.time import Device, predict_seconds
from oprd.tools.doctor.workload import GPU_BYTES, Workload

DEVICE_COUNTS = (1, 8, 64)
_PARTS = ("student weights", "gradients", "optimizer", "teacher weights", "activations", "state cache",
          "vocabulary chunks", "rollout KV cache", "base weights", "copy that samples")  # fmt: skip


def examine(work: Workload, device: Device, *, allowed: Callable[[str], bool] = lambda setting: True) -> dict[str, Any]:
    """All estimates: `parts`, `phases` and `peak` in bytes, `peak_phase`, `advice`, `seconds` per phase, `assumed`.

    Args:
        work: the workload.
        device: its speed.
        allowed: whether the run accepts a setting that may be advised.
    """
    memory = predict_memory(work)
    return {
        "parts": memory.parts,
        **_several(work),
        "phases": memory.phases,
        "peak": memory.peak,
        "peak_phase": memory.peak_phase,
        "advice": [{"setting": a.setting, "peak": a.peak} for a in advise(work, allowed=allowed)],
        "seconds": predict_seconds(work, device),
        "assumed": {
            "prompt": work.prompt, "completion": work.completion, "rollouts": work.rollouts * work.accumulation,
            "devices": work.devices,
            "sharding": work.sharding, "micro_batch_rollouts": work.rows, "micro_batches": work.micro_batches,
            "compute": "bfloat16" if work.compute_bytes == 2 else "float32",
            "student_bytes": work.student_bytes, "tflops": device.tflops, "bandwidth": device.bandwidth,
            "flops_share": device.flops_share, "bandwidth_share": device.bandwidth_share,
        },
        **({"this_machine": asdict(device)} if device.threads else {}),
    }  # fmt: skip


def _several(work: Workload) -> dict[str, Any]:
    """The weights of several teachers, and where they wait; nothing where there is one."""
    if not work.several:
        return {}
    waits, why = teachers_wait(work)
    return {"teachers": dict(work.several), "offloaded": waits, "offload_teachers": why}


def lines_of(found: dict[str, Any], families: tuple[str, ...]) -> list[str]:
    """The estimates as text lines for a terminal."""
    assumed = found["assumed"]
    lines = [
        f"computed, not measured: {assumed['rollouts']} rollouts a step and device, prompts of {assumed['prompt']} and completions "
        f"of {assumed['completion']} tokens, {assumed['micro_batch_rollouts']} rollouts a micro-batch, {assumed['compute']}, "
        f"student weights of {assumed['student_bytes']} bytes, {assumed['devices']} device(s), sharding {assumed['sharding']}",
        "",
        "memory of a device, by part (each at its largest)",
    ]
    lines += [f"  {name:<20} {_size(found['parts'][name])}" for name in _PARTS if name in found["parts"]]
    lines += _teacher_lines(found)
    lines += ["", "memory of a device, by phase"]
    for name, size in found["phases"].items():
        lines.append(f"  {name:<20} {_size(size)}{'   <- the peak' if name == found['peak_phase'] else ''}")
    lines += ["", "what would lower the peak" if found["advice"] else "no single setting would lower the peak by 2 %"]
    lines += [f"  {_size(a['peak'])} with {a['setting']}" for a in found["advice"]]
    seconds = found["seconds"]
    split = ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items())
    estimate = f"time of a step, an estimate: {sum(seconds.values()):.3g} s ({split})"
    if device := found.get("this_machine"):
        lines += ["", _machine_line(device, assumed["compute"]), estimate]
    else:
        lines += [
            "",
            f"{estimate} at {assumed['tflops']:.4g} TFLOPS x {assumed['flops_share']:.0%} and "
            f"{assumed['bandwidth']:.4g} GB/s x {assumed['bandwidth_share']:.0%}",
        ]
    if unknown := sorted(set(families) - set(CHECKED)):
        lines.append(f"the formulas were checked on {', '.join(CHECKED)} only, not on {', '.join(unknown)}")
    if left_out := found.get("not_counted"):
        lines.append(f"not counted: {', '.join(left_out)}")
    return lines


def _teacher_lines(found: dict[str, Any]) -> list[str]:
    """The weights of each of several teachers."""
    if not (several := found.get("teachers")):
        return []
    where = "each in host memory until it is used" if found["offloaded"] else "all on the device"
    return [
        "", f"weights of the teachers ({where}; offload_teachers: {found['offload_teachers']})",
        *(f"  {name:<20} {_size(size) if size else '   shared with one above'}" for name, size in several.items()),
    ]  # fmt: skip


def _machine_line(device: dict[str, Any], compute: str) -> str:
    return (
        f"this machine, {device['threads']} thread(s): {1000 * device['tflops']:.3g} GFLOP/s {compute}, "
        f"{device['bandwidth']:.3g} GB/s of weights in a decoding step, {device['written']:.3g} GB/s written, "
        f"{1000 * device['layer_seconds']:.2g} ms to start a block"
    )


def _size(size: float) -> str:
    return f"{size / 1e9:9.2f} GB" if size >= 1e9 else f"{size / 1e6:9.1f} MB"


def known_workload(size: str, devices: int) -> Workload:
    """The workload of the table of well-known sizes: a teacher of the same size, all layers, checkpointing, bfloat16."""
    shape = known_shape(size)
    return Workload(
        student=shape, teacher=shape, rollouts=16, prompt=512, completion=2048, micro_batch_tokens=16384,
        layers=tuple(range(1, shape.layers + 1)), positions=2048, compared=2048, checkpointing=True, bf16=True,
        teacher_bytes=shape.bytes_a_weight, generation_batch=16, devices=devices,
        sharding="fsdp" if devices > 1 else "none",
    )  # fmt: skip


def known_table() -> str:
    """Table of well-known student sizes on 1, 8 and 64 devices, as Markdown."""
    head = "| student | devices | weights | gradients, optimizer | teacher | activations | states | rollout | peak | fits 80 GB |"
    rows = [head, "| " + " | ".join(["---"] * 10) + " |"]
    for size in KNOWN:
        for devices in DEVICE_COUNTS:
            memory = predict_memory(known_workload(size, devices))
            parts = memory.parts
            cells = [
                parts["student weights"], parts["gradients"] + parts["optimizer"], parts["teacher weights"],
                parts["activations"], parts["state cache"], parts["rollout KV cache"], memory.peak,
            ]  # fmt: skip
            shown = " | ".join(f"{cell / 1e9:.1f}" for cell in cells)
            rows.append(
                f"| {size} | {devices} | {shown} ({memory.peak_phase}) | {'yes' if memory.peak <= GPU_BYTES else 'no'} |"
            )
    return "\n".join(rows)
