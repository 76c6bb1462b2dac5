"""Augmentation on known geometry, resizing, and the small network."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_rooms import empty_room
from torch.nn import functional as F

from mtl_tutorial import plots
from mtl_tutorial.benchmarks import dense, rooms
from mtl_tutorial.benchmarks.rooms import Camera, render

KINDS = ("label", "depth", "normal")
SIZE = (96, 128)


def seen(camera):
    """A room with a ball as tensors."""
    room = empty_room(spheres=[[2.3, 1.3, 4.0, 0.5]])
    image, label, depth, normal = map(torch.from_numpy, render(room, camera, SIZE))
    return image, (label, depth, normal)


CAMERA = Camera(np.array([1.8, 1.5, 1.0]), 0.25, 0.1)


def points(depth, rays):
    return depth * torch.from_numpy(rays).float().T.reshape(3, *SIZE)


def test_a_mirrored_view_is_the_view_of_the_mirrored_room():
    image, targets = dense.flip(*seen(CAMERA), KINDS)
    room = empty_room(spheres=[[4.0 - 2.3, 1.3, 4.0, 0.5]])
    mirrored = Camera(np.array([4.0 - 1.8, 1.5, 1.0]), -0.25, 0.1)
    room.lamp[0] = 4.0 - room.lamp[0]
    expected = [torch.from_numpy(x) for x in render(room, mirrored, SIZE)]
    assert (image.int() - expected[0].int()).abs().max() <= 1
    assert torch.equal(targets[0], expected[1])
    for got, want in zip(targets[1:], expected[2:], strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_flipping_twice_changes_nothing_and_offsets_turn_around():
    offset = torch.randn(2, 2, 4, 6)
    images, disparity = torch.rand(2, 3, 4, 6), torch.rand(2, 4, 6)
    kinds = ("offset", "disparity")
    once = dense.flip(images, (offset, disparity), kinds)
    assert torch.equal(once[1][0][:, 0], -offset[:, 0].flip(-1))
    assert torch.equal(once[1][0][:, 1], offset[:, 1].flip(-1))
    twice = dense.flip(*once, kinds)
    assert torch.equal(twice[0], images)
    assert torch.equal(twice[1][0], offset)


@pytest.mark.parametrize(("scale", "top", "left"), [(1.0, 0, 0), (1.5, 10, 20), (1.2, 0, 21)])
def test_an_enlarged_view_is_that_of_the_squeezed_scene(scale, top, left):
    image, targets = seen(CAMERA)
    _, (label, depth, normal) = dense.scale_crop(
        image, targets, KINDS, scale, top, left, squeeze=True
    )
    height, width = int(SIZE[0] / scale), int(SIZE[1] / scale)
    rows = top + ((torch.arange(SIZE[0]) + 0.5) * height / SIZE[0]).long()
    columns = left + ((torch.arange(SIZE[1]) + 0.5) * width / SIZE[1]).long()
    assert torch.equal(label, targets[0][rows][:, columns])
    # What is seen at a pixel stood at (X, Y, Z) and stands at (X, Y, Z / scale).
    before = points(targets[1], CAMERA.rays(*SIZE))[:, rows][:, :, columns]
    assert torch.allclose(depth, before[2] / scale)
    # The normal of the squeezed scene: perpendicular to squeezed steps along the surface.
    old = targets[2][:, rows][:, :, columns]
    for step in ([1.0, 0, 0], [0, 1.0, 0], [0.3, -0.5, 0.8]):
        along = torch.linalg.cross(old, torch.tensor(step).view(3, 1, 1).expand_as(old), dim=0)
        squeezed = along * torch.tensor([1, 1, 1 / scale]).view(3, 1, 1)
        assert (squeezed * normal).sum(0).abs().max() < 1e-5
    assert (normal.norm(dim=0) - 1).abs().max() < 1e-5


def test_mtan_leaves_normals_and_divides_depth():
    image, targets = seen(CAMERA)
    _, (_, depth, normal) = dense.scale_crop(image, targets, KINDS, 1.5, 16, 21)
    assert torch.allclose(depth[0, 0], targets[1][16, 21] / 1.5)
    assert torch.equal(normal[:, 0, 0], targets[2][:, 16, 21])
    with pytest.raises(ValueError, match="window inside 96x128"):
        dense.scale_crop(image, targets, KINDS, 1.5, 33, 0)


def test_a_fronto_parallel_wall_comes_nearer_and_its_texture_grows():
    camera = Camera(np.array([2.0, 1.5, 1.0]), 0.0, 0.0)
    room = empty_room((40.0, 40.0, 6.0))
    camera.place[:2] = 20.0
    size = (96, 128)
    image, label, depth, normal = map(torch.from_numpy, render(room, camera, size))
    _, (_, near, _) = dense.scale_crop(image, (label, depth, normal), KINDS, 1.2, 8, 10)
    assert torch.allclose(near, torch.tensor(5 / 1.2))
    stripes = (torch.arange(128) // 12 % 2).float().expand(3, 96, 128)
    larger, (disparity, offset) = dense.scale_crop(
        stripes, (depth, torch.ones(2, *size)), ("disparity", "offset"), 1.5, 0, 0
    )
    runs = (larger[0, 0].round().diff() != 0).nonzero().flatten().diff().double().mean()
    assert runs.item() == pytest.approx(12 * 128 / 85, abs=0.5)
    assert torch.allclose(disparity, torch.tensor(7.5))
    assert torch.allclose(offset, torch.tensor(1.5))


def test_augment_is_fixed_by_its_generator_and_uses_every_scale():
    images = torch.rand(64, 3, 12, 18)
    depth, label = torch.full((64, 12, 18), 6.0), torch.arange(64).view(-1, 1, 1).expand(64, 12, 18)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return dense.augment(images, (label, depth), ("label", "depth"), generator)

    a, b, c = run(0), run(0), run(1)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])
    assert torch.equal(a[1][0], label)  # each image keeps its own maps
    assert a[1][1].unique().tolist() == pytest.approx([4.0, 5.0, 6.0])
    same = (a[0] == images).flatten(1).all(1).double().mean()
    mirrored = (a[0] == images.flip(-1)).flatten(1).all(1).double().mean()
    assert same > 0.05
    assert mirrored > 0.05


def test_resizing_keeps_depth_and_scales_pixels():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    targets = (torch.ones(2, 8, 12), torch.ones(2, 8, 12), torch.ones(2, 2, 8, 12))
    kinds = ("depth", "disparity", "offset")
    small, (depth, disparity, offset) = dense.resize(images, targets, kinds, (4, 3))
    assert small.shape == (2, 3, 4, 3)
    assert small.dtype == torch.uint8
    assert (depth == 1).all()
    assert (disparity == 0.25).all()
    assert (offset[:, 0] == 0.25).all()
    assert (offset[:, 1] == 0.5).all()
    assert dense.resize(images, targets, kinds, (8, 12))[0] is images


def test_resizing_takes_the_pixel_under_the_centre():
    target = torch.arange(24).view(4, 6)
    for size in ((2, 3), (8, 12), (3, 5), (4, 6)):
        want = F.interpolate(target[None, None].float(), size, mode="nearest-exact")[0, 0]
        assert torch.equal(dense.resize_nearest(target, size).float(), want)


def test_the_small_network_keeps_the_size_of_its_image():
    net = dense.small_dense_net((13, 1, 3))
    for size in ((48, 64), (90, 120), (26, 34)):
        shapes = [tuple(out.shape) for out in net(torch.rand(2, 3, *size))]
        assert shapes == [(2, c, *size) for c in (13, 1, 3)]
    with pytest.raises(ValueError, match="even height and width"):
        net(torch.rand(1, 3, 25, 32))
    assert sum(p.numel() for p in net.shared_parameters()) == 83_824


def test_augmented_batches_reach_the_training_loop(monkeypatch):
    bench = rooms.Rooms()
    protocol = bench.protocols["full"]
    assert protocol.augment
    monkeypatch.setattr(rooms.Rooms, "counts", {"train": 8, "val": 2, "test": 2})
    bench = bench.under(protocol).prepare(torch.device("cpu"))
    images, (_, depth, _) = next(bench.batches(protocol, torch.Generator().manual_seed(0)))
    assert images.shape == (8, 3, 96, 128)
    stored = bench.data["train"].targets[1]
    assert depth.max() <= stored.max()
    plain = next(bench.data["train"].batches(8, torch.Generator().manual_seed(0)))
    assert not torch.equal(images, plain[0])


def test_a_contact_sheet_has_a_column_per_image_and_two_rows_per_map():
    kinds = ("label", "label", "depth", "normal", "offset")
    truths = [torch.zeros(3, 8, 12), torch.zeros(3, 8, 12), torch.ones(3, 8, 12)]
    truths += [torch.rand(3, 3, 8, 12), torch.rand(3, 2, 8, 12)]
    outputs = [torch.rand(3, c, 8, 12) for c in (4, 1, 1, 3, 2)]
    outputs[0][:, 2] = 9.0
    outputs[1] -= 2.0
    figure = plots.contact_sheet(torch.rand(3, 3, 8, 12), truths, outputs, kinds)
    panels = np.array(figure.axes).reshape(1 + 2 * len(kinds), 3)
    shown = [[panel.images[0].get_array() for panel in row] for row in panels]
    assert (shown[2][0] == 2).all()  # the class with the largest output
    assert (shown[4][0] == 0).all()  # below zero: not in the class
    assert np.allclose(shown[5][1], 1)
    plt.close(figure)
