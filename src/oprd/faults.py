"""The error that ends a run for a reason outside the code. Imports nothing, so that the command line can catch it early."""

from __future__ import annotations


class RunStopped(RuntimeError):
    """The run cannot or should not go on; the message is one sentence that says why and which setting fixes it.

    Raised, for example, where memory runs out although the batch cannot be made smaller, where a reward function fails, and after
    `max_useless_steps`. The command line shows the sentence and ends with exit code 1.
    """
