"""Five-digit addition, worked out column by column: the task of the embedded tiny pair (`oprd demo`).

A problem is a raw prompt. The worked solution adds column by column, starting from the units:

    12345+67890=            <- prompt
    5+0+0=05 4+9+0=13 3+8+1=12 2+7+1=10 1+6+1=08 #80235

`4+9+0=13` means: digits 4 and 9, carry in 0; the sum 13 gives digit 3 and carry out 1. The sum always has two digits, so
all columns have the same width. The answer follows `#`, most significant digit first, without leading zeros.
"""

import random
import re
from hashlib import blake2b

from oprd.data.rows import PromptRow

ALPHABET = "0123456789+= #"
"""Every character that a prompt or a worked solution contains."""

SPLITS = ("train", "test")

_PROMPT = re.compile(r"([1-9][0-9]{4})\+([1-9][0-9]{4})=")
_SMALLEST, _LARGEST = 10_000, 99_999
_ONE_IN_TEST = 10


def problems(n: int, seed: int, split: str) -> list[PromptRow]:
    """Draw `n` distinct problems of one split. The same arguments give the same problems on every machine.

    A problem's split depends only on its two operands, so the splits do not overlap for any seed. `a+b` and `b+a` are in
    the same split. About one problem in ten is a test problem.

    Args:
        n: number of problems, at least 1. There are about 8·10^9 problems.
        seed: any integer; different seeds give different draws from the split.
        split: "train" or "test".

    Raises:
        ValueError: `n` is below 1, or `split` is unknown.
    """
    if n < 1:
        raise ValueError(f"n is {n}: the number of problems must be 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: allowed are {', '.join(map(repr, SPLITS))}")
    # Seed with a string: random.Random drops the sign of an integer seed, so -1 and 1 would draw the same problems.
    generator = random.Random(f"addition/{split}/{seed}")
    drawn: dict[str, PromptRow] = {}
    while len(drawn) < n:
        left, right = generator.randint(_SMALLEST, _LARGEST), generator.randint(_SMALLEST, _LARGEST)
        if _split_of(left, right) == split:
            prompt = f"{left}+{right}="
            source = f"addition {split} seed {seed}, problem {len(drawn)}"
            # A repeated draw keeps the first row.
            drawn.setdefault(prompt, PromptRow(prompt=prompt, answer=str(left + right), source=source))
    return list(drawn.values())


def worked_solution(prompt: str) -> str:
    """The solution format that the tiny pair was trained on: five columns with carries, then `#` and the answer.

    Example:
        >>> worked_solution("12345+67890=")
        '5+0+0=05 4+9+0=13 3+8+1=12 2+7+1=10 1+6+1=08 #80235'

    Raises:
        ValueError: `prompt` does not have the form `12345+67890=`.
    """
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt is {prompt!r}: it must be two five-digit numbers such as '12345+67890='")
    left, right = match.groups()
    columns, carry = [], 0
    for a, b in zip(reversed(left), reversed(right), strict=True):
        total = int(a) + int(b) + carry
        columns.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return f"{' '.join(columns)} #{int(left) + int(right)}"


def is_correct(response: str, answer: str) -> bool:
    """Whether the text after the last `#` of `response` equals `answer`, apart from outer whitespace.

    Grades the final answer, not the columns. `response` must not contain special tokens: a decoded end token would count as
    part of the answer.

    Raises:
        ValueError: `answer` is not a string of digits.
    """
    try:
        check_answer(answer)
    except ValueError as error:
        raise ValueError(f"answer is {answer!r}: it {error}") from None
    _, mark, stated = response.rpartition("#")
    return mark == "#" and stated.strip() == answer


def check_answer(answer: str) -> None:
    """Refuse a reference answer that no response can equal.

    Raises:
        ValueError: `answer` is not a string of digits.
    """
    if not re.fullmatch(r"[0-9]+", answer):
        raise ValueError("must be a string of the digits 0-9, such as '80235'")


def _split_of(left: int, right: int) -> str:
    """Assign a problem to a split by a hash of its operands, independent of their order."""
    low, high = sorted((left, right))
    digest = blake2b(f"{low}+{high}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _ONE_IN_TEST == 0 else "train"
