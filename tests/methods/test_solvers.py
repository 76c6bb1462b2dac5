"""The small solvers, against enumeration of all faces and against their optimality conditions."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import gaussian, of_rank, orthogonal, relative_error, seeds, stationary, vector
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtl_tutorial import solvers

ratios = st.sampled_from([1.0, 30.0, 1e3])
scales = st.sampled_from([1e-6, 1.0, 1e6])


def spread(k: int, p: int, seed: int, ratio: float, scale: float = 1.0) -> Tensor:
    """Gaussian rows whose norms are spread over `ratio`, the whole of Frobenius norm `scale`."""
    rows = torch.nn.functional.normalize(gaussian(k, p, seed), dim=1)
    exponents = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exponents[0], exponents[-1] = 0.0, 1.0
    rows = rows * ratio ** exponents[:, None]
    return rows * scale / rows.norm()


def faces(k: int) -> list[list[int]]:
    every = range(1, k + 1)
    return [list(face) for n in every for face in itertools.combinations(range(k), n)]


def nearest_in_hull(rows: Tensor) -> Tensor:
    """Min-norm point of the hull: the shortest of the min-norm points of affine hulls inside."""
    best = None
    for face in faces(len(rows)):
        base = rows[face[0]]
        if len(face) == 1:
            point, weights = base, torch.ones(1, dtype=rows.dtype)
        else:
            edges = (rows[face[1:]] - base).T
            steps = -torch.linalg.lstsq(edges, base[:, None], driver="gelsd").solution[:, 0]
            point = base + edges @ steps
            weights = torch.cat([1 - steps.sum()[None], steps])
        if (weights >= -1e-12).all() and (best is None or point.norm() < best.norm()):
            best = point
    assert best is not None
    return best


def nearest_in_cone(rows: Tensor, x: Tensor) -> Tensor:
    """Projection on {d : J d >= 0}: the nearest feasible projection on a set of edges."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    best = None
    for face in [[], *faces(len(rows))]:
        basis = torch.linalg.svd(unit[face], full_matrices=False)
        basis = basis.Vh[basis.S > 1e-9]
        point = x - basis.T @ (basis @ x)
        feasible = (unit @ point >= -1e-10 * x.norm()).all()
        if feasible and (best is None or (point - x).norm() < (best - x).norm()):
            best = point
    assert best is not None
    return best


def best_in_ball(rows: Tensor, c: float) -> Tensor:
    """CAGrad by faces: the d on the sphere with equal gain tau on a face, largest least gain.

    Written with pseudo-inverses of the rows, so it shares nothing with the solver.
    """
    mean = rows.mean(0)
    radius = c * mean.norm()
    best, value = mean, (rows @ mean).min()
    for face in faces(len(rows)):
        pinv = torch.linalg.pinv(rows[face])
        # d - mean = pinv (tau 1 - J_S mean), of length radius: a parabola in tau
        up, back = pinv.sum(1), pinv @ (rows[face] @ mean)
        a, b, e = up @ up, up @ back, back @ back - radius**2
        if b**2 < a * e:
            continue
        for sign in (1, -1):
            tau = (b + sign * (b**2 - a * e).sqrt()) / a
            d = mean + tau * up - back
            gain = (rows @ d).min()
            if gain > value:
                best, value = d, gain
    return best


# ----------------------------------------------------------------------------- non-negative QP


@given(seeds, st.integers(1, 8), st.integers(1, 10), ratios, scales)
def test_nonnegative_qp_is_optimal(seed: int, k: int, p: int, ratio: float, scale: float) -> None:
    """``s >= 0``, ``A s + q >= 0`` and ``s (A s + q) = 0``, in units of the rows' norms."""
    rows = spread(k, p, seed, ratio, scale)
    matrix, norms = rows @ rows.T, rows.norm(dim=1)
    points = gaussian(3, p, seed + 1)  # q in the range of A, so the minimum exists for p < k too
    s = solvers.nonnegative_qp(matrix, points @ rows.T)
    slope = (s @ rows + points) @ rows.T / norms
    assert s.min() >= 0
    assert slope.min() >= -1e-9 * points.norm()
    assert (s * norms * slope).abs().max() <= 1e-9 * points.norm() ** 2


@given(seeds, st.integers(2, 7), st.integers(1, 9))
def test_nonnegative_qp_solves_each_row_as_if_alone(seed: int, k: int, p: int) -> None:
    rows, points = gaussian(k, p, seed), gaussian(4, p, seed + 1)
    together = solvers.nonnegative_qp(rows @ rows.T, points @ rows.T) @ rows
    for x, point in zip(together, points, strict=True):
        alone = solvers.nonnegative_qp(rows @ rows.T, (point @ rows.T)[None])[0] @ rows
        torch.testing.assert_close(x, alone, atol=1e-10, rtol=1e-10)


@given(seeds, st.integers(1, 9), st.integers(1, 10))
def test_the_fallback_gives_the_same_answer(seed: int, k: int, p: int) -> None:
    rows, point = gaussian(k, p, seed), gaussian(1, p, seed + 1)
    unit, norms = solvers.unit_diagonal(rows @ rows.T)
    q = (point @ rows.T)[0] / norms
    x = solvers._active_set(unit.numpy(), q.numpy(), (norms > 0).numpy(), 1e-14) / norms.numpy()
    want = solvers.nonnegative_qp(rows @ rows.T, point @ rows.T)[0]
    torch.testing.assert_close(torch.from_numpy(x) @ rows, want @ rows, atol=1e-9, rtol=1e-9)


def test_the_fallback_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """With pivoting made to fail, the answer is the fallback's, and still right."""
    violations = solvers._violations
    monkeypatch.setattr(solvers, "_violations", lambda *a: violations(*a) | True)
    rows, point = gaussian(4, 6, 3), gaussian(1, 6, 4)
    s = solvers.nonnegative_qp(rows @ rows.T, point @ rows.T)[0]
    monkeypatch.undo()
    want = solvers.nonnegative_qp(rows @ rows.T, point @ rows.T)[0]
    assert want.max() > 0
    torch.testing.assert_close(s, want, atol=1e-12, rtol=1e-12)


def test_a_zero_diagonal_entry_keeps_its_unknown_at_zero() -> None:
    matrix = torch.diag(vector(2.0, 0.0))
    assert solvers.nonnegative_qp(matrix, vector(-1.0, 0.0)[None]).tolist() == [[0.5, 0.0]]


# ------------------------------------------------------------------------------- min-norm point


@given(seeds, st.integers(1, 5), st.integers(1, 8), ratios, scales)
def test_min_norm_point_against_all_faces(
    seed: int, k: int, p: int, ratio: float, scale: float
) -> None:
    rows = spread(k, p, seed, ratio, scale)
    weights = solvers.min_norm_weights(rows @ rows.T)
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-14)
    point = nearest_in_hull(rows)
    # At a stationary point the size of the exact answer is rounding: compare with the rows then.
    size = max(point.norm(), 1e-6 * rows.norm(dim=1).min())
    assert (weights @ rows - point).norm() <= 1e-8 * size


@pytest.mark.parametrize("p", [20, 60, 400])
@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_min_norm_point_of_forty_tasks(p: int, ratio: float) -> None:
    """``g_k . d >= |d|^2`` for every task, to 1e-12 of the weighted squared norms."""
    for seed in range(5):
        rows = spread(40, p, seed, ratio)
        weights = solvers.min_norm_weights(rows @ rows.T)
        d = weights @ rows
        size = (weights @ rows.norm(dim=1)) ** 2
        assert (rows @ d).min() >= d @ d - 1e-12 * size


@given(seeds, st.integers(2, 6), st.integers(4, 9))
def test_stationary_rows_are_recognised(seed: int, k: int, p: int) -> None:
    rows, _ = stationary(k, p, seed)
    gram = rows @ rows.T
    weights = solvers.min_norm_weights(gram)
    assert (weights @ rows).norm() <= 1e-9 * (weights @ rows.norm(dim=1))
    assert solvers.is_stationary(gram, weights)
    away = rows + 0.01 * torch.ones(p, dtype=rows.dtype)
    if k <= p:
        gram = away @ away.T
        assert not solvers.is_stationary(gram, solvers.min_norm_weights(gram))


def test_zero_gradients_share_the_weight_of_the_min_norm_point() -> None:
    rows = gaussian(4, 3, 0) * vector(1, 0, 1, 0)[:, None]
    assert solvers.min_norm_weights(rows @ rows.T).tolist() == [0, 0.5, 0, 0.5]


# ------------------------------------------------------------------------------------ dual cone


@given(seeds, st.integers(1, 5), st.integers(1, 8), ratios, scales)
def test_projection_on_the_dual_cone_against_all_faces(
    seed: int, k: int, p: int, ratio: float, scale: float
) -> None:
    rows = spread(k, p, seed, ratio, scale)
    vectors = torch.cat([torch.eye(k), torch.full((1, k), 1 / k)]).double()
    for u, v in zip(vectors, solvers.dual_cone_weights(rows @ rows.T, vectors), strict=True):
        assert (v >= u).all()
        point = u @ rows
        assert (v @ rows - nearest_in_cone(rows, point)).norm() <= 1e-8 * point.norm()


@pytest.mark.parametrize("p", [20, 60, 400])
@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_dual_cone_of_forty_tasks(p: int, ratio: float) -> None:
    """``G v >= 0``, ``v >= u`` and ``(v - u) G v = 0``, to 1e-10 in units of the norms."""
    rows = spread(40, p, 1, ratio)
    norms = rows.norm(dim=1)
    u = torch.eye(40, dtype=torch.float64)
    v = solvers.dual_cone_weights(rows @ rows.T, u)
    gain = (v @ rows / norms[:, None]) @ (rows / norms[:, None]).T
    assert v.sub(u).min() >= 0
    assert gain.min() >= -1e-10
    assert ((v - u) * norms / norms[:, None] * gain).abs().max() <= 1e-10


# ------------------------------------------------------------------------------ G w = w^(-1/a)


@given(seeds, st.integers(2, 8), ratios, scales, st.sampled_from([0.3, 0.5, 1.0, 2.0, 5.0]))
def test_balanced_weights_solve_their_equation(
    seed: int, k: int, ratio: float, scale: float, alpha: float
) -> None:
    rows = spread(k, 10, seed, ratio, scale)
    gram = rows @ rows.T
    w = solvers.balanced_weights(gram, alpha)
    assert w.min() > 0
    torch.testing.assert_close((gram @ w) * w ** (1 / alpha), torch.ones_like(w), atol=1e-8, rtol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("p", [60, 400])
def test_balanced_weights_of_forty_tasks(alpha: float, p: int) -> None:
    for seed in range(5):
        rows = spread(40, p, seed, 1e3)
        gram = rows @ rows.T
        w = solvers.balanced_weights(gram, alpha)
        assert ((gram @ w) * w ** (1 / alpha) - 1).abs().max() <= 1e-8


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_balanced_weights_where_the_equation_has_no_solution(alpha: float) -> None:
    rows = gaussian(3, 5, 2)
    zero = rows * vector(1, 0, 1)[:, None]
    w = solvers.balanced_weights(zero @ zero.T, alpha)
    alone = solvers.balanced_weights(rows[[0, 2]] @ rows[[0, 2]].T, alpha)
    torch.testing.assert_close(w, torch.stack([alone[0], torch.zeros(()), alone[1]]))
    assert solvers.balanced_weights(torch.diag(vector(0.0, 9.0)), alpha).tolist() == [0, 1]
    assert solvers.balanced_weights(torch.zeros(2, 2), alpha).tolist() == [0, 0]
    opposite = torch.cat([rows[:1], -2 * rows[:1], rows[1:2]])
    w = solvers.balanced_weights(opposite @ opposite.T, alpha)
    assert w.sum() > 0
    assert (w @ opposite).norm() <= 1e-9 * (w @ opposite.norm(dim=1))


# ------------------------------------------------------------------------------- max-min in ball


def dual_value(rows: Tensor, weights: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """F at the dual weights behind d, and the size that its rounding is measured by."""
    mean = rows.mean(0)
    w = weights - 1 / len(rows)
    w = w / w.sum()
    value = (w @ rows) @ mean + c * mean.norm() * (w @ rows).norm()
    return value, mean.norm() * (w @ rows.norm(dim=1))


@given(seeds, st.integers(1, 5), ratios, scales, st.sampled_from([0.05, 0.2, 0.4, 0.9, 2.0]))
def test_max_min_step_against_all_faces(
    seed: int, k: int, ratio: float, scale: float, c: float
) -> None:
    rows = spread(k, 8, seed, ratio, scale)
    d = solvers.max_min_weights(rows @ rows.T, c) @ rows
    assert relative_error(d, best_in_ball(rows, c)) <= 1e-7
    # Not even a random point of the ball does better.
    steps = torch.nn.functional.normalize(gaussian(500, 8, seed + 1), dim=1)
    others = rows.mean(0) + c * rows.mean(0).norm() * steps
    assert (rows @ d).min() >= (others @ rows.T).amin(1).max()


@given(seeds, st.integers(2, 8), ratios, scales, st.sampled_from([0.05, 0.2, 0.4, 0.9]))
def test_max_min_value_equals_the_dual_value(
    seed: int, k: int, ratio: float, scale: float, c: float
) -> None:
    """``min_k g_k . d = F(w*)`` and ``|d - g_0| = c |g_0|``."""
    rows = spread(k, 10, seed, ratio, scale)
    weights = solvers.max_min_weights(rows @ rows.T, c)
    d, mean = weights @ rows, rows.mean(0)
    value, size = dual_value(rows, weights, c)
    assert ((rows @ d).min() - value).abs() <= 1e-9 * size
    assert ((d - mean).norm() / (c * mean.norm())).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("c", [0.02, 0.1, 0.2, 0.4])
@pytest.mark.parametrize(("p", "ratio"), [(50, 1.0), (50, 1e2), (400, 1e2)])
def test_max_min_value_of_forty_tasks(c: float, p: int, ratio: float) -> None:
    """The same two to 1e-9, where exchanging active tasks without a bracket is known to cycle."""
    for seed in range(8):
        rows = spread(40, p, seed, ratio)
        weights = solvers.max_min_weights(rows @ rows.T, c)
        d, mean = weights @ rows, rows.mean(0)
        value, size = dual_value(rows, weights, c)
        assert ((rows @ d).min() - value).abs() <= 1e-9 * size
        assert ((d - mean).norm() / (c * mean.norm())).item() == pytest.approx(1, abs=1e-9)


@given(seeds, st.integers(2, 5), st.sampled_from([0.2, 0.5, 0.9]))
def test_max_min_step_at_stationary_points(seed: int, k: int, c: float) -> None:
    """The maximum is at most 0; where it is 0, d is the maximiser nearest to the mean gradient."""
    rows, _ = stationary(k, 8, seed)
    mean = rows.mean(0)
    d = solvers.max_min_weights(rows @ rows.T, c) @ rows
    assert (d - mean).norm() <= c * mean.norm() * (1 + 1e-9)
    assert (rows @ d).min() <= 1e-9
    nearest = nearest_in_cone(rows, mean)
    if (nearest - mean).norm() <= c * mean.norm():
        assert (d - nearest).norm() <= 1e-8 * mean.norm()
    else:
        assert relative_error(d, best_in_ball(rows, c)) <= 1e-6


@given(seeds, st.floats(1.05, 1.5), st.sampled_from([0.2, 0.5, 0.9]))
def test_max_min_step_where_two_of_four_tasks_are_opposite(seed: int, r: float, c: float) -> None:
    """The maximum is 0 and is reached within the ball; of its maximisers the nearest to g_0."""
    rows = gaussian(4, 8, seed) * vector(1, 1, 9, 9)[:, None]
    rows[1] = -r * rows[0]
    mean = rows.mean(0)
    d = solvers.max_min_weights(rows @ rows.T, c) @ rows
    nearest = nearest_in_cone(rows, mean)
    if (nearest - mean).norm() <= c * mean.norm():
        assert (d - nearest).norm() <= 1e-8 * mean.norm()
    assert (d - mean).norm() <= c * mean.norm() * (1 + 1e-9)


@given(seeds, st.sampled_from([1e-3, 1e-5]), st.sampled_from([0.2, 0.9]))
def test_max_min_step_close_to_a_stationary_point(seed: int, gap: float, c: float) -> None:
    """Nearly opposite rows: the distance is steep in tau, the step still lies on the sphere."""
    rows = gaussian(3, 8, seed) * vector(1, 1, 9)[:, None]
    rows[1] = -1.1 * rows[0] + gap * rows[1]
    weights = solvers.max_min_weights(rows @ rows.T, c)
    d, mean = weights @ rows, rows.mean(0)
    # The weights are 1/gap times as long as the step, and the Gram matrix holds squares.
    assert ((d - mean).norm() / (c * mean.norm())).item() == pytest.approx(1, abs=1e-14 / gap**2)
    slack = (1e-9 + 1e-16 / gap**2) * mean.norm() ** 2
    assert (rows @ d).min() >= (rows @ best_in_ball(rows, c)).min() - slack


@pytest.mark.parametrize("exchanges", [12, 0])
def test_max_min_takes_few_systems(monkeypatch: pytest.MonkeyPatch, exchanges: int) -> None:
    """Tasks and tau exchanged at once; or the parabola's root, where bisection would take forty."""
    calls = []
    solve = solvers._solve_on
    monkeypatch.setattr(solvers, "_EXCHANGES", exchanges)
    monkeypatch.setattr(solvers, "_solve_on", lambda *a: calls.append(1) or solve(*a))
    for seed in range(20):
        rows = spread(6, 60, seed, 30.0)
        solvers.max_min_weights(rows @ rows.T, 0.4)
    assert len(calls) <= 20 * (3 if exchanges else 20)


@pytest.mark.parametrize("k", [2, 3, 10, 40])
@pytest.mark.parametrize("c", [0.05, 0.2, 0.4, 2.0])
def test_max_min_exchange_and_search_agree(
    monkeypatch: pytest.MonkeyPatch, k: int, c: float
) -> None:
    """Where exchanging cycles, or is not tried, the search in a bracket gives the same step."""
    grams = [rows @ rows.T for rows in (spread(k, 60, seed, 30.0) for seed in range(10))]
    exchanged = [solvers.max_min_weights(gram, c) for gram in grams]
    monkeypatch.setattr(solvers, "_EXCHANGES", 0)
    for weights, gram in zip(exchanged, grams, strict=True):
        off = weights - solvers.max_min_weights(gram, c)
        assert off @ gram @ off <= 1e-18 * weights @ gram @ weights


# ------------------------------------------------------------------- proofs of non-stationarity


@given(seeds, st.integers(2, 6), st.integers(4, 9))
def test_no_step_is_taken_for_a_proof_where_rows_are_stationary(seed: int, k: int, p: int) -> None:
    """Neither a random combination nor the sum, and one of rows that are not stationary is."""
    rows, _ = stationary(k, p, seed)
    unit = torch.nn.functional.normalize(rows, dim=1)
    for weights in (*gaussian(5, k, seed + 1).abs(), torch.ones(k)):
        gram = (unit @ unit.T).numpy()
        assert not solvers._descends(gram, weights.double().numpy(), 1.0, 1e-14)
    rows = orthogonal(max(k, p), seed)[:k]
    assert solvers._descends((rows @ rows.T).numpy(), torch.ones(k).double().numpy(), 1.0, 1e-14)


@pytest.mark.parametrize("eps", [1e-14, torch.finfo(torch.float32).eps])
def test_ordinary_gradients_need_no_min_norm_point(monkeypatch, eps: float) -> None:
    monkeypatch.setattr(solvers, "_min_norm_weights", lambda *a: pytest.fail("looked for it"))
    for seed in range(10):
        gram = spread(6, 40, seed, 10.0)
        gram = gram @ gram.T
        assert solvers.balanced_weights(gram, 1.0, eps).min() > 0
        assert solvers.max_min_weights(gram, 0.4, eps).min() >= 1 / 6


# -------------------------------------------------------------------------- rounded Gram matrices


@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_a_gram_matrix_rounded_to_float32_stays_harmless(seed: int, k: int, p: int) -> None:
    """Linearly dependent rows: rounding makes the Gram matrix indefinite, the answers stay sane."""
    rows = of_rank(k, p + 6, min(k, p), seed)
    rows = torch.cat([rows, rows[:1]])
    gram = (rows @ rows.T).float().double()
    eps = torch.finfo(torch.float32).eps
    norms = rows.norm(dim=1)
    d = solvers.min_norm_weights(gram, eps) @ rows
    assert (rows @ d).min() >= d @ d - 1e-3 * norms.max() ** 2
    v = solvers.dual_cone_weights(gram, torch.eye(k + 1), eps)
    assert (v @ rows @ rows.T).min() >= -1e-2 * norms.max() ** 2
    assert solvers.balanced_weights(gram, 1.0, eps).isfinite().all()
    step = solvers.max_min_weights(gram, 0.4, eps) @ rows - rows.mean(0)
    assert step.norm() <= 0.41 * rows.mean(0).norm() + 1e-3 * norms.max()
