"""SDMGrad: the min-norm point, drawn towards the mean gradient.

Xiao, Ban, Ji: "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
Algorithms", NeurIPS 2023, arXiv:2305.18409.

With the mean gradient g_0 and ``g_w = sum_k w_k g_k``,

    w = argmin |g_w + lam g_0|^2  over the simplex,     d = (g_w + lam g_0) / (1 + lam).

lam = 0 is MGDA, lam -> infinity the mean gradient. Since the weights sum to one, ``g_w + lam g_0``
is the min-norm point of the hull of the shifted gradients ``g_k + lam g_0``, whose Gram matrix is
``M G M'`` with ``M = I + lam/K 1 1'``. Where MGDA's weights are all at least
``lam / (K (1 + lam))``, the step is MGDA's.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View
from ..solvers import min_norm_weights


def sdmgrad_weights(gram: Tensor, lam: float = 0.3, eps: float = 1e-14) -> Tensor:
    """Weights ``(w + lam / K) / (1 + lam)`` of SDMGrad.

    Args:
        gram: Gram matrix (K, K).
        lam: pull of the mean gradient, 0 or more.
        eps: relative rounding error of the entries of `gram`.

    Returns:
        float64 tensor (K,), sum one, each at least ``lam / (K (1 + lam))``. A zero gradient takes
        part like any other; the step is zero only where those bounds allow it.
    """
    gram = gram.double()
    k = len(gram)
    shift = torch.eye(k, dtype=gram.dtype, device=gram.device) + lam / k
    return (min_norm_weights(shift @ gram @ shift.T, eps) + lam / k) / (1 + lam)


class SDMGrad(Method):
    """SDMGrad with the exact weights of one batch.

    Args:
        lam: pull of the mean gradient, 0 or more; 0.3 (default) is what the official runs use
            (0.6 is the default of the official class).
        head_gradients: "raw" (default) or "weighted".

    The weights sum to one.

    Where the paper and the official code differ, and what is done here:

    * The paper draws three batches per step: two for an unbiased estimate of G, one for d. Here:
      one batch for both, so that a step costs K passes and not 3 K; the bias is that of MGDA.
    * The paper moves w by stochastic gradient steps and keeps it between steps. Here: w is the
      minimum for the current G, and there is no state.
    * The official code makes 20 such steps of size 10, which end at vertices of the simplex on
      small examples; one of its repositories fills all three batches with the last one. Here: an
      exact solver.
    """

    name = "sdmgrad"
    title = "SDMGrad"
    paper = "Xiao et al., NeurIPS 2023"
    year = 2023
    sees = "gram"

    def __init__(self, lam: float = 0.3, *, head_gradients: str = "raw") -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= lam < float("inf"):
            raise ValueError(f"sdmgrad: expected a finite lam >= 0, got {lam}")
        self.lam = lam

    def _rule(self, view: View) -> Tensor:
        return sdmgrad_weights(view.gram, self.lam, view.eps)
