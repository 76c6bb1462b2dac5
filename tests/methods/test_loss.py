"""Methods that weigh by the losses, and GradNorm: known numbers, defining equations, edges."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from helpers import (
    Linear,
    assert_equal_state,
    close,
    degenerate,
    gaussian,
    jacobians,
    orthogonal,
    positive,
    repeat,
    seeds,
    sgd,
    through_file,
    vector,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torchjd import scalarization

from mtl_tutorial.methods import create
from mtl_tutorial.methods.dwa import dwa_weights
from mtl_tutorial.methods.famo import famo_gradient, famo_weights
from mtl_tutorial.methods.geometric import geometric_mean, geometric_weights
from mtl_tutorial.methods.gradnorm import gradnorm_slope, gradnorm_targets
from mtl_tutorial.methods.rlw import random_weights
from mtl_tutorial.methods.scale_invariant import scale_invariant_weights
from mtl_tutorial.methods.slaw import running_statistics, slaw_weights
from mtl_tutorial.methods.stch import nadir_weights, smooth_tchebycheff
from mtl_tutorial.methods.uncertainty import uncertainty_loss, uncertainty_step

# Losses of three tasks at four steps.
STEPS = [
    vector(2, 0.5, 1.25),
    vector(1.9, 0.49, 1.0),
    vector(1.7, 0.47, 0.9),
    vector(1.6, 0.4, 0.85),
]
L = STEPS[0]
J3 = torch.tensor([[1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2]], dtype=torch.float64)

three_losses = positive(3, 0.01, 100.0)


def derivative(f, x: Tensor) -> Tensor:
    """Gradient of the scalar function f at x, by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


# ------------------------------------------------------------------------------ random weighting


@given(st.integers(1, 8), seeds)
def test_rlw_weights_are_positive_and_sum_to_one(k: int, seed: int) -> None:
    weights = create("rlw", seed=seed).weights(torch.ones(k, dtype=torch.float64))
    assert (weights > 0).all()
    close(weights.sum(), 1.0, 1e-12)


def test_rlw_weighs_all_tasks_alike_on_average() -> None:
    """The expected weight of every task is one over K, and the spread is that of the softmax."""
    method = create("rlw")
    draws = torch.stack([method.weights(L) for _ in range(6000)])
    close(draws.mean(0), torch.full((3,), 1 / 3), 0.01)
    assert (draws.std(0) > 0.1).all()


def test_rlw_draws_anew_at_each_step_and_the_same_for_a_seed() -> None:
    first, again, other = create("rlw", seed=3), create("rlw", seed=3), create("rlw", seed=4)
    a, b = first.weights(L), first.weights(L)
    assert not torch.equal(a, b)
    assert torch.equal(again.weights(L), a)
    assert torch.equal(again.weights(L), b)
    assert not torch.equal(other.weights(L), a)


def test_rlw_absent_task_does_not_shift_the_draws_of_later_steps() -> None:
    """Present tasks share the whole weight, and the next step draws what it would have drawn."""
    whole, partial = create("rlw"), create("rlw")
    drawn = whole.weights(L)
    model = Linear(J3)
    losses = model()
    losses[1] = losses[1].detach()
    weights = partial.backward(losses).weights
    close(weights, vector(1, 0, 1) * drawn / (drawn[0] + drawn[2]), 1e-12)
    assert torch.equal(whole.weights(L), partial.weights(L))


def test_rlw_equals_torchjd_on_the_same_draws() -> None:
    """Softmax of standard normal logits."""
    torch.manual_seed(7)
    theirs = derivative(scalarization.Random(), L)
    close(random_weights(3, torch.Generator().manual_seed(7)), theirs, 1e-12)


# -------------------------------------------------------------------------- uncertainty weighting


def test_uncertainty_known_values_of_the_objective() -> None:
    close(uncertainty_loss(L, vector(0.1, -0.2, 0.3)), 1.7731994955)
    close(uncertainty_loss(L, L.log()), 1.6115717757)


@given(three_losses, positive(3, 0.1, 3.0))
def test_uncertainty_step_descends_its_objective(losses: Tensor, s: Tensor) -> None:
    """Weights are the derivative of L / (2 e^s) + s / 2 by L, the step of s is that by s."""
    method = create("uncertainty", lr=0.02, init=0.5)
    half = torch.full((3,), 0.5, dtype=torch.float64)
    expected = derivative(lambda x: uncertainty_loss(x, half), losses)
    close(method.weights(losses), expected, 1e-12)
    slope = derivative(lambda x: uncertainty_loss(losses, x), s)
    close(uncertainty_step(s, losses, 0.02, 10.0), s - 0.02 * slope, 1e-12)


def test_uncertainty_settles_at_half_the_scale_invariant_weights() -> None:
    """At fixed losses s ends at log L, where the weight is 1 / (2 L)."""
    method = create("uncertainty", lr=0.2)
    repeat(lambda _: method.weights(L), 600)
    close(method.weights(L), scale_invariant_weights(L) / 2, 1e-9)


def test_uncertainty_equals_torchjd_over_steps() -> None:
    """Same weights and log variances as a module whose s is stepped by gradient descent."""
    ours, theirs = create("uncertainty", lr=0.1), scalarization.UW(3).double()
    optimizer = sgd(theirs.parameters(), lr=0.1)
    for losses in STEPS:
        leaf = losses.clone().requires_grad_()
        optimizer.zero_grad()
        theirs(leaf).backward()
        close(ours.weights(losses), leaf.grad, 1e-12)
        optimizer.step()
        close(ours.state_dict()["state"]["log_variances"], theirs.log_var.detach(), 1e-12)


def test_uncertainty_bound_stops_a_loss_of_zero() -> None:
    """With L = 0 the log variance falls for ever; the bound keeps its weight at e^bound / 2."""
    method = create("uncertainty", lr=1.0, bound=3.0)
    repeat(lambda _: method.weights(vector(0, 1, 1)), 20)
    close(method.weights(vector(0, 1, 1)), vector(math.exp(3) / 2, 0.5, 0.5), 1e-9)


# -------------------------------------------------------------------------- dynamic weight average


def test_dwa_known_weights() -> None:
    weights = dwa_weights(vector(1.4, 0.4, 0.975), vector(1.9, 0.45, 1.225))
    close(weights, vector(0.9649508859, 1.0411702464, 0.9938788676))


def test_dwa_ones_in_two_epochs_then_ratio_of_their_means() -> None:
    """K times the softmax of (mean of last epoch / mean of the epoch before) / T."""
    method = create("dwa")
    for epoch in ([STEPS[0], STEPS[1]], [STEPS[2], STEPS[3], STEPS[3]]):
        for losses in epoch:
            close(method.weights(losses), torch.ones(3), 0.0)
        method.next_epoch()
    older = (STEPS[0] + STEPS[1]) / 2
    newer = (STEPS[2] + 2 * STEPS[3]) / 3
    expected = 3 * torch.softmax(newer / older / 2, 0)
    close(method.weights(L), expected, 1e-12)
    close(method.weights(STEPS[1]), expected, 1e-12)  # the running epoch has no say


@given(st.lists(st.lists(three_losses, min_size=1, max_size=3), min_size=4, max_size=4))
def test_dwa_equals_torchjd_over_epochs(epochs: list[list[Tensor]]) -> None:
    """Same weights at every batch while all mean losses are positive."""
    ours, theirs = create("dwa", temperature=0.7), scalarization.DWA(0.7)
    for epoch in epochs:
        for losses in epoch:
            close(ours.weights(losses), derivative(theirs, losses), 1e-9)
        ours.next_epoch()
        theirs.step()


def test_dwa_zero_mean_counts_as_standing_still_where_torchjd_gives_nan() -> None:
    """0 / 0 has no ratio: here it counts as one; TorchJD divides, and all weights are NaN."""
    ours, theirs = create("dwa"), scalarization.DWA()
    for losses in (vector(0, 1, 2), vector(0, 1, 1)):
        ours.weights(losses)
        theirs(losses)
        ours.next_epoch()
        theirs.step()
    close(ours.weights(L), 3 * torch.softmax(vector(1, 1, 0.5) / 2, 0), 1e-12)
    assert derivative(theirs, L).isnan().all()


def test_dwa_ratio_of_a_tiny_and_a_huge_mean_is_finite() -> None:
    """The quotient leaves float64's range; the softmax must not see an infinity."""
    weights = dwa_weights(vector(1e300, 1, 1), vector(1e-300, 1, 1))
    close(weights, vector(3, 0, 0), 1e-12)


def test_dwa_without_epochs_is_the_sum_and_empty_epochs_change_nothing() -> None:
    method = create("dwa")
    method.next_epoch()
    for losses in STEPS:
        close(method.weights(losses), torch.ones(3), 0.0)
    method.next_epoch()
    before = method.state_dict()
    method.next_epoch()
    assert_equal_state(method.state_dict(), before)


def test_dwa_task_that_an_epoch_never_saw_keeps_its_means() -> None:
    model, method = Linear(J3, L), create("dwa")
    for epoch, missing in enumerate((None, 1, None, 1), start=1):
        losses = [loss * epoch for loss in model()]
        if missing is not None:
            losses[missing] = losses[missing].detach()
        method.backward(losses)
        method.next_epoch()
    state = method.state_dict()["state"]
    close(state["newer"], L * vector(4, 3, 4), 1e-12)
    close(state["older"], L * vector(3, 1, 3), 1e-12)


# ------------------------------------------------------------------- geometric mean, sum of logs


def test_geometric_known_values() -> None:
    close(geometric_mean(L), 1.0772173450)
    close(create("geometric").weights(L), vector(0.1795362242, 0.7181448967, 0.2872579587))


@given(three_losses, positive(3), jacobians(3, 3))
def test_geometric_is_the_gradient_of_the_geometric_mean(
    losses: Tensor, units: Tensor, jacobian: Tensor
) -> None:
    """w is dGLS / dL; their product is K^-K; units c_k stretch the step by their own mean."""
    weights = geometric_weights(losses)
    close(weights, derivative(lambda x: x.prod() ** (1 / 3), losses), 0.0, 1e-9)
    close(weights.prod(), 3.0**-3, 1e-12)
    method = create("geometric")
    step = method.direction(jacobian, losses=losses)
    other = method.direction(jacobian * units[:, None], losses=losses * units)
    close(other, step * units.prod() ** (1 / 3), 1e-9 * other.norm().item())
    bargaining = create("scale_invariant").direction(jacobian, losses=losses)
    close(step, geometric_mean(losses) / 3 * bargaining, 1e-9 * step.norm().item())


@given(three_losses)
def test_geometric_equals_torchjd_for_positive_losses(losses: Tensor) -> None:
    close(geometric_weights(losses), derivative(scalarization.GeometricMean(), losses), 0.0, 1e-9)


def test_geometric_loss_of_zero_stays_finite_where_torchjd_gives_nan() -> None:
    """The root has no derivative at zero: here such a loss counts as 1e-8."""
    losses = vector(0, 1, 2)
    expected = vector(2e-8 ** (1 / 3) / 3e-8, 2e-8 ** (1 / 3) / 3, 2e-8 ** (1 / 3) / 6)
    close(geometric_weights(losses), expected, 0.0, 1e-12)
    assert derivative(scalarization.GeometricMean(), losses).isnan().any()


@given(three_losses, positive(3, 1e-3, 1e3), jacobians(3, 3))
def test_scale_invariant_step_does_not_know_the_units(
    losses: Tensor, units: Tensor, jacobian: Tensor
) -> None:
    """w is the derivative of the sum of log L; L_k -> c_k L_k leaves the step as it is."""
    method = create("scale_invariant")
    close(method.weights(losses), derivative(lambda x: x.log().sum(), losses), 0.0, 1e-12)
    step = method.direction(jacobian, losses=losses)
    other = method.direction(jacobian * units[:, None], losses=losses * units)
    close(other, step, 1e-9 * step.norm().item())


# ------------------------------------------------------------------------------------------- SLAW


def test_slaw_known_weights() -> None:
    method = create("slaw")
    expected = [
        vector(1, 1, 1),
        vector(0.2631578947, 2.6315789474, 0.1052631579),
        vector(0.2532218568, 2.5322185678, 0.2145595754),
        vector(0.4938385409, 1.9994938067, 0.5066676524),
    ]
    for losses, weights in zip(STEPS, expected, strict=True):
        close(method.weights(losses), weights)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30), st.sampled_from([0.0, 0.5, 0.9]))
def test_slaw_statistics_are_means_of_losses_and_squares(xs: list[float], beta: float) -> None:
    """Arithmetic means for 1 / (1 - beta) steps, exponential ones after; E[L^2] - E[L]^2."""
    mean, deviation, first, second = (torch.zeros(1, dtype=torch.float64) for _ in range(4))
    for n, x in enumerate(xs, start=1):
        share = 1 / n if n <= round(1 / (1 - beta)) else 1 - beta
        first = (1 - share) * first + share * x
        second = (1 - share) * second + share * x**2
        mean, deviation = running_statistics(vector(x), mean, deviation, vector(n), beta)
    close(mean, first, 1e-10)
    close(deviation**2, second - first**2, 1e-9)


@given(st.lists(three_losses, min_size=2, max_size=6, unique_by=lambda t: t[0].item()), positive(3))
def test_slaw_weights_undo_the_units_of_the_losses(history: list[Tensor], units: Tensor) -> None:
    """L_k -> c_k L_k gives w_k -> w_k / c_k up to the normalisation; the sum is K."""
    plain, scaled = create("slaw", floor=1e-300), create("slaw", floor=1e-300)
    noise = [torch.arange(3, dtype=torch.float64) * i + i**2 for i in range(len(history))]
    for losses, more in zip(history, noise, strict=True):
        weights = plain.weights(losses + more)
        other = scaled.weights((losses + more) * units)
    expected = weights / units
    close(weights.sum(), 3.0, 1e-12)
    close(other, 3 * expected / expected.sum(), 1e-6)


def test_slaw_reads_gradient_norms_from_a_random_walk() -> None:
    """Small isotropic moves of the parameters: weights in proportion to one over the norm."""
    rows = gaussian(3, 20, 0) * vector(1, 5, 0.2)[:, None]
    method = create("slaw", floor=1e-12)
    for _ in range(3000):
        weights = method.weights(10 + rows @ (1e-3 * torch.randn(20, dtype=torch.float64)))
    inverse = 1 / rows.norm(dim=1)
    close(weights / (3 * inverse / inverse.sum()), torch.ones(3), 0.25)


def test_slaw_spread_survives_a_large_offset() -> None:
    """The difference of squares would lose a spread of 1e-3 beside a loss of 1e6."""
    method = create("slaw")
    for i in range(50):
        change = (-1) ** i * vector(1e-3, 2e-3, 4e-3)
        weights = method.weights(1e6 + change)
    close(weights, 3 * vector(4, 2, 1) / 7, 1e-4)


def test_slaw_loss_that_stands_still_takes_the_weight() -> None:
    """Its deviation is at the floor, which is the method's known failure."""
    method = create("slaw")
    for i in range(10):
        weights = method.weights(vector(1, 1 + (-1) ** i * 0.1, 2 + (-1) ** i * 0.1))
    assert weights[0] > 2.99
    close(slaw_weights(vector(0, 0, 0)), torch.ones(3), 0.0)


# -------------------------------------------------------------------------------------- Group DRO


def test_group_dro_known_weights() -> None:
    """Ours sum to one, a third of the known ones; updated before the step uses them."""
    expected = vector(1.0075093046, 0.9925094452, 0.9999812503)
    close(3 * create("group_dro").weights(L), expected)


@given(st.lists(three_losses, min_size=1, max_size=6), st.floats(0.0, 0.1))
def test_group_dro_weights_are_the_softmax_of_summed_losses(
    history: list[Tensor], step_size: float
) -> None:
    """q_k <- q_k exp(step_size L_k) over its sum, which is softmax(step_size sum_t L_k(t))."""
    method, q = create("group_dro", step_size=step_size), torch.ones(3, dtype=torch.float64) / 3
    for losses in history:
        q = q * (step_size * losses).exp()
        q = q / q.sum()
        close(method.weights(losses), q, 1e-10)
    close(q, torch.softmax(step_size * torch.stack(history).sum(0), 0), 1e-10)


def test_group_dro_does_not_overflow_and_zero_step_is_equal_weighting() -> None:
    large = create("group_dro", step_size=1.0)
    close(large.weights(vector(1000, 1001, 900)), torch.softmax(vector(0, 1, -100), 0), 1e-12)
    close(create("group_dro", step_size=0.0).weights(L), vector(1, 1, 1) / 3, 1e-12)


# ------------------------------------------------------------------------------------------- STCH

UNIFORM, ZEROS = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


def test_stch_known_values() -> None:
    close(smooth_tchebycheff(L, UNIFORM, ZEROS, 0.1), 0.6751763913)
    close(smooth_tchebycheff(L, UNIFORM, ZEROS, 1.0), 1.5360047511)
    expected = vector(0.3061409889, 0.0020627618, 0.0251295827)
    close(create("stch", mu=0.1).weights(L), expected)


@given(three_losses, positive(3), st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_stch_weights_are_the_gradient_of_a_smooth_maximum(
    losses: Tensor, preference: Tensor, mu: float
) -> None:
    """Between the maximum and mu log K above it; w is its derivative; TorchJD agrees."""
    ideal = vector(-0.5, 0, 0.2)
    value = smooth_tchebycheff(losses, preference, ideal, mu)
    largest = (preference * (losses - ideal)).max()
    tiny = 1e-12 * largest.abs()
    assert largest - tiny <= value <= largest + mu * math.log(3) + tiny
    method = create("stch", mu=mu, preference=preference.tolist(), ideal=ideal.tolist())
    weights = method.weights(losses)
    by_hand = derivative(lambda x: smooth_tchebycheff(x, preference, ideal, mu), losses)
    theirs = scalarization.STCH(mu, preference, ideal)
    close(weights, by_hand, 1e-9)
    close(weights, derivative(theirs, losses), 1e-9)
    close(value, theirs(losses), 1e-9, 1e-9)


def test_stch_default_preference_is_uniform_over_the_present_tasks() -> None:
    method, model = create("stch"), Linear(J3, L)
    losses = model()
    losses[1] = losses[1].detach()
    alone = create("stch").weights(L[[0, 2]])
    close(method.backward(losses).weights, alone[[0, 0, 1]] * vector(1, 0, 1), 1e-12)


def test_stch_small_mu_is_the_worst_task_alone() -> None:
    close(create("stch", mu=1e-6).weights(L), vector(1 / 3, 0, 0), 1e-12)


@given(three_losses, three_losses, st.sampled_from([0.3, 1.0, 4.0]))
def test_stch_multi_task_weights(losses: Tensor, nadir: Tensor, mu: float) -> None:
    """Derivative of K mu log sum exp(log(L / nadir) / mu); sum of w L is K; LS on L / nadir."""
    weights = nadir_weights(losses, nadir, mu)
    by_hand = derivative(lambda x: 3 * mu * ((x / nadir).log() / mu).logsumexp(0), losses)
    close(weights, by_hand, 0.0, 1e-9)
    close(weights @ losses, 3.0, 1e-9)
    close(nadir_weights(losses, nadir, 1.0), 3 / (nadir * (losses / nadir).sum()), 0.0, 1e-9)


def test_stch_warm_up_trains_logs_and_measures_in_its_last_epoch() -> None:
    """Epochs 0 to E weigh by 1 / L; the means of epoch E alone are the nadir."""
    method = create("stch", mu=0.5, warmup=1)
    epochs = [[STEPS[0]], [STEPS[1], STEPS[3]], [STEPS[2], STEPS[0]], [STEPS[1]]]
    for number, epoch in enumerate(epochs):
        for losses in epoch:
            expected = 1 / losses
            if number > 1:
                expected = nadir_weights(losses, (STEPS[1] + STEPS[3]) / 2, 0.5)
            close(method.weights(losses), expected, 1e-12)
        method.next_epoch()


# ------------------------------------------------------------------------------------------- FAMO


def test_famo_known_weights_and_logits() -> None:
    """Three steps with the paper's decay and with the official class's default."""
    expected = [
        vector(0.1515151530, 0.6060606029, 0.2424242441),
        vector(0.1495911616, 0.5800473561, 0.2703614823),
        vector(0.1553843984, 0.5723170545, 0.2722985470),
    ]
    logits = {
        1e-3: vector(0.0429254621, 0.0535522643, -0.0544500461),
        1e-5: vector(0.0429911362, 0.0535901260, -0.0544854848),
    }
    for decay, final in logits.items():
        method = create("famo", decay=decay)
        for (before, after), weights in zip(itertools.pairwise(STEPS), expected, strict=True):
            close(method.weights(before), weights, 1e-10 if decay == 1e-3 else 1e-4)
            method.update(after)
        close(method.state_dict()["state"]["logits"], final)


@given(three_losses, three_losses, positive(3, 0.1, 2.0))
def test_famo_weights_and_logit_gradient(before: Tensor, after: Tensor, logits: Tensor) -> None:
    """w is the derivative of c sum z log D, c held; the logits' gradient is the softmax's."""
    z = torch.softmax(logits, 0)
    c = 1 / (z / before).sum()
    weights = famo_weights(logits, before)
    close(weights, derivative(lambda x: c * (z * x.log()).sum(), before), 1e-12)
    close(weights.sum(), 1.0, 1e-12)
    delta = before.log() - after.log()
    by_hand = derivative(lambda x: torch.softmax(x, 0) @ delta, logits)
    close(famo_gradient(logits, before, after), by_hand, 1e-12)


@given(st.lists(three_losses, min_size=2, max_size=6), st.sampled_from([0.0, 1e-3, 0.1]))
def test_famo_equals_torchjd_over_steps(history: list[Tensor], decay: float) -> None:
    """Same weights, and same logits as torch's Adam, on any path of positive losses."""
    ours = create("famo", decay=decay)
    theirs = scalarization.FAMO(3, weight_decay=decay).double()
    for before, after in itertools.pairwise(history):
        close(ours.weights(before), derivative(theirs, before), 1e-9)
        ours.update(after)
        theirs.update(after)
    close(ours.state_dict()["state"]["logits"], theirs._w.detach(), 1e-9)


def test_famo_loss_below_its_bound_counts_as_at_it_where_torchjd_ascends() -> None:
    """The logarithm has no value there: TorchJD climbs that loss, and its logits become NaN."""
    method, theirs = create("famo"), scalarization.FAMO(3).double()
    weights = method.weights(vector(-1, 0, 2))
    close(weights, vector(0.5, 0.5, 0), 1e-8)
    method.update(vector(-1, -1, 1))
    assert method.state_dict()["state"]["logits"].isfinite().all()
    assert derivative(theirs, vector(-1, 0, 2))[0] < 0
    theirs.update(vector(-1, -1, 1))
    assert theirs._w.isnan().all()


def test_famo_equal_rates_keep_the_logits_and_a_slow_task_gains() -> None:
    """delta equal for all tasks: no gradient; a loss that fell less gets the larger logit."""
    steady, uneven = create("famo", decay=0.0), create("famo", decay=0.0)
    steady.weights(L)
    steady.update(0.9 * (L + 1e-8) - 1e-8)
    close(steady.state_dict()["state"]["logits"], torch.zeros(3), 1e-6)
    uneven.weights(L)
    uneven.update(L * vector(0.99, 0.5, 0.5))
    logits = uneven.state_dict()["state"]["logits"]
    assert logits[0] > 0 > logits[1]


def test_famo_lower_bounds_are_subtracted() -> None:
    bounded, plain = create("famo", lower_bounds=[1, 0.2, 0.5]), create("famo")
    b = vector(1, 0.2, 0.5)
    close(bounded.weights(L), plain.weights(L - b), 1e-12)
    bounded.update(STEPS[1])
    plain.update(STEPS[1] - b)
    assert_equal_state(bounded.state_dict(), plain.state_dict())


def test_famo_step_is_backward_then_update_on_the_same_batch() -> None:
    calls = []

    def closure(model: Linear) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return torch.stack([loss**2 for loss in model()])

    one, two = Linear(J3), Linear(J3)
    a, b = create("famo"), create("famo")
    optimizer_one, optimizer_two = sgd(one.parameters(), 0.01), sgd(two.parameters(), 0.01)
    for _ in range(3):
        a.step(lambda: closure(one), optimizer_one)
        optimizer_two.zero_grad()
        b.backward(closure(two))
        optimizer_two.step()
        b.update(closure(two).detach())
    assert calls[:2] == [True, False]
    assert_equal_state(a.state_dict(), b.state_dict())
    assert torch.equal(one.theta, two.theta)
    assert a.state_dict()["state"]["updates"].tolist() == [3, 3, 3]


def test_famo_checkpoint_between_backward_and_update_continues() -> None:
    first = create("famo")
    for before, after in itertools.pairwise(STEPS[:3]):
        first.weights(before)
        first.update(after)
    first.weights(STEPS[2])
    second = create("famo", **first.settings)
    second.load_state_dict(through_file(first.state_dict()))
    for method in (first, second):
        method.update(STEPS[3])
    assert_equal_state(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("cause", ["loss after the step", "skipped by the scaler"])
def test_famo_logits_stay_where_no_step_can_be_judged(cause: str) -> None:
    """A non-finite loss after the step, or a step that the gradient scaler skipped."""
    method, model = create("famo"), Linear(J3)
    optimizer = sgd(model.parameters(), 0.1)
    method.step(model, optimizer)
    before = copy.deepcopy(method.state_dict())
    if cause == "loss after the step":
        method.weights(L)
        method.update(vector(1, torch.nan, 1))
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        steep = Linear(1e300 * J3)
        optimizer = sgd(steep.parameters(), 0.1)
        method.step(steep, optimizer, scaler=scaler)
        assert not steep.theta.any()
    assert_equal_state(method.state_dict(), before)


def test_famo_absent_task_keeps_logit_and_moments() -> None:
    """The others move as if they were alone."""
    method, alone = create("famo"), create("famo")
    model = Linear(J3, L)
    losses = model()
    losses[1] = losses[1].detach()
    info = method.backward(losses)
    close(info.weights[[0, 2]], alone.weights(L[[0, 2]]), 1e-12)
    after = STEPS[1].clone()
    after[1] = torch.nan  # what an absent task returns is not looked at
    method.update(after)
    alone.update(STEPS[1][[0, 2]])
    for name in ("logits", "first_moment", "second_moment", "updates"):
        mine, others = method.state_dict()["state"][name], alone.state_dict()["state"][name]
        close(mine[[0, 2]], others, 1e-12)
        assert mine[1] == 0


def test_famo_update_tells_what_is_missing() -> None:
    method = create("famo")
    with pytest.raises(RuntimeError, match="expected a backward before update"):
        method.update(L)
    method.weights(L)
    with pytest.raises(ValueError, match=r"losses of shape \(3,\)"):
        method.update(L[:2])
    method.update([STEPS[1][0], STEPS[1][1], STEPS[1][2]])
    state = method.state_dict()
    method.update(STEPS[2])  # a second update after one backward has nothing to compare with
    assert_equal_state(method.state_dict(), state)


# --------------------------------------------------------------------------------------- GradNorm


def test_gradnorm_known_step() -> None:
    norms, rates = J3.norm(dim=1), vector(1.5, 0.45, 1) / L
    targets = gradnorm_targets(norms, torch.ones(3), rates, 1.5)
    close(targets, vector(2.2129735713, 2.9090293061, 2.4379192284))
    close((norms - targets).abs().sum(), 0.8016354081)
    slope = gradnorm_slope(norms, torch.ones(3), targets)
    close(slope, vector(2.3048861143, -2.5, 2.7386127875))
    method = create("gradnorm", initial_losses=L.tolist())
    close(method.weights(J3, losses=vector(1.5, 0.45, 1)), torch.ones(3), 0.0)
    expected = vector(0.9627848659, 1.0855082418, 0.9517068923)
    close(method.state_dict()["state"]["weights"], expected)


@given(jacobians(3, 3), positive(3), three_losses, three_losses)
def test_gradnorm_slope_is_the_derivative_with_targets_held(
    jacobian: Tensor, weights: Tensor, first: Tensor, now: Tensor
) -> None:
    """Derivative of sum |w_k n_k - target_k| by w, target constant."""
    norms = jacobian.norm(dim=1)
    targets = gradnorm_targets(norms, weights, now / first, 1.5)
    assume(((weights * norms / targets - 1).abs() > 1e-5).all())  # no derivative at the kink
    by_hand = derivative(lambda w: (w * norms - targets).abs().sum(), weights)
    close(gradnorm_slope(norms, weights, targets), by_hand, 1e-9 * norms.max().item())


def test_gradnorm_uses_the_weights_before_their_step_and_keeps_their_sum() -> None:
    method = create("gradnorm", lr=0.1)
    for losses in STEPS:
        before = method.state_dict()["state"].get("weights", vector(1, 1, 1))
        close(method.direction(J3, losses=losses), before @ J3)
        close(method.state_dict()["state"]["weights"].sum(), 3.0, 1e-12)


def test_gradnorm_zero_alpha_makes_weighted_norms_equal() -> None:
    """With alpha = 0 every target is the mean weighted norm."""
    rows = J3 * vector(1, 4, 0.5)[:, None]
    method = create("gradnorm", alpha=0.0, lr=1e-4)
    repeat(lambda _: method.weights(rows, losses=L), 3000)
    weighted = method.state_dict()["state"]["weights"] * rows.norm(dim=1)
    close(weighted / weighted.mean(), torch.ones(3), 0.01)


def test_gradnorm_slow_task_gains_weight() -> None:
    """Equal norms; the task whose loss stands still is pulled up, the others down."""
    method = create("gradnorm", lr=0.01)
    rows = torch.eye(3, dtype=torch.float64)
    for t in range(5):
        method.weights(rows, losses=vector(1, 0.9**t, 0.9**t))
    weights = method.state_dict()["state"]["weights"]
    assert weights[0] > 1 > weights[1]


def test_gradnorm_last_looks_at_the_last_columns_alone() -> None:
    part, whole = create("gradnorm", last=2), create("gradnorm")
    for losses in STEPS:
        close(part.weights(J3, losses=losses), whole.weights(J3[:, 2:], losses=losses), 1e-12)
    with pytest.raises(ValueError, match="expected last <= 1"):
        part.weights(J3[:, :1], losses=L)


def test_gradnorm_weights_stay_positive_under_a_large_step() -> None:
    method = create("gradnorm", lr=100.0)
    for losses in STEPS:
        method.weights(J3, losses=losses)
        weights = method.state_dict()["state"]["weights"]
        assert (weights > 0).all()
        close(weights.sum(), 3.0, 1e-12)


def test_gradnorm_absent_task_keeps_weight_and_first_loss() -> None:
    method, model = create("gradnorm", lr=0.1), Linear(J3, L)
    losses = model()
    losses[1] = losses[1].detach()
    method.backward(losses, shared=model.shared, heads=model.heads)
    state = method.state_dict()["state"]
    assert state["weights"][1] == 1
    assert state["seen"].tolist() == [True, False, True]
    close(state["weights"].sum(), 3.0, 1e-12)
    close(state["first"], L * vector(1, 0, 1), 1e-12)


def test_gradnorm_needs_losses() -> None:
    with pytest.raises(TypeError, match="pass losses"):
        create("gradnorm").direction(J3)


# ---------------------------------------------------------------------------------- all of them

NAMES = (
    "dwa",
    "famo",
    "geometric",
    "gradnorm",
    "group_dro",
    "rlw",
    "scale_invariant",
    "slaw",
    "stch",
    "uncertainty",
)
VARIANTS = [(name, {}) for name in NAMES] + [("stch", {"warmup": 0}), ("stch", {"mu": 1e-3})]


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
@pytest.mark.parametrize("losses", [(0, 0, 0), (-1, 0, 2), (1e-300, 1, 1e300), (5, 5, 5)], ids=str)
def test_odd_losses_and_gradients_give_finite_steps(name: str, settings: dict, losses) -> None:
    """Zero, negative, tiny, huge and equal losses, with every degenerate Jacobian."""
    for label, jacobian in degenerate().items():
        k = len(jacobian)
        method = create(name, **settings)
        values = (vector(*losses) if k <= 3 else vector(*losses, 1))[:k]
        for _ in range(3):
            step = method.direction(jacobian, losses=values)
            assert step.shape == jacobian.shape[1:], label
            assert step.isfinite().all(), label
            if name == "famo":
                method.update(values * 0.5)
            method.next_epoch()
        for state in method.state_dict()["state"].values():
            assert state.isfinite().all(), label


@pytest.mark.parametrize(("name", "settings"), [v for v in VARIANTS if v[0] != "rlw"], ids=str)
def test_first_steps_without_a_task_are_those_of_the_others_alone(name, settings) -> None:
    """Over three batches; the absent task's own state stays what it was at the start."""
    partial, alone = create(name, **settings), create(name, **settings)
    for losses in STEPS[:3]:
        model, others = Linear(J3, losses), Linear(J3[[0, 2]], losses[[0, 2]])
        values = model()
        values[1] = values[1].detach()
        partial.backward(values, shared=model.shared, heads=model.heads)
        alone.backward(others(), shared=others.shared, heads=others.heads)
        close(model.theta.grad, others.theta.grad, 1e-12)
        assert model.phi[1].grad is None
        for method in (partial, alone):
            method.next_epoch()
    mine, theirs = partial.state_dict()["state"], alone.state_dict()["state"]
    for key, state in mine.items():
        if state.dim() == 0:
            close(state, theirs[key], 0.0)
            continue
        close(state[[0, 2]], theirs[key], 1e-12)
        assert state[1] == (key == "weights")  # GradNorm's weights start at one, all else at 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rlw"])
@given(seed=seeds, jacobian=jacobians(3, 3), losses=three_losses)
def test_steps_follow_permutations_and_rotations(
    name: str, seed: int, jacobian: Tensor, losses: Tensor
) -> None:
    """Over three steps: permuted tasks give the same step, rotated parameters the rotated one."""
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    turn = orthogonal(jacobian.shape[1], seed)
    plain, permuted, rotated = (create(name) for _ in range(3))
    for t in range(3):
        now = losses * (1 + 0.3 * torch.sin(t * vector(1, 2, 3)))
        step = plain.direction(jacobian, losses=now)
        tolerance = 1e-7 * jacobian.norm().item() * (1 + 100 * (name == "scale_invariant"))
        close(permuted.direction(jacobian[order], losses=now[order]), step, tolerance)
        close(rotated.direction(jacobian @ turn, losses=now), step @ turn, tolerance)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("uncertainty", {"lr": 0}, "lr > 0"),
        ("uncertainty", {"init": 11}, "init"),
        ("uncertainty", {"bound": 100}, "bound <= 80"),
        ("dwa", {"temperature": 0}, "temperature > 0"),
        ("slaw", {"beta": 1}, "beta < 1"),
        ("slaw", {"floor": 0}, "floor > 0"),
        ("group_dro", {"step_size": -1}, "step_size >= 0"),
        ("stch", {"mu": 0}, "mu > 0"),
        ("stch", {"warmup": 1.5}, "warmup"),
        ("stch", {"warmup": 4, "preference": [1, 1]}, "no preference"),
        ("stch", {"preference": [-1, 2]}, "non-negative"),
        ("stch", {"ideal": [float("nan")]}, "ideal"),
        ("famo", {"lr": 0}, "lr > 0"),
        ("famo", {"lower_bounds": [float("inf")]}, "lower_bounds"),
        ("gradnorm", {"alpha": -1}, "alpha >= 0"),
        ("gradnorm", {"last": 0}, "last >= 1"),
        ("gradnorm", {"initial_losses": [0.0]}, "positive initial_losses"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected.*{message}"):
        create(name, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("stch", {"preference": [1, 1]}, "preference for each of 3 tasks, got 2"),
        ("stch", {"ideal": [1, 1]}, "ideal for each of 3 tasks, got 2"),
        ("famo", {"lower_bounds": [0, 0]}, "lower_bounds for 3 tasks, got 2"),
        ("gradnorm", {"initial_losses": [1, 1]}, "initial_losses for 3 tasks, got 2"),
    ],
)
def test_settings_for_another_number_of_tasks_are_named(name, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **settings).direction(J3, losses=L)
