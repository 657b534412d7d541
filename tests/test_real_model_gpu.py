"""The curves of a real model on a GPU: the best rate of each objective, and a comparison that can be planned."""

from __future__ import annotations

from evidence.real_model_gpu.picture import HERE, at_edge, best_runs, curves, draw, rows

from oprd.resolve import plan
from oprd.run_config import RunConfig
from oprd.runs.pictures import new_figure, style
from oprd.tools.compare.plan import load_comparison


def run(rate, final, name="a"):
    return {
        "objective": name,
        "learning_rate": rate,
        "final": final,
        "points": [[30, 0.1], [60, final]],
        "ci95": [0, 1],
    }


def test_the_best_rate_is_the_lower_one_on_a_tie_and_an_end_is_said():
    runs = [
        run(5e-4, 0.5),
        run(5e-5, 0.5),
        run(1.5e-4, 0.4),
        run(5e-4, 0.9, "b"),
        run(5e-5, 0.1, "b"),
        run(1e-3, 0.2, "b"),
    ]
    assert {name: own["learning_rate"] for name, own in best_runs(runs).items()} == {"a": 5e-5, "b": 5e-4}
    assert (at_edge(runs, "a"), at_edge(runs, "b")) == (True, False)
    lines = rows({"runs": runs})
    assert [line[:2] for line in lines] == [["b", "0.0005"], ["a", "5e-05 (at an end)"]]
    assert lines[0][-1] == "5e-05: 10.0, 0.001: 20.0"


def test_six_objectives_are_drawn_with_the_teacher():
    with style():
        draw(curves(), figure := new_figure(3.6))
    (axis,) = figure.axes
    assert len(axis.lines) == 7
    assert "teacher" in {text.get_text() for text in axis.texts}


def test_every_objective_can_be_planned():
    _, comparison = load_comparison(HERE / "comparison.yaml")
    assert {r["objective"] for r in curves()["runs"]} <= {*comparison.objectives}
    for changes in comparison.objectives.values():
        own = {key: value for key, value in (changes or {}).items() if key != "learning_rates"}
        plan(RunConfig.load(comparison.recipe, {**comparison.settings, **own, "output_dir": "unused", "use_cpu": True}))
