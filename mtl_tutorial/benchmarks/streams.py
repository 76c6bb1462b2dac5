"""Benchmarks whose tasks bring their own inputs: several domains, several data sets, one trunk.

Each task has its own stream of examples. An epoch takes as many steps as the longest stream has
batches; shorter streams start over, shuffled anew. The trunk sees the batch of one task at a time:
then a task's backward pass runs over its own examples alone, and the gradients of all K tasks
together cost what equal weighting costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models import HardSharing, Separate
from .base import EVALUATION_BATCH, Benchmark, Data, Losses, Protocol, Splits

Batch = list[tuple[Tensor, Tensor]]  # per task: inputs and targets


def endless(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end."""
    while True:
        for inputs, targets in data.batches(size, generator):
            yield inputs, targets[0]


class StreamBenchmark(Benchmark):
    """Base of benchmarks with one stream per task.

    A subclass writes `load_streams` and `build`. Splits are stored per task under "train/k" and so
    on. There is no shared representation of all tasks at once, so no feature level.
    """

    def load_streams(self) -> dict[str, list[Data]]:
        """Split name to one `Data` with one target per task."""
        raise NotImplementedError

    def load(self) -> Splits:
        return {
            f"{split}/{k}": data
            for split, streams in self.load_streams().items()
            for k, data in enumerate(streams)
        }

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each split: of the lines of its tasks' own checksums."""
        return joined_checksums(super().checksums())

    def _place(self, k: int) -> tuple[str, int]:
        return f"train/{k}", 0

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Batch]:
        every = [self.data[f"train/{k}"] for k in range(len(self.tasks))]
        streams = [stream.first(protocol.examples) for stream in every]
        size = protocol.batch_size
        steps = max(max(1, len(stream) // size) for stream in streams)
        sources = [endless(stream, size, generator) for stream in streams]
        for _ in range(steps):
            yield [next(source) for source in sources]

    def losses(
        self, model: nn.Module, batch: Any, tasks: Sequence[int] | None = None
    ) -> tuple[Losses, Tensor | None]:
        chosen = list(range(len(self.tasks)) if tasks is None else tasks)
        losses = []
        for k in chosen:
            inputs, targets = batch[k]
            trunk, head = _path(model, k)
            losses.append(self.tasks[k].loss(head(trunk(inputs)), targets))
        return losses, None

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, examples: int = 0
    ) -> dict[str, dict[str, float]]:
        model.eval()
        scores: dict[str, dict[str, float]] = {}
        for k, task in enumerate(self.tasks):
            trunk, head = _path(model, k)
            totals: dict[str, Tensor] = {}
            data = self.data[f"{split}/{k}"].first(examples)
            for inputs, targets in data.batches(EVALUATION_BATCH):
                output = head(trunk(inputs))
                for metric in task.metrics:
                    part = metric.statistics(output, targets[0])
                    totals[metric.name] = totals.get(metric.name, torch.zeros_like(part)) + part
            scores[task.name] = {m.name: m.finish(totals[m.name].cpu()) for m in task.metrics}
        model.train()
        return scores

    def probe(self) -> Any:
        firsts = [next(iter(self.data[f"val/{k}"].batches(64))) for k in range(len(self.tasks))]
        return [(inputs, targets[0]) for inputs, targets in firsts]


def joined_checksums(of_tasks: dict[str, str]) -> dict[str, str]:
    """One checksum per split from those of "split/k"."""
    lines: dict[str, list[str]] = {}
    for name, checksum in of_tasks.items():
        lines.setdefault(name.partition("/")[0], []).append(checksum)
    return {k: hashlib.sha256("\n".join(v).encode()).hexdigest() for k, v in lines.items()}


def _path(model: nn.Module, k: int) -> tuple[nn.Module, nn.Module]:
    """Trunk and head of task k, shared or of the single-task baseline."""
    if isinstance(model, HardSharing):
        return model.trunk, model.heads[k]
    alone = cast(HardSharing, cast(Separate, model).networks[k])
    return alone.trunk, alone.heads[0]


def split_indices(
    n: int, fractions: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random partition of n examples into training, validation and test part, none empty.

    Args:
        n: number of examples, 3 or more.
        fractions: of training and of validation examples; the rest is for the test.
        generator: source of the permutation.

    Raises:
        ValueError: fewer than 3 examples.
    """
    if n < 3:
        raise ValueError(f"expected at least 3 examples of a task, got {n}; drop the task")
    order = torch.randperm(n, generator=generator)
    train = min(max(1, round(fractions[0] * n)), n - 2)
    val = min(max(1, round(fractions[1] * n)), n - train - 1)
    return order[:train], order[train : train + val], order[train + val :]
