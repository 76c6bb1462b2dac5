"""ConFIG and M-ConFIG: known numbers, defining equations, edges, and other code."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    Linear,
    assert_equal_state,
    close,
    degenerate,
    gaussian,
    jacobians,
    positive,
    relative_error,
    repeat,
    seeds,
    sgd,
    through_file,
    vector,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchjd import aggregation

from mtl_tutorial.methods import create
from mtl_tutorial.methods.config import config_weights


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


J2 = matrix([3, 1, -2, 0.5], [-1, 2, 1, 1.5])
J2B = matrix([1, 0, 0, 0], [3, 1, 0, 0])
J3 = matrix([1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2])
J4 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25])
J5 = matrix([4, 0, 2, 1], [-1, 0.5, 0, 0.25], [-0.5, -1, 1, 0.5])
J3S = J3 * vector(100, 1, 1)[:, None]

KNOWN = [
    (J2, [1.4842001247, 3.1947004365, -0.6037571696, 2.1759145886]),
    (J2B, [4.0554804791, 0.6581138830, 0, 0]),
    (J3, [0.1435786204, 1.4171823219, 2.2963464069, 2.8681784143]),
    (J4, [0, 1.25, 1.25, 1.25]),
    (J5, [-0.1698769888, 1.1380525427, 1.8175604980, 1.6476835092]),
    (J3S, [4.4866964374, 44.2856106039, 71.7586588652, 89.6278696342]),
]


def cosines(step: Tensor, jacobian: Tensor) -> Tensor:
    return (jacobian @ step) / (jacobian.norm(dim=1) * step.norm())


# ------------------------------------------------------------------------------------------ ConFIG


@pytest.mark.parametrize(("jacobian", "expected"), KNOWN)
@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_config_known_steps_at_every_scale(jacobian, expected, c):
    close(create("config").direction(c * jacobian) / c, vector(*expected), 1e-9)


def test_config_known_cosines_and_lengths():
    for jacobian, cosine, length in ((J2, 0.6294782208, 4.1842667106),
                                     (J3, 0.5223894121, 3.9406439563)):  # fmt: skip
        step = create("config").direction(jacobian)
        close(cosines(step, jacobian), torch.full((len(jacobian),), cosine), 1e-7)
        assert step.norm().item() == pytest.approx(length, abs=1e-9)


@given(jacobians(max_tasks=6))
def test_config_has_equal_positive_cosines_and_the_length_of_the_projections(jacobian):
    """cos(d, g_i) equal and positive; |d| = sum_i g_i . d / |d|."""
    step = create("config").direction(jacobian)
    cosine = cosines(step, jacobian)
    assert (cosine > 0).all()
    close(cosine, cosine.mean().expand(len(cosine)), 1e-8)
    close((jacobian @ step).sum(), step @ step, atol=0, rtol=1e-8)


@given(jacobians(max_tasks=4), st.data())
def test_config_cosines_follow_the_preference(jacobian, data):
    wanted = data.draw(positive(len(jacobian), 0.2, 5.0))
    step = create("config", preference=wanted.tolist()).direction(jacobian)
    ratio = cosines(step, jacobian) / wanted
    close(ratio / ratio.mean(), torch.ones(len(wanted)), 1e-7)


@given(jacobians())
def test_config_points_where_imtl_g_points(jacobian):
    """Both have equal projections on the unit gradients; the lengths differ."""
    one = create("config").direction(jacobian)
    other = create("imtl_g").direction(jacobian)
    close(one / one.norm(), other / other.norm(), 1e-8)


@given(jacobians())
def test_config_equals_torchjd_on_independent_gradients(jacobian):
    assert relative_error(create("config").direction(jacobian), aggregation.ConFIG()(jacobian)) < (
        1e-8
    )


def test_config_of_opposite_gradients_is_zero_where_torchjd_gives_noise():
    """Its pseudo-inverse leaves rounding noise, and the length divides by it."""
    g = vector(1, 2, 0, -1)
    jacobian = torch.stack([g, -2 * g])
    close(create("config").direction(jacobian), 0 * g, 0)
    noise = aggregation.ConFIG()(jacobian)
    assert 0 < noise.norm() < 1e-6


@given(seeds, st.sampled_from([torch.float64, torch.float32]))
def test_config_of_opposite_gradients_is_zero_whatever_their_digits(seed, dtype):
    """Without the guard rounding noise is blown up to a full step."""
    g = gaussian(1, 9, seed).to(dtype)
    for jacobian in (torch.cat([g, -3 * g]), torch.cat([g, -g, torch.zeros_like(g)])):
        close(create("config").direction(jacobian), torch.zeros(9), 0)


def test_config_degenerate_inputs_have_the_documented_answers():
    g, h = vector(1, 2, 0, -1), vector(0, 1, 3, 1)
    zero = 0 * g
    step = create("config").direction
    close(step(torch.stack([g])), g)
    close(step(torch.stack([zero])), zero)
    close(step(torch.stack([g, zero])), g)
    close(step(torch.stack([g, zero, h])), step(torch.stack([g, h])))
    close(step(torch.stack([zero, zero])), zero)
    close(step(torch.stack([g, g])), 2 * g)
    close(step(torch.stack([g, 3 * g])), 4 * g)
    close(step(torch.stack([g, h, -(g + h)])), zero)
    for name, jacobian in degenerate().items():
        for dtype in (torch.float64, torch.float32):
            weights = create("config").weights((jacobian @ jacobian.T).to(dtype))
            assert weights.isfinite().all(), name


@pytest.mark.parametrize("preference", [[1.0, 0.0], [1.0, -1.0], [], [float("inf"), 1.0]])
def test_config_preference_is_checked(preference):
    with pytest.raises(ValueError, match="config: expected preference"):
        create("config", preference=preference)


def test_config_preference_must_fit_the_tasks():
    with pytest.raises(ValueError, match="config: expected a preference for each of 3 tasks"):
        create("config", preference=[1.0, 2.0]).direction(J3)


# ---------------------------------------------------------------------------------------- M-ConFIG


def momentum_by_words(
    jacobians: list[Tensor], beta1: float = 0.9, beta2: float = 0.999
) -> list[Tensor]:
    """M-ConFIG with plain lists and numbers, tasks taking turns from the first on."""
    k, p = jacobians[0].shape
    means, turns = [torch.zeros(p, dtype=torch.float64) for _ in range(k)], [0] * k
    before = squares = torch.zeros(p, dtype=torch.float64)
    t, steps = 0, []
    for number, jacobian in enumerate(jacobians):
        task = number % k
        turns[task] += 1
        means[task] = beta1 * means[task] + (1 - beta1) * jacobian[task]
        if 0 in turns:
            steps.append(torch.zeros(p, dtype=torch.float64))
            continue
        t += 1
        hats = torch.stack([m / (1 - beta1**n) for m, n in zip(means, turns, strict=True)])
        unit = hats / hats.norm(dim=1, keepdim=True)
        direction = torch.linalg.pinv(unit) @ torch.ones(k, dtype=torch.float64)
        direction = direction / direction.norm()
        combined = (hats @ direction).sum() * direction
        now = combined * (1 - beta1**t)
        pseudo = (now - beta1 * before) / (1 - beta1)
        before = now
        squares = beta2 * squares + (1 - beta2) * pseudo**2
        steps.append(combined / ((squares / (1 - beta2**t)).sqrt() + 1e-8))
    return steps


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
def test_config_momentum_is_the_algorithm_in_words(k, betas):
    inputs = [gaussian(k, 6, seed) for seed in range(12)]
    method = create("config_momentum", beta1=betas[0], beta2=betas[1])
    for jacobian, expected in zip(inputs, momentum_by_words(inputs, *betas), strict=True):
        close(method.direction(jacobian), expected, 1e-9)


def test_config_momentum_starts_with_zeros_and_then_signs():
    """With beta2 bias-corrected, the first full step is d / |d|, coordinate by coordinate."""
    method = create("config_momentum")
    close(method.direction(J3), torch.zeros(4), 0)
    close(method.direction(J3), torch.zeros(4), 0)
    close(method.direction(J3), create("config").direction(J3).sign(), 1e-6)


@given(seeds)
def test_config_momentum_step_does_not_depend_on_the_scale_of_the_losses(seed):
    def last(c: float) -> Tensor:
        method = create("config_momentum")
        return repeat(lambda i: method.direction(c * gaussian(3, 5, seed + i)), 7)[-1]

    close(last(1e4), last(1.0), 1e-5)  # up to the constant 1e-8 beside the root


def test_config_momentum_reads_one_row_per_step():
    one, other = create("config_momentum"), create("config_momentum")
    for i in range(8):
        jacobian = gaussian(3, 5, i)
        changed = gaussian(3, 5, 100 + i)
        changed[i % 3] = jacobian[i % 3]
        close(one.direction(jacobian), other.direction(changed), 0)


def test_config_momentum_runs_one_backward_pass_and_one_head_per_step():
    model = Linear(J3)
    method = create("config_momentum")
    expected = create("config_momentum")
    for i in range(7):
        model.zero_grad(set_to_none=True)
        calls = []
        losses = model()
        for k, loss in enumerate(losses):
            loss.register_hook(lambda gradient, k=k, calls=calls: calls.append(k))
        info = method.backward(losses, shared=model.shared, heads=model.heads)
        assert calls == [i % 3]
        assert [k for k, phi in enumerate(model.phi) if phi.grad is not None] == [i % 3]
        assert model.phi[i % 3].grad == 1
        close(model.theta.grad, expected.direction(J3), 1e-10)
        assert info.weights is None


class PartlyShared(torch.nn.Module):
    """Two losses share `a`, one of them also uses `b`, none uses `c`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(vector(1.0, 2.0))
        self.b = torch.nn.Parameter(vector(3.0))
        self.c = torch.nn.Parameter(vector(4.0))

    def forward(self) -> list[Tensor]:
        return [(self.a**2).sum() + self.b.sum() ** 2, (self.a - 3).pow(2).sum()]


def test_config_momentum_moves_what_any_task_uses_in_every_turn():
    model = PartlyShared()
    method = create("config_momentum")
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        method.backward(model(), shared=model.parameters())
    assert model.b.grad.abs() > 0  # it was the turn of the task that does not use b
    assert model.c.grad is None


def test_config_momentum_absent_task_loses_its_turn():
    model = Linear(J3)
    method = create("config_momentum")
    for _ in range(4):
        method.backward(model())
    before = method.state_dict()["state"]
    losses = model()
    losses[1] = losses[1].detach()  # whose turn it would be
    method.backward(losses)
    after = method.state_dict()["state"]
    close(after["turns"] - before["turns"], vector(0, 0, 1), 0)
    close(after["means"][1], before["means"][1], 0)
    method.backward(model())
    close(method.state_dict()["state"]["turns"] - after["turns"], vector(1, 0, 0), 0)


def test_config_momentum_continues_from_a_file_in_the_middle_of_a_round():
    one = create("config_momentum")
    repeat(lambda i: one.direction(gaussian(3, 5, i)), 5)
    other = create("config_momentum", **one.settings)
    other.load_state_dict(through_file(one.state_dict()))
    for i in range(5, 12):
        close(one.direction(gaussian(3, 5, i)), other.direction(gaussian(3, 5, i)), 0)


def test_config_momentum_skipped_step_leaves_turn_and_state():
    model = Linear(J3)
    method = create("config_momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = sgd(model.parameters())
    for _ in range(4):
        method.step(model, optimizer, scaler=scaler)
    before = method.state_dict()
    theta = model.theta.detach().clone()
    method.step(lambda: [loss * torch.inf for loss in model()], optimizer, scaler=scaler)
    assert_equal_state(method.state_dict(), before)
    close(model.theta, theta, 0)
    for bad in range(3):  # a task whose turn it is not is looked at as well
        losses = model()
        losses[bad] = losses[bad] * torch.nan
        with pytest.raises(FloatingPointError, match=f"config_momentum.* task {bad}"):
            method.backward(losses)
        assert_equal_state(method.state_dict(), before)


def test_config_momentum_checks_betas_features_and_shapes():
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match="config_momentum: expected 0 <= beta < 1"):
            create("config_momentum", beta1=beta)
        with pytest.raises(ValueError, match="config_momentum: expected 0 <= beta < 1"):
            create("config_momentum", beta2=beta)
    method = create("config_momentum")
    method.direction(J3)
    with pytest.raises(ValueError, match="expected gradients of"):
        method.direction(gaussian(3, 5, 0))
    with pytest.raises(TypeError, match="config_momentum: has no weights"):
        create("config_momentum").weights(J3)


def test_config_weights_do_not_depend_on_the_scale_or_the_precision():
    gram = J3 @ J3.T
    close(config_weights(gram * 1e12), config_weights(gram), 1e-10)
    close(config_weights(gram.float(), eps=1e-7), config_weights(gram), 1e-5)
