"""What a benchmark is: tasks, data, a model and a protocol. It knows no method.

Small data sets live on the device as tensors and are shuffled and cut into batches there, without
worker processes.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .. import names
from ..metrics import Metric
from ..models import HardSharing, Separate
from ..noise import Draw, LabelNoise, uniform_labels


@dataclass(frozen=True)
class Task:
    """One task: its loss (mean over the batch, 0-dimensional) and what is measured of it.

    `n_classes` is known for classification tasks, whose labels can be made noisy; other tasks say
    with `draw` what noisy targets are, if they can have any.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[Metric, ...]
    n_classes: int | None = None
    draw: Draw | None = None


_FIRST_FIELDS = 8  # of a protocol, which every result file has
_CHOICES = {
    "optimizer": ("adam", "sgd"),
    "schedule": ("constant", "cosine", "poly", "step"),
    "report": ("last", "best"),
    "delta_m": ("metrics", "tasks", "first"),
    "evaluation": ("", "papers"),
    "precision": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Protocol:
    """How long and with what a run trains; one per budget.

    Attributes:
        epochs: passes over the training set.
        batch_size: examples per step.
        lr: learning rate of the optimiser.
        optimizer: "adam" (betas 0.9, 0.999) or "sgd" (momentum 0.9).
        weight_decay: of the optimiser.
        schedule: "constant"; "cosine" to zero over all epochs; "poly", (1 - epoch / epochs) ** 0.9;
            or "step", times `decay` from each of the epochs `steps` on, counted from 0.
        report: which test scores a run reports: those after the "last" epoch, or after the "best"
            one, by the mean over the tasks of each task's first metric on validation data.
        note: what a reader of the table should know.
        rates: learning rates tried for every method, `lr` among them; none: `lr` for all.
        examples: training examples used, the first ones of each stream, and as many at most for
            validation; 0 for all.
        steps, decay: of the schedule "step".
        average: with "last", the mean of the test scores after this many last epochs.
        delta_m: what Delta m averages: all "metrics" alike; "tasks", each the mean over its own; or
            the "first" metric of each task.
        network, single_network: names of the network and of the single-task baseline's, for a
            benchmark that has several; empty for its only one, and for the same.
        size: height and width of the images, for a benchmark that has several sizes.
        augment: whether training images are changed at random, as the benchmark says.
        evaluation: empty for figures over the whole split; "papers" for means over batches of
            `batch_size`, where a benchmark's literature prints those.
        precision: "float32", "bfloat16" or "float16", of the losses' computation in training.
        channels_last: memory layout of the network's convolutions.
        accumulate: pieces that a batch is cut into, so that one fits into memory at a time.
        cuda_graph: whether a step is recorded as a CUDA graph (`mtl_tutorial.cuda_graph`).
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "constant"
    report: str = "last"
    note: str = ""
    rates: tuple[float, ...] = ()
    examples: int = 0
    steps: tuple[int, ...] = ()
    decay: float = 0.5
    average: int = 1
    delta_m: str = "metrics"
    network: str = ""
    single_network: str = ""
    size: tuple[int, int] | None = None
    augment: bool = False
    evaluation: str = ""
    precision: str = "float32"
    channels_last: bool = False
    accumulate: int = 1
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.rates and self.lr not in self.rates:
            raise ValueError(f"expected lr {self.lr} among the rates tried, got {self.rates}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choice = " or ".join(map(repr, known))
                raise ValueError(f"expected {name} {choice}, got {getattr(self, name)!r}")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"expected to accumulate a number of pieces that divides the batch of "
                f"{self.batch_size}, got {self.accumulate}"
            )
        if not 1 <= self.average <= self.epochs or (self.average > 1 and self.report != "last"):
            raise ValueError(
                f"expected an average over 1 to {self.epochs} last epochs, and 1 unless the last "
                f"are reported, got {self.average}"
            )

    def describe(self) -> dict[str, Any]:
        """What a result file keeps: all that a run depends on, so not the other rates.

        A field that came later is left out at its default, so that older files stay valid.
        """
        everything = asdict(self)
        later = {f.name: f.default for f in fields(self)[_FIRST_FIELDS:]}
        return {k: v for k, v in everything.items() if k != "rates" and later.get(k, ...) != v}

    def make_optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Optimiser over the given parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def lr_factor(self, epoch: int) -> float:
        """Factor on the learning rate in the given epoch, counted from 0."""
        if self.schedule == "cosine":
            return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / self.epochs))))
        if self.schedule == "poly":
            return float((1 - epoch / self.epochs) ** 0.9)
        if self.schedule == "step":
            return float(self.decay ** sum(epoch >= step for step in self.steps))
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

    def first(self, n: int) -> Data:
        """The first n examples, or all of them for n = 0; nothing is copied."""
        return Data(self.inputs[:n], tuple(t[:n] for t in self.targets)) if n else self

    def noisy(self, slot: int, noise: LabelNoise, draw: Draw, seed: int, epoch: int) -> Data:
        """The same data with noisy targets of one task; nothing else is copied."""
        targets = list(self.targets)
        targets[slot] = noise.apply(targets[slot], draw, seed, epoch)
        return replace(self, targets=tuple(targets))

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
            # Copies whole rows, several times as fast as `inputs[index]`.
            yield (
                self.inputs.index_select(0, index),
                tuple(t.index_select(0, index) for t in self.targets),
            )


def _full(output: Tensor) -> Tensor:
    """The output in float32 where autocast gave less, so that a loss sums in float32."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


EVALUATION_BATCH = 256  # the activations of a larger one fall out of the cache
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
    eval_batch: ClassVar[int] = EVALUATION_BATCH

    root: Path | str | None = None
    protocol: Protocol | None = None  # of the runs at hand, set by `under`
    remark: str = ""  # what a table must say of the data at hand, set by `load`
    data: Splits = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _checksums: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    # What a benchmark defines ---------------------------------------------------------------

    def load(self) -> Splits:
        """Splits "train", "val", "test" on the CPU; deterministic."""
        raise NotImplementedError

    def build(self) -> nn.Module:
        """A freshly initialised network, from torch's global generator."""
        raise NotImplementedError

    def build_single(self) -> HardSharing:
        """The network whose copies make up the single-task baseline."""
        bench = self
        if self.protocol is not None and self.protocol.single_network:
            bench = self.under(replace(self.protocol, network=self.protocol.single_network))
        network = bench.build()
        if not isinstance(network, HardSharing):
            raise ValueError(
                f"expected a network with one trunk for the single-task baseline, got "
                f"{type(network).__name__}; name one as single_network of the protocol"
            )
        return network

    def paths(self) -> list[Path]:
        """Files or folders without which `load` fails."""
        return []

    # What the training loop uses ------------------------------------------------------------

    def here(self) -> bool:
        """Whether the data are at hand; a cheap look, not a check of their contents."""
        return all(path.exists() for path in self.paths())

    def under(self, protocol: Protocol) -> Self:
        """The same benchmark under a protocol, which may name network and image size."""
        chosen = copy.copy(self)
        chosen.protocol = protocol
        return chosen

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
        task = self.tasks[k]
        draw = task.draw or uniform_labels(task.n_classes or 0)
        noisy = copy.copy(self)
        noisy.data = {**self.data, split: self.data[split].noisy(slot, noise, draw, seed, epoch)}
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
        if self.tasks[k].n_classes is None and self.tasks[k].draw is None:
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
        network = Separate(self.build_single, len(self.tasks)) if single_task else self.build()
        return network.to(self.device)

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Any]:
        """Training batches of one epoch."""
        return self.data["train"].first(protocol.examples).batches(protocol.batch_size, generator)

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
            self.tasks[k].loss(_full(out), targets[k])
            for k, out in zip(chosen, outputs, strict=True)
        ]
        return losses, features

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, examples: int = 0
    ) -> dict[str, dict[str, float]]:
        """Scores of a split: task -> metric -> value; the model is left in training mode.

        Args:
            model: network to measure.
            split: "train", "val" or "test".
            examples: measure the first ones only; 0 for all.
        """
        model.eval()
        totals: dict[tuple[int, int], Tensor] = {}
        for inputs, targets in self.data[split].first(examples).batches(self.eval_batch):
            for k, output in enumerate(model(inputs)):
                for m, metric in enumerate(self.tasks[k].metrics):
                    part = metric.statistics(output, targets[k])
                    totals[k, m] = metric.merge(totals[k, m], part) if (k, m) in totals else part
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
