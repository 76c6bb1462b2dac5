"""UPGrad: every gradient projected on the cone of steps that increase no loss, then averaged.

Quinton, Rey: "Jacobian Descent for Multi-Objective Optimization", 2024, arXiv:2406.16232.

With the dual cone ``{x : g_k . x >= 0 for all k}`` and pi the projection on it,

    d = 1/K sum_k pi(g_k).

In weights: ``pi(g_k) = sum_j v_j g_j`` with ``v = argmin v'Gv`` over ``v >= e_k``, the k-th unit
vector. The cone is convex, so d lies in it: ``g_k . d >= 0`` for every task. Without conflict
nothing is projected and d is the mean gradient.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View
from ..solvers import dual_cone_weights


def upgrad_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights of UPGrad.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        float64 tensor (K,), each at least 1/K. A zero gradient counts as a task whose projection
        is zero, so the step is the mean over all K. Opposite gradients project on zero.
    """
    gram = gram.double()
    return dual_cone_weights(
        gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), eps
    ).mean(0)


class UPGrad(Method):
    """UPGrad: mean of the projected gradients.

    Args:
        head_gradients: "raw" (default, as in the authors' library) or "weighted".

    The weights are the paper's own: 1/K each without conflict, more with it.

    Where the authors' library (TorchJD) differs, and what is done here:

    * It adds 1e-4 to the diagonal of the trace-normalised Gram matrix, and takes one of trace
      below 1e-4 for zero, so very unequal gradients keep conflicts and tiny ones are averaged.
      Here: no such constant; the projection is exact at every scale.
    """

    name = "upgrad"
    title = "UPGrad"
    paper = "Quinton and Rey, 2024"
    year = 2024
    sees = "gram"

    def __init__(self, *, head_gradients: str = "raw") -> None:
        super().__init__(head_gradients=head_gradients)

    def _rule(self, view: View) -> Tensor:
        return upgrad_weights(view.gram, view.eps)
