"""Problems of reasoning-gym (https://github.com/open-thought/reasoning-gym): chains of additions and subtractions.

A problem is the package's question as a raw prompt. It ends in `=`, so a model without chat tuning also continues with the
answer. `worked_solution` evaluates the chain term by term, in one line:

    State the final answer to the following arithmetic problem: 57 + 87 - 70 =     <- prompt
     144 - 70 = 74

The package's own scoring is not used: it accepts loose number formats (`01.0` for 1), and for other data sets it passes the
untrusted response to sympy. This module only searches the response with a regular expression.
"""

from __future__ import annotations

import random
import re
from hashlib import blake2b

from oprd.data.rows import PromptRow

SPLITS = ("train", "test")

CHAIN_SUM = {"min_digits": 1, "max_digits": 2}
"""Terms of one or two digits, without negative terms (`reasoning_gym.arithmetic.ChainSumConfig`)."""

_WHOLE = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"(?:(?<![0-9])-)?[0-9]+(?:[.,][0-9]+)*")
_CHAIN = re.compile(r".*: ([0-9]+(?: [+-] [0-9]+)+) =")
_ONE_IN_TEST = 5
_DRAWS_A_PROBLEM = 200


def problems(n: int, seed: int, split: str, min_terms: int = 2, max_terms: int = 3) -> list[PromptRow]:
    """Draw `n` distinct problems of one split. The same arguments give the same problems.

    A problem's split depends only on its numbers, not on their order or signs. The splits therefore do not overlap for any
    seed, and `a + b` and `b + a` are in the same split. About one problem in five is a test problem.

    Args:
        n: number of problems, at least 1.
        seed: any integer; different seeds give different draws from the split.
        split: "train" or "test".
        min_terms: minimum number of terms in a chain.
        max_terms: maximum number of terms in a chain.

    Raises:
        ValueError: `n` is below 1, `split` is unknown, there are too few problems, or reasoning-gym is not installed.
    """
    if n < 1:
        raise ValueError(f"n is {n}: the number of problems must be 1 or more")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: allowed are {', '.join(map(repr, SPLITS))}")
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise ValueError("task 'chain_sum' needs reasoning-gym: pip install 'oprd[reasoning]'") from error
    # The package draws item i of seed s with Random(s + i), so neighbouring seeds would share most problems.
    start = random.Random(f"chain_sum/{split}/{seed}").getrandbits(60)
    drawn: dict[str, PromptRow] = {}
    chains = {**CHAIN_SUM, "min_terms": min_terms, "max_terms": max_terms}
    for item in create_dataset("chain_sum", seed=start, size=_DRAWS_A_PROBLEM * n, **chains):
        prompt = item["question"]
        if split_of(prompt) == split and prompt not in drawn:
            source = f"chain_sum {split} seed {seed}, problem {len(drawn)}"
            drawn[prompt] = PromptRow(prompt=prompt, answer=item["answer"], source=source)
            if len(drawn) == n:
                return list(drawn.values())
    raise ValueError(f"n is {n}: {_DRAWS_A_PROBLEM * n} draws gave only {len(drawn)} different {split} problems")


def split_of(prompt: str) -> str:
    """The split of a problem, from a hash of its sorted numbers without signs."""
    numbers = ",".join(sorted(re.findall(r"[0-9]+", prompt)))
    digest = blake2b(numbers.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % _ONE_IN_TEST == 0 else "train"


def worked_solution(prompt: str) -> str:
    """Evaluate a chain from left to right. Returns the text that follows the prompt's `=`.

    Example:
        >>> worked_solution("State the final answer to the following arithmetic problem: 57 + 87 - 70 =")
        ' 144 - 70 = 74'

    Raises:
        ValueError: `prompt` does not end in a chain and an equals sign.
    """
    match = _CHAIN.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt is {prompt!r}: it must end in a chain such as ': 57 + 87 - 70 ='")
    total, *rest = match.group(1).split(" ")
    value, lines = int(total), []
    while rest:
        sign, term, *rest = rest
        value += int(term) if sign == "+" else -int(term)
        lines.append(" ".join([str(value), *rest]))
    return " " + " = ".join(lines)


def is_correct(response: str, answer: str) -> bool:
    """Whether the last number in the first line of `response` equals `answer`, digit for digit.

    Only the first non-blank line counts, because a model that does not end its turn there continues with other text. A minus
    counts if it stands directly before the digits and no digit precedes it: `- 4` and the end of `2-4` are 4. `12.5` and
    `1,234` are never correct, also not in part.

    Raises:
        ValueError: `answer` is not a whole number.
    """
    try:
        check_answer(answer)
    except ValueError as error:
        raise ValueError(f"answer is {answer!r}: it {error}") from None
    line = response.strip().partition("\n")[0]
    stated = _NUMBER.findall(line)
    return bool(stated) and stated[-1] == answer


def check_answer(answer: str) -> None:
    """Refuse a reference answer that no response can equal.

    Raises:
        ValueError: `answer` is not a whole number.
    """
    if not _WHOLE.fullmatch(answer):
        raise ValueError("must be a whole number, such as '-12'")
