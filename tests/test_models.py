"""Shared trunks and heads; separate networks trained together are networks trained alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtl_tutorial.models import HardSharing, Separate, count_parameters, small_convnet


def test_small_convnet_has_the_parameters_that_its_text_promises():
    net = small_convnet(10, [10, 10])
    # 1 -> 8 and 8 -> 16 channels of 3x3; 10 -> 5 -> 2 pixels a side, so 16 * 2 * 2 = 64 inputs.
    trunk = (9 * 8 + 8) + (9 * 8 * 16 + 16) + (64 * 32 + 32)
    assert trunk == 3328
    assert count_parameters(net.shared_parameters()) == trunk
    assert [count_parameters(head) for head in net.head_parameters()] == [330, 330]
    assert count_parameters(net.parameters()) == trunk + 660


@pytest.mark.parametrize(
    ("side", "classes", "width", "hidden"), [(8, [3], 2, 5), (13, [2, 7], 4, 6)]
)
def test_small_convnet_shapes(side, classes, width, hidden):
    net = small_convnet(side, classes, width, hidden)
    x = torch.randn(3, 1, side, side)
    assert net.features(x).shape == (3, hidden)
    assert [out.shape for out in net(x)] == [(3, c) for c in classes]


def test_shared_and_head_parameters_are_all_parameters_once():
    net = small_convnet(10, [10, 10])
    groups = [net.shared_parameters(), *net.head_parameters()]
    ids = [id(p) for group in groups for p in group]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())


def test_outputs_of_chosen_tasks():
    net = HardSharing(nn.Identity(), [nn.Linear(2, 1 + k) for k in range(3)])
    x = torch.randn(4, 2)
    first, second, third = net(x)
    chosen = net.outputs(net.features(x), [2, 0])
    assert torch.equal(chosen[0], third)
    assert torch.equal(chosen[1], first)
    assert second.shape == (4, 2)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_separate_networks_take_the_steps_they_would_take_alone(name):
    def build():
        return small_convnet(10, [10, 10])

    both = Separate(build, 2)
    alone = [copy.deepcopy(net) for net in both.networks]
    assert both.shared_parameters() == []
    assert [count_parameters(p) for p in both.head_parameters()] == [3328 + 330] * 2

    x = torch.randn(16, 1, 10, 10)
    labels = [torch.randint(10, (16,)) for _ in range(2)]
    optimizer = OPTIMIZERS[name](both.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        sum(F.cross_entropy(out, y) for out, y in zip(both(x), labels, strict=True)).backward()
        optimizer.step()
    for k, net in enumerate(alone):
        optimizer = OPTIMIZERS[name](net.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x)[0], labels[k]).backward()
            optimizer.step()
        for ours, theirs in zip(both.networks[k].parameters(), net.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_separate_networks_start_from_different_weights():
    both = Separate(lambda: small_convnet(10, [10, 10]), 2)
    one, other = (net.trunk[0].weight for net in both.networks)
    assert not torch.equal(one, other)


def test_network_k_keeps_head_k():
    def build():
        return HardSharing(nn.Linear(2, 3), [nn.Linear(3, 1 + k) for k in range(3)])

    both = Separate(build, 3)
    assert [out.shape for out in both(torch.randn(5, 2))] == [(5, 1), (5, 2), (5, 3)]
    assert [len(net.heads) for net in both.networks] == [1, 1, 1]
