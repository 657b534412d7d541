"""A server on 127.0.0.1 that speaks the part of vLLM's interface that rollouts use; its tokens depend on the weights sent."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safetensors.torch import load_file


class FakeVLLM:
    """Completions are a function of the loaded weights' sum, the prompt and the seed; `fail` maps a path to what goes wrong."""

    def __init__(self, port: int = 0) -> None:
        self.version, self.total, self.limit = "default", 0, 128
        self.calls: list[tuple[str, dict]] = []
        self.fail: dict[str, object] = {}
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
                status, answer = fake.respond(self.path, body)
                if status is None:
                    self.close_connection = True
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "file:///etc/hostname")
                self.send_header("Content-Length", str(len(data)))
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
            self.total = sum(int(1000 * tensor.double().abs().sum()) for tensor in load_file(file).values())
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"] if self.keeps_labels else "another"
            return 200, {"success": True}
        assert path == "/inference/v1/generate"
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
