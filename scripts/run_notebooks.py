"""Execute examples/notebooks/*.ipynb on the CPU and write their outputs into them (make notebooks).

python scripts/run_notebooks.py [--check] [NAME …]     # --check: executes without writing
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "examples" / "notebooks"
SECONDS = 300


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, without what differs from machine to machine.

    Raises:
        CellExecutionError: a cell fails.
        CellTimeoutError: a cell takes more than `SECONDS`.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main() -> int:
    """Execute the named ones, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="without .ipynb; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "JUPYTER_PLATFORM_DIRS": "1", "TQDM_DISABLE": "1"}
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in options.names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        began = time.monotonic()
        notebook = execute(path)
        if not options.check:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
