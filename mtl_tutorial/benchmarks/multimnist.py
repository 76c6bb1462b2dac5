"""MultiMNIST and its two relatives: two overlaid images of 28x28 on 36x36, read one each.

The construction of MultiMNIST (Sabour, Frosst, Hinton: "Dynamic Routing Between Capsules", NIPS
2017) in the form of Lin et al.: "Pareto Multi-Task Learning", NeurIPS 2019: one image lies in the
upper left corner, another one, drawn at random from the same split, in the lower right corner, and
where they overlap the brighter pixel stays. `multimnist` takes both from MNIST, `multifashion`
both from Fashion-MNIST, `multi_fashion_mnist` the left one from Fashion-MNIST and the right one
from MNIST. The network is the LeNet of that line of work: 9x9 and 5x5 convolutions with 10 and 20
channels, 50 hidden units, one linear head per task.

Deviations: pairs are drawn by our own seed and made on the fly in seconds; 50,000 / 10,000 / 10,000
pairs for training, validation and test, training and validation from disjoint parts of the official
training set (the published sets hold 120,000 and 20,000 and no validation part); Adam in place of
SGD, so that methods with different step lengths can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import load_mnist, mnist_folder
from ..metrics import ACCURACY
from ..models import HardSharing, ToUnit
from .base import Benchmark, Data, Protocol, Splits, Task
from .multidigits import overlay

SIDE = 36
N_VAL = 10_000


def lenet(n_classes: tuple[int, ...]) -> HardSharing:
    """Pareto MTL's LeNet for uint8 images (N, 1, 36, 36): 31,250 shared parameters.

    Channels last, which makes its convolutions two to three times as fast on a CPU.
    """
    trunk = nn.Sequential(
        ToUnit(),
        nn.Conv2d(1, 10, 9),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20 * 5 * 5, 50),
        nn.ReLU(),
    )
    heads = [nn.Linear(50, c) for c in n_classes]
    return HardSharing(trunk, heads).to(memory_format=torch.channels_last)


def pairs(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], generator: torch.Generator
) -> Data:
    """Every left image once, each with a random right one: (N, 1, 36, 36) uint8, two labels."""
    partner = torch.randint(len(right[0]), (len(left[0]),), generator=generator)
    return Data(overlay(left[0], right[0][partner], SIDE), (left[1], right[1][partner]))


class MultiMNIST(Benchmark):
    """Two MNIST digits in one image (see the module's text for the protocol)."""

    name = "multimnist"
    title = "MultiMNIST: two overlaid MNIST digits"
    source = "MNIST (LeCun et al. 1998, CC BY-SA 3.0), overlaid as in Pareto MTL"
    embedded = False
    sources: ClassVar[tuple[str, str]] = ("MNIST", "MNIST")
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=2, batch_size=256, lr=1e-3),
        "full": Protocol(
            epochs=100,
            batch_size=256,
            lr=1e-3,
            schedule="cosine",
            rates=(3e-4, 1e-3, 3e-3),
        ),
        "cpu": Protocol(
            epochs=2,
            batch_size=64,
            lr=3e-3,
            schedule="cosine",
            rates=(3e-3, 1e-2),
            examples=6_000,
        ),
    }
    tasks = (
        Task("left", F.cross_entropy, (ACCURACY,), n_classes=10),
        Task("right", F.cross_entropy, (ACCURACY,), n_classes=10),
    )

    def paths(self) -> list[Path]:
        return [mnist_folder(name, self.root) for name in self.sources]

    def load(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        loaded = {
            (name, train): load_mnist(name, self.root, train)
            for name in set(self.sources)
            for train in (True, False)
        }
        splits = {}
        for split in ("train", "val", "test"):
            sides = []
            for name in self.sources:
                images, labels = loaded[name, split != "test"]
                part = {
                    "train": slice(N_VAL, None),
                    "val": slice(0, N_VAL),
                    "test": slice(None),
                }[split]
                sides.append((images[part], labels[part]))
            splits[split] = pairs(sides[0], sides[1], generator)
        return splits

    def build(self) -> HardSharing:
        return lenet((10, 10))


# Half the pairs, half the batch: as many steps as on MultiMNIST in little more than half the time.
RELATIVES = {
    **MultiMNIST.protocols,
    "cpu": replace(MultiMNIST.protocols["cpu"], examples=3_000, batch_size=32),
}


class MultiFashion(MultiMNIST):
    """Two Fashion-MNIST items in one image."""

    name = "multifashion"
    title = "MultiFashion: two overlaid Fashion-MNIST items"
    source = "Fashion-MNIST (Xiao et al. 2017, MIT), overlaid as in Pareto MTL"
    sources = ("FashionMNIST", "FashionMNIST")
    protocols: ClassVar[dict[str, Protocol]] = RELATIVES


class MultiFashionMNIST(MultiMNIST):
    """A Fashion-MNIST item (left) and an MNIST digit (right) in one image."""

    name = "multi_fashion_mnist"
    title = "Multi-Fashion+MNIST: an item and a digit, overlaid"
    source = "Fashion-MNIST (MIT) and MNIST (CC BY-SA 3.0), overlaid as in Pareto MTL"
    sources = ("FashionMNIST", "MNIST")
    protocols: ClassVar[dict[str, Protocol]] = RELATIVES
