r"""Answer checking with math-verify, in a separate process with an audit hook (see `oprd.tasks.grading`).

The hook is needed because math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14 passes strings to `eval` or `exec`:
1. `ExprExtractionConfig` -> `sympy.parse_expr` -> `eval`. Not reached: this module calls only `latex2sympy` and `verify`.
2. `latex2sympy` -> `sympy.Number(text)` -> `sympify` -> `eval`, for number tokens only (the grammar allows digits).
3. `verify` -> `evalf` of a sum -> `lambdify` -> `exec` of printed code that contains symbol names verbatim:
   ``\sum_{n=0}^{\infty} \frac{1 + n r_{(exec(chr(…)))}}{n!}`` is valid LaTeX and executes its subscript.
   A test does this. math-verify's own `verify(parse(…), parse(…))` has the same hole.
4. `simplify` -> `sympy.polys.monomials` -> `exec` of code that depends only on the number of variables.
No character allow-list separates 3 from ordinary mathematics, so the hook forbids compiling instead.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from typing import Any

from oprd.tasks.answers.algebra import MathVerify
from oprd.tasks.answers.comparison import same_answer

_FORBIDDEN = ("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess", "socket")
_PLAIN_NUMBER = re.compile(
    rb"from sympy import \*|[-+]? ?N ?(/ ?N)?".replace(b"N", rb"(?:Integer|Float) ?\('?[-+\d.eE]+'? ?\)")
)


def _guard(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: refuse starting programs, network access, writing files, and compiling code other than the libraries' own.

    `eval` and `exec` of a string raise the event "compile" with that string before it runs.
    """
    if event == "compile":
        source, filename = args[0], str(args[1])
        if not filename.startswith("<") or (filename == "<unknown>" and source is not None):
            return  # a module's file, or ast.parse, which does not run code
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
    """Whether the compiled code comes from an import, or from sympy's monomials or mpmath's series, which contain only numbers."""
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
    """Import the libraries, then limit memory and install the audit hook. Runs once per worker, outside the time limits."""
    import logging

    for name in ("SIGTERM", "SIGALRM"):  # a handler, as pebble's, cannot run while C code evaluates 9^9^9
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.dont_write_bytecode = True
    logging.disable(logging.CRITICAL)  # math-verify would log untrusted answers in full
    for truth in (r"\frac{\sqrt{3}}{2}", "x + 3", "y = 3 x", r"[3, 4] \cap [1, 2]", r"\sum_{k=1}^3 k", r"\sin 3^\circ"):
        verify(truth.replace("3", "4"), truth)  # triggers the libraries' late imports

    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as statm:
            in_use = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes,) * 2)
    sys.addaudithook(_guard)


def check(answer: str, truth: str, timeout_s: float) -> tuple[bool | None, float]:
    """`verify`, and the seconds of CPU time that it took. None also if it raises.

    The pool enforces the timeout. A kernel timer ends the process one second later, even if the pool is gone.
    """
    _kill_after(timeout_s + 1.0)
    start = time.process_time()
    try:
        right = verify(answer, truth)
    except Exception:
        right = None
    finally:
        _kill_after(0.0)
    return right, time.process_time() - start


def _kill_after(seconds: float) -> None:
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)  # 0 takes it back


def verify(answer: str, truth: str) -> bool | None:
    """Whether two LaTeX answers are the same; None if one of them cannot be read.

    Does not use `math_verify.parse`, which searches the text for something to parse and falls back to string comparison.
    """
    return same_answer(answer, truth, MathVerify())
