"""CAGrad: help the worst task as much as a ball around the mean gradient allows.

Liu, Liu, Jin, Stone, Liu: "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS
2021, arXiv:2110.14048.

With the mean gradient g_0 and c in [0, 1),

    d = argmax_d min_k g_k . d    subject to    |d - g_0| <= c |g_0|.

The dual problem is one over the simplex, with ``g_w = sum_k w_k g_k``:

    w* = argmin_w F(w),  F(w) = g_w . g_0 + c |g_0| |g_w|,     d = g_0 + c |g_0| g_w* / |g_w*|,

and both have the same value: ``min_k g_k . d = F(w*)``. c = 0 is the mean gradient, c -> infinity
MGDA's direction. F is flat near its minimum, so a solver that watches F alone leaves errors of 1e-5
in d; `solvers.max_min_weights` finds the active set instead.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

from torch import Tensor

from ..gradients import Method, View
from ..solvers import max_min_weights

RESCALES = ("none", "1+c^2", "1+c")


def cagrad_weights(
    gram: Tensor, c: float = 0.4, rescale: str = "none", eps: float = 1e-14
) -> Tensor:
    """Weights ``1/K + c |g_0| / |g_w*| w*`` of CAGrad.

    Args:
        gram: Gram matrix (K, K).
        c: radius of the ball over |g_0|, 0 or more.
        rescale: what d is divided by: "none", "1+c^2" or "1+c".
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,), each at least 1/K before rescaling, with a defined answer wherever
        ``g_w* = 0`` leaves the formula without one:

        * the maximum is 0 (Pareto stationary gradients, a zero gradient among them): of the many
          maximisers the one nearest to g_0, which is g_0 projected on ``{d : g_k . d >= 0}``;
        * g_0 = 0: 1/K each, the step is zero;
        * one task: ``(1 + c) g_1``, as the formula says, or g_1 itself with a rescale.
    """
    if len(gram) == 1 and rescale != "none":
        return gram.new_ones(1).double()
    divisor = {"none": 1.0, "1+c^2": 1 + c**2, "1+c": 1 + c}[rescale]
    return max_min_weights(gram, c, eps) / divisor


class CAGrad(Method):
    """CAGrad.

    Args:
        c: radius of the ball over |g_0|, 0 or more; 0.4 is the paper's for NYUv2. Below one the
            fixed points are those of the mean loss, from one on all Pareto stationary points.
        rescale: "none" (default, the paper), "1+c^2" (the official trainers) or "1+c" (the
            official "fast" variant): what d is divided by.
        head_gradients: "raw" (default, as in the official code) or "weighted".

    The weights are the paper's own: they sum to between 1 and ``1 + c |g_0| / |g_w*|``.

    Where the official code (Cranial-XIX/CAGrad) differs, and what is done here:

    * It minimises F by SLSQP, a bounded scalar search or 20 gradient steps, with 1e-8 under the
      roots: d is off by 1e-6 to 1e-2. Here: the active set, exact.
    * Where g_w* = 0 its step beyond g_0 is rounding noise of length c |g_0|. Here: the maximiser
      nearest to g_0.
    * Its sub-sampling of tasks is left out.
    """

    name = "cagrad"
    title = "CAGrad"
    paper = "Liu et al., NeurIPS 2021"
    year = 2021
    sees = "gram"
    syncs = True  # the solver's iterations depend on the values; it runs on the host

    def __init__(
        self, c: float = 0.4, rescale: str = "none", *, head_gradients: str = "raw"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= c < float("inf"):
            raise ValueError(f"cagrad: expected a finite c >= 0, got {c}")
        if rescale not in RESCALES:
            raise ValueError(f"cagrad: expected rescale {', '.join(RESCALES)}, got {rescale!r}")
        self.c = c
        self.rescale = rescale

    def _rule(self, view: View) -> Tensor:
        return cagrad_weights(view.gram.cpu(), self.c, self.rescale, view.eps).to(view.device)
