"""The committed pictures, and what several claims draw: rows of seeds, and the lines of teacher and start."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence.claim import Claim, Result
from evidence.comparisons import Record, of
from evidence.real_model_gpu.picture import FIGURE as FIGURE_OF_CURVES
from evidence.real_model_gpu.picture import curves
from evidence.real_model_gpu.picture import draw as draw_curves
from evidence.words import percent
from oprd.runs.curves import draw_run
from oprd.runs.pictures import BEFORE, COLOURS, QUIET, TEACHER, in_percent, mark, new_figure, save, style
from oprd.tools.compare.figure import draw_comparison
from oprd.tools.compare.interval import mean_and_interval
from oprd.tools.diagnose.show import draw_report

HERE = Path(__file__).parent
RESULT, FIGURE = "result.json", "figure.png"

OURS, OTHER = COLOURS[0], COLOURS[1]
REFERENCES = {"before": BEFORE, "teacher": TEACHER}
SEEDS = "dots: seeds; band: 95 % interval of the mean over seeds, cut at 0 and 100 %"


def draw_claim(claim: Claim, result: Result) -> Any:
    """The figure of a claim. Call it inside `oprd.runs.pictures.style`."""
    figure = new_figure(3.2)
    claim.draw(result, figure)
    return figure


def redraw(claims: Iterable[tuple[Path, Claim]]) -> Iterator[Path]:
    """Draw every committed picture anew from the committed data; yields the files."""
    for file, draw in committed(claims).items():
        with style():
            save(draw(), file)
        yield file


def committed(claims: Iterable[tuple[Path, Claim]]) -> dict[Path, Callable[[], Any]]:
    """File of each picture in the repository → what draws it from committed data, inside `oprd.runs.pictures.style`."""
    found: dict[Path, Callable[[], Any]] = {
        folder / FIGURE: partial(draw_claim, claim, _read(folder / RESULT))
        for folder, claim in claims
        if (folder / RESULT).is_file()
    }
    for name in (
        "objectives/compare",
        "bridge/compare_factors",
        "bridge/compare_wider",
        "bridge/compare_other_tokenizer",
    ):
        found[HERE / f"{name}.png"] = partial(draw_comparison, _read(HERE / f"{name}.json"))
    runs, docs = HERE / "first_light", HERE.parent / "docs"
    for name in ("demo", "smollm2"):
        summary = _read(runs / f"{name}_summary.json")
        found[docs / f"{name}.png"] = partial(draw_run, runs / f"{name}_metrics.jsonl", summary)
    found[FIGURE_OF_CURVES] = _curves
    found[docs / "diagnose.png"] = partial(draw_report, _read(runs / "diagnose.json"))
    return found


def _curves() -> Any:
    figure = new_figure(3.6)
    draw_curves(curves(), figure)
    return figure


def _read(file: Path) -> Any:
    return json.loads(file.read_text())


def accuracy_rows(
    axis: Any, found: Mapping[str, Sequence[float]], ours: Sequence[str] = (), unit: str = "Avg@2, %"
) -> None:
    """One row a name: a dot a seed, the 95 % t-interval as a band, and the mean as a number.

    Args:
        axis: an empty panel.
        found: name → accuracy of each seed, top row first.
        ours: names in the colour of this method.
        unit: label of the x axis.
    """
    seed_rows(axis, found, ours, number=percent, most=1.0)
    axis.set(xlim=(-0.02, 1.02), xlabel=unit)
    in_percent(axis.xaxis)


def seed_rows(
    axis: Any,
    found: Mapping[str, Sequence[float]],
    ours: Sequence[str] = (),
    *,
    number: Callable[[float | None], str],
    most: float = math.inf,
) -> None:
    """One row a name: a dot a seed, the 95 % t-interval between 0 and `most` as a band, and the mean as `number` writes it."""
    for row, (name, values) in enumerate(found.items()):
        mean, interval = mean_and_interval(list(values))
        low, high = interval or (mean, mean)
        colour, marker = (OURS, "o") if name in ours else (OTHER, "s")
        axis.plot(
            [max(low, 0), min(high, most)], [row, row], color=colour, alpha=0.35, linewidth=9, solid_capstyle="butt"
        )
        axis.plot(values, [row] * len(values), marker, color=colour, markersize=5, mec="white", mew=0.6)
        axis.annotate(
            number(mean), (1, row), xycoords=axis.get_yaxis_transform(), xytext=(6, 0), textcoords="offset points", va="center"
        )  # fmt: skip
    name_rows(axis, list(found))


def draw_objectives(
    figure: Any,
    runs: Sequence[Record],
    names: Mapping[str, str],
    *,
    ours: Sequence[str],
    reference: str,
    title: str,
    unit: str,
) -> None:
    """The whole figure of a claim that compares objectives: `accuracy_rows` in one panel, with teacher and start.

    Args:
        figure: an empty figure.
        runs: of the claim.
        names: objective → its name in the figure, top row first.
        ours: objectives in the colour of this method.
        reference: the objective whose runs say where teacher and start are.
        title: of the panel.
        unit: label of the x axis.
    """
    axis = figure.subplots()
    found = {text: [r["final"] for r in of(runs, name)] for name, text in names.items()}
    accuracy_rows(axis, found, ours=[names[name] for name in ours], unit=unit)
    title_above_marks(axis, title)
    reference_lines(axis, of(runs, reference))
    note(figure, SEEDS)


def name_rows(axis: Any, names: Sequence[str]) -> None:
    """Names as labels of the y axis, the first at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")


def reference_lines(axis: Any, runs: Sequence[Record], *, numbers: bool = True) -> None:
    """Draw and name the accuracy of the teacher and of the student before training above an accuracy axis."""
    values = {key: mean_and_interval([r[key] for r in runs])[0] for key in REFERENCES}
    close = abs(values["teacher"] - values["before"]) < 0.4  # then their names lie on the two sides
    for (key, value), dashes, side in zip(values.items(), REFERENCES.values(), ("right", "left"), strict=True):
        mark(axis, value, f"{key} {percent(value)}" if numbers else key, dashes, align=side if close else "center")


def title_above_marks(axis: Any, text: str) -> None:
    """A title above the names that `mark` writes."""
    axis.set_title(text, pad=18)


def note(figure: Any, text: str) -> None:
    """A grey line below the whole figure: what dots and bands are."""
    figure.supxlabel(text, color=QUIET)
