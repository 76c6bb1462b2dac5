"""Benchmarks by name: `available` lists them, `create` makes one."""

from __future__ import annotations

from pathlib import Path

from .. import names
from .base import Benchmark, Data, Protocol, Task
from .camvid import CamVid
from .celeba import CelebA
from .cityscapes import Cityscapes, Cityscapes3
from .class_streams import (
    Cifar10Partial,
    Cifar10Partial5,
    Cifar10Rotation,
    MnistPartial,
    MnistPartial5,
)
from .helmholtz import Helmholtz
from .multidigits import MultiDigits
from .multimnist import MultiFashion, MultiFashionMNIST, MultiMNIST
from .nyuv2 import NYUv2
from .office_caltech10 import OfficeCaltech10
from .office_images import Office31, OfficeHome
from .rooms import Rooms
from .school import School
from .toy import Toy, toy_losses

__all__ = [
    "CLASSES",
    "Benchmark",
    "Data",
    "MultiDigits",
    "Protocol",
    "Task",
    "Toy",
    "available",
    "create",
    "toy_losses",
]

CLASSES: dict[str, type[Benchmark]] = {
    cls.name: cls
    for cls in (
        Toy,
        MultiDigits,
        Helmholtz,
        MultiMNIST,
        MultiFashion,
        MultiFashionMNIST,
        Cifar10Rotation,
        Cifar10Partial,
        Cifar10Partial5,
        MnistPartial,
        MnistPartial5,
        OfficeCaltech10,
        OfficeHome,
        Office31,
        School,
        Rooms,
        CamVid,
        NYUv2,
        Cityscapes,
        Cityscapes3,
        CelebA,
    )
}


def available() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(CLASSES)


def create(name: str, root: Path | str | None = None) -> Benchmark:
    """Make a benchmark by its name, without loading its data.

    Args:
        name: one of `available`.
        root: folder of the data sets; see `mtl_tutorial.data.data_root`.

    Raises:
        ValueError: no benchmark of that name, with the nearest names.
    """
    if name not in CLASSES:
        raise ValueError(f"no benchmark {name!r}; {names.nearest(name, available(), 'benchmarks')}")
    return CLASSES[name](root=root)
