"""The documents say what the committed results say, and verdicts follow the data."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import typer
from evidence.__main__ import (
    FIGURE,
    HERE,
    RESULT,
    ROOT,
    WHOLE,
    claims,
    is_done,
    main,
    measure,
    measured_whole,
    results,
)
from evidence.claim import PRETRAINED, Finding, Work, kept_side_by_side, make_once, rule, side_by_side
from evidence.comparisons import best_rate, committed_tuning, difference, gap_closed, of, refuse_other_models
from evidence.document import DETAILS, details, document
from evidence.e11_real_model import claim as e11
from evidence.readme import BLOCKS, with_blocks
from evidence.words import (
    COMPARISONS,
    NOT_MEASURED,
    RULES,
    VERDICTS,
    less,
    listed,
    mean_of,
    percent,
    points,
    share,
    standing,
    standings,
    surely,
    table,
)
from typer.testing import CliRunner

from oprd.resolve.no_effect import check_effects
from oprd.resolve.terms import build_terms
from oprd.run_config import RunConfig
from oprd.tools.compare.plan import load_comparison

APP = typer.Typer()
APP.command()(main)
CLAIMS = {claim.ID: claim for _, claim in claims()}
RESULTS = results(HERE)
NOT_YET: set[str] = set()
MEASURED = sorted(RESULTS, key=lambda name: int(name[1:]))
AGAIN = "run python -m evidence --document"


def test_every_claim_is_there():
    assert list(CLAIMS) == [f"E{n}" for n in range(1, 29)]
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


def test_the_readme_begins_with_the_real_model():
    text = (ROOT / "README.md").read_text()
    assert "evidence/e11_real_model/figure.png" in text[text.index("![") :].split("\n")[0]


@pytest.mark.parametrize("name", MEASURED)
def test_every_result_can_be_judged(name):
    finding = CLAIMS[name].judge(RESULTS[name])
    assert finding.verdict in VERDICTS
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
        (
            "E2",
            {"sampled_token": 0.5, "representation": 0.6, "composite_mu_100": 0.9, "composite_mu_10": 0.55},
            "partly",
        ),
        ("E2", dict.fromkeys(("composite_mu_1", "composite_mu_10", "composite_mu_100"), 0.2), "not"),
        ("E3", {"representation": 0.8, "states_last": 0.8, "states_first": 0.5}, "holds"),
        ("E3", {"representation": 0.8, "states_last": 0.6, "states_first": 0.5}, "partly"),
        (
            "E3",
            {"representation": 0.8, "states_last": 0.2, "states_last_slowly": 0.2},
            "not",
        ),  # below the student before training
        (
            "E3",
            {"representation": 0.8, "states_last": 0.2, "states_last_slowly": 0.7},
            "partly",
        ),  # the better rate counts
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
    rows = [line for line in text.splitlines() if line.startswith("| E")]
    assert [row.split(" | ")[2:] for row in rows] == [["not measured", " |"]] * len(CLAIMS)


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


def test_what_was_done_without_tuning_is_not_done_with_it(tmp_path):
    done = tmp_path / "done"
    assert not is_done(done, tune=False)
    for written, found in (("", (True, False)), ('{"tune": false}', (True, False)), ('{"tune": true}', (True, True))):
        done.write_text(written)
        assert (is_done(done, tune=False), is_done(done, tune=True)) == found


def test_runs_do_not_go_on_with_another_model_of_the_same_name(tmp_path):
    model, runs = tmp_path / "model", tmp_path / "runs"
    for folder in (model, runs):
        folder.mkdir()
    (model / "model.safetensors").write_text("one")
    settings = {"model": "embedded:tiny/student", "teacher_model": str(model)}
    refuse_other_models(runs, settings)
    refuse_other_models(runs, settings)
    (model / "model.safetensors").write_text("another")
    for given in (settings, {"teachers": {"a": str(model)}}, {"teachers": {"a": {"model": str(model)}}}):
        with pytest.raises(
            ValueError, match=f"its runs had another {model}; remove the folder, or bring the model back"
        ):
            refuse_other_models(runs, given)


def test_seeds_of_two_teachers_are_not_paired():
    runs = [{"seed": seed, "before": 0.2, "teacher": 0.9 + 0.01 * seed} for seed in (0, 1, 0)]
    assert e11.of_one_teacher(runs) == runs
    with pytest.raises(ValueError, match="runs of seed 0 differ in 'teacher'"):
        e11.of_one_teacher([*runs, {"seed": 0, "before": 0.2, "teacher": 0.8}])


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
    assert percent(-0.004, 0) == "0 %"
    assert percent(None) == "–"
    assert mean_of([0.5]) == "50.0 %"
    assert mean_of([0.4, 0.6]).startswith("50.0 % [−77.1, 177.1]")
    assert points(-0.05, [-0.08, -0.02]) == "−5.0 ± 3.0 points"
    assert [surely(i) for i in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1], None)] == [1, 0, -1, 0]
    assert table(["a"], [[1]]) == "| a |\n| --- |\n| 1 |"
    assert share(0.9, [0.885, 0.914]) == "90 % [88, 91]"
    assert [standing(i) for i in ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1])] == [
        "ahead of", "not significantly different from", "behind",
    ]  # fmt: skip
    assert standings({"a": [1, 2], "b": [-2, -1], "c": [1, 3], "d": [-1, 1]}) == (
        "ahead of a and c; not significantly different from d; behind b"
    )
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "none",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert [less(value) for value in (4, 0, -3)] == ["4 % less", "no less", "3 % more"]


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


@pytest.mark.further
def test_results_of_side_by_side_keep_their_order():
    work = Work(Path("unused"), False, 2, print)
    assert side_by_side(work, divmod, [(7, 2), (9, 4), (5, 5)]) == [(3, 1), (2, 1), (1, 0)]
    with pytest.raises(ZeroDivisionError):
        side_by_side(work, divmod, [(1, 0)])


def test_how_long_the_whole_took_is_said(tmp_path):
    assert measured_whole(tmp_path) is None
    (tmp_path / WHOLE).write_text(json.dumps({"seconds": 5999, "cpus": 2, "workers": 2, "beside": "A cat slept."}))
    text = document(tmp_path / "evidence.md", list(claims()), {}, measured_whole(tmp_path))
    assert "One call measured all of it in 100 minutes on 2 cores. A cat slept. Earlier" in text


def test_what_more_rollouts_give_is_paired_by_seed():
    from evidence.e01_accuracy.claim import _more_rollouts

    runs = [{"objective": "grpo", "seed": seed, "final": final} for seed, final in ((1, 0.6), (0, 0.5), (2, 0.9))]
    more = {"rollouts": 32, "final": {"grpo": {"0": 0.6, "1": 0.9}}}  # seed 2 has no partner
    text = _more_rollouts({"runs": runs, "rollouts": 16, "more_rollouts": more})
    half = 12.7062 * 0.1  # gains 0.1 and 0.3: s/√2 = 0.1
    assert "With 32 instead of 16" in text
    assert f"GRPO 75.0 % [−115.6, 265.6], +20.0 ± {100 * half:.1f} points" in text


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


@pytest.mark.parametrize("asked", [["--only", "E11"], ["--show", "--only", "E11"], ["--show"]])
def test_claims_are_printed_from_their_committed_results(asked):
    """Nothing is measured, and no page is written: neither models nor runs are at hand here."""
    printed = CliRunner().invoke(APP, asked, catch_exceptions=False).output
    for name in ("E11", "E12") if asked == ["--show"] else ("E11",):
        finding = CLAIMS[name].judge(RESULTS[name])
        assert f"{name} {finding.verdict}: {finding.number}\n\n{finding.paragraph}\n" in printed
    assert ("E12" in printed) == (asked == ["--show"])
    assert {*CLAIMS} >= PRETRAINED


def test_what_is_kept_is_computed_anew_for_other_arguments(tmp_path):
    work, file = Work(tmp_path, False, 1, print), tmp_path / "seed_0.json"
    assert kept_side_by_side(work, divmod, {file: (7, 2)}) == [[3, 1]]
    file.write_text(file.read_text().replace("[3, 1]", "[30, 10]"))
    assert kept_side_by_side(work, divmod, {file: (7, 2)}) == [[30, 10]]  # kept
    assert kept_side_by_side(work, divmod, {file: (9, 2)}) == [[4, 1]]


def test_what_is_kept_is_computed_anew_for_other_contents(tmp_path):
    work, kept, model = Work(tmp_path, False, 1, print), tmp_path / "size.json", tmp_path / "model"
    model.mkdir()
    text, made = model / "model.safetensors", []
    for content in ("one", "one", "three"):
        text.write_text(content)
        [size] = kept_side_by_side(work, weights_size, {kept: ({"model": model},)})
        assert size == len(content)
        make_once(tmp_path / "copy", (text, 1), lambda: (made.append(text.read_text()), (tmp_path / "copy").mkdir())[0])
    assert made == ["one", "three"]
    make_once(tmp_path / "copy", (text, 2), lambda: made.append("other arguments"))
    assert made[2:] == ["other arguments"]
    assert not (tmp_path / "copy").exists()  # what other arguments made is removed


def weights_size(recipe):
    return (recipe["model"] / "model.safetensors").stat().st_size


PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "evidence.md",
    *(folder / DETAILS for folder, claim in claims() if claim.ID in RESULTS),
]


def test_the_words_of_a_verdict_are_defined_once_and_shown_first():
    assert {*VERDICTS.values(), NOT_MEASURED} == set(RULES)
    text = document(ROOT / "docs" / "evidence.md", list(claims()), RESULTS, None)
    first = text[: text.index("| E1")] if "| E1" in text else text[: text.index("[E1]")]
    assert all(f"| **{word}** | {when} |" in first for word, when in RULES.items())
    assert COMPARISONS in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_has_another_word_for_a_verdict(page):
    lines = page.read_text().splitlines()
    for old in ("holds here", "not here", "partly"):
        assert not [line for line in lines if old in line]


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_states_its_rule(name):
    text = rule(CLAIMS[name])
    assert text in document(ROOT / "docs" / "evidence.md", list(claims()), {}, None)
    assert name not in RESULTS or text in details(CLAIMS[name], RESULTS[name])
    assert "; in part if " in text
    assert text.endswith(".")


def test_a_claim_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="E99: the docstring of judge must begin with 'Holds if'"):
        rule(FakeClaim())  # type: ignore[arg-type]


def test_a_contradiction_is_on_both_pages():
    lines = {name: CLAIMS[name].judge(RESULTS[name]).against for name in MEASURED}
    page = document(ROOT / "docs" / "evidence.md", list(claims()), RESULTS, None).split("## Against the paper")[1]
    for name, line in lines.items():
        assert (f"- **{name}** {line}" in page) is bool(line), name
        assert ("**Against the paper.**" in details(CLAIMS[name], RESULTS[name])) is bool(line)
    assert {name for name, line in lines.items() if line} >= {"E1", "E2", "E3", "E4", "E5", "E9"}
    assert "No measured claim contradicts the paper." in document(
        ROOT / "docs" / "evidence.md", list(claims()), {}, None
    )


def flat_e9(result, values):
    for record in result["runs"]:
        if record["objective"] in values:
            record["final"] = values[record["objective"]] + 0.001 * record["seed"]


@pytest.mark.parametrize(
    ("name", "values", "number", "said", "against"),
    [
        ("E1", {"states_off_policy": 0.5, "representation": 0.9}, "+40.0 ± 0.0 points against representation on the teacher's",
         "it matters that the student writes the responses", ""),
        ("E1", {"states_off_policy": 0.95, "representation": 0.9}, "−5.0 ± 0.0 points against representation on the teacher's",
         "matching states does better where the teacher writes",
         "on them is behind representation on the teacher's responses (−5.0 ± 0.0 points, 5 seeds)"),
        ("E1", {**ALL_LOW, "representation": 0.6, "full_reverse_kl": 0.7, "states_off_policy": 0.5},
         "−10.0 ± 0.0 points against the best output-space loss (full", "behind full reverse KL", ""),
        ("E2", {"composite_mu_10": 0.9, "sampled_token": 0.5, "representation": 0.6, "composite_mu_100": 0.8},
         "µ = 10: +40.0 ± 0.0 points against sampled-token OPD, +30.0 ± 0.0 points against representation alone",
         "µ = 10 is ahead of sampled-token OPD (+40.0 ± 0.0 points) and ahead of the representation loss alone", ""),
        ("E2", {"composite_mu_10": 0.5, "sampled_token": 0.5, "representation": 0.6, "composite_mu_100": 0.8},
         "the best of three, µ = 100: +20.0 ± 0.0 points against representation alone",
         "µ = 10 is not significantly different from sampled-token OPD", "Here it is behind it (−10.0 ± 0.0 points)"),
        ("E3", {"representation": 0.8, "states_last": 0.8, "states_last_slowly": 0.7},
         "+0.0 ± 0.0 points with the last 13 positions against all at the rate chosen for all; at 0.0003 −10.0 ± 0.0 points",
         "the last 13 states, at the better rate, are ahead of it", ""),
        ("E3", {"representation": 0.8, "states_last": 0.7, "states_first": 0.9, "full_reverse_kl": 0.1}, "−10.0 ± 0.0 points",
         "Of a quarter of the positions, behind all of them: last 13 (hidden states).", "behind all positions (−10.0 ± 0.0 points"),
        ("E4", {"representation": 0.9, "last": 0.1, "even": 0.2, "odd": 0.3, "last_three": 0.8},
         "all four layers are ahead of last three, even (2, 4), odd (1, 3) and last (+80.0 ± 0.0 points", "", ""),
        ("E4", {"representation": 0.7, "last": 0.1, "even": 0.7, "odd": 0.3, "last_three": 0.8},
         "ahead of odd (1, 3) and last; not significantly different from even (2, 4); behind last three", "",
         "Here they are ahead of odd (1, 3) and last; not"),
        ("E9", {"rank_4": 0.9, "rank_32": 0.95, "rank_8": 0.9, "rank_16": 0.9, "rank_64": 0.9},
         "highest mean at rank 32 (95.0 %), ahead of rank 4, rank 8, rank 16 and rank 64", "", ""),
        ("E9", {"rank_4": 0.1, "rank_16": 0.9, "rank_32": 0.8}, "nearest tried 32 (80.0 %)", "the student reaches 10.1 %",
         "training at rank 4 ends below the student before (10.1 %, 24.9 %)"),
    ],
)  # fmt: skip
def test_sentences_follow_the_data(name, values, number, said, against):
    found = changed(name, lambda result: (flat_e9 if name == "E9" else set_final)(result, values))
    assert number in found.number
    assert said in found.paragraph
    assert against in found.against if against else not found.against


def gpu_row(result, name):
    return next(row for row in result["gpu"]["rows"] if row["name"] == name and row["checkpointing"])


def test_the_cost_sentence_follows_the_data():
    def lean(result):  # a chunked top-16 that costs less than representation
        gpu_row(result, "top16").update(
            bytes_with_weights=gpu_row(result, "representation")["bytes_with_weights"] // 2,
            seconds=2 * gpu_row(result, "representation")["seconds"],
        )

    found = changed("E5", lean)
    assert "100 % more memory and 50 % less time than a chunked top-16" in found.number
    assert "its rows of the head: 100 % more." in found.against

    def dear(result):
        gpu_row(result, "top16")["bytes_with_weights"] = gpu_row(result, "dense_top16")["bytes_with_weights"]

    assert changed("E5", dear).against == ""

    def every(ratio, *beginnings):
        def change(result):
            for row in result["rows"]:
                if row["name"].startswith(beginnings):
                    row["time_ratio"] = row["memory_ratio"] = ratio

        return changed("E5", change)

    assert every(0.5, "representation").verdict == "holds"
    assert "take no more than representation on all layers: none." in every(0.5, "representation").paragraph
    assert every(0.5, "dense").verdict == "not"
    assert "top-16, dense in time (smollm2-135m)" in every(0.5, "dense").paragraph


def test_the_diversity_sentence_follows_the_data():
    def at(length, dist_4):
        def change(result):
            teacher = {r["seed"]: r for r in result["rows"] if r["model"] == "teacher"}
            for row in result["rows"]:
                if row["model"] == "representation":
                    row["length"] = teacher[row["seed"]]["length"] + length
                    row["matched_dist_4"] = teacher[row["seed"]]["matched_dist_4"] + dist_4

        return changed("E6", change)

    cases = [at(0, 0), at(5, 0), at(0, 0.5), at(5, 0.5)]
    assert [found.verdict for found in cases] == ["holds", "partly", "partly", "not"]
    beginnings = ["matched Dist-4 and length", "matched Dist-4", "length", "none"]
    assert [found.number.split(";")[0] for found in cases] == [f"nearest in {text}" for text in beginnings]
    assert "length 5.00 tokens" in cases[1].number


def test_the_noise_sentence_follows_the_data():
    def noisy(result):
        result["rows"][0]["representation"]["trace"] = result["rows"][0]["representation"]["g2"]

    assert changed("E7", noisy).verdict == "not"
    assert changed("E7", noisy).number.startswith("variance not 0 for OPRD;")

    def as_power(power):
        def change(result):
            for row in result["rows"]:
                row["sampled_token"].update(g2=row["delta"] ** power, trace=1.0)

        return changed("E7", change)

    assert (as_power(1).verdict, as_power(1).against) == ("holds", "")
    assert "sampled-token SNR as δ^1.00 (by seed: 1.00 and 1.00)" in as_power(1).number
    assert as_power(3).verdict == "partly"
    assert "Here δ^3.00 over training" in as_power(3).against

    def quiet(result):
        for row in result["rows"]:
            row["sampled_token"]["trace"], row["rollouts"]["full_reverse_kl"]["trace"] = 3.0, 2.0

    assert "1.5 times the variance that new rollouts give" in changed("E7", quiet).paragraph


def test_the_null_space_sentence_follows_the_data():
    def equal(result):
        for row in result["left"]:
            row["unseen"] = 0.1

    found = changed("E8", equal)
    assert found.verdict == "partly"
    assert "leaves 1 times (by seed: 1, 1 and 1)" in found.number

    def rising(result):
        for index, row in enumerate(result["moved"]):
            row["ratio"] = 10.0**index

    assert "the ratio rises." in changed("E8", rising).paragraph
    assert "the ratio does not always rise." in changed("E8", lambda result: None).paragraph


def test_the_bridges_sentence_follows_the_data():
    def with_finals(**finals):
        def change(result):
            for key in ("wider", "other_tokenizer"):
                for record in result[key]:
                    record["final"] = finals.get(record["objective"], record["final"])

        return changed("E10", change)

    far = with_finals(rank_16=0.99, bridge_then_output=0.995, output_alone=0.9)
    assert far.verdict == "holds"
    assert far.against == ""
    assert "alone, takes the student from 26.5 % to 90.0 %" in far.paragraph
    near = with_finals(rank_16=0.4, output_alone=0.0)
    assert near.verdict == "not"
    assert "alone, takes the student from 26.5 % down to 0.0 %" in near.paragraph
    assert "(full reverse KL alone −36 %)" in near.number


def test_the_ends_of_a_grid_of_rates_are_said():
    from evidence.e01_accuracy.claim import end_of_rates

    def grid(*finals):
        return [
            {"objective": "a", "learning_rate": rate, "seed": 0, "final": final} for rate, final in enumerate(finals, 1)
        ]

    assert [end_of_rates(grid(*finals), "a") for finals in ((3, 2, 1), (1, 2, 3), (1, 3, 2))] == [
        "lowest",
        "highest",
        "",
    ]
    paragraph = CLAIMS["E1"].judge(RESULTS["E1"]).paragraph
    assert "over sampled-token OPD (best at the lowest rate tried, 3e-05: another may be better)" in paragraph
    assert "over GRPO (best at the lowest rate tried, 3e-05: another may be better)" in paragraph


def comparisons() -> list[Path]:
    """All files of the claims that list objectives."""
    return [file for file in sorted(HERE.glob("e*/*.yaml")) if "objectives:" in file.read_text()]


@pytest.mark.parametrize("file", comparisons(), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_no_objective_of_a_comparison_has_a_setting_without_effect(file):
    """Such a setting is refused, also where all objectives share it."""
    _, comparison = load_comparison(file)
    # What the claim sets itself.
    missing = {"model": "embedded:tiny/student", "train_dataset": "generated:addition", "task": "addition"}
    if file.parent.name == "e16_several_teachers":
        missing |= {"teachers": {"a": "embedded:tiny/teacher"}}
    for changes in comparison.objectives.values():
        values = {**missing, **comparison.settings, **(changes or {}), "output_dir": "unused"}
        values.pop("learning_rates", None)  # of this objective
        run = RunConfig.load(comparison.recipe, values)
        check_effects(run, build_terms(run))
