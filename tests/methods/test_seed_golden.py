"""Known numbers of Aligned-MTL, IMTL and ExcessMTL, to ten digits in float64.

They were computed by transcriptions of the papers' formulas and of the official code that share
no line with this package.
"""

from __future__ import annotations

import pytest
import torch
from helpers import G2, G3, Linear, close, sgd, vector

from mtl_tutorial.gradients import gram_matrix, task_gradients
from mtl_tutorial.methods import IMTL, IMTLG, IMTLL, AlignedMTL, Equal, ExcessMTL
from mtl_tutorial.methods.aligned_mtl import balance_matrix
from mtl_tutorial.methods.excess_mtl import EPSILON, excess_risks
from mtl_tutorial.methods.imtl import imtl_g_weights, imtl_l_step

# --------------------------------------------------------------------------------- Aligned-MTL


def aligned(rows, alpha, direction, atol=1e-10, **settings):
    method = AlignedMTL(**settings)
    close(method.weights(gram_matrix(rows)), vector(*alpha), atol)
    if direction is not None:
        close(method.direction(rows), vector(*direction), atol)


def test_aligned_mtl_balance_matrix_of_two_tasks():
    eigenvalues = torch.linalg.eigvalsh(gram_matrix(G2))
    close(eigenvalues, vector(1.3242043381, 25.6757956619))
    expected = [[0.2485484064, 0.1269569318], [0.1269569318, 0.9785507641]]
    close(balance_matrix(gram_matrix(G2)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", ["min", "median"])
def test_aligned_mtl_of_two_tasks(scale):
    """For two tasks the lower median is the minimum."""
    alpha = (0.1877526691, 0.5527538479)
    aligned(G2, alpha, (0.5632580072, 0.5527538479, 0.1982568284), scale=scale)


def test_aligned_mtl_of_two_tasks_rmse():
    alpha = (0.5994811071, 1.7649042773)
    aligned(G2, alpha, (1.7984433214, 1.7649042773, 0.6330201512), scale="rmse")


def test_aligned_mtl_of_two_tasks_with_preference():
    alpha = (0.2120709640, 0.3824350815)
    aligned(G2, alpha, (0.6362128920, 0.3824350815, 0.4658487745), preference=[0.7, 0.3])


def test_aligned_mtl_of_scaled_losses_is_the_official_reading_of_preferences():
    """Scaling the losses before the alignment gives another step than Algorithm 1."""
    scaled = vector(0.7, 0.3)[:, None] * G2
    direction = AlignedMTL(preference=[1, 1]).direction(scaled)
    close(direction, vector(0.3483013211, 0.3173318558, 0.1470699057))


def test_aligned_mtl_balance_matrix_of_three_tasks():
    close(torch.linalg.svdvals(G3), vector(3.2780492306, 2.4537316761, 2.1756824455))
    close(torch.linalg.eigvalsh(gram_matrix(G3)), vector(4.7335941037, 6.0207991382, 10.7456067580))
    b = balance_matrix(gram_matrix(G3))
    close(b[0], vector(0.9053186178, 0.0474282490, 0.0777477323))
    close(b[1, 1:], vector(0.9552317101, 0.0329923378))
    close(b[2, 2], vector(0.6898453466)[0])
    close(b, b.T, atol=1e-15)


@pytest.mark.parametrize(
    ("scale", "alpha", "direction"),
    [
        (
            "min",
            (0.3434981997, 0.3452174323, 0.2668618056),
            (0.9005021615, 0.6086407726, 0.6296959332),
        ),
        (
            "median",
            (0.3873967982, 0.3893357464, 0.3009663781),
            (1.0155851018, 0.6864242281, 0.7101702093),
        ),
        (
            "rmse",
            (0.4226565076, 0.4247719331, 0.3283594466),
            (1.1080206505, 0.7489005287, 0.7748077988),
        ),
    ],
)
def test_aligned_mtl_of_three_tasks(scale, alpha, direction):
    aligned(G3, alpha, direction, scale=scale)


def test_aligned_mtl_of_three_tasks_with_preference():
    w = [0.5, 0.3, 0.2]
    alpha = (0.4824373300, 0.3168821051, 0.1867406368)
    aligned(G3, alpha, (1.0228312218, 0.8347331918, 0.2362256330), preference=w)
    d = AlignedMTL(preference=w).direction(G3)
    close(vector(*w) @ G3 @ d, vector(1.8331475026)[0])
    close(d @ d, vector(1.7987657594)[0])


def test_aligned_mtl_of_dependent_tasks():
    rows = vector(1, 0, 0, 0, 2, 0, 1, 2, 0).view(3, 3)
    close(torch.linalg.eigvalsh(gram_matrix(rows))[1:], vector(1.3944487245, 8.6055512755))
    alpha = (0.1926613744, 0.0269565262, 0.2196179006)
    aligned(rows, alpha, (0.4122792750, 0.4931488536, 0))


def test_aligned_mtl_of_more_tasks_than_parameters():
    rows = torch.cat([torch.eye(3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)])
    aligned(rows, (0.0625, 0.0625, 0.0625, 0.1875), (0.25, 0.25, 0.25))


def test_aligned_mtl_of_a_zero_row():
    rows = vector(1, 2, -1, 0, 0, 0, -0.5, 1, 3).view(3, 3)
    aligned(rows, (0.3518589374, 0, 0.2749643234), None)


def test_aligned_mtl_of_nearly_parallel_tasks_is_short():
    """The smallest singular value rules the length: 1e-4 apart gives a step of about 3e-5."""
    e = 1e-4
    rows = vector(1, 0, 0, 2, e, 0).view(2, 3)
    d = AlignedMTL().direction(rows)
    # In the plane the polar factor is the rotation by atan2(2, 1 + e); sigma_min = e / sigma_max.
    sigma = e / torch.linalg.svdvals(rows)[0]
    r = ((1 + e) ** 2 + 4) ** 0.5
    close(d, sigma / (2 * r) * vector(1 + e + 2, 1 + e - 2, 0), atol=1e-12)
    close(d, vector(3.0000e-5, -9.9988e-6, 0), atol=1e-9)


def test_aligned_mtl_may_ascend_a_task():
    """Descent holds for the weighted loss, not for every task."""
    rows = vector(1, 0, 0, -0.9, 0.3, 0, -0.9, -0.3, 0.1).view(3, 3)
    d = AlignedMTL().direction(rows)
    aligned(rows, (0.4324835777, 0.2497126762, 0.2378275503), None)
    close(d, vector(-0.0063026261, 0.0035655378, 0.0237827550))
    close(rows @ d, vector(-0.0063026261, 0.0067420249, 0.0069809777))


# ---------------------------------------------------------------------------------------- IMTL


def test_imtl_g_of_two_tasks():
    alpha = imtl_g_weights(gram_matrix(G2))
    close(alpha, vector(0.2204812092, 0.7795187908))
    d = IMTLG().direction(G2)
    close(d, vector(0.6614436276, 0.7795187908, 0.1024060461))
    close(G2 @ d / G2.norm(dim=1), vector(0.4787910134, 0.4787910134))


def test_imtl_g_of_three_tasks():
    norms = G3.norm(dim=1)
    close(norms, vector(2.4494897428, 2.2912878475, 3.2015621187))
    cosine = gram_matrix(G3 / norms[:, None])
    x = torch.linalg.solve(cosine, torch.ones(3, dtype=torch.float64))
    close(x, vector(1.3651140522, 1.2132072886, 1.3438014667))
    alpha = imtl_g_weights(gram_matrix(G3))
    close(alpha, (x / norms) / (x / norms).sum())
    close(alpha, vector(0.3699276500, 0.3514623760, 0.2786099740))
    d = IMTLG().direction(G3)
    close(d, vector(0.9335474151, 0.6670028981, 0.6416334598))
    close(G3 @ d / norms, vector(*[0.6637789589] * 3))


def test_imtl_g_of_a_zero_row_solves_the_rest():
    rows = vector(1, 2, -1, 0, 0, 0, -0.5, 1, 3).view(3, 3)
    close(imtl_g_weights(gram_matrix(rows)), vector(0.5665426893, 0, 0.4334573107))


def test_imtl_g_of_dependent_tasks_is_least_squares():
    """The pseudo-inverse of the cosine matrix minimises sum_k (u_k . x - 1)^2."""
    rows = vector(1, 0, 0, 0, 2, 0, 1, 2, 0).view(3, 3)
    close(imtl_g_weights(gram_matrix(rows)), vector(0.6097265356, 0.1490711985, 0.2412022659))


def test_imtl_g_keeps_the_sign_where_the_sum_is_negative():
    """The formula alone ascends every task here; its weights are ours with the other sign."""
    rows = vector(2, 2, 0, 2, -2, 0, 0.1, 0, 0.01).view(3, 3)
    formula = vector(-0.0272748261, -0.0272748261, 1.0545496523)
    alpha = imtl_g_weights(gram_matrix(rows))
    close(alpha, -formula)
    close(-rows @ (alpha @ rows), vector(-0.0072886787, -0.0072886787, -0.0002589790))
    assert (rows @ (alpha @ rows)).min() > 0
    scaled = rows * vector(1, 1, 100)[:, None]
    other = imtl_g_weights(gram_matrix(scaled))
    close(other, vector(0.6198238705, 0.6198238705, -0.2396477409))
    a, b = alpha @ rows, other @ scaled
    close(a / a.norm(), b / b.norm())  # the guard makes the direction scale-invariant


def test_imtl_g_of_scaled_tasks():
    """g_k -> c_k g_k: d' = d / sum_k(alpha_k / c_k)."""
    scaled = vector(2, 0.5, 3)[:, None] * G3
    close(imtl_g_weights(gram_matrix(scaled)), vector(0.1885926170, 0.7167153820, 0.0946920010))
    ratio = IMTLG().direction(scaled) / IMTLG().direction(G3)
    close(ratio, vector(*[1.0196189279] * 3))


def test_imtl_g_is_not_the_min_norm_point():
    """Without constraints the min-norm point has equal inner products d . g_k instead."""
    x = torch.linalg.solve(gram_matrix(G3), torch.ones(3, dtype=torch.float64))
    alpha = x / x.sum()
    close(alpha, vector(0.3762617473, 0.3835711800, 0.2401670727))
    close(G3 @ (alpha @ G3), vector(*[1.7055342847] * 3))
    assert (imtl_g_weights(gram_matrix(G3)) - alpha).abs().max() > 0.01


def test_imtl_l_with_constant_losses():
    losses = vector(2, 0.5, 4)
    method = IMTLL(lr=0.1)
    objectives, scales = [], []
    for _ in range(4):
        factors = method.weights(losses)
        objectives.append(float((factors * losses - factors.log()).sum()))
        scales.append(method.state_dict()["state"]["log_scales"])
    close(vector(*objectives), vector(6.5, 5.648583267, 5.2350034715, 4.9923072483))
    close(scales[0], vector(-0.1, 0.05, -0.3))
    close(scales[1], vector(-0.1809674836, 0.0974364452, -0.4963272883))
    close(scales[2], vector(-0.2478599820, 0.1423193762, -0.6398322353))
    s = scales[-1]
    for _ in range(3000):
        s = imtl_l_step(s, losses, 0.1, 10.0)
    close(s, vector(-0.6931471806, 0.6931471806, -1.3862943611))


class Hybrid(torch.nn.Module):
    """L_k = (h_k (a_k . theta) - y_k)^2 / 2: three shared parameters, one per head."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(vector(0.1, -0.2, 0.3))
        self.h = torch.nn.ParameterList([vector(1.0)[0], vector(0.5)[0]])
        self.a = (vector(1, 2, -1), vector(0.5, -1, 2))
        self.y = (1.0, -2.0)

    def forward(self, tasks=(0, 1)):
        return [(self.h[k] * (self.a[k] @ self.theta) - self.y[k]) ** 2 / 2 for k in tasks]

    def numbers(self):
        return torch.cat([self.theta.detach(), torch.stack([h.detach() for h in self.h])])


def test_imtl_hybrid_trains_theta_heads_and_scales():
    model, method = Hybrid(), IMTL(lr=0.1)
    optimizer = sgd(model.parameters())
    expected = [
        (0.1308941173, 0.0036949838, 0.0917224461, 0.904, 0.293875, -0.028, -0.19403125),
        (
            *(0.1449180843, 0.0961595690, -0.0028223348, 0.9083370251, 0.2520293667),
            *(0.0273873920, -0.2708412434),
        ),
        (
            *(0.1556412639, 0.1668609868, -0.0751143376, 0.9324914767, 0.2564893496),
            *(0.1028425522, -0.3222626260),
        ),
    ]
    for i, numbers in enumerate(expected):
        info = method.step(model, optimizer, shared=[model.theta])
        if i == 0:
            close(info.losses, vector(1.28, 2.9403125))
            close(info.weights, vector(0.4148175287, 0.5851824713))
            close(model.theta.grad, vector(-0.3089411727, -2.0369498383, 2.0827755388))
        scales = method.state_dict()["state"]["log_scales"]
        close(torch.cat([model.numbers(), scales]), vector(*numbers))


# ----------------------------------------------------------------------------------- ExcessMTL

EXCESS2 = [
    vector(1, 2, -1, 0.5, -0.5, 1).view(2, 3),
    vector(0.5, 1, -0.5, 0.5, -0.5, 1).view(2, 3),
    vector(0.2, 0.4, -0.1, 0.4, -0.6, 0.8).view(2, 3),
]
EXCESS3 = [G3, 0.6 * G3, vector(0.1, 0.3, -0.2, 1.5, -1, 0.5, -0.2, 0.5, 0.4).view(3, 3)]


def test_excess_mtl_excess_risks_of_two_tasks():
    squares, baseline = torch.zeros(2, 3, dtype=torch.float64), None
    expected_risks = [
        (3.9999998750, 1.9999997500),
        (0.8944271686, 1.4142134740),
        (0.1145628144, 0.9790370953),
    ]
    expected_ratios = [None, (0.2236067991, 0.7071068254), (0.0286407045, 0.4895186088)]
    for rows, risks, ratios in zip(EXCESS2, expected_risks, expected_ratios, strict=True):
        squares = squares + rows**2
        found = excess_risks(rows, squares)
        close(found, vector(*risks))
        baseline = found if baseline is None else baseline
        if ratios is not None:
            close(found / baseline, vector(*ratios))
    assert EPSILON == 1e-7


def test_excess_mtl_weights_of_two_tasks():
    method = ExcessMTL(step_size=1)
    expected = [(0.5, 0.5), (0.3814259863, 0.6185740137), (0.2800168699, 0.7199831301)]
    for rows, weights in zip(EXCESS2, expected, strict=True):
        close(method.weights(rows), vector(*weights))
    squares = method.state_dict()["state"]["squares"]
    close(squares, vector(1.29, 5.16, 1.26, 0.66, 0.86, 2.64).view(2, 3))


@pytest.mark.parametrize(
    ("step_size", "expected"),
    [
        (1.0, [(1, 1), (0.7628519726, 1.2371480274), (0.5600337397, 1.4399662603)]),
        (0.01, [(1, 1), (0.9975825046, 1.0024174954), (0.9952781454, 1.0047218546)]),
    ],
)
def test_excess_mtl_weights_times_k_are_the_official_ones(step_size, expected):
    method = ExcessMTL(step_size=step_size)
    for rows, weights in zip(EXCESS2, expected, strict=True):
        close(2 * method.weights(rows), vector(*weights))


def test_excess_mtl_of_three_tasks():
    method, squares = ExcessMTL(step_size=0.5), torch.zeros(3, 3, dtype=torch.float64)
    risks = [
        (3.9999998750, 3.4999998250, 4.4999998333),
        (1.2347897847, 1.0804410467, 1.3891385018),
        (0.0806216379, 1.7877875374, 0.3073531019),
    ]
    weights = [(1 / 3,) * 3, (1 / 3,) * 3, (0.3028104793, 0.3870011470, 0.3101883737)]
    for i, rows in enumerate(EXCESS3):
        squares = squares + rows**2
        close(excess_risks(rows, squares), vector(*risks[i]))
        close(method.weights(rows), vector(*weights[i]), atol=2e-10 if i == 1 else 1e-10)
    ratio = vector(*risks[2]) / vector(*risks[0])
    close(ratio, vector(0.0201554101, 0.5107964648, 0.0683006918))


def test_excess_mtl_heads_receive_the_weights():
    """One ordinary backward pass of sum_k w_k L_k: shared and head parameters alike."""
    method = ExcessMTL(step_size=1)
    for i, rows in enumerate(EXCESS2):
        model = Linear(rows)
        info = method.backward(model(), shared=model.shared)
        close(torch.stack([p.grad for p in model.phi]), info.weights)
        close(model.theta.grad, info.weights @ rows)
        if i == 2:
            close(info.weights, vector(0.2800168699, 0.7199831301))


# --------------------------------------------------------------------------------------- equal


def test_equal_is_the_mean_or_the_sum():
    close(Equal().direction(G2, losses=vector(1, 2)), G2.mean(0))
    close(Equal(reduction="sum").direction(G2, losses=vector(1, 2)), G2.sum(0))


def test_equal_with_a_preference_is_the_weighted_mean_or_sum():
    losses = vector(1, 2)
    close(Equal(preference=[1, 3]).direction(G2, losses=losses), 0.25 * G2[0] + 0.75 * G2[1])
    summed = Equal(reduction="sum", preference=[1, 3])
    close(summed.direction(G2, losses=losses), G2[0] + 3 * G2[1])
    close(Equal(preference=[0, 2]).weights(losses), vector(0, 1))


def test_equal_with_a_preference_takes_the_entries_of_the_present_tasks():
    method, model = Equal(preference=[1, 2, 3]), Linear(torch.eye(3, dtype=torch.float64))
    first, second, third = model()
    info = method.backward([first, second.detach(), third], shared=model.shared)
    close(info.weights, vector(0.25, 0, 0.75))
    first, second, third = model()
    alone = Equal(preference=[1, 0, 0])
    info = alone.backward([first.detach(), second, third], shared=model.shared)
    close(info.weights, vector(0, 0, 0))


def test_hybrid_toy_has_the_gradients_of_its_formula():
    model = Hybrid()
    r = [model.h[k] * (model.a[k] @ model.theta) - model.y[k] for k in range(2)]
    expected = torch.stack([(r[k] * model.h[k] * model.a[k]).detach() for k in range(2)])
    close(task_gradients(model(), [model.theta]), expected)
