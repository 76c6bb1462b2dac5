"""Small exact solvers on a Gram matrix, shared by several methods.

Every problem here is one of K unknowns, K tasks, and is solved in float64 to rounding error. The
gradients have been put into a unit-diagonal matrix before anything is compared, and all thresholds
are relative, so tiny, huge and unequal gradients are solved alike.

* `nonnegative_qp`: ``min 1/2 s'As + q's`` over ``s >= 0``, for several q at once.
* `min_norm_weights`: the point of smallest norm in the convex hull of the gradients.

The number of iterations depends on the values, so on an accelerator a caller copies the Gram matrix
to the host once, which is cheaper than a wait per iteration.

This file needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PATIENCE = 3  # block exchanges without progress before single ones take over
_ROUNDING = 1e-13  # a violation below this share of the terms that make it up is rounding


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
    ridge = 4 * k * eps
    unit = unit + torch.diag((~alive).to(unit))

    free = (q < 0) & alive
    solution = torch.zeros_like(q)
    fewest = torch.full((len(q),), k + 1)
    patience = torch.full((len(q),), _PATIENCE)
    last = torch.arange(k)
    open_ = torch.arange(len(q))
    for _ in range(5 * k + 20):
        x = _solve_on(unit, q[open_], free[open_], ridge)
        wrong = _violations(unit, q[open_], x, free[open_]) & alive
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
            solution[i] = _active_set(unit, q[i], alive, ridge)
    return solution.clamp(min=0) * inverse


def _solve_on(unit: Tensor, q: Tensor, free: Tensor, ridge: float) -> Tensor:
    """Solve ``A_FF x_F = -q_F`` for each row of q (B, K) and of the masks F (B, K); zero outside.

    The ridge lets a singular A_FF be factorised; one step of refinement takes out its effect on
    everything but the null space, which the gradients do not see.
    """
    mask = free.to(unit.dtype)
    system = unit * mask[:, :, None] * mask[:, None, :]
    system = system + torch.diag_embed(1 - mask + ridge)
    factor, _ = torch.linalg.cholesky_ex(system)
    x = torch.cholesky_solve((-q * mask)[..., None], factor)[..., 0]
    residual = -(q + x @ unit) * mask
    return x + torch.cholesky_solve(residual[..., None], factor)[..., 0]


def _violations(unit: Tensor, q: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """Which unknowns break the optimality conditions by more than rounding."""
    slope = x @ unit + q
    rounding = _ROUNDING * (x.abs() @ unit.abs() + q.abs())
    negative = x < -_ROUNDING * x.abs().amax(1, keepdim=True)
    # A system that could not be solved counts as wrong throughout.
    return torch.where(free, negative, slope < -rounding) | ~x.isfinite()


def _active_set(unit: Tensor, q: Tensor, alive: Tensor, ridge: float) -> Tensor:
    """The same problem for one q (K,), by Lawson and Hanson's active set: slower, but it descends.

    Each iterate is feasible and better than the last one, so rounding cannot make it cycle.
    """
    x = torch.zeros_like(q)
    free = torch.zeros_like(alive)
    barred = ~alive
    for _ in range(20 * len(q)):
        slope = unit @ x + q
        rounding = _ROUNDING * (unit.abs() @ x + q.abs())
        wanted = ~free & ~barred & (slope < -rounding)
        if not wanted.any():
            break
        new = torch.where(wanted, slope, torch.inf).argmin()
        free[new] = True
        z = _solve_on(unit, q[None], free[None], ridge)[0]
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
            z = _solve_on(unit, q[None], free[None], ridge)[0]
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
