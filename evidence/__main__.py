"""`python -m evidence`: measure the claims; write docs/evidence.md, a README in each claim's folder, and the blocks of README.md."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from evidence.claim import PRETRAINED, Claim, Work
from evidence.document import write_documents
from evidence.pictures import FIGURE, RESULT, draw_claim, redraw
from evidence.readme import BLOCKS, write_blocks
from oprd.runs.pictures import save, style

HERE = Path(__file__).parent
ROOT = HERE.parent
WHOLE = "whole.json"
_SHOWN_LINE = 160


def claims() -> Iterator[tuple[Path, Claim]]:
    """Every claim with its folder, E1 first."""
    for folder in sorted(HERE.glob("e[0-9][0-9]_*")):
        module: Any = importlib.import_module(f"evidence.{folder.name}.claim")
        yield folder, module


def results(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Claim → its result, of those that have one under `folder`."""
    files = {claim.ID: folder / own.name / RESULT for own, claim in claims()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def measured_whole(folder: Path) -> dict[str, Any] | None:
    """Seconds, cpus and workers of the call that measured all claims, from `folder`."""
    file = folder / WHOLE
    return json.loads(file.read_text()) if file.is_file() else None


def measure(claim: Claim, work: Work, target: Path) -> None:
    """Measure one claim and write its result and figure into `target`."""
    started = time.monotonic()
    work.folder.mkdir(parents=True, exist_ok=True)
    clock = work.folder / "seconds.json"  # adds the time of interrupted calls
    before = json.loads(clock.read_text()) if clock.is_file() else 0.0
    try:
        found = dict(claim.measure(work))
    finally:
        clock.write_text(json.dumps(before + time.monotonic() - started))
    found["took_seconds"] = round(before + time.monotonic() - started)
    found["machine"] = {"cpus": os.cpu_count(), "workers": work.workers, "platform": platform.platform()}
    found["software"] = {name: version(name) for name in ("oprd", "torch", "transformers")}
    claim.judge(found)  # write only a result that `judge` can read
    target.mkdir(parents=True, exist_ok=True)
    with style():
        save(draw_claim(claim, found), target / FIGURE)
    (target / RESULT).write_text(json.dumps(found, indent=1) + "\n")


def print_committed(claim: Claim, file: Path) -> None:
    """Print a claim's verdict and table from its committed result, or that it has none."""
    if not file.is_file():
        typer.echo(f"{claim.ID} was not measured yet")
        return
    finding = claim.judge(json.loads(file.read_text()))
    typer.echo(
        f"{claim.ID} {finding.verdict}: {finding.number}\n\n{finding.paragraph}\n\n(committed; --again measures it again)"
    )


def main(
    only: Annotated[
        str,
        typer.Option(
            help=f"Claims, such as E1,E7; default: all but those on a pretrained model, {', '.join(sorted(PRETRAINED))}."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A tenth of the work, in runs/: checks that it runs.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 2,
    document: Annotated[
        bool, typer.Option("--document", help="Measure nothing; rewrite documents and pictures.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Also choose the learning rates again.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also measure claims that an earlier call measured.")] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Measure nothing; print the committed verdicts and tables.")
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Make only the runs that E11's committed result lacks (with --tune).")
    ] = False,
) -> None:
    """Measure the claims. A call after an interruption continues; runs are kept in runs/evidence[-quick]/."""
    import torch

    torch.set_num_threads(1)
    # Relative to the working directory: a run's settings contain the paths of its teacher and bridge.
    base = Path(os.path.relpath(ROOT / "runs")) / ("evidence-quick" if quick else "evidence")
    wanted = {name.strip().upper() for name in only.split(",") if name.strip()}
    everything = {claim.ID for _, claim in claims()}
    if unknown := wanted - everything:
        raise SystemExit(f"--only: there is no claim {', '.join(sorted(unknown))}")
    usual = everything - PRETRAINED
    started, measured = time.monotonic(), set()
    for own, claim in claims():
        if document or claim.ID not in (wanted or (everything if show else usual)):
            continue
        if show or (claim.ID in PRETRAINED and (own / RESULT).is_file() and not (quick or tune or again)):
            print_committed(claim, own / RESULT)
            continue
        target = base / own.name / "measured" if quick else own
        done = base / own.name / "done"
        if is_done(done, tune=tune) and not (again or quick):
            typer.echo(f"{claim.ID} was measured by an earlier call (--again measures it again)")
            continue
        typer.echo(f"{claim.ID} {claim.TITLE}")
        work = Work(base / own.name, quick, workers, lambda line: typer.echo(f"  {line}"[:_SHOWN_LINE]), tune, add)
        measure(claim, work, target)
        done.write_text(json.dumps({"tune": tune}))
        measured.add(claim.ID)
    if measured == usual:  # one call measured all: its time is a result
        about = {"seconds": round(time.monotonic() - started), "cpus": os.cpu_count(), "workers": workers, "tune": tune}
        (base if quick else HERE).joinpath(WHOLE).write_text(json.dumps(about) + "\n")
    if measured or document:
        write_pages(base, quick)
    if document and not quick:
        typer.echo(f"{len(list(redraw(claims())))} pictures")
    typer.echo(f"{time.monotonic() - started:.0f} s")


def is_done(done: Path, *, tune: bool) -> bool:
    """Whether an earlier call measured a claim, and chose its rates again where this one is to."""
    if not done.is_file():
        return False
    return not tune or bool(json.loads(done.read_text() or "{}").get("tune"))


def write_pages(base: Path, quick: bool) -> None:
    """Write the pages from the results: the committed ones into the repository, a quick call's into `base`."""
    if quick:
        known = [(base / own.name / "measured", claim) for own, claim in claims()]
        found = {claim.ID: json.loads(f.read_text()) for own, claim in known if (f := own / RESULT).is_file()}
        write_documents(base / "evidence.md", known, found, measured_whole(base))
    else:
        known, found = list(claims()), results(HERE)
        write_documents(ROOT / "docs" / "evidence.md", known, found, measured_whole(HERE))
        for name in BLOCKS:
            write_blocks(ROOT, name, known, found)
    typer.echo(f"{len(found)} claims in the document")


if __name__ == "__main__":
    typer.run(main)
