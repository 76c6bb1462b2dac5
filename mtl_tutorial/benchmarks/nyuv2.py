"""NYUv2: segmentation, depth and surface normals of indoor scenes, in MTAN's files.

NYUv2 (Silberman, Hoiem, Kohli, Fergus: "Indoor Segmentation and Support Inference from RGBD
Images", ECCV 2012) as Liu, Johns, Davison ("End-to-End Multi-Task Learning with Attention", CVPR
2019) prepared and published it: 795 images to train with and 654 to test with, 288x384 pixels, 13
classes, depth in metres, precomputed normals. One file per example and map, counted from 0, below
the data folder:

    nyuv2/train/image/0.npy    (H, W, 3) floats from 0 to 1
    nyuv2/train/label/0.npy    (H, W)    -1 (none) to 12
    nyuv2/train/depth/0.npy    (H, W, 1) metres, 0 for none
    nyuv2/train/normal/0.npy   (H, W, 3) unit vectors, zero for none

and the same below ``nyuv2/val``. The files are mapped into memory and read batch by batch, so that
the 9 GB need not fit into it.

There is no validation part: the published protocols report the mean over the last ten epochs on the
test images. So "val" and "test" are the same images here, and nothing may be chosen by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import check_finite, data_root, require
from ..dense_metrics import IGNORE
from .base import Protocol, Splits
from .dense import DenseBenchmark, Example, MappedData, Reader, resize
from .protocols import NYUV2
from .rooms import N_CLASSES, TASKS

CHANNELS = {"image": 3, "label": 0, "depth": 1, "disparity": 1, "normal": 3}
"""Length of the last axis of a file of each kind; 0 for files without one."""


def open_npy(path: Path, kind: str) -> NDArray[np.floating]:
    """One map of an example, mapped into memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no array file, or of another shape.
    """
    require(path, f"the {kind} of an example", "get the whole data set in MTAN's files")
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"expected a whole .npy file at {path}, got a truncated or another one ({error}); get "
            "it again"
        ) from None
    want = CHANNELS[kind]
    if values.ndim != 2 + bool(want) or (want and values.shape[-1] != want):
        shape = f"(H, W, {want})" if want else "(H, W)"
        raise ValueError(f"expected shape {shape} in {path}, got {values.shape}; get it again")
    return values


class NpyReader(Reader):
    """One split in MTAN's files.

    Args:
        folder: of the split, with a folder per map.
        maps: folder name to kind of each task's map, in the order of the tasks.
        n_classes: of the label maps.
        size: height and width to resize to.

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: a file is truncated, or its shape is not its image's.
    """

    def __init__(
        self, folder: Path, maps: Mapping[str, str], n_classes: int, size: tuple[int, int]
    ) -> None:
        self.folder, self.maps = folder, dict(maps)
        self.n_classes, self.size = n_classes, size
        require(folder / "image", "a folder of images", "get the data set in MTAN's files")
        n = len(list((folder / "image").glob("*.npy")))
        if n == 0:
            raise FileNotFoundError(
                f"expected files 0.npy, 1.npy, ... in {folder / 'image'}, got none"
            )
        files = []
        for i in range(n):  # opened, not read: headers and lengths are checked before training
            shape = open_npy(self.path("image", i), "image").shape[:2]
            for name, kind in self.maps.items():
                found = open_npy(self.path(name, i), kind).shape[:2]
                if found != shape:
                    raise ValueError(
                        f"expected {self.path(name, i)} of {shape} pixels as its image, got "
                        f"{found}; get the data set again"
                    )
            files += [self.path(name, i) for name in ("image", *self.maps)]
        super().__init__(n, files)

    def path(self, name: str, i: int) -> Path:
        """File of a map of example i."""
        return self.folder / name / f"{i}.npy"

    def read(self, i: int) -> Example:
        image = torch.from_numpy(
            np.array(open_npy(self.path("image", i), "image"), np.float32)
        ).permute(2, 0, 1)
        targets = []
        for name, kind in self.maps.items():
            path = self.path(name, i)
            values = torch.from_numpy(np.array(open_npy(path, kind), np.float32))
            check_finite(values, str(path))
            if kind == "label":
                targets.append(as_labels(values, self.n_classes, path))
            elif kind == "normal":
                targets.append(values.permute(2, 0, 1))
            else:
                targets.append(values[..., 0])
        image, maps = resize(image, targets, list(self.maps.values()), self.size)
        return image.contiguous(), tuple(t.contiguous() for t in maps)


def as_labels(values: Tensor, n_classes: int, path: Path) -> Tensor:
    """Labels -1 to n_classes - 1 as int8.

    Raises:
        ValueError: others are among them.
    """
    low, high = values.min(), values.max()
    if low < IGNORE or high >= n_classes:
        raise ValueError(
            f"expected labels -1 to {n_classes - 1} in {path}, got {low:g} to {high:g}; the file "
            "is another one"
        )
    return values.to(torch.int8)


class NYUv2(DenseBenchmark):
    """Segmentation, depth and normals of 1,449 indoor images (see the module's text)."""

    name = "nyuv2"
    title = "NYUv2: segmentation, depth and surface normals"
    source = "Silberman et al. 2012 in MTAN's files; folder nyuv2/train, nyuv2/val"
    embedded = False
    kinds = ("label", "depth", "normal")
    channels = (N_CLASSES, 1, 3)
    default_size = (288, 384)
    tasks = TASKS
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=8, lr=1e-3, size=(96, 128)),
        "full": NYUV2["mtan"],
        **NYUV2,
    }

    def paths(self) -> list[Path]:
        folder = data_root(self.root) / "nyuv2"
        return [folder / "train", folder / "val"]

    def load(self) -> Splits:
        maps = {"label": "label", "depth": "depth", "normal": "normal"}
        train, test = (NpyReader(path, maps, N_CLASSES, self.size) for path in self.paths())
        self.remark = "no validation images: val is test, as in the published protocols"
        return {"train": MappedData(train), "val": MappedData(test), "test": MappedData(test)}
