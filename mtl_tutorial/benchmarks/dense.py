"""What benchmarks of dense prediction share: maps as targets, augmentation, a small network.

An example is an image (3, H, W) and one map per task. Small sets stay on the device as bytes; large
ones stay on disk (`MappedData`) and are read batch by batch. Networks get floats from 0 to 1.

The kind of a map says how it is resized and mirrored:

- ``label``: classes (H, W); nearest pixel.
- ``depth``: metres along the camera's axis (H, W), or what is treated alike; nearest pixel. In an
  image enlarged by s everything stands s times nearer.
- ``disparity``: pixels (H, W); nearest pixel. It grows with the image.
- ``normal``: unit vectors (3, H, W), x to the right; nearest pixel. A mirror turns x around.
- ``offset``: vectors in pixels (2, H, W), x first; nearest pixel. They grow with the image, and a
  mirror turns x around.

Enlarging by s squeezes the scene along the camera's axis, and only it: (X, Y, Z / s) is seen where
(X, Y, Z) was seen enlarged. The normals of the squeezed scene are (x, y, s z), renormalised, which
is what `scale_crop` does on request; MTAN's protocol leaves them as they were.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from ..dense_metrics import per_batch
from ..models import HardSharing, Separate
from ..noise import Draw, LabelNoise
from .base import Benchmark, Data, Losses, Protocol, Task

Example = tuple[Tensor, tuple[Tensor, ...]]  # an image or a batch of them, and the maps

KINDS = ("label", "depth", "disparity", "normal", "offset")

# ------------------------------------------------------------------------------ augmentation


def flip(images: Tensor, targets: Sequence[Tensor], kinds: Sequence[str]) -> Example:
    """Mirror left and right; x of normals and offsets changes its sign.

    Args:
        images: (..., 3, H, W).
        targets: one map per kind, (..., H, W) or (..., C, H, W).
        kinds: see the module's text.
    """
    mirrored = []
    for target, kind in zip(targets, kinds, strict=True):
        turned = target.flip(-1)
        if kind in ("normal", "offset"):
            turned[..., 0, :, :].neg_()  # flip has made a copy
        mirrored.append(turned)
    return images.flip(-1), tuple(mirrored)


def resize_nearest(target: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (..., H, W) at another size, each pixel from the one under its centre."""
    rows, columns = (
        ((torch.arange(new, device=target.device) + 0.5) * (old / new)).long()
        for new, old in zip(size, target.shape[-2:], strict=True)
    )
    return target[..., rows[:, None], columns]


def resize_image(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (..., 3, H, W) at another size, bilinear; made smaller, pixels are averaged first."""
    if images.shape[-2:] == size:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    smaller = size[0] < images.shape[-2]
    resized = F.interpolate(
        flat.float(), size, mode="bilinear", align_corners=False, antialias=smaller
    )
    if images.dtype == torch.uint8:
        resized = resized.round().clamp(0, 255)
    return resized.to(images.dtype).view(*images.shape[:-2], *size)


def resize(images: Tensor, targets: Sequence[Tensor], kinds: Sequence[str], size: Any) -> Example:
    """The same scene with fewer or more pixels: what is measured in pixels changes, depth does not.

    Args:
        images: (..., 3, H, W).
        targets: one map per kind.
        kinds: see the module's text.
        size: new height and width.
    """
    old = images.shape[-2:]
    if tuple(old) == tuple(size):
        return images, tuple(targets)
    along = (size[1] / old[1], size[0] / old[0])  # x, y
    maps = []
    for target, kind in zip(targets, kinds, strict=True):
        new = resize_nearest(target, size)
        if kind == "disparity":
            new = new * along[0]
        if kind == "offset":
            new = new * new.new_tensor(along).view(2, 1, 1)
        maps.append(new)
    return resize_image(images, size), tuple(maps)


def scale_crop(
    images: Tensor,
    targets: Sequence[Tensor],
    kinds: Sequence[str],
    scale: float,
    top: int,
    left: int,
    squeeze: bool = False,
) -> Example:
    """Cut out a window of 1 / scale of each side and enlarge it to the old size.

    Args:
        images: (..., 3, H, W).
        targets: one map per kind.
        kinds: see the module's text.
        scale: 1 or more; depths are divided by it, disparities and offsets multiplied.
        top, left: upper left corner of the window.
        squeeze: turn normals as the squeezed scene has them; MTAN leaves them as they are.

    Raises:
        ValueError: the scale is below 1, or the window does not lie inside the image.
    """
    size = cast(tuple[int, int], tuple(images.shape[-2:]))
    height, width = int(size[0] / scale), int(size[1] / scale)
    if scale < 1 or not (0 <= top <= size[0] - height and 0 <= left <= size[1] - width):
        raise ValueError(
            f"expected a scale of 1 or more and a window inside {size[0]}x{size[1]}, got scale "
            f"{scale} at ({top}, {left})"
        )
    window = (..., slice(top, top + height), slice(left, left + width))
    maps = []
    for target, kind in zip(targets, kinds, strict=True):
        new = resize_nearest(target[window], size)
        if kind == "depth":
            new = new / scale
        elif kind in ("disparity", "offset"):
            new = new * scale
        elif kind == "normal" and squeeze:
            new = F.normalize(new * new.new_tensor([1, 1, scale]).view(3, 1, 1), dim=-3)
        maps.append(new)
    return resize_image(images[window], size), tuple(maps)


SCALES = (1.0, 1.2, 1.5)  # of MTAN's protocol


def augment(
    images: Tensor, targets: Sequence[Tensor], kinds: Sequence[str], generator: torch.Generator
) -> Example:
    """MTAN's augmentation of a batch: each image with a scale, a window and a coin of its own.

    Args:
        images: (N, 3, H, W).
        targets: one map (N, ...) per kind.
        kinds: see the module's text.
        generator: on the host, so that a seed means the same on any device.
    """
    height, width = images.shape[-2:]
    done = []
    for i in range(len(images)):
        pick, down, right, coin = torch.rand(4, generator=generator).tolist()
        scale = SCALES[int(pick * len(SCALES))]
        top = int(down * (height - int(height / scale) + 1))
        left = int(right * (width - int(width / scale) + 1))
        one = scale_crop(images[i], [t[i] for t in targets], kinds, scale, top, left)
        done.append(flip(*one, kinds) if coin < 0.5 else one)
    return torch.stack([x for x, _ in done]), tuple(
        torch.stack(maps) for maps in zip(*(maps for _, maps in done), strict=True)
    )


# -------------------------------------------------------------------------------------- data


class DenseData(Data):
    """Images and maps on the device; a batch's images are floats from 0 to 1."""

    def to(self, device: torch.device) -> DenseData:
        return DenseData(self.inputs.to(device), tuple(t.to(device) for t in self.targets))

    def first(self, n: int) -> DenseData:
        return DenseData(self.inputs[:n], tuple(t[:n] for t in self.targets)) if n else self

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for images, targets in super().batches(size, generator):
            yield unit(images), targets


def unit(images: Tensor) -> Tensor:
    """Bytes 0 to 255 as floats 0 to 1; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


class Reader(Dataset[Any]):
    """Examples that are read when they are asked for, with noise on one task's targets.

    A subclass writes `read`.

    Args:
        n: how many there are.
        files: what they are read from, in order, for the checksum.
    """

    def __init__(self, n: int, files: Sequence[Path]) -> None:
        self.n, self.files = n, tuple(files)
        self.slot, self.seed = 0, 0
        self.chosen: frozenset[int] = frozenset()  # examples whose targets are noisy
        self.draw: Draw | None = None

    def read(self, i: int) -> Example:
        """Image and targets of example i."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        image, targets = self.read(i)
        if self.draw is not None and i in self.chosen:
            generator = torch.Generator().manual_seed(self.seed + 7_919 * i)
            noisy = self.draw(targets[self.slot][None], generator)[0]
            targets = (*targets[: self.slot], noisy, *targets[self.slot + 1 :])
        return image, targets


WORKERS = 4  # processes that read ahead for an accelerator; on a CPU the one that trains reads


class MappedData(Data):
    """A split that stays on disk and is read batch by batch.

    Args:
        reader: gives one example at a time.
        device: where batches go.
    """

    def __init__(self, reader: Reader, device: torch.device | None = None) -> None:
        super().__init__(torch.empty(0), ())
        self.reader = reader
        self.device = device or torch.device("cpu")

    def __len__(self) -> int:
        return len(self.reader)

    def to(self, device: torch.device) -> MappedData:
        return MappedData(self.reader, device)

    def first(self, n: int) -> MappedData:
        reader = copy.copy(self.reader)
        reader.n = min(n, reader.n) if n else reader.n
        return MappedData(reader, self.device)

    def noisy(self, slot: int, noise: LabelNoise, draw: Draw, seed: int, epoch: int) -> MappedData:
        """The noise is drawn per example when it is read, from seed, epoch and its number."""
        reader = copy.copy(self.reader)
        reader.slot, reader.draw = slot, draw
        reader.chosen = frozenset(noise.chosen(len(self), seed).tolist())
        reader.seed = noise.stream(seed, epoch)
        return MappedData(reader, self.device)

    def checksum(self) -> str:
        """SHA-256 over names and sizes of all files and the bytes of 16 of them.

        Reading all of a set of 9 GB at every start would take longer than some runs.
        """
        digest = hashlib.sha256()
        files = self.reader.files
        for path in files:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}".encode())
        for path in files[:: max(1, len(files) // 16)]:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        n = len(self)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        parts = [part.tolist() for part in order.split(min(size, n))]
        if generator is not None and len(parts[-1]) < len(parts[0]):
            parts.pop()
        loader = DataLoader(
            self.reader,
            batch_sampler=parts,
            num_workers=WORKERS if self.device.type == "cuda" else 0,
            collate_fn=default_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global one
        )
        for images, targets in loader:
            yield (
                unit(images.to(self.device, non_blocking=True)),
                tuple(t.to(self.device, non_blocking=True) for t in targets),
            )


# ----------------------------------------------------------------------------------- network


class _Trunk(nn.Module):
    """Three halvings, three doublings with the halves' own maps added: (N, width, H/2, W/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()

        def block(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
                nn.GroupNorm(4, n_out),
                nn.ReLU(),
            )

        self.down = nn.ModuleList(
            [block(3, width, 2), block(width, 2 * width, 2), block(2 * width, 4 * width, 2)]
        )
        self.middle = block(4 * width, 4 * width)
        self.up = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(f"expected images of even height and width, got {x.shape[-2:]}")
        half = self.down[0](x)
        quarter = self.down[1](half)
        z = self.middle(self.down[2](quarter))
        for step, skip in zip(self.up, (quarter, half), strict=True):
            z = F.interpolate(step(z), skip.shape[-2:], mode="bilinear") + skip
        return z


def small_dense_net(n_outputs: Sequence[int], width: int = 16) -> HardSharing:
    """Encoder and decoder for quick runs: 84,000 shared parameters at width 16.

    Group normalisation, so that a batch of any size and a schedule that sees it K times give the
    same statistics. Channels last, which makes its convolutions faster on a CPU.

    Args:
        n_outputs: channels of each task's map.
        width: channels at half resolution; twice and four times as many below.
    """
    heads = [
        nn.Sequential(nn.Conv2d(width, n, 1), nn.Upsample(scale_factor=2, mode="bilinear"))
        for n in n_outputs
    ]
    return HardSharing(_Trunk(width), heads).to(memory_format=torch.channels_last)


# --------------------------------------------------------------------------------- benchmark


@dataclass
class DenseBenchmark(Benchmark):
    """Base of benchmarks with maps as targets.

    A subclass sets `kinds`, `channels` and `default_size` as well, and reads `self.size` in `load`.

    Attributes:
        kinds: kind of each task's map, see the module's text.
        channels: channels of each task's output.
        default_size: height and width where the protocol names none.
        default_network: name of the network where the protocol names none.
    """

    kinds: ClassVar[tuple[str, ...]] = ()
    channels: ClassVar[tuple[int, ...]] = ()
    default_size: ClassVar[tuple[int, int]] = (0, 0)
    default_network: ClassVar[str] = "small"
    eval_batch: ClassVar[int] = 32

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        named = None if self.protocol is None else self.protocol.size
        return named or self.default_size

    def under(self, protocol: Protocol) -> Self:
        """The same benchmark with the network, the size and the measures that a protocol names.

        Raises:
            ValueError: an unknown network.
        """
        bench = super().under(protocol)
        for name in (protocol.network, protocol.single_network):
            if name and name not in _networks():
                known = ", ".join(sorted(_networks()))
                raise ValueError(f"expected a network of {known}, got {name!r}")
        if protocol.evaluation == "papers":  # the class itself keeps the exact measures
            vars(bench).update(tasks=self.as_papers(), eval_batch=protocol.batch_size)
        return bench

    def as_papers(self) -> tuple[Task, ...]:
        """The tasks as tables on NYUv2 and Cityscapes measure them: all but labels per batch."""
        return tuple(
            task
            if kind == "label"
            else replace(task, metrics=tuple(per_batch(m) for m in task.metrics))
            for task, kind in zip(type(self).tasks, self.kinds, strict=True)
        )

    def build(self) -> nn.Module:
        name = "" if self.protocol is None else self.protocol.network
        return _networks()[name or self.default_network](self.channels)

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Any]:
        for images, targets in super().batches(protocol, generator):
            yield (
                augment(images, targets, self.kinds, generator)
                if protocol.augment
                else (images, targets)
            )

    def losses(
        self, model: nn.Module, batch: Any, tasks: Sequence[int] | None = None
    ) -> tuple[Losses, Tensor | None]:
        if tasks is None or not isinstance(model, Separate):
            return super().losses(model, batch, tasks)
        images, targets = batch  # a schedule asks for some tasks: the others' networks rest
        outputs = [model.networks[k](images)[0] for k in tasks]
        return [
            self.tasks[k].loss(o, targets[k]) for k, o in zip(tasks, outputs, strict=True)
        ], None

    def probe(self) -> Any:
        return next(iter(self.data["val"].batches(self.eval_batch)))


Builder = Callable[[Sequence[int]], nn.Module]


def _networks() -> dict[str, Builder]:
    """Builders by name: channels of each task's output to a network."""
    from ..dense_models import NETWORKS  # here, because listing benchmarks needs no networks

    return {"small": small_dense_net, **NETWORKS}
