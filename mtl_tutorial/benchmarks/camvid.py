"""CamVid: road scenes, one binary segmentation task per class.

CamVid (Brostow, Fauqueur, Cipolla: "Semantic object classes in video: a high-definition ground
truth database", Pattern Recognition Letters 2009; academic use) with the 11 classes and the 367 /
101 / 233 frames of the usual split. The protocol is the one that Pascal et al. ("Averaged or
independent losses", arXiv 2109.11678) run on Cityscapes: each class is a task of its own, in or
out, with binary cross entropy; scores are the intersection over union and the share of right pixels
of each task.

Data: ``camvid_240x180.zip`` (half size; images as lossless WebP, labels by nearest neighbour) below
the data folder, read in memory; or a folder ``camvid`` in the usual layout, ``train``, ``val`` and
``test`` with images beside ``trainannot``, ``valannot`` and ``testannot`` with label maps of the
same names, 0 to 10, anything above without a class. Images stay bytes on the device.

Deviations: CamVid in place of Cityscapes, 11 classes in place of 7; frames of 180x240 (60x80 in
the budgets for a CPU) in place of 128x256.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..data import data_root
from ..dense_metrics import BINARY_ACCURACY, IGNORE, IOU, binary_cross_entropy
from .base import Protocol, Splits, Task
from .dense import DenseBenchmark, DenseData, resize_image, resize_nearest
from .protocols import PASCAL_SEGMENTATION

CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
"""The 11 classes in the order of their labels."""

ARCHIVE, FOLDER = "camvid_240x180.zip", "camvid"
SPLITS = ("train", "val", "test")
_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")

Read = Callable[[str], bytes]


def open_source(root: Path) -> tuple[list[str], Read]:
    """Names of all files as SPLIT/FILE, and how to read one, from the folder or the archive.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the archive is broken.
    """
    folder, archive = root / FOLDER, root / ARCHIVE
    if folder.is_dir():
        names = [p.relative_to(folder).as_posix() for p in sorted(folder.glob("*/*"))]
        return names, lambda name: (folder / name).read_bytes()
    if not archive.exists():
        raise FileNotFoundError(
            f"expected {archive} or a folder {folder} with train, trainannot and so on, got "
            "neither; get CamVid from its authors and unpack it there, or point MTL_TUTORIAL_DATA "
            "to the folder that has it"
        )
    try:
        with zipfile.ZipFile(archive) as file:
            contents = {i.filename: file.read(i) for i in file.infolist() if not i.is_dir()}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"expected a whole archive at {archive}, got a broken one ({error}); get it again"
        ) from None
    return sorted(contents), contents.__getitem__


def read_split(names: list[str], read: Read, split: str, size: tuple[int, int]) -> DenseData:
    """Images (N, 3, H, W) uint8 and one map of 0, 1 and -1 (N, H, W) int8 for each class.

    Raises:
        FileNotFoundError: no images, or an image without a label map.
        ValueError: a file is unreadable, or a map's size is not its image's.
    """
    annotated = {
        PurePosixPath(name).stem: name for name in names if name.startswith(f"{split}annot/")
    }
    pairs = []
    for name in names:
        path = PurePosixPath(name)
        if path.parts[0] == split and path.suffix.lower() in _SUFFIXES:
            if path.stem not in annotated:
                raise FileNotFoundError(
                    f"expected a label map {split}annot/{path.stem}.png for {name}, got none; get "
                    "the data set again"
                )
            pairs.append((name, annotated[path.stem]))
    if not pairs:
        raise FileNotFoundError(f"expected images in {split}/ of CamVid, got none; get it again")
    images = torch.empty(len(pairs), 3, *size, dtype=torch.uint8)
    labels = torch.empty(len(pairs), *size, dtype=torch.uint8)
    for i, (image, label) in enumerate(pairs):
        pixels = torch.from_numpy(decode(read(image), image, "RGB").transpose(2, 0, 1).copy())
        classes = torch.from_numpy(decode(read(label), label, None).copy())
        if classes.shape != pixels.shape[1:]:
            raise ValueError(
                f"expected {label} of {tuple(pixels.shape[1:])} pixels as its image, got "
                f"{tuple(classes.shape)}; get the data set again"
            )
        images[i] = resize_image(pixels, size)
        labels[i] = resize_nearest(classes, size)
    return DenseData(images, binary_maps(labels, len(CLASSES)))


def decode(data: bytes, name: str, mode: str | None) -> np.ndarray:
    """Pixels of an image file, (H, W, 3) for mode "RGB", (H, W) for a map of whole numbers.

    Raises:
        ValueError: it is unreadable, or a map has more than one channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert(mode) if mode else image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(
            f"expected an image in {name}, got an unreadable file ({error}); get it again"
        ) from None
    if mode is None and pixels.ndim != 2:
        raise ValueError(
            f"expected one label per pixel in {name}, got shape {pixels.shape}; colours are no "
            "labels"
        )
    return pixels


def binary_maps(labels: Tensor, n_classes: int) -> tuple[Tensor, ...]:
    """One map per class, int8: 1 in it, 0 in another class, -1 in none (labels from n_classes)."""
    void = labels >= n_classes
    return tuple((labels == k).to(torch.int8).masked_fill(void, IGNORE) for k in range(n_classes))


def _flipped(labels: Tensor, generator: torch.Generator) -> Tensor:
    """In or out at random for every pixel that has a class."""
    drawn = torch.randint(2, labels.shape, generator=generator).to(labels)
    return torch.where(labels == IGNORE, labels, drawn)


class CamVid(DenseBenchmark):
    """Eleven binary segmentation tasks on road scenes (see the module's text)."""

    name = "camvid"
    title = "CamVid: eleven binary segmentation tasks on road scenes"
    source = f"Brostow et al. 2009, academic use; {ARCHIVE}, or folder {FOLDER}"
    embedded = False
    kinds = ("label",) * len(CLASSES)
    channels = (1,) * len(CLASSES)
    default_size = (180, 240)
    tasks = tuple(
        Task(name, binary_cross_entropy, (IOU, BINARY_ACCURACY), 2, _flipped) for name in CLASSES
    )
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=2, batch_size=4, lr=1e-2, size=(60, 80), examples=120),
        "full": PASCAL_SEGMENTATION,
        "cpu": Protocol(
            epochs=4,
            batch_size=4,
            lr=1e-3,
            schedule="cosine",
            size=(60, 80),
            rates=(1e-3, 4e-3),
            note="60x80 pixels",
        ),
    }

    def paths(self) -> list[Path]:
        root = data_root(self.root)
        return [root / FOLDER if (root / FOLDER).is_dir() else root / ARCHIVE]

    def load(self) -> Splits:
        names, read = open_source(data_root(self.root))
        return {split: read_split(names, read, split, self.size) for split in SPLITS}
