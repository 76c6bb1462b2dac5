"""What a benchmark is: tasks, data, a model and a protocol. It knows no method.

Small data sets live on the device as tensors and are shuffled and cut into batches there, without
worker processes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import names
from ..metrics import Metric
from ..models import HardSharing, Separate
from ..noise import LabelNoise


@dataclass(frozen=True)
class Task:
    """One task: its loss (mean over the batch, 0-dimensional) and what is measured of it.

    `n_classes` is known for classification tasks, whose labels can be made noisy.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...]
    n_classes: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How long and with what a run trains; one per budget.

    Attributes:
        epochs: passes over the training set.
        batch_size: examples per step.
        lr: learning rate of the optimiser.
        optimizer: "adam" (betas 0.9, 0.999) or "sgd" (momentum 0.9).
        weight_decay: of the optimiser.
        schedule: "constant" or "cosine" to zero over all epochs.
        report: which scores a run reports: those after the "last" epoch.
        note: what a reader of the table should know.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "constant"
    report: str = "last"
    note: str = ""

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Optimiser over the given parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def lr_factor(self, epoch: int) -> float:
        """Factor on the learning rate in the given epoch, counted from 0."""
        if self.schedule == "cosine":
            return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / self.epochs))))
        return 1.0


@dataclass
class Data:
    """One split as tensors: the input of all tasks and one target per task."""

    inputs: Tensor
    targets: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def to(self, device: torch.device) -> Data:
        return Data(self.inputs.to(device), tuple(t.to(device) for t in self.targets))

    def checksum(self) -> str:
        """SHA-256 over shapes, dtypes and bytes."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, *self.targets):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Batches on the device: shuffled, the last short one left out, if a generator is given.

        The permutation is drawn on the host, so that a seed gives the same order on any device.
        """
        if generator is None:
            for i in range(0, len(self), size):
                yield self.inputs[i : i + size], tuple(t[i : i + size] for t in self.targets)
            return
        order = torch.randperm(len(self), generator=generator).to(self.inputs.device)
        size = min(size, len(self))
        for i in range(0, len(self) - size + 1, size):
            index = order[i : i + size]
            yield self.inputs[index], tuple(t[index] for t in self.targets)


Splits = dict[str, Data]
Losses = list[Tensor]


@dataclass
class Benchmark:
    """Base of all benchmarks: tasks that share their inputs, data as tensors.

    A subclass sets the class attributes and writes `load` and `build`; one whose batches look
    different writes `batches`, `losses` and `evaluate` as well.

    Attributes:
        name, title: for the command line and for tables.
        source: where data and protocol come from, with citation and licence.
        synthetic: said on every table, where the data are made up.
        embedded: whether nothing has to be downloaded.
        baseline: whether Delta m against single-task learning means something here.
        root: folder of the data sets; see `mtl_tutorial.data.data_root`.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    synthetic: ClassVar[bool] = False
    embedded: ClassVar[bool] = True
    baseline: ClassVar[bool] = True
    protocols: ClassVar[dict[str, Protocol]] = {}
    tasks: ClassVar[tuple[Task, ...]] = ()

    root: Path | str | None = None
    remark: str = ""  # what a table must say of the data at hand, set by `load`
    data: Splits = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _checksums: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    # What a benchmark defines ---------------------------------------------------------------

    def load(self) -> Splits:
        """Splits "train", "val", "test" on the CPU; deterministic."""
        raise NotImplementedError

    def build(self) -> HardSharing:
        """A freshly initialised network, from torch's global generator."""
        raise NotImplementedError

    def paths(self) -> list[Path]:
        """Files or folders without which `load` fails."""
        return []

    # What the training loop uses ------------------------------------------------------------

    def here(self) -> bool:
        """Whether the data are at hand; a cheap look, not a check of their contents."""
        return all(path.exists() for path in self.paths())

    def prepare(self, device: torch.device) -> Benchmark:
        """Load the data, once, and put them on the device."""
        self.data = {name: split.to(device) for name, split in self.load().items()}
        self.device = device
        return self

    def with_noise(self, noise: LabelNoise, seed: int, epoch: int) -> Benchmark:
        """The same benchmark with noisy training labels of one task; nothing else is copied.

        Raises:
            ValueError: no such task, with the nearest names, or a task without classes.
        """
        k = self.noisy_task(noise)
        split, slot = self._place(k)
        data = self.data[split]
        n_classes = self.tasks[k].n_classes
        assert n_classes is not None
        targets = list(data.targets)
        targets[slot] = noise.apply(targets[slot], n_classes, seed, epoch)
        noisy = copy.copy(self)
        noisy.data = {**self.data, split: Data(data.inputs, tuple(targets))}
        return noisy

    def noisy_task(self, noise: LabelNoise) -> int:
        """Index of the task whose labels the noise is for.

        Raises:
            ValueError: no such task, with the nearest names, or a task without classes.
        """
        tasks = [task.name for task in self.tasks]
        if noise.task not in tasks:
            near = names.nearest(noise.task, tasks, "tasks")
            raise ValueError(f"{self.name} has no task {noise.task!r}; {near}")
        k = tasks.index(noise.task)
        if self.tasks[k].n_classes is None:
            raise ValueError(
                f"expected a classification task for label noise, got {noise.task} of {self.name}"
            )
        return k

    def _place(self, k: int) -> tuple[str, int]:
        """Split and position of task k's training targets."""
        return "train", k

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each split."""
        if not self._checksums:  # of the data as prepared; a sweep asks for them after every run
            self._checksums = {name: split.checksum() for name, split in self.data.items()}
        return self._checksums

    def model(self, seed: int, single_task: bool = False) -> nn.Module:
        """The network, or K separate ones for the single-task baseline."""
        return (Separate(self.build, len(self.tasks)) if single_task else self.build()).to(
            self.device
        )

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Any]:
        """Training batches of one epoch."""
        return self.data["train"].batches(protocol.batch_size, generator)

    def losses(
        self, model: nn.Module, batch: Any, tasks: Sequence[int] | None = None
    ) -> tuple[Losses, Tensor | None]:
        """Losses of the given tasks (default all), and the shared representation or None."""
        inputs, targets = batch
        chosen = range(len(self.tasks)) if tasks is None else tasks
        if isinstance(model, HardSharing):
            features = model.features(inputs)
            outputs = model.outputs(features, chosen)
        else:
            features, every = None, model(inputs)
            outputs = [every[k] for k in chosen]
        losses = [
            self.tasks[k].loss(out, targets[k]) for k, out in zip(chosen, outputs, strict=True)
        ]
        return losses, features

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, dict[str, float]]:
        """Scores of a split: task -> metric -> value; the model is left in training mode."""
        model.eval()
        totals: dict[tuple[int, int], Tensor] = {}
        for inputs, targets in self.data[split].batches(1024):
            for k, output in enumerate(model(inputs)):
                for m, metric in enumerate(self.tasks[k].metrics):
                    part = metric.statistics(output, targets[k])
                    totals[k, m] = totals[k, m] + part if (k, m) in totals else part
        model.train()
        return {
            task.name: {
                metric.name: metric.finish(totals[k, m].cpu())
                for m, metric in enumerate(task.metrics)
            }
            for k, task in enumerate(self.tasks)
        }

    def probe(self) -> Any:
        """A fixed batch on which gradient conflict is measured during training."""
        return next(iter(self.data["val"].batches(256)))

    @property
    def higher_is_better(self) -> dict[str, dict[str, bool]]:
        """Task -> metric -> whether higher is better."""
        return {t.name: {m.name: m.higher_is_better for m in t.metrics} for t in self.tasks}
