"""One style of all pictures: palette, text size, and names beside what they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oprd.files import writing

# Okabe and Ito's hues, each at another lightness, so that they also differ in grey; all are dark enough for lines on white.
COLOURS = ("#0072B2", "#CA8600", "#571853", "#D55E00", "#00664B", "#623F1E", "#C76BA0", "#10264F")
MARKERS = "osD^vP*X"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
INK, QUIET = "#222222", "#777777"
TEACHER, BEFORE = (0, (5, 2)), (0, (1, 1.5))
"""Dashes of the lines of the teacher and of the student before training."""
FONT = 10.0
"""Points, of all text."""
WIDTH = 6.8
"""Inches: the text of a printed page. In a README this is about 800 pixels."""
DPI = 160
_LINE = 1.25 * FONT  # points from one line of text to the next


@dataclass(frozen=True)
class End:
    """The name of a line, and where the line ends. `x` is None for a line that crosses the whole panel."""

    text: str
    x: float | None
    y: float
    colour: str = INK


def colour(index: int) -> str:
    """The colour of a line."""
    return COLOURS[index % len(COLOURS)]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line, as arguments of `Axes.plot`. Lines of one colour differ in dashes."""
    dashes = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)], "linestyle": dashes}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures inside this context: it holds matplotlib's settings, and restores them."""
    from matplotlib import rc_context

    sizes = ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize")
    settings: dict[Any, Any] = {
        **dict.fromkeys((*sizes, "legend.title_fontsize", "figure.titlesize", "figure.labelsize"), FONT),
        "font.family": "DejaVu Sans", "text.parse_math": False,  # names may hold a dollar
        "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
        "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
        "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
        "figure.facecolor": "white", "axes.facecolor": "white", "lines.linewidth": 1.6, "lines.markersize": 4.5,
    }  # fmt: skip
    with rc_context(settings):
        yield


def new_figure(height: float, width: float = WIDTH) -> Any:
    """An empty figure, in inches. Call it inside `style`."""
    # matplotlib's object interface needs no display and no global state of pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG whatever the suffix, whole or not at all. Equal figures give equal bytes."""
    with writing(file) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", metadata={"Software": None})


def level(axis: Any, value: float, text: str, dashes: Any) -> End:
    """Draw a horizontal line across a panel; give its name to `name_ends`."""
    axis.axhline(value, color=INK, linestyle=dashes, linewidth=1.1)
    return End(text, None, value)


def mark(axis: Any, value: float, text: str, dashes: Any, *, align: str = "center") -> None:
    """Draw a vertical line across a panel and write its name above it."""
    axis.axvline(value, color=INK, linestyle=dashes, linewidth=1.1)
    axis.annotate(
        text, (value, 1), xycoords=axis.get_xaxis_transform(), xytext=(0, 2), textcoords="offset points", ha=align, va="bottom",
        annotation_clip=False,
    )  # fmt: skip


def band(axis: Any, x: Sequence[float], low: Sequence[float], high: Sequence[float], fill: str) -> None:
    """Draw an interval around a line."""
    axis.fill_between(x, low, high, color=fill, alpha=0.15, linewidth=0)


def name_ends(*named: tuple[Any, Sequence[End]]) -> None:
    """Write the names of lines in a column right of their panel, at the heights where the lines end, apart from each other.

    A thin line joins a name to an end that is elsewhere. Call it last, and once: the layout must know everything else.

    Args:
        named: panels of one picture, each with the ends of its lines.
    """
    if named:
        named[0][0].figure.figure.draw_without_rendering()  # of the whole picture: computes the layout
    for axis, ends in named:
        _name_ends(axis, ends)


def _name_ends(axis: Any, ends: Sequence[End]) -> None:
    box, points = axis.get_window_extent(), 72 / axis.figure.dpi
    right, tall = axis.get_xlim()[1], box.height * points
    order = sorted(ends, key=lambda end: (axis.transData.transform((right, end.y))[1], end.text))
    own = [(axis.transData.transform((right, end.y))[1] - box.y0) * points for end in order]
    heights = spread(own, [_LINE * (1 + end.text.count("\n")) for end in order], tall)
    joined = [
        abs(at - height) > FONT / 3
        or (end.x is not None and (box.x1 - axis.transData.transform((end.x, end.y))[0]) * points > _LINE)
        for end, at, height in zip(order, own, heights, strict=True)
    ]  # fmt: skip
    column = 1 + (14 if any(joined) else 4) / (box.width * points)
    for end, height, far in zip(order, heights, joined, strict=True):
        line = {
            "arrowstyle": "-",
            "color": end.colour,
            "alpha": 0.6,
            "linewidth": 0.7,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 2,
        }
        axis.annotate(
            end.text, (right if end.x is None else end.x, end.y), xytext=(column, height / tall), textcoords="axes fraction",
            color=end.colour, va="center", annotation_clip=False, arrowprops=line if far else None,
        )  # fmt: skip


def name_two(axis: Any, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    """Write the names of two lines above the upper and below the lower one, where they are farthest apart.

    Args:
        axis: its first line has colour 0, its second one colour 1.
        x: where both have values.
        lines: name → values.
    """
    one, other = lines.values()
    place = max(range(min(len(one), len(other))), key=lambda i: abs(one[i] - other[i]))
    for index, (text, values) in enumerate(lines.items()):
        upper = values[place] == max(one[place], other[place])
        axis.annotate(
            text, (x[place], values[place]), xytext=(0, 7 if upper else -7), textcoords="offset points", color=colour(index),
            ha="center", va="bottom" if upper else "top",
        )  # fmt: skip
    axis.margins(y=0.25)


def spread(middles: Sequence[float], sizes: Sequence[float], top: float) -> list[float]:
    """Move texts apart, given their middles in ascending order: first up, then down below `top`. They may overlap."""
    if sum(sizes) > top > 0:
        sizes = [size * top / sum(sizes) for size in sizes]
    moved: list[float] = []
    for middle, size in zip(middles, sizes, strict=True):
        least = moved[-1] + (sizes[len(moved) - 1] + size) / 2 if moved else middle
        moved.append(max(middle, least))
    limit = top
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit - sizes[index] / 2)
        limit = moved[index] - sizes[index] / 2
    return moved


def in_percent(axis: Any) -> None:
    """Show shares on an x or y axis in percent; the axis label names the unit."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1, symbol=None))


def plain_log(axis: Any, most: int = 6) -> None:
    """Label a logarithmic x or y axis with plain numbers: 0.1, 1, 10; within less than two decades also 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    steps = (1.0,) if low > 0 and high / low >= 100 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def step_axis(axis: Any) -> None:
    """Label the x axis with whole steps."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
