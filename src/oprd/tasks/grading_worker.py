r"""The part of answer checking that runs in a process of its own, behind a guard (see `oprd.tasks.grading`).

Why a guard: in math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14, strings reach `eval` or `exec` by
1. `ExprExtractionConfig` -> `sympy.parse_expr` -> `eval`. Not used: only `latex2sympy` and `verify` are called here.
2. `latex2sympy` -> `sympy.Number(text)` -> `sympify` -> `eval`, for number tokens only (the grammar admits digits).
3. `verify` -> `evalf` of a sum -> `lambdify` -> `exec` of printed code, in which a symbol's name stands as written:
   ``\sum_{n=0}^{\infty} \frac{1 + n r_{(exec(chr(…)))}}{n!}`` is valid LaTeX and runs what is in its subscript.
   A test does this; math-verify's own `verify(parse(…), parse(…))` is open to it as well.
4. `simplify` -> `sympy.polys.monomials` -> `exec`, of code that depends on nothing but the number of variables.
No allow-list of characters separates 3 from ordinary mathematics, so compiling is forbidden instead.
"""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

_FORBIDDEN = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess", "socket")
_PLAIN_NUMBER = re.compile(
    rb"from sympy import \*|[-+]? ?N ?(/ ?N)?".replace(b"N", rb"(?:Integer|Float) ?\('?[-+\d.eE]+'? ?\)")
)


def _guard(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: refuse programs, the network, writing files, and compiling code that is not the library's own.

    `eval` and `exec` of a string raise the event "compile" with that string before any of it runs.
    """
    if event == "compile":
        source, filename = args[0], str(args[1])
        if not filename.startswith("<") or (filename == "<unknown>" and source is not None):
            return  # a module's file; or ast.parse, which runs nothing
        if isinstance(source, str | bytes):
            text = source.encode() if isinstance(source, str) else source
            if filename == "<string>" and _PLAIN_NUMBER.fullmatch(text.strip()):
                return
        if _is_librarys_own_code():
            return
    elif event == "open":
        mode, flags = args[1], args[2]
        if not (set(mode) & set("wax+") if isinstance(mode, str) else flags & 0b11):
            return
    elif not event.startswith(_FORBIDDEN):
        return
    raise PermissionError(f"refused while checking an answer: {event}")


def _is_librarys_own_code() -> bool:
    """Is the code being compiled generated at import time, or by sympy's monomials or mpmath's series from numbers?"""
    caller = sys._getframe(2).f_code.co_filename.replace("\\", "/")
    if caller.endswith(("sympy/polys/monomials.py", "mpmath/libmp/libhyper.py")):
        return True
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def start_worker(memory_bytes: int) -> None:
    """Import everything, then close the doors behind. Runs once in each worker, outside any answer's time limit."""
    import logging
    import os
    import signal
    import time

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler cannot run while C code computes 9^9^9
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)  # math-verify logs hostile answers whole
    for truth in (r"\frac{\sqrt{3}}{2}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "x = 3", r"(1, 2] \cup [4, \infty)"):
        verify(truth.replace("3", "4"), truth)  # imports what the libraries import late

    def exit_with_parent(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes,) * 2)
    sys.addaudithook(_guard)


def verify(answer: str, truth: str) -> bool | None:
    """Does math-verify find the two LaTeX answers equal? None: one of them is not LaTeX it can read.

    Not by `math_verify.parse`, which searches the text for something to parse and falls back to comparing strings.
    """
    import math_verify
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    # units=False: math-verify would take the t of 3t for a unit. Its own timeouts need SIGALRM: pebble's are used.
    config = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    parsed = []
    for text in (truth, answer):
        try:
            parsed.append(latex2sympy(text, is_real=not should_treat_as_complex(text), normalization_config=config))
        except Exception:  # the grammar raises a bare Exception
            return None
    return bool(math_verify.verify(parsed[0], parsed[1], timeout_seconds=None))
