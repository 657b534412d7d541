"""Checks once whether the Hugging Face hub answers. If it does not, no later call waits for it."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from functools import cache
from threading import Thread

from huggingface_hub import constants
from huggingface_hub.utils import get_session

logger = logging.getLogger("oprd")

LONGEST = 5.0
"""Seconds that a process waits for the hub's first answer."""


@cache
def hub_answers() -> bool:
    """Whether the hub answers, whatever it says. It is asked once in a process, and not at all where HF_HUB_OFFLINE is set.

    Where it does not answer, that is logged, and this process and its children use only the cache.
    """
    if constants.is_offline_mode():
        return False
    answers: list[int] = []

    def ask() -> None:
        with suppress(Exception):  # no route, no name, no certificate, no answer: all mean the same here
            answers.append(get_session().head(constants.ENDPOINT, timeout=LONGEST).status_code)

    thread = Thread(target=ask, name="ask the hub", daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(LONGEST)
    if answers:
        return True
    logger.warning(
        "the hub %s does not answer within %g s: only what is in the cache is used (HF_HUB_OFFLINE=1 does not ask it)",
        constants.ENDPOINT, LONGEST,
    )  # fmt: skip
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return False


def why_no_hub() -> str:
    """Why the hub is not used, for an error message after `hub_answers` returned False; without a full stop."""
    return f"the hub {constants.ENDPOINT} is not reachable (HF_HUB_OFFLINE is set, or it does not answer)"
