"""`RemoteTeacher`: asks a server (`oprd serve-teacher`) for states. Each process of a run asks for its own micro-batches."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import nn

from oprd.http.client import Answer, HTTPClient, ServerLost
from oprd.http.interruptible import Interruptible
from oprd.http.patience import Patience
from oprd.models.lm_head import LMHead
from oprd.models.loading import parse_dtype
from oprd.states.remote import TOKEN_ENV, wire
from oprd.states.requests import StateRequest
from oprd.types import States

logger = logging.getLogger("oprd")

T = TypeVar("T")

_SMALL, _FILES = 2**20, 2**28  # most bytes of the facts, and of a tokenizer's files


@dataclass(frozen=True)
class RemoteSettings:
    """Where a teacher is, and how long it is waited for: the keys of `teacher_model: {url: …}`.

    Args:
        url: of its server.
        token_env: the environment variable that holds the server's token.
        timeout: seconds for a request.
        wait: seconds that the server may fail, be busy or not answer before the run ends.
        dtype: of the states that are sent; None: the teacher's own.

    Raises:
        ValueError: a value that is not allowed.
    """

    url: str
    token_env: str = TOKEN_ENV
    timeout: float = 600
    wait: float = 600
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.timeout > 0 or self.wait < 0:
            raise ValueError(
                f"teacher_model: timeout: {self.timeout:g}, wait: {self.wait:g} are not allowed; more than 0, and 0 or more seconds"
            )
        if self.dtype is not None:
            try:
                parse_dtype(self.dtype)
            except ValueError as error:
                raise ValueError(f"teacher_model: {error}") from error
        if not self.token_env.isidentifier():
            raise ValueError(
                f"teacher_model: token_env: {self.token_env[:3]!r}… is not the name of an environment variable, such as {TOKEN_ENV}"
            )


class RemoteTeacher:
    """A teacher behind a server. In float32 its states are those of a teacher in this process, to the bit.

    A server that does not answer, is busy or sends a damaged body is asked again after a pause (`Patience`). One that serves
    another model than at first, or sends states of another shape, ends the run.

    Args:
        settings: of the server.
        token: the server's; empty for none.
        device: where states and LM head are wanted; states follow their request.

    Attributes:
        served: what the server says of its teacher.
        retries: requests that were repeated.
        received: bytes of all answers.

    Raises:
        ValueError: an address or token that cannot be used, or a server that refuses.
        ConnectionError: no answer within `wait` seconds.
    """

    def __init__(self, settings: RemoteSettings, token: str = "", device: torch.device | str = "cpu") -> None:
        self.settings, self._device = settings, device
        self._http = HTTPClient(
            settings.url, settings.timeout, token, content_type=wire.SAFETENSORS, setting="teacher_model: url",
            token_from=f"the environment variable {settings.token_env}",
        )  # fmt: skip
        self._loop = Interruptible()
        self._patience: Patience | None = None  # of what runs now
        self.retries = self.received = 0
        self._counted = (0, 0)
        self.served: wire.ServedTeacher = self._ask(
            wire.INFO, _SMALL, lambda a: wire.ServedTeacher.from_json(a.content)
        )
        self.info, self.identity = self.served.info, self.served.identity
        if settings.dtype is not None:
            self.identity += f" as {settings.dtype}"
        self.fingerprint = self.served.fingerprint
        self.modules: Sequence[nn.Module] = ()
        self._dtype = parse_dtype(settings.dtype or self.served.dtype)

    @property
    def projected_by(self) -> tuple[str, int] | None:
        """Digest and rank of the bridge through which the states come; None: they are whole."""
        bridge = self.served.bridge
        return None if bridge is None else (bridge.digest, bridge.rank)

    def states(self, request: StateRequest) -> States:
        """The states of `request`, one tensor `[N, D]` a layer, on its device.

        Raises:
            ConnectionError: the server fails for `wait` seconds, serves another model, or sends other states than it was asked for.
            ValueError: it refuses the request.
            KeyboardInterrupt: see `interrupt`.
        """
        tokens = request.input_ids.numel()
        if tokens > self.served.most_tokens:
            raise ValueError(
                f"micro_batch_tokens: a request has {tokens} tokens, and the teacher's server takes {self.served.most_tokens}; set "
                "a lower one, or start the server with a larger --max-tokens"
            )
        if missing := [layer for layer in request.layers if layer not in self.served.widths]:
            raise ValueError(
                f"teacher_model: {self.settings.url} has no layer {missing[0]}; it has {list(self.served.widths)}"
            )
        asked, places_N = wire.without_repeated_positions(request)
        largest = wire.largest_states(asked, self.served, self._dtype)
        body = wire.pack_request(asked, self.settings.dtype)
        found = self._ask(
            wire.STATES, largest, lambda a: wire.unpack_states(a.content, asked, self.served, self._dtype), body
        )
        if places_N is None:
            return found
        values = tuple(states.index_select(0, places_N) for states in found.values)
        return replace(found, values=values, rollout_index=request.rollout_index)

    def head(self) -> LMHead:
        """The teacher's LM head; the first call gets it from the server.

        Raises:
            ValueError: the server's model has none that can be used.
            ConnectionError: as `states`.
        """
        return self._head

    @cached_property
    def _head(self) -> LMHead:
        rows = self.info.embedding_rows or 2**20
        largest = (rows + 2**16) * (self.served.head_width + 1) * 8 + _SMALL
        head = self._ask(wire.LM_HEAD, largest, lambda a: wire.unpack_head(a.content, self.served))
        bias = None if head.bias is None else head.bias.to(self._device)
        return replace(head, weight=head.weight.to(self._device), bias=bias)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of the teacher's tokenizer, by name."""
        return self._ask(wire.TOKENIZER, _FILES, lambda answer: wire.unpack_files(answer.content))

    @property
    def failing(self) -> bool:
        """Whether a request runs, and the server has only failed since its last answer."""
        return self._patience is not None and self._patience.failing

    def interrupt(self) -> None:
        """Make a request that runs in another thread raise a KeyboardInterrupt."""
        self._loop.interrupt()

    def take_counts(self) -> Mapping[str, float]:
        """Requests that were repeated and MiB received since the last call."""
        before, self._counted = self._counted, (self.retries, self.received)
        retries, received = (now - then for now, then in zip(self._counted, before, strict=True))
        return {"teacher_retries": float(retries), "teacher_mib": received / 2**20}

    def _ask(self, path: str, largest: int, read: Callable[[Answer], T], body: bytes | None = None) -> T:
        """Request `path` and return `read(answer)`, which raises a ValueError where the answer is not what was requested."""
        patience = Patience(
            self.settings.wait,
            "teacher_model: the server has not answered",
            server="teacher's server",
            holder="teacher_model",
        )
        self._patience, before = patience, self.retries
        try:
            answer = self._loop.run(lambda: self._answered(path, largest, body, patience))
        except ValueError as error:
            raise ValueError(f"teacher_model: {error}") from error
        finally:
            self._patience = None
        if self.retries > before:
            logger.warning("teacher's server: it answers again after %d repeated requests", self.retries - before)
        self.received += len(answer.content)
        served: Any = vars(self).get("served")
        now = answer.headers.get(wire.IDENTITY, "")
        if served is not None and now != served.identity:
            raise ConnectionError(
                f"teacher_model: {self.settings.url} serves another model ({now[:12] or 'unnamed'}) than when the run began "
                f"({served.identity[:12]}); start the server with the model of this run"
            )
        try:
            return read(answer)
        except ValueError as error:
            raise ConnectionError(
                f"teacher_model: {self.settings.url}{path} sends something else than was asked for: {error}"
            ) from error

    async def _answered(self, path: str, largest: int, body: bytes | None, patience: Patience) -> Answer:
        for attempt in itertools.count():
            try:
                answer = await self._http.ask(path, body, largest=largest)
                if answer.headers.get(wire.SHA256) not in (None, wire.digest(answer.content)):
                    raise ServerLost(f"{self.settings.url}{path}: the body does not match its digest")
            except ServerLost as error:
                await patience.pause(error, attempt)
                self.retries += 1
            else:
                return answer
        raise AssertionError("itertools.count has no end")
