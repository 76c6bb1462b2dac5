"""Where data sets lie, and the one way to complain about them.

A data set's folder is ``root=`` of the loader, else the environment variable MTL_TUTORIAL_DATA,
else ``~/.cache/mtl_tutorial``. Nothing is downloaded while training: `mtl-tutorial data NAME` does
that where the set may be fetched by a program.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

ENVIRONMENT = "MTL_TUTORIAL_DATA"


def data_root(root: Path | str | None = None) -> Path:
    """The folder that holds all data sets, one subfolder or file each."""
    chosen = root if root is not None else os.environ.get(ENVIRONMENT)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "mtl_tutorial"


def require(path: Path, what: str, remedy: str) -> Path:
    """The path, if it exists.

    Raises:
        FileNotFoundError: it does not; the text says what was looked for, where, and the remedy.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"expected {what} at {path}, got no such file; {remedy}, or point {ENVIRONMENT} to the "
            "folder that has it"
        )
    return path


def verify(path: Path, md5: str) -> None:
    """Compare a file with its published MD5 sum.

    Raises:
        ValueError: they differ, so the file is truncated, corrupt or another one.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise ValueError(
            f"expected {path} with MD5 {md5}, got {found} ({path.stat().st_size} bytes); the file "
            "is truncated or another one: delete it and get it again"
        )


def check_labels(labels: Tensor, n_classes: int, what: str) -> None:
    """Check that class labels are whole numbers from 0 to n_classes - 1, and that there are some.

    Raises:
        ValueError: they are not.
    """
    if labels.numel() == 0:
        raise ValueError(f"expected examples in {what}, got none; look at its files")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"expected labels 0 to {n_classes - 1} in {what}, got {low} to {high}; the label file "
            "is another one"
        )


def check_finite(values: Tensor, what: str) -> None:
    """Check that inputs or targets hold no NaN and no infinity.

    Raises:
        ValueError: they do, with the first place.
    """
    if not values.isfinite().all():
        place = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"expected finite numbers in {what}, got NaN or infinity at {place}")


# ------------------------------------------------------------------------------- idx files

MNIST_MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
"""MD5 sums of the four official files of each set, unzipped."""


def mnist_folder(name: str, root: Path | str | None) -> Path:
    """Where torchvision keeps the files of MNIST or Fashion-MNIST."""
    return data_root(root) / name / "raw"


def load_mnist(name: str, root: Path | str | None, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST or Fashion-MNIST through torchvision, its files checked against the official ones.

    Args:
        name: "MNIST" or "FashionMNIST".
        root: see `data_root`.
        train: the 60,000 training images, else the 10,000 test images.

    Returns:
        Images (N, 28, 28) uint8 and labels (N,) int64.

    Raises:
        FileNotFoundError: the files are not there, with how to get them.
        ValueError: a file is truncated or another one.
    """
    folder = data_root(root)
    for file, md5 in MNIST_MD5[name].items():
        if file.startswith("train" if train else "t10k"):
            path = mnist_folder(name, root) / file
            require(path, f"{name}'s file", f"do `mtl-tutorial data {name.lower()}`")
            verify(path, md5)
    data_set = getattr(datasets, name)(folder, train=train, download=False)
    return data_set.data, data_set.targets.to(torch.int64)


DOWNLOADS = {
    "mnist": lambda root: [datasets.MNIST(root, train=t, download=True) for t in (True, False)],
    "fashionmnist": lambda root: [
        datasets.FashionMNIST(root, train=t, download=True) for t in (True, False)
    ],
    "cifar10": lambda root: [datasets.CIFAR10(root, train=t, download=True) for t in (True, False)],
}
"""Sets that torchvision fetches: name to download, for `mtl-tutorial data`."""
