"""Benchmarks by name: `available` lists them, `create` makes one."""

from __future__ import annotations

from .. import names
from .base import BUDGETS, Benchmark, Data, Protocol, Task
from .multidigits import MultiDigits
from .toy import Toy, toy_losses

__all__ = [
    "BUDGETS",
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

CLASSES: dict[str, type[Benchmark]] = {cls.name: cls for cls in (Toy, MultiDigits)}


def available() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(CLASSES)


def create(name: str) -> Benchmark:
    """Make a benchmark by its name, without loading its data.

    Raises:
        ValueError: no benchmark of that name, with the nearest names.
    """
    if name not in CLASSES:
        raise ValueError(f"no benchmark {name!r}; {names.nearest(name, available(), 'benchmarks')}")
    return CLASSES[name]()
