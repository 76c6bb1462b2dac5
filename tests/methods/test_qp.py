"""Methods that solve a small quadratic program: known numbers, defining equations, edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import (
    close,
    degenerate,
    equal_angles,
    gaussian,
    jacobians,
    relative_error,
    seeds,
    vector,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchjd import aggregation

from mtl_tutorial.methods import create
from mtl_tutorial.methods.cagrad import cagrad_weights
from mtl_tutorial.methods.dualproj import dualproj_weights
from mtl_tutorial.methods.fairgrad import fairgrad_weights
from mtl_tutorial.methods.mgda import mgda_weights, normaliser_sizes
from mtl_tutorial.methods.nash_mtl import clip_factor, nash_weights
from mtl_tutorial.methods.sdmgrad import sdmgrad_weights
from mtl_tutorial.methods.upgrad import upgrad_weights


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


J2 = matrix([3, 1, -2, 0.5], [-1, 2, 1, 1.5])
J2B = matrix([1, 0, 0, 0], [3, 1, 0, 0])
J4 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25])
J3 = matrix([1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2])
J5 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25], [-0.5, -1, 1, 0.5])
J3S = J3 * vector(100, 1, 1)[:, None]  # one task a hundred times as steep

METHODS = ("mgda", "upgrad", "dualproj", "cagrad", "nash_mtl", "fairgrad", "sdmgrad")

# Directions to the ten digits given, from independent solutions of each definition.
GOLDEN = [
    ("mgda", {}, J2, [0.5555555556, 1.6111111111, -0.1666666667, 1.1111111111]),
    ("mgda", {}, J2B, [1, 0, 0, 0]),
    ("mgda", {}, J4, [-0.1509433962, 0.4150943396, 0.3396226415, 0.3773584906]),
    ("mgda", {}, J3, [0.0371428571, 0.4314285714, 0.8114285714, 0.9085714286]),
    ("mgda", {}, J5, [-0.1932721713, 0.2703363914, 0.4048929664, 0.3889908257]),
    ("mgda", {}, J3S, [-0.5868348464, 1.0795894760, 0.3934658197, 1.5174911074]),
    ("cagrad", {"c": 0.2}, J2, [0.8522902108, 1.7954195784, -0.3522902108, 1.2215646838]),
    ("cagrad", {}, J2, [0.7247949579, 2.1019053779, -0.2174384874, 1.4495899158]),
    ("cagrad", {"c": 0.5}, J2, [0.7977166080, 2.3133781631, -0.2393149824, 1.5954332159]),
    (
        "cagrad",
        {"rescale": "1+c^2"},
        J2,
        [0.6248232396, 1.8119873948, -0.1874469719, 1.2496464792],
    ),
    ("cagrad", {}, J2B, [2.8246211251, 0.5, 0, 0]),
    ("cagrad", {}, J4, [0.8281156562, 0.5859421719, 1, 0.7929710859]),
    ("cagrad", {"c": 0.2}, J3, [-0.0471906866, 0.6069286767, 0.7389519601, 1.1132023283]),
    ("cagrad", {}, J3, [0.0706214098, 0.5480226284, 0.9788137513, 1.1440678852]),
    ("cagrad", {"c": 0.5}, J3, [0.0514948858, 0.5981329039, 1.1249651968, 1.2596441288]),
    (
        "cagrad",
        {"rescale": "1+c^2"},
        J3,
        [0.0608805257, 0.4724333004, 0.8438049581, 0.9862654183],
    ),
    ("cagrad", {}, J5, [0.3319067969, 0.0840466015, 1, 0.7086899674]),
    ("cagrad", {}, J3S, [23.9271576171, 2.4918313574, 61.7905055127, 31.6219485477]),
    ("nash_mtl", {"max_norm": 0}, J2, [0.5016353141, 1.0797563820, -0.2040600269, 0.7354234647]),
    ("nash_mtl", {}, J2, [0.3547097323, 0.7635030598, -0.1442922288, 0.5200229190]),
    ("nash_mtl", {"max_norm": 0}, J2B, [1.3959524698, 0.2265319005, 0, 0]),
    ("nash_mtl", {"max_norm": 0}, J4, [0, math.sqrt(2 / 3), math.sqrt(2 / 3), math.sqrt(2 / 3)]),
    ("nash_mtl", {"max_norm": 0}, J3, [-0.0457438981, 0.6835223226, 0.9319758167, 1.2892345819]),
    ("nash_mtl", {"max_norm": 0}, J3S, [-0.0457438981, 0.6835223226, 0.9319758167, 1.2892345819]),
    ("nash_mtl", {}, J3, [-0.0264102519, 0.3946317970, 0.5380764887, 0.7443399329]),
    ("nash_mtl", {"max_norm": 0}, J5, [-0.2800117772, 0.2111370328, 1.3311841415, 1.0511723643]),
    ("fairgrad", {}, J2, [0.3205930441, 0.7667069414, -0.1194654684, 0.5247483121]),
    ("fairgrad", {"alpha": 0.5}, J2, [0.7899634841, 1.5200750838, -0.3471060481, 1.0293419538]),
    ("fairgrad", {"alpha": 5}, J2, [0.2061483540, 0.5444226733, -0.0694741566, 0.3741484556]),
    ("fairgrad", {}, J4, [-0.1632725028, 0.8304785397, 0.7488422883, 0.7896604140]),
    ("fairgrad", {"alpha": 0.5}, J3, [-0.1185753564, 0.9644016616, 1.1310235381, 1.7409845538]),
    ("fairgrad", {}, J3, [-0.0067196002, 0.4896317863, 0.7564175190, 0.9611911768]),
    ("fairgrad", {"alpha": 5}, J3, [0.0131611194, 0.3540359393, 0.6079904296, 0.7209322110]),
    ("fairgrad", {}, J5, [-0.3918088605, 0.3331555060, 1.1473615159, 0.9647274976]),
    ("upgrad", {}, J2, [1.1004784689, 1.8516746411, -0.5215311005, 1.2440191388]),
    ("upgrad", {}, J2B, [2, 0.5, 0, 0]),
    ("upgrad", {}, J4, [0.4285714286, 0.9642857143, 1.1785714286, 1.0714285714]),
    ("upgrad", {}, J3, [-0.0369833648, 0.7166209341, 0.8337106271, 1.3072629052]),
    ("upgrad", {}, J5, [0.1190476190, 0.3095238095, 1.1190476190, 0.8809523810]),
    ("upgrad", {}, J3S, [27.1663694049, -1.5202595324, 62.6004744755, 27.0674669868]),
    ("dualproj", {}, J2, [1, 1.5, -0.5, 1]),
    ("dualproj", {}, J4, [0.5714285714, 0.7142857143, 1, 0.8571428571]),
    ("dualproj", {}, J3, [-0.1666666667, 0.6666666667, 0.5, 1.0833333333]),
    ("dualproj", {}, J5, [0.2460317460, 0.1269841270, 1, 0.7301587302]),
    ("dualproj", {}, J3S, [27.4781341108, -2.2594752187, 62.3906705539, 26.0204081633]),
    ("sdmgrad", {}, J2, [0.5555555556, 1.6111111111, -0.1666666667, 1.1111111111]),
    ("sdmgrad", {}, J3, [0.0371428571, 0.4314285714, 0.8114285714, 0.9085714286]),
]


@pytest.mark.parametrize(("name", "settings", "rows", "want"), GOLDEN)
def test_known_directions(name: str, settings: dict, rows: Tensor, want: list[float]) -> None:
    close(create(name, **settings).direction(rows), vector(*want), atol=1e-9)


@pytest.mark.parametrize(
    ("weights", "want"),
    [
        (mgda_weights(J2 @ J2.T), [0.3888888889, 0.6111111111]),
        (mgda_weights(J3 @ J3.T), [0.4647619048, 0.2780952381, 0.2571428571]),
        (mgda_weights(J5 @ J5.T), [0.1510703364, 0.7461773700, 0.1027522936]),
        (nash_weights(J2 @ J2.T), [0.2975752872, 0.3910905474]),
        (nash_weights(J3 @ J3.T), [0.5559400129, 0.3952205803, 0.3775144992]),
        (upgrad_weights(J3 @ J3.T), [0.5215686275, 0.3790087464, 0.3989310010]),
        (upgrad_weights(J5 @ J5.T), [0.3928571429, 1.2857142857, 0.3333333333]),
        (upgrad_weights(J3S @ J3S.T), [0.3352156863, 4.9008746356, 6.8931000972]),
        (dualproj_weights(J4 @ J4.T), [0.5, 1.4285714286]),
        (dualproj_weights(J5 @ J5.T), [0.3333333333, 0.9206349206, 0.3333333333]),
    ],
)
def test_known_weights(weights: Tensor, want: list[float]) -> None:
    close(weights, vector(*want), atol=1e-9)


# ------------------------------------------------------------------------------------------ MGDA


@given(jacobians(max_tasks=6))
def test_mgda_equal_gain_on_active_tasks(rows: Tensor) -> None:
    """``g_k . d = |d|^2`` where alpha_k > 0, at least that much elsewhere."""
    alpha = mgda_weights(rows @ rows.T)
    d = alpha @ rows
    gain = rows @ d / (d @ d)
    assert gain.min() >= 1 - 1e-9
    assert (gain[alpha > 1e-9] - 1).abs().max() <= 1e-9


@given(seeds)
def test_mgda_of_two_tasks_is_the_clipped_closed_form(seed: int) -> None:
    a, b = gaussian(2, 5, seed) * vector(1, 3)[:, None]
    alpha = ((b - a) @ b / (a - b).square().sum()).clamp(0, 1)
    close(mgda_weights(torch.stack([a, b]) @ torch.stack([a, b]).T)[0], alpha)


def test_mgda_on_unit_gradients() -> None:
    """With "l2" the direction is that of the min-norm point of the unit gradients."""
    close(create("mgda", normaliser="l2", combine="raw").weights(J2 @ J2.T), vector(0.5, 0.5))
    raw = create("mgda", normaliser="l2", combine="raw").weights(J3 @ J3.T)
    close(raw, vector(0.4178140764, 0.2732942689, 0.3088916547), atol=1e-9)
    d = create("mgda", normaliser="l2").direction(J3)
    want = vector(0.0190334250, 0.1878680358, 0.3044139645, 0.3802185765)
    close(d / d.norm(), want / want.norm(), atol=1e-9)


@given(jacobians(max_tasks=5), seeds, st.sampled_from(["none", "l2", "loss", "loss+"]))
def test_mgda_normalised_combination_is_min_norm_and_descends(
    rows: Tensor, seed: int, normaliser: str
) -> None:
    """d is a positive multiple of the min-norm point of g_k / s_k, so it lowers every loss."""
    losses = gaussian(1, len(rows), seed)[0].exp()
    method = create("mgda", normaliser=normaliser)
    d = method.direction(rows, losses=losses)
    assert (rows @ d).min() > 0
    norms = rows.norm(dim=1)
    sizes = {"none": torch.ones_like(losses), "l2": norms, "loss": losses, "loss+": losses * norms}
    scaled = rows / sizes[normaliser][:, None]
    point = mgda_weights(scaled @ scaled.T) @ scaled
    close(d / d.norm(), point / point.norm(), atol=1e-8)


def test_mgda_raw_combination_can_raise_a_loss_which_the_default_does_not() -> None:
    """Unequal lengths: with "l2" and two tasks the weights are equal whatever the gradients."""
    rows = matrix([10, 0], [-1, 0.3])
    raw = create("mgda", normaliser="l2", combine="raw").direction(rows)
    close(raw, rows.mean(0))
    assert rows[1] @ raw < 0
    assert (rows @ create("mgda", normaliser="l2").direction(rows)).min() > 0


def test_mgda_normalisers_need_positive_losses_and_guard_the_others() -> None:
    gram = J3 @ J3.T
    close(normaliser_sizes(gram, "loss", vector(2, 0, -1)), vector(2, 2e-12, 2e-12), atol=1e-20)
    close(normaliser_sizes(gram, "loss", vector(0, 0, -1)), vector(1, 1, 1))
    with pytest.raises(TypeError, match="losses"):
        create("mgda", normaliser="loss").direction(J3)


@pytest.mark.parametrize("normaliser", ["none", "l2", "loss+"])
def test_mgda_stops_for_a_zero_gradient(normaliser: str) -> None:
    rows = J3 * vector(1, 0, 1)[:, None]
    method = create("mgda", normaliser=normaliser)
    close(method.direction(rows, losses=vector(1, 2, 3)), torch.zeros(4))


# ------------------------------------------------------------------------------ UPGrad, DualProj


@given(seeds, st.integers(1, 6), st.integers(1, 8), st.sampled_from([1.0, 1e3]))
def test_upgrad_and_dualproj_never_conflict(seed: int, k: int, p: int, ratio: float) -> None:
    """``g_k . d >= 0`` for every task, and ``d = g_0`` where no two gradients conflict."""
    rows = gaussian(k, p, seed) * torch.logspace(0, math.log10(ratio), k)[:, None]
    for name in ("upgrad", "dualproj"):
        d = create(name).direction(rows)
        assert (rows @ d / rows.norm(dim=1)).min() >= -1e-10 * rows.norm(), name
    friends = rows.abs()
    for name in ("upgrad", "dualproj"):
        close(create(name).direction(friends), friends.mean(0), atol=1e-9 * ratio)


@given(jacobians(max_tasks=5))
def test_dualproj_weighs_up_only_tasks_that_would_be_hurt(rows: Tensor) -> None:
    """``v >= 1/K``, ``G v >= 0``, ``(v - 1/K) G v = 0``."""
    gram = rows @ rows.T
    v = dualproj_weights(gram)
    assert (v >= 1 / len(rows)).all()
    assert ((v - 1 / len(rows)) * (gram @ v)).abs().max() <= 1e-9 * gram.trace()


def test_upgrad_is_the_mean_of_single_projections() -> None:
    """Two tasks in conflict: each gradient loses its component along the other."""
    a, b = J2
    projected = a - (a @ b) / (b @ b) * b, b - (a @ b) / (a @ a) * a
    close(create("upgrad").direction(J2), (projected[0] + projected[1]) / 2)


def test_upgrad_counts_a_zero_gradient_as_a_task() -> None:
    rows = torch.cat([J2, torch.zeros(1, 4)])
    close(create("upgrad").direction(rows), 2 / 3 * create("upgrad").direction(J2))


# ---------------------------------------------------------------------------------------- CAGrad


@given(jacobians(max_tasks=6), st.sampled_from([0.1, 0.4, 0.9]))
def test_cagrad_reaches_the_sphere_and_helps_the_worst_task(rows: Tensor, c: float) -> None:
    """``|d - g_0| = c |g_0|`` and ``min g_k . d >= min g_k . g_0``."""
    d, mean = create("cagrad", c=c).direction(rows), rows.mean(0)
    assert ((d - mean).norm() / (c * mean.norm())).item() == pytest.approx(1, abs=1e-9)
    assert (rows @ d).min() >= (rows @ mean).min()


@pytest.mark.parametrize(
    ("c", "rows", "w", "value"),
    [
        (0.4, J3, [0.9960781467, 0.0039218533, 0], 2.040254569624),
        (0.5, J3, [0.8048972808, 0.1351397902, 0.0599629290], 2.317269859508),
    ],
)
def test_cagrad_known_dual(c: float, rows: Tensor, w: list[float], value: float) -> None:
    """``min_k g_k . d = F(w*)``, with the known w* and value."""
    weights = cagrad_weights(rows @ rows.T, c)
    dual = weights - 1 / 3
    close(dual / dual.sum(), vector(*w), atol=1e-9)
    assert (rows @ (weights @ rows)).min().item() == pytest.approx(value, abs=1e-11)


def test_cagrad_limits() -> None:
    """c = 0 is the mean gradient; for a huge c the direction is MGDA's."""
    close(create("cagrad", c=0.0).direction(J3), J3.mean(0))
    d, m = create("cagrad", c=1e6).direction(J3), create("mgda").direction(J3)
    close(d / d.norm(), m / m.norm(), atol=1e-5)


def test_cagrad_rescale_and_one_task() -> None:
    d = create("cagrad", c=0.5).direction(J2)
    close(create("cagrad", c=0.5, rescale="1+c^2").direction(J2), d / 1.25)
    close(create("cagrad", c=0.5, rescale="1+c").direction(J2), d / 1.5)
    close(create("cagrad", c=0.5).direction(J2[:1]), 1.5 * J2[0])
    for rescale in ("1+c", "1+c^2"):
        close(create("cagrad", c=0.5, rescale=rescale).direction(J2[:1]), J2[0])


def test_cagrad_at_stationary_points() -> None:
    g = vector(1, 2, 0, -1)
    close(create("cagrad").direction(torch.stack([g, -2 * g])), -0.3 * g)
    close(create("cagrad").direction(torch.stack([g, -g])), torch.zeros(4))
    close(create("cagrad").direction(torch.stack([g, g])), 1.4 * g)
    # A zero gradient caps the least gain at zero: the mean, projected where it hurts a task.
    rows = torch.cat([J2, torch.zeros(1, 4)])
    close(create("cagrad").direction(rows), create("dualproj").direction(rows), atol=1e-9)


# ---------------------------------------------------------------------------- Nash-MTL, FairGrad


@given(jacobians(max_tasks=6), seeds)
def test_nash_length_and_invariance(rows: Tensor, seed: int) -> None:
    """``|d|^2 = K``; scaling the losses one by one leaves d as it is."""
    d = create("nash_mtl", max_norm=0).direction(rows)
    assert d.square().sum().item() == pytest.approx(len(rows), rel=1e-9)
    factors = gaussian(1, len(rows), seed)[0].exp()
    close(create("nash_mtl", max_norm=0).direction(rows * factors[:, None]), d, atol=1e-8)
    assert create("nash_mtl").direction(rows).norm().item() == pytest.approx(1, rel=1e-9)


@given(seeds)
def test_nash_of_two_tasks_is_the_sum_of_unit_gradients(seed: int) -> None:
    """``d = (u_1 + u_2) / sqrt(1 + cos)``."""
    rows = gaussian(2, 6, seed)
    u = torch.nn.functional.normalize(rows, dim=1)
    want = u.sum(0) / (1 + u[0] @ u[1]).sqrt()
    close(create("nash_mtl", max_norm=0).direction(rows), want, atol=1e-9)


@given(jacobians(max_tasks=6), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_fairgrad_solves_its_equation_and_scales_by_a_power(rows: Tensor, alpha: float) -> None:
    """``G w = w^(-1/alpha)``, and ``d(s J) = s^((1 - alpha) / (1 + alpha)) d(J)``."""
    gram = rows @ rows.T
    w = fairgrad_weights(gram, alpha)
    close((gram @ w) * w ** (1 / alpha), torch.ones(len(rows)), atol=1e-9)
    scaled = fairgrad_weights(1e4 * gram, alpha)
    power = 100 ** ((1 - alpha) / (1 + alpha))
    assert relative_error(scaled @ (100 * rows), power * (w @ rows)) <= 1e-8


@given(jacobians(max_tasks=5))
def test_fairgrad_with_alpha_one_is_nash(rows: Tensor) -> None:
    want = create("nash_mtl", max_norm=0).direction(rows)
    close(create("fairgrad", alpha=1.0).direction(rows), want, atol=1e-12)


@given(jacobians(max_tasks=4, condition=5.0))
def test_fairgrad_limits(rows: Tensor) -> None:
    """alpha -> 0: the sum, projected where it conflicts; large alpha: the best least gain."""
    rows = rows / rows.norm()
    gram = rows @ rows.T
    errors = [
        relative_error(
            fairgrad_weights(gram, alpha) @ rows, len(rows) * dualproj_weights(gram) @ rows
        )
        for alpha in (0.03, 0.01)
    ]
    assert errors[1] <= 0.1
    assert errors[1] <= 0.5 * errors[0] + 1e-9
    d = create("fairgrad", alpha=200.0).direction(rows)
    best = create("mgda").direction(rows)
    least = (rows @ d).min() / d.norm()
    assert least >= 0.9 * best.norm()  # MGDA's step is the direction of largest least gain


def test_nash_reuses_weights_between_updates() -> None:
    """With update_every=3 the weights of the first step serve for three, then are solved anew."""
    method = create("nash_mtl", update_every=3, max_norm=0)
    grams = [gaussian(3, 6, seed) @ gaussian(3, 6, seed).T for seed in range(4)]
    got = [method.weights(gram) for gram in grams]
    close(got[0], nash_weights(grams[0]))
    close(got[1], got[0])
    close(got[2], got[0])
    close(got[3], nash_weights(grams[3]))


def test_nash_clips_with_the_gradients_of_the_step() -> None:
    """Reused weights on longer gradients are shortened to max_norm all the same."""
    method = create("nash_mtl", update_every=2, max_norm=0.5)
    method.direction(J3)
    assert method.direction(10 * J3).norm().item() == pytest.approx(0.5)
    assert clip_factor(torch.eye(2), vector(0.1, 0.1), 1.0) == 1
    assert clip_factor(torch.eye(2), vector(3.0, 4.0), 0.0) == 1


def test_nash_solves_for_a_task_that_was_absent_so_far() -> None:
    """Absent tasks keep their weights; one without any is solved for when it appears."""
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    method = create("nash_mtl", update_every=5, max_norm=0, head_gradients="raw")
    absent = torch.ones((), dtype=torch.float64)
    info = method.backward([J3[0] @ theta, J3[1] @ theta, absent], shared=[theta])
    close(info.weights, torch.cat([nash_weights(J3[:2] @ J3[:2].T), torch.zeros(1)]))
    info = method.backward([row @ theta for row in J3], shared=[theta])
    close(info.weights, nash_weights(J3 @ J3.T))
    info = method.backward([absent, 2 * J3[1] @ theta, 2 * J3[2] @ theta], shared=[theta])
    close(info.weights, nash_weights(J3 @ J3.T) * vector(0, 1, 1))


def test_nash_heads_receive_weights_before_clipping() -> None:
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    heads = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in J3]
    losses = [head * (row @ theta + 1) for head, row in zip(heads, J3, strict=True)]
    create("nash_mtl").backward(losses, shared=[theta], heads=[[h] for h in heads])
    close(torch.stack([h.grad for h in heads]), nash_weights(J3 @ J3.T))
    assert theta.grad is not None
    assert theta.grad.norm().item() == pytest.approx(1)


# --------------------------------------------------------------------------------------- SDMGrad


@given(jacobians(max_tasks=5), st.sampled_from([0.0, 0.1, 0.6, 5.0]))
def test_sdmgrad_is_optimal_on_the_simplex(rows: Tensor, lam: float) -> None:
    """The slope of ``1/2 |g_w + lam g_0|^2`` is least, and equal, on the tasks with w_k > 0."""
    weights = sdmgrad_weights(rows @ rows.T, lam)
    assert weights.sum().item() == pytest.approx(1)
    w = weights * (1 + lam) - lam / len(rows)
    assert w.min() >= -1e-12
    slope = rows @ (weights @ rows)
    size = rows.square().sum()
    assert (slope[w > 1e-9] - slope.min()).abs().max() <= 1e-10 * size


def test_sdmgrad_weights_and_limits() -> None:
    """Known inner weights; lam = 0 is MGDA, a huge lam the mean gradient."""
    w = sdmgrad_weights(J2 @ J2.T, 0.3) * 1.3 - 0.15
    close(w, vector(0.3555555556, 0.6444444444), atol=1e-9)
    w = sdmgrad_weights(J3 @ J3.T, 0.3) * 1.3 - 0.1
    close(w, vector(0.5041904762, 0.2615238095, 0.2342857143), atol=1e-9)
    close(create("sdmgrad", lam=0.0).direction(J3S), create("mgda").direction(J3S))
    close(create("sdmgrad", lam=1e9).direction(J3S), J3S.mean(0), atol=1e-6)


@given(seeds, st.integers(2, 6))
def test_sdmgrad_is_mgda_where_every_task_has_weight_enough(seed: int, k: int) -> None:
    """Where MGDA's weights lie in the simplex shrunk to ``(w + lam/K) / (1 + lam)``."""
    torch.manual_seed(seed)
    rows = torch.randn(k, 30, dtype=torch.float64) + 0.3
    alpha = mgda_weights(rows @ rows.T)
    least = k * alpha.min().item()  # alpha_k >= lam / (K (1 + lam)) allows lam up to this
    lam = 0.99 * least / (1 - least) if least < 1 else 1.0
    if lam <= 0:
        return
    close(create("sdmgrad", lam=lam).direction(rows), alpha @ rows, atol=1e-9)


# --------------------------------------------------------------- scale, degenerate input, settings


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_tiny_and_huge_gradients_give_the_same_weights(name: str, scale: float) -> None:
    for rows in (J3, J3S, J5):
        d = create(name).direction(rows)
        power = {"nash_mtl": 0.0, "fairgrad": -1 / 3}.get(name, 1.0)
        assert relative_error(create(name).direction(scale * rows), scale**power * d) <= 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_one_task_keeps_its_gradient(name: str) -> None:
    factor = 1.4 if name == "cagrad" else 1.0
    settings = {"max_norm": 0} if name == "nash_mtl" else {}
    close(create(name, **settings).direction(J3[:1]), factor * J3[0])


# What comes out where the formulae stop: multiples of g = (1, 2, 0, -1), in the order of METHODS.
G = vector(1, 2, 0, -1)
DEGENERATE = {
    "opposite": (torch.stack([G, -2 * G]), [0, 0, 0, -0.3, 0, 0, 0]),
    "duplicates": (torch.stack([G, G]), [1, 1, 1, 1.4, 6**-0.5, None, 1]),
    "all zero": (torch.stack([0 * G, 0 * G]), [0, 0, 0, 0, 0, 0, 0]),
    "a zero gradient": (torch.stack([G, 0 * G]), [0, 0.5, 0.5, 0.5, 6**-0.5, 1, 0.15 / 1.3]),
}


@pytest.mark.parametrize(("case", "name"), list(itertools.product(DEGENERATE, METHODS)))
def test_degenerate_gradients_have_the_documented_answer(case: str, name: str) -> None:
    rows, multiples = DEGENERATE[case]
    multiple = multiples[METHODS.index(name)]
    if multiple is None:  # G w = w^(-1/2) for w = (v, v): 12 v = v^(-1/2)
        multiple = 2 * 12 ** (-2 / 3)
    close(create(name).direction(rows), multiple * G, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_finite_whatever_the_rows(name: str) -> None:
    for case, rows in degenerate().items():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            d = create(name).direction(rows.to(dtype))
            assert d.isfinite().all(), (case, dtype)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mgda", {"normaliser": "max"}),
        ("mgda", {"combine": "mean"}),
        ("cagrad", {"c": -0.1}),
        ("cagrad", {"c": math.nan}),
        ("cagrad", {"rescale": 1}),
        ("nash_mtl", {"max_norm": -1.0}),
        ("nash_mtl", {"update_every": 0}),
        ("nash_mtl", {"update_every": 1.5}),
        ("fairgrad", {"alpha": 0.0}),
        ("sdmgrad", {"lam": -1.0}),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected .*{next(iter(settings))}"):
        create(name, **settings)


# --------------------------------------------------------------------------- parity with TorchJD

# Rows of similar length and moderate angles, where TorchJD's constants have little effect.
EASY = [J2, J3, equal_angles(vector(1, 2, 1.5), 5, 0.3, 0)]


def torchjd_method(name: str) -> aggregation.Aggregator:
    if name in ("upgrad", "dualproj"):
        reason = "torchjd's projections need its extra quadprog-projector"
        pytest.importorskip("quadprog", reason=reason)
        pytest.importorskip("qpsolvers", reason=reason)
    if name == "cagrad":
        pytest.importorskip("clarabel", reason="torchjd's CAGrad needs its extra cagrad")
    return {
        "mgda": lambda: aggregation.MGDA(epsilon=1e-9, max_iters=20_000),
        "fairgrad": lambda: aggregation.FairGrad(alpha=2.0),
        "cagrad": lambda: aggregation.CAGrad(c=0.4),
        "upgrad": aggregation.UPGrad,
        "dualproj": aggregation.DualProj,
    }[name]()


@pytest.mark.parametrize("rows", EASY)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("mgda", 1e-4),
        ("fairgrad", 1e-8),
        ("cagrad", 1e-4),
        ("upgrad", 1e-3),
        ("dualproj", 1e-3),
    ],
)
def test_parity_with_torchjd(rows: Tensor, name: str, tolerance: float) -> None:
    theirs = torchjd_method(name)(rows)
    assert relative_error(theirs, create(name).direction(rows)) <= tolerance


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_torchjd_projections_conflict_on_unequal_gradients(name: str) -> None:
    """Its ridge of 1e-4 of the trace outweighs the short gradients, so they are still hurt."""
    theirs = torchjd_method(name)(J3S)
    assert (J3S @ theirs).min() < -10
    assert relative_error(theirs, create(name).direction(J3S)) > 0.1


def test_a_ridge_makes_projections_conflict() -> None:
    """With 1e-4 of the trace on the diagonal the answers are TorchJD's, which hurt two tasks."""
    gram = J3S @ J3S.T
    ridged = gram / gram.trace() + 1e-4 * torch.eye(3)
    d = upgrad_weights(ridged) @ J3S
    close(d, vector(29.2839727765, -6.8824873225, 64.2227443251, 20.4756747613), atol=1e-6)
    assert (J3S @ d).min() < -10
    assert (J3S @ create("upgrad").direction(J3S)).min() >= -1e-9
    assert (J3S @ create("dualproj").direction(J3S)).min() >= -1e-9


def test_torchjd_upgrad_averages_small_gradients() -> None:
    """Below a trace of 1e-4 it takes the Gram matrix for zero and returns the mean gradient."""
    close(torchjd_method("upgrad")(1e-3 * J3), 1e-3 * J3.mean(0))
    assert relative_error(create("upgrad").direction(1e-3 * J3), 1e-3 * J3.mean(0)) > 0.1


def test_upgrad_scales_with_small_gradients() -> None:
    """``d(s J) = s d(J)``: no constant decides when gradients are small."""
    close(create("upgrad").direction(1e-3 * J3), 1e-3 * create("upgrad").direction(J3), atol=1e-15)


def test_torchjd_cagrad_stops_training_where_gradients_are_small() -> None:
    """Below a trace of 1e-4 it returns zero; the definition scales with the gradients."""
    close(torchjd_method("cagrad")(1e-3 * J3), torch.zeros(4, dtype=torch.float64))
    ours = create("cagrad").direction(1e-3 * J3)
    close(ours, 1e-3 * create("cagrad").direction(J3), atol=1e-12)


def test_torchjd_mgda_stops_early() -> None:
    """Its default stops Frank-Wolfe at steps of 1e-3: 3 percent off here, not the shortest."""
    theirs, ours = aggregation.MGDA()(J5), create("mgda").direction(J5)
    assert relative_error(theirs, ours) > 1e-2
    assert theirs.norm() > ours.norm()


def test_torchjd_fairgrad_leaves_small_gradients_unsolved() -> None:
    """Its least squares from 1/K ends early for gradients of 1e-4; the equation is not solved."""
    rows = 1e-4 * J3
    want = 1e-4 ** (-1 / 3) * create("fairgrad").direction(J3)
    assert relative_error(aggregation.FairGrad(alpha=2.0)(rows), want) > 0.1
    assert relative_error(create("fairgrad").direction(rows), want) <= 1e-9
