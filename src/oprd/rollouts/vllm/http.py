"""HTTP client of a `vllm serve` process, on vLLM's own interface and the standard library.

It does not trust the server: http and https only, no redirects, bounded answers, every value checked before use.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_LARGEST_ANSWER = 64 * 2**20  # bytes


class ServerLost(ConnectionError):
    """The server does not answer, fails, or lost its weights; the caller may try again."""


@dataclass(frozen=True)
class Completion:
    """Token ids of a completion, and the log-probability of each (nats, under the served weights, at temperature 1)."""

    token_ids: list[int]
    log_probs: list[float]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None  # urllib then raises the redirect as an HTTPError


class VLLMClient:
    """Client of one server.

    Args:
        base_url: such as http://127.0.0.1:8000.
        timeout: seconds before a request fails.

    Raises:
        ValueError: `base_url` is not an http or https address of a host, or `timeout` is not positive.
    """

    def __init__(self, base_url: str, timeout: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"base_url: {base_url!r} is not allowed; http://HOST:PORT or https://HOST:PORT")
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout} is not allowed; more than 0 seconds")
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        # No redirects and no proxy: requests go to the given address only.
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a POST of `body`, or to a GET without a body; None where the answer is empty.

        Raises:
            ServerLost: no connection, no answer in time, a server error (5xx), or an answer that is not JSON.
            ValueError: the server refuses the request (4xx, a redirect) or answers with more than 64 MiB.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                text = response.read(_LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            message = f"{self.base_url}{path} answers {error.code}: {_beginning(error.read(2000))}"
            raise (ServerLost if error.code >= 500 else ValueError)(message) from error
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise ServerLost(f"{self.base_url}{path}: {getattr(error, 'reason', error)}") from error
        except Exception as error:  # errors of http.client, such as an incomplete answer
            raise ServerLost(f"{self.base_url}{path}: {type(error).__name__}") from error
        if len(text) > _LARGEST_ANSWER:
            raise ValueError(f"{self.base_url}{path} answers with more than {_LARGEST_ANSWER} bytes")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerLost(f"{self.base_url}{path} answers without JSON: {_beginning(text)}") from error

    def served_version(self) -> str:
        """The version label of the weights in use; "default" after a start of the server.

        Raises:
            ServerLost: see `ask`.
            ValueError: the server lacks vLLM's interface for new weights.
        """
        try:
            answer = self.ask("/weight_info")
        except ValueError as error:
            raise ValueError(
                f"rollout_engine: vllm_server: {error}. Start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1 (docs/rollouts.md)"
            ) from error
        version = answer.get("weight_version") if isinstance(answer, dict) else None
        if not isinstance(version, str):
            raise ServerLost(f"{self.base_url}/weight_info answers without a version")
        return version

    def longest_sequence(self) -> int | None:
        """Most tokens of prompt and completion together; None where the server does not report it."""
        answer = self.ask("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
        length = card.get("max_model_len")
        return length if isinstance(length, int) else None

    def load(self, folder: str, version: str) -> None:
        """Make the server load the weights in `folder` and label them `version`.

        The label is set last, so a server that fails before keeps its former label.

        Args:
            folder: path as the server sees it.
            version: the new label.

        Raises:
            ServerLost: the server failed.
            ValueError: the server refuses.
        """
        self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        answer = self.ask("/reset_prefix_cache", {})  # its keys and values come from earlier weights
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerLost(f"{self.base_url}/reset_prefix_cache: the cache of the former weights is still in use")
        self.ask("/update_weight_version", {"new_version": version})

    def complete(self, prompt: list[int], sampling: dict[str, Any], version: str, vocab_size: int) -> Completion:
        """One completion, all of it drawn with weights `version`.

        Args:
            prompt: token ids.
            sampling: see `sampling_arguments`.
            version: label of the weights.
            vocab_size: ids lie below it.

        Raises:
            ServerLost: see `ask`; or other weights than `version` drew the completion.
            ValueError: the server refuses, or its answer is not valid.
        """
        answer = self.ask("/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling, "stream": False})
        try:
            choice = answer["choices"][0]
            ids, spans = choice["token_ids"], choice["weight_versions"]
            log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            drawn_by = {span["version"] for span in spans or ()}
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{self.base_url}: the answer lacks {error}; vLLM 0.32 or newer is needed") from error
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ServerLost(f"{self.base_url}: a completion ended with {_beginning(str(choice.get('finish_reason')))}")
        if drawn_by != {version}:
            raise ServerLost(f"{self.base_url}: other weights than {version} drew a completion")
        _check_tokens(ids, log_probs, sampling["max_tokens"], vocab_size)
        return Completion(ids, [float(p) for p in log_probs])


def _check_tokens(ids: Any, log_probs: list[Any], limit: int, vocab_size: int) -> None:
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not whole or not 1 <= len(ids) <= limit or len(log_probs) != len(ids):
        raise ValueError(
            f"vllm_server: a completion is not 1 to {limit} ids below {vocab_size} with a log-probability each"
        )
    if not all(isinstance(p, (int, float)) and math.isfinite(p) and p <= 1e-3 for p in log_probs):
        raise ValueError("vllm_server: a log-probability is not a finite number of 0 or less")


def _beginning(text: str | bytes) -> str:
    """The first 300 characters on one line, without control characters."""
    shown = text.decode(errors="replace") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else " " for c in shown[:300])
