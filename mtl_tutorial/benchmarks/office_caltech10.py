"""Office-Caltech10: one recognition problem in four domains, on published SURF features.

Ten classes that Office-31 (Saenko et al., ECCV 2010) and Caltech-256 share, as SURF bag-of-words
histograms with 800 bins (Gong et al.: "Geodesic Flow Kernel for Unsupervised Domain Adaptation",
CVPR 2012). Each domain, amazon, Caltech, dslr, webcam, is a task with its own inputs: ExcessMTL's
multi-domain setting in small. Histograms are divided by their sums and standardised per bin by the
training parts of all domains.

The protocol is our own: a random half of each domain for training, a fifth for validation, the rest
for the test, the same for every run; two hidden layers shared, one linear head per domain.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .. import matlab
from ..data import check_labels, data_root, require
from ..metrics import ACCURACY
from ..models import HardSharing
from .base import Data, Protocol, Task
from .streams import StreamBenchmark, split_indices

FILES = ("amazon", "Caltech10", "dslr", "webcam")
FRACTIONS = (0.5, 0.2)
BINS, CLASSES = 800, 10


def read_domain(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Histograms (N, 800) that sum to one and labels (N,) from 0 to 9, from a MATLAB file.

    Raises:
        ValueError: the file is unreadable or has other contents.
    """
    try:
        content = matlab.load(path)
        counts = torch.tensor(content["fts"].astype("float32"))
        labels = torch.tensor(content["labels"].astype("int64")).flatten() - 1
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"expected a MATLAB file with `fts` and `labels`, got an unreadable one at {path} "
            f"({error}); get it again"
        ) from None
    if counts.dim() != 2 or counts.shape != (len(labels), BINS):
        raise ValueError(
            f"expected {BINS} bins and a label per image in {path}, got features of shape "
            f"{tuple(counts.shape)} and {len(labels)} labels"
        )
    check_labels(labels, CLASSES, str(path))
    return counts / counts.sum(1, keepdim=True).clamp(min=1), labels


class OfficeCaltech10(StreamBenchmark):
    """Four domains, ten classes each (see the module's text for the protocol)."""

    name = "office_caltech10"
    title = "Office-Caltech10: ten classes in four domains, SURF features"
    source = "Gong et al. 2012, Saenko et al. 2010; folder office_caltech10_surf with four .mat"
    embedded = False
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=20, batch_size=32, lr=1e-3, weight_decay=1e-4),
        "full": Protocol(
            epochs=40,
            batch_size=32,
            lr=1e-3,
            weight_decay=1e-4,
            schedule="cosine",
            rates=(3e-4, 1e-3, 3e-3),
        ),
    }
    tasks = tuple(
        Task(name.removesuffix("10").lower(), F.cross_entropy, (ACCURACY,), n_classes=CLASSES)
        for name in FILES
    )

    def paths(self) -> list[Path]:
        folder = data_root(self.root) / "office_caltech10_surf"
        return [folder / f"{name}_SURF_L10.mat" for name in FILES]

    def load_streams(self) -> dict[str, list[Data]]:
        remedy = "get the SURF features of Gong et al. 2012 and put the four files there"
        domains = [
            read_domain(require(path, f"domain {name}", remedy))
            for name, path in zip(FILES, self.paths(), strict=True)
        ]
        generator = torch.Generator().manual_seed(0)
        parts = [split_indices(len(labels), FRACTIONS, generator) for _, labels in domains]
        pool = torch.cat([x[p[0]] for (x, _), p in zip(domains, parts, strict=True)])
        mean, std = pool.mean(0), pool.std(0).clamp(min=1e-8)
        return {
            split: [
                Data((x[p[i]] - mean) / std, (y[p[i]],))
                for (x, y), p in zip(domains, parts, strict=True)
            ]
            for i, split in enumerate(("train", "val", "test"))
        }

    def build(self) -> HardSharing:
        trunk = nn.Sequential(
            nn.Linear(BINS, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 64), nn.ReLU()
        )
        return HardSharing(trunk, [nn.Linear(64, CLASSES) for _ in FILES])
