"""DualProj: the mean gradient, projected on the cone of steps that increase no loss.

Lopez-Paz, Ranzato: "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
arXiv:1706.08840, project the gradient of a new task so that it increases no loss of an earlier
one. With the mean gradient g_0 in its place this is the baseline "DualProj" of Quinton, Rey:
"Jacobian Descent for Multi-Objective Optimization", 2024, arXiv:2406.16232:

    d = pi(g_0),    pi the projection on {x : g_k . x >= 0 for all k}.

In weights: ``d = sum_k v_k g_k`` with ``v = argmin v'Gv`` over ``v_k >= 1/K``. Optimality reads
``v - 1/K >= 0``, ``G v >= 0``, and of the two one is zero for every task: only tasks that d would
otherwise hurt gain weight.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View
from ..solvers import dual_cone_weights


def dualproj_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights of DualProj.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        float64 tensor (K,), each at least 1/K. Zero gradients keep 1/K, which has no effect.
        Opposite gradients: the step is zero along them.
    """
    mean = gram.new_full((1, len(gram)), 1 / len(gram), dtype=torch.float64)
    return dual_cone_weights(gram, mean, eps)[0]


class DualProj(Method):
    """DualProj: projected mean gradient.

    Args:
        head_gradients: "raw" (default) or "weighted".

    The weights are 1/K each where no task conflicts with the mean gradient, more otherwise.

    Deviation: TorchJD adds 1e-4 to the diagonal of the trace-normalised Gram matrix, so its step
    can increase losses. Here: none is added, the projection is exact at every scale.
    """

    name = "dualproj"
    title = "DualProj"
    paper = "Lopez-Paz and Ranzato, NeurIPS 2017; Quinton and Rey, 2024"
    year = 2017
    sees = "gram"

    def __init__(self, *, head_gradients: str = "raw") -> None:
        super().__init__(head_gradients=head_gradients)

    def _rule(self, view: View) -> Tensor:
        return dualproj_weights(view.gram, view.eps)
