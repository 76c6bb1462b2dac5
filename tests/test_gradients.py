"""The engine: rows, Gram matrices, heads, features and errors, against independent computations."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from helpers import BadGradient, Linear, Regression, close, gaussian, relative_error, sgd
from torch import Tensor, nn

from mtl_tutorial.gradients import (
    LossGraph,
    Method,
    View,
    add_gradient,
    all_finite,
    gram_matrix,
    split_closure_output,
    task_gradients,
)
from mtl_tutorial.methods import IMTLG, AlignedMTL, Equal, ExcessMTL, create


def reference_jacobian(make_losses, parameters) -> Tensor:
    """Jacobian by torch's functional API: nothing in common with the engine but autograd itself."""
    names = [f"p{i}" for i in range(len(parameters))]
    values = tuple(p.detach().clone() for p in parameters)

    def function(*given):
        return make_losses(dict(zip(names, given, strict=True)))

    parts = torch.autograd.functional.jacobian(function, values)
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)


# ------------------------------------------------------------------------------- task_gradients


def zoo():
    """Name, parameters, and a function from a dict of tensors (p0, p1, ...) to losses (K,)."""
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    x, y = draw(7, 3), draw(3, 7, 2)

    def linear(p):
        out = x @ p["p0"].T + p["p1"]
        return torch.stack([((out - target) ** 2).mean() for target in y])

    image = draw(4, 2, 5, 5)

    def conv(p):
        h = nn.functional.conv2d(image, p["p0"])
        h = nn.functional.batch_norm(h, None, None, p["p1"], p["p2"], training=True)
        return torch.stack([(h**2 * (k + 1)).tanh().mean() for k in range(3)])

    words = torch.tensor([[0, 1, 1], [3, 4, 0]])

    def embedding(p):
        h = nn.functional.embedding(words, p["p0"]).mean(1)
        return torch.stack([(h @ p["p1"]).exp().mean(), h.sin().sum()])

    def used_twice(p):
        h = torch.tanh(x @ p["p0"]) @ p["p0"]
        return torch.stack([h.square().mean(), h.cos().sum(), (x @ p["p0"]).sum()])

    return {
        "linear": ([draw(2, 3), draw(2)], linear),
        "conv_batchnorm": ([draw(3, 2, 3, 3), draw(3).abs(), draw(3)], conv),
        "embedding": ([draw(5, 4), draw(4)], embedding),
        "weight_used_twice": ([draw(3, 3)], used_twice),
    }


@pytest.mark.parametrize("name", list(zoo()))
def test_task_gradients_equal_the_jacobian_of_torch(name):
    parameters, losses = zoo()[name]
    leaves = [p.clone().requires_grad_() for p in parameters]
    rows = task_gradients(losses({f"p{i}": p for i, p in enumerate(leaves)}), leaves)
    close(rows, reference_jacobian(losses, parameters), atol=1e-12)
    assert not rows.requires_grad
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("form", ["list", "tuple", "stack", "cat", "vector", "one_element"])
def test_losses_may_come_in_any_form(form):
    parameters, function = zoo()["linear"]
    leaves = [p.clone().requires_grad_() for p in parameters]
    values = function({"p0": leaves[0], "p1": leaves[1]})
    parts = [value * 1.0 for value in values]
    losses = {
        "list": parts,
        "tuple": tuple(parts),
        "stack": torch.stack(parts),
        "cat": torch.cat([p[None] for p in parts]),
        "vector": values * 1.0,
        "one_element": [p.reshape(1, 1) for p in parts],
    }[form]
    expected = reference_jacobian(function, parameters)
    close(task_gradients(losses, leaves), expected, atol=1e-12)


def test_task_gradients_keep_the_graph_and_leave_frozen_parameters_out():
    w, frozen = torch.ones(2, requires_grad=True), torch.ones(3)
    losses = torch.stack([w.sum(), (w * 2).sum() + frozen.sum()])
    first = task_gradients(losses, [w, frozen])
    close(first, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    close(task_gradients(losses, iter([w])), first)  # graph still there


def test_rows_of_unused_parameters_and_absent_tasks_are_zero():
    w, other = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    rows = task_gradients([w.sum(), torch.tensor(3.0), other.sum()], [w, other])
    close(rows, torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))


def test_rows_of_mixed_dtypes_are_promoted():
    a = torch.ones(2, requires_grad=True)
    b = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    rows = task_gradients([a.sum(), b.sum().float()], [b, a])
    assert rows.dtype == torch.float32
    close(rows, torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))


# --------------------------------------------------------------------------------------- gram


@pytest.mark.parametrize("p", [1, 5, 1023, 1024, 1025, 4096, 3_000_000])
def test_gram_matrix_keeps_seven_digits_in_float32(p):
    """Summation over blocks in float64: no digit is lost to the length of the rows."""
    rows = torch.randn(3, p, generator=torch.Generator().manual_seed(1)) + 0.5
    gram = gram_matrix(rows)
    exact = rows.double() @ rows.double().T
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert ((gram - exact).abs() / exact.abs()).max() < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_matrix_of_half_precision_does_not_overflow_or_round(dtype):
    """300 * 300 is no float16; a long sum of bfloat16's few-bit products rounds to one side."""
    rows = (300 * torch.randn(3, 10_000, generator=torch.Generator().manual_seed(1))).to(dtype)
    exact = rows.double() @ rows.double().T
    assert relative_error(gram_matrix(rows), exact) < 3e-7


def test_gram_matrix_of_float64_is_exact_and_small_shapes_work():
    rows = gaussian(4, 9, 0)
    close(gram_matrix(rows), rows @ rows.T, atol=0)
    assert gram_matrix(torch.ones(1, 1)).shape == (1, 1)
    close(gram_matrix(torch.zeros(2, 0)), torch.zeros(2, 2))


@pytest.mark.parametrize("level", ["parameters", "features"])
def test_gram_matrix_is_not_computed_in_autocast_precision(level):
    """Under autocast `rows @ rows.T` would be done in bfloat16 and keep two digits."""
    torch.manual_seed(0)
    model = Regression(3, dtype=torch.float32)
    method = AlignedMTL()
    with torch.autocast("cpu", torch.bfloat16):
        z = model.features(0)
        losses = model.losses_from(z, 0)
        rows = task_gradients(losses, [z] if level == "features" else model.trunk.parameters())
        info = method.backward(
            losses, shared=model.trunk.parameters(), features=z if level == "features" else None
        )
    assert relative_error(info.gram, rows.double() @ rows.double().T) < 1e-6


# ---------------------------------------------------------------------- backward into .grad


@pytest.mark.parametrize(
    "method",
    [
        Equal("sum"),
        Equal("sum", head_gradients="raw"),
        ExcessMTL(step_size=0.0),  # uniform weights, through rows
    ],
    ids=["losses", "losses_raw_heads", "rows"],
)
def test_backward_adds_to_grad_as_torch_does(method):
    model, twin = Regression(3), Regression(3)
    scale = 1.0 if method.name == "equal" else 1 / 3
    for batch in range(3):  # not zeroed in between
        method.backward(model(batch), shared=model.trunk.parameters())
        (scale * twin(batch).sum()).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, atol=1e-12)


def test_rows_and_weighted_heads_give_torchs_gradient_of_the_weighted_sum():
    model, twin = Regression(3), Regression(3)
    method = IMTLG(head_gradients="weighted")
    info = method.backward(model(0), shared=model.trunk.parameters())
    (info.weights * twin(0)).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, atol=1e-12)


def test_raw_heads_receive_their_own_loss_gradient():
    model, twin = Regression(3), Regression(3)
    IMTLG().backward(model(0), shared=model.trunk.parameters())
    twin(0).sum().backward()
    for p, q in zip(model.tasks.parameters(), twin.tasks.parameters(), strict=True):
        close(p.grad, q.grad, atol=1e-12)


@pytest.mark.parametrize("name", ["equal", "imtl_l", "excess_mtl", "aligned_mtl", "imtl"])
@pytest.mark.parametrize("heads", ["raw", "weighted"])
def test_inferred_and_explicit_parameters_agree(name, heads):
    grads = []
    for explicit in ({}, {"shared"}, {"shared", "heads"}):
        model = Regression(3)
        choice = {}
        if "shared" in explicit:
            choice["shared"] = list(model.trunk.parameters())
        if "heads" in explicit:
            choice["heads"] = [list(head.parameters()) for head in model.tasks]
        method = create(name, head_gradients=heads)
        for batch in range(2):
            method.backward(model(batch), **choice)
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        for p, q in zip(grads[0], other, strict=True):
            close(p, q, atol=1e-12)


@pytest.mark.parametrize("method", [Equal(), ExcessMTL(), AlignedMTL()], ids=lambda m: m.name)
def test_frozen_and_unused_parameters_are_left_alone(method):
    model = Regression(2)
    model.trunk.bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    method.backward(model(0), shared=[model.trunk.bias, unused, model.trunk.weight])
    assert model.trunk.bias.grad is None
    assert unused.grad is None  # as after losses.sum().backward(): an optimiser skips it
    assert model.trunk.weight.grad.abs().sum() > 0


def test_a_parameter_shared_by_some_tasks_is_shared():
    """Tasks that do not use it have zeros in its columns."""
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    own = torch.ones(1, dtype=torch.float64, requires_grad=True)
    x = gaussian(3, 2, 0)
    losses = [x[0] @ a + x[0] @ b, x[1] @ a + 2 * x[1] @ b, x[2] @ a + own.sum()]
    graph = LossGraph(losses)
    graph.partition()
    assert {id(p) for p in graph.shared} == {id(a), id(b)}
    jacobian = torch.cat([x, torch.stack([x[0], 2 * x[1], 0 * x[2]])], 1)
    close(task_gradients(losses, [a, b]), jacobian)
    IMTLG().backward(losses)
    close(torch.cat([a.grad, b.grad]), IMTLG().direction(jacobian))
    close(own.grad, torch.ones(1))


def test_sharing_is_inferred_from_the_graph():
    model = Regression(3)
    graph = LossGraph(model.losses_from(model.features(0), 0))
    graph.partition()
    assert {id(p) for p in graph.shared} == {id(p) for p in model.trunk.parameters()}
    for found, head in zip(graph.heads, model.tasks, strict=True):
        assert {id(p) for p in found} == {id(p) for p in head.parameters()}


def test_with_one_task_every_leaf_is_shared():
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    graph = LossGraph([(a * b).sum()])
    graph.partition()
    assert {id(p) for p in graph.shared} == {id(a), id(b)}


def test_gradients_that_autograd_shares_between_parameters_are_not_aliased():
    """For a + b autograd hands one tensor to both; adding to one must not change the other."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    a, b = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    losses = [(w + a + b).sum(), w.sum() * 2]
    AlignedMTL().backward(losses, shared=[w])
    a.grad += 1
    close(b.grad, torch.ones(2))


def test_add_gradient_leaves_earlier_gradient_tensors_alone():
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = before = torch.ones(2)
    add_gradient([parameter], [torch.ones(2, dtype=torch.float64)])
    close(parameter.grad, torch.full((2,), 2.0))
    close(before, torch.ones(2))
    assert parameter.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["aligned_mtl", "imtl_g", "imtl"])
def test_feature_level_balances_on_the_flattened_representation(name):
    """Rows are dL_k/dz flattened over batch and features, then one pass through the trunk."""
    model = Regression(3)
    z = model.features(0)
    info = create(name).backward(
        model.losses_from(z, 0), shared=model.trunk.parameters(), features=z
    )
    # Independently: detached z, one autograd call per loss, weights by the pure rule.
    leaf = z.detach().requires_grad_()
    losses = model.losses_from(leaf, 0)
    rows = torch.stack([torch.autograd.grad(loss, leaf)[0].flatten() for loss in losses])
    assert rows.shape == (3, z.numel())
    weights = create(name).weights(rows @ rows.T, losses=torch.stack(losses).detach())
    close(info.weights, weights)
    close(info.gram, rows @ rows.T)
    again = model.features(0)
    expected = torch.autograd.grad(
        again, list(model.trunk.parameters()), (weights @ rows).view_as(again)
    )
    for p, q in zip(model.trunk.parameters(), expected, strict=True):
        close(p.grad, q, atol=1e-12)
    summed = rows.view(3, *z.shape).sum(1)  # the wrong form: it loses the batch
    assert relative_error(summed @ summed.T, info.gram) > 0.01


def test_feature_level_infers_trunk_and_heads():
    model, twin = Regression(3), Regression(3)
    z = model.features(0)
    AlignedMTL().backward(model.losses_from(z, 0), features=z)
    z = twin.features(0)
    AlignedMTL().backward(
        twin.losses_from(z, 0),
        shared=twin.trunk.parameters(),
        heads=[head.parameters() for head in twin.tasks],
        features=z,
    )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.grad, q.grad, atol=1e-12)


def test_feature_level_runs_the_trunk_once():
    model = Regression(3)
    passes = []
    z = model.features(0)
    z.grad_fn.register_prehook(lambda gradients: passes.append(1))
    AlignedMTL().backward(model.losses_from(z, 0), shared=model.trunk.parameters(), features=z)
    assert len(passes) == 1


# --------------------------------------------------------------------------------------- errors


def test_errors_say_what_was_expected():
    model = Regression(2)
    trunk = list(model.trunk.parameters())
    z = model.features(0)
    losses = model.losses_from(z, 0)
    method = AlignedMTL()

    def refused(message, *args, **kwargs):
        with pytest.raises(ValueError, match=message):
            method.backward(*args, **kwargs)

    refused(r"expected losses of shape \(K,\), got \(\)", losses[0])
    refused(r"got \(1, 2\)", torch.stack(losses)[None])
    refused(r"got \(0,\)", torch.zeros(0, requires_grad=True) * 1)
    refused("got an empty sequence", [])
    refused("something else for task 1", [losses[0], z])
    refused("something else for task 0", [1.0, losses[0]])
    refused("without a graph", [x.detach() for x in losses])
    refused("at least one shared parameter", losses, shared=[])
    generator = model.trunk.parameters()
    list(generator)
    refused("a generator can be used once only", losses, shared=generator)
    refused("at least one shared parameter", losses, shared=[torch.ones(1)])
    refused("heads for 2 tasks, got 1", losses, shared=trunk, heads=[[]])
    refused("got a leaf tensor", losses, shared=trunk, features=z.detach().requires_grad_())
    around = [losses[0], losses[1] + model.trunk.weight.sum()]
    refused("a shared parameter that a head uses as well", around, shared=trunk, features=z)
    with pytest.raises(ValueError, match="no feature level"):
        ExcessMTL().backward(losses, shared=trunk, features=z)
    assert all(p.grad is None for p in model.parameters())


def test_rules_refuse_wrong_shapes_and_missing_inputs():
    with pytest.raises(ValueError, match=r"aligned_mtl: expected gram of shape \(K, K\)"):
        AlignedMTL().weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected losses of shape"):
        Equal().weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected a floating-point Jacobian"):
        AlignedMTL().direction(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected a floating-point Jacobian"):
        AlignedMTL().direction(torch.ones(0, 3))
    with pytest.raises(TypeError, match="pass losses"):
        create("imtl_l").direction(torch.ones(2, 3))
    with pytest.raises(TypeError, match="pass a Jacobian or a Gram matrix"):
        _ = View(losses=torch.ones(2)).gram
    with pytest.raises(ValueError, match="'raw' or 'weighted'"):
        Method(head_gradients="none")
    with pytest.raises(ValueError, match="state of aligned_mtl"):
        AlignedMTL().load_state_dict(Equal().state_dict())


def test_closure_output_is_losses_or_losses_with_features():
    a, b, z = torch.ones(()), torch.ones(()), torch.ones(4, 2)
    losses = torch.ones(2)
    assert split_closure_output(losses) == (losses, None)
    assert split_closure_output((losses, z))[1] is z
    assert split_closure_output(([a, b], z))[1] is z
    assert split_closure_output((a, b)) == ((a, b), None)  # two losses, no features
    assert split_closure_output([a, b])[1] is None


# ------------------------------------------------------------------------------- absent tasks


@pytest.mark.parametrize("method", [Equal(), AlignedMTL(), IMTLG()], ids=lambda m: m.name)
def test_absent_tasks_have_weight_zero_and_leave_the_rest_as_if_alone(method):
    jacobian = gaussian(3, 5, 0)
    model = Linear(jacobian)
    losses = model()
    losses[1] = losses[1].detach()
    info = method.backward(losses, shared=model.shared)
    kept = jacobian[[0, 2]]
    values = model.offsets[[0, 2]]
    x = values if method.sees == "losses" else kept @ kept.T
    close(info.weights[[0, 2]], method.weights(x))
    assert info.weights[1] == 0
    close(info.losses, model.offsets)
    close(model.theta.grad, method.direction(kept, losses=values))
    assert model.phi[1].grad is None


# ------------------------------------------------------------------------------- finite checks


def test_finite_check_names_every_bad_task():
    model = Linear(gaussian(4, 5, 0))
    losses = model()
    losses[1] = BadGradient.apply(losses[1])
    losses[3] = losses[3] * torch.nan
    with pytest.raises(FloatingPointError, match=r"aligned_mtl: .* for task 1, 3; .*not taken"):
        AlignedMTL().backward(losses, shared=model.shared)
    assert model.theta.grad is None
    assert all(p.grad is None for p in model.phi)


def test_finite_check_uses_the_numbers_of_the_tasks_in_the_batch():
    model = Linear(gaussian(3, 5, 0))
    losses = model()
    losses[0] = losses[0].detach()
    losses[2] = losses[2] * torch.inf
    with pytest.raises(FloatingPointError, match="for task 2;"):
        AlignedMTL().backward(losses, shared=model.shared)


def test_gradients_of_every_kind_are_looked_at():
    """Empty, sparse, of several dtypes, or none at all."""
    big = torch.full((3, 4), 6e4, dtype=torch.float16)  # their sum is not finite
    whole = torch.eye(3).to_sparse()
    fine = [big, None, torch.zeros(0), torch.ones(2, dtype=torch.float64), whole]
    cpu = torch.device("cpu")
    assert all_finite([], cpu)
    assert all_finite([None, torch.zeros(0)], cpu)
    assert all_finite(fine, cpu)
    for value in (torch.nan, torch.inf, -torch.inf):
        for i in (0, 3):
            bad = [x if x is None else x.clone() for x in fine]
            bad[i].view(-1)[1] = value
            assert not all_finite(bad, cpu)
        assert not all_finite([*fine[:4], whole * value], cpu)


def test_sparse_gradients_of_a_head_go_through():
    table, trunk = nn.Embedding(5, 3, sparse=True), nn.Linear(2, 3)

    def losses(change):
        z = trunk(torch.ones(2, 2))
        return [z.sum(), (change(table(torch.tensor([0, 1]))) * z).sum()]

    AlignedMTL().backward(losses(torch.tanh), shared=trunk.parameters())
    assert table.weight.grad.is_sparse
    with pytest.raises(FloatingPointError, match="task 1;"):
        AlignedMTL().backward(losses(BadGradient.apply), shared=trunk.parameters())


def test_gradients_behind_the_features_do_not_share_memory():
    """Autograd hands out one tensor for both terms of a sum; clipping would shrink it twice."""
    a, b = (torch.ones(4, requires_grad=True) for _ in range(2))
    z = a + b
    AlignedMTL().backward([z.sum(), (2 * z).sum()], shared=[a, b], features=z)
    assert a.grad.data_ptr() != b.grad.data_ptr()
    assert torch.equal(a.grad, b.grad)


def test_features_pass_leaves_gradients_that_no_hook_keeps():
    """A hook of the user's that keeps what it saw must not see its tensor change afterwards."""
    layer = nn.Linear(3, 2, bias=False)
    kept = []
    layer.weight.register_hook(kept.append)
    z = layer(torch.ones(1, 3))
    IMTLG().backward([z.sum(), (2 * z).sum()], features=z)
    layer.weight.grad.add_(1)
    torch.testing.assert_close(kept[-1], torch.full((2, 3), 4 / 3))


def test_features_pass_neither_fires_hooks_of_accumulation_nor_loses_a_gradient_to_them():
    layer = nn.Linear(3, 2, bias=False)
    fired = []
    layer.weight.register_post_accumulate_grad_hook(fired.append)
    z = layer(torch.ones(1, 3))
    IMTLG().backward([z.sum(), (2 * z).sum()], features=z)
    assert not fired
    assert layer.weight.grad is not None


def test_features_pass_that_fails_leaves_no_gradient_behind():
    """One parameter has its gradient already when the other's backward pass raises."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no memory")

    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    z = Failing.apply(b * 1) * 1 + a  # a's gradient is there first
    with pytest.raises(RuntimeError, match="no memory"):
        AlignedMTL().backward([z.sum(), (2 * z).sum()], shared=[a, b], heads=[[], []], features=z)
    assert a.grad is None
    assert b.grad is None


# --------------------------------------------------------------------------- memory and syncs


@pytest.mark.parametrize("name", ["equal", "aligned_mtl", "excess_mtl", "imtl"])
def test_no_graph_is_kept_after_backward(name):
    """The activations behind the losses die with the losses: info and state hold no graph."""
    model = Regression(3)
    method = create(name)
    z = model.features(0)
    probe = Regression(1)  # any object that can be weakly referenced
    z.grad_fn.metadata["probe"] = probe  # lives as long as the node does
    alive = weakref.ref(probe)
    del probe
    losses = torch.stack(model.losses_from(z, 0))
    info = method.backward(losses, shared=model.trunk.parameters())
    assert alive() is not None
    del z, losses
    gc.collect()
    assert alive() is None
    tensors = [info.losses, info.weights, info.finite, *method.state_dict()["state"].values()]
    assert not any(t.requires_grad for t in tensors)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


def test_nothing_grows_over_a_thousand_steps():
    model = Regression(3)
    methods = [create(name) for name in ("equal", "aligned_mtl", "excess_mtl", "imtl")]
    optimizer = sgd(model.parameters(), lr=1e-3)
    counts = []
    for start in (0, 20, 1000):
        for i in range(20 if start == 0 else 500 if start == 1000 else 480):
            methods[i % 4].step(lambda i=i: model(i), optimizer, shared=model.trunk.parameters())
        counts.append(live_tensors())
    assert max(counts) - counts[0] <= 2


SYNCS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__len__", "numpy")


def record_syncs(monkeypatch) -> list[tuple[str, str]]:
    """Record who asks for a tensor's value; shapes may be asked for."""
    calls: list[tuple[str, str]] = []

    def patch(name):
        original = getattr(Tensor, name)

        def wrapper(self, *args, **kwargs):
            calls.append((name, sys._getframe(1).f_code.co_name))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, wrapper)

    for name in SYNCS:
        if name != "__len__":
            patch(name)
    return calls


@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("heads", ["raw", "weighted"])
@pytest.mark.parametrize("name", ["equal", "imtl_l", "excess_mtl", "aligned_mtl", "imtl_g", "imtl"])
def test_values_are_read_on_the_host_by_the_finite_check_alone(monkeypatch, name, heads, level):
    """On an accelerator each such read would stall; there the check keeps to masks."""
    method = create(name, head_gradients=heads)
    if level == "features" and not method.feature_level:
        pytest.skip("the method has no feature level")
    model = Regression(3)
    z = model.features(0)
    losses = model.losses_from(z, 0)
    calls = record_syncs(monkeypatch)
    method.backward(
        losses,
        shared=model.trunk.parameters(),
        heads=[head.parameters() for head in model.tasks],
        features=z if level == "features" else None,
    )
    solvers = {"_array"}  # NumPy, on the host alone
    assert {caller for _, caller in calls} <= {"_solve", "_keep", "_remember"} | solvers


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", ["equal", "imtl_l", "excess_mtl"])
def test_no_step_copies_from_the_host_but_by_upload(monkeypatch, name, absent):
    """A list as an index, or `.to(device)`, makes the host wait for an accelerator's queue."""
    calls = []
    getitem, setitem, to = Tensor.__getitem__, Tensor.__setitem__, Tensor.to

    def caller():
        return sys._getframe(2).f_code.co_name

    def recorded_getitem(self, index):
        calls.extend([caller()] if isinstance(index, list) else [])
        return getitem(self, index)

    def recorded_setitem(self, index, value):
        calls.extend([caller()] if isinstance(index, list) else [])
        return setitem(self, index, value)

    def recorded_to(self, *args, **kwargs):
        moves = not all(isinstance(x, torch.dtype) for x in args) or "device" in kwargs
        calls.extend([caller()] if moves else [])
        return to(self, *args, **kwargs)

    model, method = Regression(3), create(name)
    monkeypatch.setattr(Tensor, "__getitem__", recorded_getitem)
    monkeypatch.setattr(Tensor, "__setitem__", recorded_setitem)
    monkeypatch.setattr(Tensor, "to", recorded_to)
    for batch in range(2):
        losses = model.losses_from(model.features(batch), batch)
        if absent:
            losses[1] = losses[1].detach()
        method.backward(losses, shared=model.trunk.parameters())
    recorded = set(calls)
    calls.clear()
    torch.ones(2)[[0]].to("cpu")
    assert len(calls) == 2  # the recorder sees both
    monkeypatch.undo()
    assert recorded <= {"_send"}  # what `upload` calls


def test_the_recorder_of_host_reads_sees_them(monkeypatch):
    calls = record_syncs(monkeypatch)
    x = torch.ones(())
    bool(x), float(x), int(x), x.item(), x.tolist()
    assert [name for name, _ in calls[:3]] == ["__bool__", "__float__", "__int__"]
    assert {"item", "tolist"} <= {name for name, _ in calls}


def test_the_graph_passes_once_per_task_through_its_own_head_only():
    """K trunk passes and one pass per head, also when the losses were stacked."""
    model = Regression(3)
    counts = dict.fromkeys(range(3), 0)
    z = model.features(0)
    losses = model.losses_from(z, 0)
    for k, loss in enumerate(losses):

        def count(_, k=k):
            counts[k] += 1

        loss.grad_fn.register_prehook(count)
    AlignedMTL().backward(torch.stack(losses), shared=model.trunk.parameters())
    assert counts == {0: 1, 1: 1, 2: 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", ["equal", "imtl_l", "excess_mtl"])
def test_no_step_waits_for_the_device(name, absent):
    model = Regression(3, dtype=torch.float32).cuda()
    model.inputs = [x.cuda() for x in model.inputs]
    model.targets = [y.cuda() for y in model.targets]
    method = create(name)
    for batch in range(3):
        losses = model.losses_from(model.features(batch), batch)
        if absent:
            losses[1] = losses[1].detach()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if batch else "default")
        try:
            method.backward(losses, shared=model.trunk.parameters())
        finally:
            torch.cuda.set_sync_debug_mode("default")
