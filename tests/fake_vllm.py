"""A server on 127.0.0.1 that speaks the part of vLLM's interface that rollouts use; its tokens depend on the weights sent.

As a process of its own, which can be killed and can misbehave (see `FaultyProcess`):

    python fake_vllm.py PORT '{"/path": [{"status": 429, "headers": {"Retry-After": "1"}}, …]}'
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file  # no torch: the process starts in a moment

GENERATE = "/inference/v1/generate"


def total_of_weights(arrays: Iterable[np.ndarray]) -> int:
    """What the server keeps of its weights."""
    return sum(int(1000 * np.abs(array.astype(np.float64)).sum()) for array in arrays)


class FakeVLLM:
    """Completions are a function of the loaded weights' sum, the prompt and the seed.

    Args:
        port: 0 for a free one.
        faults: of a path, what its next requests get in place of an answer, one after the other (see `misbehave`); None: an answer.

    Attributes:
        fail: of a path, (status, answer) of every request, or a function of the body that returns them.
    """

    def __init__(self, port: int = 0, faults: dict[str, list[dict | None]] | None = None) -> None:
        self.version, self.total, self.limit = "default", 0, 128
        self.calls: list[tuple[str, dict]] = []
        self.keys: set[str | None] = set()
        self.fail: dict[str, object] = {}
        self.faults, self.taken = faults or {}, threading.Lock()
        self.die_after: int | None = None
        self.keeps_labels = True
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer({})

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                fake.calls.append((self.path, body))
                fake.keys.add(self.headers["Authorization"])
                if self.path == "/calls":  # of the tests, not vLLM's
                    return self.send(200, [path for path, _ in fake.calls])
                with fake.taken:
                    fault = fake.faults[self.path].pop(0) if fake.faults.get(self.path) else None
                if fault is not None:
                    return misbehave(self, fake, body, **fault)
                status, answer = fake.respond(self.path, body)
                if status is None:
                    self.close_connection = True
                    return None
                return self.send(status, answer)

            def send(self, status, answer, headers=None):
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "file:///etc/hostname")
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        """What a killed process forgets."""
        self.version, self.total = "default", 0

    def respond(self, path, body):
        failure = self.fail.get(path)
        if failure is not None:
            return failure(body) if callable(failure) else failure
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/v1/models":
            return 200, {"data": [{"id": "student", "max_model_len": self.limit}]}
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            file = Path(body["kwargs"]["weights_path"]) / "model.safetensors"
            if not file.is_file():
                return 500, {"error": "no such folder"}
            self.total = total_of_weights(load_file(file).values())
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"] if self.keeps_labels else "another"
            return 200, {"success": True}
        assert path == GENERATE
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after < 0:
                self.die_after = None
                self.restart()
                return None, None
        return 200, self.completion(body)

    def completion(self, body):
        sampling = body["sampling_params"]
        key = self.total + sum(body["token_ids"]) + sampling["seed"]
        ids = [4 + (key + i) % 5 for i in range(sampling["max_tokens"])]
        return {
            "choices": [{
                "token_ids": ids, "finish_reason": "length",
                "logprobs": {"content": [{"token_id": i, "logprob": -0.5 * i} for i in ids]},
                "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
            }]
        }  # fmt: skip


def misbehave(handler, fake: FakeVLLM, asked: dict, kind: str = "status", **how) -> None:
    """Answer a request badly.

    status: with `status`, `headers` and `body`. hang: not at all. trickle: the right answer, one byte in `pause` seconds, from the
    first byte of the head or (`head` false) of the body. half: half of the right answer. die: the process ends at once.
    """
    if kind == "status":
        return handler.send(how["status"], how.get("body", "no").encode(), how.get("headers"))
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(3600)
    data = json.dumps(fake.respond(handler.path, asked)[1]).encode()
    head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    try:
        if kind == "half":
            handler.wfile.write(head + data[: len(data) // 2])
        else:
            assert kind == "trickle"
            slow = head + data if how.get("head", True) else data
            handler.wfile.write((head + data)[: -len(slow)])
            for byte in slow:
                handler.wfile.write(bytes([byte]))
                time.sleep(how["pause"])
    except OSError:
        pass  # the client has left
    handler.close_connection = True
    return None


class FaultyProcess:
    """A `FakeVLLM` in a process of its own, which can be killed and started again on its port."""

    def __init__(self, faults: dict[str, list[dict | None]] | None = None) -> None:
        self.port = 0
        self.start(faults)

    def start(self, faults: dict[str, list[dict | None]] | None = None) -> None:
        command = [sys.executable, __file__, str(self.port), json.dumps(faults or {})]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with self.process.stdout as said:  # it says nothing more
            self.url = said.readline().strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def calls(self) -> list[str]:
        """Paths of the requests so far."""
        with urllib.request.urlopen(f"{self.url}/calls", timeout=60) as answer:
            return json.load(answer)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    print(FakeVLLM(int(sys.argv[1]), json.loads(sys.argv[2])).url, flush=True)
    while os.getppid() != 1:  # ends with the test that started it
        time.sleep(0.2)
