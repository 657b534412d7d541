"""A process between a run and its teacher's server, which can be killed and can misbehave. It imports no torch, to start at once.

    python teacher_proxy.py PORT UPSTREAM '{"/states": [null, {"kind": "hang"}, …]}'

Of a path, its faults are what the next requests get in place of an answer, one after the other; null: an answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from safetensors.numpy import load, save

SHA256, IDENTITY = "x-oprd-sha256", "x-oprd-identity"


def changed(body: bytes, how: str) -> bytes:
    """A lie about the states."""
    found = load(body)
    first = sorted(found)[0]
    if how == "rows":
        found = {name: values[:-1] for name, values in found.items()}
    elif how == "width":
        found[first] = np.ascontiguousarray(found[first][:, :-1])
    elif how == "lacking":
        del found[first]
    elif how == "dtype":
        found = {name: values.astype(np.float16) for name, values in found.items()}
    elif how == "extra":
        found["99"] = found[first]
    elif how == "nan":
        found[first][0, 0] = np.nan
    return save(found)


def next_of(faults: list[dict | None] | None) -> dict | None:
    """The next fault; one with `times` is that for so many requests."""
    if not faults:
        return None
    fault = faults[0]
    if fault is None or fault.get("times", 1) == 1:
        return faults.pop(0)
    fault["times"] -= 1
    return fault


class Proxy:
    """Sends requests on, but for its faults."""

    def __init__(self, port: int, upstream: str, faults: dict[str, list[dict | None]]) -> None:
        self.calls: list[str] = []
        taken, proxy = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body):
                if self.path == "/calls":
                    return self.send(200, {}, json.dumps(proxy.calls).encode())
                with taken:
                    proxy.calls.append(self.path)
                    fault = next_of(faults.get(self.path))
                kind = (fault or {}).get("kind", "")
                if kind == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "hang":
                    time.sleep(3600)
                if kind == "status":
                    return self.send(fault["status"], fault.get("headers", {}), b"no")
                headers, content = self.upstream(body)
                if kind == "lie":
                    content = changed(content, fault["how"])
                    headers[SHA256] = hashlib.sha256(content).hexdigest()
                elif kind == "flip":
                    content = content[:-1] + bytes([content[-1] ^ 64])
                elif kind == "identity":
                    headers[IDENTITY] = "f" * 64
                elif kind == "junk":
                    content = b"<html>"
                    headers[SHA256] = hashlib.sha256(content).hexdigest()
                return self.send(200, headers, content, half=kind == "half")

            def upstream(self, body):
                kept = {n: v for n, v in self.headers.items() if n.lower() in ("authorization", "content-type")}
                asked = urllib.request.Request(upstream + self.path, body, kept)
                with urllib.request.urlopen(asked, timeout=60) as found:
                    return {n: found.headers[n] for n in (SHA256, IDENTITY)}, found.read()

            def send(self, status, headers, content, half=False):
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if half else content)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


class ProxyProcess:
    """A `Proxy` in a process of its own, which can be killed and started again on its port."""

    def __init__(self, upstream: str, faults: dict[str, list[dict | None]] | None = None) -> None:
        self.port, self.upstream, self.process = 0, upstream, None
        self.start(faults)

    def start(self, faults: dict[str, list[dict | None]] | None = None) -> None:
        if self.process is not None:
            self.process.wait()
        command = [sys.executable, __file__, str(self.port), self.upstream, json.dumps(faults or {})]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with self.process.stdout as said:
            self.url = said.readline().strip()
        self.port = int(self.url.rsplit(":", 1)[1])

    def calls(self) -> list[str]:
        """Paths of the requests so far."""
        with urllib.request.urlopen(f"{self.url}/calls", timeout=60) as answer:
            return json.load(answer)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)


if __name__ == "__main__":
    running = Proxy(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    print(running.url, flush=True)
    running.http.serve_forever(0.02)
