"""How far each gradient-balancing method's step is from its own definition.

Usage::

    python tests/accuracy.py                # 2,000 Jacobians; print, store and write the page
    python tests/accuracy.py --n 100        # fewer, printed alone
    python tests/accuracy.py --page         # write the page from the stored numbers

A method's `direction` is computed in float64. Its definition is evaluated with 40 digits from the
same float64 Jacobian, by the code of definitions.py, which shares nothing with the package. The
largest relative error of each kind of Jacobian is stored in book/results/accuracy.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from definitions import (
    ZERO,
    Exact,
    Number,
    Vector,
    aligned,
    balanced,
    config,
    imtl_g,
    max_min,
    mp,
    project,
    support,
    surgery,
)
from tabulate import tabulate

from mtl_tutorial.gradients import Method
from mtl_tutorial.methods import create

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "book" / "results" / "accuracy.json"
PAGE = ROOT / "book" / "accuracy.md"

# -------------------------------------------------------------------------- matrices to try out

KINDS = ("plain", "conflicting", "unequal", "low rank")
CANCELLED = 1e-6
P = 20  # parameters, up to eight tasks
WIDE = 100  # parameters, forty tasks


@dataclass
class Case:
    """Two steps' worth of input; rows are task gradients.

    Attributes:
        kind: one of `KINDS`, or "forty".
        rows: Jacobian (K, P), float64.
        earlier: Jacobian of the step before, for methods with state.
        losses: (K,) of both steps, the earlier ones first.
    """

    kind: str
    rows: np.ndarray
    earlier: np.ndarray
    losses: tuple[np.ndarray, np.ndarray]

    @cached_property
    def exact(self) -> Exact:
        return Exact(self.rows)

    @cached_property
    def exact_earlier(self) -> Exact:
        return Exact(self.earlier)


def jacobian(kind: str, k: int, p: int, draw: np.random.Generator) -> np.ndarray:
    """A (k, p) matrix; of low rank, its rows are exactly dependent in float64."""
    if kind == "low rank":
        rank = int(draw.integers(1, max(k, 2)))
        left, right = (draw.integers(-3, 4, size=s) for s in ((k, rank), (rank, p)))
        rows = (left @ right).astype(float)
        rows[~rows.any(axis=1)] = right[0]  # zero rows have tests of their own
        if not rows.any():
            return jacobian(kind, k, p, draw)
        powers = draw.integers(0, 11, size=k) if draw.random() < 0.5 else np.zeros(k, int)
        return rows * 2.0 ** (powers[:, None] + draw.choice([-20, 0, 20]))  # exact
    rows = draw.standard_normal((k, p))
    if kind == "conflicting":
        signs = np.where(np.arange(k) % 2, 1.0, -1.0)
        rows = rows + draw.uniform(0.5, 2) * signs[:, None] * draw.standard_normal(p)
    if kind == "unequal":
        rows = rows * 10.0 ** draw.uniform(0, 3, size=(k, 1))
    return rows * draw.choice([1e-6, 1.0, 1e6])


def cases(n: int, seed: int = 0) -> Iterator[Case]:
    """n cases with 2 to 8 tasks, the kinds in turn."""
    for i in range(n):
        draw = np.random.default_rng([seed, i])
        kind, k = KINDS[i % len(KINDS)], int(draw.integers(2, 9))
        rows, earlier = (jacobian(kind, k, P, draw) for _ in range(2))
        losses = draw.uniform(0.1, 3, size=(2, k))
        yield Case(kind, rows, earlier, (losses[0], losses[1]))


def forty(n: int, seed: int = 0) -> Iterator[Case]:
    """n cases with forty tasks, in conflict and of unequal size in turn."""
    for i in range(n):
        draw = np.random.default_rng([seed, i, 40])
        rows = jacobian(("conflicting", "unequal")[i % 2], 40, WIDE, draw)
        yield Case("forty", rows, rows, (np.ones(40), np.ones(40)))


# -------------------------------------------------------------------------- what is measured


@dataclass
class Answer:
    """A step by definition, and the size of the terms that it is a sum of."""

    step: Vector
    terms: Number


def weighted(exact: Exact, weights: Vector) -> Answer:
    terms = mp.fdot([abs(w) for w in weights], exact.norms)
    step = exact.combine(weights)
    if terms <= ZERO * min(exact.norms):  # all weights are zero
        return Answer(step, min(exact.norms))
    return Answer(step, terms)


def nothing(exact: Exact, size: Number) -> Answer:
    return Answer([mp.mpf(0)] * len(exact.rows[0]), size)


def fresh(method: Method, case: Case) -> np.ndarray:
    """Weights of a new object of the same settings, as a guess."""
    made = create(method.name, **method.settings)
    return made.weights(torch.from_numpy(case.rows @ case.rows.T)).numpy()


def of_mgda(method: Method, case: Case) -> Answer:
    weights = case.exact.min_norm
    if weights is None:
        return nothing(case.exact, min(case.exact.norms))
    return weighted(case.exact, weights)


def of_mgda_l2(method: Method, case: Case) -> Answer:
    exact = case.exact
    unit = Exact(case.rows)
    unit.rows = [[x / n for x in row] for row, n in zip(exact.rows, exact.norms, strict=True)]
    unit.floats = np.array([[float(x) for x in row] for row in unit.rows])
    if unit.min_norm is None:
        return nothing(exact, min(exact.norms))
    weights = [a / n for a, n in zip(unit.min_norm, exact.norms, strict=True)]
    return weighted(exact, [w / mp.fsum(weights) for w in weights])


def of_sdmgrad(method: Method, case: Case) -> Answer:
    lam = mp.mpf(method.lam)
    shifted = case.exact.shifted(method.lam)
    weights = shifted.min_norm
    if weights is None:
        return nothing(case.exact, min(case.exact.norms))
    return weighted(case.exact, [(w + lam / case.exact.k) / (1 + lam) for w in weights])


def of_upgrad(method: Method, case: Case) -> Answer:
    exact, k = case.exact, case.exact.k
    total = [mp.mpf(0)] * k
    for i in range(k):
        start = [mp.mpf(int(i == j)) for j in range(k)]
        total = [a + b for a, b in zip(total, project(exact, start), strict=True)]
    return weighted(exact, [x / k for x in total])


def of_dualproj(method: Method, case: Case) -> Answer:
    return weighted(case.exact, project(case.exact, case.exact.mean))


def of_cagrad(method: Method, case: Case) -> Answer:
    guess = support(fresh(method, case) - 1 / case.exact.k)
    return weighted(case.exact, max_min(case.exact, method.c, guess))


def of_fairgrad(method: Method, case: Case) -> Answer:
    exact, alpha = case.exact, mp.mpf(method.alpha)
    weights = balanced(exact, method.alpha, fresh(method, case))
    if weights is None:
        return nothing(exact, exact.k * min(exact.norms) ** ((1 - alpha) / (1 + alpha)))
    return weighted(exact, weights)


def of_nash(method: Method, case: Case) -> Answer:
    exact = case.exact
    unclipped = create("nash_mtl", max_norm=0.0)
    weights = balanced(exact, 1.0, fresh(unclipped, case))
    if weights is None:
        return nothing(exact, mp.mpf(1))
    length = mp.norm(exact.combine(weights))
    factor = min(mp.mpf(1), method.max_norm / length) if method.max_norm else 1
    return weighted(exact, [factor * w for w in weights])


def of_ngdiff(method: Method, case: Case) -> Answer:
    retain, forget = case.exact.norms[:2]
    weights = [1 / retain, -1 / forget] + [mp.mpf(0)] * (case.exact.k - 2)
    return weighted(case.exact, weights)


def of_imtl(method: Method, case: Case) -> Answer:
    scales = [mp.exp(-mp.mpf(method.lr) * (mp.mpf(float(loss)) - 1)) for loss in case.losses[0]]
    scaled = Exact(case.rows)
    scaled.rows = [[s * x for x in row] for s, row in zip(scales, case.exact.rows, strict=True)]
    weights = [s * a for s, a in zip(scales, imtl_g(scaled), strict=True)]
    return weighted(case.exact, weights)


def of_pcgrad(method: Method, case: Case) -> Answer:
    k = case.exact.k
    step, _ = surgery(case.exact, [[mp.mpf(0)] * k for _ in range(k)], 0)
    return Answer(step, mp.fsum(case.exact.norms))


def of_gradvac(method: Method, case: Case) -> Answer:
    k = case.exact.k
    start = [[mp.mpf(0)] * k for _ in range(k)]
    _, targets = surgery(case.exact_earlier, start, method.beta)
    step, _ = surgery(case.exact, targets, method.beta)
    return Answer(step, mp.fsum(case.exact.norms))


def of_excess_mtl(method: Method, case: Case) -> Answer:
    risks, squares = [], [[mp.mpf(0)] * P for _ in range(case.exact.k)]
    for exact in (case.exact_earlier, case.exact):
        squares = [
            [s + x * x for s, x in zip(a, b, strict=True)]
            for a, b in zip(squares, exact.rows, strict=True)
        ]
        risks.append(
            [
                mp.fsum(x * x / mp.sqrt(s + mp.mpf(1e-7)) for s, x in zip(a, b, strict=True))
                for a, b in zip(squares, exact.rows, strict=True)
            ]
        )
    powers = [
        mp.exp(mp.mpf(method.step_size) * now / first) for first, now in zip(*risks, strict=True)
    ]
    return weighted(case.exact, [x / mp.fsum(powers) for x in powers])


def of_gradnorm(method: Method, case: Case) -> Answer:
    """At the first step every rate is one, so each target is the mean norm."""
    k, norms = case.exact.k, case.exact_earlier.norms
    target = mp.fsum(norms) / k
    signs = [mp.sign(n - target) if abs(n - target) > ZERO * n else 0 for n in norms]
    moves = [mp.mpf(method.lr) * sign * n for sign, n in zip(signs, norms, strict=True)]
    moved = [max(1 - move, mp.mpf(1e-6)) for move in moves]
    return weighted(case.exact, [k * x / mp.fsum(moved) for x in moved])


def of_db_mtl(method: Method, case: Case) -> Answer:
    beta = mp.mpf(method.beta)
    means = [[mp.mpf(0)] * P for _ in range(case.exact.k)]
    for exact, losses in zip((case.exact_earlier, case.exact), case.losses, strict=True):
        means = [
            [
                beta * m + (1 - beta) * x / (mp.mpf(float(loss)) + mp.mpf(1e-8))
                for m, x in zip(mean, row, strict=True)
            ]
            for mean, row, loss in zip(means, exact.rows, losses, strict=True)
        ]
    norms = [mp.norm(mean) for mean in means]
    longest = max(norms)
    factors = [longest / n for n in norms]
    columns = zip(*means, strict=True)
    return Answer([mp.fdot(factors, column) for column in columns], len(norms) * longest)


def of_config_momentum(method: Method, case: Case) -> Answer:
    """After one turn of every task the means are the gradients, and Adam divides d by |d|."""
    step = case.exact.combine(config(case.exact))
    divided = [x / (abs(x) + mp.mpf(1e-8)) for x in step]
    return Answer(divided, mp.sqrt(len(step)))


@dataclass
class Row:
    """One method with settings, its definition, and the tolerances that are promised.

    Attributes:
        name: of the method.
        by: how the definition is evaluated.
        definition: the step of a case by definition.
        settings: of the method.
        tolerance: largest relative error with up to eight tasks, all kinds together.
        forty: the same with forty tasks; None where the method solves no optimisation problem.
        steps: calls of `direction`, all but the last one on the earlier Jacobian; 0: one call per
            task, all on the last Jacobian.
        tasks: number of tasks where the method demands one.
        kinds: kinds of Jacobians on which the step is unique.
    """

    name: str
    by: str
    definition: Callable[[Method, Case], Answer]
    settings: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-8
    forty: float | None = None
    steps: int = 1
    tasks: int | None = None
    kinds: tuple[str, ...] = KINDS


def _closed(weights: Callable[[Exact], Vector]) -> Callable[[Method, Case], Answer]:
    return lambda method, case: weighted(case.exact, weights(case.exact))


CONDITIONS = "optimality conditions"
ROWS = [
    Row("aligned_mtl", "eigenvectors", lambda m, c: weighted(c.exact, aligned(c.exact, m.scale))),
    Row(
        "aligned_mtl",
        "eigenvectors",
        lambda m, c: weighted(c.exact, aligned(c.exact, m.scale)),
        {"scale": "rmse"},
    ),
    Row("imtl_g", "linear system", _closed(imtl_g)),
    Row("imtl", "linear system", of_imtl, {"lr": 0.1}, steps=2),
    Row("config", "linear system", _closed(config)),
    # A coordinate that is zero by definition is divided by its own rounding error.
    Row("config_momentum", "linear system", of_config_momentum, steps=0, kinds=KINDS[:3]),
    Row("mgda", CONDITIONS, of_mgda, forty=1e-8),
    Row("mgda", CONDITIONS, of_mgda_l2, {"normaliser": "l2"}, forty=1e-8, kinds=KINDS[:3]),
    Row("sdmgrad", CONDITIONS, of_sdmgrad, forty=1e-8),
    Row("upgrad", CONDITIONS, of_upgrad, forty=1e-8),
    Row("dualproj", CONDITIONS, of_dualproj, forty=1e-8),
    Row("cagrad", CONDITIONS, of_cagrad, {"c": 0.2}, 1e-5, 1e-5),
    Row("cagrad", CONDITIONS, of_cagrad, {"c": 0.4}, 1e-5, 1e-5),
    Row("cagrad", CONDITIONS, of_cagrad, {"c": 0.8}, 1e-5, 1e-5),
    Row("nash_mtl", CONDITIONS, of_nash, forty=1e-8),
    Row("nash_mtl", CONDITIONS, of_nash, {"max_norm": 0.0}, forty=1e-8),
    Row("fairgrad", CONDITIONS, of_fairgrad, {"alpha": 0.5}, forty=1e-8),
    Row("fairgrad", CONDITIONS, of_fairgrad, {"alpha": 2.0}, forty=1e-8),
    Row("pcgrad", "formula", of_pcgrad, {"order": "fixed"}),
    # The sine of an angle loses half of the digits where gradients are parallel.
    Row("gradvac", "formula", of_gradvac, {"order": "fixed"}, 1e-6, steps=2),
    Row("ngdiff", "formula", of_ngdiff, tasks=2),
    Row("db_mtl", "formula", of_db_mtl, steps=2),
    Row("excess_mtl", "formula", of_excess_mtl, {"step_size": 1.0}, steps=2),
    Row("gradnorm", "formula", of_gradnorm, steps=2),
]
LEFT_OUT = {"graddrop": "its step is drawn at random, coordinate by coordinate"}


def error(row: Row, case: Case) -> float:
    """Norm of the difference over the norm of the step.

    Where the terms that the step is a sum of cancel to less than `CANCELLED` of their size, it is
    over that much of their size; where they cancel altogether, over their size.
    """
    method = create(row.name, **row.settings)
    now = torch.from_numpy(case.rows)
    old_losses, losses = (torch.from_numpy(x) for x in case.losses)
    if row.steps == 0:
        for _ in range(len(case.rows)):
            step = method.direction(now, losses=losses)
    else:
        if row.steps == 2:
            method.direction(torch.from_numpy(case.earlier), losses=old_losses)
        step = method.direction(now, losses=losses)
    answer = row.definition(method, case)
    length, terms = mp.norm(answer.step), answer.terms
    found = [mp.mpf(float(x)) for x in step]
    difference = mp.norm([a - b for a, b in zip(found, answer.step, strict=True)])
    return float(difference / (terms if length <= ZERO * terms else max(length, CANCELLED * terms)))


def first_tasks(case: Case, k: int) -> Case:
    """The same case with k of its tasks."""
    losses = (case.losses[0][:k], case.losses[1][:k])
    return Case(case.kind, case.rows[:k], case.earlier[:k], losses)


def measure(n: int, n_forty: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Largest relative error of every row and kind.

    Args:
        n: number of Jacobians with up to eight tasks.
        n_forty: number with forty tasks; n / 100, at least one, by default.
        seed: of the Jacobians.
    """
    n_forty = max(1, n // 100) if n_forty is None else n_forty
    worst: list[dict[str, float]] = [{} for _ in ROWS]
    for case in itertools.chain(cases(n, seed), forty(n_forty, seed)):
        for row, found in zip(ROWS, worst, strict=True):
            given = case
            if (row.forty is None) if case.kind == "forty" else (case.kind not in row.kinds):
                continue
            if row.tasks is not None:
                given = first_tasks(case, row.tasks)
            found[case.kind] = max(found.get(case.kind, 0.0), error(row, given))
    rows = [
        {
            "method": row.name,
            "settings": row.settings,
            "definition": row.by,
            "errors": {kind: float(f"{value:.1e}") for kind, value in found.items()},
            "tolerance": row.tolerance,
            "tolerance_forty": row.forty,
        }
        for row, found in zip(ROWS, worst, strict=True)
    ]
    return {"n": n, "n_forty": n_forty, "seed": seed, "rows": rows}


# -------------------------------------------------------------------------- the table


def table(result: dict[str, Any], style: str = "simple") -> str:
    """One line per method and settings; an empty cell was not measured."""

    def number(x: float | None) -> str:
        return "" if x is None else f"{x:.0e}".replace("e-0", "e-")

    lines = []
    for row in result["rows"]:
        settings = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        errors = [number(row["errors"].get(kind)) for kind in (*KINDS, "forty")]
        name = f"`{row['method']}`" if style == "pipe" else row["method"]
        lines.append(
            [
                name,
                settings,
                row["definition"],
                *errors[:4],
                number(row["tolerance"]),
                errors[4],
                number(row["tolerance_forty"]),
            ]
        )
    headers = ["method", "settings", "against", *KINDS, "promised", "K = 40", "promised"]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True)


def page(result: dict[str, Any]) -> str:
    """book/accuracy.md."""
    left_out = "; ".join(f"`{name}`, because {why}" for name, why in LEFT_OUT.items())
    return f"""\
# How exact the steps are

How far is the step of a method from what its definition says? For {result["n"]} random Jacobians
with 2 to 8 tasks and {P} parameters, the definition was evaluated with 40 digits and compared with
`direction` in float64. The table shows the *largest* relative error, the norm of the difference
over the norm of the step. Where the weighted gradients cancel to less than a millionth of their
size, the difference is taken over a millionth of their size; where the step is zero by definition,
over their size.

The Jacobians are of four kinds, each at norms around $10^{{-6}}$, 1 and $10^6$: *plain* ones are
normally distributed; in *conflicting* ones every other task pulls the other way along a common
direction; in *unequal* ones the norms of the gradients differ by a factor of up to 1000; those of
*low rank* have linearly dependent gradients, half of them with norms up to 1000 times apart, and
often no step that helps every task. The column K = 40 has {result["n_forty"]} Jacobians of 40
tasks and {WIDE} parameters, conflicting or unequal, for the methods that solve an optimisation
problem. The tests check the columns *promised*.

{table(result, "pipe")}

*Against* says how the definition was evaluated. *Formula*: as written in the paper, on the
gradients themselves. *Linear system* and *eigenvectors*: solved with 40 digits. *Optimality
conditions*: a point that meets the conditions of a convex problem with 40 digits is its solution.
Methods with state were given another step first. MGDA with a normaliser scales its weights to
sum one, which leaves the length of the step open where gradients are linearly dependent; M-ConFIG
divides each coordinate by its own size, also one that is zero but for rounding. Both have no entry
under low rank. Left
out is {left_out}.

Made by `python tests/accuracy.py`.
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; store the numbers and the page where nothing was cut short."""
    parser = argparse.ArgumentParser(description="Errors of the methods' steps.")
    parser.add_argument("--n", type=int, default=2000, help="number of Jacobians (2000)")
    parser.add_argument("--page", action="store_true", help="write the page, measure nothing")
    options = parser.parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        result = measure(options.n)
        print(table(result))
        if options.n < 2000:
            return 0
        write(STORE, json.dumps(result, indent=1) + "\n")
    write(PAGE, page(json.loads(STORE.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
