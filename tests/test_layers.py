"""Layers in the graph of the losses: a convolution's patches, its gradients by a quicker way."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rng
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_tutorial import layers
from mtl_tutorial.gradients import LossGraph, task_gradients
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
    monkeypatch.setattr(layers, "_blocks_of_8", lambda: True)


@pytest.fixture
def used(blocks, monkeypatch):
    """Numbers of layers whose gradients came from their outputs, one per call."""
    counts: list[int] = []
    ask = layers.from_outputs

    def counted(*arguments):
        found = ask(*arguments)
        counts.append(len(found))
        return found

    monkeypatch.setattr(layers, "from_outputs", counted)
    return counts


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_gradients_from_outputs_are_autograds(used, name, bias):
    net = lenet(bias=bias, **GEOMETRIES[name])
    rows = task_gradients(net.losses(), net.shared)
    assert used == [2]
    assert relative_error(rows, by_autograd(doubled(net))) < 2e-6


def test_the_whole_step_is_the_same(used):
    """Also beside layers treated without rows, and for a rule that looks at the rows."""
    for rule, path in ((AlignedMTL, "rows"), (AlignedMTL, "gram"), (PCGrad, "rows")):
        found = []
        for quick in (True, False):
            net, method = lenet(), rule()
            method.path = path
            if not quick:
                for p in net.shared:
                    p.register_hook(lambda g: g)  # a parameter with a hook is autograd's
            method.backward(net.losses(), shared=net.shared)
            found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert relative_error(found[0], found[1]) < 2e-6


def test_what_is_left_to_autograd(used):
    small = Net(nn.Conv2d(1, 10, 3))  # looking for it would cost more
    full = Net(nn.Conv2d(16, 24, 3), channels=16)
    colours = Net(nn.Conv2d(3, 10, 5), channels=3)
    nearly = Net(nn.Conv2d(12, 24, 3), channels=12)
    last = lenet().to(memory_format=torch.channels_last)
    hooked = Net(nn.Conv2d(1, 10, 5))
    hooked.trunk[0].weight.register_hook(lambda g: 2 * g)
    twice = Net(nn.Conv2d(10, 10, 3, padding=1), channels=10)
    twice.trunk.insert(1, twice.trunk[0])
    double = doubled(lenet().double())
    for net in (small, full, colours, nearly, last, hooked, twice, double):
        rows = task_gradients(net.losses(), net.shared)
        net.x = net.x.double()
        assert relative_error(rows, by_autograd(net)) < 2e-6
    assert used == [0] * 8


def test_an_input_with_channels_last_is_left_to_autograd(used):
    net = Net(nn.Conv2d(10, 20, 3), channels=10)
    net.x = net.x.contiguous(memory_format=torch.channels_last)
    task_gradients(net.losses(), net.shared)
    assert used == [0]


def test_other_vectors_are_left_to_autograd(monkeypatch):
    monkeypatch.setattr(layers, "_blocks_of_8", lambda: False)
    assert not layers.is_padded(torch.zeros(10, 1, 5, 5))


def test_frozen_bias_unused_layers_and_absent_tasks(used):
    net = lenet()
    net.trunk[2].bias.requires_grad_(False)
    shared = [p for p in net.shared if p.requires_grad]
    first, second = net.losses()
    branch = net.heads[1](torch.ones(1, net.heads[1].in_features)).square().mean()
    graph = LossGraph([first, branch, second.detach()])
    graph.partition(shared, [(), (), ()])
    rows, _ = graph.rows_and_head_gradients(keep_graph=True)
    assert used == [2]
    assert rows[1].eq(0).all()
    expected = torch.autograd.grad(first, shared)
    assert relative_error(rows[0], torch.cat([g.flatten() for g in expected])) < 2e-6
    assert graph.reached == [True] * len(shared)


def test_an_input_changed_afterwards_is_noticed(used):
    net = Net(nn.Conv2d(10, 20, 3), channels=10)
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
    assert torch.equal(layer.rows(), patches.transpose(1, 2).reshape(layer.n, -1))
