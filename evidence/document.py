"""docs/evidence.md, out of the committed results alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import Claim
from evidence.words import VERDICTS, table

_HEAD = """# Evidence

The paper (arXiv 2606.06021) has one seed, checkpoints chosen on the test sets and no full-vocabulary baseline. Here each of its claims,
and some of the field's, is measured at a scale that anyone can re-run. Small models: a claim that holds or fails here may do otherwise at 7B.

    make evidence           # everything; goes on where it was interrupted
    make evidence-quick     # a tenth of the work in runs/: that it runs, not what is true
    .venv/bin/python -m evidence --only E7
    .venv/bin/python -m evidence --tune    # choose the learning rates anew, too (E1, E2, E11)

{whole}Learning rates were chosen by earlier runs on a seed of their own; these stand in the results, and `make evidence` takes the rates from
there. This page is written by `python -m evidence` from the `result.json` of each folder in [evidence/](../evidence/); verdicts are computed
there too (`judge` in each `claim.py`), and a test compares. Intervals are 95 %, Student's t over seeds, unless said otherwise.
"""


def document(
    claims: Sequence[tuple[Path, Claim]],
    results: Mapping[str, Mapping[str, Any]],
    figures: str | None,
    whole: Mapping[str, Any] | None,
) -> str:
    """The page.

    Args:
        claims: in their order, with their folders.
        results: claim → its result; claims without one are named as not measured.
        figures: the way from the page to the evidence folder; None: no pictures.
        whole: of a call that measured all claims: seconds, cpus, workers; None: there was none.
    """
    rows, sections = [], []
    for folder, claim in claims:
        if claim.ID not in results:
            rows.append([claim.ID, claim.TITLE, "not measured", ""])
            continue
        result = results[claim.ID]
        finding = claim.judge(result)
        link = f"[{claim.TITLE}](#{claim.ID.lower()})"
        rows.append([claim.ID, link, f"**{VERDICTS[finding.verdict]}**", finding.measured])
        picture = "" if figures is None else f"\n![{claim.TITLE}]({figures}/{folder.name}/figure.png)\n"
        sections.append(
            f'<a id="{claim.ID.lower()}"></a>\n\n## {claim.ID} {claim.TITLE}: {VERDICTS[finding.verdict]}\n\n> {claim.CLAIM}\n{picture}\n'
            f"{finding.paragraph.strip()}\n\n*Setting:* {claim.SETTING} *Again:* `python -m evidence --only {claim.ID}`; "
            f"[script and result](../evidence/{folder.name}/)."
        )
    head = _HEAD.replace("{whole}", _took(whole))
    return "\n\n".join([head + "\n" + table(["", "claim", "verdict", "measured"], rows), *sections]) + "\n"


def _took(whole: Mapping[str, Any] | None) -> str:
    if whole is None:
        return ""
    return (
        f"All of it was measured in one call, in {round(whole['seconds'] / 60)} minutes on {whole['cpus']} cores"
        f"{', ' + whole['beside'] if whole.get('beside') else ''}. "
    )


def write_document(
    file: Path,
    claims: Sequence[tuple[Path, Claim]],
    results: Mapping[str, Mapping[str, Any]],
    figures: str | None,
    whole: Mapping[str, Any] | None,
) -> None:
    """Write the page into `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(document(claims, results, figures, whole))
