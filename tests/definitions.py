"""Definitions of the gradient-balancing methods, evaluated with 40 digits for tests/accuracy.py.

Nothing here comes from the package: closed forms work on the rows, and solutions of optimisation
problems are found by their optimality conditions. All of these problems are convex, so a point that
meets the conditions is the answer, however its active set was guessed; guesses come from scipy's
non-negative least squares, from the caller, or from trying every face.

Each function gives the weights of the task gradients, or None where the step is zero because the
hull of the gradients contains zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import mpmath
import numpy as np
from scipy.optimize import nnls

mp = mpmath.mp
mp.dps = 40
ZERO = mp.mpf(10) ** -25  # what counts as zero in 40 digits
Number = Any  # mpmath.mpf; mpmath carries no annotations
Vector = list[Number]
Matrix = list[Vector]


class Exact:
    """A Jacobian, its Gram matrix, norms and cosines with 40 digits."""

    def __init__(self, rows: np.ndarray) -> None:
        self.floats = rows
        self.rows: Matrix = [[mp.mpf(float(x)) for x in row] for row in rows]
        self.k = len(rows)

    @cached_property
    def gram(self) -> Matrix:
        gram = [[mp.mpf(0)] * self.k for _ in range(self.k)]
        for i, j in itertools.combinations_with_replacement(range(self.k), 2):
            gram[i][j] = gram[j][i] = mp.fdot(self.rows[i], self.rows[j])
        return gram

    @cached_property
    def norms(self) -> Vector:
        return [mp.sqrt(self.gram[i][i]) for i in range(self.k)]

    @cached_property
    def cosine(self) -> Matrix:
        n = self.norms
        return [[x / n[i] / n[j] for j, x in enumerate(row)] for i, row in enumerate(self.gram)]

    @cached_property
    def mean(self) -> Vector:
        return [mp.mpf(1) / self.k] * self.k

    @cached_property
    def min_norm(self) -> Vector | None:
        """Weights of the min-norm point, or None where it is zero."""
        return min_norm(self)

    def combine(self, weights: Vector) -> Vector:
        return [mp.fdot(weights, column) for column in zip(*self.rows, strict=True)]

    def shifted(self, lam: float) -> Exact:
        """The gradients plus lam times their mean; the floats serve as a guess alone."""
        other = Exact(self.floats + lam * self.floats.mean(axis=0))
        step = self.combine([lam * w for w in self.mean])
        other.rows = [[x + y for x, y in zip(row, step, strict=True)] for row in self.rows]
        return other


def times(matrix: Matrix, vector: Vector) -> Vector:
    return [mp.fdot(row, vector) for row in matrix]


def solve(matrix: Matrix, *right: Vector) -> list[Vector] | None:
    """Solve a symmetric positive definite system; None where it is singular."""
    n = len(matrix)
    scale = [mp.sqrt(abs(matrix[i][i])) or mp.mpf(1) for i in range(n)]
    a = [
        [matrix[i][j] / scale[i] / scale[j] for j in range(n)] + [b[i] / scale[i] for b in right]
        for i in range(n)
    ]
    for i in range(n):
        if a[i][i] < ZERO:
            return None
        for row in a[i + 1 :]:
            factor = row[i] / a[i][i]
            row[i:] = [x - factor * y for x, y in zip(row[i:], a[i][i:], strict=True)]
    for i in reversed(range(n)):
        for j in range(n, n + len(right)):
            a[i][j] = (a[i][j] - mp.fdot(a[i][i + 1 : n], [a[m][j] for m in range(i + 1, n)])) / (
                a[i][i]
            )
    return [[a[i][n + j] / scale[i] for i in range(n)] for j in range(len(right))]


def part(matrix: Matrix, chosen: tuple[int, ...]) -> Matrix:
    return [[matrix[i][j] for j in chosen] for i in chosen]


def spread(values: Vector, chosen: tuple[int, ...], k: int) -> Vector:
    full = [mp.mpf(0)] * k
    for i, value in zip(chosen, values, strict=True):
        full[i] = value
    return full


def support(weights: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(weights > 0).tolist())


def faces(guess: tuple[int, ...], k: int) -> Iterator[tuple[int, ...]]:
    """The guess, then every other set of tasks where there are few enough."""
    yield guess
    if k <= 8:
        for size in range(1, k + 1):
            yield from itertools.combinations(range(k), size)


def uncertified(what: str, exact: Exact) -> ArithmeticError:
    return ArithmeticError(f"{what}: no face meets the optimality conditions, {exact.floats!r}")


# -------------------------------------------------------------------------- definitions


def min_norm(exact: Exact) -> Vector | None:
    """Optimality: a >= 0, sum one, and g_k . d >= |d|^2 with equality where a_k > 0."""
    k, n = exact.k, np.array([float(x) for x in exact.norms])
    unit = exact.floats / n[:, None]
    # min |sum_k s_k u_k|^2 + (sum_k s_k n_min / n_k - 1)^2 over s >= 0
    system = np.vstack([unit.T, n.min() / n])
    guess = support(nnls(system, np.append(np.zeros(unit.shape[1]), 1.0))[0])
    for face in faces(guess, k):
        ones = [mp.mpf(1)] * len(face)
        solved = solve(part(exact.gram, face), ones)
        if solved is None:
            # Dependent gradients: zero is in the hull if the last is a negative mix of the others.
            inner, last = face[:-1], face[-1]
            solved = solve(part(exact.gram, inner), [exact.gram[i][last] for i in inner])
            if solved is None or not inner or max(solved[0]) > 0:
                continue
            weights = spread([*[-x for x in solved[0]], mp.mpf(1)], face, k)
            d = exact.combine(weights)
            if mp.norm(d) <= ZERO * mp.fdot(weights, exact.norms):
                return None
            continue
        if min(solved[0]) < 0:
            continue
        weights = spread([x / mp.fsum(solved[0]) for x in solved[0]], face, k)
        slopes = times(exact.gram, weights)
        squared = mp.fdot(weights, slopes)
        slack = min((x - squared) / n for x, n in zip(slopes, exact.norms, strict=True))
        if slack >= -ZERO * mp.sqrt(squared):
            return weights
    raise uncertified("min-norm point", exact)


def project(exact: Exact, start: Vector) -> Vector:
    """Nearest point to sum_k u_k g_k with g_k . d >= 0: u + s, with s_k >= 0, and zero where >."""
    k, n = exact.k, np.array([float(x) for x in exact.norms])
    unit = exact.floats / n[:, None]
    point = np.array([float(x) for x in exact.combine(start)])
    inner = times(exact.gram, start)
    size = mp.fdot([abs(x) for x in start], exact.norms)
    guess = support(nnls(unit.T, -point / float(size))[0])
    for face in itertools.chain([()], faces(guess, k)):
        solved = solve(part(exact.gram, face), [-inner[i] for i in face]) if face else [[]]
        if solved is None or min(solved[0], default=0) < 0:
            continue
        weights = [u + s for u, s in zip(start, spread(solved[0], face, k), strict=True)]
        slopes = times(exact.gram, weights)
        if min(x / n for x, n in zip(slopes, exact.norms, strict=True)) >= -ZERO * size:
            return weights
    raise uncertified("projection", exact)


def max_min(exact: Exact, c: float, guess: tuple[int, ...]) -> Vector:
    """max tau with g_k . d >= tau and |d - g_0| <= c |g_0|: d = g_0 + sum_k y_k g_k, y >= 0."""
    k, mean = exact.k, exact.mean
    inner = times(exact.gram, mean)
    squared = mp.fdot(mean, inner)
    radius = mp.mpf(c) * mp.sqrt(squared)
    if mp.sqrt(squared) <= ZERO * max(exact.norms):
        return mean
    if exact.min_norm is None:  # no step helps every task: the largest tau is at most zero
        weights = project(exact, mean)
        moved = exact.combine([w - m for w, m in zip(weights, mean, strict=True)])
        if mp.norm(moved) <= radius:
            return weights
    for face in faces(guess, k):
        ones = [mp.mpf(1)] * len(face)
        solved = solve(part(exact.gram, face), ones, [inner[i] for i in face]) if face else None
        if solved is None:
            continue
        a, b = solved
        # y = tau a - b and y'Gy = radius^2: a quadratic in tau
        aa, ab = mp.fsum(a), mp.fsum(b)
        root = ab**2 - aa * (mp.fdot(b, [inner[i] for i in face]) - radius**2)
        if root < 0:
            continue
        for sign in (1, -1):
            tau = (ab + sign * mp.sqrt(root)) / aa
            y = [tau * x - z for x, z in zip(a, b, strict=True)]
            if min(y) < 0:
                continue
            weights = [m + x for m, x in zip(mean, spread(y, face, k), strict=True)]
            slopes = times(exact.gram, weights)
            slack = min((x - tau) / n for x, n in zip(slopes, exact.norms, strict=True))
            if slack >= -ZERO * radius:
                return weights
    raise uncertified("largest smallest gain", exact)


def balanced(exact: Exact, alpha: float, start: np.ndarray) -> Vector | None:
    """The positive solution of G w = w^(-1/alpha), unique; None where the hull contains zero."""
    if exact.min_norm is None:
        return None
    p = 1 / mp.mpf(alpha)
    w = [mp.mpf(float(x)) for x in start]
    for _ in range(60):
        slopes = times(exact.gram, w)
        powers = [x**-p for x in w]
        # Newton on the relative change r of w, w_i (1 + r_i)
        system = [[w[i] * g * w[j] for j, g in enumerate(row)] for i, row in enumerate(exact.gram)]
        for i in range(exact.k):
            system[i][i] += p * w[i] * powers[i]
        right = [w[i] * (powers[i] - slopes[i]) for i in range(exact.k)]
        change = solve(system, right)[0]
        largest = max(abs(x) for x in change)
        length = min(mp.mpf(1), mp.mpf("0.5") / largest) if largest else mp.mpf(1)
        w = [x * (1 + length * r) for x, r in zip(w, change, strict=True)]
        if largest < ZERO:
            return w
    raise uncertified("fixed point", exact)


def eigen(matrix: Matrix) -> list[tuple[Number, Vector]]:
    """Pairs of a symmetric matrix whose eigenvalue is not zero, in ascending order."""
    values, vectors = mp.eigsy(mp.matrix(matrix))
    k, largest = len(matrix), max(values)
    pairs = [(values[i], [vectors[j, i] for j in range(k)]) for i in range(k)]
    return [(value, vector) for value, vector in pairs if value > ZERO * largest]


def aligned(exact: Exact, scale: str) -> Vector:
    """alpha = sigma sum_r v_r (v_r . 1/K) / sigma_r."""
    pairs = eigen(exact.gram)
    values = [value for value, _ in pairs]
    common = {
        "min": values[0],
        "median": values[(len(values) - 1) // 2],
        "rmse": mp.fsum(values) / len(values),
    }[scale]
    weights = [mp.mpf(0)] * exact.k
    for value, vector in pairs:
        factor = mp.sqrt(common / value) * mp.fsum(vector) / exact.k
        weights = [w + factor * x for w, x in zip(weights, vector, strict=True)]
    return weights


def equal_cosines(exact: Exact) -> Vector:
    """C^+ 1: coefficients over unit gradients of the step with equal cosines."""
    ones = [mp.mpf(1)] * exact.k
    solved = solve(exact.cosine, ones)
    if solved is not None:
        return solved[0]
    x = [mp.mpf(0)] * exact.k
    for value, vector in eigen(exact.cosine):
        factor = mp.fsum(vector) / value
        x = [a + factor * b for a, b in zip(x, vector, strict=True)]
    return x


def imtl_g(exact: Exact) -> Vector:
    x = equal_cosines(exact)
    v = [a / n for a, n in zip(x, exact.norms, strict=True)]
    total = mp.fsum(v)
    # Two tasks: the closed form, whatever the angle. No solution: the one documented.
    if exact.k == 2 or max(map(abs, x)) <= ZERO or abs(total) <= ZERO * max(map(abs, v)):
        v = [1 / n for n in exact.norms]
        total = mp.fsum(v)
    return [x / abs(total) for x in v]


def config(exact: Exact) -> Vector:
    x = equal_cosines(exact)
    cosines = times(exact.cosine, x)
    squared = mp.fdot(x, cosines)
    if squared <= ZERO:
        return [mp.mpf(0)] * exact.k
    length = mp.fdot(exact.norms, cosines) / squared
    return [length * a / n for a, n in zip(x, exact.norms, strict=True)]


def surgery(exact: Exact, targets: Matrix, beta: float) -> tuple[Vector, Matrix]:
    """Step and new targets of GradVac by its formula on the rows, others visited by index.

    With all targets at zero, the step is PCGrad's.
    """
    step = [mp.mpf(0)] * len(exact.rows[0])
    new = [list(row) for row in targets]
    for i in range(exact.k):
        v = list(exact.rows[i])
        for j in range(exact.k):
            size = mp.norm(v)
            if j == i or size <= ZERO * exact.norms[i]:
                continue
            phi = mp.fdot(v, exact.rows[j]) / size / exact.norms[j]
            t = targets[i][j]
            new[i][j] = (1 - mp.mpf(beta)) * t + mp.mpf(beta) * phi
            t = min(t, mp.mpf("0.999"))
            if phi < t:
                sine = mp.sqrt(1 - phi**2) if 1 - phi**2 > ZERO else mp.mpf(0)
                cosine = mp.sqrt(1 - t**2)
                factor = size * (t * sine - phi * cosine) / (exact.norms[j] * cosine)
                v = [x + factor * y for x, y in zip(v, exact.rows[j], strict=True)]
        step = [x + y for x, y in zip(step, v, strict=True)]
    return step, new
