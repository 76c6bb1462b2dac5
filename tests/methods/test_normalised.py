"""DB-MTL, NGDiff and GeN's learning rate: known numbers, defining equations, edges."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    Linear,
    assert_equal_state,
    close,
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
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl_tutorial.methods import GeNLR, create
from mtl_tutorial.methods.gen_lr import fit_parabola


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


J2 = matrix([3, 1, -2, 0.5], [-1, 2, 1, 1.5])
J3 = matrix([1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2])
L3 = vector(2, 0.5, 1.25)


# ------------------------------------------------------------------------------------------ DB-MTL


def test_db_mtl_known_steps():
    # The known digits carry the paper's 1e-8 beside the norms, about 1e-7 of them here.
    method = create("db_mtl", beta=0.9)
    known = [
        vector(0.2565315203, 0.5521771560, -0.1043543494, 0.3760885742),
        vector(0.7779736472, 1.3320118144, -0.0491530931, 0.9677435929),
    ]
    inputs = [(J2, vector(2, 0.5)), (J2 + 0.5, 0.9 * vector(2, 0.5))]
    means = torch.zeros(2, 4, dtype=torch.float64)
    for (jacobian, losses), expected in zip(inputs, known, strict=True):
        step = method.direction(jacobian, losses=losses)
        close(step, expected, 5e-8)
        means = 0.9 * means + 0.1 * jacobian / (losses + 1e-8)[:, None]
        norms = means.norm(dim=1)
        close(norms.max() * (means / (norms + 1e-8)[:, None]).sum(0), expected, 1e-9)
        close(norms.max() * (means / norms[:, None]).sum(0), step, 1e-12)


@given(jacobians(), seeds, st.floats(0, 0.99), st.floats(0, 1))
def test_db_mtl_is_its_definition_over_steps(jacobian, seed, beta, sigma):
    """h <- b h + (1 - b) g / (L + 1e-8), b = beta / step^sigma; d = max |h| sum h / |h|."""
    k = len(jacobian)
    method = create("db_mtl", beta=beta, sigma=sigma)
    means = torch.zeros_like(jacobian)
    for step in range(1, 5):
        losses = 0.1 + torch.rand(
            k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        rows = jacobian * step + gaussian(*jacobian.shape, seed + step)
        b = beta / step**sigma
        means = b * means + (1 - b) * rows / (losses + 1e-8)[:, None]
        unit = means / means.norm(dim=1, keepdim=True)
        expected = means.norm(dim=1).max() * unit.sum(0)
        close(method.direction(rows, losses=losses), expected, atol=1e-12, rtol=1e-7)


@given(jacobians(), st.data())
def test_db_mtl_does_not_see_the_scale_of_a_loss(jacobian, data):
    """Losses and gradients times c_k: the gradient of log(c L) is that of log L."""
    k = len(jacobian)
    c = data.draw(positive(k, 0.1, 100.0))
    losses = data.draw(positive(k, 1.0, 10.0))
    one = create("db_mtl").direction(jacobian, losses=losses)
    other = create("db_mtl").direction(c[:, None] * jacobian, losses=c * losses)
    close(one / one.norm(), other / one.norm(), 1e-6)  # up to the constant in the logarithm


@given(jacobians())
def test_db_mtl_tasks_contribute_equally_as_much_as_the_largest(jacobian):
    """d = max |h| sum u, so orthogonal tasks each have the projection max |h|."""
    rows = jacobian.norm(dim=1)[:, None] * orthogonal(jacobian.shape[1], 0)[: len(jacobian)]
    step = create("db_mtl", beta=0.0).direction(rows, losses=torch.ones(len(rows)))
    projections = rows @ step / rows.norm(dim=1)
    close(projections / projections.max(), torch.ones(len(rows)), 1e-9)
    assert projections.max().item() == pytest.approx(rows.norm(dim=1).max().item(), rel=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_db_mtl_task_without_a_log_loss_sits_out(bad):
    method = create("db_mtl")
    method.direction(J3, losses=L3)
    before = method.state_dict()["state"]
    losses = vector(2, bad, 1.25)
    step = method.direction(J3 + 1, losses=losses)
    after = method.state_dict()["state"]
    close(after["means"][1], before["means"][1], 0)
    close(after["steps"], vector(2, 1, 2), 0)
    alone = create("db_mtl")
    alone.direction(J3[[0, 2]], losses=L3[[0, 2]])
    close(step, alone.direction(J3[[0, 2]] + 1, losses=L3[[0, 2]]), 1e-12)
    assert create("db_mtl").direction(J3, losses=torch.full((3,), bad)).abs().max() == 0


def test_db_mtl_balances_small_gradients_where_the_papers_constant_does_not():
    step = create("db_mtl").direction(1e-6 * J3, losses=L3)
    close(1e6 * step, create("db_mtl").direction(J3, losses=L3), 1e-9)
    means = 0.1 * 1e-6 * J3 / L3[:, None]
    norms = means.norm(dim=1)
    with_constant = norms.max() * (means / (norms + 1e-8)[:, None]).sum(0)
    assert (1e6 * with_constant - 1e6 * step).norm() > 0.01


def test_db_mtl_degenerate_inputs_have_the_documented_answers():
    g = vector(1, 2, 0, -1)
    zero = 0 * g

    def step(*rows: Tensor) -> Tensor:
        return create("db_mtl", beta=0.0).direction(torch.stack(rows), losses=torch.ones(len(rows)))

    close(step(g), g, 1e-7)
    close(step(g, zero), g, 1e-7)
    close(step(zero, zero), zero, 0)
    close(step(g, -2 * g), zero, 1e-12)
    close(step(g, g), 2 * g, 1e-7)
    tiny = create("db_mtl").direction(J3, losses=torch.full((3,), 1e-300))
    assert tiny.isfinite().all()


def test_db_mtl_heads_receive_the_gradient_of_the_log_loss():
    model = Linear(J3, offsets=L3)
    info = create("db_mtl").backward(model())
    close(torch.stack([phi.grad for phi in model.phi]), 1 / (L3 + 1e-8), 1e-12)
    close(model.theta.grad, create("db_mtl").direction(J3, losses=L3), 1e-12)
    assert info.weights is None
    raw = Linear(J3, offsets=L3)
    create("db_mtl", head_gradients="raw").backward(raw())
    close(torch.stack([phi.grad for phi in raw.phi]), torch.ones(3), 0)


def test_db_mtl_absent_task_keeps_its_mean():
    model = Linear(J3, offsets=L3)
    method = create("db_mtl")
    method.backward(model())
    before = method.state_dict()["state"]
    losses = model()
    losses[2] = losses[2].detach()
    method.backward(losses)
    after = method.state_dict()["state"]
    close(after["means"][2], before["means"][2], 0)
    close(after["steps"], vector(2, 2, 1), 0)


def test_db_mtl_keeps_half_precision_means_in_single():
    method = create("db_mtl")
    step = method.direction(J3.half(), losses=L3)
    assert step.dtype == torch.float16
    assert method.state_dict()["state"]["means"].dtype == torch.float32
    close(step, create("db_mtl").direction(J3, losses=L3), 2e-3)


def test_db_mtl_needs_losses_and_the_same_shared_parameters():
    with pytest.raises(TypeError, match="pass losses"):
        create("db_mtl").direction(J3)
    method = create("db_mtl")
    method.direction(J3, losses=L3)
    with pytest.raises(ValueError, match="db_mtl: expected gradients of"):
        method.direction(gaussian(3, 5, 0), losses=L3)
    for setting in ({"beta": 1.0}, {"beta": -0.1}, {"sigma": -1.0}, {"sigma": math.inf}):
        with pytest.raises(ValueError, match="db_mtl: expected 0 <= beta < 1"):
            create("db_mtl", **setting)
    model = Linear(J3)
    with pytest.raises(ValueError, match="db_mtl: expected no features"):
        create("db_mtl").backward(model(model.theta * 1), features=model.theta * 1)


# ------------------------------------------------------------------------------------------ NGDiff


def test_ngdiff_known_step():
    step = create("ngdiff").direction(J2)
    close(step, vector(1.1428747262, -0.4314041524, -0.8779682547, -0.3897797322), 1e-9)
    assert (J2[0] @ step).item() == pytest.approx(4.5582666694, abs=1e-9)
    assert (J2[1] @ step).item() == pytest.approx(-3.4683208839, abs=1e-9)
    assert (step @ step).item() == pytest.approx(2.4150286783, abs=1e-9)


@given(jacobians(max_tasks=2))
def test_ngdiff_lowers_the_retain_loss_and_raises_the_forget_loss(jacobian):
    """g_R . d = |g_R| (1 - c) >= 0, g_F . d = -|g_F| (1 - c) <= 0, |d|^2 = 2 - 2 c."""
    retain, forget = jacobian
    c = retain @ forget / (retain.norm() * forget.norm())
    step = create("ngdiff").direction(jacobian)
    close(retain @ step / retain.norm(), 1 - c, 1e-9)
    close(forget @ step / forget.norm(), c - 1, 1e-9)
    close(step @ step, 2 - 2 * c, 1e-9)


@given(jacobians(max_tasks=2), st.data())
def test_ngdiff_does_not_see_the_size_of_the_losses(jacobian, data):
    scales = data.draw(positive(2, 1e-3, 1e3))
    close(create("ngdiff").direction(scales[:, None] * jacobian),
          create("ngdiff").direction(jacobian), 1e-9)  # fmt: skip


def test_ngdiff_forget_setting_exchanges_the_roles():
    close(create("ngdiff", forget=0).direction(J2), -create("ngdiff").direction(J2), 1e-12)
    close(create("ngdiff", forget=0).direction(J2), create("ngdiff").direction(J2.flip(0)), 1e-12)


def test_ngdiff_degenerate_inputs_have_the_documented_answers():
    g = vector(1, 2, 0, -1)
    unit, zero = g / g.norm(), 0 * g

    def step(a: Tensor, b: Tensor) -> Tensor:
        return create("ngdiff").direction(torch.stack([a, b]))

    close(step(g, zero), unit, 1e-12)
    close(step(zero, g), -unit, 1e-12)
    close(step(zero, zero), zero, 0)
    close(step(g, 3 * g), zero, 1e-12)
    close(step(g, -g), 2 * unit, 1e-12)
    model = Linear(J2)
    losses = model()
    losses[1] = losses[1].detach()
    create("ngdiff").backward(losses, shared=model.shared)
    close(model.theta.grad, J2[0] / J2[0].norm(), 1e-12)


def test_ngdiff_forget_head_unlearns():
    model = Linear(J2)
    create("ngdiff").backward(model())
    norms = J2.norm(dim=1)
    close(torch.stack([phi.grad for phi in model.phi]), vector(1, -1) / norms, 1e-12)


def test_ngdiff_wants_two_tasks():
    with pytest.raises(ValueError, match="ngdiff: expected two tasks, retain and forget, got 3"):
        create("ngdiff").direction(J3)
    with pytest.raises(ValueError, match="ngdiff: expected forget"):
        create("ngdiff", forget=2)


# -------------------------------------------------------------------------------------------- GeN


CURVATURES = vector(1, 2, 3, 4)


def quadratic(lr: float = 0.3) -> tuple[nn.Parameter, torch.optim.SGD]:
    """theta, and an optimiser about to step along the unit vector of J2's first row."""
    theta = nn.Parameter(vector(1, -1, 0.5, 2))
    theta.grad = J2[0] / J2[0].norm()
    return theta, sgd([theta], lr)


def bowl(theta: Tensor) -> Tensor:
    return (CURVATURES * theta**2).sum() / 2


@pytest.mark.parametrize("lr", [0.05, 0.3, 2.0])
def test_gen_finds_the_minimum_of_a_quadratic_from_any_learning_rate(lr):
    theta, optimizer = quadratic(lr)
    vertex = GeNLR(every=1).update(lambda: bowl(theta), optimizer)
    assert vertex * lr == pytest.approx(0.3145764348, abs=1e-9)


@pytest.mark.parametrize(("lr", "factor"), [(0.3, 1.0485881), (0.01, 2.0), (3.0, 0.5)])
def test_gen_clips_and_smooths_every_groups_learning_rate(lr, factor):
    theta, optimizer = quadratic(lr)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 7.0})
    GeNLR(every=1, clip=2.0, smooth=0.75).update(lambda: bowl(theta), optimizer)
    for group, before in zip(optimizer.param_groups, (lr, 7.0), strict=True):
        assert group["lr"] == pytest.approx(before * (0.75 + 0.25 * factor), rel=1e-6)


@given(st.floats(-3, 3), st.floats(0.1, 5), st.floats(-2, 2))
def test_gen_fit_recovers_a_parabola(slope, curvature, height):
    steps = vector(-1, 0, 0.5, 1, 2)
    b, h, r2 = fit_parabola(steps, height - slope * steps + curvature * steps**2 / 2)
    assert (b, h) == pytest.approx((slope, curvature), abs=1e-9)
    assert r2 == pytest.approx(1, abs=1e-9)
    assert fit_parabola(steps, torch.ones(5)) == (pytest.approx(0, abs=1e-9),) * 2 + (0.0,)


def test_gen_leaves_the_learning_rate_where_there_is_no_minimum_ahead():
    theta, optimizer = quadratic()
    falling = [-1.0, 0.5, 1.0]  # popped from the end: ever steeper downhill
    ragged = [4.0, 0.0, 3.0, 0.0, 5.0]
    cases = (
        (lambda: vector(falling.pop())[0], (-1, 0, 1)),
        (lambda: vector(ragged.pop())[0], (-2, -1, 0, 1, 2)),  # half of the variance is left over
    )
    rates = []
    for closure, probes in cases:
        value = GeNLR(every=1, probes=probes).update(closure, optimizer)
        rates.append((value, optimizer.param_groups[0]["lr"]))
    assert rates[0] == (None, 0.3)
    assert rates[1] == (None, 0.3)
    theta.grad = -theta.grad  # downhill is behind
    assert GeNLR(every=1).update(lambda: bowl(theta), optimizer) is None


def test_gen_probes_with_non_finite_losses_shrink_the_learning_rate():
    theta, optimizer = quadratic()
    assert GeNLR(every=1, clip=4.0).update(lambda: theta.sum() * torch.nan, optimizer) is None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


class Noisy(nn.Module):
    """A network with buffers and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        )
        self.inputs = gaussian(16, 4, 0).float()

    def forward(self) -> Tensor:
        return (self.net(self.inputs) ** 2).mean()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
def test_gen_puts_parameters_buffers_moments_and_random_state_back(optimizer_class, steps, fails):
    model = Noisy()
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    optimizer.zero_grad()
    model().backward()
    before = [model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()]
    before = through_file(before)
    gradients = [p.grad.clone() for p in model.parameters()]
    losses = []

    def closure() -> Tensor:
        losses.append(model())
        if fails and len(losses) == 2:
            raise RuntimeError("out of memory")
        return losses[-1]

    gen = GeNLR(every=1)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            gen.update(closure, optimizer, model)
    else:
        gen.update(closure, optimizer, model)
    after = [model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state()]
    assert_equal_state(through_file(after), before)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close(parameter.grad, gradient, 0)


def test_gen_probes_see_the_same_random_numbers():
    theta, optimizer = quadratic()
    draws = []

    def closure() -> Tensor:
        draws.append(torch.rand(3))
        return bowl(theta)

    GeNLR(every=1).update(closure, optimizer)
    assert len(draws) == 3
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_gen_probes_see_the_same_buffers():
    theta, optimizer = quadratic()
    model = nn.BatchNorm1d(1)
    counts = []

    def closure() -> Tensor:
        counts.append(int(model.num_batches_tracked))
        model(torch.ones(2, 1))
        return bowl(theta)

    GeNLR(every=1).update(closure, optimizer, model)
    assert counts == [0, 0, 0]


def test_gen_works_every_so_many_steps_also_after_a_restart():
    theta, optimizer = quadratic()
    gen = GeNLR(every=3)
    assert repeat(lambda i: gen.update(lambda: bowl(theta), optimizer) is None, 2) == [True] * 2
    again = GeNLR(every=3)
    again.load_state_dict(through_file(gen.state_dict()))
    assert again.update(lambda: bowl(theta), optimizer) is not None
    assert again.update(lambda: bowl(theta), optimizer) is None


def test_gen_settings_are_checked():
    for setting in ({"every": 0}, {"every": 1.5}, {"clip": 0.5}, {"smooth": 1.0},
                    {"probes": (0, 1)}, {"probes": (0, 1, 1)}):  # fmt: skip
        with pytest.raises(ValueError, match="GeNLR: expected"):
            GeNLR(**setting)
