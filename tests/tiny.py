"""A benchmark that trains in a moment, and what child processes do with it.

As a script it is the command line with that benchmark added:
``python tests/tiny.py run tiny --budget full``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from mtl_tutorial import benchmarks, training
from mtl_tutorial.benchmarks import Data, MultiDigits, Protocol

SIZES = {"train": 240, "val": 100, "test": 100}


@cache
def _load() -> dict[str, Data]:
    full = MultiDigits().load()
    return {
        name: Data(full[name].inputs[:n].clone(), tuple(t[:n].clone() for t in full[name].targets))
        for name, n in SIZES.items()
    }


class Tiny(MultiDigits):
    """The first few pairs of MultiDigits."""

    name = "tiny"
    title = "Tiny: the first pairs of MultiDigits"
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=2, batch_size=40, lr=4e-3),
        "full": Protocol(epochs=40, batch_size=40, lr=4e-3, schedule="cosine"),
    }

    def load(self) -> dict[str, Data]:
        return _load()


def cell(method: str = "equal", seed: int = 0, epochs: int = 2, **protocol: Any) -> training.Cell:
    changed = dataclasses.replace(Tiny.protocols["quick"], epochs=epochs, **protocol)
    return training.Cell("tiny", "quick", changed, training.parse_spec(method), seed)


def prepared() -> Tiny:
    bench = Tiny()
    bench.prepare(torch.device("cpu"))
    return bench


def apart(ours: Sequence[training.Run], theirs: Sequence[training.Run]) -> float:
    """Largest relative difference of the parameters of two lists of runs."""
    pairs = [
        (p.detach(), q.detach().to(p.device))
        for a, b in zip(ours, theirs, strict=True)
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)
    ]
    return max(float((p - q).norm() / q.norm()) for p, q in pairs)


def without_times(value: Any) -> Any:
    """A result without what differs between two equal runs: times, memory, commits, company."""
    if isinstance(value, dict):
        times = {"seconds", "seconds_per_epoch", "date", "commit", "peak_memory_mb", "together"}
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def sweep_all(cells: list[training.Cell], root: Path, log: Path | None = None, gate=None) -> None:
    """What a child process does: run the cells, write down what happened to each."""
    torch.set_num_threads(1)
    benchmarks.CLASSES["tiny"] = Tiny
    if gate is not None:
        gate.wait()
    outcomes = [
        (o.cell.spec.label, o.cell.seed, o.status)
        for o in training.sweep(cells, root, torch.device("cpu"))
    ]
    if log is not None:
        log.write_text(json.dumps(outcomes), encoding="utf-8")


if __name__ == "__main__":
    from mtl_tutorial import cli

    benchmarks.CLASSES["tiny"] = Tiny
    cli.main()
