"""Rooms: a synthetic twin of NYUv2, made in code.

A room is a box with furniture in it, put together from boxes, upright cylinders and spheres, all
along the axes. A pin-hole camera looks into it: one ray per pixel, the nearest solid gives class,
depth and normal, exactly. Colours come from procedural textures, Lambert's law with one lamp that
fades with distance, and a little noise of the sensor. Tasks, classes and conventions are NYUv2's:

- segmentation into 13 classes (`CLASSES`), every pixel with one;
- depth in metres along the camera's axis, not along the ray;
- unit normals in the camera's frame, x to the right, y down, z forward; they face the camera.

Every frame is drawn from its split and its number alone, so a smaller set is the beginning of a
larger one. The world's axes: x and z along the floor, y up, a left-handed frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..dense_metrics import DEPTH, NORMALS, SEGMENTATION, cross_entropy, depth_l1, normal_cosine
from ..noise import normal_depths, turned_normals, uniform_labels
from .base import Protocol, Splits, Task
from .dense import DenseBenchmark, DenseData

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
Normals = Callable[[Whole, Whole, Array], Array]  # rays that hit, which solid, distance

CLASSES = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)
"""NYUv2's 13 classes in their usual order."""

FIELD_OF_VIEW = 62.0  # degrees, across; about that of the camera that NYUv2 was taken with
_RAYS = 2048  # at a time, so that the arrays stay in the cache
_FAR = 1e6


# --------------------------------------------------------------------------------- the scene


@dataclass
class Surface:
    """Class and look of a solid: two colours from 0 to 1 that a texture mixes."""

    label: int
    colors: Array  # (2, 3)
    texture: int  # 0 plain, 1 chequers, 2 stripes, 3 clouds
    frequency: float  # per metre


@dataclass
class Scene:
    """A room with solids and a lamp; lengths in metres, x and z along the floor, y up.

    Attributes:
        size: of the room along x, y, z; one corner is the origin.
        lamp: its place.
        surfaces: of floor, ceiling and walls, then of the solids: boxes, cylinders, spheres.
        boxes: lower and upper corners (n, 2, 3).
        cylinders: x, z, radius, lower and upper y (n, 5), upright.
        spheres: centre and radius (n, 4).
    """

    size: Array
    lamp: Array
    surfaces: list[Surface]
    boxes: Array = field(default_factory=lambda: np.zeros((0, 2, 3), np.float64))
    cylinders: Array = field(default_factory=lambda: np.zeros((0, 5), np.float64))
    spheres: Array = field(default_factory=lambda: np.zeros((0, 4), np.float64))


@dataclass
class Camera:
    """A pin-hole camera.

    Attributes:
        place: its centre in the room.
        yaw: direction of view in radians, 0 along z, turning towards x.
        pitch: in radians, downwards.
    """

    place: Array
    yaw: float
    pitch: float

    def axes(self) -> Array:
        """Right, down and forward (3, 3), one per row, in the room's frame."""
        cy, sy, cp, sp = (f(a) for a in (self.yaw, self.pitch) for f in (np.cos, np.sin))
        forward = (sy * cp, -sp, cy * cp)
        return np.array([(cy, 0, -sy), (-sy * sp, -cp, -cy * sp), forward], np.float64)

    def rays(self, height: int, width: int) -> Array:
        """Directions (height * width, 3) in the camera's frame; z is 1, so length is depth."""
        focal = width / 2 / np.tan(np.radians(FIELD_OF_VIEW) / 2)
        x = (np.arange(width) + 0.5 - width / 2) / focal
        y = (np.arange(height) + 0.5 - height / 2) / focal
        grid = np.stack([*np.meshgrid(x, y), np.ones((height, width))], -1)
        return grid.reshape(-1, 3).astype(np.float64)


def trace(scene: Scene, origin: Array, rays: Array) -> tuple[Array, Whole, Array]:
    """The nearest surface along each ray.

    Args:
        scene: what there is to hit; the origin lies inside the room and outside all solids.
        origin: where the rays start, (3,).
        rays: directions (n, 3) in the room's frame, of any length.

    Returns:
        Distance in lengths of the ray (n,), index into the scene's surfaces (n,), outward normal
        (n, 3).
    """
    inverse = 1 / np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    # The room is left through one of six planes: along each axis the one that the ray goes to.
    exits = (np.where(inverse > 0, scene.size, 0.0) - origin) * inverse
    axis = exits.argmin(1)
    n = len(rays)
    rows = np.arange(n)
    best = exits[rows, axis]
    up = inverse[:, 1] > 0
    index = np.where(axis == 1, np.where(up, 1, 0), 2)
    normal = np.zeros((n, 3), np.float64)
    normal[rows, axis] = -np.sign(inverse[rows, axis])
    first = 3
    for times, normals in (
        _boxes(scene.boxes, origin, inverse),
        _cylinders(scene.cylinders, origin, rays),
        _spheres(scene.spheres, origin, rays),
    ):
        if times.shape[1]:
            which = times.argmin(1)
            nearest = times[rows, which]
            hit = np.nonzero(nearest < best)[0]
            best[hit], index[hit] = nearest[hit], first + which[hit]
            normal[hit] = normals(hit, which[hit], nearest[hit])
        first += times.shape[1]
    return best, index, normal


def _boxes(boxes: Array, origin: Array, inverse: Array) -> tuple[Array, Normals]:
    """Distances (n, m), and a function to normals: the slab method."""
    enter = np.full((len(inverse), len(boxes)), -_FAR, np.float64)
    leave = -enter
    for k in range(3):
        a = inverse[:, k, None] * (boxes[None, :, 0, k] - origin[k])
        b = inverse[:, k, None] * (boxes[None, :, 1, k] - origin[k])
        np.maximum(enter, np.minimum(a, b), out=enter)
        np.minimum(leave, np.maximum(a, b), out=leave)
    times = np.where((enter <= leave) & (enter > 0), enter, _FAR)

    def normals(hit: Whole, which: Whole, at: Array) -> Array:
        side = np.where(inverse[hit] > 0, boxes[which, 0], boxes[which, 1])
        axis = np.abs((side - origin) * inverse[hit] - at[:, None]).argmin(1)
        found = np.zeros((len(hit), 3), np.float64)
        rows = np.arange(len(hit))
        found[rows, axis] = -np.sign(inverse[hit, axis])
        return found

    return times, normals


def _cylinders(cylinders: Array, origin: Array, rays: Array) -> tuple[Array, Normals]:
    """The same for upright cylinders: the round side and the two discs."""
    x, z, radius, low, high = cylinders.T[:, None, :]
    dx, dy, dz = rays.T[:, :, None]
    ox, oz = origin[0] - x, origin[2] - z
    a = np.maximum(dx**2 + dz**2, 1e-12)
    b = ox * dx + oz * dz
    root = b**2 - a * (ox**2 + oz**2 - radius**2)
    side = (-b - np.sqrt(np.maximum(root, 0))) / a
    y = origin[1] + side * dy
    times = np.where((root > 0) & (side > 0) & (y >= low) & (y <= high), side, _FAR)
    safe = np.where(np.abs(dy) < 1e-9, 1e-9, dy)
    cap = np.where(safe < 0, high, low)
    flat = (cap - origin[1]) / safe
    inside = (ox + flat * dx) ** 2 + (oz + flat * dz) ** 2 <= radius**2
    discs = np.where(inside & (flat > 0), flat, _FAR)

    def normals(hit: Whole, which: Whole, at: Array) -> Array:
        point = origin + at[:, None] * rays[hit]
        found = np.zeros((len(hit), 3), np.float64)
        found[:, 0] = (point[:, 0] - x[0, which]) / radius[0, which]
        found[:, 2] = (point[:, 2] - z[0, which]) / radius[0, which]
        flat_hit = discs[hit, which] <= times[hit, which]
        found[flat_hit] = 0
        found[flat_hit, 1] = -np.sign(rays[hit[flat_hit], 1])
        return found

    return np.minimum(times, discs), normals


def _spheres(spheres: Array, origin: Array, rays: Array) -> tuple[Array, Normals]:
    """The same for spheres."""
    away = origin - spheres[:, :3]
    a = (rays**2).sum(1, keepdims=True)
    b = rays @ away.T
    root = b**2 - a * ((away**2).sum(1) - spheres[:, 3] ** 2)
    times = (-b - np.sqrt(np.maximum(root, 0))) / a
    times = np.where((root > 0) & (times > 0), times, _FAR)

    def normals(hit: Whole, which: Whole, at: Array) -> Array:
        point = origin + at[:, None] * rays[hit]
        return (point - spheres[which, :3]) / spheres[which, 3:]

    return times, normals


# --------------------------------------------------------------------------------- the image


Maps = NDArray[np.float32]
Frame = tuple[NDArray[np.uint8], NDArray[np.int8], Maps, Maps]


def render(
    scene: Scene, camera: Camera, size: tuple[int, int], rng: np.random.Generator | None = None
) -> Frame:
    """What the camera sees.

    Args:
        scene: the room.
        camera: inside the room, outside all solids.
        size: height and width in pixels.
        rng: of the sensor's noise; none for a clean image.

    Returns:
        Image (3, H, W), classes (H, W), depth (H, W) in metres, normals (3, H, W).
    """
    height, width = size
    axes, rays = camera.axes(), camera.rays(height, width)
    n = height * width
    image, normals = np.empty((n, 3), np.float64), np.empty((n, 3), np.float64)
    depth, labels = np.empty(n, np.float64), np.empty(n, np.int8)
    of_surface = np.array([surface.label for surface in scene.surfaces], np.int8)
    for start in range(0, n, _RAYS):
        part = slice(start, start + _RAYS)
        world = rays[part] @ axes
        depth[part], index, normal = trace(scene, camera.place, world)
        points = camera.place + depth[part, None] * world
        labels[part] = of_surface[index]
        normals[part] = normal @ axes.T
        image[part] = _shade(scene, points, index, normal)
    if rng is not None:
        image += 0.012 * rng.standard_normal(image.shape)
    pixels = (255 * image.clip(0, 1)).round().astype(np.uint8)
    return (
        pixels.T.reshape(3, height, width),
        labels.reshape(size),
        depth.astype(np.float32).reshape(size),
        normals.astype(np.float32).T.reshape(3, height, width),
    )


def _shade(scene: Scene, points: Array, index: Whole, normal: Array) -> Array:
    """Colours (n, 3): texture, Lambert's law, a lamp that fades, light from everywhere."""
    colors = np.stack([s.colors for s in scene.surfaces])[index]
    texture = np.array([s.texture for s in scene.surfaces])[index]
    frequency = np.array([s.frequency for s in scene.surfaces], np.float64)[index]
    at = points * frequency[:, None] + 0.37  # off the planes on which many surfaces lie
    chequers = np.floor(at).sum(1) % 2
    stripes = (np.sin(np.pi * at @ np.array([1, 0.3, 1], np.float64)) > 0).astype(np.float64)
    clouds = 0.5 + (np.sin(2.1 * at[:, [1, 2, 0]] + 1.3 * np.sin(1.7 * at)).sum(1)) / 6
    mix = np.choose(texture, [np.float64(0), chequers, stripes, clouds]).astype(np.float64)
    albedo = colors[:, 0] + mix[:, None] * (colors[:, 1] - colors[:, 0])
    to_lamp = scene.lamp - points
    far = np.sqrt((to_lamp**2).sum(1))
    facing = np.maximum((to_lamp * normal).sum(1) / np.maximum(far, 1e-3), 0)
    light = 0.35 + 0.95 * facing / (1 + (far / 3) ** 2)
    return albedo * light[:, None]


# --------------------------------------------------------------------------- drawing a scene


class _Builder:
    """Collects solids; a piece of furniture is a few of them."""

    def __init__(self, rng: np.random.Generator, size: Array) -> None:
        self.rng, self.size = rng, size
        self.parts: dict[str, list[tuple[Sequence[float], Surface]]] = {
            "boxes": [],
            "cylinders": [],
            "spheres": [],
        }
        self.taken: list[tuple[float, float, float, float]] = []  # floor plan: x0, z0, x1, z1

    def surface(
        self, name: str, textures: Sequence[int] = (0, 0, 2, 3), pale: float = 0
    ) -> Surface:
        """A look drawn at random; `pale` moves the colours towards white."""
        base = self.rng.uniform(0.1, 0.95, 3)
        other = np.clip(base + self.rng.uniform(-0.35, 0.35, 3), 0.03, 1)
        colors = np.stack([base, other]) * (1 - pale) + pale * 0.92
        texture = int(self.rng.choice(textures))
        frequency = float(self.rng.uniform(2.0, 6.0))
        return Surface(CLASSES.index(name), colors.astype(np.float64), texture, frequency)

    def box(self, low: Sequence[float], high: Sequence[float], look: Surface) -> None:
        self.parts["boxes"].append(((*low, *high), look))

    def cylinder(self, x: float, z: float, r: float, low: float, high: float, s: Surface) -> None:
        self.parts["cylinders"].append(((x, z, r, low, high), s))

    def sphere(self, x: float, y: float, z: float, r: float, look: Surface) -> None:
        self.parts["spheres"].append(((x, y, z, r), look))

    def place(self, wide: float, deep: float, wall: bool = True) -> tuple[float, float] | None:
        """Lower corner of a free rectangle on the floor, at a wall or away from all; or None."""
        room_x, room_z = float(self.size[0]), float(self.size[2])
        for _ in range(12):
            x = self.rng.uniform(0.05, max(0.06, room_x - wide - 0.05))
            z = self.rng.uniform(0.05, max(0.06, room_z - deep - 0.05))
            if wall:
                side = self.rng.integers(4)
                x = (0.02, room_x - wide - 0.02, x, x)[side]
                z = (z, z, 0.02, room_z - deep - 0.02)[side]
            here = (x, z, x + wide, z + deep)
            free = all(
                here[0] > t[2] or here[2] < t[0] or here[1] > t[3] or here[3] < t[1]
                for t in self.taken
            )
            if free and here[2] < room_x and here[3] < room_z:
                self.taken.append(here)
                return float(x), float(z)
        return None

    def table(self) -> None:
        u = self.rng.uniform
        wide, deep, high = u(0.8, 1.7), u(0.7, 1.0), u(0.68, 0.78)
        if (at := self.place(wide, deep, wall=bool(self.rng.random() < 0.4))) is None:
            return
        x, z = at
        look = self.surface("table")
        self.box((x, high - 0.05, z), (x + wide, high, z + deep), look)
        for lx in (x + 0.06, x + wide - 0.06):
            for lz in (z + 0.06, z + deep - 0.06):
                self.cylinder(lx, lz, 0.035, 0, high - 0.05, look)
        for _ in range(self.rng.integers(0, 4)):
            self.thing(x + u(0.1, wide - 0.1), high, z + u(0.1, deep - 0.1))
        for _ in range(self.rng.integers(1, 4)):
            self.chair(x + u(-0.7, wide + 0.2), z + u(-0.7, deep + 0.2))

    def chair(self, x: float, z: float) -> None:
        look = self.surface("chair")
        x = float(np.clip(x, 0.05, self.size[0] - 0.55))
        z = float(np.clip(z, 0.05, self.size[2] - 0.55))
        side = 0.42
        self.box((x, 0.42, z), (x + side, 0.47, z + side), look)
        back = ((0, 0), (0, side - 0.05))[self.rng.integers(2)]
        along = (side, 0.05) if self.rng.random() < 0.5 else (0.05, side)
        bx, bz = (x + back[1], z) if along[0] < along[1] else (x, z + back[1])
        self.box((bx, 0.47, bz), (bx + along[0], 0.95, bz + along[1]), look)
        for lx in (x + 0.03, x + side - 0.03):
            for lz in (z + 0.03, z + side - 0.03):
                self.cylinder(lx, lz, 0.022, 0, 0.42, look)

    def bed(self) -> None:
        long, wide, turned = self.rng.uniform(1.9, 2.1), self.rng.uniform(0.9, 1.7), False
        if self.rng.random() < 0.5:
            turned = True
        dx, dz = (long, wide) if turned else (wide, long)
        if (at := self.place(dx, dz)) is None:
            return
        x, z = at
        look = self.surface("bed", (0, 2, 1))
        self.box((x, 0, z), (x + dx, 0.25, z + dz), self.surface("bed", (0,)))
        self.box((x + 0.02, 0.25, z + 0.02), (x + dx - 0.02, 0.5, z + dz - 0.02), look)
        head = (0.06, dz) if turned else (dx, 0.06)
        self.box((x, 0.25, z), (x + head[0], 0.95, z + head[1]), self.surface("bed", (0,)))
        pillow = self.surface("bed", (0,), pale=0.7)
        px, pz = (0.4, dz - 0.3) if turned else (dx - 0.3, 0.4)
        self.box((x + 0.12, 0.5, z + 0.12), (x + 0.12 + px, 0.6, z + 0.12 + pz), pillow)

    def sofa(self) -> None:
        wide, deep = self.rng.uniform(1.4, 2.2), 0.85
        turned = bool(self.rng.random() < 0.5)
        dx, dz = (deep, wide) if turned else (wide, deep)
        if (at := self.place(dx, dz)) is None:
            return
        x, z = at
        look = self.surface("sofa")
        self.box((x, 0.05, z), (x + dx, 0.42, z + dz), look)
        far = bool(x > self.size[0] / 2 if turned else z > self.size[2] / 2)
        if turned:
            bx = x + dx - 0.2 if far else x
            self.box((bx, 0.42, z), (bx + 0.2, 0.85, z + dz), look)
            for az in (z, z + dz - 0.18):
                self.box((x, 0.42, az), (x + dx, 0.62, az + 0.18), look)
        else:
            bz = z + dz - 0.2 if far else z
            self.box((x, 0.42, bz), (x + dx, 0.85, bz + 0.2), look)
            for ax in (x, x + dx - 0.18):
                self.box((ax, 0.42, z), (ax + 0.18, 0.62, z + dz), look)

    def cabinet(self) -> None:
        u = self.rng.uniform
        wide, deep, high = u(0.5, 1.4), u(0.35, 0.6), u(0.6, 2.0)
        turned = bool(self.rng.random() < 0.5)
        dx, dz = (deep, wide) if turned else (wide, deep)
        if (at := self.place(dx, dz)) is None:
            return
        x, z = at
        self.box((x, 0, z), (x + dx, high, z + dz), self.surface("furniture"))
        if high < 1.0 and self.rng.random() < 0.6:  # a screen on it
            look = Surface(CLASSES.index("tv"), np.full((2, 3), 0.05, np.float64), 0, 1)
            thin = (0.08, dz * 0.9) if turned else (dx * 0.9, 0.08)
            cx, cz = x + dx / 2, z + dz / 2
            self.box(
                (cx - thin[0] / 2, high + 0.04, cz - thin[1] / 2),
                (cx + thin[0] / 2, high + 0.04 + u(0.35, 0.6), cz + thin[1] / 2),
                look,
            )
        elif high < 1.6:
            for _ in range(self.rng.integers(1, 4)):
                self.thing(x + u(0.08, dx - 0.08), high, z + u(0.08, dz - 0.08))

    def shelf(self) -> None:
        """Boards with rows of books between them."""
        wide, deep = self.rng.uniform(0.7, 1.2), 0.3
        turned = bool(self.rng.random() < 0.5)
        dx, dz = (deep, wide) if turned else (wide, deep)
        if (at := self.place(dx, dz)) is None:
            return
        x, z = at
        look = self.surface("furniture", (0, 3))
        floors = int(self.rng.integers(3, 6))
        for i in range(floors + 1):
            self.box((x, 0.4 * i, z), (x + dx, 0.4 * i + 0.03, z + dz), look)
        for sx, sz in ((0.03, dz), (dx, 0.03)):
            self.box((x, 0, z), (x + sx, 0.4 * floors, z + sz), look)
        for i in range(floors):
            books = self.surface("books", (2, 1))
            books.frequency = float(self.rng.uniform(8, 14))
            share = self.rng.uniform(0.4, 0.95)
            end = (x + dx - 0.02, z + share * dz) if turned else (x + share * dx, z + dz - 0.02)
            top = 0.4 * i + 0.03 + self.rng.uniform(0.2, 0.33)
            self.box((x + 0.03, 0.4 * i + 0.03, z + 0.03), (end[0], top, end[1]), books)

    def lamp_stand(self) -> None:
        if (at := self.place(0.4, 0.4)) is None:
            return
        x, z = at[0] + 0.2, at[1] + 0.2
        look = self.surface("objects", (0,))
        self.cylinder(x, z, 0.16, 0, 0.03, look)
        self.cylinder(x, z, 0.02, 0.03, 1.35, look)
        self.sphere(x, 1.5, z, 0.17, self.surface("objects", (0,), pale=0.6))

    def thing(self, x: float, y: float, z: float) -> None:
        """A ball, a vase, a box or a pile of books at a place."""
        u, kind = self.rng.uniform, self.rng.integers(4)
        if kind == 0:
            r = u(0.06, 0.12)
            self.sphere(x, y + r, z, r, self.surface("objects"))
        elif kind == 1:
            self.cylinder(x, z, u(0.04, 0.08), y, y + u(0.12, 0.3), self.surface("objects"))
        elif kind == 2:
            a, b, c = u(0.05, 0.12), u(0.08, 0.25), u(0.05, 0.12)
            self.box((x - a, y, z - c), (x + a, y + b, z + c), self.surface("objects"))
        else:
            look = self.surface("books", (0, 2))
            self.box((x - 0.12, y, z - 0.09), (x + 0.12, y + u(0.05, 0.15), z + 0.09), look)

    def panel(self, name: str, low: float, tall: float, wide: float, look: Surface) -> None:
        """Something flat on one of the four walls."""
        room_x, room_y, room_z = self.size.tolist()
        top = min(low + tall, room_y - 0.1)
        side, thick = self.rng.integers(4), 0.03
        length = room_z if side < 2 else room_x
        start = self.rng.uniform(0.2, max(0.21, length - wide - 0.2))
        end = min(start + wide, length - 0.05)
        if side < 2:
            x = 0.0 if side == 0 else room_x - thick
            self.box((x, low, start), (x + thick, top, end), look)
        else:
            z = 0.0 if side == 2 else room_z - thick
            self.box((start, low, z), (end, top, z + thick), look)

    def scene(self, shell: list[Surface], lamp: Array) -> Scene:
        def array(name: str, shape: tuple[int, ...]) -> Array:
            return np.array([p for p, _ in self.parts[name]], np.float64).reshape(-1, *shape)

        return Scene(
            size=self.size,
            lamp=lamp,
            surfaces=shell + [look for part in self.parts.values() for _, look in part],
            boxes=array("boxes", (2, 3)),
            cylinders=array("cylinders", (5,)),
            spheres=array("spheres", (4,)),
        )


def draw_scene(rng: np.random.Generator) -> tuple[Scene, Camera]:
    """A furnished room and a camera in it that looks towards its middle."""
    u = rng.uniform
    size = np.array([u(3.2, 6.0), u(2.3, 2.9), u(3.2, 6.0)], np.float64)
    build = _Builder(rng, size)
    shell = [
        build.surface("floor", (0, 1, 2, 3)),
        build.surface("ceiling", (0,), pale=0.8),
        build.surface("wall", (0, 0, 2, 3), pale=0.5),
    ]
    pieces = (build.table, build.cabinet, build.shelf, build.lamp_stand, build.sofa, build.bed)
    wanted = rng.permutation(len(pieces))[: rng.integers(4, 7)]
    for i in sorted(wanted, reverse=True):  # the large ones first
        pieces[i]()
    if rng.random() < 0.7:
        build.cabinet()
    for _ in range(rng.integers(0, 3)):
        look = build.surface("window", (0, 3), pale=0.75)
        build.panel("window", u(0.7, 1.0), u(0.9, 1.3), u(0.8, 1.6), look)
    for _ in range(rng.integers(0, 4)):
        build.panel("picture", u(1.2, 1.6), u(0.3, 0.7), u(0.3, 0.9), build.surface("picture"))
    lamp = size * np.array([u(0.3, 0.7), 0.93, u(0.3, 0.7)], np.float64)
    scene = build.scene(shell, lamp.astype(np.float64))
    return scene, _draw_camera(rng, scene)


def _draw_camera(rng: np.random.Generator, scene: Scene) -> Camera:
    u, size = rng.uniform, scene.size
    for _ in range(50):
        share = np.array([rng.choice([u(0.05, 0.3), u(0.7, 0.95)]) for _ in range(2)])
        place = np.array([share[0] * size[0], u(1.2, 1.8), share[1] * size[2]], np.float64)
        if not _close(scene, place):
            break
    else:
        place[1] = size[1] - 0.15  # above all furniture
    middle = size * np.array([u(0.35, 0.65), 0, u(0.35, 0.65)])
    yaw = float(np.arctan2(middle[0] - place[0], middle[2] - place[2]) + u(-0.35, 0.35))
    return Camera(place, yaw, float(u(0.0, 0.4)))


def _close(scene: Scene, place: Array, gap: float = 0.35) -> bool:
    """Whether a solid is within reach of a place, or around it."""
    in_box = ((place > scene.boxes[:, 0] - gap) & (place < scene.boxes[:, 1] + gap)).all(1)
    across = np.hypot(place[0] - scene.cylinders[:, 0], place[2] - scene.cylinders[:, 1])
    ball = np.sqrt(((place - scene.spheres[:, :3]) ** 2).sum(1))
    return bool(
        in_box.any()
        or (across < scene.cylinders[:, 2] + gap).any()
        or (ball < scene.spheres[:, 3] + gap).any()
    )


# ------------------------------------------------------------------------------ the data set

SPLITS = ("train", "val", "test")


def frame(split: str, number: int, size: tuple[int, int]) -> Frame:
    """Frame `number` of a split: see `render`. The room is the same at any size."""
    seed = (20_12, SPLITS.index(split), number)
    scene, camera = draw_scene(np.random.default_rng(seed))
    return render(scene, camera, size, np.random.default_rng((*seed, 1)))


def frames(split: str, n: int, size: tuple[int, int]) -> DenseData:
    """The first n frames of a split: uint8 images, int8 classes, float32 depths and normals."""
    parts = [frame(split, i, size) for i in range(n)]
    image, label, depth, normal = (torch.from_numpy(np.stack(x)) for x in zip(*parts, strict=True))
    return DenseData(image, (label, depth, normal))


N_CLASSES = len(CLASSES)
TASKS = (
    Task("segmentation", cross_entropy, SEGMENTATION, N_CLASSES, uniform_labels(N_CLASSES, -1)),
    Task("depth", depth_l1, DEPTH, draw=normal_depths),
    Task("normals", normal_cosine, NORMALS, draw=turned_normals),
)
"""The three tasks of NYUv2, which `nyuv2` shares."""


class Rooms(DenseBenchmark):
    """Synthetic rooms: segmentation, depth and surface normals (see the module's text)."""

    name = "rooms"
    title = "Rooms: synthetic indoor scenes"
    source = "made in code: rooms of boxes, cylinders and spheres"
    synthetic = True
    kinds = ("label", "depth", "normal")
    channels = (N_CLASSES, 1, 3)
    default_size = (48, 64)
    tasks = TASKS
    counts: ClassVar[dict[str, int]] = {"train": 800, "val": 100, "test": 200}
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=3, batch_size=8, lr=4e-3, examples=240),
        "full": Protocol(
            epochs=60, batch_size=8, lr=1e-3, schedule="cosine", size=(96, 128), augment=True
        ),
        "cpu": Protocol(
            epochs=6, batch_size=8, lr=1e-3, schedule="cosine", rates=(1e-3, 4e-3), examples=400
        ),
    }

    def load(self) -> Splits:
        counts = dict(self.counts)
        if self.protocol is not None and self.protocol.examples:  # no more than a run looks at
            counts["train"] = min(counts["train"], self.protocol.examples)
        return {split: frames(split, n, self.size) for split, n in counts.items()}
