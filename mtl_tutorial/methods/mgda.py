"""MGDA: the common descent direction of smallest norm.

Désidéri: "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization", Comptes
Rendus Mathématique 350, 2012. Brought to deep multi-task learning, with an upper bound that needs
the gradients of the shared representation alone (MGDA-UB), by Sener, Koltun: "Multi-Task Learning
as Multi-Objective Optimization", NeurIPS 2018, arXiv:1810.04650.

    alpha = argmin |sum_k alpha_k g_k|^2   over   alpha >= 0, sum_k alpha_k = 1,
    d     = sum_k alpha_k g_k.

At the minimum ``g_k . d = |d|^2`` for the tasks with a positive weight and ``g_k . d >= |d|^2`` for
the others: d lowers every loss, unless it is zero, and then no direction does (the point is Pareto
stationary). For two tasks ``alpha_1 = (g_2 - g_1) . g_2 / |g_1 - g_2|^2``, clipped to [0, 1].

The shortest gradients dominate d. Normalisers divide every gradient by a number first.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View
from ..solvers import min_norm_weights, unit_diagonal

NORMALISERS = ("none", "l2", "loss", "loss+")


def mgda_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights alpha of the min-norm point.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        float64 tensor (K,) on the simplex. A zero gradient takes all weight, so the step is zero:
        the point is Pareto stationary.
    """
    return min_norm_weights(gram, eps)


def normaliser_sizes(gram: Tensor, normaliser: str, losses: Tensor | None = None) -> Tensor:
    """Numbers (K,) by which the gradients are divided before the min-norm point is sought.

    Args:
        gram: Gram matrix (K, K).
        normaliser: "none", one; "l2", the norms n_k; "loss", the losses L_k; "loss+", L_k n_k.
        losses: (K,), for the last two. A loss below 1e-12 of the largest counts as that much; if
            none is positive all count as one.

    Returns:
        float64 tensor (K,), positive but for the norm of a zero gradient.
    """
    sizes = torch.ones(len(gram), dtype=torch.float64, device=gram.device)
    if normaliser in ("l2", "loss+"):
        sizes = gram.double().diagonal().clamp(min=0).sqrt()
    if normaliser in ("loss", "loss+"):
        assert losses is not None
        largest = losses.max()
        positive = torch.maximum(losses.double(), 1e-12 * largest)
        sizes = sizes * torch.where(largest > 0, positive, 1.0)
    return sizes


class MGDA(Method):
    """MGDA (min-norm point); with ``features`` in `backward`, MGDA-UB.

    Args:
        normaliser: "none" (default, the paper's formula), "l2", "loss" or "loss+", which are in
            the official code alone. The last two need losses.
        combine: "normalised" (default) or "raw": which gradients the weights found for normalised
            gradients are applied to. Without normaliser the two are one.
        head_gradients: "weighted" (default, as the official code, which differentiates the
            weighted loss) or "raw".

    The weights sum to one.

    Where the official code (isl-org/MultiObjectiveOptimization) differs, and what is done here:

    * It stops after at most 250 Frank-Wolfe or gradient steps, cuts weights of a vertex to
      .999/.001, and never counts its iterations, so it can loop for ever. Here: an exact solver.
    * It applies the weights found for normalised gradients to the raw losses, which gives up
      common descent (and with "l2" and two tasks is equal weighting). Here: ``combine="raw"``;
      the default combines the normalised gradients, with factors scaled to sum one.

    A zero gradient, opposite gradients, or any hull that contains zero: the step is zero.
    """

    name = "mgda"
    title = "MGDA"
    paper = "Désidéri, C. R. Math. 2012; Sener and Koltun, NeurIPS 2018"
    year = 2018
    sees = "gram"

    def __init__(
        self,
        normaliser: str = "none",
        combine: str = "normalised",
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if normaliser not in NORMALISERS:
            raise ValueError(
                f"mgda: expected normaliser {', '.join(NORMALISERS)}, got {normaliser!r}"
            )
        if combine not in ("normalised", "raw"):
            raise ValueError(f"mgda: expected combine 'normalised' or 'raw', got {combine!r}")
        self.normaliser = normaliser
        self.combine = combine

    def _rule(self, view: View) -> Tensor:
        gram = view.gram
        if self.normaliser == "none":
            return mgda_weights(gram, view.eps)
        losses = view.losses if "loss" in self.normaliser else None
        sizes = normaliser_sizes(gram, self.normaliser, losses)
        if self.normaliser == "l2":
            scaled = unit_diagonal(gram)[0]  # exact where the norms are tiny
        else:
            inverse = torch.where(sizes > 0, 1 / torch.where(sizes > 0, sizes, 1.0), 0.0)
            scaled = gram * inverse * inverse[:, None]
        alpha = mgda_weights(scaled, view.eps)
        if self.combine == "normalised":
            # A zero gradient, of size zero, keeps the weight that makes the step zero.
            alpha = alpha / torch.where(sizes > 0, sizes, 1.0)
            alpha = alpha / alpha.sum()
        return alpha
