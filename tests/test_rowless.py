"""The Gram matrix without rows: the same step as with rows, whatever the trunk is made of."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    BadGradient,
    Regression,
    assert_equal_state,
    pretend_accelerator,
    relative_error,
    rng,
    sgd,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mtl_tutorial
from mtl_tutorial import layers
from mtl_tutorial.gradients import LossGraph, Method, gram_matrix, task_gradients
from mtl_tutorial.methods import CLASSES, IMTLG, AlignedMTL, PCGrad, available, create
from mtl_tutorial.savings import losses_in_pieces

K = 3
GRAM = [n for n in available() if CLASSES[n].sees == "gram" and CLASSES[n].n_tasks is None]


# ------------------------------------------------------------------------------------- the zoo


class Lambda(nn.Module):
    """A module of modules and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module | nn.Parameter):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def vectors() -> Tensor:
    return torch.randn(5, 8, generator=rng(1))


def sequences() -> Tensor:
    return torch.randn(4, 3, 8, generator=rng(1))


def images() -> Tensor:
    return torch.randn(3, 4, 7, 6, generator=rng(1))


def words() -> Tensor:
    return torch.randint(9, (4, 5), generator=rng(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(inplace=True))


def tied() -> nn.Module:
    """Two layers with one weight; the second bias is used by both, the third layer by one."""
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(8, 6))


def tied_bias() -> nn.Module:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.bias = a.bias
    return nn.Sequential(a, nn.Tanh(), b)


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.LayerNorm(8))


def own_attention() -> nn.Module:
    """Attention by hand, on inputs that are not contiguous."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.transpose(0, 1)).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v) + self.bias(x.transpose(0, 1))

    return Lambda(run, qkv=nn.Linear(8, 24, bias=False), out=nn.Linear(8, 8), bias=nn.Linear(8, 8))


def frozen() -> nn.Module:
    trunk = mlp()
    trunk[0].weight.requires_grad_(False)
    trunk[2].bias.requires_grad_(False)
    return nn.Sequential(trunk, nn.Linear(7, 5))


def hooked() -> nn.Module:
    """A hook that changes a weight's gradient."""
    trunk = mlp()
    trunk[0].weight.register_hook(lambda g: 3 * g)
    trunk[2].bias.register_hook(lambda g: 2 * g)
    return trunk


def normed_weight() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 5))


# Trunk, input, and how many layers are recognised.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "mlp": (mlp, vectors, 2),
    "no_bias": (lambda: nn.Sequential(nn.Linear(8, 9, bias=False), nn.Tanh()), vectors, 1),
    "vector_per_example": (lambda: Lambda(lambda m, x: m.a(x[0]) + m.a2(x[1]), a=nn.Linear(8, 9),
                                          a2=nn.Linear(8, 9)), vectors, 2),
    "n_d_linear": (mlp, sequences, 2),
    "n_d_linear_no_bias": (lambda: nn.Linear(8, 5, bias=False), sequences, 1),
    "n_d_linear_strided": (lambda: Lambda(lambda m, x: m.a(x.mT), a=nn.Linear(3, 5)),
                           sequences, 1),
    "matrix": (lambda: Lambda(lambda m, x: (x @ m.w).tanh() @ m.w2,
                              w=nn.Parameter(torch.randn(8, 6, generator=rng(2))),
                              w2=nn.Parameter(torch.randn(6, 4, generator=rng(3)))), vectors, 2),
    "matrix_used_twice": (lambda: Lambda(lambda m, x: (x @ m.w).tanh() @ m.w,
                                         w=nn.Parameter(torch.randn(8, 8, generator=rng(2)))),
                          vectors, 0),
    "matrix_first": (lambda: Lambda(lambda m, x: (m.w @ x).tanh(),
                                    w=nn.Parameter(torch.randn(6, 5, generator=rng(2)))),
                     vectors, 0),
    "scaled_addmm": (lambda: Lambda(lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3),
                                    w=nn.Parameter(torch.randn(8, 6, generator=rng(2))),
                                    b=nn.Parameter(torch.randn(6, generator=rng(3)))),
                     vectors, 0),
    "broadcast_bias": (lambda: Lambda(lambda m, x: torch.addmm(m.b, x, m.w),
                                      w=nn.Parameter(torch.randn(8, 6, generator=rng(2))),
                                      b=nn.Parameter(torch.randn(1, generator=rng(3)))),
                       vectors, 1),
    "conv": (lambda: nn.Conv2d(4, 5, 3), images, 1),
    "conv_no_bias": (lambda: nn.Conv2d(4, 5, (3, 2), bias=False), images, 1),
    "conv_1x1": (lambda: nn.Conv2d(4, 5, 1), images, 1),
    "conv_strided_padded": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=(2, 1)), images, 1),
    "conv_dilated": (lambda: nn.Conv2d(4, 5, 2, dilation=(2, 3)), images, 1),
    "conv_same": (lambda: nn.Conv2d(4, 5, (3, 5), padding="same"), images, 1),
    "conv_reflect": (lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), images, 1),
    "conv_channels_last": (lambda: nn.Sequential(nn.Conv2d(4, 5, 3), nn.Conv2d(5, 6, 3)).to(
        memory_format=torch.channels_last), images, 2),
    "conv_grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 3, 1)),
                     images, 1),
    "conv_transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 3, 3)),
                        images, 1),
    "conv_1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Linear(6, 5)), sequences, 1),
    "conv_batchnorm": (lambda: nn.Sequential(
        nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), images, 2),
    "pooling": (lambda: nn.Sequential(nn.Conv2d(4, 5, 3), nn.MaxPool2d(2), nn.Flatten(),
                                      nn.Linear(20, 8)), images, 2),
    "batchnorm": (lambda: nn.Sequential(nn.Linear(8, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)),
                  vectors, 2),
    "layernorm": (lambda: nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 4)),
                  vectors, 2),
    "embedding": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.GELU()),
                  words, 1),
    "attention": (attention, sequences, 4),
    "own_attention": (own_attention, sequences, 3),
    "weight_sharing": (tied, vectors, 1),
    "bias_sharing": (tied_bias, vectors, 2),
    "used_twice": (lambda: Lambda(lambda m, x: m.b(m.a(m.a(x).tanh())), a=nn.Linear(8, 8),
                                  b=nn.Linear(8, 3)), vectors, 1),
    "weight_with_itself": (lambda: Lambda(lambda m, x: x @ (m.w @ m.w),
                                          w=nn.Parameter(torch.randn(8, 8, generator=rng(2)))),
                           vectors, 0),
    "penalty": (lambda: Lambda(lambda m, x: m.a(x) + m.a.weight.square().mean(),
                               a=nn.Linear(8, 8)), vectors, 0),
    "checkpoint": (lambda: Lambda(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
                                  a=mlp(), b=nn.Linear(7, 4)), vectors, 3),
    "in_place": (lambda: Lambda(lambda m, x: torch.relu_(m.b(m.a(x).mul_(2)).add_(1)),
                                a=nn.Linear(8, 8), b=nn.Linear(8, 8)), vectors, 2),
    "residual": (lambda: Lambda(lambda m, x: m.b(torch.tanh(x + m.a(x)) + m.a(x) * 0 + x),
                                a=nn.Linear(8, 8), b=nn.Linear(8, 4)), vectors, 1),
    "frozen": (frozen, vectors, 2),
    "hook": (hooked, vectors, 1),
    "normed_weight": (normed_weight, vectors, 1),
}  # fmt: skip


class Net(nn.Module):
    """A trunk and K heads, whose losses are positive and pull in different directions."""

    def __init__(self, trunk: nn.Module, x: Tensor, dtype: torch.dtype, k: int = K) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = trunk.to(dtype)
        for p in self.trunk.parameters():
            with torch.no_grad():
                p.copy_(0.5 * torch.randn(p.shape, generator=rng(p.numel())))
        self.x = x.to(dtype) if x.is_floating_point() else x
        with torch.no_grad():
            z = copy.deepcopy(self.trunk)(self.x)
        self.heads = nn.ModuleList(nn.Linear(z.shape[-1], 2, dtype=dtype) for _ in range(k))

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [
            (head(z) - (k + 1) * (-1) ** k).square().mean() + 0.1
            for k, head in enumerate(self.heads)
        ]

    @property
    def shared(self) -> list[Tensor]:
        return list(self.trunk.parameters())

    @property
    def own(self) -> list[list[Tensor]]:
        return [list(head.parameters()) for head in self.heads]


def net(name: str, dtype: torch.dtype = torch.float64) -> Net:
    trunk, x, _ = ZOO[name]
    torch.manual_seed(0)
    return Net(trunk(), x(), dtype)


def step(model, method, path, *, losses=None, **settings):
    method.path = path
    losses = model.losses() if losses is None else losses
    return method.backward(losses, shared=model.shared, heads=model.own, **settings)


def grads(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(found, expected, tolerance):
    """Equal gradients, relative to the largest: that of a bias before BatchNorm is but rounding."""
    largest = max(b.norm() for b in expected if b is not None)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert (a - b).norm() <= tolerance * largest


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [(torch.float32, "raw"), (torch.float64, "weighted")],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("name", list(ZOO))
def test_the_step_is_that_of_the_rows(name, dtype, heads):
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    results = []
    for path in ("rows", "gram"):
        model = net(name, dtype)
        info = step(model, IMTLG(head_gradients=heads), path)
        results.append((info, grads(model)))
    (rows, expected), (gram, found) = results
    assert rows.path == "rows"
    assert gram.path == ("gram" if ZOO[name][2] else "rows")
    assert relative_error(gram.weights, rows.weights) < tolerance
    assert relative_error(gram.gram, rows.gram) < tolerance
    assert_same(found, expected, 10 * tolerance)  # a sum may cancel what its parts have


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name][2]])
def test_a_triangle_of_products_gives_the_gram_matrix(monkeypatch, name):
    """In strips of three rows, where the last one is shorter for some layers."""
    model = net(name, torch.float64)
    whole = step(model, AlignedMTL(), "gram").gram
    model.zero_grad()
    monkeypatch.setattr(layers, "_STRIP", 3)
    assert relative_error(step(model, AlignedMTL(), "gram").gram, whole) < 1e-10


@pytest.mark.parametrize("name", list(ZOO))
def test_layers_are_recognised(name):
    """If none were, everything would be right and nothing would be gained."""
    model = net(name)
    graph = LossGraph(model.losses())
    graph.partition(model.shared, model.own)
    assert len(layers.find_layers(graph)) == ZOO[name][2]


@pytest.mark.parametrize("name", GRAM)
def test_every_rule_that_looks_at_a_gram_matrix(name):
    results = []
    for path in ("rows", "gram"):
        model, method = net("conv_batchnorm"), create(name)
        optimizer = sgd(model.parameters(), lr=0.01)
        for _ in range(3):
            method.path = path
            info = method.step(model.losses, optimizer, shared=model.shared, heads=model.own)
        assert info.path == path
        results.append((model, method))
    for p, q in zip(results[1][0].parameters(), results[0][0].parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) < 1e-8


@pytest.mark.parametrize("name", [n for n in available() if n not in GRAM])
def test_every_other_rule_takes_its_own_path(name):
    cls = CLASSES[name]
    if cls.family == "schedule":
        pytest.skip("a schedule makes its passes itself")
    k = cls.n_tasks or K
    trunk, x, _ = ZOO["mlp"]
    model, method = Net(trunk(), x(), torch.float64, k), create(name)
    info = step(model, method, "gram")
    if cls.sees == "losses":
        assert info.path == "losses"
    elif cls.sees == "rows" or cls._combine is not Method._combine:
        assert (info.path, info.reason) == ("rows", "the rule looks at the gradients themselves")
    else:
        assert info.path == "gram"


# ------------------------------------------------------------------------------ which path is taken


def wide(k: int = K, n: int = 4) -> Net:
    """Large enough for the automatic choice; few examples, so layers are cheaper without rows."""
    x = torch.randn(n, 256, generator=rng(1))
    return Net(
        nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256)), x, torch.float64, k
    )


def test_the_cheaper_path_is_chosen_and_told():
    info = step(wide(40, 16), AlignedMTL(), "auto")
    assert (info.path, info.reason) == ("gram", "")
    info = step(wide(40, 600), AlignedMTL(), "auto")
    assert info.path == "rows"
    assert "more examples or pixels than they have inputs" in info.reason
    info = step(net("mlp"), AlignedMTL(), "auto")
    assert info.path == "rows"
    assert "small model" in info.reason
    info = step(net("matrix_first"), AlignedMTL(), "gram")
    assert info.path == "rows"
    assert "no linear or convolutional layer" in info.reason
    info = step(wide(40, 16), AlignedMTL(), "rows")
    assert (info.path, info.reason) == ("rows", "asked for")
    model = wide(1)
    assert step(model, AlignedMTL(), "gram").reason == "one task in the batch"


def test_features_and_unknown_paths():
    model = net("mlp")
    z = model.trunk(model.x)
    losses = [head(z).square().mean() for head in model.heads]
    info = step(model, AlignedMTL(), "gram", losses=losses, features=z)
    assert (info.path, info.reason) == ("features", "")
    with pytest.raises(ValueError, match="expected path 'auto', 'rows' or 'gram', got 'fast'"):
        step(net("mlp"), AlignedMTL(), "fast")


@pytest.mark.parametrize("strip", [128, 5])
def test_multiplications_are_counted_as_they_are_done(monkeypatch, strip):
    """Per layer, against the count of torch's own counter, for the rows and for the kernel."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(layers, "_STRIP", strip)
    model = wide(8, 16)
    counts = {}
    for path in ("rows", "gram"):
        losses = model.losses()
        with FlopCounterMode(display=False) as counter:
            step(model, AlignedMTL(), path, losses=losses)
        counts[path] = counter.get_total_flops() / 2
        model.zero_grad()
    graph = LossGraph(model.losses())
    graph.partition(model.shared, model.own)
    found = layers.find_layers(graph)
    kept_back = sum(0.1 * 8 * layer.fan_in * layer.fan_out * (layer.n + 8) for layer in found)
    # The rows' own Gram matrix and sum are products as well; sums of weights times rows are not
    # counted above.
    saved = sum(layer.saved(8) for layer in found) + kept_back
    assert (counts["rows"] - counts["gram"]) == pytest.approx(saved, rel=0.05)


# ----------------------------------------------------------- several batches, several processes


def test_gram_matrices_of_parts_do_not_add_up():
    """What goes wrong without rows: the products of one part's gradients with another's."""
    models = [net("mlp"), net("mlp")]
    models[1].x = models[1].x.flip(1)
    rows = [task_gradients(m.losses(), m.shared) for m in models]
    right = gram_matrix(rows[0] + rows[1])
    wrong = gram_matrix(rows[0]) + gram_matrix(rows[1])
    assert relative_error(wrong, right) > 0.1
    weights = [IMTLG().weights(g) for g in (wrong, right)]
    assert relative_error(*weights) > 0.01


def test_rows_where_gradients_are_accumulated():
    model = wide(40, 16)
    method = AlignedMTL()
    assert step(model, method, "gram").path == "gram"
    again = step(model, method, "gram")
    assert again.path == "rows"
    assert "accumulated" in again.reason
    model.zero_grad()
    assert step(model, method, "gram").path == "gram"


def test_a_batch_in_pieces_goes_by_rows_and_gives_the_step_of_the_whole():
    whole, parts = net("mlp"), net("mlp")
    whole.x = parts.x = torch.randn(6, 8, dtype=torch.float64, generator=rng(1))

    def compute(x: Tensor) -> list[Tensor]:
        twin = copy.copy(parts)
        twin.x = x
        return twin.losses()

    expected = step(whole, IMTLG(), "rows")
    losses = losses_in_pieces(compute, parts.x, 2, list(parts.parameters()))
    info = step(parts, IMTLG(), "gram", losses=losses)
    assert info.path == "rows"
    assert relative_error(info.weights, expected.weights) < 1e-10
    assert_same(grads(parts), grads(whole), 1e-10)


def test_two_forward_passes_in_one_graph_are_summed_before_the_gram_matrix():
    """Each weight is then used twice, which takes it out of the layers."""
    results = []
    for path in ("rows", "gram"):
        model = net("mlp")
        losses = model.losses()
        model.x = model.x.flip(1)
        losses = [(a + b) / 2 for a, b in zip(losses, model.losses(), strict=True)]
        results.append((step(model, IMTLG(), path, losses=losses), grads(model)))
    assert results[1][0].path == "rows"
    assert relative_error(results[1][0].weights, results[0][0].weights) < 1e-10


def test_rows_under_several_processes():
    model = net("mlp")
    method = AlignedMTL()
    method.path = "gram"
    graph = LossGraph(model.losses())
    graph.partition(model.shared, model.own)
    assert method._layers(graph)[0]
    graph.ranks = object()  # type: ignore[assignment]
    layers, reason = method._layers(graph)
    assert layers == []
    assert "several processes" in reason


# ------------------------------------------------------------------- tasks, heads, scaler, faults


def test_absent_tasks():
    results = []
    for path in ("rows", "gram"):
        model, method = net("pooling"), IMTLG()
        losses = model.losses()
        losses[1] = losses[1].detach()
        info = step(model, method, path, losses=losses)
        assert info.path == path
        assert info.weights[1] == 0
        results.append((info, grads(model)))
    assert relative_error(results[1][0].weights, results[0][0].weights) < 1e-10
    assert_same(results[1][1], results[0][1], 1e-10)


@pytest.mark.parametrize("batched", [True, False])
def test_tasks_that_use_part_of_the_trunk(batched):
    """Layers that a task does not pass through have zeros in its row; unused ones no gradient."""
    results = []
    for path in ("rows", "gram"):
        torch.manual_seed(0)
        a, b, c, unused = (nn.Linear(8, 8).double() for _ in range(4))
        x = vectors().double()
        z = torch.tanh(a(x)) if batched else torch.softmax(a(x), 1)
        y, v = b(z), c(x)
        losses = [z.square().mean(), y.sin().mean() + v.mean(), (y * v).square().mean()]
        shared = [p for layer in (a, b, c, unused) for p in layer.parameters()]
        shared = shared if not batched else shared[:-2]
        method = IMTLG()
        method.path = path
        info = method.backward(losses, shared=shared)
        assert info.path == path
        results.append((info, [p.grad for p in shared]))
    assert relative_error(results[1][0].gram, results[0][0].gram) < 1e-10
    assert_same(results[1][1], results[0][1], 1e-10)


def test_parameters_are_found_without_being_told():
    results = []
    for told in (True, False):
        model, method = net("conv_batchnorm"), IMTLG()
        method.path = "gram"
        parts = {"shared": model.shared, "heads": model.own} if told else {}
        assert method.backward(model.losses(), **parts).path == "gram"
        results.append(grads(model))
    assert_same(results[1], results[0], 1e-10)


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
@pytest.mark.parametrize("form", ["list", "stack", "cat"])
def test_losses_in_any_form(name, form):
    results = []
    for path in ("rows", "gram"):
        model = net(name)
        parts = model.losses()
        losses = {
            "list": parts,
            "stack": torch.stack(parts),
            "cat": torch.cat([x[None] for x in parts]),
        }[form]
        info = step(model, IMTLG(), path, losses=losses)
        assert info.path == path
        results.append(grads(model))
    assert_same(results[1], results[0], 1e-10)


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_scaler_leaves_the_step_the_same(name, scale):
    plain, scaled = net(name), net(name)
    step(plain, IMTLG(), "gram")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    info = step(scaled, IMTLG(), "gram", scaler=scaler)
    assert info.path == "gram"
    found = [None if g is None else g / scale for g in grads(scaled)]
    assert_same(found, grads(plain), 1e-10)


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_faults_name_the_task_and_change_nothing(name, fault):
    model, method = net(name), create("gradvac")
    step(model, method, "gram")
    model.zero_grad()
    state, before = copy.deepcopy(method.state_dict()), grads(model)
    losses = model.losses()
    losses[1] = losses[1] * torch.nan if fault == "loss" else BadGradient.apply(losses[1])
    with pytest.raises(FloatingPointError, match=r"gradvac: .* for task 1;"):
        step(model, method, "gram", losses=losses)
    assert_equal_state(method.state_dict(), state)
    assert grads(model) == before
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    losses = model.losses()
    losses[1] = losses[1] * torch.nan if fault == "loss" else BadGradient.apply(losses[1])
    info = step(model, method, "gram", losses=losses, scaler=scaler)
    assert not info.finite
    assert all(not p.grad.isfinite().any() for p in model.shared)
    assert_equal_state(method.state_dict(), state)


def test_an_input_that_was_changed_afterwards_is_noticed():
    model = net("mlp")
    losses = model.losses()
    model.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model, AlignedMTL(), "gram", losses=losses)
    assert all(p.grad is None for p in model.parameters())


def test_lower_precision_goes_by_rows():
    model = net("mlp", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses()
    assert step(model, AlignedMTL(), "gram", losses=[x.float() for x in losses]).path == "rows"
    model = net("mlp", torch.bfloat16)
    assert step(model, AlignedMTL(), "gram").path == "rows"


# ------------------------------------------------------------------------------ one batched pass


def passes_of(name: str) -> int:
    """How often the first trunk node is run."""
    model = net(name)
    losses, runs = model.losses(), []
    graph = LossGraph(losses)
    graph.partition(model.shared, model.own)
    layer = layers.find_layers(graph)[0]
    layer.node.register_prehook(lambda gradients: runs.append(1))
    # A prehook runs where the node does: ask for something behind it.
    last = layers.find_layers(graph)[-1].node
    last.register_prehook(lambda gradients: runs.append(1))
    assert step(model, AlignedMTL(), "gram", losses=losses).path == "gram"
    return len(runs)


def test_products_and_pointwise_functions_take_one_batched_pass():
    assert passes_of("mlp") == 1
    assert passes_of("layernorm") == K


# ------------------------------------------------------------------------------ memory and state


def test_results_do_not_change_with_later_steps():
    """The buffer of the rows is used again; nothing that a step gave may lie in it."""
    for path in ("rows", "gram"):
        model, method = net("conv_batchnorm"), AlignedMTL()
        info = step(model, method, path)
        kept = [info.weights, info.gram, *(p.grad for p in model.parameters())]
        copies = [x.clone() for x in kept]
        for p in model.parameters():
            p.grad = None
        model.x = 2 * model.x
        step(model, method, path)
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_the_buffer_is_reused_but_not_copied_or_saved():
    model, method = net("mlp"), AlignedMTL()
    step(model, method, "rows")
    kept = method._scratch._kept["rows"]
    model.zero_grad()
    step(model, method, "rows")
    assert method._scratch._kept["rows"] is kept
    assert copy.deepcopy(method)._scratch._kept == {}
    assert pickle.loads(pickle.dumps(method))._scratch._kept == {}
    rule = create("gradnorm")  # may keep what it sees
    step(net("mlp"), rule, "rows")
    assert rule._scratch._kept == {}


MEMORY = """
import sys
import torch
from torch import nn
from mtl_tutorial.methods import AlignedMTL

def peak():  # not getrusage: a child process starts with its parent's peak there
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

torch.manual_seed(0)
K, width = 40, 512
trunk = nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(width, width), nn.ReLU())))
heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(K))
x = torch.randn(16, width)
method = AlignedMTL()
method.path = sys.argv[1]

def losses():
    z = trunk(x)
    return [(head(z) - 1).square().mean() for head in heads]

torch.stack(losses()).sum().backward()
for p in (*trunk.parameters(), *heads.parameters()):
    p.grad = None
small = [nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)]  # warm up what is loaded on first use
z = small[0](torch.randn(3, 4))
first = AlignedMTL()
first.path = "rows" if method.path == "rows" else "gram"
first.backward([head(z).square().mean() for head in small[1:]])
before = peak()
info = method.backward(losses(), shared=trunk.parameters())
size = 4 * K * sum(p.numel() for p in trunk.parameters())
print(info.path, (peak() - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("path", ["auto", "rows"])
def test_the_matrix_of_all_gradients_is_never_formed(path):
    """Peak memory of a process above that of an ordinary step, as a share of K x P floats."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True
    )
    taken, share = done.stdout.split()
    if path == "rows":  # the measurement sees the matrix where it is formed
        assert taken == "rows"
        assert float(share) > 0.8
    else:
        assert taken == "gram"
        assert float(share) < 0.1


# ------------------------------------------------------------------- the engine's file by itself


def test_the_engine_works_without_this_module(tmp_path):
    source = Path(mtl_tutorial.__file__).parent
    (tmp_path / "alone" / "methods").mkdir(parents=True)
    for name in ("gradients.py", "methods/aligned_mtl.py"):
        shutil.copy(source / name, tmp_path / "alone" / name)
    code = (
        "import torch; from alone.methods.aligned_mtl import AlignedMTL; method = AlignedMTL();"
        "method.path = 'gram'; layer = torch.nn.Linear(3, 2); z = layer(torch.ones(2, 3));"
        "info = method.backward([z.sum(), z.square().sum()]); print(info.path, info.reason)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "rows rowless.py and layers.py are not both there"


# ------------------------------------------------------------------------------ reads on the host


@pytest.fixture
def pretended_accelerator(monkeypatch):
    """Tensors without values: reading one is an error; the engine does as on an accelerator."""
    pretend_accelerator(monkeypatch)
    monkeypatch.setattr(layers, "_plain", lambda parameter: True)  # these are a subclass
    with FakeTensorMode():
        yield


HEADS_AND_LOSSES = [n for n in available() if CLASSES[n].family != "schedule"]


@pytest.mark.parametrize("path", ["rows", "gram", "features"])
@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", HEADS_AND_LOSSES)
def test_no_value_is_read_on_the_way(pretended_accelerator, name, absent, path):
    """Also by what torch does inside: a mask as an index, or a size that depends on values."""
    if CLASSES[name].syncs:
        pytest.skip("declares syncs")
    behind = path == "features"
    if behind and not CLASSES[name].feature_level:
        pytest.skip("the method has no feature level")
    model, method = Regression(CLASSES[name].n_tasks or K), create(name)
    method.path = "auto" if behind else path
    for batch in range(2):
        z = model.features(batch)
        losses = model.losses_from(z, batch)
        if absent:
            losses[1] = losses[1].detach()
        info = method.backward(
            losses,
            shared=model.trunk.parameters(),
            heads=[list(head.parameters()) for head in model.tasks],
            features=z if behind else None,
        )
        model.zero_grad()
    if method._needs_gram_alone and len(losses) - absent > 1:
        assert info.path == path
    with pytest.raises(Exception, match="local_scalar_dense"):
        info.losses.sum().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("path", ["rows", "gram"])
@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "attention", "embedding"])
def test_gpu_no_step_waits_and_the_step_is_that_of_the_cpu(name, path):
    """A rule without `syncs`; in float32, whose rounding differs between the devices."""
    results = []
    for device in ("cpu", "cuda"):
        model = net(name, torch.float32).to(device)
        model.x = model.x.to(device)
        method = PCGrad(seed=0)
        for i in range(3):
            model.zero_grad()
            losses = model.losses()
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error" if i else "default")
            try:
                info = step(model, method, path, losses=losses)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        assert info.path == path
        results.append([g.cpu() for g in grads(model)])
    assert_same(results[1], results[0], 1e-3)


# ------------------------------------------------------------------------------------- compiled


# torch.compile warns on Python 3.13.0, the patch release, alone.
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python:RuntimeWarning")
@pytest.mark.parametrize("level", ["parameters", "features"])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_model_and_losses(backend, level):
    """The graph of a compiled model is one node, so its parameters keep their rows."""
    plain, compiled = net("mlp"), net("mlp")
    torch._dynamo.reset()
    run = torch.compile(compiled.trunk, backend=backend, fullgraph=True)
    step(plain, IMTLG(), "rows")
    z = run(compiled.x)
    losses = [
        (head(z) - (k + 1) * (-1) ** k).square().mean() + 0.1
        for k, head in enumerate(compiled.heads)
    ]
    if level == "features":
        info = step(compiled, IMTLG(), "auto", losses=losses, features=z)
        assert info.path == "features"
        return
    info = step(compiled, IMTLG(), "gram", losses=losses)
    assert info.path == "rows"
    assert_same(grads(compiled), grads(plain), 1e-9)
