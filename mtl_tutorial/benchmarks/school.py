"""School: exam scores of 139 London schools, one regression task each: how methods scale in K.

The Inner London Education Authority's data in the form of MALSAR (15,362 pupils, 28 binary or count
features); used for multi-task learning since Bakker and Heskes, JMLR 2003.

The protocol is our own: per school, 60 % of the pupils for training, 20 % for validation and for
the test; targets and count features standardised by the training parts of all schools; one hidden
layer shared, one linear unit per school. The metric is the mean squared error, so that 1 is what
the mean score of all training pupils reaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import matlab
from ..data import check_finite, data_root, require
from ..metrics import Metric, ratio
from ..models import HardSharing
from .base import Data, Protocol, Task
from .streams import StreamBenchmark, split_indices

N_SCHOOLS, N_FEATURES = 139, 28
FRACTIONS = (0.6, 0.2)


def _squared(output: Tensor, target: Tensor) -> Tensor:
    total = (output - target).double().square().sum()
    return torch.stack([total, total.new_tensor(target.numel())])


MSE = Metric("squared error", False, _squared, ratio)
"""Mean squared error, in units of the variance of all training scores."""


def read_school(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Features (n_k, 28) and scores (n_k, 1) of each school.

    Raises:
        ValueError: the file is unreadable or has other contents.
    """
    try:
        content = matlab.load(path)
        pairs = [
            (torch.tensor(x.astype("float32")), torch.tensor(y.astype("float32")))
            for x, y in zip(content["X"].ravel(), content["Y"].ravel(), strict=True)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected a MATLAB file with cells X and Y, got an unreadable one at {path} "
            f"({error}); get it again"
        ) from None
    for k, (x, y) in enumerate(pairs):
        if x.dim() != 2 or x.shape[1] != N_FEATURES or y.shape != (len(x), 1):
            raise ValueError(
                f"expected features (n, {N_FEATURES}) and scores (n, 1) of school {k} in {path}, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        check_finite(x, f"features of school {k}")
        check_finite(y, f"scores of school {k}")
    if len(pairs) != N_SCHOOLS:
        raise ValueError(f"expected {N_SCHOOLS} schools in {path}, got {len(pairs)}")
    return pairs


class School(StreamBenchmark):
    """139 schools, one regression task each (see the module's text for the protocol)."""

    name = "school"
    title = "School: exam scores of 139 schools"
    source = "Inner London Education Authority, via MALSAR; file school/school.mat"
    embedded = False
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=5, batch_size=16, lr=1e-3),
        "full": Protocol(epochs=10, batch_size=16, lr=3e-3, schedule="cosine", rates=(3e-3, 1e-2)),
    }
    tasks = tuple(Task(f"school {k + 1}", F.mse_loss, (MSE,)) for k in range(N_SCHOOLS))

    def paths(self) -> list[Path]:
        return [data_root(self.root) / "school" / "school.mat"]

    def load_streams(self) -> dict[str, list[Data]]:
        remedy = "get school.mat of the MALSAR package and put it there"
        schools = read_school(require(self.paths()[0], "the School data", remedy))
        generator = torch.Generator().manual_seed(0)
        parts = [split_indices(len(x), FRACTIONS, generator) for x, _ in schools]
        train_x = torch.cat([x[p[0]] for (x, _), p in zip(schools, parts, strict=True)])
        train_y = torch.cat([y[p[0]] for (_, y), p in zip(schools, parts, strict=True)])
        mx, sx = train_x.mean(0), train_x.std(0).clamp(min=1e-6)
        my, sy = train_y.mean(), train_y.std()
        return {
            split: [
                Data((x[p[i]] - mx) / sx, ((y[p[i]] - my) / sy,))
                for (x, y), p in zip(schools, parts, strict=True)
            ]
            for i, split in enumerate(("train", "val", "test"))
        }

    def build(self) -> HardSharing:
        trunk = nn.Sequential(nn.Linear(N_FEATURES, 64), nn.ReLU())
        return HardSharing(trunk, [nn.Linear(64, 1) for _ in range(N_SCHOOLS)])
