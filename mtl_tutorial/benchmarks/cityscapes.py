"""Cityscapes: street scenes with two tasks as in MTAN's files, or three from its own folders.

Cityscapes (Cordts et al.: "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR
2016): 2,975 images to train with, 500 to test with.

`cityscapes`: segmentation into 7 categories and inverse depth. From MTAN's files if they are there,
``cityscapes/train/image/0.npy`` and so on (see `nyuv2`), with ``label_7`` or ``label`` and
``depth``, 128x256 pixels; else from Cityscapes' own folders, with disparity as a share of the
image's width in place of MTAN's inverse depth, which the table says.

`cityscapes3`: segmentation into 19 classes, for each pixel of an instance the way to its centre
(pixels, x first), and disparity (pixels). From Cityscapes' own folders only:

    cityscapes/leftImg8bit/train/CITY/X_leftImg8bit.png
    cityscapes/gtFine/train/CITY/X_gtFine_labelIds.png, X_gtFine_instanceIds.png
    cityscapes/disparity/train/CITY/X_disparity.png    16 bits, 256 d + 1, 0 for none

and the same below ``val``. Files are read batch by batch. There is no validation part (see
`nyuv2`): "val" and "test" are the official validation images.

Choices: categories are made of the 19 classes, so that parking, bridges and the like have none;
crowds of instances without numbers have no offset; lengths in pixels are those of the resized
image. MTAN's augmentation divides its inverse depth by the scale as if it were depth; so it is here
for MTAN's protocols (`cityscapes`), while disparities of `cityscapes3` grow with the image.
Aligned-MTL's rotation by up to 10 degrees is not among the augmentations.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data import data_root, require
from ..dense_metrics import (
    DEPTH,
    IGNORE,
    MIOU,
    OFFSET_ERROR,
    SEGMENTATION,
    SQUARED_ERROR,
    cross_entropy,
    depth_l1,
    offset_l1,
)
from ..noise import uniform_labels
from .base import Protocol, Splits, Task
from .camvid import decode
from .dense import DenseBenchmark, Example, MappedData, Reader, resize_image, resize_nearest
from .nyuv2 import NpyReader
from .protocols import CITYSCAPES, CITYSCAPES_THREE

CLASS_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label number in the files of each of the 19 classes, road to bicycle."""

CATEGORIES = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)
"""Category of each class: flat, construction, object, nature, sky, human, vehicle."""

_MAX_ID = 255


def class_table(n_classes: int) -> Tensor:
    """Label number of a file (0 to 255) to class (19) or category (7), -1 for none."""
    table = torch.full((_MAX_ID + 1,), IGNORE, dtype=torch.int8)
    for k, number in enumerate(CLASS_IDS):
        table[number] = k if n_classes == 19 else CATEGORIES[k]
    return table


def instance_offsets(instances: Tensor) -> Tensor:
    """The way from each pixel to the centre of its instance.

    Args:
        instances: (H, W); ``1000 * class + number``, smaller for what has no instances.

    Returns:
        (2, H, W), x and y in pixels; NaN outside all instances. The centre is the mean of the
        instance's visible pixels.
    """
    height, width = instances.shape
    offsets = torch.full((2, height, width), torch.nan)
    inside = instances >= 1000
    _, number = instances[inside].unique(return_inverse=True)
    if len(number):
        places = inside.nonzero().flip(1).double()  # x, y
        count = torch.bincount(number).double()
        for axis in range(2):
            centre = torch.bincount(number, places[:, axis]) / count
            offsets[axis][inside] = (centre[number] - places[:, axis]).float()
    return offsets


class FolderReader(Reader):
    """One split in Cityscapes' own folders.

    Args:
        root: folder that holds ``leftImg8bit``, ``gtFine`` and ``disparity``.
        split: "train" or "val".
        n_classes: 7 categories, or 19 classes.
        size: height and width to resize to.
        instances: three tasks with instance offsets and disparity in pixels; else two, with
            disparity as a share of the width.

    Raises:
        FileNotFoundError: a folder or a file is missing.
    """

    def __init__(
        self, root: Path, split: str, n_classes: int, size: tuple[int, int], instances: bool
    ) -> None:
        self.root, self.split, self.size, self.instances = root, split, size, instances
        self.table = class_table(n_classes)
        images = root / "leftImg8bit" / split
        require(images, "Cityscapes' images", "unpack Cityscapes' own archives there")
        found = sorted(images.glob("*/*_leftImg8bit.png"))
        self.names = [f"{p.parent.name}/{p.name.removesuffix('_leftImg8bit.png')}" for p in found]
        if not self.names:
            raise FileNotFoundError(f"expected CITY/X_leftImg8bit.png in {images}, got none")
        kinds = ["image", "label", "disparity", *(["instance"] if instances else [])]
        files = [self.path(kind, name) for name in self.names for kind in kinds]
        for path in files:
            require(path, "a file of an example", "unpack all of Cityscapes' own archives")
        super().__init__(len(self.names), files)

    def path(self, kind: str, name: str) -> Path:
        """File of an example; `name` is CITY/X."""
        folder, suffix = {
            "image": ("leftImg8bit", "leftImg8bit"),
            "label": ("gtFine", "gtFine_labelIds"),
            "instance": ("gtFine", "gtFine_instanceIds"),
            "disparity": ("disparity", "disparity"),
        }[kind]
        return self.root / folder / self.split / f"{name}_{suffix}.png"

    def pixels(self, kind: str, name: str, mode: str | None = None) -> Tensor:
        """Pixels of a file, maps as int32."""
        path = self.path(kind, name)
        values = decode(path.read_bytes(), str(path), mode)
        return torch.from_numpy(values.astype(np.uint8 if mode else np.int32))

    def read(self, i: int) -> Example:
        name = self.names[i]
        image = self.pixels("image", name, "RGB").permute(2, 0, 1)
        height, width = image.shape[-2:]
        maps = {}
        for kind in ("label", "disparity", *(["instance"] if self.instances else [])):
            maps[kind] = self.pixels(kind, name)
            if maps[kind].shape != (height, width):
                raise ValueError(
                    f"expected {self.path(kind, name)} of {height}x{width} pixels as its image, "
                    f"got {tuple(maps[kind].shape)}; get it again"
                )
            maps[kind] = resize_nearest(maps[kind], self.size)
        labels = self.table[maps["label"].clamp(0, _MAX_ID).long()]
        share = ((maps["disparity"] - 1).clamp(min=0) / 256 / width).float()
        image = resize_image(image.contiguous(), self.size)
        if not self.instances:
            return image, (labels, share)
        return image, (labels, instance_offsets(maps["instance"]), share * self.size[1])


def _segmentation(n_classes: int, metrics: tuple) -> Task:  # type: ignore[type-arg]
    return Task("segmentation", cross_entropy, metrics, n_classes, uniform_labels(n_classes, -1))


class Cityscapes(DenseBenchmark):
    """Two tasks: 7 categories and inverse depth (see the module's text)."""

    name = "cityscapes"
    title = "Cityscapes: segmentation into 7 categories and depth"
    source = "Cordts et al. 2016; folder cityscapes in MTAN's files or Cityscapes' own layout"
    embedded = False
    kinds = ("label", "depth")
    channels = (7, 1)
    default_size = (128, 256)
    tasks = (_segmentation(7, SEGMENTATION), Task("depth", depth_l1, DEPTH))
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=8, lr=1e-3, size=(64, 128)),
        "full": CITYSCAPES["mtan"],
        **CITYSCAPES,
    }

    def paths(self) -> list[Path]:
        folder = data_root(self.root) / "cityscapes"
        own = folder / "leftImg8bit"
        return [own] if own.is_dir() and not (folder / "train").is_dir() else [folder / "train"]

    def load(self) -> Splits:
        folder = self.paths()[0].parent
        readers: list[Reader] = []
        self.remark = "no validation images: val is test, as in the published protocols"
        for split in ("train", "val"):
            if self.paths()[0].name == "leftImg8bit":
                readers.append(FolderReader(folder, split, 7, self.size, instances=False))
            else:
                label = "label_7" if (folder / split / "label_7").is_dir() else "label"
                maps = {label: "label", "depth": "depth"}
                readers.append(NpyReader(folder / split, maps, 7, self.size))
        if isinstance(readers[0], FolderReader):
            self.remark += "; depth is disparity as a share of the width"
        train, test = map(MappedData, readers)
        return {"train": train, "val": test, "test": test}


class Cityscapes3(DenseBenchmark):
    """Three tasks: 19 classes, instance offsets, disparity (see the module's text)."""

    name = "cityscapes3"
    title = "Cityscapes: segmentation into 19 classes, instance offsets and disparity"
    source = "Cordts et al. 2016; folder cityscapes in Cityscapes' own layout"
    embedded = False
    kinds = ("label", "offset", "disparity")
    channels = (19, 2, 1)
    default_size = (256, 512)
    tasks = (
        _segmentation(19, (MIOU,)),
        Task("instances", offset_l1, (OFFSET_ERROR,)),
        Task("disparity", depth_l1, (SQUARED_ERROR,)),
    )
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=8, lr=1e-3, size=(64, 128)),
        "full": CITYSCAPES_THREE["pspnet"],
        **CITYSCAPES_THREE,
    }

    def paths(self) -> list[Path]:
        folder = data_root(self.root) / "cityscapes"
        return [folder / part for part in ("leftImg8bit", "gtFine", "disparity")]

    def load(self) -> Splits:
        folder = self.paths()[0].parent
        train, test = (
            MappedData(FolderReader(folder, split, 19, self.size, instances=True))
            for split in ("train", "val")
        )
        self.remark = "no validation images: val is test"
        return {"train": train, "val": test, "test": test}
