"""Small exact solvers on a Gram matrix, shared by several methods.

Every problem here is one of K unknowns, K tasks, and is solved in float64 to rounding error. The
gradients have been put into a unit-diagonal matrix before anything is compared, and all thresholds
are relative, so tiny, huge and unequal gradients are solved alike.

* `nonnegative_qp`: ``min 1/2 s'As + q's`` over ``s >= 0``, for several q at once.
* `min_norm_weights`: the point of smallest norm in the convex hull of the gradients.
* `dual_cone_weights`: projections on the cone of steps that increase no loss.
* `balanced_weights`: ``G w = w^(-1/alpha)``, Nash bargaining for alpha = 1.
* `max_min_weights`: the step in a ball around the mean gradient that helps the worst task most.

The number of iterations depends on the values, so on an accelerator a caller copies the Gram matrix
to the host once, which is cheaper than a wait per iteration.

This file needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PATIENCE = 3  # block exchanges without progress before single ones take over


def unit_diagonal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine matrix and norms of the rows behind a Gram matrix.

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
    unit, norms = unit_diagonal(matrix)
    alive = norms > 0
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1.0), 0.0)
    q = linear.double() * inverse
    k = len(unit)
    unit = unit + torch.diag((~alive).to(unit))

    free = (q < 0) & alive
    solution = torch.zeros_like(q)
    fewest = torch.full((len(q),), k + 1)
    patience = torch.full((len(q),), _PATIENCE)
    last = torch.arange(k)
    open_ = torch.arange(len(q))
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
        patience[open_] = torch.where(better, _PATIENCE, patience[open_] - 1)
        fewest[open_] = torch.where(better, count, fewest[open_])
        # The finite rule of last resort exchanges the last unknown that is wrong.
        single = wrong & (last == (wrong * (last + 1)).amax(1, keepdim=True) - 1)
        free[open_] ^= torch.where((patience[open_] >= 0)[:, None], wrong, single)
    else:
        for i in open_.tolist():
            solution[i] = _active_set(unit, q[i], alive, eps)
    return solution.clamp(min=0) * inverse


def _solve_on(unit: Tensor, q: Tensor, free: Tensor, eps: float) -> Tensor:
    """Solve ``A_FF x_F = -q_F`` for each row of q (B, K) and of the masks F (B, K); zero outside.

    The ridge lets a singular A_FF be factorised; one step of refinement takes out its effect on
    everything but the null space, which the gradients do not see.
    """
    mask = free.to(unit.dtype)
    system = unit * mask[:, :, None] * mask[:, None, :]
    system = system + torch.diag_embed(1 - mask + 4 * len(unit) * eps)
    factor, _ = torch.linalg.cholesky_ex(system)
    x = torch.cholesky_solve((-q * mask)[..., None], factor)[..., 0]
    residual = -(q + x @ unit) * mask
    return x + torch.cholesky_solve(residual[..., None], factor)[..., 0]


def _violations(unit: Tensor, q: Tensor, x: Tensor, free: Tensor, eps: float) -> Tensor:
    """Which unknowns break the optimality conditions by more than rounding."""
    slope = x @ unit + q
    rounding = 10 * eps * (x.abs() @ unit.abs() + q.abs())
    negative = x < -10 * eps * x.abs().amax(1, keepdim=True)
    # A system that could not be solved counts as wrong throughout.
    return torch.where(free, negative, slope < -rounding) | ~x.isfinite()


def _active_set(unit: Tensor, q: Tensor, alive: Tensor, eps: float) -> Tensor:
    """The same problem for one q (K,), by Lawson and Hanson's active set: slower, but it descends.

    Each iterate is feasible and better than the last one, so rounding cannot make it cycle.
    """
    x = torch.zeros_like(q)
    free = torch.zeros_like(alive)
    barred = ~alive
    for _ in range(20 * len(q)):
        slope = unit @ x + q
        rounding = 10 * eps * (unit.abs() @ x + q.abs())
        wanted = ~free & ~barred & (slope < -rounding)
        if not wanted.any():
            break
        new = torch.where(wanted, slope, torch.inf).argmin()
        free[new] = True
        z = _solve_on(unit, q[None], free[None], eps)[0]
        if not z[new] > 0:  # no descent along it but for rounding
            free[new] = False
            barred[new] = True
            continue
        while (z[free] <= 0).any():
            blocking = free & (z <= 0)
            ratio = torch.where(blocking, x / torch.where(blocking, x - z, 1.0), torch.inf)
            x = x + ratio.min() * (z - x)
            free = free & ~(blocking & (ratio <= ratio.min()))
            x = torch.where(free, x, 0.0)
            z = _solve_on(unit, q[None], free[None], eps)[0]
        x = z
        barred = ~alive
    return x


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
    gram = gram.double()
    smallest = gram.diagonal().amin()
    if not smallest > 0:
        zero = (gram.diagonal() <= 0).double()
        return zero / zero.sum()
    ones = torch.ones_like(gram[:1])
    # The squared norm sought lies in [0, smallest], so t = smallest keeps all digits of both.
    weights = nonnegative_qp(gram + smallest, -ones, eps)[0]
    return weights / weights.sum()


def is_stationary(gram: Tensor, weights: Tensor, eps: float = 1e-14) -> bool:
    """Whether ``sum_k w_k g_k`` is zero within the rounding error of the Gram matrix.

    Args:
        gram: Gram matrix (K, K).
        weights: w (K,), non-negative.
        eps: relative rounding error of the entries of `gram`.
    """
    gram = gram.double()
    size = weights @ gram.diagonal().clamp(min=0).sqrt()
    return bool(weights @ gram @ weights <= 4 * len(gram) * eps * size**2)


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
    gram = gram.double()
    vectors = vectors.double()
    return vectors + nonnegative_qp(gram, vectors @ gram, eps)


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
    gram = gram.double()
    k = len(gram)
    cosine, norms = unit_diagonal(gram)
    alive = norms > 0
    if alive.sum() <= 1:
        return alive.double()
    # Zero gradients become unit vectors of their own, away from all others.
    cosine = cosine + torch.diag((~alive).to(cosine))
    norms = torch.where(alive, norms, 1.0)
    scale = norms ** (-2 * alpha / (1 + alpha))

    hull = min_norm_weights(cosine, eps)
    if is_stationary(cosine, hull, eps):
        size = (hull @ norms) ** ((1 - alpha) / (1 + alpha))
        return torch.where(alive, k * size * hull / norms, 0.0)

    p = 1 / alpha
    system = gram * scale * scale[:, None] + torch.diag((~alive).to(cosine))
    return torch.where(alive, scale * _newton(system, scale ** (1 - p), p), 0.0)


def _newton(system: Tensor, right: Tensor, p: float) -> Tensor:
    """Solve ``A x = r x^-p`` for x > 0, with A (K, K) and r (K,) positive."""

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        power = x.log() if p == 1 else torch.expm1((1 - p) * x.log()) / (1 - p)
        return x @ system @ x / 2, right @ power

    # The best multiple of ones.
    x = torch.ones_like(right) * (right.sum() / system.sum()) ** (1 / (1 + p))
    last = float("inf")
    for _ in range(200):
        power = right * x ** (1 - p)
        slope = x * (system @ x) - power
        hessian = system * x * x[:, None] + torch.diag(p * power)
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
        size = step.abs().max().item()
        length = min(1.0, 0.9 / max(-step.min().item(), 1e-300))
        quadratic, barrier = terms(x)
        decrease = slope @ step
        # Closer in, rounding would decide the comparison, and full steps converge.
        if -decrease > 1e-8 * (quadratic + barrier.abs()):
            enough = quadratic - barrier
            while torch.sub(*terms(x * (1 + length * step))) > enough + 0.1 * length * decrease:
                length /= 2
        x = x * (1 + length * step)
        if size < 1e-13 or last / 2 < size < 1e-6:
            break
        last = size
    return x


def max_min_weights(gram: Tensor, c: float, eps: float = 1e-14) -> Tensor:
    """Weights of the step that improves the worst task most, within a ball around the mean.

    ``max_d min_k g_k . d`` subject to ``|d - g_0| <= c |g_0|``, g_0 the mean gradient. Among all d
    with ``g_k . d >= tau`` for every k, the nearest to g_0 is ``g_0 + sum_k y_k g_k`` with the y
    of one non-negative QP; its distance grows with tau, so the answer is where the distance
    reaches ``c |g_0|``. On the set of positive y, the squared distance is a parabola in tau: its
    root is the next guess, kept in a bracket that every guess shrinks.

    Args:
        gram: Gram matrix (K, K).
        c: radius of the ball in units of |g_0|, 0 or more.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,): ``1/K + y_k``, so that d is the weighted sum. Where gradients are
        Pareto stationary and the maximum is 0, it has many maximisers; this is the nearest one to
        g_0. For ``g_0 = 0`` or ``c = 0``: 1/K each.
    """
    gram = gram.double()
    k = len(gram)
    mean = torch.full((k,), 1 / k, dtype=torch.float64, device=gram.device)
    if c == 0 or is_stationary(gram, mean, eps):
        return mean
    inner = gram @ mean
    radius = c * (mean @ inner).sqrt()
    norms = gram.diagonal().clamp(min=0).sqrt()

    def nearest(tau: Tensor) -> tuple[Tensor, Tensor]:
        y = nonnegative_qp(gram, (inner - tau)[None], eps)[0]
        return y, (y @ gram @ y).clamp(min=0).sqrt()

    low, high = inner.min(), (inner + radius * norms).min()
    if is_stationary(gram, min_norm_weights(gram, eps), eps):
        high = torch.zeros_like(high)
        y, distance = nearest(high)
        if distance <= radius:
            return mean + y
    tau = high
    for _ in range(100):
        y, distance = nearest(tau)
        # Close to a stationary point long y cancel to a short step: no more digits are left then.
        rounding = 1e-12 + (1e-16 * (y @ norms / radius) ** 2).clamp(max=1e-6)
        if (distance - radius).abs() <= rounding * radius or high - low <= 1e-15 * high.abs():
            break
        if distance < radius:
            low = tau
        else:
            high = tau
        tau = _root_on(gram, inner, y > 0, radius, eps)
        if not low < tau < high:
            tau = (low + high) / 2
    return mean + y * radius / distance


def _root_on(gram: Tensor, inner: Tensor, free: Tensor, radius: Tensor, eps: float) -> Tensor:
    """Where the distance to ``{d : g_k . d = tau, k in F}`` reaches the radius; NaN if nowhere."""
    unit, norms = unit_diagonal(gram[free][:, free])
    right = torch.stack([torch.ones_like(norms), inner[free]]) / norms
    every = torch.ones_like(right, dtype=torch.bool)
    solved = _solve_on(unit, -right, every, eps)
    a, b, c = right[0] @ solved[0], right[0] @ solved[1], right[1] @ solved[1]
    # a tau^2 - 2 b tau + c = radius^2, the larger root
    return (b + (b**2 - a * (c - radius**2)).sqrt()) / a
