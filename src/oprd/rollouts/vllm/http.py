"""Client of a `vllm serve` process, on vLLM's own interface. It does not trust the server: every value is checked before use."""

from __future__ import annotations

import json
import os
from typing import Any

from oprd.http.client import HTTPClient, ServerLost
from oprd.rollouts.engine import Completion

_LARGEST_ANSWER = 64 * 2**20  # bytes


class WeightsLost(ConnectionError):
    """The server has other weights than it was sent; the caller may send them again."""


class VLLMClient:
    """Client of one server. The environment variable VLLM_API_KEY, which `vllm serve` reads too, is sent as its key.

    Args:
        base_url: such as http://127.0.0.1:8000.
        timeout: seconds from the start of a request to the last byte of its answer.

    Raises:
        ValueError: `base_url` is no http or https address of a host, or holds a password; `timeout` is not positive; no header can
            hold the key.
    """

    def __init__(self, base_url: str, timeout: float) -> None:
        self._http = HTTPClient(
            base_url, timeout, os.environ.get("VLLM_API_KEY", ""),
            content_type="application/json", setting="base_url", token_from="the environment variable VLLM_API_KEY",
        )  # fmt: skip
        self.base_url = self._http.base_url

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a POST of `body`, or to a GET without a body; None where the answer is empty.

        Raises:
            ServerLost: no connection, no whole answer within `timeout`, an answer 429 or 5xx, or one that is not JSON.
            ValueError: the server refuses the request (another 4xx, a redirect), or its answer is too large or too deep to read.
        """
        data = None if body is None else json.dumps(body).encode()
        content = (await self._http.ask(path, data, largest=_LARGEST_ANSWER)).content
        where = self.base_url + path
        try:
            return json.loads(content) if content else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ServerLost(f"{where} answers without JSON: {self._http.beginning(content)}") from None
        except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
            raise ValueError(
                f"{where} answers with JSON that cannot be read: {self._http.beginning(content)}"
            ) from None

    async def served_version(self) -> str:
        """The version label of the weights in use; "default" after a start of the server.

        Raises:
            ServerLost: see `ask`.
            ValueError: the server lacks vLLM's interface for new weights.
        """
        try:
            answer = await self.ask("/weight_info")
        except ValueError as error:
            raise ValueError(
                f"rollout_engine: vllm_server: {error}. Start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1 (docs/rollouts.md)"
            ) from error
        version = answer.get("weight_version") if isinstance(answer, dict) else None
        if not isinstance(version, str):
            raise ServerLost(f"{self.base_url}/weight_info answers without a version")
        return version

    async def longest_sequence(self) -> int | None:
        """Most tokens of prompt and completion together; None where the server does not report it."""
        answer = await self.ask("/v1/models")
        cards = answer.get("data") if isinstance(answer, dict) else None
        card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
        length = card.get("max_model_len")
        return length if type(length) is int and length > 0 else None

    async def load(self, folder: str, version: str) -> None:
        """Make the server load the weights in `folder` and label them `version`.

        The label is set last, so a server that fails before keeps its former label.

        Args:
            folder: path as the server sees it.
            version: the new label.

        Raises:
            ServerLost: the server failed.
            ValueError: the server refuses.
        """
        await self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        answer = await self.ask("/reset_prefix_cache", {})  # its keys and values come from earlier weights
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise ServerLost(f"{self.base_url}/reset_prefix_cache: the cache of the former weights is still in use")
        await self.ask("/update_weight_version", {"new_version": version})

    async def complete(self, prompt: list[int], sampling: dict[str, Any], version: str, vocab_size: int) -> Completion:
        """One completion, all of it drawn with weights `version`.

        Args:
            prompt: token ids.
            sampling: see `sampling_arguments`.
            version: label of the weights.
            vocab_size: ids lie below it.

        Raises:
            ServerLost: see `ask`; or the server did not complete it.
            WeightsLost: other weights than `version` drew the completion.
            ValueError: the server refuses, or its answer is not valid.
        """
        body = {"token_ids": prompt, "sampling_params": sampling, "stream": False}
        answer = await self.ask("/inference/v1/generate", body)
        try:
            choice = answer["choices"][0]
            ids, spans, reason = choice["token_ids"], choice["weight_versions"], choice["finish_reason"]
            log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            drawn_by = {span["version"] for span in spans or ()}
        except (TypeError, KeyError, IndexError) as error:
            lacks = f"lacks {error}" if isinstance(error, KeyError) else "has another form than vLLM's"
            raise ValueError(f"{self.base_url}: the answer {lacks}; vLLM 0.32 or newer is needed") from error
        if reason not in ("stop", "length"):
            raise ServerLost(f"{self.base_url}: a completion ended with {self._http.beginning(str(reason))}")
        if drawn_by != {version}:
            raise WeightsLost(f"{self.base_url}: other weights than {version} drew a completion")
        _check_tokens(ids, log_probs, sampling["max_tokens"], vocab_size)
        return Completion(ids, [float(p) for p in log_probs])


def _check_tokens(ids: Any, log_probs: list[Any], limit: int, vocab_size: int) -> None:
    whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    if not whole or not 1 <= len(ids) <= limit or len(log_probs) != len(ids):
        raise ValueError(
            f"vllm_server: a completion is not 1 to {limit} ids below {vocab_size} with a log-probability each"
        )
    if not all(type(p) in (int, float) and -1e30 < p <= 1e-3 for p in log_probs):
        raise ValueError("vllm_server: a log-probability is not a finite number of 0 or less")
