"""The notebooks: committed with the outputs of a whole run, small, without paths of a machine; they run (further)."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def read(path: Path) -> tuple[list[dict], list[dict]]:
    """All cells, and those with code."""
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return notebook["cells"], [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["first_distillation", "own_task", "two_tokenizers"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_are_those_of_a_whole_run(path):
    cells, code = read(path)
    assert cells[0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for cell in code:
        ast.parse("".join(cell["source"]))
        prints = "print(" in "".join(cell["source"])
        assert not prints or any(output.get("name") == "stdout" for output in cell["outputs"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_name_no_machine(path):
    _, code = read(path)
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert len(outputs) < 60_000
    assert not re.search(r"/(?:tmp|home|root|work|Users|opt|usr)/", outputs)


@pytest.mark.further
@pytest.mark.timeout(900)
def test_they_run():
    pytest.importorskip("nbclient", reason="pip install '.[docs]'")
    command = [sys.executable, "scripts/run_notebooks.py", "--check"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(re.findall(r"\.ipynb: \d+ s", ended.stdout)) == len(NOTEBOOKS)
