"""MultiDigits: two overlaid handwritten digits, read one each. Real images, nothing to download.

The construction of MultiMNIST (Sabour, Frosst, Hinton: "Dynamic Routing Between Capsules", NIPS
2017) in the two-corner form that the multi-task literature uses (Lin et al.: "Pareto Multi-Task
Learning", NeurIPS 2019), on the 1,797 digits of 8x8 pixels that scikit-learn ships (Alpaydin and
Kaynak: "Optical Recognition of Handwritten Digits", UCI 1998, CC BY 4.0). One digit lies in the
upper left corner of a larger canvas, another one in the lower right corner; where they overlap the
brighter pixel stays. Task `left` names the first digit, task `right` the second.

Deviations from MultiMNIST, forced by the small source: a 10x10 canvas in place of 36x36 (the same
ratio), 1,000 / 300 / 497 source digits for training, validation and test, no digit in two splits,
and 6,000 / 1,500 / 3,000 pairs drawn with replacement within each split. The trunk is small on
purpose (8 and 16 channels, 32 hidden units): two tasks have to compete for it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ..metrics import ACCURACY
from ..models import HardSharing, small_convnet
from .base import Benchmark, Data, Protocol, Splits, Task

SIDE = 10
SPLITS = {"train": (1000, 6000), "val": (300, 1500), "test": (497, 3000)}  # digits, pairs


def overlay(left: torch.Tensor, right: torch.Tensor, side: int) -> torch.Tensor:
    """Images (N, 1, side, side): `left` (N, h, w) upper left, `right` lower right, maximum."""
    n, height, width = left.shape
    canvas = left.new_zeros(n, side, side)
    canvas[:, :height, :width] = left
    corner = canvas[:, side - height :, side - width :]
    corner.copy_(torch.maximum(corner, right))
    return canvas.unsqueeze(1)


class MultiDigits(Benchmark):
    """Two digits in one image, two ten-class tasks (see the module's text for the protocol)."""

    name = "multidigits"
    title = "MultiDigits: two overlaid scikit-learn digits"
    source = "scikit-learn load_digits (UCI optical digits, CC BY 4.0), overlaid as in MultiMNIST"
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=12, batch_size=100, lr=2e-3),
        "full": Protocol(epochs=60, batch_size=100, lr=2e-3, schedule="cosine", rates=(2e-3, 6e-3)),
    }
    tasks = (
        Task("left", F.cross_entropy, (ACCURACY,), n_classes=10),
        Task("right", F.cross_entropy, (ACCURACY,), n_classes=10),
    )

    def load(self) -> Splits:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
        classes = torch.tensor(labels)
        generator = torch.Generator().manual_seed(0)  # the data are the same for every seed
        order = torch.randperm(len(pixels), generator=generator)
        splits, start = {}, 0
        for name, (digits, pairs) in SPLITS.items():
            pool = order[start : start + digits]
            start += digits
            a, b = pool[torch.randint(digits, (2, pairs), generator=generator)]
            splits[name] = Data(overlay(pixels[a], pixels[b], SIDE), (classes[a], classes[b]))
        return splits

    def build(self) -> HardSharing:
        return small_convnet(SIDE, [10, 10])
