"""A teacher in another process: a small server holds the model, and `RemoteTeacher` requests hidden states from it.

Start the server, which loads the embedded teacher, then train:

    python examples/my_teacher.py 8123
    PYTHONPATH=examples oprd train --config tiny --eval_teacher false \\
        --teacher_model '{use: "my_teacher:RemoteTeacher", url: "http://127.0.0.1:8123"}'

This is the shortest such server; `oprd serve-teacher` is the shipped one, with a token, limits, retries and the LM head.

A teacher needs `info`, `identity`, `modules` and `states`. This one has no `head` and no `sampler`, so output-space losses, `lmbda`
below 1 and `eval_teacher` are refused when the run starts. Requests and answers are safetensors, which hold no code.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

import torch
from safetensors.torch import load, save

from oprd.models.loading import ModelInfo
from oprd.models.loading import load as load_named
from oprd.states.requests import StateRequest
from oprd.states.teachers import FrozenTeacher
from oprd.types import States

TENSORS = ("input_ids", "attention_mask", "position_ids", "flat_index", "rollout_index")


class RemoteTeacher:
    """Reads rollouts through a server. Its arguments are the keys of `teacher_model` other than `use`."""

    modules = ()  # no model in this process, so there is nothing to place or shard

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        facts = json.loads(self._ask("/info"))
        self.info = ModelInfo(**facts | {"stop_token_ids": tuple(facts["stop_token_ids"])})
        self.identity = f"{self.info.name} at {self.url}"

    def states(self, request: StateRequest) -> States:
        """The states of `request`: one tensor `[N, D]` for each of its layers, on the device of the request."""
        sent = {name: getattr(request, name).cpu() for name in TENSORS}
        sent |= {"layers": torch.tensor(request.layers), "num_rollouts": torch.tensor(request.num_rollouts)}
        found = load(self._ask("/states", save(sent)))
        values = tuple(found[str(layer)].to(request.input_ids.device) for layer in request.layers)
        return States(request.layers, values, request.rollout_index, request.num_rollouts)

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        try:
            with urlopen(self.url + path, data=body, timeout=60) as answer:
                return answer.read()
        except OSError as error:
            raise ConnectionError(f"teacher_model: {self.url}{path} does not answer: {error}") from error


def serve(name: str = "embedded:tiny/teacher", port: int = 0) -> ThreadingHTTPServer:
    """A server for a model on the loopback address; call `serve_forever`. With port 0, `server_address[1]` is the port."""
    loaded = load_named(name, dtype="auto")
    teacher = FrozenTeacher(loaded.model, loaded.info)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(json.dumps(asdict(teacher.info)).encode())

        def do_POST(self) -> None:
            sent = load(self.rfile.read(int(self.headers["Content-Length"])))
            facts = {"layers": tuple(sent["layers"].tolist()), "num_rollouts": int(sent["num_rollouts"])}
            found = teacher.states(StateRequest(**sent | facts))
            self._reply(save({str(layer): values for layer, values in zip(found.layers, found.values, strict=True)}))

        def _reply(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    serve(port=int(sys.argv[1])).serve_forever()
