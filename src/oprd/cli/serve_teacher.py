"""`oprd serve-teacher`: send a model's hidden states to runs on other machines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from oprd.states.remote import TOKEN_ENV


def serve_teacher(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or embedded:tiny/teacher.")],
    port: Annotated[int, typer.Option(help="0: a free one.")] = 8100,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a token.")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token that clients must send; else {TOKEN_ENV} is read.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; without it, a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    bridge: Annotated[
        str | None, typer.Option(help="Folder of a bridge: states are sent through it, r numbers a position.")
    ] = None,
    bridge_rank: Annotated[
        int | None, typer.Option(help="Directions of the bridge (default: as it was saved).")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get 503 and a Retry-After.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds for a request, waiting included.")] = 600,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a request, padding included.")] = 131072,
    max_body_mib: Annotated[int, typer.Option(help="Most MiB of a request's body.")] = 64,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Serve a teacher's states: a run elsewhere names it with teacher_model: {url: …}. SIGTERM ends it cleanly."""
    from oprd.cli.console import quiet_libraries, say
    from oprd.states.remote.server import ServerLimits, TeacherServer, check_access

    quiet_libraries()
    token = _token(token_file)
    check_access(host, token)
    limits = ServerLimits(queue, max_body_mib * 2**20, timeout)
    from oprd.tools.teacher_server import load_service, serve_until_signal

    service = load_service(
        model, dtype=dtype, device=device, bridge=bridge, bridge_rank=bridge_rank, trust_remote_code=trust_remote_code,
        most_tokens=max_tokens, queue=queue,
    )  # fmt: skip
    server = TeacherServer(service, host, port, token, limits)
    served = service.served
    sent = f"{len(served.widths)} layers of {served.dtype}" + (f", through {bridge}" if bridge else "")
    say(f"serving {model} ({sent}) at {server.url}, {'with' if token else 'without'} a token")
    raise typer.Exit(128 + serve_until_signal(server))


def _token(file: Path | None) -> str:
    """The token: from a file, else from the environment; empty for none."""
    if file is None:
        return os.environ.get(TOKEN_ENV, "")
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {file}: it cannot be read ({type(error).__name__})") from None
    if not token:
        raise ValueError(f"--token-file {file}: it is empty")
    return token
