"""Several seeds of a small benchmark trained side by side in one process, as one stacked model.

A step of a small network costs more in calls than in arithmetic, and does not fill a device. The
parameters of N runs that differ in their seed alone are stacked, ``torch.func.vmap`` computes the
losses of all N models on their own batches at once, and one backward pass serves one task of all
seeds, since no seed's loss depends on another's parameters. One optimiser steps the stack: Adam
and SGD work per coordinate, so that is what N optimisers would do.

What a method does with the losses and gradients of its seed is `Method.backward`, as ever: every
seed has a method object, state and random draws of its own. Initialisation, order of batches,
results and checkpoints are those of runs one by one, up to rounding, and a run that began in one
way may go on in the other.

Left out: methods with a step of their own, the feature level, networks with random layers (dropout)
and training in pieces or in lower precision.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import checkpoints, methods, results, training
from .benchmarks import Benchmark, Protocol
from .gradients import Info, Method
from .savings import Known
from .training import Cell, Grid, Outcome, Run, Spec


def why_alone(spec: Spec) -> str:
    """Why runs of a method are trained one by one; empty where they can go together."""
    if spec.level != "parameter":
        return "the feature level has no stacked form"
    cls = methods.CLASSES.get(spec.name, Method)
    if cls.step is not Method.step or cls.backward is not Method.backward:
        return "the method has a step of its own"
    return ""


def check(protocol: Protocol) -> None:
    """Raise ValueError for a protocol whose runs cannot go together."""
    names = ("precision", "accumulate", "channels_last", "cuda_graph")
    asked = {name: getattr(protocol, name) for name in names}
    if asked != {name: getattr(Protocol, name) for name in names}:
        raise ValueError(
            "expected float32, whole batches, contiguous layout and no CUDA graph for runs that go "
            f"together, got {asked}; leave --together out"
        )


class _Losses(nn.Module):
    """A run's losses as a module, for `functional_call`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model = run.model
        self.benchmark = run.benchmark

    def forward(self, batch: Any) -> tuple[Tensor, ...]:
        return tuple(self.benchmark.losses(self.model, batch)[0])


class Stack:
    """Runs at the same place of the same epoch, as one model and one optimiser.

    Args:
        runs: they differ in their seed alone. What they hold is copied here, and back by
            `give_back`.

    Attributes:
        failed: what ended a run: its number to a sentence. The others go on.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = list(runs)
        self.failed: dict[int, str] = {}
        self._call = _Losses(self.runs[0])
        modules = [_Losses(run) for run in self.runs]
        own = [dict(module.named_parameters()) for module in modules]
        self._own = {name: [parameters[name] for parameters in own] for name in own[0]}
        buffers = [dict(module.named_buffers()) for module in modules]
        self._own_buffers = {name: [found[name] for found in buffers] for name in buffers[0]}
        self._parameters = {
            name: torch.stack([p.detach() for p in each]).requires_grad_(each[0].requires_grad)
            for name, each in self._own.items()
        }
        self._buffers = {name: torch.stack(each) for name, each in self._own_buffers.items()}
        protocol = self.runs[0].cell.protocol
        self._optimizer = protocol.make_optimizer(list(self._parameters.values()))
        for group in self._optimizer.param_groups:
            group["lr"] = self.runs[0].lr
        for name, stacked in self._parameters.items():
            pairs = zip(self.runs, self._own[name], strict=True)
            states = [run.optimizer.state.get(p, {}) for run, p in pairs]
            self._optimizer.state[stacked] = {
                key: value.clone() if key == "step" else torch.stack([s[key] for s in states])
                for key, value in states[0].items()
            }

    def give_back(self) -> None:
        """Copy parameters, buffers and optimiser state to the runs."""
        with torch.no_grad():
            for name, stacked in self._parameters.items():
                state = self._optimizer.state[stacked]
                for n, (run, own) in enumerate(zip(self.runs, self._own[name], strict=True)):
                    own.copy_(stacked[n])
                    run.optimizer.state[own] = {
                        key: value.clone() if key == "step" else value[n].clone()
                        for key, value in state.items()
                    }
            for name, stacked in self._buffers.items():
                for n, buffer in enumerate(self._own_buffers[name]):
                    buffer.copy_(stacked[n])

    def step(self, batches: Sequence[Any]) -> list[Info | None]:
        """One step of every run on its own batch; None for a run that has failed."""
        losses = self._losses(batches)
        self._optimizer.zero_grad(set_to_none=True)
        method = self.runs[0].method
        if method.sees == "losses" and method.head_gradients == "weighted":
            infos = self._step_by_losses(losses)
        else:
            infos = self._step_by_gradients(losses)
        self._optimizer.step()
        return infos

    def _losses(self, batches: Sequence[Any]) -> list[Tensor]:
        """Losses of the K tasks, each (N,)."""
        leaves, form = zip(*map(tree_flatten, batches), strict=True)
        columns = list(zip(*leaves, strict=True))
        stacked = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        dims = tuple(0 if isinstance(x, Tensor) else None for x in stacked)
        state = {**self._parameters, **self._buffers}

        def of_one(state: dict[str, Tensor], *leaves: Any) -> tuple[Tensor, ...]:
            return functional_call(self._call, state, (tree_unflatten(leaves, form[0]),))

        try:
            return list(vmap(of_one, in_dims=(0, *dims))(state, *stacked))
        except RuntimeError as error:
            if training.out_of_memory(error):
                raise
            raise ValueError(
                f"expected a network that torch.func can stack, for --together, got: "
                f"{results.one_line(error)}; leave it out"
            ) from error

    def _ask(self, n: int, losses: Sequence[Tensor], **groups: Any) -> Info | None:
        """The method's backward of run n, unless the run has failed or fails now."""
        run = self.runs[n]
        if n in self.failed:
            return None
        try:
            return run.method.backward(losses, **groups)
        except FloatingPointError as error:
            self.failed[n] = f"epoch {run.epoch + 1}: {results.one_line(error)}"
            return None

    def _step_by_losses(self, losses: list[Tensor]) -> list[Info | None]:
        """Weights of all runs, then one backward pass of the weighted losses."""
        values = torch.stack([loss.detach() for loss in losses], 1)
        factors = torch.zeros_like(values)
        infos = []
        for n in range(len(self.runs)):
            # Such a method looks at values alone: its backward leaves the weights in .grad.
            leaves = [
                value.clone().requires_grad_(loss.requires_grad)
                for value, loss in zip(values[n], losses, strict=True)
            ]
            info = self._ask(n, leaves)
            if info is not None:
                for k, leaf in enumerate(leaves):
                    if leaf.grad is not None:
                        factors[n, k] = leaf.grad
            infos.append(info)
        pairs = [(x, f) for x, f in zip(losses, factors.unbind(1), strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in pairs], [f for _, f in pairs])
        return infos

    def _step_by_gradients(self, losses: list[Tensor]) -> list[Info | None]:
        """A backward pass per task for all runs, then each run's method on what it gave."""
        trained = {k: p for k, p in self._parameters.items() if p.requires_grad}
        present = [k for k, loss in enumerate(losses) if loss.requires_grad]
        found: dict[int, dict[str, tuple[Tensor, ...]]] = {}  # task -> name -> one for each run
        for k in present:
            gradients = torch.autograd.grad(
                [losses[k]],
                list(trained.values()),
                [torch.ones_like(losses[k])],
                retain_graph=k != present[-1],
                allow_unused=True,
            )
            pairs = zip(trained, gradients, strict=True)
            found[k] = {name: g.unbind() for name, g in pairs if g is not None}
        values = torch.stack([loss.detach() for loss in losses], 1)
        infos = []
        for n, run in enumerate(self.runs):
            known = [
                Known.apply(
                    value,
                    [g[n] for g in found[k].values()],
                    *(self._own[name][n] for name in found[k]),
                )
                if k in found
                else value
                for k, value in enumerate(values[n])
            ]
            run.optimizer.zero_grad(set_to_none=True)
            infos.append(self._ask(n, known, shared=run.shared, heads=run.heads))
        for name, stacked in trained.items():
            each = [p.grad for p in self._own[name]]
            if any(g is not None for g in each):
                zero = torch.zeros_like(self._own[name][0])
                stacked.grad = torch.stack([zero if g is None else g for g in each])
        return infos

    def epoch_of_training(
        self, save: Callable[[Run], None] | None = None, every: float = torch.inf
    ) -> list[Run]:
        """Train the epoch to its end and evaluate, as `Run.epoch_of_training` does.

        Args:
            save: called between two batches, for each run, to keep its state.
            every: seconds between two such calls.

        Returns:
            The runs that have not failed.
        """
        start = saved = time.perf_counter()
        drawn = torch.get_rng_state()

        def lap() -> float:
            """Share the time since the last call among the runs."""
            nonlocal start
            now = time.perf_counter()
            for run in self.runs:
                run.seconds += (now - start) / len(self.runs)
            start = now
            return now

        sources = [run.batches_left() for run in self.runs]
        for step, batches in enumerate(zip(*sources, strict=True)):
            for run, info in zip(self.runs, self.step(batches), strict=True):
                if info is not None:
                    run.count(info)
            if step == 0 and not torch.equal(drawn, torch.get_rng_state()):
                raise ValueError(
                    "expected batches and losses that draw no numbers from torch's global "
                    "generator, which the runs would share, got some that do; leave --together out"
                )
            if save is not None and time.perf_counter() - saved >= every:
                saved = lap()
                self.give_back()
                for run in self._going():
                    save(run)
                start = time.perf_counter()
        means = [run.end_steps() for run in self.runs]
        lap()
        self.give_back()
        for run, mean in zip(self.runs, means, strict=True):
            if run in self._going():
                run.end_epoch(mean)
        return self._going()

    def _going(self) -> list[Run]:
        return [run for n, run in enumerate(self.runs) if n not in self.failed]


def train(
    cells: Sequence[Cell],
    benchmark: Benchmark,
    root: Path,
    progress: Callable[[Cell, int, int], None] | None = None,
    every: float = training.CHECKPOINT_SECONDS,
) -> list[dict[str, Any]]:
    """Run cells that differ in their seed alone, together, and write their result files.

    As `training.train`: each goes on from its checkpoint, those at one place together; a non-finite
    loss or gradient ends its own run. Results say how many runs shared a process in ``together``;
    their ``seconds`` are a share of the time of all.

    Args:
        cells: what to run.
        benchmark: prepared under the cells' protocol, its data on the device.
        root: output folder.
        progress: called after every epoch, with the first of the cells trained together.
        every: seconds between checkpoints within an epoch; there is one after each epoch anyway.

    Returns:
        The results, as written, in the order of the cells.

    Raises:
        ValueError: method, protocol or network cannot go together.
        OSError: a checkpoint or a result cannot be written.
    """
    check(cells[0].protocol)
    why = why_alone(cells[0].spec)
    if why:
        raise ValueError(
            f"expected a method whose runs can go together, got {cells[0].spec.label}: {why}; "
            "leave --together out"
        )
    written: dict[int, dict[str, Any]] = {}

    def save(run: Run) -> None:
        checkpoints.write(checkpoints.files(run.cell.path(root))[0], run.state_dict())

    def end(run: Run, together: int, failed: str | None = None) -> None:
        path = run.cell.path(root)
        result = {**training.describe(run, failed), "together": together}
        results.write_result(path, result)
        checkpoints.remove(path)
        written[run.cell.seed] = result

    def place(run: Run) -> tuple[int, int]:
        return run.epoch, run.batch

    found = [training.resumed(cell, benchmark, cell.path(root)) for cell in cells]
    epochs = cells[0].protocol.epochs
    for _, group in itertools.groupby(sorted(found, key=place), place):
        runs = list(group)
        together = len(runs)
        while runs and runs[0].epoch < epochs:
            stack = Stack(runs)
            runs = stack.epoch_of_training(save, every)
            for n, why in stack.failed.items():
                end(stack.runs[n], together, why)
            for run in runs:
                if run.epoch < epochs:
                    save(run)
            if runs and progress is not None:
                progress(runs[0].cell, runs[0].epoch, epochs)
        for run in runs:
            end(run, together)
    return [written[cell.seed] for cell in cells]


def groups(grid: Grid, root: Path) -> Iterator[list[Cell]]:
    """All runs of a grid, method by method: those that can go together in one list."""
    for spec in grid.specs:
        trials = grid.trials(spec, root)
        seeds = range(grid.seeds)
        if len(trials) > 1:
            yield from ([cell] for cell in trials)
            seeds = seeds[1:]
            if seeds:
                yield from ([cell] for cell in grid.died(spec, root))
        rate = grid.choose(spec, root)
        cells = [grid.cell(spec, seed, rate) for seed in seeds]
        yield from ([cell] for cell in cells) if why_alone(spec) else [cells]


def sweep(
    grid: Grid,
    root: Path,
    device: torch.device,
    progress: Callable[[Cell, int, int], None] | None = None,
    every: float = training.CHECKPOINT_SECONDS,
) -> Iterator[Outcome]:
    """Run a grid as `training.sweep` does, the seeds of a method together.

    Trials of learning rates have one seed each and run one by one, and so do methods with a reason
    (`why_alone`). Where there is too little memory for a group, all its runs have failed.

    Yields:
        An outcome per cell, method by method.

    Raises:
        ValueError: the runs of this protocol, or this network, cannot go together.
    """
    check(grid.protocol)
    prepared: training.Prepared = {}
    for cells in groups(grid, root):
        if len(cells) < 2:
            yield from training.sweep(cells, root, device, progress, every=every, ready=prepared)
            continue
        with contextlib.ExitStack() as held:
            mine = []
            for cell in cells:
                try:
                    held.enter_context(training.claim(cell, root))
                except Timeout:
                    done = training.finished(cell.path(root))
                    yield Outcome(cell, "kept" if done else "elsewhere", done)
                    continue
                done = training.finished(cell.path(root))
                if done is None:
                    training.set_broken_aside(cell.path(root))
                    mine.append(cell)
                    continue
                with contextlib.suppress(OSError):  # left by a process that died as it ended
                    checkpoints.remove(cell.path(root))
                yield Outcome(cell, "kept", done)
            if not mine:
                continue
            try:
                bench = training.prepare(mine[0], device, prepared)
                found = train(mine, bench, root, progress, every)
            except Exception as error:
                if not training.out_of_memory(error):
                    raise
                why = f"out of memory: {results.one_line(error)}; leave --together out"
                found = [{"failed": why}] * len(mine)
            for cell, result in zip(mine, found, strict=True):
                yield Outcome(cell, "failed" if result["failed"] else "done", result)
