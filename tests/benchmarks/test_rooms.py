"""Rooms: exact maps on known geometry, frames fixed by split and number, training and noise."""

import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mtl_tutorial import benchmarks, cli
from mtl_tutorial.benchmarks import rooms
from mtl_tutorial.benchmarks.rooms import Camera, Scene, Surface, render, trace
from mtl_tutorial.noise import LabelNoise

SIZE = (48, 64)
GREY = np.full((2, 3), 0.5)


def empty_room(size=(4.0, 3.0, 6.0), **solids):
    shell = [
        Surface(rooms.CLASSES.index(name), GREY, 0, 1) for name in ("floor", "ceiling", "wall")
    ]
    extra = [
        Surface(rooms.CLASSES.index("objects"), GREY, 0, 1)
        for part in solids.values()
        for _ in range(len(part))
    ]
    arrays = {name: np.asarray(part, float) for name, part in solids.items()}
    return Scene(np.array(size), np.array([2.0, 2.8, 3.0]), shell + extra, **arrays)


def test_a_wall_in_front_has_one_depth_and_looks_back():
    camera = Camera(np.array([2.0, 1.5, 1.0]), yaw=0.0, pitch=0.0)
    _, label, depth, normal = render(empty_room(), camera, SIZE)
    middle = (slice(20, 28), slice(28, 36))
    assert np.allclose(depth[middle], 5.0, atol=1e-6)  # along the axis, not along the ray
    assert (label[middle] == rooms.CLASSES.index("wall")).all()
    assert np.allclose(normal[:, 24, 32], [0, 0, -1], atol=1e-6)


def test_floor_and_ceiling_where_the_pin_hole_puts_them():
    height, camera = 1.4, Camera(np.array([2.0, 1.4, 1.0]), 0.0, 0.0)
    _, label, depth, normal = render(empty_room(), camera, SIZE)
    rays = camera.rays(*SIZE).reshape(*SIZE, 3)
    floor, ceiling = (label == rooms.CLASSES.index(name) for name in ("floor", "ceiling"))
    assert floor[-1].any()
    assert ceiling[0].any()
    assert np.allclose(depth[floor], height / rays[..., 1][floor], rtol=1e-6)  # y is down
    assert np.allclose(depth[ceiling], (3.0 - height) / -rays[..., 1][ceiling], rtol=1e-6)
    assert np.allclose(normal[:, floor].T, [0, -1, 0], atol=1e-6)
    assert np.allclose(normal[:, ceiling].T, [0, 1, 0], atol=1e-6)
    # The wall on the right, x = 2 m from the camera, looks to the left.
    assert np.allclose(depth[24, -1], 2.0 / rays[24, -1, 0], rtol=1e-6)
    assert np.allclose(normal[:, 24, -1], [-1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(("yaw", "pitch"), [(0.3, 0.2), (-2.0, 0.4), (3.0, -0.1)])
def test_turning_the_camera_keeps_points_on_their_planes(yaw, pitch):
    camera = Camera(np.array([1.7, 1.5, 2.2]), yaw, pitch)
    room = empty_room()
    _, label, depth, normal = render(room, camera, SIZE)
    axes = camera.axes()
    assert np.allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(-1)  # from y up to y down
    points = camera.place + depth.reshape(-1, 1) * (camera.rays(*SIZE) @ axes)
    to_planes = np.minimum(np.abs(points), np.abs(points - room.size)).min(1)
    assert to_planes.max() < 1e-5
    world = normal.reshape(3, -1).T @ axes
    assert np.allclose(np.abs(world).max(1), 1, atol=1e-6)
    for name, up in (("floor", 1), ("ceiling", -1)):
        of = label.reshape(-1) == rooms.CLASSES.index(name)
        assert np.allclose(world[of, 1], up, atol=1e-6)


def test_a_ball_has_the_depth_and_the_normals_of_a_sphere():
    centre, radius = np.array([2.1, 1.4, 4.0]), 0.6
    camera = Camera(np.array([2.0, 1.5, 1.0]), 0.0, 0.0)
    room = empty_room(spheres=[[*centre, radius]])
    _, label, depth, normal = render(room, camera, SIZE)
    ball = label == rooms.CLASSES.index("objects")
    assert ball.sum() > 100
    axes, rays = camera.axes(), camera.rays(*SIZE).reshape(*SIZE, 3)
    points = camera.place + depth[ball][:, None] * (rays[ball] @ axes)
    away = points - centre
    assert np.allclose(np.linalg.norm(away, axis=1), radius, atol=1e-5)
    assert np.allclose(normal[:, ball].T @ axes, away / radius, atol=1e-4)
    # The pixels of the ball are those whose ray passes the centre within the radius.
    unit = (rays / np.linalg.norm(rays, axis=-1, keepdims=True)) @ axes
    to_centre = centre - camera.place
    apart = np.linalg.norm(np.cross(unit, to_centre), axis=-1)
    assert (ball == (apart < radius)).all()


def test_a_cylinder_and_a_box_are_hit_on_their_faces():
    room = empty_room(
        cylinders=[[2.0, 3.0, 0.5, 0.0, 1.0]], boxes=[[[0.5, 0.0, 3.0], [1.0, 0.8, 4.0]]]
    )
    eye = np.array([2.0, 2.0, 1.0])
    targets = {
        "side": ([2.0, 0.5, 2.5], [0, 0, -1]),
        "top": ([2.2, 1.0, 3.1], [0, 1, 0]),
        "front": ([0.75, 0.4, 3.0], [0, 0, -1]),
        "box top": ([0.8, 0.8, 3.3], [0, 1, 0]),
        "box side": ([1.0, 0.7, 3.2], [1, 0, 0]),
    }
    rays = np.array([np.array(point) - eye for point, _ in targets.values()])
    times, index, normal = trace(room, eye, rays)
    assert times == pytest.approx(np.ones(5), abs=1e-12)
    assert index.tolist() == [4, 4, 3, 3, 3]
    assert np.allclose(normal, [n for _, n in targets.values()], atol=1e-9)


def test_light_follows_lamberts_law():
    room = empty_room()
    camera = Camera(np.array([2.0, 1.5, 1.0]), 0.0, 0.0)
    image, _, depth, normal = render(room, camera, SIZE)
    points = camera.place + depth.reshape(-1, 1) * (camera.rays(*SIZE) @ camera.axes())
    to_lamp = room.lamp - points
    far = np.linalg.norm(to_lamp, axis=1)
    world = normal.reshape(3, -1).T @ camera.axes()
    light = 0.35 + 0.95 * (to_lamp * world).sum(1) / far / (1 + (far / 3) ** 2)
    assert np.abs(image[0].reshape(-1) - 255 * 0.5 * light).max() < 0.51


@pytest.mark.parametrize("number", range(12))
def test_drawn_frames_hold_together(number):
    image, label, depth, normal = rooms.frame("train", number, SIZE)
    assert image.shape == (3, *SIZE)
    assert image.dtype == np.uint8
    assert image.std() > 5
    assert ((label >= 0) & (label < 13)).all()
    assert len(np.unique(label)) >= 2
    assert (depth > 0.1).all()
    assert (depth < 9).all()
    assert np.abs(np.linalg.norm(normal, axis=0) - 1).max() < 1e-6
    _, camera = rooms.draw_scene(np.random.default_rng((20_12, 0, number)))
    rays = camera.rays(*SIZE).T.reshape(3, *SIZE)
    assert ((normal * rays).sum(0) < 1e-6).all()  # every surface faces the camera
    # Finite differences of the points agree with the normals inside a flat surface.
    points = depth * rays
    across, down = (
        points[:, 1:-1, 2:] - points[:, 1:-1, :-2],
        points[:, 2:, 1:-1] - points[:, :-2, 1:-1],
    )
    crossed = np.cross(down, across, axis=0)
    crossed /= np.maximum(np.linalg.norm(crossed, axis=0), 1e-12)
    inner = normal[:, 1:-1, 1:-1]
    flat = np.ones(inner.shape[1:], bool)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near = np.s_[1 + dy : 47 + dy, 1 + dx : 63 + dx]
            flat &= np.abs(normal[(slice(None), *near)] - inner).max(0) < 1e-6
            flat &= label[near] == label[1:-1, 1:-1]
    wall = flat & (label[1:-1, 1:-1] == rooms.CLASSES.index("floor"))
    if wall.any():
        assert (np.abs((crossed * inner).sum(0))[wall] > 0.999).all()


def test_frames_depend_on_split_and_number_alone():
    few, more = rooms.frames("train", 2, (24, 32)), rooms.frames("train", 3, (24, 32))
    assert torch.equal(few.inputs, more.inputs[:2])
    assert all(torch.equal(a, b[:2]) for a, b in zip(few.targets, more.targets, strict=True))
    other = rooms.frames("val", 2, (24, 32))
    assert not torch.equal(few.inputs, other.inputs)
    large = rooms.frame("train", 0, (288, 384))
    assert large[0].shape == (3, 288, 384)
    # The same room: the middle of each block of 12x12 rays is near the ray of the small image.
    near = large[2][6::12, 6::12]
    assert np.median(np.abs(near - few.targets[1][0].numpy()) / near) < 0.02


def test_all_classes_occur():
    seen = set(np.unique(rooms.frames("train", 60, (24, 32)).targets[0]).tolist())
    assert seen == set(range(13))


def small(**changes):
    bench = benchmarks.create("rooms")
    protocol = dataclasses.replace(bench.protocols["quick"], size=(24, 32), examples=8, **changes)
    bench = bench.under(protocol)
    bench.counts = {"train": 8, "val": 4, "test": 4}
    return bench.prepare(torch.device("cpu"))


@pytest.mark.parametrize(("task", "k"), [("segmentation", 0), ("depth", 1), ("normals", 2)])
def test_noise_is_that_of_excess_mtl(task, k):
    clean = small()
    noisy = clean.with_noise(LabelNoise(task, 0.5), 1, 0)
    before, after = clean.data["train"].targets[k], noisy.data["train"].targets[k]
    changed = (before != after).flatten(1).any(1)
    assert sorted(changed.nonzero()[:, 0].tolist()) == sorted(
        LabelNoise(task, 0.5).chosen(8, 1).tolist()
    )
    new = after[changed]
    if task == "segmentation":
        counts = torch.bincount(new.long().flatten() + 1, minlength=14).double()
        assert (counts / counts.sum() - 1 / 14).abs().max() < 0.02  # -1 to 12, all alike
    elif task == "depth":
        assert abs(new.mean()) < 0.05
        assert abs(new.std() - 1) < 0.05
    else:
        assert (new.norm(dim=1) - 1).abs().max() < 1e-5
        old = before[changed]
        # x : y stays as it was, z is another one.
        assert torch.allclose(new[:, 0] * old[:, 1], new[:, 1] * old[:, 0], atol=1e-5)
    assert noisy.data["val"] is clean.data["val"]


def test_papers_evaluation_takes_depth_and_normals_per_batch():
    exact, papers = small(batch_size=2), small(batch_size=2, evaluation="papers")
    torch.manual_seed(0)
    model = exact.build()
    a, b = exact.evaluate(model, "test"), papers.evaluate(model, "test")
    assert a["segmentation"] == b["segmentation"]
    assert a["normals"]["median angle"] != b["normals"]["median angle"]
    parts = [
        papers.tasks[2].metrics[1].statistics(model(x)[2], t[2])[0].item()
        for x, t in exact.data["test"].batches(2)
    ]
    assert b["normals"]["median angle"] == pytest.approx(np.mean(parts), rel=1e-5)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match=r"expected a network of .*unet"):
        small(network="unett")


def test_the_command_runs_and_says_that_it_is_synthetic(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms.Rooms, "counts", {"train": 8, "val": 4, "test": 4})
    arguments = ["run", "rooms", "--methods", "equal,imtl:level=feature", "--seeds", "1"]
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "rooms (synthetic)" in result.output
    assert "segmentation mIoU" in result.output
    assert "normals median angle" in result.output
