"""The whole response is the answer, as in completions of a model that was trained on a task's own text."""

from __future__ import annotations


def is_correct(response: str, answer: str) -> bool:
    """Whether the two are the same text; spaces and line breaks at the ends do not count."""
    return response.strip() == answer.strip()


def check_answer(answer: str) -> None:
    """Refuse an answer without text.

    Raises:
        ValueError: it is empty.
    """
    if not answer.strip():
        raise ValueError("is empty")
