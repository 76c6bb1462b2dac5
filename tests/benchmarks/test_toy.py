"""The toy landscape against formulas written down again, its gradient and its Pareto set."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from mtl_tutorial import methods
from mtl_tutorial.benchmarks import Toy, create, toy_losses
from mtl_tutorial.benchmarks.toy import START_POINTS, STEPS_PER_EPOCH, Point

coordinate = st.floats(-10, 10, allow_nan=False, width=32)


def reference(x1: float, x2: float) -> np.ndarray:
    """Both losses in numpy, term by term."""
    c1, c2 = max(np.tanh(0.5 * x2), 0.0), max(np.tanh(-0.5 * x2), 0.0)
    f1 = np.log(max(abs(0.5 * (-x1 - 7) - np.tanh(-x2)), 0.000005)) + 6
    f2 = np.log(max(abs(0.5 * (-x1 + 3) + np.tanh(-x2) + 2), 0.000005)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return np.array([c1 * f1 + c2 * g1, c1 * f2 + c2 * g2])


@given(x1=coordinate, x2=coordinate)
def test_losses_are_the_formulas(x1, x2):
    ours = toy_losses(torch.tensor([x1, x2], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(ours, reference(x1, x2), rtol=1e-12, atol=1e-12)


def test_losses_in_the_valley_stop_at_the_floor():
    # x1 = -7 + 2 tanh(x2) is the bottom of the first valley.
    x2 = torch.tensor(3.0, dtype=torch.float64)
    point = torch.stack([-7 + 2 * torch.tanh(x2), x2])
    expected = float(torch.tanh(x2 / 2)) * (np.log(5e-6) + 6)
    assert float(toy_losses(point)[0]) == pytest.approx(expected, abs=1e-12)


def test_losses_of_many_points_at_once():
    points = torch.randn(3, 4, 2, dtype=torch.float64)
    every = toy_losses(points)
    assert every.shape == (3, 4, 2)
    torch.testing.assert_close(every[1, 2], toy_losses(points[1, 2]))


@pytest.mark.parametrize("point", [(-8.5, 7.5), (9.0, 9.0), (-7.5, -0.5), (2.0, -3.0), (0.5, 1e-3)])
def test_gradient(point):
    x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(toy_losses, (x,), eps=1e-7, atol=1e-6)


def test_both_sides_pass_their_gradient_at_the_seam():
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for k, loss in enumerate(toy_losses(x)):
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
        valley = np.log([3.5, 3.5][k]) + 6
        bowl = (49 + 6.4) / 10 - 20
        assert gradient.tolist() == pytest.approx([0, 0.5 * valley - 0.5 * bowl])


@pytest.mark.parametrize("start", START_POINTS)
@pytest.mark.parametrize("single", [False, True])
def test_no_run_is_stuck_at_its_start(start, single):
    toy = Toy()
    model = Point(start, 2 if single else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        sum(toy.losses(model, None)[0]).backward()
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert (new - old).norm() > 0.05


@pytest.mark.parametrize(
    ("weight", "optimum"),
    [
        (0, (-7, -8.43)),
        (0.1, (-5.6, -8.41)),
        (0.5, (0, -8.36)),
        (0.7, (2.8, -8.37)),
        (1, (7, -8.43)),
    ],
)
def test_pareto_set_is_the_arc_that_the_text_names(weight, optimum):
    def weighted(x):
        return weight * reference(*x)[0] + (1 - weight) * reference(*x)[1]

    found = minimize(weighted, (0.3, -7.0), tol=1e-12).x
    assert found == pytest.approx(optimum, abs=5e-3)
    point = torch.tensor(found, dtype=torch.float64, requires_grad=True)
    rows = [torch.autograd.grad(f, point, retain_graph=True)[0] for f in toy_losses(point)]
    pull = weight * rows[0] + (1 - weight) * rows[1]
    assert pull.norm() < 1e-5  # Pareto stationary, with these weights


def test_benchmark_hands_out_the_usual_starts_and_steps():
    toy = create("toy").prepare(torch.device("cpu"))
    for seed, start in enumerate((*START_POINTS, START_POINTS[0])):
        assert toy.model(seed).points[0].tolist() == list(start)
    protocol = toy.protocols["full"]
    assert len(list(toy.batches(protocol, torch.Generator()))) == STEPS_PER_EPOCH
    assert (protocol.epochs * STEPS_PER_EPOCH, protocol.lr) == (35_000, 1e-3)
    assert protocol.optimizer == "adam"
    assert not toy.baseline
    assert toy.synthetic


def test_evaluation_and_chosen_tasks():
    toy = Toy()
    model = toy.model(0)
    expected = reference(*START_POINTS[0])
    scores = toy.evaluate(model, "test")
    assert [scores[t.name]["loss"] for t in toy.tasks] == pytest.approx(list(expected))
    losses, features = toy.losses(model, None, [1])
    assert features is None
    assert [loss.item() for loss in losses] == pytest.approx([expected[1]])


def test_single_task_points_move_for_their_own_loss():
    model = Toy().model(2, single_task=True)
    assert model.shared_parameters() == []
    first, second = model()
    assert torch.autograd.grad(first, list(model.points), allow_unused=True)[1] is None
    assert torch.autograd.grad(second, list(model.points), allow_unused=True)[0] is None


def test_a_method_that_balances_reaches_the_arc_from_a_hard_start():
    toy = Toy()
    model = toy.model(2)
    method = methods.create("aligned_mtl")
    optimizer = dataclasses.replace(toy.protocols["quick"], lr=0.2).make_optimizer(
        list(model.parameters())
    )
    for _ in range(250):
        method.step(lambda: toy.losses(model, None)[0], optimizer, shared=list(model.points))
    x1, x2 = model.points[0].tolist()
    assert -7.1 < x1 < 7.1
    assert x2 == pytest.approx(-8.4, abs=0.1)
