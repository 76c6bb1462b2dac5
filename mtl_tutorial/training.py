"""The one training loop: batch, task losses, `method.step`, evaluation, checkpoint, result file.

A run is a `Cell`. `train` runs one cell from its checkpoint, if there is one, to its result;
`sweep` runs a grid of cells, skips those that are done, and lets several processes share a folder.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import inspect
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn

from . import (
    __version__,
    benchmarks,
    checkpoints,
    cuda_graph,
    diagnostics,
    methods,
    metrics,
    results,
    savings,
)
from .benchmarks import Benchmark, Protocol
from .gradients import Info, Method, gram_matrix, task_gradients
from .models import count_parameters
from .noise import LabelNoise

LEVELS = ("parameter", "feature")
# Beyond, a result file keeps every task's numbers of the first and last epoch alone.
MANY_TASKS = 16
CHECKPOINT_SECONDS = 60.0  # at most so much work is done twice after a kill


# ------------------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Spec:
    """A method with its settings, as written on the command line.

    Attributes:
        name: method name, or "single_task".
        settings: keyword arguments of the method.
        level: "parameter" or "feature", what gradient balancing looks at.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    level: str = "parameter"

    @property
    def label(self) -> str:
        """The text that `parse_spec` reads back."""
        parts = [f"{k}={v}" for k, v in sorted(self.settings.items())]
        parts += [f"level={self.level}"] if self.level != "parameter" else []
        return ":".join([self.name, *parts])

    def make(self, seed: int | None = None) -> Method:
        """The method; for the single-task baseline, the sum of losses that share nothing.

        Args:
            seed: of a random rule whose settings name none, so that runs differ in its draws too.
        """
        if self.name == results.BASELINE:
            return methods.create("equal", reduction="sum")
        drawn = {}
        if seed is not None and self.name in methods.CLASSES:
            random = "seed" in inspect.signature(methods.CLASSES[self.name]).parameters
            drawn = {"seed": seed} if random else {}
        return methods.create(self.name, **{**drawn, **self.settings})


def parse_spec(text: str) -> Spec:
    """Read ``name`` or ``name:setting=value:setting=value``, checking name and settings.

    Raises:
        ValueError: unknown method, setting or level, or a setting without a value.
    """
    name, *pairs = text.strip().split(":")
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"expected setting=value after {name!r}, got {pair!r}")
        if key in settings:
            raise ValueError(f"expected each setting of {name!r} once, got {key!r} twice")
        settings[key] = _literal(value)
    level = settings.pop("level", "parameter")
    if level not in LEVELS:
        raise ValueError(f"expected level {' or '.join(LEVELS)}, got {level!r}")
    spec = Spec(name, settings, level)
    if name == results.BASELINE and (settings or level != "parameter"):
        raise ValueError(f"expected no settings for {name}, got {pairs}")
    try:
        spec.make()
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        # A value of the wrong kind fails where it is first used, with any of these.
        if name not in methods.CLASSES:
            raise ValueError(f"{error}; also {results.BASELINE} and all") from None
        raise ValueError(
            f"expected settings that {name} takes, got {':'.join(pairs)}: {error}"
        ) from None
    return spec


def _literal(value: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's parser, about texts that are no numbers
            return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


def parse_specs(text: str) -> list[Spec]:
    """Read a comma-separated list of methods; ``all`` stands for every method and the baseline."""
    names: list[str] = []
    for part in _split_commas(text):
        names += [results.BASELINE, *methods.available()] if part == "all" else [part]
    specs = {spec.label: spec for spec in map(parse_spec, names)}
    if not specs:
        raise ValueError("expected at least one method, got none")
    return list(specs.values())


def fitting(specs: Sequence[Spec], n_tasks: int, text: str) -> tuple[list[Spec], list[str]]:
    """Methods that fit a number of tasks, and a sentence for each that ``all`` leaves out.

    Raises:
        ValueError: a method that was asked for by name needs another number of tasks.
    """
    kept, left_out = [], []
    asked = {part.partition(":")[0] for part in _split_commas(text)}
    for spec in specs:
        need = None if spec.name == results.BASELINE else methods.CLASSES[spec.name].n_tasks
        if need in (None, n_tasks):
            kept.append(spec)
            continue
        why = f"{spec.name} needs {need} tasks, this benchmark has {n_tasks}"
        if spec.name in asked:
            raise ValueError(f"{why}; leave it out")
        left_out.append(f"left out: {why}")
    return kept, left_out


def _split_commas(text: str) -> list[str]:
    """Split at commas outside brackets, so that a setting's value may be a list."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class Cell:
    """One run: a method on a benchmark under a protocol with a seed.

    `lr` is the learning rate of this run where it is not the protocol's.
    """

    benchmark: str
    budget: str
    protocol: Protocol
    spec: Spec
    seed: int
    noise: LabelNoise | None = None
    lr: float | None = None

    @property
    def rate(self) -> float:
        """Learning rate of this run."""
        return self.protocol.lr if self.lr is None else self.lr

    def path(self, root: Path) -> Path:
        """The result file below an output folder."""
        run: dict[str, Any] = {
            "method": self.spec.name,
            "settings": self.spec.settings,
            "level": self.spec.level,
        }
        group = self.budget
        if self.noise is not None:
            run["noise"] = self.noise.label
            group += f"-noise-{self.noise.label}"
        if self.rate != self.protocol.lr:
            run["lr"] = self.rate
        protocol = self.protocol.describe()
        key = results.identity(self.benchmark, self.budget, protocol, run)
        return results.result_path(root, self.benchmark, group, self.spec.label, self.seed, key)


# ------------------------------------------------------------------------------- one run

Progress = Callable[[int, int], None]  # epochs done, epochs in all


class Run:
    """The state of one run between two steps; everything that a checkpoint holds."""

    def __init__(self, cell: Cell, benchmark: Benchmark) -> None:
        self.cell = cell
        self.benchmark = benchmark
        single = cell.spec.name == results.BASELINE
        torch.manual_seed(cell.seed)
        forget_peak_memory(benchmark.device)
        self.model = benchmark.model(cell.seed, single)
        if cell.protocol.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.method = cell.spec.make(cell.seed)
        self.method.group = None  # a cell is one process's, also where ranks share a sweep
        self.shared: list[nn.Parameter] = self.model.shared_parameters()  # type: ignore[operator]
        self.heads: list[list[nn.Parameter]] = self.model.head_parameters()  # type: ignore[operator]
        self.optimizer = cell.protocol.make_optimizer(list(self.model.parameters()))
        self.scaler = savings.make_scaler(cell.protocol.precision, benchmark.device)
        self.order = torch.Generator().manual_seed(cell.seed)
        self.epoch = 0
        self.batch = 0  # of this epoch, batches trained on
        self.drawn = self.order.get_state()  # when this epoch began
        self.means = {"train_losses": Mean(), "weights": Mean()}  # over this epoch's batches
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.reported: list[metrics.Scores] = []  # test scores, after the epochs that count
        self.best: float | None = None  # validation score of the epoch that counts

    def epoch_of_training(
        self, save: Callable[[], None] | None = None, every: float = math.inf
    ) -> None:
        """Train the epoch to its end, evaluate on validation data, append to the history.

        After an epoch that the protocol reports, test data are evaluated as well.

        Args:
            save: called between two batches to keep `state_dict`.
            every: seconds between two such calls.
        """
        start = saved = time.perf_counter()
        step = cuda_graph.GraphedStep(self) if self.cell.protocol.cuda_graph else self.step
        for batch in self.batches_left():
            self.count(step(batch))
            if save is not None and time.perf_counter() - saved >= every:
                self.seconds += time.perf_counter() - start
                save()
                start = saved = time.perf_counter()
        means = self.end_steps()
        self.seconds += time.perf_counter() - start
        self.end_epoch(means)

    @property
    def lr(self) -> float:
        """Learning rate of this epoch."""
        return self.cell.rate * self.cell.protocol.lr_factor(self.epoch)

    def batches_left(self) -> Iterator[Any]:
        """Get ready for this epoch's steps; its batches, without those trained on already."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.model.train()
        source, noise = self.benchmark, self.cell.noise
        if noise is not None:
            source = source.with_noise(noise, self.cell.seed, self.epoch)
        rng = torch.get_rng_state()
        batches = source.batches(self.cell.protocol, self.order)
        for _ in range(self.batch):  # drawn again, so that the others are what they were
            next(batches)
        torch.set_rng_state(rng)
        return batches

    def count(self, info: Info) -> None:
        """Take a step that was done into the epoch's means."""
        self.means["train_losses"].add(info.losses)
        self.means["weights"].add(info.weights)
        self.batch += 1

    def end_steps(self) -> dict[str, list[float] | None]:
        """Tell the method that the epoch's steps are done; their means, once the device is."""
        self.method.next_epoch()
        return {name: mean.value() for name, mean in self.means.items()}

    def end_epoch(self, means: dict[str, list[float] | None]) -> None:
        """Evaluate, append to the history, and get ready for the next epoch."""
        protocol = self.cell.protocol
        self.epoch += 1
        self.batch, self.drawn = 0, self.order.get_state()
        self.means = {name: Mean() for name in self.means}
        self.history.append(
            {
                "epoch": self.epoch,
                "seconds": self.seconds,
                **means,
                **self.probe(),
                "val": self.benchmark.evaluate(self.model, "val", protocol.examples),
            }
        )
        if protocol.report == "best":
            score = metrics.mean_score(self.history[-1]["val"], self.benchmark.higher_is_better)
            if self.best is None or score > self.best:
                self.best = score
                self.reported = [self.benchmark.evaluate(self.model, "test")]
        elif self.epoch > protocol.epochs - protocol.average:
            self.reported.append(self.benchmark.evaluate(self.model, "test"))

    def step(self, batch: Any) -> Info:
        """One step of the method on one batch."""
        protocol, device = self.cell.protocol, self.benchmark.device
        feature = self.cell.spec.level == "feature"

        def of_piece(piece: Any, tasks: Sequence[int] | None) -> Any:
            with savings.autocast(protocol.precision, device):
                return self.benchmark.losses(self.model, piece, tasks)

        def of_tasks(tasks: Sequence[int] | None) -> Any:
            if protocol.accumulate > 1:
                if feature:
                    raise ValueError(
                        "expected accumulate=1 with level=feature, since pieces of a batch have "
                        f"no common representation, got {protocol.accumulate}; leave level out"
                    )
                return savings.losses_in_pieces(
                    lambda piece: of_piece(piece, tasks)[0],
                    batch,
                    protocol.accumulate,
                    list(self.model.parameters()),
                    self.scaler,
                )
            losses, features = of_piece(batch, tasks)
            if feature and features is None:
                raise ValueError(
                    f"expected a benchmark with a shared representation for level=feature, got "
                    f"{self.cell.benchmark}; leave level out"
                )
            return (losses, features) if feature else losses

        # A schedule is told which tasks to compute; every other method wants all of them.
        told = self.method.family == "schedule"
        closure = of_tasks if told else (lambda: of_tasks(None))
        # The single-task baseline shares nothing: then there is nothing to tell the method.
        if not self.shared:
            return self.method.step(closure, self.optimizer, scaler=self.scaler)
        return self.method.step(
            closure, self.optimizer, shared=self.shared, heads=self.heads, scaler=self.scaler
        )

    def probe(self) -> dict[str, Any]:
        """Conflict of the task gradients on a fixed batch, whatever the method looks at."""
        if not self.shared:
            return {}
        rng = torch.get_rng_state()
        self.model.eval()
        losses, _ = self.benchmark.losses(self.model, self.benchmark.probe())
        with torch.no_grad():
            gram = gram_matrix(task_gradients(losses, self.shared))
            cosine = diagnostics.cosine_matrix(gram)
        self.model.train()
        torch.set_rng_state(rng)
        above = torch.triu_indices(len(gram), len(gram), 1)
        pairs = cosine[above[0], above[1]]
        return {
            "cosine": float(pairs.mean()) if len(pairs) else None,
            "conflict_share": float(diagnostics.conflict_share(gram)),
            "norms": gram.diagonal().clamp(min=0).sqrt().tolist(),
            "condition_number": float(diagnostics.condition_number(gram)),
        }

    # Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "order": self.drawn,
            "batch": self.batch,
            "means": {name: [mean.total, mean.count] for name, mean in self.means.items()},
            "rng": torch.get_rng_state(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
            "reported": self.reported,
            "best": self.best,
        }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self.benchmark.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.benchmark.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.drawn = state["order"]
        self.order.set_state(self.drawn)
        self.batch = state["batch"]
        for name, (total, count) in state["means"].items():
            self.means[name].total, self.means[name].count = total, count
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and self.benchmark.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.benchmark.device)
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.history = state["history"]
        self.reported, self.best = state.get("reported", []), state.get("best")
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])


class Mean:
    """Running mean of tensors, summed on their device and read once."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor | None) -> None:
        if value is not None:
            value = value.detach().double()
            self.total = value if self.total is None else self.total + value
            self.count += 1

    def value(self) -> list[float] | None:
        return None if self.total is None else (self.total / self.count).tolist()


def train(
    cell: Cell,
    benchmark: Benchmark,
    root: Path,
    progress: Progress | None = None,
    every: float = CHECKPOINT_SECONDS,
) -> dict[str, Any]:
    """Run one cell to its end and write its result file.

    Goes on from the cell's checkpoint where there is one, or from the one before where the newest
    is unusable, and says so. A non-finite loss or gradient, or too little memory, ends the run: the
    result says so, and a later sweep tries again; after a lack of memory from the last checkpoint.

    Args:
        cell: what to run.
        benchmark: prepared under the cell's protocol, its data on the device.
        root: output folder.
        progress: called after every epoch.
        every: seconds between checkpoints within an epoch; there is one after each epoch anyway.

    Returns:
        The result, as written.

    Raises:
        OSError: a checkpoint or the result cannot be written.
        MemoryError: not even the network fits into memory.
    """
    path = cell.path(root)
    checkpoint = checkpoints.files(path)[0]
    try:
        run = resumed(cell, benchmark, path)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(results.one_line(error)) from None

    def save() -> None:
        checkpoints.write(checkpoint, run.state_dict())

    failed, keep = None, False
    try:
        while run.epoch < cell.protocol.epochs:
            run.epoch_of_training(save, every)
            if run.epoch < cell.protocol.epochs:
                save()
            if progress is not None:
                progress(run.epoch, cell.protocol.epochs)
    except FloatingPointError as error:
        failed = f"epoch {run.epoch + 1}: {results.one_line(error)}"
    except Exception as error:
        if not out_of_memory(error):
            raise
        failed, keep = f"epoch {run.epoch + 1}: out of memory: {results.one_line(error)}", True
    result = describe(run, failed)
    results.write_result(path, result)
    if not keep:
        checkpoints.remove(path)
    return result


def resumed(cell: Cell, benchmark: Benchmark, path: Path) -> Run:
    """The run as its last usable checkpoint beside a result file has it; else a new one."""
    files = [file for file in checkpoints.files(path) if file.exists()]
    for file in files:
        run = Run(cell, benchmark)
        try:
            run.load_state_dict(checkpoints.read(file, benchmark.device))
        except Exception as error:  # of another version, or made up: nothing of it is used
            if out_of_memory(error):
                raise
            then = "starting this run anew" if file == files[-1] else "trying the one before it"
            _tell(f"checkpoint {file} unreadable ({results.one_line(error)}); {then}")
            continue
        return run
    return Run(cell, benchmark)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the host or the device has too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _tell(message: str) -> None:
    """Say something on standard error, which keeps standard output for results."""
    print(message, file=sys.stderr)


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A history that stays small with many tasks: in between, means in place of K numbers."""
    if not history or len(history[0]["val"]) <= MANY_TASKS:
        return history
    between = []
    for entry in history[1:-1]:
        scores = list(entry["val"].values())
        mean = {m: float(np.mean([score[m] for score in scores])) for m in scores[0]}
        kept = {k: v for k, v in entry.items() if k not in ("train_losses", "weights", "norms")}
        between.append({**kept, "val": {f"mean of {len(scores)} tasks": mean}})
    return [history[0], *between, *history[1:][-1:]]


def describe(run: Run, failed: str | None = None) -> dict[str, Any]:
    """The result of a run, as plain data."""
    cell, bench = run.cell, run.benchmark
    return {
        "format": results.FORMAT,
        "benchmark": cell.benchmark,
        "synthetic": bench.synthetic,
        "baseline": bench.baseline,
        "budget": cell.budget,
        "protocol": cell.protocol.describe(),
        "lr": cell.rate,
        "label": cell.spec.label,
        "method": cell.spec.name,
        "settings": run.method.settings,
        "level": cell.spec.level,
        "seed": cell.seed,
        "noise": None if cell.noise is None else cell.noise.label,
        "remark": bench.remark,
        "metrics": bench.higher_is_better,
        "finished": failed is None,
        "failed": failed,
        "test": None if failed else metrics.mean_scores(run.reported, bench.higher_is_better),
        "history": thinned(run.history),
        "parameters": {
            "shared": count_parameters(run.shared),
            "total": count_parameters(run.model.parameters()),
        },
        "seconds": run.seconds,
        "seconds_per_epoch": run.seconds / max(run.epoch, 1),
        "peak_memory_mb": peak_memory(bench.device),
        "device": describe_device(bench.device),
        "versions": versions(),
        "data": bench.checksums(),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# ------------------------------------------------------------------------------- many runs


@dataclass
class Outcome:
    """What happened to one cell of a sweep: "done", "kept", "failed" or "elsewhere"."""

    cell: Cell
    status: str
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class Grid:
    """Methods times seeds, each method with a learning rate of its own where rates are tried.

    Every rate of the protocol is tried with seed 0; the one with the best validation scores
    (`results.best_rate`) trains the other seeds. With label noise nothing is tried where the same
    trials without it are done: a method keeps the rate that it has on clean labels.
    """

    benchmark: str
    budget: str
    protocol: Protocol
    specs: Sequence[Spec]
    seeds: int
    noise: LabelNoise | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates tried for every method."""
        return self.protocol.rates or (self.protocol.lr,)

    def __len__(self) -> int:
        return len(self.specs) * (len(self.rates) + self.seeds - 1)

    def cell(self, spec: Spec, seed: int, lr: float) -> Cell:
        """One run of the grid."""
        return Cell(self.benchmark, self.budget, self.protocol, spec, seed, self.noise, lr)

    def trials(self, spec: Spec, root: Path) -> list[Cell]:
        """The runs with seed 0, one for each rate."""
        if self.noise is not None:
            clean = replace(self, noise=None)
            if all(finished(cell.path(root)) for cell in clean.trials(spec, root)):
                return [self.cell(spec, 0, clean.choose(spec, root))]
        return [self.cell(spec, 0, lr) for lr in self.rates]

    def cells(self, root: Path) -> Iterator[Cell]:
        """All runs, in the order to take them; the later seeds wait for results of the first."""
        for spec in self.specs:
            yield from self.trials(spec, root)
        if self.seeds == 1:
            return
        chosen: dict[str, float] = {}
        for spec in self.specs:
            yield from self.died(spec, root)
            chosen[spec.label] = self.choose(spec, root)
            yield self.cell(spec, 1, chosen[spec.label])
        for seed in range(2, self.seeds):
            for spec in self.specs:
                yield self.cell(spec, seed, chosen[spec.label])

    def died(self, spec: Spec, root: Path) -> Iterator[Cell]:
        """Wait for trials that other processes run; those whose process died without a result."""
        for cell in self.trials(spec, root):
            if finished(cell.path(root)) is None:
                with claim(cell, root, patient=True):  # until nobody else is running it
                    died = not cell.path(root).exists()
                if died:
                    yield cell

    def choose(self, spec: Spec, root: Path) -> float:
        """The learning rate of a method's later seeds, from the results that are there."""
        trials = self.trials(spec, root)
        if len(trials) == 1:
            return trials[0].rate
        found = [finished(cell.path(root)) for cell in trials]
        best = results.best_rate([result for result in found if result is not None])
        return self.protocol.lr if best is None else best


def lock_path(cell: Cell, root: Path) -> Path:
    """The lock file that says who is running a cell."""
    path = cell.path(root)
    lock = root / ".locks" / f"{path.parent.name}-{path.stem}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return lock


@contextlib.contextmanager
def claim(cell: Cell, root: Path, patient: bool = False) -> Iterator[None]:
    """Hold a cell: a lock on a file, which the system releases when this process dies.

    Args:
        cell: what nobody else shall run.
        root: output folder.
        patient: wait for whoever holds it.

    Raises:
        Timeout: another process holds it.
        OSError: the folder cannot be written to, or its file system knows no locks.
    """
    try:
        lock = FileLock(lock_path(cell, root), timeout=-1 if patient else 0)
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(
            f"expected to claim a run in {root}, got: {why}; choose another folder for --out"
        ) from error
    try:
        yield
    finally:
        lock.release()


Prepared = dict[tuple[str, Protocol], Benchmark]


def prepare(cell: Cell, device: torch.device, prepared: Prepared) -> Benchmark:
    """The cell's benchmark with its data on the device; loaded once for many cells."""
    which = (cell.benchmark, cell.protocol)
    if which not in prepared:
        bench = benchmarks.create(cell.benchmark).under(cell.protocol)
        prepared[which] = bench.prepare(device)
    return prepared[which]


def sweep(
    cells: Iterable[Cell],
    root: Path,
    device: torch.device,
    progress: Callable[[Cell, int, int], None] | None = None,
    patient: bool = False,
    every: float = CHECKPOINT_SECONDS,
    ready: Prepared | None = None,
) -> Iterator[Outcome]:
    """Run the cells that are not done, one after the other.

    A finished result is kept. A cell that another process is running is left to it (`claim`). A run
    that lacks memory or meets a loss that is not finite has failed; the next one follows.

    Args:
        cells: what to run.
        root: output folder.
        device: where to train.
        progress: called with the cell and its epochs done and in all.
        patient: at the end, wait for the cells of other processes, and run those whose process has
            died.
        every: see `train`.
        ready: benchmarks that are prepared already; others are added.

    Yields:
        An outcome per cell, in order; with `patient`, those of other processes come last.
    """
    prepared: Prepared = {} if ready is None else ready

    def attempt(cell: Cell, wait: bool) -> Outcome:
        path = cell.path(root)
        done = finished(path)
        if done is not None:
            with contextlib.suppress(OSError):  # left by a process that died as it ended
                checkpoints.remove(path)
            return Outcome(cell, "kept", done)
        with claim(cell, root, wait):
            done = finished(path)  # by whoever held the cell until now
            if done is not None:
                return Outcome(cell, "kept", done)
            set_broken_aside(path)
            bench = prepare(cell, device, prepared)
            report = None if progress is None else _bind(progress, cell)
            result = train(cell, bench, root, report, every)
            return Outcome(cell, "failed" if result["failed"] else "done", result)

    def ended(cell: Cell, wait: bool) -> Outcome:
        try:
            return attempt(cell, wait)
        except Timeout:
            return Outcome(cell, "elsewhere")
        except Exception as error:
            if not out_of_memory(error):
                raise
            return Outcome(cell, "failed", {"failed": f"out of memory: {results.one_line(error)}"})

    left = []
    for cell in cells:
        outcome = ended(cell, wait=False)
        if patient and outcome.status == "elsewhere":
            left.append(cell)
        else:
            yield outcome
    for cell in left:
        yield ended(cell, wait=True)


def _bind(progress: Callable[[Cell, int, int], None], cell: Cell) -> Progress:
    return lambda done, total: progress(cell, done, total)


def finished(path: Path) -> dict[str, Any] | None:
    """The result at a path if it is there, complete and finished."""
    try:
        result = results.read_result(path)
    except (ValueError, FileNotFoundError):
        return None
    return result if result["finished"] else None


def set_broken_aside(path: Path) -> None:
    """Rename a result file that is none, so that the run can be done again; nothing is deleted."""
    try:
        results.read_result(path)
    except FileNotFoundError:
        return
    except ValueError as error:
        aside, n = path.with_suffix(".broken"), 1
        while aside.exists():
            n += 1
            aside = path.with_suffix(f".broken{n}")
        path.replace(aside)
        _tell(f"{error}; it was moved to {aside.name}, and the run counts as not done")


# ------------------------------------------------------------------------------- provenance


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, kind and thread count of a device."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU {_cpu_name()}"
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of the package and of what its numbers depend on."""
    return {
        "mtl_tutorial": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def git_commit() -> str | None:
    """Commit of the source tree, with "+" behind it if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        # Installed into a folder below somebody's own checkout, the package is no part of that.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def peak_memory(device: torch.device) -> float | None:
    """Peak memory in MB since `forget_peak_memory`; None where the system does not tell.

    On CUDA that of torch's allocator, on the CPU that of the whole process: libraries, data and
    all, about 400 MB before anything is trained.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return None


def forget_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def pick_device(name: str) -> torch.device:
    """The device "auto" (CUDA if there is one), "cpu" or "cuda".

    Of several processes that torchrun started, each gets the GPU of its number on the machine.

    Raises:
        ValueError: unknown name, or "cuda" where torch finds none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"expected device auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a CUDA device for --device cuda, found none; use --device cpu, or install a "
            "torch build that matches the driver"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return torch.device(name)


def launched() -> tuple[int, int]:
    """Number of this process and how many torchrun started; 0 and 1 without it.

    They share a grid and train alone: `torch.distributed` stays uninitialised.
    """
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
