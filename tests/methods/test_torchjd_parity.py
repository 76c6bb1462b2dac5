"""Comparison with TorchJD 0.18, an independent implementation of some of the same methods.

Equality is asserted where its answer is the paper's. Where it is not, a test asserts both values,
with the reason: it fails when TorchJD changes, which is the time to look again.
"""

from __future__ import annotations

import pytest
import torch
import torchjd.aggregation as theirs
from helpers import G2, G3, close, jacobians, relative_error, vector
from hypothesis import given
from hypothesis import strategies as st
from torchjd.scalarization import IMTLL as TheirIMTLL

from mtl_tutorial.gradients import gram_matrix
from mtl_tutorial.methods import IMTLG, IMTLL, AlignedMTL, ExcessMTL
from mtl_tutorial.methods.imtl import imtl_g_weights


def parity(ours, aggregator, j, tolerance=1e-9):
    assert relative_error(ours.direction(j), aggregator(j)) < tolerance


# --------------------------------------------------------------------------------- Aligned-MTL


@given(jacobians(condition=100.0), st.sampled_from(["min", "median", "rmse"]))
def test_aligned_mtl_agrees(j, scale):
    parity(AlignedMTL(scale=scale), theirs.AlignedMTL(scale_mode=scale), j)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("j", [G2, G3], ids=["G2", "G3"])
def test_aligned_mtl_agrees_to_rounding_on_known_matrices(j, scale):
    parity(AlignedMTL(scale=scale), theirs.AlignedMTL(scale_mode=scale), j, 1e-14)


@given(jacobians(min_tasks=3, max_tasks=3, condition=100.0))
def test_aligned_mtl_agrees_with_a_preference(j):
    w = [0.5, 0.3, 0.2]
    parity(AlignedMTL(preference=w), theirs.AlignedMTL(vector(*w)), j)


def test_aligned_mtl_agrees_on_dependent_and_zero_rows():
    for j in (
        vector(1, 0, 0, 0, 2, 0, 1, 2, 0).view(3, 3),
        vector(1, 2, -1, 0, 0, 0, -0.5, 1, 3).view(3, 3),
        torch.zeros(3, 4, dtype=torch.float64),
    ):
        parity(AlignedMTL(), theirs.AlignedMTL(), j)


def test_aligned_mtl_weights_of_an_all_zero_jacobian_differ():
    """TorchJD takes B = I there, so its weights are 1/K; ours are zero. Both steps are zero."""
    gram = torch.zeros(3, 3, dtype=torch.float64)
    close(theirs.AlignedMTLWeighting()(gram), vector(1 / 3, 1 / 3, 1 / 3))
    close(AlignedMTL().weights(gram), torch.zeros(3))


# -------------------------------------------------------------------------------------- IMTL-G


@given(jacobians(condition=20.0))
def test_imtl_g_agrees_where_the_gradients_are_independent(j):
    """Up to the sign, where the sum of the un-normalised weights is negative: see below."""
    alpha, other = imtl_g_weights(gram_matrix(j)), theirs.IMTLGWeighting()(gram_matrix(j))
    assert relative_error(alpha, other * alpha.sum().sign()) < 1e-6


@pytest.mark.parametrize("j", [G2, G3], ids=["G2", "G3"])
def test_imtl_g_agrees_on_known_matrices(j):
    parity(IMTLG(), theirs.IMTLG(), j, 1e-12)


def test_imtl_g_agrees_on_a_zero_row():
    parity(IMTLG(), theirs.IMTLG(), vector(1, 2, -1, 0, 0, 0, -0.5, 1, 3).view(3, 3))


def test_imtl_g_differs_on_parallel_gradients():
    """The formula's limit is alpha proportional to 1/n_k. A pseudo-inverse of the Gram matrix in
    place of the cosine matrix loses it: alpha proportional to n_k."""
    j = vector(1, 0, 0, 2, 0, 0).view(2, 3)
    close(theirs.IMTLGWeighting()(gram_matrix(j)), vector(1 / 3, 2 / 3))
    close(imtl_g_weights(gram_matrix(j)), vector(2 / 3, 1 / 3))
    near = j + vector(0, 0, 0, 0, 1e-3, 0).view(2, 3)  # the limit, by TorchJD itself
    close(theirs.IMTLGWeighting()(gram_matrix(near)), vector(2 / 3, 1 / 3), atol=1e-4)


def test_imtl_g_differs_on_antiparallel_gradients():
    """No step has equal positive projections, so the answer is to stay, d = 0. TorchJD takes a
    step that ascends one task and is longer than any gradient."""
    j = vector(1, 0, 0, -2, 0, 0).view(2, 3)
    close(theirs.IMTLGWeighting()(gram_matrix(j)), vector(-1, 2), atol=1e-9)
    close(theirs.IMTLG()(j), vector(-5, 0, 0), atol=1e-9)
    close(IMTLG().direction(j), torch.zeros(3))
    close(imtl_g_weights(gram_matrix(j)), vector(2 / 3, 1 / 3))


def test_imtl_g_differs_where_the_sum_is_negative():
    """Dividing by a negative sum turns the step against every task; ours keeps the sign."""
    j = vector(2, 2, 0, 2, -2, 0, 0.1, 0, 0.01).view(3, 3)
    assert (j @ theirs.IMTLG()(j)).max() < 0
    assert (j @ IMTLG().direction(j)).min() > 0
    close(IMTLG().direction(j), -theirs.IMTLG()(j))


def test_imtl_g_differs_on_dependent_gradients():
    """Both are least squares: TorchJD weighs the residuals by n_k^2, ours all alike."""
    j = vector(1, 0, 0, 0, 2, 0, 1, 2, 0).view(3, 3)
    close(theirs.IMTLGWeighting()(gram_matrix(j)), vector(0.4461273828, 0.0538726172, 0.5))
    ours = vector(0.6097265356, 0.1490711985, 0.2412022659)
    close(imtl_g_weights(gram_matrix(j)), ours)
    unit = j / j.norm(dim=1, keepdim=True)

    def residual(alpha):
        """Least sum of squares of c u_k . d - 1 over the length c of the step."""
        projections = unit @ (alpha @ j)
        return len(j) - projections.sum() ** 2 / projections.square().sum()

    assert residual(ours) < residual(theirs.IMTLGWeighting()(gram_matrix(j)))


def test_imtl_g_differs_on_tiny_gradients():
    """TorchJD returns zero where the un-normalised sum is below 1e-12, an absolute threshold."""
    j = 1e13 * G3
    assert theirs.IMTLG()(j).norm() == 0
    assert relative_error(IMTLG().direction(j), 1e13 * IMTLG().direction(G3)) < 1e-12


# -------------------------------------------------------------------------------------- IMTL-L


def test_imtl_l_agrees_under_plain_gradient_descent():
    """Their log scales are a parameter of the objective, ours take the same step by themselves."""
    losses, ours, other = vector(2, 0.5, 4), IMTLL(lr=0.1), TheirIMTLL(3).double()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(5):
        scales = next(other.parameters()).detach().clone()
        close(ours.weights(losses), scales.exp(), atol=1e-14)
        optimizer.zero_grad()
        other(losses).backward()
        optimizer.step()


# ----------------------------------------------------------------------------------- ExcessMTL

SEQUENCE = [
    vector(1, 2, -1, 0.5, -0.5, 1).view(2, 3),
    vector(0.5, 1, -0.5, 0.5, -0.5, 1).view(2, 3),
    vector(0.2, 0.4, -0.1, 0.4, -0.6, 0.8).view(2, 3),
]


@pytest.mark.parametrize("warmup", [1, 2, 3])
def test_excess_mtl_agrees_with_a_warm_up(warmup):
    """Up to the 1e-7 that TorchJD adds to the baseline as well."""
    ours = ExcessMTL(step_size=1.0, warmup=warmup)
    other = theirs.ExcessMTLWeighting(1.0, n_warmup_steps=warmup)
    for rows in SEQUENCE * 2:
        close(ours.weights(rows), other(rows), atol=1e-7)


def test_excess_mtl_known_numbers_of_the_warm_up():
    other = theirs.ExcessMTLWeighting(1.0, n_warmup_steps=1)
    expected = [(0.5, 0.5), (0.3814259933, 0.6185740067), (0.2800168806, 0.7199831194)]
    for rows, weights in zip(SEQUENCE, expected, strict=True):
        close(other(rows), vector(*weights))


def test_excess_mtl_differs_in_its_first_call():
    """The released code stores the first risks as the baseline and leaves the weights alone.
    TorchJD's default updates with these risks, not divided by anything: for a network they are a
    1-norm over millions of parameters, and the weights saturate at once."""
    ours, other = ExcessMTL(step_size=1.0), theirs.ExcessMTLWeighting(1.0)
    close(ours.weights(SEQUENCE[0]), vector(0.5, 0.5))
    expected = [
        (0.8807970911, 0.1192029089),
        (0.8200225284, 0.1799774716),
        (0.7418530628, 0.2581469372),
    ]
    for rows, weights in zip(SEQUENCE, expected, strict=True):
        close(other(rows), vector(*weights))
    network = [torch.ones(1000, dtype=torch.float64), torch.full((1000,), 1.1).double()]
    saturated = theirs.ExcessMTLWeighting(1.0)(torch.stack(network))
    assert saturated.max() > 1 - 1e-9
    close(ExcessMTL(1.0).weights(torch.stack(network)), vector(0.5, 0.5))


def test_excess_mtl_differs_for_a_task_that_starts_without_gradient():
    """A baseline of zero is divided by 1e-7 there, and the task takes all the weight."""
    late = [torch.cat([SEQUENCE[0][:1], torch.zeros(1, 3).double()]), *SEQUENCE[1:]]
    other, ours = theirs.ExcessMTLWeighting(1.0, n_warmup_steps=1), ExcessMTL(1.0)
    for rows in late:
        a, b = ours.weights(rows), other(rows)
    assert b[1] > 1 - 1e-9
    assert 0.05 < a[1] < 0.95
