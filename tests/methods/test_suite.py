"""The policies that every method keeps, checked for every method of `available()`.

A method that is added to the registry is tested here without a further line: by its class
attributes (family, sees, n_tasks, properties, feature_level, syncs) and its default settings.
``pytest tests/methods/test_suite.py --matrix`` prints which method passed which policy.
"""

from __future__ import annotations

import ast
import copy
import gc
import inspect
import sys
from collections.abc import Sequence

import pytest
import torch
from helpers import (
    BadGradient,
    Linear,
    Regression,
    assert_equal_state,
    degenerate,
    gaussian,
    orthogonal,
    pretend_accelerator,
    relative_error,
    seeds,
    sgd,
    through_file,
    with_condition,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl_tutorial import methods
from mtl_tutorial.methods import CLASSES, available, create

K, P = 3, 7

METHOD_FILES = {cls.__module__.rpartition(".")[2] for cls in CLASSES.values()}

every = pytest.mark.parametrize("name", available())
few = settings(max_examples=4)


def tasks_of(name: str) -> int:
    """Number of tasks to try the method with."""
    return CLASSES[name].n_tasks or K


def is_schedule(name: str) -> bool:
    """Several optimiser steps per batch: no direction, no backward, only `step`."""
    return CLASSES[name].family == "schedule"


def sees_losses_alone(name: str) -> bool:
    return CLASSES[name].sees == "losses" and not is_schedule(name)


def needs_direction(name: str) -> None:
    if is_schedule(name):
        pytest.skip("a schedule has no direction")


def declares(name: str, what: str) -> None:
    needs_direction(name)
    if what not in CLASSES[name].properties:
        pytest.skip(f"does not declare {what}")


def jacobian(name: str, seed: int, condition: float = 5.0) -> Tensor:
    return with_condition(tasks_of(name), P, condition, seed)


def some_losses(k: int, call: int = 0) -> Tensor:
    """Positive, distinct, and changing from call to call."""
    return torch.linspace(1, 2, k, dtype=torch.float64) / (1 + 0.3 * call)


def directions(
    name: str, jacobians: Sequence[Tensor], losses: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Directions of consecutive calls of one fresh method."""
    method = create(name)
    if losses is None:
        losses = [some_losses(len(j), i) for i, j in enumerate(jacobians)]
    return [method.direction(j, losses=x) for j, x in zip(jacobians, losses, strict=True)]


def heads_of(model: Regression) -> list[list[Tensor]]:
    return [list(head.parameters()) for head in model.tasks]


def losses_of(model, batch, *, features=None, spoil=None, **bad):
    """Losses of a `Regression`; `spoil`, `bad_paths` and `bad_heads` make some of them bad."""
    features = model.features(batch) if features is None else features
    losses = model.losses_from(features, batch, **bad)
    return losses if spoil is None else spoil(losses)


def one_step(method, model, optimizer, batch, *, scaler=None, **faults):
    """A step on a `Regression`; `faults` as in `losses_of`."""

    def closure():
        return losses_of(model, batch, **faults)

    return method.step(
        closure,
        optimizer,
        shared=list(model.trunk.parameters()),
        heads=heads_of(model),
        scaler=scaler,
    )


def snapshot(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ------------------------------------------------------------------------- what it says of itself


@every
def test_class_attributes_are_filled(name):
    cls = CLASSES[name]
    assert cls.name == name
    for attribute in ("title", "paper", "passes", "memory", "state"):
        assert getattr(cls, attribute), attribute
    assert 1990 <= cls.year <= 2030
    assert cls.family in {"loss", "gradient", "schedule"}
    assert cls.sees in {"losses", "gram", "rows"}
    assert cls.properties <= {"scale", "permutation", "rotation"}
    assert isinstance(cls.syncs, bool)
    assert isinstance(cls.feature_level, bool)
    assert cls.n_tasks is None or cls.n_tasks >= 1


@every
def test_docstring_explains_every_setting(name):
    cls = CLASSES[name]
    settings_ = inspect.signature(cls).parameters
    assert cls.__doc__ and cls.__doc__ != cls.__base__.__doc__
    assert not settings_ or "Args:" in cls.__doc__
    assert [s for s in settings_ if s not in cls.__doc__] == []
    assert sys.modules[cls.__module__].__doc__


@every
def test_settings_round_trip(name):
    method = create(name)
    twin = create(name, **method.settings)
    assert twin.settings == method.settings
    assert set(method.settings) == set(inspect.signature(CLASSES[name]).parameters)
    namespace = {cls.__name__: cls for cls in CLASSES.values()}
    again = eval(repr(method), namespace)
    assert type(again) is CLASSES[name]
    assert again.settings == method.settings


@every
def test_unknown_settings_are_refused(name):
    with pytest.raises(TypeError, match=f"method '{name}' has no setting 'no_such_setting'"):
        create(name, no_such_setting=1)


@every
def test_a_method_file_can_be_copied(name):
    """It needs torch, the engine, at most the solvers and one other method's file."""
    tree = ast.parse(inspect.getsource(sys.modules[CLASSES[name].__module__]))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        "." * node.level + (node.module or "")
        for node in imports
        if isinstance(node, ast.ImportFrom)
    } | {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    inside = {module for module in modules if module.startswith(".")}
    outside = {module.split(".")[0] for module in modules - inside}
    assert outside - set(sys.stdlib_module_names) <= {"torch"}
    inside -= {"..gradients", "..solvers", "..device_solvers"}  # the last where it is there
    assert inside <= {f".{m}" for m in METHOD_FILES}
    assert len(inside) <= 1


# ------------------------------------------------------------------------------- degenerate inputs


@pytest.mark.parametrize("case", list(degenerate()))
@every
def test_degenerate_inputs_have_a_finite_answer(name, case):
    j = degenerate()[case]
    fixed = CLASSES[name].n_tasks
    if fixed is not None:
        if len(j) < fixed:
            pytest.skip(f"takes {fixed} tasks")
        j = j[:fixed]
    model, method = Linear(j), create(name)
    optimizer = sgd(model.parameters(), lr=0.0)  # the losses stay linear, positive, the same
    shared, heads = model.shared, model.heads
    if is_schedule(name):
        optimizer = sgd(model.parameters(), lr=1e-9)
    expected = None
    if not is_schedule(name):
        expected = directions(name, [j] * 3, [model.offsets] * 3)
    for call in range(3):
        info = method.step(model, optimizer, shared=shared, heads=heads)
        assert info.finite
        assert all(p.isfinite().all() for p in model.parameters())
        if expected is None:
            continue
        d = expected[call]
        assert d.shape == (j.shape[1],)
        assert d.dtype == j.dtype
        assert d.isfinite().all()
        # What backward writes is what the rule alone says.
        torch.testing.assert_close(model.theta.grad, d, rtol=1e-9, atol=1e-12)
        # A method that takes the tasks in turns leaves the other heads without a gradient.
        assert all(p.grad is None or p.grad.isfinite() for p in model.phi)
        if not j.any():
            assert not d.any()  # no step without a gradient
        if info.weights is not None:
            assert info.weights.shape == (len(j),)
            assert info.weights.isfinite().all()


# -------------------------------------------------------------------------------- non-finite input

FAULTS = {
    "loss_nan": lambda loss: loss * torch.nan,
    "loss_inf": lambda loss: loss * torch.inf,
    "gradient": BadGradient.apply,
    "shared_gradient": None,
    "head_gradient": None,
}


def faulty(fault, tasks):
    """Keyword arguments of `losses_of` that make these tasks bad."""
    if fault == "shared_gradient":  # the heads' gradients are fine
        return {"bad_paths": tasks}
    if fault == "head_gradient":  # the shared parameters' gradients are fine
        return {"bad_heads": tasks}
    change = FAULTS[fault]
    return {"spoil": lambda losses: [change(x) if k in tasks else x for k, x in enumerate(losses)]}


def left_to_the_optimiser(name, fault):
    if fault.endswith("gradient") and sees_losses_alone(name):
        pytest.skip("looks at losses alone: gradients are as after losses.sum().backward()")


@pytest.mark.parametrize("fault", list(FAULTS))
@every
def test_non_finite_input_is_an_error_that_names_the_task(name, fault):
    """State and .grad are what they were, so the next good batch goes on from there."""
    left_to_the_optimiser(name, fault)
    k = tasks_of(name)
    model, method = Regression(k), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    for batch in range(k + 1):  # now a method that takes the tasks in turns has come to task 1
        one_step(method, model, optimizer, batch)
    state = copy.deepcopy(method.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = snapshot(model.trunk)
    # The gradient of a sum of losses tells no task: a joint step names all that it sums.
    joined = name == "joint" and fault.endswith("gradient")
    message = rf"(?s){name}.*task 0, 1, 2\b" if joined else rf"(?s){name}.*task 1\b"
    with pytest.raises(FloatingPointError, match=message):
        if is_schedule(name):
            one_step(method, model, optimizer, 7, **faulty(fault, [1]))
        else:
            losses = losses_of(model, 7, **faulty(fault, [1]))
            method.backward(losses, shared=model.trunk.parameters(), heads=heads_of(model))
    assert_equal_state(method.state_dict(), state)
    if not is_schedule(name):
        assert all((p.grad == 7).all() for p in model.parameters())
        for p, q in zip(model.trunk.parameters(), before, strict=True):
            assert torch.equal(p, q)
    assert all(p.isfinite().all() for p in model.parameters())
    one_step(method, model, optimizer, 8)
    assert all(p.isfinite().all() for p in model.parameters())


@every
def test_non_finite_gradient_behind_the_features_is_an_error(name):
    """There the tasks are one sum, so all of the batch are named; nothing has changed."""
    if not CLASSES[name].feature_level or CLASSES[name].sees == "losses":
        pytest.skip("does not look at features")
    model, method = Regression(tasks_of(name)), create(name)
    shared = list(model.trunk.parameters())

    def backward(batch, bad):
        z = model.features(batch)
        z = BadGradient.apply(z) if bad else z
        losses = losses_of(model, batch, features=z)
        return method.backward(losses, shared=shared, heads=heads_of(model), features=z)

    backward(0, bad=False)
    named = ", ".join(map(str, range(tasks_of(name))))
    state = copy.deepcopy(method.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    with pytest.raises(FloatingPointError, match=f"{name}: .* task {named}; .*not taken"):
        backward(1, bad=True)
    assert_equal_state(method.state_dict(), state)
    assert all((p.grad == 7).all() for p in model.parameters())
    model.zero_grad()
    assert backward(2, bad=False).finite
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every
def test_non_finite_jacobian_is_an_error(name):
    needs_direction(name)
    method, j = create(name), jacobian(name, 0)
    method.direction(j, losses=some_losses(len(j)))
    state = copy.deepcopy(method.state_dict())
    bad_losses = some_losses(len(j))
    if sees_losses_alone(name):
        bad_losses[1] = torch.nan
    else:
        j[1, 2] = torch.inf
    with pytest.raises(FloatingPointError, match=rf"{name}: .*task 1\b"):
        method.direction(j, losses=bad_losses)
    assert_equal_state(method.state_dict(), state)


# ------------------------------------------------------------------------------ gradient scaler


@pytest.mark.parametrize("fault", list(FAULTS))
@every
def test_scaler_skips_a_non_finite_step(name, fault):
    """Parameters and state unchanged, scale halved, no exception; then training goes on."""
    k = tasks_of(name)
    model, method = Regression(k), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in range(k + 1):  # as above
        assert one_step(method, model, optimizer, batch, scaler=scaler).finite
    before, state = snapshot(model), copy.deepcopy(method.state_dict())
    # A schedule steps once per group, so a fault in one task would skip that group's step alone.
    tasks = range(k) if is_schedule(name) else [1]
    info = one_step(method, model, optimizer, 7, scaler=scaler, **faulty(fault, tasks))
    assert not info.finite
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert_equal_state(method.state_dict(), state)
    scale = scaler.get_scale()
    assert scale == 512.0 if not is_schedule(name) else scale in (512.0, 1024.0 / 2**k)
    assert one_step(method, model, optimizer, 8, scaler=scaler).finite
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@every
def test_scaler_leaves_the_update_the_same(name):
    """Scale 1, scale 65536 and no scaler."""
    results, weights = [], []
    for scale in (None, 1.0, 65536.0):
        model, method = Regression(tasks_of(name)), create(name)
        optimizer = sgd(model.parameters(), lr=0.05, momentum=0.9)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        for batch in range(4):
            info = one_step(method, model, optimizer, batch, scaler=scaler)
        results.append(torch.cat([p.flatten() for p in snapshot(model)]))
        weights.append(info.weights)
    for other, w in zip(results[1:], weights[1:], strict=True):
        assert relative_error(other, results[0]) < 1e-9
        assert (w is None) == (weights[0] is None)
        if w is not None:
            assert relative_error(w, weights[0]) < 1e-7


# --------------------------------------------------------------------------------- equivariances


@pytest.mark.parametrize("c", [1e-6, 1e6])
@given(seed=seeds)
@few
@every
def test_scale_equivariance(name, c, seed):
    """d(c J) = c d(J)."""
    declares(name, "scale")
    sequence = [jacobian(name, seed + i) for i in range(3)]
    plain = directions(name, sequence)
    scaled = directions(name, [c * j for j in sequence])
    for a, b in zip(plain, scaled, strict=True):
        assert relative_error(b / c, a) < 1e-9


@given(seed=seeds)
@few
@every
def test_permutation_equivariance(name, seed):
    """The order of the tasks does not matter."""
    declares(name, "permutation")
    k = tasks_of(name)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    sequence = [jacobian(name, seed + i) for i in range(3)]
    losses = [some_losses(k, i) for i in range(3)]
    plain = directions(name, sequence, losses)
    permuted = directions(name, [j[order] for j in sequence], [x[order] for x in losses])
    for a, b in zip(plain, permuted, strict=True):
        assert relative_error(b, a) < 1e-7


@given(seed=seeds)
@few
@every
def test_rotation_equivariance(name, seed):
    """d(J Q) = d(J) Q for orthogonal Q."""
    declares(name, "rotation")
    q = orthogonal(P, seed + 100)
    sequence = [jacobian(name, seed + i) for i in range(3)]
    plain = directions(name, sequence)
    rotated = directions(name, [j @ q for j in sequence])
    for a, b in zip(plain, rotated, strict=True):
        assert relative_error(b, a @ q) < 1e-7


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@given(seed=seeds)
@few
@every
def test_half_precision_is_close_to_float64(name, dtype, seed):
    """On the same rounded Jacobian; only the rule's own arithmetic may differ."""
    needs_direction(name)
    sequence = [jacobian(name, seed + i).to(dtype) for i in range(3)]
    found = directions(name, sequence)
    exact = directions(name, [j.double() for j in sequence])
    for d, e in zip(found, exact, strict=True):
        assert d.dtype == dtype
        assert d.isfinite().all()
        assert relative_error(d, e) < 2e-2


@given(seed=seeds, condition=st.floats(1.5, 30))
@few
@every
def test_float32_is_close_to_float64(name, seed, condition):
    """A Gram matrix squares the condition number, so 1e-4 is what float32 leaves at thirty.

    Not from condition number one on: equal norms are a kink of the rules that compare them.
    """
    needs_direction(name)
    sequence = [jacobian(name, seed + i, condition).float() for i in range(3)]
    found = directions(name, sequence)
    exact = directions(name, [j.double() for j in sequence])
    for d, e in zip(found, exact, strict=True):
        assert d.dtype == torch.float32
        assert relative_error(d, e) < 1e-4


# ------------------------------------------------------------------------------------ checkpoints


@every
def test_checkpoint_continues_exactly(name):
    """Five steps, save, load into fresh objects, five more: equal to ten, bit for bit."""

    def fresh():
        model = Regression(tasks_of(name))
        return model, create(name), sgd(model.parameters(), lr=0.01, momentum=0.9)

    def run(parts, batches):
        model, method, optimizer = parts
        for batch in batches:
            one_step(method, model, optimizer, batch)
            if batch in (2, 6):
                method.next_epoch()

    whole = fresh()
    run(whole, range(10))
    first = fresh()
    run(first, range(5))
    saved = through_file([part.state_dict() for part in first])
    second = fresh()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    assert_equal_state(second[1].state_dict(), first[1].state_dict())
    run(second, range(5, 10))
    for found, expected in zip(second, whole, strict=True):
        assert_equal_state(found.state_dict(), expected.state_dict())


@every
def test_state_dict_is_a_copy(name):
    """A state that was taken does not change with the steps that follow."""
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01, momentum=0.9)
    one_step(method, model, optimizer, 0)
    taken = method.state_dict()
    kept = copy.deepcopy(taken)
    for batch in range(1, 4):
        one_step(method, model, optimizer, batch)
    assert_equal_state(taken, kept)


@every
def test_state_of_another_method_is_refused(name):
    with pytest.raises(ValueError, match="expected a state of"):
        create(name).load_state_dict({"method": "no_such_method", "state": {}})


@every
def test_randomness_is_the_methods_own(name):
    """The global generator is neither used nor moved, and a fresh object repeats the run."""
    results = []
    for seed in (1, 2):
        model, method = Regression(tasks_of(name)), create(name)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer = sgd(model.parameters(), lr=0.01)
        for batch in range(3):
            one_step(method, model, optimizer, batch)
        assert torch.equal(before, torch.get_rng_state())
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------ parameters that are not like others


class Partly(nn.Module):
    """Linear losses of a (all tasks), b (the first two tasks), a frozen and an unused parameter."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.rows_a, self.rows_b = gaussian(k, 4, 1), gaussian(k, 3, 2)
        self.rows_a[:, 0].abs_()  # moved by rules, too, that move only where all signs agree
        self.rows_b[2:] = 0
        self.a = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.head = nn.ParameterList(
            nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(k)
        )

    def forward(self):
        losses = []
        for i, (x, y) in enumerate(zip(self.rows_a, self.rows_b, strict=True)):
            loss = x @ self.a + self.head[i] + self.frozen.sum() + i
            losses.append(loss + y @ self.b if i < 2 else loss)
        return losses

    @property
    def jacobian(self) -> Tensor:
        k = len(self.rows_a)
        return torch.cat([self.rows_a, self.rows_b, torch.zeros(k, 2, dtype=torch.float64)], 1)


@every
def test_frozen_unused_and_partly_shared_parameters(name):
    k = tasks_of(name)
    model, method = Partly(k), create(name)
    optimizer = sgd(model.parameters(), lr=1e-3, weight_decay=0.1)
    shared = [model.a, model.b, model.frozen, model.unused]
    heads = [[p] for p in model.head]
    if not is_schedule(name):
        losses = model()
        create(name).backward(losses, shared=shared, heads=heads)
        (d,) = directions(name, [model.jacobian], [torch.stack(losses).detach()])
        torch.testing.assert_close(model.a.grad, d[:4], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model.b.grad, d[4:7], rtol=1e-9, atol=1e-12)
        assert model.frozen.grad is None
        assert model.unused.grad is None
    for _ in range(k):  # a method that takes the tasks in turns moves at the last
        method.step(model, optimizer, shared=shared, heads=heads)
    assert model.frozen.grad is None
    assert torch.equal(model.unused, torch.ones(2).double())  # not even decayed
    assert model.a.abs().sum() > 0
    assert all(p.isfinite().all() for p in model.parameters())


@every
def test_parameters_are_found_without_being_told(name):
    """Without `shared` and `heads`: the same step."""
    results = []
    for told in (True, False):
        model, method = Regression(tasks_of(name)), create(name)
        optimizer = sgd(model.parameters(), lr=0.01)
        for batch in range(3):

            def closure(model=model, batch=batch):
                return model(batch)

            given_ = {"shared": list(model.trunk.parameters()), "heads": heads_of(model)}
            method.step(closure, optimizer, **(given_ if told else {}))
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-9


# ---------------------------------------------------------------------------------- absent tasks


def absent(task):
    return lambda losses: [x.detach() if i == task else x for i, x in enumerate(losses)]


def entries_of(state, task, k):
    """What a state holds of one task, and the number of that task's steps."""
    return {
        key: value[task].clone()
        for key, value in state["state"].items()
        if value.dim() >= 1 and value.shape[0] == k
    }


@every
def test_absent_task_has_weight_zero_and_keeps_its_state(name):
    k = tasks_of(name)
    model, method = Regression(k), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    for batch in range(3):
        one_step(method, model, optimizer, batch)
    before = entries_of(method.state_dict(), 1, k)
    head = snapshot(model.tasks[1])
    info = one_step(method, model, optimizer, 3, spoil=absent(1))
    if info.weights is not None:
        assert info.weights[1] == 0
        assert info.weights.shape == (k,)
    if not is_schedule(name):  # a schedule's projection or groups may move what it shares
        assert_equal_state(entries_of(method.state_dict(), 1, k), before)
    for p, q in zip(model.tasks[1].parameters(), head, strict=True):
        assert torch.equal(p, q)
    assert all(p.isfinite().all() for p in model.parameters())
    assert one_step(method, model, optimizer, 4).finite  # and it may come back


@every
def test_tasks_may_be_absent_from_the_first_step_on(name):
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    for batch in range(2):
        assert one_step(method, model, optimizer, batch, spoil=absent(0)).finite
    assert one_step(method, model, optimizer, 2).finite
    assert all(p.isfinite().all() for p in model.parameters())


@every
def test_other_tasks_are_solved_as_if_alone(name):
    needs_direction(name)
    method = create(name)
    if CLASSES[name].n_tasks is not None:
        pytest.skip(f"takes {CLASSES[name].n_tasks} tasks")
    model = Linear(gaussian(4, P, 0))
    rest = [0, 2, 3]
    method.backward(absent(1)(model()), shared=model.shared, heads=model.heads)
    if method.state_dict()["state"] or "generator" in method.state_dict():
        pytest.skip("has state: its answer depends on more than this batch")
    (alone,) = directions(name, [model.jacobian[rest]], [model.offsets[rest]])
    torch.testing.assert_close(model.theta.grad, alone, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------- accumulation, features


@every
def test_gradients_accumulate(name):
    """Two backward calls add their steps in .grad."""
    needs_direction(name)
    model, method = Linear(jacobian(name, 0)), create(name)
    for _ in range(2):
        method.backward(model(), shared=model.shared, heads=model.heads)
    d = sum(directions(name, [model.jacobian] * 2, [model.offsets] * 2))
    torch.testing.assert_close(model.theta.grad, d, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bijection", ["identity", "rotation"])
@every
def test_feature_level_agrees_where_features_are_the_parameters(name, bijection):
    """z = theta gives the very step; z = theta Q the same step where rotations do not matter."""
    needs_direction(name)
    j = jacobian(name, 0)
    if not CLASSES[name].feature_level:
        model = Linear(j)
        z = model.theta * 1.0
        with pytest.raises(ValueError, match=f"{name}: expected no features"):
            create(name).backward(model(z), shared=model.shared, features=z)
        assert model.theta.grad is None
        return
    if bijection == "rotation" and "rotation" not in CLASSES[name].properties:
        pytest.skip("does not declare rotation")
    q = orthogonal(P, 5) if bijection == "rotation" else torch.eye(P, dtype=torch.float64)
    plain, feature = Linear(j @ q.T), Linear(j)
    a, b = create(name), create(name)
    for _ in range(2):
        plain.zero_grad(set_to_none=True)
        feature.zero_grad(set_to_none=True)
        a.backward(plain(), shared=plain.shared, heads=plain.heads)
        z = feature.theta @ q * 1.0
        b.backward(feature(z), shared=feature.shared, heads=feature.heads, features=z)
        assert relative_error(feature.theta.grad, plain.theta.grad) < 1e-7
        for p, r in zip(feature.phi, plain.phi, strict=True):
            assert relative_error(p.grad, r.grad) < 1e-7


# --------------------------------------------------------------------------------- memory, syncs


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


@every
def test_nothing_grows_from_step_to_step(name):
    """Over 1,000 steps: one tensor kept per step would show as nine hundred."""
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=1e-4)
    gc.freeze()  # look at what is made from here on alone: the rest of the process is large
    try:
        counts = []
        for start, stop in ((0, 100), (100, 1000)):
            for batch in range(start, stop):
                one_step(method, model, optimizer, batch)
                if batch % 50 == 49:
                    method.next_epoch()
            counts.append(live_tensors())
    finally:
        gc.unfreeze()
    assert counts[1] - counts[0] <= 5


@every
def test_results_and_state_hold_no_graph(name):
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    info = one_step(method, model, optimizer, 0)
    tensors = [info.losses, info.finite, *method.state_dict()["state"].values()]
    tensors += [x for x in (info.weights, info.gram) if x is not None]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    assert not any(t.requires_grad for t in tensors)


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy")
CPU_ONLY = {
    "_solve",
    "_keep",
    "_remember",
    "_group_backward",
}  # their finite checks, which ask for the device first


@pytest.mark.parametrize("present", ["all", "one_absent"])
@every
def test_values_are_not_read_on_the_host(monkeypatch, name, present):
    """Each read would stall an accelerator; a method whose rule needs one declares `syncs`."""
    if CLASSES[name].syncs:
        pytest.skip("declares syncs")
    model, method = Regression(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    pretend_accelerator(monkeypatch)
    one_step(method, model, optimizer, 0)
    calls = []

    def patch(read):
        original = getattr(Tensor, read)

        def wrapper(self, *args, **kwargs):
            calls.append((read, sys._getframe(1).f_code.co_name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, read, wrapper)

    for read in READS:
        patch(read)
    spoil = absent(0) if present == "one_absent" else None
    for batch in range(1, 4):
        one_step(method, model, optimizer, batch, spoil=spoil)
    monkeypatch.undo()
    assert {(read, caller) for read, caller in calls if caller not in CPU_ONLY} == set()


# -------------------------------------------------------------------------------------- on a GPU

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(k: int) -> Regression:
    model = Regression(k, dtype=torch.float32).cuda()
    model.inputs = [x.cuda() for x in model.inputs]
    model.targets = [y.cuda() for y in model.targets]
    return model


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("present", ["all", "one_absent"])
@every
def test_gpu_no_step_waits_for_the_device(name, present):
    if CLASSES[name].syncs:
        pytest.skip("declares syncs")
    model, method = on_device(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    spoil = absent(0) if present == "one_absent" else None
    for batch in range(3):
        one_step(method, model, optimizer, batch, spoil=spoil)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in range(3, 5):
            one_step(method, model, optimizer, batch, spoil=spoil)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@every
def test_gpu_takes_the_steps_of_the_cpu(name):
    models = [Regression(tasks_of(name), dtype=torch.float32), on_device(tasks_of(name))]
    for model in models:
        method, optimizer = create(name), sgd(model.parameters(), lr=0.01)
        for batch in range(5):
            one_step(method, model, optimizer, batch)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert relative_error(q.detach().cpu(), p.detach()) < 1e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("fault", list(FAULTS))
@every
def test_gpu_non_finite_step_is_skipped_and_reported_later(name, fault):
    left_to_the_optimiser(name, fault)
    if is_schedule(name):
        pytest.skip("a schedule has taken earlier steps of the batch by then")
    model, method = on_device(tasks_of(name)), create(name)
    optimizer = sgd(model.parameters(), lr=0.01)
    for batch in range(2):
        one_step(method, model, optimizer, batch)
    before, state = snapshot(model), copy.deepcopy(method.state_dict())
    losses = losses_of(model, 2, **faulty(fault, [1]))
    optimizer.zero_grad()
    method.backward(losses, shared=model.trunk.parameters(), heads=heads_of(model))
    optimizer.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert_equal_state(method.state_dict(), state)
    torch.cuda.synchronize()
    with pytest.raises(FloatingPointError, match=rf"{name}: .*task 1\b.*earlier step"):
        one_step(method, model, optimizer, 3)


def test_the_suite_covers_the_package():
    assert set(available()) == set(CLASSES)
    assert len(available()) >= 7
    assert methods.available is available
