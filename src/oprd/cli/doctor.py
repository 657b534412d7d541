"""`oprd doctor`: memory and time that a recipe needs, computed without loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from oprd.cli.options import JsonFile, check_json, write_report

if TYPE_CHECKING:
    from oprd.tools.doctor.time import Device
    from oprd.tools.doctor.workload import Workload


def doctor(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="Recipe: a YAML file, or the name of a shipped one (tiny).")],
    devices: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(help="none, ddp (a copy on each device), fsdp (split). Default: by devices and fully_shard."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16, in which the student computes (default: the recipe's bf16)."),
    ] = None,
    prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest prompt (default: max_prompt_length, else 256).")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="For this machine's CPU, measured for two seconds (default with use_cpu).")
    ] = False,
    device_tflops: Annotated[
        float | None,
        typer.Option(
            help="10^12 operations per second (default: 989, H100 SXM, dense bfloat16); instead of measuring."
        ),
    ] = None,
    device_bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth, GB/s (default: 3350, H100 SXM); instead of measuring.")
    ] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="Memory of the device, GB (default: 80, H100 SXM), for offload_teachers: auto.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine: its GPU, or without one its CPU.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Compute memory of each device and time of a step, without loading a model. Set any key of the recipe with --key value."""
    from oprd.cli.console import quiet_libraries, say
    from oprd.run_config import RunConfig, parse_overrides

    check_json(json_file)
    overrides = parse_overrides(context.args)
    cpu = cpu or RunConfig.asks_for_cpu(config, overrides)
    _check(dtype, device_tflops, device_bandwidth, measure, cpu, device_memory)
    quiet_libraries()
    from oprd.tools.doctor.advice import allowed_in
    from oprd.tools.doctor.show import examine, lines_of
    from oprd.tools.doctor.workload import not_counted, workload_of

    run = RunConfig.load_on_cpu(config, overrides)
    if sharding is None and devices > 1:
        sharding = "fsdp" if run.args.fully_shard else "ddp"
    work = workload_of(
        run, prompt=prompt_length, devices=devices, sharding=sharding,
        bf16=None if dtype is None else dtype == "bfloat16", accelerator=not cpu,
        device_bytes=_device_bytes(device_memory, measure and not cpu),
    )  # fmt: skip
    device = _device(work, cpu, device_tflops, device_bandwidth, measure, run.args.rollout_engine)
    found = {**examine(work, device, allowed=allowed_in(config, overrides)), "not_counted": not_counted(run)}
    for line in lines_of(found, tuple({shape.family for shape in (work.student, work.teacher) if shape})):
        say(line)
    write_report(json_file, found)


def _device_bytes(gigabytes: float | None, measure: bool) -> float:
    """Memory of the device that was described, or of this machine's GPU."""
    import torch

    from oprd.states.offload import device_bytes
    from oprd.tools.doctor.workload import GPU_BYTES

    here = device_bytes(torch.device("cuda")) if measure and torch.cuda.is_available() else None
    return 1e9 * gigabytes if gigabytes else here or GPU_BYTES


def _device(
    work: Workload, cpu: bool, tflops: float | None, bandwidth: float | None, measure: bool, engine: str
) -> Device:
    """The device that was described, or this machine, measured."""
    from oprd.tools.doctor.probe import measure_machine
    from oprd.tools.doctor.time import Device

    if cpu and tflops and bandwidth:
        return Device(tflops, bandwidth, 1.0, 1.0)
    if cpu or measure:
        return measure_machine(work, engine, cpu=cpu)
    return Device(tflops or Device.tflops, bandwidth or Device.bandwidth)


def _check(
    dtype: str | None,
    tflops: float | None,
    bandwidth: float | None,
    measure: bool,
    cpu: bool,
    memory: float | None,
) -> None:
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype: {dtype!r} is not one of float32, bfloat16")
    given = {"tflops": tflops, "bandwidth": bandwidth}
    for name, value in {**given, "memory": memory}.items():
        if value is not None and value <= 0:
            raise ValueError(f"--device-{name}: {value} is not above 0")
    if measure and (tflops or bandwidth):
        raise ValueError(
            "--measure: it finds out what --device-tflops and --device-bandwidth say; give one or the other"
        )
    if cpu and bool(tflops) != bool(bandwidth):
        one, other = sorted(given, key=lambda name: given[name] is None)
        raise ValueError(
            f"--device-{one}: {given[one]} alone does not describe a CPU; give --device-{other} too, or neither to measure this one"
        )
