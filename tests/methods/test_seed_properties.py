"""Defining properties of Aligned-MTL, IMTL and ExcessMTL, for matrices drawn at random."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    close,
    degenerate,
    equal_angles,
    gaussian,
    jacobians,
    of_rank,
    orthogonal,
    positive,
    relative_error,
    seeds,
    stationary,
    vector,
    with_condition,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mtl_tutorial.gradients import gram_matrix
from mtl_tutorial.methods import IMTL, IMTLG, IMTLL, AlignedMTL, Equal, ExcessMTL
from mtl_tutorial.methods.aligned_mtl import aligned_weights, balance_matrix
from mtl_tutorial.methods.excess_mtl import excess_risks
from mtl_tutorial.methods.imtl import imtl_g_weights, imtl_l_step

scales = st.sampled_from(["min", "median", "rmse"])


def identity(k):
    return torch.eye(k, dtype=torch.float64)


# --------------------------------------------------------------------------------- Aligned-MTL


@given(jacobians(), scales)
def test_aligned_gradients_are_orthogonal_with_one_common_norm(j, scale):
    """J^ J^T = sigma^2 I, so the condition number is one; sigma as the scale mode says."""
    aligned = balance_matrix(gram_matrix(j), scale) @ j
    values = torch.linalg.svdvals(j)
    sigma2 = {
        "min": values[-1] ** 2,
        "median": values[len(j) // 2] ** 2,  # descending, so this is the lower middle
        "rmse": (values**2).mean(),
    }[scale]
    assert relative_error(gram_matrix(aligned), sigma2 * identity(len(j))) < 1e-9


@given(jacobians())
def test_aligned_gradients_are_the_scaled_polar_factor(j):
    """J^ = sigma_min U V^T of the singular value decomposition."""
    u, s, vh = torch.linalg.svd(j, full_matrices=False)
    aligned = balance_matrix(gram_matrix(j)) @ j
    assert relative_error(aligned, s[-1] * u @ vh) < 1e-9


@given(jacobians(condition=1000.0), seeds)
def test_aligned_step_is_bounded_by_the_weights(j, seed):
    """B symmetric, positive semi-definite, norm one: |alpha| <= |w| and |d| = sigma_min |w|."""
    b = balance_matrix(gram_matrix(j))
    assert torch.equal(b, b.T) or relative_error(b, b.T) < 1e-14
    eigenvalues = torch.linalg.eigvalsh(b)
    assert eigenvalues[0] > -1e-12
    assert abs(eigenvalues[-1] - 1) < 1e-9
    w = torch.rand(len(j), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alpha = aligned_weights(gram_matrix(j), w)
    assert alpha.norm() <= w.norm() * (1 + 1e-9)
    sigma = torch.linalg.svdvals(j)[-1]
    assert abs((alpha @ j).norm() / (sigma * w.norm()) - 1) < 1e-7


@given(jacobians())
def test_aligned_step_descends_the_weighted_loss(j):
    """g0 . d = sigma sum_r sigma_r (w . v_r)^2 >= |d|^2 for g0 = J^T w."""
    method = AlignedMTL()
    d = method.direction(j)
    g0 = j.mean(0)
    u, s, _ = torch.linalg.svd(j, full_matrices=False)
    w = torch.full((len(j),), 1 / len(j), dtype=torch.float64)
    expected = s[-1] * (s * (u.T @ w) ** 2).sum()
    assert abs(g0 @ d / expected - 1) < 1e-9
    assert g0 @ d >= (d @ d) * (1 - 1e-9)


@given(jacobians())
def test_aligned_gradient_descends_its_own_task(j):
    """g_k . g^_k = sigma (M^{1/2})_kk > 0."""
    gram = gram_matrix(j)
    own = (j * (balance_matrix(gram) @ j)).sum(1)
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.sqrt()) @ vectors.T
    assert relative_error(own, values[0].sqrt() * root.diagonal()) < 1e-8
    assert own.min() > 0


@given(st.integers(2, 5), st.floats(0.1, 10), seeds)
def test_aligned_mtl_leaves_orthogonal_equal_gradients_alone(k, norm, seed):
    """B = I and d = J^T w."""
    j = norm * orthogonal(8, seed)[:k]
    close(balance_matrix(gram_matrix(j)), identity(k), atol=1e-9)
    close(AlignedMTL().direction(j), j.mean(0), atol=1e-9 * norm)


@given(positive(3))
def test_aligned_mtl_of_orthogonal_gradients_divides_by_their_norms(norms):
    """alpha_k = w_k min(n) / n_k."""
    j = torch.diag(norms)
    close(aligned_weights(gram_matrix(j)), norms.min() / norms / 3, atol=1e-9)


@given(st.floats(0.2, 3.0), seeds)
def test_condition_number_of_two_equal_gradients_is_a_cotangent(angle, seed):
    """cot(angle / 2) for an acute angle, tan(angle / 2) for an obtuse one."""
    j = vector(1, 0, math.cos(angle), math.sin(angle)).view(2, 2) @ orthogonal(4, seed)[:2]
    values = torch.linalg.svdvals(j)
    tangent = math.tan(angle / 2)
    assert abs(values[0] / values[-1] / max(tangent, 1 / tangent) - 1) < 1e-9


def test_condition_number_known():
    j = vector(1, 0, math.cos(1.1), math.sin(1.1)).view(2, 2)
    values = torch.linalg.svdvals(j)
    close(values[0] / values[1], vector(1.6310414238)[0])


@given(st.integers(3, 6), st.integers(1, 3), seeds)
def test_aligned_mtl_of_dependent_gradients_is_a_scaled_projector(k, rank, seed):
    """J^ J^T = sigma^2 V_R V_R^T: all non-zero singular values are equal."""
    assume(rank < k)
    j = of_rank(k, 8, rank, seed)
    aligned = balance_matrix(gram_matrix(j)) @ j
    u = torch.linalg.svd(j)[0][:, :rank]
    assert relative_error(gram_matrix(aligned), u @ u.T) < 1e-9  # sigma_min is one


@given(seeds)
def test_aligned_mtl_stops_at_stationary_points_of_the_weighted_loss_alone(seed):
    """d = 0 where J^T w = 0; at other Pareto-stationary points it moves on."""
    j, w = stationary(3, 6, seed)
    size = j.norm()
    alpha = aligned_weights(gram_matrix(j), w)
    assert (alpha @ j).norm() < 1e-7 * size
    other = w.roll(1)
    assume((w - other).abs().max() > 0.05)
    assert (aligned_weights(gram_matrix(j), other) @ j).norm() > 1e-4 * size


# -------------------------------------------------------------------------------------- IMTL-G


@given(jacobians())
def test_imtl_g_projects_equally_on_all_unit_gradients(j):
    """sum alpha = 1 (or -1 where the sign was kept) and d . u_k the same, positive, for all k."""
    alpha = imtl_g_weights(gram_matrix(j))
    projections = (j @ (alpha @ j)) / j.norm(dim=1)
    assert abs(abs(alpha.sum()) - 1) < 1e-9
    assert projections.min() > 0
    assert (projections - projections.mean()).abs().max() < 1e-7 * projections.mean()


@given(jacobians(condition=10.0))
def test_imtl_g_equals_the_papers_closed_form(j):
    """alpha_{2..K} = g_1 U^T (D U^T)^-1, alpha_1 the rest."""
    unit = j / j.norm(dim=1, keepdim=True)
    d, u = j[:1] - j[1:], unit[:1] - unit[1:]
    rest = torch.linalg.solve((d @ u.T).T, u @ j[0])
    paper = torch.cat([1 - rest.sum()[None], rest])
    alpha = imtl_g_weights(gram_matrix(j))
    assume(paper.abs().max() < 1e3)  # away from the pole of the paper's normalisation
    assert min(relative_error(alpha, paper), relative_error(alpha, -paper)) < 1e-6
    assert relative_error(alpha @ j, paper @ j) < 1e-6 or alpha.sum() < 0


@given(jacobians(min_tasks=2, max_tasks=2))
def test_imtl_g_of_two_tasks_ignores_the_angle(j):
    """alpha = (n_2, n_1) / (n_1 + n_2)."""
    n = j.norm(dim=1)
    close(imtl_g_weights(gram_matrix(j)), n.flip(0) / n.sum(), atol=1e-12)


@given(jacobians(min_tasks=3, max_tasks=3, condition=10.0), positive(3))
def test_imtl_g_direction_ignores_the_scales_of_the_tasks(j, c):
    """g_k -> c_k g_k: d' = d / sum_k(alpha_k / c_k), alpha'_k proportional to alpha_k / c_k."""
    alpha, other = imtl_g_weights(gram_matrix(j)), imtl_g_weights(gram_matrix(c[:, None] * j))
    factor = (alpha / c).sum().abs()
    assume(factor > 1e-3 * (alpha / c).abs().sum())
    d, scaled = alpha @ j, other @ (c[:, None] * j)
    assert relative_error(scaled, d / factor) < 1e-7
    assert relative_error(other, alpha / c / factor) < 1e-7


@given(positive(4), st.floats(0.0, 0.9), seeds)
def test_imtl_g_of_equal_angles_divides_by_the_norms(norms, cosine, seed):
    """Then alpha_k is proportional to 1 / n_k, all positive."""
    j = equal_angles(norms, 6, cosine, seed)
    close(imtl_g_weights(gram_matrix(j)), (1 / norms) / (1 / norms).sum(), atol=1e-7)


@given(seeds, st.integers(2, 4))
def test_imtl_g_stops_at_opposite_gradients_and_keeps_the_limit_of_parallel_ones(seed, factor):
    g = gaussian(1, 5, seed)
    assert IMTLG().direction(torch.cat([g, -factor * g])).norm() < 1e-12 * g.norm() * factor
    parallel = imtl_g_weights(gram_matrix(torch.cat([g, factor * g, 2 * factor * g])))
    inverse = vector(1, 1 / factor, 1 / (2 * factor))
    close(parallel, inverse / inverse.sum(), atol=1e-7)


@given(seeds, positive(4), st.integers(2, 5))
@example(1226, vector(1, 1, 1, 3), 5)  # g and h nearly parallel: an eigenvalue of 0.018
def test_imtl_g_stops_at_pairs_of_opposite_gradients(seed, norms, size):
    """No x has u_k . x > 0 for all k: alpha_k proportional to 1 / n_k, and d = 0."""
    g, h = gaussian(1, size, seed), gaussian(1, size, seed + 1)
    rows = torch.cat([g, -g, h, -h])
    rows = norms[:, None] * rows / rows.norm(dim=1, keepdim=True)
    alpha = imtl_g_weights(gram_matrix(rows))
    close(alpha, (1 / norms) / (1 / norms).sum(), atol=1e-9)
    assert (alpha @ rows).norm() < 1e-9


@given(jacobians(), st.integers(0, 4))
def test_imtl_g_treats_zero_gradients_as_absent(j, at):
    at = at % (len(j) + 1)
    rows = torch.cat([j[:at], torch.zeros_like(j[:1]), j[at:]])
    alpha = imtl_g_weights(gram_matrix(rows))
    assert alpha[at] == 0
    assert relative_error(alpha @ rows, IMTLG().direction(j)) < 1e-6


# -------------------------------------------------------------------------------------- IMTL-L


@given(positive(3))
def test_imtl_l_settles_where_every_scaled_loss_is_one(losses):
    """s* = -ln L, the fixed point of s - lr (e^s L - 1)."""
    s = -losses.log()
    close(imtl_l_step(s, losses, 0.1, 10.0), s, atol=1e-12)
    found = torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        found = imtl_l_step(found, losses, 0.05, 10.0)
    close(found, s, atol=1e-8)
    close(found.exp() * losses - found, 1 + losses.log(), atol=1e-8)  # its minimum is 1 + ln L


@given(positive(3), st.floats(-2, 2), st.floats(-2, 2))
def test_imtl_l_step_is_the_gradient_of_its_convex_objective(losses, a, b):
    """d/ds (e^s L - s) = e^s L - 1, and the objective lies below its chords."""

    def objective(s):
        return s.exp() * losses - s

    s = torch.full((3,), a, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(s).sum(), s)
    close(imtl_l_step(s.detach(), losses, 0.1, 1e9), s.detach() - 0.1 * gradient, atol=1e-12)
    t = torch.full((3,), b, dtype=torch.float64)
    chord = (objective(s.detach()) + objective(t)) / 2
    assert (objective((s.detach() + t) / 2) <= chord + 1e-9).all()


@given(positive(3), st.floats(0.1, 10))
def test_imtl_l_is_exactly_scale_invariant_with_a_shifted_start(losses, c):
    """L -> c L with s_0 -> s_0 - ln c gives the same scaled losses at every step."""
    plain, shifted = IMTLL(lr=0.1), IMTLL(lr=0.1, init=-math.log(c))
    for _ in range(5):
        a, b = plain.weights(losses), shifted.weights(c * losses)
        close(c * b, a, atol=1e-9)


def test_imtl_l_is_twice_the_regression_form_of_uncertainty_weighting():
    """With s = -2 ln sigma: e^s L - s = 2 (e^{-2 ln sigma} L / 2 + ln sigma)."""
    losses, log_sigma = vector(2, 0.5, 4), vector(0.3, -0.2, 0.1)
    s = -2 * log_sigma
    close(s.exp() * losses - s, 2 * ((-2 * log_sigma).exp() * losses / 2 + log_sigma), 1e-14)


def test_imtl_l_stays_within_its_bound_for_losses_at_or_below_zero():
    """Without a bound the log scales of such losses go to infinity."""
    method = IMTLL(lr=1.0, bound=3.0)
    for _ in range(50):
        method.weights(vector(0.0, -5.0, 1e9))
    close(method.state_dict()["state"]["log_scales"], vector(3, 3, -3))


# ---------------------------------------------------------------------------------------- IMTL


@given(jacobians(condition=10.0), st.floats(-1, 1), seeds)
def test_imtl_points_where_imtl_g_points(j, init, seed):
    """The scales change the length of the shared step alone (the factor is positive here)."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(len(j), dtype=torch.float64, generator=generator) + 0.1
    method = IMTL(lr=0.3, init=init)
    g = IMTLG().direction(j)
    for _ in range(3):
        d = method.direction(j, losses=losses)
        close(d / d.norm(), g / g.norm(), atol=1e-6)


def test_imtl_without_losses_leaves_the_scales_alone():
    method, j = IMTL(lr=0.5), gaussian(2, 4, 0)
    method.direction(j, losses=vector(1.5, 4))
    before = method.state_dict()["state"]["log_scales"]
    method.direction(j)
    method.weights(gram_matrix(j))
    close(method.state_dict()["state"]["log_scales"], before, atol=0)


# ----------------------------------------------------------------------------------- ExcessMTL


def excess_run(sequence, **settings):
    method = ExcessMTL(**settings)
    return torch.stack([method.weights(rows) for rows in sequence])


@st.composite
def sequences(draw):
    k, p, steps = draw(st.integers(2, 4)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    return [gaussian(k, p, draw(seeds)) for _ in range(steps)]


@given(sequences(), st.floats(0, 5))
def test_excess_weights_are_the_softmax_of_the_summed_ratios(sequence, step_size):
    """w(t) = softmax(step_size * sum over tau >= 2 of R(tau)): positive, sum one."""
    weights = excess_run(sequence, step_size=step_size)
    assert weights.min() > 0
    close(weights.sum(1), torch.ones(len(sequence)), atol=1e-12)
    squares, total, baseline = torch.zeros_like(sequence[0]), 0.0, None
    for rows, found in zip(sequence, weights, strict=True):
        squares = squares + rows**2
        risks = (rows**2 / (squares + 1e-7) ** 0.5).sum(1)
        if baseline is None:
            baseline, total = risks, torch.zeros(len(rows), dtype=torch.float64)
        else:
            total = total + risks / baseline
        close(found, torch.softmax(step_size * total, 0), atol=1e-9)


@given(sequences())
def test_excess_weights_without_step_size_are_uniform(sequence):
    weights = excess_run(sequence, step_size=0)
    close(weights, torch.full_like(weights, 1 / weights.shape[1]), atol=1e-15)


@given(sequences())
def test_excess_risks_lie_between_zero_and_the_one_norm(sequence):
    """S_k >= g_k^2, hence E_k <= |g_k|_1, with equality (up to epsilon) at the first step."""
    squares = torch.zeros_like(sequence[0])
    for i, rows in enumerate(sequence):
        squares = squares + rows**2
        risks = excess_risks(rows, squares)
        assert risks.min() >= 0
        assert (risks <= rows.abs().sum(1)).all()
        if i == 0:
            close(risks, rows.abs().sum(1), atol=2e-3)


@given(sequences(), st.floats(0.1, 10))
def test_excess_weights_ignore_the_scales_of_the_losses(sequence, c):
    """Exact but for epsilon."""
    scales_ = torch.ones(len(sequence[0]), 1, dtype=torch.float64)
    scales_[0], scales_[1] = 10 * c, 10 / c  # large enough for epsilon to vanish beside it
    big = [10 * rows for rows in sequence]
    scaled = [scales_ * rows for rows in sequence]
    close(excess_run(scaled, step_size=1), excess_run(big, step_size=1), atol=2e-3)


@given(st.integers(2, 4), st.integers(2, 6), seeds)
def test_excess_weights_stay_uniform_under_constant_gradients(k, p, seed):
    """Then R_k(t) = 1 / sqrt(t) for every task."""
    rows = 10 * gaussian(k, p, seed).sign() * (1 + gaussian(k, p, seed + 1) ** 2)
    weights = excess_run([rows] * 5, step_size=1)
    close(weights, torch.full_like(weights, 1 / k), atol=1e-7)


@given(sequences(), seeds)
def test_excess_weights_ignore_signs_and_order_of_coordinates_but_not_rotations(sequence, seed):
    p = sequence[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(p, generator=generator)
    signs = torch.randint(0, 2, (p,), generator=generator) * 2.0 - 1
    plain = excess_run(sequence, step_size=1)
    close(excess_run([(signs * rows)[:, order] for rows in sequence], step_size=1), plain, 1e-9)


def test_excess_weights_change_under_rotation():
    sequence = [gaussian(2, 4, seed) for seed in range(3)]
    rotated = [rows @ orthogonal(4, 9) for rows in sequence]
    plain, other = excess_run(sequence, step_size=1), excess_run(rotated, step_size=1)
    assert (plain - other).abs().max() > 1e-3


@given(sequences())
def test_the_larger_ratio_grows_the_weight(sequence):
    """w_i / w_j grows from one step to the next exactly if R_i > R_j."""
    method = ExcessMTL(step_size=1)
    before = method.weights(sequence[0])
    squares = sequence[0] ** 2
    baseline = excess_risks(sequence[0], squares)
    for rows in sequence[1:]:
        squares = squares + rows**2
        ratio = excess_risks(rows, squares) / baseline
        after = method.weights(rows)
        growth = (after / before).log()
        close(growth[0] - growth[1], ratio[0] - ratio[1], atol=1e-9)
        before = after


def test_excess_warm_up_counts_steps_with_a_gradient():
    """A task with zero gradients at first gets its baseline later, and no ratio till then."""
    method = ExcessMTL(step_size=1, warmup=2)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    g = gaussian(1, 3, 0)
    for _ in range(3):
        weights = method.weights(torch.cat([g, zero]))
        assert weights.isfinite().all()
    state = method.state_dict()["state"]
    assert state["seen"].tolist() == [3, 0]
    assert state["log_weights"][1] == 0
    method.weights(torch.cat([g, g]))
    method.weights(torch.cat([g, g]))
    assert method.state_dict()["state"]["log_weights"][1] == 0  # two steps of its own warm-up
    method.weights(torch.cat([g, g]))
    assert method.state_dict()["state"]["log_weights"][1] > 0


def test_excess_huge_step_size_saturates_without_overflow():
    weights = excess_run([gaussian(2, 3, s) for s in range(4)], step_size=1e6)
    assert weights.isfinite().all()
    close(weights.sum(1), torch.ones(4))


def test_excess_refuses_another_number_of_parameters():
    method = ExcessMTL()
    method.weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"tasks x parameters as in earlier steps, got \(2, 4\)"):
        method.weights(torch.ones(2, 4))


# ------------------------------------------------------------------------------ settings refused


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (AlignedMTL, {"scale": "mean"}),
        (AlignedMTL, {"preference": [-1, 2]}),
        (AlignedMTL, {"preference": [0, 0]}),
        (AlignedMTL, {"preference": [1, float("inf")]}),
        (AlignedMTL, {"preference": []}),
        (IMTLL, {"lr": 0}),
        (IMTLL, {"bound": -1}),
        (IMTLL, {"init": 11}),
        (IMTL, {"lr": float("nan")}),
        (ExcessMTL, {"step_size": -1}),
        (ExcessMTL, {"step_size": float("inf")}),
        (ExcessMTL, {"warmup": 0}),
        (ExcessMTL, {"warmup": 1.5}),
        (Equal, {"reduction": "max"}),
        (Equal, {"preference": [-1, 2]}),
        (Equal, {"preference": [0, 0]}),
        (Equal, {"preference": []}),
    ],
)
def test_bad_settings_are_refused(cls, settings):
    with pytest.raises(ValueError, match=f"{cls.name}: expected"):
        cls(**settings)


@pytest.mark.parametrize("method", [AlignedMTL, Equal])
def test_preference_must_have_one_entry_per_task(method):
    with pytest.raises(ValueError, match="a preference for each of 3 tasks, got 2"):
        method(preference=[1, 1]).direction(gaussian(3, 4, 0), losses=torch.ones(3))


# ------------------------------------------------------------------------------ behaviour table

DIAG = torch.diag(vector(1, 2, 4))
PLAIN = with_condition(3, 5, 5.0, 1)
SCALES = vector(2, 0.5, 3)[:, None]
ROTATION = orthogonal(5, 7)
ORDER = [2, 0, 1]
METHODS = {"imtl_g": IMTLG, "aligned_mtl": AlignedMTL, "excess_mtl": lambda: ExcessMTL(1.0)}


def two_steps(name, j):
    """Direction and weights of the second of two calls, so that ExcessMTL has moved."""
    method, twin = METHODS[name](), METHODS[name]()
    method.direction(j), twin.direction(j)
    shrunk = j * torch.linspace(0.2, 1, j.shape[1], dtype=torch.float64)
    x = shrunk if twin.sees == "rows" else gram_matrix(shrunk)
    return method.direction(shrunk), twin.weights(x)


def same_weights(name, a, b):
    return relative_error(two_steps(name, b)[1], two_steps(name, a)[1]) < 1e-6


def same_direction(name, a, b):
    u, v = two_steps(name, a)[0], two_steps(name, b)[0]
    return relative_error(v / v.norm(), u / u.norm()) < 1e-6


def call_one(name, j):
    method = METHODS[name]()
    return method.weights(j if method.sees == "rows" else gram_matrix(j))


def min_norm_zero(name, j):
    return bool(METHODS[name]().direction(j).norm() < 1e-9)


def rotated(name):
    method, twin = METHODS[name](), METHODS[name]()
    pairs = [
        (method.direction(j) @ ROTATION, twin.direction(j @ ROTATION))
        for j in (PLAIN, PLAIN * torch.linspace(0.2, 1, 5, dtype=torch.float64))
    ]
    return all(relative_error(b, a) < 1e-6 for a, b in pairs)


def tuple_of(t):
    return pytest.approx(tuple(t.tolist()), abs=1e-9)


G = gaussian(1, 5, 3)
ZERO_ROW = torch.cat([PLAIN[:1], torch.zeros(1, 5, dtype=torch.float64), PLAIN[1:2]])
ASCENDS = vector(1, 0, 0, -0.9, 0.3, 0, -0.9, -0.3, 0.1).view(3, 3)

# One line per input; one expected value per method: IMTL-G, Aligned-MTL, ExcessMTL.
TABLE = {
    "one task": (lambda n: tuple(call_one(n, G).tolist()), (1.0,), (1.0,), (1.0,)),
    "orthogonal, equal norms": (
        lambda n: tuple(call_one(n, 2 * orthogonal(5, 2)[:3]).tolist()),
        *[(1 / 3,) * 3] * 3,
    ),
    "orthogonal, norms 1 2 4": (
        lambda n: tuple(call_one(n, DIAG).tolist()),
        (4 / 7, 2 / 7, 1 / 7),
        (1 / 3, 1 / 6, 1 / 12),
        (1 / 3,) * 3,
    ),
    "orthogonal, norms 1 2 4: direction": (
        lambda n: tuple(METHODS[n]().direction(DIAG).tolist()),
        (4 / 7,) * 3,
        (1 / 3,) * 3,
        (1 / 3, 2 / 3, 4 / 3),
    ),
    "common scale: same weights": (lambda n: same_weights(n, 10 * PLAIN, 40 * PLAIN), *[True] * 3),
    "scale per task: same direction": (
        lambda n: same_direction(n, 10 * PLAIN, 10 * SCALES * PLAIN),
        *(True, False, False),
    ),
    "scale per task: same weights": (
        lambda n: same_weights(n, 100 * PLAIN, 100 * SCALES * PLAIN),
        *(False, False, True),
    ),
    "order of tasks: weights follow": (
        lambda n: (
            relative_error(two_steps(n, PLAIN[ORDER])[1], two_steps(n, PLAIN)[1][ORDER]) < 1e-9
        ),
        *[True] * 3,
    ),
    "rotation: direction rotates": (rotated, True, True, False),
    "zero row: its weight at the first call": (
        lambda n: round(call_one(n, ZERO_ROW)[1].item(), 9),
        *(0.0, 0.0, round(1 / 3, 9)),
    ),
    "two equal rows": (
        lambda n: tuple(call_one(n, torch.cat([G, G])).tolist()),
        *[(0.5, 0.5)] * 3,
    ),
    "opposite rows, equal norms: no step": (
        lambda n: min_norm_zero(n, torch.cat([G, -G])),
        *[True] * 3,
    ),
    "opposite rows, norms 1 and 2: no step": (
        lambda n: min_norm_zero(n, torch.cat([G, -2 * G])),
        *(True, False, False),
    ),
    "descends every task": (
        lambda n: bool((ASCENDS @ METHODS[n]().direction(ASCENDS)).min() > 0),
        *(True, False, False),
    ),
    "descends the mean loss": (
        lambda n: bool(
            min(
                gaussian(3, 4, s).mean(0) @ METHODS[n]().direction(gaussian(3, 4, s))
                for s in range(200)
            )
            > 0
        ),
        # IMTL-G by equal positive projections on independent gradients (its sign guard included),
        # Aligned-MTL by theorem, ExcessMTL since its first call is the mean.
        *(True, True, True),
    ),
}


@pytest.mark.parametrize("column", [0, 1, 2], ids=list(METHODS))
@pytest.mark.parametrize("row", list(TABLE))
def test_behaviour_table(row, column):
    measure, *expected = TABLE[row]
    found = measure(list(METHODS)[column])
    want = expected[column]
    assert found == (pytest.approx(want, abs=1e-9) if isinstance(want, tuple) else want)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("case", list(degenerate()))
def test_degenerate_inputs_have_finite_weights(name, case):
    j = degenerate()[case]
    assert call_one(name, j).isfinite().all()
