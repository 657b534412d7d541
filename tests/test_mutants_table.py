"""The table of scripts/mutants.py fits the code: each text occurs once, each test exists. `make test-mutants` runs them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    module = sys.modules["mutants"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


def test_the_table_fits_the_code(mutants):
    problems = [problem for mutant in mutants.MUTANTS for problem in mutant.problems()]
    assert not problems, "\n".join(problems)


def test_each_mutant_is_another_and_still_python(mutants):
    labels = Counter(mutant.label for mutant in mutants.MUTANTS)
    assert not [label for label, count in labels.items() if count > 1]
    for mutant in mutants.MUTANTS:
        text = (ROOT / mutants.SOURCE / mutant.file).read_text()
        compile(text.replace(mutant.old, mutant.new), mutant.label, "exec", dont_inherit=True)
    assert len({(m.file, m.old, m.new) for m in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 89


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "no/such.py"}, "there is no file src/oprd/no/such.py"),
        ({"old": "no such text"}, "the old text occurs 0 times: 'no such text'"),
        ({"old": "return"}, "the old text occurs 3 times"),
        ({"new": "def avg_at_k("}, "it changes nothing"),
        ({"tests": ("test_none.py",)}, "there is no test test_none.py"),
        ({"tests": ("test_measures.py::test_none",)}, "there is no test test_measures.py::test_none"),
    ],
)
def test_what_does_not_fit_is_named(mutants, tmp_path, change, message):
    for name, text in (
        ("src/oprd/a.py", "def avg_at_k(\nreturn return return"),
        ("tests/test_measures.py", "def test_a():"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sound = mutants.Mutant(
        "a.py", "none", "def avg_at_k(", "def other(", ("test_measures.py::test_a", "test_measures.py")
    )
    assert sound.problems(tmp_path) == []
    (problem,) = replace(sound, **change).problems(tmp_path)
    assert message in problem
