"""The command line of a claim's program that writes prompt files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_files(write: Callable[[Path], None], about: str | None, folder: str) -> None:
    """Write the files into `--output`, which is made where it is missing.

    Args:
        write: writes them into a folder.
        about: text of `--help`.
        folder: default of `--output`.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(folder), help="folder for the files")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    write(output)
