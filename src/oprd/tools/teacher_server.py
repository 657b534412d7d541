"""Loads a model and serves its states (`oprd serve-teacher`)."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedTokenizerBase

from oprd.bridge import Bridge
from oprd.bridge.files import folder_digest
from oprd.bridge.teacher import BridgedTeacher
from oprd.models.fingerprint import fingerprint, tokenizer_digest, weights_checksum
from oprd.resolve import load
from oprd.states.capture import read_states
from oprd.states.layouts import check_layout, probe_layouts
from oprd.states.remote.server import TeacherServer, TeacherService
from oprd.states.remote.wire import TOKENIZER_FILES, ServedBridge, ServedTeacher
from oprd.states.requests import request_states
from oprd.states.teachers import FrozenTeacher, Teacher
from oprd.types import Rollouts

logger = logging.getLogger("oprd")


def load_service(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    bridge: str | None = None,
    bridge_rank: int | None = None,
    trust_remote_code: bool = False,
    most_tokens: int = 131072,
    queue: int = 16,
) -> TeacherService:
    """Load a model, check that its states do not depend on the padding, and return the service that answers requests.

    Args:
        name: folder, hub name or `embedded:…`.
        dtype: of the weights; "auto": of the checkpoint.
        device: such as "cuda:0"; None: a GPU if there is one.
        bridge: folder of a bridge that was fitted for this teacher: states are sent through it, r numbers a position.
        bridge_rank: directions of the bridge; None: the rank that it was saved with.
        trust_remote_code: run code that comes with the model.
        most_tokens: most tokens of a request, padding included.
        queue: most requests that wait.

    Raises:
        ValueError: a model that cannot be loaded or read in padded batches, a bridge for another one, or a number that is not
            allowed.
    """
    if most_tokens < 1:
        raise ValueError(f"--max-tokens: {most_tokens} is not allowed; at least 1")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load(name, dtype=dtype, trust_remote_code=trust_remote_code, device=device)
    assert loaded.tokenizer is not None, "a model that is loaded by name has one"
    layers = range(1, loaded.info.layers + 1)
    check_layout(probe_layouts(loaded.model, layers, read=read_states), "right")
    own = fingerprint(loaded.model, loaded.tokenizer, name)
    frozen = FrozenTeacher(loaded.model, loaded.info)
    teacher: Teacher = frozen
    through = None
    if bridge is not None:
        found = Bridge.load(bridge, teacher=own, rank=bridge_rank)
        through = ServedBridge(folder_digest(Path(bridge)), found.rank)
        projecting = BridgedTeacher(frozen, found, through.digest)
        projecting.to(device)
        teacher, layers = projecting, found.layers  # type: ignore[assignment]
    weight = next(loaded.model.parameters())
    widths, head_width = _widths(teacher, tuple(layers), weight.device)
    identity = f"{weights_checksum(loaded.model.named_parameters())} {own.config} {through}"
    served = ServedTeacher(
        loaded.info, hashlib.sha256(identity.encode()).hexdigest(), own, str(weight.dtype).removeprefix("torch."), widths,
        head_width, tokenizer_digest(loaded.tokenizer), most_tokens, through,
        {package: version(package) for package in ("oprd", "torch", "transformers")},
    )  # fmt: skip
    return TeacherService(teacher, served, tokenizer_files(loaded.tokenizer), loaded.model, queue=queue)


def _widths(teacher: Teacher, layers: tuple[int, ...], device: torch.device) -> tuple[dict[int, int], int]:
    """Width of each layer's states and of what the LM head reads: of one token, which also shows that the model runs."""
    one = Rollouts([[0]], [[0]], ["stop"], [""], [0])
    states = teacher.states(request_states(one, layers, head=True).to(device))
    assert states.head_MD is not None, "it was asked for"
    widths = {layer: values.shape[1] for layer, values in zip(states.layers, states.values, strict=True)}
    return widths, states.head_MD.shape[1]


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that `AutoTokenizer` makes a tokenizer of, by name."""
    with TemporaryDirectory(prefix="oprd-") as folder:
        tokenizer.save_pretrained(folder)
        files = {name: Path(folder) / name for name in TOKENIZER_FILES}
        return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def serve_until_signal(server: TeacherServer) -> int:
    """Answer requests until SIGTERM or SIGINT, finish the one that is computed, and return the signal's number."""
    received: list[int] = []
    asked = threading.Event()

    def stop(number: int, frame: object) -> None:
        if received:  # a second signal ends it at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(number)
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    thread = threading.Thread(target=server.serve, name="teacher server")
    thread.start()
    while not asked.wait(1):
        pass
    logger.info("%s: finishing the current request, dropping those that wait", signal.Signals(received[0]).name)
    server.stop()
    thread.join()
    return received[0]
