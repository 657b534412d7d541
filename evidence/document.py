"""The pages that are written from the committed results: docs/evidence.md (verdicts) and a README in each claim's folder (details)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.claim import PRETRAINED, Claim, Finding, Result, rule
from evidence.words import COMPARISONS, NOT_MEASURED, RULES, VERDICTS, table

DETAILS = "README.md"
Claims = Sequence[tuple[Path, Claim]]
_PAGE = """# Evidence

{count} claims of the paper (arXiv 2606.06021) and of the field, each at a scale that anyone can re-run. The paper reports one seed, chooses
checkpoints on its test sets and has no full-vocabulary baseline. The models here are small: a verdict may differ at 7B.

{words}

{comparisons}

{verdicts}

Intervals are 95 %, Student's t over seeds; `±` is half of one, over differences seed by seed. Each claim's folder has figure, numbers, setting and
script.

## Rules

`judge` in each claim's `claim.py` computes the verdict from `result.json` alone, by this rule:

{rules}

## Against the paper

{against}

## Measure again

    make evidence                            # measures the claims on small models; continues after interruptions
    make evidence-real                       # E11, on a pretrained model: rates, then seeds; hours, continues after interruptions
    make evidence-quick                      # a tenth of the work, in runs/: checks that it runs
    .venv/bin/python -m evidence --only E7   # one claim
    .venv/bin/python -m evidence --only E14,E24,E25,E26,E27,E28 --tune --again   # the others on a pretrained model, likewise
    .venv/bin/python -m evidence --tune      # also chooses the learning rates again
    .venv/bin/python -m evidence --document  # rewrites pages and pictures from committed results

{whole}Earlier
measurements: [objectives](../evidence/objectives/README.md), [bridges](../evidence/bridge/README.md), [demo and SmolLM2](../evidence/first_light/README.md).
"""


def document(page: Path, claims: Claims, results: Mapping[str, Result], whole: Mapping[str, Any] | None) -> str:
    """The page of verdicts: what the words mean, one row a claim, the rules, and what contradicts the paper.

    Args:
        page: the file that will hold the page; its links are relative to it.
        claims: in their order, each with the folder of its README.
        results: claim → its result; a claim without one is listed as not measured.
        whole: seconds, cpus, workers of the call that measured all claims; None: there was none.
    """
    findings = {claim.ID: claim.judge(results[claim.ID]) for _, claim in claims if claim.ID in results}
    rows = []
    for folder, claim in claims:
        if claim.ID not in findings:
            rows.append([claim.ID, claim.TITLE, NOT_MEASURED, ""])
            continue
        finding = findings[claim.ID]
        link = f"[{claim.ID}]({os.path.relpath(folder / DETAILS, page.parent)})"
        rows.append([link, claim.TITLE, f"**{VERDICTS[finding.verdict]}**", finding.number])
    return _PAGE.format(
        count=len(claims),
        words=table(["verdict", "when"], [[f"**{word}**", when] for word, when in RULES.items()]),
        comparisons=COMPARISONS,
        verdicts=table(["", "claim", "verdict", "measured"], rows),
        rules=_rules([claim for _, claim in claims]),
        against=_against(findings),
        whole=_took(whole),
    )


def _rules(claims: Sequence[Claim]) -> str:
    """Each rule once, with the claims that it judges."""
    judged: dict[str, list[str]] = {}
    for claim in claims:
        judged.setdefault(rule(claim), []).append(claim.ID)
    return "\n".join(f"- **{', '.join(names)}** {text}" for text, names in judged.items())


def _against(findings: Mapping[str, Finding]) -> str:
    """Every line in which a result contradicts the paper."""
    lines = [f"- **{name}** {finding.against}" for name, finding in findings.items() if finding.against]
    return "\n".join(lines) or "No measured claim contradicts the paper."


def details(claim: Claim, result: Result) -> str:
    """The README of a claim's folder: claim, verdict with its rule, figure, numbers, setting."""
    finding = claim.judge(result)
    against = f"**Against the paper.** {finding.against}\n\n" if finding.against else ""
    return (
        f"# {claim.ID} {claim.TITLE}: {VERDICTS[finding.verdict]}\n\n> {claim.CLAIM}\n\n"
        f"**{VERDICTS[finding.verdict].capitalize()}**: {finding.number}. *Rule*: {rule(claim)}\n\n![{claim.TITLE}](figure.png)\n\n"
        f"{finding.paragraph.strip()}\n\n{against}**Setting.** {claim.SETTING}\n\n`python -m evidence --only {claim.ID}{' --again' if claim.ID in PRETRAINED else ''}` measures it "
        "again. "
        "Script: [claim.py](claim.py). Numbers: [result.json](result.json). All verdicts: [docs/evidence.md](../../docs/evidence.md).\n"
    )


def _took(whole: Mapping[str, Any] | None) -> str:
    if whole is None:
        return ""
    beside = f" {whole['beside']}" if whole.get("beside") else ""
    return f"One call measured {whole.get('claims', 'all of it')} in {round(whole['seconds'] / 60)} minutes on {whole['cpus']} cores.{beside} "


def write_documents(page: Path, claims: Claims, results: Mapping[str, Result], whole: Mapping[str, Any] | None) -> None:
    """Write the page of verdicts, and the details of each measured claim into its folder. Arguments: see `document`."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document(page, claims, results, whole))
    for folder, claim in claims:
        if claim.ID in results:
            (folder / DETAILS).write_text(details(claim, results[claim.ID]))
