"""The documents say what the committed results say, and verdicts follow the data."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from evidence.__main__ import FIGURE, HERE, RESULT, ROOT, WHOLE, claims, measure, measured_whole, results
from evidence.claim import Finding, Work, kept_side_by_side, side_by_side
from evidence.comparisons import best_rate, committed_tuning, difference, gap_closed, of
from evidence.document import DETAILS, details, document
from evidence.readme import BLOCKS, with_blocks
from evidence.words import mean_of, percent, points, surely, table

from oprd.tools.compare.plan import load_comparison

CLAIMS = {claim.ID: claim for _, claim in claims()}
RESULTS = results(HERE)
NOT_YET: set[str] = {"E13"}
MEASURED = sorted(RESULTS, key=lambda name: int(name[1:]))
AGAIN = "run python -m evidence --document"


def test_every_claim_is_there():
    assert list(CLAIMS) == [f"E{n}" for n in range(1, 14)]
    assert set(CLAIMS) - set(RESULTS) == NOT_YET
    for folder, claim in claims():
        if claim.ID in NOT_YET:
            continue
        assert (folder / FIGURE).stat().st_size > 5000
        assert (folder / RESULT).stat().st_size < 200_000


def test_the_page_is_what_the_results_give():
    page = ROOT / "docs" / "evidence.md"
    assert page.read_text() == document(page, list(claims()), RESULTS, measured_whole(HERE)), AGAIN


@pytest.mark.parametrize("name", MEASURED)
def test_the_details_are_what_the_result_gives(name):
    folder = next(folder for folder, claim in claims() if name == claim.ID)
    assert (folder / DETAILS).read_text() == details(CLAIMS[name], RESULTS[name]), AGAIN


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_are_what_the_results_give(name):
    text = (ROOT / name).read_text()
    assert text == with_blocks(name, text, list(claims()), RESULTS), AGAIN


def test_the_readme_begins_with_the_first_claims_figure():
    text = (ROOT / "README.md").read_text()
    assert "evidence/e01_accuracy/figure.png" in text[text.index("![") :].split("\n")[0]


@pytest.mark.parametrize("name", MEASURED)
def test_every_result_can_be_judged(name):
    finding = CLAIMS[name].judge(RESULTS[name])
    assert finding.verdict in ("holds", "partly", "not")
    assert finding.number


def changed(name: str, change) -> Finding:
    result = copy.deepcopy(dict(RESULTS[name]))
    change(result)
    return CLAIMS[name].judge(result)


def set_final(result, values, key="runs"):
    """Objectives → their final accuracy in every seed, a little apart so that there is an interval."""
    for record in result[key]:
        if record["objective"] in values:
            record["final"] = values[record["objective"]] + 0.001 * (record["seed"] % 3)


ALL_LOW = dict.fromkeys(("sampled_token", "top_4", "full_reverse_kl"), 0.5)


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("E1", {"representation": 0.97, **ALL_LOW}, "holds"),
        ("E1", {"representation": 0.97, **ALL_LOW, "full_reverse_kl": 0.98}, "partly"),
        ("E1", {"representation": 0.6, **ALL_LOW}, "partly"),  # ahead, and far from the teacher
        ("E1", {"representation": 0.5, **ALL_LOW, "top_4": 0.6}, "not"),
        ("E2", {"sampled_token": 0.5, "representation": 0.6, "composite_mu_10": 0.9}, "holds"),
        ("E2", {"sampled_token": 0.5, "representation": 0.95, "composite_mu_1": 0.6, "composite_mu_10": 0.9}, "partly"),
        ("E3", {"representation": 0.8, "states_last": 0.8, "states_first": 0.5}, "holds"),
        ("E3", {"representation": 0.8, "states_last": 0.6, "states_first": 0.5}, "partly"),
        ("E3", {"representation": 0.8, "states_last": 0.5, "states_first": 0.6}, "not"),
        ("E4", {"representation": 0.9, "last": 0.1, "even": 0.2, "odd": 0.3, "last_three": 0.8}, "holds"),
        ("E4", {"representation": 0.7, "last": 0.1, "even": 0.2, "odd": 0.3, "last_three": 0.8}, "not"),
    ],
)
def test_verdicts_follow_the_data(name, values, verdict):
    assert changed(name, lambda result: set_final(result, values)).verdict == verdict


def test_the_alarms_verdict_follows_the_data():
    def case(quiet, false):
        def change(result):
            good = {"of": "E1", "objective": "representation", "learning_rate": 1e-3, "before": 0.2, "final": 0.9}
            bad = {**good, "final": 0.0}
            cosine = [0.8, 0.9]
            result["runs"] = [
                *({**bad, "seed": i, "cosine": cosine, "alarms": [] if i < quiet else [20]} for i in range(10)),
                *({**good, "seed": i, "cosine": cosine, "alarms": [20] if i < false else []} for i in range(10)),
            ]

        return changed("E12", change).verdict

    assert [case(0, 0), case(1, 1), case(0, 2), case(4, 0), case(6, 0)] == ["holds", "holds", "partly", "partly", "not"]


def test_what_is_not_measured_is_said():
    text = document(ROOT / "docs" / "evidence.md", list(claims()), {}, None)
    assert text.count("not measured") == len(CLAIMS)


class FakeClaim:
    """Fails in its first call, and is done in its second."""

    ID, TITLE, CLAIM, SETTING = "E99", "title", "claim", "setting"
    calls = 0

    def measure(self, work):
        type(self).calls += 1
        if self.calls == 1:
            raise RuntimeError("stopped")
        return {"value": 0.25}

    def judge(self, result):
        return Finding("holds", percent(result["value"]), "")

    def draw(self, result, figure):
        figure.subplots().plot([0, result["value"]])


def test_an_interrupted_claim_leaves_no_result(tmp_path):
    work, claim = Work(tmp_path / "work", False, 1, print), FakeClaim()
    with pytest.raises(RuntimeError, match="stopped"):
        measure(claim, work, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    measure(claim, work, tmp_path / "target")
    written = json.loads((tmp_path / "target" / RESULT).read_text())
    assert written["value"] == 0.25
    assert {"took_seconds", "machine", "software"} < written.keys()


RECORDS = [
    {"objective": name, "learning_rate": rate, "seed": seed, "final": final, "before": 0.2, "teacher": 1.0}
    for name, rate, seed, final in [
        ("a", 0.1, 1, 0.5), ("a", 0.1, 0, 0.6), ("a", 0.2, 0, 0.7), ("a", 0.2, 1, 0.3), ("b", 0.1, 0, 0.4), ("b", 0.1, 1, 0.1),
    ]
]  # fmt: skip


def test_records_by_hand():
    assert [r["final"] for r in of(RECORDS, "a", 0.1)] == [0.6, 0.5]
    assert best_rate(RECORDS, "a") == 0.1
    mean, interval, seeds = difference(of(RECORDS, "a", 0.1) + of(RECORDS, "b"), "a", "b")
    assert (mean, seeds) == (pytest.approx(0.3), 2)
    half = 12.7062 * 0.1 * 2**0.5 / 2**0.5  # differences 0.2 and 0.4: s = 0.1·√2
    assert interval == pytest.approx([0.3 - half, 0.3 + half], abs=1e-4)
    assert gap_closed(of(RECORDS, "a", 0.1))[0] == pytest.approx((0.5 + 0.375) / 2)
    with pytest.raises(ValueError, match="no seed in common"):
        difference(RECORDS, "a", "c")


def test_words():
    assert percent(0.9412) == "94.1 %"
    assert percent(None) == "–"
    assert mean_of([0.5]) == "50.0 %"
    assert mean_of([0.4, 0.6]).startswith("50.0 % [-77.1, 177.1]")
    assert points(-0.05, [-0.08, -0.02]) == "−5.0 ± 3.0 points"
    assert [surely(i) for i in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1], None)] == [1, 0, -1, 0]
    assert table(["a"], [[1]]) == "| a |\n| --- |\n| 1 |"


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="must have each of picture"):
        with_blocks("README.md", "text", [], {})


def test_every_folder_has_its_files():
    for folder, claim in claims():
        assert {"__init__.py", "claim.py"} <= {f.name for f in Path(folder).iterdir()}
        assert claim.CLAIM.strip().endswith(".")


def test_rates_come_from_the_committed_result_or_are_chosen_anew(tmp_path):
    (tmp_path / RESULT).write_text(json.dumps({"tuning": RECORDS}))
    assert committed_tuning(tmp_path, ("a", "b")) == RECORDS
    with pytest.raises(ValueError, match=r"no rate was chosen for c; choose with --tune"):
        committed_tuning(tmp_path, ("a", "c"))
    with pytest.raises(ValueError, match=r"no rate was chosen for a; choose with --tune"):
        committed_tuning(tmp_path / "nothing", ("a",))


def test_results_of_side_by_side_keep_their_order():
    work = Work(Path("unused"), False, 2, print)
    assert side_by_side(work, divmod, [(7, 2), (9, 4), (5, 5)]) == [(3, 1), (2, 1), (1, 0)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(work, divmod, [(1, 0)])


def test_how_long_the_whole_took_is_said(tmp_path):
    assert measured_whole(tmp_path) is None
    (tmp_path / WHOLE).write_text(json.dumps({"seconds": 5999, "cpus": 2, "workers": 2, "beside": "beside a cat"}))
    text = document(tmp_path / "evidence.md", list(claims()), {}, measured_whole(tmp_path))
    assert "One call measured all of it in 100 minutes on 2 cores, beside a cat. Learning" in text


def test_what_more_rollouts_give_is_paired_by_seed():
    from evidence.e01_accuracy.claim import _more_rollouts

    runs = [{"objective": "grpo", "seed": seed, "final": final} for seed, final in ((1, 0.6), (0, 0.5), (2, 0.9))]
    more = {"rollouts": 32, "final": {"grpo": {"0": 0.6, "1": 0.9}}}  # seed 2 has no partner
    text = _more_rollouts({"runs": runs, "rollouts": 16, "more_rollouts": more})
    half = 12.7062 * 0.1  # gains 0.1 and 0.3: s/√2 = 0.1
    assert "With 32 instead of 16" in text
    assert f"GRPO 75.0 % [-115.6, 265.6], +20.0 ± {100 * half:.1f} points" in text


def test_the_comparison_with_more_rollouts_differs_in_nothing_else():
    folder = HERE / "e01_accuracy"
    few, many = (load_comparison(folder / name)[1] for name in ("comparison.yaml", "rollouts_32.yaml"))
    settings = json.loads((folder / "rollouts_32.json").read_text())["settings"]
    assert (settings["settings"], settings["objectives"]) == (many.settings, many.objectives)
    assert {**few.settings, "per_device_train_batch_size": 32} == many.settings
    assert (few.recipe, few.seeds) == (many.recipe, many.seeds)
    free = {"learning_rates", "per_device_train_batch_size"}  # GRPO's counts prompts
    for name, changes in few.objectives.items():
        assert {k: v for k, v in changes.items() if k not in free} == {
            k: v for k, v in many.objectives[name].items() if k not in free
        }


def test_a_best_rate_at_the_edge_of_the_grid_is_said():
    def best_at(place):
        def change(result):
            rates = sorted({r["learning_rate"] for r in result["tuning"]})
            for record in result["tuning"]:
                record["final"] = 0.5 + 0.1 * (record["learning_rate"] == rates[place])

        return changed("E1", change).paragraph

    assert "Best at the lowest rate tried, so a lower one may be better: representation (OPRD-Vanilla)" in best_at(0)
    assert "Best at the lowest rate" not in best_at(1)


def test_what_is_kept_is_computed_anew_for_other_arguments(tmp_path):
    work, file = Work(tmp_path, False, 1, print), tmp_path / "seed_0.json"
    assert kept_side_by_side(work, divmod, {file: (7, 2)}) == [[3, 1]]
    file.write_text(file.read_text().replace("[3, 1]", "[30, 10]"))
    assert kept_side_by_side(work, divmod, {file: (7, 2)}) == [[30, 10]]  # kept
    assert kept_side_by_side(work, divmod, {file: (9, 2)}) == [[4, 1]]
