"""The texts of a matplotlib figure that a reader sees, and those that cannot be read."""

from __future__ import annotations

from itertools import combinations

from matplotlib.text import Text


def shown_texts(figure):
    """Every text that a reader sees: tick labels inside their axis, and all other texts."""
    ticks, shown = set(), []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {id(tick.label1), id(tick.label2)}
                if low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    shown += [tick.label1, tick.label2]
    shown += [text for text in figure.findobj(Text) if id(text) not in ticks]
    return [text for text in shown if text.get_visible() and text.get_text().strip()]


def covered(figure):
    """Pairs of texts that cover each other, and texts that leave the figure. Without the lines that lead to names."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), Text.get_window_extent(text).shrunk(0.98, 0.85)) for text in shown_texts(figure)]
    pairs = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    inside = figure.bbox.padded(2)
    return pairs + [a for a, box in boxes if not (inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1))]
