"""Fitting one pair of layers: torch.linalg.lstsq and torch.cov as references, a planted subspace, AdamW, and awkward states."""

from __future__ import annotations

import dataclasses
import inspect
import time

import pytest
import torch

from oprd.bridge.collect import check_fitting
from oprd.bridge.curve import direction_errors, predicted_errors, rank_cosines, report_pair, verdict
from oprd.bridge.fit import PROJECTORS, SCALES, adamw_projector, choose_ridge, fit_pair, principal_directions
from oprd.bridge.statistics import PairStatistics

D, E, SHARED = 24, 32, 8


def planted_pair(tokens, seed=0, noise=0.1, shuffled=False, mean=2.0):
    """Student and teacher that share `SHARED` latent numbers, each with noise of its own; one subspace for all seeds."""
    fixed, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)

    def draw(*shape, of=generator):
        return torch.randn(*shape, generator=of, dtype=torch.float64)

    basis_E = torch.linalg.qr(draw(E, SHARED, of=fixed)).Q
    basis_D = torch.linalg.qr(draw(D, SHARED, of=fixed)).Q
    mix = draw(SHARED, SHARED, of=fixed)
    shift_D, shift_E = draw(D, of=fixed), draw(E, of=fixed)
    latent = draw(tokens, SHARED) * torch.linspace(2.0, 1.0, SHARED, dtype=torch.float64)
    student = latent @ mix @ basis_D.T + noise * draw(tokens, D) + mean * shift_D
    teacher = latent @ basis_E.T + 2 * noise * draw(tokens, E) + mean * shift_E
    return student, teacher[torch.randperm(tokens, generator=generator)] if shuffled else teacher, basis_E


def statistics_of(student_ND, teacher_NE, **options):
    statistics = PairStatistics(student_ND.shape[1], teacher_NE.shape[1], **options)
    statistics.update(student_ND, teacher_NE)
    return statistics


def squared_errors(fit, student_ND, teacher_NE):
    predicted_NR = (student_ND - fit.student_mean_D) @ fit.student_RD.T
    return (predicted_NR - (teacher_NE - fit.teacher_mean_E) @ fit.teacher_RE.T).square().mean(0)


def test_directions_are_those_of_the_sample_covariance():
    student, teacher, _ = planted_pair(500)
    statistics = statistics_of(student, teacher)
    fit = fit_pair(statistics)
    values, vectors = torch.linalg.eigh(torch.cov(teacher.T))
    torch.testing.assert_close(fit.variance_R, values.flip(0))
    torch.testing.assert_close((fit.teacher_RE * vectors.T.flip(0)).sum(1).abs(), torch.ones(E, dtype=torch.float64))
    torch.testing.assert_close(fit.teacher_RE @ fit.teacher_RE.T, torch.eye(E, dtype=torch.float64))
    torch.testing.assert_close(fit.explained_R, values.flip(0).cumsum(0) / values.sum())
    largest = fit.teacher_RE.gather(1, fit.teacher_RE.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    # the sign does not depend on what eigh happened to return
    statistics.teacher_EE.copy_(statistics.teacher_EE.flip(0, 1).clone())
    torch.testing.assert_close(principal_directions(statistics).flip(1), fit.teacher_RE)


@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_equals_lstsq(intercept):
    student, teacher, _ = planted_pair(400)
    fit = fit_pair(statistics_of(student, teacher), ridge=0.0, intercept=intercept)
    inputs = student - student.mean(0) if intercept else student
    target = (teacher - teacher.mean(0)) @ fit.teacher_RE.T
    reference = torch.linalg.lstsq(inputs, target).solution.T
    torch.testing.assert_close(fit.student_RD, reference, rtol=1e-8, atol=1e-10)
    if intercept:  # the explicit column of ones agrees
        ones = torch.cat([student, torch.ones(400, 1, dtype=torch.float64)], 1)
        torch.testing.assert_close(
            fit.student_RD, torch.linalg.lstsq(ones, target).solution[:-1].T, rtol=1e-7, atol=1e-9
        )
    assert bool((fit.student_mean_D != 0).any()) == intercept


def test_ridge_equals_its_formula_and_does_not_know_units():
    student, teacher, _ = planted_pair(400)
    fit = fit_pair(statistics_of(student, teacher), ridge=0.1)
    centred = student - student.mean(0)
    gram = centred.T @ centred
    right = centred.T @ ((teacher - teacher.mean(0)) @ fit.teacher_RE.T)
    reference = torch.linalg.solve(gram + 0.1 * gram.diagonal().diag(), right).T
    torch.testing.assert_close(fit.student_RD, reference, rtol=1e-8, atol=1e-10)
    units = torch.logspace(-3, 3, D, dtype=torch.float64)
    scaled = fit_pair(statistics_of(student * units, teacher), ridge=0.1)
    torch.testing.assert_close(scaled.student_RD * units, fit.student_RD, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_lower_rank_is_the_first_rows(projector):
    student, teacher, _ = planted_pair(600)
    statistics = statistics_of(student, teacher)
    fit = fit_pair(statistics, projector=projector, ridge=0.0)
    held_out = statistics_of(*planted_pair(300, seed=1)[:2])
    for rank in (1, 3, 8):
        cut = fit.first(rank)
        assert torch.equal(cut.teacher_RE, fit.teacher_RE[:rank])
        assert torch.equal(cut.student_RD, fit.student_RD[:rank])
        assert torch.equal(cut.student_mean_D, fit.student_mean_D)
        # lstsq on the cut target gives the same rows: the ranks do not depend on each other
        if projector != "procrustes":
            target = (teacher - teacher.mean(0)) @ cut.teacher_RE.T
            reference = torch.linalg.lstsq(student - student.mean(0), target).solution.T
            torch.testing.assert_close(cut.student_RD, reference, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(rank_cosines(cut, held_out)[-1], rank_cosines(fit, held_out)[rank - 1])


def test_held_out_errors_equal_brute_force():
    fit = fit_pair(statistics_of(*planted_pair(500)[:2]))
    student, teacher, _ = planted_pair(300, seed=1, mean=2.3)  # another mean: its shift counts as error
    held_out = statistics_of(student, teacher)
    error_R, variance_R = direction_errors(fit, held_out)
    target = (teacher - fit.teacher_mean_E) @ fit.teacher_RE.T
    torch.testing.assert_close(error_R, squared_errors(fit, student, teacher), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(variance_R, target.var(0, correction=0), rtol=1e-8, atol=1e-10)
    report = report_pair(fit, held_out, held_out)
    torch.testing.assert_close(report.r2_R, 1 - error_R / variance_R)
    torch.testing.assert_close(report.rank_r2_R[4], 1 - error_R[:5].sum() / variance_R[:5].sum())
    predicted = (student - fit.student_mean_D) @ fit.student_RD.T
    cosine = torch.nn.functional.cosine_similarity(predicted[:, :5], target[:, :5]).mean()
    torch.testing.assert_close(report.rank_cosine_R[4], cosine, rtol=1e-5, atol=1e-6)  # the sample is float32


def drawn_pair(tokens, seed, noise, mean):
    """Student and teacher of one width, the teacher a mix of the student's dimensions and noise."""
    fixed, generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    mix = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(6, 6, generator=fixed, dtype=torch.float64)
    student, rest = (torch.randn(tokens, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return student + mean, (student + mean) @ mix + noise * rest


def test_each_figure_of_a_report_is_of_the_tokens_that_it_is_said_to_be_of():
    """The CKA is of the fit's tokens, all else of the held-out ones, which are noisier and have another mean."""
    student, teacher = drawn_pair(300, 0, 0.2, 0.0)
    held_student, held_teacher = drawn_pair(200, 1, 1.5, 0.4)
    statistics, held_out = statistics_of(student, teacher), statistics_of(held_student, held_teacher)
    fit = fit_pair(statistics)
    report = report_pair(fit, statistics, held_out)
    assert (report.tokens, report.held_out_tokens) == (300, 200)

    def cka(one, other):
        one, other = one - one.mean(0), other - other.mean(0)
        return float((one.T @ other).square().sum() / ((one.T @ one).norm() * (other.T @ other).norm()))

    assert report.cka == pytest.approx(cka(student, teacher), rel=1e-9)
    assert abs(report.cka - cka(held_student, held_teacher)) > 0.1

    def direct(one, other):
        return 1 - float((one - other).square().sum() / (other - other.mean(0)).square().sum())

    assert report.direct_r2 == pytest.approx(direct(held_student, held_teacher), rel=1e-9)
    assert abs(report.direct_r2 - direct(student, teacher)) > 0.1

    def judged(one, other):
        """Of each direction the R², of the first 1, 2, … together the R² and the mean cosine."""
        ours, theirs = (one - fit.student_mean_D) @ fit.student_RD.T, (other - fit.teacher_mean_E) @ fit.teacher_RE.T
        errors, variances = (ours - theirs).square().mean(0), theirs.var(0, correction=0)
        cosines = [torch.cosine_similarity(ours[:, :r], theirs[:, :r]).mean() for r in range(1, 7)]
        return 1 - errors / variances, 1 - errors.cumsum(0) / variances.cumsum(0), torch.stack(cosines)

    found = (report.r2_R, report.rank_r2_R, report.rank_cosine_R)
    others = judged(student, teacher)
    for ours, expected, other in zip(found, judged(held_student, held_teacher), others, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert ((expected - other).abs() > 0.1).all()

    r2 = judged(held_student, held_teacher)[0].clamp(0, 1)
    spread = torch.cov(teacher.T).trace()  # of the fit's tokens
    assert report.predictable == pytest.approx(float((fit.variance_R * r2).sum() / spread), rel=1e-6)
    errors = [float((fit.variance_R[r:] * r2[r:]).sum() + (fit.variance_R[:r] * (1 - r2[:r])).sum()) for r in range(7)]
    assert report.suggested_rank == min(range(7), key=errors.__getitem__)
    assert report.rank_error_R.tolist() == pytest.approx([error / float(spread) for error in errors[1:]], rel=1e-6)


def test_theorem_3_by_hand():
    variance, r2 = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([0.75, 0.5, -0.2])
    # r=0: 4·.75 + 2·.5 + 0 = 4; r=1: 1 + 4·.25 = 2; r=2: 0 + 1 + 1 = 2; r=3: 1 + 1 + 1 = 3
    torch.testing.assert_close(predicted_errors(variance, r2), torch.tensor([4.0, 2.0, 2.0, 3.0]))


@pytest.mark.parametrize(("projector", "angle", "r2"), [("least_squares", 0.03, 0.85), ("cca", 0.3, 0.6)])
def test_the_planted_subspace_is_recovered(projector, angle, r2):
    student, teacher, basis_E = planted_pair(6000)
    statistics, held_out = statistics_of(student, teacher), statistics_of(*planted_pair(3000, seed=1)[:2])
    fit = fit_pair(statistics, projector=projector)
    report = report_pair(fit, statistics, held_out)
    rows = torch.linalg.qr(fit.teacher_RE[:SHARED].T).Q
    angles = torch.linalg.svdvals(rows.T @ basis_E).clamp(max=1).acos()
    assert float(angles.max()) < angle
    assert report.suggested_rank == SHARED
    assert (report.r2_R[:SHARED] > r2).all()
    assert (report.r2_R[SHARED:].abs() < 0.05).all()
    assert report.rank_error_R.argmin() == SHARED - 1
    assert report.rank_cosine_R[SHARED - 1] > 0.95
    assert report.rank_r2_R[SHARED - 1] > 0.9
    assert report.predictable > 0.85  # of a teacher whose noise is a tenth


@pytest.mark.parametrize("projector", PROJECTORS)
def test_a_shuffled_teacher_is_not_predicted(projector):
    student, teacher, _ = planted_pair(6000, shuffled=True)
    statistics = statistics_of(student, teacher)
    held_out = statistics_of(*planted_pair(3000, seed=1, shuffled=True)[:2])
    report = report_pair(fit_pair(statistics, projector=projector), statistics, held_out)
    assert (report.r2_R < 0.02).all()
    assert projector == "procrustes" or (report.r2_R > -0.04).all()
    assert report.suggested_rank <= 1
    assert report.predictable < 0.01
    assert report.cka < 0.01
    assert verdict({1: report}, same_depth=False) == ("hopeless", ())


def test_least_squares_is_no_worse_than_adamw_at_any_rank():
    student, teacher, _ = (x.float() for x in planted_pair(4000))
    held_student, held_teacher, _ = planted_pair(3000, seed=1)
    start = time.perf_counter()
    fit = fit_pair(statistics_of(student, teacher))
    closed_form_seconds = time.perf_counter() - start
    ours = squared_errors(fit, held_student, held_teacher).cumsum(0)
    batches = list(zip(student.split(128), teacher.split(128), strict=True))
    best = torch.full_like(ours, torch.inf)
    for lr in (3e-3, 1e-2, 3e-2):
        start = time.perf_counter()
        trained = adamw_projector(fit, batches, lr=lr)
        trained_seconds = time.perf_counter() - start
        assert closed_form_seconds < trained_seconds / 2  # states in memory; with the models' forward passes 20 times
        best = torch.minimum(best, squared_errors(trained, held_student, held_teacher).cumsum(0))
    assert (ours <= best).all()
    assert float(best[SHARED - 1] / ours[SHARED - 1]) < 1.5  # AdamW did train
    assert torch.equal(trained.teacher_RE, fit.teacher_RE)


def test_adamw_trains_every_rank_as_if_it_were_alone():
    student, teacher, _ = (x.float() for x in planted_pair(1000))
    fit, batches = fit_pair(statistics_of(student, teacher)), [(student, teacher)]
    whole = adamw_projector(fit, batches, epochs=200, lr=1e-2)
    with torch.no_grad():  # where states are captured
        alone = adamw_projector(fit.first(2), batches, epochs=200, lr=1e-2)
    torch.testing.assert_close(whole.student_RD[:2], alone.student_RD, rtol=1e-4, atol=1e-4)


def test_procrustes_finds_a_rotation_and_a_scale():
    student, _, _ = planted_pair(2000)
    rotation = torch.linalg.qr(torch.randn(E, D, dtype=torch.float64)).Q
    teacher = 1.7 * student @ rotation.T
    fit = fit_pair(statistics_of(student, teacher), projector="procrustes")
    assert fit.teacher_RE.shape == (D, E)  # the teacher's states span no more
    torch.testing.assert_close(fit.teacher_RE.T @ fit.student_RD, 1.7 * rotation, rtol=1e-7, atol=1e-8)
    bent = fit_pair(statistics_of(student, student @ torch.randn(D, E, dtype=torch.float64)), projector="procrustes")
    sizes = torch.linalg.svdvals(bent.student_RD)
    torch.testing.assert_close(sizes, sizes[:1].expand(D), rtol=1e-6, atol=0)  # an isometry times a number


def test_cca_orders_by_correlation_at_variance_one():
    student, teacher, _ = planted_pair(3000)
    fit = fit_pair(statistics_of(student, teacher), projector="cca", ridge=0.0)
    canonical = (teacher - teacher.mean(0)) @ fit.teacher_RE.T
    torch.testing.assert_close(torch.cov(canonical.T), torch.eye(E, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    bases = [torch.linalg.qr(x - x.mean(0)).Q for x in (student, teacher)]
    correlations = torch.linalg.svdvals(bases[0].T @ bases[1])
    r2 = 1 - squared_errors(fit, student, teacher)[:D] / canonical.var(0, correction=0)[:D]
    torch.testing.assert_close(r2, correlations.square(), rtol=1e-6, atol=1e-8)
    assert float(fit.explained_R[-1]) == pytest.approx(1)
    assert (fit.explained_R.diff() > 0).all()


def test_cca_leaves_out_directions_below_the_ridge():
    student, teacher, _ = planted_pair(500)
    variances = torch.linalg.eigvalsh(torch.cov(teacher.T)).flip(0)
    ridge = float((variances[2] * variances[3]).sqrt() / variances[0])
    assert len(fit_pair(statistics_of(student, teacher), projector="cca", ridge=ridge).variance_R) == 3


def test_ill_conditioned_states_with_ridge():
    generator = torch.Generator().manual_seed(5)
    student, teacher, _ = planted_pair(3000)
    held_student, held_teacher, _ = planted_pair(2000, seed=1)
    plain = squared_errors(fit_pair(statistics_of(student, teacher)), held_student, held_teacher)
    copy = torch.randn(D, D, generator=generator, dtype=torch.float64)

    def degenerate(states):
        """Linear copies up to rounding of 1e-5 (bfloat16's, of states of different sizes), a dimension of 1e4, a constant one."""
        noise = 1e-5 * torch.randn(len(states), D, generator=generator, dtype=torch.float64)
        return torch.cat(
            [states, states @ copy + noise, 1e4 * states[:, :1], torch.full_like(states[:, :1], 0.1)], 1
        ).float()

    statistics = statistics_of(degenerate(student), teacher.float())
    for ridge in (0.0, 1e-6, 1e-4):
        fit = fit_pair(statistics, ridge=ridge)
        assert fit.student_RD.isfinite().all()
        assert (fit.student_RD[:, -1] == 0).all()  # a constant carries nothing
        errors = squared_errors(fit, degenerate(held_student).double(), held_teacher)
        assert float(errors[:SHARED].sum()) < 1.1 * float(plain[:SHARED].sum())
    assert fit.student_RD.abs().max() < 10


@pytest.mark.parametrize(("spread", "constant"), [(1e-5, True), (1e-2, False)])
def test_a_dimension_that_varies_by_less_than_its_float32_rounding_is_constant(spread, constant):
    """1000 ± 1e-5 is 1000 in float32, where 1000 ± 1e-2 is not; a row of its own size would be 1/1e-5."""
    student, teacher, _ = planted_pair(400, mean=0.0)
    noise = torch.randn(400, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fit = fit_pair(statistics_of(torch.cat([student, 1000 + spread * noise], 1), teacher))
    assert bool((fit.student_RD[:, -1] == 0).all()) == constant
    if constant:
        torch.testing.assert_close(fit.student_RD[:, :-1], fit_pair(statistics_of(student, teacher)).student_RD)


def test_fewer_tokens_than_dimensions():
    student, teacher, _ = planted_pair(15)
    statistics = statistics_of(student, teacher)
    fit = fit_pair(statistics, ridge=0.0)
    assert len(fit.variance_R) == 14  # n − 1 directions are seen
    assert float(squared_errors(fit, student, teacher).max()) < 1e-10  # and interpolated
    held_out = statistics_of(*planted_pair(2000, seed=1)[:2])
    ridge = choose_ridge(statistics, held_out)
    errors = {r: float(direction_errors(fit_pair(statistics, ridge=r), held_out)[0].sum()) for r in (1e-8, ridge)}
    assert ridge > 1e-4
    assert errors[ridge] < 0.9 * errors[1e-8]
    report = report_pair(fit_pair(statistics, ridge=ridge), statistics, held_out)
    assert 1 <= report.suggested_rank <= SHARED


@pytest.mark.parametrize("intercept", [True, False])
def test_the_chosen_ridge_is_the_best_by_brute_force(intercept):
    statistics, held_out = (statistics_of(*planted_pair(40, seed=s, noise=0.5)[:2]) for s in (0, 1))
    ridges = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    fits = {r: fit_pair(statistics, ridge=r, intercept=intercept) for r in ridges}
    errors = {r: float(direction_errors(fit, held_out)[0].sum()) for r, fit in fits.items()}
    assert choose_ridge(statistics, held_out, ridges, intercept=intercept) == min(errors, key=errors.get)


@pytest.mark.parametrize("moved", ["student", "teacher", "both", "against"])
def test_the_chosen_ridge_knows_how_far_the_held_out_means_have_moved(moved):
    """By brute force, on tokens whose means are not those of the fit's; it matters in some of the draws."""
    ridges, mattered = torch.logspace(-6, 2, 17).tolist(), 0
    for seed in range(6):
        statistics = statistics_of(*planted_pair(60, seed=seed, noise=0.5)[:2])
        student, teacher, _ = planted_pair(60, seed=seed + 10, noise=0.5)
        step = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        carried = fit_pair(statistics, ridge=1e-6)
        follow = 2 * step @ carried.student_RD.T @ carried.teacher_RE  # what the fit makes of the student's step
        steps = {
            "student": (2 * step, 0),
            "teacher": (0, follow),
            "both": (2 * step, follow),
            "against": (2 * step, -follow),
        }
        held_out = statistics_of(student + steps[moved][0], teacher + steps[moved][1])
        errors = {r: float(direction_errors(fit_pair(statistics, ridge=r), held_out)[0].sum()) for r in ridges}
        chosen = choose_ridge(statistics, held_out, ridges)
        assert chosen == min(errors, key=errors.get)
        mattered += chosen != choose_ridge(statistics, statistics_of(student, teacher), ridges)
    assert mattered or moved == "teacher"


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_float32_states_with_a_large_mean(mean):
    student, teacher, _ = planted_pair(3000, mean=mean)
    exact, fit = (fit_pair(statistics_of(student.to(t), teacher.to(t))) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(fit.variance_R, exact.variance_R, rtol=1e-4, atol=0)
    torch.testing.assert_close(fit.student_RD[:SHARED], exact.student_RD[:SHARED], rtol=1e-3, atol=1e-4)


def test_the_intercept_matters_where_means_are_large():
    student, teacher, _ = planted_pair(3000, mean=50.0)
    held_out = statistics_of(*planted_pair(2000, seed=1, mean=50.0)[:2])
    with_it, without = (fit_pair(statistics_of(student, teacher), intercept=i) for i in (True, False))
    errors = [float(direction_errors(fit, held_out)[0][:SHARED].sum()) for fit in (with_it, without)]
    assert errors[0] <= errors[1]
    assert (without.student_mean_D == 0).all()


def test_scales():
    variance = torch.tensor([9.0, 4.0, 2.0])
    assert SCALES["none"](variance).tolist() == [1]
    assert SCALES["mean"](variance).tolist() == [pytest.approx(5**0.5)]
    assert SCALES["direction"](variance).tolist() == pytest.approx([3, 2, 2**0.5])


def report_with(**changes):
    statistics = statistics_of(*planted_pair(100)[:2])
    report = report_pair(fit_pair(statistics), statistics, statistics)
    return dataclasses.replace(report, **{"cka": 0.6, "direct_r2": None, "predictable": 0.7, **changes})


def test_verdicts():
    good, weak, unlike = report_with(), report_with(predictable=0.4), report_with(cka=0.2)
    same = report_with(cka=0.98, direct_r2=0.9)
    assert verdict({1: same, 2: same}, same_depth=True) == ("direct", (1, 2))
    assert verdict({1: same, 2: same}, same_depth=False) == ("bridge all layers", (1, 2))
    rotated = report_with(cka=0.98, direct_r2=-1.0)  # one shape, unaligned dimensions
    assert verdict({1: same, 2: rotated}, same_depth=True) == ("bridge all layers", (1, 2))
    assert verdict({1: weak, 2: good, 3: weak, 5: good, 6: good}, same_depth=True) == ("bridge last layers", (5, 6))
    assert verdict({1: unlike, 2: good}, same_depth=True) == ("bridge last layers", (2,))
    assert verdict({1: good, 2: unlike}, same_depth=True) == ("hopeless", ())


def test_the_ridge_auto_is_the_one_that_the_held_out_tokens_choose():
    student, teacher, _ = planted_pair(160)
    statistics, held_out = statistics_of(student[:80], teacher[:80]), statistics_of(student[80:], teacher[80:])
    auto = fit_pair(statistics, ridge="auto", held_out=held_out)
    chosen = choose_ridge(statistics, held_out)
    assert chosen > 1e-4  # so few tokens want more than the default
    assert torch.equal(auto.student_RD, fit_pair(statistics, ridge=chosen).student_RD)


def test_bad_arguments_are_refused():
    student, teacher, _ = planted_pair(50)
    statistics = statistics_of(student, teacher)
    fit = fit_pair(statistics)
    constant = statistics_of(student, torch.full_like(teacher, 0.1))
    for message, call in {
        "'lasso' is not one of least_squares, procrustes, cca": lambda: fit_pair(statistics, projector="lasso"),
        "ridge: -1.0 must be 0 or more": lambda: fit_pair(statistics, ridge=-1.0),
        "ridge: 'some' is not allowed; a number": lambda: fit_pair(statistics, ridge="some"),
        "ridge: 'auto' is chosen by held-out tokens": lambda: fit_pair(statistics, ridge="auto"),
        "do not vary over the 50 tokens": lambda: fit_pair(constant),
        "do not vary over the 0 tokens": lambda: fit_pair(PairStatistics(D, E)),
        "rank: 40 is not between 1 and the 32 directions": lambda: fit.first(40),
        "rank: 0 is not between": lambda: fit.first(0),
        "0 held-out tokens and a sample of 0": lambda: report_pair(fit, statistics, PairStatistics(D, E)),
        "a sample of 0": lambda: report_pair(fit, statistics, statistics_of(student, teacher, sample_size=0)),
        "no layer to judge": lambda: inspect.unwrap(verdict)({}, same_depth=True),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_rank_above_the_largest_that_is_kept_is_refused_before_rollouts():
    check_fitting(10, 0.2, rank=4, max_rank=4)
    with pytest.raises(ValueError, match="rank: 8 is more than max_rank, which is 4"):
        check_fitting(10, 0.2, rank=8, max_rank=4)
