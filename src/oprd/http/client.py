"""HTTP client of one server that is not trusted: http and https only, no redirects, no proxy, bounded answers."""

from __future__ import annotations

import email.utils
import re
import ssl
import time
from dataclasses import dataclass

import anyio
import httpx2

_LARGEST_ERROR = 2000  # bytes
_CONNECT_SECONDS = 10.0
_BUSY = 429


class ServerLost(ConnectionError):
    """The server does not answer, or fails; the caller may repeat the request.

    Attributes:
        pause: seconds that the server asks to wait first (Retry-After); None where it does not ask.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Answer:
    """Headers and content of an answer with status 2xx. Names of headers are in lower case."""

    headers: dict[str, str]
    content: bytes


class HTTPClient:
    """Client of one server.

    Args:
        base_url: such as http://127.0.0.1:8000.
        timeout: seconds from the start of a request to the last byte of its answer.
        token: sent as `Authorization: Bearer …`; empty for none. It is left out of messages.
        content_type: of the bodies that are sent.
        setting: the key that holds `base_url`, for messages.
        token_from: the environment variable or file that holds the token, for messages.

    Raises:
        ValueError: `base_url` is no http or https address of a host, or holds a password; `timeout` is not positive; no header can
            hold the token.
    """

    def __init__(
        self, base_url: str, timeout: float, token: str = "", *, content_type: str, setting: str, token_from: str
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: {timeout} is not allowed; more than 0 seconds")
        self.base_url, self.timeout, self._token = _checked(base_url, setting, token_from), timeout, token
        if not (token.isascii() and token.isprintable()):
            raise ValueError(f"{token_from}: it holds characters other than printable ASCII")
        # httpx2 would decompress an answer of any size, and keep a connection that may have died with the server.
        self._headers = {"Content-Type": content_type, "Accept-Encoding": "identity", "Connection": "close"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        # Made once: it takes httpx2 longer than the rest of a request, for http too.
        secure = self.base_url.startswith("https")
        self._trust = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    async def ask(self, path: str, body: bytes | None = None, *, largest: int) -> Answer:
        """The answer to a POST of `body`, or to a GET without a body.

        Args:
            path: begins with a slash.
            body: what is sent.
            largest: most bytes of the answer.

        Raises:
            ServerLost: no connection, no whole answer within `timeout`, or an answer 429 or 5xx.
            ValueError: the server refuses the request (another 4xx, a redirect), or its answer is too large.
        """
        where = self.base_url + path
        try:
            with anyio.fail_after(self.timeout):
                status, headers, content = await self._exchange(where, body, largest)
        except TimeoutError:
            raise ServerLost(f"{where}: no whole answer within {self.timeout:g} s (timeout)") from None
        except (httpx2.HTTPError, OSError) as error:
            raise ServerLost(f"{where}: {type(error).__name__}: {self.beginning(str(error))}") from error
        if not 200 <= status < 300:
            message = f"{where} answers {status}: {self.beginning(content)}"
            if status != _BUSY and status < 500:
                raise ValueError(message)
            pause = _requested_pause(headers.get("Retry-After", ""))
            asks = "" if pause is None else f" (it asks for a pause of {pause:.0f} s)"
            raise ServerLost(message + asks, pause)
        return Answer({name.lower(): value for name, value in headers.items()}, content)

    async def _exchange(self, url: str, body: bytes | None, largest: int) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and content of an answer; of an error, the beginning of its content."""
        method, received = "GET" if body is None else "POST", bytearray()
        timeout = httpx2.Timeout(None, connect=_CONNECT_SECONDS)
        async with (
            httpx2.AsyncClient(verify=self._trust, trust_env=False, timeout=timeout, headers=self._headers) as client,
            client.stream(method, url, content=body, follow_redirects=False) as response,
        ):
            async for part in response.aiter_raw():
                received += part
                if not response.is_success and len(received) > _LARGEST_ERROR:
                    break
                if len(received) > largest:
                    raise ValueError(f"{url} answers with more than {largest} bytes")
            return response.status_code, response.headers, bytes(received)

    def beginning(self, text: str | bytes) -> str:
        """The first 300 characters on one line, without control characters and without the token."""
        shown = text[:_LARGEST_ERROR].decode(errors="replace") if isinstance(text, bytes) else text
        shown = shown.replace(self._token, "***") if self._token else shown
        return "".join(c if c.isprintable() else " " for c in shown[:300])


def _checked(base_url: str, setting: str, token_from: str) -> str:
    """`base_url` without a slash at its end.

    Raises:
        ValueError: it is not an http or https address of a host, or holds a user name or password.
    """
    if "@" in str(base_url):
        raise ValueError(
            f"{setting}: user names and passwords are not allowed in an address, since addresses are logged; remove what stands "
            f"before the @ (a server that asks for a key or token takes it from {token_from})"
        )
    try:
        url = httpx2.URL(base_url)
    except (TypeError, httpx2.InvalidURL):
        url = httpx2.URL()
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ValueError(f"{setting}: {base_url!r} is not allowed; http://HOST:PORT or https://HOST:PORT")
    return base_url.rstrip("/")


def _requested_pause(retry_after: str) -> float | None:
    """Seconds to wait by a header Retry-After (seconds, or an HTTP date); None without a valid one."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
