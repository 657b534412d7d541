import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.tasks.measures import Sample, avg_at_k, best_at_k, bootstrap_ci, distinct_n, summarize

VERDICTS = st.integers(1, 5).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=8)
)


def test_avg_and_best_on_a_hand_computed_case():
    correct = [[True, False, False, False], [True, True, True, True], [False] * 4]
    assert avg_at_k(correct) == pytest.approx((0.25 + 1 + 0) / 3)
    assert best_at_k(correct) == pytest.approx(2 / 3)


@given(VERDICTS)
def test_best_is_never_below_avg(correct):
    assert best_at_k(correct) >= avg_at_k(correct) - 1e-12
    assert (best_at_k(correct) == 0) == (avg_at_k(correct) == 0)
    assert avg_at_k(correct) == pytest.approx(sum(map(sum, correct)) / sum(map(len, correct)))


def test_partial_credit_is_averaged_and_its_best_taken():
    assert avg_at_k([[0.5, 1.0], [0.0, 0.25]]) == pytest.approx(0.4375)
    assert best_at_k([[0.5, 1.0], [0.0, 0.25]]) == pytest.approx(0.625)
    assert (avg_at_k([[-1.0, 3.0]]), best_at_k([[-1.0, 3.0]])) == (1.0, 3.0)


@pytest.mark.parametrize("bad", [[], [[]], [[True], [True, False]], [[math.inf]], [[math.nan]]])
@pytest.mark.parametrize("measure", [avg_at_k, best_at_k])
def test_accuracy_refuses_ragged_empty_or_not_finite(measure, bad):
    with pytest.raises(ValueError, match=r"samples|allowed"):
        measure(bad)


def test_distinct_n_counts_over_all_responses_of_a_problem():
    # problem 0: 2 + 2 four-grams, of which (1,2,3,4) twice -> 3/4; problem 1: one, unique -> 1; problem 2: none
    responses = [[[1, 2, 3, 4, 5], [9, 1, 2, 3, 4]], [[7, 7, 7, 7]], [[1, 2], []]]
    assert distinct_n(responses) == (pytest.approx((3 / 4 + 1) / 2), 1)
    assert distinct_n([[[1, 2, 3]]]) == (None, 1)
    assert distinct_n([]) == (None, 0)
    assert distinct_n([[(5, 5, 5)]], n=1) == (pytest.approx(1 / 3), 0)
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([[[1]]], n=0)


@given(st.lists(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=3), min_size=1, max_size=4))
def test_distinct_n_matches_brute_force(responses_by_problem):
    ratios = []
    for responses in responses_by_problem:
        counts = Counter()
        for ids in responses:
            for i in range(len(ids)):
                if i + 4 <= len(ids):
                    counts[str(ids[i : i + 4])] += 1
        if counts:
            ratios.append(len(counts) / sum(counts.values()))
    value, left_out = distinct_n(responses_by_problem)
    assert left_out == len(responses_by_problem) - len(ratios)
    assert value == (pytest.approx(sum(ratios) / len(ratios)) if ratios else None)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 5))
def test_bootstrap_interval_contains_the_mean_and_repeats(values, seed):
    low, high = bootstrap_ci(values, resamples=500, seed=seed)
    assert min(values) - 1e-12 <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= max(values) + 1e-12
    assert (low, high) == bootstrap_ci(values, resamples=500, seed=seed)


def test_bootstrap_matches_a_plain_loop():
    values = [0.0, 0.25, 0.5, 1.0, 0.75, 0.1]
    generator = np.random.default_rng(3)
    means = [np.mean([values[i] for i in generator.integers(6, size=6)]) for _ in range(2000)]
    low, high = bootstrap_ci(values, resamples=2000, seed=3)
    assert (low, high) == (pytest.approx(np.quantile(means, 0.025)), pytest.approx(np.quantile(means, 0.975)))


def test_bootstrap_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(0).random(400)
    low, high = bootstrap_ci(values.tolist())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_bootstrap_in_chunks_is_as_good_and_one_problem_has_no_width():
    assert bootstrap_ci([0.25]) == (0.25, 0.25)
    values = np.random.default_rng(0).random(5000)  # more than one chunk of indices
    low, high = bootstrap_ci(values.tolist(), resamples=1000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 5000**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("values", "options"),
    [([], {}), ([math.nan], {}), ([1.0], {"confidence": 1.0}), ([1.0], {"resamples": 0})],
)
def test_bootstrap_refuses(values, options):
    with pytest.raises(ValueError, match="give"):
        bootstrap_ci(values, **options)


def sample(correct, length=4, finished=True, ids=(1, 2, 3, 4)):
    return Sample(correct=correct, num_tokens=length, finished=finished, token_ids=list(ids))


def test_summarize_on_a_hand_computed_case():
    problems = [
        [sample(True, 10), sample(False, 20, finished=False)],
        [sample(False, 30, ids=[5, 6, 7, 8]), sample(False, 40, ids=[5, 6, 7, 9])],
    ]
    summary = summarize(problems)
    assert summary == {
        "avg_at_k": 0.25,
        "best_at_k": 0.5,
        "ci95": [0.0, 0.5],
        "k": 2,
        "problems": 2,
        "dist_4": pytest.approx((0.5 + 1) / 2),
        "dist_4_left_out": 0,
        "mean_length": 25.0,
        "finished": 0.75,
        "accuracy_given_finished": pytest.approx(1 / 3),
        "ungraded": 0,
    }
    assert json.loads(json.dumps(summary)) == summary


def test_summarize_without_finished_or_graded_samples_says_none():
    summary = summarize([[sample(True, finished=False)], [sample(None, finished=True)]])
    assert (summary["avg_at_k"], summary["accuracy_given_finished"], summary["ungraded"]) == (1.0, None, 1)
    summary = summarize([[sample(None, ids=[])]])
    assert summary["avg_at_k"] is summary["best_at_k"] is summary["ci95"] is summary["dist_4"] is None
    json.dumps(summary)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "no problems"),
        ([[]], "samples"),
        ([[sample(True)], [sample(True), sample(True)]], r"\[1, 2\] samples"),
    ],
)
def test_summarize_refuses(problems, message):
    with pytest.raises(ValueError, match=message):
        summarize(problems)
