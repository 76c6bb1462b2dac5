"""FairGrad: alpha-fair division of the step between the tasks.

Ban, Ji: "Fair Resource Allocation in Multi-Task Learning", ICML 2024, arXiv:2402.15638.

The progress ``g_k . d`` of each task counts as a resource that d divides, and d maximises the sum
of its alpha-fair utilities ``x^(1 - alpha) / (1 - alpha)`` (``log x`` for alpha = 1). The step is
``d = sum_k w_k g_k`` with

    G w = w^(-1/alpha),   w > 0, entry by entry,

the minimum of the convex ``1/2 w'Gw - sum_k w_k^(1 - 1/alpha) / (1 - 1/alpha)``. alpha = 1 is
Nash-MTL, alpha -> infinity max-min fairness. For alpha -> 0 the weights tend to one where their
plain sum hurts no task, which is linear scalarisation; where it does, to K times DualProj's.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

from torch import Tensor

from ..gradients import Method, View
from ..solvers import balanced_weights


def fairgrad_weights(gram: Tensor, alpha: float = 2.0, eps: float = 1e-14) -> Tensor:
    """Weights w of FairGrad.

    Args:
        gram: Gram matrix (K, K).
        alpha: fairness, positive.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,), positive but for the guards of `solvers.balanced_weights`: zero
        gradients get weight zero, a single gradient weight one, and at a Pareto stationary point
        the step is zero.
    """
    return balanced_weights(gram, alpha, eps)


class FairGrad(Method):
    """FairGrad.

    Args:
        alpha: fairness, positive; 2 (default) is what all official runs use.
        head_gradients: "raw" (default, as in the official code) or "weighted".

    The length of d is the paper's own and not that of the gradients: scaling J by s scales d by
    ``s^((1 - alpha) / (1 + alpha))``.

    Where the official code (OptMN-Lab/fairgrad) differs, and what is done here:

    * It solves by nonlinear least squares from w = 1/K, which stays far from the solution for
      small gradients. Here: damped Newton on scaled unknowns, at every scale.
    * It multiplies d by K and its trainer clips the shared gradients to norm one. Here: neither.
    * A single gradient, whose length the formula would change, keeps its own length.
    """

    name = "fairgrad"
    title = "FairGrad"
    paper = "Ban and Ji, ICML 2024"
    year = 2024
    sees = "gram"
    properties = frozenset({"permutation", "rotation"})  # d scales by a power of the gradients'

    def __init__(self, alpha: float = 2.0, *, head_gradients: str = "raw") -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 < alpha < float("inf"):
            raise ValueError(f"fairgrad: expected a finite alpha > 0, got {alpha}")
        self.alpha = alpha

    def _rule(self, view: View) -> Tensor:
        return fairgrad_weights(view.gram, self.alpha, view.eps)
