"""The one training loop: batch, task losses, `method.step`, evaluation, checkpoint, result file.

A run is a `Cell`. `train` runs one cell from its checkpoint, if there is one, to its result;
`sweep` runs a grid of cells, skips those that are done, and lets several processes share a folder.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import inspect
import io
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn

from . import __version__, benchmarks, diagnostics, methods, results
from .benchmarks import Benchmark, Protocol
from .gradients import Method, gram_matrix, task_gradients
from .models import count_parameters
from .noise import LabelNoise

LEVELS = ("parameter", "feature")


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
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
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
    """The state of one run between epochs; everything that a checkpoint holds."""

    def __init__(self, cell: Cell, benchmark: Benchmark) -> None:
        self.cell = cell
        self.benchmark = benchmark
        single = cell.spec.name == results.BASELINE
        torch.manual_seed(cell.seed)
        forget_peak_memory(benchmark.device)
        self.model = benchmark.model(cell.seed, single)
        self.method = cell.spec.make(cell.seed)
        self.shared: list[nn.Parameter] = self.model.shared_parameters()  # type: ignore[operator]
        self.heads: list[list[nn.Parameter]] = self.model.head_parameters()  # type: ignore[operator]
        self.optimizer = cell.protocol.make_optimizer(list(self.model.parameters()))
        self.order = torch.Generator().manual_seed(cell.seed)
        self.epoch = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []

    def epoch_of_training(self) -> None:
        """Train one epoch, evaluate on validation data, append to the history."""
        protocol = self.cell.protocol
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.rate * protocol.lr_factor(self.epoch)
        start = time.perf_counter()
        losses, weights = Mean(), Mean()
        self.model.train()
        source, noise = self.benchmark, self.cell.noise
        if noise is not None:
            source = source.with_noise(noise, self.cell.seed, self.epoch)
        for batch in source.batches(protocol, self.order):
            info = self.step(batch)
            losses.add(info.losses)
            weights.add(info.weights)
        self.method.next_epoch()
        train_losses, mean_weights = losses.value(), weights.value()  # waits for the device
        self.seconds += time.perf_counter() - start
        self.epoch += 1
        self.history.append(
            {
                "epoch": self.epoch,
                "seconds": self.seconds,
                "train_losses": train_losses,
                "weights": mean_weights,
                **self.probe(),
                "val": self.benchmark.evaluate(self.model, "val", protocol.examples),
            }
        )

    def step(self, batch: Any) -> Any:
        """One step of the method on one batch."""
        feature = self.cell.spec.level == "feature"

        def of_tasks(tasks: Sequence[int] | None) -> Any:
            losses, features = self.benchmark.losses(self.model, batch, tasks)
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
            return self.method.step(closure, self.optimizer)
        return self.method.step(closure, self.optimizer, shared=self.shared, heads=self.heads)

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
        """Everything that the next epoch depends on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
        }
        if torch.cuda.is_available():
            state["rng_cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        if "rng_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.history = state["history"]


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
) -> dict[str, Any]:
    """Run one cell to its end and write its result file.

    Goes on from the cell's checkpoint where there is one; a checkpoint that cannot be read is
    thrown away and the run starts anew. A non-finite loss or gradient ends the run: the result
    says so, and a later sweep tries again.

    Args:
        cell: what to run.
        benchmark: prepared, its data on the device.
        root: output folder.
        progress: called after every epoch.

    Returns:
        The result, as written.
    """
    path = cell.path(root)
    checkpoint = path.with_suffix(".ckpt")
    run = Run(cell, benchmark)
    if checkpoint.exists():
        try:
            run.load_state_dict(torch.load(checkpoint, weights_only=True))
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            _tell(f"checkpoint {checkpoint} unreadable ({why}); starting this run anew")
            run = Run(cell, benchmark)
    failed = None
    try:
        while run.epoch < cell.protocol.epochs:
            run.epoch_of_training()
            if run.epoch < cell.protocol.epochs:
                buffer = io.BytesIO()
                torch.save(run.state_dict(), buffer)
                results.write_atomically(checkpoint, buffer.getvalue())
            if progress is not None:
                progress(run.epoch, cell.protocol.epochs)
    except FloatingPointError as error:
        failed = f"epoch {run.epoch + 1}: {error}"
    result = describe(run, failed)
    results.write_result(path, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _tell(message: str) -> None:
    """Say something on standard error, which keeps standard output for results."""
    print(message, file=sys.stderr)


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
        "test": None if failed else bench.evaluate(run.model, "test"),
        "history": run.history,
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
            for cell in self.trials(spec, root):
                with FileLock(lock_path(cell, root)):  # until nobody else is running it
                    pass
                if not cell.path(root).exists():  # who ran it has died
                    yield cell
            chosen[spec.label] = self.choose(spec, root)
            yield self.cell(spec, 1, chosen[spec.label])
        for seed in range(2, self.seeds):
            for spec in self.specs:
                yield self.cell(spec, seed, chosen[spec.label])

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


def sweep(
    cells: Iterable[Cell],
    root: Path,
    device: torch.device,
    progress: Callable[[Cell, int, int], None] | None = None,
) -> Iterator[Outcome]:
    """Run the cells that are not done, one after the other.

    A finished result is kept. A cell that another process is running is skipped: each cell is
    claimed by a file lock, which the system releases when its process dies.

    Args:
        cells: what to run.
        root: output folder.
        device: where to train.
        progress: called with the cell and its epochs done and in all.

    Yields:
        An outcome per cell, in order.
    """
    prepared: dict[str, Benchmark] = {}
    for cell in cells:
        path = cell.path(root)
        try:
            with FileLock(lock_path(cell, root), timeout=0):
                done = finished(path)
                if done is not None:
                    yield Outcome(cell, "kept", done)
                    continue
                if cell.benchmark not in prepared:
                    bench = benchmarks.create(cell.benchmark)
                    prepared[cell.benchmark] = bench.prepare(device)
                report = None if progress is None else _bind(progress, cell)
                result = train(cell, prepared[cell.benchmark], root, report)
                yield Outcome(cell, "failed" if result["failed"] else "done", result)
        except Timeout:
            yield Outcome(cell, "elsewhere")


def _bind(progress: Callable[[Cell, int, int], None], cell: Cell) -> Progress:
    return lambda done, total: progress(cell, done, total)


def finished(path: Path) -> dict[str, Any] | None:
    """The result at a path if it is there, complete and finished; a broken file is moved aside."""
    if not path.exists():
        return None
    try:
        result = results.read_result(path)
    except ValueError as error:
        aside = path.with_suffix(".broken")
        path.replace(aside)
        _tell(f"{error}; it was moved to {aside.name}, and the run counts as not done")
        return None
    return result if result["finished"] else None


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
    return torch.device(name)
