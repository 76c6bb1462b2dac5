"""Networks for maps and faces: sizes of the reference, what is shared, and that all can train."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mtl_tutorial import methods
from mtl_tutorial.branched_models import (
    MTAN,
    CrossStitch,
    MMoE,
    small_cross_stitch,
    small_mmoe,
    small_stages,
)
from mtl_tutorial.dense_models import NETWORKS
from mtl_tutorial.hard_models import (
    Enlarged,
    PyramidHead,
    SegNetTrunk,
    celeba_net,
    deeplab,
    dilated_resnet50,
    pspnet,
    resnet18_faces,
    segnet,
    unet,
)
from mtl_tutorial.models import HardSharing, count_parameters

NYUV2 = [13, 1, 3]
NARROW = (4, 8, 8, 8, 8)


def sizes(network):
    heads = [count_parameters(head) for head in network.head_parameters()]
    return count_parameters(network.shared_parameters()), heads


# ------------------------------------------------------------------ sizes that others have printed


def test_segnet_has_the_parameters_that_mtans_code_divides_by():
    shared, heads = sizes(segnet([13]))
    assert shared + sum(heads) == 24_981_069
    assert shared == 24_943_296
    assert sizes(segnet(NYUV2)) == (shared, [37_773, 36_993, 37_123])


def test_mtan_has_the_published_ratio_to_segnet():
    network = MTAN(NYUV2)
    total = count_parameters(network.parameters())
    assert round(total / 24_981_069, 2) == 1.77
    # Counted by hand: SegNet 24,943,296 and the carrying convolutions with their batch norms.
    down = [(64, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    up = [(64, 64), (128, 64), (256, 128), (512, 256), (512, 512)]
    carried = sum(9 * a * b + b + 2 * b for a, b in down + up)
    assert sizes(network)[0] == 24_943_296 + carried


def test_dilated_resnet_has_a_resnets_parameters_at_an_eighth_of_the_size():
    trunk = dilated_resnet50()
    assert count_parameters(trunk.parameters()) == 25_557_032 - (2048 * 1000 + 1000)
    trunk.eval()
    with torch.no_grad():
        assert trunk(torch.rand(1, 3, 64, 96)).shape == (1, 2048, 8, 12)


def test_pyramid_head_has_the_parameters_of_mgda_ubs():
    head = PyramidHead(2048, 13)
    branches = 4 * (2048 * 512 + 2 * 512)
    assert count_parameters(head.parameters()) == (
        branches + 9 * 4096 * 512 + 2 * 512 + 512 * 13 + 13
    )


def test_unet_has_the_parameters_of_pascals():
    # Convolutions of the official code, input and output channels, each with bias and batch norm.
    convolutions = [
        *[(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)],
        *[(256, 512), (512, 512), (512, 512), (512, 512)],
        *[(1024, 512), (512, 256), (512, 256), (256, 128), (256, 128), (128, 64)],
        *[(128, 64), (64, 64)],
    ]
    shared = sum(9 * a * b + b + 2 * b for a, b in convolutions)
    assert shared == 17_267_328
    assert sizes(unet([1] * 7)) == (shared, [65] * 7)


def test_celeba_net_has_the_parameters_of_famos():
    widths = [3, 64, 128, 128, 256, 256, 512, 512]
    convolutions = sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    shared = convolutions + 2 * (512 * 512 + 2 * 512)
    assert shared == 5_176_640
    assert sizes(celeba_net([1] * 40)) == (shared, [513] * 40)
    assert sizes(celeba_net([1], bias=True, running=False))[0] == shared + 1024


def test_resnet18_has_a_resnets_parameters():
    assert sizes(resnet18_faces([1] * 40)) == (11_689_512 - 513_000, [513] * 40)


# --------------------------------------------------------------------------- what is shared


SMALL = {
    "segnet": (lambda: segnet([3, 1], widths=NARROW), 32),
    "mtan": (lambda: MTAN([3, 1], widths=NARROW), 32),
    "unet": (lambda: unet([3, 1], widths=NARROW), 16),
    "cross_stitch": (lambda: small_cross_stitch([3, 1], width=4), 32),
    "mmoe": (lambda: small_mmoe([3, 1], width=4, experts=2), 32),
    "celeba_net": (lambda: celeba_net([3, 1], width=4), 32),
    "pspnet": (
        lambda: HardSharing(
            nn.Sequential(nn.Conv2d(3, 6, 3, 8, 1), nn.ReLU()),
            [Enlarged(PyramidHead(6, c, width=4), 8) for c in (3, 1)],
        ),
        64,
    ),
}
HARD = ["segnet", "unet", "celeba_net", "pspnet"]


def make(name):
    torch.manual_seed(0)
    build, side = SMALL[name]
    return build(), torch.rand(4, 3, side, side)


def losses_of(outputs):
    return [(out - k).square().mean() for k, out in enumerate(outputs)]


@pytest.mark.parametrize("name", SMALL)
def test_shared_parameters_are_those_that_both_losses_depend_on(name):
    network, x = make(name)
    first, second = losses_of(network(x))
    groups = [network.shared_parameters(), *network.head_parameters()]
    ids = [id(p) for group in groups for p in group]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())

    def reached(loss, parameters):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [gradient is not None for gradient in found]

    shared, one, other = groups
    assert all(reached(first, shared))
    assert all(reached(second, shared))
    assert all(reached(first, one))
    assert all(reached(second, other))
    assert not any(reached(first, other))
    assert not any(reached(second, one))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["aligned_mtl", "imtl"])
def test_every_network_learns_with_gradient_balancing_on_the_parameters(name, method):
    network, x = make(name)
    rule = methods.create(method)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = [p.detach().clone() for p in network.parameters()]
    for _ in range(2):
        info = rule.step(
            lambda: losses_of(network(x)),
            optimizer,
            shared=network.shared_parameters(),
            heads=network.head_parameters(),
        )
    assert info.losses.isfinite().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    # What batch norm takes out again, a bias before it, has no gradient but rounding.
    assert sum(moved) >= 0.5 * len(moved)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("method", ["aligned_mtl", "imtl"])
def test_networks_with_one_trunk_learn_with_balancing_on_the_features(name, method):
    network, x = make(name)
    rule = methods.create(method)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def closure():
        z = network.features(x)
        return losses_of(network.outputs(z)), z

    info = rule.step(
        closure, optimizer, shared=network.shared_parameters(), heads=network.head_parameters()
    )
    assert info.losses.isfinite().all()
    assert any(p.grad.abs().sum() > 0 for p in network.shared_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", sorted(set(SMALL) - set(HARD)))
def test_networks_without_one_representation_say_so(name):
    network, x = make(name)
    with pytest.raises(TypeError, match="parameter level"):
        network.features(x)
    with pytest.raises(TypeError, match="parameter level"):
        network.outputs(x)


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"celeba_net"}))
def test_maps_have_the_size_of_the_images(name):
    network, x = make(name)
    wide = torch.cat([x, x], 3)
    assert [out.shape for out in network(wide)] == [
        (4, c, x.shape[2], 2 * x.shape[3]) for c in (3, 1)
    ]


@pytest.mark.parametrize("name", HARD)
def test_chosen_tasks_are_those_of_all(name):
    network, x = make(name)
    network.eval()
    every = network(x)
    chosen = network.outputs(network.features(x), [1])
    assert torch.equal(chosen[0], every[1])


# --------------------------------------------------------------------------- properties


def test_unpooling_puts_values_back_where_they_came_from():
    trunk = SegNetTrunk(widths=NARROW).eval()
    with torch.no_grad():
        down, up = trunk.stages(torch.rand(2, 3, 48, 32))
    for (entry, whole), (spread, out) in zip(down, up, strict=True):
        assert entry.shape == whole.shape == spread.shape
        assert spread.shape[-2:] == out.shape[-2:]
        # One value at most per 2x2 square, at the place of that square's maximum.
        n, c = spread.shape[:2]
        squares = spread.unfold(2, 2, 2).unfold(3, 2, 2).reshape(n, c, -1, 4)
        maxima = whole.unfold(2, 2, 2).unfold(3, 2, 2).reshape(n, c, -1, 4)
        assert ((squares != 0).sum(-1) <= 1).all()
        hit = (squares != 0).any(-1)
        where = torch.where(squares != 0, 1, 0).argmax(-1)
        top = maxima.gather(-1, where[..., None])[..., 0]
        assert torch.equal(top[hit], maxima.amax(-1)[hit])


def test_segnet_takes_sides_that_are_no_multiples_of_32():
    network = segnet([2], widths=NARROW)
    assert network(torch.rand(2, 3, 45, 70))[0].shape == (2, 2, 45, 70)
    with pytest.raises(ValueError, match="32 x 32"):
        network(torch.rand(2, 3, 16, 64))


def test_mtan_whose_masks_are_one_is_segnet():
    torch.manual_seed(1)
    network = MTAN([3, 1], widths=NARROW).eval()
    for masks in [*network.masks_down, *network.masks_up]:
        for mask in masks:
            nn.init.zeros_(mask[4].weight)
            nn.init.constant_(mask[4].bias, 40.0)
    plain = HardSharing(network.trunk, network.heads).eval()
    x = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        for ours, theirs in zip(network(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)


def test_mtan_carries_masked_features_down():
    network = MTAN([3], widths=NARROW).eval()
    for mask in network.masks_down[0]:
        nn.init.zeros_(mask[4].weight)
        nn.init.constant_(mask[4].bias, -200.0)
    carried = []
    for carry in network.carry_down:
        carry.register_forward_pre_hook(lambda _m, x: carried.append(x[0]))
    with torch.no_grad():
        network(torch.rand(2, 3, 32, 32))
    assert len(carried) == 5
    assert not any(x.any() for x in carried)


def heads_of(width):
    return [Enlarged(nn.Conv2d(4 * width, c, 1), 4) for c in (3, 1)]


def test_cross_stitch_that_mixes_nothing_is_separate_networks():
    networks, heads = [small_stages(width=4) for _ in range(2)], heads_of(4)
    stitched = CrossStitch(networks, heads, [4, 8], own=1.0).eval()
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        for k, out in enumerate(stitched(x)):
            alone = nn.Sequential(*networks[k]).eval()(x)
            torch.testing.assert_close(out, heads[k](alone))


def test_cross_stitch_starts_with_shares_that_sum_to_one():
    stitched = CrossStitch([small_stages(width=4)] * 3, [nn.Identity()] * 3, [4, 8])
    for unit in stitched.units:
        torch.testing.assert_close(unit.sum(1), torch.ones_like(unit[:, 0]))
        torch.testing.assert_close(unit[1, 1], torch.full_like(unit[1, 1], 0.9))
        torch.testing.assert_close(unit[1, 2], torch.full_like(unit[1, 2], 0.05))


def test_cross_stitch_mixes_by_rows():
    first, second = (nn.Conv2d(1, 1, 1, bias=False) for _ in range(2))
    nn.init.constant_(first.weight, 2.0)
    nn.init.constant_(second.weight, 5.0)
    networks = [[first, nn.Identity()], [second, nn.Identity()]]
    stitched = CrossStitch(networks, [nn.Identity()] * 2, [1])
    stitched.units[0].data = torch.tensor([[1.0, 2.0], [0.0, 1.0]])[..., None]
    with torch.no_grad():
        one, other = stitched(torch.ones(1, 1, 1, 1))
    assert float(one) == 12.0  # 1 x 2 + 2 x 5
    assert float(other) == 5.0


def test_cross_stitch_with_equal_rows_gives_all_networks_the_same():
    networks = [small_stages(width=4) for _ in range(2)]
    stitched = CrossStitch(networks, [nn.Identity()] * 2, [4, 8], own=0.5).eval()
    last = networks[0][-1]
    stitched.networks[1][2].load_state_dict(last.state_dict())
    with torch.no_grad():
        first, second = stitched(torch.rand(2, 3, 16, 24))
    torch.testing.assert_close(first, second)


def test_gates_sum_to_one_and_mix_the_experts():
    experts = [nn.Sequential(*small_stages(width=4)).eval() for _ in range(3)]
    network = MMoE(experts, [nn.Identity()] * 2).eval()
    x = torch.rand(5, 3, 16, 24)
    with torch.no_grad():
        shares = network.shares(x)
        for k, out in enumerate(network(x)):
            assert shares[k].shape == (5, 3)
            torch.testing.assert_close(shares[k].sum(1), torch.ones(5))
            parts = [shares[k][:, e, None, None, None] * f(x) for e, f in enumerate(experts)]
            torch.testing.assert_close(out, sum(parts))


def test_one_expert_is_hard_sharing():
    expert = nn.Sequential(*small_stages(width=4)).eval()
    network = MMoE([expert], heads_of(4)).eval()
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        plain = HardSharing(expert, network.heads)(x)
        for ours, theirs in zip(network(x), plain, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("build", [pspnet, deeplab])
def test_resnet_networks_give_maps_and_gradients(build):
    network = build([3, 1])
    x = torch.rand(2, 3, 32, 64)
    z = network.features(x)
    assert z.shape == (2, 2048, 4, 8)
    losses = losses_of(network.outputs(z))
    assert [out.shape for out in network.outputs(z)] == [(2, 3, 32, 64), (2, 1, 32, 64)]
    info = methods.create("aligned_mtl").backward(
        losses,
        shared=network.shared_parameters(),
        heads=network.head_parameters(),
        features=z,
    )
    assert info.gram.shape == (2, 2)
    assert network.trunk[1].weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="multiples of 8"):
        network(torch.rand(2, 3, 30, 64))


def test_faces_give_a_logit_per_task():
    network = resnet18_faces([1] * 3)
    outputs = network(torch.rand(2, 3, 54, 44))
    assert [out.shape for out in outputs] == [(2, 1)] * 3
    losses = [F.binary_cross_entropy_with_logits(out, torch.ones(2, 1)) for out in outputs]
    info = methods.create("imtl").backward(losses, shared=network.shared_parameters())
    assert info.losses.isfinite().all()


def test_batch_statistics_rule_evaluation_where_the_protocol_says_so():
    x = torch.rand(6, 3, 32, 32)
    own = celeba_net([1], width=2, running=False).eval()
    kept = celeba_net([1], width=2).eval()
    with torch.no_grad():
        assert not torch.allclose(own(x)[0][:3], own(x[:3])[0], atol=1e-6)
        torch.testing.assert_close(kept(x)[0][:3], kept(x[:3])[0])


def test_names_build_networks():
    for name, build in NETWORKS.items():
        if not name.endswith("pretrained"):  # those download
            network = build([2, 1])
            assert len(network.head_parameters()) == 2
            assert network.shared_parameters()
