"""A hub that does not answer costs one wait of at most five seconds a process, and says so once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest

ASKS = """
import json, logging, sys, time
import transformers, datasets
news = []
class Keep(logging.Handler):
    def emit(self, record):
        news.append(record.getMessage())
logging.getLogger("oprd").addHandler(Keep(logging.WARNING))
from oprd.data.hub import hub_answers
from oprd.data.rows import load_prompts
from oprd.models.loading import ModelInfo, load_tokenizer
began = time.monotonic()
said = [str(ModelInfo.from_config("far/away"))]
for call in (load_tokenizer, load_prompts):
    try:
        call("far/away")
    except ValueError as error:
        said.append(str(error))
print(json.dumps({"seconds": time.monotonic() - began, "said": said, "news": news, "answers": hub_answers()}))
"""
NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def server(answer: bytes | None) -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that gives each request `answer`, or takes the connection and says nothing; its address and connections."""
    taken: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):  # closed
            while True:
                connection, _ = listening.accept()
                taken.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", taken
        for connection in taken:
            connection.close()


def ask(endpoint: str, cache: str, **more: str) -> dict:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    environment = {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": cache,
        "no_proxy": "127.0.0.1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASKS], env=environment | more, capture_output=True, text=True, timeout=240, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.further
def test_a_hub_that_says_nothing_is_waited_for_once(tmp_path):
    with server(None) as (endpoint, taken):
        found = ask(endpoint, str(tmp_path))
        assert len(taken) == 1
    assert found["answers"] is False
    assert found["seconds"] < 60
    assert found["news"] == [
        f"the hub {endpoint} does not answer within 5 s: only what is in the cache is used (HF_HUB_OFFLINE=1 does not ask it)"
    ]
    model, tokenizer, dataset = found["said"]
    assert model == "None"
    assert "it is neither a folder nor wholly in the cache, and the hub" in tokenizer
    assert dataset.startswith(f"'far/away': this dataset is not in the cache, and the hub {endpoint} is not reachable")


@pytest.mark.further
def test_a_hub_that_is_not_to_be_asked_is_not(tmp_path):
    with server(None) as (endpoint, taken):
        found = ask(endpoint, str(tmp_path), HF_HUB_OFFLINE="1")
        assert not taken
    assert (found["answers"], found["news"]) == (False, [])


@pytest.mark.further
def test_a_hub_without_the_name_is_reachable(tmp_path):
    with server(NOT_FOUND) as (endpoint, taken):
        found = ask(endpoint, str(tmp_path))
        assert len(taken) > 1
    assert (found["answers"], found["news"]) == (True, [])
    assert not any("is not reachable" in said for said in found["said"])
