"""Agreement with LibMTL's weightings, and the reason wherever there is none.

As released on PyPI, version 1.1.5. Its steps are made in the default dtype, set to float64 here.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers import G2, G3, close, gaussian, jacobians, relative_error, vector
from hypothesis import given
from hypothesis import strategies as st
from libmtl_stub import Weighting, weighting_class

from mtl_tutorial.methods import create
from mtl_tutorial.methods.graddrop import graddrop_step

# Rows in conflict, two and three of them.
J2 = vector(3, 1, -2, 0.5, -1, 2, 1, 1.5).view(2, 4)
J3 = vector(1, -0.5, 2, 0.25, -2, 1, 0.5, 1, 0.5, 1.5, -1, 2).view(3, 4)
LOSSES = vector(2, 0.5, 1.25)


@pytest.fixture(autouse=True, scope="module")
def double():
    """LibMTL allocates in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True, scope="module")
def installed():
    weighting_class("EW")  # skips without LibMTL


def theirs(name, jacobian, losses=None, **arguments):
    return Weighting(name, *jacobian.shape, **arguments).step(jacobian, losses)


# -------------------------------------------------------------------------------- loss balancing


@given(jacobians())
def test_ew_is_the_sum(j):
    """Its documentation says 1/K each, its code sums. Ours is the mean by default."""
    step = theirs("EW", j)
    losses = torch.ones(len(j))
    ours = create("equal", reduction="sum").direction(j, losses=losses)
    assert relative_error(ours, step.direction) < 1e-14
    mean = create("equal").direction(j, losses=losses)
    assert relative_error(len(j) * mean, step.direction) < 1e-14


def test_gls_direction_agrees_and_its_reported_weights_are_not_those_of_the_step():
    """The gradient is GLS / (K L_k) each; LibMTL reports L_k / (K prod L)."""
    step = theirs("GLS", J3, LOSSES)
    method = create("geometric")
    close(method.direction(J3, losses=LOSSES), step.direction, 1e-13)
    weights = method.weights(LOSSES)
    close(weights @ J3, step.direction, 1e-13)
    close(step.weights, LOSSES / (3 * LOSSES.prod()))
    assert (step.weights @ J3 - step.direction).norm() > 0.1


def test_uncertainty_agrees_over_steps():
    """From its start of -0.5, with its scales moved by plain gradient descent."""
    other, ours = Weighting("UW", 3, 4), create("uncertainty", lr=0.1, init=-0.5)
    for losses in (LOSSES, 0.9 * LOSSES, LOSSES**2):
        step = other.step(J3, losses)
        close(ours.direction(J3, losses=losses), step.direction, 1e-12)
        scales = other.model.loss_scale
        scales.data -= 0.1 * scales.grad


def test_dwa_agrees_over_epochs():
    other, ours = Weighting("DWA", 3, 4, T=2.0), create("dwa")
    means = torch.stack([LOSSES, vector(1.4, 0.4, 1), vector(1.3, 0.3, 1)], dim=1)
    other.model.train_loss_buffer = means.numpy()
    for epoch in range(3):
        other.model.epoch = epoch
        step = other.step(J3, means[:, epoch])
        close(ours.weights(means[:, epoch]), step.weights, 1e-12)
        ours.next_epoch()


def test_dwa_differs_where_a_mean_was_zero():
    """0/0 there; a ratio without meaning counts as one here."""
    other, ours = Weighting("DWA", 2, 4, T=2.0), create("dwa")
    other.model.train_loss_buffer = vector(0, 0, 0, 1, 1, 1).view(2, 3).numpy()
    other.model.epoch = 2
    with pytest.warns(RuntimeWarning, match="invalid value"):
        step = other.step(J2, vector(0, 1))
    assert step.weights.isnan().all()
    for _ in range(2):
        ours.weights(vector(0, 1))
        ours.next_epoch()
    close(ours.weights(vector(0, 1)), torch.ones(2))


@pytest.mark.parametrize("seed", range(3))
def test_rlw_draws_the_same_distribution(seed):
    """Softmax of standard normal numbers; from the global generator there, an own one here."""
    torch.manual_seed(seed)
    step = theirs("RLW", J3, dist="Normal")
    ours = create("rlw", seed=seed)
    close(ours.direction(J3, losses=torch.ones(3)), step.direction, 1e-12)
    close(step.heads, step.weights)


# ------------------------------------------------------------------------------------------ MGDA


@given(jacobians(min_tasks=2, max_tasks=2))
def test_mgda_agrees_for_two_tasks_up_to_its_cut_at_the_vertices(j):
    """Its weights are cut to .999 and .001 where the minimum is at one of the two gradients."""
    j = j / j.norm()
    step = theirs("MGDA", j, mgda_gn="none")
    ours = create("mgda")
    weights = ours.weights(j @ j.T)
    if weights.min() > 0:
        close(weights, step.weights, 1e-9)
        assert relative_error(ours.direction(j), step.direction) < 1e-9
    else:
        assert step.weights.min().item() == pytest.approx(0.001)
        assert weights.min() == 0


def test_mgda_differs_at_a_vertex():
    j = vector(1, 0, 3, 1).view(2, 2)
    close(theirs("MGDA", j, mgda_gn="none").direction, vector(1.002, 0.001))
    close(create("mgda").direction(j), vector(1, 0))


def test_mgda_takes_no_large_gradients():
    """It looks for a pair whose squared norm is below 1e8, an absolute bound."""
    with pytest.raises(UnboundLocalError):
        theirs("MGDA", 1e5 * J2, mgda_gn="none")
    exact = create("mgda").direction(J2)
    assert relative_error(create("mgda").direction(1e5 * J2), 1e5 * exact) < 1e-12


def test_mgda_of_three_tasks_agrees_to_its_stopping_rule():
    step = theirs("MGDA", J3, mgda_gn="none")
    exact = create("mgda").direction(J3)
    assert 1e-12 < relative_error(step.direction, exact) < 1e-3


def test_mgda_normaliser_gives_the_same_line():
    """Both combine the normalised gradients; ours brings the factors back to sum one."""
    step = theirs("MGDA", J2, mgda_gn="l2")
    ours = create("mgda", normaliser="l2").direction(J2)
    close(ours / ours.norm(), step.direction / step.direction.norm(), 1e-12)
    assert abs(ours.norm() / step.direction.norm() - 1) > 0.1


# --------------------------------------------------------------------------------------- surgery


@given(jacobians(min_tasks=2, max_tasks=2))
def test_pcgrad_agrees_for_two_tasks(j):
    step = theirs("PCGrad", j)
    assert relative_error(create("pcgrad").direction(j), step.direction) < 1e-12


def test_pcgrad_differs_where_a_gradient_has_turned_against_itself():
    """It also projects v_i on g_i, which matters once v_i . g_i < 0: the gradient of task 0 turns
    after the other two have been visited, in the right order."""
    random.seed(0)
    angles = torch.tensor([0.0, 170.0, 200.0]) * math.pi / 180
    j = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = {tuple(theirs("PCGrad", j).direction.numpy().round(9)) for _ in range(60)}
    ours = {tuple(create("pcgrad", seed=seed).direction(j).numpy().round(9)) for seed in range(60)}
    assert ours < found


@given(jacobians(min_tasks=2, max_tasks=2), st.sampled_from([0.1, 0.5]))
def test_gradvac_agrees_for_two_tasks_in_its_first_step(j, beta):
    step = theirs("GradVac", j, beta=beta)
    assert relative_error(create("gradvac", beta=beta).direction(j), step.direction) < 1e-9


def test_gradvac_agrees_in_later_steps_where_the_gradients_were_corrected():
    other, ours = Weighting("GradVac", 2, 4, beta=0.5), create("gradvac", beta=0.5)
    for j in (J2, J2, J2):
        close(ours.direction(j), other.step(j).direction, 1e-9)


def test_gradvac_differs_in_when_targets_move():
    """There a target moves with a correction alone, so after agreeing gradients it stays at zero
    and the next, less similar ones pass. Here it moves at every step, as a running mean does."""
    agreeing = vector(1, 0, 1, 0.1).view(2, 2)
    orthogonal = vector(1, 0, 0, 1).view(2, 2)
    other, ours = Weighting("GradVac", 2, 2, beta=0.5), create("gradvac", beta=0.5)
    for j in (agreeing, orthogonal):
        step, mine = other.step(j), ours.direction(j)
    assert not other.model.rho_T.any()
    close(step.direction, vector(1, 1))
    assert mine.min() > 1.1


def test_graddrop_agrees_on_one_sample_with_positive_features():
    """There it works on features alone, on gradients times the sign of the activation, summed over
    the batch; with one sample and positive activations that is ours with the same draws."""
    j = gaussian(3, 200, 0)
    torch.manual_seed(3)
    step = Weighting("GradDrop", 3, 200, leak=0.0).features_step(j, torch.ones(200))
    torch.manual_seed(3)
    close(graddrop_step(j, torch.rand(200)), step, 1e-12)


# ---------------------------------------------------------------------------------------- CAGrad


@pytest.mark.parametrize("rescale", [0, 1, 2])
@pytest.mark.parametrize("c", [0.2, 0.5])
def test_cagrad_agrees_to_the_accuracy_of_its_solver(c, rescale):
    """Its SLSQP watches the objective, which is flat: the step is off by about 1e-5."""
    name = ["none", "1+c^2", "1+c"][rescale]
    step = theirs("CAGrad", J3, calpha=c, rescale=rescale)
    assert relative_error(step.direction, create("cagrad", c=c, rescale=name).direction(J3)) < 3e-4


def test_cagrad_differs_for_small_gradients():
    """It adds 1e-8 under its roots, which decides once the squared gradients are as small."""
    small = 1e-5 * J3
    step = theirs("CAGrad", small, calpha=0.5, rescale=0)
    ours = create("cagrad", c=0.5).direction(small)
    assert relative_error(ours, 1e-5 * create("cagrad", c=0.5).direction(J3)) < 1e-9
    assert relative_error(step.direction, ours) > 0.1


def test_cagrad_takes_three_tasks_alone():
    """This release has the number three written into its objective."""
    with pytest.raises(ValueError, match="cannot reshape"):
        theirs("CAGrad", J2, calpha=0.5, rescale=0)


# ------------------------------------------------------------------------------------------ IMTL


@pytest.mark.parametrize("j", [G2, G3], ids=["G2", "G3"])
def test_imtl_agrees_over_steps(j):
    """Shared step, heads and scales of the hybrid, with gradients of the parameters."""
    k = len(j)
    other, ours = Weighting("IMTL", *j.shape), create("imtl", lr=0.1)
    losses = LOSSES[:k]
    for _ in range(3):
        scales = other.model.loss_scale
        factors = scales.detach().exp()
        step = other.step(j, losses)
        close(ours.direction(j, losses=losses), step.direction, 1e-12)
        close(step.heads, factors, 1e-12)
        scales.data -= 0.1 * scales.grad


def test_imtl_differs_for_a_task_without_gradient():
    """0/0 in the unit gradient: every weight is NaN there, the task is left out here."""
    j = torch.stack([J3[0], torch.zeros(4), J3[2]])
    assert theirs("IMTL", j).direction.isnan().all()
    rest = create("imtl").direction(J3[[0, 2]], losses=LOSSES[[0, 2]])
    close(create("imtl").direction(j, losses=LOSSES), rest)


def test_imtl_differs_on_parallel_gradients():
    """The matrix to invert is zero there; the formula's limit is taken here."""
    j = vector(1, 0, 0, 2, 0, 0).view(2, 3)
    with pytest.raises(RuntimeError, match="singular"):
        theirs("IMTL", j)
    close(create("imtl").direction(j, losses=torch.ones(2)), vector(4 / 3, 0, 0))


def test_imtl_differs_where_the_sum_is_negative():
    """There the step ascends every task; here the sign is kept."""
    j = vector(2, 2, 0, 2, -2, 0, 0.1, 0, 0.01).view(3, 3)
    assert (j @ theirs("IMTL", j).direction).max() < 0
    assert (j @ create("imtl").direction(j, losses=torch.ones(3))).min() > 0


# ---------------------------------------------------------------------- the adapter itself


def test_adapter_gives_the_gradients_of_its_formula():
    j = gaussian(3, 5, 1)
    step = theirs("EW", j, LOSSES)
    close(step.direction, j.sum(0))
    close(step.heads, torch.ones(3))
