"""`oprd doctor`: memory and time that a recipe needs, computed without loading a model."""

from __future__ import annotations

from typing import Annotated

import typer

from oprd.cli.options import JsonFile, check_json, write_report


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
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute for a CPU, where chunks of logits are smaller.")] = False,
    device_tflops: Annotated[
        float | None, typer.Option(help="10^12 operations per second (default: 989, H100 SXM, dense bfloat16).")
    ] = None,
    device_bandwidth: Annotated[
        float | None, typer.Option(help="Memory bandwidth, GB/s (default: 3350, H100 SXM).")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure operations and bandwidth on this machine.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Compute memory of each device and time of a step, without loading a model. Set any key of the recipe with --key value."""
    from oprd.cli.console import quiet_libraries, say
    from oprd.run_config import RunConfig, parse_overrides

    _check(dtype, device_tflops, device_bandwidth, measure)
    check_json(json_file)
    quiet_libraries()
    import torch

    from oprd.tools.doctor.show import examine, lines_of
    from oprd.tools.doctor.time import Device, measure_device
    from oprd.tools.doctor.workload import workload_of

    run = RunConfig.load_on_cpu(config, parse_overrides(context.args))
    if sharding is None and devices > 1:
        sharding = "fsdp" if run.args.fully_shard else "ddp"
    work = workload_of(
        run, prompt=prompt_length, devices=devices, sharding=sharding,
        bf16=None if dtype is None else dtype == "bfloat16", accelerator=not cpu,
    )  # fmt: skip
    if measure:
        place = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
        device = measure_device(torch.bfloat16 if work.bf16 else torch.float32, place)
    else:
        device = Device(device_tflops or Device.tflops, device_bandwidth or Device.bandwidth)
    found = examine(work, device)
    for line in lines_of(found, tuple({shape.family for shape in (work.student, work.teacher) if shape})):
        say(line)
    write_report(json_file, found)


def _check(dtype: str | None, tflops: float | None, bandwidth: float | None, measure: bool) -> None:
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype: {dtype!r} is not one of float32, bfloat16")
    for name, value in (("tflops", tflops), ("bandwidth", bandwidth)):
        if value is not None and value <= 0:
            raise ValueError(f"--device-{name}: {value} is not above 0")
    if measure and (tflops or bandwidth):
        raise ValueError(
            "--measure: it finds out what --device-tflops and --device-bandwidth say; give one or the other"
        )
