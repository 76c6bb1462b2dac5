"""The solvers of `mtl_tutorial.solvers` for an accelerator: no value is ever read on the host.

Same problems, same answers, other means: whether to go on cannot be asked, so every loop has a
fixed number of rounds, and what depends on values is chosen by masks. Each number stands below with
its reason; where it rests on experience, `tests/methods/test_device_solvers.py` counts again.
Eigenvalues are not computed, since `torch.linalg.eigh` looks on the host whether it succeeded;
projectors and roots come from Cholesky factors and products of matrices.

On the host the other module is faster: it stops when it is done.

This file needs torch and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .solvers import unit_diagonal

# Block pivoting ends within 12 rounds on nearly all problems of independent gradients.
PIVOTS = 12
_PATIENCE = 3  # block exchanges without progress before single ones take over
# Where it does not, an interior point method shrinks s'y to 1e-14 in 8 to 20 rounds, whatever K.
INTERIOR = 24
# Newton's method took up to 16 rounds for alpha = 1, 27 between 0.3 and 5.
NEWTON = 32
_LENGTHS = 10  # lengths tried at once in a round of Newton's method, each half the one before
# p -> 3 p^2 - 2 p^3 takes 1/3, where zero starts, to 1e-17 in 9 rounds; 30 do so for all that does
# not lie within 1e-4 of 1/2.
PURIFICATIONS = 30
# The smallest singular value starts at 1e-8 or more, grows by 1.5 in a round, which takes 45 of
# them, and from there on the number of digits doubles.
POLAR = 50
# Eigenvalues raised to the power 8^12 = 7e10: what is weighed beside the largest one differs from
# it by less than 2e-11.
EIGHTH_POWERS = 12


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """``L L' x = r`` for a Cholesky factor L (..., K, K) and r (..., K, M)."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, zero for zero."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0)


# ------------------------------------------------------------------------------ non-negative QP


def nonnegative_qp(matrix: Tensor, linear: Tensor, eps: float = 1e-14) -> Tensor:
    """`solvers.nonnegative_qp`."""
    unit, norms = unit_diagonal(matrix)
    inverse = _inverse(norms)
    return _pivot(unit, linear.double() * inverse, norms > 0, eps) * inverse


def _pivot(unit: Tensor, q: Tensor, alive: Tensor, eps: float) -> Tensor:
    """`nonnegative_qp` for a unit diagonal; what pivoting has not solved, `_interior` does."""
    k = unit.shape[-1]
    unit = unit + (~alive).double().diag()
    free = (q < 0) & alive
    places = torch.arange(1, k + 1, device=q.device)
    fewest = torch.full_like(q[:, 0], k + 1)
    patience = torch.full_like(fewest, _PATIENCE)
    x, wrong = q, free
    for _ in range(PIVOTS):
        x = _solve_on(unit, q, free, eps)
        wrong = _violations(unit, q, x, free, eps) & alive  # none: x and F stay what they are
        count = wrong.sum(1)
        better = count < fewest
        patience = torch.where(better, _PATIENCE, patience - 1)
        fewest = torch.where(better, count, fewest)
        last = (wrong * places).amax(1, keepdim=True)
        free = free ^ (wrong & ((patience >= 0)[:, None] | (places == last)))
    x = torch.where(wrong.any(1, keepdim=True), _interior(unit, q, alive, eps), x)
    return x.clamp(min=0)


def _interior(unit: Tensor, q: Tensor, alive: Tensor, eps: float) -> Tensor:
    """The same by Mehrotra's predictor and corrector, finished on the face where it ends.

    With slacks y = A s + q, s'y falls to zero. The ridge keeps the problem strictly convex where
    rounding has made A indefinite. Where the face is not the right one, the answer is the point
    before that, which is right to about 1e-8.
    """

    def longest(x: Tensor, step: Tensor) -> Tensor:
        """How far x can go along a step and stay positive (B, 1)."""
        shrinks = step < 0
        return torch.where(shrinks, x / torch.where(shrinks, -step, 1.0), torch.inf).amin(
            1, keepdim=True
        )

    size = q.abs().amax(1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    q = torch.where(alive, q / size, 1.0)  # 1 keeps an unknown without gradient at zero
    ridged = unit + 4 * unit.shape[-1] * eps * _eye(unit)
    s = torch.ones_like(q)
    y = (s @ ridged + q).clamp(min=1)
    for _ in range(INTERIOR):
        residual = s @ ridged + q - y
        gap = (s * y).mean(1, keepdim=True)
        factor, _ = torch.linalg.cholesky_ex(ridged + torch.diag_embed(y / s))
        ds = _solve(factor, -(residual + y)[..., None])[..., 0]
        dy = ds @ ridged + residual
        length = torch.minimum(longest(s, ds), longest(y, dy)).clamp(max=1)
        ahead = ((s + length * ds) * (y + length * dy)).mean(1, keepdim=True)
        centre = (gap * (ahead / gap) ** 3 - ds * dy) / s
        ds = _solve(factor, (centre - residual - y)[..., None])[..., 0]
        dy = ds @ ridged + residual
        length = (0.99 * torch.minimum(longest(s, ds), longest(y, dy))).clamp(max=1)
        next_s, next_y = s + length * ds, y + length * dy
        # Past its end the systems become singular.
        going = (gap > 1e-14) & (next_s.isfinite() & next_y.isfinite()).all(1, keepdim=True)
        s, y = torch.where(going, next_s, s), torch.where(going, next_y, y)
    free = (s > y) & alive
    x = torch.where(free, s, 0.0)
    for _ in range(3):
        x = x + _solve_on(unit, q + x @ unit, free, eps)
    # Gradients that depend on each other make it hard to tell the face.
    missed = (_violations(unit, q, x, free, eps) & alive).any(1, keepdim=True)
    return torch.where(missed, s * alive, x) * size


def _solve_on(unit: Tensor, q: Tensor, free: Tensor, eps: float) -> Tensor:
    """``A_FF x_F = -q_F`` for each row of q (B, K) and of F (B, K), with `solvers`' ridge."""
    mask = free.double()
    system = unit * (mask[:, :, None] * mask[:, None, :])
    system = system + torch.diag_embed(1 - mask + 4 * unit.shape[-1] * eps)
    factor, _ = torch.linalg.cholesky_ex(system)
    x = _solve(factor, (-q * mask)[..., None])[..., 0]
    return x + _solve(factor, (-(q + x @ unit) * mask)[..., None])[..., 0]


def _violations(unit: Tensor, q: Tensor, x: Tensor, free: Tensor, eps: float) -> Tensor:
    """Which unknowns break the optimality conditions by more than rounding."""
    size = x.abs()
    slope = x @ unit + q
    rounding = 10 * eps * (size @ unit.abs() + q.abs())
    negative = x < -10 * eps * size.amax(1, keepdim=True)
    return torch.where(free, negative, slope < -rounding) | ~x.isfinite()


def min_norm_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """`solvers.min_norm_weights`."""
    gram = gram.double()
    smallest = gram.diagonal().amin()
    weights = nonnegative_qp(gram + smallest, gram.new_full((1, len(gram)), -1.0), eps)[0]
    zero = (gram.diagonal() <= 0).double()
    weights = torch.where(smallest > 0, weights, zero)
    return weights / weights.sum()


def dual_cone_weights(gram: Tensor, vectors: Tensor, eps: float = 1e-14) -> Tensor:
    """`solvers.dual_cone_weights`."""
    gram, vectors = gram.double(), vectors.double()
    return vectors + nonnegative_qp(gram, vectors @ gram, eps)


# ------------------------------------------------------------------------------ G w = w^(-1/a)


def balanced_weights(gram: Tensor, alpha: float = 1.0, eps: float = 1e-14) -> Tensor:
    """`solvers.balanced_weights`."""
    gram = gram.double()
    k = len(gram)
    cosine, norms = unit_diagonal(gram)
    alive = norms > 0
    zero = (~alive).double().diag()
    # Zero gradients become unit vectors of their own, away from all others.
    cosine = cosine + zero
    norms = torch.where(alive, norms, 1.0)
    scale = norms ** (-2 * alpha / (1 + alpha))
    p = 1 / alpha
    system = gram * scale * scale[:, None] + zero
    weights = scale * _newton(system, scale ** (1 - p), p)

    # The min-norm point of the unit gradients, and whether it is zero within rounding; weights
    # that descend prove that it is not.
    hull = min_norm_weights(cosine, eps)
    stationary = hull @ cosine @ hull <= 4 * k * eps * hull.sum() ** 2
    gains = cosine @ (weights * norms)
    least = gains.amin()
    descends = (least > 0) & (least**2 > 16 * k * eps * ((weights * norms) @ gains))
    size = (hull @ norms) ** ((1 - alpha) / (1 + alpha))
    weights = torch.where(stationary & ~descends, k * size * hull / norms, weights)
    weights = torch.where(alive.sum() <= 1, 1.0, weights)
    return torch.where(alive, weights, 0.0)


def _newton(system: Tensor, right: Tensor, p: float) -> Tensor:
    """Solve ``A x = r x^-p`` for x > 0, with A (K, K) and r (K,) positive."""

    def values(x: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of the function at the rows of x (..., K)."""
        power = x.log() if p == 1 else torch.expm1((1 - p) * x.log()) / (1 - p)
        return ((x @ system) * x).sum(-1) / 2, power @ right

    halves = 0.5 ** torch.arange(_LENGTHS, dtype=torch.float64, device=right.device)
    # The best multiple of ones.
    x = ((right.sum() / system.sum()) ** (1 / (1 + p))).expand(len(right))
    for _ in range(NEWTON):
        power = right if p == 1 else right * x ** (1 - p)
        slope = x * (system @ x) - power
        hessian = system * x * x[:, None] + (p * power).diag()
        factor, _ = torch.linalg.cholesky_ex(hessian)
        step = -_solve(factor, slope[:, None])[:, 0]
        decrease = slope @ step
        first = (0.9 / (-step.amin()).clamp(min=0.9)).clamp(max=1)
        lengths = first * halves
        quadratic, barrier = values(x)
        near, beside = values(x * (1 + lengths[:, None] * step))
        enough = near - beside <= quadratic - barrier + 0.1 * lengths * decrease
        length = torch.where(enough, lengths, lengths[-1]).amax()
        # Closer in, rounding would decide the comparison, and full steps converge.
        far = (step.abs().amax() > 1e-5) & (-decrease > 1e-8 * (quadratic + barrier.abs()))
        moved = x * (1 + torch.where(far, length, first) * step)
        x = torch.where(moved.isfinite().all(), moved, x)
    return x


# ------------------------------------------------------------------------------ eigenvalues


def _kept(matrix: Tensor, floor: Tensor | float) -> Tensor:
    """Projector (K, K) on the eigenvectors whose eigenvalues are above `floor`, a positive number.

    ``I - 2 f (A + 3 f I)^-1`` has the eigenvalue 1/2 where A has f, more above and less below.
    """
    eye = _eye(matrix)
    factor, _ = torch.linalg.cholesky_ex(matrix + 3 * floor * eye)
    p = eye - 2 * floor * _solve(factor, eye)
    p = (p + p.T) / 2
    for _ in range(PURIFICATIONS):
        squared = p @ p
        p = torch.addmm(squared, squared, p, beta=3, alpha=-2)
    return p


def pseudo_solve(matrix: Tensor, right: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """``A^+ b``, with eigenvalues of A up to `floor` counted as zero, and b's part in the range.

    Args:
        matrix: symmetric positive semi-definite A (K, K), of entries around one.
        right: b (K,).
        floor: positive number.
    """
    kept = _kept(matrix, floor)
    factor, _ = torch.linalg.cholesky_ex(matrix + (_eye(matrix) - kept))
    reached = kept @ right
    return kept @ _solve(factor, reached[:, None])[:, 0], reached


def equal_projection_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """`solvers.equal_projection_weights`."""
    cosine, norms = unit_diagonal(gram)
    inverse = _inverse(norms)
    v = inverse  # the closed form for two tasks: x_1 = x_2 whatever the angle
    small = len(norms) * eps
    if len(norms) != 2:
        x, reached = pseudo_solve(cosine, torch.ones_like(norms), small)
        v = x * inverse
        # Opposite gradients leave rounding error, which is no solution: of what lies in the null
        # space, the more the smaller the eigenvalues are by which x was divided.
        lost = small * ((1 - reached) * (norms > 0)).norm()
        divisor = (x @ reached) / (x @ x)
        error = small + torch.where(divisor > 0, lost / divisor, 0.0)
        none = (reached.norm() <= error) | (v.sum().abs() <= 1e-12 * v.abs().sum())
        v = torch.where(none, inverse, v)
    total = v.sum().abs()
    return v / torch.where(total > 0, total, 1.0)


def _largest(matrix: Tensor) -> Tensor:
    """Largest eigenvalue of a positive semi-definite matrix (K, K) that is not zero."""
    power = matrix / matrix.trace()
    for _ in range(EIGHTH_POWERS):
        power = torch.linalg.matrix_power(power, 8)
        power = power / power.trace()
    return (matrix * power).sum()


def balance_matrix(gram: Tensor, scale: str, eps: float) -> Tensor:
    """`methods.aligned_mtl.balance_matrix` for the scales "min" and "rmse".

    ``A = L L'``, and L has the polar factor U: then ``A^(-1/2) = U L^-1``.
    """
    trace = gram.diagonal().sum()
    some = trace > 0
    gram = gram / torch.where(some, trace, 1.0)
    eye = _eye(gram)
    kept = _kept(gram, torch.where(some, len(gram) * eps * _largest(gram), 1.0))
    # What was dropped becomes an eigenvalue that is not the smallest.
    factor, _ = torch.linalg.cholesky_ex(gram + (eye - kept))
    polar = factor / factor.norm()
    for _ in range(POLAR):
        polar = torch.addmm(polar, polar, polar.T @ polar, beta=1.5, alpha=-0.5)
    root = torch.linalg.solve_triangular(factor, polar, upper=False, left=False)
    if scale == "min":
        common = 1 / _largest(_solve(factor, eye))
    else:
        common = (gram * kept).sum() / kept.trace().clamp(min=1)
    return common.clamp(min=0).sqrt() * (kept @ root @ kept)
