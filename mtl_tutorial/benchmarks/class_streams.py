"""Image benchmarks with a stream per task: CIFAR-10 under rotations, CIFAR-10 and MNIST in parts.

* `cifar10_rotation`: each task names the ten classes, under its own rotation of 0, 90, 180 or 270
  degrees. All tasks train on the same photographs, in their own order; each test photograph is
  asked about once, by one of the tasks in turn.
* `cifar10_partial`, `mnist_partial`: task k sees its own C = 2 classes (10 / C tasks) and tells
  them apart; `cifar10_partial5` and `mnist_partial5` with C = 5.

The names are used elsewhere for other protocols; these are our own: a small residual network (a
first convolution of stride 2, three stages of 16, 32 and 64 channels, one block each, group
normalisation, so that no batch statistics mix the tasks), no augmentation, a tenth of the official
training set for validation. The budget "cpu" halves the photographs' sides.

Photographs come from the official CIFAR-10 where torchvision finds it, else from a JPEG copy
``cifar10_jpeg.tar.xz`` (quality 75, so not the official pixels; the result says so).
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import datasets

from ..data import check_labels, data_root, load_mnist, mnist_folder
from ..metrics import ACCURACY
from ..models import HardSharing, ToUnit
from .base import Data, Protocol, Task
from .streams import StreamBenchmark

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
ROTATIONS = (0, 90, 180, 270)
LARGEST_JPEG = 100_000  # bytes of a 32x32 image, at most


def load_cifar10(root: Path | str | None) -> tuple[dict[str, tuple[Tensor, Tensor]], bool]:
    """CIFAR-10 as bytes.

    Args:
        root: see `mtl_tutorial.data.data_root`.

    Returns:
        "train" and "test" to images (N, 3, 32, 32) uint8 and labels (N,), and whether they are the
        JPEG copy.

    Raises:
        FileNotFoundError: neither the official files nor the copy are there.
        ValueError: the copy is truncated or has other contents.
    """
    folder = data_root(root)
    if (folder / "cifar-10-batches-py").is_dir():
        splits = {}
        for name in ("train", "test"):
            try:
                data_set = datasets.CIFAR10(folder, train=name == "train", download=False)
            except RuntimeError:  # torchvision compares checksums before it opens a file
                raise ValueError(
                    f"expected the official files of CIFAR-10 in {folder}, got missing or other "
                    "ones; delete cifar-10-batches-py and do `mtl-tutorial data cifar10`"
                ) from None
            images = torch.from_numpy(data_set.data).permute(0, 3, 1, 2).contiguous()
            splits[name] = (images, torch.tensor(data_set.targets))
        return splits, False
    archive = folder / "cifar10_jpeg.tar.xz"
    if archive.is_file():
        return _read_jpeg_copy(archive), True
    raise FileNotFoundError(
        f"expected CIFAR-10 in {folder}, got neither cifar-10-batches-py nor cifar10_jpeg.tar.xz; "
        "do `mtl-tutorial data cifar10`, or point MTL_TUTORIAL_DATA to the folder that has it"
    )


def _read_jpeg_copy(archive: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Decode members ``split/class/number.jpg`` in memory; nothing is extracted to disk."""
    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts
                if not member.isfile() or len(parts) != 3 or parts[0] not in found:
                    continue
                file = tar.extractfile(member)
                if file is None or member.size > LARGEST_JPEG:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                with Image.open(io.BytesIO(file.read())) as image:
                    if image.size != (32, 32):
                        raise ValueError(f"{member.name} has {image.size} pixels")
                    pixels = np.asarray(image.convert("RGB"))
                found[parts[0]].append((pixels, CIFAR_CLASSES.index(parts[1])))
        return {
            split: (
                torch.from_numpy(np.stack([p for p, _ in pairs])).permute(0, 3, 1, 2).contiguous(),
                torch.tensor([label for _, label in pairs]),
            )
            for split, pairs in found.items()
        }
    except Exception as error:  # tar, xz and JPEG each break in ways of their own
        raise ValueError(
            f"expected the JPEG copy of CIFAR-10 in {archive}, got a broken archive ({error}); "
            "get it again"
        ) from None


class Residual(nn.Module):
    """Two 3x3 convolutions with group normalisation beside a (projected) identity."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.GroupNorm(8, outside),
        )
        same = inside == outside and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def small_resnet(channels: int, heads: tuple[int, ...]) -> HardSharing:
    """Residual network of three blocks for images of about 32x32; 64 shared features."""
    trunk = nn.Sequential(
        ToUnit(),
        nn.Conv2d(channels, 16, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return HardSharing(trunk, [nn.Linear(64, c) for c in heads])


Images = dict[str, tuple[Tensor, Tensor]]  # "train", "val", "test" to images and labels


def with_validation(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Images:
    """Cut a tenth of the training set off for validation, at random but always the same."""
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    cut = len(order) // 10
    val, rest = order[:cut], order[cut:]
    return {
        "train": (train[0][rest], train[1][rest]),
        "val": (train[0][val], train[1][val]),
        "test": test,
    }


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) uint8 at a smaller size, by means over equal windows of pixels."""
    means = F.adaptive_avg_pool2d(images.float(), size)
    return means.round().to(torch.uint8)


def rotate(images: Tensor, degrees: int) -> Tensor:
    """Images (N, C, H, W) turned anticlockwise by a multiple of 90 degrees."""
    return torch.rot90(images, degrees // 90, (2, 3)).contiguous()


def parts_of(images: Images, per_task: int) -> dict[str, list[Data]]:
    """Per split, task k's examples: classes ``k C`` to ``k C + C - 1``, numbered from 0."""
    streams: dict[str, list[Data]] = {}
    for split, (pixels, labels) in images.items():
        streams[split] = []
        for first in range(0, 10, per_task):
            mine = (labels >= first) & (labels < first + per_task)
            streams[split].append(Data(pixels[mine], (labels[mine] - first,)))
    return streams


def _class_tasks(per_task: int) -> tuple[Task, ...]:
    names = [f"{k}-{k + per_task - 1}" for k in range(0, 10, per_task)]
    return tuple(Task(n, F.cross_entropy, (ACCURACY,), n_classes=per_task) for n in names)


class Cifar10Rotation(StreamBenchmark):
    """Ten classes under four rotations (see the module's text for the protocol)."""

    name = "cifar10_rotation"
    title = "CIFAR-10 under four rotations"
    source = "CIFAR-10 (Krizhevsky 2009)"
    embedded = False
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=128, lr=2e-3),
        "full": Protocol(epochs=30, batch_size=128, lr=2e-3, schedule="cosine"),
        "cpu": Protocol(
            epochs=3,
            batch_size=32,
            lr=3e-3,
            schedule="cosine",
            rates=(1e-3, 3e-3),
            examples=3_000,
            size=(16, 16),
            note="16x16 pixels",
        ),
    }
    tasks = tuple(
        Task(f"{d} degrees", F.cross_entropy, (ACCURACY,), n_classes=10) for d in ROTATIONS
    )

    def paths(self) -> list[Path]:
        folder = data_root(self.root)
        official = folder / "cifar-10-batches-py"
        return [official if official.exists() else folder / "cifar10_jpeg.tar.xz"]

    def images(self) -> Images:
        """CIFAR-10 with a validation part."""
        splits, copy = load_cifar10(self.root)
        for split, (_, labels) in splits.items():
            check_labels(labels, 10, f"CIFAR-10's {split} set")
        self.remark = "JPEG copy of CIFAR-10" if copy else ""
        if self.protocol is not None and self.protocol.size is not None:
            splits = {k: (shrink(x, self.protocol.size), y) for k, (x, y) in splits.items()}
        return with_validation(splits["train"], splits["test"])

    def load_streams(self) -> dict[str, list[Data]]:
        streams: dict[str, list[Data]] = {}
        for split, (pixels, labels) in self.images().items():
            step = len(ROTATIONS) if split == "test" else 1
            streams[split] = [
                Data(rotate(pixels[k % step :: step], d), (labels[k % step :: step],))
                for k, d in enumerate(ROTATIONS)
            ]
        return streams

    def build(self) -> HardSharing:
        return small_resnet(3, (10,) * len(ROTATIONS))


class Cifar10Partial(Cifar10Rotation):
    """Five tasks of two classes each."""

    name = "cifar10_partial"
    title = "CIFAR-10 in five pairs of classes"
    per_task: ClassVar[int] = 2
    tasks = _class_tasks(2)

    def load_streams(self) -> dict[str, list[Data]]:
        return parts_of(self.images(), self.per_task)

    def build(self) -> HardSharing:
        return small_resnet(3, (self.per_task,) * len(self.tasks))


class Cifar10Partial5(Cifar10Partial):
    """Two tasks of five classes each."""

    name = "cifar10_partial5"
    title = "CIFAR-10 in two groups of five classes"
    per_task = 5
    tasks = _class_tasks(5)


class MnistPartial(Cifar10Partial):
    """Five tasks of two digits each."""

    name = "mnist_partial"
    title = "MNIST in five pairs of digits"
    source = "MNIST (LeCun et al. 1998, CC BY-SA 3.0)"

    def paths(self) -> list[Path]:
        return [mnist_folder("MNIST", self.root)]

    def images(self) -> Images:
        """MNIST with a validation part."""
        sets = [load_mnist("MNIST", self.root, train) for train in (True, False)]
        return with_validation(*[(x.unsqueeze(1), y) for x, y in sets])

    def build(self) -> HardSharing:
        return small_resnet(1, (self.per_task,) * len(self.tasks))


class MnistPartial5(MnistPartial):
    """Two tasks of five digits each."""

    name = "mnist_partial5"
    title = "MNIST in two groups of five digits"
    per_task = 5
    tasks = _class_tasks(5)
