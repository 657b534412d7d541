"""Write what the site takes from elsewhere: tables of docs/recipes.md and docs/metrics.md, and docs/llms.txt (a test compares)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES, METRICS, INDEX, LLMS = (ROOT / "docs" / name for name in ("recipes.md", "metrics.md", "index.md", "llms.txt"))
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN_STEPS = (1, 5, 10, 20, 50, 100)
DEMOS = {
    "same-origin": ("`oprd demo`", "first_light/demo_summary.json"),
    "wider": ("`oprd demo --pair wider`", "bridge/demo_wider_summary.json"),
    "other-tokenizer": ("`oprd demo --pair other-tokenizer`", "bridge/demo_other_tokenizer_summary.json"),
}


def _read(name: str) -> Any:
    return json.loads((ROOT / "evidence" / name).read_text())


def _score(measured: dict[str, Any]) -> str:
    low, high = (100 * end for end in measured["ci95"])
    return f"{100 * measured['avg_at_k']:.1f} % [{low:.1f}, {high:.1f}]"


def measured() -> str:
    """The table of the demos, from the committed results."""
    peaks = _read("first_light/demo_memory.json")["peak_mib"]
    lines = [
        "| command | before | after | teacher | steps | time | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair, (command, file) in DEMOS.items():
        run = _read(file)
        scores = [_score(run[name]) for name in ("student_before", "student_after", "teacher")]
        cost = [str(run["steps"]), f"[{run['seconds']:.0f} s](../evidence/{file})", f"{peaks[pair]:.0f} MiB"]
        lines.append(f"| {' | '.join([command, *scores, *cost])} |")
    return "\n".join(lines)


def recipes(text: str) -> str:
    """docs/recipes.md with its table up to date."""
    return BLOCK.sub(lambda match: f"{match[1]}{measured()}\n{match[2]}", text)


def healthy() -> str:
    """The table of some steps of the demo, from its committed metrics."""
    rows = [
        json.loads(line) for line in (ROOT / "evidence" / "first_light" / "demo_metrics.jsonl").read_text().splitlines()
    ]
    lines = ["| step | `loss` | `cosine` | `accuracy` | length |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "loss" in row and row["step"] in SHOWN_STEPS:
            layers = [value for key, value in row.items() if key.startswith("cosine/layer_")]
            length = row["completions/mean_length"]
            cells = (
                f"{row['loss']:.3f}",
                f"{sum(layers) / len(layers):.3f}",
                f"{row['accuracy']:.0%}",
                f"{length:.0f}",
            )
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def metrics(text: str) -> str:
    """docs/metrics.md with its table up to date."""
    return BLOCK.sub(lambda match: f"{match[1]}{healthy()}\n{match[2]}", text)


def first_sentence(page: str) -> str:
    """First sentence of a page's first paragraph, in plain words."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if re.match(r"[^\W\d]|[`\[]", part.strip())]
    plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", " ".join(paragraphs[0].split())) if paragraphs else ""
    return re.split(r"(?<=[.:])\s", plain)[0].rstrip(":.")


def title(page: str) -> str:
    """A page's heading."""
    return page.splitlines()[0].removeprefix("# ").replace("`", "")


def llms() -> str:
    """docs/llms.txt (llmstxt.org): the sections of docs/index.md, with each page's title and what is
    said of it there, or else its first sentence."""
    index = INDEX.read_text()
    lines = [f"# {title(index)}", "", f"> {first_sentence(index)}."]
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        lines += ["", f"## {section.splitlines()[0]}", ""]
        for name, said in re.findall(r"\]\(([\w./-]+\.md)\)(?:: (.+))?", section):
            page = (INDEX.parent / name).read_text()
            lines.append(f"- [{title(page)}]({name}): {said or first_sentence(page)}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write all."""
    RECIPES.write_text(recipes(RECIPES.read_text()))
    METRICS.write_text(metrics(METRICS.read_text()))
    LLMS.write_text(llms())


if __name__ == "__main__":
    main()
