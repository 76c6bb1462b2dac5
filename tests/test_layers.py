"""Layers in the graph of the losses: a convolution's patches, its gradients by a quicker way."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative_error, rng
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_tutorial import layers
from mtl_tutorial.gradients import LossGraph, Scratch, task_gradients
from mtl_tutorial.methods import AlignedMTL, PCGrad

GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2},
    "padded": {"padding": 2},
    "strided and padded": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (2, 1), "padding": 1},
}


@pytest.fixture
def blocks(monkeypatch):
    """A CPU with vectors of 8 floats, whatever this one is."""
    monkeypatch.setattr(layers, "_vectors_of_8", lambda: True)


@pytest.fixture
def used(blocks, monkeypatch):
    """The ways that convolutions went in place of autograd's, a list per call."""
    ways: list[list[str]] = []
    ask = layers.from_outputs

    def noted(*arguments):
        found = ask(*arguments)
        ways.append([type(layer).__name__ for layer in found])
        return found

    monkeypatch.setattr(layers, "from_outputs", noted)
    return ways


class Net(nn.Module):
    """Convolutions of few channels, and two linear heads."""

    def __init__(self, *convolutions: nn.Module, channels: int = 1) -> None:
        super().__init__()
        trunk = [m for c in convolutions for m in (c, nn.ReLU(inplace=True))]
        self.trunk = nn.Sequential(*trunk, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.x = torch.randn(3, channels, 17, 15, generator=rng(1))
        with torch.no_grad():
            width = self.trunk(self.x).shape[1]
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=rng(p.numel())))

    def losses(self) -> list[Tensor]:
        z = self.trunk(self.x)
        return [(head(z) + (-1) ** k).square().mean() for k, head in enumerate(self.heads)]

    @property
    def shared(self) -> list[Tensor]:
        return list(self.trunk.parameters())


def lenet(**geometry) -> Net:
    return Net(nn.Conv2d(1, 10, 5, **geometry), nn.Conv2d(10, 20, 3, **geometry))


def wide(**geometry) -> Net:
    return Net(nn.Conv2d(16, 24, 3, **geometry), nn.Conv2d(24, 8, (2, 3), **geometry), channels=16)


def by_autograd(net: Net) -> Tensor:
    """Rows as autograd gives them, in float64."""
    rows = []
    for loss in net.double().losses():
        found = torch.autograd.grad(loss, net.shared, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def doubled(net: Net) -> Net:
    net.x = net.x.double()
    return net


WAYS = {"ChannelsLast": lenet, "Together": wide}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(GEOMETRIES))
@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_from_outputs_are_autograds(used, way, name, bias):
    net = WAYS[way](bias=bias, **GEOMETRIES[name])
    rows = task_gradients(net.losses(), net.shared)
    assert used == [[way, way]]
    assert relative_error(rows, by_autograd(doubled(net))) < 2e-6


@pytest.mark.parametrize("room", [-1, 0])
def test_output_gradients_of_all_tasks_are_held_where_there_is_room(used, monkeypatch, room):
    net = wide()
    outputs = 3 * (24 * 15 * 13 + 8 * 14 * 11)  # of three examples
    monkeypatch.setattr(layers, "_HELD", 5 * outputs + room)
    a, b = net.losses()
    rows = task_gradients([a, b, 2 * a, 2 * b, 3 * a], net.shared)
    assert used == [[] if room < 0 else ["Together", "Together"]]
    expected = by_autograd(doubled(net))
    for k, row in enumerate(rows):
        assert relative_error(row, (k // 2 + 1) * expected[k % 2]) < 2e-6


@pytest.mark.parametrize("way", list(WAYS))
def test_the_whole_step_is_the_same(used, way):
    """Also beside layers treated without rows, and for a rule that looks at the rows."""
    for rule, path in ((AlignedMTL, "rows"), (AlignedMTL, "gram"), (PCGrad, "rows")):
        found = []
        for quick in (True, False):
            net, method = WAYS[way](), rule()
            method.path = path
            if not quick:
                for p in net.shared:
                    p.register_hook(lambda g: g)  # a parameter with a hook is autograd's
            method.backward(net.losses(), shared=net.shared)
            found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert relative_error(found[0], found[1]) < 2e-6


def test_what_is_left_to_autograd(used, monkeypatch):
    small = Net(nn.Conv2d(1, 10, 3))  # looking for it would cost more
    short = Net(nn.Conv2d(8, 24, 3), channels=8)
    points = Net(nn.Conv2d(160, 8, 1), channels=160)
    colours = Net(nn.Conv2d(3, 10, 5), channels=3)
    nearly = Net(nn.Conv2d(12, 24, 3), channels=12)
    last = lenet().to(memory_format=torch.channels_last)
    hooked = Net(nn.Conv2d(1, 10, 5))
    hooked.trunk[0].weight.register_hook(lambda g: 2 * g)
    twice = Net(nn.Conv2d(10, 10, 3, padding=1), channels=10)
    twice.trunk.insert(1, twice.trunk[0])
    double = doubled(lenet().double())
    nets = (small, short, points, colours, nearly, last, hooked, twice, double)
    for net in nets:
        rows = task_gradients(net.losses(), net.shared)
        net.x = net.x.double()
        assert relative_error(rows, by_autograd(net)) < 2e-6
    assert used == [[]] * len(nets)
    task_gradients((net := wide()).losses()[:1], net.shared)  # one task has nothing to share
    monkeypatch.setattr(layers, "_PATCHES", 1000)
    task_gradients((net := wide()).losses(), net.shared)
    assert used[len(nets) :] == [[], []]


@pytest.mark.parametrize("way", list(WAYS))
def test_rows_may_be_wider_than_a_layers_gradients(used, way):
    net = WAYS[way]()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = [loss * scale for loss in net.losses()]
    rows = task_gradients(losses, [*net.shared, scale])
    assert rows.dtype == torch.float64
    assert used == [[way, way]]
    assert relative_error(rows[:, :-1], by_autograd(doubled(net))) < 2e-6


def test_features_are_no_weights(used, monkeypatch):
    monkeypatch.setattr(layers, "find_layers", None)  # not even looked for
    z = F.conv2d(torch.ones(4, 1, 20, 20), torch.ones(8, 1, 3, 3, requires_grad=True))
    graph = LossGraph([z.sum(), z.square().sum()], features=z)
    graph.partition()
    graph.rows_and_head_gradients()
    assert used == [[]]


def test_an_input_with_channels_last_is_left_to_autograd(used):
    net = Net(nn.Conv2d(10, 20, 3), channels=10)
    net.x = net.x.contiguous(memory_format=torch.channels_last)
    task_gradients(net.losses(), net.shared)
    assert used == [[]]


def test_other_vectors_are_left_to_autograd(used, monkeypatch):
    monkeypatch.setattr(layers, "_vectors_of_8", lambda: False)
    for make in WAYS.values():
        net = make()
        task_gradients(net.losses(), net.shared)
    assert used == [[], []]


@pytest.mark.parametrize("way", list(WAYS))
def test_frozen_bias_unused_layers_and_absent_tasks(used, way):
    net = WAYS[way]()
    net.trunk[2].bias.requires_grad_(False)
    shared = [p for p in net.shared if p.requires_grad]
    first, second = net.losses()
    branch = net.heads[1](torch.ones(1, net.heads[1].in_features)).square().mean()
    graph = LossGraph([first, branch, second.detach()])
    graph.partition(shared, [(), (), ()])
    rows, _ = graph.rows_and_head_gradients(keep_graph=True)
    assert used == [[way, way]]
    assert rows[1].eq(0).all()
    expected = torch.autograd.grad(first, shared)
    assert relative_error(rows[0], torch.cat([g.flatten() for g in expected])) < 2e-6
    assert graph.reached == [True] * len(shared)


@pytest.mark.parametrize("channels", [10, 16])
def test_an_input_changed_afterwards_is_noticed(used, channels):
    net = Net(nn.Conv2d(channels, 20, 3), channels=channels)
    losses = net.losses()
    net.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        task_gradients(losses, net.shared)


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_patches_are_those_of_unfold(name):
    geometry = {"stride": 1, "padding": 0, "dilation": 1, **GEOMETRIES[name]}
    net = Net(nn.Conv2d(4, 6, (3, 2), **geometry), channels=4)
    graph = LossGraph(net.losses())
    graph.partition(net.shared)
    (layer,) = layers.find_layers(graph)
    patches = F.unfold(net.x, (3, 2), **geometry).transpose(1, 2).reshape(layer.n, 4, 6)
    found = layer.rows(layer.input(), Scratch())
    assert torch.equal(found, patches.transpose(1, 2).reshape(layer.n, -1))


@pytest.mark.parametrize("n_tasks", [1, 200])
def test_kernels_are_autograds_whatever_is_brought_into_order(n_tasks):
    """More patches than outputs of all tasks, or fewer."""
    net = Net(nn.Conv2d(4, 6, (3, 2), padding=1), channels=4)
    graph = LossGraph(net.losses())
    graph.partition(net.shared)
    (layer,) = layers.find_layers(graph)
    assert (layer.n < n_tasks * 6) == (n_tasks == 200)
    d = torch.randn(n_tasks, *layer.shape, generator=rng(5))
    outputs = d.transpose(1, 2).reshape(n_tasks * 6, -1)
    scratch = Scratch()
    found = [layer.kernels(layer.input(), part, scratch) for part in (outputs, outputs)]
    (weight, _) = net.shared
    y = F.conv2d(net.x, weight, padding=1)
    expected = [torch.autograd.grad(y, weight, one, retain_graph=True)[0] for one in d]
    for kernels in found:  # the second call uses the first one's memory
        assert relative_error(kernels, torch.stack(expected)) < 2e-6


def test_large_temporaries_take_the_memory_of_the_step_before():
    scratch, like = Scratch(), (torch.float32, torch.device("cpu"))
    first = scratch.space("patches", (3, 4), *like)
    other = scratch.space("products", (3, 4), *like)
    assert first.shape == (3, 4) and first.data_ptr() != other.data_ptr()
    assert scratch.space("patches", (2, 5), *like).data_ptr() == first.data_ptr()
    assert scratch.space("patches", (30, 4), *like).shape == (30, 4)
    assert scratch.space("patches", (3, 4), torch.float64, like[1]).dtype == torch.float64
    assert copy.deepcopy(scratch)._kept == {}


# ------------------------------------------------------------- all heads in one backward pass


class Heads(nn.Module):
    """A linear trunk and three heads in float64."""

    def __init__(self, make) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.heads = nn.ModuleList(make() for _ in range(3))
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=rng(i)))

    def features(self) -> Tensor:
        return self.trunk(torch.randn(5, 6, generator=rng(7)).double())

    def graph(self, call=lambda head, z: head(z), z: Tensor | None = None) -> LossGraph:
        z = self.features() if z is None else z
        losses = [(call(h, z) - i).square().mean() for i, h in enumerate(self.heads)]
        graph = LossGraph(losses, z)
        graph.partition(self.trunk.parameters(), [h.parameters() for h in self.heads])
        return graph


def frozen_bias() -> nn.Module:
    layer = nn.Linear(8, 2)
    layer.bias.requires_grad_(False)
    return layer


ENTERED = {
    "linear": lambda: nn.Linear(8, 2),
    "without bias": lambda: nn.Linear(8, 1, bias=False),
    "frozen bias": frozen_bias,
    "deep": lambda: nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("name", list(ENTERED))
def test_one_pass_through_all_heads_gives_what_autograd_gives(name, scale):
    graph = Heads(ENTERED[name]).graph()
    factor = None if scale is None else torch.tensor(scale)
    assert len(graph.entrances) == 3
    entered = layers.Entered(graph, graph.entrances, factor)
    rows = entered.rows(Scratch()).clone()
    graph._entrances = []
    expected, expected_heads = graph.rows_and_head_gradients(factor)
    torch.testing.assert_close(rows, expected)
    assert len(entered.head_gradients) == 3
    for mine, its in zip(entered.head_gradients, expected_heads, strict=True):
        torch.testing.assert_close(mine, its)
    torch.testing.assert_close(entered.gram(), expected @ expected.T)
    weights = torch.tensor([0.2, 0.5, 3.0])
    torch.testing.assert_close(entered.direction(weights), weights.double() @ expected)


def test_products_of_weights_as_they_are():
    """``z @ W``, without a transpose between."""
    net = Heads(lambda: nn.ParameterList([nn.Parameter(torch.zeros(8, 2))]))
    graph = net.graph(lambda head, z: z @ head[0])
    rows, (first, *_) = graph.rows_and_head_gradients()
    assert graph.entrances
    graph._entrances = []
    expected, (expected_first, *_) = graph.rows_and_head_gradients()
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(first, expected_first)


def test_heads_of_other_kinds_are_left_to_autograd():
    net = Heads(lambda: nn.Linear(8, 2))
    assert net.graph().entrances
    assert not net.graph(lambda h, z: h(z) + h(z).tanh()).entrances  # used twice
    assert not net.graph(lambda h, z: h(z) + z.sum()).entrances  # a second way in
    assert not net.graph(lambda h, z: h(z.relu())).entrances  # no layer is first
    assert not net.graph(lambda h, z: h(z.expand(2, 5, 8))).entrances
    assert not Heads(lambda: nn.Linear(8, 9)).graph().entrances  # wider than the features
    common = nn.Parameter(torch.ones((), dtype=torch.float64))
    graph = net.graph(lambda h, z: h(z) * common)
    graph.heads = [[*head, common] for head in graph.heads]
    assert not graph.entrances  # one pass would add up what belongs to three tasks
    graph = net.graph(lambda h, z: h(z) * common)
    graph.heads[0].append(common)
    assert not graph.entrances  # nor what is listed with one of them
    graph = net.graph()
    graph.heads[0].append(graph.heads[2][0])
    assert not graph.entrances  # listed twice: it has no gradient by the first loss
    two = Heads(lambda: nn.ModuleList(nn.Linear(8, 2) for _ in range(2)))
    assert not two.graph(lambda h, z: h[0](z) * h[1](z)).entrances  # two layers are first
    one = torch.ones(5, 8, dtype=torch.float64)
    square = Heads(lambda: nn.Linear(8, 8))
    assert not square.graph(lambda h, z: torch.addmm(z, one, h.weight.t())).entrances  # as a bias
    z = net.features()
    z.register_hook(lambda g: 2 * g)
    assert not net.graph(z=z).entrances
    z = net.features()
    z.retain_grad()
    assert not net.graph(z=z).entrances
    net.heads[1].weight.register_hook(lambda g: 2 * g)
    assert not net.graph().entrances


def test_a_loss_that_is_not_its_heads_alone_is_left_to_autograd():
    """The second loss contains the first: the first head has two owners."""
    net = Heads(lambda: nn.Linear(8, 2))
    z = net.features()
    first, second, third = (h(z).square().mean() for h in net.heads)
    graph = LossGraph([first, first + second, third], z)
    graph.partition(net.trunk.parameters(), [h.parameters() for h in net.heads])
    assert not graph.entrances


@pytest.mark.parametrize("method", [AlignedMTL, PCGrad])
@pytest.mark.parametrize("name", ["linear", "deep"])
def test_a_step_behind_the_features_is_the_same_by_one_pass(name, method, monkeypatch):
    net, found = Heads(ENTERED[name]), []
    for asked in (layers.entrances, lambda graph: []):
        monkeypatch.setattr(layers, "entrances", asked)
        net.zero_grad()
        z = net.features()
        losses = [(h(z) - i).square().mean() for i, h in enumerate(net.heads)]
        heads = [h.parameters() for h in net.heads]
        method().backward(losses, shared=net.trunk.parameters(), heads=heads, features=z)
        found.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*found)


def test_rows_are_left_out_where_the_gram_matrix_is_cheaper_without(monkeypatch):
    def fail(*arguments):
        pytest.fail("rows were made")

    monkeypatch.setattr(layers.Entered, "rows", fail)
    net = Heads(lambda: nn.Linear(8, 1))
    z = net.features()
    losses = [(h(z) - i).square().mean() for i, h in enumerate(net.heads)]
    info = AlignedMTL().backward(losses, features=z)
    assert info.path == "features"
    wide = Heads(lambda: nn.Linear(8, 8))
    z = wide.features()
    losses = [h(z).square().mean() for h in wide.heads]
    with pytest.raises(pytest.fail.Exception, match="rows were made"):
        AlignedMTL().backward(losses, features=z)


def test_wide_heads_of_a_small_batch_get_rows():
    """Their outputs side by side are wider than the rows are long."""
    graph = Heads(lambda: nn.Linear(8, 8)).graph()
    assert not layers.gram_is_cheaper(graph.entrances)
    assert layers.gram_is_cheaper(Heads(lambda: nn.Linear(8, 1)).graph().entrances)


def test_a_head_changed_afterwards_is_noticed():
    net = Heads(lambda: nn.Linear(8, 1))
    graph = net.graph()
    with torch.no_grad():
        net.heads[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.rows_and_head_gradients()
