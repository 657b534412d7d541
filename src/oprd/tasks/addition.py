"""Five-digit addition written out column by column: the task of the embedded tiny pair (`oprd demo`).

A problem is a raw prompt, and its solution adds from the units up, one column a group:

    12345+67890=            <- prompt
    5+0+0=05 4+9+0=13 3+8+1=12 2+7+1=10 1+6+1=08 #80235

`4+9+0=13` reads: digit 4, digit 9, carry in 0; the sum 13 is digit 3, carry out 1. The sum always has two digits, so
every column has the same width. After `#` stands the answer, most significant digit first, without leading zeros.
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
    """Draw `n` distinct problems of one split, the same ones for the same arguments on every machine.

    A problem's split follows from its two operands alone, so no seed can make the splits overlap; `a+b` and `b+a`
    are always in the same split. About one problem in ten is a test problem.

    Args:
        n: how many, at least 1. There are some 8·10^9 problems, so no draw repeats one.
        seed: any integer; other seeds give other draws from the same split.
        split: "train" or "test".

    Raises:
        ValueError: `n` is below 1 or `split` is not a split.
    """
    if n < 1:
        raise ValueError(f"n is {n}: the number of problems must be 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: allowed are {', '.join(map(repr, SPLITS))}")
    # A string seed is hashed whole; an integer seed would lose its sign (-1 and 1 draw alike).
    generator = random.Random(f"addition/{split}/{seed}")
    drawn: dict[str, PromptRow] = {}
    while len(drawn) < n:
        left, right = generator.randint(_SMALLEST, _LARGEST), generator.randint(_SMALLEST, _LARGEST)
        if _split_of(left, right) == split:
            prompt = f"{left}+{right}="
            source = f"addition {split} seed {seed}, problem {len(drawn)}"
            # A pair drawn before keeps its first row.
            drawn.setdefault(prompt, PromptRow(prompt=prompt, answer=str(left + right), source=source))
    return list(drawn.values())


def worked_solution(prompt: str) -> str:
    """Write out the solution that the tiny pair was trained on: five columns with carries, then `#` and the answer.

    Example:
        >>> worked_solution("12345+67890=")
        '5+0+0=05 4+9+0=13 3+8+1=12 2+7+1=10 1+6+1=08 #80235'

    Raises:
        ValueError: `prompt` is not of the form `12345+67890=`.
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
    """Whether what follows the last `#` of `response` is `answer`, character for character, up to outer whitespace.

    Only the final answer is graded, not the columns. `response` is text without special tokens: a decoded end token
    would count as part of the answer.

    Raises:
        ValueError: `answer` is not a string of digits.
    """
    if not re.fullmatch(r"[0-9]+", answer):
        raise ValueError(f"answer is {answer!r}: it must be a string of the digits 0-9, such as '80235'")
    _, mark, stated = response.rpartition("#")
    return mark == "#" and stated.strip() == answer


def _split_of(left: int, right: int) -> str:
    """Assign a problem to a split by a hash of its operands that does not depend on their order."""
    low, high = sorted((left, right))
    digest = blake2b(f"{low}+{high}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _ONE_IN_TEST == 0 else "train"
