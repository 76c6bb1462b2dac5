"""IMTL: impartial multi-task learning, by gradients (IMTL-G), by losses (IMTL-L), and both.

Liu, Li, Kuang, Xue, Chen, Yang, Liao, Zhang: "Towards Impartial Multi-task Learning", ICLR 2021.

IMTL-G (section 3.1) wants the step ``d = sum_k alpha_k g_k``, ``sum_k alpha_k = 1``, to have the
same projection on every task's unit gradient ``u_k = g_k / n_k``. The paper's closed form inverts a
(K-1, K-1) matrix of differences; with the cosine matrix ``C = U U^T`` the same weights are

    x = C^-1 1,     v_k = x_k / n_k,     alpha = v / sum_k v_k,

which needs the Gram matrix alone and treats no task as the first.

IMTL-L (section 3.2) learns one log scale s_k per task by minimising ``e^{s_k} L_k - s_k``
(equation 8 with a = e, b = 1), whose minimum is where every scaled loss ``e^{s_k} L_k`` is one.

IMTL (Algorithm 1) scales the losses by IMTL-L and weighs the scaled gradients by IMTL-G.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View
from ..solvers import equal_projection_weights


def imtl_g_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights of IMTL-G: equal projections on the unit gradients, sum one.

    Args:
        gram: Gram matrix (K, K).
        eps: eigenvalues of the cosine matrix below ``K * eps`` count as zero.

    Returns:
        float64 tensor (K,), with the defined answers of `solvers.equal_projection_weights`.
    """
    return equal_projection_weights(gram, eps)


class IMTLG(Method):
    """IMTL-G: equal projections on all task gradients.

    Without ``features`` the gradients are those of the shared parameters (the paper's "exact"
    row); with ``features`` those of the shared representation (the paper's default).

    Args:
        head_gradients: "raw" (default, Algorithm 1) or "weighted" (the prose of section 3.1 and
            the code of Nash-MTL; a negative weight then makes a head ascend).

    Deviations: the guards of `solvers.equal_projection_weights`, where the paper's formula is
    undefined or ascends. A step whose sign was kept shows as weights that sum to -1. There is no
    official code.
    """

    name = "imtl_g"
    title = "IMTL-G"
    paper = "Liu et al., ICLR 2021"
    year = 2021
    sees = "gram"

    def __init__(self, *, head_gradients: str = "raw") -> None:
        super().__init__(head_gradients=head_gradients)

    def _rule(self, view: View) -> Tensor:
        return imtl_g_weights(view.gram, view.eps)


def imtl_l_step(scales: Tensor, losses: Tensor, lr: float, bound: float) -> Tensor:
    """One gradient step on the log scales: ``s_k - lr * (e^{s_k} L_k - 1)``, within +-bound."""
    return (scales - lr * (scales.exp() * losses - 1)).clamp(-bound, bound)


class IMTLL(Method):
    """IMTL-L: losses scaled by learnt factors ``e^{s_k}``, pushed towards ``e^{s_k} L_k = 1``.

    Each step weighs by the current scales and then moves them, as Algorithm 1 does.

    Args:
        lr: step size of the log scales, positive. The paper uses the model's; it is a setting of
            its own here, since `backward` does not see the optimiser, and plain gradient descent.
        init: initial s_k; 0 starts from the plain sum. Not stated in the paper.
        bound: s_k stays within +-bound. Not in the paper, where a loss at or below zero drives
            s_k to infinity.
        head_gradients: "weighted" (default, equation 8) or "raw".

    The weights do not sum to one: their scale is the method's own result.
    """

    name = "imtl_l"
    title = "IMTL-L"
    paper = "Liu et al., ICLR 2021"
    year = 2021
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "K"
    state = "K log scales"

    def __init__(
        self,
        lr: float = 0.01,
        init: float = 0.0,
        bound: float = 10.0,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not lr > 0 or not bound > 0 or not abs(init) <= bound:
            raise ValueError(
                f"{self.name}: expected lr > 0, bound > 0 and |init| <= bound, got lr={lr}, "
                f"init={init}, bound={bound}"
            )
        self.lr = lr
        self.init = init
        self.bound = bound

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        return {
            "log_scales": torch.full(
                (view.n_tasks,), float(self.init), dtype=torch.float64, device=view.device
            )
        }

    def _advance(self, view: View) -> Tensor:
        """Factors e^{s_k} (n,) of this step; moves s_k of the present tasks for the next one."""
        before = self._state["log_scales"]
        at = view.index
        now = before[at]
        moved = imtl_l_step(now, view.losses, self.lr, self.bound)
        self._state = {"log_scales": before.index_copy(0, at, moved)}
        return now.exp()

    def _rule(self, view: View) -> Tensor:
        return self._advance(view)


class IMTL(IMTLL):
    """IMTL, the hybrid of Algorithm 1: IMTL-G on the gradients of the losses scaled by IMTL-L.

    The shared step is ``sum_k alpha_k e^{s_k} g_k`` with IMTL-G's alpha of the scaled gradients;
    head k receives ``e^{s_k} dL_k/dphi_k``, without alpha, and so does s_k.

    Args:
        lr, init, bound: as in `IMTLL`.
        head_gradients: "weighted" (default: by ``e^{s_k}``, Algorithm 1) or "raw".

    `weights` and `Info.weights` are ``alpha_k e^{s_k}``, the factors of the raw gradients. Without
    ``losses``, `weights` and `direction` use the scales as they are and leave them so.
    """

    name = "imtl"
    title = "IMTL"
    family = "gradient"
    sees = "gram"
    passes = "K"
    memory = "K x P"

    def _rule(self, view: View) -> Tensor:
        if view.has_losses:
            factors = self._advance(view)
        else:
            factors = self._state["log_scales"][view.index].exp()
        self._factors = factors
        return factors * imtl_g_weights(view.gram * factors * factors[:, None], view.eps)

    def _head_weights(self, weights: Tensor | None) -> Tensor | None:
        return None if self.head_gradients == "raw" else self._factors
