"""How much tasks conflict, how unequal they are, how far a common descent direction is away.

Pure functions of a Gram matrix ``G = J J^T`` (K, K) of K task gradients, or of weights (K,). They
cost a few K x K operations, so they can be taken at every step; `Info.gram` and `Info.weights` of a
step are what goes in. Everything is computed in float64, nothing is ever NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .solvers import min_norm_weights, unit_diagonal


def cosine_matrix(gram: Tensor) -> Tensor:
    """Cosines between the task gradients.

    Args:
        gram: Gram matrix (K, K).

    Returns:
        float64 tensor (K, K) with entries in [-1, 1]; zero in the row and column of a gradient that
        is zero, its diagonal entry included.
    """
    return unit_diagonal(gram)[0]


def conflict_share(gram: Tensor) -> Tensor:
    """Share of the K (K - 1) / 2 pairs of tasks whose gradients have a negative inner product.

    Args:
        gram: Gram matrix (K, K).

    Returns:
        0-dimensional float64 tensor in [0, 1]; 0 for a single task.
    """
    k = len(gram)
    pairs = max(k * (k - 1) // 2, 1)
    return (gram < 0).triu(1).sum().double() / pairs


def norm_ratio(gram: Tensor) -> Tensor:
    """Largest gradient norm over the smallest.

    Args:
        gram: Gram matrix (K, K).

    Returns:
        0-dimensional float64 tensor, at least 1: infinity where some but not all gradients are
        zero, 1 where all are.
    """
    norms = gram.diagonal().double().clamp(min=0).sqrt()
    smallest, largest = norms.aminmax()
    return torch.where(largest > 0, largest / smallest, 1.0)


def condition_number(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Condition number of the Jacobian: its largest singular value over its smallest.

    One where the gradients are orthogonal and of equal length; both conflict (or agreement) and
    unequal lengths raise it.

    Args:
        gram: Gram matrix (K, K).
        eps: an eigenvalue of `gram` below ``K * eps * largest`` counts as zero.

    Returns:
        0-dimensional float64 tensor, at least 1: infinity for linearly dependent gradients.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    full = smallest > len(gram) * eps * largest
    return torch.where(full, (largest / smallest.clamp(min=0)).clamp(min=1).sqrt(), torch.inf)


def effective_rank(gram: Tensor) -> Tensor:
    """Number of directions that the gradients really use.

    The exponential of the entropy of the eigenvalues of `gram`, divided by their sum: the
    definition of Roy and Vetterli (EUSIPCO 2007), with squared singular values in place of
    singular values.

    Args:
        gram: Gram matrix (K, K).

    Returns:
        0-dimensional float64 tensor: 0 for no gradient at all, 1 for parallel gradients, K for
        orthogonal ones of equal length.
    """
    eigenvalues = torch.linalg.eigvalsh(gram.double()).clamp(min=0)
    return torch.where(eigenvalues.sum() > 0, _entropy(eigenvalues).exp(), 0.0)


def weight_entropy(weights: Tensor) -> Tensor:
    """Entropy of the absolute weights, divided by their sum.

    Args:
        weights: (K,), of any sign.

    Returns:
        0-dimensional float64 tensor in nats: log K for equal weights, 0 where one task (or none)
        has all.
    """
    return _entropy(weights.double().abs())


def stationarity_gap(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Distance to Pareto stationarity: the norm of the min-norm point of the gradients' hull.

    Zero where no direction decreases all losses to first order; otherwise MGDA's step has this
    length. On an accelerator this waits for the device.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        0-dimensional float64 tensor, in units of a gradient norm. Its resolution is
        ``sqrt(eps)`` of the norms: the Gram matrix holds squares.
    """
    host = gram.detach().double().cpu()
    weights = min_norm_weights(host, eps)
    return (weights @ host @ weights).clamp(min=0).sqrt().to(gram.device)


def _entropy(masses: Tensor) -> Tensor:
    """Entropy of non-negative masses divided by their sum; 0 where there are none."""
    total = masses.sum()
    shares = masses / torch.where(total > 0, total, 1.0)
    return -torch.special.xlogy(shares, shares).sum().clamp(max=0)
