import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.data.rows import PromptRow, load_prompts
from oprd.tasks.answers.decide import decide
from oprd.tasks.answers.notation import normalize_answer
from oprd.tasks.answers.quantities import parse_number
from oprd.tasks.grading import MathGrader, Verdict, VerdictCache, last_boxed
from oprd.tasks.task import get_task, with_instruction
from processes import descendants, wait_until

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def grader():
    with MathGrader(timeout_s=2.0) as grader:
        yield grader


def grade(grader, answer, truth):
    return grader.grade([(rf"So the answer is \boxed{{{answer}}}.", truth)])[0]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", None),
        (r"\boxed{5}", "5"),
        (r"\boxed{5} or rather \boxed{6}.", "6"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{6", None),
        (r"\boxed{", None),
        (r"\boxed", None),
        (r"\boxed 5", None),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{ \boxed{7}", "7"),
        (r"} } \boxed{7}", "7"),
        (r"{ { \boxed{7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"\boxed{a \\ b}", r"a \\ b"),
        ("\\boxed{a\nb}", "a\nb"),
        (r"\boxed{7} text {unclosed \}", "7"),
        (r"\boxedx{7}", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


BALANCED = st.recursive(
    st.text(alphabet="ab1\\{}" + "é", max_size=4).map(lambda s: "".join("\\" + c if c in "\\{}" else c for c in s)),
    lambda inner: st.lists(inner.map(lambda s: "{" + s + "}") | inner, max_size=4).map("".join),
    max_leaves=20,
)


@given(BALANCED, st.text(max_size=20).filter(lambda s: "boxed" not in s and "fbox" not in s and "\\" not in s))
def test_any_balanced_content_comes_back(content, around):
    assert last_boxed(rf"{around} \boxed{{1}} {around} \boxed{{{content}}} {around}") == content


def last_boxed_by_hand(text):
    """From the last opening backwards, the first that closes: quadratic, and nothing else than what is said of it."""
    for opening in reversed([*re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth, at = 1, opening.end()
        while at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[opening.end() : at]
            at += 2 if text[at] == "\\" else 1
    return None


@given(
    st.lists(
        st.sampled_from([r"\boxed{", r"\fbox {", "boxed", "\\", "{", "}", "}", r"\}", r"\{", "1", "é"]), max_size=25
    )
)
def test_last_boxed_is_what_a_search_from_the_end_finds(parts):
    text = "".join(parts)
    assert last_boxed(text) == last_boxed_by_hand(text)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" * 100_000 + "}" * 50_000,
        "\\" * 1_000_000,
        "{" * 1_000_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed " * 150_000,
        r"\boxed{" + "x" * 1_000_000 + "}",
    ],
)
def test_last_boxed_takes_linear_time(text):
    start = time.perf_counter()
    last_boxed(text)
    assert time.perf_counter() - start < 3.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("142", 142),
        ("142.0", 142),
        ("007", 7),
        ("-4.0", -4),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1,000", 1000),
        ("1,234,567.50", Fraction(2469135, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"\frac12", Fraction(1, 2)),
        (r"\frac{270}7", Fraction(270, 7)),
        (r"\frac9{19}", Fraction(9, 19)),
        (r"-\frac{-6}{4}", Fraction(3, 2)),
        ("6/4", Fraction(3, 2)),
        ("-1/3", Fraction(-1, 3)),
        ("", None),
        (".", None),
        ("-", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1,00", None),
        ("1, 000", None),
        ("1e5", None),
        ("1e999999999", None),
        ("1_000", None),
        ("٣", None),
        ("²", None),
        ("x", None),
        ("1 2", None),
        ("9" * 1_000_000, None),
        ("inf", None),
        ("nan", None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@given(st.fractions(), st.integers(0, 3))
def test_parse_number_reads_what_python_writes(value, zeros):
    assert parse_number(str(value)) == value
    assert parse_number(rf"\frac{{{value.numerator}}}{{{value.denominator}}}") == value
    assert parse_number(f"{value.numerator}.{'0' * zeros}") == value.numerator


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" $42$. ", "42"),
        (r"\$32,\!348", r"\$32,348"),
        (r"11,\! 111,\! 111,\! 100", "11,111,111,100"),
        (r"10{,}080", "10,080"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}2)".replace("2)", "{2})").replace("{{2}}", "{2}")),
        (r"90^\circ", r"90^\circ"),
        (r"90^{\circ}.", r"90^\circ"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"5 \text{ cm}", r"5\text{cm}"),
        (r"4210_{5}", "4210_5"),
        ("−3", "-3"),
        ("1  2", "1 2"),
        ("1, 200", "1, 200"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\sin 30^\circ + 1", r"\sin30^\circ+1"),
    ],
)
def test_normalize_answer(text, normal):
    assert normalize_answer(text).replace(" ", "") == normal.replace(" ", "")
    if " " not in text or normal[1] == " ":
        assert normalize_answer(text) == normal
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@pytest.mark.parametrize(
    ("answer", "truth", "decision"),
    [
        ("142", "142.0", (True, "numeric")),
        ("1,200", "1200", (True, "numeric")),
        ("1, 200", "1200", (None, "")),
        ("1 200", "1200", (None, "")),
        ("18.9", r"\$18.90", (True, "numeric")),
        (r"5\text{ cm}", "5", (True, "numeric")),
        (r"998.5", r"\frac{1997}{2}", (True, "numeric")),
        ("0.333", r"\frac13", (False, "numeric")),
        ("0.000067", ".0000672", (False, "numeric")),
        ("41", "42", (False, "numeric")),
        ("52_{8}", "52_8", (True, "exact")),
        ("52_9", "52_8", (False, "exact")),
        ("(3,4)", "(3,4]", (None, "")),
    ],
)
def test_decide(answer, truth, decision):
    assert decide(answer, truth) == decision


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (r"\frac{\pi}{2}", r"\pi/2", True),
        (r"(b+2)(a+5)", "(a+5)(b+2)", True),
        (r"x = 5", "5", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        (r"1\frac{4}{5}", "1.8", True),
        (r"-5i+6", "6-5i", True),
        (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
        (r"3+2\sqrt2, 3-2\sqrt2", r"3 \pm 2 \sqrt{2}", True),
        ("C", r"\text{(C)}", True),
        (r"864 \text{ in}^2", r"864 \mbox{ inches}^2", True),
        (r"\frac{50}{100}", r"50\%", True),
        ("(3,4)", "(3,4]", False),
        ("(4,2)", "(2,4)", False),
        ("3", "3t", False),
        ("1, 200", "1200", False),
        ("42, 43", "42", False),
        ("q-p", "p-q", False),
        (r"\infty", r"-\infty", False),
        ("3.14", r"\pi", False),
        ("D", r"\text{(C)}", False),
    ],
)
def test_algebra(grader, answer, truth, right):
    assert grade(grader, answer, truth) is right


def test_a_missing_box_is_wrong_and_a_bad_truth_an_error(grader):
    grader.stats.clear()
    assert grader.grade([("42", "42"), (r"\boxed{}", "42"), (r"\boxed{42", "42"), ("", "42")]) == [False] * 4
    assert grader.grade([]) == []
    assert grader.stats == {"missing": 4}
    for truth in ("", " ", r"\boxed{}", "1" * 1001):
        with pytest.raises(ValueError, match="ground truth of pair 1"):
            grader.grade([(r"\boxed{1}", "1"), (r"\boxed{1}", truth)])


@pytest.mark.parametrize("option", ["workers", "timeout_s", "batch_timeout_s", "max_answer_chars"])
def test_options_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        MathGrader(**{option: 0})


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not there")
def test_every_benchmark_answer_is_right_and_its_neighbours_are_wrong(grader):
    truths = [
        row.answer
        for name in ("AIME24", "AIME25", "AIMO", "AMC23", "MATH-500")
        for row in load_prompts(str(DATA / f"{name}.parquet"))
    ]
    assert len(truths) == 683
    plain = [truth if last_boxed(truth) is None else last_boxed(truth) for truth in truths]
    assert all(grader.grade([(rf"thus \boxed{{{text}}}", truth) for text, truth in zip(plain, truths, strict=True)]))
    for perturbed in ("{}+1", "2{}"):
        wrong = [perturbed.format(text) for text in plain]
        verdicts = grader.grade([(rf"\boxed{{{text}}}", truth) for text, truth in zip(wrong, truths, strict=True)])
        assert [wrong[i] for i, right in enumerate(verdicts) if right] == []


HOSTILE = [
    "__import__('os').system('touch {mark}')",
    r"\text{{__import__('os').system('touch {mark}')}}",
    r"x_{{__import__('os').system('touch {mark}')}}",
    r"\operatorname{{exec}}(open('{mark}','w'))",
    "eval(compile(open('{mark}','w'),'x','exec'))",
    # Symbols' names are printed into code by sympy's lambdify: this one runs in math-verify without the guard
    r"\sum_{{n=0}}^{{\infty}} \frac{{1 + n r_{{(exec({code}))}}}}{{n!}}",
]
EACH_MODE = """
for mode in ("w", "a", "x", "there"):
    try:
        open(FOLDER + mode, "r+" if mode == "there" else mode).write("X")
    except Exception:
        pass
"""


def hostile_answers(folder):
    """Answers that, were their code run, would leave marks in `folder` and change the file that is there."""
    (folder / "there").write_text("as it was")
    (folder / "p").write_text(EACH_MODE.replace("FOLDER", repr(f"{folder}/")))  # read, which is allowed: short answers
    code = "+".join(f"chr({ord(c)})" for c in f"exec(open('{folder / 'p'}').read())")
    plain = [text.format(mark=folder / "mark", code=code) for text in HOSTILE]
    return [*(form.format(plain[-1]) for form in ("x = {}", "({}, 1)", "{} \\approx 3", "{}\\%", "{} < x")), *plain]


def left_in(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "p"}


@pytest.mark.parametrize("truths", [("3", "x = y"), pytest.param((r"\pi", "(3,1)"), marks=pytest.mark.further)])
def test_no_answer_runs_code(grader, tmp_path, truths):
    pairs = [(rf"\boxed{{{text}}}", truth) for text in hostile_answers(tmp_path) for truth in truths]
    with MathGrader(max_answer_chars=10_000) as big:
        assert big.grade(pairs) == [False] * len(pairs)
        assert not big.stats["too_long"]
    assert left_in(tmp_path) == {"there": "as it was"}


@pytest.mark.further
def test_the_last_hostile_answer_does_run_code_without_the_guard(tmp_path):
    """The control of the test above: if a later sympy mends this, the guard may be reconsidered."""
    program = (
        "import sys, math_verify; from oprd.tasks.answers.algebra import parsed; "
        "math_verify.verify(parsed('\\\\pi', False), parsed(sys.argv[1], False), timeout_seconds=None)"
    )
    subprocess.run([sys.executable, "-c", program, hostile_answers(tmp_path)[-1]], check=True, timeout=60)
    left = left_in(tmp_path)
    assert set(left.pop("a")) == {"X"}  # once for each time that the code was run
    assert left == {"there": "Xs it was", "w": "X", "x": "X"}


GUARDED = """
import os, pty, socket, subprocess, sys
from oprd.tasks.grading_worker import start_worker, verify
folder = sys.argv[1]
new, there = os.path.join(folder, "new"), os.path.join(folder, "there")
server = socket.socket()

def forked(fork):
    if fork() == 0:
        os._exit(0)

attempts = {
    **{f"open {mode}": lambda mode=mode: open(there, mode).close() for mode in ("r+", "rb+", "w", "wb", "a", "ab", "w+")},
    "open x": lambda: open(new, "x").close(),
    "os.open w": lambda: os.open(there, os.O_WRONLY),
    "os.open rw": lambda: os.open(there, os.O_RDWR),
    "os.open a": lambda: os.open(there, os.O_WRONLY | os.O_APPEND),
    "os.open c": lambda: os.open(new, os.O_RDWR | os.O_CREAT),
    "system": lambda: os.system("true"),
    "popen": lambda: os.popen("true").close(),
    "subprocess": lambda: subprocess.run(["true"]),
    "fork": lambda: forked(os.fork),
    "forkpty": lambda: forked(lambda: os.forkpty()[0]),
    "spawn": lambda: os.spawnlp(os.P_WAIT, "true", "true"),
    "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "pty": lambda: pty.spawn("true"),
    "socket": lambda: socket.socket(),
    "bind": lambda: server.bind(("127.0.0.1", 0)),
    "connect": lambda: server.connect(("127.0.0.1", 9)),
    "resolve": lambda: socket.getaddrinfo("localhost", 80),
    "eval": lambda: eval("1 + 1"),
    "exec": lambda: exec("x = 1"),
    "compile": lambda: compile("x = 1", "<string>", "exec"),
    "exec file": lambda: os.execv("/bin/true", ["true"]),
}
start_worker(2**30)
print("verified", verify("x+1", "1+x"), flush=True)
with open(there) as file, open(there, "rb") as other:
    print("read", file.read() == other.read().decode() == "as it was", flush=True)
os.close(os.open(there, os.O_RDONLY))
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError as error:
        print(name, "refused" if "while checking an answer" in str(error) else error, flush=True)
    except Exception as error:
        print(name, repr(error), flush=True)
    else:
        print(name, "done", flush=True)
print("end", len(attempts), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names Linux's ways to start programs")
def test_the_guard_refuses_each_way_out_and_lets_files_be_read(tmp_path):
    """Each by itself, since an answer that runs code is already stopped where the code is compiled."""
    (tmp_path / "there").write_text("as it was")
    run = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    allowed, attempts, end = run.stdout.splitlines()[:2], run.stdout.splitlines()[2:-1], run.stdout.splitlines()[-1]
    assert allowed == ["verified True", "read True"]
    assert [line for line in attempts if not line.endswith(" refused")] == []
    assert end == f"end {len(attempts)}"
    assert left_in(tmp_path) == {"there": "as it was"}


def test_hostile_answers_are_wrong_counted_and_survived(grader):
    grader.stats.clear()
    assert not grade(grader, "9^{9^{9^9}}", r"\pi")
    assert not grade(grader, "(" * 400 + "1" + ")" * 400, "2")
    assert grader.stats["timed_out"] == 2
    assert not grade(grader, "1" * 1_000_000, "1")
    assert not grade(grader, "{" * 1_000 + "}" * 1_000, "1")
    assert grader.stats["too_long"] == 2
    for junk in [
        "\x00\ud800é漢🙂",
        "1e999999999",
        r"\frac{1}{0}",
        "%",
        r"\\",
        "^",
        "_{}",
        r"\begin{pmatrix}",
        "'\"",
        "(1," * 300,
    ]:
        assert not grade(grader, junk, r"\sqrt{2}")
    assert grade(grader, "x+1", "1+x")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_memory_bomb_is_refused():
    with MathGrader(timeout_s=20.0, memory_bytes=2**28) as grader:
        assert not grade(grader, r"\gcd(10^{10^{10}}, 3)", "3")
        assert grader.stats == {"failed": 1}


def test_survives_killed_workers_and_serves_threads(grader):
    assert grade(grader, "x+1", "1+x")
    for worker in [w for w in multiprocessing.active_children() if w.name == "pebble_pool_worker"]:
        os.kill(worker.pid, signal.SIGKILL)
    results = []
    pairs = [(r"\boxed{x+1}", "1+x"), (r"\boxed{x+2}", "1+x")] * 10
    threads = [threading.Thread(target=lambda: results.append(grader.grade(pairs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == [[True, False] * 10] * 4


def workers() -> set[int]:
    return {w.pid for w in multiprocessing.active_children() if w.name == "pebble_pool_worker"}


@pytest.fixture
def no_worker(grader):
    """The grader of the other tests has no worker here."""
    grader.close()
    assert workers() == set()


def hostile(number):
    return rf"\boxed{{{number}^{{9^{{9^9}}}}}}", r"\pi"


SUM = (r"\boxed{x+1}", "1+x")


@pytest.mark.usefixtures("no_worker")
def test_a_pair_is_checked_once_however_it_ended(caplog):
    pairs = [hostile(9), SUM, (r"\boxed{x+2}", "1+x"), (r"\boxed{\frac}", "1+x"), hostile(9)]
    with MathGrader(1, timeout_s=0.5) as first:
        assert first.grade(pairs) == [False, True, False, False, False]
        assert first.stats == {"timed_out": 2, "verified": 2, "failed": 1}
    with MathGrader(1, timeout_s=0.5, cache=first.cache) as grader:
        assert grader.grade([*pairs, (r"\boxed{1}", "1")]) == [False, True, False, False, False, True]
        assert grader.stats == {"timed_out": 2, "verified": 2, "failed": 1, "exact": 1}
        assert workers() == set()
        assert grader.grade([(r"\boxed{x+1}", "1+2x")]) == [False]  # another truth is another pair
        assert workers() != set()
        grader.timeout_s = 0.6  # another limit, too
        start = time.monotonic()
        assert grader.grade(pairs[:1]) == [False]
        assert time.monotonic() - start >= 0.6
    warnings = [record.getMessage() for record in caplog.records if record.name == "oprd"]
    assert len(warnings) == 2  # one a grader
    assert "for example '9^{9^{9^9}}' (0.5 s an answer, 20 s a batch)" in warnings[0]


@pytest.mark.usefixtures("no_worker")
def test_the_graders_of_the_task_share_their_verdicts():
    for _ in range(2):
        with get_task("math").grader() as grader:
            assert grader.grade([r"\boxed{x+17}"], ["17+x"]) == [True]
            assert grader.stats == {"verified": 1}
            started = workers()
    assert started == set()


def test_the_cache_keeps_what_was_used_last():
    cache = VerdictCache(2)
    for key in "ab":
        cache.put(key, Verdict(True, key))
    assert cache.get("a") == Verdict(True, "a")
    cache.put("c", Verdict(False, "c"))
    assert [cache.get(key) for key in "abc"] == [Verdict(True, "a"), None, Verdict(False, "c")]


def test_a_batch_of_hostile_answers_is_bounded_and_what_it_does_not_reach_is_checked_later():
    """Which it reaches does not depend on which worker is faster: one decides the last while the other is at the first."""
    behind = (r"\boxed{x+2}", "2+x")
    with MathGrader(2, timeout_s=0.5, batch_timeout_s=0.5) as grader:
        assert grader.grade([SUM, hostile(9), behind, *map(hostile, range(11, 31))]) == [True] + [False] * 22
        assert grader.stats == {"verified": 1, "timed_out": 22}
        assert grader.grade([hostile(9), behind]) == [False, True]
        grader.batch_timeout_s = 1e-9  # nothing is reached, but these two are known
        assert grader.grade([hostile(8), hostile(9), SUM]) == [False, False, True]


@pytest.mark.further
def test_larger_batches_have_a_larger_limit():
    """Here one answer may time out among 256, and two among 257."""
    for count, timed_out in ((256, [11]), (257, [11, 12])):
        with MathGrader(1, timeout_s=0.5, batch_timeout_s=0.5) as grader:
            grader.grade([*map(hostile, range(11, 31)), *[("no box", "1")] * (count - 20)])
            assert grader.stats == {"timed_out": 20, "missing": count - 20}
            known = [i for i in range(11, 31) if grader.cache.get((hostile(i)[0][7:-1], r"\pi", 0.5, 2**30))]
            assert known == timed_out


def test_ordinary_answers_do_not_use_up_the_limit_of_a_batch(grader, monkeypatch):
    monkeypatch.setattr(grader, "batch_timeout_s", 1e-6)
    assert grader.grade([(r"\boxed{x+1}", f"1+x+{i}-{i}") for i in range(20)]) == [True] * 20


@pytest.mark.further
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pair_whose_worker_is_killed_is_checked_again_once():
    found = []
    others = workers()

    def working(ticks: int):
        """The worker of this test, once it has used so much CPU time."""
        return [p.pid for p, used in descendants(os.getpid()).items() if p.pid in workers() - others and used > ticks]

    with MathGrader(1, timeout_s=600, batch_timeout_s=10_000) as grader:
        thread = threading.Thread(target=lambda: found.append(grader.grade([hostile(9), (r"\boxed{x+3}", "3+x")])))
        thread.start()
        for _ in range(2):
            wait_until(lambda: working(ticks=300))  # its imports take less
            (pid,) = working(ticks=300)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: pid not in workers())  # noqa: B023
        thread.join()
        assert found == [[False, True]]
        assert grader.stats == {"verified": 1, "failed": 1}


def test_a_worker_outlives_the_thread_that_started_it():
    """Linux' PR_SET_PDEATHSIG would kill it."""
    with MathGrader(1) as grader:
        before, found = workers(), []
        thread = threading.Thread(target=lambda: found.append(grader.grade([SUM])))
        thread.start()
        thread.join()
        started = workers() - before
        assert (len(started), found) == (1, [[True]])
        time.sleep(0.5)
        assert grader.grade([(r"\boxed{x+2}", "2+x")]) == [True]
        assert workers() - before == started


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no timers for processes")
def test_a_worker_whose_pool_is_gone_ends_itself():
    program = r"from oprd.tasks.grading_worker import *; start_worker(2**30); check('9^{9^{9^9}}', r'\pi', 0.1)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -signal.SIGALRM


SCRIPT = """
import multiprocessing, os, signal, sys, time
print("script runs", flush=True)
from oprd.tasks.grading import MathGrader
grader = MathGrader(timeout_s=60)
assert grader.grade([(r"\\boxed{x+1}", "1+x")]) == [True]
print(multiprocessing.active_children()[0].pid, flush=True)
with grader:
    if sys.argv[1] == "interrupt":
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        grader.grade([(r"\\boxed{9^{9^{9^9}}}", r"\\pi")])
if sys.argv[1] == "unclosed":
    grader.grade([(r"\\boxed{x+1}", "1+x")])
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("ending", ["interrupt", "unclosed"])  # killed: test_children.py
def test_no_orphans_and_the_script_is_not_run_again(tmp_path, ending):
    script = tmp_path / "script.py"  # without `if __name__ == "__main__":`, on purpose
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, str(script), ending], capture_output=True, text=True, timeout=60)
    first, pid = run.stdout.split("\n")[:2]
    assert first == "script runs"
    assert run.stdout.count("script runs") == 1
    assert ("KeyboardInterrupt" in run.stderr) == (ending == "interrupt")
    deadline = time.monotonic() + 10
    while alive(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid))


def test_the_instruction_is_appended_where_it_is_missing():
    task = get_task("math")
    said = PromptRow([{"role": "user", "content": "1+1? Answer in \\boxed{}."}], "2")
    rows, changed = with_instruction(
        task, [PromptRow("1+1?", "2"), said, PromptRow([{"role": "user", "content": "2+2?"}], "4")]
    )
    assert changed == 2
    assert rows[0].prompt == f"1+1? {task.instruction}"
    assert rows[1] is said
    assert rows[2].prompt == [{"role": "user", "content": f"2+2? {task.instruction}"}]
    assert with_instruction(get_task("addition"), [PromptRow("1+1=", "2")])[1] == 0
