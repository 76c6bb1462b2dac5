"""Small exact solvers on a Gram matrix, shared by several methods.

Every problem here is one of K unknowns, K tasks, and is solved in float64 to rounding error. The
gradients have been put into a unit-diagonal matrix before anything is compared, and all thresholds
are relative, so tiny, huge and unequal gradients are solved alike.

* `nonnegative_qp`: ``min 1/2 s'As + q's`` over ``s >= 0``, for several q at once.
* `min_norm_weights`: the point of smallest norm in the convex hull of the gradients.
* `dual_cone_weights`: projections on the cone of steps that increase no loss.
* `balanced_weights`: ``G w = w^(-1/alpha)``, Nash bargaining for alpha = 1.
* `equal_projection_weights`: the step with one projection on all unit gradients.
* `max_min_weights`: the step in a ball around the mean gradient that helps the worst task most.

The number of iterations depends on the values, so this is done on the host. Tensors come in and go
out; in between the arrays are NumPy's, whose calls cost a third of torch's at these sizes, and the
calls are all that a solver of K unknowns costs. A tensor on an accelerator would have to be waited
for, so there all hand the problem to `mtl_tutorial.device_solvers` but `max_min_weights`, for whose
search no number of rounds is always enough.

This file needs torch and NumPy; on an accelerator it uses device_solvers.py where that lies beside
it.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_EXCHANGES = 12  # rounds of `_Ball.exchange`
_PATIENCE = 3  # block exchanges without progress before single ones take over

# What is not finite is sorted out where it matters, as torch does it.
_silent = np.errstate(all="ignore")


def _elsewhere(x: Tensor) -> ModuleType | None:
    """`device_solvers` for a tensor on an accelerator; None where a problem is solved here."""
    if x.device.type == "cpu":
        return None
    try:
        from . import device_solvers  # here, so that a copy of this file works without it
    except ImportError:
        return None
    return device_solvers


def _array(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()


def _unit_diagonal(gram: Array) -> tuple[Array, Array, Array]:
    """`unit_diagonal` on the host, and the inverse norms, zero for a zero gradient."""
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosine = (gram * inverse) * inverse[:, None]
    cosine = np.minimum(np.maximum((cosine + cosine.T) / 2, -1), 1)
    return cosine, norms, inverse


def unit_diagonal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine matrix and norms of the rows behind a Gram matrix, on its device.

    Args:
        gram: Gram matrix (K, K).

    Returns:
        float64 cosine matrix (K, K), symmetric, with entries in [-1, 1], and norms (K,). The row
        and column of a zero gradient are zero, its diagonal entry included.
    """
    gram = gram.double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / torch.where(norms > 0, norms, 1.0), 0.0)
    cosine = (gram * inverse) * inverse[:, None]
    return ((cosine + cosine.T) / 2).clamp(-1, 1), norms


# ------------------------------------------------------------------------------ non-negative QP


@_silent
def nonnegative_qp(matrix: Tensor, linear: Tensor, eps: float = 1e-14) -> Tensor:
    """Minimise ``1/2 s'As + q's`` over ``s >= 0`` for every row q of `linear`.

    Block principal pivoting: guess the set F of positive unknowns, solve the linear system on F,
    exchange all unknowns whose sign (in F) or slope (outside) is wrong, and exchange single ones
    when their number stops falling. Where that has not ended, `_active_set` solves the problem.

    Args:
        matrix: symmetric positive semi-definite A (K, K).
        linear: rows q (B, K). The minimum must exist, as it does wherever q lies in A's range.
        eps: relative rounding error of A's entries.

    Returns:
        float64 tensor (B, K), non-negative. Unknowns with a zero diagonal entry stay zero. Where A
        is singular, s is one of several minimisers; they share ``A s``.
    """
    if there := _elsewhere(matrix):
        return there.nonnegative_qp(matrix, linear, eps)
    return torch.from_numpy(_nonnegative_qp(_array(matrix), _array(linear), eps)).to(matrix.device)


def _nonnegative_qp(matrix: Array, linear: Array, eps: float) -> Array:
    unit, norms, inverse = _unit_diagonal(matrix)
    q = linear * inverse
    alive = norms > 0
    return _pivot(unit, q, alive, (q < 0) & alive, eps)[0] * inverse


def _pivot(unit: Array, q: Array, alive: Mask, free: Mask, eps: float) -> tuple[Array, Mask]:
    """`nonnegative_qp` for a unit diagonal, from a first guess of F (B, K); also gives the last F.

    Rows and columns outside `alive` are zero in `unit`.
    """
    k = len(unit)
    if not alive.all():
        unit = unit + np.diag(~alive)
    free = free.copy()
    solution = np.zeros_like(q)
    fewest = np.full(len(q), k + 1)
    patience = np.full(len(q), _PATIENCE)
    open_ = np.arange(len(q))
    for _ in range(5 * k + 20):
        x = _solve_on(unit, q[open_], free[open_], eps)
        wrong = _violations(unit, q[open_], x, free[open_], eps) & alive
        solution[open_] = x
        count = wrong.sum(1)
        going = count > 0
        if not going.any():
            break
        open_, wrong, count = open_[going], wrong[going], count[going]
        better = count < fewest[open_]
        patience[open_] = np.where(better, _PATIENCE, patience[open_] - 1)
        fewest[open_] = np.where(better, count, fewest[open_])
        stuck = patience[open_] < 0
        if stuck.any():
            # The finite rule of last resort exchanges the last unknown that is wrong.
            last = np.arange(k)
            single = last == (wrong * (last + 1)).max(1, keepdims=True) - 1
            wrong = wrong & (single | ~stuck[:, None])
        free[open_] ^= wrong
    else:
        for i in open_:
            solution[i] = _active_set(unit, q[i], alive, eps)
    return np.maximum(solution, 0), free


def _solve_on(unit: Array, q: Array, free: Mask, eps: float) -> Array:
    """Solve ``A_FF x_F = -q_F`` for each row of q (B, K) and of the masks F (B, K); zero outside.

    One mask (1, K) holds for all rows. The ridge lets a singular A_FF be factorised; one step of
    refinement takes out its effect on everything but the null space, which the gradients do not
    see.
    """
    k = len(unit)
    mask = free.astype(np.float64)
    system = unit * (mask[:, :, None] * mask[:, None, :])
    system.reshape(len(free), k * k)[:, :: k + 1] += 1 - mask + 4 * k * eps
    # Torch factorises a whole batch in one call, and does not raise where that fails.
    factor, _ = torch.linalg.cholesky_ex(torch.from_numpy(system))

    def solve(right: Array) -> Array:
        if len(free) == 1:
            return torch.cholesky_solve(torch.from_numpy(right.T), factor[0]).numpy().T
        return torch.cholesky_solve(torch.from_numpy(right[..., None]), factor)[..., 0].numpy()

    x = solve(-q * mask)
    return x + solve(-(q + x @ unit) * mask)


def _violations(unit: Array, q: Array, x: Array, free: Mask, eps: float) -> Mask:
    """Which unknowns break the optimality conditions by more than rounding."""
    size = np.abs(x)
    slope = x @ unit + q
    rounding = 10 * eps * (size @ np.abs(unit) + np.abs(q))
    negative = x < -10 * eps * size.max(1, keepdims=True)
    # A system that could not be solved counts as wrong throughout.
    return np.where(free, negative, slope < -rounding) | ~np.isfinite(x)


def _active_set(unit: Array, q: Array, alive: Mask, eps: float) -> Array:
    """The same problem for one q (K,), by Lawson and Hanson's active set: slower, but it descends.

    Each iterate is feasible and better than the last one, so rounding cannot make it cycle.
    """
    x = np.zeros_like(q)
    free = np.zeros_like(alive)
    barred = ~alive
    for _ in range(20 * len(q)):
        slope = unit @ x + q
        rounding = 10 * eps * (np.abs(unit) @ x + np.abs(q))
        wanted = ~free & ~barred & (slope < -rounding)
        if not wanted.any():
            break
        new = np.where(wanted, slope, np.inf).argmin()
        free[new] = True
        z = _solve_on(unit, q[None], free[None], eps)[0]
        if not z[new] > 0:  # no descent along it but for rounding
            free[new] = False
            barred[new] = True
            continue
        while (z[free] <= 0).any():
            blocking = free & (z <= 0)
            ratio = np.where(blocking, x / np.where(blocking, x - z, 1.0), np.inf)
            x = x + ratio.min() * (z - x)
            free = free & ~(blocking & (ratio <= ratio.min()))
            x = np.where(free, x, 0.0)
            z = _solve_on(unit, q[None], free[None], eps)[0]
        x = z
        barred = ~alive
    return x


# ------------------------------------------------------------------------------- min-norm point


@_silent
def min_norm_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights of the point of smallest norm in the convex hull of the gradients.

    ``min a'Ga`` over ``a >= 0, sum a = 1``. On that set ``a'(G + t 11')a`` differs by the constant
    t alone, and the minimum of ``1/2 s'(G + t 11')s - sum s`` over ``s >= 0`` is proportional to
    it. With t > 0 this minimum exists even where the hull contains zero.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        float64 tensor (K,), non-negative, sum one. Several minimisers (linearly dependent
        gradients) give the same point. Zero gradients share the whole weight: the point is zero.
    """
    if there := _elsewhere(gram):
        return there.min_norm_weights(gram, eps)
    return torch.from_numpy(_min_norm_weights(_array(gram), eps)).to(gram.device)


def _min_norm_weights(gram: Array, eps: float) -> Array:
    smallest = gram.diagonal().min()
    if not smallest > 0:
        zero = (gram.diagonal() <= 0).astype(np.float64)
        return zero / zero.sum()
    # The squared norm sought lies in [0, smallest], so t = smallest keeps all digits of both.
    weights = _nonnegative_qp(gram + smallest, -np.ones((1, len(gram))), eps)[0]
    return weights / weights.sum()


@_silent
def is_stationary(gram: Tensor, weights: Tensor, eps: float = 1e-14) -> bool:
    """Whether ``sum_k w_k g_k`` is zero within the rounding error of the Gram matrix.

    Args:
        gram: Gram matrix (K, K).
        weights: w (K,), non-negative.
        eps: relative rounding error of the entries of `gram`.
    """
    return _is_stationary(_array(gram), _array(weights), eps)


def _is_stationary(gram: Array, weights: Array, eps: float) -> bool:
    size = weights @ np.sqrt(np.maximum(gram.diagonal(), 0))
    return bool(weights @ gram @ weights <= 4 * len(gram) * eps * size**2)


def _descends(gram: Array, weights: Array, longest: float, eps: float) -> bool:
    """Whether a step proves that no point of the hull is zero within rounding, so none is sought.

    With ``d = sum_k w_k g_k`` and any a of the simplex, ``|sum_k a_k g_k| |d| >= min_k g_k . d``.
    The point's size, by which `_is_stationary` measures, is at most the longest gradient.
    """
    gains = gram @ weights
    least = gains.min()
    return bool(least > 0 and least**2 > 16 * len(gram) * eps * longest**2 * (weights @ gains))


# ------------------------------------------------------------------------------------ dual cone


@_silent
def dual_cone_weights(gram: Tensor, vectors: Tensor, eps: float = 1e-14) -> Tensor:
    """Project combinations of the gradients on the cone ``{d : g_k . d >= 0 for all k}``.

    The projection of ``sum_k u_k g_k`` is ``sum_k v_k g_k`` with the v >= u of smallest
    ``v'Gv``.

    Args:
        gram: Gram matrix (K, K).
        vectors: rows u (B, K), one per point to project.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (B, K): the rows v.
    """
    if there := _elsewhere(gram):
        return there.dual_cone_weights(gram, vectors, eps)
    matrix, u = _array(gram), _array(vectors)
    return torch.from_numpy(u + _nonnegative_qp(matrix, u @ matrix, eps)).to(gram.device)


# ------------------------------------------------------------------------------ G w = w^(-1/a)


@_silent
def balanced_weights(gram: Tensor, alpha: float = 1.0, eps: float = 1e-14) -> Tensor:
    """Positive weights with ``G w = w^(-1/alpha)``, entry by entry, by damped Newton.

    With ``p = 1/alpha`` they are the minimum of the convex function

        ``1/2 w'Gw - sum_k (w_k^(1-p) - 1) / (1 - p)``        (log w_k for p = 1).

    The unknowns are scaled by ``|g_k|^(-2 alpha / (1 + alpha))``, the solution for orthogonal
    gradients, and Newton's step is taken in the relative change of each weight, so no weight can
    become negative and gradients of very different lengths are solved alike.

    Args:
        gram: Gram matrix (K, K).
        alpha: positive exponent; 1 is Nash bargaining.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,). Where the equation has no solution:

        * zero gradients get weight zero, the others are solved among themselves;
        * a single gradient, or a single one that is not zero, gets weight one: there is nothing to
          balance, and the equation would only replace its length;
        * Pareto stationary gradients (some convex combination is zero): weights with which the
          step is zero, those of the min-norm point of the unit gradients.
    """
    if there := _elsewhere(gram):
        return there.balanced_weights(gram, alpha, eps)
    return torch.from_numpy(_balanced_weights(_array(gram), alpha, eps)).to(gram.device)


def _balanced_weights(gram: Array, alpha: float, eps: float) -> Array:
    k = len(gram)
    cosine, norms, _ = _unit_diagonal(gram)
    alive = norms > 0
    if alive.sum() <= 1:
        return alive.astype(np.float64)
    zero = ~alive
    if zero.any():
        # Zero gradients become unit vectors of their own, away from all others.
        cosine = cosine + np.diag(zero)
        norms = np.where(alive, norms, 1.0)
    scale = norms ** (-2 * alpha / (1 + alpha))
    p = 1 / alpha
    system = gram * scale * scale[:, None]
    if zero.any():
        system = system + np.diag(zero)
    weights = scale * _newton(system, scale ** (1 - p), p)

    # Whatever Newton made of it, weights that descend are its solution; others are looked at.
    if not _descends(cosine, weights * norms, 1.0, eps):
        hull = _min_norm_weights(cosine, eps)
        if _is_stationary(cosine, hull, eps):
            size = (hull @ norms) ** ((1 - alpha) / (1 + alpha))
            weights = k * size * hull / norms
    return np.where(alive, weights, 0.0)


def _newton(system: Array, right: Array, p: float) -> Array:
    """Solve ``A x = r x^-p`` for x > 0, with A (K, K) and r (K,) positive."""

    def value(x: Array) -> tuple[float, float]:
        power = np.log(x) if p == 1 else np.expm1((1 - p) * np.log(x)) / (1 - p)
        return float(x @ system @ x / 2), float(right @ power)

    k = len(right)
    # The best multiple of ones.
    x = np.full(k, (right.sum() / system.sum()) ** (1 / (1 + p)))
    last = float("inf")
    for _ in range(200):
        power = right if p == 1 else right * x ** (1 - p)
        slope = x * (system @ x) - power
        hessian = system * x * x[:, None]
        hessian.reshape(k * k)[:: k + 1] += p * power
        try:
            step = -np.linalg.solve(hessian, slope)
        except np.linalg.LinAlgError:
            break
        size = float(np.abs(step).max())
        if not size < np.inf:
            break
        length = min(1.0, 0.9 / max(-float(step.min()), 1e-300))
        decrease = slope @ step
        if size > 1e-5:
            quadratic, barrier = value(x)
            # Closer in, rounding would decide the comparison, and full steps converge.
            if -decrease > 1e-8 * (quadratic + abs(barrier)):
                enough = quadratic - barrier
                while (
                    np.subtract(*value(x * (1 + length * step))) > enough + 0.1 * length * decrease
                ):
                    length /= 2
        x = x * (1 + length * step)
        # The next step would be as long as this one's square, measured by the Hessian: rounding.
        done = length == 1 and -decrease < 1e-15 * min(1.0, p * float(power.min()))
        if done or size < 1e-13 or last / 2 < size < 1e-6:
            break
        last = size
    return x


# ------------------------------------------------------------------------------ equal projections


@_silent
def equal_projection_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights, sum one, of the step whose projections on all unit gradients are equal.

    With the cosine matrix C and norms n: ``x = C^-1 1``, ``v_k = x_k / n_k``, weights
    ``v / sum_k v_k``.

    Args:
        gram: Gram matrix (K, K).
        eps: eigenvalues of C below ``K * eps`` count as zero.

    Returns:
        float64 tensor (K,), with a defined answer for every input:

        * zero gradients get weight zero, the others are solved among themselves;
        * linearly dependent gradients: the pseudo-inverse of C, which minimises
          ``sum_k (u_k . x - 1)^2`` and keeps the formula's limit for parallel gradients;
        * no such x (opposite gradients): weights proportional to ``1 / n_k``;
        * ``sum_k v_k < 0``, where the normalisation would turn the step against every task: the
          sign is kept positive and the weights sum to minus one.
    """
    if there := _elsewhere(gram):
        return there.equal_projection_weights(gram, eps)
    cosine, norms, inverse = _unit_diagonal(_array(gram))
    v = inverse  # the closed form for two tasks: x_1 = x_2 whatever the angle
    if len(norms) != 2:
        small = len(norms) * eps
        eigenvalues, vectors = np.linalg.eigh(cosine)
        # A zero gradient lies in the null space, which is left out.
        ones = vectors[norms > 0].sum(0)
        range_ = eigenvalues > small
        # Opposite gradients leave rounding error in `ones`, which is no solution: of what lies in
        # the null space, an eigenvector has the more the smaller its eigenvalue is.
        lost = small * np.sqrt((ones[~range_] ** 2).sum())
        kept = range_ & (np.abs(ones) > small + lost / np.maximum(eigenvalues, small))
        x = vectors[:, kept] @ (ones[kept] / eigenvalues[kept])
        v = x * inverse
        if abs(v.sum()) <= 1e-12 * np.abs(v).sum():
            v = inverse
    total = abs(v.sum())
    return torch.from_numpy(v / total if total > 0 else v).to(gram.device)


# ------------------------------------------------------------------------------- max-min in ball


@_silent
def max_min_weights(gram: Tensor, c: float, eps: float = 1e-14) -> Tensor:
    """Weights of the step that improves the worst task most, within a ball around the mean.

    ``max_d min_k g_k . d`` subject to ``|d - g_0| <= c |g_0|``, g_0 the mean gradient. Among all d
    with ``g_k . d >= tau`` for every k, the nearest to g_0 is ``g_0 + sum_k y_k g_k`` with the y
    of one non-negative QP; its distance grows with tau, so the answer is where the distance
    reaches ``c |g_0|``. On the set of positive y, the squared distance is a parabola in tau: set
    and root are corrected in turn until both fit. Where that cycles, the root is the next guess in
    a bracket that every guess shrinks, and each guess has a QP of its own.

    Args:
        gram: Gram matrix (K, K).
        c: radius of the ball in units of |g_0|, 0 or more.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,): ``1/K + y_k``, so that d is the weighted sum. Where gradients are
        Pareto stationary and the maximum is 0, it has many maximisers; this is the nearest one to
        g_0. For ``g_0 = 0`` or ``c = 0``: 1/K each.
    """
    return torch.from_numpy(_max_min_weights(_array(gram), c, eps))


def _max_min_weights(gram: Array, c: float, eps: float) -> Array:
    k = len(gram)
    mean = np.full(k, 1 / k)
    if c == 0 or _is_stationary(gram, mean, eps):
        return mean
    ball = _Ball(gram, c, eps)
    if ball.alive.all():  # a zero gradient is a point of the hull
        y = ball.exchange()
        weights = mean + (ball.search(ball.highest) if y is None else y)
        if _descends(gram, weights, ball.norms.max(), eps):
            return weights
    if not _is_stationary(gram, _min_norm_weights(gram, eps), eps):
        return mean + ball.search(ball.highest)
    ball.free = None  # a search for what does not exist leaves a bad guess
    y, distance = ball.nearest(0.0)
    return mean + (y if distance <= ball.radius else ball.search(0.0))


class _Ball:
    """The ball ``|d - g_0| <= c |g_0|``, and what is nearest to its centre in a cone.

    Attributes:
        radius: ``c |g_0|``.
        highest: a tau that no d of the ball exceeds with every ``g_k . d``.
    """

    def __init__(self, gram: Array, c: float, eps: float) -> None:
        self.unit, self.norms, self.inverse = _unit_diagonal(gram)
        self.alive = self.norms > 0
        self.eps = eps
        self.inner = gram.mean(1)
        self.radius: float = c * np.sqrt(self.inner.mean())
        self.lowest: float = self.inner.min()
        self.highest: float = (self.inner + self.radius * self.norms).min()
        self.free: Mask | None = None

    def nearest(self, tau: float) -> tuple[Array, float]:
        """y and its length, of the d nearest to g_0 with ``g_k . d >= tau``."""
        q = ((self.inner - tau) * self.inverse)[None]
        guess = (q < 0) & self.alive if self.free is None else self.free  # F changes little
        s, self.free = _pivot(self.unit, q, self.alive, guess, self.eps)
        return self.length(s[0])

    def exchange(self) -> Array | None:
        """y of the d on the sphere, by exchanging tasks and tau at once; None if that cycles.

        What is returned meets the optimality conditions, as the answer alone does. A few rounds
        are enough but for rare problems of many tasks.
        """
        right = np.stack([self.inverse, self.inner * self.inverse])
        free = self.alive & (self.inner < self.highest)
        for _ in range(_EXCHANGES):
            one, mean = solved = _solve_on(self.unit, -right, free[None], self.eps)
            (a, b), (_, c) = (right * free) @ solved.T
            # Where this F cannot reach the sphere: the tau at which it comes nearest.
            tau = (b + np.sqrt(np.maximum(b**2 - a * (c - self.radius**2), 0.0))) / a
            s = tau * one - mean
            q = (self.inner - tau) * self.inverse
            wrong = _violations(self.unit, q[None], s[None], free[None], self.eps)[0]
            if not wrong.any():
                y, distance = self.length(s)
                return y * (self.radius / distance) if self.close(y, distance) else None
            if not np.isfinite(tau):
                return None
            free = free ^ wrong
        return None

    def length(self, s: Array) -> tuple[Array, float]:
        """y and the length of ``sum_k y_k g_k``, from its weights in terms of unit gradients."""
        s = np.maximum(s, 0)
        return s * self.inverse, float(np.sqrt(np.maximum(s @ self.unit @ s, 0.0)))

    def close(self, y: Array, distance: float) -> bool:
        """Whether a distance is the radius, as far as there are digits."""
        # Close to a stationary point long y cancel to a short step: no more digits are left.
        lost = np.minimum(1e-16 * (y @ self.norms / self.radius) ** 2, 1e-6)
        return bool(abs(distance - self.radius) <= (1e-12 + lost) * self.radius)

    def search(self, high: float) -> Array:
        """y of the d on the sphere, where tau is below `high`."""
        low, tau = self.lowest, high
        guess = self.root(self.alive)  # right where all tasks gain alike
        if low < guess < high:
            tau = guess
            self.free = self.alive[None] if self.free is None else self.free
        for _ in range(100):
            y, distance = self.nearest(tau)
            if self.close(y, distance) or high - low <= 1e-15 * abs(high):
                break
            if distance < self.radius:
                low = tau
            else:
                high = tau
            tau = self.root(y > 0)
            if not low < tau < high:
                tau = (low + high) / 2
        return y * (self.radius / distance)

    def root(self, free: Mask) -> float:
        """Where ``{d : g_k . d = tau, k in F}`` has the radius as its distance; NaN if nowhere."""
        right = np.stack([self.inverse, self.inner * self.inverse]) * free
        solved = _solve_on(self.unit, -right, free[None], self.eps)
        (a, b), (_, c) = right @ solved.T
        # a tau^2 - 2 b tau + c = radius^2, the larger root
        return float((b + np.sqrt(b**2 - a * (c - self.radius**2))) / a)
