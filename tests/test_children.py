"""No child outlives its parent, which SIGKILL ends here: no handler, no `finally` and no exit function of it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest
import yaml

from oprd import children
from processes import descendants, left_after_10_s, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

HALF_A_SECOND = 50  # in CPU ticks


@pytest.fixture
def killed(tmp_path):
    """Start a script, wait until `ready(its pid)`, kill it, and return which of its descendants are left after 10 s."""
    started = []

    def kill(program: str, ready, *words: str) -> set:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(program))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)]),
        }
        with (tmp_path / "script.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(script), str(tmp_path), *words], env=environment, stdout=log, stderr=log
            )
        started.append(process)
        try:
            wait_until(lambda: process.poll() is not None or ready(process.pid))
            assert process.poll() is None, (tmp_path / "script.log").read_text()
            family = set(descendants(process.pid))
            assert family
        finally:
            process.kill()
            process.wait()
        left = left_after_10_s(family)
        for orphan in left:
            os.kill(orphan.pid, signal.SIGKILL)
        return left

    return kill


@pytest.fixture
def all_work(tmp_path):
    """Whether each descendant that a process has when it touches `warm` has since worked for half a second."""
    before: dict = {}

    def ready(pid: int, workers: int = 2) -> bool:
        now = descendants(pid)
        if not before and (tmp_path / "warm").exists():
            before.update(now)
        return sum(now[p] - ticks > HALF_A_SECOND for p, ticks in before.items() if p in now) == workers

    return ready


def test_workers_end_while_they_evaluate_hostile_answers(killed, all_work):
    program = r"""
        import sys
        from pathlib import Path
        from oprd.tasks.grading import MathGrader
        grader = MathGrader(workers=2, timeout_s=600)
        grader.grade([(r"\boxed{x+1}", f"{i}+x") for i in range(20)])  # enough for both
        (Path(sys.argv[1]) / "warm").touch()
        grader.grade([(r"\boxed{9^{9^{9^9}}}", r"\pi"), (r"\boxed{8^{9^{9^9}}}", r"\pi")])
    """
    assert killed(program, all_work) == set()


@pytest.mark.further
def test_a_trainer_that_is_killed_while_it_grades_leaves_no_process(killed, all_work):
    program = r"""
        import sys
        from dataclasses import replace
        from pathlib import Path
        from oprd.tasks.math import BoxedGrader
        from oprd.tasks.task import Task
        from tiny import scripted_generate, tiny_trainer

        grader = BoxedGrader(1, timeout_s=600, batch_timeout_s=600)
        assert grader.grade([r"\boxed{x+1}"], ["1+x"]) == [True]

        def hostile(*args, **options):
            sampled = scripted_generate(*args, **options)
            return replace(sampled, rollouts=replace(sampled.rollouts, texts=[r"\boxed{9^{9^{9^9}}}"]))

        folder = Path(sys.argv[1])
        trainer = tiny_trainer(folder / "run", rows=[{"prompt": "1+2=", "answer": r"\pi"}], per_device_train_batch_size=1)
        trainer.engine.generate = hostile
        trainer.grading.task = Task("math", "", lambda: grader)
        (folder / "warm").touch()
        trainer.train()
    """
    assert killed(program, partial(all_work, workers=1)) == set()


@pytest.mark.further
def test_the_runs_of_a_comparison_end_with_it(killed, tmp_path):
    recipe = {
        "model": "embedded:tiny/student", "teacher_model": "embedded:tiny/teacher", "task": "addition",
        "train_dataset": "generated:addition", "train_limit": 16, "eval_dataset": "generated:addition", "eval_limit": 4,
        "max_steps": 100_000, "per_device_train_batch_size": 2, "max_completion_length": 8, "eval_num_generations": 1,
        "save_strategy": "no", "use_cpu": True, "output_dir": "unused",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = {
        "recipe": str(tmp_path / "recipe.yaml"), "output_dir": str(tmp_path / "out"), "seeds": [0],
        "learning_rates": [1e-3], "objectives": {"all": {}},
    }  # fmt: skip
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(plan))
    program = """
        import sys
        from oprd.cli import main
        if __name__ == "__main__":
            sys.argv = ["oprd", "compare", "--config", sys.argv[1] + "/compare.yaml"]
            main()
    """
    assert killed(program, lambda pid: any((tmp_path / "out").rglob("metrics.jsonl"))) == set()


def test_a_program_ends_with_its_group(killed, tmp_path):
    program = """
        import subprocess, sys, time
        from oprd import children
        program = children.start(["sh", "-c", "sleep 1000 & touch $0/up; wait", sys.argv[1]], start_new_session=True)
        other = children.start(["sleep", "1000"])
        time.sleep(1000)
    """
    assert killed(program, lambda pid: (tmp_path / "up").exists() and len(descendants(pid)) == 3) == set()


def test_a_fork_that_measures_ends_with_its_parent(killed):
    program = """
        from oprd.tools.bench.memory import in_a_fork
        in_a_fork(lambda: sum(range(10**13)))
    """
    assert killed(program, lambda pid: any(ticks > 10 for ticks in descendants(pid).values())) == set()


def test_a_child_whose_parent_is_dead_already_ends_at_once():
    program = """
        import os, time
        from multiprocessing.connection import Pipe
        from oprd.children import end_with_parent
        lifeline, writing = Pipe(duplex=False)
        writing.close()
        end_with_parent(lifeline, group={group})
        print("goes on")
    """
    for group, code in ((False, 1), (True, -signal.SIGKILL)):
        text = textwrap.dedent(program.format(group=group))
        ended = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, start_new_session=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def test_where_the_kernel_does_not_help_a_thread_ends_the_child(tmp_path):
    """As on a Mac: the system's name is all that is changed."""
    program = """
        import sys, time
        sys.platform = "another"
        from multiprocessing.connection import Pipe
        from oprd.children import end_with_parent
        lifeline, writing = Pipe(duplex=False)
        end_with_parent(lifeline)
        print("goes on", flush=True)
        writing.close()
        time.sleep(60)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "goes on\n", "")


def test_a_program_is_run_to_its_end():
    done = children.run(["sh", "-c", "echo said; echo wrong >&2; exit 3"], stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "wrong\n")
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        children.run(["true"])
        with pytest.raises(OSError, match="no such program"):
            children.start(["no such program"])
    assert len(os.listdir("/proc/self/fd")) == files
