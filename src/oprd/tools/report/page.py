"""The report as one HTML page: it loads nothing, and its content security policy allows no script but our own."""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from oprd.files import write_text
from oprd.runs.pictures import colour
from oprd.tasks.measures import in_words
from oprd.tasks.near_misses import NearMisses, near_misses
from oprd.tools.report import curves, draw
from oprd.tools.report.comparison import Comparison
from oprd.tools.report.read import RunRecord
from oprd.tools.report.rollouts import (
    Distances,
    Pair,
    Side,
    as_side,
    as_wrong,
    choose,
    disagreements,
    is_wrong,
    logged_pairs,
    read_distances,
    spread_rows,
)
from oprd.tools.report.table import duration, table
from oprd.tools.report.text import plain, shown, shown_token

MARK = "<!-- written by oprd report -->"
_TEMPLATE, _STYLE, _SCRIPT = "page.html.jinja", "page.css", "page.js"
_LEVELS = 10  # colours of distances; page.css has the same number of classes
_SHOWN_TOKENS, _SHOWN_PAIRS, _SHOWN_ROLLOUTS, _SHOWN_DISAGREEMENTS = 4000, 12, 200, 20


@dataclass(frozen=True)
class Picture:
    """A picture with its alternative text and caption."""

    uri: str
    alt: str
    caption: str
    title: str


@dataclass(frozen=True)
class Rollouts:
    """The rollouts of one run: labelled pairs, then the others. `heading` names the students that wrote them."""

    heading: str
    early: str
    late: str
    chosen: list[tuple[str, Pair]]
    rest: list[Pair]


@dataclass(frozen=True)
class Section:
    """The part of the page about a single run. `logged` are some of the `count` rollouts that it logged."""

    run: int
    record: RunRecord
    notes: list[str]
    distances: Distances | None
    rollouts: list[Rollouts]
    near: NearMisses
    command: str
    logged: list[Side]
    count: int


def render(records: Sequence[RunRecord], comparisons: Sequence[Comparison] = ()) -> str:
    """The page about these runs. It depends on their files alone.

    Args:
        records: of the runs.
        comparisons: whose tables head the page.
    """
    sections = [_section(run, record) for run, record in enumerate(records)]
    panels, unmeasured = curves.panels(records)
    grades = curves.grades_panel(records)
    of_panel = {panel.title: curves.curves(records, panel) for panel in (grades, *panels)}
    pictures, missing = _pictures(records, grades, panels, of_panel)
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in (_STYLE, _SCRIPT))
    colours = "".join(f".run{run}{{color:{colour(run)}}}" for run in range(len(records)))
    style = f"\n{style}{colours}\n"
    scales = _Scales(sections)
    splits = {run: split for run, record in enumerate(records) if (split := curves.time_split(record))}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "shown": shown,
        "shown_token": shown_token,
        "plain": plain,
        "letter": draw.letter,
        "layers": _layers,
        "duration": duration,
        "disagreements": disagreements,
    }
    environment.globals |= {
        "level": scales.level,
        "levels_of_layers": scales.of_layers,
        "numbers": lambda panel: [(c, curves.extent(c)) for c in of_panel[panel.title]],
        "max_tokens": _SHOWN_TOKENS,
        "max_disagreements": _SHOWN_DISAGREEMENTS,
    }
    return environment.get_template(_TEMPLATE).render(
        mark=Markup(MARK),
        policy=_policy(style, script),
        style=Markup(style),  # our own texts; the policy allows their digests
        script=Markup(script),
        records=records,
        comparisons=comparisons,
        sections=sections,
        rows=table(records),
        pictures=pictures,
        panels=[grades, *panels],
        missing=[*missing, *unmeasured],
        heats=_heats(records),
        times=_times(splits, [record.name for record in records]),
        phases=curves.PHASES,
        splits=splits,
        levels=_LEVELS,
        scales=scales.tops,
    )


def write_page(file: Path, page: str) -> None:
    """Write the page in one step: to a temporary file, then renamed.

    Raises:
        ValueError: as `check_page_file`.
    """
    check_page_file(file)
    write_text(file, page)


def check_page_file(file: Path) -> None:
    """Refuse a place where no report may be written.

    Raises:
        ValueError: `file` exists and is not a report, or its folder does not exist.
    """
    if file.is_dir():
        raise ValueError(f"output: {file} is a folder; name a file such as {file / 'report.html'}")
    if not file.parent.is_dir():
        raise ValueError(f"output: there is no folder {file.parent}; make it first or choose another")
    if file.exists() and MARK.encode() not in file.read_bytes()[:200]:
        raise ValueError(f"output: {file} holds something that no report wrote; choose another file")


def _policy(style: str, script: str) -> str:
    """A content security policy that allows embedded pictures, this style sheet and this script, and nothing else."""
    styles, scripts = (
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (style, script)
    )
    return f"default-src 'none'; img-src data:; style-src {styles}; script-src {scripts}; base-uri 'none'; form-action 'none'"


def _pictures(
    records: Sequence[RunRecord],
    grades: curves.Panel,
    panels: Sequence[curves.Panel],
    of_panel: Mapping[str, list[curves.Curve]],
) -> tuple[list[Picture], list[str]]:
    """Pictures of grades and of the panels; and the title of grades where there are none."""
    missing = []
    evaluated = {run: points for run, record in enumerate(records) if (points := curves.evaluations(record))}
    teachers = {run: v for run, record in enumerate(records) if (v := curves.teacher_accuracy(record)) is not None}
    rollouts = of_panel[grades.title]
    pictures = []
    if rollouts or evaluated or teachers:
        ends = [
            f"{draw.letter(run)}: {_at_step(records[run], points[0])}, {_at_step(records[run], points[-1])}"
            for run, points in evaluated.items()
        ]
        pictures.append(
            Picture(
                draw.draw_accuracy(grades, rollouts, evaluated, teachers),
                f"{grades.title} over steps. Evaluations: {'; '.join(ends) or 'none'}.",
                f"Squares: {'Avg@k' if grades.share else 'the mean'} on the evaluation problems, with its 95 % interval over "
                "problems. Curve: rollouts in training. Dotted: the teacher.",
                grades.title,
            )
        )
    else:
        missing.append(grades.title)
    for panel in panels:
        found = of_panel[panel.title]
        ends = [f"{draw.letter(c.run)} {c.key}: {c.values[0]:.4g} at first, {c.values[-1]:.4g} at last" for c in found]
        scale = "Logarithmic axis." if curves.is_log(panel, found) else ""
        pictures.append(
            Picture(
                draw.draw_panel(panel, found), f"{panel.title} over steps. {'; '.join(ends)}.",
                f"{panel.note} {scale}".strip(), panel.title,
            )
        )  # fmt: skip
    return pictures, missing


def _at_step(record: RunRecord, point: curves.Point) -> str:
    return f"{in_words(point.value, record.measure)} at step {point.step:.0f}"


def _heats(records: Sequence[RunRecord]) -> list[tuple[int, Picture | None]]:
    """One heat map per run on a common colour scale; None for a run without cosines."""
    found = [curves.heat(record) for record in records]
    values = [v for heat in found if heat for line in heat.values for v in line if math.isfinite(v)]
    pictures: list[tuple[int, Picture | None]] = []
    for run, heat in enumerate(found):
        if heat is None:
            pictures.append((run, None))
            continue
        ends = [f"layer {heat.layers[i]} from {heat.values[i][0]:.3f} to {heat.values[i][-1]:.3f}" for i in (0, -1)]
        alt = f"Cosine of {len(heat.layers)} layers at {len(heat.steps)} steps: {'; '.join(ends)}."
        uri = draw.draw_heat(heat, min(values), max(values))
        of = "" if len(heat.steps) == heat.measured else f" of {heat.measured} measured"
        pictures.append((run, Picture(uri, alt, f"{len(heat.layers)} layers, {len(heat.steps)} steps{of}", "")))
    return pictures


def _times(splits: dict[int, dict[str, float]], names: Sequence[str]) -> Picture | None:
    if not splits:
        return None
    words = [
        f"{draw.letter(run)}: {', '.join(f'{phase} {s:.3g} s' for phase, s in split.items())}"
        for run, split in splits.items()
    ]
    return Picture(draw.draw_times(splits, names), f"Seconds of a step. {'; '.join(words)}.", "", "")


def _section(run: int, record: RunRecord) -> Section:
    notes = list(record.notes)
    distances, problem = read_distances(record.folder, record.summary.get("steps"))
    if problem:
        notes.append(problem)
    groups = []
    if distances is not None:
        notes += [f"distances: {note}" for note in distances.notes]
        chosen = choose(distances.before_after)
        heading = f"The same problems before and after training ({distances.sampling})"
        groups.append(_group(heading, "before training", "after training", distances.before_after, chosen))
        widest = [("best and worst", pair) for pair in distances.best_worst[:1]]
        heading = "Several answers to the same problem after training"
        groups.append(_group(heading, "best answer", "worst answer", distances.best_worst, widest))
    logged = distances.logged if distances is not None else []
    if not logged:
        logged = [Pair(as_side(a), as_side(b)) for a, b in logged_pairs(record.completions, _SHOWN_PAIRS)]
    groups.append(_group("Rollouts logged in training", "early", "late", logged, choose(logged)))
    place = record.name if record.folder.is_absolute() else str(record.folder)  # an absolute path would name a machine
    name = shlex.quote(place)
    command = f"oprd train --config {name}/config.yaml --output_dir {name}-again" if record.config else ""
    near = near_misses(as_wrong(row) for row in record.completions if is_wrong(row))
    rows, count = spread_rows(record.completions, _SHOWN_ROLLOUTS)
    groups = [group for group in groups if _all(group)]
    return Section(run, record, notes, distances, groups, near, command, [as_side(row) for row in rows], count)


def _group(heading: str, early: str, late: str, pairs: Sequence[Pair], chosen: list[tuple[str, Pair]]) -> Rollouts:
    picked = [id(pair) for _, pair in chosen]
    return Rollouts(heading, early, late, chosen, [pair for pair in pairs if id(pair) not in picked])


def _all(group: Rollouts) -> list[Pair]:
    return [*(pair for _, pair in group.chosen), *group.rest]


def _layers(layers: Sequence[int]) -> str:
    """Layers as text; consecutive layers as a range."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


class _Scales:
    """The colour scales of distances: one for the mean over layers, and one for each layer that has its own.

    Attributes:
        tops: name of a scale → the distance with its strongest colour, the 98th percentile of all tokens. Empty without distances.
    """

    def __init__(self, sections: Sequence[Section]) -> None:
        sides = [
            (section.distances.shown_layers if section.distances else [], side)
            for section in sections for group in section.rollouts for pair in _all(group) for side in (pair.early, pair.late)
        ]  # fmt: skip
        found: dict[str, list[float]] = {}
        for layers, side in sides:
            for name, line in [("", side.distances), *zip(map(str, layers), side.by_layer, strict=False)]:
                found.setdefault(name, []).extend(line)
        order = sorted(found, key=lambda name: int(name or 0))
        self.tops = {name: top for name in order if (top := _percentile(found[name])) > 0}

    def level(self, distance: float, name: str = "") -> int:
        """The colour of a distance on a scale."""
        top = self.tops.get(name, 0.0)
        return min(int(_LEVELS * distance / top), _LEVELS - 1) if top else 0

    def of_layers(self, side: Side, layers: Sequence[int], token: int) -> str:
        """The colours of a token, one digit a scale in the order of `tops`; a layer that was not kept has the mean's."""
        lines = dict(zip(map(str, layers), side.by_layer, strict=False)) | {"": side.distances}
        return "".join(
            str(self.level(lines.get(name, side.distances)[token], name if name in lines else "")) for name in self.tops
        )


def _percentile(values: Sequence[float]) -> float:
    """The 98th percentile; 0 without values."""
    return sorted(values)[int(0.98 * (len(values) - 1))] if values else 0.0
