"""Time the K x K solvers alone: ours and TorchJD's, each on the same Gram matrices.

The Gram matrices come from random Jacobians; in every other one the tasks conflict, and in every
second pair their gradients' norms are spread over two orders of magnitude. TorchJD's Nash-MTL takes
a Jacobian: it gets a K x K one with that Gram matrix, and keeps its state from one to the next, as
in training.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..methods.aligned_mtl import aligned_weights
from ..methods.cagrad import cagrad_weights
from ..methods.imtl import imtl_g_weights
from ..methods.mgda import mgda_weights
from ..methods.nash_mtl import nash_weights
from ..methods.pcgrad import pcgrad_weights, visiting_orders
from ..methods.upgrad import upgrad_weights
from .contenders import missing
from .steps import Tell, wall_time

SIZES = (2, 3, 10, 40)


class Problem(NamedTuple):
    """A Gram matrix (K, K), and a float32 matrix (K, K) of which it is the Gram matrix."""

    gram: Tensor
    root: Tensor


Solver = Callable[[Problem], Any]

OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "nash_mtl": nash_weights,
    "cagrad": cagrad_weights,
    "aligned_mtl": aligned_weights,
    "imtl_g": imtl_g_weights,
    "mgda": mgda_weights,
    "pcgrad": lambda gram: pcgrad_weights(gram, visiting_orders(len(gram), "random")),
    "upgrad": upgrad_weights,
}
TORCHJD: dict[str, tuple[str, dict[str, Any]]] = {
    "cagrad": ("CAGradWeighting", {"c": 0.4}),
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "mgda": ("MGDAWeighting", {}),
    "pcgrad": ("PCGradWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
}


def problems(k: int, n: int, seed: int = 0) -> list[Problem]:
    """n problems of k tasks, from random Jacobians with 400 columns."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(n):
        rows = torch.randn(k, 400, generator=draw)
        if i % 2:
            signs = torch.where(torch.arange(k) % 2 == 0, 1.0, -1.0)
            rows = rows + 0.5 * signs[:, None] * torch.randn(400, generator=draw)
        if i % 4 >= 2:
            rows = rows * 10 ** (2 * torch.rand(k, 1, generator=draw) - 1)
        gram = rows @ rows.T
        found.append(Problem(gram, torch.linalg.cholesky(gram.double()).float()))
    return found


def our_solver(name: str) -> Solver:
    solve = OURS[name]
    return lambda problem: solve(problem.gram)


def torchjd_solver(name: str, k: int) -> Solver:
    """TorchJD's solver, at its defaults.

    Raises:
        ImportError: it needs a package that is not there.
    """
    aggregation = importlib.import_module("torchjd.aggregation")
    if name == "nash_mtl":
        aggregator = aggregation.NashMTL(n_tasks=k)
        return lambda problem: aggregator(problem.root)
    kind, arguments = TORCHJD[name]
    weighting = getattr(aggregation, kind)(**arguments)
    return lambda problem: weighting(problem.gram)


def compare(
    solvers: dict[str, Solver], todo: list[Problem], seconds: float = 5.0
) -> list[dict[str, float]]:
    """Seconds of each solver on each problem, after one untimed call, in an order drawn anew.

    No further problem is begun after the given seconds, but for the first three.
    """
    rng, begin, table = random.Random(0), time.perf_counter(), []
    for i, problem in enumerate(todo):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        row = {}
        for name in rng.sample(list(solvers), len(solvers)):
            solve = solvers[name]
            solve(problem)
            row[name] = wall_time(partial(solve, problem))
        table.append(row)
    return table


def measure(
    n: int = 40, sizes: tuple[int, ...] = SIZES, tell: Tell = lambda _: None
) -> list[dict[str, Any]]:
    """Median microseconds of ours and TorchJD's, and the median of their ratios.

    Args:
        n: number of matrices per size.
        sizes: numbers of tasks.
        tell: gets a line on what is going on.
    """
    why = missing("torchjd")
    rows = []
    for name in OURS:
        for k in sizes:
            tell(f"solver {name}, K={k}")
            row: dict[str, Any] = {"solver": name, "tasks": k}
            pair = {"ours": our_solver(name)}
            complaint = why
            if complaint is None:
                try:
                    pair["torchjd"] = torchjd_solver(name, k)
                except ImportError as error:
                    complaint = " ".join(str(error).split())
            table = compare(pair, problems(k, n, seed=k))
            for who in pair:
                row[f"{who}_us"] = 1e6 * statistics.median(r[who] for r in table)
            if complaint is None:
                row["ratio"] = statistics.median(r["torchjd"] / r["ours"] for r in table)
            else:
                row["failed"] = complaint
            rows.append(row)
    return rows
