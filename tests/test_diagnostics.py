"""Diagnostics: closed forms, invariances and the answer of each to degenerate gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtl_tutorial import diagnostics as dg

SCALARS = [
    dg.conflict_share,
    dg.norm_ratio,
    dg.condition_number,
    dg.effective_rank,
    dg.stationarity_gap,
]
seeds = st.integers(0, 2**31 - 1)


def jacobian(seed: int, k: int, p: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, p, generator=generator, dtype=torch.float64)


def gram(rows: torch.Tensor) -> torch.Tensor:
    return rows @ rows.T


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_tasks_by_hand() -> None:
    # |g1| = 5, |g2| = sqrt 2, g1.g2 = -4; eigenvalues of [[25, -4], [-4, 2]].
    g = gram(rows([3.0, 0.0, 4.0], [0.0, 1.0, -1.0]))
    cosine = -4 / (5 * math.sqrt(2))
    torch.testing.assert_close(dg.cosine_matrix(g), rows([1.0, cosine], [cosine, 1.0]))
    assert dg.conflict_share(g) == 1
    assert dg.norm_ratio(g).item() == pytest.approx(5 / math.sqrt(2), rel=1e-14)
    root = math.sqrt(23**2 / 4 + 16)
    low, high = 13.5 - root, 13.5 + root
    assert dg.condition_number(g).item() == pytest.approx(math.sqrt(high / low), rel=1e-12)
    shares = (low / 27, high / 27)
    entropy = -sum(s * math.log(s) for s in shares)
    assert dg.effective_rank(g).item() == pytest.approx(math.exp(entropy), rel=1e-12)
    # Nearest point of the segment to zero: alpha_1 = (g2 - g1).g2 / |g1 - g2|^2.
    alpha = 6 / 35
    d = alpha * rows([3.0, 0.0, 4.0])[0] + (1 - alpha) * rows([0.0, 1.0, -1.0])[0]
    assert dg.stationarity_gap(g).item() == pytest.approx(d.norm().item(), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_orthogonal_rows_of_equal_length(k: int) -> None:
    g = 9.0 * torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(dg.cosine_matrix(g), torch.eye(k, dtype=torch.float64))
    assert dg.conflict_share(g) == 0
    assert dg.norm_ratio(g) == 1
    assert dg.condition_number(g) == 1
    assert dg.effective_rank(g).item() == pytest.approx(k)
    assert dg.stationarity_gap(g).item() == pytest.approx(3 / math.sqrt(k))


def test_conflict_share_counts_pairs() -> None:
    g = gram(rows([1.0, 0.0], [1.0, 1.0], [-1.0, 0.5], [0.0, 0.0]))
    # Of the 6 pairs, (0, 2) and (1, 2) conflict; a zero gradient conflicts with nobody.
    assert dg.conflict_share(g).item() == pytest.approx(2 / 6)


@given(seeds, st.integers(1, 7), st.sampled_from([1e-6, 1.0, 1e6]))
def test_scale_permutation_and_rotation(seed: int, k: int, scale: float) -> None:
    j = jacobian(seed, k, 9)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(jacobian(seed + 1, 9, 9))[0]
    for f in SCALARS:
        before = f(gram(j)).item()
        after = f(gram(scale * j[order] @ rotation)).item()
        unit = scale if f is dg.stationarity_gap else 1.0
        assert after == pytest.approx(unit * before, rel=1e-6), f.__name__


@given(seeds, st.integers(2, 6))
def test_against_the_jacobian_itself(seed: int, k: int) -> None:
    j = jacobian(seed, k, 8)
    norms = j.norm(dim=1)
    singular = torch.linalg.svdvals(j)
    assert dg.norm_ratio(gram(j)).item() == pytest.approx((norms.max() / norms.min()).item())
    want = (singular[0] / singular[-1]).item()
    assert dg.condition_number(gram(j)).item() == pytest.approx(want, rel=1e-6)
    cosines = torch.nn.functional.cosine_similarity(j[:, None], j[None], dim=2)
    torch.testing.assert_close(dg.cosine_matrix(gram(j)), cosines)
    assert 1 <= dg.effective_rank(gram(j)).item() <= k + 1e-9
    # The gap is a lower bound on the norm of every point of the hull, and is reached by one.
    weights = torch.distributions.Dirichlet(torch.ones(k, dtype=torch.float64)).sample((2000,))
    assert dg.stationarity_gap(gram(j)) <= (weights @ j).norm(dim=1).min() + 1e-9


def test_stationarity_gap_vanishes_exactly_at_pareto_stationary_points() -> None:
    a, b = rows([1.0, 2.0, -1.0]), rows([-2.0, 0.5, 1.0])
    assert dg.stationarity_gap(gram(torch.cat([a, b, -(0.3 * a + 2 * b)]))).item() < 1e-7
    assert dg.stationarity_gap(gram(torch.cat([a, -2 * a]))).item() < 1e-7
    assert dg.stationarity_gap(gram(torch.cat([a, 0 * a]))).item() == 0
    assert dg.stationarity_gap(gram(torch.cat([a, b]))).item() > 0.1


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        ([0.25, 0.25, 0.25, 0.25], math.log(4)),
        ([3.0, -3.0], math.log(2)),
        ([0.0, 2.0, 0.0], 0.0),
        ([0.0, 0.0], 0.0),
        ([0.5, 0.25, 0.25], 1.5 * math.log(2)),
    ],
)
def test_weight_entropy(weights: list[float], want: float) -> None:
    got = dg.weight_entropy(torch.tensor(weights))
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want)


ZERO = torch.zeros(3, 3)
PARALLEL = gram(rows([1.0, 2.0], [2.0, 4.0], [3.0, 6.0]))
ONE_ZERO = gram(rows([1.0, 2.0], [0.0, 0.0]))


@pytest.mark.parametrize(
    ("name", "g", "want"),
    [
        ("conflict_share", ZERO, 0),
        ("norm_ratio", ZERO, 1),
        ("condition_number", ZERO, math.inf),
        ("effective_rank", ZERO, 0),
        ("stationarity_gap", ZERO, 0),
        ("conflict_share", PARALLEL, 0),
        ("norm_ratio", PARALLEL, 3),
        ("condition_number", PARALLEL, math.inf),
        ("effective_rank", PARALLEL, 1),
        ("stationarity_gap", PARALLEL, math.sqrt(5)),
        ("norm_ratio", ONE_ZERO, math.inf),
        ("condition_number", ONE_ZERO, math.inf),
        ("effective_rank", ONE_ZERO, 1),
        ("stationarity_gap", ONE_ZERO, 0),
        ("conflict_share", torch.ones(1, 1), 0),
        ("condition_number", torch.ones(1, 1), 1),
    ],
)
def test_degenerate_gradients_have_a_defined_answer(
    name: str, g: torch.Tensor, want: float
) -> None:
    got = getattr(dg, name)(g)
    assert got.dtype == torch.float64
    assert got.dim() == 0
    assert got.item() == pytest.approx(want, abs=1e-9)


def test_cosines_of_a_zero_gradient_are_zero() -> None:
    assert dg.cosine_matrix(ONE_ZERO).tolist() == [[1.0, 0.0], [0.0, 0.0]]
