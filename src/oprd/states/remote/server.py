"""Serves a teacher's states over HTTP. One request is computed at a time; the others wait in the order in which they came.

The standard library's threading server does: one model computes one request at a time, so an event loop would gain nothing, and the
teacher's machine needs no further package. What that server lacks is here: limits for connections, bodies and time, and a token.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from oprd.models.lm_head import check_head
from oprd.models.memory import ran_out_of_memory
from oprd.states.remote import TOKEN_ENV, wire
from oprd.states.teachers import HasHead, Teacher

logger = logging.getLogger("oprd")

_LEAST_TOKEN = 16  # characters
_CHUNK = 2**20  # bytes
_SPARE = 8  # connections beside those that wait, so that more are answered 503
_MOST_UNAUTHENTICATED = 64  # connections that have not shown that they may ask
_MOST_DIGITS = 18  # of a body's length
_GRACE = 5.0  # seconds
_LOOPBACK = ("localhost",)
_STOPS = "the server is stopping"


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of the answer.
        retry_after: seconds after which it may be sent again; None: it would be refused again.
    """

    def __init__(self, status: HTTPStatus, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes.

    Args:
        queue: most requests that wait while one is computed; more are answered 503.
        body_bytes: most bytes of a request's body.
        timeout: seconds for a request, from its connection to the last byte of its answer, waiting included.
        headers: seconds for a request's headers, from its connection.
    """

    queue: int = 16
    body_bytes: int = 64 * 2**20
    timeout: float = 600
    headers: float = 10

    def __post_init__(self) -> None:
        if self.queue < 1 or self.body_bytes < 1:
            raise ValueError(f"queue: {self.queue}, body: {self.body_bytes} bytes are not allowed; at least 1")
        for name, value in (("timeout", self.timeout), ("headers", self.headers)):
            if not value > 0:
                raise ValueError(f"{name}: {value} is not allowed; more than 0 seconds")


class TeacherService:
    """Answers requests with a teacher, one at a time in the order in which they come.

    Args:
        teacher: gives the states; with a bridge, a `BridgedTeacher`.
        served: what is said of it.
        files: of its tokenizer, by name.
        model: the model behind the teacher, to check its LM head; None: it is not checked.
        queue: most requests that wait.
    """

    def __init__(
        self,
        teacher: Teacher,
        served: wire.ServedTeacher,
        files: Mapping[str, bytes],
        model: nn.Module | None = None,
        *,
        queue: int = 16,
    ) -> None:
        self.teacher, self.served, self.files, self.model, self.queue = teacher, served, files, model, queue
        self._device = next((p.device for module in teacher.modules for p in module.parameters()), torch.device("cpu"))
        self._worker = ThreadPoolExecutor(1, "teacher")
        self._counted = threading.Lock()
        self._waiting, self._closed = 0, False

    def states(self, body: bytes) -> bytes:
        """The answer to `POST /states`.

        Raises:
            Refused: no request, one that the teacher cannot answer, or not enough memory for it.
        """
        try:
            request, dtype = wire.unpack_request(body, self.served)
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from error
        try:
            return wire.pack_states(self.teacher.states(request.to(self._device)), dtype)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            shape = list(request.input_ids.shape)
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the teacher ran out of memory with input_ids of shape {shape}; lower micro_batch_tokens",
            ) from None

    @cached_property
    def head(self) -> bytes:
        """The answer to `GET /head`.

        Raises:
            Refused: the model has no LM head, or one that is computed in an unknown way.
        """
        try:
            if not isinstance(self.teacher, HasHead):
                raise ValueError(f"{type(self.teacher).__name__} has no LM head")
            head = self.teacher.head()
            if self.model is not None:
                with torch.no_grad():
                    check_head(head, self.model)
        except ValueError as error:
            raise Refused(HTTPStatus.NOT_FOUND, str(error)) from error
        return wire.pack_head(head)

    def begin(self, work: Callable[[], bytes]) -> Future[bytes]:
        """Compute something once what came before is computed.

        Raises:
            Refused: too many wait already, or the service is closed.
        """
        with self._counted:
            if self._closed:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, _STOPS, retry_after=1)
            if self._waiting > self.queue:  # one is computed
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{self.queue} requests wait already", retry_after=1)
            self._waiting += 1
            future = self._worker.submit(work)
        future.add_done_callback(lambda _: self._left())
        return future

    @property
    def waiting(self) -> int:
        """Requests that are computed or wait."""
        return self._waiting

    def close(self) -> None:
        """Finish what is computed, and drop what waits: its futures are cancelled."""
        with self._counted:
            self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _left(self) -> None:
        with self._counted:
            self._waiting -= 1


class TeacherServer:
    """A server on one address. `serve` blocks until `stop` is called.

    Args:
        service: answers.
        host: address to listen on. Another than a loopback address needs a token.
        port: 0 for a free one.
        token: what clients must send (`Authorization: Bearer …`); empty: none is asked for.
        limits: what it takes.

    Attributes:
        url: where it listens.

    Raises:
        ValueError: another host without a token, or a token that is too short.
        OSError: the address is in use or cannot be had.
    """

    def __init__(
        self, service: TeacherService, host: str = "127.0.0.1", port: int = 8100, token: str = "",
        limits: ServerLimits | None = None,
    ) -> None:  # fmt: skip
        check_access(host, token)
        self.limits = limits or ServerLimits()
        try:
            handler = partial(_Handler, service, _AccessCheck(token, loopback=is_loopback(host)), self.limits)
            self._http = _Listener((host, port), handler, self.limits)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error}; choose another --port") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._http.server_address[1]}"
        self._service = service

    def serve(self) -> None:
        """Answer requests until `stop` is called."""
        self._http.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Take no more requests, finish the one that is computed, and let `serve` return. From another thread than `serve`'s."""
        self._http.shutdown()
        self._service.close()
        self._http.end_connections()
        self._http.server_close()


def check_access(host: str, token: str) -> None:
    """Check that a server that others can reach asks for a token.

    Raises:
        ValueError: it does not, or the token is too short or cannot be sent.
    """
    if token and (len(token) < _LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token):
        raise ValueError(
            f"token: it must have at least {_LEAST_TOKEN} printable ASCII characters without spaces (python -c 'import secrets; "
            "print(secrets.token_hex(32))')"
        )
    if not token and not is_loopback(host):
        raise ValueError(
            f"--host {host}: others can reach this address, so the server needs a token: put one into a file and give "
            f"--token-file, or set the environment variable {TOKEN_ENV}; or leave --host out to listen on 127.0.0.1 alone"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in _LOOPBACK


class _Listener(ThreadingHTTPServer):
    """Accepts connections and ends those that take too long.

    A connection takes one of the limited places only after its request is admitted, so idle connections block no client. If
    more than `_MOST_UNAUTHENTICATED` connections are not admitted yet, the oldest of them is closed.

    Args:
        address: host and port.
        handler: of a connection.
        limits: what the server takes.
    """

    daemon_threads = False  # `server_close` waits for them
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: Any, limits: ServerLimits) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._limits, self._open = limits, set[socket.socket]()
        self._unauthenticated: dict[socket.socket, None] = {}  # in the order in which they came
        self._admitted, self._changing = set[socket.socket](), threading.Lock()
        self._places = threading.BoundedSemaphore(limits.queue + _SPARE)
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread of its own."""
        with self._changing:
            oldest = next(iter(self._unauthenticated)) if len(self._unauthenticated) >= _MOST_UNAUTHENTICATED else None
            if oldest is not None:
                del self._unauthenticated[oldest]
            self._unauthenticated[request] = None
            self._open.add(request)
        if oldest is not None:
            logger.info(
                "%d connections have sent no request that may be answered; the oldest is ended", _MOST_UNAUTHENTICATED
            )
            _end(oldest)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle a connection; end it when its time is over."""
        clocks = [
            threading.Timer(self._limits.headers, self._end_unauthenticated, (request, client_address)),
            threading.Timer(self._limits.timeout, _end, (request,)),
        ]
        for clock in clocks:
            clock.daemon = True
            clock.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            for clock in clocks:
                clock.cancel()
            with self._changing:
                self._open.discard(request)
                self._unauthenticated.pop(request, None)
                if request in self._admitted:
                    self._admitted.remove(request)
                    self._places.release()

    def admit(self, connection: socket.socket) -> None:
        """Give a connection whose request may be answered a place.

        Raises:
            Refused: there is none.
        """
        if not self._places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections wait already", retry_after=1)
        with self._changing:
            self._unauthenticated.pop(connection, None)
            self._admitted.add(connection)

    def _end_unauthenticated(self, connection: socket.socket, client_address: Any) -> None:
        with self._changing:
            if connection not in self._unauthenticated:
                return
            _end(connection)
        logger.info("%s: no request that may be answered within %g s", client_address[0], self._limits.headers)

    def end_connections(self) -> None:
        """Give answers that are being sent some seconds, then end what is open."""
        end = time.monotonic() + _GRACE
        while self._open and time.monotonic() < end:
            time.sleep(0.02)
        for connection in list(self._open):
            _end(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that the connection to a client was lost."""
        logger.info("%s: the connection was lost", client_address[0])


def _end(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _AccessCheck:
    """Decides which requests may be answered: with a token those that send it, else those to a loopback name (no DNS rebinding)."""

    def __init__(self, token: str, *, loopback: bool) -> None:
        self._expected = f"Bearer {token}".encode() if token else b""
        self._loopback = loopback

    def check(self, authorization: str, host: str) -> None:
        """Check the two headers of a request.

        Raises:
            Refused: it may not be answered.
        """
        if self._expected:
            if not hmac.compare_digest(authorization.encode("utf-8", "replace"), self._expected):
                raise Refused(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong (token_env, in teacher_model)")
        elif not is_loopback(host.rpartition(":")[0].strip("[]") or host):
            raise Refused(HTTPStatus.FORBIDDEN, "without a token this server answers to loopback addresses alone")


class _Handler(BaseHTTPRequestHandler):
    """Handles one connection: one request."""

    server_version, sys_version = "oprd", ""

    def __init__(self, service: TeacherService, access: _AccessCheck, limits: ServerLimits, *args: Any) -> None:
        self.service, self.access, self.limits = service, access, limits
        super().__init__(*args)  # handles the connection

    def do_GET(self) -> None:
        """Answer what is asked for without a body."""
        service = self.service
        answers: dict[str, Callable[[], bytes]] = {
            wire.INFO: service.served.to_json,
            wire.LM_HEAD: lambda: service.head,
            wire.TOKENIZER: lambda: wire.pack_files(service.files),
        }
        self._answer(lambda: self._of(answers))

    def do_POST(self) -> None:
        """Answer a request for states."""
        self._answer(self._states)

    def _of(self, answers: Mapping[str, Callable[[], bytes]]) -> bytes:
        if self.path not in answers:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this path")
        return self._compute(answers[self.path])

    def _states(self) -> bytes:
        if self.path != wire.STATES:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing at this path")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request has no Content-Length")
        digits = length.lstrip("0") or "0"
        size = int(digits) if len(digits) <= _MOST_DIGITS else None
        if size is None or size > self.limits.body_bytes:
            shown = f"{'more than ' * (size is None)}{digits[:_MOST_DIGITS]}"
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the body has {shown} bytes, and the server takes {self.limits.body_bytes}; lower micro_batch_tokens",
            )
        body = bytearray()
        while len(body) < size:
            part = self.rfile.read(min(_CHUNK, size - len(body)))
            if not part:
                raise ConnectionError("the client has left")
            body += part
        return self._compute(lambda: self.service.states(bytes(body)))

    def _compute(self, work: Callable[[], bytes]) -> bytes:
        future = self.service.begin(work)
        try:
            return future.result(self.limits.timeout)
        except NotDone:
            future.cancel()
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the request has waited too long", retry_after=1) from None
        except CancelledError:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, _STOPS, retry_after=1) from None

    def _answer(self, answer: Callable[[], bytes]) -> None:
        try:
            self.access.check(self.headers.get("Authorization", ""), self.headers.get("Host", ""))
            assert isinstance(self.server, _Listener), "it makes the handlers"
            self.server.admit(self.connection)
            content = answer()
        except Refused as refused:
            retry = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
            self._send(refused.status, str(refused).encode(), "text/plain; charset=utf-8", retry)
            self._drain()
        except ConnectionError:
            raise
        except Exception:
            logger.exception("%s %s failed", self.command, self.path[:100])
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, b"the server failed; its log says why", "text/plain", {})
        else:
            headers = {wire.SHA256: wire.digest(content), wire.IDENTITY: self.service.served.identity}
            self._send(HTTPStatus.OK, content, wire.SAFETENSORS, headers)

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _drain(self) -> None:
        """Read the beginning of what is still sent: closing at once would take the answer from the client."""
        _end_of_sending(self.connection)
        self.connection.settimeout(1)
        with suppress(OSError):
            for _ in range(8):
                if not self.connection.recv(_CHUNK):
                    break

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a header may hold what is secret."""


def _end_of_sending(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
