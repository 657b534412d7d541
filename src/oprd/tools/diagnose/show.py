"""A report as tables for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from oprd.runs.pictures import BEFORE, level, look, name_ends, name_two, new_figure, plain_log, save, style
from oprd.sanitize import printable
from oprd.tasks.measures import ACCURACY, REWARD, in_words

Report = Mapping[str, Any]


def tables(report: Report) -> Iterator[tuple[str, Table]]:
    """Yield (title, table): the pair, its layers, positions and distributions, and the advice."""
    yield f"{printable(report['student'])} <- {printable(report['teacher'])}", _pair(report)
    if report["layers"] is not None:
        yield "layer by layer", _layers(report)
    if report["layers"] is None or report["verdict"]["bridge"]:
        yield "the layer map with the highest CKA", _best_map(report)
    yield "means over the first and the last k response positions", _positions(report)
    yield "where the distributions differ most", _most_different(report)
    yield "what to choose", _advice(report)


def _table(*columns: str) -> Table:
    return Table(*columns, box=SIMPLE, pad_edge=False)


def _pair(report: Report) -> Table:
    table = _table("", "student", "teacher")
    sides = [report["models"][side] for side in ("student", "teacher")]
    table.add_row("layers, width", *(f"{side['layers']}, {side['width']}" for side in sides))
    table.add_row("parameters", *(f"{side['parameters']:,}" for side in sides))
    table.add_row("vocabulary", *(f"{side['vocabulary']:,}" for side in sides))
    tokens, ends, output = report["tokens"], report["ends"], report["output"]
    same = "the same ids" if tokens["same_ids"] else "other ids"
    if tokens["own_text"]:
        same += f"; {tokens['aligned']:.1%} of positions have a partner, {tokens['one_to_one']:.1%} with the same next token"
    table.add_row("tokenizers", "", same)
    table.add_row("end tokens", *(_end(ends[side], ends["positions"]) for side in ("student", "teacher")))
    if output["reverse_kl"] is not None:
        table.add_row("entropy, nats", *(f"{output[f'entropy_{side}']:.3g}" for side in ("student", "teacher")))
        kl = f"reverse {output['reverse_kl']:.3g}, forward {output['forward_kl']:.3g} nats; overlap {output['overlap']:.1%}"
        table.add_row("KL", "", kl)
    if report["accuracy"] is not None:
        both = [report["accuracy"][side] for side in ("student", "teacher")]
        unit = REWARD if REWARD in [side.get("measure") for side in both] else ACCURACY
        table.add_row(f"{unit} [95 %]", *(_grade(side, unit) for side in both))
    return table


def _grade(side: Mapping[str, Any], unit: str) -> str:
    low, high = (in_words(end, unit, ".0%") for end in side["ci95"])
    return f"{in_words(side['accuracy'], unit)} [{low}, {high}]"


def _end(end: Mapping[str, Any], positions: int) -> Text:
    names = ", ".join(f"{printable(t)} ({i})" for t, i in zip(end["stop_tokens"], end["stop_ids"], strict=True))
    if not positions:
        return Text(names)
    likeliest = f"{printable(end['likeliest_token'])} ({end['likeliest']})"
    return Text(f"{names}; most probable there {likeliest}, P(end) {end['mass']:.1%}")


def _layers(report: Report) -> Table:
    table = _table(
        "layer", "CKA", "direct R²", "cosine", "relative difference", "(1/D)·|diff.|²", "CKA, directions", "R², directions"
    )  # fmt: skip
    layers = report["layers"]
    names = (
        "cka", "direct_r2", "cosine", "relative_difference", "squared_difference", "cka_directions", "direct_r2_directions",
    )  # fmt: skip
    for index, layer in enumerate(layers["layer"]):
        table.add_row(str(layer), *(_number(layers[name][index]) for name in names))
    return table


def _best_map(report: Report) -> Table:
    table = _table("student layer", "teacher layer", "CKA", "the paper's map", "CKA")
    cka = report["cka"]
    columns = zip(cka["best_map"], cka["best"], cka["proportional_map"], cka["proportional"], strict=True)
    for layer, (best, value, proportional, other) in enumerate(columns, 1):
        table.add_row(str(layer), str(best), f"{value:.3f}", str(proportional), f"{other:.3f}")
    return table


def _positions(report: Report) -> Table:
    curves = {name: report["positions"][name] for name in ("cosine", "reverse_kl")}
    shown = {name: curve for name, curve in curves.items() if curve is not None}
    heads = {"cosine": "cosine", "reverse_kl": "reverse KL"}
    table = _table("k", *(f"{heads[name]}, {side} k" for name in shown for side in ("first", "last")), "longer than k")
    longest = max(shown.values(), key=lambda curve: len(curve["k"]), default=None)
    for index, k in enumerate(longest["k"] if longest else ()):
        cells = [
            _number(curve[f"{side}_k"][index] if index < len(curve["k"]) else None)
            for curve in shown.values()
            for side in ("first", "last")
        ]
        assert longest is not None
        table.add_row(str(k), *cells, f"{longest['longer'][index]:.0%}")
    if any(curve["at_end"] is not None for curve in shown.values()):
        table.add_row("end", *(c for curve in shown.values() for c in (_number(curve["at_end"]), "")), "")
    return table


def _most_different(report: Report) -> Table:
    table = _table("reverse KL", "prompt", "position", "text before", "token")
    for row in report["output"]["most_different"][:5]:
        place = f"{row['position']} of {row['of']}"
        table.add_row(
            f"{row['reverse_kl']:.3g}",
            str(row["row"]),
            place,
            Text(printable(row["before"])),
            Text(printable(row["token"])),
        )
    return table


def _advice(report: Report) -> Table:
    table = Table("", "choose", "because", box=SIMPLE, pad_edge=False, show_lines=True)
    for rule in report["advice"]:
        table.add_row(rule["about"], Text(printable(rule["choose"])), Text(printable(rule["because"])))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.2e}"


def plot_report(report: Report, file: Path) -> None:
    """Draw the CKA of all pairs of layers, and the means over positions (PNG)."""
    with style():
        save(draw_report(report), file)


def draw_report(report: Report) -> Any:
    """The figure of `plot_report`. Call it inside `oprd.runs.pictures.style`."""
    figure = new_figure(3.3)
    left, right = figure.subplots(1, 2)
    _draw_layers(figure, left, report["cka"])
    name = "reverse_kl" if report["verdict"]["bridge"] else "cosine"
    curve, ends = report["positions"][name], []
    if curve is not None:
        for index, side in enumerate(("first", "last")):
            right.plot(curve["k"], curve[f"{side}_k"], **look(index))
        name_two(right, curve["k"], {f"{side} k": curve[f"{side}_k"] for side in ("first", "last")})
        if curve["at_end"] is not None:
            ends.append(level(right, curve["at_end"], "end token", BEFORE))
    unit = "cosine, last layer" if name == "cosine" else "reverse KL, nats a position"
    right.set(title="Over the response", xlabel="k, positions", xscale="log", ylabel=unit)
    plain_log(right.xaxis)
    name_ends((right, ends))
    return figure


def _draw_layers(figure: Any, axis: Any, cka: Mapping[str, Any]) -> None:
    """Every pair of layers as a shade; rings mark the map with the highest CKA."""
    matrix = cka["matrix"]
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
    for ticks, layers in ((axis.set_yticks, len(matrix)), (axis.set_xticks, len(matrix[0]))):
        shown = range(0, layers, max(1, layers // 8))
        ticks(shown, [layer + 1 for layer in shown])
    best = ([teacher - 1 for teacher in cka["best_map"]], range(len(matrix)))
    axis.plot(*best, "o", mfc="none", mec="white", markersize=9, mew=3)
    axis.plot(*best, "o", mfc="none", mec="black", markersize=9, mew=1.2)
    axis.grid(visible=False)
    axis.set(title="CKA (rings: best map)", xlabel="teacher layer", ylabel="student layer")
    figure.colorbar(image, ax=axis, label="CKA of directions")
