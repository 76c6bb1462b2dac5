"""CelebA: 40 binary attributes of faces, each a task.

CelebA (Liu, Luo, Wang, Tang: "Deep Learning Face Attributes in the Wild", ICCV 2015; non-commercial
research) in torchvision's layout below the data folder, with the official split of 162,770 / 19,867
/ 19,962 aligned images:

    celeba/img_align_celeba/000001.jpg ...
    celeba/list_attr_celeba.txt, list_eval_partition.txt, identity_CelebA.txt,
    celeba/list_bbox_celeba.txt, list_landmarks_align_celeba.txt

torchvision checks the text files against their published sums. Images are read and resized batch by
batch. Each task has two measures: F1, which FAMO and its followers compare, and accuracy, which
IMTL prints; Delta m is over F1 alone in the protocol "famo", as that paper prints it, and over both
elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torchvision import datasets

from ..data import data_root, require
from ..dense_metrics import BINARY_ACCURACY, F1, binary_cross_entropy
from .base import Protocol, Splits, Task
from .camvid import decode
from .dense import DenseBenchmark, Example, MappedData, Reader, resize_image
from .protocols import CELEBA

ATTRIBUTES = (
    *("5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs"),
    *("Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair"),
    *("Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair"),
    *("Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache"),
    *("Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline"),
    *("Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings"),
    *("Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young"),
)
"""The 40 attributes in the order of their file."""

SPLITS = {"train": "train", "val": "valid", "test": "test"}


class FaceReader(Reader):
    """One official split.

    Args:
        root: folder that holds the folder ``celeba``.
        split: torchvision's name of it.
        size: height and width to resize to.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a text file is not the official one, or names other attributes.
    """

    def __init__(self, root: Path, split: str, size: tuple[int, int]) -> None:
        try:
            faces = datasets.CelebA(root, split, target_type="attr", download=False)
        except RuntimeError as error:
            raise ValueError(
                f"expected CelebA's official files in {root / 'celeba'}, got others ({error}); get "
                "them again from its authors"
            ) from None
        names = tuple(name for name in faces.attr_names if name)
        if names != ATTRIBUTES:
            raise ValueError(
                f"expected CelebA's 40 attributes in list_attr_celeba.txt, got {len(names)}: "
                f"{', '.join(names[:3])}, ...; the file is another one"
            )
        self.folder, self.size = root / "celeba" / "img_align_celeba", size
        self.labels = faces.attr.to(torch.int8)
        files = [self.folder / name for name in faces.filename]
        for path in files:
            require(path, "an image of CelebA", "unpack img_align_celeba.zip there")
        super().__init__(len(files), files)

    def read(self, i: int) -> Example:
        path = self.files[i]
        pixels = torch.from_numpy(decode(path.read_bytes(), str(path), "RGB").copy())
        image = resize_image(pixels.permute(2, 0, 1).contiguous(), self.size)
        return image, tuple(self.labels[i])


class CelebA(DenseBenchmark):
    """Forty attributes of faces, yes or no (see the module's text)."""

    name = "celeba"
    title = "CelebA: 40 attributes of faces"
    source = "Liu et al. 2015, non-commercial research; folder celeba in torchvision's layout"
    embedded = False
    kinds = ("label",) * len(ATTRIBUTES)
    channels = (1,) * len(ATTRIBUTES)
    default_size = (64, 64)
    default_network = "celeba_net"
    tasks = tuple(
        Task(name.replace("_", " "), binary_cross_entropy, (F1, BINARY_ACCURACY), 2)
        for name in ATTRIBUTES
    )
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=64, lr=1e-3, examples=640),
        "full": CELEBA["famo"],
        **CELEBA,
    }

    def paths(self) -> list[Path]:
        folder = data_root(self.root) / "celeba"
        return [folder / "img_align_celeba", folder / "list_attr_celeba.txt"]

    def load(self) -> Splits:
        root = data_root(self.root)
        for path in self.paths():
            require(path, "CelebA", "get it from its authors in torchvision's layout")
        return {
            name: MappedData(FaceReader(root, split, self.size)) for name, split in SPLITS.items()
        }
