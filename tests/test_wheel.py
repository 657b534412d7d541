"""The wheel alone: built, installed in an environment of its own, and used from an empty folder (make test-wheel)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LARGEST = 10 * 2**20  # bytes
pytestmark = pytest.mark.further


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and source distribution."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> tuple[Path, Path]:
    """The `bin` folder of an environment with the wheel, and an empty folder. What oprd needs is taken from this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0], cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    (folder / "empty").mkdir()
    return python.parent, folder / "empty"


def test_both_are_small_and_whole(built):
    assert all(path.stat().st_size <= LARGEST for path in built)
    names = {name for name in zipfile.ZipFile(built[0]).namelist() if not name.endswith(".py")}
    recipes = {f"oprd/recipes/{path.name}" for path in (ROOT / "recipes").iterdir() if path.is_file()}
    comparisons = {f"oprd/comparisons/{path.name}" for path in (ROOT / "comparisons").iterdir()}
    wanted = {"oprd/py.typed", "oprd/recipes/schema.json", "oprd/models/assets/tiny/student/model.safetensors"}
    assert wanted | recipes | comparisons <= names


def test_the_command_line_of_the_wheel(installed):
    bin_, empty = installed
    assert "oprd 0." in run(bin_ / "oprd", "--version", cwd=empty)
    assert "--pair" in run(bin_ / "oprd", "demo", "--help", cwd=empty)
    assert "max_completion_length" in run(bin_ / "oprd", "keys", cwd=empty)
    assert json.loads(run(bin_ / "oprd", "keys", "--schema", cwd=empty))["properties"]["layers"]
    code = "import oprd; print(oprd.__file__, oprd.__version__, oprd.load_run)"
    assert str(bin_.parent) in run(bin_ / "python", "-c", code, cwd=empty)
    assert not [*empty.iterdir()]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_each_recipe_of_the_wheel(installed, recipe):
    bin_, empty = installed
    said = run(bin_ / "oprd", "train", "--config", recipe, "--dry-run", cwd=empty)
    assert "dry run: nothing was trained or written" in said


def test_the_demo_of_the_wheel(installed):
    bin_, empty = installed
    run(bin_ / "oprd", "demo", "--steps", "1", "--problems", "4", "--json", "found.json", cwd=empty)
    assert json.loads((empty / "found.json").read_text())["steps"] == 1
    assert (empty / "runs" / "demo" / "curves.png").exists()
