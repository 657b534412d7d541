"""When a failed request is repeated, and when it is given up."""

from __future__ import annotations

import logging
import random
import time

import anyio

from oprd.http.client import ServerLost

logger = logging.getLogger("oprd")

_FIRST, _LONGEST = 0.25, 10.0  # seconds
_jitter = random.SystemRandom()  # the global random state is the run's


class Patience:
    """Pauses between the attempts of requests, until the server has failed for `wait` seconds without a success.

    The limit of a request's pause doubles from 0.25 to 10 seconds; the pause is drawn evenly between 0 and the limit, so that
    requests that failed together do not return together. A pause that the server asks for (Retry-After) comes on top.

    Args:
        wait: seconds.
        lacking: the setting that names the server, and what has not happened when the time is over, for the error.
        advice: a sentence that the error, and the warning at the beginning of an outage, end with.
        server: what the server is, for the warning.
        holder: the setting that holds `wait`, for the error.
    """

    def __init__(self, wait: float, lacking: str, advice: str = "", *, server: str, holder: str) -> None:
        self.wait, self.lacking, self.advice = wait, lacking, f". {advice}" if advice else ""
        self.server, self.holder = server, holder
        self._failing_since: float | None = None

    @property
    def failing(self) -> bool:
        """Whether a request has failed since the last success."""
        return self._failing_since is not None

    def renew(self) -> None:
        """Note a success."""
        self._failing_since = None

    async def pause(self, error: ServerLost, attempt: int) -> None:
        """Wait before a request is repeated.

        Args:
            error: why it failed.
            attempt: how often it was repeated before.

        Raises:
            ConnectionError: the time is over, or the server asks for a longer pause than is left.
        """
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
            logger.warning("%s: %s; repeated for up to %g s%s", self.server, error, self.wait, self.advice)
        left = self._failing_since + self.wait - now
        asked = error.pause or 0.0
        if left <= 0 or asked > left:
            raise ConnectionError(
                f"{self.lacking} within {self.wait:g} s (wait, in {self.holder}): {error}{self.advice}"
            ) from error
        limit = min(_LONGEST, _FIRST * 2 ** min(attempt, 10))
        await anyio.sleep(min(left, asked + _jitter.uniform(0, limit)))
