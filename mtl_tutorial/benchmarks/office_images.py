"""Office-Home and Office-31: one recognition problem in several image domains, each a task.

Office-Home (Venkateswara et al.: "Deep Hashing Network for Unsupervised Domain Adaptation", CVPR
2017): Art, Clipart, Product, Real World, 65 classes. Office-31 (Saenko et al.: "Adapting Visual
Category Models to New Domains", ECCV 2010): amazon, dslr, webcam, 31 classes. ExcessMTL's main
benchmark is the first.

Layout: ``office_home/DOMAIN/CLASS/image.jpg`` and ``office_31/DOMAIN/CLASS/image.jpg`` below the
data folder; domains are found without regard to case, blanks and underscores, and ``DOMAIN/images``
is looked through. If ``DOMAIN_train.txt``, ``DOMAIN_val.txt`` and ``DOMAIN_test.txt`` lie
beside the domains, with lines ``path label`` (LibMTL's split lists), they are the split; else 60 %,
20 % and 20 % of each domain at random, always the same.

Network of the ExcessMTL code: ResNet-18, then Linear 512, batch normalisation, ReLU, dropout 0.5,
shared; one linear head per domain. Pretrained weights are optional (``pretrained=True`` downloads
them through torchvision) and never required; the table's rows here are from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models, transforms

from ..data import check_labels, data_root, require
from ..metrics import ACCURACY
from ..models import HardSharing
from .base import Data, Protocol, Task
from .streams import StreamBenchmark, split_indices

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
FRACTIONS = (0.6, 0.2)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the ExcessMTL code


class Normalise(nn.Module):
    """Bytes (N, 3, H, W) to floats with ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.step = transforms.Normalize(_MEAN, _STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.float() / 255)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def find_domain(folder: Path, domain: str) -> Path:
    """The folder of a domain whose subfolders are the classes.

    Raises:
        FileNotFoundError: there is none.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and _plain(path.name) == _plain(domain):
            return path / "images" if (path / "images").is_dir() else path
    raise FileNotFoundError(
        f"expected a folder for domain {domain} in {folder}, got none; get the data set from its "
        "authors and unpack it there, or point MTL_TUTORIAL_DATA to the folder that has it"
    )


def read_list(path: Path) -> list[tuple[str, int]]:
    """Lines ``path label`` of a split list.

    Raises:
        ValueError: a line has another form, with its number.
    """
    entries = []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not name or not label.isdecimal() or len(label) > 9:
            raise ValueError(f"expected `path label` in line {number} of {path}, got {line!r}")
        entries.append((name.strip(), int(label)))
    return entries


def read_images(paths: list[Path], side: int) -> Tensor:
    """Images as bytes (N, 3, side, side), resized without keeping their shape.

    Raises:
        ValueError: a file is no readable image.
    """
    pixels = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    to_tensor = transforms.PILToTensor()
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels[i] = to_tensor(image.convert("RGB").resize((side, side)))
        except Exception as error:  # a broken file makes pillow stumble in many ways
            raise ValueError(
                f"expected an image at {path}, got an unreadable file ({error}); get it again"
            ) from None
    return pixels


@dataclass
class OfficeHome(StreamBenchmark):
    """Four domains, 65 classes (see the module's text for layout and protocol).

    Attributes:
        side: images are resized to side x side pixels.
        pretrained: start from torchvision's ImageNet weights.
    """

    name = "office_home"
    title = "Office-Home: 65 classes in four image domains"
    source = "Venkateswara et al., CVPR 2017; folder office_home/DOMAIN/CLASS"
    embedded = False
    folder: ClassVar[str] = "office_home"
    domains: ClassVar[tuple[str, ...]] = ("Art", "Clipart", "Product", "Real_World")
    n_classes: ClassVar[int] = 65
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=1, batch_size=16, lr=1e-4, weight_decay=1e-5),
        "full": Protocol(epochs=100, batch_size=64, lr=1e-4, weight_decay=1e-5),
    }
    tasks = tuple(
        Task(d, F.cross_entropy, (ACCURACY,), n_classes=65)
        for d in ("Art", "Clipart", "Product", "Real_World")
    )

    side: int = 224
    pretrained: bool = False

    def paths(self) -> list[Path]:
        return [data_root(self.root) / self.folder]

    def load_streams(self) -> dict[str, list[Data]]:
        root = self.paths()[0]
        streams: dict[str, list[Data]] = {"train": [], "val": [], "test": []}
        generator = torch.Generator().manual_seed(0)
        for domain in self.domains:
            folder = find_domain(root, domain)
            lists = {s: root / f"{domain}_{s}.txt" for s in streams}
            if all(path.is_file() for path in lists.values()):
                parts = {
                    s: [
                        (require(root / name, f"an image named in {path}", "get it again"), label)
                        for name, label in read_list(path)
                    ]
                    for s, path in lists.items()
                }
            else:
                every = self.scan(folder)
                indices = split_indices(len(every), FRACTIONS, generator)
                parts = {
                    s: [every[i] for i in index.tolist()]
                    for s, index in zip(streams, indices, strict=True)
                }
            for split, pairs in parts.items():
                labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
                check_labels(labels, self.n_classes, f"{domain} {split}")
                streams[split].append(
                    Data(read_images([path for path, _ in pairs], self.side), (labels,))
                )
        return streams

    def scan(self, folder: Path) -> list[tuple[Path, int]]:
        """Image files of a domain and the number of their class, in alphabetical order.

        Raises:
            ValueError: the domain has another number of classes.
        """
        classes = sorted(p for p in folder.iterdir() if p.is_dir())
        if len(classes) != self.n_classes:
            raise ValueError(
                f"expected {self.n_classes} class folders in {folder}, got {len(classes)}; unpack "
                "the whole data set"
            )
        return [
            (path, label)
            for label, group in enumerate(classes)
            for path in sorted(group.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]

    def build(self) -> HardSharing:
        weights = models.ResNet18_Weights.DEFAULT if self.pretrained else None
        body = models.resnet18(weights=weights)
        body.fc = nn.Identity()
        neck = nn.Linear(512, 512)
        nn.init.normal_(neck.weight, std=0.005)
        nn.init.constant_(neck.bias, 0.1)
        trunk = nn.Sequential(
            Normalise(), body, neck, nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.5)
        )
        return HardSharing(trunk, [nn.Linear(512, self.n_classes) for _ in self.domains])


@dataclass
class Office31(OfficeHome):
    """Three domains, 31 classes."""

    name = "office_31"
    title = "Office-31: 31 classes in three image domains"
    source = "Saenko et al., ECCV 2010; folder office_31/DOMAIN/CLASS"
    folder: ClassVar[str] = "office_31"
    domains: ClassVar[tuple[str, ...]] = ("amazon", "dslr", "webcam")
    n_classes: ClassVar[int] = 31
    tasks = tuple(
        Task(d, F.cross_entropy, (ACCURACY,), n_classes=31) for d in ("amazon", "dslr", "webcam")
    )
