"""Joint, independent and individual updates: known numbers, defining properties, bookkeeping."""

from __future__ import annotations

import pytest
import torch
from helpers import Regression, assert_equal_state, close, repeat, sgd, through_file, vector
from hypothesis import given
from hypothesis import strategies as st

from mtl_tutorial.methods import Independent
from mtl_tutorial.methods.independent import clone_optimizer, draw_groups

A = (vector(1, 2, -1), vector(0.5, -1, 2))
Y = (1.0, -2.0)


class Toy:
    """L_k = c_k (h_k (a_k . theta) - y_k)^2 / 2."""

    def __init__(self, scales=(1.0, 1.0)):
        self.theta = vector(0.1, -0.2, 0.3).requires_grad_()
        self.h = [vector(1.0)[0].requires_grad_(), vector(0.5)[0].requires_grad_()]
        self.scales = scales

    @property
    def parameters(self):
        return [self.theta, *self.h]

    def __call__(self):
        return [
            c * (h * (a @ self.theta) - y) ** 2 / 2
            for a, y, h, c in zip(A, Y, self.h, self.scales, strict=True)
        ]

    def numbers(self):
        return torch.cat([self.theta.detach(), torch.stack(self.h).detach()])


SCHEDULES = {
    "joint": {"group_size": None},
    "independent": {"optimizers": "shared"},
    "individual": {"optimizers": "individual"},
}


def run(schedule, optimizer, batches, scales=(1.0, 1.0), **settings):
    toy, method = Toy(scales), Independent(**SCHEDULES[schedule])
    given = optimizer(toy.parameters, lr=settings.pop("lr", 0.1), **settings)
    return repeat(lambda _: (method.step(toy, given), toy.numbers())[1], batches)


GOLDEN_ADAM = {
    "joint": [
        (0.1999999990, -0.1000000002, 0.2000000002, 0.9000000010, 0.4000000005),
        (0.2961229239, -0.0026705540, 0.1022932818, 0.8171605364, 0.3032220966),
        (0.3863089046, 0.0903048579, 0.0084564056, 0.7641261462, 0.2130444631),
    ],
    "independent": [
        (0.2378761136, -0.0117683580, 0.1006517111, 0.9000000010, 0.4000000007),
        (0.3225953372, 0.1608336444, -0.0846196389, 0.8412403023, 0.3240735176),
        (0.3790170919, 0.3146749056, -0.2548000335, 0.8155691697, 0.3025478950),
    ],
    "individual": [
        (0.1000000011, -0.0000000012, 0.1000000011, 0.9000000010, 0.4000000007),
        (0.0973566114, 0.1924226341, -0.0924226344, 0.8329941764, 0.3316239220),
        (0.0889367031, 0.3730323766, -0.2730323769, 0.8026013867, 0.3259299258),
    ],
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_adam_gives_the_known_numbers(schedule):
    for found, expected in zip(
        run(schedule, torch.optim.Adam, 3), GOLDEN_ADAM[schedule], strict=True
    ):
        close(found, vector(*expected))


def test_stale_moments_of_the_other_heads_are_not_replayed():
    """With gradients zeroed in place of None, as in torch 1.2, other heads drift on old moments."""
    toy = Toy()
    optimizer = torch.optim.Adam(toy.parameters, lr=0.1)
    expected = [
        (0.2378761136, -0.0117683580, 0.1006517111, 0.8329941766, 0.4000000007),
        (0.3226125961, 0.1580174001, -0.0820609132, 0.7517085526, 0.2733748868),
        (0.3844680485, 0.3078686060, -0.2478609677, 0.7301483109, 0.2137323227),
    ]
    for numbers in expected:
        for k in range(2):
            losses = toy()
            for p in toy.parameters:  # what the released code's zero_grad leaves behind
                p.grad = p.grad if p.grad is None else torch.zeros_like(p)
            losses[k].backward()
            optimizer.step()
        close(toy.numbers(), vector(*numbers))
    ours = run("independent", torch.optim.Adam, 3)[-1]
    assert (ours - toy.numbers()).abs().max() > 0.05


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("joint", (0.199375, 0.24125, -0.1025, 0.904, 0.293875)),
        ("independent", (0.206375, 0.22725, -0.0745, 0.904, 0.437795)),
        ("individual", (0.206375, 0.22725, -0.0745, 0.904, 0.437795)),
    ],
)
def test_sgd_gives_the_known_numbers(schedule, expected):
    close(run(schedule, torch.optim.SGD, 1)[0], vector(*expected))


def test_plain_sgd_makes_independent_and_individual_the_same():
    for a, b in zip(
        run("independent", torch.optim.SGD, 5), run("individual", torch.optim.SGD, 5), strict=True
    ):
        close(a, b, atol=0)


def test_joint_and_independent_differ_by_the_square_of_the_learning_rate():
    differences = [
        (
            run("joint", torch.optim.SGD, 1, lr=lr)[0]
            - run("independent", torch.optim.SGD, 1, lr=lr)[0]
        )
        .abs()
        .max()
        .item()
        for lr in (1e-2, 5e-3, 2.5e-3)
    ]
    close(vector(*differences), vector(1.58032e-3, 3.97040e-4, 9.95050e-5), atol=1e-8)


@pytest.mark.parametrize(("eps", "bound"), [(0.0, 1e-14), (1e-8, 3e-6)])
def test_individual_adam_is_invariant_to_the_scales_of_the_losses(eps, bound):
    plain = run("individual", torch.optim.Adam, 3, eps=eps)[-1]
    scaled = run("individual", torch.optim.Adam, 3, scales=(100.0, 0.01), eps=eps)[-1]
    assert (plain - scaled).abs().max() < bound


@pytest.mark.parametrize("schedule", ["joint", "independent"])
def test_shared_adam_is_not_invariant_to_the_scales_of_the_losses(schedule):
    plain = run(schedule, torch.optim.Adam, 3)[-1]
    scaled = run(schedule, torch.optim.Adam, 3, scales=(100.0, 0.01))[-1]
    assert (plain - scaled).abs().max() > 1e-3


def test_first_individual_adam_step_is_a_sum_of_signs():
    """Each task moves theta by lr * sign(g_k): where the signs oppose, the moves cancel."""
    moved = run("individual", torch.optim.Adam, 1, lr=1e-3, eps=0.0)[0][:3] - vector(0.1, -0.2, 0.3)
    model = Toy()
    signs = torch.stack([torch.autograd.grad(loss, model.theta)[0].sign() for loss in model()])
    close(moved, -1e-3 * signs.sum(0), atol=1e-12)
    assert (signs[0] * signs[1] == -1).any()


# --------------------------------------------------------------------------------- groups


@given(k=st.integers(1, 45), size=st.integers(1, 50), seed=st.integers(0, 1000))
def test_groups_partition_the_tasks(k, size, seed):
    """Disjoint, all tasks, ceil(k / size) groups, none larger than size."""
    groups = draw_groups(k, size, torch.Generator().manual_seed(seed))
    assert sorted(task for group in groups for task in group) == list(range(k))
    assert len(groups) == -(-k // min(size, k))
    assert max(map(len, groups)) <= size
    assert all(len(group) == min(size, k) for group in groups[:-1])
    again = draw_groups(k, size, torch.Generator().manual_seed(seed))
    assert groups == again


def test_groups_of_one_and_of_all_need_no_draw():
    assert draw_groups(3, 1, None) == [[0], [1], [2]]
    assert draw_groups(3, None, None) == draw_groups(3, 7, None) == [[0, 1, 2]]


def test_different_seeds_group_differently():
    groups = {str(draw_groups(10, 2, torch.Generator().manual_seed(seed))) for seed in range(5)}
    assert len(groups) == 5


def trained(steps=4, k=5, optimizer=torch.optim.Adam, epochs=(), **settings):
    model, method = Regression(k), Independent(**settings)
    opt = optimizer(model.parameters(), lr=0.01)
    drawn = []
    for i in range(steps):
        method.step(lambda i=i: model(i), opt)
        drawn.append(method.groups)
        if i in epochs:
            method.next_epoch()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), drawn


@pytest.mark.parametrize("optimizers", ["shared", "individual"])
def test_one_group_is_the_joint_schedule(optimizers):
    joint, _ = trained(group_size=None)
    for size in (5, 9):
        close(trained(group_size=size, optimizers=optimizers)[0], joint, atol=0)


def test_number_of_optimiser_steps_is_the_number_of_groups():
    for size, expected in ((1, 5), (2, 3), (3, 2), (None, 1)):
        model, calls = Regression(5), []
        opt = sgd(model.parameters(), lr=0.01)
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        Independent(group_size=size).step(lambda model=model: model(0), opt)
        assert len(calls) == expected


def test_groups_are_drawn_once_or_every_epoch():
    once = trained(6, epochs=(1, 3), group_size=2)[1]
    assert all(groups == once[0] for groups in once)
    anew = trained(6, epochs=(1, 3), group_size=2, regroup="epoch")[1]
    assert anew[0] == anew[1] != anew[2] == anew[3] != anew[4] == anew[5]


def test_closure_may_compute_the_group_alone():
    """Same result, and the other heads' forward passes are saved."""
    full, part, asked = Regression(4), Regression(4), []
    methods = [Independent(group_size=2, seed=1) for _ in range(2)]
    opts = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (full, part)]

    def closure(tasks):
        asked.append(tasks)
        losses = part.losses_from(part.features(0), 0)
        return losses if tasks is None else [losses[k] for k in tasks]

    for _ in range(3):
        a = methods[0].step(lambda: full(0), opts[0])
        b = methods[1].step(closure, opts[1])
        close(a.losses, b.losses, atol=0)
    assert_equal_state(full.state_dict(), part.state_dict())
    assert asked == [None, *methods[1].groups * 3]
    with pytest.raises(ValueError, match=r"expected 4 losses, or those of tasks .*, got 3"):
        methods[0].step(lambda: full(0)[:3], opts[0])


def test_arguments_with_a_default_are_the_callers_own():
    """`lambda batch=batch: ...` in a loop must not be handed the group."""
    model, seen = Regression(3), []

    def closure(batch=4, *rest, **more):
        seen.append(batch)
        return model(batch)

    Independent().step(closure, sgd(model.parameters()))
    assert seen == [4, 4, 4, 4]


def test_copies_of_the_optimiser_follow_its_settings_and_leave_it_alone():
    model = Regression(2)
    given = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    copy = clone_optimizer(given)
    assert type(copy) is torch.optim.AdamW
    assert copy.param_groups[0]["weight_decay"] == 0.25
    assert copy.param_groups[0]["params"] == given.param_groups[0]["params"]
    method = Independent("individual")
    method.step(lambda: model(0), given)
    assert not given.state  # it is the pattern alone
    before = [p.detach().clone() for p in model.parameters()]
    given.param_groups[0]["lr"] = 0.0  # as a scheduler would
    method.step(lambda: model(1), given)
    for p, q in zip(model.parameters(), before, strict=True):
        close(p.detach(), q, atol=0)


@pytest.mark.parametrize("optimizers", ["shared", "individual"])
@pytest.mark.parametrize("regroup", ["once", "epoch"])
def test_checkpoint_restores_groups_and_every_optimiser(optimizers, regroup):
    settings = {"optimizers": optimizers, "group_size": 2, "regroup": regroup, "seed": 3}

    def steps(model, method, opt, numbers):
        for i in numbers:
            if i in (3, 7):
                method.next_epoch()
            method.step(lambda i=i: model(i), opt)

    def fresh():
        model = Regression(5)
        return model, Independent(**settings), torch.optim.Adam(model.parameters(), lr=0.01)

    whole = fresh()
    steps(*whole, range(10))
    first = fresh()
    steps(*first, range(5))
    saved = through_file([part.state_dict() for part in first])
    second = fresh()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    steps(*second, range(5, 10))
    assert_equal_state(second[0].state_dict(), whole[0].state_dict())
    assert_equal_state(second[1].state_dict(), whole[1].state_dict())


def test_each_head_is_stepped_by_its_own_group_alone():
    """Weight decay acts once per batch on a head, not once per group."""
    model = Regression(3)
    opt = sgd(model.parameters(), lr=0.1, weight_decay=0.1)
    twin = Regression(3)
    Independent().step(lambda: model(0), opt)
    # The same by hand: theta decays three times, a head once.
    decays = {id(p): 0 for p in twin.parameters()}
    for k in range(3):
        twin.zero_grad(set_to_none=True)
        twin.losses_from(twin.features(0), 0)[k].backward()
        with torch.no_grad():
            for p in twin.parameters():
                if p.grad is not None:
                    p -= 0.1 * (p.grad + 0.1 * p)
                    decays[id(p)] += 1
    assert {decays[id(p)] for p in twin.tasks.parameters()} == {1}
    assert {decays[id(p)] for p in twin.trunk.parameters()} == {3}
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach(), atol=1e-12)


def test_what_a_schedule_cannot_do_is_an_error():
    method, model = Independent(), Regression(3)
    with pytest.raises(RuntimeError, match=r"call step\(closure, optimizer\)"):
        method.backward(model(0))
    with pytest.raises(TypeError, match="no single direction"):
        method.direction(torch.ones(2, 2))
    with pytest.raises(TypeError, match="no weights"):
        method.weights(torch.ones(2))
    Independent(group_size=None).backward(model(0))
    twin = Regression(3)
    twin(0).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"optimizers": "own"}, {"group_size": 0}, {"group_size": 1.5}, {"regroup": "batch"}],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="independent: expected"):
        Independent(**settings)


def test_a_bad_loss_stops_its_own_group_before_the_step():
    model, method = Regression(3), Independent()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    method.step(lambda: model(0), opt)
    head = [p.detach().clone() for p in model.tasks[1].parameters()]

    def closure():
        losses = model.losses_from(model.features(1), 1)
        losses[1] = losses[1] * torch.nan
        return losses

    with pytest.raises(FloatingPointError, match=r"independent: .* task 1; this group's step"):
        method.step(closure, opt)
    for p, q in zip(model.tasks[1].parameters(), head, strict=True):
        close(p.detach(), q, atol=0)
    assert all(p.isfinite().all() for p in model.parameters())
