"""Cross-learning: the projection against its defining problem, and the schedule of steps."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Linear,
    Regression,
    assert_equal_state,
    close,
    gaussian,
    orthogonal,
    repeat,
    seeds,
    sgd,
    through_file,
    vector,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtl_tutorial.methods import create
from mtl_tutorial.methods.cross_learning import project_copies

TRIANGLE = torch.tensor([[0, 0], [4, 0], [0, 3]], dtype=torch.float64)
J3 = torch.tensor([[1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2]], dtype=torch.float64)


@st.composite
def clouds(draw: st.DrawFn) -> tuple[Tensor, float]:
    """Points of unequal spread far from zero, and a radius from none to more than enough."""
    k, p, seed = draw(st.integers(2, 7)), draw(st.integers(1, 9)), draw(seeds)
    points = (
        gaussian(k, p, seed)
        * gaussian(k, 1, seed + 1).exp()
        * draw(st.sampled_from([1e-3, 1, 1e3]))
    )
    reach = (points - points.mean(0)).norm(dim=1).max().item()
    return points + 10 * gaussian(1, p, seed + 2), draw(st.floats(0, 1.3)) * reach


# ---------------------------------------------------------------------------------- the projection


def test_projection_known_points():
    for radius, expected in (
        (1.0, [[0.6854030428, 0.4826623732], [2.4237182901, 0.6681590003],
               [0.8908786671, 1.8491786265]]),
        (0.5, [[1.0053624981, 0.7297615321], [1.8750102089, 0.8397204698],
               [1.119627293, 1.4305179981]]),
        (0.0, [[4 / 3, 1]] * 3),
    ):  # fmt: skip
        points, _ = project_copies(TRIANGLE, radius)
        close(points, torch.tensor(expected, dtype=torch.float64), 1e-9)
    _, centre = project_copies(TRIANGLE, 1.0)
    close(centre, vector(1.5030175694, 1.0584283724), 1e-9)
    for radius in (2.5 + 1e-9, 3.0, float("inf")):  # the circumradius is 2.5
        close(project_copies(TRIANGLE, radius)[0], TRIANGLE, 1e-8)


def test_projection_of_two_points_has_a_closed_form():
    """Towards the midpoint, to the radius; untouched within twice the radius."""
    pair = torch.tensor([[0, 0], [4, 0]], dtype=torch.float64)
    close(project_copies(pair, 0.5)[0], torch.tensor([[1.5, 0], [2.5, 0]]), 1e-12)
    points, centre = project_copies(pair, 2.0)
    close(points, pair, 0)
    close(centre, vector(2, 0), 1e-12)


@given(clouds())
def test_projection_is_feasible_and_idempotent(cloud):
    """|theta_i - centre| <= radius (1 + 1e-9); projecting twice is projecting once."""
    points, radius = cloud
    size = points.norm()
    near, centre = project_copies(points, radius)
    assert (near - centre).norm(dim=1).max() <= radius * (1 + 1e-9) + 1e-14 * size
    close(project_copies(near, radius)[0] / size, near / size, 1e-9)


@given(clouds())
def test_projection_centre_is_where_the_pulls_cancel(cloud):
    """Optimality of the convex problem: sum (1 - radius / |v_i - c|)_+ (c - v_i) = 0."""
    points, radius = cloud
    near, centre = project_copies(points, radius)
    pulls = near - points
    spread = (points - points.mean(0)).norm()
    assert pulls.sum(0).norm() <= 1e-11 * spread + 1e-14 * points.norm()
    outside = (points - centre).norm(dim=1) > radius
    close(pulls[~outside], torch.zeros_like(pulls[~outside]), 0)


@given(clouds(), seeds)
def test_projection_is_the_nearest_feasible_point(cloud, seed):
    """No other feasible set of copies is nearer; <v - theta, other - theta> <= 0 for all others."""
    points, radius = cloud
    near, centre = project_copies(points, radius)
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        shift = torch.randn(points.shape[1], dtype=torch.float64, generator=g) * radius
        step = torch.randn(*points.shape, dtype=torch.float64, generator=g)
        step *= radius * torch.rand(len(points), 1, generator=g) / step.norm(dim=1, keepdim=True)
        other = centre + shift + step
        assert ((points - near) * (other - near)).sum() <= 1e-9 * points.norm() ** 2


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_projection_is_what_a_cone_program_finds(k, share):
    """``min sum_i |theta_i - v_i|^2`` with ``|theta_i - centre| <= radius``, by another solver."""
    cvxpy = pytest.importorskip("cvxpy", reason="the cone program needs cvxpy")
    points = gaussian(k, 4, seed=10 * k)
    radius = share * (points - points.mean(0)).norm(dim=1).max().item()
    copies, centre = cvxpy.Variable((k, 4)), cvxpy.Variable(4)
    near = [cvxpy.norm(copies[i] - centre) <= radius for i in range(k)]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(copies - points.numpy())), near)
    problem.solve(solver=cvxpy.CLARABEL)  # to 1e-8 in the objective, so to 1e-5 in the copies
    close(project_copies(points, radius)[0], torch.tensor(copies.value), 1e-5)
    ours = (project_copies(points, radius)[0] - points).square().sum().item()
    assert ours <= problem.value + 1e-9


@given(clouds(), seeds)
def test_projection_does_not_expand_distances(cloud, seed):
    points, radius = cloud
    others = points + gaussian(*points.shape, seed) * points.std()
    moved = (project_copies(points, radius)[0] - project_copies(others, radius)[0]).norm()
    assert moved <= (points - others).norm() * (1 + 1e-9)


@given(clouds(), seeds)
def test_projection_follows_permutations_and_rotations(cloud, seed):
    points, radius = cloud
    near, _ = project_copies(points, radius)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    size = points.norm()
    close(project_copies(points[order], radius)[0] / size, near[order] / size, 1e-9)
    turn = orthogonal(points.shape[1], seed)
    close(project_copies(points @ turn, radius)[0] / size, near @ turn / size, 1e-9)


@pytest.mark.parametrize("points", [torch.ones(3, 4), torch.zeros(1, 4), torch.zeros(3, 1)])
@pytest.mark.parametrize("radius", [0.0, 1.0, float("inf")])
def test_projection_of_equal_points_leaves_them(points, radius):
    near, centre = project_copies(points.double(), radius)
    close(near, points, 1e-14)
    close(centre, points[0], 1e-14)


def test_projection_in_single_precision_far_from_zero():
    """Around their mean, so that near copies of large parameters lose no digits."""
    offsets = gaussian(4, 1000, 0)
    points = (100 + offsets).float()
    expected, _ = project_copies(points.double(), 5.0)
    near, _ = project_copies(points, 5.0)
    close(near, expected, 1e-4)


# --------------------------------------------------------------------------------------- the steps


def run(method, model, optimizer, steps: int, start: int = 0, **settings) -> None:
    for batch in range(start, start + steps):
        method.step(lambda batch=batch: model(batch), optimizer, **settings)


def flat(parameters) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def test_radius_zero_is_gradient_descent_on_the_mean_loss():
    one, other = Regression(3), Regression(3)
    method = create("cross_learning", radius=0.0)
    run(method, one, sgd(one.parameters()), 5, shared=list(one.trunk.parameters()))
    optimizer = sgd(other.parameters())
    for batch in range(5):
        optimizer.zero_grad()
        losses = other(batch)
        losses.sum().backward()
        for parameter in other.trunk.parameters():
            parameter.grad /= 3
        optimizer.step()
    close(flat(one.parameters()), flat(other.parameters()), 1e-12)
    copies = method.state_dict()["state"]["copies"]
    close(copies - copies[0], torch.zeros_like(copies), 1e-12)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
def test_infinite_radius_is_one_network_per_task(optimizer_class):
    """Each copy and its optimiser state go as if the other tasks did not exist."""
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    model = Regression(3)
    method = create("cross_learning", radius=float("inf"))
    run(method, model, optimizer_class(model.parameters(), lr=0.02, **settings), 6)
    for task in range(3):
        alone = Regression(3)
        mine = [*alone.trunk.parameters(), *alone.tasks[task].parameters()]
        optimizer = optimizer_class(mine, lr=0.02, **settings)
        for batch in range(6):
            optimizer.zero_grad()
            alone(batch)[task].backward()
            optimizer.step()
        with method.use(task):
            close(model(9)[task], alone(9)[task], 1e-10)
        close(flat(model.tasks[task].parameters()), flat(alone.tasks[task].parameters()), 1e-10)


def test_steps_are_gradient_steps_of_the_copies_and_a_projection():
    """v_k = theta_k - lr g_k(theta_k), then the projection; the model holds the centre."""
    model = Linear(J3)
    method = create("cross_learning", radius=0.3)
    optimizer = sgd(model.parameters(), lr=0.5)
    copies = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(4):
        info = method.step(model, optimizer)
        offsets = model.offsets + torch.stack([row @ c for row, c in zip(J3, copies, strict=True)])
        close(info.losses, offsets - 0.5 * _, 1e-10)  # heads have moved by 0.5 a step
        copies, centre = project_copies(copies - 0.5 * J3, 0.3)
        close(method.state_dict()["state"]["copies"], copies, 1e-10)
        close(model.theta, centre, 1e-10)
        assert info.weights is None


def test_use_puts_a_copy_into_the_model_and_takes_it_out_again():
    model = Linear(J3)
    method = create("cross_learning", radius=1.0)
    with pytest.raises(RuntimeError, match="got none so far"), method.use(0):
        pass
    method.step(model, sgd(model.parameters()))
    centre = model.theta.detach().clone()
    copies = method.state_dict()["state"]["copies"]
    for task in range(3):
        with pytest.raises(KeyError), method.use(task):
            close(model.theta, copies[task], 0)
            raise KeyError
        close(model.theta, centre, 0)
    again = create("cross_learning", **method.settings)
    again.load_state_dict(through_file(method.state_dict()))
    with again.use(1, shared=model.shared):
        close(model.theta, copies[1], 0)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("explicit", [False, True])
def test_continues_from_a_file_exactly(optimizer_class, explicit):
    def start():
        model = Regression(3)
        settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
        return model, optimizer_class(model.parameters(), lr=0.02, **settings)

    def named(model):
        return {"shared": model.trunk.parameters()} if explicit else {}

    model, optimizer = start()
    method = create("cross_learning", radius=0.1)
    for i in range(8):
        run(method, model, optimizer, 1, i, **named(model))
        if i == 3:
            saved = through_file([x.state_dict() for x in (model, optimizer, method)])
    again, again_optimizer = start()
    again_method = create("cross_learning", **method.settings)
    for x, state in zip((again, again_optimizer, again_method), saved, strict=True):
        x.load_state_dict(state)
    for i in range(4, 8):
        run(again_method, again, again_optimizer, 1, i, **named(again))
    assert_equal_state(again.state_dict(), model.state_dict())
    assert_equal_state(again_method.state_dict(), method.state_dict())


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_moves_nothing(bad, value):
    model = Linear(J3)
    method = create("cross_learning")
    optimizer = torch.optim.Adam(model.parameters())
    method.step(model, optimizer)
    before = through_file([x.state_dict() for x in (model, optimizer, method)])

    def closure() -> list[Tensor]:
        losses = model()
        losses[bad] = losses[bad] * value
        return losses

    with pytest.raises(FloatingPointError, match=f"cross_learning.* task {bad};"):
        method.step(closure, optimizer)
    after = [x.state_dict() for x in (model, optimizer, method)]
    assert_equal_state(through_file(after), before)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    info = method.step(closure, optimizer, scaler=scaler)
    assert not info.finite
    assert scaler.get_scale() == 8
    after = [x.state_dict() for x in (model, optimizer, method)]
    assert_equal_state(through_file(after), before)


def test_a_failing_closure_leaves_the_centre_in_the_model():
    model = Linear(J3)
    method = create("cross_learning")
    optimizer = sgd(model.parameters())
    method.step(model, optimizer)
    centre = model.theta.detach().clone()
    calls = []

    def closure() -> list[Tensor]:
        calls.append(model.theta.detach().clone())
        if len(calls) == 3:
            raise KeyError
        return model()

    with pytest.raises(KeyError):
        method.step(closure, optimizer)
    assert not torch.equal(calls[2], centre)
    close(model.theta, centre, 0)


def test_gradient_scaler_changes_nothing_and_counts_one_step_per_batch():
    results = []
    for scale in (None, 1.0, 65536.0):
        model = Regression(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        run(create("cross_learning", radius=0.1), model, optimizer, 4, scaler=scaler)
        results.append(flat(model.parameters()))
        if scale:
            assert scaler.get_scale() == 2 * scale  # grown once, after four batches
    close(results[1], results[0], 1e-12)
    close(results[2], results[0], 1e-12)


def test_absent_task_takes_no_step_and_stays_where_the_others_allow():
    model = Linear(J3)
    method = create("cross_learning", radius=1e3)
    optimizer = sgd(model.parameters(), momentum=0.9)
    method.step(model, optimizer)
    before = method.state_dict()

    def closure() -> list[Tensor]:
        losses = model()
        losses[1] = losses[1].detach()
        return losses

    phi = model.phi[1].detach().clone()
    info = method.step(closure, optimizer)
    after = method.state_dict()
    assert info.losses.shape == (3,)
    close(after["state"]["copies"][1], before["state"]["copies"][1], 0)
    assert_equal_state(after["moments"][1], before["moments"][1])
    close(model.phi[1], phi, 0)
    moved = (after["state"]["copies"] - before["state"]["copies"]).norm(dim=1)
    assert (moved[[0, 2]] > 0).all()


def test_closure_with_an_argument_is_asked_for_all_tasks():
    model = Linear(J3)
    asked = []

    def closure(tasks):
        asked.append(tasks)
        return model()

    create("cross_learning").step(closure, sgd(model.parameters()), shared=model.shared)
    assert asked == [None] * 3


def test_frozen_and_unused_parameters_stay():
    model = Regression(2)
    model.trunk.bias.requires_grad_(False)
    unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    shared = [*model.trunk.parameters(), unused]
    bias = model.trunk.bias.detach().clone()
    optimizer = sgd([*model.parameters(), unused], weight_decay=0.1)
    run(create("cross_learning"), model, optimizer, 3, shared=shared)
    close(model.trunk.bias, bias, 0)
    close(unused, torch.ones(2), 0)


def test_what_is_not_defined_says_so():
    method = create("cross_learning")
    with pytest.raises(RuntimeError, match=r"call of step\(closure, optimizer\)"):
        method.backward(Linear(J3)())
    with pytest.raises(TypeError, match="no single direction"):
        method.direction(J3)
    with pytest.raises(TypeError, match="no weights"):
        method.weights(vector(1, 2, 3))
    for radius in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cross_learning: expected radius"):
            create("cross_learning", radius=radius)
    model = Regression(2)
    run(method, model, sgd(model.parameters()), 1, shared=model.trunk.parameters())
    with pytest.raises(ValueError, match="expected 30 shared parameters"):
        run(method, model, sgd(model.parameters()), 1, shared=[model.trunk.weight])


def test_copies_stay_within_the_radius_while_learning():
    model = Regression(3)
    method = create("cross_learning", radius=0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = model(0).detach()
    repeat(lambda i: run(method, model, optimizer, 1, i), 60)
    copies = method.state_dict()["state"]["copies"]
    with method.use(0, shared=method._shared):
        close(flat(method._shared), copies[0], 0)
    distances = (copies - flat(method._shared)).norm(dim=1)
    assert distances.max() == pytest.approx(0.2, rel=1e-9)  # the tasks want to be apart
    assert (model(0) < first).all()
