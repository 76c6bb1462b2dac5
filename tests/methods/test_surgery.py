"""PCGrad, GradVac and GradDrop: known numbers, defining equations, edges, and other code."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import Linear, close, gaussian, jacobians, of_rank, orthogonal, seeds, sgd, vector
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchjd import aggregation

from mtl_tutorial.gradients import gram_matrix
from mtl_tutorial.methods import create
from mtl_tutorial.methods.graddrop import graddrop_step
from mtl_tutorial.methods.gradvac import LARGEST_TARGET, gradvac_weights
from mtl_tutorial.methods.pcgrad import pcgrad_weights, visiting_orders


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


J2 = matrix([3, 1, -2, 0.5], [-1, 2, 1, 1.5])
J2B = matrix([1, 0, 0, 0], [3, 1, 0, 0])
J3 = matrix([1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2])
J4 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25])
J5 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25], [-0.5, -1, 1, 0.5])


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def all_orders(k: int) -> list[Tensor]:
    """Every way in which k tasks can each go through the others."""
    each = [itertools.permutations([j for j in range(k) if j != i]) for i in range(k)]
    return [torch.tensor(rows) for rows in itertools.product(*each)]


def project_by_vectors(jacobian: Tensor, orders: Tensor) -> Tensor:
    """PCGrad word by word, on vectors."""
    total = torch.zeros_like(jacobian[0])
    for i, order in enumerate(orders.tolist()):
        v = jacobian[i].clone()
        for j in order:
            inner = v @ jacobian[j]
            if inner < 0:
                v = v - inner / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total += v
    return total


# ------------------------------------------------------------------------------------------ PCGrad


@pytest.mark.parametrize(
    ("jacobian", "expected"),
    [
        (J2, [2.2009569378, 3.7033492823, -1.0430622010, 2.4880382775]),
        (J2B, [4, 1, 0, 0]),
        (J4, [0.8571428571, 1.9285714286, 2.3571428571, 2.1428571429]),
        (J5, [0.3571428571, 0.9285714286, 3.3571428571, 2.6428571429]),
    ],
)
@pytest.mark.parametrize("order", ["random", "fixed"])
def test_pcgrad_known_steps_where_the_order_does_not_matter(jacobian, expected, order):
    close(create("pcgrad", order=order).direction(jacobian), vector(*expected), 1e-9)


def test_pcgrad_known_steps_for_both_orders_of_the_first_task():
    expected = {
        (1, 2): vector(-0.2452941176, 2.1876470588, 2.5494117647, 3.9511764706),
        (2, 1): vector(-0.0692941176, 2.1929803922, 2.4587450980, 3.9831764706),
    }
    for orders in all_orders(3):
        step = pcgrad_weights(J3 @ J3.T, orders) @ J3
        close(step, expected[tuple(orders[0].tolist())], 1e-9)
    close(create("pcgrad", order="fixed").direction(J3), expected[1, 2], 1e-9)


@given(jacobians(max_tasks=6), seeds)
def test_pcgrad_gram_form_is_the_algorithm_on_vectors(jacobian, seed):
    orders = visiting_orders(len(jacobian), "random", torch.Generator().manual_seed(seed))
    expected = project_by_vectors(jacobian, orders)
    close(pcgrad_weights(jacobian @ jacobian.T, orders) @ jacobian / expected.norm(),
          expected / expected.norm(), 1e-9)  # fmt: skip


@given(jacobians(max_tasks=2))
def test_pcgrad_of_two_tasks_never_conflicts(jacobian):
    step = create("pcgrad").direction(jacobian)
    assert (jacobian @ step >= -1e-12 * jacobian.norm() ** 2).all()


@given(seeds, st.integers(1, 5))
def test_pcgrad_and_first_gradvac_step_without_conflict_are_the_sum(seed, k):
    jacobian = gaussian(k, 7, seed).abs()
    close(create("pcgrad").direction(jacobian), jacobian.sum(0), 1e-12)
    close(create("gradvac").direction(jacobian), jacobian.sum(0), 1e-12)


def test_pcgrad_degenerate_inputs_have_the_documented_answers():
    g = vector(1, 2, 0, -1)
    zero = torch.zeros(4, dtype=torch.float64)
    step = create("pcgrad").direction
    close(step(torch.stack([g])), g)
    close(step(torch.stack([g, zero])), g)
    close(step(torch.stack([zero, zero])), zero)
    close(step(torch.stack([g, -2 * g])), zero)
    close(step(torch.stack([g, g])), 2 * g)
    close(create("pcgrad").weights(torch.diag(vector(1, 0))), vector(1, 1))


def test_pcgrad_leaves_itself_out_where_some_releases_do_not():
    angles = torch.deg2rad(vector(0, 170, 200))
    jacobian = torch.stack([angles.cos(), angles.sin()], dim=1)
    fixed = torch.tensor([[1, 2], [0, 2], [0, 1]])
    ours = create("pcgrad", order="fixed").direction(jacobian)
    close(ours, project_by_vectors(jacobian, fixed), 1e-12)
    late = jacobian[0] - (jacobian[0] @ jacobian[1]) * jacobian[1]
    late = late - min(late @ jacobian[2], 0) * jacobian[2]
    assert late @ jacobian[0] < -0.05  # by then the first task has turned against itself
    # Projected on itself last, it would lose that part as well.
    other = ours - late + (late - (late @ jacobian[0]) * jacobian[0])
    assert (ours - other).norm() > 0.05


def test_visiting_orders_hold_every_other_task_once_in_every_order():
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(200):
        orders = visiting_orders(4, "random", generator)
        for i, row in enumerate(orders.tolist()):
            assert sorted([*row, i]) == [0, 1, 2, 3]
        seen.add(tuple(orders[2].tolist()))
    assert len(seen) == 6
    assert visiting_orders(3, "fixed").tolist() == [[1, 2], [0, 2], [0, 1]]
    assert visiting_orders(1, "random").shape == (1, 0)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "graddrop"])
def test_a_seed_gives_the_same_steps_and_another_seed_others(name):
    jacobian = gaussian(6, 20, 5)

    def steps(seed: int) -> Tensor:
        method = create(name, seed=seed)
        return torch.stack([method.direction(jacobian) for _ in range(5)])

    torch.manual_seed(1)
    first = steps(0)
    torch.manual_seed(2)
    close(steps(0), first, 0)
    assert not torch.equal(steps(1), first)


def test_pcgrad_mean_is_the_sum_over_the_number_of_tasks():
    mean = create("pcgrad", reduction="mean", order="fixed").direction(J3)
    close(3 * mean, create("pcgrad", order="fixed").direction(J3), 1e-12)


def test_pcgrad_is_one_of_torchjds_steps_over_all_orders():
    for seed in range(6):
        jacobian = gaussian(3, 4, seed)
        ours = torch.stack([pcgrad_weights(jacobian @ jacobian.T, o) for o in all_orders(3)])
        for repeat in range(4):
            torch.manual_seed(repeat)
            theirs = aggregation.PCGrad()(jacobian)
            assert (ours @ jacobian - theirs).norm(dim=1).min() < 1e-10


@pytest.mark.parametrize("c", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "graddrop"])
def test_surgery_scales_with_the_gradients(name, c):
    close(create(name).direction(c * J3) / c, create(name).direction(J3), 1e-9)


# ----------------------------------------------------------------------------------------- GradVac


def test_gradvac_known_steps_of_three_calls():
    # The known digits carry released code's 1e-8 in denominators: they differ from ours by 4e-9.
    method = create("gradvac", beta=0.5)
    for expected in (
        [2.2009569373, 3.7033492793, -1.0430622010, 2.4880382754],
        [2.1021322961, 3.3574630357, -1.0218854921, 2.2480355758],
        [2.0517013083, 3.1809545789, -1.0110788518, 2.1255603200],
    ):
        close(method.direction(J2), vector(*expected), 1e-8)
    targets = method.state_dict()["state"]["targets"]
    close(targets[0, 1], torch.tensor(-0.18157505), 1e-8)
    close(targets[1, 0], torch.tensor(-0.18157505), 1e-8)


@given(jacobians(max_tasks=5), seeds)
def test_gradvac_first_step_is_pcgrads(jacobian, seed):
    ours = create("gradvac", seed=seed).direction(jacobian)
    other = create("pcgrad", seed=seed).direction(jacobian)
    close(ours / jacobian.norm(), other / jacobian.norm(), 1e-10)


@given(jacobians(max_tasks=2), st.floats(-0.9, 0.9))
def test_gradvac_correction_reaches_its_target_cosine(jacobian, target):
    """After the correction cos(v, g_j) = t; a pair above its target is left alone."""
    targets = matrix([0, target], [-1, 0])  # the second task is never corrected
    if cosine(*jacobian) < -LARGEST_TARGET:
        return
    orders = torch.tensor([[1], [0]])
    weights, _ = gradvac_weights(jacobian @ jacobian.T, targets, orders, 0.5)
    v = weights @ jacobian - jacobian[1]
    assert cosine(v, jacobian[1]) == pytest.approx(max(target, cosine(*jacobian)), abs=1e-9)


@given(jacobians(min_tasks=3, max_tasks=4), st.floats(0, 1))
def test_gradvac_targets_are_running_means_of_the_cosines_before_correction(jacobian, beta):
    """t <- (1 - beta) t + beta phi, phi of v as it is when it meets task j."""
    k = len(jacobian)
    targets = torch.full((k, k), 0.2, dtype=torch.float64)
    orders = visiting_orders(k, "fixed")
    _, after = gradvac_weights(jacobian @ jacobian.T, targets, orders, beta)
    for i in range(k):
        first = orders[i, 0]
        phi = cosine(jacobian[i], jacobian[first])  # the first meeting: v is still g_i
        assert after[i, first].item() == pytest.approx((1 - beta) * 0.2 + beta * phi, abs=1e-9)
    close(after.diagonal(), targets.diagonal(), 0)


def test_gradvac_equals_torchjd_over_calls():
    # Two tasks, so that the orders, which it draws from the global generator, do not matter.
    for seed in range(5):
        ours, theirs = create("gradvac"), aggregation.GradVac(beta=0.5)
        for step in range(5):
            jacobian = gaussian(2, 6, 100 * seed + step)
            close(ours.direction(jacobian), theirs(jacobian), 1e-6)


def test_gradvac_balances_small_gradients_where_torchjd_does_not():
    """Its constant 1e-8 is added to products of norms, which small gradients fall below."""
    small = 1e-5 * J2
    close(create("gradvac").direction(small) * 1e5, create("gradvac").direction(J2), 1e-9)
    theirs = aggregation.GradVac()(small) * 1e5
    assert (theirs - aggregation.GradVac()(J2)).norm() > 1e-3


def test_gradvac_target_of_one_stays_bounded():
    g = vector(1, 2, 0, -1)
    method = create("gradvac")
    for _ in range(60):
        close(method.direction(torch.stack([g, g])), 2 * g, 1e-9)
    assert method.state_dict()["state"]["targets"][0, 1] == pytest.approx(1)
    step = method.direction(torch.stack([g, vector(2, -1, 0, 0)]))  # now they are orthogonal
    assert step.isfinite().all()
    assert step.norm() < 100 * g.norm()


def test_gradvac_pairs_without_a_cosine_keep_their_target():
    method = create("gradvac")
    method.direction(J3)
    before = method.state_dict()["state"]["targets"]
    step = method.direction(torch.stack([J3[0], 0 * J3[1], J3[2]]))
    after = method.state_dict()["state"]["targets"]
    assert step.isfinite().all()
    for i, j in itertools.permutations(range(3), 2):
        assert torch.equal(before[i, j], after[i, j]) == (1 in (i, j))


def test_gradvac_degenerate_inputs_have_the_documented_answers():
    g = vector(1, 2, 0, -1)
    zero = torch.zeros(4, dtype=torch.float64)
    for jacobian, expected in (
        (torch.stack([g]), g),
        (torch.stack([g, zero]), g),
        (torch.stack([zero, zero]), zero),
        (torch.stack([g, -2 * g]), zero),
        (torch.stack([g, g]), 2 * g),
    ):
        close(create("gradvac").direction(jacobian), expected)
    # A v that an earlier projection made zero meets the third task without a cosine.
    jacobian = torch.stack([g, -g, vector(0, 1, 1, 0)])
    assert create("gradvac").direction(jacobian).isfinite().all()


def test_gradvac_absent_task_keeps_its_targets():
    model = Linear(J3)
    method = create("gradvac")
    method.backward(model())
    before = method.state_dict()["state"]["targets"]
    losses = model()
    losses[1] = losses[1].detach()
    info = method.backward(losses)
    after = method.state_dict()["state"]["targets"]
    close(after[1], before[1], 0)
    close(after[:, 1], before[:, 1], 0)
    assert not torch.equal(after[0], before[0])
    assert info.weights[1] == 0


# ---------------------------------------------------------------------------------------- GradDrop


def drop_by_rows(rows: Tensor, uniform: Tensor, leak: Tensor) -> Tensor:
    """GradDrop word by word: one mask per task."""
    purity = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0))
    total = torch.zeros_like(rows[0])
    for row, kept in zip(rows, leak, strict=True):
        mask = (row > 0) & (purity > uniform) | (row < 0) & (purity < uniform)
        total += (kept + (1 - kept) * mask) * row
    return total


@given(seeds, st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]))
def test_graddrop_is_the_masked_sum_of_its_definition(seed, k, leak):
    rows = gaussian(k, 9, seed)
    uniform = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    leaks = torch.linspace(0, leak, k, dtype=torch.float64)
    close(graddrop_step(rows, uniform, leaks), drop_by_rows(rows, uniform, leaks), 1e-12)
    if leak == 0:
        close(graddrop_step(rows, uniform), drop_by_rows(rows, uniform, leaks), 1e-12)


@given(seeds, st.integers(2, 5))
def test_graddrop_keeps_coordinates_on_whose_sign_all_agree(seed, k):
    rows = gaussian(k, 12, seed)
    rows[:, :4] = rows[:, :4].abs()
    rows[:, 4:8] = -rows[:, 4:8].abs()
    rows[:, 8] = 0
    step = create("graddrop", seed=seed).direction(rows)
    close(step[:9], rows[:, :9].sum(0), 1e-12)


def test_graddrop_expectation_is_each_sign_by_its_purity():
    """E[d] = P sum g^+ + (1 - P) sum g^-, and every draw is one of the two sides."""
    rows = J3
    up, down = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
    purity = up / (up - down)
    method = create("graddrop")
    draws = torch.stack([method.direction(rows) for _ in range(4000)])
    assert ((draws - up).abs().minimum((draws - down).abs()) < 1e-12).all()
    spread = (up - down) * (purity * (1 - purity)).sqrt() / 4000**0.5
    assert ((draws.mean(0) - (purity * up + (1 - purity) * down)).abs() <= 4.5 * spread).all()


def test_graddrop_leak_of_one_is_the_sum_and_leaks_are_per_task():
    close(create("graddrop", leak=1.0).direction(J3), J3.sum(0), 1e-12)
    rows = matrix([1.0, -1.0], [-2.0, 2.0])
    draws = {
        tuple(create("graddrop", leak=[1, 0], seed=seed).direction(rows).tolist())
        for seed in range(40)
    }
    assert draws == {(1, -1), (-1, -1), (1, 1), (-1, 1)}  # the first row is always in


def test_graddrop_equals_torchjd_for_the_same_random_numbers():
    for seed in range(10):
        rows, leak = gaussian(4, 30, seed), vector(0, 0.2, 0.5, 1)
        torch.manual_seed(seed)
        theirs = aggregation.GradDrop(leak=leak)(rows)
        torch.manual_seed(seed)
        close(graddrop_step(rows, torch.rand(30, dtype=torch.float64), leak), theirs, 1e-12)


def test_graddrop_degenerate_inputs_have_the_documented_answers():
    g = vector(1, 2, 0, -1)
    zero = torch.zeros(4, dtype=torch.float64)
    step = create("graddrop").direction
    close(step(torch.stack([g])), g)
    close(step(torch.stack([g, zero])), g)
    close(step(torch.stack([zero, zero])), zero)
    close(step(torch.stack([g, g])), 2 * g)
    opposite = step(torch.stack([g, -2 * g]))
    assert all(x in (a, b) for x, a, b in zip(opposite, g, -2 * g, strict=True))


def test_graddrop_skipped_steps_draw_nothing():
    method = create("graddrop")
    before = method.state_dict()["generator"]
    with pytest.raises(FloatingPointError, match=r"graddrop.*task 1"):
        method.direction(torch.stack([J2[0], torch.inf * J2[1]]))
    assert torch.equal(method.state_dict()["generator"], before)
    model = Linear(J2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    bad = [loss * torch.inf for loss in model()]
    method.step(lambda: bad, sgd(model.parameters()), scaler=scaler)
    assert torch.equal(method.state_dict()["generator"], before)


def test_graddrop_has_no_weights():
    with pytest.raises(TypeError, match="graddrop: has no weights"):
        create("graddrop").weights(J3)
    model = Linear(J3)
    info = create("graddrop").backward(model())
    assert info.weights is None
    assert all(phi.grad == 1 for phi in model.phi)  # heads receive their raw gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graddrop_sums_half_precision_in_single(dtype):
    rows = gaussian(3, 5000, 0).to(dtype)
    step = create("graddrop").direction(rows)
    assert step.dtype == dtype
    single = create("graddrop").direction(rows.float())
    assert torch.equal(step, single.to(dtype))


# ------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_surgery_reaches_the_gradients_and_leaves_the_heads_raw(name):
    model = Linear(J3)
    info = create(name).backward(model())
    close(model.theta.grad, create(name).direction(J3), 1e-10)
    close(info.weights @ J3, model.theta.grad, 1e-10)
    assert all(phi.grad == 1 for phi in model.phi)
    weighted = Linear(J3)
    info = create(name, head_gradients="weighted").backward(weighted())
    close(torch.stack([phi.grad for phi in weighted.phi]), info.weights, 1e-12)


def test_surgery_holds_with_more_tasks_than_parameters_and_in_single_precision():
    jacobian = of_rank(6, 3, 2, 0)
    orders = visiting_orders(6, "fixed")
    expected = project_by_vectors(jacobian, orders)
    close(create("pcgrad", order="fixed").direction(jacobian), expected, 1e-9)
    single = create("pcgrad", order="fixed").direction(jacobian.float())
    close(single, expected, 1e-4)
    rotated = jacobian @ orthogonal(3, 1)
    close(gram_matrix(rotated), gram_matrix(jacobian), 1e-12)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("pcgrad", {"order": "sorted"}),
        ("pcgrad", {"reduction": "max"}),
        ("gradvac", {"beta": 1.5}),
        ("gradvac", {"order": "sorted"}),
        ("graddrop", {"leak": -0.1}),
        ("graddrop", {"leak": []}),
    ],
)
def test_surgery_settings_are_checked(name, setting):
    with pytest.raises(
        ValueError, match=f"{name}: expected {next(iter(setting))}|{name}: expected"
    ):
        create(name, **setting)


def test_graddrop_leaks_must_fit_the_tasks():
    with pytest.raises(ValueError, match="graddrop: expected a leak for each of 3 tasks, got 2"):
        create("graddrop", leak=[0.1, 0.2]).direction(J3)
